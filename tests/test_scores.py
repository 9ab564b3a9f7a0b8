"""The tools that read losses or a model: compare.py, sample.py, and files of scores."""

import math

import compare
import numpy as np
import pytest
import sample
import scores
import torch
from conftest import CONFORMANCE, tiny_condition, tiny_config, tiny_documents, tiny_model

import train_gpt as tg


@pytest.fixture
def model(rt):
    return tiny_model(tiny_config(), rt)


def test_both_files_of_scores_hold_the_same_rows(model, rt, tmp_path):
    """Of every condition. scores.py itself sums the losses of tokens, in pieces of one length."""
    docs = tiny_documents([2, 9, 20], lead=[5, 6, 7, 8])
    rungs = tg.ladder(docs, model, rt)
    found = {name: tg.evaluate(model, docs, how, rt) for name, how in rungs.items()}
    paths = [tmp_path / "a.csv", tmp_path / "a.npz"]
    for path in paths:
        tg.write_scores(path, found, docs, tg.RunLog())
    rows, same = [scores.read_rows(path, model.cfg.ttt_chunk_size) for path in paths]
    assert np.array_equal(rows, same)
    doc = rows[rows["condition"] == "doc"]
    assert doc["doc"].tolist() == [0, 1, 1, 2, 2, 2]
    assert doc["start"].tolist() == [0, 0, 8, 0, 8, 16]
    assert doc["tokens"].tolist() == [2, 8, 1, 8, 8, 3]
    # Whole rows of 32 of the stream, from its first token on.
    flat = rows[rows["condition"] == "flat"]
    assert flat["tokens"].tolist() == [4, 2, 8, 1, 8, 8, 1]
    with np.load(paths[1]) as arrays:
        assert arrays["predictions"].tolist() == docs.predictions.tolist()
    paths[1].write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.npz: found no \.npz.*; expected a file"):
        scores.read_rows(paths[1], 8)


def write_csv(path, documents):
    """A scores file of tokens, bytes and bits for each document."""
    lines = [",".join(name for name, _ in scores.COLUMNS)]
    for index, document in enumerate(documents.split(", ")):
        tokens, size, bits = document.split()
        nats = float(bits) * math.log(2)
        lines.append(f"ttt,{index},0,0,{tokens},{size},{nats}")
    path.write_text("\n".join(lines))
    return str(path)


A = "100 300 600, 600 2000 4200, 3000 9000 18000, 511 1500 3000"
B = "90 300 570, 500 2000 4000, 2900 9000 16200, 400 1500 3100"


def test_a_comparison_says_how_much_and_how_surely(tmp_path, capsys):
    a = write_csv(tmp_path / "a.csv", f"{A}, 9 30 60")
    b = write_csv(tmp_path / "b.csv", f"{B}, 9 31 60")  # cut: left out
    assert compare.main([f"{a}:ttt", b]) == 0
    table = capsys.readouterr().out.splitlines()[3:]
    # Document by document -30, -200, -1800 and +100 bits of 12,800 bytes.
    assert table[0].split()[:6] == ["all", "4", "12,800", "2.0156", "1.8648", "-0.1508"]
    without = np.array([-1900 / 12500, -1730 / 10800, -130 / 3800, -2030 / 11300])
    reach = 3.18245 * math.sqrt(3 / 4 * np.square(without - without.mean()).sum())
    middle = -1930 / 12800
    assert f" {middle - reach:+.4f} to {middle + reach:+.4f} " in table[0]
    counts = [row[:26].split() for row in table[1:4]]
    assert [row[-1] for row in counts] == ["2", "1", "1"]
    assert table[4].endswith("in full: 1")


def test_an_evaluation_equals_itself_and_no_other_text(tmp_path, capsys):
    a = write_csv(tmp_path / "a.csv", A)
    assert compare.main([a, a]) == 0
    assert "+0.0000 to +0.0000         1\n" in capsys.readouterr().out
    other = write_csv(tmp_path / "b.csv", B.replace("300", "301"))
    assert compare.main([a, other]) == 1
    assert "found document 0 of 301 bytes; expected 300, as in" in capsys.readouterr().err


def test_a_prompt_is_learned_from_and_continued(model, rt):
    how = tiny_condition(model.cfg, stream=True)
    ids = [1, *range(10, 30)]
    state = sample.read_prompt(model, ids, how, rt, learns=False)
    written = sample.continue_text(model, ids, state, 3, lambda logits: int(logits.argmax()))
    tokens = torch.tensor([ids + written])
    logits = model(tokens[:, :-1])[0, len(ids) - 1 :]
    assert written == logits.argmax(1).tolist()
    _, learned = sample.read_prompt(model, ids, how, rt, learns=True)
    prompt = torch.tensor([ids])
    before = model(prompt[:, :-1], prompt[:, 1:]).sum()
    after = model(prompt[:, :-1], prompt[:, 1:], adapters=learned).sum()
    assert after < before


def test_samples_repeat_with_their_seed(monkeypatch, capsys):
    monkeypatch.setenv("DATA_PATH", str(CONFORMANCE))
    model = str(CONFORMANCE / "final_model.int8.ptz")
    command = [model, "--prompt", "The functions take a path.", "--tokens", "30", "--seed"]
    texts = []
    for seed in "223":
        assert sample.main([*command, seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    plain, learned = texts[0].split("--- after learning from 9 tokens\n")
    assert plain.startswith("--- without learning\n") and learned not in plain
