"""The script as its users run it: real processes, real ranks, real files."""

import csv
import dataclasses
import fcntl
import math
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from hashlib import sha256

import numpy as np
import pytest
import torch
from conftest import (
    CONFORMANCE,
    EVAL_ARTIFACT,
    ROOT,
    TINY_RUN,
    run_script,
    script_behind,
    write_shard,
)

import train_gpt as tg


def final(done, name="final_int8_ttt_lora"):
    """val_bpb of the line called `name`."""
    assert done.returncode == 0, done.stdout + done.stderr
    return float(re.search(rf"^{name} val_loss:[\d.]+ val_bpb:([\d.]+)", done.stdout, re.M)[1])


def losses(done):
    return [float(value) for value in re.findall(r"train_loss:([\d.]+)", done.stdout)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same tiny training by plain python, and by torchrun with one and two ranks."""
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (0, 1, 2)}
    settings = {
        "MAX_VAL_DOCS": None,
        "ITERATIONS": "6",
        "DTYPE": "float32",
    }  # exact enough to compare trainings
    settings |= {"EVAL": "flat,doc,stride,ttt", "SCORES_PATH": "scores.csv"}
    return {
        ranks: (run_script(folder, ranks, **settings), folder) for ranks, folder in folders.items()
    }


LINES = [
    r"step:1/6 train_loss:\d\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
    r"step:6/6 val_loss:\d\.\d{4} val_bpb:\d\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
    r"Serialized model: \d+ bytes",
    r"Code size: \d+ bytes",
    r"Total submission size: \d+ bytes",
    r"Serialized model int8\+zlib: \d+ bytes \(payload:\d+ raw_torch:\d+ payload_ratio:\d\.\d\dx\)",
    r"Total submission size int8\+zlib: \d+ bytes",
    r"final_int8_zlib_roundtrip val_loss:\d\.\d{4} val_bpb:\d\.\d{4} eval_time:\d+ms",
    r"final_int8_zlib_roundtrip_exact val_loss:\d\.\d{8} val_bpb:\d\.\d{8}",
    r"final_int8_ttt_lora val_loss:\d\.\d{4} val_bpb:\d\.\d{4} eval_time:\d+ms",
]


@pytest.mark.parametrize("ranks", [0, 1, 2])
def test_lines_that_tools_read(runs, ranks):
    done, folder = runs[ranks]
    assert done.returncode == 0, done.stderr
    for line in LINES:
        assert len(re.findall(rf"^{line}$", done.stdout, re.M)) == 1, line
    assert "partial" not in done.stdout
    assert "val_documents:30 predictions:13688 documents_of_one_token:0" in done.stdout.splitlines()
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "checkpoints/test.step000000006.pt",
        "final_model.int8.ptz",
        "final_model.pt",
        "logs/test.txt",
        "scores.csv",
    ]


@pytest.mark.parametrize("ranks", [0, 2])
def test_ladder_and_its_audits(runs, ranks):
    """One line for each rung, each with its audits; deltas against the first; sizes and hashes of what was used."""
    done, folder = runs[ranks]
    rungs = [
        dict(re.findall(r"(\w+):(\S+)", line))
        for line in re.findall(r"^ladder .*$", done.stdout, re.M)
    ]
    assert [rung["condition"] for rung in rungs] == ["flat", "doc", "stride", "ttt"]
    for rung in rungs:
        assert re.fullmatch(
            r"\d\.\d{6} \d\.\d{6} [+-]\d\.\d{4} \d+ \d+ms",
            " ".join(
                rung[key] for key in ("val_loss", "val_bpb", "delta_bpb", "docs", "eval_time")
            ),
        )
        assert float(rung["delta_bpb"]) == pytest.approx(
            float(rung["val_bpb"]) - float(rungs[0]["val_bpb"]), abs=6e-5
        )
        flat = rung["condition"] == "flat"
        assert (rung["docs"], rung["tokens"]) == ("30", "13568" if flat else "13688")
        left_out = (
            f"before_first_bos:0 after_last_row:{120 if flat else 0} beyond_max_val_docs:0 PASS"
        )
        coverage = (
            f"condition:{rung['condition']} targets:13688 scored_once:{rung['tokens']} {left_out}"
        )
        assert f"audit coverage: {coverage}" in done.stdout.splitlines()
    assert (
        "audit bytes: documents:30 of:30 table_bytes:33165 text_bytes:33165 PASS"
        in done.stdout.splitlines()
    )
    # Chunks of 64 in windows of 128: four chunks cut in the third, two chunks cut in the first.
    assert re.findall(r"^audit causality: .*(?= time:\d+ms PASS$)", done.stdout, re.M) == [
        f"audit causality: condition:ttt documents:3 compared:{64 + 64 + 32 + 32}"
    ]
    digest = {
        name: sha256(path.read_bytes()).hexdigest()
        for name, path in [
            ("script", ROOT / "train_gpt.py"),
            ("tokenizer", CONFORMANCE / "tokenizer.model"),
            ("val", CONFORMANCE / "fineweb_val_000000.bin"),
            ("artifact", folder / "final_model.int8.ptz"),
        ]
    }
    assert dict(re.findall(r"^sha256 (\w+):(\w{64})", done.stdout, re.M)) == digest
    size = (folder / "final_model.int8.ptz").stat().st_size + (ROOT / "train_gpt.py").stat().st_size
    assert (
        f"submission_size:{size} budget:16000000 headroom:{16000000 - size} PASS"
        in done.stdout.splitlines()
    )


def test_the_log_says_how_to_do_it_again(runs):
    log = (runs[2][1] / "logs" / "test.txt").read_text()
    command = re.search(r"^command: (.*)$", log, re.M)[1]
    assert (
        command.endswith(" torchrun --standalone --nproc_per_node=2 train_gpt.py")
        and " ITERATIONS=6 " in command
    )
    given = [
        f.name.upper() for f in dataclasses.fields(tg.Config) if f"{f.name.upper()}=" in command
    ]
    assert {"DATA_PATH", "RUN_ID", "EVAL"} <= set(given) and "ROPE_BASE" not in given
    settings = dict(
        word.split("=", 1) for word in shlex.split(re.search(r"^config: (.*)$", log, re.M)[1])
    )
    read_back = dataclasses.asdict(tg.read_config(settings | {"WORLD_SIZE": "2"}))
    assert list(settings) == [name.upper() for name in read_back]
    assert {name: tg.spell(value) for name, value in read_back.items()} == {
        k.lower(): v for k, v in settings.items()
    }
    assert re.search(r"^started:\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$", log, re.M)
    assert f"torch:{torch.__version__} numpy:{np.__version__} sentencepiece:" in log


@pytest.mark.parametrize("ranks", [0, 2])
def test_scores_file_adds_up_to_the_printed_totals(runs, ranks):
    done, folder = runs[ranks]
    path = folder / "scores.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for line in re.findall(r"^ladder .*$", done.stdout, re.M):
        rung = dict(re.findall(r"(\w+):(\S+)", line))
        mine = [row for row in rows if row["condition"] == rung["condition"]]
        tokens, size = (sum(int(row[key]) for row in mine) for key in ("tokens", "bytes"))
        nats = math.fsum(float(row["loss_nats"]) for row in mine)
        assert (str(tokens), str(size)) == (rung["tokens"], rung["bytes"])
        assert (f"{nats / tokens:.6f}", f"{nats / math.log(2) / size:.6f}") == (
            rung["val_loss"],
            rung["val_bpb"],
        )
    assert (
        f"scores:{path} rows:{len(rows)} sha256:{sha256(path.read_bytes()).hexdigest()}"
        in done.stdout.splitlines()
    )


@pytest.mark.parametrize("names", ["flat", "stride,doc", "ttt"])
def test_a_rung_evaluated_again_is_the_same_to_the_last_digit(runs, tmp_path, names):
    """Without its training, and without its neighbours; deltas refer to the first rung that is there."""
    done, folder = runs[0]
    again = run_script(
        tmp_path,
        EVAL_ONLY="1",
        MODEL_PATH=str(folder / "final_model.int8.ptz"),
        EVAL=names,
        MAX_VAL_DOCS=None,
        DTYPE="float32",
    )
    rungs, first = (
        {
            rung[0]: rung[1:]
            for rung in re.findall(
                r"^ladder condition:(\w+) (val_loss:\S+ val_bpb:\S+) delta_bpb:(\S+) (docs:\S+ tokens:\S+ bytes:\S+)",
                run.stdout,
                re.M,
            )
        }
        for run in (again, done)
    )
    assert list(rungs) == names.split(",")
    assert all(
        (rung[0], rung[2]) == (first[name][0], first[name][2]) for name, rung in rungs.items()
    )
    assert rungs[names.split(",")[0]][1] == "+0.0000"
    audited = re.findall(r"^audit causality: condition:(\w+) ", again.stdout, re.M)
    assert audited == names.split(",")[-1:]  # what learns, and the rung that the run ends with


def test_world_size_does_not_move_training_or_score(runs):
    one, two, plain = runs[1][0], runs[2][0], runs[0][0]
    assert losses(plain) == losses(one)
    assert losses(one) == pytest.approx(losses(two), abs=2e-4)
    assert final(plain) == final(one)
    assert final(two) == pytest.approx(final(one), abs=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_artifact_scores_the_same_on_any_number_of_ranks(runs, tmp_path, dtype):
    artifact = str(runs[1][1] / "final_model.int8.ptz")
    lines, scores, positions = (
        ("final_int8_ttt_lora", "final_int8_zlib_roundtrip", "final_int8_ttt_stream"),
        [],
        [],
    )
    # A CPU without bf16 emulates it, thirty times as slowly.
    few, worlds = {"float32": ("10", (0, 3)), "bfloat16": ("2", (0, 2))}[dtype]
    for ranks in worlds:
        done = run_script(
            tmp_path, ranks, EVAL_ONLY="1", MODEL_PATH=artifact, MAX_VAL_DOCS=few, DTYPE=dtype
        )
        scores.append([final(done, line) for line in lines])
        positions.append(
            re.findall(r"^(flat|stream) positions:(\d+)/(\d+)(?: partial)?$", done.stdout, re.M)
        )
    assert len(positions[0]) == 2 and positions == [positions[0]] * len(
        scores
    )  # counted over all ranks
    for score in scores:
        assert score == pytest.approx(scores[0], abs=2e-4)


def test_evaluating_a_published_artifact_needs_no_shape_and_no_training_shards(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "fineweb_val_000000.bin").symlink_to(CONFORMANCE / "fineweb_val_000000.bin")
    done = run_script(tmp_path, **EVAL_ARTIFACT, DATA_PATH=str(data))
    assert final(done, "final_int8_zlib_roundtrip") > 2
    assert "num_layers:3 model_dim:128 num_heads:2 num_kv_heads:1" in done.stdout
    assert not list(tmp_path.glob("*.p*"))  # the artifact is read where it lies


def test_a_plain_state_dict_is_made_an_artifact_before_it_is_scored(tmp_path):
    settings = EVAL_ARTIFACT | {"MODEL_PATH": str(CONFORMANCE / "init.pt")}
    assert final(run_script(tmp_path, **settings)) > 2
    assert [path.name for path in tmp_path.glob("*.p*")] == [
        "eval_init.int8.ptz"
    ]  # no other run's file is touched


def test_weights_that_exceed_the_budget_are_rounded(tmp_path):
    """By rank 0 while the other one waits, and read back by both; without shards to learn from, in vain."""
    budget = len(tg.source_code().encode()) + 80_000
    done = run_script(tmp_path, 2, ITERATIONS="2", EVAL="flat", ARTIFACT_BUDGET=str(budget))
    headroom = re.search(
        rf"^submission_size:\d+ budget:{budget} headroom:(\d+) PASS", done.stdout, re.M
    )[1]
    assert int(headroom) < 12_000  # of the 80,000; two steps after the start, sizes move in leaps
    assert abs(final(done, "final_int8_zlib_roundtrip") - final(done, r"step:2/2")) < 0.05
    (data := tmp_path / "data").mkdir()
    (data / "fineweb_val_000000.bin").symlink_to(CONFORMANCE / "fineweb_val_000000.bin")
    again = {
        "EVAL_ONLY": "1",
        "MODEL_PATH": str(tmp_path / "final_model.pt"),
        "DATA_PATH": str(data),
    }
    done = run_script(tmp_path, ARTIFACT_BUDGET=str(budget), **again)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(rf"^error: ARTIFACT_BUDGET={budget}: .* training shards", done.stderr, re.M)


def test_text_before_the_first_document_is_accounted_for(tmp_path):
    """`flat` scores it, documents do not; two shards are one stream; a BOS at the very end is no document."""
    stream = tg.open_shard(CONFORMANCE / "fineweb_val_000000.bin")[200:3000]
    lead = int(np.flatnonzero(stream == 1)[0])
    assert 0 < lead < 500
    write_shard(tmp_path / "fineweb_val_000000.bin", stream[:1000])
    write_shard(tmp_path / "fineweb_val_000001.bin", [*stream[1000:], 1])
    done = run_script(
        tmp_path, **EVAL_ARTIFACT, EVAL="flat,doc", DATA_PATH=str(tmp_path), MAX_VAL_DOCS=None
    )
    documents, rows = int((stream == 1).sum()), 2800 // 512 * 512
    assert (
        f"val_documents:{documents} predictions:{2800 - lead} documents_of_one_token:1"
        in done.stdout.splitlines()
    )
    for name, tokens, before, after in (
        ("flat", rows, 0, 2800 - rows),
        ("doc", 2800 - lead, lead, 0),
    ):
        left_out = f"before_first_bos:{before} after_last_row:{after} beyond_max_val_docs:0 PASS"
        coverage = f"audit coverage: condition:{name} targets:2800 scored_once:{tokens} {left_out}"
        assert coverage in done.stdout.splitlines()
        rung = re.search(
            rf"^ladder condition:{name} .* docs:(\d+) tokens:(\d+) ", done.stdout, re.M
        )
        reached = stream[: tokens + 1] if name == "flat" else stream
        assert (int(rung[1]), int(rung[2])) == (int((reached == 1).sum()), tokens)
    assert (
        len(re.findall(r"^sha256 val:\w{64} fineweb_val_00000[01]\.bin$", done.stdout, re.M)) == 2
    )


def test_a_partial_run_says_so_in_every_line_and_out_dir_takes_everything(tmp_path):
    out, here = tmp_path / "made" / "on demand", tmp_path / "here"
    here.mkdir()
    done = run_script(here, **EVAL_ARTIFACT, OUT_DIR=str(out), MAX_VAL_DOCS="2")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 5
    assert all(line.endswith(" partial") for line in done.stdout.splitlines())
    assert not list(here.iterdir()) and (out / "logs" / "test.txt").exists()


@pytest.mark.parametrize("ranks", [0, 2])
def test_bad_settings_fail_in_one_line_on_every_rank(tmp_path, ranks):
    """Even if rank 0, which says so, is the last one to start."""
    (out := tmp_path / "out").mkdir()
    script = script_behind(tmp_path, 'time.sleep(4 * (os.environ.get("RANK") == "0"))')
    done = run_script(out, ranks, script=script, MATRIX_LR="fast")
    assert done.returncode != 0 and done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: MATRIX_LR='fast': expected a number from 0 to 1e+18; set it so or unset it"
    ]
    assert ranks or done.stderr.splitlines() == errors
    assert not list(out.iterdir())


def test_bad_files_fail_in_one_line_before_anything_is_trained(tmp_path):
    """A truncated shard that would only be read much later."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("fineweb_train_000000.bin", "fineweb_val_000000.bin"):
        (data / name).symlink_to(CONFORMANCE / name)
    shard = write_shard(data / "fineweb_train_000001.bin", [1] * 1000)
    shard.write_bytes(shard.read_bytes()[:-2])
    done = run_script(tmp_path, 2, DATA_PATH=str(data))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1
    assert (
        "fineweb_train_000001.bin: found 3022 bytes" in errors[0]
        and 'train_gpt.py", line' not in done.stderr
    )
    assert "step:" not in done.stdout and errors[0] in (tmp_path / "logs" / "test.txt").read_text()


def test_one_rank_that_refuses_stops_the_others_with_its_line(tmp_path):
    """A token id in the shard that the second rank checks."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("fineweb_train_000000.bin", "fineweb_val_000000.bin"):
        (data / name).symlink_to(CONFORMANCE / name)
    write_shard(data / "fineweb_train_000001.bin", [1, 60000, 5])
    done = run_script(tmp_path, 2, DATA_PATH=str(data))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1
    assert (
        errors[0].startswith("error: rank 1: ")
        and "token id 60000, expected ids up to 1023" in errors[0]
    )


def test_a_finished_training_is_saved_before_it_is_evaluated(runs):
    lines = runs[1][0].stdout.splitlines()
    saved = next(
        i for i, line in enumerate(lines) if line.startswith("Total submission size int8+zlib")
    )
    assert saved < next(i for i, line in enumerate(lines) if "val_loss" in line)


def test_wallclock_cap_with_two_ranks(tmp_path):
    """Both ranks stop at the same step, by rank 0's clock."""
    done = run_script(
        tmp_path, 2, ITERATIONS="100000", MAX_WALLCLOCK_SECONDS="2", WARMDOWN_ITERS="5"
    )
    assert final(done) > 0
    step = re.search(
        r"^stopping_early: wallclock_cap train_time:(\d+)ms step:(\d+)/100000 partial$",
        done.stdout,
        re.M,
    )
    assert int(step[1]) >= 2000 and int(step[2]) > 1
    assert f"step:{step[2]}/100000 val_loss:" in done.stdout


def test_an_unusual_shape_runs_on_two_ranks(tmp_path):
    """No skip weights, a head of its own; and the second rank has no document, the first one shorter than a row."""
    done = run_script(
        tmp_path, 2, ITERATIONS="2", NUM_LAYERS="1", TIE_EMBEDDINGS="0", MAX_VAL_DOCS="1"
    )
    assert final(done) > 0


def test_compiled_and_eager_training_agree(tmp_path):
    settings = {
        "NUM_LAYERS": "2",
        "MAX_VAL_DOCS": "2",
        "TORCH_LOGS": "recompiles",
    }  # two have a skip connection
    eager, compiled = (run_script(tmp_path, COMPILE=choice, **settings) for choice in ("0", "1"))
    assert re.search(r"^compile:done time:[\d.]+s", compiled.stdout, re.M)
    assert "recompil" not in compiled.stderr.lower()  # a second time, in the steps
    assert "compile:" not in eager.stdout
    assert losses(compiled) == pytest.approx(losses(eager), abs=0.02)
    assert final(compiled) == pytest.approx(final(eager), abs=0.02)


def test_a_failing_compiler_is_announced_and_survived(tmp_path):
    broken = {
        "COMPILE": "1",
        "CXX": "/nonexistent/compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = run_script(tmp_path, NUM_LAYERS="1", **broken)
    assert re.search(r"^compile:failed \(.+\); running eager", done.stdout, re.M)
    assert len(losses(done)) == 4 and final(done) > 2


def test_progress_is_for_people(tmp_path):
    """Bars appear on a terminal only; neither pipes nor the log file ever hold one."""
    env = os.environ | TINY_RUN | {"OUT_DIR": str(tmp_path), "RUN_ID": "test", "ITERATIONS": "12"}
    master, slave = pty.openpty()
    fcntl.ioctl(
        slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0)
    )  # a bar needs a width
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=slave, text=True)
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += os.read(master, 65536)
        except OSError:  # the other end is closed
            break
    out = process.communicate()[0]
    assert process.returncode == 0
    assert b"training" in shown and b"tokens/s" in shown and b"evaluating" in shown
    log = (tmp_path / "logs" / "test.txt").read_text()
    for text in (out, log.removeprefix((ROOT / "train_gpt.py").read_text())):
        assert "tokens/s" not in text and "\r" not in text


def test_torch_is_the_pinned_one():
    """Golden numbers are only promised for this version."""
    pin = re.search(r"^torch==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M)[1]
    assert torch.__version__.split("+")[0] == pin
