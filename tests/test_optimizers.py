"""Muon, the split of parameters between optimizers, and the schedules."""

import subprocess
import sys

import pytest
import torch
from conftest import tiny_config, tiny_model

import train_gpt as tg


@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (64, 128)])
def test_orthogonalize_against_float64(shape):
    """Same singular vectors as the exact polar factor, singular values in Newton-Schulz's band around 1."""
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    ours = tg.orthogonalize(matrix[None], 5)[0].double()
    left, before, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    inside = (
        left.T @ ours @ right.T
    )  # the result in the singular basis: diagonal if the vectors are the same
    values = inside.diagonal()
    lifted = values[
        before > 0.005 * matrix.norm()
    ]  # five steps cannot lift what starts at almost nothing
    assert len(lifted) > 60 and lifted.min() > 0.6 and values.max() < 1.3
    assert (inside - torch.diag(values)).abs().max() < 0.1
    exact = left @ right
    cosine = (ours * exact).sum() / ours.norm() / exact.norm()
    assert cosine > 0.97


def muon_setup(shapes=((48, 32), (32, 32), (32, 64), (16, 32), (64, 32))):
    torch.manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    return params, [torch.randn(shape) for shape in shapes]


def muon_reference(params, grads, steps, lr, momentum):
    """Muon from its formula: float64 state, one matrix at a time."""
    out = []
    for p, g in zip(params, grads, strict=True):
        p, buffer = p.detach().double(), torch.zeros(p.shape, dtype=torch.float64)
        for i in range(steps):
            gradient = g.double() * (i + 1)
            buffer = momentum * buffer + gradient
            update = tg.orthogonalize((gradient + momentum * buffer).float()[None], 5)[0].double()
            p = p - lr * max(1, p.shape[0] / p.shape[1]) ** 0.5 * update
        out.append(p)
    return out


def take_steps(muon, params, grads, steps, momentum):
    muon.param_groups[0]["momentum"] = momentum
    for i in range(steps):
        for p, g in zip(params, grads, strict=True):
            p.grad = g * (i + 1)
        muon.step()


def test_muon_follows_its_formula(rt):
    params, grads = muon_setup()
    expected = muon_reference(params, grads, 3, 0.02, 0.9)
    take_steps(tg.Muon(params, 0.02, 5, rt), params, grads, 3, 0.9)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), e, atol=1e-3, rtol=0)


def test_matrices_of_a_shape_are_orthogonalised_together_as_each_alone():
    torch.manual_seed(0)
    for shape in ((5, 24, 16), (3, 16, 24), (4, 16, 16)):
        batch = (
            torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None, None]
        )  # each has a norm of its own
        together = tg.orthogonalize(batch, 5)
        for alone, matrix in zip(together, batch, strict=True):
            torch.testing.assert_close(
                alone, tg.orthogonalize(matrix[None], 5)[0], atol=1e-5, rtol=1e-4
            )


def test_orthogonalize_works_in_the_dtype_it_is_given():
    batch = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(0))
    exact, rounded = (
        tg.orthogonalize(batch.to(dtype), 5) for dtype in (torch.float32, torch.bfloat16)
    )
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(rounded.float(), exact, atol=0.06, rtol=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_works_in_the_compute_dtype(dtype, monkeypatch):
    params, grads = muon_setup()
    exact, seen = tg.orthogonalize, set()
    monkeypatch.setattr(tg, "orthogonalize", lambda x, steps: seen.add(x.dtype) or exact(x, steps))
    take_steps(
        tg.Muon(params, 0.02, 5, tg.Runtime(torch.device("cpu"), dtype)), params, grads, 1, 0.9
    )
    assert seen == {dtype}


@pytest.mark.parametrize("world", [2, 3, 9])
def test_muon_ranks_share_the_matrices(rt, monkeypatch, world):
    """Every rank computes its own matrices; together, they are the update of a single rank. 9 ranks, 5 matrices."""
    alone, grads = muon_setup()
    take_steps(tg.Muon(alone, 0.02, 5, rt), alone, grads, 1, 0.9)
    parts, owned = [], torch.zeros(world, len(alone), dtype=torch.bool)
    for rank in range(world):
        params, _ = muon_setup()
        before = [p.detach().clone() for p in params]
        ranked = tg.Runtime(rt.device, rt.dtype, rank=rank, world=world)

        def exchange(shares, rank=rank):  # keeps this rank's share, all that it knows
            for share in shares[:rank] + shares[rank + 1 :]:
                for tensor in share:
                    tensor.zero_()

        monkeypatch.setattr(ranked, "exchange", exchange)
        take_steps(tg.Muon(params, 0.02, 5, ranked), params, grads, 1, 0.9)
        owned[rank] = torch.tensor(
            [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
        )
        parts.append([p.detach() - b for p, b in zip(params, before, strict=True)])
    assert (owned.sum(0) == 1).all()
    loads = owned.double() @ torch.tensor([p.numel() for p in alone], dtype=torch.float64)
    assert loads.max() <= max(loads.sum() / world, loads.min()) + max(p.numel() for p in alone)
    start, _ = muon_setup()
    for j, p in enumerate(alone):
        torch.testing.assert_close(
            p.detach(), start[j].detach() + sum(part[j] for part in parts), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_optimizer_and_its_rate(rt, tied):
    cfg = tiny_config(tie_embeddings=tied)
    model = tiny_model(cfg, rt)
    rates = {}
    muon, adam = tg.build_optimizers(model, cfg, rt)
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[id(p)] not in rates
                rates[names[id(p)]] = (type(optimizer).__name__, group["base_lr"])
    for name in names.values():
        if name == "tok_emb.weight":
            expected = ("Adam", 0.05 if tied else 0.6)
        elif name == "lm_head.weight":
            expected = ("Adam", 0.008)
        elif name.endswith("weight"):
            expected = ("Muon", 0.04)
        else:
            expected = ("Adam", 0.04)
        assert rates[name] == expected, name
    assert (adam.betas, adam.eps) == ((0.9, 0.95), 1e-8)


def test_adam_equals_that_of_torch():
    """In bf16 too, to the bit, over steps whose rate changes; an empty parameter, which never has a gradient, rests."""
    torch.manual_seed(0)
    ours = [torch.randn(5, 3), torch.randn(7), torch.randn(4, 2).bfloat16(), torch.empty(0, 3)]
    theirs = [torch.nn.Parameter(p.clone()) for p in ours]
    ours = [torch.nn.Parameter(p) for p in ours]
    groups = [[0, 1, 3], [2]]
    mine = tg.Adam(
        [{"params": [ours[i] for i in group], "lr": 0.0} for group in groups], (0.9, 0.95), 1e-8
    )
    adam = torch.optim.Adam(
        [{"params": [theirs[i] for i in group]} for group in groups], 0.0, (0.9, 0.95), fused=True
    )
    for lr in (0.1, 0.05, 0.01):
        for group in (*mine.param_groups, *adam.param_groups):
            group["lr"] = lr
        for p, q in zip(ours[:3], theirs[:3], strict=True):
            p.grad = torch.randn(p.shape).to(p.dtype)
            q.grad = p.grad.clone()
        mine.step()
        adam.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert torch.equal(mine.state[ours[2]]["exp_avg_sq"], adam.state[theirs[2]]["exp_avg_sq"])


def test_the_compiler_is_not_imported_by_a_run_that_does_not_compile():
    """Its import takes as long as that of torch itself."""
    code = "import sys, torch, train_gpt as tg; m = torch.nn.Linear(2, 2); p = [m.weight]; rt = tg.Runtime("
    code += "torch.device('cpu'), torch.float32); o = tg.Muon(p, 0.1, 5, rt); "
    code += "a = tg.Adam([{'params': [m.bias], 'lr': 0.1}], (0.9, 0.95), 1e-8); m(torch.ones(1, 2)).sum().backward(); "
    code += "o.step(); a.step(); "
    code += "sys.exit('torch._dynamo' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=tg.Path(tg.__file__).parent).returncode
        == 0
    )


def test_a_forgotten_parameter_is_noticed(rt):
    cfg = tiny_config()
    model = tiny_model(cfg, rt)
    model.register_parameter("extra", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(AssertionError, match="no optimizer"):
        tg.build_optimizers(model, cfg, rt)


def test_schedule_without_a_cap():
    cfg = tiny_config(iterations=100, warmdown_iters=40, max_wallclock_seconds=0.0)
    assert [tg.schedule(step, 1e9, cfg)[0] for step in (0, 60, 80, 99, 100)] == pytest.approx(
        [1, 1, 0.5, 0.025, 0]
    )
    assert tg.schedule(50, 0, tiny_config(warmdown_iters=0, max_wallclock_seconds=10.0))[0] == 1


def test_schedule_under_a_cap():
    """100 s at 1 s a step: the last 20 steps fall linearly; a slower pace starts earlier."""
    cfg = tiny_config(iterations=10**6, warmdown_iters=20, max_wallclock_seconds=100.0)
    assert [tg.schedule(s, 1000.0 * s, cfg)[0] for s in (1, 79, 80, 90, 100)] == pytest.approx(
        [1, 1, 1, 0.5, 0]
    )
    assert tg.schedule(30, 60_000, cfg)[0] == pytest.approx(1)
    assert tg.schedule(35, 70_000, cfg)[0] == pytest.approx(30 / 40)
    assert tg.schedule(0, 0, cfg)[0] == 1


def test_momentum_warms_up():
    cfg = tiny_config()
    assert [tg.schedule(s, 0, cfg)[1] for s in (0, 250, 500, 9999)] == pytest.approx(
        [0.85, 0.90, 0.95, 0.95]
    )
    assert tg.schedule(0, 0, tiny_config(muon_momentum_warmup_steps=0))[1] == 0.95
