"""The model against the formulas of the recipe, written out once more without batching, heads layout or reuse."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, tiny_config, tiny_model

import train_gpt as tg


def reference_logits(model, cfg, ids):
    """Logits (T, V) of one sequence, position by position and head by head, in float64 (spec section 3)."""
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    dim = cfg.model_dim // cfg.num_heads

    def norm(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rope(x, position):
        half = dim // 2
        angle = position / cfg.rope_base ** (torch.arange(half, dtype=torch.float64) * 2 / dim)
        x1, x2 = x[:half], x[half:]
        return torch.cat(
            (x1 * angle.cos() + x2 * angle.sin(), -x1 * angle.sin() + x2 * angle.cos())
        )

    def attend(n, i):
        q, k, v = (n @ w[f"blocks.{i}.attn.{name}.weight"].T for name in ("c_q", "c_k", "c_v"))
        out = torch.zeros_like(n)
        for h in range(cfg.num_heads):
            g = h // (cfg.num_heads // cfg.num_kv_heads)
            span, shared = slice(h * dim, (h + 1) * dim), slice(g * dim, (g + 1) * dim)
            keys = [rope(norm(k[t, shared]), t) for t in range(len(n))]
            for t in range(len(n)):
                query = rope(norm(q[t, span]), t) * w[f"blocks.{i}.attn.q_gain"][h]
                weight = torch.stack(
                    [query @ key / math.sqrt(dim) for key in keys[: t + 1]]
                ).softmax(0)
                out[t, span] = weight @ v[: t + 1, shared]
        return out @ w[f"blocks.{i}.attn.proj.weight"].T

    x = x0 = norm(w["tok_emb.weight"][ids])
    stack = []
    for i in range(cfg.num_layers):
        if i >= cfg.num_layers // 2 and stack:
            x = x + w["skip_weights"][i - cfg.num_layers // 2] * stack.pop()
        mix = w[f"blocks.{i}.resid_mix"]
        x = mix[0] * x + mix[1] * x0
        x = x + w[f"blocks.{i}.attn_scale"] * attend(norm(x), i)
        hidden = torch.relu(norm(x) @ w[f"blocks.{i}.mlp.fc.weight"].T) ** 2
        x = x + w[f"blocks.{i}.mlp_scale"] * (hidden @ w[f"blocks.{i}.mlp.proj.weight"].T)
        if i < cfg.num_layers // 2:
            stack.append(x)
    head = w["tok_emb.weight" if cfg.tie_embeddings else "lm_head.weight"]
    return cfg.logit_softcap * torch.tanh(norm(x) @ head.T / cfg.logit_softcap)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_layers": 1},
        {"num_layers": 4, "tie_embeddings": False, "mlp_mult": 3, "num_kv_heads": 4},
    ],
)
def test_forward_follows_the_recipe(rt, settings):
    cfg = tiny_config(**settings)
    model = tiny_model(cfg, rt)
    ids = torch.randint(0, cfg.vocab_size, (2, 13))
    targets = torch.randint(0, cfg.vocab_size, (2, 13))
    losses = model(ids, targets)
    logits = model(ids)
    for row in range(2):
        exact = reference_logits(model, cfg, ids[row])
        expected = F.cross_entropy(exact, targets[row], reduction="none")
        torch.testing.assert_close(logits[row].double(), exact, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(losses[row].double(), expected, atol=2e-5, rtol=2e-5)


def test_state_dict_has_the_published_names(rt):
    cfg = tiny_config(num_layers=2, tie_embeddings=False)
    per_block = [
        "attn_scale",
        "mlp_scale",
        "resid_mix",
        "attn.q_gain",
        "attn.c_q.weight",
        "attn.c_k.weight",
        "attn.c_v.weight",
        "attn.proj.weight",
        "mlp.fc.weight",
        "mlp.proj.weight",
    ]
    names = {"tok_emb.weight", "skip_weights", "lm_head.weight"}
    names |= {f"blocks.{i}.{name}" for i in (0, 1) for name in per_block}
    assert set(tg.GPT(cfg, rt.dtype).state_dict()) == names
    assert set(tg.GPT(tiny_config(num_layers=2), rt.dtype).state_dict()) == names - {
        "lm_head.weight"
    }


def test_initial_weights(rt):
    torch.manual_seed(1)
    model = tg.GPT(tiny_config(model_dim=256, num_heads=4, vocab_size=1024), torch.bfloat16)
    w = model.state_dict()
    assert w["tok_emb.weight"].dtype is torch.bfloat16
    assert w["tok_emb.weight"].float().std().item() == pytest.approx(0.005, rel=0.02)
    assert all(t.dtype is torch.float32 for name, t in w.items() if name != "tok_emb.weight")
    assert not w["blocks.0.attn.proj.weight"].any() and not w["blocks.2.mlp.proj.weight"].any()
    assert (w["blocks.1.attn.q_gain"] == 1.5).all() and (w["skip_weights"] == 1).all()
    assert (w["blocks.1.resid_mix"] == torch.tensor([[1.0], [0.0]])).all()
    untied = tg.GPT(tiny_config(tie_embeddings=False), torch.bfloat16).state_dict()
    assert (
        not untied["lm_head.weight"].any() and untied["tok_emb.weight"].float().std().item() > 0.9
    )


def test_a_seed_means_the_same_weights(rt):
    first, second, other = (
        tg.build_model(tiny_config(seed=seed), rt.dtype).state_dict() for seed in (7, 7, 8)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["tok_emb.weight"], other["tok_emb.weight"])


def test_positions_reach_the_head_alone(rt):
    """Losses at chosen positions equal the same entries of the full forward."""
    cfg = tiny_config()
    model = tiny_model(cfg, rt)
    ids, targets = torch.randint(0, 96, (3, 20)), torch.randint(0, 96, (3, 20))
    at = torch.tensor([[4, 5, 6], [0, 1, 2], [17, 18, 19]])
    full = model(ids, targets)
    torch.testing.assert_close(
        model(ids, targets.gather(1, at), at), full.gather(1, at), atol=1e-5, rtol=1e-5
    )


def test_the_future_is_invisible(rt):
    cfg = tiny_config()
    model = tiny_model(cfg, rt)
    ids = torch.randint(0, 96, (1, 20))
    other = ids.clone()
    other[:, 12:] = torch.randint(0, 96, (1, 8))
    targets = torch.zeros_like(ids)
    assert torch.equal(model(ids, targets)[:, :12], model(other, targets)[:, :12])


def test_residual_stream_and_products_are_bf16_and_losses_fp32(monkeypatch):
    """The decision that the class docstring states, seen at the doors."""
    cfg = tiny_config()
    model = tiny_model(cfg, tg.Runtime(torch.device("cpu"), torch.bfloat16))
    seen = {"product": set()}
    block = model.blocks[1]
    block.register_forward_hook(
        lambda module, args, out: seen.update(residual=(args[0].dtype, out.dtype))
    )
    project = tg.project

    def watched(x, weight, lora):
        out = project(x, weight, lora)
        seen["product"].add((x.dtype, out.dtype))
        return out

    monkeypatch.setattr(tg, "project", watched)
    losses = model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64))
    assert seen == {"residual": (torch.bfloat16,) * 2, "product": {(torch.bfloat16,) * 2}}
    assert losses.dtype is torch.float32


def test_rope_tables_are_built_in_double_precision():
    tables = tg.rope_tables(torch.arange(130_001), 64, 10000.0)
    angle = 130_000 * 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    for table, expected in zip(tables, (angle.cos(), angle.sin()), strict=True):
        torch.testing.assert_close(table[130_000].double(), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_copy_scores_the_same_and_keeps_its_gains(tied):
    """Weights are cast once instead of in every pass; gains are used in fp32."""
    model = tiny_model(tiny_config(tie_embeddings=tied), tg.Runtime(CPU, torch.bfloat16))
    ids = torch.arange(64).view(2, 32)
    copied = tg.frozen(model)
    assert torch.equal(copied(ids, ids.flip(0)), model(ids, ids.flip(0)))
    for name, p in copied.named_parameters():
        is_matrix = name.endswith(".weight")
        assert p.dtype is (torch.bfloat16 if is_matrix else torch.float32), name
    assert (copied.lm_head.weight is copied.tok_emb.weight) == tied
    assert not any(p.requires_grad for p in copied.parameters())
    assert all(p.requires_grad for p in model.parameters())


def attention_results(attend, inputs, weight, dtype):
    """What `attend` makes of q, k and v cast to `dtype`, and the gradients of its weighted sum."""
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    out = attend(*inputs)
    loss = (out * weight.to(dtype)).sum()
    return [out, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("length", [1, 16, 70])
def test_our_attention_is_torchs(dtype, tolerance, length):
    """Values and gradients of torch's own in fp64, over less than a block, one and several."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, length, heads, 8).transpose(1, 2).to(dtype) for heads in (6, 2, 2)]
    weight = torch.randn(2, 6, length, 8)
    future = torch.full((2, length, length), -math.inf).triu(1)
    exact = attention_results(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        inputs,
        weight,
        torch.float64,
    )
    for attend in (
        lambda q, k, v: tg.causal_attention(q, k, v, block=16),
        lambda q, k, v: tg.masked_attention(q, k, v, future.to(dtype)),
    ):
        found = attention_results(attend, inputs, weight, dtype)
        for ours, expected in zip(found, exact, strict=True):
            assert ours.dtype is dtype
            torch.testing.assert_close(ours.double(), expected, atol=tolerance, rtol=tolerance)
