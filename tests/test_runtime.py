"""The runtime: explicit placement, atomic files, logs, dtype, and what happens without the wished-for device."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import CONFORMANCE, ROOT, TINY_RUN, run_script, tiny_config

import train_gpt as tg


def test_importing_does_nothing(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import train_gpt as t; assert not t.dist.is_initialized()"
    command = [sys.executable, "-c", code, str(ROOT)]
    env = os.environ | {"ITERATIONS": "nonsense", "RANK": "5", "WORLD_SIZE": "no"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


def test_every_tensor_names_its_device(tmp_path, monkeypatch):
    """With meta as the default device, a tensor created without one has no data and breaks what touches it."""
    env = TINY_RUN | {
        "OUT_DIR": str(tmp_path),
        "ITERATIONS": "2",
        "MAX_VAL_DOCS": "3",
        "GRAD_CLIP_NORM": "1",
    }
    monkeypatch.setattr(
        tg.sys.stderr, "isatty", lambda: True, raising=False
    )  # progress bars ask the device, too
    torch.set_default_device("meta")
    try:
        cfg = tg.read_config(env)
        tg.run(cfg, tg.Runtime.create(cfg, {}))
        artifact = tmp_path / "final_model.int8.ptz"
        cfg = tg.read_config(
            env | {"EVAL_ONLY": "1", "MODEL_PATH": str(artifact), "OUT_DIR": str(tmp_path)}
        )
        tg.run(cfg, tg.Runtime.create(cfg, {}))
    finally:
        torch.set_default_device(None)


def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, rt):
    path = tmp_path / "file"
    rt.write(path, b"first")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tg.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        rt.write(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_and_never_written_into(tmp_path, rt):
    """Whoever holds the old file, by another name or open, keeps it whole: the new one is another file, renamed."""
    path, other = tmp_path / "file", tmp_path / "other"
    rt.write(path, b"first")
    other.hardlink_to(path)
    with path.open("rb") as reader:
        rt.write(path, b"second")
        assert (path.read_bytes(), other.read_bytes(), reader.read()) == (
            b"second",
            b"first",
            b"first",
        )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx2": True}, torch.float32),
    ],
)
def test_dtype_is_what_the_processor_can_do(monkeypatch, flags, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    dtype, why = tg.choose_dtype(tiny_config())
    assert dtype is expected and why
    assert tg.choose_dtype(tiny_config(dtype="float32")) == (torch.float32, "DTYPE")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_gpu_is_refused_in_one_line(tmp_path):
    done = run_script(tmp_path, DEVICE="cuda")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: DEVICE=cuda: 1 ranks on this machine, found 0 GPUs; start fewer ranks"
    ]


def test_log_file_holds_source_versions_and_everything_printed(tmp_path):
    done = run_script(tmp_path, **EVAL)
    log = (tmp_path / "logs" / "test.txt").read_text()
    assert done.returncode == 0, done.stderr
    assert log.startswith(tg.source_code())
    for part in (
        f"Running Python {sys.version}",
        f"Running PyTorch {torch.__version__}",
        "config: ",
        "SEED=1337",
    ):
        assert part in log
    assert log.endswith(done.stdout) and "\r" not in done.stdout + done.stderr


EVAL = {"EVAL_ONLY": "1", "MODEL_PATH": str(CONFORMANCE / "final_model.int8.ptz")}


def test_a_refusal_is_raised_as_one_line(rt):
    def refuse():
        raise tg.UserError("thing: found this, expected that")

    with pytest.raises(tg.AgreedError, match=r"^thing: found this, expected that$"):
        rt.together(refuse)
    assert rt.together(lambda: 5) == 5


def test_an_unwritable_out_dir_is_refused(tmp_path):
    (tmp_path / "file").touch()
    done = run_script(tmp_path, 2, OUT_DIR=str(tmp_path / "file"))
    assert done.returncode != 0 and done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (
        len(errors) == 1
        and "Not a directory" in errors[0]
        and 'train_gpt.py", line' not in done.stderr
    )


def test_average_of_one_rank_changes_nothing(rt):
    tensors = [torch.ones(2), torch.full((3,), 2.0, dtype=torch.bfloat16)]
    rt.average([tensors])  # of several, real ones: tests/test_training.py
    assert tensors[0].tolist() == [1, 1] and tensors[1].tolist() == [2, 2, 2]


@pytest.mark.parametrize("length", [1, 7, 256, 257, 600])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_equals_torch_s(length, kv_heads):
    """Values and gradients, below, at and beyond the block of 256 queries."""
    torch.manual_seed(0)
    shapes = (2, 4, length, 16), (2, kv_heads, length, 16), (2, kv_heads, length, 16)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.randn(shapes[0], dtype=torch.float64)
    ours = tg.causal_attention(*inputs)
    torchs = torch.nn.functional.scaled_dot_product_attention(
        *inputs, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(ours, torchs, atol=1e-10, rtol=1e-10)
    grads = [torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, torchs)]
    torch.testing.assert_close(*grads, atol=1e-10, rtol=1e-10)
