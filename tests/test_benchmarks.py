"""The benchmarks run, and say no where a promise is broken."""

import sys
from unittest import mock

import checkpoint
import invariance
import mixtures
import numpy as np
import pytest
import rate_distortion
import train_step
import ttt_eval
from bench_tools import Bench, open_stream
from conftest import CONFORMANCE, tiny_config
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as tg

ARTIFACT = CONFORMANCE / "final_model.int8.ptz"


@pytest.fixture
def printed(capsys):
    """A function that returns what was printed, and the cells of its Markdown rows, heads left out."""

    def read():
        text = capsys.readouterr().out
        rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:2] == "| "]
        return text, rows[1:]

    return read


# ==== invariance.py ===============================================================================


@pytest.fixture(scope="module")
def bench():
    """The conformance artifact and its first two documents, as the benchmarks load them."""
    return Bench.load(ARTIFACT, CONFORMANCE, 2)


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


def test_shuffled_documents_are_the_same_documents(tmp_path):
    """Whole ones: the scores in the next test agree."""
    streams = []
    for shuffled in (False, True):
        folder = tmp_path / str(shuffled)
        invariance.write_documents(CONFORMANCE, folder, 9, shuffled)
        streams.append(tg.open_shard(folder / "fineweb_val_000000.bin").tolist())
    first, second = streams
    assert first != second and sorted(first) == sorted(second)
    assert first[0] == 1 and first.count(1) == 10  # a BOS for each and one at the end


def test_invariance_prints_spreads_and_judges_them(monkeypatch, printed):
    runs = dict([*invariance.RUNS.items()][3:5])  # other batches, documents shuffled
    monkeypatch.setattr(invariance, "RUNS", runs)
    monkeypatch.setattr(invariance, "PROMISED", {"float32": 1e-6})
    command = f"invariance.py --artifact {ARTIFACT} --data {CONFORMANCE} --docs 4"
    monkeypatch.setattr(sys, "argv", command.split())
    assert invariance.main() == 0
    _, rows = printed()
    for row in rows[:-1]:
        assert 1.5 < float(row[4]) < float(row[2]) < 3  # the stream gains more
    batch = "TTT_BATCH_SIZE"
    monkeypatch.setattr(invariance, "score", lambda env, ranks: [1.0, float(env[batch])])
    assert invariance.main() == 1


# ==== ttt_eval.py =================================================================================


def test_costs_are_printed_for_every_variant(bench, printed):
    """The naive way scores what ours scores, at the price of positions that nobody needs."""
    ttt_eval.compare(bench, 1)
    _, rows = printed()
    assert [row[0] for row in rows] == list(ttt_eval.VARIANTS)
    assert rows[0][4] == "1.0x"
    naive, stride, ttt, stream = (float(row[1]) for row in rows)
    assert naive == pytest.approx(ttt, abs=5e-4)
    assert stream < ttt < stride - 5e-3  # which learning tells apart
    assert [row[2] for row in rows[1:3]] == ["0.00", "1.00"]
    spares = [float(row[5]) for row in rows]
    assert min(spares) >= 1 and spares[2] <= 1.05 < spares[0]
    assert min(float(row[7]) for row in rows) > 0  # of useful GFLOP/s


def test_the_frontier_is_drawn(bench, printed, tmp_path, monkeypatch):
    every = ttt_eval.settings(bench)
    assert len(set(every.values())) == len(every) > 10
    rungs = {name: every[name] for name in ttt_eval.RUNGS}
    monkeypatch.setattr(ttt_eval, "settings", lambda bench: rungs)
    picture = tmp_path / "frontier.png"
    ttt_eval.frontier(bench, picture)
    assert picture.stat().st_size > 5000
    _, rows = printed()
    for _, _, gain, interval, *_ in rows[1:]:
        low, high = interval.split(" to ")
        assert float(low) < float(gain) < float(high)
    assert rows[1][4] == "1.00"


def test_scaling_is_printed(bench, printed):
    """Evaluation refuses documents whose lengths do not add up."""
    ttt_eval.scaling(bench, 3000, (1000, 2000), (1, 2, 3))
    text, rows = printed()
    assert [row[:3] for row in rows[:2]] == [["1000", "3", "3000"], ["2000", "2", "3000"]]
    assert "\ncorrelation of predictions and seconds: " in text


# ==== mixtures.py =================================================================================


def test_variants_are_compared_with_what_the_script_finds(bench, printed, monkeypatch):
    """The script's own scores, also under adapters that decay by 0."""
    monkeypatch.setattr(tg, "TAIL", 2**10)
    monkeypatch.setattr(tg, "find_rate", lambda loss_at: 0.004)
    monkeypatch.setattr(bench.model, "made_with", {})
    none = mixtures.Variant({}, weight_decay=0.0)
    monkeypatch.setitem(mixtures.VARIANTS, "weight decay 0", none)
    command = f"mixtures.py --artifact {ARTIFACT} --data {CONFORMANCE} --docs 2 --only"
    only = ["weight decay 0", "weight decay 1", "weights by place"]
    monkeypatch.setattr(sys, "argv", [*command.split(), *only])
    mixtures.main()
    _, (*rungs, default, same, decayed, placed) = printed()
    tg.calibrate(bench.model, open_stream(bench.model.cfg), 1, bench.rt, tg.RunLog(rank=1))
    scores = {}
    for name in ("stride", "stride+copy", "stream", "mix"):
        score = tg.evaluate(bench.model, bench.docs, bench.condition(name), bench.rt)
        scores[name] = f"{score.bpb:.4f}"
    assert [row[3] for row in rungs] == [scores["stride"], scores["stride+copy"]]
    assert default[2:4] == same[2:4] == [scores["stream"], scores["mix"]]
    assert decayed[2] != default[2] == placed[2] and placed[3] != default[3]
    match = mixtures.copy_by_place(bench.docs, 1024, bench.rt)[1]
    longer = bench.docs.starts[bench.docs.predictions.argmax()]
    classes = match[longer:].long() // tg.ORDERS
    assert classes[[0, 255, 256]].tolist() == [0, 0, 1]


# ==== checkpoint.py ===============================================================================


def test_checkpoints_are_measured():
    cost = checkpoint.measure("cpu", CONFORMANCE, repeats=1)
    embedding = 1024 * 192
    matrices = 4 * 192 * (192 * 2 + 64 * 2 + 2 * 384)
    # An embedding in bf16 with two moments, matrices in fp32 with one.
    needed = 6 * embedding + 8 * matrices
    assert needed < cost.size < 1.1 * needed


# ==== rate_distortion.py ==========================================================================


def test_rate_distortion_compares_at_equal_bytes(bench, tmp_path, monkeypatch):
    """On the published artifact's weights, which its own quantiser has coarsened already."""
    monkeypatch.setattr(rate_distortion, "FLOORS", (8,))
    found = rate_distortion.compare(bench)
    assert [row.variant for row in found] == ["as it is", "of every matrix"]
    for row in found:
        assert row.theirs > max(0.002, 3 * row.ours)
    picture = tmp_path / "curves.png"
    rate_distortion.draw({"one": found, "other": found}, picture)
    assert picture.stat().st_size > 5000


def test_quantisation_is_timed(printed):
    budget = len(tg.source_code()) + 40_000
    rate_distortion.print_times(tiny_training(artifact_budget=budget), 1)
    _, rows = printed()
    theirs, ours = (int(row[2]) for row in rows[:2])
    assert theirs > 40_000 >= ours > 0.97 * 40_000


# ==== train_step.py ===============================================================================


def test_both_loops_train_alike(rt, monkeypatch, printed):
    """20 steps of the recipe written plainly and of ours; an error in either parts them."""
    assert train_step.compare(tiny_training(), rt, 20, compiled=False) <= train_step.AGREEMENT
    text, rows = printed()
    assert text.endswith("PASS\n")
    _, plain, ours = rows
    assert float(ours[8]) < float(plain[8])  # fewer operations
    assert float(ours[9]) < 6.9 < np.log(1024)  # something was learned
    monkeypatch.setattr(tg, "orthogonalize", lambda x, steps: -x)
    assert train_step.compare(tiny_training(), rt, 8, compiled=False) > train_step.AGREEMENT
    assert printed()[0].endswith("FAIL\n")


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


def test_bytes_on_the_wire_are_those_of_two_all_reduces(printed):
    """What the kernel counts at the sockets of two ranks is near the minimum for both loops."""
    cfg = tiny_training(dtype="float32")
    found = train_step.wire(cfg, 2, 3)
    least = train_step.least_bytes(cfg, 2)
    for row in found:
        assert least <= row.count <= 1.02 * least + 4000
    _, rows = printed()
    assert [row[4] for row in rows] == ["yes", "yes"]


def test_waiting_for_tokens_is_measured_across_a_switch_of_shards(rt):
    read = tg.TokenStream.read
    with mock.patch.object(tg.TokenStream, "read", autospec=True, side_effect=read) as watched:
        found = train_step.waits(tiny_training(), rt, 4, tokens=100_000)
    assert [len(times) for times in found.values()] == [4, 4]
    starts = [call.args[1] for call in watched.mock_calls]
    assert starts[8] < 100_000 < starts[-1]
