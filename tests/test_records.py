"""The records tools: what they read, draw and write, and that they refuse what cannot be trusted.

The logs are those of two tiny trainings. A table of faults has one on a line: what to find in a
log, what to put there, and a part of the refusal.
"""

import math
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import make_record
import matplotlib.image
import numpy as np
import plot
import pytest
import run_log
import stats
from conftest import CONFORMANCE, EVAL_ARTIFACT, ROOT, run_forked, write_shard
from scores import COLUMNS

import train_gpt as tg

RULE = "=" * 100
TRAIN = "fineweb_train_000000.bin"
VAL = "fineweb_val_000000.bin"
RESUME = "resume:out/x.pt step:5/12 train_time:9ms"
OLD = ROOT / "records/track_cpu" / make_record.OLD_RECORDS[0]


def lines(text):
    return text.strip("\n").split("\n")


def edit(path, fault, count=0):
    """Put one fault into a file, into a log below its head; ^ and $ are those of a line.

    fault: what to find => what to put there, and maybe => a message. Returns the message.
    """
    pattern, new, *message = fault.split(" => ")
    head, rule, body = path.read_text(encoding="utf-8").rpartition(RULE)
    body, changed = re.subn(pattern, new, body, count=count, flags=re.MULTILINE)
    assert changed, f"nothing to edit: {pattern}"
    path.write_text(head + rule + body, encoding="utf-8")
    return "".join(message)


def interrupt(path, resume=RESUME):
    """Make a log that of a run which was killed after step 8 and went on after step 5."""
    head, rule, body = path.read_text(encoding="utf-8").rpartition(RULE)
    opening = body.partition("step:1/")[0]
    killed = body.partition("step:9/")[0]
    again = body.partition("step:6/")[2]
    second = opening.lstrip().replace("attempt:1", "attempt:2")
    second = second.replace("RESUME=''", "RESUME=auto").replace("RUN_ID=test", "RUN_ID=x")
    path.write_text(f"{head}{rule}{killed}{second}{resume}\nstep:6/{again}", encoding="utf-8")


def raise_limit(copy):
    """Make a log that of a run whose ITERATIONS were raised when it was resumed."""
    interrupt(copy, f"resume: ITERATIONS was 9, now 12\n{RESUME}")
    edit(copy, "ITERATIONS=12 => ITERATIONS=9", 2)


def refusal(call, *arguments):
    """The one line with which a call refuses."""
    with pytest.raises(ValueError) as error:
        call(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Logs of two seeds, with what the program wrote beside them; nobody changes them."""
    base = tmp_path_factory.mktemp("runs")
    data = base / "my own/data/demo"
    data.mkdir(parents=True)
    (data / TRAIN).symlink_to(CONFORMANCE / TRAIN)
    tokens = tg.open_shard(CONFORMANCE / "fineweb_val_000000.bin")
    write_shard(data / VAL, tokens[20:4000])  # begins inside a document
    settings = dict(PRESET="cpu", DATA_PATH=str(data), MAX_VAL_DOCS=None, SCORES_PATH="scores.csv")
    settings |= dict(ITERATIONS="12", TRAIN_LOG_EVERY="1", EVAL="flat,doc,stride,ttt")
    for seed in ("1338", "1337"):
        done = run_forked(base / seed, SEED=seed, **settings)
        assert not done.returncode, done.stderr
    return [base / "1338/logs/test.txt", base / "1337/logs/test.txt"]


@pytest.fixture(scope="module")
def log(runs):
    """The second of these logs as it is read."""
    return run_log.read_log(runs[1])


@pytest.fixture
def copy(runs, tmp_path):
    """A copy of the second log, to be changed."""
    return Path(shutil.copy(runs[1], tmp_path / "run.txt"))


@pytest.fixture(scope="module")
def record(runs, tmp_path_factory):
    """A record of both; nobody changes it."""
    return make_record.make_record("try-1", 5.0, runs, tmp_path_factory.mktemp("records"))


@pytest.fixture
def mine(record, tmp_path):
    """A copy of the record, to be changed."""
    return shutil.copytree(record, tmp_path / record.parent.name / record.name)


# --- Logs ---


WRITTEN = """
started:{started}
command: {command}
versions: {versions}
hardware: {hardware}
preset:{preset} device:{device} world_size:{world_size} dtype:{dtype}
sha256 script:{script_hash}
sha256 tokenizer:{tokenizer_hash}
sha256 val:{val_hashes[fineweb_val_000000.bin]} fineweb_val_000000.bin
sha256 artifact:{artifact_hash} final_model.int8.ptz
step:10/12 train_loss:{training[9].loss:.4f} train_time:{training[9].milliseconds}ms
step:12/12 val_loss:{validation[0].loss:.4f} val_bpb
 train_time:{validation[0].milliseconds}ms step_avg
int8+zlib: {sizes.model} bytes
Code size: {sizes.code} bytes
submission_size:{sizes.total} budget:{sizes.budget}
"""


def test_a_log_says_what_was_written(log):
    """What is read stands in the text; test_a_record_holds_... finds the scores file."""
    assert log.source == tg.source_code().decode()
    assert [point.step for point in log.training] == [*range(1, 13)]
    text = log.path.read_text()
    for expected in lines(WRITTEN.format_map(vars(log))):
        assert expected in text


UNUSUAL = r"""
^command: (.*)python => command: GRAD_ACCUM_STEPS=0 \1torchrun --standalone --nproc_per_node=2
world_size:1 => world_size:2
(config:.*CLOCK_SECONDS)=0.0 => \1=1e-05
(command:.*CLOCK_SECONDS)=0 => \1=0.00001
^(command:.*PRESET)=cpu => \1=auto
^(command:.*DEVICE)=cpu => \1=auto
 ITERATIONS=12 =>  ITERATIONS=20
^Serialized model: => stopping_early: cap train_time:9ms step:12/20\n
"""


def test_what_the_program_may_print_is_read(copy, log):
    for change in lines(UNUSUAL):
        edit(copy, change)
    edit(copy, f"budget:.* => budget:{log.sizes.total - 1} headroom:-1 FAIL")
    assert run_log.read_log(copy).config["MAX_WALLCLOCK_SECONDS"] == "1e-05"


UNTRUSTWORTHY = r"""
^sha256 script:.* => sha256 script:x => of the source at the head
^started:.*\n =>  => 0 lines 'started:'
^sha256 val:.*\n =>  => one for each validation shard
^(sha256 val:.*\n) => \1\1 => two hashes of fineweb_val_000000.bin
(config:.*demo)' => \1 => quoted as for a shell
(config:.*) SEED=1337 => \1 SEED=x => found SEED=x in the line
^(command:.*) SEED=1337 => \1 SEED=9 => found SEED=9; expected SEED=1337
^(command:.*) train_gpt.py => \1 other.py => train_gpt
world_size:1 => world_size:8 => found world_size:8; expected the ranks
device:cpu => device:cuda:0 => DEVICE=cuda; expected DEVICE=cpu
^step:.*val_bpb.*\n =>  => val_loss after no step; expected the last
^step:12(/12 val_) => step:11\1 => val_loss after 11
^Serialized model: => stopping_early: x step:7/12\n => after step 7, where training ended
^(step:5/.*\n)(step:6/.*\n) => \2\1 => expected steps that rise
^result: .*"doc".*\n =>  => results of 'flat,stride,ttt'; expected one for each
(config:.*EVAL=)flat,doc => \1doc,flat => 'doc,flat,stride,ttt', in that order
^(result: .*)}$ => \1 => a JSON object with the keys condition, val_loss,
("tokens": \d+) => \1.0 => tokens of the type int
("val_loss": )[^,]+ => \1NaN => a finite val_loss
("val_bpb": )[^,]+ => \g<1>1.5 => val_bpb:1.5; expected
("bytes": )\d+ => \g<1>0 => bytes above 0
("stride".*val_bpb": )(\d)\.(.*bytes": \d+) => \g<1>0.\2\g<3>0 => as under the other conditions of
^(audit bytes.*) PASS => \1 FAIL => PASS at its end
^(audit bytes.*text_bytes:)\d+ => \g<1>9 => as many bytes in the table
^audit coverage: condition:ttt.*\n =>  => 0 lines 'audit coverage: cond
(:ttt.*once:)\d+(.*bos:)\d+ => \g<1>3978\g<2>1 => found 'audit coverage: condition:ttt
(condition:ttt.* after_last_row:)\d+ => \g<1>9 => all other targets left out
^(Serialized model int8\+zlib:) \d+ => \1 5 => expected model 5 + source
^submission_size:\d+ => submission_size:5 => found submission_size:5;
^(submission_size.*) PASS => \1 FAIL => FAIL; expected headroom:
^Serialized model int8(.|\n)* => error: disk full => 'error: disk full'
^scores:.* => stopped by SIGTERM => 'stopped by SIGTERM'; expected
^step:9/(.|\n)* =>  => found results of ''; expected one for each
^attempt:1 => attempt:2 => found 'attempt:2'; expected 'attempt:1'
^total_eval_time:.* => total_eval_time:0.0s => at least the
^total_eval_time:.* => \g<0> limit:600s PASS => under the preset baseline alone
^(validation: .* documents, )\d+ => \g<1>9 => 3,980, one more than targets
^validation: not the => validation: => 'validation: ' and then
"""
DISAGREE = r"""
^(config:.*SEED)=1337 => \1=9 => found SEED 9; expected 1337, as in attempt:2
^command: => command: COMPILE=0 => found 'command: ' COMPILE=0
^hardware: .* => hardware: x => found 'hardware: ' x; expected
^versions: .* => versions: x => found 'versions: ' x; expected
world_size:1 => world_size:4 => found 'preset:' cpu device:cpu world_size:4
^(sha256 tokenizer:).* => \1b => found 'sha256 tokenizer:' b
^(sha256 val:)\w+ => \1a => found sha256 of fineweb_val_000000.bin a
^sha256 script:.* => sha256 script:x => found 'sha256 script:x'
"""
RAISED = r"""
^resume: .*\n =>  => ITERATIONS 9; expected 12
(config: .*ITERATIONS)=9 => \1=13 => ITERATIONS 13; expected 12
now 12 => now 13 => ITERATIONS 9; expected 12
(config: .*MATRIX_LR)=0.03 => \1=0.02 => MATRIX_LR 0.02; expected 0.03
"""


@pytest.mark.parametrize("fault", lines(UNTRUSTWORTHY + DISAGREE.lstrip() + RAISED.lstrip()))
def test_a_log_that_cannot_be_trusted_is_refused(copy, fault):
    if fault in DISAGREE:
        interrupt(copy)
    if fault in RAISED:
        raise_limit(copy)
    message = edit(copy, fault, 1)
    line = refusal(run_log.read_log, copy)
    assert line.startswith(f"{copy}: attempt:1: found ") and "; expected " in line
    assert message in line


def test_two_runs_in_one_log_and_no_log_are_refused(runs, copy):
    contents = {
        "found 4 lines of 100 '='": runs[0].read_bytes() + runs[1].read_bytes(),
        "not UTF-8": b"\xff",
        "expected 'attempt:1'": (OLD / "seed1337.txt").read_bytes(),
    }
    for message, content in contents.items():
        copy.write_bytes(content)
        assert message in refusal(run_log.read_log, copy)


# --- Logs of several attempts ---


@pytest.mark.parametrize(("resume", "start"), [(RESUME, 0), ("resume: found no checkpoint", 5)])
def test_a_run_of_two_attempts_reads_as_one(copy, log, resume, start):
    interrupt(copy, resume)
    edit(copy, r"^(step:7/12 train_loss:)\S+ => \g<1>9.0", 1)  # replaced by the later one
    found = run_log.read_log(copy)
    assert "RUN_ID=x" in found.command
    assert found.training == log.training[start:] and found.validation == log.validation
    assert found.results == log.results


def test_points_beyond_the_checkpoint_are_dropped(copy):
    """Also those that the later attempt does not print again."""
    interrupt(copy)
    edit(copy, r"^step:([57])/.* => \g<0>\nstep:\1/12 val_loss:3.0 train_time:1ms x", 2)
    edit(copy, r"^(resume:.*\n)(step:.*\n)*?(?=step:12/) => \1")
    log = run_log.read_log(copy)
    assert [point.step for point in log.training] == [1, 2, 3, 4, 5, 12]
    assert [point.step for point in log.validation] == [5, 12]


def test_attempts_that_did_not_come_far_are_passed_over(copy):
    """The first one failed when it had printed its start, the second was stopped in training."""
    interrupt(copy)
    edit(copy, r"^attempt:2 => stopped by SIGTERM: after step 8\nattempt:3")
    edit(copy, r"^attempt:1 => attempt:1\nstarted:2026-11-28T16:00:00Z\nerror: x\nattempt:2")
    assert run_log.read_log(copy).attempts == 3


def test_a_later_attempt_says_where_it_went_on(copy):
    interrupt(copy, "resume:somewhere")
    assert "'resume:somewhere'; expected" in refusal(run_log.read_log, copy)
    edit(copy, r"^resume:.*\n => ")
    assert "lines 'step:' but none 'resume:'" in refusal(run_log.read_log, copy)


# --- Statistics ---


def test_statistics_of_the_published_runs(monkeypatch, capsys):
    command = "stats.py --threshold 1.195 1.1927 1.1935 1.1921 1.1929"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(stats.__file__, run_name="__main__")
    expected = "n:4 mean:1.1928 std:0.0005 threshold:1.195 p_value:0.00234486\n"
    assert capsys.readouterr() == (expected, "")
    assert stats.main(["1.1", "inf", "--threshold", "1.2"]) == 1
    assert re.fullmatch(r"error: found inf; expected .*\n", capsys.readouterr().err)


@pytest.mark.filterwarnings("error")
def test_equal_scores_have_a_p_value():
    assert stats.summarize([1.1, 1.1], 1.2) == stats.Summary(2, 1.1, 0.0, 1.2, 0.0)
    assert stats.summarize([1.1, 1.1], 1.1).p_value == 1.0


# --- Pictures ---


def assert_pictures(folder, names="ladder position training"):
    """The folder's PNG files are these, with something on them."""
    paths = sorted(folder.glob("*.png"))
    assert [path.stem for path in paths] == names.split()
    for path in paths:
        assert matplotlib.image.imread(path).std() > 0.05


def test_plot_draws_a_partial_evaluation_without_training(tmp_path):
    run = run_forked(tmp_path, EVAL="ttt,flat", SCORES_PATH="scores.csv", **EVAL_ARTIFACT)
    assert not run.returncode, run.stderr
    path = tmp_path / "logs/test.txt"
    log = run_log.read_log(path)
    assert log.partial and log.sizes is None
    out = tmp_path / "new/out"
    assert plot.main([f"{tmp_path}/scores.csv", str(path), "--out", str(out)]) == 0
    assert_pictures(out, "ladder position")
    new = replace(log.score, condition="new")
    assert plot.draw([replace(log, results=[new])], None).keys() == {"ladder.png"}


OTHER_SCORES = r"""
^(doc,0,0,0,)\d+ => \g<1>9 => condition:doc tokens:
^(ttt,0,0,0,\d+),\d+ => \1,1 => condition:ttt tokens:
^(stride,0,0,0,.*),.* => \1,1.0 => condition:stride tokens:
^ttt,.*\n =>  => conditions ['flat', 'doc', 'stride']
^condition, => what, => the header 'what,doc
^(doc,0,0,0,)\d+ => \1many => many
"""


@pytest.mark.parametrize("fault", lines(OTHER_SCORES))
def test_plot_refuses_the_scores_of_another_run(log, tmp_path, fault):
    scores = Path(shutil.copy(log.scores[0], tmp_path))
    message = edit(scores, fault)
    line = refusal(plot.read_scores, scores, log)
    assert line.startswith(f"{scores}: found ") and message in line


def test_a_picture_that_cannot_be_written_leaves_nothing(log, tmp_path, capsys):
    (tmp_path / "ladder.png").mkdir()
    assert plot.main([log.scores[0], str(log.path), "--out", str(tmp_path)]) == 1
    assert re.fullmatch(r"error: .*ladder\.png.*; expected .*\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["ladder.png"]


def score_rows(text):
    return np.loadtxt(lines(text), dtype=COLUMNS)


def test_positions_divide_sums_by_sums():
    """Two chunks of different density at one place, a shorter one behind, and bins without text."""
    rows = score_rows("""
        doc 0 0  0 100 200  80
        doc 1 0  0  60 400 100
        doc 1 1 60  50 100  30""")
    position, bits = plot.bits_by_position(rows, np.array([0, 50, 60, 200]))
    assert bits * math.log(2) == pytest.approx([180 / 600, 30 / 100])
    assert position == pytest.approx([(200 * 50 + 400 * 30) / 600, 60 + 25])


def test_bins_of_positions_hold_enough_text():
    """Each has 8 % of all; too little at the end joins the bin before."""
    rows = score_rows("""
        doc 0 0   0 100 500 1
        doc 0 1 100 100  50 1
        doc 0 2 200 100  50 1
        doc 0 3 300 100 380 1
        doc 0 4 400   4  20 1""")
    assert plot.position_edges(rows).tolist() == [0, 100, 300]


def test_text_before_the_first_document_has_no_position(log):
    rows = plot.read_scores(Path(log.scores[0]), log)
    line = plot.position_figure(rows, log).axes[0].lines[0]
    rows = rows[rows["doc"] >= 0]
    edges = plot.position_edges(rows)
    flat = plot.bits_by_position(rows[rows["condition"] == "flat"], edges)
    assert np.array_equal(line.get_data(), flat)


def test_a_running_mean_looks_no_further_than_half_way_to_the_start():
    """Nor further than a tenth of the run, which is 3 steps here."""
    steps = np.array([1, 2, 4, 10, 12, 14])
    losses = np.array([8, 6, 4, 9, 3, 0])
    assert plot.running_mean(steps, losses, 30) == pytest.approx([8, 7, 5, 6, 4, 1.5])


# --- Records ---


@pytest.mark.parametrize("folder", sorted(ROOT.glob("records/track*/*")), ids=str)
def test_every_record_agrees_with_its_logs(folder):
    make_record.verify(folder)


def test_a_record_holds_what_checks_its_number(runs, record):
    make_record.verify(record)
    assert not list(record.parent.parent.glob(".*"))
    assert_pictures(record)
    logs = make_record.read_runs(runs)
    summary = stats.summarize([log.score.val_bpb for log in logs], 5.0)
    submission = (record / "submission.json").read_text()
    for text in (
        '"track": "track_cpu",\n  "condition": "ttt"',
        f'"val_bpb": {round(summary.mean, 6)},\n  "val_loss"',
        f'"p_value": {summary.p_value:.6g}',
        f'"bytes_total": {max(log.sizes.total for log in logs)},\n  "bytes_code"',
        '"seed": 1337,\n      "steps": 12',
    ):
        assert text in submission
    readme = (record / "README.md").read_text()
    gain = summary.mean - fmean(log.results[0].val_bpb for log in logs)
    for text in (
        " | std | seed 1337 | seed 1338 | published | published delta |",
        f" | **{summary.mean:.4f}** | {gain:+.4f} | ",
        "the ladder; below the threshold 5.0.",
        "demo corpus on a CPU",
        *(f"\n    {log.command}\n" for log in logs),
    ):
        assert text in readme


def test_a_record_of_a_resumed_run_that_read_its_data_elsewhere(
    runs, copy, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(make_record, "RECORDS", tmp_path)
    interrupt(copy)
    edit(copy, "my own/data => mnt/data")
    edit(copy, "^started:.* => started:2099-01-01T00:00:01Z")
    logs = [str(runs[0]), str(copy)]
    assert make_record.main(["--name", "x", "--threshold", "1.6", "--logs", *logs]) == 0
    folder = tmp_path / "track_cpu/2099-01-01_x"
    assert capsys.readouterr().out == f"record:{folder}\n"
    make_record.verify(folder)
    readme = (folder / "README.md").read_text()
    assert "| [1337](seed1337.txt) | 2099-01-01T00:00:01Z | 2 |" in readme


@pytest.mark.parametrize("scores", ["no.csv", __file__])
def test_a_record_without_its_scores_file_shows_no_positions(runs, copy, tmp_path, scores):
    edit(copy, f"^scores:.* sha256 => scores:{scores} sha256")
    folder = make_record.make_record("x", 1.6, [runs[0], copy], tmp_path)
    assert_pictures(folder, "ladder training")
    make_record.verify(folder)


TAMPERED = r"""
seed1338.txt | train_loss:(\d)\. => train_loss:1\1.
seed1338.txt | "val_loss": \d => "val_loss": 1
README.md | \*\*4\. => **0.
submission.json | "val_bpb": 4 => "val_bpb": 0
submission.json | "threshold": 5 => "threshold": 4
submission.json | try-1 => try-2
train_gpt.py | import math => import cmath
"""


@pytest.mark.parametrize("fault", lines(TAMPERED))
def test_a_record_that_was_tampered_with_is_refused(mine, fault):
    name, fault = fault.split(" | ")
    edit(mine / name, fault, 1)
    assert str(mine) in refusal(make_record.verify, mine)


@pytest.mark.parametrize("name", ["ladder.png", "seed1338.txt", "notes.md"])
def test_a_record_with_files_too_many_or_too_few_is_refused(mine, name):
    path = mine / name
    path.unlink() if path.exists() else path.write_text("x")
    assert f"{mine}: found the files " in refusal(make_record.verify, mine)


def test_an_old_record_is_checked_by_its_hashes(tmp_path):
    folder = shutil.copytree(OLD, tmp_path / OLD.name)
    edit(folder / "seed1337.txt", "train_loss => loss")
    assert "found sha256" in refusal(make_record.verify, folder)


def test_a_record_in_another_place_is_refused(record, tmp_path):
    folder = shutil.copytree(record, tmp_path / "track_10min_16mb" / record.name)
    assert f"expected the folder track_cpu/{record.name}" in refusal(make_record.verify, folder)


FACTS = "preset device ranks MAX_WALLCLOCK_SECONDS DATA_PATH hardware"
TRACKS = """
track_cpu             cpu      cpu    1 0   data/demo       AMD EPYC
track_cpu             cpu      cpu    1 0   /mnt/data/demo/ AMD EPYC
track_non_record_16mb cpu      cpu    1 0   /mnt/my/demo    AMD EPYC
track_non_record_16mb cpu      cuda:0 1 0   data/demo       AMD EPYC
track_non_record_16mb baseline cpu    1 0   data/demo       AMD EPYC
track_10min_16mb      baseline cuda:0 8 600 fineweb         8 x NVIDIA H100 80GB HBM3, CUDA 12.8
track_non_record_16mb baseline cuda:0 8 601 fineweb         8 x NVIDIA H100 80GB HBM3, CUDA 12.8
track_non_record_16mb baseline cuda:0 8 0   fineweb         8 x NVIDIA H100 80GB HBM3, CUDA 12.8
track_non_record_16mb baseline cuda:0 1 600 fineweb         8 x NVIDIA H100 80GB HBM3, CUDA 12.8
track_non_record_16mb baseline cpu    8 600 fineweb         8 x NVIDIA H100 80GB HBM3, CUDA 12.8
track_non_record_16mb cpu      cuda:0 8 600 fineweb         8 x NVIDIA H100 80GB HBM3, CUDA 12.8
track_non_record_16mb baseline cuda:0 8 600 fineweb         8 x NVIDIA A100 80GB HBM3, CUDA 12.8
track_non_record_16mb baseline cuda:0 8 600 fineweb         4 x NVIDIA H100 80GB HBM3, CUDA 12.8
"""


@pytest.mark.parametrize("case", lines(TRACKS))
def test_the_track_follows_from_the_log(case):
    track, *values = case.split(None, 6)
    config = dict(zip(FACTS.split(), values, strict=True))
    log = SimpleNamespace(config=config, world_size=int(config["ranks"]), **config)
    assert make_record.track_of(log) == track


NO_RECORD = r"""
("doc".*"partial": )false => \1true => a partial run
MAX_VAL_DOCS=0 => MAX_VAL_DOCS=9 => a partial run
EVAL_ONLY=0 => EVAL_ONLY=1 => nothing trained
^step:1/.*\n =>  => 2 as the first step
^step:.*train_loss.*\n =>  => None as the first step
^audit causality.*\n =>  => no line 'audit causality:' for condition:ttt
MODEL_PATH='' => MODEL_PATH=first.pt => MODEL_PATH=first.pt
^(sha256 tokenizer:).{4} => \g<1>0000 => tokenizer 0000
^(sha256 val:.*_)000 => \g<1>123 => validation shards {'fineweb_val_123
^hardware: .* => hardware: x => hardware x; expected
^versions: .* => versions: x => versions x; expected
^(command.*)python((.|\n)*size:)1 => \1torchrun --standalone --nproc_per_node=4\g<2>4 => world_size 4; expected 1
dtype:.* => dtype:x => dtype x; expected
^result: .*"doc".*\n|doc,(?=stride) =>  => (tokens, bytes) of condition:doc None
MATRIX_LR=0.03 => MATRIX_LR=0.04 => MATRIX_LR 0.04; expected 0.03
^config: => config: NEW=1 => NEW 1; expected None
 BETA1=0.9 =>  => BETA1 None; expected 0.9
my own/data => my own => track track_non_record_16mb; expected
SEED=1337 => SEED=1338 => SEED=1338 again
"""


@pytest.mark.parametrize("fault", lines(NO_RECORD))
def test_runs_that_are_no_record_are_refused(runs, copy, fault):
    message = edit(copy, fault)
    line = refusal(make_record.check_runs, [run_log.read_log(path) for path in (runs[0], copy)])
    assert line.startswith(f"{copy}: found {message}") and "; expected " in line


def test_artifacts_over_the_budget_and_other_scripts_are_no_record(log):
    for total, budget in (17_000_000, 16_000_000), (5, 16_000_001):
        odd = replace(log, sizes=run_log.Sizes(1, 1, total, budget))
        assert f"found {total} bytes" in refusal(make_record.check_run, odd)
    odd = replace(log, script_hash="x")
    assert "found script x; expected" in refusal(make_record.check_runs, [log, odd])


LADDER = """
ttt flat => ttt (+ LoRA test-time training) | 3.1000 | **1.5500** | -0.0700 | 0.0100 | 1.5400 |
ttt flat => 1.1910 | -0.0368;
ttt doc => 1.1910 | -0.0258;
ttt new => 1.1910 | ;
new flat => new | 3.1000 | **1.5500** | -0.0700 | 0.0100 | 1.5400 | 1.5600 |  | ;
"""


@pytest.mark.parametrize("case", lines(LADDER))
def test_rows_of_the_ladder(case):
    """Published deltas start where ours do, at the second condition of a case; ; ends a row."""
    conditions, expected = case.split(" => ")
    condition, start = conditions.split()
    results = [run_log.Result(condition, 2 * bpb, bpb, *[0] * 5) for bpb in (1.54, 1.56)]
    row = make_record.ladder_row(results, start, 1.62)
    assert expected in " | ".join(row) + ";"


def test_wrong_arguments_are_refused(runs, record):
    """Nothing is written."""
    records = record.parent.parent
    before = sorted(records.rglob("*"))
    make = make_record.make_record
    assert "--name: found 'a/b'" in refusal(make, "a/b", 5.0, runs, records)
    assert f"{record}: found an earlier record" in refusal(make, "try-1", 5.0, runs, records)
    assert "found 1 value" in refusal(make, "x", 5.0, runs[:1], records)
    assert "found SEED=1338 again" in refusal(make, "x", 5.0, runs[:1] * 2, records)
    assert sorted(records.rglob("*")) == before


# --- Rules of the game, and pictures ---


def test_a_raised_limit_is_read_but_makes_no_record(copy, log):
    raise_limit(copy)
    found = run_log.read_log(copy)
    assert found.training == log.training
    line = refusal(make_record.check_run, found)
    assert "attempts that differ in settings: ITERATIONS was 9, now 12; expected" in line


@pytest.mark.parametrize("spent", ["600.1s limit:600s PASS", "599.9s limit:600s FAIL"])
def test_a_wrong_verdict_on_time_is_refused(log, spent):
    attempt = run_log.Attempt(log.path, 1, [f"total_eval_time:{spent}"])
    line = refusal(run_log.read_eval_time, attempt, "baseline", log.results)
    assert "expected PASS for up to 600 s" in line


def test_the_ten_minute_track_demands_the_full_set_in_time(log):
    run = {"hardware": "8 x NVIDIA H100, CUDA", "device": "cuda:0", "world_size": 8}
    run |= {"preset": "baseline", "config": {**log.config, "MAX_WALLCLOCK_SECONDS": "600"}}
    game = replace(log, calibration_left=0.0, **run)
    assert "(3 documents, 3,980 tokens)'; expected full" in refusal(make_record.check_run, game)
    game = replace(game, validation_set=run_log.FULL_VALIDATION, eval_verdict="FAIL")
    assert "FAIL; expected PASS" in refusal(make_record.check_run, game)
    late = replace(game, calibration_left=-2.5)
    assert "read 2.5 s after the time limit" in refusal(make_record.check_run, late)
    make_record.check_run(replace(game, eval_verdict="PASS"))


def test_one_artifact_under_two_seeds_is_one_run(log):
    twin = replace(log, path=Path("twin"), config={**log.config, "SEED": "9"})
    assert "twin: found the artifact" in refusal(make_record.check_runs, [log, twin])


def test_every_line_has_its_name_inside_the_axes():
    axes = plot.Figure().add_axes((0, 0, 1, 1))
    plot.label_ends(axes, [(1, 0.98, "a", "red"), (1, 0.99, "b", "red"), (1, 0.1, "c", "red")])
    heights = {text.get_text(): text.xy[1] for text in axes.texts}
    assert heights == pytest.approx({"a": 0.945, "b": 1, "c": 0.1})
