"""The artifact: the published container, no byte too many, the least loss for its bytes, strangers' files refused."""

import copy
import functools
import io
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CONFORMANCE, tiny_config, tiny_model, write_shard
from rate_distortion import record_content

import train_gpt as tg

CODE = len(tg.source_code().encode())


def published_loader(blob):
    """How a published artifact is read, written down from spec section 5, independently of the script."""
    content = torch.load(io.BytesIO(zlib.decompress(blob)), map_location="cpu", weights_only=True)
    assert content["__quant_format__"] == "int8_clean_per_row_v1"
    state = {}
    for name, q in content["quantized"].items():
        scale = content["scales"][name]
        assert q.dtype == torch.int8 and content["qmeta"][name] == {"scheme": "per_row", "axis": 0}
        assert scale.dtype == torch.float16 and scale.shape == q.shape[:1]
        values = torch.from_numpy(
            q.numpy().astype(np.float32) * scale.numpy().astype(np.float32)[:, None]
        )
        state[name] = values.to(getattr(torch, content["dtypes"][name]))
    for name, tensor in content["passthrough"].items():
        original = content["passthrough_orig_dtypes"].get(name)
        state[name] = tensor.to(getattr(torch, original)) if original else tensor
    return state


@pytest.fixture
def trained(rt, tmp_path):
    """(a small model, its settings) with training tokens to calibrate on."""
    rng = np.random.default_rng(0)
    write_shard(
        tmp_path / "fineweb_train_000000.bin",
        rng.integers(4, 96, 20_000) // rng.integers(1, 9, 20_000),
    )
    cfg = tiny_config(data_path=str(tmp_path), out_dir=str(tmp_path))
    return tiny_model(cfg, rt), cfg


def fitted(model, cfg, room):
    """The content of an artifact of at most `room` bytes."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    content, blob = tg.fit(state, CODE + room, functools.partial(tg.calibrate, model, cfg))
    assert blob == tg.pack(content)
    return content


def test_every_matrix_is_rounded(rt, trained):
    """An embedding that is no head, whose rows count as often as they are used, and matrices without a gradient."""
    _, cfg = trained
    cfg = replace(cfg, tie_embeddings=False)
    fresh = tg.GPT(
        cfg, rt.dtype
    )  # its output projections and head are zero: nothing before them has a gradient
    for model in (tiny_model(cfg, rt), fresh):
        found = tg.calibrate(model, cfg, 4)
        assert len(found) == 3 * 6 + 2
        content = fitted(model, cfg, 25_000)
        assert content["quantized"].keys() == found.keys()
        if model is not fresh:
            moments, slopes = found["tok_emb.weight"]
            assert (
                torch.equal(moments, torch.eye(32)) and (slopes > 0).any() and (slopes == 0).any()
            )
            assert (found["lm_head.weight"][1] > 0).all()


def test_with_room_to_spare_nothing_is_lost(trained):
    model, cfg = trained
    state, blob = model.state_dict(), tg.pack(fitted(model, cfg, 16_000_000 - CODE))
    for name, tensor in published_loader(blob).items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name


def test_budgets_are_kept_and_spent(trained):
    """Never a byte more, nearly all of them used, and the more there are the less is lost, down to nothing."""
    model, cfg = trained
    state, errors = model.state_dict(), []
    exact = len(tg.pack(tg.quantize_state(state, [])))
    for room in (exact // 5, exact // 3, exact // 2, exact - 1, exact):
        content = fitted(model, cfg, room)
        size = len(tg.pack(content))
        assert size <= room
        if room < exact // 2:
            assert size > 0.98 * room and len(content["quantized"]) > 10
        back = tg.dequantize_state(content)
        errors.append(
            sum(
                (back[name].double() - state[name].double()).square().sum().item() for name in state
            )
        )
    assert (
        errors == sorted(errors, reverse=True)
        and errors[0] > 100 * errors[2] > 0
        and errors[-1] == 0
    )


def test_equal_weights_and_tokens_give_equal_bytes(trained):
    model, cfg = trained
    once = tg.pack(fitted(model, cfg, 25_000))
    torch.manual_seed(99)
    assert tg.pack(fitted(model, cfg, 25_000)) == once


def test_the_published_loader_reads_what_we_write(trained, tmp_path):
    model, cfg = trained
    for room in (20_000, 50_000):
        (tmp_path / "a.ptz").write_bytes(blob := tg.pack(fitted(model, cfg, room)))
        ours, theirs = tg.read_weights(tmp_path / "a.ptz"), published_loader(blob)
        shapes = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
        assert {name: (t.shape, t.dtype) for name, t in ours.items()} == shapes
        assert ours.keys() == theirs.keys() and all(
            torch.equal(ours[name], theirs[name]) for name in ours
        )


@pytest.mark.parametrize("budget", [1, CODE, CODE + 3000])
def test_a_budget_that_nothing_fits_is_refused_and_the_weights_are_kept(
    rt, trained, tmp_path, budget
):
    model, cfg = trained
    with pytest.raises(tg.UserError) as refused:
        tg.export(model, replace(cfg, artifact_budget=budget), rt)
    line = str(refused.value)
    assert line.startswith(
        f"ARTIFACT_BUDGET={budget}: the script leaves {budget - CODE} bytes, the coarsest artifact"
    )
    assert "\n" not in line and "EVAL_ONLY=1" in line
    saved = torch.load(tmp_path / "final_model.pt", weights_only=True)
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    assert not list(tmp_path.glob("*.ptz"))


def test_weights_that_no_token_reaches_are_refused(trained):
    """An embedding of zeros has no activations to calibrate with."""
    model, cfg = copy.deepcopy(trained[0]), trained[1]
    model.tok_emb.weight.data.zero_()
    with pytest.raises(
        tg.UserError,
        match=f"ARTIFACT_BUDGET={CODE + 20_000}: found no matrix that any token reaches",
    ):
        fitted(model, cfg, 20_000)


def test_calibration_measures_inputs_and_outputs(rt, trained):
    """Moments of inputs against a copy of the first block's arithmetic; slopes of the head against the chain rule."""
    model, cfg = trained
    found = tg.calibrate(model, cfg, 3, 30)
    assert len(found) == 3 * 6 + 1 and all(
        p.requires_grad and p.grad is None for p in model.parameters()
    )
    tokens = tg.open_shards(cfg.data_path, "fineweb_train_*.bin")[0].astype(np.int64)
    x = torch.from_numpy(np.stack([tokens[at : at + 31] for at in (0, 20_000 // 3, 40_000 // 3)]))
    emb = torch.nn.functional.rms_norm(model.tok_emb(x[:, :-1]).float(), (32,)).detach()
    block = model.blocks[0]
    n = (
        torch.nn.functional.rms_norm(block.resid_mix[0] * emb + block.resid_mix[1] * emb, (32,))
        .flatten(0, 1)
        .detach()
    )
    for part in ("c_q", "c_k", "c_v"):
        torch.testing.assert_close(
            found[f"blocks.0.attn.{part}.weight"][0], n.T @ n / 90, atol=1e-4, rtol=1e-4
        )
    logits, cross_entropy = [], tg.F.cross_entropy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tg.F,
            "cross_entropy",
            lambda z, *a, **k: logits.append(z.detach()) or cross_entropy(z, *a, **k),
        )
        model(x[:, :-1], x[:, 1:])
    z = logits[0]
    grad = (z.softmax(1) - torch.eye(96)[x[:, 1:].flatten()]) * (
        1 - (z / 30).square()
    )  # d softcap = 1 - tanh^2
    torch.testing.assert_close(
        found["tok_emb.weight"][1], grad.square().mean(0), atol=1e-5, rtol=1e-2
    )


def lesson(seed=0, rows=48, cols=64):
    """(weights (1, in, out), moments of inputs that depend on each other, slopes) of a matrix."""
    torch.manual_seed(seed)
    x = torch.randn(2000, 12) @ torch.randn(12, cols) + 0.3 * torch.randn(2000, cols)
    return torch.randn(1, cols, rows), (x.T @ x / 2000)[None], torch.rand(1, rows) + 0.1


def output_error(q, scale, w, moments, slopes):
    error = q.mT * scale[:, None].float() - w
    return (slopes[:, None] * error * (moments @ error)).sum().item()


def test_errors_make_up_for_each_other():
    """With correlated inputs, rounding that feeds errors back loses far less than rounding to the same steps."""
    w, moments, slopes = lesson()
    w, feedback, care = tg.plan_rounding(w, moments, slopes)
    lost = [
        output_error(*tg.round_matrices(w, f, care, 0.1)[:2], w, moments, slopes)
        for f in (feedback, 0 * feedback)
    ]
    assert lost[0] < 0.3 * lost[1]


def test_steps_follow_what_errors_cost():
    """Outputs that matter 16 times as much have a quarter of the step, inputs that hardly matter a long one."""
    w, slopes = (
        torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(1)),
        torch.tensor([[16.0, 1.0, 1.0, 1.0]]),
    )
    moments = torch.eye(64)[None].clone()
    moments[0, 5, 5] = 0.001
    q, scale, wide = tg.round_matrices(*tg.plan_rounding(w, moments, slopes), 0.1)
    assert 3 < scale[0, 1] / scale[0, 0] < 5 and not wide.any()
    ticks = q[0, :, 5].abs().unique()
    assert ticks.any() and all(tick % 2 == 0 for tick in ticks) and (q[0, :, 6] % 2 != 0).any()
    assert (q.abs() <= 127).all()


def test_what_is_too_wide_for_int8_is_said_to_be():
    w, moments, slopes = lesson()
    plan = tg.plan_rounding(w, moments, slopes)
    q, scale, wide = tg.round_matrices(*plan, 1e-4)
    assert wide.all() and q.abs().max() > 127
    assert (q.mT * scale[:, None].float() - w).abs().max() < 1e-3
    assert not tg.round_matrices(*plan, 0.1)[2].any()


def test_dead_and_silent_matrices_round_to_something_finite():
    for moments, slopes in (
        (torch.zeros(1, 8, 8), torch.ones(1, 6)),
        (torch.eye(8)[None], torch.zeros(1, 6)),
    ):
        for w in (torch.randn(1, 8, 6), torch.zeros(1, 8, 6)):
            for unit in (2.0**-60, 1.0, 2.0**60):
                q, scale, _ = tg.round_matrices(*tg.plan_rounding(w, moments, slopes), unit)
                assert q.isfinite().all() and scale.isfinite().all() and (scale > 0).all()


@pytest.mark.parametrize("spread", [2.0, 5.0, 30.0])
def test_pack_makes_zlib_streams_close_to_the_entropy_of_rounded_weights(spread):
    """At 3 bits a weight and more; there zlib's default, which looks for repeats, takes a tenth more."""
    torch.manual_seed(0)
    content = {
        "q": (spread * torch.randn(300, 512)).round().clamp(-127, 127).char(),
        "small": torch.ones(3),
    }
    torch.save(content, plain := io.BytesIO())
    blob = tg.pack(content)
    assert zlib.decompress(blob) == plain.getvalue()
    counts = content["q"].unique(return_counts=True)[1] / content["q"].numel()
    entropy = -(counts * counts.log2()).sum().item() * content["q"].numel() / 8
    assert len(blob) < 1.05 * entropy + 700
    assert spread > 2 or len(blob) < 0.9 * len(zlib.compress(plain.getvalue(), 9))


def big_state():
    torch.manual_seed(0)
    return {
        "tok_emb.weight": torch.randn(1024, 128).bfloat16() * 0.4,
        "blocks.0.mlp.fc.weight": torch.randn(300, 256) * torch.logspace(-3, 1, 300)[:, None],
        "blocks.0.attn.c_q.weight": torch.randn(
            256, 256
        ),  # 65,536 elements: the largest that stays float
        "blocks.0.attn.q_gain": torch.randn(8),
        "blocks.0.resid_mix": torch.randn(2, 256),
        "skip_weights": torch.randn(4, 256),
    }


def test_the_layout_is_the_published_one(trained):
    model, cfg = trained
    content = fitted(model, cfg, 25_000)
    assert list(content) == [
        "__quant_format__",
        "quantized",
        "scales",
        "dtypes",
        "passthrough",
        "qmeta",
        "passthrough_orig_dtypes",
    ]
    assert content["__quant_format__"] == "int8_clean_per_row_v1"
    matrices = {n for n, p in model.named_parameters() if p.ndim == 2 and n.endswith("weight")}
    assert (
        content["quantized"].keys()
        == content["scales"].keys()
        == content["qmeta"].keys()
        == matrices
    )
    assert content["dtypes"] == {
        n: "bfloat16" if n == "tok_emb.weight" else "float32" for n in content["quantized"]
    }
    assert set(content["passthrough_orig_dtypes"].values()) == {"float32"}
    assert {t.dtype for t in content["passthrough"].values()} == {torch.float16}


def test_the_records_quantiser_gives_the_published_artifact():
    """Quantising the weights of the published artifact again gives its very types, shapes, numbers and bytes."""
    blob = (CONFORMANCE / "final_model.int8.ptz").read_bytes()
    published = torch.load(io.BytesIO(zlib.decompress(blob)), weights_only=True)
    ours = record_content(tg.dequantize_state(published))
    for part in ("dtypes", "qmeta", "passthrough_orig_dtypes", "__quant_format__"):
        assert ours[part] == published[part]
    for part in ("quantized", "scales", "passthrough"):
        assert list(ours[part]) == list(published[part])
        for name, tensor in published[part].items():
            assert ours[part][name].dtype == tensor.dtype and torch.equal(
                ours[part][name], tensor
            ), name


def test_what_the_record_writes_is_read():
    state = big_state()
    content = record_content(state)
    assert content["quantized"].keys() == {"tok_emb.weight", "blocks.0.mlp.fc.weight"}
    back = tg.dequantize_state(content)
    assert {n: (t.dtype, t.shape) for n, t in back.items()} == {
        n: (t.dtype, t.shape) for n, t in state.items()
    }
    for name in ("blocks.0.attn.q_gain", "blocks.0.resid_mix", "skip_weights"):
        assert torch.equal(back[name], state[name])
    assert torch.equal(
        back["blocks.0.attn.c_q.weight"], state["blocks.0.attn.c_q.weight"].half().float()
    )
    assert (
        back["blocks.0.mlp.fc.weight"] - state["blocks.0.mlp.fc.weight"]
    ).abs().max() < 0.51 * 40 / 127


def test_a_scalar_scale_is_read():
    """The published writer gives large tensors that are not matrices one fp32 scale."""
    content = {
        "quantized": {"v": torch.tensor([2, -3], dtype=torch.int8)},
        "scales": {"v": torch.tensor(0.5)},
        "dtypes": {"v": "float32"},
        "passthrough": {},
        "passthrough_orig_dtypes": {},
        "__quant_format__": "int8_clean_per_row_v1",
    }
    assert tg.dequantize_state(content)["v"].tolist() == [1.0, -1.5]


def test_export_writes_both_files_and_their_sizes(rt, tmp_path, capsys):
    cfg = tiny_config(out_dir=str(tmp_path))
    model = tiny_model(cfg, rt)
    rt.log_path = tmp_path / "log"
    path = tg.export(model, cfg, rt)
    lines, code = capsys.readouterr().out.splitlines(), len(tg.source_code().encode())
    raw, packed = (tmp_path / "final_model.pt").stat().st_size, path.stat().st_size
    assert path.name == "final_model.int8.ptz"
    assert lines[:3] == [
        f"Serialized model: {raw} bytes",
        f"Code size: {code} bytes",
        f"Total submission size: {raw + code} bytes",
    ]
    assert lines[3].startswith(f"Serialized model int8+zlib: {packed} bytes (payload:")
    assert lines[4] == f"Total submission size int8+zlib: {packed + code} bytes"
    saved = torch.load(tmp_path / "final_model.pt", weights_only=True)
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    unpacked = tg.read_weights(path)
    fresh = tg.GPT(tg.shape_from_weights(unpacked, tg.Config(), "x"), rt.dtype)
    tg.copy_tensors(fresh.state_dict(), unpacked, path)


@pytest.mark.parametrize("tied", [True, False])
def test_shape_comes_from_the_weights(rt, tied):
    cfg = tiny_config(tie_embeddings=tied, mlp_mult=3)
    found = tg.shape_from_weights(tiny_model(cfg, rt).state_dict(), tg.Config(), "file")
    names = (
        "vocab_size",
        "num_layers",
        "model_dim",
        "num_heads",
        "num_kv_heads",
        "mlp_mult",
        "tie_embeddings",
    )
    assert {n: getattr(found, n) for n in names} == {n: getattr(cfg, n) for n in names}


class Bomb:
    """Pickles to a call, as a hostile file would."""

    def __reduce__(self):
        return (print, ("this must never run",))


def saved(content):
    torch.save(content, buffer := io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "blob"),
    [
        ("a.ptz", b""),
        ("a.pt", b""),
        ("a.ptz", b"not zlib"),
        ("a.pt", b"not torch"),
        ("a.ptz", zlib.compress(saved({"__quant_format__": "int4_other"}))),
        ("a.ptz", zlib.compress(saved({"w": torch.ones(2)}))),
        ("a.pt", saved({"w": "text"})),
        ("a.pt", saved([torch.ones(2)])),
        ("a.pt", saved({"w": Bomb()})),
    ],
)
def test_unusable_files_are_refused_and_never_executed(tmp_path, capsys, name, blob):
    path = tmp_path / name
    path.write_bytes(blob)
    with pytest.raises(tg.UserError) as refused:
        tg.read_weights(path)
    assert str(path) in str(refused.value) and "expected an artifact (.ptz)" in str(refused.value)
    assert "\n" not in str(refused.value) and "must never run" not in capsys.readouterr().out


def test_weights_that_do_not_fit_are_named(rt):
    cfg = tiny_config()
    model = tiny_model(cfg, rt)
    good = dict(model.state_dict())
    for change, message in (
        (
            {"blocks.1.attn.c_v.weight": torch.ones(3, 3)},
            r"attn.c_v.weight: found \(3, 3\), expected \(16, 32\)",
        ),
        ({"surprise": torch.ones(1)}, r"surprise: found \(1,\), expected no such tensor"),
    ):
        with pytest.raises(tg.UserError, match=message):
            tg.copy_tensors(model.state_dict(), good | change, "file.pt")
    with pytest.raises(tg.UserError, match="skip_weights: found no such tensor"):
        tg.copy_tensors(
            model.state_dict(), {n: t for n, t in good.items() if n != "skip_weights"}, "file.pt"
        )
    with pytest.raises(tg.UserError, match="expected the weights of this model"):
        tg.shape_from_weights({"w": torch.ones(2)}, cfg, "file.pt")
