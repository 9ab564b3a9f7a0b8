"""check_shards.py on sets with one fault each, and what make_shards.py learned from them."""

import gzip
import json
import os
import shutil
import subprocess
import sys

import check_shards
import make_shards
import numpy as np
import pytest
from conftest import CONFORMANCE, ROOT, train_tokenizer, write_jsonl, write_shard

VAL = "fineweb_val_000000.bin"
TRAIN = "fineweb_train_000000.bin"
NEXT = "fineweb_train_000001.bin"
TEXTS = [f"Chapter {n}: the Café of ZÜRICH and its {n} guests, {'äöü ' * n}" for n in range(30)]


def make_set(source, out, *options):
    """Exit status of make_shards.py."""
    command = ["--input", source, "--out", out, "--val-docs", 5, *options]
    return make_shards.main([str(argument) for argument in command])


# --- check_shards.py ------------------------------------------------------------------------------


FAULTS = {
    "missing shards": lambda f: (f / TRAIN).rename(f / NEXT),
    "equal files": lambda f: shutil.copy(f / TRAIN, f / NEXT),
    "training on validation": lambda f: write_shard(
        f / NEXT, np.append(np.fromfile(f / VAL, "<u2", offset=1024), [1, 5])
    ),
    "ids": lambda f: write_shard(f / NEXT, [1, 5, 1024]),
    "BOS": lambda f: write_shard(f / NEXT, [5, 6]),
    "round trip": lambda f: train_tokenizer(
        f / "tokenizer.model", (ROOT / "train_gpt.py").open(), vocab_size=1024
    ),
    "manifest": lambda f: (f / "manifest.json").write_text('{"files": {"x": {"sha256": "0"}}}'),
}


@pytest.mark.parametrize("subject", FAULTS)
def test_a_fault_is_the_only_thing_wrong(subject, tmp_path, capsys):
    folder = shutil.copytree(CONFORMANCE, tmp_path / "set")
    (folder / "fineweb_val_bytes_000000.bin").touch()
    assert check_shards.main([str(folder)]) == 0
    assert "note   other files             fineweb_val_bytes" in capsys.readouterr().out
    FAULTS[subject](folder)
    assert check_shards.main([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line[7:31].strip() for line in lines if line.startswith("WRONG")] == [subject]


# --- make_shards.py -------------------------------------------------------------------------------


def test_a_folder_gives_the_set_of_one_file_without_doubles(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text(TEXTS[0])
    (folder / "deep" / "b.md").write_text(TEXTS[1] + "\n")
    lines = write_jsonl(tmp_path / "c.jsonl", [TEXTS[0], *TEXTS[2:]], "body").read_bytes()
    for name in ("c.jsonl.gz", "d.jsonl.gz"):
        (folder / "deep" / name).write_bytes(gzip.compress(lines.strip()))
    one = write_jsonl(tmp_path / "one.jsonl", TEXTS)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert make_set(one, tmp_path / "one", "--vocab-size", 330) == 0
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert make_set(folder, tmp_path / "set", "--text-key", "body", "--vocab-size", 330) == 0
    for name in (VAL, TRAIN, "tokenizer.model"):
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    out, err = capsys.readouterr()
    assert f"{tmp_path / 'set'}: complete in" in out
    assert "dropped 30 exact doubles" in out
    assert "encoding train" in err
    assert check_shards.main([str(tmp_path / "set")]) == 0


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nmt_nfkc_cf"])
def test_folded_case_shows_in_the_text_and_a_dummy_prefix_is_no_byte(rule, tmp_path, capsys):
    jsonl = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    options = {"vocab_size": 330, "add_dummy_prefix": True, "normalization_rule_name": rule}
    model = train_tokenizer(tmp_path / "a.model", TEXTS, **options)
    assert make_set(jsonl, tmp_path / "set", "--tokenizer", model) == 0
    warning = capsys.readouterr().err
    assert ("loses text" in warning and "'Chapter'" in warning) == (rule == "nmt_nfkc_cf")
    splits = json.loads((tmp_path / "set" / "manifest.json").read_text())["splits"]
    spelled = sum(len(text.strip().encode()) for text in TEXTS)
    assert sum(split["decoded_bytes"] for split in splits.values()) == spelled


# --- The Makefile ---------------------------------------------------------


def test_an_old_python_is_refused_before_it_makes_an_environment(tmp_path):
    python = tmp_path / "python"
    old = "import sys; sys.version_info = (3, 10, 4); exec(sys.argv[1])"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{old}' \"$2\"\n")
    python.chmod(0o755)
    command = ["make", "demo", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "found Python 3.10; expected 3.11 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()
