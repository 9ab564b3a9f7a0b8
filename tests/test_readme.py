"""The README cannot disagree with the program."""

import dataclasses
import re

import torch
from conftest import CONFORMANCE, ROOT
from test_fork import FORKS

import train_gpt as tg


def shown(value):
    return f"{value:g}" if isinstance(value, float) else tg.spell(value)


def settings_table():
    """The lines that README.md must hold between its two marks."""
    for spec in dataclasses.fields(tg.Config):
        cells = [f"`{spec.name.upper()}`", shown(spec.default)]
        for preset in ("gpu", "cpu"):
            given = tg.PRESETS[preset]
            cells.append(shown(given[spec.name]) if spec.name in given else "")
        cells.append(spec.metadata["help"])
        yield f"| {' | '.join(cells)} |"


def test_settings_table_is_the_program_s():
    text = (ROOT / "README.md").read_text()
    table = text.split("<!-- settings -->\n")[1].split("<!-- end of settings -->")[0]
    assert table.splitlines()[2:] == list(settings_table())


def test_every_setting_that_is_named_exists():
    """Names in capitals with an underscore are settings, but for a few of other programs."""
    text = (ROOT / "README.md").read_text()
    names = set(re.findall(r"\b[A-Z]+[A-Z0-9]*(?:_[A-Z0-9]+)+\b", text))
    settings = {spec.name.upper() for spec in dataclasses.fields(tg.Config)}
    assert names - settings <= {"TTT_LORA_RNK"}  # an example of a mistake


def test_every_file_named_exists():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"`((?:data|records|benchmarks|tests|[.]ci)/[\w./-]*)`", text)
    assert len(named) > 5
    for name in (*named, "Makefile", "LICENSE", "requirements.txt", "requirements-dev.txt"):
        assert (ROOT / name).exists(), name


def test_every_picture_is_there():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert pictures
    for path in pictures:
        assert (ROOT / path).read_bytes().startswith(b"\x89PNG")


def test_the_notebook_s_lines_load_a_model():
    text = (ROOT / "README.md").read_text()
    code = re.search(r"^```python\n(import train_gpt\n.*?)```", text, re.M | re.S)[1]
    artifact = CONFORMANCE / "final_model.int8.ptz"
    scope = {}
    exec(code.replace("final_model.int8.ptz", str(artifact)), scope)
    assert scope["model"](torch.ones(1, 3, dtype=torch.int64)).shape == (1, 3, 1024)


def test_the_fork_is_one_that_is_tested():
    text = (ROOT / "README.md").read_text()
    for line in FORKS["activation"][0]:
        assert f"\n{line.rstrip()}" in text
