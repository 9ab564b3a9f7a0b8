"""What a run survives: kills, signals, full disks, lost ranks. Real processes, each watched, hit and started again."""

import contextlib
import itertools
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import CONFORMANCE, TINY_RUN, invocation, script_behind, write_shard

import train_gpt as tg

TERM, INT, KILL, STOP, CONT = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGKILL,
    signal.SIGSTOP,
    signal.SIGCONT,
)
LONG = 600  # seconds that nothing here takes, on a slow machine either

# 40 short steps, then two evaluations of half a second or more in which documents end all the time.
RUN = TINY_RUN | {
    "RUN_ID": "test",
    "NUM_LAYERS": "2",
    "ITERATIONS": "40",
    "TRAIN_BATCH_TOKENS": "512",
    "GRAD_ACCUM_STEPS": "2",
    "TRAIN_LOG_EVERY": "1",
    "CHECKPOINT_EVERY": "5",
    "COMPILE": "0",
    "DTYPE": "float32",
    "MAX_VAL_DOCS": None,
    "EVAL": "flat,ttt,stream",
    "SCORES_PATH": "scores.csv",
    "TTT_CHUNK_SIZE": "16",
    "TTT_STREAM_CHUNK": "16",
    "TTT_EVAL_SEQ_LEN": "64",
    "TTT_BATCH_SIZE": "8",
}
BRIEF = {"EVAL": "flat", "SCORES_PATH": None}  # where the evaluation does not matter
AUTO = {"RESUME": "auto"}
TWO = {"ranks": 2, "GRAD_ACCUM_STEPS": "1"}  # the same tokens in the same order as one rank
ENDLESS = {"ITERATIONS": "1000000"}
DATA = {
    "train": "fineweb_train_000000.bin",
    "val": "fineweb_val_000000.bin",
    "tokenizer": "tokenizer.model",
}
ARTIFACTS = ("final_model.pt", "final_model.int8.ptz")


class Program:
    """The script as a process, or as several under torchrun, all of which are gone after the `with` block."""

    def __init__(self, out, ranks=0, limit=None, **settings):
        """Start it in the folder `out`, see invocation; `limit` is the size in bytes that no file may exceed."""
        self.mark = f"STARTED_BY_TEST={uuid.uuid4()}"
        command, env = invocation(out, ranks, **RUN | settings | dict([self.mark.split("=")]))
        out.mkdir(parents=True, exist_ok=True)
        self.folder, self.files = out, [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self.process = subprocess.Popen(
            command, env=env, cwd=out, stdout=self.files[0], stderr=self.files[1]
        )
        if limit:
            self.limit(limit)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()  # a process that has just been started shows no environment yet
        while alive := self.family():
            for pid in alive:
                self.kill(KILL, pid)
            self.process.poll()  # a zombie has no environment, and so is none of the family
            time.sleep(0.01)
        self.process.wait(LONG)

    def read(self, which):
        """What has been written to standard output (0) or error (1) so far; pread leaves the shared offset alone."""
        return os.pread(self.files[which].fileno(), 2**24, 0).decode()

    out = property(lambda self: self.read(0))
    err = property(lambda self: self.read(1))
    log = property(
        lambda self: (self.folder / "logs" / "test.txt").read_text().rpartition("started:")[2]
    )

    def family(self):
        """{process id: its RANK, None for torchrun} of all living processes of this program."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                lines = path.read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has ended, or belongs to somebody else
                continue
            if self.mark in lines:
                found[int(path.parent.name)] = next(
                    (line[5:] for line in lines if line.startswith("RANK=")), None
                )
        return found

    def rank(self, number):
        """The process id of a rank, a child of torchrun."""
        return next(
            pid
            for pid, rank in self.family().items()
            if rank == str(number) and parent(pid) == self.pid
        )

    pid = property(lambda self: self.process.pid)

    def kill(self, number, pid=None):
        """Send a signal, unless its addressee is gone already."""
        if pid is None:
            self.process.send_signal(number)
            return
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return

    def limit(self, size):
        """From now on no write may make a file larger than this: as if the disk was full."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def until(self, holds, pause=0.005):
        """Wait until holds() is true and return its value; None if the program ended before."""
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            ended = self.process.poll() is not None
            if value := holds():
                return value
            if ended:
                return None
            time.sleep(pause)
        raise AssertionError(f"nothing happened:\n{self.out}\n{self.err}")

    def line(self, pattern):
        """Wait for a line of output that begins like this."""
        found = self.until(lambda: re.search(f"^{pattern}", self.out, re.M))
        assert found, f"ended without {pattern}:\n{self.out}\n{self.err}"
        return found

    def end(self, status=0):
        """Wait for its end and check its exit status (None: any but 0)."""
        code = self.process.wait(LONG)
        assert code == status if status is not None else code, f"{code}\n{self.out}\n{self.err}"
        return self


def parent(pid):
    """The process id of a process' parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def run(out, status=0, **settings):
    """Run the program to its end."""
    with Program(out, **settings) as program:
        return program.end(status)


def losses(*programs):
    """{step: train_loss} of all lines that the programs have printed; none may contradict another."""
    lines = [
        re.findall(r"^step:(\d+)/\d+ train_loss:(\S+)", program.out, re.M) for program in programs
    ]
    lines = {line for found in lines for line in found}
    assert len(lines) == len(dict(lines))
    return {int(step): loss for step, loss in lines}


def scores(program):
    """All digits of the final lines, without times and the positions that were computed."""
    final = re.findall(
        r"^(?:ladder condition:|final_\w+|step:\d+/\d+ (?=val)).*", program.out, re.M
    )
    return [re.sub(r" (?:eval|train)_time:.*", "", line) for line in final]


def seconds(base, name):
    """How long this machine takes for the evaluation of a condition."""
    return (
        int(re.search(rf"^ladder condition:{name} .* eval_time:(\d+)ms$", base.out, re.M)[1]) / 1000
    )


SHARES = (
    0.5,
    0.3,
    0.8,
    0.15,
    1.2,
)  # of an evaluation's seconds: this machine may be faster or slower than it was


def finished(folder, name):
    """Whether the unfinished evaluation of a condition has kept a document."""
    return any(
        len(tg.load_state(path)["at"]) for path in parts(folder) if path.name.startswith(name)
    )


def cut_short(out, base, trained):
    """A run that EVAL_MAX_SECONDS has ended in both evaluations, each of which has finished documents."""
    for share in SHARES:
        limit = share * min(seconds(base, name) for name in ("ttt", "stream"))
        done = run(out, **trained, EVAL_MAX_SECONDS=str(limit))
        if done.out.count("out_of_time:") == 2 and finished(out, "ttt") and finished(out, "stream"):
            return done
        shutil.rmtree(out / "checkpoints")
    raise AssertionError("no limit met the middle of both evaluations")


def positions(program, name):
    """How many positions the evaluation of a condition has computed."""
    return int(re.search(rf"^{name} positions:(\d+)/", program.out, re.M)[1])


def content(folder, *names):
    """{path: bytes} of some files, or of all, under a folder."""
    paths = (
        [folder / name for name in names]
        if names
        else [path for path in folder.rglob("*") if path.is_file()]
    )
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def checkpoints(folder):
    """The names of a folder's checkpoints."""
    return sorted(path.name for path in (folder / "checkpoints").glob("*.pt"))


def parts(folder):
    """The files of unfinished evaluations."""
    return list((folder / "checkpoints").glob("*.part"))


def continued(base, out, *names):
    """Put checkpoints, or other files, of a finished run into a new folder, and return the folder."""
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(base.folder / name, out / name)
    return out


def step(number):
    """Where the checkpoint after a step lies."""
    return f"checkpoints/test.step{number:09d}.pt"


def same_end(program, base, brief):
    """The run ended as the uninterrupted one did: weights, artifact, scores, and nothing half done left behind."""
    assert scores(program) == scores(base)[: 4 if brief else None]
    names = ARTIFACTS if brief else (*ARTIFACTS, "scores.csv")
    assert content(program.folder, *names) == content(base.folder, *names)
    assert checkpoints(program.folder)[-1] == checkpoints(base.folder)[-1] and not parts(
        program.folder
    )
    assert not list(program.folder.rglob("*.tmp"))


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    """The conformance data, its validation text cut into documents of 20 to 150 tokens: some end after every turn."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(5)
    for name in DATA.values():
        shutil.copy(CONFORMANCE / name, folder / name)
    tokens = [
        token for token in tg.open_shard(CONFORMANCE / DATA["val"])[:4000].tolist() if token != 1
    ]
    ends = itertools.accumulate(iter(lambda: rng.randint(20, 150), 0))
    ends = [0, *itertools.takewhile(lambda end: end < len(tokens), ends), len(tokens)]
    documents = [[1, *tokens[begin:end]] for begin, end in itertools.pairwise(ends)]
    write_shard(folder / DATA["val"], [token for document in documents for token in document])
    RUN["DATA_PATH"] = str(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The uninterrupted run of one rank."""
    done = run(tmp_path_factory.mktemp("base") / "out")
    assert len(losses(done)) == 40 and len(scores(done)) == 1 + 3 + 4
    return done


@pytest.fixture(scope="module")
def base2(tmp_path_factory):
    """The uninterrupted run of two ranks."""
    return run(tmp_path_factory.mktemp("base2") / "out", **TWO)


@pytest.fixture(scope="module")
def trained(base):
    """Settings of an evaluation of what the uninterrupted run has made."""
    return {"EVAL_ONLY": "1", "MODEL_PATH": str(base.folder / "final_model.int8.ptz")}


# ---- SIGKILL at seeded moments ---------------------------------------------------------------------------------------

# What is awaited, the most seconds that a seeded delay adds, and the seeds: a line of output, or, with a dot, the
# temporary name of a file that is being written.
MOMENTS = {
    "loading": (r"sha256 val:", 0.3, [11]),
    "training": (r"step:2/40 ", 0.5, [21]),
    "late training": (r"step:34/40 ", 0.1, [31]),
    "first checkpoint": (r".test~test.step000000005.pt.", 0.002, [41]),
    "checkpoint": (r".test~test.step000000025.pt.", 0.004, [51]),
    "last checkpoint": (r".test~test.step000000040.pt.", 0.003, [61]),
    "weights": (r".test~final_model.pt.", 0.003, [71]),
    "artifact": (r".test~final_model.int8.ptz.", 0.002, [81]),
    "ttt": (r"audit causality: condition:ttt", 0.3, [91, 92]),
    "stream": (r"audit causality: condition:stream", 0.2, [101]),
    "scores": (r".test~scores.csv.", 0.001, [111]),
}
EARLY = (
    "loading",
    "training",
    "late training",
    "first checkpoint",
    "checkpoint",
)  # the artifact says all that follows
UNMET = []  # cases in which this machine was too fast to be met while writing
KILLS = [f"{name}-{seed}" for name, (_, _, seeds) in MOMENTS.items() for seed in seeds]


def killed(out, awaited, delay, settings):
    """A program that was killed at a moment; None if it was faster than this test."""
    with Program(out, **AUTO, **settings) as program:
        if not awaited.startswith("."):
            program.line(awaited)
            time.sleep(delay)
            if program.process.poll() is not None:
                return None
        else:
            folder = out / ("checkpoints" if "step" in awaited else "")
            folder.mkdir(exist_ok=True)

            def writing():
                return any(
                    name.startswith(awaited) and name.endswith(".tmp")
                    for name in os.listdir(folder)
                )

            def halted():
                with contextlib.suppress(FileNotFoundError):  # it has ended
                    return re.search(r"\) [Tt] ", Path(f"/proc/{program.pid}/stat").read_text())

            program.line("step:1/")
            program.until(writing, pause=0.0002)
            time.sleep(delay)
            program.kill(STOP)  # now look without haste
            stopped = program.until(halted)
            if not stopped or not writing():
                return None
        program.kill(KILL)
        program.end(-KILL)
        return program


def kill_and_go_on(base, folder, case):
    """(killed program, its files, resumed program), with up to three tries at meeting the moment."""
    name, _, seed = case.rpartition("-")
    (awaited, most, _), settings = MOMENTS[name], BRIEF if name in EARLY else {}
    for attempt in range(3):
        delay = random.Random(int(seed)).uniform(0, most) / 3**attempt
        if first := killed(folder / str(attempt), awaited, delay, settings):
            break
    else:
        UNMET.append(case)
        first = run(folder / "whole", **settings)
    left = content(first.folder)
    return first, left, run(first.folder, **AUTO, **settings)


@pytest.fixture(scope="module", autouse=True)
def killer(request, tmp_path_factory):
    """case -> its outcome: a thread runs the cases from the last on, beside the other tests, which take one core."""
    cases = [
        item.callspec.params["case"]
        for item in request.session.items
        if "killed_at_any" in item.name
    ]
    folders = {case: tmp_path_factory.mktemp("kill") for case in cases}
    base = request.getfixturevalue("base") if cases else None
    pool = ThreadPoolExecutor(1)
    ahead = {
        case: pool.submit(kill_and_go_on, base, folders[case], case) for case in reversed(cases)
    }

    def outcome(case):
        if ahead[case].cancel():  # not begun: done here
            return kill_and_go_on(base, folders[case], case)
        return ahead[case].result()

    yield outcome
    pool.shutdown(cancel_futures=True)


# ---- Checkpoints and resume ------------------------------------------------------------------------------------------


def test_the_last_two_checkpoints_are_kept(base):
    assert checkpoints(base.folder) == ["test.step000000035.pt", "test.step000000040.pt"]


def test_auto_without_a_checkpoint_starts_anew_and_one_is_written_at_the_end(tmp_path, base):
    done = run(tmp_path, **AUTO, **BRIEF, CHECKPOINT_EVERY="0", ITERATIONS="3")
    assert "resume: found no checkpoint; starting anew" in done.out.splitlines()
    assert checkpoints(tmp_path) == ["test.step000000003.pt"] and losses(done).keys() == {1, 2, 3}


def test_auto_takes_the_newest_by_time(tmp_path, base):
    """Not the one with the highest step; and what it continues is the uninterrupted run."""
    out = continued(base, tmp_path, step(35), step(40))
    os.utime(out / step(40), ns=(0, 0))
    done = run(out, **AUTO, **BRIEF)
    resumed = re.search(
        rf"^resume:{re.escape(str(out / step(35)))} step:35/40 train_time:(\d+)ms$", done.out, re.M
    )
    assert resumed and losses(done) == {n: loss for n, loss in losses(base).items() if n > 35}
    assert content(out, *ARTIFACTS) == content(base.folder, *ARTIFACTS)
    times = [int(ms) for ms in re.findall(r"train_loss:\S+ train_time:(\d+)ms", done.out)]
    before = re.search(r"^step:35/40 train_loss:\S+ train_time:(\d+)ms", base.out, re.M)[1]
    assert int(before) == int(resumed[1]) < times[0] and times == sorted(
        times
    )  # the clock goes on, too


def test_auto_takes_its_own_before_another_runs(tmp_path, base):
    """Which may be newer; without one of its own, the newest of all."""
    out = continued(base, tmp_path, step(35), step(40))
    (out / step(40)).rename(out / step(40).replace("test", "other"))
    assert "step:35/40 train" in re.search("^resume:.*", run(out, **AUTO, **BRIEF).out, re.M)[0]
    done = run(out, **AUTO | BRIEF | {"RUN_ID": "third"})
    assert re.search(r"^resume:\S*test\.step000000040\.pt ", done.out, re.M)


def test_a_clock_set_back_costs_no_checkpoint(tmp_path, base):
    """Those of an earlier run that claim to be newer do not push out the one just written."""
    out = continued(base, tmp_path, step(35))
    for number in (50, 60):
        shutil.copy(out / step(35), out / step(number))
        os.utime(out / step(number), (time.time() + 3600,) * 2)
    (start := out / "start.pt").write_bytes((out / step(35)).read_bytes())
    run(out, RESUME=str(start), **BRIEF)
    assert content(out, step(40)) and len(checkpoints(out)) == 2


@pytest.mark.parametrize("harm", ["cut", "flipped"])
def test_a_damaged_newest_checkpoint_is_skipped(tmp_path, base, harm):
    """With a warning, in favour of the previous one; given by its path it is an error."""
    out = continued(base, tmp_path, step(35), step(40))
    blob = bytearray((out / step(40)).read_bytes())
    blob[len(blob) // 2] ^= 64
    (out / step(40)).write_bytes(blob[: len(blob) // 2] if harm == "cut" else blob)
    if harm == "cut":
        refused = run(out, 1, **BRIEF | {"RUN_ID": "other", "RESUME": str(out / step(40))})
        assert re.fullmatch(rf"error: .*{re.escape(step(40))}.*\n", refused.err) and not losses(
            refused
        )
    done = run(out, **AUTO, **BRIEF)
    assert re.search(rf"^warning: skipped .*{re.escape(step(40))}", done.out, re.M)
    assert re.search(rf"^resume:\S*{re.escape(step(35))} step:35/40 ", done.out, re.M)
    assert losses(done) == {n: loss for n, loss in losses(base).items() if n > 35}
    assert content(out, *ARTIFACTS, step(40)).items() >= content(base.folder, *ARTIFACTS).items()


def test_a_missing_checkpoint_is_an_error(tmp_path):
    done = run(tmp_path, 1, RESUME=str(tmp_path / "nothing.pt"), **BRIEF)
    assert re.fullmatch(r"error: .*nothing\.pt.*\n", done.err)


def other_data(data, folder, name):
    """Settings with a copy of the data in which one token, or one byte of the tokenizer, is another one."""
    shutil.copytree(data, folder)
    blob = bytearray((folder / DATA[name]).read_bytes())
    if name == "tokenizer":
        blob += b"\xfa\x7f\x00"  # an empty field of a number that no tokenizer has: it still loads
    else:
        blob[-20] ^= 1
    (folder / DATA[name]).write_bytes(blob)
    return {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(folder / DATA["tokenizer"])}


@pytest.mark.parametrize(
    "names", [("MATRIX_LR", "train"), ("SEED", "val"), ("ITERATIONS", "tokenizer")]
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, base, data, names):
    """Other settings or data, two at once: the line names both and nothing else; nothing is trained or written."""
    out = continued(base, tmp_path / "out", step(40))
    changed = {"MATRIX_LR": "0.05", "SEED": "5", "ITERATIONS": "41"}[names[0]]
    how = AUTO if names[0] == "SEED" else {"RESUME": str(out / step(40))}
    done = run(
        out,
        1,
        **how,
        **BRIEF,
        **{names[0]: changed},
        **other_data(data, tmp_path / "data", names[1]),
    )
    assert re.fullmatch(r"error: .*\n", done.err)
    assert set(re.findall(r"([\w.]+)=", done.err)) == {
        names[0],
        DATA[names[1]].removesuffix(".model"),
    }, done.err
    assert content(out, step(40)) == content(base.folder, step(40)) and not losses(done)
    assert not list(out.glob("final_model*"))


def same_losses_from_35_on(program, base):
    """Up to the order of sums, which another number of ranks changes."""
    found, expected = (
        {n: float(loss) for n, loss in losses(p).items() if n > 35} for p in (program, base)
    )
    assert found == pytest.approx(expected, abs=3e-4)


def test_another_world_size_goes_on(tmp_path, base):
    """From one rank to two, of which the second one sees another folder, without any checkpoint."""
    apart = script_behind(tmp_path, 'os.environ["OUT_DIR"] += os.environ["RANK"]')
    continued(base, tmp_path / "out0", step(35))
    with Program(tmp_path / "out", script=apart, **AUTO, **TWO, **BRIEF) as done:
        done.end()
    assert re.search(rf"^resume:\S*out0/{re.escape(step(35))} step:35/40 ", done.out, re.M)
    same_losses_from_35_on(done, base)
    assert "world_size:2" in done.out and not checkpoints(tmp_path / "out1")
    found, expected = (
        tg.load_state(folder / step(40))["tensors"] for folder in (tmp_path / "out0", base.folder)
    )
    for name, tensor in expected.items():  # the optimizers' as well, half of them the second rank's
        assert (found[name] - tensor).abs().max() <= 0.02 * tensor.abs().max(), name


def test_a_checkpoint_of_two_ranks_goes_on_with_one(tmp_path, base2):
    out = continued(base2, tmp_path, step(35))
    done = run(out, RESUME=str(out / step(35)), **BRIEF)
    assert re.search(rf"^resume:\S*{re.escape(step(35))} step:35/40 ", done.out, re.M)
    same_losses_from_35_on(done, base2)
    assert "world_size:1" in done.out


# ---- Signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [TERM, INT])
def test_a_signal_in_training_stops_after_the_step(tmp_path, base, number):
    """With a checkpoint, status 75, and a line that says how to go on. An echo of the signal is no second one."""
    with Program(tmp_path, CHECKPOINT_EVERY="0", **BRIEF) as first:
        first.line("step:7/")
        first.kill(number)
        first.kill(number)
        first.end(75)
    last = max(losses(first))
    line = rf"stopped by {number.name}: after step {last} of 40.*RESUME=auto.*\n"
    assert re.fullmatch(line, first.err) and first.log.endswith(first.err)
    assert checkpoints(tmp_path) == [f"test.step{last:09d}.pt"] and not list(
        tmp_path.glob("final_model*")
    )
    if number == TERM:  # from the other the way on is the same
        done = run(tmp_path, **AUTO, **BRIEF)
        assert f"step:{last}/40" in re.search("^resume:.*", done.out, re.M)[0]
        assert losses(first, done) == losses(base) and min(losses(done)) == last + 1
        assert content(tmp_path, *ARTIFACTS) == content(base.folder, *ARTIFACTS)


@pytest.mark.parametrize("name", ["ttt", "stream"])
def test_a_signal_in_evaluation_keeps_what_is_done(tmp_path, base, trained, name):
    """The next attempt, which need not ask for it, computes less and prints the same."""
    for share in SHARES:  # until some of its documents have ended, but not all
        (tmp_path / "scores.csv").unlink(missing_ok=True)
        with Program(tmp_path, **trained) as first:
            first.line(f"audit causality: condition:{name}")
            time.sleep(share * seconds(base, name))
            first.kill(TERM)
            code = first.process.wait(LONG)
        if code == 75 and finished(tmp_path, name):
            break
    assert (
        code == 75
        and re.fullmatch(r"stopped by SIGTERM: .*\n", first.err)
        and first.log.endswith(first.err)
    )
    assert finished(tmp_path, name) and not (tmp_path / "scores.csv").exists()
    done = run(tmp_path, **trained)
    assert scores(done) == scores(base)[1:]  # the first line is of the training
    assert content(tmp_path, "scores.csv") == content(base.folder, "scores.csv") and not parts(
        tmp_path
    )
    assert positions(done, name) < positions(base, name)


@pytest.mark.parametrize(("one", "two"), [(TERM, TERM), (INT, TERM)])
def test_a_second_signal_ends_the_process_at_once(tmp_path, one, two):
    """In the middle of a step that would take minutes."""
    settings = {
        "TRAIN_BATCH_TOKENS": str(128 * 20000),
        "GRAD_ACCUM_STEPS": "20000",
        "WARMUP_STEPS": "0",
    }
    with Program(tmp_path, **settings) as program:
        program.line("model_params:")
        time.sleep(0.3)
        program.kill(one)
        time.sleep(1)
        assert program.process.poll() is None
        ended(program, two)
        program.end(-two)
    assert not checkpoints(tmp_path) and not losses(program)


def ended(program, number, pid=None):
    """Send the signal once a second until its addressee is gone: on a busy machine an early one passes for an echo."""
    for _ in range(20):
        program.kill(number, pid)
        for _ in range(100):
            if program.process.poll() is not None if pid is None else pid not in program.family():
                return
            time.sleep(0.01)
    raise AssertionError("it lives")


def test_a_second_signal_ends_a_rank_that_waits_for_another(tmp_path):
    """Inside a reduction, which lets no handler of Python run until the other rank, here stopped, has come."""
    with Program(tmp_path, CHECKPOINT_EVERY="0", **TWO, **ENDLESS) as program:
        program.line("step:5/")
        first, second = program.rank(0), program.rank(1)
        program.kill(STOP, second)
        time.sleep(1)
        program.kill(TERM, first)
        time.sleep(1)
        assert first in program.family()
        ended(program, TERM, first)
        program.kill(KILL, second)
        program.end(None)


def test_a_rank_that_has_nothing_left_to_score_hears_signals(tmp_path, trained):
    """One document for two ranks: the second waits, and is not taken for dead."""
    long = {
        "MAX_VAL_DOCS": "4",
        "DATA_PATH": str(CONFORMANCE),
        "EVAL": "stream",
        "TTT_STREAM_CHUNK": "1",
    }
    with Program(tmp_path, **TWO, **trained | long | {"TTT_BATCH_SIZE": "1"}) as first:
        first.line("audit causality: condition:stream")
        time.sleep(1)
        first.kill(TERM)
        first.end(None)
    assert "stopped by SIGTERM: rank 0: what is finished is kept" in first.log
    assert (
        "stopped by SIGTERM: rank 1: what is finished is kept" in first.log
        and "error:" not in first.log
    )


@pytest.mark.parametrize("addressee", ["torchrun", 1])
def test_a_signal_stops_two_ranks_after_the_same_step(tmp_path, base2, addressee):
    """Whether all ranks hear it or one alone; resuming gives the uninterrupted result."""
    with Program(tmp_path, CHECKPOINT_EVERY="0", **TWO, **BRIEF) as first:
        first.line("step:5/")
        first.kill(TERM, first.pid if addressee == "torchrun" else first.rank(addressee))
        first.end(None)
    stops = re.findall(
        r"^stopped by SIGTERM: (?:rank \d: )?after step (\d+) of 40", first.err, re.M
    )
    last = max(losses(first))
    assert stops and set(stops) == {str(last)} and 'train_gpt.py", line' not in first.err
    assert checkpoints(tmp_path) == [f"test.step{last:09d}.pt"]
    assert re.search(
        rf"^stopped by SIGTERM: .*after step {last} of 40.*RESUME=auto", first.log, re.M
    )
    if addressee == "torchrun":
        done = run(tmp_path, **AUTO, **TWO, **BRIEF)
        assert losses(first, done) == losses(base2) and min(losses(done)) == last + 1
        assert content(tmp_path, *ARTIFACTS) == content(base2.folder, *ARTIFACTS)


# ---- Evaluations that go on ------------------------------------------------------------------------------------------


def test_an_evaluation_saves_its_documents_every_few_seconds(tmp_path, base, trained):
    """Killed without warning after the first save, it goes on behind it, and ends as one that nobody killed."""
    for share in SHARES:
        with Program(tmp_path, **trained) as first:
            first.line("audit causality: condition:ttt")
            time.sleep(share * seconds(base, "ttt"))
            first.kill(STOP)
            time.sleep(5)
            first.kill(CONT)
            first.until(lambda: parts(tmp_path))
            first.kill(KILL)
        if finished(tmp_path, "ttt"):
            break
    assert finished(tmp_path, "ttt"), "no documents were saved"
    done = run(tmp_path, **trained)
    assert scores(done) == scores(base)[1:] and not parts(tmp_path)
    assert content(tmp_path, "scores.csv") == content(base.folder, "scores.csv")
    assert positions(done, "ttt") < positions(base, "ttt")


def test_an_evaluation_out_of_time_says_so_and_can_go_on(tmp_path, base, trained):
    first = cut_short(tmp_path, base, trained)
    for name in ("ttt", "stream"):
        coverage = re.search(
            rf"^audit coverage: condition:{name} .* out_of_time:(\d+) PASS partial$",
            first.out,
            re.M,
        )
        targets, scored = re.search(r"targets:(\d+) scored_once:(\d+) ", coverage[0]).groups()
        assert int(coverage[1]) + int(scored) == int(targets) and int(scored) > 0
        assert re.search(
            rf"^ladder condition:{name} .* tokens:{scored} .* partial$", first.out, re.M
        )
        assert re.search(rf"^final_int8_ttt_(?:lora|{name}) .* partial$", first.out, re.M)
    assert not re.search(r"condition:flat .*(?:partial|out_of_time)", first.out) and parts(tmp_path)
    done = run(tmp_path, **trained, EVAL_MAX_SECONDS="100")
    assert scores(done) == scores(base)[1:] and not re.search(
        "partial$|out_of_time:", done.out, re.M
    )
    assert content(tmp_path, "scores.csv") == content(base.folder, "scores.csv") and not parts(
        tmp_path
    )
    for name in ("ttt", "stream"):
        assert positions(done, name) < positions(base, name)


def test_damaged_parts_of_an_evaluation_are_scored_again(tmp_path, base, trained):
    """Whatever is wrong with what an earlier attempt has kept: a warning, and the same scores."""
    cut_short(tmp_path, base, trained)
    good = next(path for path in parts(tmp_path) if path.name.startswith("stream"))
    state = tg.load_state(good)
    wrong = {
        "cut": good.read_bytes()[:-100],
        "without": {"at": state["at"]},
        "far": state | {"at": state["at"] + 10**9},
        "twice": state | {"entries": state["entries"] * 2},
        "endless": state | {"entries": state["entries"] * torch.tensor([[float("inf")], [1]])},
        "text": state | {"seconds": "long"},
    }
    for number, bad in enumerate(wrong.values()):
        path = good.with_name(good.name.replace(".0.part", f".{number + 1}.part"))
        path.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, path)
    done = run(tmp_path, **trained, EVAL_MAX_SECONDS="100")
    assert len(re.findall(r"^warning: skipped \S*stream-\S*\.part: ", done.out, re.M)) == len(wrong)
    assert scores(done) == scores(base)[1:] and not parts(tmp_path)
    assert content(tmp_path, "scores.csv") == content(base.folder, "scores.csv")


# ---- Ranks that are lost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "rank"), [("step:12/", 1), ("audit causality: condition:ttt", 0)]
)
def test_torchrun_restarts_and_the_run_ends_as_if_nothing_had_happened(
    tmp_path, base2, moment, rank
):
    """One rank is killed, in training and in evaluation; the logs of both attempts are there."""
    late = "audit" in moment
    out, settings = (continued(base2, tmp_path, step(40)), {}) if late else (tmp_path, BRIEF)
    with Program(out, restarts=1, **AUTO, **TWO, **settings) as program:
        program.line(moment)
        time.sleep(0.4 * seconds(base2, "ttt") if late else 0.05)
        program.kill(KILL, program.rank(rank))
        program.end()
    assert len(re.findall("^resume:.* step:[1-9]", program.out, re.M)) == 1 + late
    again = re.findall(
        r"^(?:ladder condition:|final_\w+|step:\d+/\d+ (?=val)).*", program.log, re.M
    )
    assert [re.sub(r" (?:eval|train)_time:.*", "", line) for line in again] == scores(base2)[
        : None if late else 4
    ]
    assert late or losses(program) == losses(base2)
    names = (*ARTIFACTS, "scores.csv") if late else ARTIFACTS
    assert (
        content(tmp_path, *names) == content(base2.folder, *names)
        and (tmp_path / "logs" / "test.1.txt").exists()
    )
    assert not parts(tmp_path)


@pytest.mark.parametrize("moment", ["step:5/", "audit causality: condition:ttt"])
def test_a_killed_rank_ends_the_others(tmp_path, base2, moment):
    """Without restarts: in training and in evaluation the log says that something went wrong."""
    out = continued(base2, tmp_path, step(40)) if "audit" in moment else tmp_path
    settings = AUTO | {"TTT_BATCH_SIZE": "1"} if "audit" in moment else ENDLESS
    with Program(out, **TWO, **settings) as program:
        program.line(moment)
        time.sleep(0.2)
        program.kill(KILL, program.rank(1))
        began = time.monotonic()
        program.end(None)
        assert time.monotonic() - began < 60 and not program.family()
    assert re.search(r"^error: no word from rank 1: rank 0: .*RESUME=auto", program.log, re.M), (
        program.log[-2000:]
    )


def test_a_hanging_rank_is_given_up(tmp_path):
    with Program(tmp_path, **TWO, **ENDLESS, RANK_TIMEOUT_SECONDS="5") as program:
        program.line("step:5/")
        first, second = program.rank(0), program.rank(1)
        program.kill(STOP, second)
        program.until(lambda: first not in program.family())
        program.kill(KILL, second)  # torchrun takes 30 s to do so
        program.end(None)
    assert re.search(r"^error: no word from rank 1: rank 0: .*RESUME=auto", program.log, re.M), (
        program.log[-2000:]
    )


# ---- Logs ------------------------------------------------------------------------------------------------------------


def test_two_runs_of_one_name(tmp_path, trained):
    """The second is refused while the first lives, which takes no notice; afterwards the old log gets a number."""
    log = tmp_path / "logs" / "test.txt"
    with Program(tmp_path, **ENDLESS, CHECKPOINT_EVERY="0", CHECKPOINT_SECONDS="0.3") as first:
        first.line("step:10/")
        before = log.read_bytes()
        refused = run(tmp_path, 1, **BRIEF)
        assert re.fullmatch(r"error: RUN_ID=test: .*\n", refused.err) and not losses(refused)
        assert first.process.poll() is None and log.read_bytes().startswith(before)
        assert first.until(lambda: len(checkpoints(tmp_path)) >= 2)  # written by time, not by steps
        first.kill(TERM)
        first.end(75)
    assert len(checkpoints(tmp_path)) == 2
    old = log.read_bytes()
    assert old.startswith(before) and old.endswith(first.err.encode())
    second = run(tmp_path, **trained, EVAL="flat")
    assert (tmp_path / "logs" / "test.1.txt").read_bytes() == old
    assert log.read_text().endswith(second.out) and len(list(log.parent.iterdir())) == 2


# ---- A full disk -----------------------------------------------------------------------------------------------------


def refused_write(program, name):
    """One line names the file that could not be written; no traceback, no temporary file."""
    assert re.fullmatch(rf"error: .*{re.escape(name)}.*\n", program.err), program.err
    assert not list(program.folder.rglob("*.tmp")) and not list(program.folder.rglob(".*.tmp"))


def test_no_room_for_the_head_of_the_log(tmp_path, base, trained):
    settings = trained | {"EVAL": "flat", "RUN_ID": "new", "SCORES_PATH": None}
    folder, names = (
        continued(base, tmp_path, *ARTIFACTS, "logs/test.txt"),
        (*ARTIFACTS, "logs/test.txt"),
    )
    refused_write(run(folder, 1, **settings, limit=50_000), "logs/new.txt")
    assert content(folder, *names) == content(base.folder, *names)


def test_no_room_for_more_of_the_log_ends_no_training(tmp_path, base):
    """One warning, a log with gaps, and all else as ever: the disk has room again before the model is written."""
    with Program(tmp_path, **BRIEF, CHECKPOINT_EVERY="0") as program:
        program.line("step:2/")
        program.limit((tmp_path / "logs" / "test.txt").stat().st_size)
        program.line("step:30/")
        program.limit(resource.RLIM_INFINITY)
        program.end()
    assert re.fullmatch(r"warning: .*logs/test\.txt: File too large; .*\n", program.err)
    assert losses(program) == losses(base) and len(re.findall("train_loss", program.log)) < 40
    assert content(tmp_path, *ARTIFACTS) == content(base.folder, *ARTIFACTS)


def test_a_reader_that_leaves_ends_no_training(tmp_path, base):
    """As in `python train_gpt.py | head -n 3`."""
    command, env = invocation(tmp_path, **RUN | BRIEF)
    piped = subprocess.run(
        f"{shlex.join(command)} | head -n 3",
        shell=True,
        env=env,
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert len(piped.stdout.splitlines()) == 3 and piped.stderr.startswith(
        "warning: standard output: Broken pipe; "
    )
    assert content(tmp_path, *ARTIFACTS) == content(base.folder, *ARTIFACTS)
    assert (tmp_path / "logs" / "test.txt").read_text().count("/40 train_loss:") == 40


def test_no_room_for_a_checkpoint(tmp_path, base):
    """The training goes on without, the earlier one stays, and nothing half written."""
    out = continued(base, tmp_path, step(35))
    done = run(out, **AUTO, **BRIEF, CHECKPOINT_EVERY="2", limit=700_000)
    warned = re.findall(r"^warning: .*without this save.*", done.out, re.M)
    assert len(warned) == 4 and all("test.step" in line for line in warned), (
        done.out
    )  # 36, 38, 40 and the end
    assert (
        done.err == ""
        and checkpoints(out) == ["test.step000000035.pt"]
        and not list(out.rglob(".*"))
    )
    assert losses(done) == {n: loss for n, loss in losses(base).items() if n > 35}
    names = (*ARTIFACTS, step(35))
    assert content(out, *names) == content(base.folder, *names)


def earlier(out, *names):
    """Files of these names with known content."""
    for name in names:
        (out / name).write_bytes(b"from an earlier run: " + name.encode())
    return content(out)


def test_no_room_for_the_weights(tmp_path, base):
    out = continued(base, tmp_path, step(40))
    before = earlier(out, *ARTIFACTS, "scores.csv")
    done = run(out, 1, **AUTO, limit=300_000)
    refused_write(done, "final_model.pt")
    assert content(out, *before) == before
    assert content(out).keys() - before.keys() == {"logs/test.txt"}


def test_no_room_for_the_artifact(tmp_path, base):
    """The limit comes while the weights, which are larger, are on their way to the disk."""
    size, status = (base.folder / "final_model.pt").stat().st_size, 0
    for attempt in range(3):
        out = continued(base, tmp_path / str(attempt), step(40))
        before = earlier(out, "final_model.int8.ptz", "scores.csv")
        before.pop(step(40))  # written again, with a clock a little later

        def weights_written(out=out):
            found = [
                path.stat().st_size
                for path in (*out.glob(".*~final_model.pt.*"), *out.glob("final_model.pt"))
            ]
            return found == [size]

        with Program(out, **AUTO) as program:
            with contextlib.suppress(FileNotFoundError):  # it was renamed just now
                program.until(weights_written, pause=0.0002)
            program.limit(200_000)
            status = program.process.wait(LONG)
        if status:
            break
    program.end(1)
    refused_write(program, "final_model.int8.ptz")
    assert content(out, *before) == before
    assert content(out, "final_model.pt") == content(base.folder, "final_model.pt")
    assert content(out).keys() - before.keys() == {"final_model.pt", "logs/test.txt", step(40)}


def test_no_room_for_the_scores(tmp_path, base, trained):
    before = earlier(continued(base, tmp_path, "logs/test.txt"), "scores.csv")
    done = run(
        tmp_path,
        1,
        **trained | {"EVAL": "flat,doc", "TTT_CHUNK_SIZE": "1", "RUN_ID": "new"},
        limit=200_000,
    )
    refused_write(done, "scores.csv")
    assert content(tmp_path, *before) == before
    assert re.search("^ladder condition:flat ", done.out, re.M)  # the score itself is not lost


# ---- The kills, last, since a thread has been at them since the start ------------------------------------------------


def test_what_the_uninterrupted_run_has_written_can_be_read(base):
    """So that files which equal its files are whole."""
    files = content(base.folder)
    assert files.keys() == {*ARTIFACTS, "scores.csv", "logs/test.txt", step(35), step(40)}
    torch.load(base.folder / "final_model.pt", weights_only=True)
    assert zlib.decompress(files["final_model.int8.ptz"]) and files["scores.csv"].endswith(b"\n")


@pytest.mark.parametrize("case", KILLS)
def test_killed_at_any_moment_the_run_can_go_on(base, killer, case):
    """Nothing is half written, and the next attempt ends as the uninterrupted run did, to the last bit."""
    first, left, done = killer(case)
    whole = content(base.folder)
    known = (
        r"logs/test\.txt|(.*/)?\.[^/]+\.tmp|checkpoints/(test\.step\d{9}\.pt|[a-z]+-[\w.]+\.part)"
    )
    for name in left.keys() - whole.keys():
        assert re.fullmatch(known, name)  # whether a checkpoint is whole, the next attempt says
    for name in left.keys() & {*ARTIFACTS, "scores.csv"}:
        assert left[name] == whole[name], name
    assert "warning: skipped" not in done.out and done.err == ""
    last = max(
        [int(name[-10:-3]) for name in left if name.startswith("checkpoints/test.step")], default=0
    )
    resumed = re.search(r"^resume:.* step:(\d+)/40 |^resume: found no checkpoint", done.out, re.M)
    assert int(resumed[1] or 0) == last >= max(losses(first), default=0) // 5 * 5 - 5
    assert losses(done).keys() == set(range(last + 1, 41))
    assert losses(first, done).items() <= losses(base).items()
    same_end(done, base, case.rpartition("-")[0] in EARLY)
    assert (
        checkpoints(done.folder)[-1] == "test.step000000040.pt"
        and len(checkpoints(done.folder)) <= 2
    )


def test_most_kills_have_met_their_moment():
    assert len(UNMET) <= 2, UNMET
