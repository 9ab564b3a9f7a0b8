"""Read what train_gpt.py wrote to logs/{RUN_ID}.txt, and refuse what cannot be trusted.

A log is the script's own source, the machine, then one line for each event. Everything that it says twice must agree:
the source with its hash, the command with the settings, the final lines with the ladder, bits per byte with loss,
tokens and bytes, the audits with what was scored, the sizes with their sum. Audits must have passed. Short runs
(`partial`) and artifacts over the budget are read like any other, for a picture of them does no harm; what else a
record asks for is in make_record.py.
"""

import hashlib
import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import NoReturn

RULE = "=" * 100  # stands before and after the lines on Python, PyTorch and the hardware
PARTIAL = " partial"  # ends every line of a run that scored only some documents

# What people call the conditions. One that is not here goes by its name alone.
LABELS = {
    "flat": "cross-document, flat stream",
    "doc": "+ document-isolated",
    "stride": "+ stride, windows that overlap",
    "ttt": "+ LoRA test-time training",
    "stream_fast": "+ streaming, quick settings",
    "stream": "+ streaming",
}
# Lines that repeat a condition's score under the name that older tools look for; other conditions have none.
FINAL_LINES = {
    "flat": ("final_int8_zlib_roundtrip", "final_int8_zlib_roundtrip_exact"),
    "ttt": ("final_int8_ttt_lora",),
    "stream": ("final_int8_ttt_stream",),
}
# What may be given and stands in the line 'config:' as another value, which the program chose.
CHOSEN = {("PRESET", "auto"), ("DEVICE", "auto"), ("GRAD_ACCUM_STEPS", "0")}

NUMBER, HASH = r"(\d+\.\d+)", r"([0-9a-f]{64})"
SCORE = rf"val_loss:{NUMBER} val_bpb:{NUMBER}"
STEP = r"step:(\d+)/\d+ "
# Settings that the tools look at, and how the program spells them.
FORMS = {
    "PRESET": "baseline|cpu",
    "DEVICE": "cpu|cuda",
    "DTYPE": r"\w+",
    "EVAL_ONLY": "[01]",
    "MODEL_PATH": ".*",
    "DATA_PATH": ".+",
    "SEED": r"\d+",
    "EVAL": r"\w+(,\w+)*",
    "ITERATIONS": r"\d+",
    "MAX_VAL_DOCS": r"\d+",
    "MAX_WALLCLOCK_SECONDS": r"\d+(\.\d+)?(e[+-]\d+)?",
}


@dataclass(frozen=True)
class Rung:
    """The score of one condition, with the digits that were printed."""

    condition: str
    val_loss: Decimal  # nats per token
    val_bpb: Decimal  # bits per byte
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Point:
    """A score along the training: a loss in nats per token after `step` steps and `milliseconds`."""

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
    """One finished run. Hashes are SHA-256 in hexadecimal."""

    path: Path
    content: bytes  # the file
    source: str  # of train_gpt.py
    partial: bool
    hardware: str
    started: str  # UTC, as in 2026-11-22T16:03:11Z, so that text sorts by time
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
    training: tuple[Point, ...]
    validation: tuple[
        Point, ...
    ]  # the last one after the last step; empty where nothing was trained
    sizes: Sizes | None  # None where nothing was trained
    ladder: tuple[Rung, ...]  # in the order of EVAL; the last is the score of the run
    scores: tuple[str, str] | None  # path and hash of the scores file

    @property
    def seed(self) -> int:
        """SEED of the run."""
        return int(self.config["SEED"])

    @property
    def score(self) -> Rung:
        """The rung that counts: the last."""
        return self.ladder[-1]


@dataclass(frozen=True)
class Lines:
    """The lines below the head. Those that are asked for must be there, and have the form that is expected."""

    path: Path
    lines: list[str]

    def refuse(self, found: str, expected: str) -> NoReturn:
        """Raise the `ValueError`."""
        raise ValueError(f"{self.path}: found {found}; expected {expected}")

    def all(self, prefix: str, form: str) -> list[re.Match]:
        """Matches of the regular expression `form` with what follows `prefix` in every line that starts with it."""
        matches = []
        for line in self.lines:
            if line.startswith(prefix):
                match = re.fullmatch(form, line.removeprefix(prefix))
                matches.append(match or self.refuse(repr(line), f"'{prefix}' and then {form}"))
        return matches

    def one(self, prefix: str, form: str = "(.*)") -> re.Match:
        """The match of the only line that starts with `prefix`."""
        matches = self.all(prefix, form)
        if len(matches) != 1:
            self.refuse(f"{len(matches)} lines '{prefix}'", "one")
        return matches[0]


def agree(a: Decimal, b: Decimal) -> bool:
    """Whether two printed numbers can be the same number, rounded to the digits that each shows."""
    return abs(a - b) <= (half_digit(a) + half_digit(b))


def half_digit(number: Decimal) -> Decimal:
    """How far rounding can have moved a printed number."""
    return Decimal(1).scaleb(number.as_tuple().exponent) / 2


def run_command(work: Callable[[], None], place: object = "") -> int:
    """Exit status of a command. What a user can get wrong ends in one line on stderr, if need be with its `place`."""
    try:
        work()
    except OSError as error:
        print(
            f"error: {error.filename or place}: {error.strerror}; expected a usable path",
            file=sys.stderr,
        )
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def read_log(path: Path) -> RunLog:
    """The run in this file. `ValueError`, in one line, for a log that contradicts itself or is no finished run."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(
            f"{path}: found bytes that are not UTF-8; expected a log of train_gpt.py"
        ) from None
    parts = text.split(f"\n{RULE}\n")
    if len(parts) != 3:
        raise ValueError(
            f"{path}: found {len(parts) - 1} lines of 100 '='; expected 2: the head of one run, "
            "and a RUN_ID of its own for each run"
        )
    source, head, body = parts
    body = body.split("\n")
    lines = Lines(path, [line.removesuffix(PARTIAL) for line in body])
    for line in lines.lines:
        if line.startswith("error: "):
            lines.refuse(repr(line), "a run that came to its end")
    config = read_config(lines)
    place = lines.one("preset:", r"(\w+) device:(\S+) world_size:(\d+) dtype:(\S+) \(.*\)")
    validation = read_validation(lines, config)
    ladder = read_ladder(lines, config["EVAL"].split(","))
    scores = lines.all("scores:", rf"(.+) rows:\d+ sha256:{HASH}")
    return RunLog(
        path=path,
        content=content,
        source=source,
        partial=any(line.endswith(PARTIAL) for line in body) or config["MAX_VAL_DOCS"] != "0",
        hardware=head.split("\n")[-1],
        started=lines.one("started:", r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)")[1],
        command=read_command(lines, config, place),
        config=config,
        versions=lines.one("versions: ")[1],
        preset=place[1],
        device=place[2],
        world_size=int(place[3]),
        dtype=place[4],
        script_hash=read_script_hash(lines, source),
        tokenizer_hash=lines.one("sha256 tokenizer:", HASH)[1],
        val_hashes=read_shards(lines),
        artifact_hash=lines.one("sha256 artifact:", rf"{HASH} .+")[1],
        causal=read_audits(lines, ladder),
        training=points(lines, rf"train_loss:{NUMBER}"),
        validation=validation,
        sizes=read_sizes(lines, source) if validation else None,
        ladder=ladder,
        scores=(scores[-1][1], scores[-1][2]) if scores else None,
    )


def read_config(lines: Lines) -> dict[str, str]:
    """Every setting of the run."""
    config = settings(lines, lines.one("config: ")[1])
    for name, form in FORMS.items():
        if name not in config or not re.fullmatch(form, config[name]):
            lines.refuse(
                f"{name}={config.get(name)} in the line 'config:'", f"a value of the form {form}"
            )
    return config


def settings(lines: Lines, text: str) -> dict[str, str]:
    """The NAME=value pairs of a text."""
    try:
        return dict(word.split("=", 1) for word in shlex.split(text))
    except ValueError:
        lines.refuse(repr(text), "NAME=value pairs, quoted as a shell would read them")


def read_command(lines: Lines, config: Mapping[str, str], place: re.Match) -> str:
    """The command, which must give the settings of the line 'config:' and start the ranks of the line 'preset:'.

    So must the rest of that line, `place`: what was set, and where it ran.
    """
    launcher = r"(?:torchrun --standalone --nproc_per_node=(\d+)|python) train_gpt\.py"
    command = lines.one("command: ", rf"((.* )?{launcher})")
    preset, device, world_size, dtype = place.groups()
    if (command[3] or "1") != world_size:
        lines.refuse(f"world_size:{world_size}", f"the ranks that '{command[1]}' starts")
    said = [pair for pair in settings(lines, command[2] or "").items() if pair not in CHOSEN]
    said += [("PRESET", preset), ("DEVICE", device.split(":")[0])]
    said += [("DTYPE", dtype.removeprefix("torch."))] if config["DTYPE"] != "auto" else []
    for name, value in said:
        if not same(value, config.get(name)):
            lines.refuse(f"{name}={value}", f"{name}={config.get(name)}, as in the line 'config:'")
    return command[1]


def same(given: str, shown: str | None) -> bool:
    """Whether two texts spell one value: 175 and 175.0 do."""
    try:
        return float(given) == float(shown)
    except (TypeError, ValueError):
        return given == shown


def read_shards(lines: Lines) -> dict[str, str]:
    """Hashes of the validation shards by their names, each of which may come once."""
    matches = lines.all("sha256 val:", rf"{HASH} (.+)")
    hashes = {match[2]: match[1] for match in matches}
    if not matches or len(hashes) != len(matches):
        lines.refuse(
            f"{len(matches)} lines 'sha256 val:' with {len(hashes)} names",
            "one for each validation shard",
        )
    return hashes


def read_script_hash(lines: Lines, source: str) -> str:
    """The hash of the script, which must be that of the source at the head of the log."""
    printed, actual = (
        lines.one("sha256 script:", HASH)[1],
        hashlib.sha256(source.encode()).hexdigest(),
    )
    if printed != actual:
        lines.refuse(
            f"a source text with sha256 {actual}", f"{printed}, as in the line 'sha256 script:'"
        )
    return printed


def points(lines: Lines, form: str) -> tuple[Point, ...]:
    """The progress lines of this form, whose first group is a loss. Others report something else."""
    pattern = re.compile(STEP + form + r" train_time:(\d+)ms step_avg:\d+\.\d+ms")
    matches = [match for line in lines.lines if (match := pattern.fullmatch(line))]
    return tuple(
        Point(int(match[1]), float(match[2]), int(match[match.re.groups])) for match in matches
    )


def read_validation(lines: Lines, config: Mapping[str, str]) -> tuple[Point, ...]:
    """The validations: a training ends with one after its last step, an EVAL_ONLY run has none."""
    validation = points(lines, SCORE)
    stop = lines.all("stopping_early: ", r"wallclock_cap train_time:\d+ms step:(\d+)/\d+")
    end = [] if config["EVAL_ONLY"] == "1" else [int(stop[-1][1] if stop else config["ITERATIONS"])]
    steps = [point.step for point in validation]
    if steps[-1:] != end or steps != sorted(set(steps)):
        lines.refuse(
            f"validations after the steps {steps}", f"steps that rise, the last of them {end}"
        )
    return validation


def read_sizes(lines: Lines, source: str) -> Sizes:
    """The bytes of the submission, added up again."""
    model = int(lines.one("Serialized model int8+zlib: ", r"(\d+) bytes .*")[1])
    code = int(lines.one("Code size: ", r"(\d+) bytes")[1])
    added = int(lines.one("Total submission size int8+zlib: ", r"(\d+) bytes")[1])
    size = lines.one("submission_size:", r"(\d+) budget:(\d+) headroom:(-?\d+) (PASS|FAIL)")
    total, budget, headroom = (int(size[group]) for group in (1, 2, 3))
    if code != len(source.encode()):
        lines.refuse(
            f"'Code size: {code} bytes'",
            f"{len(source.encode())}, the size of the source in the log",
        )
    if not model + code == added == total:
        lines.refuse(
            f"a submission of {added} and of {total} bytes",
            f"model {model} + code {code} = {model + code}",
        )
    if headroom != budget - total or (size[4] == "PASS") != (headroom >= 0):
        lines.refuse(
            f"'submission_size:{size[0]}'",
            f"headroom:{budget - total}; PASS where it is not below 0",
        )
    return Sizes(model, code, total, budget)


def read_audits(lines: Lines, ladder: tuple[Rung, ...]) -> tuple[str, ...]:
    """Conditions whose causality was audited. All audits must have passed, and bytes and coverage fit the ladder."""
    lines.all("audit ", ".* PASS")
    audit = lines.one(
        "audit bytes: ", r"documents:(\d+) of:(\d+) table_bytes:(\d+) text_bytes:(\d+) PASS"
    )
    documents, of, counted, spelled = map(int, audit.groups())
    if counted != spelled:
        lines.refuse(f"'audit bytes: {audit[0]}'", "as many bytes in the table as in the text")
    reasons = r"before_first_bos:(\d+) after_last_row:(\d+) beyond_max_val_docs:(\d+)(?: out_of_time:(\d+))?"
    matches = lines.all(
        "audit coverage: ", rf"condition:(\w+) targets:(\d+) scored_once:(\d+) {reasons} PASS"
    )
    covered, conditions = [match[1] for match in matches], [rung.condition for rung in ladder]
    if covered != conditions:
        lines.refuse(
            f"'audit coverage:' of '{','.join(covered)}'",
            f"one for each of '{','.join(conditions)}'",
        )
    for rung, match in zip(ladder, matches, strict=True):
        targets, scored, *left_out = (int(number or 0) for number in match.groups()[1:])
        if scored != rung.tokens or targets != scored + sum(left_out):
            lines.refuse(
                f"'audit coverage: {match[0]}'",
                f"scored_once:{rung.tokens}; the other targets left out",
            )
    late = {match[1] for match in matches if match[7]}  # EVAL_MAX_SECONDS ended them
    isolated = [
        rung for rung in ladder if rung.condition not in {"flat", *late}
    ]  # they score the same documents
    for rung in isolated:
        size = counted if documents == of else isolated[0].bytes
        if (rung.tokens, rung.bytes) != (isolated[0].tokens, size):
            found = f"condition:{rung.condition} tokens:{rung.tokens} bytes:{rung.bytes}"
            lines.refuse(found, f"tokens:{isolated[0].tokens} bytes:{size}, those of all documents")
    return tuple(match[1] for match in lines.all("audit causality: ", r"condition:(\w+) .*PASS"))


def read_ladder(lines: Lines, conditions: list[str]) -> tuple[Rung, ...]:
    """The scores in the order of EVAL, checked against themselves, their deltas and the final lines."""
    form = (
        rf"(\w+) {SCORE} delta_bpb:([+-]\d+\.\d+) docs:\d+ tokens:(\d+) bytes:(\d+) eval_time:\d+ms"
    )
    matches = lines.all("ladder condition:", form)
    if [match[1] for match in matches] != conditions:
        found = ",".join(match[1] for match in matches)
        lines.refuse(
            f"ladder lines for '{found}'", f"those of EVAL, '{','.join(conditions)}', in that order"
        )
    ladder = tuple(Rung(m[1], Decimal(m[2]), Decimal(m[3]), int(m[5]), int(m[6])) for m in matches)
    for rung, match in zip(ladder, matches, strict=True):
        check_bits(lines, rung)
        delta, expected = Decimal(match[4]), rung.val_bpb - ladder[0].val_bpb
        if abs(delta - expected) > half_digit(delta) + 2 * half_digit(
            rung.val_bpb
        ):  # two rounded scores
            lines.refuse(
                f"condition:{rung.condition} delta_bpb:{match[4]}",
                f"{expected:+}, the step from the first",
            )
    check_final_lines(lines, ladder)
    return ladder


def check_bits(lines: Lines, rung: Rung) -> None:
    """Refuse bits per byte that are not the loss in bits, times tokens, divided by bytes."""
    if not rung.bytes:
        lines.refuse(f"condition:{rung.condition} bytes:0", "scored text")
    bits_per_nat = rung.tokens / rung.bytes / math.log(2)
    expected = float(rung.val_loss) * bits_per_nat
    rounding = float(half_digit(rung.val_bpb)) + float(half_digit(rung.val_loss)) * bits_per_nat
    if abs(float(rung.val_bpb) - expected) > rounding + 1e-12:
        lines.refuse(
            f"condition:{rung.condition} val_bpb:{rung.val_bpb}",
            f"{expected:.6f} = val_loss {rung.val_loss} / ln 2 * {rung.tokens} tokens / {rung.bytes} bytes",
        )


def check_final_lines(lines: Lines, ladder: tuple[Rung, ...]) -> None:
    """Refuse final lines that are missing, of other conditions, or of other scores than the ladder's."""
    matches = lines.all("final_", rf"(\w+) {SCORE}( eval_time:\d+ms)?")
    found = ["final_" + match[1] for match in matches]
    rungs = [(name, rung) for rung in ladder for name in FINAL_LINES.get(rung.condition, ())]
    expected = [name for name, _ in rungs]
    if found != expected:
        lines.refuse(
            f"final lines '{', '.join(found)}'",
            f"'{', '.join(expected)}', since EVAL has those conditions",
        )
    for (name, rung), match in zip(rungs, matches, strict=True):
        if not (agree(Decimal(match[2]), rung.val_loss) and agree(Decimal(match[3]), rung.val_bpb)):
            lines.refuse(
                f"{name} val_loss:{match[2]} val_bpb:{match[3]}",
                f"the ladder's val_loss:{rung.val_loss} val_bpb:{rung.val_bpb}",
            )
