"""Compare two evaluations document by document: is one better, by how much, and on which documents.

    python records/compare.py out/a/scores.csv out/b/scores.csv     the last condition of each
    python records/compare.py out/a/x.npz:ttt out/a/x.npz:stream    two conditions of one file

B - A is the difference in bits per byte, below 0 where B is better: all bits of the one less all
bits of the other, divided by all bytes. So long documents weigh more, as they do in the score.

The interval and the two-sided p are those of a t-test on jackknife values of that ratio: one value
a document, which says how the ratio would move without it (Miller, "The jackknife - a review",
Biometrika 1974). A paired bootstrap and the delta method were tried and are surer of themselves
than they may be where a few long documents hold much of the text. In simulated comparisons in
which the difference depends on the length, intervals that say 95 % held the truth in 85 % (10
documents), 89 % (64) and 93 % (300); those of the delta method in 80, 87 and 93, of the bootstrap
in 74, 85 and 92 %. So distrust a narrow miss on few documents. Random numbers are not needed.

Documents are paired, so what makes one hard for both drops out. The test is about these two
artifacts and text like this; whether a setting is better needs several seeds as well (stats.py).
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from run_log import run_command
from scipy.stats import ttest_1samp
from scores import read_rows

WHOLE_DOCUMENTS = 2**40  # tokens: more than any document has, so that each is one chunk
# Documents by the number of their predictions under A, from the first to before the last.
LENGTHS = {
    "all": (0, math.inf),
    "under 512 tokens": (0, 512),
    "512 to 2,048": (512, 2049),
    "over 2,048": (2049, math.inf),
}
HEAD = ("documents", "number", "bytes", "A bpb", "B bpb", "B - A", "95 % interval", "p")
FORM = "{:<18}{:>8}{:>12}{:>9}{:>9}{:>10}{:>20}{:>10}"


class Evaluation(NamedTuple):
    """What one condition scored, by document."""

    name: str  # file and condition
    documents: np.ndarray  # (n,) their places in the validation set, rising
    tokens: np.ndarray  # (n,)
    bytes: np.ndarray  # (n,)
    nats: np.ndarray  # (n,)


class Difference(NamedTuple):
    """B - A in bits per byte, with what a t-test says about it."""

    value: float
    low: float  # of the 95 % interval
    high: float
    p_value: float  # two-sided


def read_evaluation(text: str) -> Evaluation:
    """Return the evaluation that FILE or FILE:CONDITION names; without a condition, the last one.

    Raises `ValueError` for a condition that the file does not hold.
    """
    path, colon, condition = text.rpartition(":")
    if not colon or Path(text).exists():
        path = text
        condition = ""
    rows = read_rows(Path(path), WHOLE_DOCUMENTS)
    condition = condition or str(rows["condition"][-1])
    held = np.unique(rows["condition"]).tolist()
    if condition not in held:
        raise ValueError(f"{path}: found conditions {held}; expected {condition}, as in {text}")
    # Text before the first document, which `flat` scores, is in no document.
    rows = rows[(rows["condition"] == condition) & (rows["doc"] >= 0)]
    documents, places = np.unique(rows["doc"], return_inverse=True)
    sums = [np.bincount(places, rows[name]) for name in ("tokens", "bytes", "loss_nats")]
    return Evaluation(f"{path} {condition}", documents, *sums)


def pair(a: Evaluation, b: Evaluation) -> tuple[Evaluation, Evaluation]:
    """Return both, with the documents alone that both have scored in full.

    A document is known by its place and its bytes, so that tokenizers may differ. The last one may
    be cut, since `flat` drops an incomplete row. Raises `ValueError` if another one differs: then
    the evaluations are of different texts.
    """
    documents, of_a, of_b = np.intersect1d(a.documents, b.documents, return_indices=True)
    a = Evaluation(a.name, documents, *(values[of_a] for values in a[2:]))
    b = Evaluation(b.name, documents, *(values[of_b] for values in b[2:]))
    same = a.bytes == b.bytes
    if len(documents):
        same[-1] &= a.tokens[-1] == b.tokens[-1]
    different = np.flatnonzero(~same[:-1])
    if len(different):
        first = different[0]
        found = f"document {documents[first]} of {b.bytes[first]:.0f} bytes"
        expected = f"{a.bytes[first]:.0f}, as in {a.name}: evaluations of the same documents"
        raise ValueError(f"{b.name}: found {found}; expected {expected}")
    if not same.any():
        raise ValueError(f"{b.name}: found no document that {a.name} scored; expected some")
    return select(a, same), select(b, same)


def select(evaluation: Evaluation, chosen: np.ndarray) -> Evaluation:
    """Return the evaluation of the chosen documents, (n,) bool."""
    return Evaluation(evaluation.name, *(values[chosen] for values in evaluation[1:]))


def compare(a: Evaluation, b: Evaluation) -> Difference:
    """Return the difference of two evaluations of the same documents, at least two."""
    bits = (b.nats - a.nats) / math.log(2)
    count = len(bits)
    ratio = bits.sum() / a.bytes.sum()
    without = (bits.sum() - bits) / (a.bytes.sum() - a.bytes)
    values = ratio + (count - 1) * (without.mean() - without)
    if np.ptp(values) == 0:  # no spread to test with, as of an evaluation and itself
        return Difference(ratio, ratio, ratio, float(ratio == 0))
    test = ttest_1samp(values, 0)
    interval = test.confidence_interval(0.95)
    return Difference(ratio, interval.low, interval.high, test.pvalue)


def table_rows(a: Evaluation, b: Evaluation) -> Iterator[list[str]]:
    """Yield the cells below HEAD, a row for each of LENGTHS that has documents."""
    for name, (least, beyond) in LENGTHS.items():
        chosen = (a.tokens >= least) & (a.tokens < beyond)
        count = chosen.sum()
        if not count:
            continue
        mine = select(a, chosen)
        theirs = select(b, chosen)
        size = mine.bytes.sum()
        scores = [each.nats.sum() / math.log(2) / size for each in (mine, theirs)]
        row = [name, f"{count:,}", f"{size:,.0f}", *(f"{score:.4f}" for score in scores)]
        row.append(f"{scores[1] - scores[0]:+.4f}")
        if count > 1:
            found = compare(mine, theirs)
            row += [f"{found.low:+.4f} to {found.high:+.4f}", f"{found.p_value:.2g}"]
        else:
            row += ["", ""]  # one document has no spread
        yield row


def report(first: str, second: str) -> None:
    """Print the comparison."""
    whole_a = read_evaluation(first)
    whole_b = read_evaluation(second)
    a, b = pair(whole_a, whole_b)
    print(f"A: {a.name}")
    print(f"B: {b.name}")
    for row in (HEAD, *table_rows(a, b)):
        print(FORM.format(*row).rstrip())
    left_out = len(np.union1d(whole_a.documents, whole_b.documents)) - len(a.documents)
    if left_out:
        print(f"documents left out, since only one of them scored them in full: {left_out}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description="Compare two evaluations, paired by document.")
    for name in ("A", "B"):
        parser.add_argument(name, help="file that SCORES_PATH named, and maybe :CONDITION")
    options = parser.parse_args(arguments)
    return run_command(lambda: report(options.A, options.B))


if __name__ == "__main__":
    sys.exit(main())
