"""The README cannot disagree with the program."""

import dataclasses
import re

from conftest import ROOT

import train_gpt as tg


def shown(value):
    return f"{value:g}" if isinstance(value, float) else tg.spell(value)


def test_settings_table_is_the_program_s():
    text = (ROOT / "README.md").read_text()
    table = (
        text.split("<!-- settings -->\n")[1].split("<!-- end of settings -->")[0].splitlines()[2:]
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    cpu = tg.PRESETS["cpu"]
    assert rows == [
        [
            f"`{f.name.upper()}`",
            shown(f.default),
            shown(cpu[f.name]) if f.name in cpu else "",
            f.metadata["unit"],
        ]
        for f in dataclasses.fields(tg.Config)
    ]


def test_every_file_named_in_the_map_exists():
    for name in (
        "train_gpt.py",
        "data/README.md",
        "records/README.md",
        "records/NOTES.md",
        "benchmarks/README.md",
        "tests/conformance",
        "Makefile",
        ".ci/run",
        "requirements.txt",
        "requirements-dev.txt",
        "LICENSE",
    ):
        assert (ROOT / name).exists(), name


def test_every_picture_is_there():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert pictures and all((ROOT / path).read_bytes().startswith(b"\x89PNG") for path in pictures)
