"""The records tools: what they read, draw and write, and that they refuse what cannot be trusted."""

import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import make_record
import matplotlib.image
import numpy as np
import plot
import pytest
import run_log
import stats
from conftest import CONFORMANCE, EVAL_ARTIFACT, ROOT, run_script, write_shard

import train_gpt as tg

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
CODE = len(SOURCE.encode())
RULE = "=" * 100
DOCUMENTS = [90, 300, 1000, 2500, 5000, 7200]  # predictions in each
BEFORE = 7  # tokens before the first BOS
CHUNK = 256  # predictions in a row of a scores file
TOKENS = sum(DOCUMENTS)
TARGETS = BEFORE + TOKENS
TEXT = sum(int(2.5 * n) for n in DOCUMENTS)  # bytes of the documents
LADDER = ("flat", "doc", "stride", "ttt")
MACHINE = """Running Python 3.11.2
Running PyTorch 2.13.0
8 x NVIDIA H100
| NVIDIA-SMI 570.86 |
|===================|"""
DEFAULTS = "PRESET=cpu DEVICE=cpu EVAL_ONLY=0 MODEL_PATH='' ITERATIONS=20000 MAX_VAL_DOCS=0"
DEFAULTS += " RESUME='' RUN_ID=''"


def digest(content):
    return hashlib.sha256(content).hexdigest()


# --- Runs that were never run ---


def scores_rows(conditions, seed):
    """Rows of a scores file: losses fall along a document, and from one condition to the next."""
    for rank, condition in enumerate(conditions):
        if condition == "flat":
            yield condition, -1, 0, 0, BEFORE, 11, 30.5
        for doc, length in enumerate(DOCUMENTS):
            for chunk, start in enumerate(range(0, length, CHUNK)):
                tokens = min(CHUNK, length - start)
                loss = 2.9 + math.sin(seed) / 100 - 0.03 * rank * math.log1p(start / 64)
                yield condition, doc, chunk, start, tokens, int(2.5 * tokens), tokens * loss


def training_lines(seed, steps):
    for step in [*range(1, 11), *range(50, steps, 50)]:
        loss = 2.6 + math.exp(-step / 150) + 0.4 * math.sin(step * seed)
        yield f"step:{step}/20000 train_loss:{loss:.4f} train_time:{145 * step}ms step_avg:145.00ms"


def result_lines(condition, rows):
    """What is printed for one condition, whose rows these are."""
    mine = [row for row in rows if row[0] == condition]
    tokens, size, nats = (sum(row[column] for row in mine) for column in (4, 5, 6))
    bpb = nats / math.log(2) / size
    result = run_log.Result(condition, nats / tokens, bpb, 6, tokens, size, 3.454, False)
    yield (
        f"audit coverage: condition:{condition} targets:{TARGETS} scored_once:{tokens} "
        f"before_first_bos:{TARGETS - tokens} after_last_row:0 beyond_max_val_docs:0 PASS"
    )
    yield f"ladder condition:{condition} whatever people like to read"
    yield f"result: {json.dumps(asdict(result))}"


def spell(settings):
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())


def write_run(folder, seed=1337, conditions=LADDER, **given):
    """A log as train_gpt.py writes it, with its scores file beside it. Returns the log's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(scores_rows(conditions, seed))
    lines = ["condition,doc,chunk,start,tokens,bytes,loss_nats"]
    lines += [",".join(map(str, row)) for row in rows]
    scores = folder / f"scores{seed}.csv"
    scores.write_text("\n".join(lines) + "\n")
    given = {
        "DATA_PATH": "my files/data/demo",
        "OUT_DIR": str(folder),
        "SEED": str(seed),
        "EVAL": ",".join(conditions),
        "MAX_WALLCLOCK_SECONDS": "175.0",
    } | given
    config = run_log.Attempt(folder, 1, []).settings(DEFAULTS) | given
    model = 1441734 + seed
    steps = 1200 + seed % 10
    results = [line for condition in conditions for line in result_lines(condition, rows)]
    newline = "\n"  # for Python 3.11, whose f-strings take no backslash inside braces
    path = folder / f"run{seed}.txt"
    path.write_text(f"""{SOURCE}
{RULE}
{MACHINE}
{RULE}
attempt:1
started:2026-11-28T16:03:11Z
command: {spell(given)} torchrun --standalone --nproc_per_node=2 train_gpt.py
config: {spell(config)}
versions: python:3.11.2 torch:2.13.0+cpu numpy:2.4.6 sentencepiece:0.2.3
hardware: AMD EPYC, 2 cores, 2 threads
preset:cpu device:cpu world_size:2 dtype:torch.bfloat16
data:./data/demo tokenizer:./data/demo/tokenizer.model log:x.txt
sha256 script:{digest(SOURCE.encode())}
sha256 tokenizer:{"a" * 64}
sha256 val:{"b" * 64} fineweb_val_000000.bin
audit bytes: documents:6 of:6 table_bytes:{TEXT} text_bytes:{TEXT} PASS
compile:done time:58.7s
{newline.join(training_lines(seed, steps))}
stopping_early: wallclock_cap train_time:{145 * steps}ms step:{steps}/20000
Serialized model: 4351717 bytes
Serialized model int8+zlib: {model} bytes (payload:1593392 raw_torch:1609162)
step:{steps}/20000 val_loss:2.8000 val_bpb:1.6158 train_time:{145 * steps}ms step_avg:145.00ms
sha256 artifact:{digest(b"weights")} final_model.int8.ptz
submission_size:{model + CODE} budget:16000000 headroom:{16000000 - model - CODE} PASS
audit causality: condition:{conditions[-1]} documents:3 compared:512 time:432ms PASS
{newline.join(results)}
scores:{scores} rows:{len(rows)} sha256:{digest(scores.read_bytes())}
""")
    return path


def edit(path, pattern, new, count=0):
    """Change what one pattern matches below the head of a log; ^ and $ are those of a line."""
    head, body = path.read_text(encoding="utf-8").rsplit(RULE, 1)
    body, changed = re.subn(pattern, new, body, count=count, flags=re.MULTILINE)
    assert changed, f"nothing to edit: {pattern}"
    path.write_text(head + RULE + body, encoding="utf-8")


def interrupt(path, killed=700, resumed=500):
    """Make a log that of a run which was killed after a step and went on from a checkpoint.

    resumed: step of the checkpoint; 0 if the second attempt found none.
    """
    head, body = path.read_text(encoding="utf-8").rsplit(RULE, 1)
    opening, training = re.split(r"^(?=step:1/)", body, flags=re.MULTILINE)
    first = re.match(rf"(.*\n)*step:{killed}/.*\n", training)[0]
    line = "resume: found no checkpoint; starting anew\n"
    if resumed:
        line = f"resume:out/x.500.pt step:{resumed}/20000 train_time:{145 * resumed}ms\n"
        training = re.sub(rf"^(.*\n)*step:{resumed}/.*\n", "", training)
    second = opening.removeprefix("\n").replace("attempt:1", "attempt:2")
    second = second.replace("RESUME='' RUN_ID=''", "RESUME=auto RUN_ID=x")
    second = second.replace("command: ", "command: RESUME=auto RUN_ID=x ")
    path.write_text(head + RULE + opening + first + second + line + training, encoding="utf-8")
    return path


def refusal(call, *arguments):
    """The one line with which a call refuses."""
    with pytest.raises(ValueError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Logs of three seeds; nobody changes them."""
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder, seed) for seed in (1338, 1337, 1339)]


@pytest.fixture(scope="module")
def log(runs):
    """The second of these logs, with seed 1337, as it is read."""
    return run_log.read_log(runs[1])


@pytest.fixture(scope="module")
def rows(runs, log):
    """Its scores, the text before the first document left out."""
    rows = plot.read_scores(runs[1].with_name("scores1337.csv"), log)
    return rows[rows["doc"] >= 0]


@pytest.fixture(scope="module")
def record(runs, tmp_path_factory):
    """A record of the three; nobody changes it."""
    return make_record.make_record("try-1", 1.6, runs, tmp_path_factory.mktemp("records"))


# --- Logs ---


def test_a_log_says_what_was_written(runs, log):
    expected = {
        "source": SOURCE,
        "attempts": 1,
        "partial": False,
        "hardware": "AMD EPYC, 2 cores, 2 threads",
        "started": "2026-11-28T16:03:11Z",
        "world_size": 2,
        "dtype": "torch.bfloat16",
        "tokenizer_hash": "a" * 64,
        "val_hashes": {"fineweb_val_000000.bin": "b" * 64},
        "artifact_hash": digest(b"weights"),
        "causal": ("ttt",),
        "validation": (run_log.Point(1207, 2.8, 175015),),
        "sizes": run_log.Sizes(1443071, CODE, 1443071 + CODE, 16000000),
    }
    assert vars(log) | expected == vars(log)
    assert log.seed == 1337 and log.config["DATA_PATH"] == "my files/data/demo"
    assert log.command.endswith(" torchrun --standalone --nproc_per_node=2 train_gpt.py")
    assert log.results[0].tokens == TARGETS and log.score.bytes == TEXT
    assert len(log.training) == 34 and log.training[10].step == 50
    scores = runs[1].with_name("scores1337.csv")
    assert log.scores == (str(scores), digest(scores.read_bytes()))


def test_what_the_program_may_print_is_read(tmp_path):
    path = write_run(tmp_path)
    edit(path, r"^(command:.*SECONDS=175)\.0", r"\1")
    edit(path, r"^command:", "command: PRESET=auto DEVICE=auto GRAD_ACCUM_STEPS=0")
    edit(path, r"final_model.int8.ptz", "my model.ptz")
    edit(path, r"fineweb_val_000000.bin", "fineweb_val_my own.bin")
    assert [*run_log.read_log(path).val_hashes] == ["fineweb_val_my own.bin"]
    edit(path, r"^command:.* torchrun.*", "command: python train_gpt.py")
    edit(path, r"world_size:2", "world_size:1")
    edit(path, r"(config:.*SECONDS)=175.0", r"\1=1e-05")
    edit(path, r"^stopping_early.*\n", "")
    edit(path, r" ITERATIONS=20000", " ITERATIONS=1207")  # training ended by itself
    log = run_log.read_log(path)
    assert log.command == "python train_gpt.py" and log.config["MAX_WALLCLOCK_SECONDS"] == "1e-05"


DOC = r'^(result: .*"doc".*'  # the result of this condition
UNTRUSTWORTHY = {
    "source": (
        r"^sha256 script:.*",
        "sha256 script:x",
        f"{digest(SOURCE.encode())}, of the source",
    ),
    "no start": (r"^started:.*\n", "", "0 lines 'started:'"),
    "no shard": (r"^sha256 val:.*\n", "", "one for each validation shard"),
    "shard twice": (r"^(sha256 val:.*\n)", r"\1\1", "two hashes of fineweb_val_000000.bin"),
    "quotes": (r"(config:.*)'my files/data/demo'", r"\1'my files", "quoted as for a shell"),
    "odd seed": (r" SEED=\d+", " SEED=x", "SEED=x"),
    "command's seed": (r"^(command:.*) SEED=\d+", r"\1 SEED=9", "found SEED=9; expected SEED=1338"),
    "launcher": (r"^(command:.*) train_gpt.py", r"\1 other.py", "train_gpt"),
    "ranks": (r"world_size:2", "world_size:8", "world_size:8"),
    "device": (r"device:cpu", "device:cuda:0", "DEVICE=cuda; expected DEVICE=cpu"),
    "never validated": (r"^step:.*val_bpb.*\n", "", "val_loss after no step; expected the last"),
    "validated early": (r"^step:1208(/20000 val_)", r"step:1207\1", "val_loss after 1207"),
    "cap unsaid": (r"^stopping_early.*\n", "", "after step 20000, where training ended"),
    "steps fall": (r"^(step:50/.*\n)(step:100/.*\n)", r"\2\1", "expected steps that rise"),
    "no result": (DOC + r"\n)", "", "results of 'flat,stride,ttt'; expected one for each"),
    "order": (r"EVAL=flat,doc", "EVAL=doc,flat", "'doc,flat,stride,ttt', in that order"),
    "no JSON": (DOC + "\\}$)", r"\1}", "a JSON object with the keys condition, val_loss,"),
    "other type": (DOC + r'"tokens": \d+)', r"\1.0", "tokens of the type int"),
    "nan": (DOC + r'"val_loss": )[^,]+', r"\1NaN", "a finite val_loss"),
    "bits": (DOC + r'"val_bpb": )[^,]+', r"\g<1>1.5", "val_bpb:1.5; expected "),
    "no bytes": (DOC + r'"bytes": )\d+', r"\g<1>0", "bytes above 0"),
    "bytes audit": (r"^(audit bytes.*) PASS", r"\1 FAIL", "PASS at its end"),
    "other text": (r"^(audit bytes.*text_bytes:)\d+", r"\g<1>9", "as many bytes in the table"),
    "no coverage": (r"^audit coverage: condition:ttt.*\n", "", "0 lines 'audit coverage: cond"),
    "covered": (r"(:ttt.*once:)16090 (.*bos:)7", r"\g<1>16089 \g<2>8", "scored_once:16090"),
    "left out": (r"(condition:ttt.* after_last_row:)\d+", r"\g<1>9", "all other targets left out"),
    "model size": (r"^(Serialized model int8\+zlib:) \d+", r"\1 5", "expected model 5 + source"),
    "total size": (r"^submission_size:\d+", "submission_size:5", "found submission_size:5; "),
    "verdict": (r"^(submission_size.*) PASS", r"\1 FAIL", "FAIL; expected headroom:"),
    "failed": (r"^Serialized model int8(.|\n)*", "error: disk full", "'error: disk full'"),
    "stopped": (r"^scores:.*", "stopped by SIGTERM", "'stopped by SIGTERM'; expected"),
    "killed": (r"^step:400(.|\n)*", "", "found results of ''; expected one for each"),
    "attempts": (r"^attempt:1", "attempt:2", "found 'attempt:2'; expected 'attempt:1'"),
}


@pytest.mark.parametrize("case", UNTRUSTWORTHY)
def test_a_log_that_cannot_be_trusted_is_refused(runs, tmp_path, case):
    path = tmp_path / "run.txt"
    shutil.copy(runs[0], path)
    pattern, new, message = UNTRUSTWORTHY[case]
    edit(path, pattern, new)
    line = refusal(run_log.read_log, path)
    assert line.startswith(f"{path}: attempt:1: found ") and "; expected " in line
    assert message in line


def test_two_runs_in_one_log_and_no_log_are_refused(runs, tmp_path):
    path = tmp_path / "run.txt"
    path.write_bytes(runs[0].read_bytes() + runs[1].read_bytes())
    assert "found 4 lines of 100 '='" in refusal(run_log.read_log, path)
    path.write_text(SOURCE)
    assert "found 0 lines of 100 '='" in refusal(run_log.read_log, path)
    path.write_bytes(b"\xff")
    assert "not UTF-8" in refusal(run_log.read_log, path)


def test_a_log_of_the_old_format_is_refused():
    path = next(ROOT.glob("records/track_cpu/*lora-ttt/seed1337.txt"))
    line = refusal(run_log.read_log, path)
    assert "found 'started:2026-11-22" in line and "expected 'attempt:1'" in line


def test_the_same_tokens_have_the_same_bytes(tmp_path):
    """A loss that makes up for bytes left out keeps bits per byte consistent."""
    path = write_run(tmp_path)
    result = run_log.read_log(path).results[2]
    fewer = replace(result, bytes=TEXT - 5, val_bpb=result.val_bpb * TEXT / (TEXT - 5))
    edit(path, r'^result: .*"stride".*', f"result: {json.dumps(asdict(fewer))}")
    line = refusal(run_log.read_log, path)
    assert f"condition:stride bytes:{TEXT - 5}; expected {TEXT}" in line


# --- Logs of several attempts ---


@pytest.mark.parametrize("resumed", [500, 0])
def test_a_run_of_two_attempts_reads_as_one(tmp_path, resumed):
    path = write_run(tmp_path)
    whole = run_log.read_log(path)
    interrupt(path, resumed=resumed)
    edit(path, r"^(step:650/20000 train_loss:)\S+", r"\g<1>9.0", 1)  # replaced by the later one
    log = run_log.read_log(path)
    assert log.attempts == 2 and log.command.startswith("RESUME=auto ")
    assert log.training == whole.training and log.validation == whole.validation
    assert log.results == whole.results and log.sizes == whole.sizes


def test_points_beyond_the_checkpoint_are_dropped(tmp_path):
    """Also those that the later attempt does not print again."""
    path = interrupt(write_run(tmp_path))
    for step in (500, 550):
        line = f"step:{step}/20000 val_loss:3.0 val_bpb:2.0 train_time:1ms step_avg:1ms"
        edit(path, rf"^(step:{step}/.*)$", rf"\1\n{line}", 1)
    edit(path, r"^(resume:.*\n)(step:.*\n)*?(?=step:1200)", r"\1")
    log = run_log.read_log(path)
    assert [point.step for point in log.training if point.step > 400] == [450, 500, 1200]
    assert [point.step for point in log.validation] == [500, 1207]


def test_attempts_that_did_not_come_far_are_passed_over(tmp_path):
    """The first one failed when it had printed its start, the second was stopped in training."""
    path = interrupt(write_run(tmp_path))
    edit(path, r"^attempt:2", "stopped by SIGTERM: after step 700\nattempt:3")
    edit(path, r"^attempt:1", "attempt:1\nstarted:2026-11-28T16:00:00Z\nerror: x\nattempt:2")
    assert run_log.read_log(path).attempts == 3


DISAGREE = {
    "setting": (r"^(config:.*SEED)=1337", r"\1=9", "found SEED 9; expected 1337, as in attempt:2"),
    "command": (r"^command: ", "command: COMPILE=0 ", "found 'command: ' COMPILE=0 "),
    "hardware": (r"^hardware: AMD", "hardware: Intel", "found 'hardware: ' Intel"),
    "ranks": (r"world_size:2", "world_size:4", "found 'preset:' cpu device:cpu world_size:4"),
    "tokenizer": (r"^(sha256 tokenizer:)a", r"\1b", "found 'sha256 tokenizer:' b"),
    "shard": (r"^(sha256 val:)b", r"\1a", "found sha256 of fineweb_val_000000.bin a"),
    "script": (r"^sha256 script:.*", "sha256 script:x", "found 'sha256 script:x'"),
    "number": (r"^attempt:1", "attempt:7", "found 'attempt:7'; expected 'attempt:1'"),
}


@pytest.mark.parametrize("case", DISAGREE)
def test_attempts_at_different_runs_are_refused(tmp_path, case):
    path = interrupt(write_run(tmp_path))
    pattern, new, message = DISAGREE[case]
    edit(path, pattern, new, 1)
    line = refusal(run_log.read_log, path)
    assert line.startswith(f"{path}: attempt:1: ") and message in line


def test_a_later_attempt_says_where_it_went_on(tmp_path):
    path = interrupt(write_run(tmp_path))
    edit(path, "^resume:.*", "resume:somewhere")
    assert "'resume:somewhere'; expected" in refusal(run_log.read_log, path)
    edit(path, "^resume:.*\n", "")
    assert "lines 'step:' but none 'resume:'" in refusal(run_log.read_log, path)


# --- Statistics ---


def test_statistics_of_the_published_runs():
    command = [sys.executable, ROOT / "records/stats.py", "--threshold", "1.195"]
    values = ["1.1927", "1.1935", "1.1921", "1.1929"]
    done = subprocess.run([*command, *values], capture_output=True, text=True)
    assert done.stdout == "n:4 mean:1.1928 std:0.0005 threshold:1.195 p_value:0.00234486\n"
    assert not done.stderr


@pytest.mark.filterwarnings("error")
def test_equal_scores_have_a_p_value():
    assert stats.summarize([1.1, 1.1, 1.1], 1.2) == stats.Summary(3, 1.1, 0.0, 1.2, 0.0)
    assert stats.summarize([1.1, 1.1], 1.1).p_value == 1.0


@pytest.mark.parametrize("values", [["1.1"], ["1.1", "nan"], ["1.1", "inf"]])
def test_statistics_refuse_in_one_line(capsys, values):
    assert stats.main([*values, "--threshold", "1.2"]) == 1
    assert re.fullmatch(r"error: found .*; expected .*\n", capsys.readouterr().err)


# --- Pictures ---


def assert_pictures(folder, *names):
    """The folder's PNG files are these, of a size for people, with something on them."""
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(names)
    for name in names:
        image = matplotlib.image.imread(folder / name)
        assert image.shape[1] == 1280 and 300 < image.shape[0] < 1280 and image.std() > 0.05


def run_plot(log, out, scores=None):
    scores = scores or log.with_name(log.name.replace("run", "scores")).with_suffix(".csv")
    return plot.main([str(scores), str(log), "--out", str(out)])


@pytest.mark.parametrize("conditions", [("flat",), ("ttt", "new", "doc")])
def test_plot_draws_any_conditions_of_a_short_run(tmp_path, conditions):
    path = write_run(tmp_path, conditions=conditions, MAX_VAL_DOCS="6")
    edit(path, r"^(?!result: )(.+)$", r"\1 partial")
    log = run_log.read_log(path)
    assert log.partial and tuple(result.condition for result in log.results) == conditions
    assert run_plot(path, tmp_path / "out") == 0
    assert_pictures(tmp_path / "out", "ladder.png", "position.png", "training.png")


def test_plot_draws_an_evaluation_without_training(tmp_path):
    log = write_run(tmp_path, EVAL_ONLY="1", MODEL_PATH="final_model.int8.ptz")
    edit(log, r"^(step:|stopping|Serialized).*\n", "")
    scores = tmp_path / "scores1337.csv"
    command = [sys.executable, ROOT / "records/plot.py", scores, log, "--out", tmp_path / "out"]
    assert subprocess.run(command).returncode == 0
    assert_pictures(tmp_path / "out", "ladder.png", "position.png")


OTHER_SCORES = {
    "tokens": (r"^doc,0,0,0,90,", "doc,0,0,0,91,", "condition:doc tokens:16091"),
    "bytes": (r"^ttt,0,0,0,90,225,", "ttt,0,0,0,90,226,", "condition:ttt"),
    "nats": (r"^(stride,0,0,0,90,225,2\d\d)\..*", r"\g<1>.999", "condition:stride"),
    "condition": (r"^ttt,.*\n", "", "conditions ['flat', 'doc', 'stride']"),
    "header": (r"^condition,", "what,", "the header 'what,doc"),
    "number": (r"^doc,0,0,0,90,", "doc,0,0,0,many,", "many"),
}


@pytest.mark.parametrize("case", OTHER_SCORES)
def test_plot_refuses_the_scores_of_another_run(runs, tmp_path, capsys, case):
    pattern, new, message = OTHER_SCORES[case]
    text = runs[1].with_name("scores1337.csv").read_text()
    text, count = re.subn(pattern, new, text, flags=re.MULTILINE)
    assert count
    scores = tmp_path / "scores.csv"
    scores.write_text(text)
    assert run_plot(runs[1], tmp_path / "out", scores) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {scores}: found ") and err.count("\n") == 1
    assert message in err and not (tmp_path / "out").exists()


def test_plot_names_a_file_that_is_missing(runs, tmp_path, capsys):
    assert run_plot(runs[0], tmp_path, tmp_path / "no.csv") == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'no.csv'}: No such file")


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "b.png").mkdir()
    with pytest.raises(OSError):
        plot.write_pictures({"b.png": b"x"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]


def score_rows(*rows):
    return np.array([("doc", *row) for row in rows], dtype=plot.COLUMNS)


def test_positions_divide_sums_by_sums():
    """Two chunks of different density at one place, a shorter one behind, and bins without text."""
    two = (0, 0, 0, 100, 200, 80.0), (1, 0, 0, 100, 400, 100.0)
    rows = score_rows(*two, (1, 1, 100, 50, 100, 30.0))
    position, bits = plot.bits_by_position(rows, np.array([0, 50, 100, 200]))
    assert bits * math.log(2) == pytest.approx([180 / 600, 30 / 100])
    assert position == pytest.approx([50, 125])
    position, _ = plot.bits_by_position(rows, np.array([0]))
    assert position == pytest.approx((600 * 50 + 100 * 125) / 700)


def test_bins_of_positions_hold_enough_text_and_lose_none(rows):
    edges = plot.position_edges(rows)
    held = np.histogram(rows["start"], [*edges, 10**9], weights=rows["bytes"])[0]
    assert sum(held) == rows["bytes"].sum() and len(held) > 8
    assert min(held) >= plot.LEAST_SHARE * sum(held)
    bits = plot.bits_by_position(rows, edges)[1]
    assert np.dot(bits, held) * math.log(2) == pytest.approx(rows["loss_nats"].sum())


def test_too_little_text_at_the_end_joins_the_bin_before():
    rows = score_rows((0, 0, 0, 100, 500, 1.0), (0, 1, 100, 100, 480, 1.0), (0, 2, 200, 4, 20, 1.0))
    assert plot.position_edges(rows).tolist() == [0, 100]


def test_text_before_the_first_document_has_no_position(runs, log, rows):
    every = plot.read_scores(runs[1].with_name("scores1337.csv"), log)
    line = plot.position_figure(every, log).axes[0].lines[0]
    flat = rows[rows["condition"] == "flat"]
    expected = plot.bits_by_position(flat, plot.position_edges(rows))
    assert np.array_equal(line.get_xydata(), np.transpose(expected))


def test_a_running_mean_looks_no_further_than_half_way_to_the_start():
    steps, losses = np.array([1.0, 2, 3, 4, 100]), np.array([8.0, 6, 4, 2, 1])
    # The fourth sees steps 2 to 6, and in a shorter run 3 to 5.
    assert plot.running_mean(steps, losses, 1000) == pytest.approx([8, 6, 4, 4, 1])
    assert plot.running_mean(steps, losses, 10) == pytest.approx([8, 6, 4, 3, 1])


# --- Records ---


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in ROOT.glob("records/*/*/*")}), ids=str
)
def test_every_record_agrees_with_its_logs(folder):
    make_record.verify(folder)


def test_a_record_holds_what_checks_its_number(runs, record):
    make_record.verify(record)
    assert not list(record.parent.parent.glob(".*"))
    assert_pictures(record, "ladder.png", "position.png", "training.png")
    logs = [run_log.read_log(path) for path in sorted(runs)]
    summary = stats.summarize([log.score.val_bpb for log in logs], 1.6)
    facts = json.loads((record / "submission.json").read_text())
    expected = {
        "name": "try-1",
        "date": "2026-11-28",
        "track": "track_cpu",
        "condition": "ttt",
        "val_bpb": round(summary.mean, 6),
        "bytes_total": 1441734 + 1339 + CODE,
    }
    assert facts | expected == facts
    assert facts["statistics"]["p_value"] == pytest.approx(summary.p_value, rel=1e-5)
    seeds = [(seed["seed"], seed["steps"]) for seed in facts["seeds"]]
    assert seeds == [(1337, 1207), (1338, 1208), (1339, 1209)]
    readme = (record / "README.md").read_text()
    texts = [f"**{summary.mean:.4f}**", "| 1.1910 | -0.0368 |", "demo corpus on a CPU"]
    for text in [*texts, *(log.command for log in logs)]:
        assert text in readme


def test_a_record_of_a_resumed_run_that_read_its_data_elsewhere(
    runs, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(make_record, "RECORDS", tmp_path)
    paths = dict(DATA_PATH="/mnt/data/demo", TOKENIZER_PATH="/mnt/tokenizer.model")
    logs = [str(runs[0]), str(interrupt(write_run(tmp_path, 5, **paths)))]
    assert make_record.main(["--name", "x", "--threshold", "1.6", "--logs", *logs]) == 0
    folder = tmp_path / "track_cpu" / "2026-11-28_x"
    assert capsys.readouterr().out == f"record:{folder}\n"
    make_record.verify(folder)
    assert "| [5](seed5.txt) | 2026-11-28T16:03:11Z | 2 |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("change", ["missing", "edited"])
def test_a_record_without_its_scores_file_shows_no_positions(tmp_path, change):
    runs = [write_run(tmp_path, seed) for seed in (10, 9)]
    scores = tmp_path / "scores9.csv"
    scores.unlink() if change == "missing" else scores.write_text("condition\n")
    folder = make_record.make_record("x", 1.6, runs, tmp_path)
    assert_pictures(folder, "ladder.png", "training.png")
    make_record.verify(folder)


TAMPERED = {
    "log": ("seed1338.txt", r"train_loss:(\d)\.", r"train_loss:1\1."),
    "result": ("seed1338.txt", r'"val_loss": \d', '"val_loss": 1'),
    "readme": ("README.md", r"\*\*1\.", "**0."),
    "submission": ("submission.json", r'"val_bpb": 1', '"val_bpb": 0'),
    "threshold": ("submission.json", r'"threshold": 1\.6', '"threshold": 1.7'),
    "name": ("submission.json", "try-1", "try-2"),
    "script": ("train_gpt.py", "import math", "import cmath"),
}


OLD = ROOT / "records/track_cpu" / make_record.OLD_RECORDS[0]


@pytest.fixture
def copies(record, tmp_path):
    """Copies of a new and of an old record, by whether it is old."""
    return {
        old: shutil.copytree(folder, tmp_path / folder.parent.name / folder.name)
        for old, folder in ((False, record), (True, OLD))
    }


@pytest.mark.parametrize(
    ("case", "old"), [*((case, False) for case in TAMPERED), ("log", True), ("script", True)]
)
def test_a_record_that_was_tampered_with_is_refused(copies, case, old):
    folder = copies[old]
    make_record.verify(folder)
    name, pattern, new = TAMPERED[case]
    text, count = re.subn(pattern, new, (folder / name).read_text(), count=1)
    assert count
    (folder / name).write_text(text)
    assert str(folder) in refusal(make_record.verify, folder)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", ["ladder.png", "seed1339.txt", "notes.md", "other.png"])
def test_a_record_with_files_too_many_or_too_few_is_refused(copies, name, old):
    path = copies[old] / name
    path.unlink() if path.exists() else path.write_text("x")
    assert f"{copies[old]}: found the files " in refusal(make_record.verify, copies[old])


def test_a_record_in_another_place_is_refused(record, tmp_path):
    folder = shutil.copytree(record, tmp_path / "track_10min_16mb" / record.name)
    assert "expected the folder track_cpu/2026-11-28_try-1" in refusal(make_record.verify, folder)


NAME = "8 x NVIDIA H100 80GB HBM3, CUDA 12.8"
H100 = dict(preset="baseline", device="cuda:0", world_size=8, hardware=NAME, cap=600)
TRACK = {
    "track_cpu": [{}, dict(data="/mnt/data/demo/")],
    "track_10min_16mb": [H100],
    "track_non_record_16mb": [
        dict(data="/mnt/mydata/demo"),
        dict(device="cuda:0"),
        dict(preset="baseline"),
        H100 | dict(cap=601),
        H100 | dict(cap=0),
        H100 | dict(world_size=1),
        H100 | dict(device="cpu"),
        H100 | dict(preset="cpu"),
        H100 | dict(hardware=NAME.replace("H100", "A100")),
        H100 | dict(hardware=NAME.replace("8 x", "4 x")),
    ],
}


@pytest.mark.parametrize("track", TRACK)
def test_the_track_follows_from_the_log(log, track):
    for case in TRACK[track]:
        facts = dict(case)
        data = facts.pop("data", "data/demo")
        cap = str(facts.pop("cap", 175))
        config = log.config | {"DATA_PATH": data, "MAX_WALLCLOCK_SECONDS": cap}
        assert make_record.track_of(replace(log, config=config, **facts)) == track, case


def test_the_date_is_that_of_the_last_start(log):
    later = replace(log, started="2026-11-29T00:00:01Z")
    assert make_record.date_of([log, later, log]) == "2026-11-29"


SHORT = run_log.Result("flat", 3.0, 2.0, 6, 1, 1, 1.0, False)
LATE = run_log.Point(10, 3.0, 1450)
NO_RECORD = {
    "a partial run": dict(partial=True),
    "nothing trained": dict(sizes=None),
    "10 as the first step": dict(training=(LATE,)),
    "None as the first step": dict(training=()),
    "no line 'audit causality:' for condition:ttt": dict(causal=("doc",)),
    "17000000 bytes of a budget of 16000000": dict(sizes=run_log.Sizes(1, 1, 17000000, 16000000)),
    "5 bytes of a budget of 16000001": dict(sizes=run_log.Sizes(1, 1, 5, 16000001)),
    "script x; expected": dict(script_hash="x"),
    "tokenizer x; expected": dict(tokenizer_hash="x"),
    "validation shards {}; expected": dict(val_hashes={}),
    "hardware x; expected AMD EPYC": dict(hardware="x"),
    "versions x; expected": dict(versions="x"),
    "world_size 4; expected 2": dict(world_size=4),
    "dtype torch.float32; expected": dict(dtype="torch.float32"),
    "(tokens, bytes) of condition:doc None": dict(results=(SHORT,), causal=("flat",)),
}
NO_SETTINGS = {
    "MODEL_PATH=first.pt": dict(MODEL_PATH="first.pt"),
    "ITERATIONS 5; expected 20000": dict(ITERATIONS="5"),
    "NEW 1; expected None": dict(NEW="1"),
    "track track_non_record_16mb; expected": dict(DATA_PATH="/mnt/shards"),
    "SEED=1337 again": dict(SEED="1337"),
}


@pytest.mark.parametrize("message", [*NO_RECORD, *NO_SETTINGS])
def test_runs_that_are_no_record_are_refused(runs, log, message):
    odd = run_log.read_log(runs[2])
    config = odd.config | NO_SETTINGS.get(message, {})
    odd = replace(odd, config=config, **NO_RECORD.get(message, {}))
    line = refusal(make_record.check_runs, [log, odd])
    assert line.startswith(f"{runs[2]}: found {message}") and "; expected " in line


def test_one_partial_result_makes_a_run_partial(tmp_path):
    path = write_run(tmp_path)
    edit(path, r'("doc".*"partial": )false', r"\1true")
    assert run_log.read_log(path).partial


@pytest.fixture
def refuse(capsys, monkeypatch, tmp_path):
    """Returns the line with which the command refuses to make a record; nothing is written."""

    def run(logs, name="x", threshold="1.6", records=tmp_path):
        monkeypatch.setattr(make_record, "RECORDS", records)
        before = sorted(records.rglob("*"))
        arguments = ["--name", name, "--threshold", threshold, "--logs", *map(str, logs)]
        assert make_record.main(arguments) == 1
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: ") and err.count("\n") == 1
        assert sorted(records.rglob("*")) == before
        return err

    return run


def test_an_artifact_over_the_budget_is_drawn(tmp_path):
    path = write_run(tmp_path)
    edit(path, r"^(Serialized model int8\+zlib: )\d+", rf"\g<1>{16_000_001 - CODE}")
    line = "submission_size:16000001 budget:16000000 headroom:-1 FAIL"
    edit(path, r"^submission_size:.*", line)
    assert plot.draw([run_log.read_log(path)], None).keys() == {"ladder.png", "training.png"}


def ladder_rows(log, *ladders):
    """The lines of the ladder's table for runs with these (condition, val_loss, val_bpb)."""
    results = [[run_log.Result(*scores, 1, 1, 1, 1.0, False) for scores in one] for one in ladders]
    return make_record.ladder_table([replace(log, results=one) for one in results]).split("\n")


def test_the_ladder_in_a_readme(log):
    table = ladder_rows(
        log,
        [("flat", 2.7, 1.61), ("ttt", 2.5, 1.54), ("new", 2.4, 1.5)],
        [("flat", 2.8, 1.63), ("ttt", 2.6, 1.56), ("new", 2.4, 1.5)],
    )
    head = "| condition | val_loss | val_bpb | delta | std | seed 1337 | seed 1337 "
    assert table[0] == head + "| published | published delta |"
    ttt = "| ttt (+ LoRA test-time training) | 2.5500 | **1.5500** | -0.0700 | 0.0100 "
    assert table[3] == ttt + "| 1.5400 | 1.5600 | 1.1910 | -0.0368 |"
    assert table[4] == "| new | 2.4000 | **1.5000** | -0.1200 | 0.0000 | 1.5000 | 1.5000 |  |  |"


@pytest.mark.parametrize(("start", "delta"), [("doc", "-0.0258"), ("new", "")])
def test_published_deltas_start_where_ours_do(log, start, delta):
    table = ladder_rows(log, [(start, 2.7, 1.6), ("ttt", 2.5, 1.54)])
    assert table[3].endswith(f"| 1.1910 | {delta} |")


WRONG = [
    (dict(name="a/b"), 3, "--name: found 'a/b'"),
    (dict(name="x\n"), 3, "--name: found 'x\\n'"),
    (dict(threshold="nan"), 3, "found nan"),
    ({}, 1, "found 1 value"),
]


@pytest.mark.parametrize(("arguments", "count", "message"), WRONG)
def test_wrong_arguments_are_refused(runs, refuse, arguments, count, message):
    assert message in refuse(runs[:count], **arguments)


def test_a_record_is_never_replaced(runs, record, refuse):
    line = refuse(runs, name="try-1", records=record.parent.parent)
    assert f"{record}: found an earlier record" in line


def test_a_log_that_is_missing_is_named(runs, tmp_path, refuse):
    assert f"{tmp_path / 'no.txt'}: No such file" in refuse([runs[0], tmp_path / "no.txt"])


# --- The program's own logs ---


def test_real_runs_become_a_record(tmp_path):
    """Two tiny trainings, and what the tools make of what they wrote."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "fineweb_train_000000.bin").symlink_to(CONFORMANCE / "fineweb_train_000000.bin")
    tokens = tg.open_shard(CONFORMANCE / "fineweb_val_000000.bin")[:4000]
    write_shard(data / "fineweb_val_000000.bin", tokens)
    settings = dict(EVAL="flat,doc,stride,ttt", SCORES_PATH="scores.csv", ITERATIONS="3")
    settings |= dict(MAX_VAL_DOCS=None, DATA_PATH=str(data))
    paths = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        out.mkdir()
        done = run_script(out, SEED=seed, **settings)
        assert not done.returncode, done.stderr
        paths.append(out / "logs" / "test.txt")
    rows = plot.read_scores(tmp_path / "1" / "scores.csv", run_log.read_log(paths[0]))
    assert not (rows["start"] % 64).any() and rows["tokens"].max() == 64
    folder = make_record.make_record("tiny", 5.0, paths, tmp_path)
    make_record.verify(folder)
    assert folder.parent.name == "track_non_record_16mb" and (folder / "position.png").exists()


def test_a_real_short_run_is_read(tmp_path):
    """Some documents are left out, and nothing was trained."""
    done = run_script(tmp_path, EVAL="ttt,flat", SCORES_PATH="scores.csv", **EVAL_ARTIFACT)
    assert not done.returncode, done.stderr
    log = run_log.read_log(tmp_path / "logs" / "test.txt")
    assert log.partial and not log.validation and log.sizes is None
    plot.draw([log], plot.read_scores(tmp_path / "scores.csv", log))
