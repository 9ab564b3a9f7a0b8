"""Make a record: the folder that holds everything needed to check a number, written from the logs of its runs.

    python records/make_record.py --name shorter-warmup --threshold 1.78 --logs out/*/logs/*.txt

The logs are those of one program with one configuration under several seeds. README.md and submission.json follow from
the logs, the name and the threshold alone, so that `verify` can write them again and compare byte for byte. The track
follows from the logs as well, and the date is that of the last start.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, pstdev

from plot import draw, read_scores
from run_log import LABELS, RunLog, read_log, run_command
from stats import Summary, summarize

RECORDS = Path(__file__).resolve().parent
# Between the runs of a record: the seed, and names of files. What is read is known by its hashes.
MAY_DIFFER = {"SEED", "RUN_ID", "OUT_DIR", "SCORES_PATH", "DATA_PATH", "TOKENIZER_PATH"}
BUDGET = 16_000_000  # bytes of artifact and code
PUBLISHED = {
    "flat": 1.2278,
    "doc": 1.2168,
    "stride": 1.1941,
    "ttt": 1.1910,
}  # bits per byte, 8xH100, FineWeb
PICTURES = {  # with what a reader who cannot see them is told
    "ladder.png": "What each condition gains",
    "position.png": "Bits per byte by position in the document, first seed",
    "training.png": "Training loss",
}
TRACKS = {
    "track_10min_16mb": "Ten minutes of training on 8xH100, code and artifact within the budget. The published ladder "
    "beside ours was printed after 600 s of training on FineWeb; whether the shards below are the published ones is "
    "for a reader to check by their hashes.",
    "track_cpu": "**A demo corpus on a CPU.** These numbers compare with other records of this track and with nothing "
    "published: the published ladder (8xH100, 600 s of training, FineWeb) stands beside them only to show the shape of "
    "the steps.",
    "track_non_record_16mb": "Not the setting of the published record, so the numbers do not compete with it. The "
    "published ladder beside ours was printed on 8xH100 after 600 s of training on FineWeb.",
}


# --- What makes runs a record ----------------------------------------------------------------------------------------


def check_run(log: RunLog) -> None:
    """Refuse a run that is sound but no evidence: not scored in full, not trained from scratch, or over the budget."""
    if log.partial:
        raise ValueError(
            f"{log.path}: found a partial run; expected one that scored every document"
        )
    if log.sizes is None or log.config["MODEL_PATH"]:
        found = (
            f"MODEL_PATH={log.config['MODEL_PATH']}"
            if log.config["MODEL_PATH"]
            else "nothing trained"
        )
        raise ValueError(
            f"{log.path}: found {found}; expected a training from scratch, which the log shows in full"
        )
    if log.sizes.budget != BUDGET or log.sizes.total > BUDGET:
        found = f"{log.sizes.total} bytes of a budget of {log.sizes.budget}"
        raise ValueError(
            f"{log.path}: found {found}; expected at most {BUDGET} of {BUDGET}, artifact and code"
        )
    if log.score.condition not in log.causal:
        scored = f"condition:{log.score.condition}, the last of EVAL"
        raise ValueError(
            f"{log.path}: found no line 'audit causality:' for {scored}; expected one, which ends in PASS"
        )


def setting(log: RunLog) -> dict[str, object]:
    """What the runs of a record have in common, by a name for it."""
    return {
        "script": log.script_hash,
        "tokenizer": log.tokenizer_hash,
        "validation shards": log.val_hashes,
        "hardware": log.hardware,
        "versions": log.versions,
        "world_size": log.world_size,
        "dtype": log.dtype,
        "track": track_of(log),
        **{
            f"(tokens, bytes) of condition:{rung.condition}": (rung.tokens, rung.bytes)
            for rung in log.ladder
        },
    } | {name: value for name, value in log.config.items() if name not in MAY_DIFFER}


def check_together(logs: Sequence[RunLog]) -> None:
    """Refuse logs that do not make one record: runs that count twice, or that differ in more than the seed."""
    first = logs[0]
    for log in logs[1:]:
        mine, expected = setting(log), setting(first)
        for name in sorted(mine.keys() | expected.keys()):
            if mine.get(name) != expected.get(name):
                raise ValueError(
                    f"{log.path}: found {name} {mine.get(name)}; expected {expected.get(name)}, as in {first.path}"
                )
    seeds = [log.seed for log in logs]
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise ValueError(
                f"--logs: found SEED={seed} in {seeds.count(seed)} logs; expected a seed for each run"
            )


def track_of(log: RunLog) -> str:
    """The track that a run belongs to."""
    if (log.preset, log.device, Path(log.config["DATA_PATH"]).parts[-2:]) == (
        "cpu",
        "cpu",
        ("data", "demo"),
    ):
        return "track_cpu"
    capped = 0 < float(log.config["MAX_WALLCLOCK_SECONDS"]) <= 600  # 0 is no cap
    machine = (
        log.device.startswith("cuda")
        and log.world_size == 8
        and re.match(r"8 x .*\bH100\b", log.hardware)
    )
    return (
        "track_10min_16mb"
        if log.preset == "baseline" and machine and capped
        else "track_non_record_16mb"
    )


def date_of(logs: Sequence[RunLog]) -> str:
    """The day on which the last run was started."""
    return max(log.started for log in logs)[:10]


# --- README.md and submission.json: functions of the logs, the name and the threshold ---------------------------------


def statistics_of(logs: Sequence[RunLog], threshold: float) -> Summary:
    """Of the scores of the runs: bits per byte of the last condition."""
    return summarize([float(log.score.val_bpb) for log in logs], threshold)


def render_submission(name: str, threshold: float, logs: Sequence[RunLog]) -> str:
    """submission.json. Its floats have as many digits as the logs, so that every machine writes the same ones."""
    largest = max((log.sizes for log in logs), key=lambda sizes: sizes.total)
    summary = {
        key: float(f"{value:.6g}") for key, value in asdict(statistics_of(logs, threshold)).items()
    }
    content = {
        "name": name,
        "date": date_of(logs),
        "track": track_of(logs[0]),
        "condition": logs[0].score.condition,
        "val_bpb": round(fmean(log.score.val_bpb for log in logs), 6),
        "val_loss": round(fmean(log.score.val_loss for log in logs), 6),
        "statistics": summary | {"n": len(logs), "threshold": threshold},
        "seeds": [
            {
                "seed": log.seed,
                "steps": log.validation[-1].step,
                "val_bpb": float(log.score.val_bpb),
                "val_loss": float(log.score.val_loss),
                "bytes_total": log.sizes.total,
                "sha256_artifact": log.artifact_hash,
                "sha256_log": hashlib.sha256(log.content).hexdigest(),
            }
            for log in logs
        ],
        "bytes_total": largest.total,
        "bytes_code": largest.code,
        "bytes_model": largest.model,
        "sha256": {
            "script": logs[0].script_hash,
            "tokenizer": logs[0].tokenizer_hash,
            "val": logs[0].val_hashes,
        },
    }
    return json.dumps(content, indent=2) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def ladder_table(logs: Sequence[RunLog]) -> str:
    """Every condition: mean over the seeds, step from the first condition, spread, each seed, and the published one."""
    rows, start = [], logs[0].ladder[0].condition
    first = fmean(float(log.ladder[0].val_bpb) for log in logs)
    for rungs in zip(*(log.ladder for log in logs), strict=True):
        condition, scores = rungs[0].condition, [float(rung.val_bpb) for rung in rungs]
        published = PUBLISHED.get(condition)
        rows.append(
            [
                f"{condition} ({LABELS[condition]})" if condition in LABELS else condition,
                f"{fmean(rung.val_loss for rung in rungs):.4f}",
                f"**{fmean(scores):.4f}**",
                f"{fmean(scores) - first:+.4f}",
                f"{pstdev(scores):.4f}",
                *(f"{score:.4f}" for score in scores),
                f"{published:.4f}" if published else "",
                f"{published - PUBLISHED[start]:+.4f}" if published and start in PUBLISHED else "",
            ]
        )
    seeds = [f"seed {log.seed}" for log in logs]
    return table(
        [
            "condition",
            "val_loss",
            "val_bpb",
            "delta",
            "std",
            *seeds,
            "published",
            "published delta",
        ],
        rows,
    )


def runs_table(logs: Sequence[RunLog]) -> str:
    """How far every seed came, and what it weighs."""
    rows = []
    for log in logs:
        last = log.validation[-1]
        trained = [f"{last.step:,}", f"{last.milliseconds / 1000:.1f}"]
        weight = [f"{log.sizes.model:,}", f"{log.sizes.total:,}", f"`{log.artifact_hash}`"]
        rows.append([f"[{log.seed}]({log_name(log)})", log.started, *trained, *weight])
    return table(
        [
            "seed",
            "started",
            "steps",
            "training s",
            "artifact bytes",
            "with code",
            "artifact sha256",
        ],
        rows,
    )


def environment_table(log: RunLog) -> str:
    """Where the runs ran, and what they read."""
    rows = [
        ("hardware", log.hardware),
        ("device", f"{log.device}, world size {log.world_size}, {log.dtype}"),
        ("versions", log.versions),
        ("preset", log.preset),
        ("cap of training", f"{float(log.config['MAX_WALLCLOCK_SECONDS']):g} s"),
        ("code bytes", f"{log.sizes.code:,}"),
        ("script sha256", f"`{log.script_hash}`"),
        ("tokenizer sha256", f"`{log.tokenizer_hash}`"),
        *((f"{name} sha256", f"`{value}`") for name, value in log.val_hashes.items()),
    ]
    return table(["what", "value"], rows)


def render_readme(
    name: str, threshold: float, logs: Sequence[RunLog], pictures: Sequence[str]
) -> str:
    """README.md, which shows the `pictures` that the folder has."""
    statistics = statistics_of(logs, threshold)
    largest = max((log.sizes for log in logs), key=lambda sizes: sizes.total)
    below = "below" if statistics.mean < threshold else "not below"
    parts = [
        f"# {name}",
        f"Mean `val_bpb` **{statistics.mean:.4f}** over {len(logs)} seeds under `{logs[0].score.condition}`, the last "
        f"condition of the ladder; {below} the threshold {threshold}. {date_of(logs)}, `{track_of(logs[0])}`.",
        TRACKS[track_of(logs[0])],
        "## Ladder",
        "Bits per byte, lower is better. `std` is the population's; each delta is the step from the first condition.",
        ladder_table(logs),
        *(f"![{PICTURES[picture]}]({picture})" for picture in pictures),
        "## Statistics",
        f"A one-sided one-sample t-test asks whether the true mean is below {threshold}:",
        f"    {statistics}",
        "## Runs",
        runs_table(logs),
        f"The largest submission has {largest.total:,} bytes of {BUDGET:,}, code included: "
        f"{BUDGET - largest.total:,} to spare.",
        "The exact commands:",
        "\n".join(f"    {log.command}" for log in logs),
        "## Environment",
        environment_table(logs[0]),
        "Written by `records/make_record.py` from the logs in this folder; `tests/test_records.py` checks that they "
        "agree.",
    ]
    return "\n\n".join(parts) + "\n"


def log_name(log: RunLog) -> str:
    """The name of a log inside its record: RUN_IDs of different folders can be the same, seeds cannot."""
    return f"seed{log.seed}.txt"


def render(
    name: str, threshold: float, logs: Sequence[RunLog], pictures: Sequence[str]
) -> dict[str, bytes]:
    """Every file of a record but the pictures, by name."""
    return {
        "README.md": render_readme(name, threshold, logs, pictures).encode(),
        "submission.json": render_submission(name, threshold, logs).encode(),
        "train_gpt.py": logs[0].source.encode(),
    } | {log_name(log): log.content for log in logs}


# --- Making and checking a folder ------------------------------------------------------------------------------------


def read_runs(paths: Sequence[Path]) -> list[RunLog]:
    """The runs of a record by seed. `ValueError` for runs that are no record."""
    logs = sorted((read_log(path) for path in paths), key=lambda log: log.seed)
    for log in logs:
        check_run(log)
    check_together(logs)
    return logs


def make_record(name: str, threshold: float, paths: Sequence[Path], records: Path) -> Path:
    """Write the record of these logs to records/{track}/{date}_{name}/, as a whole or not at all; returns the folder.

    Positions are drawn where the scores file that the first seed's log names is still there and still the same.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise ValueError(
            f"--name {name!r}: expected letters, digits, '.', '_' and '-', since it names a folder"
        )
    logs = read_runs(paths)
    target = records / track_of(logs[0]) / f"{date_of(logs)}_{name}"
    if target.exists():
        raise ValueError(
            f"{target}: found an earlier record; expected a new folder; choose another --name"
        )
    rows = None
    if logs[0].scores:
        path, printed = logs[0].scores
        if Path(path).is_file() and hashlib.sha256(Path(path).read_bytes()).hexdigest() == printed:
            rows = read_scores(Path(path), logs[0])
    pictures = draw(logs, rows)
    files = render(name, threshold, logs, list(pictures)) | pictures
    with tempfile.TemporaryDirectory(prefix=".building-", dir=records) as folder:
        build = Path(folder) / "record"  # inside, for a temporary folder is closed to other users
        build.mkdir()
        for file, content in files.items():
            (build / file).write_bytes(content)
        target.parent.mkdir(exist_ok=True)
        os.rename(build, target)
    return target


def verify(folder: Path) -> None:
    """Refuse a record whose files are not those that its logs, its name and its threshold give. `ValueError`."""
    submission = json.loads((folder / "submission.json").read_bytes())
    name, threshold = submission["name"], submission["statistics"]["threshold"]
    logs = read_runs(sorted(folder.glob("*.txt")))
    pictures = [picture for picture in PICTURES if (folder / picture).exists()]
    expected = render(name, threshold, logs, pictures)
    if (folder.parent.name, folder.name) != (track_of(logs[0]), f"{date_of(logs)}_{name}"):
        raise ValueError(
            f"{folder}: expected {track_of(logs[0])}/{date_of(logs)}_{name}, as the logs say"
        )
    found = {path.name for path in folder.iterdir()}
    if found != {*expected, *pictures}:
        raise ValueError(
            f"{folder}: found the files {sorted(found)}; expected {sorted({*expected, *pictures})}"
        )
    for file, content in expected.items():
        if (folder / file).read_bytes() != content:
            raise ValueError(
                f"{folder / file}: found a text that does not follow from the logs; make the record again"
            )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description="Make a record from the logs of several seeds.")
    parser.add_argument(
        "--name", required=True, help="of the record: letters, digits, '.', '_' and '-'"
    )
    parser.add_argument(
        "--threshold", type=float, required=True, help="the score to beat, bits per byte"
    )
    parser.add_argument("--logs", type=Path, nargs="+", required=True, help="one log for each seed")
    options = parser.parse_args(arguments)

    def make() -> None:
        print(f"record:{make_record(options.name, options.threshold, options.logs, RECORDS)}")

    return run_command(make, RECORDS)


if __name__ == "__main__":
    sys.exit(main())
