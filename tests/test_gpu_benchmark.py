"""benchmarks/gpu.py at tiny shapes: it measures all that it promises, and no failure stops it."""

import json
import sys
from dataclasses import replace

import gpu
import pytest
import torch


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """A function that runs it with some options. Returns (exit status, content of its file)."""

    def run(*options):
        out = tmp_path / "gpu.json"
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--out", str(out), *options])
        monkeypatch.setenv(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # as it would for the whole process
        return gpu.main(), json.loads(out.read_text())

    return run


def test_everything_is_measured(measure):
    status, found = measure()
    done = dict.fromkeys(gpu.SECTIONS, "done")
    assert (status, found["status"]) == (0, done | {"record": "skipped"})
    rates, conformance, train, evaluation, program, _ = found["sections"].values()
    assert min(rates["copy"]["TB/s"], rates["bf16 matmul"]["TFLOP/s"]) > 0
    assert conformance["artifact"]["audits passed"] == 5
    assert abs(conformance["doc"]["bpb off"]) < 0.2  # of two documents
    assert max(part["most nats"] for name, part in conformance.items() if "twice" in name) == 0
    assert len(train["flash"]["kernels"]) == 10
    assert 0 < train["flash"]["of matmul"] < 1 < train["flash"]["ms a step"]
    for condition in ("stream", "ttt"):
        eager, varied = (evaluation[f"{how}, {condition}, 4 at a time"] for how in ("eager", "all"))
        assert eager.keys() == varied.keys() and abs(varied["off"]) < 1e-6 < eager["bpb"]
        assert min(eager["launches a turn"], varied["launches a turn"]) > 100
        assert varied["graphs compiled meanwhile"] == 0
    assert program["section"]["exit status"] == 0 and program["seconds"]["scoring"] > 0
    assert {"flat", "doc", "stride", "ttt", "stream"} < program.keys()


def test_a_failure_is_reported_and_the_others_go_on(measure, monkeypatch):
    monkeypatch.setattr(gpu, "measure_copy", lambda lab: 1 / 0)
    status, found = measure("--only", "rates", "train")
    assert (status, found["status"]) == (1, {"rates": "failed", "train": "done"})
    rates = found["sections"]["rates"]
    assert "ZeroDivisionError" in rates["copy"]["failed"] and rates["launch"]["microseconds"] > 0
    monkeypatch.setitem(gpu.SCALES, "tiny", replace(gpu.SCALES["tiny"], seconds=-1.0))
    status, found = measure("--only", "train")
    assert found["sections"]["train"]["section"]["skipped"] == "no time left"
    assert status == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cpu_is_refused_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 1
    assert capsys.readouterr().err.count("\n") == 1
