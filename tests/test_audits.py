"""The audits: each passes on sound code and stops the bug that it is for, in functions and in whole runs."""

import copy
import re
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import (
    CONFORMANCE,
    CPU,
    EVAL_ARTIFACT,
    tiny_condition,
    tiny_config,
    tiny_documents,
    tiny_model,
    train_tokenizer,
)

import train_gpt as tg

TOKENIZER = CONFORMANCE / "tokenizer.model"


def refusal(ended):
    """The one line that a run, in this process, printed on stderr when it stopped with status 1."""
    assert ended.status == 1
    assert re.fullmatch(r"error: .*\n", ended.err), ended.err
    return ended.err


# -- bytes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return tg.load_tokenizer(str(TOKENIZER), 1024)


def audit(tokenizer, texts, table=None):
    """What the audit says of documents, given as texts or as ids, whose bytes this table counts."""
    table = table or tg.ByteTable.build(tokenizer)
    ids = []
    for text in texts:
        ids += [tokenizer.bos_id(), *(tokenizer.encode(text) if isinstance(text, str) else text)]
    docs = tg.split_documents(np.array(ids), tokenizer.bos_id(), 0, table, CPU)
    return tg.audit_bytes(docs, table, tokenizer)


def renamed(pieces, model):
    """The tokenizer of this model with other pieces in the place of some, each of as many bytes."""
    for old, new in pieces.items():
        entry = b"\x0a%c%b\x15" % (len(old.encode()), old.encode())
        assert model.count(entry) == 1
        model = model.replace(entry, entry.replace(old.encode(), new.encode()))
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def test_random_tokens_pass(tokenizer):
    """Control pieces, broken UTF-8 and spaces after either: bytes are right for any stream.

    The audit goes on to the words, which no tokenizer would have spelled like this.
    """
    with pytest.raises(tg.UserError, match=r"audit bytes: only \d+ of \d+ words"):
        audit(tokenizer, np.random.default_rng(0).integers(0, 1024, (400, 50)))


def test_a_sample_of_200_at_least(tokenizer):
    found = audit(tokenizer, ["some words"] * 1000)
    assert 200 <= int(re.search(r"documents:(\d+) of:1000 ", found)[1]) < 1000


def test_a_wrong_piece_is_named(tokenizer):
    """Here a space is counted twice."""
    table = tg.ByteTable.build(tokenizer)
    table.base[tokenizer.piece_to_id("▁the")] = 4
    with pytest.raises(tg.UserError, match=r"audit bytes: .* are the pieces \['▁the'\]"):
        audit(tokenizer, ["or the end"], table)


def test_a_space_that_opens_a_document_is_no_text(tokenizer):
    """The audit takes nothing from the table, which here takes BOS for text."""
    table = tg.ByteTable.build(tokenizer)
    table.is_text[tokenizer.bos_id()] = True
    with pytest.raises(tg.UserError, match=r"audit bytes: .* 4 bytes .* has 3; .*how pieces join"):
        audit(tokenizer, [[tokenizer.piece_to_id("▁the")]], table)


def test_a_tokenizer_without_a_piece_for_space_is_refused():
    """Byte fallback would spell each space in three bytes: the score would look a fifth better."""
    with pytest.raises(tg.UserError, match="TOKENIZER_PATH: found no piece '▁'"):
        tg.ByteTable.build(renamed({"▁": "ㄅ"}, TOKENIZER.read_bytes()))


def test_bytes_and_spaces_alone_pass(tmp_path):
    """Without a letter among its pieces a tokenizer is audited all the same."""
    model = train_tokenizer(tmp_path / "b.model", ["b b"], model_type="char", vocab_size=262)
    assert audit(renamed({"b": "\t"}, model.read_bytes()), ["all of it bytes"])


def test_spaces_inside_pieces_count_one_byte_each():
    tokenizer = renamed({"▁first": "▁of▁", "▁one": "▁▁"}, TOKENIZER.read_bytes())
    letter = tokenizer.piece_to_id("a")
    of, spaces = tokenizer.piece_to_id(["▁of▁", "▁▁"])
    with pytest.raises(tg.UserError, match=r"audit bytes: only 0 of 3 words"):  # bytes are right
        audit(tokenizer, [[letter, of, of, letter, spaces, letter], [spaces, letter]])


# -- causality --------------------------------------------------------------------------------------------------------

# At a rate high enough for any leak to show.
HOW = tiny_condition(tiny_config(ttt_lora_lr=0.05))
STREAM = replace(HOW, stream=True)


@pytest.fixture
def audited(rt):
    """A function that audits a small model under a condition, on documents of these lengths."""
    model = tiny_model(tiny_config(), rt)

    def audited(how, *lengths):
        return tg.audit_causality(model, tiny_documents(lengths or [50, 9, 60, 33, 40]), how, rt)

    return audited


@pytest.mark.parametrize(
    "how", [HOW, STREAM, tg.Condition(8, 24, 4), tg.Condition(32, 32, 4, isolated=False)]
)
def test_sound_code_passes(audited, how):
    # The longest and the third longest document, of 60 and 39 predictions, keep their beginnings.
    compared = {8: 8 * 3 + 4 + 4, 32: 16 + 16}[how.chunk]
    assert audited(how) == f"documents:3 compared:{compared}"


@pytest.mark.parametrize(
    ("lengths", "compared"),
    [([2], 0), ([9, 3], 4 + 4), ([30, 30, 30], 20 + 4)],
)
def test_few_and_short_documents_pass(audited, lengths, compared):
    """Short ones stand in for each other; an only chunk is cut halfway, else the last but one."""
    assert audited(HOW, *lengths) == f"documents:{len(lengths)} compared:{compared}"


def assert_leaks(audited, how, *lengths):
    """The audit finds it, and says by how much."""
    with pytest.raises(tg.UserError, match=r"audit causality: .* moved scores by .*leaks"):
        audited(how, *lengths)


tg_score_then_learn = tg.score_then_learn
tg_gather_chunk = tg.gather_chunk
tg_count = tg.ByteTable.count
tg_step = tg.DocumentAdapters.step
tg_advance = tg.KVCache.advance


def learn_then_score(model, chunk, rows, adapters, cache, learns):
    if learns:
        tg_score_then_learn(model, chunk, rows, adapters, copy.deepcopy(cache), learns)
    return tg_score_then_learn(model, chunk, rows, adapters, cache, False)


def remember_everything(self, rows):
    """A new document finds what the last one in its row left."""


def learn_for_good(model, *arguments):
    losses = tg_score_then_learn(model, *arguments)
    if arguments[-1]:
        model.blocks[0].attn.q_gain.mul_(1 + 1e-3 * float(losses.mean()))
    return losses


def share_lessons(self, rows, grad):
    tg_step(self, rows, grad.mean(0, keepdim=True).expand_as(grad))


def see_the_future(q, k, v):
    return tg.F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def normalise_over_the_batch(x, shape):
    return x / x.square().mean().sqrt()


def see_the_future_of_the_chunk(self, batch):
    tg_advance(self, batch)
    self.mask[:, :, -self.chunk :] = 0


def score_by_no_numbers(model, chunk, *_):
    return torch.full(chunk.targets.shape, torch.nan)


def see_what_others_left(self, batch):
    """A cache that shows whatever is in it, be it from another document."""
    self.began.zero_()
    tg_advance(self, batch)


LEARNS_FIRST = (tg, "score_then_learn", learn_then_score)
BOTH = (HOW, STREAM)
# What is wrong, and under which conditions it can be.
LEAKS = [
    ((tg.DocumentAdapters, "restart", remember_everything), BOTH),
    ((tg, "score_then_learn", learn_for_good), BOTH),
    ((tg, "score_then_learn", score_by_no_numbers), BOTH),
    ((tg.DocumentAdapters, "step", share_lessons), BOTH),
    ((tg.F, "rms_norm", normalise_over_the_batch), BOTH),
    ((tg, "causal_attention", see_the_future), [HOW]),
    ((tg.KVCache, "advance", see_the_future_of_the_chunk), [STREAM]),
    ((tg.KVCache, "advance", see_what_others_left), [STREAM]),
]


@pytest.mark.parametrize(("bug", "hows"), LEAKS)
def test_a_leak_is_found(audited, monkeypatch, bug, hows):
    monkeypatch.setattr(*bug)
    for how in hows:
        assert_leaks(audited, how)


@pytest.mark.parametrize("length", [10, 17, 25, 60])
def test_learning_before_scoring_is_found_at_any_length(audited, monkeypatch, length):
    monkeypatch.setattr(*LEARNS_FIRST)
    assert_leaks(audited, HOW, length)
    assert_leaks(audited, STREAM, length)


def test_noise_is_allowed_only_where_no_kernel_is_deterministic(audited, monkeypatch):
    """A small difference fails, unless an operation is named that cannot repeat; a large one always does."""
    original = tg.causal_attention

    def noisy_attention(q, k, v):
        assert are_deterministic() or unable
        return original(q, k, v) + noise * torch.randn(q.shape)

    def unable_attention(q, k, v):
        q.detach().clone().put_(torch.tensor([0]), torch.tensor([0.0]))  # has no such kernel
        return noisy_attention(q, k, v)

    are_deterministic = torch.are_deterministic_algorithms_enabled
    noise = 1e-6
    unable = False
    monkeypatch.setattr(tg, "causal_attention", noisy_attention)
    assert_leaks(audited, HOW)
    unable = True
    monkeypatch.setattr(tg, "causal_attention", unable_attention)
    assert "(put_ does not have a deterministic" in audited(HOW)
    assert not are_deterministic()
    noise = 0.1
    assert_leaks(audited, HOW)


# -- whole runs -----------------------------------------------------------------------------------------------------


def count_spaces_twice(table, previous, target):
    return tg_count(table, previous, target) + table.leading_space[target]


def forget_the_last(tokens, spans, *rest):
    chunk = tg_gather_chunk(tokens, spans, *rest)
    if (spans[1] > 0).all():
        chunk.live[-1, -1] = False
    return chunk


@pytest.mark.parametrize(
    ("bug", "rungs", "words"),
    [
        ((tg.ByteTable, "count", count_spaces_twice), "flat", "bytes: up to token "),
        (LEARNS_FIRST, "ttt,flat", "causality: later tokens "),
        ((tg, "gather_chunk", forget_the_last), "stride,flat", r"coverage: .* scored 0 times, "),
    ],
)
def test_a_run_that_fails_an_audit_prints_no_score(
    bug, rungs, words, tmp_path, run_here, monkeypatch
):
    monkeypatch.setattr(*bug)
    ended = run_here(tmp_path, **EVAL_ARTIFACT, EVAL=rungs)
    assert re.match(f"error: audit {words}", refusal(ended))
    assert "bpb" not in ended.out


def test_a_diverging_training_stops_and_exports_nothing(tmp_path, run_here):
    """A rate that overflows: the line says at which step and parameter."""
    rates = {"MATRIX_LR": "1e18", "SCALAR_LR": "1e18", "WARMUP_STEPS": "0"}
    ended = run_here(tmp_path, ITERATIONS="30", **rates)
    line = r"error: step (\d+): .* \S+ is not finite; .* after step (\d+); nothing was exported"
    step, good = map(int, re.match(line, refusal(ended)).groups())
    assert 1 < step == good + 1 <= 10
    assert not list(tmp_path.glob("final_model*"))


# -- what is not finite ---------------------------------------------------------------------------------------------

FC = "blocks.1.mlp.fc.weight"


@pytest.fixture
def trainer(rt):
    cfg = tiny_config(iterations=100, train_log_every=0, val_loss_every=0)
    stream = tg.TokenStream([np.arange(5000) % 96], 96)
    return tg.Trainer(tiny_model(cfg, rt), stream, rt, tg.RunLog(), {})


def spoil_gradient(trainer, step):
    """A gradient holds a nan in the step with this number, counted from 1."""

    def hook(grad):
        spoils = trainer.step == step - 1
        return grad.index_fill(0, torch.tensor([3]), torch.nan) if spoils else grad

    trainer.params[FC].register_hook(hook)


def test_the_parameter_at_fault_is_named(trainer):
    """Clipping by a norm that is no number spoils all gradients, but one was the first."""
    trainer.cfg = replace(trainer.cfg, grad_clip_norm=1.0)
    spoil_gradient(trainer, 2)
    for _ in range(3):
        trainer.train_step()  # by then everything is lost, but the first fault is what counts
    with pytest.raises(tg.UserError, match=f"step 2: the gradient of {FC} .*step 1;"):
        trainer.check_finite()


def test_a_weight_at_fault_is_named(trainer):
    """Finite gradients, an infinite rate: the weight is what goes first."""
    trainer.optimizers[0].param_groups[0]["base_lr"] = torch.inf
    trainer.train_step()
    with pytest.raises(tg.UserError, match=r"step 1: the weight blocks\.0\.attn\.c_q\.weight "):
        trainer.check_finite()


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, 15),
        ({"train_log_every": 14}, 14),
        ({"val_loss_every": 14}, 14),
        ({"iterations": 13}, 13),
    ],
)
def test_a_fault_is_found_before_it_is_reported(trainer, settings, found, capsys):
    """Before any log line, any validation and the end, and within two steps."""
    trainer.cfg = replace(trainer.cfg, **settings)
    spoil_gradient(trainer, 13)
    with pytest.raises(tg.UserError, match="step 13: "):
        tg.train(trainer, lambda: pytest.fail("it validates") if trainer.step == found else "")
    assert trainer.step == found
    assert f"step:{found}/" not in capsys.readouterr().out


def test_the_clock_is_two_steps_ahead_of_the_device_at_most(trainer, monkeypatch):
    """Of a device that works only while it is waited for."""
    ended = []

    def record():
        step = trainer.step
        assert len(ended) == max(0, step - 2)
        return mock.Mock(synchronize=lambda: ended.append(step))

    trainer.cfg = replace(trainer.cfg, iterations=7)
    monkeypatch.setattr(trainer.rt, "record", record)
    tg.train(trainer, None)
    assert ended == [*range(7)]


def test_a_fault_is_counted_from_the_end_of_the_warm_up(trainer):
    trainer.cfg = replace(trainer.cfg, warmup_steps=2)
    trainer.warm_up()
    spoil_gradient(trainer, 1)
    trainer.train_step()
    with pytest.raises(tg.UserError, match=f"step 1: the gradient of {FC} "):
        trainer.check_finite()
