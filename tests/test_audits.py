"""The audits: each passes on sound code and stops the bug that it is for, in functions and in whole runs."""

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
    changed_script,
    run_script,
    tiny_condition,
    tiny_config,
    tiny_documents,
    tiny_model,
    tiny_score,
    write_shard,
)

import train_gpt as tg

TOKENIZER = CONFORMANCE / "tokenizer.model"


def refusal(done):
    """The one error line of a run that stopped with status 1 before it printed a final score."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert not re.search(r'(train_gpt|changed)\.py", line', done.stderr), done.stderr
    assert done.returncode != 0 and len(errors) == 1, done.stdout + done.stderr
    return errors[0]


# -- bytes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return tg.load_tokenizer(str(TOKENIZER), 1024)


def documents(tokenizer, texts, table=None):
    ids = [i for text in texts for i in [tokenizer.bos_id(), *tokenizer.encode(text)]]
    return tg.split_documents(
        np.array(ids), tokenizer.bos_id(), 0, table or tg.ByteTable.build(tokenizer), CPU
    )


def changed_table(tokenizer, **columns):
    table = tg.ByteTable.build(tokenizer)
    for name, change in columns.items():
        change(getattr(table, name))
    return table


TEXTS = ["the first of all texts", "Crème brûlée 漢字 🙂 fine", "tabs\tand  two spaces", "the end"]


def test_a_right_table_passes(tokenizer, rt, capsys, tmp_path):
    rt.log_path = tmp_path / "log.txt"
    docs = documents(tokenizer, TEXTS)
    tg.audit_bytes(docs, tg.ByteTable.build(tokenizer), tokenizer, rt)
    size = sum(len(tokenizer.decode(tokenizer.encode(text)).encode()) for text in TEXTS)
    assert (
        capsys.readouterr().out
        == f"audit bytes: documents:4 of:4 table_bytes:{size} text_bytes:{size} PASS\n"
    )


def test_random_tokens_pass(tokenizer, rt):
    """Control pieces, broken UTF-8 and spaces after either: the rules hold for any stream."""
    ids = np.random.default_rng(0).integers(0, 1024, 20_000)
    ids[::50] = tokenizer.bos_id()
    table = tg.ByteTable.build(tokenizer)
    tg.audit_bytes(tg.split_documents(ids, tokenizer.bos_id(), 0, table, CPU), table, tokenizer, rt)


def test_a_sample_of_200_at_least(tokenizer, rt, capsys, tmp_path):
    rt.log_path = tmp_path / "log.txt"
    tg.audit_bytes(
        documents(tokenizer, ["some words"] * 1000), tg.ByteTable.build(tokenizer), tokenizer, rt
    )
    assert 200 <= int(re.search(r"documents:(\d+) of:1000 ", capsys.readouterr().out)[1]) < 1000


def test_a_wrong_piece_is_named(tokenizer, rt):
    the = tokenizer.piece_to_id("▁the")
    assert the in tokenizer.encode("or the end")
    table = changed_table(
        tokenizer, base=lambda base: base.__setitem__(the, 4)
    )  # the space counted twice
    docs = documents(tokenizer, ["plain", "or the end"], table)
    with pytest.raises(tg.UserError, match=r"audit bytes: .* because of piece '▁the'"):
        tg.audit_bytes(docs, table, tokenizer, rt)


def test_a_space_that_opens_a_document_is_no_text(tokenizer, rt):
    """The audit takes nothing from the table, which here takes BOS for text."""
    table = changed_table(
        tokenizer, is_text=lambda text: text.__setitem__(tokenizer.bos_id(), True)
    )
    docs = tg.split_documents(
        np.array([1, tokenizer.piece_to_id("▁the"), 1]), tokenizer.bos_id(), 0, table, CPU
    )
    with pytest.raises(
        tg.UserError, match=r"audit bytes: .* 4 bytes .* has 3, because of how pieces join"
    ):
        tg.audit_bytes(docs, table, tokenizer, rt)


def test_a_byte_piece_that_counts_more_is_named(tokenizer, rt):
    table = changed_table(
        tokenizer, base=lambda base: base.__setitem__(tokenizer.piece_to_id("<0xE6>"), 3)
    )
    with pytest.raises(tg.UserError, match=r"audit bytes: .*because of piece '<0xE6>'"):
        tg.audit_bytes(documents(tokenizer, ["plain", "漢字"], table), table, tokenizer, rt)


def test_a_tokenizer_without_a_piece_for_space_is_refused(tmp_path):
    """Byte fallback would spell each space in three bytes, and the score would look a fifth better than it is."""
    model = TOKENIZER.read_bytes()
    entry = b"\x0a\x03\xe2\x96\x81\x15"  # the piece "▁" in the serialised model
    assert model.count(entry) == 1
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.replace(entry, entry.replace(b"\xe2\x96\x81", b"\xe3\x84\x85")))
    line = refusal(run_script(tmp_path, **EVAL_ARTIFACT, TOKENIZER_PATH=str(path)))
    assert line.startswith("error: TOKENIZER_PATH: found no piece '▁'")


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    """A tokenizer with pieces that hold spaces inside and at their end."""
    path = tmp_path_factory.mktemp("spaced") / "spaced"
    texts = ["the cat sat on  the mat of the hat", "in  the end of  the day on the bay"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(path),
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
        split_by_whitespace=False,
        user_defined_symbols=["▁of▁the▁", "▁▁"],
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{path}.model")


@pytest.mark.parametrize(
    "text", ["hat of the mat", "on  the end", "day of the  bay 漢 cat", "the  "]
)
def test_spaces_inside_pieces_count_one_byte_each(spaced, rt, text):
    ids = spaced.encode(text)
    pieces = [spaced.id_to_piece(i) for i in ids]
    assert any("▁" in piece[1:] for piece in pieces), pieces
    table = tg.ByteTable.build(spaced)
    docs = documents(spaced, [text])
    assert int(docs.bytes.sum()) == len(spaced.decode(ids).encode()) == len(text.encode())
    tg.audit_bytes(docs, table, spaced, rt)


def test_a_run_that_counts_wrongly_prints_no_score(tmp_path):
    script = changed_script(
        tmp_path, "+ (self.leading_space[target]", "+ 2 * (self.leading_space[target]"
    )
    done = run_script(tmp_path, 2, script=script, **EVAL_ARTIFACT)
    assert refusal(done).startswith("error: audit bytes: up to token ")
    assert "bpb" not in done.stdout


# -- causality --------------------------------------------------------------------------------------------------------

# At a rate high enough for any leak to show.
HOW = tiny_condition(tiny_config(ttt_lora_lr=0.05))
STREAM = tiny_condition(tiny_config(ttt_lora_lr=0.05), stream=True)


@pytest.fixture
def scored(rt):
    """(model, documents, config)"""
    cfg = tiny_config()
    return tiny_model(cfg, rt), tiny_documents([50, 9, 60, 33, 40]), cfg


@pytest.mark.parametrize(
    "how", [HOW, STREAM, tg.Condition(8, 24, 4), tg.Condition(32, 32, 4, isolated=False)]
)
def test_sound_code_passes(scored, rt, how):
    model, docs, cfg = scored
    # The longest and the third longest document, of 60 and 39 predictions, keep their beginnings.
    compared = {8: 8 * 3 + 4 + 4, 32: 16 + 16}[how.chunk]
    assert tg.audit_causality(model, docs, how, cfg, rt) == f"documents:3 compared:{compared}"


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
    """Short ones stand in for each other. The cut is in the last chunk but one, or halfway through an only one."""
    cfg = tiny_config()
    found = tg.audit_causality(tiny_model(cfg, rt), tiny_documents(lengths), HOW, cfg, rt)
    assert found == f"documents:{len(lengths)} compared:{compared}"


def learn_then_score(model, chunk, rows, adapters, memory, learn):
    if learn:
        past, now = (list(memory.past), memory.now) if memory else (None, None)
        tg_score_then_learn(model, chunk, rows, adapters, memory, learn)
        if memory:
            memory.past, memory.now = past, now
    return tg_score_then_learn(model, chunk, rows, adapters, memory, False)


tg_score_then_learn = tg.score_then_learn


def remember_everything(self, rows):
    """Whoever sits down finds what the last one left."""


def remember_for_ever(self, *arguments):
    """State on the class outlives every evaluation, the audit's own included."""
    tg_init(self, *arguments)
    kept = tg.DocumentAdapters.__dict__.get("kept", [])
    for mine, theirs in zip(self.state, kept, strict=bool(kept)):
        mine.copy_(theirs)
    tg.DocumentAdapters.kept = self.state
    self.reset = lambda rows: None


tg_init = tg.DocumentAdapters.__init__


def learn_for_good(*arguments):
    losses, model = tg_score_then_learn(*arguments), arguments[0]
    if arguments[-1]:
        model.blocks[0].q_gain = model.blocks[0].attn.q_gain.mul_(1 + 1e-3 * float(losses.mean()))
    return losses


def look_ahead_in_slid_windows(tokens, starts, left, places, length, how, rt):
    """Windows that no longer begin with their document show each prediction what follows its target."""
    ids, targets, at, positions, live = tg_gather_chunk(
        tokens, starts, left, places, length, how, rt
    )
    slid = torch.from_numpy(places + np.minimum(left, how.chunk) > how.window)[:, None]
    at = torch.arange(targets.shape[1]).expand_as(targets) if at is None else at
    return ids, targets, (at + 2 * slid).clamp(max=ids.shape[1] - 1), positions, live


tg_gather_chunk = tg.gather_chunk


def share_lessons(self, rows, grad):
    tg_adam(self, rows, grad.mean(0, keepdim=True).expand_as(grad))


tg_adam = tg.DocumentAdapters.adam


def see_the_future(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def normalise_over_the_batch(x, shape):
    return x / x.square().mean().sqrt()


def see_the_future_of_the_chunk(self, rows):
    tg_turn(self, rows)
    self.bias[:, :, -self.how.chunk :] = 0


def see_what_others_left(self, rows):
    """A memory that shows whatever is in it, be it from another document."""
    self.began.zero_()
    tg_turn(self, rows)


tg_turn = tg.Memory.turn


def share_the_past(self, layer, q, k, v):
    """Every document reads what the one in the last seat remembers."""
    self.past[layer] = tuple(half[-1:].expand_as(half) for half in self.past[layer])
    return tg_attend(self, layer, q, k, v)


tg_attend = tg.Memory.attend


BUGS = {
    "learning before scoring": (tg, "score_then_learn", learn_then_score),
    "adapters kept from document to document": (tg.DocumentAdapters, "reset", remember_everything),
    "adapters kept from evaluation to evaluation": (
        tg.DocumentAdapters,
        "__init__",
        remember_for_ever,
    ),
    "a weight that learns": (tg, "score_then_learn", learn_for_good),
    "a look ahead in slid windows": (tg, "gather_chunk", look_ahead_in_slid_windows),
    "one gradient for all documents": (tg.DocumentAdapters, "adam", share_lessons),
    "attention without a mask": (tg, "causal_attention", see_the_future),
    "statistics of the whole batch": (tg.F, "rms_norm", normalise_over_the_batch),
}
STREAM_BUGS = {
    name: bug for name, bug in BUGS.items() if bug[1] not in ("gather_chunk", "causal_attention")
} | {
    "a chunk that sees its own future": (tg.Memory, "turn", see_the_future_of_the_chunk),
    "a memory that outlives its document": (tg.Memory, "turn", see_what_others_left),
    "a memory of another document": (tg.Memory, "attend", share_the_past),
}


@pytest.mark.parametrize(
    ("how", "bug"),
    [*((HOW, bug) for bug in BUGS.items()), *((STREAM, bug) for bug in STREAM_BUGS.items())],
)
def test_a_leak_is_found(scored, rt, monkeypatch, how, bug):
    model, docs, cfg = scored
    monkeypatch.setattr(*bug[1])
    monkeypatch.delattr(tg.DocumentAdapters, "kept", raising=False)
    with pytest.raises(tg.UserError, match=r"audit causality: .* moved scores by up to .*leaks"):
        tg.audit_causality(model, docs, how, cfg, rt)


@pytest.mark.parametrize("length", [10, 16, 17, 18, 24, 25, 33, 60])
@pytest.mark.parametrize("how", [HOW, STREAM])
def test_learning_before_scoring_is_found_at_any_length(rt, monkeypatch, how, length):
    cfg = tiny_config()
    monkeypatch.setattr(tg, "score_then_learn", learn_then_score)
    with pytest.raises(tg.UserError, match="audit causality"):
        tg.audit_causality(tiny_model(cfg, rt), tiny_documents([length]), how, cfg, rt)


def test_noise_of_kernels_is_allowed_for_where_there_is_any(scored, rt, monkeypatch):
    """GPUs add in any order: there, and only there, a small difference is no leak; a real one still is."""
    generator, original = torch.Generator().manual_seed(0), tg.causal_attention
    monkeypatch.setattr(
        tg,
        "causal_attention",
        lambda q, k, v: (o := original(q, k, v)) + 1e-6 * torch.randn(o.shape, generator=generator),
    )
    model, docs, cfg = scored
    with pytest.raises(tg.UserError, match="audit causality"):
        tg.audit_causality(model, docs, HOW, cfg, rt)
    rt.noise = 1e-2
    tg.audit_causality(model, docs, HOW, cfg, rt)
    monkeypatch.setattr(tg, "score_then_learn", learn_then_score)
    with pytest.raises(tg.UserError, match="audit causality"):
        tg.audit_causality(model, docs, HOW, cfg, rt)


@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_do_not_pass(scored, rt, monkeypatch, fill):
    model, docs, cfg = scored
    monkeypatch.setattr(
        tg, "score_then_learn", lambda model, chunk, *_: torch.full(chunk[1].shape, fill)
    )
    with pytest.raises(tg.UserError, match="audit causality"):
        tg.audit_causality(model, docs, HOW, cfg, rt)


def test_a_run_that_learns_before_it_scores_stops(tmp_path):
    old = "    return losses.detach()\n"
    again = "losses = score_then_learn(model, chunk, rows, adapters, memory, False)"
    new = f"        if learn:\n            {again}\n{old}"
    done = run_script(tmp_path, 2, script=changed_script(tmp_path, old, new), **EVAL_ARTIFACT)
    assert refusal(done).startswith("error: audit causality: ")
    assert "condition:flat" in done.stdout and "condition:ttt" not in done.stdout


def test_a_run_that_skips_tokens_stops(tmp_path):
    old = "                ledger.index_add_("
    script = changed_script(
        tmp_path, old, f"                entry[:, -1, -1] *= numbers.max() != 1\n{old}"
    )
    line = refusal(run_script(tmp_path, script=script, **EVAL_ARTIFACT, EVAL="stride"))
    assert re.match(
        r"error: audit coverage: position \d+: scored 0 times, loss 0; expected 1 times", line
    )


# -- what is not finite, and what is too large --------------------------------------------------------------------


def test_a_diverging_training_stops_and_exports_nothing(tmp_path):
    """A rate that overflows: every rank stops, rank 0 says at which step and parameter."""
    done = run_script(
        tmp_path, 2, MATRIX_LR="1e18", SCALAR_LR="1e18", ITERATIONS="30", WARMUP_STEPS="0"
    )
    line = r"error: step (\d+): the (?:gradient of|weight) (\S+) is not finite; the last good state is that after"
    found = re.match(rf"{line} step (\d+); nothing was exported", refusal(done))
    assert 1 < int(found[1]) <= 10 and int(found[3]) == int(found[1]) - 1
    assert not list(tmp_path.glob("final_model*"))
    assert (
        f"step:{found[3]}/30 train_loss" in done.stdout
        and f"step:{int(found[1]) + 1}/30" not in done.stdout
    )


@pytest.fixture
def trainer(rt):
    cfg = tiny_config(iterations=100, train_log_every=0, val_loss_every=0)
    model = tiny_model(cfg, rt)
    return tg.Trainer(model, tg.TokenStream([np.arange(5000, dtype=np.uint16) % 96]), cfg, rt, {})


def spoil_gradient(trainer, step):
    """From now on a gradient holds an infinity in the step with this number, counted from 1."""

    def hook(grad):
        return (
            grad.index_fill(0, torch.tensor([3]), torch.inf) if trainer.step == step - 1 else grad
        )

    trainer.model.blocks[1].mlp.fc.weight.register_hook(hook)


def test_the_parameter_at_fault_is_named(trainer):
    spoil_gradient(trainer, 2)
    trainer.train_step()
    trainer.refuse_faults()
    trainer.train_step()
    trainer.train_step()  # by now everything is lost, but the first fault is what counts
    with pytest.raises(
        tg.AgreedError, match=r"step 2: the gradient of blocks\.1\.mlp\.fc\.weight .*step 1;"
    ):
        trainer.refuse_faults()


def test_a_weight_at_fault_is_named(trainer):
    """Finite gradients, an infinite rate: the weight is what goes first."""
    trainer.train_step()
    trainer.optimizers[0].param_groups[0]["base_lr"] = math.inf
    trainer.train_step()
    with pytest.raises(
        tg.AgreedError, match=r"step 2: the weight blocks\.0\.attn\.c_q\.weight .*step 1;"
    ):
        trainer.refuse_faults()


def test_a_fault_is_found_within_ten_steps(trainer):
    """Without a line to log, so that nothing else looks."""
    spoil_gradient(trainer, 13)
    with pytest.raises(tg.AgreedError, match="step 13: "):
        tg.train(trainer, validate=None)
    assert trainer.step == 20


@pytest.mark.parametrize("ahead", ["train_log_every", "val_loss_every"])
def test_nothing_is_reported_after_a_fault(trainer, ahead, capsys, tmp_path):
    trainer.rt.log_path = tmp_path / "log.txt"
    trainer.cfg = replace(trainer.cfg, **{ahead: 14})
    spoil_gradient(trainer, 13)
    validations = []
    with pytest.raises(tg.AgreedError, match="step 13: "):
        tg.train(
            trainer, validate=lambda: validations.append(trainer.step) or tiny_score(1.0, 1, 1)
        )
    assert (
        trainer.step == 14 and "step:14/" not in capsys.readouterr().out and 14 not in validations
    )


def test_the_last_steps_of_a_training_count_too(trainer):
    trainer.cfg = replace(trainer.cfg, iterations=3)
    spoil_gradient(trainer, 3)
    with pytest.raises(tg.AgreedError, match="step 3: "):
        tg.train(trainer, validate=None)


def test_a_fault_in_the_warm_up_is_undone_with_it(trainer):
    trainer.cfg = replace(trainer.cfg, warmup_steps=2)
    handle = trainer.model.skip_weights.register_hook(lambda grad: grad * torch.inf)
    trainer.model.register_forward_pre_hook(
        lambda *_: handle.remove() if trainer.step == 1 else None
    )
    trainer.warm_up()
    trainer.refuse_faults()


def test_a_spike_is_no_fault(trainer):
    trainer.model.blocks[1].mlp.fc.weight.register_hook(lambda grad: grad * 1e6)
    trainer.train_step()
    trainer.refuse_faults()


def test_weights_that_are_not_finite_are_never_exported(tmp_path):
    """The last step of a training, and strangers' weights, have no later gradient to show it."""
    state = torch.load(CONFORMANCE / "init.pt", weights_only=True)
    state["blocks.2.attn.proj.weight"][5, 7] = torch.nan
    torch.save(state, tmp_path / "bad.pt")
    line = refusal(run_script(tmp_path, **EVAL_ARTIFACT | {"MODEL_PATH": str(tmp_path / "bad.pt")}))
    assert line.startswith(f"error: {tmp_path / 'bad.pt'}: unusable")
    assert "'blocks.2.attn.proj.weight' does not name finite floats" in line
    assert not list(tmp_path.glob("*.ptz"))


def test_an_artifact_over_budget_fails(rt, tmp_path, capsys):
    cfg = tiny_config(out_dir=str(tmp_path), eval=())
    model = tiny_model(cfg, rt)
    rt.log_path = tmp_path / "log.txt"
    path = tg.export(model, cfg, rt)
    size = path.stat().st_size + len(tg.source_code().encode())
    for budget, verdict in ((size, "PASS"), (size - 1, "FAIL")):
        tg.score_artifact(
            model, path, tiny_documents([9]), replace(cfg, artifact_budget=budget), rt, {}
        )
        line = f"submission_size:{size} budget:{budget} headroom:{budget - size} {verdict}"
        assert capsys.readouterr().out.splitlines()[-1] == line


def test_shards_of_zero_bytes_are_refused(tmp_path):
    for kind in ("train", "val"):
        write_shard(tmp_path / f"fineweb_{kind}_000000.bin", [1, 2, 1, 2])
    line = refusal(run_script(tmp_path, DATA_PATH=str(tmp_path)))
    assert "2 BOS (id 1) and 0 bytes of text in 4 tokens: nothing to predict" in line
