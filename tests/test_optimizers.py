"""Muon, the role of every parameter, and the schedule."""

from dataclasses import replace

import pytest
import torch
from conftest import CPU, tiny_config, tiny_model

import train_gpt as tg

SHAPES = ((48, 32), (32, 32), (32, 64), (16, 32), (32, 64))


@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (64, 128)])
def test_orthogonalize_against_float64(shape):
    """The singular vectors of the exact polar factor, and singular values in a band around 1.

    Of each matrix in a batch, although their norms differ.
    """
    torch.manual_seed(0)
    batch = torch.randn(3, *shape) * torch.tensor([1e-3, 1, 1e3])[:, None, None]
    for matrix, ours in zip(batch, tg.orthogonalize(batch, 5).double(), strict=True):
        exact = torch.linalg.svd(matrix.double(), full_matrices=False)
        inside = exact.U.T @ ours @ exact.Vh.T  # diagonal if the vectors are the same
        # Five steps cannot lift what starts at almost nothing, the last 4.
        lifted = inside[:60, :60]
        assert (lifted - torch.eye(60)).abs().max() < 0.35


def draw_matrices(seed):
    """Random matrices of several shapes."""
    torch.manual_seed(seed)
    return [torch.randn(shape) for shape in SHAPES]


def take_steps(rt, count=1, rates=(0.02,)):
    """Muon's steps on matrices, with a new gradient each time, and a group for each rate.

    Returns the matrices and the optimizer.
    """
    params = [torch.nn.Parameter(matrix) for matrix in draw_matrices(3)]
    groups = []
    for i, rate in enumerate(rates):
        groups.append({"params": params[i :: len(rates)], "lr": rate, "momentum": 0.9})
    muon = tg.Muon(groups, 5, rt)
    for step in range(count):
        for p, grad in zip(params, draw_matrices(4), strict=True):
            p.grad = grad.roll(step)
        muon.step()
    return params, muon


def follow_formula(p, grad, count, rate):
    """Muon on one matrix, in float64 but for the orthogonalisation."""
    momentum = 0
    rows, cols = p.shape
    rate *= max(1, rows / cols) ** 0.5
    for step in range(count):
        gradient = grad.roll(step).double()
        momentum = 0.9 * momentum + gradient
        nesterov = gradient + 0.9 * momentum
        update = tg.orthogonalize(nesterov.float()[None], 5)[0].double()
        p = p - rate * update
    return p


def test_muon_follows_its_formula(rt):
    params, _ = take_steps(rt, 3, (0.02, 0.005))
    start = draw_matrices(3)
    grads = draw_matrices(4)
    for i, after in enumerate(params):
        rate = 0.005 if i % 2 else 0.02
        expected = follow_formula(start[i].double(), grads[i], 3, rate)
        # Updates are rounded to bf16: by up to 1/256 of their rates.
        torch.testing.assert_close(after.double(), expected, atol=2e-4, rtol=0)


def test_muon_works_in_the_compute_dtype(monkeypatch):
    seen = set()

    def note(matrices, steps):
        seen.add(matrices.dtype)
        return matrices

    monkeypatch.setattr(tg, "orthogonalize", note)
    take_steps(tg.Runtime(CPU, torch.bfloat16))
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("world", [2, 9])
def test_muon_shares_its_work_by_one_all_reduce(rt, monkeypatch, world):
    """Each matrix is one rank's work, and none has more than one above its share.

    The sum of all buffers is the update of a single rank. The momentum is the same on all ranks.
    """
    sent = []
    monkeypatch.setattr(tg.Runtime, "sum", lambda rt, flat: sent.append(flat.clone()))
    _, alone = take_steps(rt)
    sizes = [rows * cols for rows, cols in SHAPES]
    for rank in range(world):
        _, muon = take_steps(replace(rt, rank=rank, world=world))
        states = [each.state_dict()["state"] for each in (muon, alone)]
        torch.testing.assert_close(*states, atol=0, rtol=0)
    whole, *parts = sent
    assert len(parts) == world
    assert whole.dtype == torch.bfloat16
    stacked = torch.stack(parts)
    assert torch.equal(whole, stacked.sum(0))
    filled = torch.stack([part.any(1) for part in stacked.split(sizes, dim=1)])
    assert (filled.sum(1) == 1).all()
    assert filled.sum(0).max() == -(-len(SHAPES) // world)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_the_optimizer_and_the_rate_of_its_role(rt, tied):
    """Also a matrix that a fork gave a rate of its own."""
    model = tiny_model(tiny_config(tie_embeddings=tied, scalar_lr=0.01), rt)
    model.blocks[1].mlp.fc.weight.role = tg.Role("muon", "scalar_lr")
    muon, adam = tg.build_optimizers(model, rt)
    names = {p: name for name, p in model.named_parameters()}
    found = {}
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            found |= {names[p]: (optimizer, group["lr"]) for p in group["params"]}
    expected = dict.fromkeys(names.values(), (adam, 0.01))
    for name in expected:
        if name.startswith("blocks.") and name.endswith(".weight"):
            expected[name] = (muon, 0.04)
    expected["blocks.1.mlp.fc.weight"] = (muon, 0.01)
    expected["tok_emb.weight"] = (adam, 0.05 if tied else 0.6)
    if not tied:
        expected["lm_head.weight"] = (adam, 0.008)
    assert found == expected
    assert (adam.defaults["betas"], adam.defaults["eps"]) == ((0.9, 0.95), 1e-8)


CAPPED = {"iterations": 1_000_000, "warmdown_iters": 20, "max_wallclock_seconds": 125.0}
CAPPED["calibration_seconds"] = 25.0  # of the 125: training has 100


@pytest.mark.parametrize(
    ("settings", "moments"),  # settings, and the scale at each (step, seconds)
    [
        (
            {"iterations": 100, "warmdown_iters": 40},
            {(0, 1e6): 1, (80, 1e6): 0.5, (100, 1e6): 0},
        ),
        # 1 s a step: the last 20 steps fall linearly; a slower pace starts earlier.
        (CAPPED, {(0, 0): 1, (90, 90): 0.5, (30, 60): 1, (35, 70): 0.75, (60, 120): 0}),
        (CAPPED | {"warmdown_iters": 0}, {(99, 99): 1}),
    ],
)
def test_the_scale_of_rates(settings, moments):
    cfg = tiny_config(**settings)
    for (step, seconds), scale in moments.items():
        assert tg.schedule(step, 1000.0 * seconds, cfg)[0] == pytest.approx(scale)
