"""Adapters by algebra: merging, mixing and doing nothing must agree with what they stand for."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config, tiny_documents, tiny_model

import train_gpt as tg

RECIPE = tg.Learner(("c_q", "c_v", "lm_head"), rank=2, lr=0.01)
EVERYWHERE = replace(RECIPE, targets=tg.TARGETS)

# The projection that each field of `BlockLoRA` corrects.
PARTS = {
    "c_q": "attn.c_q",
    "c_k": "attn.c_k",
    "c_v": "attn.c_v",
    "attn_proj": "attn.proj",
    "fc": "mlp.fc",
    "mlp_proj": "mlp.proj",
}


def adapters_of(model, rt, learner=RECIPE, slots=1, chunk=8):
    """Adapters as documents start with them."""
    return tg.DocumentAdapters(model, learner, chunk, slots, rt)


def random_adapters(model, rt, slots, learner=EVERYWHERE):
    """Adapters that change everything, and another thing for each document."""
    adapters = adapters_of(model, rt, learner, slots)
    torch.manual_seed(5)
    adapters.state.flat.copy_(0.2 * torch.randn_like(adapters.state.flat))
    return adapters


def by_name(adapters):
    """{name of a projection in the model: its LoRA}."""
    found = {}
    for i, block in enumerate(adapters.blocks):
        for field, lora in block._asdict().items():
            found[f"blocks.{i}.{PARTS[field]}"] = lora
    found["lm_head"] = adapters.lm_head
    return {name: lora for name, lora in found.items() if lora is not None}


def batch(rows):
    """Random ids and targets, each (rows, 16)."""
    torch.manual_seed(1)
    return torch.randint(0, 96, (rows, 16)), torch.randint(0, 96, (rows, 16))


@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_equal_adapters(rt, tied):
    """W + BA in the weights gives the losses of W with adapters (A, B)."""
    model = tiny_model(tiny_config(tie_embeddings=tied), rt)
    adapters = random_adapters(model, rt, 1)
    loras = adapters.unflatten(adapters.state.flat)
    ids, targets = batch(1)
    # Always an untied head, so that one that was tied can be merged alone.
    merged = tg.GPT(tiny_config(tie_embeddings=False), rt.dtype)
    state = model.state_dict() | {"lm_head.weight": model.lm_head.weight.detach().float()}
    assert len(by_name(loras)) == 3 * 6 + 1
    for name, lora in by_name(loras).items():
        state[f"{name}.weight"] = state[f"{name}.weight"] + lora.b[0] @ lora.a[0]
    merged.load_state_dict(state)
    expected = model(ids, targets, adapters=loras)
    torch.testing.assert_close(merged(ids, targets), expected, atol=2e-4, rtol=1e-4)
    assert (expected - model(ids, targets)).abs().max() > 0.1


def test_adapters_sit_where_the_record_has_them(rt):
    cfg = tiny_config(ttt_lora_rank=3)
    learner = tg.ladder(tiny_documents([60]), cfg, rt)["ttt"].learner
    adapters = adapters_of(tiny_model(cfg, rt), rt, learner, slots=2)
    found = by_name(adapters.unflatten(adapters.state.flat))
    shapes = {name: (tuple(lora.a.shape), tuple(lora.b.shape)) for name, lora in found.items()}
    expected = {"lm_head": ((2, 3, 32), (2, 96, 3))}
    for i in range(3):
        expected[f"blocks.{i}.attn.c_q"] = ((2, 3, 32), (2, 32, 3))
        expected[f"blocks.{i}.attn.c_v"] = ((2, 3, 32), (2, 16, 3))
    assert shapes == expected


def test_a_mixed_batch_equals_each_document_alone(rt):
    model = tiny_model(tiny_config(), rt)
    adapters = random_adapters(model, rt, 3)
    flat = adapters.state.flat
    ids, targets = batch(3)
    together = model(ids, targets, adapters=adapters.unflatten(flat))
    for i in range(3):
        row = slice(i, i + 1)
        alone = model(ids[row], targets[row], adapters=adapters.unflatten(flat[row]))
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)


def test_fresh_adapters_change_nothing(rt):
    model = tiny_model(tiny_config(), rt)
    adapters = adapters_of(model, rt, slots=2)
    loras = adapters.unflatten(adapters.state.flat)
    ids, targets = batch(2)
    assert torch.equal(model(ids, targets, adapters=loras), model(ids, targets))


def test_every_document_starts_from_the_same_draw_whatever_the_seed(rt):
    cfg = tiny_config()
    model = tiny_model(cfg, rt)
    learner = replace(RECIPE, rank=8)
    adapters = adapters_of(model, rt, learner, slots=3)
    for name, (a, b) in by_name(adapters.unflatten(adapters.state.flat)).items():
        assert torch.equal(a[0], a[1]) and torch.equal(a[0], a[2]), name
        assert not b.any(), name
        bound = 1 / math.sqrt(a.shape[-1])
        assert a.abs().max() <= bound, name
        assert a.max() > 0.9 * bound and a.min() < -0.9 * bound, name
    other = tiny_model(replace(cfg, seed=2), rt, seed=99)  # and another state of torch's generator
    assert torch.equal(adapters_of(other, rt, learner).start, adapters.start)


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.95), (0.0, 0.99)])
@pytest.mark.parametrize("active", [[0, 1, 2], [2, 0]])
def test_batched_adam_equals_torch_adam_per_document(rt, beta1, beta2, active):
    """Three documents, some of which rest now and then, against one torch optimizer for each."""
    learner = tg.Learner(("c_q", "lm_head"), 2, 0.03, beta1, beta2)
    adapters = adapters_of(tiny_model(tiny_config(), rt), rt, learner, slots=3)
    state = adapters.state
    theirs = [torch.nn.Parameter(adapters.start.clone()) for _ in range(3)]
    adams = [torch.optim.Adam([p], 0.03, (beta1, beta2), eps=1e-10) for p in theirs]
    torch.manual_seed(0)
    for rows in (slice(3), torch.tensor(active), slice(1), slice(3), torch.tensor(active[::-1])):
        documents = torch.arange(3)[rows]
        grad = torch.randn(len(documents), state.flat.shape[1])
        adapters.step(rows, grad)
        for own, document in zip(grad, documents, strict=True):
            theirs[document].grad = own.clone()
            adams[document].step()
    for row in range(3):
        torch.testing.assert_close(state.flat[row], theirs[row].detach(), atol=1e-6, rtol=1e-5)
    kept = state.flat[1].clone()
    adapters.restart(torch.tensor([0, 2]))
    for row in (0, 2):
        assert torch.equal(state.flat[row], adapters.start)
        assert not any(tensor[row].any() for tensor in (state.mean, state.square, state.steps))
    assert torch.equal(state.flat[1], kept)
    assert state.steps[1] > 0 and state.square[1].all()


def test_the_rate_falls_over_a_document(rt):
    """Step s of chunks of C moves by (1 + sC/1000)^-decay of what it would move without a decay."""
    model = tiny_model(tiny_config(), rt)
    for decay, factors in ((0.0, (1, 1, 1)), (0.5, (1.5**-0.5, 2.0**-0.5, 2.5**-0.5))):
        learner = tg.Learner(("fc",), 2, 0.01, 0.0, 0.99, decay=decay)
        adapters = adapters_of(model, rt, learner, chunk=500)
        flat = adapters.state.flat
        for factor in factors:
            before = flat.clone()
            adapters.step(slice(1), torch.ones_like(flat))
            moved = (flat - before).mean().item()
            assert moved == pytest.approx(-0.01 * factor, rel=1e-3)


@pytest.mark.parametrize("targets", [("c_q",), ("attn.proj", "mlp.proj"), ("lm_head",), tg.TARGETS])
def test_targets_name_the_adapted_projections(rt, targets):
    model = tiny_model(tiny_config(num_layers=2), rt)
    learner = replace(RECIPE, targets=targets, rank=4, init_scale=3.0)
    adapters = adapters_of(model, rt, learner)
    found = by_name(adapters.unflatten(adapters.state.flat))
    everywhere = [f"blocks.{i}.{part}" for i in range(2) for part in PARTS.values()]
    expected = [name for name in [*everywhere, "lm_head"] if name.endswith(targets)]
    assert list(found) == expected
    for a, b in found.values():
        bound = 3 / math.sqrt(a.shape[-1])
        assert a.shape[1] == b.shape[2] == 4
        assert 0.9 * bound < a.abs().max() <= bound


def test_a_head_alone_spends_nothing_on_the_body(rt):
    """No gradient flows below the head if nothing there learns."""
    model = tg.frozen(tiny_model(tiny_config(), rt))
    adapters = random_adapters(model, rt, 1, replace(RECIPE, targets=("lm_head",)))
    states = []
    model.blocks[-1].register_forward_hook(lambda module, args, out: states.append(out))
    loras = adapters.unflatten(adapters.state.flat.requires_grad_())
    losses = model(*batch(1), adapters=loras)
    assert losses.requires_grad and not states[0].requires_grad
