"""The artifact: the published container, half a step of error at most, and strangers' files refused."""

import io
import zlib

import pytest
import torch
from conftest import CONFORMANCE, tiny_config, tiny_model

import train_gpt as tg


def big_state():
    torch.manual_seed(0)
    return {
        "tok_emb.weight": torch.randn(1024, 128).bfloat16() * 0.4,
        "blocks.0.mlp.fc.weight": torch.randn(300, 256) * torch.logspace(-3, 1, 300)[:, None],
        "blocks.0.attn.c_q.weight": torch.randn(256, 256),  # 65,536 elements: the largest that stays float
        "blocks.0.attn.q_gain": torch.randn(8),
        "blocks.0.resid_mix": torch.randn(2, 256),
        "skip_weights": torch.randn(4, 256),
    }


def test_layout_is_the_published_one():
    content = tg.quantize_state(big_state())
    assert list(content) == ["__quant_format__", "quantized", "scales", "dtypes", "passthrough", "qmeta",
                             "passthrough_orig_dtypes"]  # fmt: skip
    assert content["__quant_format__"] == "int8_clean_per_row_v1"
    assert {n: (q.dtype, q.shape) for n, q in content["quantized"].items()} == {
        "tok_emb.weight": (torch.int8, (1024, 128)),
        "blocks.0.mlp.fc.weight": (torch.int8, (300, 256)),
    }
    assert {n: (s.dtype, s.shape) for n, s in content["scales"].items()} == {
        "tok_emb.weight": (torch.float16, (1024,)),
        "blocks.0.mlp.fc.weight": (torch.float16, (300,)),
    }
    assert content["dtypes"] == {"tok_emb.weight": "bfloat16", "blocks.0.mlp.fc.weight": "float32"}
    assert set(map(str, content["qmeta"].values())) == {str({"scheme": "per_row", "axis": 0})}
    assert {n: t.dtype for n, t in content["passthrough"].items()} == {
        "blocks.0.attn.c_q.weight": torch.float16,
        "blocks.0.attn.q_gain": torch.float32,
        "blocks.0.resid_mix": torch.float32,
        "skip_weights": torch.float32,
    }
    assert content["passthrough_orig_dtypes"] == {"blocks.0.attn.c_q.weight": "float32"}


def test_layout_equals_the_published_artifact(rt):
    """Quantising the weights of the published artifact again gives its very types, shapes and numbers."""
    blob = zlib.decompress((CONFORMANCE / "final_model.int8.ptz").read_bytes())
    published = torch.load(io.BytesIO(blob), weights_only=True)
    ours = tg.quantize_state(tg.dequantize_state(published))
    for part in ("dtypes", "qmeta", "passthrough_orig_dtypes", "__quant_format__"):
        assert ours[part] == published[part]
    for part in ("quantized", "scales", "passthrough"):
        assert list(ours[part]) == list(published[part])
        for name, tensor in published[part].items():
            assert ours[part][name].dtype == tensor.dtype and torch.equal(ours[part][name], tensor), name


def test_every_element_within_half_a_step():
    state = big_state()
    content = tg.quantize_state(state)
    for name, q in content["quantized"].items():
        w, scale = state[name].float(), content["scales"][name].float()[:, None]
        clip = torch.quantile(w.abs(), 0.9999984, dim=1, keepdim=True)
        assert torch.allclose(scale, (clip / 127).clamp_min(1 / 127), rtol=1e-3)
        error = (q.float() * scale - torch.minimum(torch.maximum(w, -clip), clip)).abs()
        # Half a step, and what rounding the scale to fp16 adds at |q| = 127.
        assert (error <= scale * (0.5 + 127 * 2**-11)).all()
        assert (scale >= 1 / 127 * (1 - 2**-11)).all() and scale.max() > 1.5 / 127


def test_round_trip_restores_names_shapes_and_dtypes():
    state = big_state()
    back = tg.dequantize_state(tg.quantize_state(state))
    assert {n: (t.dtype, t.shape) for n, t in back.items()} == {n: (t.dtype, t.shape) for n, t in state.items()}
    for name in ("blocks.0.attn.q_gain", "blocks.0.resid_mix", "skip_weights"):
        assert torch.equal(back[name], state[name])
    assert torch.equal(back["blocks.0.attn.c_q.weight"], state["blocks.0.attn.c_q.weight"].half().float())


def test_a_scalar_scale_is_read():
    """The published writer gives large tensors that are not matrices one fp32 scale."""
    content = {"quantized": {"v": torch.tensor([2, -3], dtype=torch.int8)}, "scales": {"v": torch.tensor(0.5)},
               "dtypes": {"v": "float32"}, "passthrough": {}, "passthrough_orig_dtypes": {},
               "__quant_format__": "int8_clean_per_row_v1"}  # fmt: skip
    assert tg.dequantize_state(content)["v"].tolist() == [1.0, -1.5]


def test_export_writes_both_files_and_their_sizes(rt, tmp_path, capsys):
    cfg = tiny_config(out_dir=str(tmp_path))
    model = tiny_model(cfg, rt)
    rt.log_path = tmp_path / "log"
    path = tg.export(model, cfg, rt)
    lines, code = capsys.readouterr().out.splitlines(), len(tg.source_code().encode())
    raw, packed = (tmp_path / "final_model.pt").stat().st_size, path.stat().st_size
    assert path.name == "final_model.int8.ptz"
    assert lines[:3] == [f"Serialized model: {raw} bytes", f"Code size: {code} bytes",
                         f"Total submission size: {raw + code} bytes"]  # fmt: skip
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
    names = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "tie_embeddings")
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
        ({"blocks.1.attn.c_v.weight": torch.ones(3, 3)}, r"attn.c_v.weight: found \(3, 3\), expected \(16, 32\)"),
        ({"surprise": torch.ones(1)}, r"surprise: found \(1,\), expected no such tensor"),
    ):
        with pytest.raises(tg.UserError, match=message):
            tg.copy_tensors(model.state_dict(), good | change, "file.pt")
    with pytest.raises(tg.UserError, match="skip_weights: found no such tensor"):
        tg.copy_tensors(model.state_dict(), {n: t for n, t in good.items() if n != "skip_weights"}, "file.pt")
    with pytest.raises(tg.UserError, match="expected the weights of this model"):
        tg.shape_from_weights({"w": torch.ones(2)}, cfg, "file.pt")
