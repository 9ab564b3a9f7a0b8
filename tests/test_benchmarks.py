"""The benchmarks run, and say no where a promise is broken."""

import sys

import invariance
import numpy as np
import pytest
from conftest import CONFORMANCE, CPU, tiny_table

import train_gpt as tg


def test_shuffled_documents_are_the_same_documents(tmp_path):
    streams = []
    for shuffled in (False, True):
        invariance.write_documents(CONFORMANCE, tmp_path / str(shuffled), 9, shuffled)
        streams.append(tg.open_shard(tmp_path / str(shuffled) / "fineweb_val_000000.bin"))
    texts = [[part.tolist() for part in np.split(s, np.flatnonzero(s == 1))[1:]] for s in streams]
    assert texts[0] != texts[1] and sorted(texts[0]) == sorted(texts[1]) and len(texts[0]) == 10
    docs = [tg.split_documents(s, 1, 0, tiny_table(1024), CPU) for s in streams]
    assert docs[0].predictions.tolist() != docs[1].predictions.tolist()
    assert sorted(docs[0].predictions) == sorted(docs[1].predictions)


@pytest.mark.parametrize(("promised", "status"), [(1e-6, 0), (-1.0, 1)])
def test_invariance_prints_spreads_and_judges_them(monkeypatch, capsys, promised, status):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs = dict(list(invariance.RUNS.items())[3:5] if status == 0 else list(invariance.RUNS.items())[3:4])
    monkeypatch.setattr(invariance, "RUNS", runs)
    monkeypatch.setattr(invariance, "PROMISED", {"float32": promised})
    artifact = str(CONFORMANCE / "final_model.int8.ptz")
    arguments = ["--artifact", artifact, "--data", str(CONFORMANCE), "--docs", "4"]
    monkeypatch.setattr(sys, "argv", ["invariance.py", *arguments])
    assert invariance.main() == status
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip("| ") for row in table] == [*runs, "**spread**"]
    assert all(2 < float(row[2]) < 3 for row in table[:-1])
