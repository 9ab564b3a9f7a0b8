"""Bytes against bits per byte lost: the record's quantiser and ours, on the same trained weights.

    python benchmarks/rate_distortion.py --weights out/demo/final_model.pt --data data/demo --picture curves.png
    python benchmarks/rate_distortion.py --time --data data/demo

The record's quantiser has one knob that trades bytes for loss, the least step of a row, 1/127 in the record. It is
written here from spec section 5, with that knob, and zlib as the record calls it; a second curve quantises matrices of
65,536 numbers and fewer as well, which the record leaves in 16 bits. Ours is given the very bytes that each of these
artifacts takes. What is lost is the flat score of the artifact's weights less that of the weights in training
precision. With --time: seconds for the 17 million parameters of the baseline, drawn at random, and the defaults.
"""

import argparse
import copy
import functools
import io
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ttt_eval import Bench

import train_gpt as tg

FLOORS = (1, 2, 4, 8, 16)  # least steps, in those of the record
CONTROL = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights")


def record_content(
    state: Mapping[str, Tensor], floor: float = 1.0, largest_float: int = 65_536
) -> dict[str, Any]:
    """What the record's quantiser puts into an artifact; `floor` counts its least step, 1/127."""
    parts = ("quantized", "scales", "dtypes", "passthrough", "qmeta", "passthrough_orig_dtypes")
    out: dict[str, Any] = {"__quant_format__": tg.QUANT_FORMAT} | {part: {} for part in parts}
    for name, tensor in state.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if name.endswith(CONTROL):
            out["passthrough"][name] = tensor.float()
        elif tensor.numel() > largest_float:
            w = tensor.float()
            clip = torch.quantile(w.abs(), 0.9999984, dim=1, keepdim=True)
            scale = (clip / 127).clamp_min(floor / 127)
            out["quantized"][name] = (
                (w.clamp(-clip, clip) / scale).round().clamp(-127, 127).to(torch.int8)
            )
            out["scales"][name], out["dtypes"][name] = scale[:, 0].half(), dtype
            out["qmeta"][name] = {"scheme": "per_row", "axis": 0}
        else:
            out["passthrough"][name], out["passthrough_orig_dtypes"][name] = tensor.half(), dtype
    return out


def record_pack(content: Mapping[str, Any]) -> bytes:
    """The artifact as the record compresses it."""
    torch.save(content, buffer := io.BytesIO())
    return zlib.compress(buffer.getvalue(), 9)


def flat(bench: Bench, state: Mapping[str, Tensor]) -> float:
    """Bits per byte of these weights on the flat validation stream."""
    model = copy.deepcopy(bench.model)
    tg.copy_tensors(model.state_dict(), state, "")
    return tg.evaluate(model, bench.docs, bench.condition("flat"), bench.cfg, bench.rt).bpb


def compare(bench: Bench) -> list[tuple[str, float, int, float, float]]:
    """(record's variant, floor, bytes, bpb that it loses, bpb that ours loses at these bytes), and a table of them."""
    state = dict(bench.model.state_dict())
    calibrated = functools.cache(lambda rows: tg.calibrate(bench.model, bench.cfg, rows))
    base, code, rows = flat(bench, state), len(tg.source_code().encode()), []
    print(f"\nflat val_bpb of the weights: {base:.6f}\n")
    print(
        "| the record's quantiser | least step | bytes | bpb lost | lost by ours in these bytes | share |"
    )
    print("|---|---|---|---|---|---|")
    for name, largest_float in (("as it is", 65_536), ("of every matrix", 0)):
        for floor in FLOORS:
            theirs = record_content(state, floor, largest_float)
            size = len(record_pack(theirs))
            ours, blob = tg.fit(state, size + code, calibrated)
            assert len(blob) <= size
            lost = [flat(bench, tg.dequantize_state(content)) - base for content in (theirs, ours)]
            rows.append((name, floor, size, *lost))
            share = f"{max(lost[1], 0) / lost[0]:.3f}" if lost[0] > 0 else ""
            print(
                f"| {name} | {floor}/127 | {size} | {lost[0]:.5f} | {lost[1]:.5f} | {share} |",
                flush=True,
            )
    return rows


def draw(curves: Mapping[str, list[tuple[str, float, int, float, float]]], picture: Path) -> None:
    """A panel for each model: bpb lost, on a logarithmic scale, against bytes."""
    import matplotlib.pyplot as plt  # the rest of the file does without

    style = {
        "axes.edgecolor": "#6b7280",
        "axes.labelcolor": "#6b7280",
        "font.size": 10,
        "text.color": "#22262b",
        "xtick.color": "#6b7280",
        "ytick.color": "#6b7280",
    }
    with plt.rc_context(style):
        size = (5.2 * len(curves), 4.2)
        figure, panels = plt.subplots(
            1, len(curves), figsize=size, sharey=True, squeeze=False, layout="constrained"
        )
        for axes, (title, rows) in zip(panels[0], curves.items(), strict=True):
            ours = sorted({(size, lost) for _, _, size, _, lost in rows})
            lines = [([size for size, _ in ours], [lost for _, lost in ours], "ours", "#d9622b")]
            for name, colour in (("as it is", "#2b6cab"), ("of every matrix", "#9aa3ad")):
                theirs = [row for row in rows if row[0] == name]
                label = f"the record's, {name}"
                lines.append(
                    ([row[2] for row in theirs], [row[3] for row in theirs], label, colour)
                )
            for sizes, losses, label, colour in lines:
                shown = [
                    max(lost, 1e-5) for lost in losses
                ]  # what is less is noise, on whichever side of 0
                axes.plot(
                    [size / 1e6 for size in sizes],
                    shown,
                    "o-",
                    color=colour,
                    label=label,
                    markersize=4,
                )
            axes.set(xlabel="megabytes of artifact", yscale="log", title=title)
            axes.grid(color="#e3e6ea")
            axes.spines[["top", "right"]].set_visible(False)
        panels[0][0].set_ylabel("bits per byte lost (1e-5: that or less)")
        panels[0][-1].legend(frameon=False)
        figure.savefig(picture, dpi=160)


def least_seconds(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """(seconds of the fastest of `repeats`, what it returned)."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = work()
        found.append((time.perf_counter() - began, result))
    return min(found, key=lambda pair: pair[0])


def timing(cfg: tg.Config, repeats: int) -> None:
    """Seconds that the record's quantiser and ours take for a model of this shape with random weights."""
    torch.manual_seed(0)
    model = tg.GPT(cfg, torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(
                "weight"
            ):  # spreads of a trained model: rows differ by a third, matrices by a fifth
                spread = 0.3 * (0.3 * torch.randn(len(p), 1) + 0.2 * torch.randn(())).exp()
                p.copy_(torch.randn(p.shape) * spread)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    print(
        f"{tg.count_parameters(cfg)} parameters, {torch.get_num_threads()} threads, least of {repeats}"
    )
    print("| what | seconds | bytes |\n|---|---|---|")
    seconds, blob = least_seconds(lambda: record_pack(record_content(state)), repeats)
    print(f"| the record's: round, compress | {seconds:.1f} | {len(blob)} |", flush=True)
    calibrating = []

    def calibrated(rows: int) -> dict[str, tuple[Tensor, Tensor]]:
        began = time.perf_counter()
        found = tg.calibrate(model, cfg, rows)
        calibrating.append(time.perf_counter() - began)
        return found

    seconds, (_, blob) = least_seconds(
        lambda: tg.fit(state, cfg.artifact_budget, calibrated), repeats
    )
    print(f"| ours: calibrate, search, round, compress | {seconds:.1f} | {len(blob)} |")
    print(f"| calibrate alone, least | {min(calibrating, default=0):.1f} | |")


def main() -> None:
    """The tables, and the picture."""
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
        timing(
            tg.read_config({"PRESET": "baseline", "DEVICE": "cpu", "DATA_PATH": str(options.data)}),
            options.repeats,
        )
        return
    curves = {str(path): compare(Bench.load(path, options.data, 0)) for path in options.weights}
    if options.picture:
        draw(curves, options.picture)


if __name__ == "__main__":
    main()
