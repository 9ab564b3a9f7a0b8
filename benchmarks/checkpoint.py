"""What a checkpoint takes: its bytes, its seconds, and its share of the training time.

    python benchmarks/checkpoint.py --data data/demo --repeats 5

The models of both presets take steps and write checkpoints in turns; the table has the medians.
A step of the baseline's model here is one of 8,192 tokens on a CPU and says nothing about a GPU.
Its checkpoint does, up to the disk and the copy from the GPU: a CPU writes it anyway.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

from bench_tools import open_stream, print_head, print_row, timed

import train_gpt as tg


class Cost(NamedTuple):
    """What checkpoints of one model take."""

    size: int  # bytes
    save: float  # seconds to write one, the median
    step: float  # seconds of a training step, the median


def make_trainer(preset: str, data: Path, out_dir: str) -> tg.Trainer:
    """A trainer of the preset's model, which writes its checkpoints into `out_dir`."""
    env = {"PRESET": preset, "DEVICE": "cpu", "DATA_PATH": str(data), "OUT_DIR": out_dir}
    if preset == "baseline":
        env["TRAIN_BATCH_TOKENS"] = "8192"
    cfg = tg.read_config(env)
    rt = tg.Runtime.create(cfg, {})
    log = tg.RunLog()
    log.run_id = "benchmark"
    return tg.Trainer(tg.build_model(cfg, rt.dtype), open_stream(cfg), rt, log, hashes={})


def measure(preset: str, data: Path, repeats: int) -> Cost:
    """Step and save `repeats` times each, in turns."""
    saves = []
    steps = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(folder, "checkpoints")
        checkpoints.mkdir()
        trainer = make_trainer(preset, data, folder)
        trainer.train_step()  # the first one makes the optimizers' state
        for _ in range(repeats):
            steps.append(timed(trainer.train_step)[0])
            saves.append(timed(trainer.save)[0])
        newest = tg.find_checkpoints(trainer.cfg, trainer.log.run_id)[0]
        size = newest.stat().st_size
    return Cost(size, statistics.median(saves), statistics.median(steps))


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of shards of a vocabulary of 1,024"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print_head(
        "preset",
        "MB",
        "seconds each",
        "steps (eager) that it takes",
        "share of the time, one every 30 s",
    )
    for preset in ("cpu", "baseline"):
        cost = measure(preset, options.data, options.repeats)
        print_row(
            preset,
            f"{cost.size / 1e6:.1f}",
            f"{cost.save:.2f}",
            f"{cost.save / cost.step:.2f}",
            f"{cost.save / (30 + cost.save):.2%}",
        )


if __name__ == "__main__":
    main()
