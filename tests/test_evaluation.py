"""The evaluation: which position is scored where, score before learning, and nothing leaks between documents."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_documents, tiny_model, tiny_table

import train_gpt as tg

C, W = 8, 24
LENGTHS = [2, 3, C, C + 1, C + 2, W, W + 1, W + 2, 5 * C + 7]


def score(model, docs, cfg, rt, chunk=C, window=W, learn=True):
    return tg.evaluate_documents(model, docs, tiny_table(96), tg.Condition(chunk, window, learn), cfg, rt)


@pytest.fixture
def recorded(monkeypatch):
    """Every chunk that passes the one place that scores, as (batch, losses)."""
    calls, original = [], tg.score_then_learn

    def record(model, batch, adapters, learn):
        losses = original(model, batch, adapters, learn)
        calls.append((batch, losses))
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
def test_each_position_is_scored_once_in_its_window(rt, chunk, window):
    """All lengths in one batch; tokens are their own positions, so a gathered window shows where it came from."""
    stream = np.arange(sum(LENGTHS))
    starts = np.cumsum([0, *LENGTHS[:-1]])
    docs = tg.Documents(torch.from_numpy(stream), starts, np.array(LENGTHS) - 1, {})
    table = tiny_table(len(stream))
    seen = [{} for _ in LENGTHS]
    chunks = -(-docs.predictions // chunk)
    for c in range(chunks.max()):
        group = np.flatnonzero(chunks > c)
        batch = tg.gather_chunk(docs, table, group, slice(None), c, tg.Condition(chunk, window, False), rt)
        for row, document in enumerate(group):
            for ids, at, target, count in zip(
                batch.ids[row].expand(batch.at.shape[1], -1)[batch.live[row]],
                batch.at[row][batch.live[row]], batch.targets[row][batch.live[row]], batch.bytes[row][batch.live[row]],
                strict=True,
            ):  # fmt: skip
                context = ids[: at + 1].tolist()
                assert context == list(range(context[0], context[-1] + 1)) and int(target) == context[-1] + 1
                assert int(count) == target + (target % 3 == 0 and context[-1] > 3)
                position = context[-1] - starts[document]
                assert position not in seen[document]
                seen[document][position] = context[0] - starts[document]
    assert seen == [brute_force(length, chunk, window) for length in LENGTHS]


def test_a_finished_document_costs_no_row(rt, recorded):
    """Rows computed = chunks that exist, whatever the lengths; every live position counted once."""
    cfg = tiny_config(ttt_batch_size=4)
    docs = tiny_documents(LENGTHS)
    result = score(tiny_model(cfg, rt), docs, cfg, rt)
    assert sum(len(batch.ids) for batch, _ in recorded) == sum(math.ceil(n / C) for n in docs.predictions)
    assert sum(int(batch.live.sum()) for batch, _ in recorded) == docs.predictions.sum() == result.tokens
    assert result.tokens == sum(LENGTHS) - 1  # every token but the first document's BOS


# -- against a document at a time -----------------------------------------------------------------------------------


def reference(model, docs, cfg, rt, chunk, window, learn):
    """(nats, tokens) of the recipe, one document and one chunk at a time, with torch's own Adam on plain tensors."""
    nats, tokens = 0.0, 0
    stream = docs.tokens.long()
    start_values = tg.DocumentAdapters(model, cfg, rt)
    for start, n in zip(docs.starts, docs.predictions, strict=True):
        start_values.reset(1)
        fresh = start_values.pairs(start_values.flat)
        pairs = {name: tuple(t.clone().requires_grad_() for t in ab) for name, ab in fresh.items()}
        adam = torch.optim.Adam([t for ab in pairs.values() for t in ab], cfg.ttt_lora_lr, (0.9, 0.95), 1e-10)
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
    assert result.tokens == tokens
    assert result.nats == pytest.approx(nats, rel=2e-6)
    if learn:
        assert abs(result.nats - score(model, docs, cfg, rt, learn=False).nats) > 5e-5 * nats


def test_learning_rate_zero_equals_no_adapters(rt):
    cfg = tiny_config(ttt_lora_lr=0.0)
    model, docs = tiny_model(cfg, rt), tiny_documents(LENGTHS)
    assert score(model, docs, cfg, rt).nats == pytest.approx(score(model, docs, cfg, rt, learn=False).nats, rel=1e-7)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_batch_size_does_not_move_the_score(rt, batch_size):
    model, docs = tiny_model(tiny_config(), rt), tiny_documents(LENGTHS)
    expected = score(model, docs, tiny_config(), rt)
    result = score(model, docs, tiny_config(ttt_batch_size=batch_size), rt)
    assert (result.tokens, result.bytes) == (expected.tokens, expected.bytes)
    assert result.nats == pytest.approx(expected.nats, rel=1e-6)


def test_order_of_documents_does_not_move_the_score(rt):
    cfg = tiny_config()
    model, docs = tiny_model(cfg, rt), tiny_documents(LENGTHS)
    order = np.random.default_rng(0).permutation(len(LENGTHS))
    shuffled = tg.Documents(docs.tokens, docs.starts[order], docs.predictions[order], {})
    assert score(model, shuffled, cfg, rt).nats == pytest.approx(score(model, docs, cfg, rt).nats, rel=1e-6)


@pytest.mark.parametrize("world", [2, 3, 16])
def test_ranks_together_give_the_same_score(rt, monkeypatch, world):
    """The sums of every rank's share; 16 ranks are more than there are documents."""
    cfg = tiny_config()
    model, docs = tiny_model(cfg, rt), tiny_documents(LENGTHS)
    parts = []
    monkeypatch.setattr(tg.Score, "from_sums", classmethod(lambda cls, sums, rt: parts.append(sums)))
    for rank in range(world):
        score(model, docs, cfg, tg.Runtime(rt.device, rt.dtype, rank=rank, world=world))
    monkeypatch.undo()
    together, alone = sum(parts).tolist(), score(model, docs, cfg, rt)
    assert together == [pytest.approx(alone.nats, rel=1e-6), alone.tokens, alone.bytes]


def test_documents_are_shared_by_work():
    chunks = np.array([100, 1, 1, 50, 50, 1, 1, 1, 1, 1])
    shares = tg.share_documents(chunks, 2)
    assert sorted(np.concatenate(shares).tolist()) == list(range(10))
    assert abs(chunks[shares[0]].sum() - chunks[shares[1]].sum()) <= 1
    for share in shares:
        assert (np.diff(chunks[share]) <= 0).all()  # longest first
    assert [len(s) for s in tg.share_documents(np.array([3, 2]), 4)] == [1, 1, 0, 0]


# -- the law --------------------------------------------------------------------------------------------------------


def scores_by_position(model, docs, cfg, rt):
    """[per document: losses of its predictions in order], by watching the one place that scores."""
    groups, original_gather, original_score = [], tg.gather_chunk, tg.score_then_learn
    out = [np.full(n, np.nan) for n in docs.predictions]

    def gather(docs, table, group, rows, c, how, rt):
        groups.append((group[rows], c))
        return original_gather(docs, table, group, rows, c, how, rt)

    def record(model, batch, adapters, learn):
        losses = original_score(model, batch, adapters, learn)
        documents, c = groups[-1]
        for row, document in enumerate(documents):
            values = losses[row][batch.live[row]].numpy()
            assert np.isnan(out[document][c * C : c * C + len(values)]).all(), "scored twice"
            out[document][c * C : c * C + len(values)] = values
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg, "gather_chunk", gather)
        patch.setattr(tg, "score_then_learn", record)
        result = score(model, docs, cfg, rt)
    assert sum(values.sum() for values in out) == pytest.approx(result.nats, rel=1e-6)
    return out


@pytest.fixture
def law(rt):
    """(model, config, documents, scores by position) at a rate high enough for any leak to show."""
    cfg = tiny_config(ttt_lora_lr=0.05)
    model, docs = tiny_model(cfg, rt), tiny_documents(LENGTHS)
    return model, cfg, docs, scores_by_position(model, docs, cfg, rt)


@pytest.mark.parametrize("document", range(len(LENGTHS)))
def test_a_later_token_never_changes_an_earlier_score(rt, law, document):
    """Change everything from token t on: the scores of predictions before t - 1 stay the same to the last bit."""
    model, cfg, docs, before = law
    n = int(docs.predictions[document])
    for t in sorted({1, 2, C - 1, C, C + 1, n // 2, n - 1, n} & set(range(1, n + 1))):
        tokens = docs.tokens.clone()
        span = slice(int(docs.starts[document]) + t, int(docs.starts[document]) + n)
        tokens[span] = (tokens[span] - 4 + 17) % 92 + 4
        after = scores_by_position(model, tg.Documents(tokens, docs.starts, docs.predictions, {}), cfg, rt)
        assert np.array_equal(after[document][: t - 1], before[document][: t - 1])
        if t < n:  # and the change was a real one
            assert not np.array_equal(after[document][t - 1 :], before[document][t - 1 :])
        for other in range(len(LENGTHS)):
            if other != document:
                assert np.array_equal(after[other], before[other])


def test_other_documents_change_nothing(rt, law):
    model, cfg, docs, before = law
    kept = len(LENGTHS) - 1
    tokens = docs.tokens.clone()
    first = int(docs.starts[kept])
    inside = tokens[:first] != 1
    tokens[:first][inside] = (tokens[:first][inside] - 4 + 31) % 92 + 4
    after = scores_by_position(model, tg.Documents(tokens, docs.starts, docs.predictions, {}), cfg, rt)
    assert np.array_equal(after[kept], before[kept])
    assert not np.array_equal(after[0], before[0])


def test_learning_helps_on_a_document_that_repeats_itself(rt):
    """The point of it all: adapters must lower the loss of later chunks of a predictable document."""
    cfg = tiny_config(ttt_lora_lr=0.02)
    model = tiny_model(cfg, rt)
    stream = np.concatenate(([1], np.tile([7, 8, 9, 10], 40)))
    docs = tg.split_documents(stream.astype(np.uint16), 1, 0, rt.device)
    assert score(model, docs, cfg, rt).loss < score(model, docs, cfg, rt, learn=False).loss - 0.5


def test_the_model_itself_is_left_as_it_was(rt):
    cfg = tiny_config()
    model, docs = tiny_model(cfg, rt), tiny_documents(LENGTHS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score(model, docs, cfg, rt)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# -- flat -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("val_batch_size", [1, 128, 10**6])
def test_flat_scores_whole_rows_of_the_stream(rt, val_batch_size):
    cfg = tiny_config(val_batch_size=val_batch_size)
    model, docs = tiny_model(cfg, rt), tiny_documents([150, 90])
    result = tg.evaluate_flat(model, docs, tiny_table(96), cfg, rt)
    stream = docs.tokens.long()
    nats = sum(model(stream[None, r : r + 32], stream[None, r + 1 : r + 33]).sum().item() for r in range(0, 224, 32))
    count = int(tiny_table(96).count(stream[:224], stream[1:225]).sum())
    assert (result.tokens, result.bytes) == (224, count)
    assert result.nats == pytest.approx(nats, rel=1e-6)


def test_a_stream_shorter_than_a_row_is_one_row(rt):
    cfg = tiny_config()
    model, docs = tiny_model(cfg, rt), tiny_documents([20])
    result = tg.evaluate_flat(model, docs, tiny_table(96), cfg, rt)
    stream = docs.tokens.long()
    assert result.tokens == 19
    assert result.nats == pytest.approx(model(stream[None, :-1], stream[None, 1:]).sum().item(), rel=1e-6)


@pytest.mark.parametrize("world", [2, 5, 9])
def test_flat_rows_are_shared_over_ranks(rt, monkeypatch, world):
    cfg = tiny_config()
    model, docs = tiny_model(cfg, rt), tiny_documents([150, 90])
    alone = tg.evaluate_flat(model, docs, tiny_table(96), cfg, rt)
    parts = []
    monkeypatch.setattr(tg.Score, "from_sums", classmethod(lambda cls, sums, rt: parts.append(sums)))
    for rank in range(world):
        ranked = tg.Runtime(rt.device, rt.dtype, rank=rank, world=world)
        tg.evaluate_flat(model, docs, tiny_table(96), cfg, ranked)
    assert sum(parts).tolist() == [pytest.approx(alone.nats, rel=1e-6), alone.tokens, alone.bytes]
