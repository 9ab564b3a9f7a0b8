"""The benchmarks run, and say no where a promise is broken."""

import itertools
import sys
from dataclasses import replace

import checkpoint
import invariance
import numpy as np
import pytest
import rate_distortion
import ttt_eval
from conftest import CONFORMANCE, CPU, tiny_config, tiny_table

import train_gpt as tg


def test_shuffled_documents_are_the_same_documents(tmp_path):
    streams = []
    for shuffled in (False, True):
        invariance.write_documents(CONFORMANCE, tmp_path / str(shuffled), 9, shuffled)
        streams.append(tg.open_shard(tmp_path / str(shuffled) / "fineweb_val_000000.bin"))
    texts = [[part.tolist() for part in np.split(s, np.flatnonzero(s == 1))[1:]] for s in streams]
    assert texts[0] != texts[1] and sorted(texts[0]) == sorted(texts[1]) and len(texts[0]) == 10
    docs = [tg.split_documents(s, 1, 0, tiny_table(1024), CPU) for s in streams]
    assert docs[0].predictions.tolist() != docs[1].predictions.tolist()
    assert sorted(docs[0].predictions) == sorted(docs[1].predictions)


@pytest.mark.parametrize(("promised", "status"), [(1e-6, 0), (-1.0, 1)])
def test_invariance_prints_spreads_and_judges_them(monkeypatch, capsys, promised, status):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs = dict(list(invariance.RUNS.items())[3:5] if status == 0 else list(invariance.RUNS.items())[3:4])
    monkeypatch.setattr(invariance, "RUNS", runs)
    monkeypatch.setattr(invariance, "PROMISED", {"float32": promised})
    artifact = str(CONFORMANCE / "final_model.int8.ptz")
    arguments = ["--artifact", artifact, "--data", str(CONFORMANCE), "--docs", "4"]
    monkeypatch.setattr(sys, "argv", ["invariance.py", *arguments])
    assert invariance.main() == status
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip("| ") for row in table] == [*runs, "**spread**"]
    assert all(2 < float(row[2]) < 3 for row in table[:-1])
    assert all(1.5 < float(row[4]) < float(row[2]) for row in table[:-1])  # the stream gains more


@pytest.fixture(scope="module")
def bench():
    """The conformance artifact and its first four documents, as the benchmark loads them."""
    return ttt_eval.Bench.load(CONFORMANCE / "final_model.int8.ptz", CONFORMANCE, 4)


def test_the_naive_baseline_is_the_same_recipe(bench):
    """It scores what ours scores, at the price of positions that nobody needs."""
    naive, ours = bench.evaluate("naive"), bench.evaluate("ttt")
    assert naive.bpb == pytest.approx(ours.bpb, abs=5e-4)
    assert abs(naive.bpb - bench.evaluate("stride").bpb) > 5e-3  # which learning tells apart
    needed = bench.condition("ttt").work(bench.docs.predictions).sum()
    assert ours.computed <= 1.05 * needed < naive.computed


def test_costs_are_printed_for_every_variant(bench, capsys):
    ttt_eval.compare(bench, 1)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    rows = [[cell.strip("| x%") for cell in row] for row in rows if len(row) == 11][1:]
    assert [row[0] for row in rows] == list(ttt_eval.VARIANTS)
    assert float(rows[1][2]) == 0 and float(rows[2][2]) == 1 and float(rows[0][4]) == 1
    for name, *_, flops, rate, _, memory, operations in rows:
        positions = bench.evaluate(name).computed
        forward = 2 * sum(p.numel() for p in bench.model.parameters() if p.ndim == 2) * positions
        assert 0.9 * forward < float(flops) * 1e12 + 5e9 and float(rate) > 0, name
        assert float(memory) > 100 and float(operations) > 100


def test_synthetic_documents_have_the_lengths_asked_for(bench):
    docs = ttt_eval.synthetic(bench.docs, [9000, 10, 700])
    assert docs.predictions.tolist() == [9000, 10, 700] and docs.starts.tolist() == [0, 9000, 9010]
    assert len(docs.tokens) == 9711 == len(docs.bytes) + 1
    assert docs.tokens[len(bench.docs.tokens) - 1] == bench.docs.tokens[0]


def test_scaling_and_frontier_run(bench, capsys, tmp_path, monkeypatch):
    conditions = ttt_eval.settings(bench)
    shapes = [replace(how, final="") for how in conditions.values()]
    assert all(a != b for a, b in itertools.combinations(shapes, 2))
    monkeypatch.setattr(ttt_eval, "settings", lambda bench: dict(list(conditions.items())[:3]))
    ttt_eval.frontier(bench, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 5000
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == ["stride", "ttt", "stream_fast"]
    for row in rows[1:]:
        low, high = (float(bound) for bound in row[3].split(" to "))
        assert low < float(row[2]) < high
    ttt_eval.scaling(bench, 3000, (1000, 2000), (2, 4, 8))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1:3] for line in lines[2:4]] == [["3", "3000"], ["2", "3000"]]
    assert lines[-1].startswith("correlation of predictions and seconds: ")


def test_checkpoints_are_measured():
    size, save, step = checkpoint.measure("cpu", CONFORMANCE, repeats=1)
    needed = 6 * 1024 * 192 + 8 * 4 * 192 * (192 * 2 + 64 * 2 + 2 * 384)  # bytes: bf16 with two moments, fp32 with one
    assert needed < size < 1.1 * needed and save > 0 and step > 0


def test_rate_distortion_compares_at_equal_bytes(capsys, tmp_path, monkeypatch):
    """On the published artifact's weights, which its own quantiser has coarsened already."""
    bench = ttt_eval.Bench.load(CONFORMANCE / "final_model.int8.ptz", CONFORMANCE, 6)
    monkeypatch.setattr(rate_distortion, "FLOORS", (8, 16))
    rows = rate_distortion.compare(bench)
    assert [(name, floor) for name, floor, *_ in rows] == [
        ("as it is", 8), ("as it is", 16), ("of every matrix", 8), ("of every matrix", 16)]  # fmt: skip
    for _, _, size, theirs, ours in rows:
        assert 20_000 < size < 800_000 and theirs > 0.002 and ours < theirs / 3
    table = capsys.readouterr().out.splitlines()[-len(rows) :]
    assert [line.split(" | ")[2] for line in table] == [str(size) for _, _, size, *_ in rows]
    rate_distortion.draw({"one": rows, "other": rows}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_quantisation_is_timed(capsys):
    cfg = replace(tiny_config(), data_path=str(CONFORMANCE), vocab_size=1024, artifact_budget=160_000)
    rate_distortion.timing(cfg, 1)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[0].split(":")[0] for row in rows] == ["the record's", "ours", "ours", "ours"]
    assert all(float(row[1]) >= 0 for row in rows)
