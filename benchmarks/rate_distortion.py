"""Bytes against bits per byte lost: the record's quantiser and ours, on the same trained weights.

    W=out/demo/final_model.pt
    python benchmarks/rate_distortion.py --weights $W --data data/demo --picture curves.png
    python benchmarks/rate_distortion.py --time --data data/demo

The record's quantiser has one knob that trades bytes for loss: the least step of a row, 1/127 in
the record. It is written here from spec section 5, with that knob, and zlib as the record calls it.
The record leaves matrices of 65,536 numbers and fewer in 16 bits; a second curve quantises them,
too. Ours is given the very bytes that each of these artifacts takes. What is lost is the flat score
of the artifact's weights less that of the weights in training precision.

With --time: the seconds of both for the 17 million parameters of the baseline, drawn at random.
"""

import argparse
import copy
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from bench_tools import Bench, open_stream, print_head, print_row, timed
from torch import Tensor

import train_gpt as tg

FLOORS = (1, 2, 4, 8, 16)  # least steps, in those of the record
CONTROL = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights")
# What the record's quantiser is called, and the largest tensor that it leaves in 16 bits.
VARIANTS = {"as it is": 65_536, "of every matrix": 0}

ORANGE = "#d9622b"
COLOURS = {"as it is": "#2b6cab", "of every matrix": "#9aa3ad"}
GREY = "#6b7280"
STYLE = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "font.size": 10,
    "text.color": "#22262b",
    "xtick.color": GREY,
    "ytick.color": GREY,
}
LEAST_SHOWN = 1e-5  # bits per byte: what is less is noise, on whichever side of 0


def round_rows(weights: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """(int8, like weights; fp16 scales, one for each row), as the record rounds a matrix.

    The largest 1.6 in a million of a row's numbers are clipped.
    """
    clip = torch.quantile(weights.abs(), 0.9999984, dim=1, keepdim=True)
    scale = (clip / 127).clamp_min(floor / 127)
    steps = weights.clamp(-clip, clip) / scale
    return steps.round().clamp(-127, 127).to(torch.int8), scale[:, 0].half()


def record_content(
    state: Mapping[str, Tensor], floor: float = 1.0, largest_float: int = 65_536
) -> dict[str, Any]:
    """What the record's quantiser puts into an artifact.

    `floor` is its least step, in steps of 1/127; tensors of up to `largest_float` numbers stay in
    16 bits.
    """
    parts = ("quantized", "scales", "dtypes", "passthrough", "qmeta", "passthrough_orig_dtypes")
    content = {"__quant_format__": tg.QUANT_FORMAT} | {part: {} for part in parts}
    for name, tensor in state.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if name.endswith(CONTROL):
            content["passthrough"][name] = tensor.float()
        elif tensor.numel() <= largest_float:
            content["passthrough"][name] = tensor.half()
            content["passthrough_orig_dtypes"][name] = dtype
        else:
            q, scale = round_rows(tensor.float(), floor)
            content["quantized"][name] = q
            content["scales"][name] = scale
            content["dtypes"][name] = dtype
            content["qmeta"][name] = {"scheme": "per_row", "axis": 0}
    return content


def record_pack(content: Mapping[str, Any]) -> bytes:
    """The artifact as the record compresses it."""
    return zlib.compress(tg.torch_bytes(content), 9)


def our_artifact(model: tg.GPT, size: int) -> bytes:
    """Our artifact of the model in at most `size` bytes."""
    model = copy.copy(model)
    budget = size + len(tg.source_code())
    model.cfg = replace(model.cfg, artifact_budget=budget)
    blob = tg.fit_artifact(
        model, dict(model.state_dict()), open_stream(model.cfg), tg.RunLog(rank=1)
    )
    assert len(blob) <= size
    return blob


def flat_bpb(bench: Bench, state: Mapping[str, Tensor]) -> float:
    """Bits per byte of these weights on the flat validation stream."""
    model = copy.deepcopy(bench.model)
    model.load_state_dict(state)
    return tg.evaluate(model, bench.docs, bench.condition("flat"), bench.rt).bpb


class Row(NamedTuple):
    """What both quantisers lose in the same number of bytes."""

    variant: str  # of the record's quantiser
    floor: int  # its least step, in steps of 1/127
    size: int  # bytes
    theirs: float  # bits per byte that the record's loses
    ours: float


def compare(bench: Bench) -> list[Row]:
    """Quantise under every variant and floor. Prints the table and returns its rows."""
    state = dict(bench.model.state_dict())
    exact = flat_bpb(bench, state)
    print(f"\nflat val_bpb of the weights: {exact:.6f}\n")
    print_head(
        "the record's quantiser",
        "least step",
        "bytes",
        "bpb lost",
        "lost by ours in these bytes",
        "share",
    )
    rows = []
    for variant, largest_float in VARIANTS.items():
        for floor in FLOORS:
            content = record_content(state, floor, largest_float)
            size = len(record_pack(content))
            theirs = flat_bpb(bench, tg.dequantize(content)) - exact
            blob = our_artifact(bench.model, size)
            content = tg.load_torch(zlib.decompress(blob))
            ours = flat_bpb(bench, tg.dequantize(content)) - exact
            rows.append(Row(variant, floor, size, theirs, ours))
            share = f"{max(ours, 0) / theirs:.3f}" if theirs > 0 else ""
            print_row(variant, f"{floor}/127", size, f"{theirs:.5f}", f"{ours:.5f}", share)
    return rows


def draw_curve(axes: Any, points: Sequence[tuple[int, float]], label: str, colour: str):
    """Add the curve through points of (bytes, bits per byte lost)."""
    megabytes = [size / 1e6 for size, _ in points]
    losses = [max(lost, LEAST_SHOWN) for _, lost in points]
    axes.plot(megabytes, losses, "o-", color=colour, label=label, markersize=4)


def draw_panel(axes: Any, title: str, rows: Sequence[Row]):
    """Draw the curves of one model: bits per byte lost, on a logarithmic scale, against bytes."""
    draw_curve(axes, sorted({(row.size, row.ours) for row in rows}), "ours", ORANGE)
    for variant, colour in COLOURS.items():
        points = [(row.size, row.theirs) for row in rows if row.variant == variant]
        draw_curve(axes, points, f"the record's, {variant}", colour)
    axes.set(xlabel="megabytes of artifact", yscale="log", title=title)
    axes.grid(color="#e3e6ea")
    axes.spines[["top", "right"]].set_visible(False)


def draw(curves: Mapping[str, Sequence[Row]], picture: Path):
    """Write the picture, with a panel for each model."""
    import matplotlib.pyplot as plt  # the rest of the file does without

    count = len(curves)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, count, sharey=True, squeeze=False, layout="constrained")
        figure.set_size_inches(5.2 * count, 4.2)
        panels = grid[0]
        for axes, (title, rows) in zip(panels, curves.items(), strict=True):
            draw_panel(axes, title, rows)
        panels[0].set_ylabel(f"bits per byte lost ({LEAST_SHOWN:.0e}: that or less)")
        panels[-1].legend(frameon=False)
        figure.savefig(picture, dpi=160)


def fastest(work: Callable, repeats: int) -> tuple[float, Any]:
    """(seconds of the fastest of `repeats` calls of work(), what that one returned)."""
    results = [timed(work) for _ in range(repeats)]
    return min(results, key=lambda result: result[0])


def randomize(model: tg.GPT):
    """Fill the matrices with spreads as training leaves them.

    The spreads of rows differ by a third, those of matrices by a fifth.
    """
    for name, p in model.named_parameters():
        if name.endswith("weight"):
            spread = 0.3 * torch.randn(len(p), 1) + 0.2 * torch.randn(())
            p.data.copy_(torch.randn(p.shape) * 0.3 * spread.exp())


def print_times(cfg: tg.Config, repeats: int):
    """Print the seconds that both quantisers take for random weights of this shape."""
    model = tg.build_model(cfg, torch.float32).requires_grad_(False)
    randomize(model)
    state = dict(model.state_dict())
    count = sum(p.numel() for p in model.parameters())
    print(f"{count} parameters, {torch.get_num_threads()} threads, least of {repeats}")
    print_head("what", "seconds", "bytes")
    seconds, blob = fastest(lambda: record_pack(record_content(state)), repeats)
    print_row("the record's: round, compress", f"{seconds:.1f}", len(blob))
    measure = tg.measure_matrices
    times = []

    def timed_measure(*arguments: Any) -> dict:
        seconds, stats = timed(lambda: measure(*arguments))
        times.append(seconds)
        return stats

    with mock.patch.object(tg, "measure_matrices", timed_measure):
        stream = open_stream(model.cfg)
        log = tg.RunLog(rank=1)  # says nothing
        seconds, blob = fastest(lambda: tg.fit_artifact(model, state, stream, log), repeats)
    print_row("ours: measure, search, round, compress", f"{seconds:.1f}", len(blob))
    print_row("measure alone, least", f"{min(times, default=0):.1f}", "")


def main():
    """Print the tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights",
        type=Path,
        nargs="*",
        default=[],
        help="final_model.pt of one or more trainings",
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of shards and tokenizer.model"
    )
    parser.add_argument("--picture", type=Path, help="where to draw the curves")
    parser.add_argument(
        "--time", action="store_true", help="seconds for the baseline's model instead"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of --time")
    options = parser.parse_args()
    if options.time:
        env = {"PRESET": "baseline", "DEVICE": "cpu", "DATA_PATH": str(options.data)}
        print_times(tg.read_config(env), options.repeats)
        return
    curves = {}
    for path in options.weights:
        curves[str(path)] = compare(Bench.load(path, options.data))
    if options.picture:
        draw(curves, options.picture)


if __name__ == "__main__":
    main()
