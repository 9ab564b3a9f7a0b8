"""Training: ten golden steps, warm-up without a trace, the batch, the clock, log lines, and the compiler."""

import json
from dataclasses import replace

import pytest
import torch
import torch._dynamo
import torch._inductor.config as inductor
import torch._inductor.utils
from conftest import CONFORMANCE, CPU, tiny_config, tiny_model, tiny_score

import train_gpt as tg

GOLDEN = json.loads((CONFORMANCE.parent / "golden" / "ten_steps.json").read_text())


def make_trainer(cfg, rt, tokens=None):
    if tokens is None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(4, 96, (5000,), generator=generator).numpy().astype("uint16")
    log = tg.RunLog()
    log.run_id = "test"
    return tg.Trainer(tiny_model(cfg, rt), tg.TokenStream([tokens]), rt, log, {})


def take_steps(trainer, count):
    return [trainer.train_step().item() for _ in range(count)]


def catch_gradients(trainer):
    """Gradients, by name, as the optimizers get them: filled in by the next step."""
    caught = {}

    def catch():
        for name, p in trainer.params.items():
            caught[name] = p.grad.clone()

    trainer.optimizers[0].step = catch
    return caught


def test_ten_golden_steps(rt):
    """The losses that this code printed when it agreed with the published one."""
    env = {name: str(value) for name, value in GOLDEN["env"].items()}
    env |= {"PRESET": "baseline", "DEVICE": "cpu", "DATA_PATH": str(CONFORMANCE)}
    cfg = tg.read_config(env)
    model = tg.load_model(CONFORMANCE / "init.pt", replace(cfg, dtype="float32"))
    stream = tg.TokenStream(tg.open_shards(str(CONFORMANCE), "train"))
    trainer = tg.Trainer(model, stream, rt, tg.RunLog(), {})
    losses = take_steps(trainer, 10)
    assert losses == pytest.approx(GOLDEN["train_loss"], abs=GOLDEN["tolerance"])


def test_neither_a_checkpoint_nor_a_warm_up_leaves_a_trace(rt, tmp_path):
    """Four steps; and two, a checkpoint, other steps, RESUME, a warm-up, two more: equal to the bit."""
    cfg = tiny_config(warmup_steps=3, out_dir=str(tmp_path), resume="auto", warmdown_iters=3)
    (tmp_path / "checkpoints").mkdir()
    plain = make_trainer(cfg, rt)
    losses = take_steps(plain, 4)
    first = make_trainer(cfg, rt)
    first.warm_up()
    assert take_steps(first, 2) == losses[:2]
    first.save()
    second = make_trainer(cfg, rt)
    take_steps(second, 1)
    second.resume()
    second.warm_up()
    assert (second.step, second.stream.position) == (2, first.stream.position)
    assert take_steps(second, 2) == losses[2:]
    second.check_finite()
    torch.testing.assert_close(second.state(), plain.state(), atol=0, rtol=0)


def test_accumulation_averages_over_the_whole_batch(rt):
    """Loss and gradient are those of the mean over all tokens, however they are cut."""
    trainer = make_trainer(tiny_config(grad_accum_steps=4), rt)
    spans = [torch.from_numpy(trainer.stream.read(65 * i, 65)) for i in range(4)]
    ids = torch.cat([span[:-1].view(2, 32) for span in spans])
    targets = torch.cat([span[1:].view(2, 32) for span in spans])
    mean = trainer.model(ids, targets).mean()
    expected = torch.autograd.grad(mean, list(trainer.params.values()))
    caught = catch_gradients(trainer)
    assert trainer.train_step().item() == pytest.approx(mean.item(), rel=1e-6)
    for name, gradient in zip(trainer.params, expected, strict=True):
        tolerance = 1e-2 if gradient.dtype is torch.bfloat16 else 1e-6
        torch.testing.assert_close(caught[name], gradient, atol=tolerance, rtol=tolerance)


def test_gradients_are_clipped_by_their_global_norm(rt, monkeypatch):
    """All by one factor, so that their direction stays, and after the ranks have averaged them."""
    monkeypatch.setattr(rt, "average", lambda grads: torch._foreach_mul_(grads, 3.0))
    whole = make_trainer(tiny_config(), rt)
    clipped = make_trainer(tiny_config(grad_clip_norm=1e-3), rt)
    gradients = []
    for trainer in (whole, clipped):
        caught = catch_gradients(trainer)
        trainer.train_step()
        gradients.append(torch.cat([grad.float().flatten() for grad in caught.values()]))
    before, after = gradients
    assert after.norm().item() == pytest.approx(1e-3, rel=1e-2)
    torch.testing.assert_close(after, before * (1e-3 / before.norm()), atol=1e-6, rtol=1e-2)


def test_rates_follow_the_schedule(rt):
    cfg = tiny_config(iterations=10, warmdown_iters=4, muon_momentum_warmup_steps=4)
    trainer = make_trainer(cfg, rt)
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    factors = []
    momenta = []
    for _ in range(10):
        trainer.train_step()
        factors.append({round(group["lr"] / group["base_lr"], 9) for group in groups})
        momenta.append(groups[0]["momentum"])
    assert factors == [{1}, {1}, {1}, {1}, {1}, {1}, {1}, {0.75}, {0.5}, {0.25}]
    assert momenta[:6] == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95])


class Clock:
    """Stands in for the time module: every reading is one second after the last."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1.0
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tg, "time", clock)
    return clock


def run_train(rt, tmp_path, validate=lambda: tiny_score(2.0, 1, 4), **settings):
    """A training without checkpoints on the way, which says all that a log holds."""
    (tmp_path / "checkpoints").mkdir()
    trainer = make_trainer(tiny_config(out_dir=str(tmp_path), **settings), rt)
    tg.train(trainer, validate)
    return trainer


def test_log_lines_to_the_character(rt, clock, capsys, tmp_path):
    run_train(rt, tmp_path, iterations=14, val_loss_every=7, train_log_every=6)
    lines = capsys.readouterr().out.splitlines()
    steps = [int(line.split("/")[0].removeprefix("step:")) for line in lines]
    assert steps == [0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 12]
    validation = "val_loss:2.0000 val_bpb:0.7213"
    assert lines[0] == f"step:0/14 {validation} train_time:1000ms step_avg:1000.00ms"
    assert lines[1].startswith("step:1/14 train_loss:")
    assert lines[1].endswith(" train_time:2000ms step_avg:2000.00ms")
    # Eight seconds on the clock: a reading after each step, and one before each validation.
    assert lines[8] == f"step:7/14 {validation} train_time:9000ms step_avg:1285.71ms"


def test_the_wall_clock_cap_stops_and_says_so(rt, clock, capsys, tmp_path):
    settings = {"max_wallclock_seconds": 5.0, "val_loss_every": 0, "train_log_every": 0}
    trainer = run_train(rt, tmp_path, iterations=1000, compile="0", **settings)
    assert trainer.step == 5
    stopped = "stopping_early: wallclock_cap train_time:6000ms step:5/1000\n"
    assert capsys.readouterr().out == stopped


def test_validation_is_outside_the_training_clock(rt, clock, tmp_path):
    def validate():
        clock.now += 1000.0
        return tiny_score(2.0, 1, 4)

    trainer = run_train(rt, tmp_path, validate, iterations=3, val_loss_every=1)
    assert trainer.elapsed_ms == 7000


def test_every_rank_follows_rank_0_s_clock(rt, monkeypatch):
    """Half of the cap is over by rank 0's clock, whatever this rank's own says."""
    second = replace(rt, rank=1)
    sent = []
    monkeypatch.setattr(second, "maximum", lambda *values: sent.append(values) or [5000.0, 15.0])
    trainer = make_trainer(tiny_config(max_wallclock_seconds=10.0, warmdown_iters=100), second)
    trainer.train_step()
    trainer.tick(now=123.0)
    assert sent == [(0.0, 0)]
    assert (trainer.elapsed_ms, trainer.stop_signal) == (5000.0, 15)
    assert trainer.progress == 0.5
    trainer.train_step()
    # 5 s are left, and 100 steps would take 500 s.
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.04 * 5 / 500)


@pytest.mark.parametrize(
    ("seconds", "steps", "choice", "wanted"),
    [
        (0.0, 199, "auto", False),
        (0.0, 200, "auto", True),
        (119.0, 10**6, "auto", False),
        (120.0, 200, "auto", True),
        (600.0, 10**6, "0", False),
        (1.0, 1, "1", True),
    ],
)
def test_compiling_is_for_trainings_that_repay_it(rt, monkeypatch, seconds, steps, choice, wanted):
    """On a CPU: two minutes and 200 steps. COMPILE=0 and 1 are obeyed."""
    cfg = tiny_config(max_wallclock_seconds=seconds, iterations=steps, compile=choice)
    trainer = make_trainer(cfg, rt)
    monkeypatch.setattr(torch, "compile", lambda model, **options: lambda *batch: model(*batch))
    trainer.compile_forward()
    assert (trainer.forward is not trainer.model) == wanted


def test_compiled_and_eager_training_agree(rt, capsys):
    """Two layers have a skip connection. The steps compile nothing more, and evaluations run eager."""
    cfg = tiny_config(num_layers=2, compile="1")
    eager = make_trainer(cfg, rt)
    compiled = make_trainer(cfg, rt)
    compiled.compile_forward()
    assert compiled.forward is not compiled.model
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = take_steps(compiled, 3)
    assert losses == pytest.approx(take_steps(eager, 3), abs=1e-4)
    first, last = capsys.readouterr().out.splitlines()
    assert first == "compile:started"
    assert last.startswith("compile:done time:")


def test_a_failing_compiler_is_announced_and_survived(rt, capsys):
    trainer = make_trainer(tiny_config(num_layers=1, compile="1"), rt)
    compiler = {"cpp.cxx": (None, "/nonexistent/compiler"), "compile_threads": 1}
    with inductor.patch(compiler), torch._inductor.utils.fresh_cache():
        trainer.compile_forward()
    assert trainer.forward is trainer.model
    _, outcome = capsys.readouterr().out.splitlines()
    assert outcome.startswith("compile:failed (")
    assert outcome.endswith("); running eager")
    plain = make_trainer(tiny_config(num_layers=1), rt)
    assert take_steps(trainer, 2) == take_steps(plain, 2)


def test_a_compiler_that_fails_on_one_rank_is_used_on_none(rt, monkeypatch):
    trainer = make_trainer(tiny_config(compile="1"), rt)
    monkeypatch.setattr(torch, "compile", lambda model, **options: lambda *batch: model(*batch))
    monkeypatch.setattr(rt, "gather", lambda mine: [mine, "no compiler"])
    trainer.compile_forward()
    assert trainer.forward is trainer.model


def test_training_lowers_the_loss():
    """Real steps on a predictable stream, in bf16."""
    tokens = torch.tensor([7, 8, 9, 10]).repeat(2000).numpy().astype("uint16")
    cfg = tiny_config(iterations=40, warmdown_iters=0)
    trainer = make_trainer(cfg, tg.Runtime(CPU, torch.bfloat16), tokens)
    losses = take_steps(trainer, 40)
    assert losses[-1] < 0.3 < losses[0]
