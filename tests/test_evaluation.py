"""Which position is scored where, score before learning, and nothing leaks between documents."""

import csv
import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CPU, tiny_condition, tiny_config, tiny_documents, tiny_model, tiny_table

import train_gpt as tg

C, W = 8, 24
LENGTHS = [2, 3, C, C + 1, C + 2, W, W + 1, W + 2, 5 * C + 7]


def score(model, docs, rt, **settings):
    """The score under chunks of C in windows of W; settings as in `tiny_condition`."""
    return tg.evaluate(model, docs, tiny_condition(model.cfg, **settings), rt)


def stream_score(model, docs, rt):
    return score(model, docs, rt, stream=True)


def flat_score(model, docs, rt):
    return tg.evaluate(model, docs, tg.ladder(docs, model.cfg, rt)["flat"], rt)


def assert_same(result, expected):
    """Equal scores, up to the order in which fp32 numbers were added."""
    assert (result.tokens, result.bytes) == (expected.tokens, expected.bytes)
    assert result.nats == pytest.approx(expected.nats, rel=1e-6)


@pytest.fixture
def recorded(monkeypatch):
    """Every chunk that passes the one place that learns, as (chunk, whether it was learned from)."""
    calls = []
    original = tg.score_then_learn

    def record(model, chunk, rows, adapters, cache, learns):
        calls.append((chunk, learns))
        return original(model, chunk, rows, adapters, cache, learns)

    monkeypatch.setattr(tg, "score_then_learn", record)
    return calls


def count_positions(model):
    """Count what goes through the model, and through copies of it: ids, and positions at the head."""
    counts = Counter()

    def count(key):
        def hook(module, args):
            counts[key] += args[0].shape[:2].numel()

        return hook

    model.register_forward_pre_hook(count("ids"))
    model.lm_head.register_forward_pre_hook(count("head"))
    return counts


# -- windows -----------------------------------------------------------------------------------


def brute_force(length, chunk, window):
    """{prediction: first input of its context} of a document, straight from the spec's words."""
    n = length - 1
    out = {}
    for p in range(n):
        end = min((p // chunk + 1) * chunk, n)
        out[p] = max(0, end - window)
    return out


@pytest.mark.parametrize(("chunk", "window"), [(C, W), (W, W), (C, C), (1, 5)])
@pytest.mark.parametrize("stream", [False, True])
def test_each_position_is_scored_once_in_its_window(rt, recorded, chunk, window, stream):
    """Tokens are their own positions, so a gathered window shows where it came from."""
    docs = tiny_documents(LENGTHS)
    docs = replace(docs, tokens=torch.arange(len(docs.tokens), dtype=torch.int32))
    model = tiny_model(tiny_config(vocab_size=len(docs.tokens)), rt)
    tg.score_documents(model, docs, tg.Condition(chunk, window, 4, stream=stream), rt)
    seen = [{} for _ in LENGTHS]
    for (ids, targets, at, positions, live), _ in recorded:
        if at is None:
            at = torch.arange(ids.shape[1]).expand_as(targets)
        for row, column in live.nonzero():
            context = ids[row, : at[row, column] + 1].tolist()
            first = context[0]
            last = context[-1]
            assert context == list(range(first, last + 1))
            assert positions[row, column] == last
            assert targets[row, column] == last + 1
            document = int(np.searchsorted(docs.starts, last, side="right")) - 1
            start = docs.starts[document]
            assert last - start not in seen[document]
            seen[document][last - start] = first - start
    if stream:  # the tokens before the chunk are in the cache instead
        assert seen == [{p: p // chunk * chunk for p in range(n)} for n in docs.predictions]
    else:
        assert seen == [brute_force(n + 1, chunk, window) for n in docs.predictions]


@pytest.mark.parametrize(
    "lengths", [LENGTHS, [2] * 30, [600, *range(2, 40)], [40] * 9, list(range(2, 90))]
)
@pytest.mark.parametrize("learn", [False, True])
def test_hardly_a_position_is_computed_in_vain(rt, recorded, lengths, learn):
    """Work against what the windows need, whatever the lengths."""
    docs = tiny_documents(lengths)
    model = tiny_model(tiny_config(), rt)
    counts = count_positions(model)
    result = score(model, docs, rt, learn=learn)
    needed = 0
    chunks = 0
    for n in docs.predictions:
        ends = range(C, n + C, C)
        needed += sum(min(end, n, W) for end in ends)
        chunks += len(ends)
    assert needed <= counts["ids"] <= 1.05 * needed
    assert counts["head"] <= C * chunks
    assert result.tokens == docs.predictions.sum()
    # A document's last chunk teaches nobody.
    lessons = sum(len(chunk.ids) for chunk, learns in recorded if learns)
    assert lessons == (chunks - len(lengths) if learn else 0)


def test_a_stream_runs_each_token_once(rt):
    """Up to the padding of each last chunk."""
    docs = tiny_documents(LENGTHS)
    model = tiny_model(tiny_config(), rt)
    counts = count_positions(model)
    stream_score(model, docs, rt)
    assert counts["ids"] == sum(math.ceil(n / C) * C for n in docs.predictions)


def test_slots_are_filled_longest_first_and_never_idle():
    """One long document does not hold up the others, and no slot before a used one is empty."""
    chunks = np.array([3, 20, 1, 5, 5, 2, 4])
    turns = list(tg.plan_slots(np.arange(7), chunks, 3))
    used = [len(documents) for documents, _ in turns]
    assert len(turns) == 20  # the longest document, from the first turn to the last
    assert used == sorted(used, reverse=True)
    pairs = [pair for turn in turns for pair in zip(*turn, strict=True)]
    assert sorted(pairs) == [(d, n) for d in range(7) for n in range(chunks[d])]
    for turn, (documents, numbers) in enumerate(turns):
        assert (documents[0], numbers[0]) == (1, turn)
    for (before, last), (after, number) in itertools.pairwise(turns):
        for slot in range(len(after)):
            if before[slot] == after[slot]:
                assert number[slot] == last[slot] + 1
            else:  # the next document begins where the last one ended
                assert number[slot] == 0
                assert last[slot] == chunks[before[slot]] - 1
    assert list(tg.plan_slots(np.array([], dtype=np.int64), chunks, 0)) == []


# -- against a document at a time --------------------------------------------------------------


def reference(model, docs, how, rt):
    """(nats, tokens), one document and one chunk at a time, with torch's Adam on plain tensors."""
    nats = 0.0
    tokens = 0
    stream = docs.tokens.long()
    for start, n in zip(docs.starts, docs.predictions, strict=True):
        loras = tg.NO_ADAPTERS
        cache = None
        if how.learner:
            fresh = tg.DocumentAdapters(model, how.learner, how.chunk, 1, rt)
            flat = fresh.start.clone()[None].requires_grad_()
            adam = torch.optim.Adam([flat], how.learner.lr, (0.9, 0.95), 1e-10)
        for place in range(0, n, how.chunk):
            end = min(place + how.chunk, n)
            begin = max(0, end - how.window)
            if how.stream:
                begin = place
                cache = cache or tg.KVCache(1, how.window, 1, rt)
                cache.chunk = end - place
                cache.advance(1)
            window = stream[start + begin : start + end + 1][None]
            if how.learner:
                loras = fresh.unflatten(flat)
            losses = model(window[:, :-1], window[:, 1:], None, loras, cache)
            losses = losses[0, place - begin :]
            nats += losses.sum().item()
            tokens += len(losses)
            if how.learner and end < n:
                adam.zero_grad()
                losses.mean().backward()
                adam.step()
    return nats, tokens


@pytest.mark.parametrize(
    ("tied", "learn", "stream"),
    [(True, False, False), (True, True, False), (False, True, False), (True, True, True)],
)
def test_batched_evaluation_equals_one_document_at_a_time(rt, tied, learn, stream):
    cfg = tiny_config(tie_embeddings=tied, ttt_lora_lr=0.02)
    model, docs = tiny_model(cfg, rt), tiny_documents(LENGTHS)
    nats, tokens = reference(model, docs, tiny_condition(cfg, learn, stream), rt)
    result = score(model, docs, rt, learn=learn, stream=stream)
    assert result.tokens == tokens
    assert result.nats == pytest.approx(nats, rel=2e-6)
    if learn:
        plain = score(model, docs, rt, learn=False, stream=stream)
        assert abs(result.nats - plain.nats) > 5e-5 * nats


def test_learning_rate_zero_equals_no_adapters(rt):
    model, docs = tiny_model(tiny_config(ttt_lora_lr=0.0), rt), tiny_documents(LENGTHS)
    plain = score(model, docs, rt, learn=False)
    assert score(model, docs, rt).nats == pytest.approx(plain.nats, rel=1e-7)


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
@pytest.mark.parametrize("stream", [False, True])
def test_batch_size_does_not_move_the_score(rt, batch, stream):
    model, docs = tiny_model(tiny_config(), rt), tiny_documents(LENGTHS)
    expected = score(model, docs, rt, stream=stream)
    assert_same(score(model, docs, rt, stream=stream, batch=batch), expected)


@pytest.mark.parametrize("evaluate", [score, stream_score])
def test_order_of_documents_does_not_move_the_score(rt, evaluate):
    model = tiny_model(tiny_config(), rt)
    texts = [np.random.default_rng(i).integers(4, 96, n - 1) for i, n in enumerate(LENGTHS)]
    scores = []
    for order in (range(len(LENGTHS)), np.random.default_rng(0).permutation(len(LENGTHS))):
        stream = np.concatenate([*(np.append(1, texts[i]) for i in order), [1]])
        docs = tg.split_documents(stream, 1, 0, tiny_table(96), CPU)
        scores.append(evaluate(model, docs, rt))
    assert_same(*scores)
    assert scores[0].columns["doc"].tolist() != scores[1].columns["doc"].tolist()


@pytest.mark.parametrize("world", [2, 3, 16])
@pytest.mark.parametrize("evaluate", [score, flat_score, stream_score])
def test_ranks_together_give_the_same_score(rt, world, evaluate):
    """The sums of every rank's share; 16 ranks are more than there are documents or rows."""
    model, docs = tiny_model(tiny_config(), rt), tiny_documents(LENGTHS)
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
    assert_same(together, evaluate(model, docs, rt))


def test_documents_are_shared_by_work():
    chunks = np.array([100, 1, 1, 50, 50, 1, 1, 1, 1, 1])
    shares = tg.share_documents(chunks, 2)
    assert sorted(np.concatenate(shares).tolist()) == list(range(10))
    assert abs(chunks[shares[0]].sum() - chunks[shares[1]].sum()) <= 1
    for share in shares:
        assert (np.diff(chunks[share]) <= 0).all()  # longest first
    few = tg.share_documents(np.array([3, 2]), 4)
    assert [len(share) for share in few] == [1, 1, 0, 0]


# -- the law -----------------------------------------------------------------------------------


def scores_by_position(model, docs, rt, stream):
    """[per document: losses of its predictions in order]."""
    how = tiny_condition(model.cfg, stream=stream)
    losses, times = tg.score_documents(model, docs, how, rt).numpy()
    assert (times == 1).all()
    spans = zip(docs.starts, docs.predictions, strict=True)
    return [losses[start : start + n] for start, n in spans]


@pytest.fixture(params=[False, True], ids=["windows", "stream"])
def law(rt, request):
    """(scores by position, documents, those scores) at a rate high enough for any leak to show."""
    model = tiny_model(tiny_config(ttt_lora_lr=0.05), rt)
    docs = tiny_documents(LENGTHS)

    def scores(docs):
        return scores_by_position(model, docs, rt, request.param)

    return scores, docs, scores(docs)


def shift(tokens, by):
    """Other tokens of text."""
    return (tokens - 4 + by) % 92 + 4


@pytest.mark.parametrize("document", range(len(LENGTHS)))
def test_a_later_token_never_changes_an_earlier_score(law, document):
    """Change all from token t on: predictions before t - 1 score the same to the last bit."""
    scores, docs, before = law
    n = int(docs.predictions[document])
    start = int(docs.starts[document])
    for t in sorted({1, 2, C - 1, C, C + 1, n // 2, n - 1, n} & set(range(1, n + 1))):
        tokens = docs.tokens.clone()
        tokens[start + t : start + n] = shift(tokens[start + t : start + n], 17)
        after = scores(replace(docs, tokens=tokens))
        assert np.array_equal(after[document][: t - 1], before[document][: t - 1])
        if t < n:  # and the change was a real one
            assert not np.array_equal(after[document][t - 1 :], before[document][t - 1 :])
        for other in set(range(len(LENGTHS))) - {document}:
            assert np.array_equal(after[other], before[other])


def test_other_documents_change_nothing(law):
    scores, docs, before = law
    tokens = docs.tokens.clone()
    others = tokens[: docs.starts[-1]]  # all but the last document
    others[others != 1] = shift(others[others != 1], 31)
    after = scores(replace(docs, tokens=tokens))
    assert np.array_equal(after[-1], before[-1])
    assert not np.array_equal(after[0], before[0])


@pytest.mark.parametrize("stream", [False, True])
def test_learning_helps_on_a_document_that_repeats_itself(rt, stream):
    """The point of it all: later chunks of a predictable document must cost less."""
    model = tiny_model(tiny_config(ttt_lora_lr=0.02), rt)
    text = np.concatenate(([1], np.tile([7, 8, 9, 10], 40)))
    docs = tg.split_documents(text.astype(np.uint16), 1, 0, tiny_table(96), CPU)
    plain = score(model, docs, rt, learn=False, stream=stream)
    assert score(model, docs, rt, stream=stream).loss < plain.loss - 0.5


def test_the_model_itself_is_left_as_it_was(rt):
    model, docs = tiny_model(tiny_config(), rt), tiny_documents(LENGTHS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score(model, docs, rt)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# -- streaming ---------------------------------------------------------------------------------


class WholeDocument:
    """Stands in for a cache: all of a document at once, and a mask in place of a past."""

    def __init__(self, length, window):
        age = torch.arange(length)[:, None] - torch.arange(length)
        hidden = (age < 0) | (age >= window)
        self.mask = torch.zeros(1, length, length).masked_fill(hidden, -math.inf)
        self.positions = torch.arange(length)[None]

    def extend(self, layer, keys, values):
        return keys, values


@torch.no_grad()
def banded_losses(model, docs, window):
    """Losses (n - 1,) of one pass over each document; a query sees itself and window - 1 before."""
    losses = torch.zeros(len(docs.tokens) - 1)
    stream = docs.tokens.long()
    for start, n in zip(docs.starts, docs.predictions, strict=True):
        own = slice(start, start + n)
        cache = WholeDocument(int(n), window)
        losses[own] = model(stream[own][None], stream[1:][own][None], cache=cache)[0]
    return losses


@pytest.mark.parametrize(
    ("chunk", "batch"), [(1, 64), (5, 1), (5, 64), (C, 3), (W, 64), (30, 1), (64, 3)]
)
def test_a_stream_that_learns_nothing_is_one_banded_pass(rt, chunk, batch):
    """A query sees itself and W - 1 tokens before it in every layer, wherever a chunk ends."""
    model, docs = tiny_model(tiny_config(), rt), tiny_documents([*LENGTHS, 120])
    expected = banded_losses(model, docs, W)
    for learner in (None, tg.Learner(tg.TARGETS, 4, 0.0)):
        how = tg.Condition(chunk, W, batch, learner, stream=True)
        losses, _ = tg.score_documents(model, docs, how, rt)
        torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("now", "began"), [(0, 0), (130_000, 0), (130_000, 130_000)])
def test_positions_far_out_lose_no_precision(rt, now, began):
    """Far into a document, and for one that starts late, scores are what they are at the start."""
    cfg = tiny_config()
    model = tiny_model(cfg, rt)
    docs = tiny_documents([150])
    how = tiny_condition(cfg, learn=False, stream=True)
    cache = tg.KVCache(1, W, C, rt)
    cache.now = began
    cache.restart(torch.tensor([0]))
    cache.now = now
    losses = []
    for c in range(18):
        place = np.array([c * C])
        spans = np.stack((docs.starts, place, place + C))
        chunk = tg.gather_chunk(docs.tokens, spans, C, how, rt)
        losses.append(tg.score_then_learn(model, chunk, slice(1), None, cache, False)[0])
        first = now - began + c * C
        assert cache.positions.tolist() == [list(range(first, first + C))]
    assert cache.now == now + 18 * C
    # Far out the cached past is no text, which three layers see so far.
    skipped = 0 if now == began else cfg.num_layers * W
    expected = banded_losses(model, docs, W)[skipped : 18 * C]
    torch.testing.assert_close(torch.cat(losses)[skipped:], expected, atol=1e-5, rtol=0)


def test_a_cache_does_not_grow(rt, monkeypatch):
    """It holds a window for each slot that was in use, however long the documents."""
    original = tg.KVCache.advance
    slots = []
    sizes = []

    def weigh(self, batch):
        original(self, batch)
        held = [*self.keys.values(), *self.values.values()]
        for tensor in held:
            assert tensor.shape == (slots[-1], 2, W, 8)
        slots.append(batch)
        tensors = (*held, self.mask, self.positions)
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))

    monkeypatch.setattr(tg.KVCache, "advance", weigh)
    stream_score(tiny_model(tiny_config(), rt), tiny_documents([30, 1000, 70]), rt)
    assert slots == [3] * 4 + [2] * 5 + [1] * 116
    assert sizes[-1] == sizes[11] < sizes[8] < sizes[3]


# -- flat --------------------------------------------------------------------------------------


@pytest.mark.parametrize("val_batch_size", [1, 128, 10**6])
def test_flat_scores_whole_rows_of_the_stream(rt, val_batch_size):
    model = tiny_model(tiny_config(val_batch_size=val_batch_size), rt)
    docs = tiny_documents([150, 90])
    stream = docs.tokens.long()[: 7 * 32 + 1]
    result = flat_score(model, docs, rt)
    losses = model(stream[:-1].view(7, 32), stream[1:].view(7, 32))
    assert result.nats == pytest.approx(losses.sum().item(), rel=1e-6)
    assert result.tokens == 7 * 32
    assert result.bytes == docs.bytes[: 7 * 32].sum()


def test_a_stream_shorter_than_a_row_is_one_row(rt):
    model, docs = tiny_model(tiny_config(), rt), tiny_documents([20])
    stream = docs.tokens.long()[None]
    result = flat_score(model, docs, rt)
    expected = model(stream[:, :-1], stream[:, 1:]).sum().item()
    assert (result.nats, result.tokens) == (pytest.approx(expected, rel=1e-6), 19)


# -- the ladder and its columns ----------------------------------------------------------------


def test_the_ladder_is_the_record_s(rt):
    cfg = tg.Config(
        grad_accum_steps=8,
        ttt_batch_size=13,
        ttt_stream_targets=("fc",),
        ttt_stream_lr=0.5,
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
        "stream": tg.Condition(64, 1024, 13, streamer, stream=True),
    }
    rungs = tg.ladder(tiny_documents([5000]), cfg, rt)
    assert {name: replace(how, final="") for name, how in rungs.items()} == expected
    assert tuple(rungs) == tg.RUNGS


def with_lead(lengths):
    """Documents after five tokens that belong to none, and a BOS at the very end."""
    rng = np.random.default_rng(3)
    texts = [np.append(1, rng.integers(4, 96, n - 1)) for n in lengths]
    stream = np.concatenate([[5, 6, 7, 8, 9], *texts, [1]])
    return tg.split_documents(stream, 1, 0, tiny_table(96), CPU)


@pytest.mark.parametrize("name", tg.RUNGS)
def test_columns_add_up_chunk_by_chunk(rt, name):
    """Pieces of one length, whatever the condition's chunk, against sums taken by hand."""
    model, docs = tiny_model(tiny_config(), rt), with_lead([2, 8, 40, 9, 70])
    how = tg.ladder(docs, model.cfg, rt)[name]
    losses, times = tg.score_documents(model, docs, how, rt).double().numpy()
    ends = docs.starts + docs.predictions
    expected = []
    for d, (start, end) in enumerate([(0, 5), *zip(docs.starts, ends, strict=True)], start=-1):
        for c, edge in enumerate(range(start, end, C)):
            part = slice(edge, min(edge + C, end))
            scored = int(times[part].sum())
            size = int((docs.bytes.numpy()[part] * times[part]).sum())
            if scored:
                nats = pytest.approx(losses[part].sum(), rel=1e-12)
                expected.append((d, c, edge - start, scored, size, nats))
    result = tg.tabulate(losses, times, docs, C)
    assert list(result.columns) == ["doc", "chunk", "start", "tokens", "bytes", "loss_nats"]
    columns = [column.tolist() for column in result.columns.values()]
    assert list(zip(*columns, strict=True)) == expected
    total = len(docs.tokens) - 1
    assert result.tokens == (total // 32 * 32 if name == "flat" else total - 5)
    assert (expected[0][0] == -1) == (name == "flat")


@pytest.mark.parametrize(
    ("row", "value", "found"),
    [
        (1, 0, "scored 0 times"),
        (1, 2, "scored 2 times"),
        (0, math.nan, "loss nan"),
        (0, math.inf, "loss inf"),
    ],
)
@pytest.mark.parametrize("position", [5, 40, -1])
def test_coverage_refuses_what_is_not_scored_once(row, value, found, position):
    docs, how = with_lead([20, 30]), tg.Condition(C, W, 4)
    ledger = np.ones((2, len(docs.tokens) - 1), dtype=np.float32)
    ledger[:, :5] = 0  # before the first BOS
    tg.check_coverage(*ledger, docs, how)
    ledger[row, position] = value
    place = position % ledger.shape[1]
    with pytest.raises(tg.UserError, match=rf"audit coverage: position {place}: .*{found}"):
        tg.check_coverage(*ledger, docs, how)


def test_coverage_refuses_a_score_before_the_first_document():
    docs, how = with_lead([20, 30]), tg.Condition(C, W, 4)
    ledger = np.ones((2, len(docs.tokens) - 1))
    with pytest.raises(tg.UserError, match=r"position 0: scored 1 times.*expected 0 times"):
        tg.check_coverage(*ledger, docs, how)


def test_scores_file_adds_up_to_the_totals(rt, tmp_path):
    model, docs = tiny_model(tiny_config(), rt), tiny_documents(LENGTHS)
    rungs = tg.ladder(docs, model.cfg, rt)
    scores = {name: tg.evaluate(model, docs, how, rt) for name, how in rungs.items()}
    tg.write_scores(tmp_path / "scores.csv", scores, tg.RunLog())
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["condition", "doc", "chunk", "start", "tokens", "bytes", "loss_nats"]
    for name, result in scores.items():
        mine = [row for row in rows if row["condition"] == name]
        assert math.fsum(float(row["loss_nats"]) for row in mine) == result.nats
        assert sum(int(row["tokens"]) for row in mine) == result.tokens
        assert sum(int(row["bytes"]) for row in mine) == result.bytes
        assert len({(row["doc"], row["chunk"]) for row in mine}) == len(mine)


def test_bits_per_byte_divides_bits_by_bytes():
    columns = {
        "tokens": np.array([2, 3]),
        "bytes": np.array([5, 3]),
        "loss_nats": np.array([4, 8]) * math.log(2),
    }
    result = tg.Score(columns)
    assert result.loss == pytest.approx(math.log(2) * 12 / 5)
    assert result.bpb == pytest.approx(1.5)
    assert str(result) == "val_loss:1.6636 val_bpb:1.5000"


def test_a_score_over_no_bytes_is_refused(rt):
    """A row of control pieces before the only text: the flat stream has nothing to divide by."""
    stream = np.array([*[1, 2] * 16, 1, 9])
    docs = tg.split_documents(stream, 1, 0, tiny_table(96), CPU)
    docs.bytes[:32] = 0
    with pytest.raises(tg.UserError, match="0 bytes"):
        flat_score(tiny_model(tiny_config(), rt), docs, rt)


def test_totals_are_rounded_once():
    """Sums in any order, and those of whoever adds the file up exactly, are the printed totals."""
    powers = np.random.default_rng(1).integers(-8, 8, 10_001)
    nats = np.random.default_rng(0).random(10_001) * 10.0**powers
    ones = np.ones(len(nats), dtype=np.int64)
    for order in (nats, nats[::-1]):
        result = tg.Score({"tokens": ones, "bytes": ones, "loss_nats": order})
        assert (result.nats, result.tokens, result.bytes) == (math.fsum(nats), 10_001, 10_001)
    assert float(nats.sum()) != math.fsum(nats)
