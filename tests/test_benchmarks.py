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
from bench_tools import Bench
from conftest import CONFORMANCE, CPU, tiny_config, tiny_table
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as tg

ARTIFACT = CONFORMANCE / "final_model.int8.ptz"


def table_rows(text):
    """The cells of every row of a Markdown table in `text`, its head included."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# ==== invariance.py ===============================================================================


def test_shuffled_documents_are_the_same_documents(tmp_path):
    texts = []
    predictions = []
    for shuffled in (False, True):
        folder = tmp_path / str(shuffled)
        invariance.write_documents(CONFORMANCE, folder, 9, shuffled)
        stream = tg.open_shard(folder / "fineweb_val_000000.bin")
        parts = np.split(stream, np.flatnonzero(stream == 1))[1:]
        texts.append([part.tolist() for part in parts])
        docs = tg.split_documents(stream, 1, 0, tiny_table(1024), CPU)
        predictions.append(docs.predictions.tolist())
    assert len(texts[0]) == 10
    assert texts[0] != texts[1]
    assert sorted(texts[0]) == sorted(texts[1])
    assert predictions[0] != predictions[1]
    assert sorted(predictions[0]) == sorted(predictions[1])


@pytest.mark.parametrize(
    ("names", "promised", "status"),
    [
        (["1 rank, batch 7", "1 rank, batch 64, documents shuffled"], 1e-6, 0),
        (["1 rank, batch 7"], -1.0, 1),
    ],
)
def test_invariance_prints_spreads_and_judges_them(monkeypatch, capsys, names, promised, status):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(invariance, "RUNS", {name: invariance.RUNS[name] for name in names})
    monkeypatch.setattr(invariance, "PROMISED", {"float32": promised})
    arguments = ["--artifact", str(ARTIFACT), "--data", str(CONFORMANCE), "--docs", "2"]
    monkeypatch.setattr(sys, "argv", ["invariance.py", *arguments])
    assert invariance.main() == status
    _, *rows = table_rows(capsys.readouterr().out)
    assert [row[0] for row in rows] == [*names, "**spread**"]
    for row in rows[:-1]:
        ttt = float(row[2])
        stream = float(row[4])
        assert 1.5 < stream < ttt < 3  # the stream gains more
        assert ttt > 2


# ==== ttt_eval.py =================================================================================


@pytest.fixture(scope="module")
def bench():
    """The conformance artifact and its first two documents, as the benchmark loads them."""
    return Bench.load(ARTIFACT, CONFORMANCE, 2)


def test_the_naive_baseline_is_the_same_recipe(bench):
    """It scores what ours scores, at the price of positions that nobody needs."""
    with ttt_eval.counting_positions(bench.model) as naive_positions:
        naive = ttt_eval.evaluate(bench, "naive")
    with ttt_eval.counting_positions(bench.model) as our_positions:
        ours = ttt_eval.evaluate(bench, "ttt")
    assert naive.bpb == pytest.approx(ours.bpb, abs=5e-4)
    stride = ttt_eval.evaluate(bench, "stride")
    assert abs(naive.bpb - stride.bpb) > 5e-3  # which learning tells apart
    needed = ttt_eval.needed_positions(bench.condition("ttt"), bench.docs.predictions).sum()
    assert needed <= sum(our_positions) <= 1.05 * needed < sum(naive_positions)


def test_needed_positions_are_the_inputs_of_all_windows():
    how = tg.Condition(chunk=8, window=24, batch=1)
    predictions = np.array([3, 8, 20, 43])
    growing = 8 + 16 + 24
    expected = [3, 8, 8 + 16 + 20, growing + 24 + 24 + 24]
    assert ttt_eval.needed_positions(how, predictions).tolist() == expected
    stream = replace(how, stream=True)
    assert ttt_eval.needed_positions(stream, predictions).tolist() == predictions.tolist()


def test_costs_are_printed_for_every_variant(bench, capsys):
    ttt_eval.compare(bench, 1)
    _, *rows = table_rows(capsys.readouterr().out)
    assert [row[0] for row in rows] == list(ttt_eval.VARIANTS)
    naive, stride, ttt, stream = rows
    assert float(naive[4].rstrip("x")) == 1
    assert float(stride[2]) == 0
    assert float(ttt[2]) == 1
    assert float(stream[2]) > 1
    weights = sum(p.numel() for p in bench.model.parameters() if p.ndim == 2)
    for name, *_, spare, flops, rate, _, memory, operations in rows:
        how = bench.condition("ttt" if name == "naive" else name)
        needed = ttt_eval.needed_positions(how, bench.docs.predictions).sum()
        assert float(spare) >= 1, name
        forward = 2 * weights * needed * float(spare)
        assert 0.9 * forward < float(flops) * 1e12 + 5e9, name
        assert float(rate) > 0, name
        assert float(memory) > 100, name
        assert float(operations) > 100, name


def test_synthetic_documents_have_the_lengths_asked_for(bench):
    docs = ttt_eval.synthetic(bench.docs, [9000, 10, 700])
    assert docs.predictions.tolist() == [9000, 10, 700]
    assert docs.starts.tolist() == [0, 9000, 9010]
    assert len(docs.tokens) == 9711
    assert len(docs.bytes) == 9710
    assert docs.tokens[len(bench.docs.tokens) - 1] == bench.docs.tokens[0]


def test_every_setting_of_the_frontier_is_another(bench):
    conditions = [replace(how, final="") for how in ttt_eval.settings(bench).values()]
    assert len(conditions) > 10
    assert all(a != b for a, b in itertools.combinations(conditions, 2))


def test_the_frontier_is_drawn(bench, capsys, tmp_path, monkeypatch):
    rungs = {name: bench.condition(name) for name in ttt_eval.RUNGS}
    monkeypatch.setattr(ttt_eval, "settings", lambda bench: rungs)
    picture = tmp_path / "frontier.png"
    ttt_eval.frontier(bench, picture)
    assert picture.stat().st_size > 5000
    _, *rows = table_rows(capsys.readouterr().out)
    assert [row[0] for row in rows] == list(rungs)
    for row in rows[1:]:
        low, high = (float(bound) for bound in row[3].split(" to "))
        assert low < float(row[2]) < high
    assert rows[1][4] == "1.00"


def test_scaling_is_printed(bench, capsys):
    ttt_eval.scaling(bench, 3000, (1000, 2000), (2, 4, 8))
    text = capsys.readouterr().out
    rows = table_rows(text)
    assert [row[:3] for row in rows[1:3]] == [["1000", "3", "3000"], ["2000", "2", "3000"]]
    assert [row[0] for row in rows[4:]] == ["2", "4", "8"]
    assert text.splitlines()[-1].startswith("correlation of predictions and seconds: ")


# ==== checkpoint.py ===============================================================================


def test_checkpoints_are_measured():
    cost = checkpoint.measure("cpu", CONFORMANCE, repeats=1)
    embedding = 1024 * 192
    matrices = 4 * 192 * (192 * 2 + 64 * 2 + 2 * 384)
    # An embedding in bf16 with two moments, matrices in fp32 with one.
    needed = 6 * embedding + 8 * matrices
    assert needed < cost.size < 1.1 * needed
    assert cost.save > 0
    assert cost.step > 0


# ==== rate_distortion.py ==========================================================================


def test_rate_distortion_compares_at_equal_bytes(capsys, tmp_path, monkeypatch):
    """On the published artifact's weights, which its own quantiser has coarsened already."""
    monkeypatch.setattr(rate_distortion, "FLOORS", (8, 12))
    rows = rate_distortion.compare(Bench.load(ARTIFACT, CONFORMANCE, 3))
    expected = list(itertools.product(("as it is", "of every matrix"), (8, 12)))
    assert [(row.variant, row.floor) for row in rows] == expected
    for row in rows:
        assert 20_000 < row.size < 800_000
        assert row.theirs > 0.002
        assert row.ours < row.theirs / 3
    _, *printed = table_rows(capsys.readouterr().out)
    assert [cells[2] for cells in printed] == [str(row.size) for row in rows]
    rate_distortion.draw({"one": rows, "other": rows}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_quantisation_is_timed(capsys):
    budget = len(tg.source_code().encode()) + 40_000
    cfg = tiny_config(data_path=str(CONFORMANCE), vocab_size=1024, artifact_budget=budget)
    rate_distortion.print_times(cfg, 1)
    _, theirs, ours, calibration = table_rows(capsys.readouterr().out)
    assert theirs[0].startswith("the record's:")
    assert ours[0].startswith("ours:")
    assert calibration[0].startswith("calibrate alone")
    assert int(theirs[2]) > 40_000 >= int(ours[2]) > 0.97 * 40_000


# ==== train_step.py ===============================================================================


def tiny_training(**settings):
    """Three layers of width 32 on the conformance shards.

    Gentle rates: at the record's, rounding shows within 40 steps.
    """
    gentle = dict(
        vocab_size=1024,
        data_path=str(CONFORMANCE),
        iterations=100,
        warmdown_iters=0,
        tied_embed_lr=0.01,
        matrix_lr=0.02,
        scalar_lr=0.01,
        train_batch_tokens=1024,
    )
    return tiny_config(**gentle | settings)


def test_both_loops_train_alike(rt, capsys):
    """40 steps of the recipe written plainly and of ours; an error in either parts them."""
    assert train_step.compare(tiny_training(), rt, 40, compiled=False) <= train_step.AGREEMENT
    text = capsys.readouterr().out
    assert text.splitlines()[-1].endswith("PASS")
    _, *rows = table_rows(text)
    assert [row[0] for row in rows] == ["plain, eager", "plain, fp32 NS, eager", "ours, eager"]
    for row in rows:
        assert all(float(cell.rstrip("%")) >= 0 for cell in row[1:])
    _, plain, ours = rows
    assert float(ours[8]) < float(plain[8])  # fewer operations
    assert float(ours[9]) < 6.9 < np.log(1024)  # something was learned


def test_trajectories_that_part_are_seen(rt, monkeypatch, capsys):
    monkeypatch.setattr(tg, "orthogonalize", lambda x, steps: -x)
    assert train_step.compare(tiny_training(), rt, 12, compiled=False) > train_step.AGREEMENT
    assert capsys.readouterr().out.splitlines()[-1].endswith("FAIL")


def test_model_flops_are_those_that_torch_counts(rt):
    """Beside torch's counter, which sees the masked half of attention as well.

    A row is one block of `causal_attention`, which computes that half.
    """
    cfg = tiny_training(train_seq_len=64, train_batch_tokens=64, grad_accum_steps=1)
    trainer = train_step.make_trainer(cfg, rt)
    with FlopCounterMode(display=False) as counter:
        trainer.forward(*trainer.stream.next_batch(cfg, rt)).sum().backward()
    masked = 6 * cfg.train_batch_tokens * cfg.num_layers * cfg.train_seq_len * cfg.model_dim
    assert counter.get_total_flops() == train_step.model_flops(cfg) + masked


def test_bytes_on_the_wire_are_those_of_two_all_reduces(capsys):
    """What the kernel counts at the sockets of two ranks is near the minimum for both loops."""
    cfg = tiny_training(dtype="float32")
    rows = train_step.wire(cfg, 2, 3)
    assert [row.name for row in rows] == ["plain", "ours"]
    matrices = 3 * 32 * (32 * 2 + 16 * 2 + 2 * 64)
    embedding = 1024 * 32
    vectors = 3 * (4 * 32 + 4) + 32
    least = 12 * matrices + 8 * (embedding + vectors)
    assert train_step.least_bytes(cfg, 2) == least
    for row in rows:
        assert least <= row.count <= 1.02 * least + 4000
        assert row.equal
    assert capsys.readouterr().out.count("| yes |") == 2


def test_waiting_for_tokens_is_measured_across_a_switch_of_shards(rt, monkeypatch):
    seen = []
    read = tg.TokenStream.read

    def watched_read(self, start, count):
        seen.append((start, start + count))
        return read(self, start, count)

    monkeypatch.setattr(tg.TokenStream, "read", watched_read)
    found = train_step.waits(tiny_training(), rt, 20, tokens=100_000)
    assert len(found) == 2
    for times in found.values():
        assert len(times) == 20
        assert 0 < min(times) <= max(times) < 1000
    switched = seen[len(seen) // 2 :]
    assert any(start < 100_000 < end for start, end in switched)
