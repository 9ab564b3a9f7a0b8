"""What an evaluation costs: the recipe done naively, done well, and as a stream.

    A=out/demo/final_model.int8.ptz
    python benchmarks/ttt_eval.py --artifact $A --data data/demo
    python benchmarks/ttt_eval.py --artifact $A --data data/demo --scaling
    python benchmarks/ttt_eval.py --artifact $A --data data/demo --frontier frontier.png

The first prints a table of variants, run in turns in one process on the same artifact and
documents, with the median of their seconds; the second, how the time of a stream grows with the
longest document and with the number of documents; the third, what changed settings of the stream
gain and take.

`naive` is written here, from the description of the recipe: documents in ascending order, 64 at a
time, all of them run until the last has ended, losses of whole windows, Python loops over documents
for the bookkeeping. It uses the model of train_gpt.py as it is.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_tools import Bench, matmul_rate, peak_memory, print_head, print_row, timed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as tg

RUNGS = ("stride", "ttt", "stream")  # of the script's ladder
VARIANTS = ("naive", *RUNGS)
NAIVE_BATCH = 64  # documents, as in the record

# What --scaling varies: predictions in the longest document, numbers of documents.
LONGEST = (1_000, 10_000, 30_000, 100_000)
COUNTS = (50, 100, 200, 400, 800)

# What --frontier changes in the learner of `stream`, besides its rate and its chunk.
CHANGES = {
    "head alone": {"targets": ("lm_head",)},
    "MLP and head": {"targets": ("fc", "mlp.proj", "lm_head")},
    "all projections": {"targets": tg.TARGETS},
    "rank 8": {"rank": 8},
    "spread 1": {"init_scale": 1.0},
    "beta1 0.9": {"beta1": 0.9},
    "beta2 0.999": {"beta2": 0.999},
}


# ==== The recipe, done naively ====================================================================


class Window(NamedTuple):
    """A chunk of one document, with the text before it. Places count from the document's start."""

    row: int  # in the batch
    start: int  # the document's, in the stream
    begin: int  # where the window begins
    place: int  # where the chunk begins
    end: int  # where both end
    is_last: bool

    def find_text(self, tokens: Tensor) -> Tensor:
        """Inputs and last target, (end - begin + 1,) int64."""
        return tokens[self.start + self.begin : self.start + self.end + 1].long()

    def find_losses(self, losses: Tensor) -> Tensor:
        """Those of the chunk, (end - place,), among the losses (B, T) of the batch's windows."""
        return losses[self.row, self.place - self.begin : self.end - self.begin]


def find_windows(
    docs: tg.Documents, batch: Sequence[int], place: int, how: tg.Condition
) -> list[Window]:
    """The windows of the chunk that begins at `place`, of the documents that are so long."""
    windows = []
    for row, document in enumerate(batch):
        predictions = int(docs.predictions[document])
        if place < predictions:
            end = min(place + how.chunk, predictions)
            begin = max(0, end - how.window)
            is_last = end == predictions
            windows.append(Window(row, int(docs.starts[document]), begin, place, end, is_last))
    return windows


def score_naively(bench: Bench, how: tg.Condition, batch: Sequence[int], ledger: Tensor):
    """Score the documents of one batch, chunk after chunk, each under adapters of its own.

    Fills in `ledger` (2, n - 1): the loss of each position, and how often it was scored.
    """
    learner = how.learner
    adapters = tg.DocumentAdapters(bench.model, learner, how.chunk, len(batch), bench.rt)
    flat = torch.nn.Parameter(adapters.state.flat.clone())
    adam = torch.optim.Adam([flat], learner.lr, (learner.beta1, learner.beta2), 1e-10)
    longest = int(bench.docs.predictions[batch].max())
    for place in range(0, longest, how.chunk):
        ids = torch.zeros(len(batch), min(place + how.chunk, how.window), dtype=torch.int64)
        targets = torch.zeros_like(ids)
        windows = find_windows(bench.docs, batch, place, how)
        for window in windows:
            text = window.find_text(bench.docs.tokens)
            ids[window.row, : len(text) - 1] = text[:-1]
            targets[window.row, : len(text) - 1] = text[1:]
        losses = bench.model(ids, targets, adapters=adapters.unflatten(flat))
        lessons = []
        for window in windows:
            own = window.find_losses(losses)
            scored = slice(window.start + window.place, window.start + window.end)
            ledger[0, scored] = own.detach()
            ledger[1, scored] += 1
            if not window.is_last:
                lessons.append(own.mean())
        if lessons:
            adam.zero_grad()
            sum(lessons).backward()
            adam.step()


def evaluate_naively(bench: Bench) -> tg.Score:
    """The score under `ttt`, at the price of the naive way."""
    docs = bench.docs
    how = bench.condition("ttt")
    ledger = torch.zeros(2, len(docs.tokens) - 1)
    order = np.argsort(docs.predictions, kind="stable")
    for batch in np.split(order, range(NAIVE_BATCH, len(order), NAIVE_BATCH)):
        score_naively(bench, how, batch, ledger)
    losses, times = ledger.numpy()
    tg.check_coverage(losses, times, docs, how)
    return tg.tabulate(losses, times, docs, bench.model.cfg.ttt_chunk_size)


# ==== Counting ====================================================================================


def evaluate(bench: Bench, name: str) -> tg.Score:
    """The score under one of VARIANTS."""
    if name == "naive":
        return evaluate_naively(bench)
    return tg.evaluate(bench.model, bench.docs, bench.condition(name), bench.rt)


class OperationCounter(TorchDispatchMode):
    """How many aten operations are dispatched, views included."""

    count = 0

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting_positions(model: tg.GPT) -> Iterator[list[int]]:
    """Collect the number of input positions of every call of the model, or of copies made here."""
    sizes = []

    def count(module: tg.GPT, arguments: tuple):
        ids = arguments[0]
        sizes.append(ids.numel())

    hook = model.register_forward_pre_hook(count)
    try:
        yield sizes
    finally:
        hook.remove()


def needed_positions(how: tg.Condition, predictions: np.ndarray) -> np.ndarray:
    """Inputs that must be run to score documents of so many predictions: those of all windows."""
    if how.stream:
        return predictions
    needed = np.zeros_like(predictions)
    for place in range(0, int(predictions.max()), how.chunk):
        ends = np.minimum(place + how.chunk, predictions)
        needed += np.where(place < predictions, np.minimum(ends, how.window), 0)
    return needed


@dataclass
class Cost:
    """What one variant took."""

    score: tg.Score
    computed: int  # positions, those that only fill up included
    flops: int
    operations: int
    memory: float  # MB
    seconds: list[float] = field(default_factory=list)  # of each timed round


def count_cost(bench: Bench, name: str) -> Cost:
    """Evaluate once, untimed, and count what that takes."""
    peak_memory(reset=True)
    flops = FlopCounterMode(display=False)
    operations = OperationCounter()
    with counting_positions(bench.model) as positions, flops, operations:
        score = evaluate(bench, name)
    total = flops.get_total_flops()
    return Cost(score, sum(positions), total, operations.count, peak_memory())


# ==== The table of variants =======================================================================


def compare(bench: Bench, repeats: int):
    """Print what every variant scores and takes, and how evenly two ranks would share the work."""
    docs = bench.docs
    costs = {name: count_cost(bench, name) for name in VARIANTS}
    rates = []
    for _ in range(repeats):
        for name, cost in costs.items():
            rates.append(matmul_rate(bench.rt.dtype))
            seconds, _ = timed(lambda name=name: evaluate(bench, name))
            cost.seconds.append(seconds)
    rate = statistics.median(rates)
    print(
        f"documents:{len(docs.starts)} predictions:{docs.predictions.sum()}"
        f" longest:{docs.predictions.max()} repeats:{repeats}"
        f" threads:{torch.get_num_threads()} matmul:{rate:.0f} GFLOP/s {bench.rt.dtype}"
    )
    print_head(
        "variant",
        "val_bpb",
        "gain over stride / ttt's",
        "seconds",
        "faster than naive",
        "computed / needed",
        "TFLOP",
        "GFLOP/s useful",
        "of matmul",
        "peak MB",
        "operations a chunk",
    )
    for name in VARIANTS:
        print_cost(bench, name, costs, rate)
    for name in ("ttt", "stream"):
        print_shares(bench.condition(name), docs.predictions, name)


def print_cost(bench: Bench, name: str, costs: dict[str, Cost], rate: float):
    """Print the row of one variant; `rate` is that of matrix products, in GFLOP/s."""
    cost = costs[name]
    how = bench.condition("ttt" if name == "naive" else name)
    predictions = bench.docs.predictions
    chunks = int(np.ceil(predictions / how.chunk).sum())
    seconds = statistics.median(cost.seconds)
    faster = statistics.median(costs["naive"].seconds) / seconds
    stride = costs["stride"].score.bpb
    gain = (stride - cost.score.bpb) / (stride - costs["ttt"].score.bpb)
    spare = cost.computed / int(needed_positions(how, predictions).sum())
    useful = cost.flops / spare / seconds / 1e9
    print_row(
        name,
        f"{cost.score.bpb:.4f}",
        f"{gain:.2f}",
        f"{seconds:.1f}",
        f"{faster:.1f}x",
        f"{spare:.3f}",
        f"{cost.flops / 1e12:.2f}",
        f"{useful:.0f}",
        f"{useful / rate:.0%}",
        f"{cost.memory:.0f}",
        f"{cost.operations / chunks:.0f}",
    )


def print_shares(how: tg.Condition, predictions: np.ndarray, name: str):
    """Print how far from half the positions the longer share of two ranks is."""
    chunks = np.ceil(predictions / how.chunk).astype(np.int64)
    work = needed_positions(how, predictions)
    shares = [work[share].sum() for share in tg.share_documents(chunks, 2)]
    ratio = 2 * max(shares) / sum(shares)
    print(f"two ranks, {name}: the longer share has {ratio:.3f} of half the positions")


# ==== Scaling =====================================================================================


def synthetic(docs: tg.Documents, lengths: Sequence[int]) -> tg.Documents:
    """Documents of the given numbers of predictions, cut from the text of `docs` over and over."""
    predictions = np.array(lengths)
    starts = np.cumsum(predictions) - predictions
    where = np.arange(predictions.sum() + 1) % (len(docs.tokens) - 1)
    sizes = docs.bytes[where[:-1]]
    tokens = docs.tokens[torch.from_numpy(where).to(docs.tokens.device)]
    return replace(docs, tokens=tokens, bytes=sizes, starts=starts, predictions=predictions)


def time_stream(bench: Bench, lengths: Sequence[int]) -> float:
    """Seconds of `stream` on documents of the given numbers of predictions."""
    bench = replace(bench, docs=synthetic(bench.docs, lengths))
    seconds, _ = timed(lambda: evaluate(bench, "stream"))
    return seconds


def scaling(
    bench: Bench, total: int, longest_ones: Sequence[int] = LONGEST, counts: Sequence[int] = COUNTS
):
    """Print how seconds and memory of a stream follow the lengths and the number of documents."""
    print_head("longest", "documents", "predictions", "us per token", "peak MB")
    for longest in longest_ones:
        lengths = [longest] + [1_000] * ((total - longest) // 1_000)
        peak_memory(reset=True)
        pace = time_stream(bench, lengths) / sum(lengths) * 1e6
        print_row(longest, len(lengths), sum(lengths), f"{pace:.1f}", f"{peak_memory():.0f}")
    print()
    print_head("documents", "predictions", "seconds")
    sizes = []
    times = []
    for count in counts:
        lengths = np.resize(np.minimum(bench.docs.predictions, 4_000), count).tolist()
        sizes.append(sum(lengths))
        times.append(time_stream(bench, lengths))
        print_row(count, sizes[-1], f"{times[-1]:.1f}")
    print(f"correlation of predictions and seconds: {np.corrcoef(sizes, times)[0, 1]:.4f}")


# ==== The frontier ================================================================================


class Point(NamedTuple):
    """One setting of the frontier."""

    name: str
    gain: float  # bits per byte less than `stride`
    seconds: float


def settings(bench: Bench) -> dict[str, tg.Condition]:
    """The rungs of the ladder, and the stream with one thing or another changed."""
    best = bench.condition("stream")
    learner = best.learner
    found = {name: bench.condition(name) for name in RUNGS}
    for chunk in (16, 64, 256):
        lr = learner.lr * (chunk / best.chunk) ** 0.5
        found[f"stream, chunk {chunk}"] = replace(
            best, chunk=chunk, learner=replace(learner, lr=lr)
        )
    rates = {"half the rate": {"lr": learner.lr / 2}, "twice the rate": {"lr": learner.lr * 2}}
    for label, change in (CHANGES | rates).items():
        found[f"stream, {label}"] = replace(best, learner=replace(learner, **change))
    return found


def interval(saved: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """A 95 % bootstrap interval of bits saved per byte; both arguments count by document."""
    count = len(saved)
    draws = np.random.default_rng(0).integers(count, size=(10_000, count))
    gains = saved[draws].sum(1) / sizes[draws].sum(1)
    low, high = np.quantile(gains, (0.025, 0.975))
    return low, high


def frontier(bench: Bench, picture: Path):
    """Print what each setting gains over `stride` and the seconds it takes; draw both."""
    print_head(
        "setting", "val_bpb", "gain over stride", "95 % interval", "/ ttt's", "seconds", "/ ttt's"
    )
    points = {}
    stride = None
    for name, how in settings(bench).items():
        seconds, score = timed(lambda how=how: tg.evaluate(bench.model, bench.docs, how, bench.rt))
        documents = score.columns["doc"]
        bits = np.bincount(documents, score.columns["loss_nats"]) / np.log(2)
        sizes = np.bincount(documents, score.columns["bytes"])
        if stride is None:
            stride = bits
        saved = stride - bits
        points[name] = Point(name, saved.sum() / sizes.sum(), seconds)
        low, high = interval(saved, sizes)
        print_point(points[name], points.get("ttt"), score.bpb, f"{low:.4f} to {high:.4f}")
    draw(list(points.values()), picture)


def print_point(point: Point, ttt: Point | None, bpb: float, bounds: str):
    """Print the row of one setting; nothing is compared with `ttt` before that has run."""
    gain = f"{point.gain / ttt.gain:.2f}" if ttt else ""
    longer = f"{point.seconds / ttt.seconds:.2f}" if ttt else ""
    seconds = f"{point.seconds:.1f}"
    print_row(point.name, f"{bpb:.4f}", f"{point.gain:.4f}", bounds, gain, seconds, longer)


def draw(points: Sequence[Point], picture: Path):
    """Draw gain against seconds: rungs named on their left, among the changed settings."""
    import matplotlib.pyplot as plt  # the rest of the file does without

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for place, point in enumerate(points):
        if point.name in RUNGS:
            colour = "#d9622b"
            style = {"xytext": (-6, 3), "ha": "right"}
        else:
            colour = "#9aa3ad"
            style = {"xytext": (6, 4 - 9 * (place % 2)), "ha": "left"}
        spot = (point.seconds, point.gain)
        axes.plot(*spot, "o", color=colour)
        label = point.name.removeprefix("stream, ")
        axes.annotate(label, spot, textcoords="offset points", size=8, **style)
    axes.set(xlabel="seconds", ylabel="bits per byte gained over stride", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=150)


def main():
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of validation shards and tokenizer.model"
    )
    parser.add_argument(
        "--docs", type=int, default=0, help="only the first so many documents (default: all)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="time against lengths and numbers of documents instead",
    )
    parser.add_argument(
        "--frontier", type=Path, help="picture of gain against seconds, with its table, instead"
    )
    parser.add_argument(
        "--total",
        type=int,
        default=1_200_000,
        help="predictions in the runs of --scaling by length",
    )
    options = parser.parse_args()
    bench = Bench.load(options.artifact, options.data, options.docs)
    if options.frontier:
        frontier(bench, options.frontier)
    elif options.scaling:
        scaling(bench, options.total)
    else:
        compare(bench, options.repeats)


if __name__ == "__main__":
    main()
