"""How far the score of one artifact moves with what must not move it: ranks, batch size, order of documents.

    python benchmarks/invariance.py --artifact out/demo/final_model.int8.ptz --data data/demo --docs 64

Each row is one run of train_gpt.py (EVAL_ONLY, EVAL=ttt,stream) on the same documents. Scores are added up from the
scores file, so that they have more digits than the log. Exit status 1 if a spread is above what the README promises.
"""

import argparse
import csv
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt.py"
CONDITIONS = ("ttt", "stream")
PROMISED = {"bfloat16": 2e-4, "float32": 1e-6}  # bits per byte between any two runs
BOS, HEADER_BYTES = 1, 1024  # as in the shards of data/make_shards.py

# name: (ranks, documents side by side, whether the documents are shuffled)
RUNS = {
    "1 rank, batch 64": (1, 64, False),
    "2 ranks, batch 64": (2, 64, False),
    "1 rank, batch 1": (1, 1, False),
    "1 rank, batch 7": (1, 7, False),
    "1 rank, batch 64, documents shuffled": (1, 64, True),
    "2 ranks, batch 7, documents shuffled": (2, 7, True),
}


def write_documents(data: Path, folder: Path, count: int, shuffled: bool) -> None:
    """A validation shard of the first `count` documents of `data`, and a BOS that closes the last like the others."""
    shards = [
        np.fromfile(path, dtype="<u2", offset=HEADER_BYTES)
        for path in sorted(data.glob("fineweb_val_*.bin"))
    ]
    stream = np.concatenate(shards)
    documents = np.split(stream, np.flatnonzero(stream == BOS))[1 : count + 1]
    if shuffled:
        np.random.default_rng(0).shuffle(documents := list(documents))
    tokens = np.concatenate([*documents, [BOS]]).astype("<u2")
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    folder.mkdir()
    (folder / "fineweb_val_000000.bin").write_bytes(header.tobytes() + tokens.tobytes())


def score(
    artifact: Path, tokenizer: Path, data: Path, out: Path, ranks: int, batch: int, dtype: str
) -> list[float]:
    """val_bpb of one run under each of CONDITIONS, from its scores file."""
    env = os.environ | {
        "EVAL_ONLY": "1",
        "EVAL": ",".join(CONDITIONS),
        "MODEL_PATH": str(artifact),
        "DATA_PATH": str(data),
        "TOKENIZER_PATH": str(tokenizer),
        "OUT_DIR": str(out),
        "SCORES_PATH": "scores.csv",
        "DTYPE": dtype,
        "TTT_BATCH_SIZE": str(batch),
    }
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else []
    )
    subprocess.run(
        [sys.executable, *launcher, SCRIPT], env=env, check=True, stdout=subprocess.DEVNULL
    )
    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    parts = ([row for row in rows if row["condition"] == name] for name in CONDITIONS)
    return [
        math.fsum(float(row["loss_nats"]) for row in part)
        / math.log(2)
        / sum(int(row["bytes"]) for row in part)
        for part in parts
    ]


def main() -> int:
    """Run everything, print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Measure how far the score moves with what must not move it."
    )
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of validation shards")
    parser.add_argument(
        "--tokenizer", type=Path, help="default: tokenizer.model in the folder of shards"
    )
    parser.add_argument("--docs", type=int, default=64)
    options = parser.parse_args()
    tokenizer = options.tokenizer or options.data / "tokenizer.model"
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        for shuffled in (False, True):
            write_documents(
                options.data, Path(folder, f"shuffled_{shuffled}"), options.docs, shuffled
            )
        print(
            "| run | dtype |"
            + "".join(f" {name} val_bpb | difference to the first |" for name in CONDITIONS)
        )
        print("|---|---|" + "---|---|" * len(CONDITIONS))
        for dtype, promised in PROMISED.items():
            scores = []
            for name, (ranks, batch, shuffled) in RUNS.items():
                data, out = Path(folder, f"shuffled_{shuffled}"), Path(folder, "out")
                scores.append(score(options.artifact, tokenizer, data, out, ranks, batch, dtype))
                moved = (
                    f" {now:.8f} | {now - first:+.1e} |"
                    for now, first in zip(scores[-1], scores[0], strict=True)
                )
                print(f"| {name} | {dtype} |" + "".join(moved), flush=True)
            spreads = [max(column) - min(column) for column in zip(*scores, strict=True)]
            status |= max(spreads) > promised
            judged = (f" {spread:.1e} | promised: {promised:.0e} |" for spread in spreads)
            print(f"| **spread** | {dtype} |" + "".join(judged), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
