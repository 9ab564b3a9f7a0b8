"""The evaluation: which position is scored where, score before learning, and nothing leaks between documents."""

import csv
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_condition, tiny_config, tiny_documents, tiny_model, tiny_table

import train_gpt as tg

C, W = 8, 24
LENGTHS = [2, 3, C, C + 1, C + 2, W, W + 1, W + 2, 5 * C + 7]


def score(model, docs, cfg, rt, learn=True, stream=False):
    return tg.evaluate(model, docs, tiny_condition(cfg, learn, stream), cfg, rt)


def stream_score(model, docs, cfg, rt):
    return score(model, docs, cfg, rt, stream=True)


def flat_score(model, docs, cfg, rt):
    return tg.evaluate(model, docs, tg.ladder(docs, cfg, rt)["flat"], cfg, rt)


@pytest.fixture
def recorded(monkeypatch):
    """Every chunk that passes the one place that scores, as (chunk, losses)."""
    calls, original = [], tg.score_then_learn

    def record(model, chunk, *arguments):
        losses = original(model, chunk, *arguments)
        calls.append((chunk, losses))
        return losses

    monkeypatch.setattr(tg, "score_then_learn", record)
    return calls


# -- windows ----------------------------------------------------------------------------------------------------------


def brute_force(length, chunk, window):
    """{prediction: first input of its context} for a document of `length` tokens, straight from the spec's words."""
    n = length - 1
    out = {}
    for p in range(n):
        c = p // chunk
        end = min((c + 1) * chunk, n)
        out[p] = max(0, end - window)
    return out


@pytest.mark.parametrize(("chunk", "window"), [(C, W), (W, W), (C, C), (1, 5)])
@pytest.mark.parametrize("stream", [False, True])
def test_each_position_is_scored_once_in_its_window(
    rt, recorded, monkeypatch, chunk, window, stream
):
    """All lengths side by side; tokens are their own positions, so a gathered window shows where it came from."""
    docs = tiny_documents(LENGTHS)
    docs = replace(docs, tokens=torch.arange(len(docs.tokens), dtype=torch.int32))
    cfg = tiny_config(vocab_size=len(docs.tokens))
    how = tg.Condition(chunk, window, 4, stream=stream)
    tg.fill_ledger(tiny_model(cfg, rt), docs, how, cfg, rt)
    seen = [{} for _ in LENGTHS]
    for (ids, targets, at, positions, alive), _ in recorded:
        at = torch.arange(ids.shape[1]).expand_as(targets) if at is None else at
        for row, live in enumerate(alive):
            columns = (part[row][live] for part in (at, positions, targets))
            for place, position, target in zip(*columns, strict=True):
                context = ids[row][: place + 1].tolist()
                assert (
                    context == list(range(context[0], context[-1] + 1))
                    and int(target) == context[-1] + 1
                )
                assert int(position) == context[-1]
                document = int(np.searchsorted(docs.starts, context[-1], side="right")) - 1
                inside = context[-1] - docs.starts[document]
                assert inside not in seen[document]
                seen[document][inside] = context[0] - docs.starts[document]
    if stream:  # the tokens before the chunk are in the memory instead
        assert seen == [{p: p // chunk * chunk for p in range(n)} for n in docs.predictions]
    else:
        assert seen == [brute_force(n + 1, chunk, window) for n in docs.predictions]


@pytest.mark.parametrize(
    "lengths", [LENGTHS, [2] * 30, [600, *range(2, 40)], [40] * 9, list(range(2, 90))]
)
@pytest.mark.parametrize("learn", [False, True])
def test_hardly_a_position_is_computed_in_vain(rt, lengths, learn):
    """Work against what the windows need, whatever the lengths."""
    cfg = tiny_config(ttt_batch_size=4)
    docs = tiny_documents(lengths)
    how, needed = tiny_condition(cfg, learn), 0
    for n in docs.predictions:
        needed += sum(min(min(end, n), W) for end in range(C, n + C, C))
    result = score(tiny_model(cfg, rt), docs, cfg, rt, learn=learn)
    assert how.work(docs.predictions).sum() == needed
    assert needed <= result.computed <= 1.05 * needed
    assert result.totals[1] == docs.predictions.sum()


def test_a_stream_runs_each_token_once(rt):
    """Up to the padding of each last chunk."""
    cfg = tiny_config()
    docs = tiny_documents(LENGTHS)
    result = stream_score(tiny_model(cfg, rt), docs, cfg, rt)
    assert result.computed == sum(math.ceil(n / C) * C for n in docs.predictions)
    assert (
        tiny_condition(cfg, stream=True).work(docs.predictions).tolist()
        == docs.predictions.tolist()
    )


def test_seats_are_filled_longest_first_and_never_idle():
    """One long document does not hold up the others, and a turn has no empty seat between taken ones."""
    chunks = np.array([3, 20, 1, 5, 5, 2, 4])
    turns = list(tg.plan_seats(np.arange(7), chunks, 3))
    assert len(turns) == 20  # the longest document, from the first turn to the last
    assert [len(documents) for documents, _ in turns] == sorted(
        (len(d) for d, _ in turns), reverse=True
    )
    assert sorted((d, n) for turn in turns for d, n in zip(*turn, strict=True)) == [
        (d, n) for d in range(7) for n in range(chunks[d])
    ]
    assert all(
        numbers[0] == turn and documents[0] == 1 for turn, (documents, numbers) in enumerate(turns)
    )
    for (before, last), (after, number) in itertools.pairwise(turns):
        for seat in range(
            len(after)
        ):  # a document goes on where it was, or the next one begins at its beginning
            same = before[seat] == after[seat]
            assert number[seat] == (last[seat] + 1 if same else 0)
            assert same or last[seat] == chunks[before[seat]] - 1
    assert list(tg.plan_seats(np.array([], dtype=np.int64), chunks, 0)) == []


# -- against a document at a time -----------------------------------------------------------------------------------


def reference(model, docs, cfg, rt, chunk, window, learn):
    """(nats, tokens) of the recipe, one document and one chunk at a time, with torch's own Adam on plain tensors."""
    nats, tokens = 0.0, 0
    stream = docs.tokens.long()
    start_values = tg.DocumentAdapters(model, tiny_condition(cfg), 1, cfg.seed, rt)
    for start, n in zip(docs.starts, docs.predictions, strict=True):
        fresh = start_values.pairs(start_values.flat)
        pairs = {name: tuple(t.clone().requires_grad_() for t in ab) for name, ab in fresh.items()}
        adam = torch.optim.Adam(
            [t for ab in pairs.values() for t in ab], cfg.ttt_lora_lr, (0.9, 0.95), 1e-10
        )
        for c in range(-(-n // chunk)):
            end = min((c + 1) * chunk, n)
            begin = max(0, end - window)
            inputs = stream[start + begin : start + end][None]
            targets = stream[start + begin + 1 : start + end + 1][None]
            losses = model(inputs, targets, adapters=pairs if learn else {})[0, c * chunk - begin :]
            nats, tokens = nats + losses.sum().item(), tokens + len(losses)
            if learn and end < n:
                adam.zero_grad()
                losses.mean().backward()
                adam.step()
    return nats, tokens


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_batched_evaluation_equals_one_document_at_a_time(rt, learn, tied):
    cfg = tiny_config(tie_embeddings=tied, ttt_lora_lr=0.02)
    model, docs = tiny_model(cfg, rt), tiny_documents(LENGTHS)
    nats, tokens = reference(model, docs, cfg, rt, C, W, learn)
    result = score(model, docs, cfg, rt, learn=learn)
    assert result.totals[1] == tokens
    assert result.totals[0] == pytest.approx(nats, rel=2e-6)
    if learn:
        assert (
            abs(result.totals[0] - score(model, docs, cfg, rt, learn=False).totals[0]) > 5e-5 * nats
        )


def test_learning_rate_zero_equals_no_adapters(rt):
    cfg = tiny_config(ttt_lora_lr=0.0)
    model, docs = tiny_model(cfg, rt), tiny_documents(LENGTHS)
    plain = score(model, docs, cfg, rt, learn=False)
    assert score(model, docs, cfg, rt).totals[0] == pytest.approx(plain.totals[0], rel=1e-7)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
@pytest.mark.parametrize("evaluate", [score, stream_score])
def test_batch_size_does_not_move_the_score(rt, batch_size, evaluate):
    model, docs = tiny_model(tiny_config(), rt), tiny_documents(LENGTHS)
    expected = evaluate(model, docs, tiny_config(), rt)
    result = evaluate(model, docs, tiny_config(ttt_batch_size=batch_size), rt)
    assert result.totals == (pytest.approx(expected.totals[0], rel=1e-6), *expected.totals[1:])


@pytest.mark.parametrize("evaluate", [score, stream_score])
def test_order_of_documents_does_not_move_the_score(rt, evaluate):
    cfg = tiny_config()
    model = tiny_model(cfg, rt)
    texts = [np.random.default_rng(i).integers(4, 96, n - 1) for i, n in enumerate(LENGTHS)]
    scores = []
    for order in (range(len(LENGTHS)), np.random.default_rng(0).permutation(len(LENGTHS))):
        stream = np.concatenate([*(np.append(1, texts[i]) for i in order), [1]])
        docs = tg.split_documents(stream, 1, 0, tiny_table(96), rt.device)
        scores.append(evaluate(model, docs, cfg, rt))
    assert scores[0].totals == (pytest.approx(scores[1].totals[0], rel=1e-6), *scores[1].totals[1:])
    assert scores[0].columns["doc"].tolist() != scores[1].columns["doc"].tolist()


@pytest.mark.parametrize("world", [2, 3, 16])
@pytest.mark.parametrize("evaluate", [score, flat_score, stream_score])
def test_ranks_together_give_the_same_score(rt, world, evaluate):
    """The sums of every rank's share; 16 ranks are more than there are documents or rows."""
    cfg = tiny_config()
    model, docs = tiny_model(cfg, rt), tiny_documents(LENGTHS)
    parts = []

    class Ranked(tg.Runtime):
        def sum(self, values):
            if values.ndim == 2:  # the ledger; the other sum is that of positions computed
                parts.append(values)
            return whole if len(parts) > world and values.ndim == 2 else values

    whole = None
    for rank in range(world):
        with pytest.raises(
            tg.AgreedError, match="audit coverage"
        ):  # a share alone is not the whole
            evaluate(model, docs, cfg, Ranked(rt.device, rt.dtype, rank=rank, world=world))
    whole = sum(parts)
    together = evaluate(model, docs, cfg, Ranked(rt.device, rt.dtype, rank=0, world=world))
    alone = evaluate(model, docs, cfg, rt)
    assert together.totals == (pytest.approx(alone.totals[0], rel=1e-6), *alone.totals[1:])


def test_documents_are_shared_by_work():
    chunks = np.array([100, 1, 1, 50, 50, 1, 1, 1, 1, 1])
    shares = tg.share_documents(chunks, 2)
    assert sorted(np.concatenate(shares).tolist()) == list(range(10))
    assert abs(chunks[shares[0]].sum() - chunks[shares[1]].sum()) <= 1
    for share in shares:
        assert (np.diff(chunks[share]) <= 0).all()  # longest first
    assert [len(s) for s in tg.share_documents(np.array([3, 2]), 4)] == [1, 1, 0, 0]


# -- the law --------------------------------------------------------------------------------------------------------


def scores_by_position(model, docs, cfg, rt, stream):
    """[per document: losses of its predictions in order]."""
    ledger, _ = tg.fill_ledger(model, docs, tiny_condition(cfg, stream=stream), cfg, rt)
    losses, times = ledger.numpy()
    assert (times == 1).all()
    return [
        losses[start : start + n] for start, n in zip(docs.starts, docs.predictions, strict=True)
    ]


@pytest.fixture(params=[False, True], ids=["windows", "stream"])
def law(rt, request):
    """(scores by position, documents, those scores) at a rate high enough for any leak to show."""
    cfg = tiny_config(ttt_lora_lr=0.05)
    model, docs = tiny_model(cfg, rt), tiny_documents(LENGTHS)

    def scores(docs):
        return scores_by_position(model, docs, cfg, rt, request.param)

    return scores, docs, scores(docs)


@pytest.mark.parametrize("document", range(len(LENGTHS)))
def test_a_later_token_never_changes_an_earlier_score(rt, law, document):
    """Change everything from token t on: the scores of predictions before t - 1 stay the same to the last bit."""
    scores, docs, before = law
    n = int(docs.predictions[document])
    for t in sorted({1, 2, C - 1, C, C + 1, n // 2, n - 1, n} & set(range(1, n + 1))):
        tokens = docs.tokens.clone()
        span = slice(int(docs.starts[document]) + t, int(docs.starts[document]) + n)
        tokens[span] = (tokens[span] - 4 + 17) % 92 + 4
        after = scores(replace(docs, tokens=tokens))
        assert np.array_equal(after[document][: t - 1], before[document][: t - 1])
        if t < n:  # and the change was a real one
            assert not np.array_equal(after[document][t - 1 :], before[document][t - 1 :])
        for other in range(len(LENGTHS)):
            if other != document:
                assert np.array_equal(after[other], before[other])


def test_other_documents_change_nothing(rt, law):
    scores, docs, before = law
    kept = len(LENGTHS) - 1
    tokens = docs.tokens.clone()
    first = int(docs.starts[kept])
    inside = tokens[:first] != 1
    tokens[:first][inside] = (tokens[:first][inside] - 4 + 31) % 92 + 4
    after = scores(replace(docs, tokens=tokens))
    assert np.array_equal(after[kept], before[kept])
    assert not np.array_equal(after[0], before[0])


@pytest.mark.parametrize("stream", [False, True])
def test_learning_helps_on_a_document_that_repeats_itself(rt, stream):
    """The point of it all: adapters must lower the loss of later chunks of a predictable document."""
    cfg = tiny_config(ttt_lora_lr=0.02)
    model = tiny_model(cfg, rt)
    text = np.concatenate(([1], np.tile([7, 8, 9, 10], 40)))
    docs = tg.split_documents(text.astype(np.uint16), 1, 0, tiny_table(96), rt.device)
    plain = score(model, docs, cfg, rt, learn=False, stream=stream)
    assert score(model, docs, cfg, rt, stream=stream).loss < plain.loss - 0.5


def test_the_model_itself_is_left_as_it_was(rt):
    cfg = tiny_config()
    model, docs = tiny_model(cfg, rt), tiny_documents(LENGTHS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score(model, docs, cfg, rt)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# -- streaming --------------------------------------------------------------------------------------------------------


def banded_losses(model, docs, window):
    """Losses (n - 1,) of one pass over each document, in which a query sees itself and window - 1 tokens before."""
    out, stream = torch.zeros(len(docs.tokens) - 1), docs.tokens.long()
    n = int(docs.predictions.max())
    age = torch.arange(n)[:, None] - torch.arange(n)
    bias = torch.zeros(n, n).masked_fill((age < 0) | (age >= window), -math.inf)

    class Whole:
        """Stands in for a memory: absolute positions, and a mask in place of a past."""

        def __init__(self, n):
            self.n, self.rope = (
                n,
                tg.rope_tables(torch.arange(n), model.blocks[0].head_dim, 10000.0),
            )

        def attend(self, layer, q, k, v):
            mask = bias[: self.n, : self.n]
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=True
            )

    for start, n in zip(docs.starts, docs.predictions, strict=True):
        span = stream[start : start + n + 1][None]
        with torch.no_grad():
            out[start : start + n] = model(span[:, :-1], span[:, 1:], memory=Whole(int(n)))[0]
    return out


@pytest.mark.parametrize("chunk", [1, 5, C, W, 30, 64])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_stream_that_learns_nothing_is_one_banded_pass(rt, chunk, batch):
    """A query sees itself and the W - 1 tokens before it, in every layer, wherever the chunk boundary falls."""
    cfg = tiny_config()
    model, docs = tiny_model(cfg, rt), tiny_documents([*LENGTHS, 120, 200])
    for targets in ((), tg.TARGETS):
        how = tg.Condition(chunk, W, batch, targets, rank=4, stream=True)
        ledger, _ = tg.fill_ledger(model, docs, how, cfg, rt)
        torch.testing.assert_close(ledger[0], banded_losses(model, docs, W), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("now", "began"), [(0, 0), (130_000, 0), (130_000, 130_000)])
def test_positions_far_out_lose_no_precision(rt, now, began):
    """Far into a document, and for one that sits down late, scores are what they are at the start, rotations fp64's."""
    cfg = tiny_config()
    model, docs, how = (
        tiny_model(cfg, rt),
        tiny_documents([150]),
        tiny_condition(cfg, learn=False, stream=True),
    )
    model = tg.frozen(model)
    memory = tg.Memory(model, how, 1, rt)
    memory.now = began
    memory.reset(torch.tensor([0]))
    memory.now = now
    losses = []
    for c in range(18):
        place = np.array([c * C])
        batch = tg.gather_chunk(
            docs.tokens, docs.starts, docs.predictions - place, place, C, how, rt
        )
        losses.append(tg.score_then_learn(model, batch, slice(1), None, memory, False)[0])
        frequencies = 10000.0 ** -(torch.arange(4).double() / 4)
        exact = torch.outer(
            torch.arange(now - began + c * C, now - began + (c + 1) * C).double(), frequencies
        )
        for ours, expected in zip(memory.rope, (exact.cos(), exact.sin()), strict=True):
            torch.testing.assert_close(ours[0, 0, :, :4].double(), expected, atol=1e-7, rtol=0)
    assert memory.now == now + 18 * C
    first = (
        0 if now == began else cfg.num_layers * W
    )  # else the past is no text, which three layers see so far
    expected = banded_losses(model, docs, W)[first : 18 * C]
    torch.testing.assert_close(torch.cat(losses)[first:], expected, atol=1e-5, rtol=0)


def test_a_memory_does_not_grow(rt, monkeypatch):
    """It holds a window for each seat that was taken in the turn before, however long the documents."""
    cfg, original, seats, sizes = tiny_config(), tg.Memory.turn, [], []

    def weigh(self, rows):
        original(self, rows)
        halves = [half for layer in self.past for half in layer]
        assert {tuple(half.shape) for half in halves} == {((seats or [3])[-1], 2, W, 8)}
        seats.append(rows.stop)
        sizes.append(
            sum(tensor.untyped_storage().nbytes() for tensor in (*halves, self.bias, *self.rope))
        )

    monkeypatch.setattr(tg.Memory, "turn", weigh)
    stream_score(tiny_model(cfg, rt), tiny_documents([30, 3000, 70]), cfg, rt)
    assert seats == [3] * 4 + [2] * 5 + [1] * 366
    assert sizes[-1] == sizes[11] < sizes[8] < sizes[3]


# -- flat -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("val_batch_size", [1, 128, 10**6])
def test_flat_scores_whole_rows_of_the_stream(rt, val_batch_size):
    cfg = tiny_config(val_batch_size=val_batch_size)
    model, docs = tiny_model(cfg, rt), tiny_documents([150, 90])
    stream = docs.tokens.long()
    nats = sum(
        model(stream[None, r : r + 32], stream[None, r + 1 : r + 33]).sum().item()
        for r in range(0, 224, 32)
    )
    count = int(tiny_table(96).count(stream[:224].numpy(), stream[1:225].numpy()).sum())
    assert flat_score(model, docs, cfg, rt).totals == (pytest.approx(nats, rel=1e-6), 224, count)


def test_a_stream_shorter_than_a_row_is_one_row(rt):
    cfg = tiny_config()
    model, docs = tiny_model(cfg, rt), tiny_documents([20])
    stream = docs.tokens.long()
    nats = model(stream[None, :-1], stream[None, 1:]).sum().item()
    assert flat_score(model, docs, cfg, rt).totals[:2] == (pytest.approx(nats, rel=1e-6), 19)


# -- the ladder and its columns -----------------------------------------------------------------------------------


def test_the_ladder_is_the_record_s():
    stream = {"ttt_stream_targets": ("fc",), "ttt_stream_lr": 0.5, "ttt_stream_rank": 5}
    docs, cfg = tiny_documents([5000]), tg.Config(grad_accum_steps=8, ttt_batch_size=13, **stream)
    rungs = tg.ladder(docs, cfg, tg.Runtime(docs.tokens.device, torch.float32))
    shapes = {
        name: (how.chunk, how.window, how.stream, how.isolated) for name, how in rungs.items()
    }
    assert shapes == {
        "flat": (1024, 1024, False, False),
        "doc": (1024, 1024, False, True),
        "stride": (256, 1024, False, True),
        "ttt": (256, 1024, False, True),
        "stream_fast": (128, 1024, True, True),
        "stream": (64, 1024, True, True),
    }
    lessons = {
        name: (how.targets, how.rank, how.lr, how.betas, how.spread, how.decay)
        for name, how in rungs.items()
        if how.targets
    }
    assert lessons == {
        "ttt": (("c_q", "c_v", "lm_head"), 8, 0.01, (0.9, 0.95), 1.0, 0.0),
        "stream_fast": (("fc",), 5, 0.5 * math.sqrt(2), (0.0, 0.99), 4.0, 0.2),
        "stream": (("fc",), 5, 0.5, (0.0, 0.99), 4.0, 0.2),
    }
    assert {name: how.batch for name, how in rungs.items() if name != "flat"} == dict.fromkeys(
        list(rungs)[1:], 13
    )


def with_lead(lengths):
    """Documents after five tokens that belong to none, and a BOS at the very end."""
    rng = np.random.default_rng(3)
    stream = np.concatenate(
        [[5, 6, 7, 8, 9], *(np.append(1, rng.integers(4, 96, n - 1)) for n in lengths), [1]]
    )
    return tg.split_documents(stream, 1, 0, tiny_table(96), torch.device("cpu"))


@pytest.mark.parametrize("name", ["flat", "doc", "stride", "ttt", "stream"])
def test_columns_add_up_chunk_by_chunk(rt, name):
    """Every row against sums taken straight from the ledger: pieces of one length, whatever the condition's chunk."""
    cfg = tiny_config()
    model, docs = tiny_model(cfg, rt), with_lead([2, 8, 40, 9, 70])
    how = tg.ladder(docs, cfg, rt)[name]
    ledger, _ = tg.fill_ledger(model, docs, how, cfg, rt)
    losses, times = ledger.double().numpy()
    starts, ends = docs.starts, docs.starts + docs.predictions
    expected = []
    for d, (start, end) in enumerate([(0, 5), *zip(starts, ends, strict=True)], start=-1):
        for c, edge in enumerate(range(start, end, C)):
            part = slice(edge, min(edge + C, end))
            if times[part].sum():
                size = int((docs.bytes.numpy()[part] * times[part]).sum())
                nats = pytest.approx(losses[part].sum(), rel=1e-12)
                expected.append((d, c, edge - start, int(times[part].sum()), size, nats))
    result = tg.Score.tally(ledger, docs, how, C)
    assert list(result.columns) == ["doc", "chunk", "start", "tokens", "bytes", "loss_nats"]
    assert (
        list(zip(*(column.tolist() for column in result.columns.values()), strict=True)) == expected
    )
    covered = len(docs.tokens) - 1 - 5 if name != "flat" else (len(docs.tokens) - 1) // 32 * 32
    assert result.totals[1] == covered and (expected[0][0] == -1) == (name == "flat")


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
def test_coverage_refuses_what_is_not_scored_once(rt, row, value, found, position):
    docs, how = with_lead([20, 30]), tg.Condition(C, W, 4)
    ledger = torch.ones(2, len(docs.tokens) - 1)
    ledger[:, :5] = 0  # before the first BOS
    tg.Score.tally(ledger, docs, how, C)
    ledger[row, position] = value
    with pytest.raises(
        tg.AgreedError, match=rf"audit coverage: position {position % ledger.shape[1]}: .*{found}"
    ):
        tg.Score.tally(ledger, docs, how, C)


def test_coverage_refuses_a_score_before_the_first_document(rt):
    docs, how = with_lead([20, 30]), tg.Condition(C, W, 4)
    with pytest.raises(tg.AgreedError, match=r"position 0: scored 1 times.*expected 0 times"):
        tg.Score.tally(torch.ones(2, len(docs.tokens) - 1), docs, how, C)


def test_scores_file_adds_up_to_the_totals(rt, tmp_path):
    cfg = tiny_config()
    model, docs = tiny_model(cfg, rt), tiny_documents(LENGTHS)
    scores = {
        name: tg.evaluate(model, docs, how, cfg, rt)
        for name, how in tg.ladder(docs, cfg, rt).items()
    }
    tg.write_scores(tmp_path / "scores.csv", scores, rt)
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["condition", "doc", "chunk", "start", "tokens", "bytes", "loss_nats"]
    for name, result in scores.items():
        mine = [row for row in rows if row["condition"] == name]
        nats = math.fsum(float(row["loss_nats"]) for row in mine)
        assert (
            nats,
            *(sum(int(row[key]) for row in mine) for key in ("tokens", "bytes")),
        ) == result.totals
        assert len({(row["doc"], row["chunk"]) for row in mine}) == len(mine)


def test_bits_per_byte_divides_bits_by_bytes():
    columns = {
        "tokens": np.array([2, 3]),
        "bytes": np.array([5, 3]),
        "loss_nats": np.array([4, 8]) * math.log(2),
    }
    result = tg.Score(columns)
    assert (result.loss, result.bpb) == (pytest.approx(math.log(2) * 12 / 5), pytest.approx(1.5))
    assert str(result) == "val_loss:1.6636 val_bpb:1.5000"


def test_a_score_over_no_bytes_is_refused(rt):
    """A row of control pieces before the only text: the flat stream has nothing to divide by."""
    stream = np.array([*[1, 2] * 16, 1, 9])
    docs = tg.split_documents(stream, 1, 0, tiny_table(96), torch.device("cpu"))
    docs.bytes[:32] = 0
    with pytest.raises(tg.AgreedError, match="0 bytes"):
        flat_score(tiny_model(tiny_config(), rt), docs, tiny_config(), rt)


def test_totals_are_rounded_once():
    """Sums in any order, and those of whoever adds the file up exactly, are the printed totals."""
    nats = np.random.default_rng(0).random(10_001) * 10.0 ** np.random.default_rng(1).integers(
        -8, 8, 10_001
    )
    ones = np.ones(len(nats), dtype=np.int64)
    totals = [
        tg.Score({"tokens": ones, "bytes": ones, "loss_nats": n}).totals for n in (nats, nats[::-1])
    ]
    assert totals[0] == totals[1] == (math.fsum(nats), len(nats), len(nats))
    assert float(nats.sum()) != math.fsum(nats)
