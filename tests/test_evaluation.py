"""The evaluation: which position is scored where, score before learning, and nothing leaks between documents."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_documents, tiny_model, tiny_table

import train_gpt as tg

C, W = 8, 24
LENGTHS = [2, 3, C, C + 1, C + 2, W, W + 1, W + 2, 5 * C + 7]


def score(model, docs, cfg, rt, learn=True):
    return tg.evaluate(model, docs, tg.Condition(C, W, cfg.ttt_batch_size, learn), cfg, rt)


def flat_score(model, docs, cfg, rt):
    return tg.evaluate(model, docs, tg.ladder(docs, cfg, rt)["flat"], cfg, rt)


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
    predictions = np.array(LENGTHS) - 1
    seen = [{} for _ in LENGTHS]
    chunks = -(-predictions // chunk)
    for c in range(chunks.max()):
        group = np.flatnonzero(chunks > c)
        how = tg.Condition(chunk, window, 64)
        batch = tg.gather_chunk(torch.from_numpy(stream), starts[group], predictions[group], slice(None), c, how, rt)
        for row, document in enumerate(group):
            live = batch.live[row]
            columns = (part[row][live] for part in (batch.at, batch.positions, batch.targets))
            for at, place, target in zip(*columns, strict=True):
                context = batch.ids[row][: at + 1].tolist()
                assert context == list(range(context[0], context[-1] + 1)) and int(target) == context[-1] + 1
                assert int(place) == context[-1]
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
    assert sum(int(batch.live.sum()) for batch, _ in recorded) == docs.predictions.sum() == result.totals[1]
    assert result.totals[1] == sum(LENGTHS) - 1  # every token but the first document's BOS


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
    assert result.totals[1] == tokens
    assert result.totals[0] == pytest.approx(nats, rel=2e-6)
    if learn:
        assert abs(result.totals[0] - score(model, docs, cfg, rt, learn=False).totals[0]) > 5e-5 * nats


def test_learning_rate_zero_equals_no_adapters(rt):
    cfg = tiny_config(ttt_lora_lr=0.0)
    model, docs = tiny_model(cfg, rt), tiny_documents(LENGTHS)
    plain = score(model, docs, cfg, rt, learn=False)
    assert score(model, docs, cfg, rt).totals[0] == pytest.approx(plain.totals[0], rel=1e-7)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_batch_size_does_not_move_the_score(rt, batch_size):
    model, docs = tiny_model(tiny_config(), rt), tiny_documents(LENGTHS)
    expected = score(model, docs, tiny_config(), rt)
    result = score(model, docs, tiny_config(ttt_batch_size=batch_size), rt)
    assert result.totals == (pytest.approx(expected.totals[0], rel=1e-6), *expected.totals[1:])


def test_order_of_documents_does_not_move_the_score(rt):
    cfg = tiny_config()
    model = tiny_model(cfg, rt)
    texts = [np.random.default_rng(i).integers(4, 96, n - 1) for i, n in enumerate(LENGTHS)]
    scores = []
    for order in (range(len(LENGTHS)), np.random.default_rng(0).permutation(len(LENGTHS))):
        stream = np.concatenate([*(np.append(1, texts[i]) for i in order), [1]])
        docs = tg.split_documents(stream, 1, 0, tiny_table(96), rt.device)
        scores.append(score(model, docs, cfg, rt))
    assert scores[0].totals == (pytest.approx(scores[1].totals[0], rel=1e-6), *scores[1].totals[1:])
    assert scores[0].columns["doc"].tolist() != scores[1].columns["doc"].tolist()


@pytest.mark.parametrize("world", [2, 3, 16])
@pytest.mark.parametrize("evaluate", [score, flat_score])
def test_ranks_together_give_the_same_score(rt, world, evaluate):
    """The sums of every rank's share; 16 ranks are more than there are documents or rows."""
    cfg = tiny_config()
    model, docs = tiny_model(cfg, rt), tiny_documents(LENGTHS)
    parts = []

    class Ranked(tg.Runtime):
        def sum(self, values):
            parts.append(values)
            return whole if len(parts) > world else values

    whole = None
    for rank in range(world):
        with pytest.raises(tg.AgreedError, match="audit coverage"):  # a share alone is not the whole
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


def scores_by_position(model, docs, cfg, rt):
    """[per document: losses of its predictions in order]."""
    how = tg.Condition(C, W, cfg.ttt_batch_size, learn=True)
    losses, times = tg.fill_ledger(model, docs, how, cfg, rt).numpy()
    assert (times == 1).all()
    return [losses[start : start + n] for start, n in zip(docs.starts, docs.predictions, strict=True)]


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
        after = scores_by_position(model, replace(docs, tokens=tokens), cfg, rt)
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
    after = scores_by_position(model, replace(docs, tokens=tokens), cfg, rt)
    assert np.array_equal(after[kept], before[kept])
    assert not np.array_equal(after[0], before[0])


def test_learning_helps_on_a_document_that_repeats_itself(rt):
    """The point of it all: adapters must lower the loss of later chunks of a predictable document."""
    cfg = tiny_config(ttt_lora_lr=0.02)
    model = tiny_model(cfg, rt)
    stream = np.concatenate(([1], np.tile([7, 8, 9, 10], 40)))
    docs = tg.split_documents(stream.astype(np.uint16), 1, 0, tiny_table(96), rt.device)
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
    stream = docs.tokens.long()
    nats = sum(model(stream[None, r : r + 32], stream[None, r + 1 : r + 33]).sum().item() for r in range(0, 224, 32))
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
    docs = tiny_documents([5000])
    rungs = tg.ladder(docs, tg.Config(grad_accum_steps=8), tg.Runtime(docs.tokens.device, torch.float32))
    shapes = {name: (how.chunk, how.window, how.learn, how.isolated) for name, how in rungs.items()}
    assert shapes == {
        "flat": (1024, 1024, False, False), "doc": (1024, 1024, False, True),
        "stride": (256, 1024, False, True), "ttt": (256, 1024, True, True),
    }  # fmt: skip


def with_lead(lengths):
    """Documents after five tokens that belong to none, and a BOS at the very end."""
    rng = np.random.default_rng(3)
    stream = np.concatenate([[5, 6, 7, 8, 9], *(np.append(1, rng.integers(4, 96, n - 1)) for n in lengths), [1]])
    return tg.split_documents(stream, 1, 0, tiny_table(96), torch.device("cpu"))


@pytest.mark.parametrize("name", ["flat", "doc", "stride", "ttt"])
def test_columns_add_up_chunk_by_chunk(rt, name):
    """Every row against sums taken straight from the ledger: pieces of one length, whatever the condition's chunk."""
    cfg = tiny_config()
    model, docs = tiny_model(cfg, rt), with_lead([2, 8, 40, 9, 70])
    how = tg.ladder(docs, cfg, rt)[name]
    ledger = tg.fill_ledger(model, docs, how, cfg, rt)
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
    assert list(zip(*(column.tolist() for column in result.columns.values()), strict=True)) == expected
    covered = len(docs.tokens) - 1 - 5 if name != "flat" else (len(docs.tokens) - 1) // 32 * 32
    assert result.totals[1] == covered and (expected[0][0] == -1) == (name == "flat")


@pytest.mark.parametrize(("row", "value", "found"), [(1, 0, "scored 0 times"), (1, 2, "scored 2 times"),
                                                     (0, math.nan, "loss nan"), (0, math.inf, "loss inf")])  # fmt: skip
@pytest.mark.parametrize("position", [5, 40, -1])
def test_coverage_refuses_what_is_not_scored_once(rt, row, value, found, position):
    docs, how = with_lead([20, 30]), tg.Condition(C, W, 4)
    ledger = torch.ones(2, len(docs.tokens) - 1)
    ledger[:, :5] = 0  # before the first BOS
    tg.Score.tally(ledger, docs, how, C)
    ledger[row, position] = value
    with pytest.raises(tg.AgreedError, match=rf"audit coverage: position {position % ledger.shape[1]}: .*{found}"):
        tg.Score.tally(ledger, docs, how, C)


def test_coverage_refuses_a_score_before_the_first_document(rt):
    docs, how = with_lead([20, 30]), tg.Condition(C, W, 4)
    with pytest.raises(tg.AgreedError, match=r"position 0: scored 1 times.*expected 0 times"):
        tg.Score.tally(torch.ones(2, len(docs.tokens) - 1), docs, how, C)


def test_scores_file_adds_up_to_the_totals(rt, tmp_path):
    cfg = tiny_config()
    model, docs = tiny_model(cfg, rt), tiny_documents(LENGTHS)
    scores = {name: tg.evaluate(model, docs, how, cfg, rt) for name, how in tg.ladder(docs, cfg, rt).items()}
    tg.write_scores(tmp_path / "scores.csv", scores, rt)
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["condition", "doc", "chunk", "start", "tokens", "bytes", "loss_nats"]
    for name, result in scores.items():
        mine = [row for row in rows if row["condition"] == name]
        nats = math.fsum(float(row["loss_nats"]) for row in mine)
        assert (nats, *(sum(int(row[key]) for row in mine) for key in ("tokens", "bytes"))) == result.totals
        assert len({(row["doc"], row["chunk"]) for row in mine}) == len(mine)


def test_bits_per_byte_divides_bits_by_bytes():
    columns = {"tokens": np.array([2, 3]), "bytes": np.array([5, 3]), "loss_nats": np.array([4, 8]) * math.log(2)}
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
    nats = np.random.default_rng(0).random(10_001) * 10.0 ** np.random.default_rng(1).integers(-8, 8, 10_001)
    ones = np.ones(len(nats), dtype=np.int64)
    totals = [tg.Score({"tokens": ones, "bytes": ones, "loss_nats": n}).totals for n in (nats, nats[::-1])]
    assert totals[0] == totals[1] == (math.fsum(nats), len(nats), len(nats))
    assert float(nats.sum()) != math.fsum(nats)
