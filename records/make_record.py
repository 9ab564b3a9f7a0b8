"""Make a record: a folder that holds everything needed to check a number, written from logs.

    python records/make_record.py --name shorter-warmup --threshold 1.78 --logs out/*/logs/*.txt

The logs are those of one program with one configuration under several seeds. README.md and
submission.json follow from the logs, the name and the threshold alone, so that `verify` can write
them again and compare byte for byte. The track follows from the logs as well; the date is that of
the last start.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, pstdev
from typing import NoReturn

from plot import draw, read_scores
from run_log import FULL_VALIDATION, LABELS, Result, RunLog, Sizes, read_log, run_command
from stats import Summary, summarize

RECORDS = Path(__file__).resolve().parent
# Made when logs had neither attempts nor results: their hashes are all that is checked.
OLD_RECORDS = ("2026-11-22_lora-ttt", "2026-11-26_new-defaults", "2026-11-26_plain-recipe")
# Settings that runs of one record need not share: seed, file names, and whether a run was resumed.
# Hashes say which shards and tokenizer were read.
MAY_DIFFER = {
    "SEED",
    "RUN_ID",
    "OUT_DIR",
    "SCORES_PATH",
    "DATA_PATH",
    "TOKENIZER_PATH",
    "RESUME",
}
BUDGET = 16_000_000  # bytes of artifact and code
# Bits per byte on 8xH100, FineWeb.
PUBLISHED = {"flat": 1.2278, "doc": 1.2168, "stride": 1.1941, "ttt": 1.1910}
# File names, and what is said to a reader who cannot see the pictures.
PICTURES = {
    "ladder.png": "What each condition gains",
    "position.png": "Bits per byte by position in the document, first seed",
    "training.png": "Training loss",
}
TRACKS = {
    "track_10min_16mb": (
        "Ten minutes of training on 8xH100, code and artifact within the budget, as many documents "
        "and tokens as the published validation set has, scored within ten minutes. The published "
        "ladder beside ours was printed after 600 s of training on FineWeb; whether the shards "
        "below are the published ones is for a reader to check by their hashes."
    ),
    "track_cpu": (
        "**A demo corpus on a CPU.** These numbers compare with other records of this track and "
        "with nothing published: the published ladder (8xH100, 600 s of training, FineWeb) stands "
        "beside them only to show the shape of the steps."
    ),
    "track_non_record_16mb": (
        "Not the setting of the published record, so the numbers do not compete with it. The "
        "published ladder beside ours was printed on 8xH100 after 600 s of training on FineWeb."
    ),
}


# --- What makes runs a record ---


def check_run(log: RunLog) -> None:
    """Refuse a sound run that is no evidence: partial, not trained from scratch, or too large.

    For track_10min_16mb, refuse also what the rules of the game forbid.
    """

    def refuse(found: str, expected: str) -> NoReturn:
        raise ValueError(f"{log.path}: found {found}; expected {expected}")

    if log.partial:
        refuse("a partial run", "one that scored every document")
    if log.config["MODEL_PATH"]:
        refuse(f"MODEL_PATH={log.config['MODEL_PATH']}", "a training from scratch")
    if log.sizes is None:
        refuse("nothing trained", "a training from scratch")
    if log.changes:
        found = f"attempts that differ in settings: {', '.join(log.changes)}"
        refuse(
            found, "the same settings from start to end, so that the command gives the run again"
        )
    steps = [point.step for point in log.training]
    if steps[:1] != [1]:
        first = steps[0] if steps else None
        refuse(f"{first} as the first step with a train_loss", "1: a log of the whole training")
    if log.sizes.budget != BUDGET or log.sizes.total > BUDGET:
        found = f"{log.sizes.total} bytes of a budget of {log.sizes.budget}"
        refuse(found, f"at most {BUDGET} of {BUDGET}, artifact and code")
    condition = log.score.condition
    if condition not in log.causal:
        found = f"no line 'audit causality:' for condition:{condition}, the last of EVAL"
        refuse(found, "one, which ends in PASS")
    if track_of(log) == "track_10min_16mb":
        if log.validation_set != FULL_VALIDATION:
            expected = f"{FULL_VALIDATION}, which this track demands"
            refuse(f"'validation: {log.validation_set}'", expected)
        if log.calibration_left < 0:
            found = f"training text read {-log.calibration_left} s after the time limit"
            refuse(found, "all of it read before; set CALIBRATION_SECONDS higher")
        if log.eval_verdict != "PASS":
            found = f"total_eval_time:{log.eval_seconds}s {log.eval_verdict}"
            refuse(found, "PASS: the last condition, its audit and `flat` within 600 s")


def shared_facts(log: RunLog) -> dict[str, object]:
    """Return what the runs of a record must have in common, by a name for it."""
    facts = {
        "script": log.script_hash,
        "tokenizer": log.tokenizer_hash,
        "validation shards": log.val_hashes,
        "hardware": log.hardware,
        "versions": log.versions,
        "world_size": log.world_size,
        "dtype": log.dtype,
        "track": track_of(log),
    }
    for result in log.results:
        name = f"(tokens, bytes) of condition:{result.condition}"
        facts[name] = (result.tokens, result.bytes)
    for name, value in log.config.items():
        if name not in MAY_DIFFER:
            facts[name] = value
    return facts


def check_runs(logs: Sequence[RunLog]) -> None:
    """Refuse runs that are no evidence, that differ in more than the seed, or that share one.

    Two runs with one artifact are one run, whatever seeds their logs name.
    """
    expected = shared_facts(logs[0])
    seeds = set()
    artifacts = {}
    for log in logs:
        check_run(log)
        found = shared_facts(log)
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                same = f"{expected.get(name)}, as in {logs[0].path}"
                raise ValueError(f"{log.path}: found {name} {found.get(name)}; expected {same}")
        if log.seed in seeds:
            raise ValueError(f"{log.path}: found SEED={log.seed} again; expected one run per seed")
        seeds.add(log.seed)
        twin = artifacts.setdefault(log.artifact_hash, log.path)
        if twin != log.path:
            found = f"the artifact {log.artifact_hash} of {twin} again"
            raise ValueError(f"{log.path}: found {found}; expected logs of different runs")


def track_of(log: RunLog) -> str:
    """Return the track that a run belongs to."""
    demo = Path(log.config["DATA_PATH"]).parts[-2:] == ("data", "demo")
    if log.preset == "cpu" and log.device == "cpu" and demo:
        return "track_cpu"
    capped = 0 < float(log.config["MAX_WALLCLOCK_SECONDS"]) <= 600  # 0 is no cap
    machine = re.match(r"8 x .*\bH100\b", log.hardware) and log.world_size == 8
    if log.preset == "baseline" and log.device.startswith("cuda") and machine and capped:
        return "track_10min_16mb"
    return "track_non_record_16mb"


def date_of(logs: Sequence[RunLog]) -> str:
    """Return the day on which the last run was started."""
    return max(log.started for log in logs)[:10]


# --- README.md and submission.json: functions of the logs, the name and the threshold ---


def sha256(content: bytes) -> str:
    """Return a hash in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def statistics_of(logs: Sequence[RunLog], threshold: float) -> Summary:
    """Return the statistics of the runs' scores: bits per byte of the last condition."""
    return summarize([log.score.val_bpb for log in logs], threshold)


def largest_sizes(logs: Sequence[RunLog]) -> Sizes:
    """Return the sizes of the largest submission."""
    return max((log.sizes for log in logs), key=lambda sizes: sizes.total)


def describe_seed(log: RunLog) -> dict[str, object]:
    """Return one run's entry in submission.json."""
    return {
        "seed": log.seed,
        "steps": log.validation[-1].step,
        "val_bpb": round(log.score.val_bpb, 6),
        "val_loss": round(log.score.val_loss, 6),
        "bytes_total": log.sizes.total,
        "sha256_artifact": log.artifact_hash,
        "sha256_log": sha256(log.content),
    }


def render_submission(name: str, threshold: float, logs: Sequence[RunLog]) -> str:
    """Return submission.json. Rounded floats come out the same on every machine."""
    first = logs[0]
    largest = largest_sizes(logs)
    statistics = {}
    for key, value in asdict(statistics_of(logs, threshold)).items():
        statistics[key] = float(f"{value:.6g}")
    statistics["n"] = len(logs)
    statistics["threshold"] = threshold
    content = {
        "name": name,
        "date": date_of(logs),
        "track": track_of(first),
        "condition": first.score.condition,
        "val_bpb": round(fmean(log.score.val_bpb for log in logs), 6),
        "val_loss": round(fmean(log.score.val_loss for log in logs), 6),
        "statistics": statistics,
        "seeds": [describe_seed(log) for log in logs],
        "bytes_total": largest.total,
        "bytes_code": largest.code,
        "bytes_model": largest.model,
        "sha256": {
            "script": first.script_hash,
            "tokenizer": first.tokenizer_hash,
            "val": first.val_hashes,
        },
    }
    return json.dumps(content, indent=2) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = []
    for cells in (head, ["---"] * len(head), *rows):
        text = " | ".join(str(cell) for cell in cells)
        lines.append(f"| {text} |")
    return "\n".join(lines)


def ladder_row(results: Sequence[Result], start: str, start_bpb: float) -> list[str]:
    """Return one condition's row. The ladder starts at the condition `start` with `start_bpb`."""
    condition = results[0].condition
    label = LABELS.get(condition)
    scores = [result.val_bpb for result in results]
    mean = fmean(scores)
    row = [
        f"{condition} ({label})" if label else condition,
        f"{fmean(result.val_loss for result in results):.4f}",
        f"**{mean:.4f}**",
        f"{mean - start_bpb:+.4f}",
        f"{pstdev(scores):.4f}",
    ]
    row += [f"{score:.4f}" for score in scores]
    published = PUBLISHED.get(condition)
    published_start = PUBLISHED.get(start)
    row.append(f"{published:.4f}" if published else "")
    row.append(f"{published - published_start:+.4f}" if published and published_start else "")
    return row


def ladder_table(logs: Sequence[RunLog]) -> str:
    """Return the table of all conditions: mean, gain, spread, every seed, and the published one."""
    start = logs[0].results[0].condition
    start_bpb = fmean(log.results[0].val_bpb for log in logs)
    head = ["condition", "val_loss", "val_bpb", "delta", "std"]
    head += [f"seed {log.seed}" for log in logs]
    head += ["published", "published delta"]
    by_condition = zip(*(log.results for log in logs), strict=True)
    return table(head, [ladder_row(results, start, start_bpb) for results in by_condition])


def runs_table(logs: Sequence[RunLog]) -> str:
    """Return the table of how far every seed came, and what it weighs."""
    head = ["seed", "started", "attempts", "steps", "training s", "evaluation s"]
    head += ["artifact bytes", "with code", "artifact sha256"]
    rows = []
    for log in logs:
        last = log.validation[-1]
        row = [
            f"[{log.seed}]({log_name(log)})",
            log.started,
            log.attempts,
            f"{last.step:,}",
            f"{last.milliseconds / 1000:.1f}",
            f"{log.eval_seconds:.1f}",
            f"{log.sizes.model:,}",
            f"{log.sizes.total:,}",
            f"`{log.artifact_hash}`",
        ]
        rows.append(row)
    return table(head, rows)


def environment_table(log: RunLog) -> str:
    """Return the table of where the runs ran, and what they read."""
    rows = [
        ("hardware", log.hardware),
        ("device", f"{log.device}, world size {log.world_size}, {log.dtype}"),
        ("versions", log.versions),
        ("preset", log.preset),
        ("cap of training", f"{float(log.config['MAX_WALLCLOCK_SECONDS']):g} s"),
        ("code bytes", f"{log.sizes.code:,}"),
        ("script sha256", f"`{log.script_hash}`"),
        ("tokenizer sha256", f"`{log.tokenizer_hash}`"),
        ("validation", log.validation_set),
    ]
    for name, shard_hash in log.val_hashes.items():
        rows.append((f"{name} sha256", f"`{shard_hash}`"))
    return table(["what", "value"], rows)


def render_readme(
    name: str, threshold: float, logs: Sequence[RunLog], pictures: Sequence[str]
) -> str:
    """Return README.md, which shows the `pictures` that the folder has."""
    statistics = statistics_of(logs, threshold)
    condition = logs[0].score.condition
    track = track_of(logs[0])
    size = largest_sizes(logs).total
    below = "below" if statistics.mean < threshold else "not below"
    parts = [
        f"# {name}",
        f"Mean `val_bpb` **{statistics.mean:.4f}** over {len(logs)} seeds under `{condition}`, the "
        f"last condition of the ladder; {below} the threshold {threshold}. "
        f"{date_of(logs)}, `{track}`.",
        TRACKS[track],
        "## Ladder",
        "Bits per byte, lower is better. `std` is the population's; each delta is the step from "
        "the first condition.",
        ladder_table(logs),
        *(f"![{PICTURES[picture]}]({picture})" for picture in pictures),
        "## Statistics",
        f"A one-sided one-sample t-test asks whether the true mean is below {threshold}:",
        f"    {statistics}",
        "## Runs",
        runs_table(logs),
        f"The largest submission has {size:,} bytes of {BUDGET:,}, code included: "
        f"{BUDGET - size:,} to spare.",
        "The exact commands:",
        "\n".join(f"    {log.command}" for log in logs),
        "## Environment",
        environment_table(logs[0]),
        "Written by `records/make_record.py` from the logs in this folder; "
        "`tests/test_records.py` checks that they agree.",
    ]
    return "\n\n".join(parts) + "\n"


def log_name(log: RunLog) -> str:
    """Return a log's name in its record; seeds differ, while RUN_IDs may be the same."""
    return f"seed{log.seed}.txt"


def render(
    name: str, threshold: float, logs: Sequence[RunLog], pictures: Sequence[str]
) -> dict[str, bytes]:
    """Return every file of a record but the pictures, by name."""
    files = {
        "README.md": render_readme(name, threshold, logs, pictures).encode(),
        "submission.json": render_submission(name, threshold, logs).encode(),
        "train_gpt.py": logs[0].source.encode(),
    }
    for log in logs:
        files[log_name(log)] = log.content
    return files


# --- Making and checking a folder ---


def read_runs(paths: Sequence[Path]) -> list[RunLog]:
    """Return the runs of a record by seed. `ValueError` for runs that are no record."""
    logs = sorted(map(read_log, paths), key=lambda log: log.seed)
    check_runs(logs)
    return logs


def folder_of(name: str, logs: Sequence[RunLog]) -> Path:
    """Return where a record belongs, below records/."""
    return Path(track_of(logs[0]), f"{date_of(logs)}_{name}")


def make_record(name: str, threshold: float, paths: Sequence[Path], records: Path) -> Path:
    """Write the record of these logs below `records`, as a whole or not at all; return its folder.

    Positions are drawn if the first seed's scores file is still there and still the same.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        expected = "letters, digits, '.', '_' and '-', since it names a folder"
        raise ValueError(f"--name: found {name!r}; expected {expected}")
    logs = read_runs(paths)
    target = records / folder_of(name, logs)
    if target.exists():
        raise ValueError(f"{target}: found an earlier record; expected another --name")
    rows = None
    if logs[0].scores:
        path = Path(logs[0].scores[0])
        if path.is_file() and sha256(path.read_bytes()) == logs[0].scores[1]:
            rows = read_scores(path, logs[0])
    pictures = draw(logs, rows)
    files = render(name, threshold, logs, list(pictures)) | pictures
    with tempfile.TemporaryDirectory(prefix=".building-", dir=records) as temporary:
        build = Path(temporary) / "record"  # inside: other users cannot enter a temporary folder
        build.mkdir()
        for file, content in files.items():
            (build / file).write_bytes(content)
        target.parent.mkdir(exist_ok=True)
        os.rename(build, target)
    return target


def check_files(folder: Path, submission: Mapping) -> None:
    """Refuse a record with other files or other hashes than it should have. `ValueError`.

    submission: what submission.json holds.
    """
    hashes = {"train_gpt.py": submission["sha256"]["script"]}
    for seed in submission["seeds"]:
        hashes[f"seed{seed['seed']}.txt"] = seed["sha256_log"]
    readme = (folder / "README.md").read_text(encoding="utf-8")
    shown = [picture for picture in PICTURES if f"]({picture})" in readme]
    expected = sorted([*hashes, "README.md", "submission.json", *shown])
    found = sorted(path.name for path in folder.iterdir())
    if found != expected:
        raise ValueError(f"{folder}: found the files {found}; expected {expected}")
    for name, expected_hash in hashes.items():
        found_hash = sha256((folder / name).read_bytes())
        if found_hash != expected_hash:
            same = f"{expected_hash}, as in submission.json"
            raise ValueError(f"{folder / name}: found sha256 {found_hash}; expected {same}")


def verify(folder: Path) -> None:
    """Refuse a record that does not follow from its logs, name and threshold. `ValueError`."""
    submission = json.loads((folder / "submission.json").read_bytes())
    check_files(folder, submission)
    if folder.name in OLD_RECORDS:
        return
    logs = read_runs(sorted(folder.glob("seed*.txt")))
    place = folder_of(submission["name"], logs)
    if place.parts != folder.parts[-2:]:
        raise ValueError(f"{folder}: expected the folder {place}, as the logs say")
    pictures = [picture for picture in PICTURES if (folder / picture).exists()]
    threshold = submission["statistics"]["threshold"]
    for file, content in render(submission["name"], threshold, logs, pictures).items():
        if (folder / file).read_bytes() != content:
            found = "a text that does not follow from the logs"
            raise ValueError(f"{folder / file}: found {found}; expected what make_record.py writes")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description="Make a record from the logs of several seeds.")
    parser.add_argument("--name", required=True, help="letters, digits, '.', '_' and '-'")
    parser.add_argument("--threshold", type=float, required=True, help="bits per byte to beat")
    parser.add_argument("--logs", type=Path, nargs="+", required=True, help="one for each seed")
    options = parser.parse_args(arguments)

    def make() -> None:
        folder = make_record(options.name, options.threshold, options.logs, RECORDS)
        print(f"record:{folder}")

    return run_command(make, RECORDS)


if __name__ == "__main__":
    sys.exit(main())
