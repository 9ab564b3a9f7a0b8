"""The audits: each passes on sound code and stops the bug that it is for, in functions and in whole runs."""

import copy
import io
import math
import re
from dataclasses import replace

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
    tiny_score,
    write_shard,
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


def renamed(**pieces):
    """The tokenizer with other pieces in the place of some, each of as many bytes."""
    model = TOKENIZER.read_bytes()
    for old, new in pieces.items():
        entry, changed = (b"\x0a%c%b\x15" % (len(p.encode()), p.encode()) for p in (old, new))
        assert model.count(entry) == 1
        model = model.replace(entry, changed)
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def test_a_right_table_passes(tokenizer):
    texts = ["the first of all texts", "Crème brûlée 漢字 🙂 fine", "tabs\tand  two spaces", "the end"]
    size = sum(len(tokenizer.decode(tokenizer.encode(text)).encode()) for text in texts)
    assert audit(tokenizer, texts) == f"documents:4 of:4 table_bytes:{size} text_bytes:{size}"


def test_random_tokens_pass(tokenizer):
    """Control pieces, broken UTF-8 and spaces after either: the rules hold for any stream."""
    audit(tokenizer, np.random.default_rng(0).integers(0, 1024, (400, 50)))


def test_a_sample_of_200_at_least(tokenizer):
    found = audit(tokenizer, ["some words"] * 1000)
    assert 200 <= int(re.search(r"documents:(\d+) of:1000 ", found)[1]) < 1000


@pytest.mark.parametrize(
    ("piece", "size", "text"), [("▁the", 4, "or the end"), ("<0xE6>", 3, "漢字")]
)
def test_a_wrong_piece_is_named(tokenizer, piece, size, text):
    """A space counted twice; a byte that counts as a whole letter."""
    table = tg.ByteTable.build(tokenizer)
    table.base[tokenizer.piece_to_id(piece)] = size
    with pytest.raises(tg.UserError, match=rf"audit bytes: .* are the pieces \['{piece}'\]"):
        audit(tokenizer, ["plain", text], table)


def test_a_space_that_opens_a_document_is_no_text(tokenizer):
    """The audit takes nothing from the table, which here takes BOS for text."""
    table = tg.ByteTable.build(tokenizer)
    table.is_text[tokenizer.bos_id()] = True
    with pytest.raises(tg.UserError, match=r"audit bytes: .* 4 bytes .* has 3; .*how pieces join"):
        audit(tokenizer, [[tokenizer.piece_to_id("▁the")]], table)


def test_a_tokenizer_without_a_piece_for_space_is_refused():
    """Byte fallback would spell each space in three bytes: the score would look a fifth better."""
    with pytest.raises(tg.UserError, match="TOKENIZER_PATH: found no piece '▁'"):
        tg.ByteTable.build(renamed(**{"▁": "ㄅ"}))


def test_bytes_and_spaces_alone_pass():
    """Without a letter among its pieces a tokenizer is audited all the same."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["\x07"]),
        model_writer=model,
        model_type="char",
        byte_fallback=True,
        vocab_size=260,
        minloglevel=2,
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert audit(tokenizer, ["all of it bytes"])


def test_spaces_inside_pieces_count_one_byte_each():
    tokenizer = renamed(▁first="▁of▁", ▁one="▁▁")
    of, spaces, letter = tokenizer.piece_to_id(["▁of▁", "▁▁", "a"])
    texts = [letter, of, of, letter, spaces, letter, spaces], [of, letter, of], [spaces, letter]
    size = sum(len(tokenizer.decode(ids).encode()) for ids in texts)
    assert audit(tokenizer, texts) == f"documents:3 of:3 table_bytes:{size} text_bytes:{size}"


# -- causality --------------------------------------------------------------------------------------------------------

# At a rate high enough for any leak to show.
HOW = tiny_condition(tiny_config(ttt_lora_lr=0.05))
STREAM = tiny_condition(tiny_config(ttt_lora_lr=0.05), stream=True)


@pytest.fixture
def scored(rt):
    """(model, documents)"""
    return tiny_model(tiny_config(), rt), tiny_documents([50, 9, 60, 33, 40])


@pytest.mark.parametrize(
    "how", [HOW, STREAM, tg.Condition(8, 24, 4), tg.Condition(32, 32, 4, isolated=False)]
)
def test_sound_code_passes(scored, rt, how):
    # The longest and the third longest document, of 60 and 39 predictions, keep their beginnings.
    compared = {8: 8 * 3 + 4 + 4, 32: 16 + 16}[how.chunk]
    assert tg.audit_causality(*scored, how, rt) == f"documents:3 compared:{compared}"


@pytest.mark.parametrize(
    ("lengths", "compared"),
    [
        ([2], 0),
        ([3], 2),
        ([2, 2], 2),
        ([9, 3], 4 + 4),
        ([17], 4 + 4),
        ([18], 8 + 4 + 4),
        ([30, 30, 30], 20 + 4),
    ],
)
def test_few_and_short_documents_pass(rt, lengths, compared):
    """Short ones stand in for each other; an only chunk is cut halfway, else the last but one."""
    model = tiny_model(tiny_config(), rt)
    found = tg.audit_causality(model, tiny_documents(lengths), HOW, rt)
    assert found == f"documents:{len(lengths)} compared:{compared}"


tg_score_then_learn = tg.score_then_learn
tg_init = tg.DocumentAdapters.__init__
tg_gather_chunk = tg.gather_chunk
tg_step = tg.DocumentAdapters.step
tg_advance = tg.KVCache.advance
tg_extend = tg.KVCache.extend


def learn_then_score(model, chunk, rows, adapters, cache, learns):
    if learns:
        before = copy.copy(vars(cache)) if cache else {}
        past = {name: dict(before[name]) for name in before if name in ("keys", "values")}
        tg_score_then_learn(model, chunk, rows, adapters, cache, learns)
        if cache:
            vars(cache).update(before | past)
    return tg_score_then_learn(model, chunk, rows, adapters, cache, False)


def remember_everything(self, rows):
    """A new document finds what the last one in its row left."""


def remember_for_ever(self, *arguments):
    """State on the class outlives every evaluation, the audit's own included."""
    tg_init(self, *arguments)
    kept = tg.DocumentAdapters.__dict__.get("kept", [])
    for mine, theirs in zip(self.state, kept, strict=bool(kept)):
        mine.copy_(theirs)
    tg.DocumentAdapters.kept = self.state
    self.restart = lambda rows: None


def learn_for_good(model, *arguments):
    losses = tg_score_then_learn(model, *arguments)
    if arguments[-1]:
        model.blocks[0].attn.q_gain.mul_(1 + 1e-3 * float(losses.mean()))
    return losses


def look_ahead_in_slid_windows(tokens, spans, length, how, rt):
    """Windows that no longer begin with their document show a prediction what follows its target."""
    chunk = tg_gather_chunk(tokens, spans, length, how, rt)
    slid = torch.from_numpy(spans[2] > how.window)[:, None]
    at = chunk.at
    if at is None:
        at = torch.arange(chunk.targets.size(1)).expand_as(chunk.targets)
    return chunk._replace(at=(at + 2 * slid).clamp(max=chunk.ids.size(1) - 1))


def share_lessons(self, rows, grad):
    tg_step(self, rows, grad.mean(0, keepdim=True).expand_as(grad))


def see_the_future(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def normalise_over_the_batch(x, shape):
    return x / x.square().mean().sqrt()


def see_the_future_of_the_chunk(self, batch):
    tg_advance(self, batch)
    self.mask[:, :, -self.chunk :] = 0


def see_what_others_left(self, batch):
    """A cache that shows whatever is in it, be it from another document."""
    self.began.zero_()
    tg_advance(self, batch)


def share_the_past(self, layer, keys, values):
    """Every document reads the cache of the one in the last row."""
    for past in (self.keys, self.values):
        if layer in past:
            past[layer] = past[layer][-1:].expand_as(past[layer])
    return tg_extend(self, layer, keys, values)


ADAPTERS = tg.DocumentAdapters
BUGS = {
    "learning before scoring": (tg, "score_then_learn", learn_then_score),
    "adapters kept from document to document": (ADAPTERS, "restart", remember_everything),
    "adapters kept from evaluation to evaluation": (ADAPTERS, "__init__", remember_for_ever),
    "a weight that learns": (tg, "score_then_learn", learn_for_good),
    "one gradient for all documents": (ADAPTERS, "step", share_lessons),
    "statistics of the whole batch": (tg.F, "rms_norm", normalise_over_the_batch),
}
WINDOW_BUGS = BUGS | {
    "a look ahead in slid windows": (tg, "gather_chunk", look_ahead_in_slid_windows),
    "attention without a mask": (tg, "causal_attention", see_the_future),
}
STREAM_BUGS = BUGS | {
    "a chunk that sees its own future": (tg.KVCache, "advance", see_the_future_of_the_chunk),
    "a cache that outlives its document": (tg.KVCache, "advance", see_what_others_left),
    "a cache of another document": (tg.KVCache, "extend", share_the_past),
}
LEAKS = [(HOW, name) for name in WINDOW_BUGS] + [(STREAM, name) for name in STREAM_BUGS]


@pytest.mark.parametrize(("how", "bug"), LEAKS)
def test_a_leak_is_found(scored, rt, monkeypatch, how, bug):
    monkeypatch.setattr(*(WINDOW_BUGS | STREAM_BUGS)[bug])
    monkeypatch.delattr(ADAPTERS, "kept", raising=False)
    with pytest.raises(tg.UserError, match=r"audit causality: .* moved scores by up to .*leaks"):
        tg.audit_causality(*scored, how, rt)


@pytest.mark.parametrize("length", [10, 16, 17, 18, 24, 25, 33, 60])
@pytest.mark.parametrize("how", [HOW, STREAM])
def test_learning_before_scoring_is_found_at_any_length(rt, monkeypatch, how, length):
    monkeypatch.setattr(tg, "score_then_learn", learn_then_score)
    model = tiny_model(tiny_config(), rt)
    with pytest.raises(tg.UserError, match="audit causality"):
        tg.audit_causality(model, tiny_documents([length]), how, rt)


def test_noise_of_kernels_is_allowed_for_where_there_is_any(scored, rt, monkeypatch):
    """GPUs add in any order: there a small difference is no leak, while a real one still is."""
    generator = torch.Generator().manual_seed(0)
    original = tg.causal_attention

    def noisy_attention(q, k, v):
        out = original(q, k, v)
        return out + 1e-6 * torch.randn(out.shape, generator=generator)

    monkeypatch.setattr(tg, "causal_attention", noisy_attention)
    with pytest.raises(tg.UserError, match="audit causality"):
        tg.audit_causality(*scored, HOW, rt)
    rt.score_noise = 1e-2
    tg.audit_causality(*scored, HOW, rt)
    monkeypatch.setattr(tg, "score_then_learn", learn_then_score)
    with pytest.raises(tg.UserError, match="audit causality"):
        tg.audit_causality(*scored, HOW, rt)


@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_do_not_pass(scored, rt, monkeypatch, fill):
    def score(model, chunk, *_):
        return torch.full(chunk.targets.shape, fill)

    monkeypatch.setattr(tg, "score_then_learn", score)
    with pytest.raises(tg.UserError, match="audit causality"):
        tg.audit_causality(*scored, HOW, rt)


def test_a_run_that_learns_before_it_scores_stops(tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(tg, "score_then_learn", learn_then_score)
    ended = run_here(tmp_path, **EVAL_ARTIFACT, EVAL="flat,ttt")
    assert refusal(ended).startswith("error: audit causality: ")
    assert "condition:flat" in ended.out
    assert "condition:ttt" not in ended.out


def test_a_run_that_skips_tokens_stops(tmp_path, run_here, monkeypatch):
    def forget_the_last(tokens, spans, *rest):
        chunk = tg_gather_chunk(tokens, spans, *rest)
        if (spans[1] > 0).all():
            chunk.live[-1, -1] = False
        return chunk

    monkeypatch.setattr(tg, "gather_chunk", forget_the_last)
    ended = run_here(tmp_path, **EVAL_ARTIFACT, EVAL="stride,flat")
    line = r"error: audit coverage: position \d+: scored 0 times, loss 0; expected 1 times"
    assert re.match(line, refusal(ended))
    assert "condition:" not in ended.out


# -- what is not finite, and what is too large --------------------------------------------------------------------


def test_a_diverging_training_stops_and_exports_nothing(tmp_path, run_here):
    """A rate that overflows: the line says at which step and parameter."""
    rates = {"MATRIX_LR": "1e18", "SCALAR_LR": "1e18", "WARMUP_STEPS": "0"}
    ended = run_here(tmp_path, ITERATIONS="30", **rates)
    line = (
        r"error: step (\d+): (?:the gradient of|the weight) \S+ is not finite; the last good state is"
        r" that after step (\d+); nothing was exported"
    )
    found = re.match(line, refusal(ended))
    step = int(found[1])
    assert 1 < step <= 10
    assert int(found[2]) == step - 1
    assert not list(tmp_path.glob("final_model*"))
    assert f"step:{step - 1}/30 train_loss" in ended.out
    assert f"step:{step + 1}/30" not in ended.out


@pytest.fixture
def trainer(rt):
    cfg = tiny_config(iterations=100, train_log_every=0, val_loss_every=0)
    stream = tg.TokenStream([np.arange(5000, dtype=np.uint16) % 96])
    return tg.Trainer(tiny_model(cfg, rt), stream, rt, tg.RunLog(), {})


def spoil_gradient(trainer, step):
    """From now on a gradient holds an infinity in the step with this number, counted from 1."""

    def hook(grad):
        if trainer.step != step - 1:
            return grad
        return grad.index_fill(0, torch.tensor([3]), torch.inf)

    trainer.model.blocks[1].mlp.fc.weight.register_hook(hook)


def test_the_parameter_at_fault_is_named(trainer):
    spoil_gradient(trainer, 2)
    trainer.train_step()
    trainer.check_finite()
    trainer.train_step()
    trainer.train_step()  # by now everything is lost, but the first fault is what counts
    with pytest.raises(
        tg.UserError, match=r"step 2: the gradient of blocks\.1\.mlp\.fc\.weight .*step 1;"
    ):
        trainer.check_finite()


def test_the_parameter_at_fault_is_named_under_clipping(trainer):
    """Clipping by a norm that is no number spoils all gradients, but one was the first."""
    trainer.cfg = tg.replace(trainer.cfg, grad_clip_norm=1.0)
    trainer.model.blocks[1].mlp.fc.weight.register_hook(lambda grad: torch.nan * grad)
    trainer.train_step()
    with pytest.raises(tg.UserError, match=r"step 1: the gradient of blocks\.1\.mlp\.fc\.weight"):
        trainer.check_finite()


def test_a_weight_at_fault_is_named(trainer):
    """Finite gradients, an infinite rate: the weight is what goes first."""
    trainer.train_step()
    trainer.optimizers[0].param_groups[0]["base_lr"] = math.inf
    trainer.train_step()
    with pytest.raises(
        tg.UserError, match=r"step 2: the weight blocks\.0\.attn\.c_q\.weight .*step 1;"
    ):
        trainer.check_finite()


def test_a_fault_is_found_within_ten_steps(trainer):
    """Without a line to log, so that nothing else looks."""
    spoil_gradient(trainer, 13)
    with pytest.raises(tg.UserError, match="step 13: "):
        tg.train(trainer, validate=None)
    assert trainer.step == 20


@pytest.mark.parametrize("ahead", ["train_log_every", "val_loss_every"])
def test_nothing_is_reported_after_a_fault(trainer, ahead, capsys):
    trainer.cfg = replace(trainer.cfg, **{ahead: 14})
    spoil_gradient(trainer, 13)
    validations = []

    def validate():
        validations.append(trainer.step)
        return tiny_score(1.0, 1, 1)

    with pytest.raises(tg.UserError, match="step 13: "):
        tg.train(trainer, validate)
    assert trainer.step == 14
    assert 14 not in validations
    assert "step:14/" not in capsys.readouterr().out


def test_the_last_steps_of_a_training_count_too(trainer):
    trainer.cfg = replace(trainer.cfg, iterations=3)
    spoil_gradient(trainer, 3)
    with pytest.raises(tg.UserError, match="step 3: "):
        tg.train(trainer, validate=None)


def test_a_fault_in_the_warm_up_is_undone_with_it(trainer):
    trainer.cfg = replace(trainer.cfg, warmup_steps=2)
    handle = trainer.model.skip_weights.register_hook(lambda grad: grad * torch.inf)
    trainer.model.register_forward_pre_hook(
        lambda *_: handle.remove() if trainer.step == 1 else None
    )
    trainer.warm_up()
    trainer.check_finite()


def test_a_spike_is_no_fault(trainer):
    trainer.model.blocks[1].mlp.fc.weight.register_hook(lambda grad: grad * 1e6)
    trainer.train_step()
    trainer.check_finite()


def test_weights_that_are_not_finite_are_never_exported(tmp_path, rt):
    """The last step of a training has no later gradient that shows it."""
    model = tiny_model(tiny_config(out_dir=str(tmp_path)), rt)
    with torch.no_grad():
        model.blocks[2].attn.proj.weight[5, 7] = torch.nan
    with pytest.raises(tg.UserError, match=r"^blocks\.2\.attn\.proj\.weight: .* not finite"):
        tg.export(model, tg.RunLog())
    assert not list(tmp_path.iterdir())


def test_an_artifact_over_budget_fails(rt, tmp_path, capsys):
    model = tiny_model(tiny_config(out_dir=str(tmp_path), eval=()), rt)
    log = tg.RunLog()
    log.artifact = tg.export(model, log)
    size = log.artifact.stat().st_size + len(tg.source_code().encode())
    for budget, verdict in ((size, "PASS"), (size - 1, "FAIL")):
        model.cfg = replace(model.cfg, artifact_budget=budget)
        tg.score_artifact(model, tiny_documents([9]), rt, log)
        line = f"submission_size:{size} budget:{budget} headroom:{budget - size} {verdict}"
        assert capsys.readouterr().out.splitlines()[-1] == line


def test_shards_of_zero_bytes_are_refused(tmp_path, run_here):
    for kind in ("train", "val"):
        write_shard(tmp_path / f"fineweb_{kind}_000000.bin", [1, 2, 1, 2])
    line = refusal(run_here(tmp_path, DATA_PATH=str(tmp_path)))
    assert "2 BOS (id 1) and 0 bytes of text in 4 tokens: nothing to predict" in line
