"""The program as its users run it: ranks, files, log lines, artifacts.

Starting it takes seconds. `runs` are started as a user does and serve many tests; what needs no
process of its own runs in this one, by `run_here`.
"""

import csv
import json
import math
import re
import shlex
import sys
from hashlib import sha256

import numpy as np
import pytest
import torch
from conftest import (
    CONFORMANCE,
    EVAL_ARTIFACT,
    ROOT,
    run_forked,
    run_script,
    script_behind,
    write_shard,
)

import train_gpt as tg

TRAIN = "fineweb_train_000000.bin"
VAL = "fineweb_val_000000.bin"
RUNGS = "flat,doc,stride,ttt,stream"
CHECKPOINT = "checkpoints/test.step000000003.pt"
ALL_DOCUMENTS = {"MAX_VAL_DOCS": None, "DTYPE": "float32"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What 1, 2 and 3 ranks print and write, with the same tokens for a step."""
    settings = {"ITERATIONS": "3", "TRAIN_BATCH_TOKENS": "1536"}
    settings |= {"MUON_MOMENTUM_WARMUP_STEPS": "0", "MODEL_DIM": "32"}
    settings |= {"EVAL": RUNGS, "SCORES_PATH": "scores.csv"} | ALL_DOCUMENTS
    finished = {}
    for ranks in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        done = run_script(folder, ranks, GRAD_ACCUM_STEPS=str(6 // ranks), **settings)
        assert done.returncode == 0, done.stderr
        assert "%|" not in done.stderr  # a progress bar
        finished[ranks] = (done.stdout, folder)
    return finished


@pytest.fixture
def score(tmp_path, run_here):
    """A function that runs the program in this process with success and returns what it prints."""

    def run(**settings):
        done = run_here(tmp_path, **settings)
        assert done.status == 0, done.err
        return done.out

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


def list_files(folder):
    """The relative paths of all files under a folder, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


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
        (found,) = re.finditer(rf"^{line}$", text, re.M)
        places.append(found.start())
    assert places == sorted(places) and " partial\n" not in text
    assert "\nval_documents:30 predictions:13688\n" in text
    results = ["final_model.int8.ptz", "final_model.pt", "logs/test.txt", "scores.csv"]
    assert list_files(folder) == [CHECKPOINT, *results]


@pytest.mark.parametrize("ranks", [1, 3])
def test_ladder_result_and_scores_agree(runs, ranks):
    """The line for people and the JSON for tools both say what scores.csv adds up to."""
    text, folder = runs[ranks]
    path = folder / "scores.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
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
        bpb = nats / math.log(2) / size
        result = {"condition": name, "val_loss": nats / tokens, "val_bpb": bpb, "documents": 30}
        result |= {"tokens": tokens, "bytes": size, "partial": False}
        seconds = results[name].pop("seconds")
        assert results[name] == result
        assert int(rung.pop("eval_time").removesuffix("ms")) == pytest.approx(1000 * seconds, abs=1)
        shown = [
            name,
            f"{nats / tokens:.6f}",
            f"{bpb:.6f}",
            f"{bpb - first:+.4f}",
            30,
            tokens,
            size,
        ]
        assert list(rung.values()) == list(map(str, shown))


def test_audits_sizes_and_hashes(runs):
    text, folder = runs[3]
    lines = text.splitlines()
    for name in RUNGS.split(","):
        scored = 13568 if name == "flat" else 13688
        assert (
            f"audit coverage: condition:{name} targets:13688 scored_once:{scored}"
            f" before_first_bos:0 after_last_row:{13688 - scored} beyond_max_val_docs:0 PASS"
        ) in lines
    assert "audit bytes: documents:30 of:30 table_bytes:33165 text_bytes:33165 PASS" in lines
    # Chunks of 64 in windows of 128: four chunks are cut in the third, two in the first.
    found = re.findall(r"^audit causality: condition:(.*) time:\d+ms PASS$", text, re.M)
    compared = f"documents:3 compared:{64 + 64 + 32 + 32}"
    assert found == [f"ttt {compared}", f"stream {compared}"]
    artifact = folder / "final_model.int8.ptz"
    files = {"script": ROOT / "train_gpt.py", "tokenizer": CONFORMANCE / "tokenizer.model"}
    files |= {"val": CONFORMANCE / VAL, "artifact": artifact}
    digests = {name: sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert dict(re.findall(r"^sha256 (\w+):(\w{64})", text, re.M)) == digests
    size = artifact.stat().st_size + files["script"].stat().st_size
    assert f"submission_size:{size} budget:16000000 headroom:{16000000 - size} PASS" in lines


def test_the_log_says_how_to_do_it_again(runs):
    """After the source: versions, the command with what was set, and every setting's value."""
    text, folder = runs[2]
    log = (folder / "logs" / "test.txt").read_text()
    assert log.startswith((ROOT / "train_gpt.py").read_text()) and log.endswith(text)
    assert f"Running Python {sys.version}\nRunning PyTorch {torch.__version__}\n" in log
    assert len(re.findall(r"^attempt:1\nstarted:\d{4}(-\d\d){2}T(\d\d:){2}\d\dZ$", log, re.M)) == 1
    assert f"torch:{torch.__version__} numpy:{np.__version__} sentencepiece:" in log
    command = re.search(r"^command: (.*)$", log, re.M)[1]
    assert command.endswith(" torchrun --standalone --nproc_per_node=2 train_gpt.py")
    assert " ITERATIONS=3 " in command and " ROPE_BASE=" not in command
    config = re.search(r"^config: (.*)$", log, re.M)[1]
    settings = dict(word.split("=", 1) for word in shlex.split(config))
    read_back = vars(tg.read_config(settings | {"WORLD_SIZE": "2"}))
    assert settings == {name.upper(): tg.spell(value) for name, value in read_back.items()}


def read_tensors(path):
    """Weights, Muon's momentum and Adam's moments of a checkpoint, by name; and the rest of it."""
    rest = tg.load_torch(path.read_bytes())
    tensors = rest.pop("model")
    for kind, optimizer in zip(("muon", "adam"), rest.pop("optimizers"), strict=True):
        for number, state in optimizer["state"].items():
            for name, tensor in state.items():
                tensors[f"{kind} {number} {name}"] = tensor
    return tensors, rest


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_trains_alike(runs, ranks):
    """Weights, momentum of every matrix and Adam's moments: the same, up to the order of sums."""
    expected, alone = read_tensors(runs[1][1] / CHECKPOINT)
    found, shared = read_tensors(runs[ranks][1] / CHECKPOINT)
    for name in ("identity", "step", "position"):
        assert alone[name] == shared[name]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # The embedding and all updates of Muon are rounded to bf16.
        tolerance = 0.05 if tensor.dtype is torch.bfloat16 else 0.02
        difference = (tensor.float() - found[name].float()).abs().max()
        assert difference <= tolerance * tensor.float().abs().max(), name
    losses = [re.findall(r"train_loss:([\d.]+)", runs[n][0]) for n in (ranks, 1)]
    # `stream`, which learns most, magnifies the rounding of the training.
    scores = [list(read_scores(runs[n][0]).values())[:4] for n in (ranks, 1)]
    for theirs, ours in (losses, scores):
        assert list(map(float, theirs)) == pytest.approx(list(map(float, ours)), abs=2e-4)


def test_a_rung_evaluated_again_is_the_same_to_the_last_digit(runs, score):
    """Without its training and in other company. Deltas refer to the first rung that is there."""
    text, folder = runs[1]
    artifact = str(folder / "final_model.int8.ptz")
    again = score(EVAL_ONLY="1", MODEL_PATH=artifact, EVAL="ttt,stride,doc", **ALL_DOCUMENTS)
    before = read_scores(text)
    scores = read_scores(again)
    assert scores == {name: before[name] for name in ("ttt", "stride", "doc")}
    for name, rung in read_ladder(again).items():
        assert rung["delta_bpb"] == f"{scores[name] - scores['ttt']:+.4f}"
    # What learns is audited, and the rung that the run ends with.
    assert re.findall(r"^audit causality: condition:(\w+) ", again, re.M) == ["ttt", "doc"]


def test_bf16_scores_the_same_on_two_ranks(runs, tmp_path):
    """Of two documents alone, since a CPU without bf16 emulates it, thirty times as slowly."""
    settings = {"EVAL_ONLY": "1", "MODEL_PATH": str(runs[1][1] / "final_model.int8.ptz")}
    settings |= {"MAX_VAL_DOCS": "2", "DTYPE": "bfloat16"}
    shared, alone = (run_forked(tmp_path / str(n), n, **settings).stdout for n in (2, 1))
    assert list(read_scores(alone)) == ["flat", "ttt", "stream"]
    assert read_scores(shared) == pytest.approx(read_scores(alone), abs=2e-4)


def test_a_published_artifact_needs_no_shape_and_no_training_shards(score, tmp_path, monkeypatch):
    """It is read where it lies. OUT_DIR takes everything, and every line but the JSON says partial."""
    data = link_shards(tmp_path / "data", VAL)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    out = tmp_path / "made" / "on demand"
    text = score(**EVAL_ARTIFACT, DATA_PATH=str(data), OUT_DIR=str(out), MAX_VAL_DOCS="2")
    assert " num_layers:3 model_dim:128 partial\n" in text
    assert read_scores(text)["flat"] > 2
    for line in text.splitlines():
        assert line.endswith(" partial") != line.startswith("result: ")
    assert all(result["partial"] for result in read_results(text).values())
    assert list_files(out) == ["logs/test.txt"] and not list_files(here)


def test_a_checkpoint_is_made_an_artifact_and_scored(runs, score, tmp_path):
    """The same artifact as after the training. No other run's file is touched."""
    text, folder = runs[1]
    again = score(EVAL_ONLY="1", MODEL_PATH=str(folder / CHECKPOINT), EVAL="flat", **ALL_DOCUMENTS)
    assert read_scores(again)["flat"] == read_scores(text)["flat"]
    assert list_files(tmp_path) == ["eval_test.step000000003.int8.ptz", "logs/test.txt"]


def test_two_ranks_round_an_unusual_model_to_its_budget(run_here, tmp_path):
    """No skip weights, a head of its own, a document for one rank only; stopped by rank 0's clock.

    Rank 0 rounds the weights while the other waits, and both read them back.
    """
    budget = str(len(tg.source_code().encode()) + 80_000)
    shape = {"NUM_LAYERS": "1", "TIE_EMBEDDINGS": "0", "ARTIFACT_BUDGET": budget, "COMPILE": "0"}
    limits = {"ITERATIONS": "100000", "MAX_WALLCLOCK_SECONDS": "1", "MAX_VAL_DOCS": "1"}
    done = run_forked(tmp_path, 2, WARMDOWN_ITERS="5", **shape, **limits)
    assert done.returncode == 0, done.stderr
    stopping = r"^stopping_early: wallclock_cap train_time:(\d+)ms step:(\d+)/100000 partial$"
    spent, step = map(int, re.search(stopping, done.stdout, re.M).groups())
    assert spent >= 1000 and step > 1
    trained = re.search(rf"^step:{step}/\d+ val_loss:\S+ val_bpb:(\S+) ", done.stdout, re.M)[1]
    assert read_scores(done.stdout)["flat"] == pytest.approx(float(trained), abs=0.05)
    sizes = rf"^submission_size:\d+ budget:{budget} headroom:(\d+) PASS"
    assert int(re.search(sizes, done.stdout, re.M)[1]) < 12_000
    # Without shards to learn from, nothing can be rounded.
    weights = {"EVAL_ONLY": "1", "MODEL_PATH": str(tmp_path / "final_model.pt"), "RESUME": "auto"}
    data = link_shards(tmp_path / "data", VAL)
    refused = run_here(tmp_path, DATA_PATH=str(data), ARTIFACT_BUDGET=budget, **weights)
    assert re.fullmatch(r"error: ARTIFACT_BUDGET=\d+: .* training shards.*\n", refused.err)


def test_text_before_the_first_document_is_accounted_for(score, tmp_path):
    """`flat` scores it, documents do not. Two shards are one stream. A last BOS is no document."""
    stream = tg.open_shard(CONFORMANCE / VAL)[200:3000]
    lead = int(np.flatnonzero(stream == 1)[0])
    assert 0 < lead < 500
    write_shard(tmp_path / VAL, stream[:1000])
    write_shard(tmp_path / "fineweb_val_000001.bin", [*stream[1000:], 1])
    settings = {"EVAL": "flat,doc", "DATA_PATH": str(tmp_path), "MAX_VAL_DOCS": None}
    text = score(**EVAL_ARTIFACT, **settings)
    documents = int((stream == 1).sum())
    assert f"\nval_documents:{documents} predictions:{2800 - lead}\n" in text
    rows = 2800 // 512 * 512
    for name, tokens, before, after in [
        ("flat", rows, 0, 2800 - rows),
        ("doc", 2800 - lead, lead, 0),
    ]:
        assert (
            f"\naudit coverage: condition:{name} targets:2800 scored_once:{tokens}"
            f" before_first_bos:{before} after_last_row:{after} beyond_max_val_docs:0 PASS\n"
        ) in text
        reached = stream[: tokens + 1] if name == "flat" else stream
        result = read_results(text)[name]
        assert (result["documents"], result["tokens"]) == (int((reached == 1).sum()), tokens)
    assert re.findall(r"^sha256 val:\w{64} \w+_(\d+)\.bin$", text, re.M) == ["000000", "000001"]


def test_bad_settings_fail_in_one_line_on_every_rank(tmp_path):
    """Even if rank 0, which says so, is the last one to start."""
    script = script_behind(tmp_path, 'time.sleep(2 * (os.environ.get("RANK") == "0"))')
    done = run_script(tmp_path, 2, script=script, MATRIX_LR="fast")
    assert done.returncode != 0 and done.stdout == ""
    problem = "MATRIX_LR='fast': expected a number from 0 to 1e+18; give such a value or unset it"
    assert re.findall("^error: .*", done.stderr, re.M) == [f"error: {problem}"]
    assert list_files(tmp_path) == [script.name]


def test_one_rank_that_refuses_stops_the_others_with_its_line(tmp_path):
    """A token id in the shard that the second rank checks, before anything is trained."""
    data = link_shards(tmp_path / "data", TRAIN, VAL)
    write_shard(data / "fineweb_train_000001.bin", [1, 60000, 5])
    done = run_forked(tmp_path, 2, DATA_PATH=str(data))
    assert done.returncode == 1 and "step:" not in done.stdout
    assert re.fullmatch("error: rank 1: .*token id 60000, expected at most 1023.*\n", done.stderr)
    assert (tmp_path / "logs" / "test.txt").read_text().endswith(f"\n{done.stderr}")


def test_progress_is_for_people(tmp_path):
    """Bars appear on a terminal only; neither standard output nor the log ever holds one."""
    terminal = "tg.sys.stderr.isatty = lambda: True"
    done = run_forked(tmp_path, hook=terminal, ITERATIONS="12", EVAL="flat")
    assert done.returncode == 0
    for what in ("training", "evaluating"):
        assert re.search(rf"{what} +\d+%\|", done.stderr)
    log = (tmp_path / "logs" / "test.txt").read_text().removeprefix(tg.source_code())
    for mark in ("%|", "\r"):
        assert mark not in done.stdout + log
    assert re.search(r"^command: .* python train_gpt\.py$", log, re.M)


def test_torch_is_the_pinned_one():
    """Golden numbers are only promised for this version."""
    pin = re.search(r"^torch==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M)[1]
    assert torch.__version__.split("+")[0] == pin
