"""The model against the formulas of the recipe, written out without batches, layout or reuse."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, tiny_config, tiny_model

import train_gpt as tg


def norm(x):
    """x / rms(x) over the last dimension."""
    eps = torch.finfo(torch.float32).eps
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def turn(x, position, base):
    """One head's vector (N,), its halves rotated by position x frequency."""
    first, second = x.chunk(2)
    frequency = base ** (-torch.arange(len(first), dtype=torch.float64) / len(first))
    cos = (position * frequency).cos()
    sin = (position * frequency).sin()
    return torch.cat((first * cos + second * sin, second * cos - first * sin))


def reference_attention(w, cfg, n):
    """(T, D) -> (T, D) with the weights of one attention, head by head, position by position."""
    dim = cfg.model_dim // cfg.num_heads
    share = cfg.num_heads // cfg.num_kv_heads
    out = torch.zeros_like(n)
    for head in range(cfg.num_heads):
        own = slice(head * dim, (head + 1) * dim)
        shared = slice(head // share * dim, (head // share + 1) * dim)
        queries = norm(n @ w["c_q.weight"][own].T)
        keys = norm(n @ w["c_k.weight"][shared].T)
        values = n @ w["c_v.weight"][shared].T
        keys = torch.stack([turn(key, t, cfg.rope_base) for t, key in enumerate(keys)])
        for t, query in enumerate(queries):
            query = turn(query, t, cfg.rope_base) * w["q_gain"][head]
            weights = (keys[: t + 1] @ query / math.sqrt(dim)).softmax(0)
            out[t, own] = weights @ values[: t + 1]
    return out @ w["proj.weight"].T


def part_of(w, prefix):
    """The weights whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in w.items() if name.startswith(prefix)}


def reference_logits(model, cfg, ids):
    """Logits (T, V) of one sequence in float64, as the recipe has them (spec section 3)."""
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    half = cfg.num_layers // 2
    x0 = norm(w["tok_emb.weight"][ids])
    x = x0
    stack = []
    for i in range(cfg.num_layers):
        block = part_of(w, f"blocks.{i}.")
        if i >= half and stack:
            x = x + w["skip_weights"][i - half] * stack.pop()
        x = block["resid_mix"][0] * x + block["resid_mix"][1] * x0
        x = x + block["attn_scale"] * reference_attention(part_of(block, "attn."), cfg, norm(x))
        hidden = torch.relu(norm(x) @ block["mlp.fc.weight"].T) ** 2
        x = x + block["mlp_scale"] * (hidden @ block["mlp.proj.weight"].T)
        if i < half:
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


def test_initial_weights():
    torch.manual_seed(1)
    model = tg.GPT(tiny_config(model_dim=256, vocab_size=1024), torch.bfloat16)
    w = model.state_dict()
    emb = w.pop("tok_emb.weight")
    assert emb.dtype is torch.bfloat16
    assert emb.float().std().item() == pytest.approx(0.005, rel=0.02)
    assert all(tensor.dtype is torch.float32 for tensor in w.values())
    assert not w["blocks.0.attn.proj.weight"].any()
    assert not w["blocks.2.mlp.proj.weight"].any()
    assert (w["blocks.1.attn.q_gain"] == 1.5).all()
    assert (w["skip_weights"] == 1).all()
    assert (w["blocks.1.resid_mix"] == torch.tensor([[1.0], [0.0]])).all()
    untied = tg.GPT(tiny_config(tie_embeddings=False), torch.bfloat16).state_dict()
    assert not untied["lm_head.weight"].any()
    assert untied["tok_emb.weight"].float().std().item() > 0.9


def test_a_seed_means_the_same_weights(rt):
    def draw(seed):
        return tg.build_model(tiny_config(seed=seed), rt.dtype).state_dict()

    first = draw(7)
    for name, tensor in draw(7).items():
        assert torch.equal(first[name], tensor), name
    assert not torch.equal(first["tok_emb.weight"], draw(8)["tok_emb.weight"])


def test_positions_reach_the_head_alone(rt):
    """Losses at chosen positions equal the same entries of the full forward."""
    cfg = tiny_config()
    model = tiny_model(cfg, rt)
    ids = torch.randint(0, 96, (3, 20))
    targets = torch.randint(0, 96, (3, 20))
    at = torch.tensor([[4, 5, 6], [0, 1, 2], [17, 18, 19]])
    full = model(ids, targets)
    some = model(ids, targets.gather(1, at), at)
    torch.testing.assert_close(some, full.gather(1, at), atol=1e-5, rtol=1e-5)


def test_the_future_is_invisible(rt):
    cfg = tiny_config()
    model = tiny_model(cfg, rt)
    ids = torch.randint(0, 96, (1, 20))
    other = ids.clone()
    other[:, 12:] = torch.randint(0, 96, (1, 8))
    targets = torch.zeros_like(ids)
    assert torch.equal(model(ids, targets)[:, :12], model(other, targets)[:, :12])


def test_residual_stream_and_products_are_bf16_and_losses_fp32():
    """The decision that the class docstring states, seen at the doors of the modules."""
    model = tiny_model(tiny_config(), tg.Runtime(CPU, torch.bfloat16))
    seen = set()
    for module in model.modules():
        if isinstance(module, (tg.Block, tg.Linear, tg.TiedHead)):
            module.register_forward_hook(
                lambda module, args, out: seen.add((args[0].dtype, out.dtype))
            )
    ids = torch.zeros(1, 8, dtype=torch.int64)
    losses = model(ids, ids)
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert losses.dtype is torch.float32


def test_rotary_angles_are_built_in_double_precision(rt):
    model = tg.GPT(tiny_config(model_dim=256), rt.dtype)
    angle = 130_000 * 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    exact = torch.stack((angle.cos(), angle.sin()))
    found = model.rope(torch.tensor([130_000]))[:, 0]
    torch.testing.assert_close(found.double(), exact, atol=1e-7, rtol=0)


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
    theirs = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    blocked = functools.partial(tg.causal_attention, block=16)
    masked = functools.partial(tg.masked_attention, mask=future.to(dtype))
    exact = attention_results(theirs, inputs, weight, torch.float64)
    for attend in (blocked, masked):
        found = attention_results(attend, inputs, weight, dtype)
        for ours, expected in zip(found, exact, strict=True):
            assert ours.dtype is dtype
            torch.testing.assert_close(ours.double(), expected, atol=tolerance, rtol=tolerance)
