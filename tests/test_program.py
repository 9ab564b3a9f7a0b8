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
    folder_bytes,
    run_forked,
    run_script,
    script_behind,
    write_shard,
)
from test_artifact import published_loader
from torch.utils._pytree import tree_leaves

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


def link_shards(folder, *names):
    """A folder that holds these shards of the conformance set alone."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(CONFORMANCE / name)
    return folder


def read_results(text):
    """The object of every `result:` line, by condition."""
    results = [json.loads(line) for line in re.findall(r"^result: (.*)$", text, re.M)]
    return {result["condition"]: result for result in results}


def read_scores(text):
    """val_bpb by condition."""
    return {name: result["val_bpb"] for name, result in read_results(text).items()}


LINES = [
    r"validation: not the full FineWeb \(30 documents, 13,689 tokens\)",
    r"step:1/3 train_loss:\d\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
    r"train_tokens:\d+ of:\d+ tokens_per_second:\d+ peak_memory:\d+MB",
    r"Serialized model: \d+ bytes",
    r"Code size: \d+ bytes",
    r"Total submission size: \d+ bytes",
    r"Serialized model int8\+zlib: \d+ bytes"
    r" \(payload:\d+ raw_torch:\d+ payload_ratio:\d\.\d\dx\)",
    r"Total submission size int8\+zlib: \d+ bytes",
    r"step:3/3 val_loss:\d\.\d{4} val_bpb:\d\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
    r"conditions: causal .*, normalised .*, score first .*, one pass .*",
    r"final_int8_zlib_roundtrip val_loss:\d\.\d{4} val_bpb:\d\.\d{4} eval_time:\d+ms",
    r"final_int8_zlib_roundtrip_exact val_loss:\d\.\d{8} val_bpb:\d\.\d{8}",
    r"final_int8_ttt_lora val_loss:\d\.\d{4} val_bpb:\d\.\d{4} eval_time:\d+ms",
    r"final_int8_ttt_stream val_loss:\d\.\d{4} val_bpb:\d\.\d{4} eval_time:\d+ms",
    r"total_eval_time:\d+\.\ds limit:600s PASS",
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
    results = ["final_model.int8.ptz", "final_model.pt", "logs/test.txt", "scores.csv"]
    assert list(folder_bytes(folder)) == [CHECKPOINT, *results]


def test_ladder_result_and_scores_agree(runs):
    """The line for people and the JSON for tools both say what scores.csv adds up to."""
    text, folder = runs[3]
    path = folder / "scores.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    digest = sha256(path.read_bytes()).hexdigest()
    assert f"\nscores:{path} sha256:{digest}\n" in text
    results = read_results(text)
    assert ",".join(results) == RUNGS
    first = results["flat"]["val_bpb"]
    for name, found in results.items():
        mine = [row for row in rows if row["condition"] == name]
        columns = ("tokens", "bytes", "loss_nats")
        tokens, size, nats = (math.fsum(float(row[key]) for row in mine) for key in columns)
        bpb = nats / math.log(2) / size
        seconds = found.pop("seconds")
        result = {"condition": name, "val_loss": nats / tokens, "val_bpb": bpb, "documents": 30}
        assert found == result | {"tokens": tokens, "bytes": size, "partial": False}
        assert (
            f"\nladder condition:{name} val_loss:{nats / tokens:.6f} val_bpb:{bpb:.6f}"
            f" delta_bpb:{bpb - first:+.4f} docs:30 tokens:{tokens:.0f}"
            f" bytes:{size:.0f} eval_time:{1000 * seconds:.0f}ms\n"
        ) in text


def test_audits_sizes_and_hashes(runs):
    text, folder = runs[3]
    lines = text.splitlines()
    whole = (
        "targets:13688 scored_once:13688 before_first_bos:0 after_last_row:0 beyond_max_val_docs:0"
    )
    audited = re.findall(rf"^audit coverage: condition:(\w+) {whole} PASS$", text, re.M)
    assert audited == ["doc", "stride", "ttt", "stream"]
    counts = "unknown_pieces:0 table_bytes:33165 text_bytes:33165"
    assert f"audit bytes: documents:30 of:30 words:5073 same:5073 {counts} PASS" in lines
    # Chunks of 64 in windows of 128: four chunks are cut in the third, two in the first.
    found = re.findall(r"^audit causality: condition:(\w+) (.*) PASS$", text, re.M)
    assert ",".join(name for name, _ in found) == RUNGS
    compared = f"documents:3 compared:{64 + 64 + 32 + 32}"
    assert found[3] == ("ttt", compared)
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
    start = r"^attempt:1\nstarted:\S+Z\ncommand: (.*)\nconfig: (.*)\nversions: python:\S+ torch:"
    command, config = re.search(start, log, re.M).groups()
    assert command.endswith(" torchrun --standalone --nproc_per_node=2 train_gpt.py")
    assert " ITERATIONS=3 " in command and " ROPE_BASE=" not in command
    settings = dict(word.split("=", 1) for word in shlex.split(config))
    read_back = vars(tg.read_config(settings | {"WORLD_SIZE": "2"}))
    assert settings == {name.upper(): tg.spell(value) for name, value in read_back.items()}


def read_checkpoint(folder):
    """All values of a checkpoint but its time, in order."""
    checkpoint = tg.load_torch((folder / CHECKPOINT).read_bytes())
    del checkpoint["elapsed_ms"]
    return tree_leaves(checkpoint)


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_trains_alike(runs, ranks):
    """Weights, momentum of every matrix and Adam's moments: the same, up to the order of sums."""
    pair = (read_checkpoint(runs[n][1]) for n in (ranks, 1))
    for found, expected in zip(*pair, strict=True):
        if not isinstance(expected, torch.Tensor):
            assert found == expected
            continue
        # The embedding and all updates of Muon are rounded to bf16.
        tolerance = 0.05 if expected.dtype is torch.bfloat16 else 0.02
        difference = (found.float() - expected.float()).abs().max()
        assert difference <= tolerance * expected.float().abs().max()
    # `stream`, which learns most, magnifies the rounding of the training.
    texts = (runs[n][0].partition("\nladder condition:stream")[0] for n in (ranks, 1))
    found, expected = (re.findall(r"(?:train_loss|val_bpb):([\d.]+)", text) for text in texts)
    assert list(map(float, found)) == pytest.approx(list(map(float, expected)), abs=2e-4)


def test_a_checkpoint_is_scored_like_the_artifact_of_its_training(runs, run_here, tmp_path):
    """To the last digit, in other company. It is made an artifact under a name of its own."""
    text, folder = runs[1]
    settings = {"EVAL_ONLY": "1", "MODEL_PATH": str(folder / CHECKPOINT), "EVAL": "ttt,stride,doc"}
    again = run_here(tmp_path, **settings | ALL_DOCUMENTS).out
    assert list(folder_bytes(tmp_path)) == ["eval_test.step000000003.int8.ptz", "logs/test.txt"]
    before = read_scores(text)
    assert read_scores(again) == {name: before[name] for name in ("ttt", "stride", "doc")}


def test_a_published_artifact_needs_no_shape_and_no_training_shards(
    run_here, tmp_path, monkeypatch
):
    """It is read where it lies. OUT_DIR takes everything, and every line but the JSON says partial.

    Without a calibration there are no mixtures: left out of the ladder, refused where one is named.
    """
    link_shards(tmp_path / "data", VAL)
    monkeypatch.chdir(tmp_path)
    brief = EVAL_ARTIFACT | {"MAX_VAL_DOCS": "2", "ARTIFACT_BUDGET": "9", "DATA_PATH": "data"}
    ended = run_here("made", **brief, EVAL="mix")
    assert ended.status == 1 and "calibration found none; leave the mixtures out" in ended.err
    text = run_here("made/on demand", **brief, EVAL=None).out
    assert "\nleft out of EVAL: the mixtures, since " in text
    assert list(read_scores(text)) == ["flat", "doc", "stride", "ttt", "stream"]
    assert re.search(r"^submission_size:\d+ budget:9 headroom:-\d+ FAIL partial$", text, re.M)
    assert " num_layers:3 model_dim:128 partial\n" in text
    assert read_scores(text)["flat"] > 2
    for line in text.splitlines():
        assert line.endswith(" partial") != line.startswith("result: ")
    assert all(result["partial"] for result in read_results(text).values())
    logs = ["made/logs/test.txt", "made/on demand/logs/test.txt"]
    assert list(folder_bytes(tmp_path)) == [f"data/{VAL}", *logs]


def test_an_artifact_brings_its_settings(run_here, tmp_path):
    """What no shape shows decides the score; a variable or tokenizer that contradicts it is refused."""
    odd = {"ROPE_BASE": "500000", "LOGIT_SOFTCAP": "15", "EVAL": "flat"}
    score = read_scores(run_here(tmp_path, **odd).out)
    path = tmp_path / "final_model.int8.ptz"
    seen = published_loader(path.read_bytes())  # which knows no settings
    ours, _ = tg.parse_weights(path.read_bytes(), path)
    assert all(torch.equal(seen[name], tensor) for name, tensor in ours.items())
    alone = EVAL_ARTIFACT | {"TRAIN_SEQ_LEN": "128", "EVAL": "flat", "MODEL_PATH": str(path)}
    ended = run_here(tmp_path / "alone", **alone)
    assert read_scores(ended.out) == score and "holds none" not in ended.out
    ended = run_here(tmp_path / "other", **alone, ROPE_BASE="10000")
    said = "it was made with ROPE_BASE=500000.0, the environment says 10000.0; unset ROPE_BASE"
    assert ended.status == 1 and said in ended.err
    model = tmp_path / "other.model"
    model.write_bytes((CONFORMANCE / "tokenizer.model").read_bytes() + b"\x98\x06\1")
    ended = run_here(tmp_path / "words", **alone, TOKENIZER_PATH=str(model))
    assert ended.status == 1
    assert re.match(f"error: TOKENIZER_PATH={model}: .* expected that of {path}; ", ended.err)
    weights = alone | {"MODEL_PATH": str(path.with_name("final_model.pt"))}
    ended = run_here(tmp_path / "weights", **weights)
    assert "final_model.pt holds none; the environment's hold" in ended.out
    assert read_scores(ended.out) != score


def test_an_artifact_that_was_replaced_is_not_scored(run_here, tmp_path, monkeypatch):
    """Another run in the same folder exports while this one validates."""

    def evaluate(*arguments, evaluate=tg.evaluate):
        (tmp_path / "final_model.int8.ptz").write_bytes(b"another run's")
        return evaluate(*arguments)

    monkeypatch.setattr(tg, "evaluate", evaluate)
    ended = run_here(tmp_path, EVAL="flat")
    assert ended.status == 1 and "another program replaced it" in ended.err
    assert "ladder" not in ended.out


def test_the_full_set_is_known_and_a_closed_stderr_survived(run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(tg, "FULL_VALIDATION", (30, 13_689))
    monkeypatch.setattr(sys, "stderr", None)
    ended = run_here(tmp_path, **EVAL_ARTIFACT, EVAL="flat", MAX_VAL_DOCS=None)
    assert ended.status == 0
    assert "\nvalidation: full FineWeb (30 documents, 13,689 tokens)\n" in ended.out


def test_two_ranks_round_an_unusual_model_to_its_budget(tmp_path):
    """No skip weights, a head of its own, a document for one rank only; stopped by rank 0's clock.

    Rank 0 rounds the weights while the other waits, and both read them back.
    """
    budget = str(len(tg.source_code()) + 80_000)
    settings = {"NUM_LAYERS": "1", "TIE_EMBEDDINGS": "0", "DTYPE": "bfloat16", "COMPILE": "0"}
    settings |= {"ITERATIONS": "100000", "MAX_WALLCLOCK_SECONDS": "1", "WARMDOWN_ITERS": "5"}
    done = run_forked(tmp_path, 2, MAX_VAL_DOCS="1", ARTIFACT_BUDGET=budget, **settings)
    assert done.returncode == 0, done.stderr
    stopping = r"^stopping_early: wallclock_cap train_time:(\d+)ms step:(\d+)/100000 partial$"
    spent, step = map(int, re.search(stopping, done.stdout, re.M).groups())
    assert spent >= 1000 and step > 1
    trained = re.search(rf"^step:{step}/\d+ val_loss:\S+ val_bpb:(\S+) ", done.stdout, re.M)[1]
    assert read_scores(done.stdout)["flat"] == pytest.approx(float(trained), abs=0.05)
    sizes = rf"^submission_size:\d+ budget:{budget} headroom:(\d+) PASS"
    assert int(re.search(sizes, done.stdout, re.M)[1]) < 12_000


def test_text_before_the_first_document_is_accounted_for(run_here, tmp_path):
    """`flat` scores it, documents do not. Two shards are one stream. A last BOS is no document."""
    stream = tg.open_shard(CONFORMANCE / VAL)[200:3000]
    lead = int(np.flatnonzero(stream == 1)[0])
    write_shard(tmp_path / VAL, stream[:1000])
    write_shard(tmp_path / "fineweb_val_000001.bin", [*stream[1000:], 1])
    settings = {"EVAL": "flat,doc", "DATA_PATH": str(tmp_path), "MAX_VAL_DOCS": None}
    text = run_here(tmp_path, **EVAL_ARTIFACT, **settings).out
    documents = (stream == 1).sum()
    assert f"({documents} documents, {2801:,} tokens)\n" in text
    covered = {"flat": "scored_once:2560 before_first_bos:0 after_last_row:240"}
    covered["doc"] = f"scored_once:{2800 - lead} before_first_bos:{lead} after_last_row:0"
    for name, counts in covered.items():
        audit = f"condition:{name} targets:2800 {counts} beyond_max_val_docs:0 PASS"
        assert f"\naudit coverage: {audit}\n" in text


def test_bad_settings_fail_in_one_line_on_every_rank(tmp_path):
    """Even if rank 0, which says so, is the last one to start."""
    script = script_behind(tmp_path, 'time.sleep(2 * (os.environ.get("RANK") == "0"))')
    done = run_script(tmp_path, 2, script=script, MATRIX_LR="fast")
    assert done.returncode != 0 and done.stdout == ""
    problem = "MATRIX_LR='fast': expected a number from 0 to 1e+18; give such a value or unset it"
    assert re.findall("^error: .*", done.stderr, re.M) == [f"error: {problem}"]


def test_one_rank_that_refuses_stops_the_others_with_its_line(tmp_path):
    """It finds no shards before the training, or a token id in the part of a batch that it reads."""
    apart = 'if os.environ["RANK"] == "1": os.environ["DATA_PATH"] = "/nowhere"'
    done = run_forked(tmp_path, 2, hook=apart)
    assert done.returncode == 1
    assert re.fullmatch("error: rank 1: DATA_PATH=/nowhere: found no .*\n", done.stderr)
    data = link_shards(tmp_path / "data", VAL)
    tokens = np.array(tg.open_shard(CONFORMANCE / TRAIN))
    tokens[600] = 60000
    write_shard(data / TRAIN, tokens)
    done = run_forked(tmp_path, 2, DATA_PATH=str(data), RUN_ID="second", WARMUP_STEPS="0")
    assert done.returncode == 1 and "step:" not in done.stdout
    assert re.search("error: rank 1: .*token id 60000, expected at most 1023", done.stderr)


def test_progress_is_for_people(tmp_path):
    """Bars appear on a terminal only; neither standard output nor the log ever holds one."""
    terminal = "tg.sys.stderr.isatty = lambda: True"
    done = run_forked(tmp_path, hook=terminal, EVAL="flat", ITERATIONS="80")
    assert done.returncode == 0
    assert re.search(r"training +\d+%\|", done.stderr)  # what takes under a second has none
    log = (tmp_path / "logs" / "test.txt").read_text().removeprefix(tg.source_code().decode())
    assert not re.search(r"%\||\r", done.stdout + log)
