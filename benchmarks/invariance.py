"""How far the score of one artifact moves with what must not move it.

    A=out/demo/final_model.int8.ptz
    python benchmarks/invariance.py --artifact $A --data data/demo --docs 64

Neither the number of ranks, nor the batch size, nor the order of the documents may move a score.
Each row of the table is one run of train_gpt.py (EVAL_ONLY, EVAL=ttt,stream) on the same documents;
scores come from the `result:` lines, which hold all digits. The exit status is 1 if a spread is
above what the README promises.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from bench_tools import print_head, print_row

SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt.py"
CONDITIONS = ("ttt", "stream")
PROMISED = {"bfloat16": 2e-4, "float32": 1e-6}  # bits per byte between any two runs
# As in the shards of data/make_shards.py.
BOS = 1
HEADER_BYTES = 1024


class Run(NamedTuple):
    """What one run does in its own way."""

    ranks: int
    batch: int  # documents side by side
    shuffled: bool  # whether the documents come in another order


RUNS = {
    "1 rank, batch 64": Run(1, 64, False),
    "2 ranks, batch 64": Run(2, 64, False),
    "1 rank, batch 1": Run(1, 1, False),
    "1 rank, batch 7": Run(1, 7, False),
    "1 rank, batch 64, documents shuffled": Run(1, 64, True),
    "2 ranks, batch 7, documents shuffled": Run(2, 7, True),
}


def write_documents(data: Path, folder: Path, count: int, shuffled: bool):
    """Write a validation shard of the first `count` documents of `data` into a new folder.

    A BOS closes the last document like the others.
    """
    paths = sorted(data.glob("fineweb_val_*.bin"))
    shards = [np.fromfile(path, dtype="<u2", offset=HEADER_BYTES) for path in paths]
    stream = np.concatenate(shards)
    documents = np.split(stream, np.flatnonzero(stream == BOS))[1 : count + 1]
    if shuffled:
        np.random.default_rng(0).shuffle(documents)
    tokens = np.concatenate([*documents, [BOS]]).astype("<u2")
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    folder.mkdir()
    path = folder / "fineweb_val_000000.bin"
    path.write_bytes(header.tobytes() + tokens.tobytes())


def score(settings: Mapping[str, str], ranks: int) -> list[float]:
    """val_bpb under each of CONDITIONS, of one run of the script with these settings."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command.append(str(SCRIPT))
    env = os.environ | settings
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    scores = {}
    for line in done.stdout.splitlines():
        if line.startswith("result: "):
            result = json.loads(line.removeprefix("result: "))
            scores[result["condition"]] = result["val_bpb"]
    return [scores[name] for name in CONDITIONS]


def compare(settings: Mapping[str, str], folder: Path, dtype: str) -> list[float]:
    """Score all RUNS in one dtype and print a row for each.

    Returns, for each of CONDITIONS, the spread of its scores in bits per byte.
    """
    scores = []
    for name, run in RUNS.items():
        changes = {
            "DATA_PATH": str(folder / f"shuffled_{run.shuffled}"),
            "OUT_DIR": str(folder / "out"),
            "RUN_ID": "",
            "DTYPE": dtype,
            "TTT_BATCH_SIZE": str(run.batch),
        }
        scores.append(score({**settings, **changes}, run.ranks))
        cells = []
        for now, first in zip(scores[-1], scores[0], strict=True):
            cells += [f"{now:.8f}", f"{now - first:+.1e}"]
        print_row(name, dtype, *cells)
    return np.ptp(scores, axis=0).tolist()


def main() -> int:
    """Run everything and print the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of validation shards")
    parser.add_argument(
        "--tokenizer", type=Path, help="default: tokenizer.model in the folder of shards"
    )
    parser.add_argument("--docs", type=int, default=64)
    options = parser.parse_args()
    settings = {
        "EVAL_ONLY": "1",
        "EVAL": ",".join(CONDITIONS),
        "MODEL_PATH": str(options.artifact),
        "TOKENIZER_PATH": str(options.tokenizer or options.data / "tokenizer.model"),
    }
    columns = ["run", "dtype"]
    for name in CONDITIONS:
        columns += [f"{name} val_bpb", "difference to the first"]
    status = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shuffled in (False, True):
            write_documents(options.data, folder / f"shuffled_{shuffled}", options.docs, shuffled)
        print_head(*columns)
        for dtype, promised in PROMISED.items():
            cells = []
            for spread in compare(settings, folder, dtype):
                cells += [f"{spread:.1e}", f"promised: {promised:.0e}"]
                if spread > promised:
                    status = 1
            print_row("**spread**", dtype, *cells)
    return status


if __name__ == "__main__":
    sys.exit(main())
