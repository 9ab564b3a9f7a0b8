"""The benchmarks run, and say no where a promise is broken."""

import itertools
import sys
from dataclasses import replace

import checkpoint
import invariance
import numpy as np
import pytest
import rate_distortion
import train_step
import ttt_eval
from conftest import CONFORMANCE, CPU, tiny_config, tiny_table
from torch.utils.flop_counter import FlopCounterMode

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
    runs = dict(
        list(invariance.RUNS.items())[3:5] if status == 0 else list(invariance.RUNS.items())[3:4]
    )
    monkeypatch.setattr(invariance, "RUNS", runs)
    monkeypatch.setattr(invariance, "PROMISED", {"float32": promised})
    artifact = str(CONFORMANCE / "final_model.int8.ptz")
    arguments = ["--artifact", artifact, "--data", str(CONFORMANCE), "--docs", "2"]
    monkeypatch.setattr(sys, "argv", ["invariance.py", *arguments])
    assert invariance.main() == status
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip("| ") for row in table] == [*runs, "**spread**"]
    assert all(2 < float(row[2]) < 3 for row in table[:-1])
    assert all(1.5 < float(row[4]) < float(row[2]) for row in table[:-1])  # the stream gains more


@pytest.fixture(scope="module")
def bench():
    """The conformance artifact and its first two documents, as the benchmark loads them."""
    return ttt_eval.Bench.load(CONFORMANCE / "final_model.int8.ptz", CONFORMANCE, 2)


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
    needed = 6 * 1024 * 192 + 8 * 4 * 192 * (
        192 * 2 + 64 * 2 + 2 * 384
    )  # bytes: bf16 with two moments, fp32 with one
    assert needed < size < 1.1 * needed and save > 0 and step > 0


def test_rate_distortion_compares_at_equal_bytes(capsys, tmp_path, monkeypatch):
    """On the published artifact's weights, which its own quantiser has coarsened already."""
    bench = ttt_eval.Bench.load(CONFORMANCE / "final_model.int8.ptz", CONFORMANCE, 3)
    monkeypatch.setattr(rate_distortion, "FLOORS", (8, 12))
    rows = rate_distortion.compare(bench)
    assert [(name, floor) for name, floor, *_ in rows] == [
        ("as it is", 8),
        ("as it is", 12),
        ("of every matrix", 8),
        ("of every matrix", 12),
    ]
    for _, _, size, theirs, ours in rows:
        assert 20_000 < size < 800_000 and theirs > 0.002 and ours < theirs / 3
    table = capsys.readouterr().out.splitlines()[-len(rows) :]
    assert [line.split(" | ")[2] for line in table] == [str(size) for _, _, size, *_ in rows]
    rate_distortion.draw({"one": rows, "other": rows}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_quantisation_is_timed(capsys):
    budget = len(tg.source_code().encode()) + 40_000
    cfg = replace(
        tiny_config(), data_path=str(CONFORMANCE), vocab_size=1024, artifact_budget=budget
    )
    rate_distortion.timing(cfg, 1)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[0].split(":")[0] for row in rows] == [
        "the record's",
        "ours",
        "calibrate alone, least",
    ]
    assert int(rows[0][2]) > int(rows[1][2]) > 0.97 * 40_000


def tiny_training(**settings):
    """Three layers of width 32 on the conformance shards; rounding shows within 40 steps at the record's rates."""
    rates = dict(tied_embed_lr=0.01, matrix_lr=0.02, scalar_lr=0.01)
    base = tiny_config(
        vocab_size=1024, data_path=str(CONFORMANCE), iterations=100, warmdown_iters=0, **rates
    )
    return replace(base, **dict(train_batch_tokens=1024) | settings)


def test_both_loops_train_alike(rt, capsys):
    """40 steps of the recipe written plainly and of ours; an error in either parts the trajectories."""
    assert train_step.compare(tiny_training(), rt, 40, compiled=False) <= train_step.AGREEMENT
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip("| ") for cell in line.split(" | ")] for line in lines[3:-1]]
    assert [row[0] for row in rows] == ["plain, eager", "plain, fp32 NS, eager", "ours, eager"]
    assert all(float(cell.rstrip("%")) >= 0 for row in rows for cell in row[1:])
    assert float(rows[2][8]) < float(rows[1][8]) and lines[-1].endswith("PASS")  # fewer operations
    assert float(rows[2][9]) < 6.9 < np.log(1024)  # something was learned


def test_trajectories_that_part_are_seen(rt, monkeypatch, capsys):
    monkeypatch.setattr(tg, "orthogonalize", lambda x, steps: -x)
    assert train_step.compare(tiny_training(), rt, 12, compiled=False) > train_step.AGREEMENT
    assert capsys.readouterr().out.splitlines()[-1].endswith("FAIL")


def test_model_flops_are_those_that_torch_counts(rt):
    """Beside torch's counter, which sees the masked half of attention as well, so far as blocks compute it."""
    cfg = tiny_training(train_seq_len=64, train_batch_tokens=64, grad_accum_steps=1)
    trainer = train_step.make_trainer(cfg, rt)
    with FlopCounterMode(display=False) as counter:
        trainer.forward(*trainer.stream.next_batch(cfg, rt)).sum().backward()
    masked = 6 * cfg.train_batch_tokens * cfg.num_layers * cfg.train_seq_len * cfg.model_dim
    assert counter.get_total_flops() == train_step.model_flops(cfg) + masked


def test_bytes_on_the_wire_are_the_fewest(capsys):
    """What the kernel counts at the sockets of two ranks: ours near the minimum, the plain loop nearly twice."""
    rows = {
        name: (count, same)
        for name, count, _, same in train_step.wire(tiny_training(dtype="float32"), 2, 3)
    }
    ours, plain = train_step.least_bytes(tiny_training(), 2)
    assert ours <= rows["ours"][0] <= 1.02 * ours + 4000 and rows["plain"][0] >= plain > 1.3 * ours
    assert rows["ours"][1] and rows["plain"][1]
    assert capsys.readouterr().out.count("| yes |") == 2


def test_waiting_for_tokens_is_measured_across_a_switch_of_shards(rt, monkeypatch):
    seen = []
    read = tg.TokenStream.read
    monkeypatch.setattr(
        tg.TokenStream,
        "read",
        lambda self, start, n: seen.append((start, n)) or read(self, start, n),
    )
    found = train_step.waits(tiny_training(), rt, 20, tokens=100_000)
    assert len(found) == 2 and all(0 < median <= most < 1000 for median, most in found.values())
    assert any(start < 100_000 < start + n for start, n in seen[len(seen) // 2 :])
