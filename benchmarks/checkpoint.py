"""What a checkpoint takes: its bytes, its seconds, and its share of the training time.

    python benchmarks/checkpoint.py --data data/demo --repeats 5

For the models of both presets: steps and checkpoints in turns, the median of each. A step of the baseline's model here
is one of 8,192 tokens on a CPU and says nothing about a GPU; the checkpoint, which a CPU writes anyway, does, up to
the disk and the copy from the GPU.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as tg


def measure(preset: str, data: Path, repeats: int) -> tuple[int, float, float]:
    """(bytes of a checkpoint, seconds of writing one, seconds of a step), the medians of `repeats`."""
    env = {"PRESET": preset, "DEVICE": "cpu", "DATA_PATH": str(data)}
    cfg = tg.read_config(env | ({"TRAIN_BATCH_TOKENS": "8192"} if preset == "baseline" else {}))
    with tempfile.TemporaryDirectory() as folder:
        cfg, rt = (
            replace(cfg, out_dir=folder),
            tg.Runtime(torch.device("cpu"), tg.choose_dtype(cfg)[0]),
        )
        Path(folder, "checkpoints").mkdir()
        stream = tg.TokenStream(tg.open_shards(str(data), "fineweb_train_*.bin"))
        torch.manual_seed(cfg.seed)
        trainer, times = (
            tg.Trainer(tg.GPT(cfg, rt.dtype), stream, cfg, rt, {}),
            {"save": [], "step": []},
        )
        trainer.train_step()
        for _ in range(repeats):
            for name, work in (("step", trainer.train_step), ("save", trainer.save)):
                began = time.perf_counter()
                work()
                times[name].append(time.perf_counter() - began)
        size = tg.find_checkpoints(cfg)[0].stat().st_size
        return size, statistics.median(times["save"]), statistics.median(times["step"])


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of shards of a vocabulary of 1,024"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(
        "| preset | MB | seconds each | steps (eager) that it takes | share of the time, one every 30 s |"
    )
    print("|---|---|---|---|---|")
    for preset in ("cpu", "baseline"):
        size, save, step = measure(preset, options.data, options.repeats)
        print(
            f"| {preset} | {size / 1e6:.1f} | {save:.2f} | {save / step:.2f} | {save / (30 + save):.2%} |"
        )


if __name__ == "__main__":
    main()
