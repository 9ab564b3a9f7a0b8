"""Muon, the role of every parameter, and the schedule."""

from dataclasses import replace

import pytest
import torch
from conftest import CPU, tiny_config, tiny_model

import train_gpt as tg

SHAPES = ((48, 32), (32, 32), (32, 64), (16, 32), (64, 32))


@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (64, 128)])
def test_orthogonalize_against_float64(shape):
    """The singular vectors of the exact polar factor, and singular values in a band around 1."""
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    ours = tg.orthogonalize(matrix[None], 5)[0].double()
    left, before, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    inside = left.T @ ours @ right.T  # diagonal if the vectors are the same
    values = inside.diagonal()
    # Five steps cannot lift what starts at almost nothing.
    lifted = values[before > 0.005 * matrix.norm()]
    assert len(lifted) > 60
    assert lifted.min() > 0.6
    assert values.max() < 1.3
    assert (inside - torch.diag(values)).abs().max() < 0.1
    exact = left @ right
    cosine = (ours * exact).sum() / ours.norm() / exact.norm()
    assert cosine > 0.97


@pytest.mark.parametrize("shape", [(5, 24, 16), (3, 16, 24), (4, 16, 16)])
def test_matrices_of_a_shape_are_orthogonalised_together_as_each_alone(shape):
    """Though each has a norm of its own."""
    torch.manual_seed(0)
    norms = torch.logspace(-3, 3, shape[0])
    batch = torch.randn(shape) * norms[:, None, None]
    together = tg.orthogonalize(batch, 5)
    alone = torch.cat([tg.orthogonalize(matrix[None], 5) for matrix in batch])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def take_steps(rt, count=1):
    """Muon's steps on matrices of several shapes, with a new gradient each time. Returns the matrices."""
    torch.manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    grads = [torch.randn(shape) for shape in SHAPES]
    muon = tg.Muon([{"params": params, "lr": 0.02}], 5, rt)
    muon.param_groups[0]["momentum"] = 0.9
    for step in range(count):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.roll(step)
        muon.step()
    return params, grads, muon


def follow_formula(start, grad, count):
    """Muon on one matrix, in float64 but for the orthogonalisation."""
    p = start.double()
    momentum = torch.zeros_like(p)
    rows, cols = p.shape
    for step in range(count):
        gradient = grad.roll(step).double()
        momentum = 0.9 * momentum + gradient
        nesterov = gradient + 0.9 * momentum
        update = tg.orthogonalize(nesterov.float()[None], 5)[0].double()
        p = p - 0.02 * max(1, rows / cols) ** 0.5 * update
    return p


def test_muon_follows_its_formula(rt):
    start, _, _ = take_steps(rt, 0)
    params, grads, _ = take_steps(rt, 3)
    for before, after, grad in zip(start, params, grads, strict=True):
        expected = follow_formula(before.detach(), grad, 3)
        # Updates are rounded to bf16: by up to 1/256 of their rates.
        torch.testing.assert_close(after.detach().double(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_works_in_the_compute_dtype(dtype, monkeypatch):
    exact = tg.orthogonalize
    seen = set()

    def watch(x, steps):
        update = exact(x, steps)
        seen.update((x.dtype, update.dtype))
        return update

    monkeypatch.setattr(tg, "orthogonalize", watch)
    take_steps(tg.Runtime(CPU, dtype))
    assert seen == {dtype}


@pytest.mark.parametrize("world", [2, 3, 9])
def test_muon_shares_its_work_by_one_all_reduce(rt, monkeypatch, world):
    """Each matrix is one rank's work, and none has more than one above its share.

    The sum of all buffers is the update of a single rank. The momentum is the same on all ranks.
    """
    sent = []
    monkeypatch.setattr(tg.Runtime, "sum", lambda rt, flat: sent.append(flat.clone()))
    _, _, alone = take_steps(rt)
    sizes = [rows * cols for rows, cols in SHAPES]
    filled = []
    for rank in range(world):
        _, _, muon = take_steps(replace(rt, rank=rank, world=world))
        filled.append([bool(part.any()) for part in sent[-1].split(sizes)])
        for mine, whole in zip(muon.state.values(), alone.state.values(), strict=True):
            assert torch.equal(mine["momentum_buffer"], whole["momentum_buffer"])
    whole, *parts = sent
    assert len(parts) == world
    assert whole.dtype == torch.bfloat16
    assert torch.equal(whole, torch.stack(parts).sum(0))
    assert torch.tensor(filled).sum(0).tolist() == [1] * len(SHAPES)
    assert max(map(sum, filled)) == -(-len(SHAPES) // world)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_optimizer_and_its_rate(rt, tied):
    model = tiny_model(tiny_config(tie_embeddings=tied), rt)
    names = {p: name for name, p in model.named_parameters()}
    found = []
    muon, adam = tg.build_optimizers(model, rt)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            how = (type(optimizer), group["base_lr"])
            found += [(names[p], how) for p in group["params"]]
    assert len(found) == len(names)
    expected = {}
    for name in names.values():
        is_matrix = name.startswith("blocks.") and name.endswith(".weight")
        expected[name] = (tg.Muon if is_matrix else torch.optim.Adam, 0.04)
    expected["tok_emb.weight"] = (torch.optim.Adam, 0.05 if tied else 0.6)
    if not tied:
        expected["lm_head.weight"] = (torch.optim.Adam, 0.008)
    assert dict(found) == expected
    assert (adam.defaults["betas"], adam.defaults["eps"]) == ((0.9, 0.95), 1e-8)


def test_muon_takes_the_rate_that_a_role_names(rt):
    """A fork's matrix may have a rate of its own; its step is that of Muon alone on it."""
    model = tiny_model(tiny_config(scalar_lr=0.01), rt)
    weight = model.blocks[1].mlp.fc.weight
    weight.role = tg.Role("muon", "scalar_lr")
    muon, _ = tg.build_optimizers(model, rt)
    rates = {group["lr"]: len(group["params"]) for group in muon.param_groups}
    assert rates == {0.04: 3 * 6 - 1, 0.01: 1}
    start = {p: p.detach().clone() for p in model.parameters()}
    for p in start:
        p.grad = torch.randn_like(p)
    muon.step()
    alone = tg.orthogonalize(weight.grad[None], 5)[0].bfloat16() * 2**0.5
    torch.testing.assert_close(weight, start[weight] - 0.01 * alone, atol=1e-3, rtol=0)
    other = model.blocks[0].mlp.fc.weight
    assert (other - start[other]).abs().mean() > 2 * (weight - start[weight]).abs().mean()


def test_a_parameter_without_a_role_is_noticed(rt):
    model = tiny_model(tiny_config(), rt)
    model.blocks[1].register_parameter("extra", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(AssertionError, match=r"blocks\.1\.extra has no Role"):
        tg.build_optimizers(model, rt)


def scales(cfg, *moments):
    return [tg.schedule(step, elapsed_ms, cfg)[0] for step, elapsed_ms in moments]


def test_schedule_without_a_cap():
    cfg = tiny_config(iterations=100, warmdown_iters=40)
    moments = [(step, 1e9) for step in (0, 60, 80, 99, 100)]
    assert scales(cfg, *moments) == pytest.approx([1, 1, 0.5, 0.025, 0])


def test_schedule_under_a_cap():
    """100 s at 1 s a step: the last 20 steps fall linearly; a slower pace starts earlier."""
    cfg = tiny_config(iterations=10**6, warmdown_iters=20, max_wallclock_seconds=100.0)
    moments = [(step, 1000.0 * step) for step in (0, 1, 79, 80, 90, 100)]
    assert scales(cfg, *moments) == pytest.approx([1, 1, 1, 1, 0.5, 0])
    slower = scales(cfg, (30, 60_000), (35, 70_000))
    assert slower == pytest.approx([1, 30 / 40])
    without = replace(cfg, warmdown_iters=0)
    assert scales(without, (99, 99_000)) == [1]


def test_momentum_warms_up():
    cfg = tiny_config()
    momenta = [tg.schedule(step, 0, cfg)[1] for step in (0, 250, 500, 9999)]
    assert momenta == pytest.approx([0.85, 0.90, 0.95, 0.95])
    at_once = replace(cfg, muon_momentum_warmup_steps=0)
    assert tg.schedule(0, 0, at_once)[1] == 0.95
