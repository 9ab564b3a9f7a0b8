"""benchmarks/gpu.py at tiny shapes: it measures what it promises, and no failure stops it."""

import json
import sys

import gpu
import pytest


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """A function that runs it with some options. Returns (exit status, content of its file)."""

    def run(*options):
        out = tmp_path / "gpu.json"
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--out", str(out), *options])
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # it would stay set
        return gpu.main(), json.loads(out.read_text())

    return run


def test_everything_is_measured(measure):
    status, found = measure()
    done = dict.fromkeys(gpu.SECTIONS, "done")
    assert (status, found["status"]) == (0, done | {"record": "skipped"})
    rates, conformance, train, evaluation, program, _ = found["sections"].values()
    assert rates["copy"]["TB/s"] > 0
    assert conformance["artifact"]["audits passed"] == 5
    assert conformance["ttt twice, deterministic"]["most nats"] == 0
    assert len(train["flash"]["kernels"]) == 10
    assert train["flash"]["tokens/s"] > 100
    for name in ("eager, ttt", "eager, stream", "all, stream", "blocks, ttt"):
        part = evaluation[f"{name}, 4 at a time"]
        assert abs(part["off"]) < 1e-6 and part["new graphs"] == 0
        assert part["launches a turn"] > 100
    assert program["section"]["exit status"] == 0 < program["seconds"]["scoring"]


def test_a_failure_is_reported_and_the_others_go_on(measure, monkeypatch):
    monkeypatch.setattr(gpu, "measure_copy", lambda lab: 1 / 0)
    status, found = measure("--only", "rates", "train")
    assert (status, found["status"]) == (1, {"rates": "failed", "train": "done"})
    rates = found["sections"]["rates"]
    assert "ZeroDivisionError" in rates["copy"]["failed"] and rates["launch"]["microseconds"] > 0
