"""Adapters by algebra: merging, mixing and doing nothing must agree with what they stand for."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config, tiny_model

import train_gpt as tg

RECIPE = tg.Learner(("c_q", "c_v", "lm_head"), rank=2, lr=0.01)
EVERYWHERE = replace(RECIPE, targets=tg.TARGETS)


def adapters_of(model, rt, learner=RECIPE, slots=1, chunk=8):
    """Adapters as documents start with them."""
    return tg.DocumentAdapters(model, learner, chunk, slots, rt)


def random_adapters(model, rt, slots, learner=EVERYWHERE):
    """LoRAs that change everything, and another thing for each document."""
    adapters = adapters_of(model, rt, learner, slots)
    torch.manual_seed(5)
    flat = 0.2 * torch.randn_like(adapters.state.flat)
    return adapters.unflatten(flat.requires_grad_())


def by_name(loras):
    """{name of a projection in the model: its LoRA}."""
    found = {}
    for i, block in enumerate(loras.blocks):
        for field, lora in block._asdict().items():
            found[f"blocks.{i}.{tg.PROJECTIONS[field]}"] = lora
    found["lm_head"] = loras.lm_head
    return {name: lora for name, lora in found.items() if lora is not None}


def batch(rows):
    """Random ids and targets, each (rows, 16)."""
    torch.manual_seed(1)
    return torch.randint(0, 96, (2, rows, 16))


@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_equal_adapters(rt, tied):
    """W + BA in the weights gives a document the losses of W with its adapters (A, B)."""
    model = tiny_model(tiny_config(tie_embeddings=tied), rt)
    loras = random_adapters(model, rt, 2)
    ids, targets = batch(2)
    found = model(ids, targets, adapters=loras)
    # Always an untied head, so that one that was tied can be merged alone.
    merged = tg.GPT(tiny_config(tie_embeddings=False), rt.dtype)
    for row in range(2):
        state = model.state_dict()
        state["lm_head.weight"] = model.lm_head.weight.float()
        for name, lora in by_name(loras).items():
            change = lora.b[row] @ lora.a[row]
            state[f"{name}.weight"] = state[f"{name}.weight"] + change
        merged.load_state_dict(state)
        expected = merged(ids, targets)[row]
        torch.testing.assert_close(found[row], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("targets", [RECIPE.targets, ("attn.proj", "mlp.proj"), tg.TARGETS])
def test_targets_name_the_adapted_projections(rt, targets):
    model = tiny_model(tiny_config(num_layers=2), rt)
    learner = replace(RECIPE, targets=targets, rank=4, init_scale=3.0)
    adapters = adapters_of(model, rt, learner)
    found = by_name(adapters.unflatten(adapters.state.flat))
    everywhere = [f"blocks.{i}.{part}" for i in range(2) for part in tg.PROJECTIONS.values()]
    everywhere.append("lm_head")
    assert list(found) == [name for name in everywhere if name.endswith(targets)]
    parts = [tensor.flatten() for lora in found.values() for tensor in lora]
    assert torch.equal(torch.cat(parts), adapters.start)
    for name, (a, b) in found.items():
        out_dim, in_dim = model.get_submodule(name).weight.shape
        assert a.shape == (1, 4, in_dim)
        assert b.shape == (1, out_dim, 4)
        bound = 3 / math.sqrt(in_dim)
        assert 0.9 * bound < a.max() <= bound
        assert 0.9 * bound < -a.min() <= bound


def test_every_document_starts_from_one_draw_that_changes_nothing(rt):
    cfg = tiny_config()
    model = tiny_model(cfg, rt)
    adapters = adapters_of(model, rt, slots=3)
    ids, targets = batch(3)
    loras = adapters.unflatten(adapters.state.flat)
    assert torch.equal(model(ids, targets, adapters=loras), model(ids, targets))
    other = tiny_model(replace(cfg, seed=2), rt, seed=99)  # and another state of torch's generator
    assert torch.equal(adapters_of(other, rt).start, adapters.start)


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.95), (0.0, 0.99)])
def test_batched_adam_equals_torch_adam_per_document(rt, beta1, beta2):
    """Three documents, some of which rest now and then, against one torch optimizer for each."""
    learner = tg.Learner(("c_q", "lm_head"), 2, 0.03, beta1, beta2)
    model = tiny_model(tiny_config(), rt)
    adapters = adapters_of(model, rt, learner, slots=3)
    state = adapters.state
    theirs = [torch.nn.Parameter(adapters.start.clone()) for _ in range(3)]
    adams = [torch.optim.Adam([p], 0.03, (beta1, beta2), eps=1e-10) for p in theirs]
    torch.manual_seed(0)
    for rows in (slice(3), torch.tensor([2, 0]), slice(1), slice(3), torch.tensor([0, 2])):
        grad = torch.randn_like(state.flat)
        adapters.step(rows, grad[rows])
        for document in torch.arange(3)[rows]:
            theirs[document].grad = grad[document]
            adams[document].step()
    expected = torch.stack([p.detach() for p in theirs])
    torch.testing.assert_close(state.flat, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_rate_falls_over_a_document(rt, decay):
    """Step s of chunks of C moves by (1 + sC/1000)^-decay of what it would move without a decay."""
    model = tiny_model(tiny_config(), rt)
    learner = tg.Learner(("fc",), 2, 0.01, 0.0, 0.99, decay=decay)
    adapters = adapters_of(model, rt, learner, chunk=500)
    flat = adapters.state.flat
    for grown in (1.5, 2.0, 2.5):
        before = flat.clone()
        adapters.step(slice(1), torch.ones_like(flat))
        moved = (before - flat).mean().item()
        assert moved == pytest.approx(0.01 * grown**-decay, rel=1e-3)


def test_a_head_alone_spends_nothing_on_the_body(rt):
    """No gradient flows below the head if nothing there learns."""
    model = tg.frozen(tiny_model(tiny_config(), rt))
    loras = random_adapters(model, rt, 1, replace(RECIPE, targets=("lm_head",)))
    states = []
    model.blocks[-1].register_forward_hook(lambda module, args, out: states.append(out))
    losses = model(*batch(1), adapters=loras)
    assert losses.requires_grad
    assert not states[0].requires_grad
