"""Training: ten golden steps, warm-up without a trace, the batch, the clock, log lines, and the compiler."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch._dynamo
import torch._inductor.config as inductor
import torch._inductor.utils
from conftest import CONFORMANCE, tiny_config, tiny_model, tiny_score

import train_gpt as tg

GOLDEN = json.loads((CONFORMANCE.parent / "golden" / "ten_steps.json").read_text())


def random_tokens(count):
    return np.random.default_rng(0).integers(4, 96, count, dtype=np.uint16)


TOKENS = random_tokens(5000)


def make_trainer(rt, tokens=TOKENS, **settings):
    model = tiny_model(tiny_config(**settings), rt)
    return tg.Trainer(
        model, tg.TokenStream([tokens], model.cfg.vocab_size), rt, tg.RunLog(run_id="test"), {}
    )


def take_steps(trainer, count):
    return [trainer.train_step().item() for _ in range(count)]


def loss_and_gradients(trainer):
    """Of the next step, the gradients in one row, as the optimizers get them."""
    caught = []
    params = trainer.params.values()
    trainer.optimizers[0].step = lambda: caught.extend(p.grad.float().flatten() for p in params)
    loss = trainer.train_step()
    return loss, torch.cat(caught)


def test_ten_golden_steps(rt):
    """The losses that this code printed when it agreed with the published one."""
    env = {name: str(value) for name, value in GOLDEN["env"].items()}
    env |= {"PRESET": "baseline", "DEVICE": "cpu", "DTYPE": "float32"}
    model = tg.load_model(CONFORMANCE / "init.pt", tg.read_config(env))
    stream = tg.TokenStream(tg.open_shards(str(CONFORMANCE), "train"), 1024)
    losses = take_steps(tg.Trainer(model, stream, rt, tg.RunLog(), {}), 10)
    assert losses == pytest.approx(GOLDEN["train_loss"], abs=GOLDEN["tolerance"])


def test_neither_a_checkpoint_nor_a_warm_up_leaves_a_trace(rt, tmp_path):
    """Four steps; and two, a checkpoint, another step, RESUME, a warm-up, two more: equal to the bit."""
    settings = {"warmup_steps": 3, "out_dir": str(tmp_path), "resume": "auto", "warmdown_iters": 3}
    (tmp_path / "checkpoints").mkdir()
    plain = make_trainer(rt, **settings)
    losses = take_steps(plain, 4)
    first = make_trainer(rt, **settings)
    first.warm_up()
    assert take_steps(first, 2) == losses[:2]
    first.elapsed_ms = plain.elapsed_ms = 7.0
    first.save()
    second = make_trainer(rt, **settings)
    take_steps(second, 1)
    second.resume()
    second.warm_up()
    assert take_steps(second, 2) == losses[2:]
    torch.testing.assert_close(second.state(), plain.state(), atol=0, rtol=0)


def test_accumulation_averages_over_the_whole_batch(rt):
    """Four times the same 65 tokens have the loss and the gradients of once."""
    span = random_tokens(65)
    once = make_trainer(rt, span, grad_accum_steps=1, train_batch_tokens=64)
    often = make_trainer(rt, span, grad_accum_steps=4, train_batch_tokens=256)
    pairs = zip(loss_and_gradients(often), loss_and_gradients(once), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-2)  # some are in bf16


def test_gradients_are_clipped_by_their_global_norm(rt, monkeypatch):
    """All by one factor, so that their direction stays, and after the ranks have averaged them."""
    monkeypatch.setattr(rt, "average", lambda grads: torch._foreach_mul_(grads, 3.0))
    _, before = loss_and_gradients(make_trainer(rt))
    _, after = loss_and_gradients(make_trainer(rt, grad_clip_norm=1e-3))
    assert after.norm().item() == pytest.approx(1e-3, rel=1e-2)
    torch.testing.assert_close(after, before * (1e-3 / before.norm()), atol=1e-6, rtol=1e-2)


def test_rates_follow_the_schedule(rt):
    trainer = make_trainer(rt, iterations=10, warmdown_iters=4, muon_momentum_warmup_steps=4)
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    momenta = [0.85, 0.875, 0.9, 0.925] + 6 * [0.95]
    for factor, momentum in zip([1] * 7 + [0.75, 0.5, 0.25], momenta, strict=True):
        trainer.train_step()
        assert groups[0]["momentum"] == pytest.approx(momentum)
        assert {round(group["lr"] / group["base_lr"], 9) for group in groups} == {factor}
    assert tg.schedule(0, 0, tiny_config(muon_momentum_warmup_steps=0))[1] == 0.95


class Clock:
    """Stands in for the time module: every reading is one second after the last."""

    now = 0.0

    def perf_counter(self):
        self.now += 1.0
        return self.now

    def validate(self):
        self.now += 1000.0
        return tiny_score(2.0, 1, 4)


@pytest.fixture
def train(rt, monkeypatch, tmp_path, capsys):
    """A function that trains by such a clock and returns the steps taken and the lines printed.

    A validation takes 1000 s.
    """
    clock = Clock()
    monkeypatch.setattr(tg, "time", clock)
    (tmp_path / "checkpoints").mkdir()

    def run(**settings):
        trainer = make_trainer(rt, out_dir=str(tmp_path), **settings)
        tg.train(trainer, clock.validate)
        run.stream = trainer.stream
        return trainer.step, capsys.readouterr().out.splitlines()

    return run


def test_log_lines_to_the_character(train):
    _, lines = train(iterations=14, val_loss_every=7, train_log_every=6)
    steps = re.findall(r"step:(\d+)/14 ", "\n".join(lines))
    assert " ".join(steps) == "0 1 2 3 4 5 6 7 7 8 9 10 12"
    validation = "val_loss:2.0000 val_bpb:0.7213"
    assert lines[0] == f"step:0/14 {validation} train_time:1000ms step_avg:1000.00ms"
    assert lines[1].endswith(" train_time:2000ms step_avg:2000.00ms")
    # Nine seconds on the clock: a reading after each step, and one before each validation.
    assert lines[8] == f"step:7/14 {validation} train_time:9000ms step_avg:1285.71ms"


def test_the_wall_clock_cap_stops_and_says_so(train):
    brief = {"compile": "0", "val_loss_every": 0, "train_log_every": 0}
    steps, lines = train(
        max_wallclock_seconds=6.0, calibration_seconds=1.0, iterations=1000, **brief
    )
    assert steps == 5
    assert train.stream.deadline == 7.0  # six seconds after the first reading, which said 1
    assert lines[0] == "stopping_early: wallclock_cap train_time:6000ms step:5/1000"
    assert re.fullmatch(
        r"train_tokens:1290 of:5000 tokens_per_second:215 peak_memory:\d+MB", lines[1]
    )


def test_every_rank_follows_rank_0_s_clock(rt, monkeypatch):
    """Half of the cap is over by rank 0's clock, whatever this rank's own says."""
    second = replace(rt, rank=1)
    monkeypatch.setattr(second, "maximum", lambda mine, number: [mine + 5000.0, number + 15])
    trainer = make_trainer(
        second, max_wallclock_seconds=12.0, calibration_seconds=2.0, warmdown_iters=100
    )
    trainer.train_step()
    trainer.tick(now=123.0)
    assert (trainer.progress, trainer.stop_signal) == (0.5, 15)
    trainer.train_step()
    # 5 s are left, and 100 steps would take 500 s.
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.04 * 5 / 500)


@pytest.mark.parametrize(
    ("seconds", "steps", "choice", "wanted"),
    [
        (0.0, 199, "auto", False),
        (0.0, 200, "auto", True),
        (119.0, 10**6, "auto", False),
        (123.0, 200, "auto", True),
        (600.0, 10**6, "0", False),
    ],
)
def test_compiling_is_for_trainings_that_repay_it(rt, monkeypatch, seconds, steps, choice, wanted):
    """On a CPU: two minutes and 200 steps. A compiler that fails on one rank is used on none.

    With COMPILE=1 that is an error.
    """
    trainer = make_trainer(rt, max_wallclock_seconds=seconds, iterations=steps, compile=choice)
    monkeypatch.setattr(torch, "compile", lambda model, **options: lambda *batch: model(*batch))
    trainer.compile_forward()
    assert (trainer.forward is not trainer.model) == wanted
    assert trainer.params["tok_emb.weight"].grad is None
    monkeypatch.setattr(rt, "gather", lambda mine: [mine, "no compiler"])
    trainer.compile_forward()
    assert trainer.forward is trainer.model
    trainer.cfg = replace(trainer.cfg, compile="1")
    with pytest.raises(tg.UserError, match=r"^COMPILE=1: torch\.compile failed \(no compiler\); "):
        trainer.compile_forward()


def test_compiled_and_eager_training_agree(rt, capsys):
    """Two layers have a skip connection. The steps compile nothing more, and evaluations run eager."""
    eager = make_trainer(rt, num_layers=2)
    compiled = make_trainer(rt, num_layers=2, compile="1")
    compiled.warm_up()
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = take_steps(compiled, 3)
    assert losses == pytest.approx(take_steps(eager, 3), abs=1e-4)
    assert re.fullmatch(r"compile:started\ncompile:done time:\S+s\n", capsys.readouterr().out)


def test_no_text_is_read_before_the_clock_starts(rt, monkeypatch):
    trainer = make_trainer(rt, warmup_steps=2, compile="1")
    text = trainer.stream
    monkeypatch.setattr(text, "read", None)
    monkeypatch.setattr(torch, "compile", lambda model, **options: lambda *batch: model(*batch))
    trainer.warm_up()
    assert trainer.stream is text and text.position == 0


def test_a_failing_compiler_is_announced_and_survived(rt, capsys):
    trainer = make_trainer(rt, num_layers=1, compile="auto", iterations=200)
    compiler = {"cpp.cxx": (None, "/nonexistent/compiler"), "compile_threads": 1}
    with inductor.patch(compiler), torch._inductor.utils.fresh_cache():
        trainer.compile_forward()
    assert trainer.forward is trainer.model
    said = r"compile:started\ncompile:failed \(.+\); running eager: slower, on a GPU .*\n"
    assert re.fullmatch(said, capsys.readouterr().out)
