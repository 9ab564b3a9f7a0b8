"""Adapters by algebra: merging, mixing and doing nothing must agree with what they stand for."""

import math

import pytest
import torch
from conftest import tiny_condition, tiny_config, tiny_documents, tiny_model

import train_gpt as tg


def random_adapters(model, cfg, rt, documents, targets=tg.TARGETS):
    how = tiny_condition(cfg, targets=targets)
    adapters = tg.DocumentAdapters(model, how, documents, cfg.seed, rt)
    torch.manual_seed(5)
    adapters.flat.copy_(0.2 * torch.randn_like(adapters.flat))
    return adapters


def batch(rows, seed=1):
    torch.manual_seed(seed)
    return torch.randint(0, 96, (rows, 16)), torch.randint(0, 96, (rows, 16))


@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_equal_adapters(rt, tied):
    """W + BA in the weights gives the losses of W with adapters (A, B)."""
    cfg = tiny_config(tie_embeddings=tied)
    model = tiny_model(cfg, rt)
    adapters = random_adapters(model, cfg, rt, 1)
    pairs = adapters.pairs(adapters.flat)
    ids, targets = batch(1)
    with torch.no_grad():
        expected, plain = model(ids, targets, adapters=pairs), model(ids, targets)
        merged = tg.GPT(tiny_config(tie_embeddings=False), rt.dtype)
        head = (model.lm_head or model.tok_emb).weight.float()
        state = model.state_dict() | {
            "lm_head.weight": head
        }  # so that a tied head can be merged alone
        for name, (a, b) in pairs.items():
            state[f"{name}.weight"] = state[f"{name}.weight"] + b[0] @ a[0]
        merged.load_state_dict(state)
        torch.testing.assert_close(merged(ids, targets), expected, atol=2e-4, rtol=1e-4)
    assert (expected - plain).abs().max() > 0.1


def test_adapters_sit_where_the_record_has_them(rt):
    cfg = tiny_config(ttt_lora_rank=3)
    model = tiny_model(cfg, rt)
    how = tg.ladder(tiny_documents([60]), cfg, rt)["ttt"]
    adapters = tg.DocumentAdapters(model, how, 2, cfg.seed, rt)
    shapes = {
        name: (tuple(a.shape), tuple(b.shape))
        for name, (a, b) in adapters.pairs(adapters.flat).items()
    }
    expected = {"lm_head": ((2, 3, 32), (2, 96, 3))}
    for i in range(3):
        expected[f"blocks.{i}.attn.c_q"] = ((2, 3, 32), (2, 32, 3))
        expected[f"blocks.{i}.attn.c_v"] = ((2, 3, 32), (2, 16, 3))
    assert shapes == expected


def test_a_mixed_batch_equals_each_document_alone(rt):
    cfg = tiny_config()
    model = tiny_model(cfg, rt)
    adapters = random_adapters(model, cfg, rt, 3)
    ids, targets = batch(3)
    together = model(ids, targets, adapters=adapters.pairs(adapters.flat))
    for row in range(3):
        own = adapters.pairs(adapters.flat[row : row + 1])
        alone = model(ids[row : row + 1], targets[row : row + 1], adapters=own)
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)


def test_fresh_adapters_change_nothing(rt):
    cfg = tiny_config()
    model = tiny_model(cfg, rt)
    adapters = tg.DocumentAdapters(model, tiny_condition(cfg), 2, cfg.seed, rt)
    ids, targets = batch(2)
    assert torch.equal(
        model(ids, targets, adapters=adapters.pairs(adapters.flat)), model(ids, targets)
    )


def test_every_document_starts_from_the_same_seeded_draw(rt):
    cfg = tiny_config(ttt_lora_rank=8)
    model = tiny_model(cfg, rt)
    adapters = tg.DocumentAdapters(model, tiny_condition(cfg), 3, cfg.seed, rt)
    for name, (a, b) in adapters.pairs(adapters.flat).items():
        assert torch.equal(a[0], a[1]) and torch.equal(a[0], a[2]) and not b.any(), name
        bound = 1 / math.sqrt(a.shape[-1])
        assert a.abs().max() <= bound and a.max() > 0.9 * bound and a.min() < -0.9 * bound
    torch.manual_seed(99)
    again = tg.DocumentAdapters(model, tiny_condition(cfg), 3, cfg.seed, rt)
    assert torch.equal(again.start, adapters.start)
    other = tg.DocumentAdapters(model, tiny_condition(cfg), 3, 2, rt)
    assert not torch.equal(other.start, adapters.start)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.99)])
@pytest.mark.parametrize("seated", [[0, 1, 2], [2, 0]])
def test_batched_adam_equals_torch_adam_per_document(rt, betas, seated):
    """Three documents at different steps, some of which rest now and then, against one torch optimizer for each."""
    cfg = tiny_config(ttt_lora_lr=0.03)
    model, how = tiny_model(cfg, rt), tiny_condition(cfg, targets=("c_q", "lm_head"), betas=betas)
    adapters = tg.DocumentAdapters(model, how, 3, cfg.seed, rt)
    ours = [torch.nn.Parameter(adapters.start.clone()) for _ in range(3)]
    adams = [torch.optim.Adam([p], lr=0.03, betas=betas, eps=1e-10) for p in ours]
    torch.manual_seed(0)
    for rows in (slice(3), torch.tensor(seated), slice(1), slice(3), torch.tensor(seated[::-1])):
        active = torch.arange(3)[rows]
        grad = torch.randn(len(active), adapters.flat.shape[1])
        adapters.adam(rows, grad)
        for place, row in enumerate(active):
            ours[row].grad = grad[place].clone()
            adams[row].step()
    for row in range(3):
        torch.testing.assert_close(adapters.flat[row], ours[row].detach(), atol=1e-6, rtol=1e-5)
    adapters.reset(torch.tensor([0, 2]))
    for row in (0, 2):
        assert torch.equal(adapters.flat[row], adapters.start) and adapters.steps[row] == 0
        assert not adapters.mean[row].any() and not adapters.square[row].any()
    assert (
        not torch.equal(adapters.flat[1], adapters.start)
        and adapters.steps[1] > 0
        and adapters.square[1].all()
    )


def test_the_rate_falls_over_a_document(rt):
    """Step s of chunks of C moves by (1 + sC/1000)^-decay of what it would move by without a decay."""
    cfg = tiny_config()
    model, moved = tiny_model(cfg, rt), {}
    for decay in (0.0, 0.5):
        how = tiny_condition(cfg, chunk=500, targets=("fc",), betas=(0.0, 0.99), decay=decay)
        adapters = tg.DocumentAdapters(model, how, 1, cfg.seed, rt)
        places = [adapters.flat.clone()]
        for _ in range(3):
            adapters.adam(slice(1), torch.ones_like(adapters.flat))
            places.append(adapters.flat.clone())
        moved[decay] = [(places[i + 1] - places[i]).mean().item() for i in range(3)]
    assert moved[0.0] == pytest.approx([-0.01] * 3, rel=1e-3)
    assert moved[0.5] == pytest.approx([-0.01 * x**-0.5 for x in (1.5, 2.0, 2.5)], rel=1e-3)


@pytest.mark.parametrize("targets", [("c_q",), ("attn.proj", "mlp.proj"), ("lm_head",), tg.TARGETS])
def test_targets_name_the_adapted_projections(rt, targets):
    cfg = tiny_config(num_layers=2)
    model = tiny_model(cfg, rt)
    how = tiny_condition(cfg, targets=targets, rank=4, spread=3.0)
    adapters = tg.DocumentAdapters(model, how, 1, cfg.seed, rt)
    inside = [
        f"blocks.{i}.{part}"
        for i in range(2)
        for part in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")
    ]
    assert list(adapters.names) == [name for name in [*inside, "lm_head"] if name.endswith(targets)]
    for a, b in adapters.pairs(adapters.flat).values():
        bound = 3 / math.sqrt(a.shape[-1])
        assert a.shape[1] == b.shape[2] == 4 and 0.9 * bound < a.abs().max() <= bound


def test_a_head_alone_spends_nothing_on_the_body(rt):
    """On targets that nobody adapts nothing is spent: no gradient flows below the head."""
    cfg = tiny_config()
    model = tg.frozen(tiny_model(cfg, rt))
    adapters = random_adapters(model, cfg, rt, 1, ("lm_head",))
    states = []
    model.blocks[-1].register_forward_hook(lambda module, args, out: states.append(out))
    ids, targets = batch(1)
    model(ids, targets, adapters=adapters.pairs(adapters.flat.requires_grad_()))
    assert not states[0].requires_grad
