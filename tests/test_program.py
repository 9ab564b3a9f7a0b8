"""The program as its users run it: ranks, files, log lines, artifacts.

Starting it takes seconds. `runs` are started as a user does and serve many tests; what needs no
process of its own runs in this one, by `run_here`.
"""

import csv
import dataclasses
import fcntl
import json
import math
import os
import pty
import re
import shlex
import struct
import subprocess
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
    invocation,
    run_script,
    script_behind,
    write_shard,
)

import train_gpt as tg

TRAIN = "fineweb_train_000000.bin"
VAL = "fineweb_val_000000.bin"
RUNGS = "flat,doc,stride,ttt,stream"
CHECKPOINT = "checkpoints/test.step000000003.pt"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What 1, 2 and 3 ranks print and write, with the same tokens for a step."""
    settings = {"ITERATIONS": "3", "TRAIN_BATCH_TOKENS": "1536"}
    settings |= {"MUON_MOMENTUM_WARMUP_STEPS": "0", "MODEL_DIM": "32", "DTYPE": "float32"}
    settings |= {"MAX_VAL_DOCS": None, "EVAL": RUNGS, "SCORES_PATH": "scores.csv"}
    finished = {}
    for ranks in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        done = run_script(folder, ranks, GRAD_ACCUM_STEPS=str(6 // ranks), **settings)
        assert done.returncode == 0, done.stderr
        assert "%|" not in done.stderr  # a progress bar
        finished[ranks] = (done.stdout, folder)
    return finished


@pytest.fixture
def run_here(tmp_path, capsys):
    """A function that runs the program in this process, as one rank. It returns what is printed."""

    def run(**settings):
        env = TINY_RUN | {"OUT_DIR": str(tmp_path)} | settings
        env = {name: value for name, value in env.items() if value is not None}
        cfg = tg.read_config(env)
        rt = tg.Runtime.create(cfg, env)
        log = tg.RunLog()
        log.run_id = "test"
        log.open(cfg, rt, env)
        try:
            tg.run(cfg, rt, log)
        finally:
            os.close(log.lock)
        return capsys.readouterr().out

    return run


def link_shards(folder, *names):
    """A folder that holds these shards of the conformance set alone."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(CONFORMANCE / name)
    return folder


def read_ladder(text):
    """The fields of every `ladder` line, by condition."""
    lines = re.findall(r"^ladder .*$", text, re.M)
    rungs = [dict(re.findall(r"(\w+):(\S+)", line)) for line in lines]
    return {rung["condition"]: rung for rung in rungs}


def read_results(text):
    """The object of every `result:` line, by condition."""
    results = [json.loads(line) for line in re.findall(r"^result: (.*)$", text, re.M)]
    return {result["condition"]: result for result in results}


def read_scores(text):
    """val_bpb by condition."""
    return {name: result["val_bpb"] for name, result in read_results(text).items()}


def read_losses(text):
    return [float(value) for value in re.findall(r"train_loss:([\d.]+)", text)]


def read_errors(done):
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


LINES = [
    r"step:1/3 train_loss:\d\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
    r"Serialized model: \d+ bytes",
    r"Code size: \d+ bytes",
    r"Total submission size: \d+ bytes",
    r"Serialized model int8\+zlib: \d+ bytes"
    r" \(payload:\d+ raw_torch:\d+ payload_ratio:\d\.\d\dx\)",
    r"Total submission size int8\+zlib: \d+ bytes",
    r"step:3/3 val_loss:\d\.\d{4} val_bpb:\d\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
    r"final_int8_zlib_roundtrip val_loss:\d\.\d{4} val_bpb:\d\.\d{4} eval_time:\d+ms",
    r"final_int8_zlib_roundtrip_exact val_loss:\d\.\d{8} val_bpb:\d\.\d{8}",
    r"final_int8_ttt_lora val_loss:\d\.\d{4} val_bpb:\d\.\d{4} eval_time:\d+ms",
    r"final_int8_ttt_stream val_loss:\d\.\d{4} val_bpb:\d\.\d{4} eval_time:\d+ms",
]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_lines_that_tools_read(runs, ranks):
    """Each once, in this order: a finished training is saved before it is evaluated."""
    text, folder = runs[ranks]
    places = []
    for line in LINES:
        found = list(re.finditer(rf"^{line}$", text, re.M))
        assert len(found) == 1, line
        places.append(found[0].start())
    assert places == sorted(places)
    assert " partial\n" not in text
    assert "\nval_documents:30 predictions:13688\n" in text
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    results = ["final_model.int8.ptz", "final_model.pt", "logs/test.txt", "scores.csv"]
    assert sorted(map(str, files)) == [CHECKPOINT, *results]


@pytest.mark.parametrize("ranks", [1, 3])
def test_ladder_result_and_scores_agree(runs, ranks):
    """The line for people and the JSON for tools both say what scores.csv adds up to."""
    text, folder = runs[ranks]
    path = folder / "scores.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    digest = sha256(path.read_bytes()).hexdigest()
    assert f"\nscores:{path} rows:{len(rows)} sha256:{digest}\n" in text
    results = read_results(text)
    assert ",".join(results) == RUNGS
    first = results["flat"]["val_bpb"]
    for name, rung in read_ladder(text).items():
        mine = [row for row in rows if row["condition"] == name]
        tokens = sum(int(row["tokens"]) for row in mine)
        size = sum(int(row["bytes"]) for row in mine)
        nats = math.fsum(float(row["loss_nats"]) for row in mine)
        result = results[name]
        seconds = result.pop("seconds")
        bpb = nats / math.log(2) / size
        expected = {"condition": name, "val_loss": nats / tokens, "val_bpb": bpb, "documents": 30}
        assert result == expected | {"tokens": tokens, "bytes": size, "partial": False}
        assert int(rung.pop("eval_time").removesuffix("ms")) == pytest.approx(1000 * seconds, abs=1)
        shown = {"condition": name, "val_loss": f"{nats / tokens:.6f}", "val_bpb": f"{bpb:.6f}"}
        shown |= {"delta_bpb": f"{bpb - first:+.4f}", "docs": "30"}
        assert rung == shown | {"tokens": str(tokens), "bytes": str(size)}


@pytest.mark.parametrize("ranks", [1, 3])
def test_audits_sizes_and_hashes(runs, ranks):
    text, folder = runs[ranks]
    lines = text.splitlines()
    for name in RUNGS.split(","):
        scored = 13568 if name == "flat" else 13688
        assert (
            f"audit coverage: condition:{name} targets:13688 scored_once:{scored}"
            f" before_first_bos:0 after_last_row:{13688 - scored} beyond_max_val_docs:0 PASS"
        ) in lines
    assert "audit bytes: documents:30 of:30 table_bytes:33165 text_bytes:33165 PASS" in lines
    # Chunks of 64 in windows of 128: four chunks are cut in the third, two in the first.
    assert re.findall(r"^audit causality: (.*) time:\d+ms PASS$", text, re.M) == [
        f"condition:ttt documents:3 compared:{64 + 64 + 32 + 32}",
        f"condition:stream documents:3 compared:{64 + 64 + 32 + 32}",
    ]
    artifact = folder / "final_model.int8.ptz"
    script = ROOT / "train_gpt.py"
    files = {"script": script, "tokenizer": CONFORMANCE / "tokenizer.model"}
    files |= {"val": CONFORMANCE / VAL, "artifact": artifact}
    digests = {name: sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert dict(re.findall(r"^sha256 (\w+):(\w{64})", text, re.M)) == digests
    size = artifact.stat().st_size + script.stat().st_size
    assert f"submission_size:{size} budget:16000000 headroom:{16000000 - size} PASS" in lines


def test_the_log_says_how_to_do_it_again(runs):
    text, folder = runs[2]
    log = (folder / "logs" / "test.txt").read_text()
    assert log.startswith((ROOT / "train_gpt.py").read_text())
    assert log.endswith(text)
    command = re.search(r"^command: (.*)$", log, re.M)[1]
    assert command.endswith(" torchrun --standalone --nproc_per_node=2 train_gpt.py")
    given = dict(word.split("=", 1) for word in shlex.split(command) if "=" in word)
    assert given["ITERATIONS"] == "3"
    assert "ROPE_BASE" not in given
    config = re.search(r"^config: (.*)$", log, re.M)[1]
    settings = dict(word.split("=", 1) for word in shlex.split(config))
    read_back = tg.read_config(settings | {"WORLD_SIZE": "2"})
    spelled = {n.upper(): tg.spell(value) for n, value in dataclasses.asdict(read_back).items()}
    assert settings == spelled
    assert len(re.findall(r"^attempt:1\nstarted:\d{4}(-\d\d){2}T(\d\d:){2}\d\dZ$", log, re.M)) == 1
    assert f"torch:{torch.__version__} numpy:{np.__version__} sentencepiece:" in log


def read_tensors(checkpoint):
    """Weights, Muon's momentum and Adam's moments, by name."""
    tensors = dict(checkpoint["model"])
    for kind, optimizer in zip(("muon", "adam"), checkpoint["optimizers"], strict=True):
        for number, state in optimizer["state"].items():
            for name, tensor in state.items():
                tensors[f"{kind} {number} {name}"] = tensor
    return tensors


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_trains_alike(runs, ranks):
    """Weights, momentum of every matrix and Adam's moments: the same, up to the order of sums."""
    alone, shared = (tg.load_torch((runs[n][1] / CHECKPOINT).read_bytes()) for n in (1, ranks))
    for name in ("identity", "step", "position"):
        assert alone[name] == shared[name]
    expected = read_tensors(alone)
    found = read_tensors(shared)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # The embedding and all updates of Muon are rounded to bf16.
        tolerance = 0.05 if tensor.dtype is torch.bfloat16 else 0.02
        difference = (tensor.float() - found[name].float()).abs().max()
        assert difference <= tolerance * tensor.float().abs().max(), name
    assert read_losses(runs[ranks][0]) == pytest.approx(read_losses(runs[1][0]), abs=2e-4)
    # `stream`, which learns most, magnifies the rounding of the training.
    scores, first = (read_scores(runs[n][0]) for n in (ranks, 1))
    for name in ("flat", "doc", "stride", "ttt"):
        assert scores[name] == pytest.approx(first[name], abs=2e-4)


def test_a_rung_evaluated_again_is_the_same_to_the_last_digit(runs, run_here):
    """Without its training and in other company. Deltas refer to the first rung that is there."""
    text, folder = runs[1]
    artifact = str(folder / "final_model.int8.ptz")
    again = run_here(
        EVAL_ONLY="1",
        MODEL_PATH=artifact,
        EVAL="ttt,stride,doc",
        MAX_VAL_DOCS=None,
        DTYPE="float32",
    )
    before = read_scores(text)
    scores = read_scores(again)
    assert scores == {name: before[name] for name in ("ttt", "stride", "doc")}
    for name, rung in read_ladder(again).items():
        assert rung["delta_bpb"] == f"{scores[name] - scores['ttt']:+.4f}"
    # What learns is audited, and the rung that the run ends with.
    assert re.findall(r"^audit causality: condition:(\w+) ", again, re.M) == ["ttt", "doc"]


def test_bf16_scores_the_same_on_two_ranks(runs, run_here, tmp_path):
    """Of two documents alone, since a CPU without bf16 emulates it, thirty times as slowly."""
    settings = {"EVAL_ONLY": "1", "MODEL_PATH": str(runs[1][1] / "final_model.int8.ptz")}
    settings |= {"MAX_VAL_DOCS": "2", "DTYPE": "bfloat16", "RUN_ID": "two"}
    done = run_script(tmp_path, 2, **settings)
    assert done.returncode == 0, done.stderr
    alone = read_scores(run_here(**settings))
    assert list(alone) == ["flat", "ttt", "stream"]
    assert read_scores(done.stdout) == pytest.approx(alone, abs=2e-4)


def test_a_published_artifact_needs_no_shape_and_no_training_shards(
    run_here, tmp_path, monkeypatch
):
    """It is read where it lies. OUT_DIR takes everything, and every line but the JSON says partial."""
    data = link_shards(tmp_path / "data", VAL)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    out = tmp_path / "made" / "on demand"
    text = run_here(**EVAL_ARTIFACT, DATA_PATH=str(data), OUT_DIR=str(out), MAX_VAL_DOCS="2")
    assert " num_layers:3 model_dim:128 partial\n" in text
    assert read_scores(text)["flat"] > 2
    for line in text.splitlines():
        assert line.endswith(" partial") != line.startswith("result: ")
    assert all(result["partial"] for result in read_results(text).values())
    assert not list(here.iterdir())
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert list(map(str, files)) == ["logs/test.txt"]


@pytest.mark.parametrize("name", [CHECKPOINT, "final_model.pt"])
def test_a_checkpoint_or_a_state_dict_is_made_an_artifact_and_scored(
    runs, run_here, tmp_path, name
):
    """The same artifact as after the training. No other run's file is touched."""
    text, folder = runs[1]
    path = folder / name
    again = run_here(
        EVAL_ONLY="1", MODEL_PATH=str(path), EVAL="flat", MAX_VAL_DOCS=None, DTYPE="float32"
    )
    assert read_scores(again) == {"flat": read_scores(text)["flat"]}
    made = [found.name for found in tmp_path.glob("*.p*")]
    assert made == [f"eval_{path.stem}.int8.ptz"]


def test_two_ranks_round_an_unusual_model_to_its_budget(run_here, tmp_path):
    """No skip weights, a head of its own, a document for one rank only; stopped by rank 0's clock.

    Rank 0 rounds the weights while the other waits, and both read them back.
    """
    budget = len(tg.source_code().encode()) + 80_000
    shape = {"NUM_LAYERS": "1", "TIE_EMBEDDINGS": "0", "ARTIFACT_BUDGET": str(budget)}
    limits = {"ITERATIONS": "100000", "MAX_WALLCLOCK_SECONDS": "2", "MAX_VAL_DOCS": "1"}
    done = run_script(tmp_path, 2, COMPILE="0", WARMDOWN_ITERS="5", **shape, **limits)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    stopped = re.search(r"^stopping_early: wallclock_cap .*$", text, re.M)[0]
    fields = dict(re.findall(r"(\w+):(\S+)", stopped))
    assert stopped.endswith(" partial")
    assert int(fields["train_time"].removesuffix("ms")) >= 2000
    assert int(fields["step"].split("/")[0]) > 1
    step = re.escape(fields["step"])
    trained = re.search(rf"^step:{step} val_loss:\S+ val_bpb:(\S+) ", text, re.M)[1]
    assert read_scores(text)["flat"] == pytest.approx(float(trained), abs=0.05)
    headroom = re.search(rf"^submission_size:\d+ budget:{budget} headroom:(\d+) PASS", text, re.M)
    assert int(headroom[1]) < 12_000
    # Without shards to learn from, nothing can be rounded.
    weights = {"EVAL_ONLY": "1", "MODEL_PATH": str(tmp_path / "final_model.pt")}
    data = link_shards(tmp_path / "data", VAL)
    with pytest.raises(tg.UserError, match=r"^ARTIFACT_BUDGET=\d+: .* training shards"):
        run_here(DATA_PATH=str(data), ARTIFACT_BUDGET=str(budget), RESUME="auto", **weights)


def test_text_before_the_first_document_is_accounted_for(run_here, tmp_path):
    """`flat` scores it, documents do not. Two shards are one stream. A last BOS is no document."""
    stream = tg.open_shard(CONFORMANCE / VAL)[200:3000]
    lead = int(np.flatnonzero(stream == 1)[0])
    assert 0 < lead < 500
    write_shard(tmp_path / "fineweb_val_000000.bin", stream[:1000])
    write_shard(tmp_path / "fineweb_val_000001.bin", [*stream[1000:], 1])
    settings = {"EVAL": "flat,doc", "DATA_PATH": str(tmp_path), "MAX_VAL_DOCS": None}
    text = run_here(**EVAL_ARTIFACT, **settings)
    documents = int((stream == 1).sum())
    found = f"val_documents:{documents} predictions:{2800 - lead}"
    assert found in text.splitlines()
    rows = 2800 // 512 * 512
    for name, tokens, before, after in [
        ("flat", rows, 0, 2800 - rows),
        ("doc", 2800 - lead, lead, 0),
    ]:
        assert (
            f"audit coverage: condition:{name} targets:2800 scored_once:{tokens}"
            f" before_first_bos:{before} after_last_row:{after} beyond_max_val_docs:0 PASS"
        ) in text.splitlines()
        reached = stream[: tokens + 1] if name == "flat" else stream
        result = read_results(text)[name]
        assert (result["documents"], result["tokens"]) == (int((reached == 1).sum()), tokens)
    hashes = re.findall(r"^sha256 val:\w{64} fineweb_val_00000([01])\.bin$", text, re.M)
    assert hashes == ["0", "1"]


def test_bad_settings_fail_in_one_line_on_every_rank(tmp_path):
    """Even if rank 0, which says so, is the last one to start."""
    out = tmp_path / "out"
    out.mkdir()
    script = script_behind(tmp_path, 'time.sleep(2 * (os.environ.get("RANK") == "0"))')
    done = run_script(out, 2, script=script, MATRIX_LR="fast")
    assert done.returncode != 0
    assert done.stdout == ""
    problem = "MATRIX_LR='fast': expected a number from 0 to 1e+18; give such a value or unset it"
    assert read_errors(done) == [f"error: {problem}"]
    assert not list(out.iterdir())


def test_one_rank_that_refuses_stops_the_others_with_its_line(tmp_path):
    """A token id in the shard that the second rank checks, before anything is trained."""
    data = link_shards(tmp_path / "data", TRAIN, VAL)
    write_shard(data / "fineweb_train_000001.bin", [1, 60000, 5])
    done = run_script(tmp_path, 2, DATA_PATH=str(data))
    assert done.returncode != 0
    (error,) = read_errors(done)
    assert error.startswith("error: rank 1: ")
    assert "token id 60000, expected at most 1023" in error
    assert 'train_gpt.py", line' not in done.stderr
    assert "step:" not in done.stdout
    assert (tmp_path / "logs" / "test.txt").read_text().endswith(f"\n{error}\n")


def test_progress_is_for_people(tmp_path):
    """Bars appear on a terminal only; neither standard output nor the log ever holds one."""
    command, env = invocation(tmp_path, ITERATIONS="12", EVAL="flat")
    master, slave = pty.openpty()
    size = struct.pack("HHHH", 40, 120, 0, 0)  # a bar needs a width
    fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=slave, text=True)
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += os.read(master, 65536)
        except OSError:  # the other end is closed
            break
    out = process.communicate()[0]
    os.close(master)
    assert process.returncode == 0
    assert re.search(rb"training +\d+%\|", shown)
    assert re.search(rb"evaluating +\d+%\|", shown)
    log = (tmp_path / "logs" / "test.txt").read_text()
    for text in (out, log.removeprefix(tg.source_code())):
        assert "%|" not in text
        assert "\r" not in text
    assert re.search(r"^command: .* python train_gpt\.py$", log, re.M)


def test_torch_is_the_pinned_one():
    """Golden numbers are only promised for this version."""
    pin = re.search(r"^torch==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M)[1]
    assert torch.__version__.split("+")[0] == pin
