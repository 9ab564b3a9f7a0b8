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
    square = x.square().mean(-1, keepdim=True)
    return x / (square + 1.2e-7).sqrt()


def turn(x, base):
    """One head's vectors (T, N), normed, their halves rotated by position x frequency."""
    first, second = norm(x).chunk(2, dim=1)
    steps = torch.arange(first.size(1)).double()
    frequency = base ** (-steps / len(steps))
    angle = torch.arange(len(x))[:, None] * frequency
    turned = torch.complex(first, second) * torch.exp(-1j * angle)
    return torch.cat((turned.real, turned.imag), dim=1)


def reference_attention(w, cfg, n):
    """(T, D) -> (T, D) with the weights of one attention, head by head."""
    dim = cfg.model_dim // cfg.num_heads
    share = cfg.num_heads // cfg.num_kv_heads
    future = torch.full((len(n), len(n)), -math.inf).triu(1)
    out = []
    for head in range(cfg.num_heads):
        own = slice(head * dim, (head + 1) * dim)
        shared = slice(head // share * dim, (head // share + 1) * dim)
        queries = turn(n @ w["c_q.weight"][own].T, cfg.rope_base)
        keys = turn(n @ w["c_k.weight"][shared].T, cfg.rope_base)
        scores = w["q_gain"][head] * queries @ keys.T / math.sqrt(dim)
        weights = (scores + future).softmax(-1)
        out.append(weights @ n @ w["c_v.weight"][shared].T)
    return torch.cat(out, dim=1) @ w["proj.weight"].T


def part_of(w, prefix):
    """The weights whose names begin with the prefix, without it."""
    own = {}
    for name, tensor in w.items():
        if name.startswith(prefix):
            own[name.removeprefix(prefix)] = tensor
    return own


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
        kept, added = block["resid_mix"]
        x = kept * x + added * x0
        seen = reference_attention(part_of(block, "attn."), cfg, norm(x))
        x = x + block["attn_scale"] * seen
        hidden = torch.relu(norm(x) @ block["mlp.fc.weight"].T) ** 2
        x = x + block["mlp_scale"] * (hidden @ block["mlp.proj.weight"].T)
        if i < half:
            stack.append(x)
    head = w["tok_emb.weight" if cfg.tie_embeddings else "lm_head.weight"]
    logits = norm(x) @ head.T
    return cfg.logit_softcap * torch.tanh(logits / cfg.logit_softcap)


UNTIED = {"num_layers": 4, "tie_embeddings": False, "mlp_mult": 3, "num_kv_heads": 4}


@pytest.mark.parametrize("settings", [{}, {"num_layers": 1}, UNTIED])
def test_forward_follows_the_recipe(rt, settings):
    cfg = tiny_config(**settings)
    model = tiny_model(cfg, rt)
    ids, targets = torch.randint(0, cfg.vocab_size, (2, 2, 13))
    losses = model(ids, targets)
    logits = model(ids)
    for row in range(2):
        exact = reference_logits(model, cfg, ids[row])
        assert (logits[row] - exact).abs().max() < 2e-5
        expected = F.cross_entropy(exact, targets[row], reduction="none")
        assert (losses[row] - expected).abs().max() < 2e-5


def test_initial_weights_come_from_the_seed():
    def draw(**settings):
        cfg = tiny_config(model_dim=256, vocab_size=1024, **settings)
        return tg.build_model(cfg, torch.bfloat16).state_dict()

    w = draw(seed=7)
    torch.testing.assert_close(draw(seed=7), w, atol=0, rtol=0)
    emb = w.pop("tok_emb.weight")
    assert not torch.equal(emb, draw(seed=8)["tok_emb.weight"])
    assert emb.dtype is torch.bfloat16
    assert emb.float().std().item() == pytest.approx(0.005, rel=0.02)
    assert all(tensor.dtype is torch.float32 for tensor in w.values())
    values = {
        "attn_scale": 1,
        "mlp_scale": 1,
        "resid_mix": torch.tensor([[1.0], [0.0]]),
        "attn.q_gain": 1.5,
        "attn.proj.weight": 0,
        "mlp.proj.weight": 0,
    }
    for name, value in values.items():
        assert (w[f"blocks.2.{name}"] == value).all(), name
    assert (w["skip_weights"] == 1).all()
    untied = draw(tie_embeddings=False)
    assert not untied["lm_head.weight"].any()
    assert untied["tok_emb.weight"].float().std().item() > 0.9


def test_residual_stream_and_products_are_bf16_and_losses_fp32():
    """The decision that the class docstring states, seen at the doors of the modules."""
    model = tiny_model(tiny_config(), tg.Runtime(CPU, torch.bfloat16))
    seen = set()

    def note(module, args, out):
        seen.update((args[0].dtype, out.dtype))

    for module in model.modules():
        if isinstance(module, (tg.Block, tg.Linear, tg.TiedHead)):
            module.register_forward_hook(note)
    ids = torch.arange(8)[None]
    assert model(ids, ids).dtype is torch.float32
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_copy_scores_the_same_and_keeps_its_gains(tied):
    """Weights are cast once instead of in every pass; gains are used in fp32."""
    model = tiny_model(tiny_config(tie_embeddings=tied), tg.Runtime(CPU, torch.bfloat16))
    ids = torch.arange(64).view(2, 32)
    copied = tg.frozen(model)
    assert torch.equal(copied(ids, ids.flip(0)), model(ids, ids.flip(0)))
    for name, p in copied.named_parameters():
        assert (p.dtype is torch.bfloat16) == name.endswith(".weight")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_our_attention_is_torchs(dtype, tolerance):
    """Values and gradients of torch's own in fp64, over several blocks and a part of one."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 70, 8).to(dtype) for heads in (6, 2, 2)]

    def results(attend, dtype):
        """The output and the gradients of the sum of its sines."""
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        out = attend(*leaves)
        return [out, *torch.autograd.grad(out.sin().sum(), leaves)]

    theirs = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    blocked = functools.partial(tg.causal_attention, block=16)
    exact = results(theirs, torch.float64)
    for ours, expected in zip(results(blocked, dtype), exact, strict=True):
        assert ours.dtype is dtype
        error = ours - expected
        assert error.norm() <= tolerance * expected.norm()
