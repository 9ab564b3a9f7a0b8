"""Draw a run: what each condition gains, where in a document it gains it, and how training went.

    python records/plot.py out/demo/scores.csv out/demo/logs/x.txt --out pictures

writes ladder.png, position.png and training.png. The scores file must be that run's: its sums are checked against the
ladder lines of the log before anything is drawn.
"""

import argparse
import io
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from run_log import LABELS, RunLog, half_digit, read_log, run_command

COLUMNS = [
    ("condition", "U32"),
    ("doc", "i8"),
    ("chunk", "i8"),
    ("start", "i8"),
    ("tokens", "i8"),
    ("bytes", "i8"),
    ("loss_nats", "f8"),
]
INK, QUIET, FAINT = "#22262b", "#6b7280", "#e3e6ea"
COLOURS = (
    "#9aa3ad",
    "#6aa9d8",
    "#2b6cab",
    "#d9622b",
    "#4b9b6e",
    "#8a63b0",
)  # by place in the ladder, again from there
STYLE = {
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "savefig.dpi": 160,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
}
LEAST_SHARE = 0.08  # of a condition's bytes in each point of position.png: a few long documents shall make no zigzag


# --- Scores ----------------------------------------------------------------------------------------------------------


def read_scores(path: Path, log: RunLog) -> np.ndarray:
    """The rows of a scores file, one for each condition, document and piece. `ValueError` unless they are the run's."""
    try:
        with open(path, encoding="utf-8") as file:
            header = file.readline().strip()
            if header != ",".join(name for name, _ in COLUMNS):
                raise ValueError(f"the header {header!r}; expected the columns of SCORES_PATH")
            rows = np.loadtxt(file, dtype=COLUMNS, delimiter=",", ndmin=1)
    except ValueError as error:
        raise ValueError(f"{path}: found {error}") from None
    found, expected = (
        list(dict.fromkeys(rows["condition"].tolist())),
        [rung.condition for rung in log.ladder],
    )
    if found != expected:
        raise ValueError(f"{path}: found conditions {found}; expected {expected}, as in {log.path}")
    for rung in log.ladder:
        mine = rows[rows["condition"] == rung.condition]
        tokens, count, nats = (mine[name].sum() for name in ("tokens", "bytes", "loss_nats"))
        same_loss = (
            abs(nats / tokens - float(rung.val_loss)) <= float(half_digit(rung.val_loss)) + 1e-12
        )
        if (tokens, count) != (rung.tokens, rung.bytes) or not same_loss:
            raise ValueError(
                f"{path}: found condition:{rung.condition} tokens:{tokens} bytes:{count} val_loss:{nats / tokens:.6f}; "
                f"expected tokens:{rung.tokens} bytes:{rung.bytes} val_loss:{rung.val_loss}, as in {log.path}"
            )
    return rows


def position_edges(rows: np.ndarray) -> np.ndarray:
    """First positions of bins, as close as LEAST_SHARE of all bytes in each allows.

    Under every condition a row is a piece of TTT_CHUNK_SIZE predictions that starts at a multiple of it, or the shorter
    end of a document: one set of bins serves them all, and no row lies in two.
    """
    starts, places = np.unique(rows["start"], return_inverse=True)
    least, edges, held = LEAST_SHARE * rows["bytes"].sum(), [0], 0.0
    for start, count in zip(starts, np.bincount(places, weights=rows["bytes"]), strict=True):
        if held >= least:
            edges.append(start)
            held = 0.0
        held += count
    return np.array(
        edges if held >= least else edges[:-1]
    )  # too little text at the end belongs to the bin before


def bits_by_position(rows: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean position in tokens, bits per byte) of each bin that holds text.

    Bits per byte is the sum of all nats / ln 2, divided by the sum of all bytes; bytes weigh the positions too.
    """
    places, middles = np.digitize(rows["start"], edges) - 1, rows["start"] + rows["tokens"] / 2
    parts = rows["bytes"], rows["bytes"] * middles, rows["loss_nats"]
    count, position, nats = (np.bincount(places, weights=part) for part in parts)
    full = count > 0
    return position[full] / count[full], nats[full] / math.log(2) / count[full]


# --- Pictures --------------------------------------------------------------------------------------------------------


def new_figure(
    title: str, note: str, logs: Sequence[RunLog], box: tuple[float, float, float]
) -> tuple[Figure, Axes]:
    """A figure 8 inches wide with a headline and a quiet line below it that says what is drawn.

    box is (space left of the axes, space right of them, their height) in inches.
    """
    left, right, tall = box
    high = tall + 1.65
    figure = Figure(figsize=(8, high))
    axes = figure.add_axes((left / 8, 0.7 / high, (8 - left - right) / 8, tall / high))
    note += "; partial run, no score" if any(log.partial for log in logs) else ""
    figure.text(0.25 / 8, 1 - 0.42 / high, title, size=14, weight="bold")
    figure.text(0.25 / 8, 1 - 0.68 / high, note, size=9.5, color=QUIET)
    return figure, axes


def seeds_note(logs: Sequence[RunLog]) -> str:
    """Which runs a picture shows."""
    return f"seed {logs[0].seed}" if len(logs) == 1 else f"{len(logs)} seeds"


def ladder_figure(logs: Sequence[RunLog]) -> Figure:
    """Each condition's bits per byte, mean over the runs, as a bar from the score of the first condition.

    The length of such a bar is the gain, so that it is honest on an axis that does not start at zero.
    """
    conditions = [rung.condition for rung in logs[0].ladder]
    scores = np.array([[float(rung.val_bpb) for rung in log.ladder] for log in logs])
    means, spread, first = scores.mean(0), scores.std(0), scores[:, 0].mean()
    shown = (
        seeds_note(logs)
        if len(logs) == 1
        else f"mean and standard deviation of {seeds_note(logs)} (circles)"
    )
    note = f"lower is better; bars start at the score of {conditions[0]}; {shown}"
    figure, axes = new_figure(
        "What each condition gains", note, logs, (2.25, 1.75, 0.62 * len(conditions))
    )
    axes.axvline(first, color=QUIET, linewidth=1, zorder=0)
    for row, (condition, mean) in enumerate(zip(conditions, means, strict=True)):
        axes.barh(row, mean - first, left=first, height=0.5, color=COLOURS[row % len(COLOURS)])
        axes.plot(
            scores[:, row], [row] * len(logs), "o", color="white", markeredgecolor=INK, markersize=5
        )
        side = {
            "xycoords": axes.get_yaxis_transform(),
            "textcoords": "offset points",
            "va": "center_baseline",
        }
        axes.annotate(
            condition, (0, row), (-144, 6 if condition in LABELS else 0), weight="bold", **side
        )
        axes.annotate(
            LABELS.get(condition, ""), (0, row), (-144, -8), color=QUIET, size=8.5, **side
        )
        axes.annotate(
            f"{mean:.4f}", (1, row), (14, 0 if len(logs) == 1 else 6), weight="bold", **side
        )
        if len(logs) > 1:
            axes.annotate(f"±{spread[row]:.4f}", (1, row), (14, -8), color=QUIET, size=8.5, **side)
        if row:
            axes.annotate(f"{mean - first:+.4f}".replace("-", "−"), (1, row), (66, 0), **side)
    axes.set_ylim(len(conditions) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.use_sticky_edges = (
        False  # bars would pull the axis in to where they start, through the middle of a circle
    )
    axes.margins(x=0.06)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("bits per byte (the axis does not start at 0)")
    return figure


def position_figure(rows: np.ndarray, log: RunLog) -> Figure:
    """Bits per byte against the position in the document, one line for each condition."""
    rows = rows[rows["doc"] >= 0]  # text before the first document has no position in one
    note = f"{seeds_note([log])}; documents pooled, each point about {LEAST_SHARE:.0%} of the text or more"
    figure, axes = new_figure(
        "Bits per byte by position in the document", note, [log], (0.9, 1, 3.3)
    )
    ends, edges = [], position_edges(rows)
    for index, rung in enumerate(log.ladder):
        colour, mine = COLOURS[index % len(COLOURS)], rows[rows["condition"] == rung.condition]
        x, y = bits_by_position(mine, edges)
        axes.plot(x, y, color=colour, linewidth=2, marker="o", markersize=4)
        ends.append((x[-1], y[-1], rung.condition, colour))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("predictions since the start of the document")
    axes.set_ylabel("bits per byte (the axis does not start at 0)")
    axes.grid(axis="y", color=FAINT)
    label_ends(axes, ends)
    return figure


def label_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each line's name beside its last point (x, y, name, colour), moved apart where names would touch."""
    low, high = axes.get_ylim()
    gap, above = 0.055 * (high - low), -math.inf
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        above = max(y, above + gap)
        axes.annotate(
            name,
            (x, above),
            (9, 0),
            textcoords="offset points",
            color=colour,
            weight="bold",
            va="center_baseline",
        )


def training_figure(logs: Sequence[RunLog]) -> Figure:
    """Training loss of every run against the step, with the time that the steps took, and the validations."""
    trend, check = COLOURS[2], COLOURS[3]
    note = f"nats per token; dots are single steps, lines their running means; {seeds_note(logs)}"
    figure, axes = new_figure("Training loss", note, logs, (0.75, 1.15, 3.3))
    for log in logs:
        steps, losses = (
            np.array([(point.step, point.loss) for point in log.training]).reshape(-1, 2).T
        )
        axes.plot(steps, losses, "o", color=trend, alpha=0.25, markersize=3.5, markeredgewidth=0)
        axes.plot(
            steps, running_mean(steps, losses, log.validation[-1].step), color=trend, linewidth=1.5
        )
        validated = [(point.step, point.loss) for point in log.validation]
        axes.plot(
            *zip(*validated, strict=True),
            "o",
            color="white",
            markeredgecolor=check,
            markeredgewidth=1.8,
        )
    last = [log.validation[-1] for log in logs]
    end, loss = max(point.step for point in last), np.mean([point.loss for point in last])
    pace = np.mean([point.milliseconds / max(point.step, 1) for point in last]) / 1000
    axes.set_xlim(0, 1.02 * max(end, 1))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}\n{step * pace:,.0f} s")
    axes.set_xlabel("step, and seconds of training until then")
    axes.grid(axis="y", color=FAINT)
    label_ends(axes, [(end, loss, f"validation\n{loss:.4f}", check)])
    return figure


def running_mean(steps: np.ndarray, losses: np.ndarray, end: int) -> np.ndarray:
    """Mean of the losses near each step: within a tenth of the run, and at most half-way to its start."""
    near = np.abs(steps[:, None] - steps) <= np.minimum(0.1 * end, steps / 2)[:, None]
    return (near * losses).sum(1) / near.sum(1)


# --- Command line ----------------------------------------------------------------------------------------------------


def draw(logs: Sequence[RunLog], rows: np.ndarray | None) -> dict[str, bytes]:
    """PNG files by name: the ladder always, positions from the rows of the first run, training where there was any."""
    with matplotlib.rc_context(STYLE):
        figures = {"ladder.png": ladder_figure(logs)}
        if rows is not None:
            figures["position.png"] = position_figure(rows, logs[0])
        if all(log.validation for log in logs):
            figures["training.png"] = training_figure(logs)
        pictures = {}
        for name, figure in figures.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", metadata={"Software": None})
            pictures[name] = buffer.getvalue()
    return pictures


def write_pictures(pictures: dict[str, bytes], folder: Path) -> None:
    """Put every picture at its place entirely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(content)
            os.replace(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description="Draw the scores and the training of a run.")
    parser.add_argument("scores", type=Path, help="the file that SCORES_PATH named")
    parser.add_argument("log", type=Path, help="the log of that run")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    options = parser.parse_args(arguments)

    def plot() -> None:
        log = read_log(options.log)
        write_pictures(draw([log], read_scores(options.scores, log)), options.out)

    return run_command(plot, options.out)


if __name__ == "__main__":
    sys.exit(main())
