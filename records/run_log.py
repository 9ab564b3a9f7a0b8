"""Read what train_gpt.py wrote to logs/{RUN_ID}.txt, and refuse what cannot be trusted.

A log is the script's own source, the machine, and then one attempt after another, since RESUME goes
on in the same file. The last attempt must have finished; the others must be attempts at the same
run, of which ITERATIONS and MAX_WALLCLOCK_SECONDS may be raised by an attempt that says so. What a
log says twice must agree: the source and its hash, the command and the settings, bits per byte and
loss, tokens and bytes, the audits and the results, the sizes and their sum, the times. Audits must
have passed. Partial runs and artifacts over the budget are read like any other, because a
picture of them does no harm; make_record.py says what else a record needs.
"""

import dataclasses
import hashlib
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

RULE = "=" * 100  # stands before and after the description of the machine
PARTIAL = " partial"  # ends the lines of a run that evaluates only some documents, `result:` apart

# What people call the conditions. One that is not here goes by its name alone.
LABELS = {
    "flat": "cross-document, flat stream",
    "doc": "+ document-isolated",
    "stride": "+ stride, windows that overlap",
    "ttt": "+ LoRA test-time training",
    "stream": "replaces ttt: a learning stream",
    "stride+copy": "stride mixed with a copy model",
    "mix": "stride, stream and copy mixed",
}
MIXTURES = ("stride+copy", "mix")  # need weights, which calibration may have had no time to find
# Commands may give these values; the line `config:` has what the program chose instead.
CHOSEN = {("PRESET", "auto"), ("DEVICE", "auto"), ("GRAD_ACCUM_STEPS", "0")}
# In these, attempts at one run may differ: the log's own name may be given to go on with it.
RESUMING = ("RESUME", "RUN_ID")
# These may be larger in a later attempt, which must say so in a line 'resume: A was 4, now 8'.
GROWING = ("ITERATIONS", "MAX_WALLCLOCK_SECONDS")
CHANGE = re.compile(rf" ({'|'.join(GROWING)}) was (\S+), now (\S+)")
FULL_VALIDATION = "full FineWeb (50,000 documents, 62,021,846 tokens)"
NOT_FULL = r"not the full FineWeb \([\d,]+ documents, [\d,]+ tokens\)"
VALIDATION = f"{re.escape(FULL_VALIDATION)}|{NOT_FULL}"
EVALUATION_LIMIT = 600  # seconds that the game allows for scoring
HASH = r"([0-9a-f]{64})"
LAUNCHER = r"(?:torchrun --standalone --nproc_per_node=(\d+)|python) train_gpt\.py"
# The settings that the tools use, as the program spells them.
FORMS = {
    "PRESET": "baseline|cpu",
    "DEVICE": "cpu|cuda",
    "EVAL_ONLY": "[01]",
    "MODEL_PATH": ".*",
    "DATA_PATH": ".+",
    "SEED": r"\d+",
    "EVAL": r"[\w+]+(,[\w+]+)*",
    "ITERATIONS": r"\d+",
    "MAX_VAL_DOCS": r"\d+",
    "TTT_CHUNK_SIZE": r"[1-9]\d*",
    "MAX_WALLCLOCK_SECONDS": r"\d+(\.\d+)?(e[+-]\d+)?",
}


@dataclass(frozen=True)
class Result:
    """What one condition scored: the object behind `result: `, whose keys are these fields."""

    condition: str
    val_loss: float  # nats per token
    val_bpb: float  # bits per byte
    documents: int
    tokens: int
    bytes: int
    seconds: float
    partial: bool  # only some documents were scored


@dataclass(frozen=True)
class Point:
    """A loss in nats per token after `step` steps and `milliseconds` of training."""

    step: int
    loss: float
    milliseconds: int


@dataclass(frozen=True)
class Sizes:
    """Bytes of a submission."""

    model: int
    code: int
    total: int
    budget: int


@dataclass(frozen=True)
class RunLog:
    """One finished run, as its last attempt describes it. Hashes are SHA-256 in hexadecimal."""

    path: Path
    content: bytes  # the file
    source: str  # of train_gpt.py
    attempts: int
    partial: bool
    hardware: str
    started: str  # UTC, as in 2026-11-28T13:00:00Z, so that text sorts by time
    command: str
    config: Mapping[str, str]  # every setting by its variable
    versions: str
    preset: str
    device: str
    world_size: int
    dtype: str
    script_hash: str
    tokenizer_hash: str
    val_hashes: Mapping[str, str]  # by shard
    artifact_hash: str
    causal: tuple[str, ...]  # conditions whose audit of causality passed
    changes: tuple[str, ...]  # settings that a later attempt raised, as 'ITERATIONS was 4, now 8'
    calibration_left: float  # seconds before the time limit when training text was read last
    validation_set: str  # FULL_VALIDATION, or what was scored instead
    eval_seconds: float  # of what the game counts: `flat` and the last condition with its audit
    eval_verdict: str  # PASS or FAIL against EVALUATION_LIMIT; empty where there is no limit
    training: tuple[Point, ...]  # of all attempts, without what a later one trained again
    validation: tuple[Point, ...]  # the same; the last one is after the last step
    sizes: Sizes | None  # None where nothing was trained
    results: tuple[Result, ...]  # in the order of EVAL; the last is the score of the run
    scores: tuple[str, str] | None  # path and hash of the scores file

    @property
    def seed(self) -> int:
        """SEED of the run."""
        return int(self.config["SEED"])

    @property
    def score(self) -> Result:
        """The result that counts: the last."""
        return self.results[-1]


@dataclass(frozen=True)
class Attempt:
    """The lines of one attempt. Every method refuses lines that are not as asked for."""

    path: Path
    number: int
    lines: list[str]

    def refuse(self, found: str, expected: str) -> NoReturn:
        """Raise the `ValueError`."""
        raise ValueError(f"{self.path}: attempt:{self.number}: found {found}; expected {expected}")

    def all(self, prefix: str) -> list[str]:
        """What follows `prefix` in every line that starts with it."""
        return [line.removeprefix(prefix) for line in self.lines if line.startswith(prefix)]

    def one(self, prefix: str) -> str:
        """What follows `prefix` in the only line that starts with it."""
        found = self.all(prefix)
        if len(found) != 1:
            self.refuse(f"{len(found)} lines '{prefix}'", "one")
        return found[0]

    def parse(self, prefix: str, text: str, form: str) -> re.Match:
        """The match of the regular expression `form` with the text behind `prefix`."""
        match = re.fullmatch(form, text)
        if match is None:
            self.refuse(repr(prefix + text), f"'{prefix}' and then {form}")
        return match

    def parse_one(self, prefix: str, form: str) -> re.Match:
        """The match of `form` with what follows `prefix` in the only line that starts with it."""
        return self.parse(prefix, self.one(prefix), form)

    def words(self, text: str) -> list[str]:
        """The words of a text as a shell reads them."""
        try:
            return shlex.split(text)
        except ValueError:
            self.refuse(repr(text), "text quoted as for a shell")

    def settings(self, text: str) -> dict[str, str]:
        """The NAME=value pairs of a text."""
        settings = {}
        for word in self.words(text):
            name, sign, value = word.partition("=")
            if not sign:
                self.refuse(repr(word), "NAME=value")
            settings[name] = value
        return settings


def run_command(work: Callable[[], None], place: object = "") -> int:
    """Run a command and return its exit status; a user's error becomes one line on stderr.

    place: named where an `OSError` names no file.
    """
    try:
        work()
    except OSError as error:
        name = error.filename or place
        print(f"error: {name}: {error.strerror}; expected a usable path", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def read_log(path: Path) -> RunLog:
    """Return the run in this file.

    Raises `ValueError`, in one line, for a log that contradicts itself or holds no finished run.
    """
    content = path.read_bytes()
    source, attempts = split_log(path, content)
    last = attempts[-1]
    check_finished(last)
    check_same_run(attempts)
    config = read_config(last)
    where = last.parse_one("preset:", r"(\w+) device:(\S+) world_size:(\d+) dtype:(\S+)")
    preset, device = where[1], where[2]
    conditions = config["EVAL"].split(",")
    if last.all("left out of EVAL: the mixtures, "):
        conditions = [name for name in conditions if name not in MIXTURES]
    results = read_results(last, conditions)
    check_audits(last, results)
    eval_seconds, eval_verdict = read_eval_time(last, preset, results)
    validation = read_points(attempts, "val")
    trained = config["EVAL_ONLY"] == "0"
    if trained:
        check_last_step(last, config, validation)
    return RunLog(
        path=path,
        content=content,
        source=source,
        attempts=len(attempts),
        partial=config["MAX_VAL_DOCS"] != "0" or any(result.partial for result in results),
        hardware=last.one("hardware: "),
        started=last.parse_one("started:", r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")[0],
        command=read_command(last, config, preset, device, where[3]),
        config=config,
        versions=last.one("versions: "),
        preset=preset,
        device=device,
        world_size=int(where[3]),
        dtype=where[4],
        script_hash=check_source(attempts, source),
        tokenizer_hash=last.parse_one("sha256 tokenizer:", HASH)[1],
        val_hashes=read_shards(last),
        artifact_hash=last.parse_one("sha256 artifact:", f"{HASH} .+")[1],
        causal=tuple(line.split()[0] for line in last.all("audit causality: condition:")),
        changes=tuple(change[0].strip() for change in read_changes(attempts)),
        calibration_left=read_calibration(last),
        validation_set=last.parse_one("validation: ", VALIDATION)[0],
        eval_seconds=eval_seconds,
        eval_verdict=eval_verdict,
        training=read_points(attempts, "train"),
        validation=validation,
        sizes=read_sizes(last, source) if trained else None,
        results=results,
        scores=read_scores_line(last),
    )


def split_log(path: Path, content: bytes) -> tuple[str, list[Attempt]]:
    """Return the source at the head of a log, and its attempts."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        message = "found bytes that are not UTF-8; expected a log of train_gpt.py"
        raise ValueError(f"{path}: {message}") from None
    parts = text.split(f"\n{RULE}\n")
    if len(parts) != 3:
        found = f"{len(parts) - 1} lines of 100 '='"
        raise ValueError(f"{path}: found {found}; expected 2: the log of one run has one head")
    source, _, body = parts
    before, *pieces = re.split(rf"^attempt:(\d+)(?:{PARTIAL})?\n", body, flags=re.MULTILINE)
    if before.strip() or not pieces:
        found = body.split("\n")[0]
        expected = "'attempt:1', with which logs of this script go on (older logs are not read)"
        raise ValueError(f"{path}: found {found!r} below the head; expected {expected}")
    attempts = []
    for number, piece in zip(pieces[::2], pieces[1::2], strict=True):
        lines = [line.removesuffix(PARTIAL) for line in piece.split("\n")]
        attempt = Attempt(path, len(attempts) + 1, lines)
        if int(number) != attempt.number:
            attempt.refuse(f"'attempt:{number}'", f"'attempt:{attempt.number}'")
        attempts.append(attempt)
    return source, attempts


# --- Attempts at one run ---


def check_finished(last: Attempt) -> None:
    """Refuse a run whose last attempt failed or was stopped."""
    for line in last.lines:
        if line.startswith(("error: ", "stopped by ")):
            last.refuse(repr(line), "a run that finished")


def check_source(attempts: Sequence[Attempt], source: str) -> str:
    """Return the hash of the source, which every attempt must have printed."""
    actual = hashlib.sha256(source.encode()).hexdigest()
    for attempt in attempts:
        for printed in attempt.all("sha256 script:"):
            if printed != actual:
                attempt.refuse(f"'sha256 script:{printed}'", f"{actual}, of the source at the head")
    attempts[-1].one("sha256 script:")
    return actual


def identity(attempt: Attempt) -> dict[str, str]:
    """Return what attempts at one run have in common, by a name for it, as far as this one came."""
    facts = {}
    for prefix in ("versions: ", "hardware: ", "preset:", "sha256 tokenizer:"):
        for text in attempt.all(prefix):
            facts[f"'{prefix}'"] = text
    for line in attempt.all("sha256 val:"):
        shard_hash, _, shard = line.partition(" ")
        facts[f"sha256 of {shard}"] = shard_hash
    for text in attempt.all("config: "):
        facts |= attempt.settings(text)
    for name in RESUMING:
        facts.pop(name, None)
    for command in attempt.all("command: "):
        words = attempt.words(command)
        # Of settings that may grow, the line `config:` has the values that count.
        kept = [word for word in words if word.split("=")[0] not in (*RESUMING, *GROWING)]
        facts["'command: '"] = shlex.join(kept)
    return facts


def read_changes(attempts: Sequence[Attempt]) -> list[re.Match]:
    """Return what attempts said of settings that they raised: matches of CHANGE."""
    changes = []
    for attempt in attempts:
        changes += filter(None, map(CHANGE.fullmatch, attempt.all("resume:")))
    return changes


def is_raised(name: str, value: str, now: str | None, later: Sequence[Attempt]) -> bool:
    """Whether a setting grew from `value` to `now`, and one of the later attempts says so."""
    said = [(change[1], change[3]) for change in read_changes(later)]
    if (name, now) not in said:
        return False
    before = float(value)
    after = float(now)
    if name == "MAX_WALLCLOCK_SECONDS":  # 0 is no limit
        before = before or math.inf
        after = after or math.inf
    return before < after


def check_same_run(attempts: Sequence[Attempt]) -> None:
    """Refuse attempts that differ from the last in more than RESUME, RUN_ID and what it raised."""
    last = attempts[-1]
    expected = identity(last)
    for attempt in attempts[:-1]:
        later = attempts[attempt.number :]
        for name, value in identity(attempt).items():
            now = expected.get(name)
            if value != now and not is_raised(name, value, now, later):
                attempt.refuse(f"{name} {value}", f"{now}, as in attempt:{last.number}")


def resumed_step(attempt: Attempt) -> int | None:
    """Return the step from which an attempt went on.

    -1 if it started anew; None if it did not resume, or was killed before it could.
    """
    found = [text for text in attempt.all("resume:") if not CHANGE.fullmatch(text)]
    if not found:
        return None
    if found[-1].startswith(" found no checkpoint"):
        return -1
    form = r".+ step:(\d+)/\d+ train_time:\d+ms"
    return int(attempt.parse("resume:", found[-1], form)[1])


def read_points(attempts: Sequence[Attempt], kind: str) -> tuple[Point, ...]:
    """Return the `train` or `val` losses of the run by rising steps.

    An attempt that resumes at step N replaces what earlier ones printed after step N.
    """
    form = re.compile(rf"step:(\d+)/\d+ {kind}_loss:(\d+\.\d+) .*train_time:(\d+)ms .*")
    points = {}
    for attempt in attempts:
        start = resumed_step(attempt)
        if start is not None:
            points = {step: point for step, point in points.items() if step <= start}
        elif points and attempt.all("step:"):
            attempt.refuse("lines 'step:' but none 'resume:'", "the step at which it went on")
        for match in filter(None, map(form.fullmatch, attempt.lines)):
            step = int(match[1])
            points[step] = Point(step, float(match[2]), int(match[3]))
    if list(points) != sorted(points):
        attempts[-1].refuse(f"{kind}_loss after the steps {list(points)}", "steps that rise")
    return tuple(points.values())


# --- The last attempt ---


def read_config(last: Attempt) -> dict[str, str]:
    """Return every setting of the run."""
    config = last.settings(last.one("config: "))
    for name, form in FORMS.items():
        value = config.get(name)
        if value is None or not re.fullmatch(form, value):
            last.refuse(f"{name}={value} in the line 'config:'", f"a value of the form {form}")
    return config


def read_command(
    last: Attempt, config: Mapping[str, str], preset: str, device: str, world_size: str
) -> str:
    """Return the command, which must give the settings of `config:` and start all ranks."""
    match = last.parse_one("command: ", f"(.* )?{LAUNCHER}")
    command = match[0]
    if (match[2] or "1") != world_size:
        last.refuse(f"world_size:{world_size}", f"the ranks that '{command}' starts")
    given = last.settings(match[1] or "").items() - CHOSEN
    given |= {("PRESET", preset), ("DEVICE", device.split(":")[0])}
    for name, value in sorted(given):
        if not same_value(value, config.get(name)):
            expected = f"{name}={config.get(name)}, as in the line 'config:'"
            last.refuse(f"{name}={value}", expected)
    return command


def same_value(given: str, shown: str | None) -> bool:
    """Whether two texts spell one value: 175 and 175.0 do."""
    try:
        return float(given) == float(shown)
    except (TypeError, ValueError):
        return given == shown


def read_shards(last: Attempt) -> dict[str, str]:
    """Return the hashes of the validation shards by their names, each of which may come once."""
    hashes = {}
    for line in last.all("sha256 val:"):
        match = last.parse("sha256 val:", line, f"{HASH} (.+)")
        if match[2] in hashes:
            last.refuse(f"two hashes of {match[2]}", "one")
        hashes[match[2]] = match[1]
    if not hashes:
        last.refuse("no line 'sha256 val:'", "one for each validation shard")
    return hashes


def read_scores_line(last: Attempt) -> tuple[str, str] | None:
    """Return the path and the hash of the scores file, None if there is none."""
    lines = last.all("scores:")
    if not lines:
        return None
    match = last.parse("scores:", lines[-1], rf"(.+) sha256:{HASH}")
    return match[1], match[2]


def check_last_step(last: Attempt, config: Mapping[str, str], validation: Sequence[Point]) -> None:
    """Refuse a training that was not validated after its last step."""
    end = config["ITERATIONS"]
    for line in last.all("stopping_early: "):
        end = last.parse("stopping_early: ", line, r".*step:(\d+)/\d+")[1]
    steps = [str(point.step) for point in validation]
    if steps[-1:] != [end]:
        found = ", ".join(steps) or "no step"
        last.refuse(
            f"val_loss after {found}", f"the last one after step {end}, where training ended"
        )


def read_sizes(last: Attempt, source: str) -> Sizes:
    """Return the bytes of the submission, added up again."""
    model = int(last.parse_one("Serialized model int8+zlib: ", r"(\d+) bytes.*")[1])
    code = len(source.encode())
    form = r"(\d+) budget:(\d+) headroom:(-?\d+) (PASS|FAIL)"
    match = last.parse_one("submission_size:", form)
    total = int(match[1])
    budget = int(match[2])
    if total != model + code:
        last.refuse(f"submission_size:{total}", f"model {model} + source {code} = {model + code}")
    headroom = budget - total
    verdict = "PASS" if headroom >= 0 else "FAIL"
    if (match[3], match[4]) != (str(headroom), verdict):
        last.refuse(f"headroom:{match[3]} {match[4]}", f"headroom:{headroom} {verdict}")
    return Sizes(model, code, total, budget)


def read_results(last: Attempt, conditions: list[str]) -> tuple[Result, ...]:
    """Return the result of each condition, in the order of EVAL."""
    results = tuple(read_result(last, text) for text in last.all("result: "))
    found = [result.condition for result in results]
    if found != conditions:
        expected = f"one for each of EVAL, '{','.join(conditions)}', in that order"
        last.refuse(f"results of '{','.join(found)}'", expected)
    sizes = {}
    for result in results:
        size = sizes.setdefault(result.tokens, result.bytes)
        if result.bytes != size:
            found = f"condition:{result.condition} bytes:{result.bytes}"
            last.refuse(found, f"{size}, as under the other conditions of {result.tokens} tokens")
    return results


def read_result(last: Attempt, text: str) -> Result:
    """Return one result, whose bits per byte must follow from loss, tokens and bytes."""
    fields = dataclasses.fields(Result)
    try:
        result = Result(**json.loads(text))
    except (TypeError, ValueError):  # no JSON, no object, or other keys
        names = ", ".join(field.name for field in fields)
        last.refuse(f"'result: {text}'", f"a JSON object with the keys {names}")
    for field in fields:
        value = getattr(result, field.name)
        if type(value) is not field.type:
            last.refuse(f"'result: {text}'", f"{field.name} of the type {field.type.__name__}")
    if result.tokens <= 0 or result.bytes <= 0 or not math.isfinite(result.val_loss):
        last.refuse(f"'result: {text}'", "tokens and bytes above 0 and a finite val_loss")
    bits = result.val_loss * result.tokens / math.log(2)
    expected = bits / result.bytes
    if not math.isclose(result.val_bpb, expected, rel_tol=1e-6):
        found = f"condition:{result.condition} val_bpb:{result.val_bpb}"
        last.refuse(found, f"{expected} = val_loss * tokens / ln 2 / bytes")
    return result


def read_calibration(last: Attempt) -> float:
    """Return the seconds that were left when calibration ended. inf: no limit, no calibration."""
    left = math.inf
    for prefix in ("calibration: rate:", "quantizer statistics: "):
        for line in last.all(prefix):
            form = r".* before_time_limit:(-?\d+\.\d|inf)s"
            left = min(left, float(last.parse(prefix, line, form)[1]))
    return left


def read_eval_time(last: Attempt, preset: str, results: Sequence[Result]) -> tuple[float, str]:
    """Return the seconds of what the game counts, and the verdict, which only `baseline` has."""
    form = rf"(\d+\.\d)s(?: limit:{EVALUATION_LIMIT}s (PASS|FAIL))?"
    match = last.parse_one("total_eval_time:", form)
    seconds = float(match[1])
    verdict = match[2] or ""
    counted = {"flat", results[-1].condition}
    least = sum(result.seconds for result in results if result.condition in counted)
    if seconds < least - 0.1:  # the printed times are rounded
        last.refuse(f"total_eval_time:{seconds}s", f"at least the {least:.1f} s of its conditions")
    if bool(verdict) != (preset == "baseline"):
        last.refuse(f"'total_eval_time:{match[0]}'", "a limit under the preset baseline alone")
    is_late = seconds > EVALUATION_LIMIT
    is_early = seconds < EVALUATION_LIMIT
    if (verdict == "PASS" and is_late) or (verdict == "FAIL" and is_early):
        expected = f"PASS for up to {EVALUATION_LIMIT} s, FAIL for more"
        last.refuse(f"'total_eval_time:{match[0]}'", expected)
    return seconds, verdict


def check_audits(last: Attempt, results: Sequence[Result]) -> None:
    """Refuse audits that failed or are missing, and audits of bytes or coverage that do not fit."""
    for line in last.lines:
        if line.startswith("audit ") and not line.endswith(" PASS"):
            last.refuse(repr(line), "PASS at its end")
    match = last.parse_one("audit bytes: ", r".*table_bytes:(\d+) text_bytes:(\d+) PASS")
    if match[1] != match[2]:
        last.refuse(f"'audit bytes: {match[0]}'", "as many bytes in the table as in the text")
    tokens = last.parse_one("validation: ", r".* ([\d,]+) tokens\)")[1]
    for result in results:
        prefix = f"audit coverage: condition:{result.condition} "
        form = r"targets:(\d+) scored_once:(\d+)(.* beyond_max_val_docs:(\d+)) PASS"
        match = last.parse_one(prefix, form)
        read = int(match[1]) - int(match[4]) + 1
        if tokens != f"{read:,}":
            last.refuse(f"'validation:' of {tokens} tokens", f"{read:,}, one more than targets")
        left_out = sum(map(int, re.findall(r":(\d+)", match[3])))
        scored = int(match[2])
        if scored != result.tokens or int(match[1]) != scored + left_out:
            expected = f"scored_once:{result.tokens}, and all other targets left out"
            last.refuse(f"'{prefix}{match[0]}'", expected)
