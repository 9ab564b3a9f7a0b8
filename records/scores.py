"""Read the file that SCORES_PATH named: losses summed by chunk (.csv) or of every token (.npz).

Both become the same rows, which add up to what the program printed.
"""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

COLUMNS = [
    ("condition", "U32"),
    ("doc", "i8"),  # -1: text before the first document
    ("chunk", "i8"),
    ("start", "i8"),  # position in the document
    ("tokens", "i8"),
    ("bytes", "i8"),
    ("loss_nats", "f8"),
]


def read_rows(path: Path, size: int) -> np.ndarray:
    """Return one row for each condition, document and chunk, as COLUMNS says.

    size: tokens of a chunk, for an .npz alone; the chunks of a .csv are as they were written.
    Raises `ValueError`, in one line, for a file that is neither.
    """
    try:
        rows = read_tokens(path, size) if path.suffix == ".npz" else read_chunks(path)
    except (ValueError, KeyError, IndexError, TypeError, zipfile.BadZipFile) as error:
        expected = "a file that SCORES_PATH named, .csv or .npz"
        raise ValueError(f"{path}: found {error}; expected {expected}") from None
    if not len(rows):
        raise ValueError(f"{path}: found no scores; expected those of one condition or more")
    return rows


def read_chunks(path: Path) -> np.ndarray:
    """Return the rows of a .csv."""
    columns = ",".join(name for name, _ in COLUMNS)
    with open(path, encoding="utf-8") as file:
        header = file.readline().strip()
        if header != columns:
            raise ValueError(f"the header {header!r}, not {columns}")
        return np.loadtxt(file, dtype=COLUMNS, delimiter=",", ndmin=1)


def read_tokens(path: Path, size: int) -> np.ndarray:
    """Return the rows of an .npz: its losses, summed over chunks of `size` tokens."""
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("no .npz, which is a zip file of arrays")
        file.seek(0)
        with np.load(file) as arrays:
            return np.concatenate(list(sum_by_chunk(arrays, size)))


def sum_by_chunk(arrays: Mapping[str, np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yield the rows of each condition.

    arrays: starts (docs,), predictions (docs,), bytes (n - 1,), and the losses (n - 1,) of every
    condition in nats, nan where it scores nothing. A chunk that was not scored has no row.
    """
    starts = arrays["starts"]
    sizes = arrays["bytes"]
    # A document runs to the next one; text before the first one counts as document -1.
    begins = np.unique(np.append(0, starts))
    ends = np.append(begins[1:], len(sizes))
    edges = []
    for begin, end in zip(begins, ends, strict=True):
        edges.append(np.arange(begin, end, size))
    edges = np.concatenate(edges)
    start = edges - begins[np.searchsorted(begins, edges, side="right") - 1]
    for condition in arrays:
        if condition in ("starts", "predictions", "bytes"):
            continue
        losses = arrays[condition]
        scored = ~np.isnan(losses)
        rows = np.zeros(len(edges), dtype=COLUMNS)
        rows["condition"] = condition
        rows["doc"] = np.searchsorted(starts, edges, side="right") - 1
        rows["chunk"] = start // size
        rows["start"] = start
        rows["tokens"] = np.add.reduceat(scored, edges, dtype=np.int64)
        rows["bytes"] = np.add.reduceat(sizes * scored, edges, dtype=np.int64)
        rows["loss_nats"] = np.add.reduceat(np.nan_to_num(losses), edges, dtype=np.float64)
        yield rows[rows["tokens"] > 0]
