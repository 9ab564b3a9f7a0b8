"""The artifact: the published container, no byte too many, the least loss for its bytes."""

import io
import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from bench_tools import open_stream
from conftest import CONFORMANCE, tiny_config, tiny_model, write_shard
from rate_distortion import record_content

import train_gpt as tg

CODE = len(tg.source_code())


def published_loader(blob):
    """How a published artifact is read, written down from spec section 5, independently of the script."""
    content = torch.load(io.BytesIO(zlib.decompress(blob)), map_location="cpu", weights_only=True)
    assert content["__quant_format__"] == "int8_clean_per_row_v1"
    state = {}
    for name, q in content["quantized"].items():
        scale = content["scales"][name]
        assert (q.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float16, q.shape[:1])
        assert content["qmeta"][name] == {"scheme": "per_row", "axis": 0}
        values = q.numpy() * scale.numpy().astype(np.float32)[:, None]
        state[name] = torch.from_numpy(values).to(getattr(torch, content["dtypes"][name]))
    for name, tensor in content["passthrough"].items():
        original = content["passthrough_orig_dtypes"].get(name)
        state[name] = tensor.to(getattr(torch, original)) if original else tensor
    return state


@pytest.fixture
def model(rt, tmp_path):
    """A small model, and in its folder training tokens to calibrate on."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 96, 20_000) // rng.integers(1, 9, 20_000)
    write_shard(tmp_path / "fineweb_train_000000.bin", tokens)
    return tiny_model(tiny_config(data_path=str(tmp_path), out_dir=str(tmp_path)), rt)


def fitted(model, room):
    """An artifact of at most `room` bytes."""
    model.cfg = replace(model.cfg, artifact_budget=CODE + room)
    return tg.fit_artifact(model, dict(model.state_dict()), open_stream(model.cfg), tg.RunLog())


def opened(blob):
    """The content of an artifact."""
    return tg.load_torch(zlib.decompress(blob))


def assert_equal_states(found, expected):
    """Equal names, dtypes and values."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_budgets_are_kept_and_spent(model, tmp_path):
    """Never a byte more, nearly all of them, and the more there are the less is lost.

    The script and the published loader read the same weights from every artifact.
    """
    state = model.state_dict()
    exact = len(tg.pack(tg.quantize(state, {}, 0) | {"made_with": {}}))
    path = tmp_path / "a.ptz"
    errors = []
    for room in (exact // 8, exact // 5, exact // 4, exact - 1, exact):
        blob = fitted(model, room)
        assert len(blob) <= room
        if room < exact - 1:  # there int8 has no finer steps
            assert len(blob) > 0.98 * room
        back, _ = tg.parse_weights(blob, path)
        assert_equal_states(back, published_loader(blob))
        errors.append(sum((back[name] - state[name]).square().sum().item() for name in state))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1000 * errors[3] > errors[-1] == 0


def test_equal_weights_and_tokens_give_equal_bytes(model):
    once = fitted(model, 25_000)
    assert fitted(model, 25_000) == once


@pytest.mark.parametrize("room", [1 - CODE, 3000])
def test_a_budget_that_nothing_fits_is_refused_and_the_weights_are_kept(model, tmp_path, room):
    model.cfg = replace(model.cfg, artifact_budget=CODE + room)
    start = f"^ARTIFACT_BUDGET={CODE + room}: the script leaves {room} bytes, the smallest artifact"
    with pytest.raises(tg.UserError, match=f"{start}.*EVAL_ONLY=1"):
        tg.export(model, open_stream(model.cfg), tg.RunLog())
    saved = torch.load(tmp_path / "final_model.pt", weights_only=True)
    assert_equal_states(saved, dict(model.state_dict()))
    assert not list(tmp_path.glob("*.ptz"))


# -- calibration -------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_calibration_measures_every_matrix(rt, model, tied):
    """Against autograd's own record, on three rows that are evenly spaced over the shards.

    A tied matrix is measured as the head; a row of an untied embedding by the gradients that its
    uses send back.
    """
    model = tiny_model(replace(model.cfg, tie_embeddings=tied), rt)
    found = tg.measure_matrices(model, open_stream(model.cfg), 3, tg.RunLog(), 30)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    names = {p: name for name, p in model.named_parameters()}
    seen = {}

    def keep(module, args, output):
        output.retain_grad()
        seen[names[module.weight]] = (args[0].detach().flatten(0, 1), output)

    for module in model.float().modules():
        if hasattr(module, "weight"):
            module.register_forward_hook(keep)
    shard = tg.open_shards(model.cfg.data_path, "train")[0]
    tokens = torch.from_numpy(shard.astype(np.int64))
    rows = torch.stack([tokens[at : at + 31] for at in (0, 20_000 // 3, 40_000 // 3)])
    model(rows[:, :-1], rows[:, 1:]).sum().backward()
    assert found.keys() == seen.keys()
    for name, (moments, slopes) in found.items():
        inputs, output = seen[name]
        squares = output.grad.square().flatten(0, 1)
        if inputs.ndim == 1:
            used = torch.eye(96)[inputs]
            expected = torch.eye(32), used.T @ squares.mean(1) / 90
        else:
            expected = inputs.T @ inputs / 90, squares.mean(0)
        torch.testing.assert_close((moments, slopes), expected, atol=1e-7, rtol=1e-3)


def test_calibration_ends_with_the_time(rt, model, capsys):
    """At least one batch of rows is measured; averages are over those that were."""
    model = tiny_model(replace(model.cfg, tie_embeddings=False), rt)
    stream = open_stream(model.cfg)
    stream.deadline = 0.0
    stats = tg.measure_matrices(model, stream, 24, tg.RunLog(), 30)
    assert "quantizer statistics: rows:8 of:24 before_time_limit:-" in capsys.readouterr().out
    assert torch.allclose(stats["tok_emb.weight"].moments, torch.eye(32))


# -- rounding ----------------------------------------------------------------------------------


def lesson():
    """(weights (48, 160), statistics of inputs that depend on each other) of a matrix."""
    torch.manual_seed(0)
    x = torch.randn(2000, 12) @ torch.randn(12, 160) + 0.3 * torch.randn(2000, 160)
    return torch.randn(48, 160), tg.MatrixStats(x.T @ x / 2000, torch.rand(48) + 0.1)


def test_errors_make_up_for_each_other():
    """With correlated inputs, feeding errors back loses far less than the same steps without."""
    weights, stats = lesson()
    plan = tg.plan_rounding(weights, stats)
    losses = []
    for feedback in (plan.feedback, 0 * plan.feedback):
        q, scale = tg.round_matrix(replace(plan, feedback=feedback), 0.1)
        error = q * scale[:, None].float() - weights
        losses.append(stats.slopes @ ((error @ stats.moments) * error).sum(1))
    assert losses[0] < 0.05 * losses[1]


def test_steps_follow_what_errors_cost():
    """Outputs that matter 16 times as much get a quarter of the step, idle inputs a long one."""
    torch.manual_seed(1)
    moments = torch.eye(64)
    moments[5, 5] = 0.001
    stats = tg.MatrixStats(moments, torch.tensor([16.0, 1.0, 1.0, 1.0]))
    q, scale = tg.round_matrix(tg.plan_rounding(torch.randn(4, 64), stats), 0.1)
    assert 3 < scale[1] / scale[0] < 5
    assert q[:, 5].any() and not (q[:, 5] % 2).any()
    assert (q[:, 6] % 2).any()


def test_integers_are_of_8_bits_however_fine_the_steps():
    """Also where errors fed back would push a weight beyond. Scales are of a quarter of an octave."""
    weights, stats = lesson()
    brim = weights.sign() * (127 - 0.4 * torch.rand_like(weights)) * 2**-7.25
    q, scale = tg.round_matrix(tg.plan_rounding(brim, stats), 2.0**-60)
    assert (scale == torch.tensor(2**-7.25).half()).all()
    assert q.abs().max() == 127


@pytest.mark.parametrize(("size", "unit"), [(0, 1.0), (1, 2.0**-60), (1, 2.0**60)])
def test_dead_and_silent_matrices_round_to_something_finite(size, unit):
    dead = tg.MatrixStats(torch.zeros(8, 8), torch.ones(6))
    silent = tg.MatrixStats(torch.eye(8), torch.zeros(6))
    for stats in (dead, silent):
        q, scale = tg.round_matrix(tg.plan_rounding(size * torch.randn(6, 8), stats), unit)
        assert q.abs().max() <= 127
        assert 0 < scale.min() <= scale.max() < torch.inf


# -- the search for a size ---------------------------------------------------------------------

FINEST, COARSEST = 90_000, 4_000  # bytes, where int8 ends and where nothing but zeros is left


def blob_at(log_unit, shift=0.0):
    """Of 100,000 weights: a bit more for each octave of finer steps, bent and flat at both ends."""
    bits = 3.5 - 3.7 * math.tanh((log_unit - shift + 7) / 4)
    return bytes(int(min(FINEST, max(COARSEST, 12_500 * bits))))


@pytest.mark.parametrize("shift", [-20.0, -4.0, 0.0, 4.0, 20.0])
@pytest.mark.parametrize("room", [4_000, 20_000, 89_000, 10**9])
def test_the_search_spends_the_room_in_few_tries(room, shift):
    """Wherever the right unit is, and if there is more room than int8 can use."""
    tried = []

    def artifact_at(unit):
        tried.append(unit)
        return blob_at(unit, shift)

    blob = tg.search_artifact(artifact_at, room, 12_500.0)
    assert 0.98 * min(room, FINEST) <= len(blob) <= room
    assert len(tried) <= (11 if abs(shift) <= 4 and room < 89_000 else 24)


def test_the_search_ends_where_nothing_fits_or_every_unit_gives_one_size():
    assert len(tg.search_artifact(blob_at, COARSEST - 1, 12_500.0)) == COARSEST
    assert len(tg.search_artifact(lambda unit: bytes(4_000), 9_000, 12_500.0)) == 4_000


# -- files -------------------------------------------------------------------------------------


def test_pack_makes_zlib_streams_close_to_the_entropy_of_rounded_weights():
    """There zlib's default, which looks for repeats, takes a tenth more."""
    torch.manual_seed(0)
    q = (2 * torch.randn(300, 512)).round().char()
    blob = tg.pack({"q": q})
    assert torch.equal(opened(blob)["q"], q)
    counts = q.unique(return_counts=True)[1] / q.numel()
    entropy = -(counts * counts.log2()).sum() * q.numel() / 8
    assert len(blob) < 1.05 * entropy + 700


def test_the_layout_is_the_published_one(rt, model):
    """Of a fresh model, too: nothing before its output projections, which are zero, has a gradient."""
    published = opened((CONFORMANCE / "final_model.int8.ptz").read_bytes())
    untied = replace(model.cfg, tie_embeddings=False)
    for each in (model, tg.build_model(untied, rt.dtype)):
        content = opened(fitted(each, 25_000))
        assert list(content) == [*published, "made_with"]
        matrices = {}
        others = set()
        for name, p in each.named_parameters():
            if name.endswith(".weight"):
                matrices[name] = str(p.dtype).removeprefix("torch.")
            else:
                others.add(name)
        assert content["dtypes"] == matrices
        assert content["quantized"].keys() == matrices.keys()
        assert content["passthrough"].keys() == others
        assert {tensor.dtype for tensor in content["passthrough"].values()} == {torch.float32}


def test_the_records_quantiser_gives_the_published_artifact():
    """Quantising the weights of the published artifact again gives its very types, shapes, numbers and bytes."""
    published = opened((CONFORMANCE / "final_model.int8.ptz").read_bytes())
    ours = record_content(tg.dequantize(published))
    for part in ("dtypes", "qmeta", "passthrough_orig_dtypes", "__quant_format__"):
        assert ours[part] == published[part]
    for part in ("quantized", "scales", "passthrough"):
        assert_equal_states(ours[part], published[part])


def test_a_scalar_scale_is_read():
    """The published writer gives large tensors that are not matrices one fp32 scale."""
    content = tg.quantize({}, {}, 0)
    content["quantized"]["v"] = torch.tensor([2, -3], dtype=torch.int8)
    content["scales"]["v"] = torch.tensor(0.5)
    content["dtypes"]["v"] = "float32"
    assert tg.dequantize(content)["v"].tolist() == [1.0, -1.5]


def test_export_writes_both_files_and_their_sizes(model, tmp_path, capsys):
    log = tg.RunLog()
    tg.export(model, open_stream(model.cfg), log)
    packed = log.artifact.stat().st_size
    raw = (tmp_path / "final_model.pt").stat().st_size
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"Serialized model: {raw} bytes\n"
        f"Code size: {CODE} bytes\n"
        f"Total submission size: {raw + CODE} bytes\n"
        f"Serialized model int8+zlib: {packed} bytes (payload:"
    )
    assert printed.endswith(f"\nTotal submission size int8+zlib: {packed + CODE} bytes\n")


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_loaded_from_whatever_holds_its_weights(rt, model, tmp_path, tied):
    """An artifact, a state dict, a compiled model's, a checkpoint: the shape is the file's."""
    cfg = replace(model.cfg, tie_embeddings=tied, mlp_mult=3)
    model = tiny_model(cfg, rt)
    log = tg.RunLog()
    tg.export(model, open_stream(model.cfg), log)
    artifact = log.artifact
    state = model.state_dict()
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    torch.save(compiled, tmp_path / "compiled.pt")
    torch.save({"model": state, "step": 3}, tmp_path / "checkpoint.pt")
    paths = [artifact, *tmp_path.glob("*.pt")]
    assert len(paths) == 4
    others = replace(
        cfg,
        vocab_size=4,
        num_layers=1,
        model_dim=64,
        num_heads=8,
        num_kv_heads=8,
        mlp_mult=1,
        tie_embeddings=not tied,
    )
    for path in paths:
        loaded = tg.load_model(path, others)
        assert loaded.cfg == cfg
        assert_equal_states(loaded.state_dict(), state)


@pytest.mark.parametrize(
    ("name", "shape", "found"),
    [
        ("blocks.1.attn.c_v.weight", (3, 3), r"size mismatch .*c_v.*\[3, 3\].*\[16, 32\]"),
        ("surprise", (1,), "Unexpected key.*surprise"),
        ("tok_emb.weight", (2,), "expected the weights of this model"),
    ],
)
def test_weights_that_do_not_fit_are_named(model, tmp_path, name, shape, found):
    path = tmp_path / "file.pt"
    torch.save(model.state_dict() | {name: torch.ones(shape)}, path)
    with pytest.raises(tg.UserError, match=f"^{path}: .*{found}"):
        tg.load_model(path, model.cfg)
