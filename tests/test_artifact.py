"""The artifact: the published container, no byte too many, the least loss for its bytes."""

import io
import math
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
def folder(tmp_path):
    """A folder with training tokens to calibrate on."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 96, 20_000) // rng.integers(1, 9, 20_000)
    write_shard(tmp_path / "fineweb_train_000000.bin", tokens)
    return tmp_path


@pytest.fixture
def model(rt, folder):
    """A small model that finds these tokens."""
    return tiny_model(tiny_config(data_path=str(folder), out_dir=str(folder)), rt)


def limited(model, room):
    """The model with a budget that leaves `room` bytes to the artifact."""
    model.cfg = replace(model.cfg, artifact_budget=CODE + room)
    return model


def fitted(model, room):
    """An artifact of at most `room` bytes."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return tg.fit_artifact(limited(model, room), state)


def opened(blob):
    """The content of an artifact."""
    return tg.load_torch(zlib.decompress(blob))


def assert_equal_states(found, expected):
    """Equal names, dtypes and values."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_every_matrix_is_rounded(rt, model):
    """An untied embedding too, whose rows count as often as they are used."""
    untied = replace(model.cfg, tie_embeddings=False)
    # In a fresh model output projections and head are zero: nothing before them has a gradient.
    for each in (tiny_model(untied, rt), tg.build_model(untied, rt.dtype)):
        found = tg.calibrate(each, 4)
        assert len(found) == 3 * 6 + 2
        assert opened(fitted(each, 25_000))["quantized"].keys() == found.keys()
    moments, slopes = tg.calibrate(tiny_model(untied, rt), 4)["tok_emb.weight"]
    assert torch.equal(moments, torch.eye(32))
    assert (slopes > 0).any() and (slopes == 0).any()


def test_with_room_to_spare_nothing_is_lost(model):
    back = published_loader(fitted(model, 16_000_000 - CODE))
    assert_equal_states(back, dict(model.state_dict()))


def test_budgets_are_kept_and_spent(model):
    """Never a byte more, nearly all of them, and the more there are the less is lost."""
    state = model.state_dict()
    exact = len(tg.pack(tg.quantize(state, [], 0)))
    errors = []
    for room in (exact // 8, exact // 5, exact // 4, exact - 1, exact):
        blob = fitted(model, room)
        assert len(blob) <= room
        if room < exact - 1:  # there int8 has no finer steps
            assert len(blob) > 0.98 * room
        back = tg.dequantize(opened(blob))
        differences = [(back[name].double() - state[name].double()) for name in state]
        errors.append(sum(difference.square().sum().item() for difference in differences))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1000 * errors[3] > errors[-1] == 0


def test_equal_weights_and_tokens_give_equal_bytes(model):
    once = fitted(model, 25_000)
    torch.manual_seed(99)
    assert fitted(model, 25_000) == once


@pytest.mark.parametrize("room", [20_000, 50_000])
def test_the_published_loader_reads_what_we_write(model, tmp_path, room):
    blob = fitted(model, room)
    path = tmp_path / "a.ptz"
    path.write_bytes(blob)
    ours = tg.read_weights(path)
    assert_equal_states(ours, published_loader(blob))
    for name, tensor in model.state_dict().items():
        assert (ours[name].shape, ours[name].dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.parametrize("room", [1 - CODE, 0, 3000])
def test_a_budget_that_nothing_fits_is_refused_and_the_weights_are_kept(model, folder, room):
    with pytest.raises(tg.UserError) as refused:
        tg.export(limited(model, room), tg.RunLog())
    line = str(refused.value)
    start = f"ARTIFACT_BUDGET={CODE + room}: the script leaves {room} bytes, the smallest artifact"
    assert line.startswith(start)
    assert "EVAL_ONLY=1" in line
    saved = torch.load(folder / "final_model.pt", weights_only=True)
    assert_equal_states(saved, dict(model.state_dict()))
    assert not list(folder.glob("*.ptz"))


def test_weights_that_no_token_reaches_are_refused(model):
    """An embedding of zeros has no activations to calibrate with."""
    model.tok_emb.weight.data.zero_()
    begin = f"ARTIFACT_BUDGET={CODE + 20_000}: calibration: .*no matrix that any token reaches"
    with pytest.raises(tg.UserError, match=begin):
        fitted(model, 20_000)


# -- calibration -------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_calibration_measures_inputs_and_outputs(rt, model, tied):
    """Inputs of the first block and of the head, against the formulas; outputs by the chain rule."""
    model = tiny_model(replace(model.cfg, tie_embeddings=tied), rt)
    found = tg.calibrate(model, 3, 30)
    assert len(found) == 3 * 6 + (1 if tied else 2)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    tokens = tg.open_shards(model.cfg.data_path, "train")[0].astype(np.int64)
    rows = [tokens[at : at + 31] for at in (0, 20_000 // 3, 40_000 // 3)]
    rows = torch.from_numpy(np.stack(rows))
    ids = rows[:, :-1]
    targets = rows[:, 1:].flatten()
    with torch.no_grad():
        emb = tg.rms_norm(model.tok_emb(ids).float())
        first = tg.rms_norm(model.blocks[0].resid_mix.sum(0) * emb).flatten(0, 1)
        logits = model(ids).flatten(0, 1)
        softcap = model.cfg.logit_softcap
        grad = logits.softmax(1) - torch.eye(96)[targets]
        grad *= 1 - (logits / softcap).square()  # the slope of the softcap
        raw = softcap * torch.atanh(logits.double() / softcap)
    for part in ("c_q", "c_k", "c_v"):
        moments = found[f"blocks.0.attn.{part}.weight"].moments
        torch.testing.assert_close(moments, first.T @ first / 90, atol=1e-4, rtol=1e-4)
    head = found["tok_emb.weight" if tied else "lm_head.weight"]
    torch.testing.assert_close(head.slopes, grad.square().mean(0), atol=1e-5, rtol=1e-2)
    # The head's inputs x, by what they are to its weights: W M W^T is the mean of (W x)(W x)^T.
    weight = model.lm_head.weight.detach().double()
    outputs = weight @ head.moments.double() @ weight.T
    torch.testing.assert_close(outputs, raw.T @ raw / 90, atol=1e-3, rtol=1e-3)


def test_an_untied_embedding_is_measured_by_its_rows(rt, model):
    """A row's slope: the mean square of the gradient that its uses send back."""
    model = tiny_model(replace(model.cfg, tie_embeddings=False), rt)
    shard = tg.open_shards(model.cfg.data_path, "train")[0]
    tokens = torch.from_numpy(shard[:31].astype(np.int64))
    ids = tokens[None, :-1]
    embedded = model.tok_emb(ids).detach().float().requires_grad_()
    model.tok_emb.register_forward_hook(lambda module, args, out: embedded)
    model(ids, tokens[None, 1:]).sum().backward()
    expected = torch.zeros(96)
    for token, grad in zip(ids[0], embedded.grad[0], strict=True):
        expected[token] += grad.square().mean() / 30
    model.tok_emb._forward_hooks.clear()
    found = tg.calibrate(model, 1, 30)["tok_emb.weight"].slopes
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-4)


# -- rounding ----------------------------------------------------------------------------------


def lesson(rows=48, cols=64):
    """(weights (rows, cols), statistics of inputs that depend on each other) of a matrix."""
    torch.manual_seed(0)
    x = torch.randn(2000, 12) @ torch.randn(12, cols) + 0.3 * torch.randn(2000, cols)
    stats = tg.MatrixStats(x.T @ x / 2000, torch.rand(rows) + 0.1)
    return torch.randn(rows, cols), stats


def plan_of(weights, stats):
    """The plan of one matrix."""
    (plan,) = tg.plan_rounding({"w": weights}, {"w": stats})
    return plan


def output_error(plan, weights, stats):
    q, scale = tg.round_matrices(plan, 0.1)
    error = q[0] * scale[0, :, None].float() - weights
    return (stats.slopes * ((error @ stats.moments) * error).sum(1)).sum().item()


def test_errors_make_up_for_each_other():
    """With correlated inputs, feeding errors back loses far less than the same steps without."""
    weights, stats = lesson()
    plan = plan_of(weights, stats)
    blind = replace(plan, feedback=0 * plan.feedback)
    assert output_error(plan, weights, stats) < 0.3 * output_error(blind, weights, stats)


def test_steps_follow_what_errors_cost():
    """Outputs that matter 16 times as much get a quarter of the step, idle inputs a long one."""
    torch.manual_seed(1)
    moments = torch.eye(64)
    moments[5, 5] = 0.001
    stats = tg.MatrixStats(moments, torch.tensor([16.0, 1.0, 1.0, 1.0]))
    q, scale = tg.round_matrices(plan_of(torch.randn(4, 64), stats), 0.1)
    assert 3 < scale[0, 1] / scale[0, 0] < 5
    assert q[0, :, 5].any() and not (q[0, :, 5] % 2).any()
    assert (q[0, :, 6] % 2).any()


def test_integers_are_of_8_bits_however_fine_the_steps():
    """Also where errors fed back would push a weight beyond."""
    weights, stats = lesson()
    brim = weights.sign() * (127 - 0.4 * torch.rand_like(weights)) / 128
    q, scale = tg.round_matrices(plan_of(brim, stats), 2.0**-60)
    assert (scale == 1 / 128).all()
    assert q.abs().max() == 127
    stats = tg.MatrixStats(torch.eye(64), torch.ones(48))
    q, scale = tg.round_matrices(plan_of(weights, stats), 2.0**-60)
    assert 106 <= q.abs().amax(2).min() <= q.abs().max() <= 127  # within a quarter of an octave
    error = q[0] * scale[0, :, None].float() - weights
    assert (error.abs().amax(1) < 0.6 * weights.abs().amax(1) / 127).all()


def test_dead_and_silent_matrices_round_to_something_finite():
    dead = tg.MatrixStats(torch.zeros(8, 8), torch.ones(6))
    silent = tg.MatrixStats(torch.eye(8), torch.zeros(6))
    for stats in (dead, silent):
        for weights in (torch.randn(6, 8), torch.zeros(6, 8)):
            for unit in (0.0, 2.0**-60, 1.0, 2.0**60):
                q, scale = tg.round_matrices(plan_of(weights, stats), unit)
                assert q.isfinite().all() and q.abs().max() <= 127
                assert scale.isfinite().all() and (scale > 0).all()


# -- the search for a size ---------------------------------------------------------------------

FINEST, COARSEST = 90_000, 4_000  # bytes, where int8 ends and where nothing but zeros is left


def size_of(log_unit):
    """100,000 weights: a bit more for each octave of finer steps, bent and flat at both ends."""
    bits = 3.5 - 3.7 * math.tanh((log_unit + 7) / 4)
    return int(min(FINEST, max(COARSEST, 12_500 * bits)))


@pytest.mark.parametrize("guess", [-math.inf, -40.0, -8.0, -4.0, 3.0, 40.0, math.inf, math.nan])
@pytest.mark.parametrize("room", [4_000, 4_500, 20_000, 50_000, 89_000, 95_000, 10**9])
def test_the_search_spends_the_room_in_few_tries(room, guess):
    """Wherever it starts, and if there is more room than int8 can use."""
    tried = []

    def size_at(unit):
        tried.append(unit)
        assert len(tried) <= 22
        return size_of(unit)

    unit = tg.search_unit(size_at, room, guess, 12_500.0)
    assert 0.98 * min(room, FINEST) <= size_of(unit) <= room
    if -8 <= guess <= -4:  # as guesses are
        assert len(tried) <= 9


def test_the_search_finds_nothing_where_nothing_fits():
    assert tg.search_unit(size_of, COARSEST - 1, -4.0, 12_500.0) is None


def test_the_search_ends_where_every_unit_gives_one_size():
    assert tg.search_unit(lambda unit: 4_000, 9_000, -4.0, 12_500.0) is not None


# -- files -------------------------------------------------------------------------------------


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


def test_the_layout_is_the_published_one(model):
    content = opened(fitted(model, 25_000))
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
    parameters = dict(model.named_parameters())
    matrices = {name for name in parameters if name.endswith(".weight")}
    for part in ("quantized", "scales", "qmeta", "dtypes"):
        assert content[part].keys() == matrices
    for name, dtype in content["dtypes"].items():
        assert dtype == str(parameters[name].dtype).removeprefix("torch.")
    for part in ("passthrough", "passthrough_orig_dtypes"):
        assert content[part].keys() == parameters.keys() - matrices
    assert set(content["passthrough_orig_dtypes"].values()) == {"float32"}
    assert {tensor.dtype for tensor in content["passthrough"].values()} == {torch.float16}


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


def test_the_records_quantiser_gives_the_published_artifact():
    """Quantising the weights of the published artifact again gives its very types, shapes, numbers and bytes."""
    blob = (CONFORMANCE / "final_model.int8.ptz").read_bytes()
    published = torch.load(io.BytesIO(zlib.decompress(blob)), weights_only=True)
    ours = record_content(tg.dequantize(published))
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
    back = tg.dequantize(content)
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
    assert tg.dequantize(content)["v"].tolist() == [1.0, -1.5]


def test_export_writes_both_files_and_their_sizes(rt, tmp_path, capsys):
    model = tiny_model(tiny_config(out_dir=str(tmp_path)), rt)
    path = tg.export(model, tg.RunLog())
    lines = capsys.readouterr().out.splitlines()
    raw = (tmp_path / "final_model.pt").stat().st_size
    packed = path.stat().st_size
    assert path.name == "final_model.int8.ptz"
    assert lines[:3] == [
        f"Serialized model: {raw} bytes",
        f"Code size: {CODE} bytes",
        f"Total submission size: {raw + CODE} bytes",
    ]
    assert lines[3].startswith(f"Serialized model int8+zlib: {packed} bytes (payload:")
    assert lines[4] == f"Total submission size int8+zlib: {packed + CODE} bytes"
    saved = torch.load(tmp_path / "final_model.pt", weights_only=True)
    assert_equal_states(saved, dict(model.state_dict()))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_loaded_from_whatever_holds_its_weights(rt, folder, tied):
    """An artifact, a state dict, a compiled model's, a checkpoint: the shape is the file's."""
    cfg = tiny_config(data_path=str(folder), out_dir=str(folder), tie_embeddings=tied, mlp_mult=3)
    model = tiny_model(cfg, rt)
    log = tg.RunLog()
    log.run_id = "run"
    shards = tg.open_shards(cfg.data_path, "train")
    trainer = tg.Trainer(model, tg.TokenStream(shards), rt, log, {})
    trainer.train_step()
    (folder / "checkpoints").mkdir()
    trainer.save()
    artifact = tg.export(model, log)
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(compiled, folder / "compiled.pt")
    paths = [artifact, *tg.find_checkpoints(cfg, "run")]
    paths += [folder / "final_model.pt", folder / "compiled.pt"]
    assert len(paths) == 4
    other = tg.Config(dtype="float32", ttt_lora_rank=5)
    for path in paths:
        loaded = tg.load_model(str(path), other)
        assert_equal_states(dict(loaded.state_dict()), dict(model.state_dict()))
        for name in ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads"):
            assert getattr(loaded.cfg, name) == getattr(cfg, name)
        assert (loaded.cfg.mlp_mult, loaded.cfg.tie_embeddings) == (3, tied)
        assert loaded.cfg.ttt_lora_rank == 5
        ids = torch.arange(16)[None]
        assert torch.equal(loaded(ids), model(ids))


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


@pytest.mark.parametrize(
    ("name", "tensor", "found"),
    [
        ("blocks.1.attn.c_v.weight", torch.ones(3, 3), r"found \(3, 3\), expected \(16, 32\)"),
        ("surprise", torch.ones(1), r"found \(1,\), expected no such tensor"),
        ("skip_weights", None, "found no such tensor"),
        ("tok_emb.weight", torch.ones(2), "expected the weights of this model"),
    ],
)
def test_weights_that_do_not_fit_are_named(model, tmp_path, name, tensor, found):
    state = dict(model.state_dict()) | {name: tensor}
    if tensor is None:
        del state[name]
    path = tmp_path / "file.pt"
    torch.save(state, path)
    with pytest.raises(tg.UserError, match=found) as refused:
        tg.load_model(path, model.cfg)
    assert str(path) in str(refused.value)
    if name != "tok_emb.weight":
        assert name in str(refused.value)
