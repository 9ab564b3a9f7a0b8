"""What a run survives: kills, signals, full disks, lost ranks. Whole runs, each hit and started again.

Most runs are forked from a process that has made the imports (`fork_ranks`). Their hooks hit them at
an exact step or write, so that no test waits for a moment. Others are started as users start them.
"""

import os
import random
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import CONFORMANCE, TINY_RUN, fork_ranks, invocation

import train_gpt as tg

LONG = 300  # seconds that nothing here takes, on a slow machine either

RUN = TINY_RUN | {
    "RUN_ID": "test",
    "NUM_LAYERS": "2",
    "ITERATIONS": "20",
    "TRAIN_BATCH_TOKENS": "256",
    "GRAD_ACCUM_STEPS": "2",
    "TRAIN_LOG_EVERY": "1",
    "CHECKPOINT_EVERY": "5",
    "DTYPE": "float32",
    "EVAL": "flat",
    "SCORES_PATH": "scores.csv",
}
AUTO = {"RESUME": "auto"}
TWO = {"ranks": 2, "GRAD_ACCUM_STEPS": "1"}  # the same tokens in the same order as one rank
WEIGHTS = "final_model.pt"
ARTIFACT = "final_model.int8.ptz"
RESULTS = (WEIGHTS, ARTIFACT, "scores.csv")

# ---- Programs and what hits them -----------------------------------------------------------------

HIT = "os.kill(os.getpid(), signal.SIGTERM)"
TEAR = "os.ftruncate(number, 1000), os.kill(os.getpid(), signal.SIGKILL)"
LATER = "os.system(f'(sleep {delay}; kill -KILL {{os.getpid()}}) &')"


def at_step(step, action):
    """A hook: run `action` at the end of this training step, which is 2 or more."""
    return f"""
def hooked_step(self, train_step=tg.Trainer.train_step):
    loss = train_step(self)
    if self.step == {step}:
        {action}
    return loss
tg.Trainer.train_step = hooked_step
"""


def at_write(name, action):
    """A hook: run `action` when a file of this name has been written, but not renamed."""
    return f"""
def hooked_fsync(number, fsync=os.fsync):
    if "{name}" in os.readlink(f"/proc/self/fd/{{number}}"):
        {action}
    fsync(number)
os.fsync = hooked_fsync
"""


def at_call(function, action):
    """A hook: run `action` before this function of the script."""
    return f"""
original = {function}
def hooked(*arguments, **named):
    {action}
    return original(*arguments, **named)
{function} = hooked
"""


def limit(size):
    """An action: from now on no write may make a file larger than this, as if the disk was full."""
    return f"(r := __import__('resource')).setrlimit(r.RLIMIT_FSIZE, ({size}, -1))"


class Program:
    """The program as one forked process, or as several ranks, all gone after the `with` block."""

    def __init__(self, out, ranks=1, hook="", **settings):
        _, env = invocation(out, **RUN | settings)
        self.folder = out
        self.ranks = fork_ranks(ranks, out, env, hook)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process, _, _ in self.ranks:
            process.kill()
            process.join(LONG)

    @property
    def out(self):
        """What rank 0 has printed so far."""
        return self.ranks[0][1].read_text()

    @property
    def err(self):
        """The errors of all ranks so far."""
        return "".join(path.read_text() for _, _, path in self.ranks)

    @property
    def log(self):
        """What the last attempt has logged."""
        return logged(self.folder).rpartition("\nattempt:")[2]

    def line(self, text):
        """Wait for a line of the log that begins like this."""
        path = self.folder / "logs/test.txt"
        end = time.monotonic() + LONG
        while not (path.exists() and f"\n{text}" in path.read_text()):
            assert self.ranks[0][0].is_alive() and time.monotonic() < end, self.err
            time.sleep(0.005)

    @property
    def pid(self):
        """The process of rank 0, or of torchrun."""
        return self.ranks[0][0].pid

    def end(self, *statuses):
        """Wait for the end of all ranks and check their exit statuses."""
        for process, _, _ in self.ranks:
            process.join(LONG)
        found = [process.exitcode for process, _, _ in self.ranks]
        assert found == [*statuses], f"{found}\n{self.out}\n{self.err}"
        return self


def torchrun(out, restarts=0, **settings):
    """The program under a real torchrun, which the forked process becomes."""
    command, _ = invocation(out, 2, restarts=restarts)
    hook = f"os.execv({command[0]!r}, {command})"
    return Program(out, hook=hook, GRAD_ACCUM_STEPS="1", **settings)


def run(out, *statuses, **settings):
    """Run the program to its end, by default with success."""
    with Program(out, **settings) as program:
        return program.end(*statuses or [0] * settings.get("ranks", 1))


def losses(*programs, after=0):
    """{step: train_loss} of what the programs have printed; none may contradict another."""
    lines = set()
    for program in programs:
        lines |= set(re.findall(r"^step:(\d+)/\d+ train_loss:(\S+)", program.out, re.M))
    assert len(lines) == len(dict(lines))
    return {int(step): float(loss) for step, loss in lines if int(step) > after}


def logged(folder):
    """The log of the run, all attempts."""
    return (folder / "logs/test.txt").read_text()


def content(folder, *names):
    """{path: bytes} of some files, or of all, under a folder."""
    paths = [folder / name for name in names] or filter(Path.is_file, folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def has_ended_like(program, base):
    """Whether weights, artifact and scores are those of the uninterrupted run, to the last bit."""
    assert not list(program.folder.rglob(".*.tmp"))
    return content(program.folder, *RESULTS) == content(base.folder, *RESULTS)


def checkpoints(folder):
    """The steps of a folder's checkpoints."""
    return sorted(int(path.name[-12:-3]) for path in (folder / "checkpoints").glob("test.step*.pt"))


def saved(step):
    """Where the checkpoint after a step lies."""
    return f"checkpoints/test.step{step:09d}.pt"


def continued(base, out, *steps):
    """Copy checkpoints of a finished run into a new folder. Returns the folder."""
    (out / "checkpoints").mkdir(parents=True)
    for step in steps:
        shutil.copy2(base.folder / saved(step), out / saved(step))
    return out


def command_after(text, program):
    """(settings, launcher) of a command that a stopped run has printed, and written into its log."""
    line = re.search(rf"^{text}: (.*?) (python|torchrun .*) train_gpt\.py$", program.err, re.M)
    assert line[0] in program.log
    return dict(word.split("=", 1) for word in shlex.split(line[1])), line[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The uninterrupted run of one rank."""
    done = run(tmp_path_factory.mktemp("base") / "out")
    assert checkpoints(done.folder) == [15, 20]
    return done


@pytest.fixture(scope="module")
def base2(tmp_path_factory):
    """The uninterrupted run of two ranks."""
    return run(tmp_path_factory.mktemp("base2") / "out", **TWO)


# ---- SIGKILL -------------------------------------------------------------------------------------


def later(seed):
    """A hook: SIGKILL at a moment between start and end, the same for a seed."""
    dice = random.Random(seed)
    return at_step(dice.randint(2, 19), LATER.format(delay=dice.uniform(0, 0.03)))


MOMENTS = [later(seed) for seed in (2, 3, 10)]
MOMENTS += [at_write(name, TEAR) for name in ("test.step000000010", WEIGHTS, ARTIFACT)]


@pytest.mark.parametrize("hook", MOMENTS)
def test_a_run_killed_at_any_moment_can_go_on(tmp_path, base, hook):
    """At any time, or with a part of a file written."""
    first = run(tmp_path, -signal.SIGKILL, hook=hook, **AUTO)
    left = content(tmp_path)
    whole = content(base.folder)
    for name in left.keys() & {*RESULTS}:
        assert left[name] == whole[name]
    last = max(checkpoints(tmp_path), default=0)
    done = run(tmp_path, **AUTO)
    assert "warning:" not in done.out and done.err == ""
    assert losses(done).keys() == {*range(last + 1, 21)}
    assert losses(first, done) == losses(base)
    assert has_ended_like(done, base)


# ---- Checkpoints and resume ----------------------------------------------------------------------


def test_auto_means_the_newest_checkpoint_of_the_same_run(tmp_path):
    """By time, not by step. A run without a name takes that of the newest."""
    cfg = tg.Config(out_dir=str(tmp_path), resume="old.pt")
    log = tg.RunLog(run_id="test")
    # While this run has no checkpoint of its own, it keeps the path.
    assert "RESUME=old.pt RUN_ID=test " in tg.explain_stop(signal.SIGTERM, cfg, log)
    mine = tmp_path / saved(15)
    mine.parent.mkdir()
    mine.touch()
    os.utime(mine, ns=(0, 0))
    mine.with_name("other.step000000010.pt").touch()
    assert tg.find_checkpoints(cfg, "test") == [mine]
    assert "RESUME=auto RUN_ID=test " in tg.explain_stop(signal.SIGTERM, cfg, log)
    auto = tg.replace(cfg, resume="auto")
    assert tg.choose_run_id(auto) == "other"
    scoring = tg.replace(auto, eval_only=True)  # writes into no training's log, nor goes on with it
    assert tg.choose_run_id(scoring) != "other"
    assert "go on with" not in tg.explain_stop(signal.SIGTERM, scoring, log)


def test_a_damaged_checkpoint_is_skipped(tmp_path, base):
    """With a warning. By its clock it stays the newest, but what is written now is not deleted."""
    continued(base, tmp_path, 15)
    blob = bytearray((tmp_path / saved(15)).read_bytes())
    blob[len(blob) // 2] ^= 64
    damaged = tmp_path / saved(30)
    damaged.write_bytes(blob)
    os.utime(damaged, (time.time() + 3600,) * 2)
    done = run(tmp_path, **AUTO)
    assert "\nwarning: skipped " in done.out and checkpoints(tmp_path) == [20, 30]
    assert losses(done) == losses(base, after=15) and has_ended_like(done, base)


def test_a_checkpoint_of_other_settings_and_data_is_refused(tmp_path, base):
    """The line names what differs and nothing else; nothing is trained or written."""
    out = continued(base, tmp_path / "out", 20)
    shutil.copytree(CONFORMANCE, tmp_path / "data")
    shard = tmp_path / "data/fineweb_train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\7\0")
    done = run(out, 1, **AUTO, SEED="5", ITERATIONS="19", DATA_PATH=str(tmp_path / "data"))
    assert re.findall(r"([\w.]+)=", done.err) == ["ITERATIONS", "SEED", shard.name]
    assert content(out).keys() == {saved(20), "logs/test.txt"} and not losses(done)


def test_a_run_can_be_made_longer(tmp_path, base):
    out = continued(base, tmp_path / "out", 20)
    done = run(out, **AUTO, ITERATIONS="22")
    assert "\nresume: ITERATIONS was 20, now 22 partial\n" in done.out
    assert "\nstep:22/22 val_loss" in done.out


def test_another_world_size_goes_on(tmp_path, base):
    """From one rank to two, of which the second sees another folder."""
    continued(base, tmp_path / "out0", 15)
    apart = 'os.environ["OUT_DIR"] += os.environ["RANK"]'
    done = run(tmp_path / "out", hook=apart, **AUTO, **TWO)
    expected = pytest.approx(losses(base, after=15), abs=3e-4)  # the order of sums is another
    assert losses(done) == expected


# ---- Signals -------------------------------------------------------------------------------------


def test_a_stopped_training_goes_on_with_the_command_it_prints(tmp_path, base):
    """A repeated signal is no second one. The command holds all that was set, ready for a shell."""
    out = tmp_path / "a folder"
    first = run(out, 75, hook=at_step(7, f"{HIT}, {HIT}"), CHECKPOINT_EVERY="0")
    assert re.fullmatch("stopped by SIGTERM\n.*\n", first.err)
    assert checkpoints(out) == [7]
    changes, launcher = command_after("go on with", first)
    assert changes == RUN | AUTO | {"OUT_DIR": str(out), "CHECKPOINT_EVERY": "0"}
    assert launcher == "python"
    done = run(out, **changes)
    assert losses(first, done) == losses(base) and has_ended_like(done, base)


def test_what_nohup_ignores_stops_nothing_and_a_later_signal_kills(tmp_path):
    """The later one comes within a long step, after which the first was to be heard."""
    nohup = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    hangup = HIT.replace("SIGTERM", "SIGHUP")
    slow = f"{HIT}, time.sleep(1.1), {HIT}, time.sleep(60)"
    hook = nohup + at_step(2, hangup) + at_step(3, slow)
    done = run(tmp_path, -signal.SIGTERM, hook=hook)
    assert max(losses(done)) == 2 and checkpoints(tmp_path) == []


def test_before_the_training_a_signal_stops_at_once(tmp_path):
    """While compiling, whose errors are survived: nothing is written, the next attempt begins anew."""
    hook = at_call("tg.torch.compile", f"{HIT}, time.sleep(60)")
    done = run(tmp_path, 75, hook=hook, COMPILE="1")
    assert command_after("go on with", done)
    assert content(tmp_path).keys() == {"logs/test.txt"}


def test_a_signal_in_evaluation_leaves_the_artifact_to_be_scored(tmp_path, base2):
    """The printed command scores it under a fresh name, as the uninterrupted run did."""
    at_once = at_call("tg.score_documents", f"{HIT}, time.sleep(60)")
    first = run(tmp_path, 75, 75, hook=at_once, **TWO)
    assert re.fullmatch("stopped by SIGTERM\ngo on with: .*\n.*\n", first.err)
    changes, _ = command_after("score the artifact alone with", first)
    assert changes["EVAL_ONLY"] == "1" and changes["RUN_ID"] != "test"
    assert has_ended_like(run(tmp_path, **TWO | changes), base2)


def test_a_signal_during_export_lets_the_files_be_finished(tmp_path, base):
    """The one that is being written and the one after it."""
    done = run(tmp_path, 75, hook=at_write(WEIGHTS, HIT))
    assert command_after("score the artifact alone with", done)
    assert content(tmp_path, *RESULTS[:2]) == content(base.folder, *RESULTS[:2])


def test_one_rank_s_signal_stops_all_ranks_after_the_same_step(tmp_path):
    """Then torchrun sends SIGTERM to all, here while rank 0 tells of its stop, which goes on."""
    one = f"os.environ['RANK'] == '1' and {HIT.replace('SIGTERM', 'SIGHUP')}"
    heard = "signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # these tests may run under nohup
    hook = heard + at_step(7, one) + at_call("tg.dist.destroy_process_group", HIT)
    first = run(tmp_path, 75, 75, hook=hook, CHECKPOINT_EVERY="0", **TWO)
    assert checkpoints(tmp_path) == [7] and max(losses(first)) == 7
    assert re.fullmatch("stopped by SIGHUP\ngo on with: .*\n", first.err)


def test_torchrun_s_signal_stops_its_ranks(tmp_path):
    """The command goes on with as many."""
    with torchrun(tmp_path, CHECKPOINT_EVERY="0") as first:
        first.line("step:3/")
        os.kill(first.pid, signal.SIGTERM)
        first.end(1)
    assert first.err.count("stopped by SIGTERM") == 1 and 'train_gpt.py", line' not in first.err
    last = max(losses(first))
    assert checkpoints(tmp_path) == [last]
    _, launcher = command_after("go on with", first)
    assert launcher == "torchrun --standalone --nproc_per_node=2"


# ---- Ranks that are lost -------------------------------------------------------------------------


def test_torchrun_restarts_and_the_run_ends_as_if_nothing_had_happened(tmp_path, base2):
    """One rank is killed; the log holds both attempts."""
    with torchrun(tmp_path, restarts=1, **AUTO) as program:
        program.line("step:7/")
        ranks = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        program.end(0)
    assert re.search(r"^resume:\S+ step:(5|10|15)/", program.log, re.M)
    assert losses(program) == losses(base2) and has_ended_like(program, base2)
    assert logged(tmp_path).count("\nattempt:") == 2


def test_a_lost_rank_ends_the_others(tmp_path):
    """By itself, before torchrun comes to it: what it waits for will not come."""
    lost = f"os.environ['RANK'] == '1' and {HIT.replace('SIGTERM', 'SIGSTOP')}"
    with Program(tmp_path, hook=at_step(7, lost), RANK_TIMEOUT_SECONDS="2", **TWO) as program:
        program.ranks[0][0].join(60)
        assert program.ranks[0][0].exitcode == 1
        error = re.search(r"^error: rank 0: .*\n", program.err, re.M)[0]
        assert program.log.endswith(error) and checkpoints(tmp_path) == [5]


def test_out_of_memory_is_said_in_one_line(tmp_path):
    """By the rank that ran out, with what to change. The other rank blames nobody at length."""
    hungry = "os.environ['RANK'] == '1' and __import__('torch').empty(2**50)"
    with Program(tmp_path, hook=at_step(7, hungry), **TWO) as program:
        program.end(1, 1)
    assert "Traceback" not in program.err
    lost, hungry = re.findall("^error: .*", program.err, re.MULTILINE)
    assert lost == "error: rank 0: lost another rank, which may have said why"
    assert hungry.startswith("error: rank 1: out of memory (") and "lower TTT_BATCH_SIZE" in hungry


# ---- Logs ----------------------------------------------------------------------------------------


def test_a_log_is_appended_to_with_resume_and_refused_without(tmp_path):
    """Every attempt has a number. An attempt that died within a line spoils no later one."""
    before = "source\nattempt:1\nstep:1/"
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/test.txt").write_text(before)
    refused = run(tmp_path, 1)
    assert re.fullmatch(r"error: RUN_ID=test: .*RESUME=auto\n", refused.err)
    assert logged(tmp_path) == before
    run(tmp_path, **AUTO, ITERATIONS="1")
    assert logged(tmp_path).startswith(before + "\nattempt:2\n")


def test_one_run_at_a_time_writes_into_a_folder(tmp_path):
    """The second is refused in one line while the first lives, which takes no notice."""
    with Program(tmp_path, hook=at_step(5, "time.sleep(60)")) as first:
        first.line("step:4/")
        before = content(tmp_path)
        refused = run(tmp_path, 1, RUN_ID="other")
        assert f"error: OUT_DIR={tmp_path}: another run is writing there; " in refused.err
        assert content(tmp_path) == before


# ---- A full disk ---------------------------------------------------------------------------------


def refused_write(program, name):
    """One line names the file that could not be written; no traceback, no temporary file."""
    assert re.fullmatch(rf"error: .*{re.escape(name)}.*\n", program.err)
    assert not list(program.folder.rglob(".*"))


FULL = at_step(2, limit("os.path.getsize(self.log.path)")) + at_step(10, limit(-1))
CLOSED = "ends = os.pipe(); os.dup2(ends[1], 1); os.close(ends[0]); os.close(ends[1])"


@pytest.mark.parametrize(
    ("hook", "problem", "lines"), [(FULL, "File too large", 12), (CLOSED, "Broken pipe", 20)]
)
def test_output_that_cannot_be_written_ends_no_training(tmp_path, base, hook, problem, lines):
    """One warning and a log with gaps while the disk is full. As in `... | head -n 3`: no gaps."""
    done = run(tmp_path, hook=hook, CHECKPOINT_EVERY="0")
    assert re.fullmatch(rf"warning: {problem}; the run goes on, .*\n", done.err)
    assert done.log.count("/20 train_loss:") == lines and has_ended_like(done, base)


def test_no_room_for_a_checkpoint(tmp_path, base):
    """The training goes on without, the earlier one stays, and nothing half written."""
    continued(base, tmp_path, 15)
    size = (tmp_path / saved(15)).stat().st_size
    done = run(tmp_path, hook=limit(size - 1000), **AUTO, CHECKPOINT_EVERY="2")
    warning = "\nwarning: checkpoint not written, the run goes on: "
    assert done.out.count(warning) == 4  # 16, 18, 20, the end
    assert done.err == "" and checkpoints(tmp_path) == [15]
    assert has_ended_like(done, base)


def test_no_room_for_the_checkpoint_of_a_stopped_run(tmp_path):
    """It must not claim that one could go on."""
    done = run(tmp_path, 1, hook=at_step(7, f"{limit(200_000)}, {HIT}"))
    refused_write(done, saved(7))
    assert checkpoints(tmp_path) == [5]


def test_no_room_for_a_result(tmp_path, base):
    """The file of an earlier run stays, what was written before is whole, the score is printed."""
    continued(base, tmp_path, 20)
    (tmp_path / "scores.csv").write_text("earlier")
    hook = at_write("scores.csv", "raise OSError(28, 'No space left on device')")
    done = run(tmp_path, 1, hook=hook, **AUTO, CHECKPOINT_EVERY="0")
    refused_write(done, "scores.csv")
    assert (tmp_path / "scores.csv").read_text() == "earlier"
    assert content(tmp_path, *RESULTS[:2]) == content(base.folder, *RESULTS[:2])
    assert "\nladder condition:flat " in done.out
