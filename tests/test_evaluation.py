"""Which position is scored where, score before learning, and nothing leaks between documents."""

import functools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, tiny_condition, tiny_config, tiny_documents, tiny_model

import train_gpt as tg

C, W = 8, 24
LENGTHS = [25, 2, 47, 8, 3, 24, 10, 26, 9]  # around C and W, in no order


def score(model, docs, rt, **settings):
    """The score under chunks of C in windows of W; settings as in `tiny_condition`."""
    return tg.evaluate(model, docs, tiny_condition(model.cfg, **settings), rt)


def flat_score(model, docs, rt):
    how = tg.ladder(docs, model, rt)["flat"]
    return tg.evaluate(model, docs, how, rt)


def losses_of(model, docs, how, rt):
    """Losses (n - 1,) by position, each of which was scored once."""
    losses, times = tg.score_documents(model, docs, how, rt)
    assert (times == 1).all()
    return losses


# -- what is computed --------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [LENGTHS, [*range(2, 24), 100]])
@pytest.mark.parametrize("learn", [False, True])
def test_hardly_a_position_is_computed_in_vain(rt, lengths, learn):
    """Work against what the windows need, whatever the lengths."""
    docs = tiny_documents(lengths)
    model = tiny_model(tiny_config(), rt)
    counts = Counter()

    def count_ids(module, args):
        counts["ids"] += args[0].numel()
        if torch.is_grad_enabled():
            counts["lessons"] += len(args[0])

    def count_head(module, args):
        counts["head"] += args[0].shape[:2].numel()

    # Hooks are copied with the model.
    model.register_forward_pre_hook(count_ids)
    model.lm_head.register_forward_pre_hook(count_head)
    score(model, docs, rt, learn=learn)
    ends = [(end, n) for n in docs.predictions for end in range(C, n + C, C)]
    needed = sum(min(end, n, W) for end, n in ends)
    assert needed <= counts["ids"] <= 1.05 * needed
    assert counts["head"] <= C * len(ends)
    # A document's last chunk teaches nobody.
    assert counts["lessons"] == (len(ends) - len(lengths) if learn else 0)
    counts.clear()
    score(model, docs, rt, learn=learn, stream=True)
    assert counts["ids"] == C * len(ends)


def test_slots_finish_together():
    """One long document does not hold up the others, and no slot before a used one is empty."""
    chunks = np.array([1, 1, 50, 50, 1, 1, 1, 100, 1, 1])
    turns = tg.plan_slots(np.arange(10), chunks, 2)
    used = [len(documents) for documents, _ in turns]
    assert used == [2] * 103 + [1]


# -- against a document at a time --------------------------------------------------------------


def reference(model, docs, how, rt):
    """Losses by position, one document and one chunk at a time, with torch's Adam."""
    found = []
    stream = docs.tokens.long()
    loras = tg.NO_ADAPTERS
    cache = None
    for start, n in zip(docs.starts, docs.predictions, strict=True):
        if how.learner:
            fresh = tg.DocumentAdapters(model, how.learner, how.chunk, 1, rt)
            flat = fresh.start.clone()[None].requires_grad_()
            adam = torch.optim.Adam([flat], how.learner.lr, (0.9, 0.95), 1e-10)
        if how.stream:
            cache = tg.KVCache(1, how.window, 1, rt)
        for place in range(0, n, how.chunk):
            end = min(place + how.chunk, n)
            begin = max(0, end - how.window)
            if how.stream:  # what stands before the chunk is in the cache
                begin = place
                cache.chunk = end - place
                cache.advance(1)
            window = stream[start + begin : start + end + 1]
            ids = window[None, :-1]
            if how.learner:
                loras = fresh.unflatten(flat)
            losses = model(ids, window[None, 1:], None, loras, cache)[0]
            losses = losses[place - begin :]
            found.append(losses.detach())
            if how.learner:
                adam.zero_grad()
                losses.mean().backward()
                adam.step()
    return torch.cat(found)


@pytest.mark.parametrize(
    "settings",
    [
        {"learn": False},
        {"learn": False, "chunk": W, "batch": 2},
        {"learn": False, "chunk": 1, "window": 5},
        {},
        {"window": C, "batch": 64},
        {"stream": True},
        {"stream": True, "batch": 1},
    ],
)
def test_batched_evaluation_equals_one_document_at_a_time(rt, settings):
    cfg = tiny_config(ttt_lora_lr=0.02)
    model = tiny_model(cfg, rt)
    docs = tiny_documents(LENGTHS)
    how = tiny_condition(cfg, **settings)
    expected = reference(model, docs, how, rt)
    found = losses_of(model, docs, how, rt)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("world", [2, 16])
@pytest.mark.parametrize("evaluate", [score, flat_score, functools.partial(score, stream=True)])
def test_ranks_together_give_the_same_score(rt, world, evaluate):
    """The sums of every rank's share; 16 ranks are more than there are documents or rows."""
    model = tiny_model(tiny_config(), rt)
    docs = tiny_documents(LENGTHS)
    parts = []

    class Ranked(tg.Runtime):
        def sum(self, values):
            parts.append(values)
            return sum(parts) if len(parts) == world else values

        def gather(self, value):
            return [value] * world

    for rank in range(world - 1):
        with pytest.raises(tg.UserError, match="audit coverage"):  # a share alone is not the whole
            evaluate(model, docs, Ranked(CPU, rt.dtype, rank, world))
    together = evaluate(model, docs, Ranked(CPU, rt.dtype, world - 1, world))
    assert together.nats == pytest.approx(evaluate(model, docs, rt).nats, rel=1e-6)


# -- the law -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_no_score_sees_a_later_token_or_another_document(rt, stream):
    """Scores of the tokens that are kept are the same to the last bit, whatever else changes."""
    cfg = tiny_config(ttt_lora_lr=0.05)  # high enough for any leak to show
    model = tiny_model(cfg, rt)
    docs = tiny_documents(LENGTHS)
    how = tiny_condition(cfg, stream=stream)
    before = losses_of(model, docs, how, rt)
    offsets = np.arange(len(before)) - np.repeat(docs.starts, docs.predictions)
    cuts = (1, 2, 7, 8, 9, 20, 23, 25, 40)
    cases = [np.full(len(LENGTHS), cut) for cut in cuts]  # of each document the first so many
    cases += [
        np.where(np.array(LENGTHS) == n, n, 1) for n in LENGTHS
    ]  # one document, of others BOS
    for kept in cases:
        limits = np.repeat(kept, docs.predictions)
        changed = offsets >= limits
        tokens = docs.tokens.clone()
        other = (tokens + 13) % 92 + 4
        tokens[:-1][changed] = other[:-1][changed]
        after = losses_of(model, replace(docs, tokens=tokens), how, rt)
        early = offsets < limits - 1
        assert torch.equal(after[early], before[early])
        assert (after != before)[changed].all()


# -- streaming ---------------------------------------------------------------------------------


def banded_attention(q, k, v):
    """torch's own, where a query sees itself and W - 1 tokens before it."""
    times = torch.arange(q.size(2))
    age = times[:, None] - times
    seen = (age >= 0) & (age < W)
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)


@pytest.mark.parametrize(("chunk", "batch"), [(1, 64), (5, 1), (C, 3), (30, 3)])
def test_a_stream_that_learns_nothing_is_one_banded_pass(rt, monkeypatch, chunk, batch):
    """Whatever the chunk, and at a learning rate of zero, too."""
    model = tiny_model(tiny_config(train_seq_len=128), rt)
    docs = tiny_documents([*LENGTHS, 120])
    learner = tg.Learner(tg.TARGETS, 4, lr=0.0) if batch == 3 else None
    how = tg.Condition(chunk, W, batch, learner, stream=True)
    found = losses_of(model, docs, how, rt)
    monkeypatch.setattr(tg, "causal_attention", banded_attention)
    stream = docs.tokens.long()
    for start, n in zip(docs.starts, docs.predictions, strict=True):
        own = slice(start, start + n)
        losses = model(stream[None, own], stream[None, 1:][:, own])[0]
        torch.testing.assert_close(found[own], losses, atol=1e-5, rtol=0)


def test_rotary_angles_are_built_in_double_precision(rt):
    model = tiny_model(tiny_config(), rt)
    steps = torch.arange(4, dtype=torch.float64)
    angle = 130_003 * 10000.0 ** (-steps / 4)
    cos, sin = model.rope(torch.tensor(130_003))
    assert (cos - angle.cos()).abs().max() < 1e-7
    assert (sin - angle.sin()).abs().max() < 1e-7


# -- flat --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lengths", "rows", "row"), [([150, 90], 7, 32), ([20], 1, 19)])
@pytest.mark.parametrize("val_batch_size", [1, 128, 10**6])
def test_flat_scores_whole_rows_of_the_stream(rt, lengths, rows, row, val_batch_size):
    """A stream that is shorter than a row is one row."""
    model = tiny_model(tiny_config(val_batch_size=val_batch_size), rt)
    docs = tiny_documents(lengths)
    stream = docs.tokens.long()[: rows * row + 1]
    ids = stream[:-1].view(rows, row)
    targets = stream[1:].view(rows, row)
    losses = model(ids, targets)
    result = flat_score(model, docs, rt)
    assert result.nats == pytest.approx(losses.sum().item(), rel=1e-6)
    assert result.tokens == rows * row
    assert result.bytes == docs.bytes[: rows * row].sum()


# -- the ladder and its scores -----------------------------------------------------------------


def test_the_ladder_is_the_record_s(rt):
    cfg = tg.Config(
        grad_accum_steps=8,
        ttt_batch_size=13,
        ttt_stream_targets=("fc",),
        ttt_stream_lr="0.5",
        ttt_stream_rank=5,
    )
    recipe = tg.Learner(("c_q", "c_v", "lm_head"), 8, 0.01, 0.9, 0.95, 1.0, 0.0)
    streamer = tg.Learner(("fc",), 5, 0.5, 0.0, 0.99, 4.0, 0.2)
    rows = 524288 // (8 * 1024)
    expected = {
        "flat": tg.Condition(1024, 1024, rows, isolated=False),
        "doc": tg.Condition(1024, 1024, 13),
        "stride": tg.Condition(256, 1024, 13),
        "ttt": tg.Condition(256, 1024, 13, recipe),
        "stream": tg.Condition(32, 1024, 13, streamer, stream=True),
    }
    model = tiny_model(tiny_config(), rt)
    model.cfg = cfg
    rungs = tg.ladder(tiny_documents([5000]), model, rt)
    assert {name: replace(how, final="") for name, how in rungs.items()} == expected
    assert tuple(rungs) == tg.RUNGS[:5]  # mixtures need weights


@pytest.mark.parametrize(
    ("row", "position", "value", "found"),
    [
        (1, 5, 0, "scored 0 times.*expected 1 times"),
        (1, 53, 2, "scored 2 times.*expected 1 times"),
        (1, 0, 1, "scored 1 times.*expected 0 times"),  # before the first BOS
        (0, 5, math.nan, "loss nan"),
        (0, 53, math.inf, "loss inf"),
    ],
)
def test_coverage_refuses_what_is_not_scored_once(row, position, value, found):
    docs = tiny_documents([20, 30], lead=range(5, 10))
    how = tg.Condition(C, W, 4)
    ledger = np.ones((2, len(docs.tokens) - 1))
    ledger[:, :5] = 0
    tg.check_coverage(*ledger, docs, how)
    ledger[row, position] = value
    with pytest.raises(tg.UserError, match=rf"audit coverage: position {position}: .*{found}"):
        tg.check_coverage(*ledger, docs, how)


def test_totals_are_rounded_once():
    """Sums in any order, and those of whoever adds the file up exactly, are the printed totals."""
    powers = np.random.default_rng(1).integers(-8, 8, 10_001)
    nats = np.random.default_rng(0).random(10_001) * 10.0**powers
    exact = math.fsum(nats)
    assert float(nats.sum()) != exact
    ones = np.ones(len(nats))
    for order in (nats, nats[::-1]):
        columns = {"tokens": ones, "bytes": ones, "loss_nats": order}
        assert tg.Score(columns, order).nats == exact
