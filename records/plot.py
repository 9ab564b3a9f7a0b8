"""Draw a run: what each condition gains, where in a document it gains it, and how training went.

    python records/plot.py out/demo/scores.csv out/demo/logs/x.txt --out pictures

writes ladder.png, position.png and training.png. The scores file must be that run's: its sums are
checked against the results in the log before anything is drawn.
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
from run_log import LABELS, Result, RunLog, read_log, run_command
from scores import read_rows

INK = "#22262b"
QUIET = "#6b7280"
FAINT = "#e3e6ea"
# By place in the ladder, and again from the first one.
COLOURS = ("#9aa3ad", "#6aa9d8", "#2b6cab", "#d9622b", "#4b9b6e", "#b8912f", "#8a63b0")
VALIDATION_COLOUR = "#d9622b"
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
# Of a condition's bytes in each point of position.png: a few long documents must not make a zigzag.
LEAST_SHARE = 0.08


# --- Scores ---


def read_scores(path: Path, log: RunLog) -> np.ndarray:
    """Return the rows of a scores file, one for each condition, document and chunk.

    Raises `ValueError` unless they are the rows of this run.
    """
    rows = read_rows(path, int(log.config["TTT_CHUNK_SIZE"]))
    found = list(dict.fromkeys(rows["condition"].tolist()))
    expected = [result.condition for result in log.results]
    if found != expected:
        raise ValueError(f"{path}: found conditions {found}; expected {expected}, as in {log.path}")
    for result in log.results:
        try:
            check_sums(rows[rows["condition"] == result.condition], result)
        except ValueError as error:
            raise ValueError(f"{path}: {error}, as in {log.path}") from None
    return rows


def check_sums(rows: np.ndarray, result: Result) -> None:
    """Refuse rows of a condition that do not add up to its result. `ValueError`."""
    tokens = rows["tokens"].sum()
    size = rows["bytes"].sum()
    loss = rows["loss_nats"].sum() / tokens
    same_loss = abs(loss - result.val_loss) <= 1e-6
    if tokens != result.tokens or size != result.bytes or not same_loss:
        found = f"tokens:{tokens} bytes:{size} val_loss:{loss:.6f}"
        expected = f"tokens:{result.tokens} bytes:{result.bytes} val_loss:{result.val_loss:.6f}"
        raise ValueError(f"found condition:{result.condition} {found}; expected {expected}")


def position_edges(rows: np.ndarray) -> np.ndarray:
    """Return the first positions of bins, as close as LEAST_SHARE of all bytes in each allows.

    Under every condition a row starts at a multiple of TTT_CHUNK_SIZE and is at most that long: one
    set of bins serves them all, and no row lies in two.
    """
    starts, places = np.unique(rows["start"], return_inverse=True)
    sizes = np.bincount(places, weights=rows["bytes"])
    least = LEAST_SHARE * rows["bytes"].sum()
    edges = [0]
    held = 0.0
    for start, size in zip(starts, sizes, strict=True):
        if held >= least:
            edges.append(start)
            held = 0.0
        held += size
    if held < least:
        edges.pop()  # too little text at the end belongs to the bin before
    return np.array(edges)


def bits_by_position(rows: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (mean position in tokens, bits per byte) of each bin that holds text.

    Bits per byte is the sum of all nats / ln 2, divided by the sum of all bytes; the mean position
    is weighted by bytes, too.
    """
    bins = np.digitize(rows["start"], edges) - 1
    middles = rows["start"] + rows["tokens"] / 2
    sizes = np.bincount(bins, weights=rows["bytes"])
    positions = np.bincount(bins, weights=rows["bytes"] * middles)
    nats = np.bincount(bins, weights=rows["loss_nats"])
    full = sizes > 0
    sizes = sizes[full]
    return positions[full] / sizes, nats[full] / math.log(2) / sizes


# --- Pictures ---


def new_figure(
    title: str, note: str, logs: Sequence[RunLog], box: tuple[float, float, float]
) -> tuple[Figure, Axes]:
    """Return a figure 8 inches wide with a headline and a quiet line that says what is drawn.

    box: (space left of the axes, space right of them, their height) in inches.
    """
    left, right, axes_height = box
    height = axes_height + 1.65
    figure = Figure(figsize=(8, height))
    bottom = 0.7 / height
    width = (8 - left - right) / 8
    axes = figure.add_axes((left / 8, bottom, width, axes_height / height))
    if any(log.partial for log in logs):
        note += "; partial run, no score"
    figure.text(0.25 / 8, 1 - 0.42 / height, title, size=14, weight="bold")
    figure.text(0.25 / 8, 1 - 0.68 / height, note, size=9.5, color=QUIET)
    return figure, axes


def name_seeds(logs: Sequence[RunLog]) -> str:
    """Return which runs a picture shows."""
    return f"seed {logs[0].seed}" if len(logs) == 1 else f"{len(logs)} seeds"


def write_in_row(axes: Axes, text: str, side: int, row: int, shift: tuple, **style) -> None:
    """Write a text beside a row of the ladder.

    side: 0 left of the axes, 1 right of them. shift: (x, y) in points from there.
    """
    style |= {"textcoords": "offset points", "va": "center_baseline"}
    place = axes.get_yaxis_transform()
    axes.annotate(text, (side, row), shift, xycoords=place, **style)


def draw_condition(axes: Axes, row: int, condition: str, scores: np.ndarray, first: float) -> None:
    """Draw one row of the ladder: a bar from `first`, a circle for each run's score, and texts."""
    mean = scores.mean()
    several = len(scores) > 1
    label = LABELS.get(condition)
    quiet = {"color": QUIET, "size": 8.5}
    colour = COLOURS[row % len(COLOURS)]
    axes.barh(row, mean - first, left=first, height=0.5, color=colour)
    circles = {"color": "white", "markeredgecolor": INK, "markersize": 5}
    axes.plot(scores, [row] * len(scores), "o", **circles)
    write_in_row(axes, condition, 0, row, (-144, 6 if label else 0), weight="bold")
    if label:
        write_in_row(axes, label, 0, row, (-144, -8), **quiet)
    write_in_row(axes, f"{mean:.4f}", 1, row, (14, 6 if several else 0), weight="bold")
    if several:
        write_in_row(axes, f"±{scores.std():.4f}", 1, row, (14, -8), **quiet)
    if row > 0:
        gain = f"{mean - first:+.4f}".replace("-", "−")
        write_in_row(axes, gain, 1, row, (66, 0))


def ladder_figure(logs: Sequence[RunLog]) -> Figure:
    """Return each condition's bits per byte, mean over the runs, as a bar from the first score.

    The length of such a bar is the gain, so it is honest on an axis that does not start at zero.
    """
    conditions = [result.condition for result in logs[0].results]
    scores = np.array([[result.val_bpb for result in log.results] for log in logs])
    first = scores[:, 0].mean()
    shown = name_seeds(logs)
    if len(logs) > 1:
        shown = f"mean and standard deviation of {shown} (circles)"
    note = f"lower is better; bars start at the score of {conditions[0]}; {shown}"
    box = (2.25, 1.75, 0.62 * len(conditions))
    figure, axes = new_figure("What each condition gains", note, logs, box)
    axes.axvline(first, color=QUIET, linewidth=1, zorder=0)
    for row, condition in enumerate(conditions):
        draw_condition(axes, row, condition, scores[:, row], first)
    axes.set_ylim(len(conditions) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    # Sticky bars would end the axis where they start, through the middle of a circle.
    axes.use_sticky_edges = False
    axes.margins(x=0.06)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("bits per byte (the axis does not start at 0)")
    return figure


def position_figure(rows: np.ndarray, log: RunLog) -> Figure:
    """Return bits per byte against the position in the document, one line for each condition."""
    rows = rows[rows["doc"] >= 0]  # text before the first document has no position in one
    edges = position_edges(rows)
    share = f"each point about {LEAST_SHARE:.0%} of the text or more"
    note = f"{name_seeds([log])}; documents pooled, {share}"
    title = "Bits per byte by position in the document"
    figure, axes = new_figure(title, note, [log], (0.9, 1, 3.3))
    ends = []
    for index, result in enumerate(log.results):
        mine = rows[rows["condition"] == result.condition]
        x, y = bits_by_position(mine, edges)
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(x, y, color=colour, linewidth=2, marker="o", markersize=4)
        ends.append((x[-1], y[-1], result.condition, colour))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("predictions since the start of the document")
    axes.set_ylabel("bits per byte (the axis does not start at 0)")
    axes.grid(axis="y", color=FAINT)
    label_ends(axes, ends)
    return figure


def label_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each line's name beside its last point, moved apart where names would touch.

    ends: (x, y, name, colour) of each line.
    """
    ends = sorted(ends, key=lambda end: end[1])
    low, high = axes.get_ylim()
    gap = 0.055 * (high - low)
    heights = []
    floor = low
    for _, y, _, _ in ends:
        heights.append(max(y, floor))
        floor = heights[-1] + gap
    # From the top down: a name above the axes would not be drawn.
    ceiling = high
    for index in reversed(range(len(ends))):
        heights[index] = min(heights[index], ceiling)
        ceiling = heights[index] - gap
    style = {"textcoords": "offset points", "weight": "bold", "va": "center_baseline"}
    for (x, _, name, colour), height in zip(ends, heights, strict=True):
        axes.annotate(name, (x, height), (9, 0), color=colour, annotation_clip=False, **style)


def draw_training(axes: Axes, log: RunLog) -> np.ndarray:
    """Draw the losses of one run: single steps, their running mean, and the validations.

    Returns the losses that must be seen: all but those of the first 2 % of the run.
    """
    steps = np.array([point.step for point in log.training])
    losses = np.array([point.loss for point in log.training])
    end = log.validation[-1].step
    trend = running_mean(steps, losses, end)
    dots = {"alpha": 0.35, "markersize": 4, "markeredgewidth": 0}
    axes.plot(steps, losses, "o", color=COLOURS[2], **dots)
    axes.plot(steps, trend, color=COLOURS[2], linewidth=2)
    later = steps > 0.02 * end
    shown = [losses[later], trend[later]]
    steps = [point.step for point in log.validation]
    losses = [point.loss for point in log.validation]
    circles = {"color": "white", "markeredgecolor": VALIDATION_COLOUR, "markeredgewidth": 1.8}
    axes.plot(steps, losses, "o", **circles)
    return np.concatenate([*shown, losses])


def training_figure(logs: Sequence[RunLog]) -> Figure:
    """Return the losses of every run against the step, with the time that the steps took.

    A dashed line is the loss under the last condition: what test-time training adds to training.
    """
    seeds = name_seeds(logs)
    drawn = "dots are steps, lines their running means, dashes the final score"
    note = f"nats per token; {drawn}; {seeds}"
    figure, axes = new_figure("Training loss", note, logs, (0.75, 1.6, 3.3))
    shown = np.concatenate([draw_training(axes, log) for log in logs])
    last = [log.validation[-1] for log in logs]
    end = max(point.step for point in last)
    loss = np.mean([point.loss for point in last])
    score = np.mean([log.score.val_loss for log in logs])
    lowest = min(score, shown.min())
    highest = max(score, shown.max())
    room = 0.08 * max(highest - lowest, 0.1)
    axes.set_ylim(lowest - room, highest + room)
    condition = logs[0].score.condition
    index = len(logs[0].results) - 1
    colour = COLOURS[index % len(COLOURS)]
    axes.axhline(score, color=colour, linestyle="--")
    step_ms = np.mean([point.milliseconds / max(point.step, 1) for point in last])
    axes.set_xlim(0, 1.02 * max(end, 1))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}\n{step * step_ms / 1000:,.0f} s")
    axes.set_xlabel("step, and seconds of training until then")
    axes.grid(axis="y", color=FAINT)
    right = axes.get_xlim()[1]
    ends = [(right, score, f"{condition} {score:.4f}", colour)]
    ends.append((right, loss, f"validation {loss:.4f}", VALIDATION_COLOUR))
    label_ends(axes, ends)
    return figure


def running_mean(steps: np.ndarray, losses: np.ndarray, end: int) -> np.ndarray:
    """Return the mean of the losses near each step, of `end` in all.

    Near is within a tenth of the run, and at most half-way to its start.
    """
    reach = np.minimum(0.1 * end, steps / 2)
    near = np.abs(steps[:, None] - steps) <= reach[:, None]
    return (near * losses).sum(1) / near.sum(1)


# --- Command line ---


def draw(logs: Sequence[RunLog], rows: np.ndarray | None) -> dict[str, bytes]:
    """Return PNG files by name: the ladder, and what else there is something to draw of.

    rows: the scores of the first run, if they are there.
    """
    pictures = {}
    with matplotlib.rc_context(STYLE):
        figures = {"ladder.png": ladder_figure(logs)}
        if rows is not None:
            figures["position.png"] = position_figure(rows, logs[0])
        if all(log.validation for log in logs):
            figures["training.png"] = training_figure(logs)
        for name, figure in figures.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", metadata={"Software": None})
            pictures[name] = buffer.getvalue()
    return pictures


def write_pictures(pictures: dict[str, bytes], folder: Path) -> None:
    """Write every picture as a whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(content)
            os.replace(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description="Draw the scores and the training of a run.")
    parser.add_argument("scores", type=Path, help="the file that SCORES_PATH named")
    parser.add_argument("log", type=Path, help="the log of that run")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    options = parser.parse_args(arguments)

    def plot() -> None:
        log = read_log(options.log)
        rows = read_scores(options.scores, log)
        write_pictures(draw([log], rows), options.out)

    return run_command(plot, options.out)


if __name__ == "__main__":
    sys.exit(main())
