"""Mean, spread and significance of the scores of several seeds.

    python records/stats.py 1.1927 1.1935 1.1921 1.1929 --threshold 1.195

The p-value is that of a one-sided one-sample t-test: how often seeds would score this far below the
threshold by luck if their true mean were the threshold. Lower scores are better.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from run_log import run_command
from scipy.stats import ttest_1samp


@dataclass(frozen=True)
class Summary:
    """What several scores say together, in bits per byte."""

    n: int
    mean: float
    std: float  # of the population: the spread of these very seeds
    threshold: float
    p_value: float  # of a mean below the threshold

    def __str__(self) -> str:
        spread = f"mean:{self.mean:.4f} std:{self.std:.4f}"
        return f"n:{self.n} {spread} threshold:{self.threshold} p_value:{self.p_value:g}"


def summarize(values: Sequence[float], threshold: float) -> Summary:
    """Return the summary of at least two scores. `ValueError` for fewer, or if one is not finite.

    Equal scores have no spread to test with: they prove a mean below the threshold (p = 0) or do
    not (p = 1).
    """
    if len(values) < 2:
        expected = "at least 2, as one score has no spread; run more seeds"
        raise ValueError(f"found {len(values)} value; expected {expected}")
    for value in (*values, threshold):
        if not math.isfinite(value):
            raise ValueError(f"found {value}; expected finite numbers")
    if min(values) == max(values):
        return Summary(len(values), values[0], 0.0, threshold, float(values[0] >= threshold))
    p_value = float(ttest_1samp(values, threshold, alternative="less").pvalue)
    return Summary(
        len(values), statistics.fmean(values), statistics.pstdev(values), threshold, p_value
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        description="Mean, spread and p-value of the scores of several seeds."
    )
    parser.add_argument("values", type=float, nargs="+", help="bits per byte, one for each seed")
    parser.add_argument("--threshold", type=float, required=True, help="the score to beat")
    options = parser.parse_args(arguments)
    return run_command(lambda: print(summarize(options.values, options.threshold)))


if __name__ == "__main__":
    sys.exit(main())
