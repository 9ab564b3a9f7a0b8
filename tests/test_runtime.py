"""The runtime: explicit placement, atomic files, logs, dtype, and what happens without the wished-for device."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import CONFORMANCE, CPU, ROOT, TINY_RUN, run_script, tiny_config

import train_gpt as tg


def test_importing_does_nothing(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import train_gpt as t; assert not t.dist.is_initialized()"
    command = [sys.executable, "-c", code, str(ROOT)]
    env = os.environ | {"ITERATIONS": "nonsense", "RANK": "5", "WORLD_SIZE": "no"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


def test_every_tensor_names_its_device(tmp_path, monkeypatch):
    """With meta as the default device, a tensor created without one has no data and breaks what touches it."""
    env = TINY_RUN | {"OUT_DIR": str(tmp_path), "ITERATIONS": "2", "MAX_VAL_DOCS": "3", "GRAD_CLIP_NORM": "1"}
    monkeypatch.setattr(tg.sys.stderr, "isatty", lambda: True, raising=False)  # progress bars ask the device, too
    torch.set_default_device("meta")
    try:
        cfg = tg.read_config(env)
        tg.run(cfg, tg.Runtime.create(cfg, {}))
        artifact = tmp_path / "final_model.int8.ptz"
        cfg = tg.read_config(env | {"EVAL_ONLY": "1", "MODEL_PATH": str(artifact), "OUT_DIR": str(tmp_path)})
        tg.run(cfg, tg.Runtime.create(cfg, {}))
    finally:
        torch.set_default_device(None)


def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    tg.write_atomically(path, b"first")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tg.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tg.write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)],
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
    assert done.stderr.splitlines() == ["error: DEVICE=cuda: rank 0 needs GPU 0, found 0; start fewer or use cpu"]


def test_log_file_holds_source_versions_and_everything_printed(tmp_path):
    done = run_script(tmp_path, **EVAL)
    log = (tmp_path / "logs" / "test.txt").read_text()
    assert done.returncode == 0, done.stderr
    assert log.startswith(tg.source_code())
    for part in (f"Running Python {sys.version}", f"Running PyTorch {torch.__version__}", "config: ", "SEED=1337"):
        assert part in log
    assert log.endswith(done.stdout) and "\r" not in done.stdout + done.stderr


EVAL = {"EVAL_ONLY": "1", "MODEL_PATH": str(CONFORMANCE / "final_model.int8.ptz")}


def test_a_refusal_ends_the_log(tmp_path, capsys):
    rt = tg.Runtime(CPU, torch.float32, log_path=tmp_path / "log.txt")

    def refuse():
        raise tg.UserError("thing: found this, expected that")

    with pytest.raises(SystemExit) as stopped:
        rt.together(refuse)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: thing: found this, expected that\n"
    assert (tmp_path / "log.txt").read_text() == "error: thing: found this, expected that\n"
