"""The runtime: explicit placement, atomic files, logs, dtype, collectives, a missing device."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_forked, run_script, tiny_config

import train_gpt as tg


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_gpt; "
    code += "assert not train_gpt.dist.is_initialized()"
    command = [sys.executable, "-c", code]
    env = os.environ | {"ITERATIONS": "nonsense", "RANK": "5", "WORLD_SIZE": "no"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


def test_every_tensor_names_its_device(tmp_path, monkeypatch, run_here):
    """With meta as the default device, a tensor made without one has no data and breaks its user."""
    brief = {"ITERATIONS": "2", "MAX_VAL_DOCS": "3", "GRAD_CLIP_NORM": "1", "RESUME": "auto"}
    artifact = str(tmp_path / "final_model.int8.ptz")
    # Progress bars ask the device, too.
    monkeypatch.setattr(tg.sys.stderr, "isatty", lambda: True, raising=False)
    torch.set_default_device("meta")
    try:
        for more in ({}, {"EVAL_ONLY": "1", "MODEL_PATH": artifact}):
            done = run_here(tmp_path, **brief | more)
            assert done.status == 0, done.err
    finally:
        torch.set_default_device(None)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """Whoever holds the old file, by another name or open, keeps it; nothing else stays."""
    path = tmp_path / "file"
    other = tmp_path / "other"
    tg.write_atomically(path, b"first")
    other.hardlink_to(path)
    with path.open("rb") as reader:
        tg.write_atomically(path, b"second")
        assert path.read_bytes() == b"second"
        assert other.read_bytes() == reader.read() == b"first"

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tg.os, "fsync", full_disk)
    with pytest.raises(OSError, match=f"{path}: No space left"):
        tg.write_atomically(path, b"third")
    assert path.read_bytes() == b"second" and {*tmp_path.iterdir()} == {path, other}


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
    assert tg.choose_dtype(tiny_config()) is expected
    assert tg.choose_dtype(tiny_config(dtype="float32")) is torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_gpu_is_refused_in_one_line(tmp_path):
    done = run_forked(tmp_path, DEVICE="cuda")
    assert done.returncode == 1 and done.stdout == ""
    expected = "error: DEVICE=cuda: 1 ranks on this machine, found 0 GPUs that PyTorch can use; "
    assert done.stderr.splitlines() == [f"{expected}start fewer ranks, or set DEVICE=cpu"]


def test_an_unwritable_out_dir_is_refused(tmp_path):
    (tmp_path / "file").touch()
    done = run_forked(tmp_path, 2, OUT_DIR=str(tmp_path / "file/inner"))
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(
        f"error: rank 0: OUT_DIR={tmp_path}/file/inner: .*Not a directory.*\n", done.stderr
    )


def test_a_compiler_cache_that_cannot_be_made_stops_nothing(tmp_path):
    done = run_script(tmp_path, TORCHINDUCTOR_CACHE_DIR="/proc/nowhere", EVAL="flat", COMPILE="1")
    assert done.returncode == 0, done.stderr
    assert "\ncompile:" in done.stdout


def test_neither_memory_nor_a_lost_rank_is_blamed_for_another_error():
    for error in (ConnectionError("cannot join (gloo/transport)"), RuntimeError("allocated twice")):
        assert str(error) in tg.explain_error(error)


# What two ranks compute together, in place of a run.
PROBE = """
import pytest, torch
def probe(cfg, rt, log):
    mine = rt.rank + 1.0
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert rt.gather(rt.rank) == [0, 1]
    assert rt.sum(torch.tensor([mine])).item() == 3
    assert rt.maximum(mine, -mine) == [2, -1]
    assert rt.from_rank0(lambda: rt.rank + 7) == 7
    means = [torch.full((2,), mine), torch.full((3, 1), 2 * mine, dtype=torch.bfloat16)]
    rt.average(means)
    assert means[0].tolist() == [1.5, 1.5] and means[1].tolist() == [[3.0]] * 3
    assert means[1].dtype == torch.bfloat16
    with pytest.raises(tg.UserError, match="^rank 1: no file$"):
        rt.together(lambda: tg.require(rt.rank == 0, "no file"))
    with pytest.raises(tg.UserError, match="^no file$"):
        rt.together(lambda: tg.require(False, "no file"))
    with pytest.raises(tg.UserError, match="^rank 0: no room$"):
        rt.from_rank0(lambda: tg.require(False, "no room"))
    log.line(f"rank {rt.rank} agrees")
tg.run = probe
"""


def test_two_ranks_compute_together(tmp_path):
    done = run_forked(tmp_path, 2, PROBE)
    assert done.returncode == 0, done.stderr
    assert "rank 0 agrees partial\n" in done.stdout
