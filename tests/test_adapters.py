"""Adapters by algebra: merging, mixing and doing nothing must agree with what they stand for."""

import math

import pytest
import torch
from conftest import tiny_config, tiny_model

import train_gpt as tg


def random_adapters(model, cfg, rt, documents):
    adapters = tg.DocumentAdapters(model, cfg, rt)
    adapters.reset(documents)
    torch.manual_seed(5)
    adapters.flat = 0.2 * torch.randn_like(adapters.flat)
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
        state = model.state_dict() | {"lm_head.weight": model.head.float()}  # so that a tied head can be merged alone
        for name, (a, b) in pairs.items():
            state[f"{name}.weight"] = state[f"{name}.weight"] + b[0] @ a[0]
        merged.load_state_dict(state)
        torch.testing.assert_close(merged(ids, targets), expected, atol=2e-4, rtol=1e-4)
    assert (expected - plain).abs().max() > 0.1


def test_adapters_sit_where_the_record_has_them(rt):
    cfg = tiny_config(ttt_lora_rank=3)
    model = tiny_model(cfg, rt)
    adapters = tg.DocumentAdapters(model, cfg, rt)
    adapters.reset(2)
    shapes = {name: (tuple(a.shape), tuple(b.shape)) for name, (a, b) in adapters.pairs(adapters.flat).items()}
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
    adapters = tg.DocumentAdapters(model, cfg, rt)
    adapters.reset(2)
    ids, targets = batch(2)
    assert torch.equal(model(ids, targets, adapters=adapters.pairs(adapters.flat)), model(ids, targets))


def test_every_document_starts_from_the_same_seeded_draw(rt):
    cfg = tiny_config(ttt_lora_rank=8)
    model = tiny_model(cfg, rt)
    adapters = tg.DocumentAdapters(model, cfg, rt)
    adapters.reset(3)
    for name, (a, b) in adapters.pairs(adapters.flat).items():
        assert torch.equal(a[0], a[1]) and torch.equal(a[0], a[2]) and not b.any(), name
        bound = 1 / math.sqrt(a.shape[-1])
        assert a.abs().max() <= bound and a.max() > 0.9 * bound and a.min() < -0.9 * bound
    torch.manual_seed(99)
    again = tg.DocumentAdapters(model, cfg, rt)
    assert torch.equal(again.start, adapters.start)
    other = tg.DocumentAdapters(model, tiny_config(ttt_lora_rank=8, seed=2), rt)
    assert not torch.equal(other.start, adapters.start)


def test_batched_adam_equals_torch_adam_per_document(rt):
    """Three documents, the last of which stops early, against one torch optimizer per document."""
    cfg = tiny_config(ttt_lora_lr=0.03)
    model = tiny_model(cfg, rt)
    adapters = tg.DocumentAdapters(model, cfg, rt)
    adapters.reset(3)
    ours = [torch.nn.Parameter(adapters.start.clone()) for _ in range(3)]
    adams = [torch.optim.Adam([p], lr=0.03, betas=(0.9, 0.95), eps=1e-10) for p in ours]
    torch.manual_seed(0)
    for step in range(5):
        active = 3 if step < 2 else 2
        grad = torch.randn(active, adapters.flat.shape[1])
        adapters.adam(grad)
        for row in range(active):
            ours[row].grad = grad[row].clone()
            adams[row].step()
    for row in range(3):
        torch.testing.assert_close(adapters.flat[row], ours[row].detach(), atol=1e-6, rtol=1e-5)
    adapters.reset(3)
    assert torch.equal(adapters.flat[0], adapters.start) and not adapters.mean.any() and adapters.steps == 0
