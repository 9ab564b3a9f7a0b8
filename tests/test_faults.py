"""What a run survives: kills, signals, full disks, lost ranks. Whole runs, each hit and started again.

Most runs are forked from a process that has made the imports (`fork_ranks`). Their hooks hit them at
an exact step or write, so that no test waits for a moment. Others are started as users start them.
"""

import contextlib
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CONFORMANCE, ROOT, TINY_RUN, fork_ranks, invocation

import train_gpt as tg

TERM = signal.SIGTERM
KILL = signal.SIGKILL
STOP = signal.SIGSTOP
LONG = 300  # seconds that nothing here takes, on a slow machine either

RUN = TINY_RUN | {
    "RUN_ID": "test",
    "NUM_LAYERS": "2",
    "ITERATIONS": "20",
    "TRAIN_BATCH_TOKENS": "256",
    "GRAD_ACCUM_STEPS": "2",
    "TRAIN_LOG_EVERY": "1",
    "CHECKPOINT_EVERY": "5",
    "COMPILE": "0",
    "DTYPE": "float32",
    "MAX_VAL_DOCS": "3",
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
    return f"__import__('resource').setrlimit({resource.RLIMIT_FSIZE}, ({size}, -1))"


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
        return (self.folder / "logs/test.txt").read_text().rpartition("\nattempt:")[2]

    def line(self, pattern):
        """Wait for a line of output that begins like this."""
        wait(lambda: re.search(f"^{pattern}", self.out, re.M) or not self.is_alive())
        assert re.search(f"^{pattern}", self.out, re.M), self.err

    def is_alive(self):
        """Whether rank 0 still runs."""
        return self.ranks[0][0].is_alive()

    def kill(self, number, rank=0):
        """Send a signal to a rank."""
        os.kill(self.ranks[rank][0].pid, number)

    def end(self, *statuses):
        """Wait for the end of all ranks and check their exit statuses."""
        for process, _, _ in self.ranks:
            process.join(LONG)
        found = [process.exitcode for process, _, _ in self.ranks]
        assert found == [*statuses], f"{found}\n{self.out}\n{self.err}"
        return self


class Torchrun:
    """The program under a real torchrun; it and its ranks are gone after the `with` block."""

    def __init__(self, out, restarts=0, **settings):
        command, env = invocation(out, restarts=restarts, **RUN | TWO | settings)
        out.mkdir(exist_ok=True)
        self.folder = out
        self.paths = [out.with_name(f"{out.name}.{name}") for name in ("out", "err")]
        with self.paths[0].open("w") as stdout, self.paths[1].open("w") as stderr:
            self.process = subprocess.Popen(command, env=env, cwd=out, stdout=stdout, stderr=stderr)

    log = Program.log
    line = Program.line

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        for rank in self.ranks():
            os.kill(rank, KILL)
        self.process.wait(LONG)

    @property
    def out(self):
        """What has been printed so far."""
        return self.paths[0].read_text()

    @property
    def err(self):
        """What has been written to standard error so far."""
        return self.paths[1].read_text()

    def is_alive(self):
        """Whether torchrun still runs."""
        return self.process.poll() is None

    def ranks(self):
        """The process ids of the ranks, in order."""
        pid = self.process.pid
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return [int(child) for child in children if is_rank(child)]
        return []

    def end(self):
        """Wait for its end. Returns whether it succeeded."""
        return self.process.wait(LONG) == 0


def is_rank(pid):
    """Whether a process is the script."""
    with contextlib.suppress(OSError):
        return b"train_gpt.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def wait(holds):
    """Wait until holds() is true."""
    end = time.monotonic() + LONG
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def run(out, *statuses, **settings):
    """Run the program to its end, by default with success."""
    with Program(out, **settings) as program:
        return program.end(*statuses or [0] * settings.get("ranks", 1))


def losses(*programs):
    """{step: train_loss} of all that the programs have printed; none may contradict another."""
    lines = set()
    for program in programs:
        lines |= set(re.findall(r"^step:(\d+)/\d+ train_loss:(\S+)", program.out, re.M))
    assert len(lines) == len(dict(lines))
    return {int(step): loss for step, loss in lines}


def losses_after(step, program):
    """The losses of later steps."""
    return {number: loss for number, loss in losses(program).items() if number > step}


def content(folder, *names):
    """{path: bytes} of some files, or of all, under a folder."""
    paths = [folder / name for name in names]
    if not names:
        paths = [path for path in folder.rglob("*") if path.is_file()]
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


def continued(base, out, *names):
    """Copy checkpoints, or other files, of a finished run into a new folder. Returns the folder."""
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(base.folder / name, out / name)
    return out


def resumed_from(program):
    """(file name, step) of the line that says where the run goes on."""
    found = re.search(r"^resume:\S*/(\S+\.pt) step:(\d+)/20 ", program.out, re.M)
    return found[1], int(found[2])


def command_after(text, program):
    """(settings, launcher) of a command that a stopped run has printed, and written into its log."""
    line = re.search(f"^{text}: (.*)$", program.err, re.M)
    assert line[0] in program.log
    words = shlex.split(line[1])
    first = next(i for i, word in enumerate(words) if "=" not in word)
    return dict(word.split("=", 1) for word in words[:first]), shlex.join(words[first:])


def run_in_shell(text, program):
    """Run such a command as a person does, in a shell beside the script."""
    line = re.search(f"^{text}: (.*)$", program.err, re.M)[1]
    _, env = invocation(program.folder)
    env = {key: value for key, value in env.items() if key not in TINY_RUN}
    for name in ("OUT_DIR", "RUN_ID"):
        env.pop(name)
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    return subprocess.run(
        line, shell=True, env=env, cwd=ROOT, capture_output=True, text=True, timeout=LONG
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The uninterrupted run of one rank."""
    done = run(tmp_path_factory.mktemp("base") / "out")
    assert len(losses(done)) == 20 and checkpoints(done.folder) == [15, 20]
    return done


@pytest.fixture(scope="module")
def base2(tmp_path_factory):
    """The uninterrupted run of two ranks."""
    return run(tmp_path_factory.mktemp("base2") / "out", **TWO)


@pytest.fixture(scope="module")
def trained(base):
    """Settings of an evaluation of what the uninterrupted run has made."""
    return {"EVAL_ONLY": "1", "MODEL_PATH": str(base.folder / ARTIFACT)}


# ---- SIGKILL -------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", [2, 3, 10, "test.step000000010", WEIGHTS, ARTIFACT])
def test_a_run_killed_at_any_moment_can_go_on(tmp_path, base, moment):
    """A seed for a moment between start and end, or a file of which only a part was written."""
    hook = ""
    if isinstance(moment, str):
        hook = at_write(moment, TEAR)
    with Program(tmp_path, hook=hook, **AUTO) as first:
        if not hook:
            step = random.Random(moment).randint(1, 20)
            first.line(f"step:{step}/20 train_loss")
            time.sleep(random.Random(moment).uniform(0, 0.03))
            first.kill(KILL)
        first.end(-KILL)
    left = content(tmp_path)
    whole = content(base.folder)
    for name in left.keys() & {*RESULTS}:
        assert left[name] == whole[name]
    torn = [name for name in left if name.endswith(".tmp")]
    assert len(torn) == 1 or not hook
    last = max(checkpoints(tmp_path), default=0)
    done = run(tmp_path, **AUTO)
    assert "warning:" not in done.out and done.err == ""
    assert losses(done).keys() == {*range(last + 1, 21)}
    assert losses(first, done) == losses(base)
    assert has_ended_like(done, base)
    assert len(checkpoints(tmp_path)) <= 2


# ---- Checkpoints and resume ----------------------------------------------------------------------


def test_auto_takes_the_newest_by_time(tmp_path, base):
    """Not the one with the highest step; what goes on is the uninterrupted run, and its clock."""
    continued(base, tmp_path, saved(15), saved(20))
    os.utime(tmp_path / saved(20), ns=(0, 0))
    done = run(tmp_path, **AUTO)
    assert resumed_from(done) == ("test.step000000015.pt", 15)
    assert losses(done) == losses_after(15, base) and has_ended_like(done, base)
    times = [int(ms) for ms in re.findall(r"train_time:(\d+)ms", done.out)]
    before = re.search(r"^step:15/20 train_loss:\S+ train_time:(\d+)ms", base.out, re.M)[1]
    assert times[0] >= int(before) and times == sorted(times)


def test_auto_takes_checkpoints_of_its_own_run(tmp_path, base):
    """Whatever is newer there; a run without a name takes the name of the newest."""
    continued(base, tmp_path, saved(15), saved(20))
    (tmp_path / saved(20)).rename(tmp_path / saved(20).replace("test", "other"))
    cfg = tg.read_config(RUN | AUTO | {"OUT_DIR": str(tmp_path)})
    assert [path.name for path in tg.find_checkpoints(cfg, "test")] == ["test.step000000015.pt"]
    nameless = tg.replace(cfg, run_id="")
    os.utime(tmp_path / saved(15), ns=(0, 0))
    assert tg.choose_run_id(nameless) == "other"
    assert tg.choose_run_id(tg.replace(nameless, resume="")) not in ("other", "test")
    scoring = tg.replace(nameless, eval_only=True)  # writes into no training's log
    assert tg.choose_run_id(scoring) not in ("other", "test")
    done = run(tmp_path, **AUTO | {"RUN_ID": "third", "ITERATIONS": "1"})
    assert "resume: found no checkpoint; starting anew" in done.out


def test_the_printed_command_keeps_a_path_until_there_is_a_checkpoint(tmp_path, monkeypatch):
    """Else a run that was stopped before its first one would start anew."""
    monkeypatch.setenv("RESUME", "old/run.step000000015.pt")
    cfg = tg.Config(out_dir=str(tmp_path), resume="old/run.step000000015.pt")
    log = tg.RunLog(run_id="new")
    assert "RESUME=old/run.step000000015.pt RUN_ID=new " in tg.explain_stop(TERM, cfg, log)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "new.step000000020.pt").touch()
    assert "RESUME=auto RUN_ID=new " in tg.explain_stop(TERM, cfg, log)


def test_a_clock_set_back_costs_no_checkpoint(tmp_path, base):
    """Those of an earlier run that claim to be newer do not push out the one just written."""
    continued(base, tmp_path, saved(15))
    for number in (30, 40):
        shutil.copy(tmp_path / saved(15), tmp_path / saved(number))
        os.utime(tmp_path / saved(number), (time.time() + 3600,) * 2)
    run(tmp_path, RESUME=str(base.folder / saved(15)))
    assert 20 in checkpoints(tmp_path) and len(checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("harm", ["cut", "flipped"])
def test_a_damaged_newest_checkpoint_is_skipped(tmp_path, base, harm):
    """With a warning, in favour of the previous one; given by its path it is an error."""
    continued(base, tmp_path, saved(15), saved(20))
    path = tmp_path / saved(20)
    blob = bytearray(path.read_bytes())
    middle = len(blob) // 2
    blob[middle] ^= 64
    path.write_bytes(blob[:middle] if harm == "cut" else blob)
    refused = run(tmp_path, 1, RUN_ID="new", RESUME=str(path))
    assert re.fullmatch(rf"error: .*{saved(20)}.*\n", refused.err) and not losses(refused)
    done = run(tmp_path, **AUTO)
    assert re.search(rf"^warning: skipped .*{saved(20)}", done.out, re.M)
    assert losses(done) == losses_after(15, base) and has_ended_like(done, base)


def test_a_missing_checkpoint_is_an_error(tmp_path):
    done = run(tmp_path, 1, RESUME=str(tmp_path / "nothing.pt"))
    assert re.fullmatch(r"error: .*nothing\.pt.*\n", done.err)


def test_a_checkpoint_of_other_settings_and_data_is_refused(tmp_path, base):
    """The line names what differs and nothing else; nothing is trained or written."""
    out = continued(base, tmp_path / "out", saved(20))
    shutil.copytree(CONFORMANCE, tmp_path / "data")
    shard = tmp_path / "data/fineweb_train_000000.bin"
    blob = bytearray(shard.read_bytes())
    blob[-20] ^= 1
    shard.write_bytes(blob)
    done = run(out, 1, **AUTO, SEED="5", MATRIX_LR="0.05", DATA_PATH=str(tmp_path / "data"))
    names = re.findall(r"([\w.]+)=", done.err)
    assert re.fullmatch(r"error: .*\n", done.err)
    assert names == ["MATRIX_LR", "SEED", shard.name]
    assert content(out, saved(20)) == content(base.folder, saved(20)) and not losses(done)
    assert not list(out.glob("final_model*"))


def test_another_world_size_goes_on(tmp_path, base, base2):
    """From one rank to two, of which the second sees another folder; and from two to one."""
    continued(base, tmp_path / "out0", saved(15))
    continued(base2, tmp_path / "one", saved(15))
    apart = 'os.environ["OUT_DIR"] += os.environ["RANK"]'
    more = run(tmp_path / "out", hook=apart, **AUTO, **TWO)
    fewer = run(tmp_path / "one", **AUTO)
    for done in (more, fewer):
        assert resumed_from(done)[1] == 15
        found = {step: float(loss) for step, loss in losses(done).items()}
        expected = {step: float(loss) for step, loss in losses_after(15, base).items()}
        assert found == pytest.approx(expected, abs=3e-4)  # the order of sums is another
    assert not (tmp_path / "out1/checkpoints").exists()


# ---- Signals -------------------------------------------------------------------------------------


def test_a_stopped_training_goes_on_with_the_command_it_prints(tmp_path, base):
    """A repeated signal is no second one. The command is run as a person would run it."""
    first = run(tmp_path, 75, hook=at_step(7, f"{HIT}, {HIT}"), CHECKPOINT_EVERY="0")
    assert first.err.startswith("stopped by SIGTERM\ngo on with: ")
    assert first.err.count("\n") == 2 and first.log.endswith(first.err)
    assert checkpoints(tmp_path) == [7] and not (tmp_path / WEIGHTS).exists()
    done = run_in_shell("go on with", first)
    assert done.returncode == 0, done.stderr
    assert "step:7/20 " in re.search("^resume:.*", done.stdout, re.M)[0]
    assert has_ended_like(first, base)


@pytest.mark.parametrize("number", ["SIGINT", "SIGHUP"])
def test_other_signals_stop_a_training(tmp_path, number):
    done = run(tmp_path, 75, hook=at_step(2, HIT.replace("SIGTERM", number)))
    assert done.err.startswith(f"stopped by {number}\n") and checkpoints(tmp_path) == [2]


def test_under_nohup_a_hangup_stops_nothing(tmp_path):
    nohup = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    hangup = HIT.replace("SIGTERM", "SIGHUP")
    hook = nohup + at_step(2, hangup) + at_step(3, HIT)
    done = run(tmp_path, 75, hook=hook)
    assert done.err.startswith("stopped by SIGTERM\n") and checkpoints(tmp_path) == [3]


def test_a_later_signal_ends_the_process_by_its_default_action(tmp_path):
    """Within a step that would take long; the first signal was to be heard after it."""
    slow = f"{HIT}, time.sleep(1.1), os.kill(os.getpid(), signal.SIGINT), time.sleep(60)"
    done = run(tmp_path, -signal.SIGINT, hook=at_step(2, slow))
    assert checkpoints(tmp_path) == [] and done.err == ""


@pytest.mark.parametrize(
    "function", ["tg.read_weights", "tg.load_inputs", "tg.Trainer.warm_up", "torch.compile"]
)
def test_before_the_training_a_signal_stops_at_once(tmp_path, base, function):
    """While loading, warming up or compiling: nothing is written, the next attempt begins anew."""
    hook = "import torch\n" + at_call(function, f"{HIT}, time.sleep(60)")
    settings = {"COMPILE": str(int(function == "torch.compile"))}
    if function == "tg.read_weights":
        settings["MODEL_PATH"] = str(base.folder / ARTIFACT)
    done = run(tmp_path, 75, hook=hook, **settings)
    changes, _ = command_after("go on with", done)
    assert changes == settings_given(tmp_path, settings) | AUTO
    assert checkpoints(tmp_path) == [] and not losses(done)


def settings_given(out, settings):
    """The settings that a run was given."""
    return {key: value for key, value in (RUN | settings).items()} | {"OUT_DIR": str(out)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_in_evaluation_leaves_the_artifact_to_be_scored(tmp_path, base, base2, ranks):
    """The printed command scores it under a fresh name, as the uninterrupted run did."""
    settings = TWO if ranks == 2 else {}
    at_once = at_call("tg.score_documents", f"{HIT}, time.sleep(60)")
    first = run(tmp_path, *[75] * ranks, hook=at_once, **settings)
    assert first.err.startswith("stopped by SIGTERM\ngo on with: ")
    assert first.err.count("\n") == 3 and first.log.endswith(first.err)
    changes, launcher = command_after("score the artifact alone with", first)
    assert launcher.endswith(["python train_gpt.py", "--nproc_per_node=2 train_gpt.py"][ranks - 1])
    assert changes["EVAL_ONLY"] == "1" and changes["RUN_ID"] != "test"
    again = run(tmp_path, **settings | changes)
    assert has_ended_like(again, base2 if ranks == 2 else base)
    assert len(list((tmp_path / "logs").iterdir())) == 2


def test_a_stopped_evaluation_prints_how_to_start_it_again(tmp_path, trained):
    """There is nothing else to go on with."""
    done = run(tmp_path, 75, hook=at_call("tg.evaluate", HIT), **trained)
    assert re.fullmatch("stopped by SIGTERM\nscore the artifact alone with: .*\n", done.err)
    changes, _ = command_after("score the artifact alone with", done)
    assert changes["MODEL_PATH"] == trained["MODEL_PATH"]


@pytest.mark.parametrize("moment", [WEIGHTS, ARTIFACT])
def test_a_signal_during_export_lets_the_files_be_finished(tmp_path, base, moment):
    done = run(tmp_path, 75, hook=at_write(moment, HIT))
    assert command_after("score the artifact alone with", done)
    names = (WEIGHTS, ARTIFACT)
    assert content(tmp_path, *names) == content(base.folder, *names)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_s_signal_stops_all_ranks_after_the_same_step(tmp_path, rank):
    one = f"os.environ['RANK'] == '{rank}' and {HIT}"
    first = run(tmp_path, 75, 75, hook=at_step(7, one), CHECKPOINT_EVERY="0", **TWO)
    assert checkpoints(tmp_path) == [7] and max(losses(first)) == 7
    assert first.err.count("stopped by SIGTERM") == 1 and first.err.count("\n") == 2


def test_the_end_of_a_rank_spoils_no_other_rank_s_end(tmp_path):
    """torchrun sends SIGTERM to all when the first has ended: here while rank 0 tells of its stop."""
    one = f"os.environ['RANK'] == '1' and {HIT}"
    echo = f"os.environ['RANK'] == '0' and {HIT}"
    hook = at_step(7, one) + at_call("tg.dist.destroy_process_group", echo)
    done = run(tmp_path, 75, 75, hook=hook, **TWO)
    assert done.err.startswith("stopped by SIGTERM\ngo on with: ") and done.err.count("\n") == 2


def test_torchrun_s_signal_stops_its_ranks_and_the_printed_command_goes_on(tmp_path, base2):
    with Torchrun(tmp_path, CHECKPOINT_EVERY="0") as first:
        first.line("step:3/")
        first.process.send_signal(TERM)
        assert not first.end()
    assert first.err.count("stopped by SIGTERM") == 1 and 'train_gpt.py", line' not in first.err
    last = max(losses(first))
    assert checkpoints(tmp_path) == [last] and last < 20
    changes, launcher = command_after("go on with", first)
    assert launcher == "torchrun --standalone --nproc_per_node=2 train_gpt.py"
    done = run(tmp_path, **TWO | changes)
    assert resumed_from(done)[1] == last and has_ended_like(done, base2)


# ---- Ranks that are lost -------------------------------------------------------------------------


def test_torchrun_restarts_and_the_run_ends_as_if_nothing_had_happened(tmp_path, base2):
    """One rank is killed; the log holds both attempts."""
    with Torchrun(tmp_path, restarts=1, **AUTO) as program:
        program.line("step:7/")
        os.kill(program.ranks()[1], KILL)
        assert program.end()
    assert resumed_from(program)[1] in (5, 10, 15)
    assert losses(program) == losses(base2) and has_ended_like(program, base2)
    assert re.findall(r"^attempt:\d", logged(tmp_path), re.M) == ["attempt:1", "attempt:2"]


def test_a_killed_rank_ends_the_others(tmp_path):
    """By itself, before torchrun comes to it: what it waits for will not come."""
    die = "os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL)"
    done = run(tmp_path, 1, -KILL, hook=at_step(7, die), **TWO)
    assert re.search(r"^error: rank 0: ", done.err, re.M)
    assert re.search(r"^error: rank 0: ", done.log, re.M) and checkpoints(tmp_path) == [5]


def test_a_hanging_rank_is_given_up(tmp_path):
    hang = "os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGSTOP)"
    settings = TWO | {"RANK_TIMEOUT_SECONDS": "2"}
    with Program(tmp_path, hook=at_step(7, hang), **settings) as program:
        program.ranks[0][0].join(60)
        assert program.ranks[0][0].exitcode == 1
        assert re.search(r"^error: rank 0: .*[Tt]ime", program.err, re.M), program.err


# ---- Logs ----------------------------------------------------------------------------------------


def logged(folder):
    """The log of the run, all attempts."""
    return (folder / "logs/test.txt").read_text()


def test_a_log_is_appended_to_with_resume_and_refused_without(tmp_path):
    """Every attempt has a number. An attempt that died within a line spoils no later one."""
    run(tmp_path, ITERATIONS="1")
    path = tmp_path / "logs/test.txt"
    path.write_text(path.read_text() + "step:1/")
    before = path.read_text()
    refused = run(tmp_path, 1, ITERATIONS="1")
    assert re.fullmatch(r"error: RUN_ID=test: .*RESUME=auto\n", refused.err)
    assert path.read_text() == before
    run(tmp_path, **AUTO, ITERATIONS="1")
    after = path.read_text()
    assert after.startswith(before + "\nattempt:2\n") and after.count("\nattempt:1\n") == 1
    assert after.count(tg.source_code()) == 1


@pytest.mark.parametrize("name", ["test", "other"])
def test_one_run_at_a_time_writes_into_a_folder(tmp_path, trained, name):
    """The second is refused in one line while the first lives, which takes no notice."""
    with Program(tmp_path, hook=at_step(5, "time.sleep(60)")) as first:
        first.line("step:4/")
        log = tmp_path / "logs" / "test.txt"
        while "step:4/" not in log.read_text():  # a line is in the log a moment after it is shown
            time.sleep(0.01)
        before = content(tmp_path)
        refused = run(tmp_path, 1, RUN_ID=name)
        expected = f"error: OUT_DIR={tmp_path}: another run is writing there; .*\n"
        assert re.fullmatch(expected, refused.err) and refused.out == ""
        assert content(tmp_path) == before
    run(tmp_path, **trained | {"RUN_ID": "free"})  # a killed run locks nothing


# ---- A full disk ---------------------------------------------------------------------------------


def earlier(out, *names):
    """Files of these names with known content. Returns all content of the folder."""
    for name in names:
        (out / name).write_bytes(b"from an earlier run: " + name.encode())
    return content(out)


def refused_write(program, name):
    """One line names the file that could not be written; no traceback, no temporary file."""
    assert re.fullmatch(rf"error: .*{re.escape(name)}.*\n", program.err), program.err
    assert not list(program.folder.rglob(".*"))


def test_no_room_for_the_head_of_the_log(tmp_path, trained):
    done = run(tmp_path, 1, hook=limit(50_000), **trained)
    refused_write(done, "logs/test.txt")
    assert content(tmp_path) == {}


def test_no_room_for_more_of_the_log_ends_no_training(tmp_path, base):
    """One warning, a log with gaps, and all else as ever: there is room again before the export."""
    full = limit("os.path.getsize(self.log.path)")
    hook = at_step(2, full) + at_step(10, limit(-1))
    done = run(tmp_path, hook=hook, CHECKPOINT_EVERY="0")
    assert re.fullmatch(r"warning: File too large; the run goes on, .*\n", done.err)
    assert losses(done) == losses(base) and done.log.count("train_loss") == 12
    assert has_ended_like(done, base)


def test_a_reader_that_leaves_ends_no_training(tmp_path, base):
    """As in `python train_gpt.py | head -n 3`."""
    closed = "ends = os.pipe(); os.dup2(ends[1], 1); os.close(ends[0]); os.close(ends[1])"
    done = run(tmp_path, hook=closed)
    assert re.fullmatch(r"warning: Broken pipe; the run goes on, .*\n", done.err)
    assert done.log.count("/20 train_loss:") == 20 and has_ended_like(done, base)


def test_no_room_for_a_checkpoint(tmp_path, base):
    """The training goes on without, the earlier one stays, and nothing half written."""
    continued(base, tmp_path, saved(15))
    size = (tmp_path / saved(15)).stat().st_size
    done = run(tmp_path, hook=limit(size - 1000), **AUTO, CHECKPOINT_EVERY="2")
    warned = re.findall(r"^warning: checkpoint not written, the run goes on: (.*)", done.out, re.M)
    assert len(warned) == 4 and all("test.step" in line for line in warned)  # 16, 18, 20, the end
    assert done.err == "" and checkpoints(tmp_path) == [15]
    assert losses(done) == losses_after(15, base) and has_ended_like(done, base)


def test_no_room_for_the_checkpoint_of_a_stopped_run(tmp_path):
    """It must not claim that one could go on."""
    done = run(tmp_path, 1, hook=at_step(7, f"{limit(200_000)}, {HIT}"))
    refused_write(done, saved(7))
    assert checkpoints(tmp_path) == [5]


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        (WEIGHTS, limit(300_000)),
        (ARTIFACT, at_write(WEIGHTS, limit(200_000))),
        ("scores.csv", at_write("scores.csv", "raise OSError(28, 'No space left on device')")),
    ],
)
def test_no_room_for_a_result(tmp_path, base, name, hook):
    """The file of an earlier run stays; what was written before is whole."""
    continued(base, tmp_path, saved(20))
    earlier(tmp_path, *RESULTS)
    done = run(tmp_path, 1, hook=hook, **AUTO, CHECKPOINT_EVERY="0")
    refused_write(done, name)
    place = RESULTS.index(name)
    for early in RESULTS[:place]:
        assert content(tmp_path, early) == content(base.folder, early)
    for late in RESULTS[place:]:
        assert (tmp_path / late).read_bytes().startswith(b"from an earlier run")
    if name == "scores.csv":
        assert re.search("^ladder condition:flat ", done.out, re.M)  # the score is not lost
