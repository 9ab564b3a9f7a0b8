"""What changed settings of `stream` and of the mixtures gain over the defaults.

    A=out/demo/final_model.int8.ptz
    python benchmarks/mixtures.py --artifact $A --data data/demo
    python benchmarks/mixtures.py --artifact $A --data data/demo --only "chunk 16" "chunk 64"

Every variant is calibrated as the script calibrates: its rate, then the weights of its mixtures, on
the last training documents. Then it scores the validation documents. So the rates suit the
variants, except where a share of the default's rate is given. Use an artifact on whose documents
nothing was tuned.

The differences are those of `mix`, paired by document, below 0 where the variant is better, with
the intervals of records/compare.py; of `stride` and `stride+copy` those of their own score. A
variant that only weighs differently shares the default's `stream`, and so takes no seconds.
"""

import argparse
import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from bench_tools import Bench, open_stream, print_head, print_row, timed
from compare import LENGTHS, Evaluation, table_rows
from torch import Tensor

import train_gpt as tg

PLACES = (256, 1024)  # tokens after which a document's weights change, if they depend on the place


class Variant(NamedTuple):
    """What is changed."""

    settings: dict  # of `Config`
    share: float | None = None  # of the default's rate, instead of calibration
    weight_decay: float | None = None
    by_place: bool = False  # the weights also depend on the place in the document


DEFAULT = Variant({})
VARIANTS = {
    "chunk 16": Variant({"ttt_stream_chunk": 16}),
    "chunk 64": Variant({"ttt_stream_chunk": 64}),
    "rank 8": Variant({"ttt_stream_rank": 8}),
    "rank 8, low rate": Variant({"ttt_stream_rank": 8}, share=0.25),
    "rank 96": Variant({"ttt_stream_rank": 96}),
    "rank 96, low rate": Variant({"ttt_stream_rank": 96}, share=0.25),
    "weight decay 0.1": Variant({}, weight_decay=0.1),
    "weight decay 0.5": Variant({}, weight_decay=0.5),
    "weight decay 1": Variant({}, weight_decay=1.0),
    "weights by place": Variant({}, by_place=True),
    "rate 0": Variant({}, share=0.0),
}


class Result(NamedTuple):
    """What was measured of one variant."""

    rate: float
    scores: dict[str, tg.Score]  # by rung
    seconds: float  # of `stream`


# ==== What a variant changes in the script ========================================================


@dataclass(frozen=True)
class DecayingLearner(tg.Learner):
    """A learner that also pulls its adapters towards 0."""

    weight_decay: float = 0.0


class DecayingAdapters(tg.DocumentAdapters):
    """Adapters with decoupled weight decay, as in AdamW (Loshchilov and Hutter 2019)."""

    @torch.no_grad()
    def step(self, rows: Tensor | slice, grad: Tensor):
        """One Adam step for `rows`, then the decay; grad (B, P)."""
        super().step(rows, grad)
        learner = self.learner
        tokens = self.state.steps[rows] * self.chunk
        rate = learner.lr * (1 + tokens / 1000) ** -learner.decay
        self.state.flat[rows] *= 1 - rate * learner.weight_decay


def copy_by_place(docs: tg.Documents, vocab_size: int, rt: tg.Runtime) -> Tensor:
    """Like `copy_losses`, but the matches of each later class of places are another 7 higher.

    So whoever looks up weights by match finds those of match and place.
    """
    with mock.patch.object(tg, "ORDERS", ORDERS):
        losses, match = copy_losses(docs, vocab_size, rt)
    positions = np.arange(len(match))
    documents = np.searchsorted(docs.starts, positions, side="right") - 1
    places = positions - docs.starts[documents]
    classes = np.searchsorted(PLACES, places, side="right")
    return torch.stack((losses, match + ORDERS * rt.upload(classes)))


# The script's own, which `substitutes` hides while a variant is measured.
ORDERS = tg.ORDERS
copy_losses = tg.copy_losses


def substitutes(variant: Variant, default_rate: float) -> dict[str, Any]:
    """What stands under names of the script while a variant is measured."""
    found = {"find_rate": tg.find_rate}  # `mock.patch.multiple` wants at least one name
    if variant.weight_decay is not None:
        found["Learner"] = functools.partial(DecayingLearner, weight_decay=variant.weight_decay)
        found["DocumentAdapters"] = DecayingAdapters
    if variant.share is not None:
        found["find_rate"] = lambda loss_at: variant.share * default_rate
    if variant.by_place:
        found["ORDERS"] = ORDERS * (len(PLACES) + 1)
        found["copy_losses"] = copy_by_place
    return found


# ==== The table ===================================================================================


def measure(
    bench: Bench, variant: Variant, default_rate: float, known: dict, rungs: Iterable[str]
) -> Result:
    """Calibrate a variant, then score the documents under these rungs.

    `known` keeps what was scored, for variants that need the same.
    """
    model = bench.model
    docs = bench.docs
    cfg = replace(model.cfg, **variant.settings)
    bos = int(docs.tokens[docs.starts[0]])
    silent = tg.RunLog(rank=1)  # its lines would part the table
    with (
        mock.patch.object(model, "cfg", cfg),
        mock.patch.multiple(tg, **substitutes(variant, default_rate)),
    ):
        tg.calibrate(model, open_stream(cfg), bos, bench.rt, silent)
        ladder = tg.ladder(docs, model, bench.rt)
        stream = ladder["stream"]
        seconds, _ = timed(lambda: tg.score_tokens(model, docs, stream, bench.rt, known))
        scores = {}
        for name in rungs:
            scores[name] = tg.evaluate(model, docs, ladder[name], bench.rt, known)
    return Result(stream.learner.lr, scores, seconds)


def sum_by_document(score: tg.Score) -> Evaluation:
    """The score as records/compare.py takes it."""
    documents = score.columns["doc"]
    names = ("tokens", "bytes", "loss_nats")
    sums = [np.bincount(documents, score.columns[name]) for name in names]
    return Evaluation("", np.arange(len(sums[0])), *sums)


def print_differences(cells: Iterable[str], score: tg.Score, default: tg.Score, seconds: str):
    """Print a row: these cells, the score, what it adds to the default's, the seconds."""
    rows = table_rows(sum_by_document(default), sum_by_document(score))
    found = dict.fromkeys(LENGTHS, "")  # no documents of this length
    for name, _, _, _, _, difference, interval, _ in rows:
        found[name] = f"{difference} ({interval})"
    print_row(*cells, f"{score.bpb:.4f}", *found.values(), seconds)


def print_result(name: str, result: Result, default: tg.Score):
    """Print the row of a variant."""
    cells = (name, f"{result.rate:.6f}", f"{result.scores['stream'].bpb:.4f}")
    print_differences(cells, result.scores["mix"], default, f"{result.seconds:.1f}")


def compare_variants(bench: Bench, names: Iterable[str]) -> dict[str, tg.Score]:
    """Print the table of the default and of these variants; return the scores by variant.

    Those of `stream` are called by the variant and "stream".
    """
    print_head("variant", "rate", "stream bpb", "mix bpb", *LENGTHS, "seconds")
    known = {}
    default = measure(bench, DEFAULT, 0.0, known, ("stride", "stride+copy", "stream", "mix"))
    reference = default.scores["mix"]
    for name in ("stride", "stride+copy"):
        print_differences((name, "", ""), default.scores[name], reference, "")
    print_result("default", default, reference)
    scores = {"default": reference, "default stream": default.scores["stream"]}
    for name in names:
        result = measure(bench, VARIANTS[name], default.rate, known, ("stream", "mix"))
        print_result(name, result, reference)
        scores[name] = result.scores["mix"]
        scores[f"{name} stream"] = result.scores["stream"]
    return scores


def main():
    """Print the table; write the losses of every token if that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of shards and tokenizer")
    parser.add_argument(
        "--docs", type=int, default=0, help="only the first so many documents (default: all)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, default=VARIANTS, help="these variants"
    )
    parser.add_argument(
        "--out", type=Path, help=".npz for the losses, for records/compare.py FILE:VARIANT"
    )
    options = parser.parse_args()
    bench = Bench.load(options.artifact, options.data, options.docs)
    scores = compare_variants(bench, options.only)
    if options.out:
        tg.write_scores(options.out, scores, bench.docs, tg.RunLog())


if __name__ == "__main__":
    main()
