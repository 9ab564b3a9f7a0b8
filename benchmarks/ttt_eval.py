"""What an evaluation costs: the recipe done naively, done well, and as a stream, on the same artifact and documents.

    python benchmarks/ttt_eval.py --artifact out/demo/final_model.int8.ptz --data data/demo
    python benchmarks/ttt_eval.py --artifact out/demo/final_model.int8.ptz --data data/demo --scaling
    python benchmarks/ttt_eval.py --artifact out/demo/final_model.int8.ptz --data data/demo --frontier frontier.png

The first prints a table of the variants, run in turns in one process, with the median of their seconds; the second how
the time of a stream grows with the number of documents and with the longest of them; the third what changed settings of
the stream gain and take. `naive` is written here, from the description of the recipe: documents in ascending order, 64
at a time, all of them run until the last has ended, losses of whole windows, Python loops over documents for the
bookkeeping. It uses the model of train_gpt.py as it is.
"""

import argparse
import ctypes
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg

VARIANTS = ("naive", "stride", "ttt", "stream_fast", "stream")
NAIVE_BATCH = 64  # documents, as in the record


@dataclass
class Bench:
    """One artifact, its documents, and what they are run with."""

    model: tg.GPT
    docs: tg.Documents
    cfg: tg.Config
    rt: tg.Runtime

    @classmethod
    def load(cls, artifact: Path, data: Path, docs: int) -> "Bench":
        """The artifact and the first `docs` documents (0: all) under the cpu preset, on this machine's best dtype."""
        env = {
            "PRESET": "cpu",
            "DEVICE": "cpu",
            "EVAL_ONLY": "1",
            "MODEL_PATH": str(artifact),
            "DATA_PATH": str(data),
            "TOKENIZER_PATH": str(data / "tokenizer.model"),
            "MAX_VAL_DOCS": str(docs),
        }
        cfg = tg.read_config(env)
        with tempfile.TemporaryDirectory() as folder:  # for a log that nobody reads
            rt = replace(tg.Runtime.create(replace(cfg, out_dir=folder), {}), log_path=None)
        cfg, weights, _, documents, _ = tg.load_inputs(cfg, rt)
        model = tg.GPT(cfg, rt.dtype)
        tg.copy_tensors(model.state_dict(), weights, artifact)
        return cls(model, documents, cfg, rt)

    def condition(self, name: str) -> tg.Condition:
        return tg.ladder(self.docs, self.cfg, self.rt)["ttt" if name == "naive" else name]

    def evaluate(self, name: str) -> tg.Score:
        """The score under one variant; `computed` counts its positions."""
        if name != "naive":
            return tg.evaluate(self.model, self.docs, self.condition(name), self.cfg, self.rt)
        ledger, computed = naive_ledger(
            self.model, self.docs, self.condition(name), self.cfg, self.rt
        )
        score = tg.Score.tally(ledger, self.docs, self.condition(name), self.cfg.ttt_chunk_size)
        return replace(score, computed=computed)


def naive_ledger(
    model: tg.GPT, docs: tg.Documents, how: tg.Condition, cfg: tg.Config, rt: tg.Runtime
) -> tuple[torch.Tensor, int]:
    """The recipe's scores, as `tg.fill_ledger` returns them."""
    ledger, computed = torch.zeros(2, len(docs.tokens) - 1), 0
    model.requires_grad_(False)
    order = np.argsort(docs.predictions, kind="stable")
    for batch in np.split(order, range(NAIVE_BATCH, len(order), NAIVE_BATCH)):
        start = tg.DocumentAdapters(model, how, len(batch), cfg.seed, rt)
        flat = torch.nn.Parameter(start.flat.clone())
        adam = torch.optim.Adam([flat], how.lr, how.betas, 1e-10)
        predictions, chunks = docs.predictions[batch], -(-docs.predictions[batch] // how.chunk)
        for c in range(chunks.max()):
            ids = torch.zeros(len(batch), min((c + 1) * how.chunk, how.window), dtype=torch.int64)
            targets, spans = torch.zeros_like(ids), []
            for row, (document, n) in enumerate(zip(batch, predictions, strict=True)):
                end = min((c + 1) * how.chunk, n)
                begin = max(0, end - how.window)
                spans.append((c * how.chunk - begin, end - begin))
                if c < chunks[row]:
                    text = docs.tokens[
                        docs.starts[document] + begin : docs.starts[document] + end + 1
                    ].long()
                    ids[row, : end - begin], targets[row, : end - begin] = text[:-1], text[1:]
            losses = model(ids, targets, adapters=start.pairs(flat))
            computed += ids.numel()
            lesson = torch.zeros(())
            for row, (document, (begin, end)) in enumerate(zip(batch, spans, strict=True)):
                if c < chunks[row]:
                    own = losses[row, begin:end]
                    place = docs.starts[document] + c * how.chunk
                    ledger[0, place : place + end - begin] = own.detach()
                    ledger[1, place : place + end - begin] += 1
                if c < chunks[row] - 1:
                    lesson = lesson + own.mean()
            if lesson.requires_grad:
                adam.zero_grad()
                lesson.backward()
                adam.step()
    model.requires_grad_(True)
    return ledger, computed


class OperationCounter(TorchDispatchMode):
    """How many aten operations are dispatched, views included."""

    count = 0

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.count += 1
        return func(*args, **(kwargs or {}))


def peak_memory(reset: bool = False) -> float:
    """Highest resident size of this process since the last reset, in MB."""
    if reset:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def matmul_rate(dtype: torch.dtype, size: int = 1024, seconds: float = 0.5) -> float:
    """GFLOP/s of a square matrix product."""
    a, count, began = torch.randn(size, size).to(dtype), 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        a = (a @ a).clamp(-1, 1)
        count += 1
    return count * 2 * size**3 / spent / 1e9


@dataclass
class Cost:
    """What one variant took."""

    score: tg.Score | None = None
    flops: int = 0
    operations: int = 0
    memory: float = 0.0
    seconds: list[float] = field(default_factory=list)


def compare(bench: Bench, repeats: int) -> None:
    """The table of variants. The first, untimed round counts operations and memory."""
    costs, rates = {name: Cost() for name in VARIANTS}, []
    for name, cost in costs.items():
        peak_memory(reset=True)
        with FlopCounterMode(display=False) as flops, OperationCounter() as operations:
            cost.score = bench.evaluate(name)
        cost.flops, cost.operations, cost.memory = (
            flops.get_total_flops(),
            operations.count,
            peak_memory(),
        )
    for _ in range(repeats):
        for name, cost in costs.items():
            rates.append(matmul_rate(bench.rt.dtype))
            began = time.perf_counter()
            bench.evaluate(name)
            cost.seconds.append(time.perf_counter() - began)
    rate, seconds = (
        statistics.median(rates),
        {name: statistics.median(cost.seconds) for name, cost in costs.items()},
    )
    stride, gain = costs["stride"].score.bpb, costs["stride"].score.bpb - costs["ttt"].score.bpb
    print(
        f"documents:{len(bench.docs.starts)} predictions:{bench.docs.predictions.sum()} "
        f"longest:{bench.docs.predictions.max()} repeats:{repeats} threads:{torch.get_num_threads()} "
        f"matmul:{rate:.0f} GFLOP/s {bench.rt.dtype}"
    )
    print(
        "| variant | val_bpb | gain over stride / ttt's | seconds | faster than naive | computed / needed "
        "| TFLOP | GFLOP/s useful | of matmul | peak MB | operations a chunk |"
    )
    print("|" + "---|" * 11)
    for name, cost in costs.items():
        how = bench.condition(name)
        needed = int(how.work(bench.docs.predictions).sum())
        chunks = int((-(-bench.docs.predictions // how.chunk)).sum())
        useful = cost.flops * needed / cost.score.computed / seconds[name] / 1e9
        bpb, faster, spare = (
            cost.score.bpb,
            seconds["naive"] / seconds[name],
            cost.score.computed / needed,
        )
        print(
            f"| {name} | {bpb:.4f} | {(stride - bpb) / gain:.2f} | {seconds[name]:.1f} | {faster:.1f}x | {spare:.3f} "
            f"| {cost.flops / 1e12:.2f} | {useful:.0f} | {useful / rate:.0%} | {cost.memory:.0f} "
            f"| {cost.operations / chunks:.0f} |"
        )
    for name in ("ttt", "stream"):
        work = bench.condition(name).work(bench.docs.predictions)
        shares = [work[share].sum() for share in tg.share_documents(work, 2)]
        print(
            f"two ranks, {name}: the longer share has {2 * max(shares) / sum(shares):.3f} of half the positions"
        )


def synthetic(docs: tg.Documents, lengths: list[int]) -> tg.Documents:
    """Documents of the given numbers of predictions, cut from the text of `docs`, over and over."""
    predictions = np.array(lengths)
    starts = np.cumsum(predictions) - predictions
    where = np.arange(predictions.sum() + 1) % (len(docs.tokens) - 1)
    sizes = docs.bytes[where[:-1]]
    return replace(
        docs, tokens=docs.tokens[where], bytes=sizes, starts=starts, predictions=predictions
    )


LONGEST, COUNTS = (1_000, 10_000, 30_000, 100_000), (50, 100, 200, 400, 800)


def scaling(
    bench: Bench, total: int, longest_ones: tuple = LONGEST, counts: tuple = COUNTS
) -> None:
    """How seconds and memory of a stream follow the longest document and the number of documents."""
    print("| longest | documents | predictions | us per token | peak MB |\n|" + "---|" * 5)
    for longest in longest_ones:
        docs = synthetic(bench.docs, [longest] + [1_000] * ((total - longest) // 1_000))
        peak_memory(reset=True)
        began = time.perf_counter()
        replace(bench, docs=docs).evaluate("stream_fast")
        spent = time.perf_counter() - began
        count, tokens = len(docs.starts), docs.predictions.sum()
        print(
            f"| {longest} | {count} | {tokens} | {spent / tokens * 1e6:.1f} | {peak_memory():.0f} |",
            flush=True,
        )
    rows = []
    print("\n| documents | predictions | seconds |\n|---|---|---|")
    for count in counts:
        lengths = np.resize(np.minimum(bench.docs.predictions, 4_000), count).tolist()
        began = time.perf_counter()
        replace(bench, docs=synthetic(bench.docs, lengths)).evaluate("stream_fast")
        rows.append((sum(lengths), time.perf_counter() - began))
        print(f"| {count} | {rows[-1][0]} | {rows[-1][1]:.1f} |", flush=True)
    print(f"correlation of predictions and seconds: {np.corrcoef(np.array(rows).T)[0, 1]:.4f}")


def settings(bench: Bench) -> dict[str, tg.Condition]:
    """What the frontier is drawn from: the rungs of the ladder, and the stream with one thing or another changed."""
    best = bench.condition("stream")
    chunks = {
        c: replace(best, chunk=c, lr=best.lr * (c / best.chunk) ** 0.5) for c in (16, 32, 256)
    }
    lessons = {
        "head alone": {"targets": ("lm_head",)},
        "MLP and head": {"targets": ("fc", "mlp.proj", "lm_head")},
        "all projections": {"targets": tg.TARGETS},
        "rank 8": {"rank": 8},
        "spread 1": {"spread": 1.0},
        "half the rate": {"lr": best.lr / 2},
        "twice the rate": {"lr": best.lr * 2},
        "beta1 0.9": {"betas": (0.9, 0.99)},
        "beta2 0.999": {"betas": (0.0, 0.999)},
    }
    changed = {f"stream, {label}": replace(best, **change) for label, change in lessons.items()}
    rungs = {name: bench.condition(name) for name in ("stride", "ttt", "stream_fast", "stream")}
    return rungs | {f"stream, chunk {c}": how for c, how in chunks.items()} | changed


def frontier(bench: Bench, picture: Path) -> None:
    """Gain over `stride` against seconds for many settings: a table, with intervals by document, and a picture."""
    rows, stride = [], None
    print(
        "| setting | val_bpb | gain over stride | 95 % interval | / ttt's | seconds | / ttt's |\n|"
        + "---|" * 7
    )
    for name, how in settings(bench).items():
        began = time.perf_counter()
        score = tg.evaluate(bench.model, bench.docs, how, bench.cfg, bench.rt)
        spent = time.perf_counter() - began
        nats = np.bincount(score.columns["doc"], score.columns["loss_nats"]) / np.log(2)
        sizes = np.bincount(score.columns["doc"], score.columns["bytes"])
        stride = nats if stride is None else stride
        draws = np.random.default_rng(0).integers(
            len(nats), size=(10_000, len(nats))
        )  # documents, with replacement
        low, high = np.quantile((stride - nats)[draws].sum(1) / sizes[draws].sum(1), (0.025, 0.975))
        rows.append((name, (stride - nats).sum() / sizes.sum(), spent))
        gain, seconds = (rows[1][1], rows[1][2]) if len(rows) > 1 else (np.nan, np.nan)
        print(
            f"| {name} | {score.bpb:.4f} | {rows[-1][1]:.4f} | {low:.4f} to {high:.4f} | {rows[-1][1] / gain:.2f} "
            f"| {spent:.1f} | {spent / seconds:.2f} |",
            flush=True,
        )
    draw(rows, picture)


def draw(rows: list[tuple[str, float, float]], picture: Path) -> None:
    """Points of (name, gain, seconds): the rungs of the ladder, named on their left, among the changed settings."""
    import matplotlib.pyplot as plt  # the rest of the file does without

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for place, (name, gain, seconds) in enumerate(rows):
        rung = name in VARIANTS
        axes.plot(seconds, gain, "o", color="#d9622b" if rung else "#9aa3ad")
        offset, side = ((-6, 3), "right") if rung else ((6, 4 - 9 * (place % 2)), "left")
        label = name.removeprefix("stream, ")
        axes.annotate(label, (seconds, gain), offset, textcoords="offset points", size=8, ha=side)
    axes.set(xlabel="seconds", ylabel="bits per byte gained over stride", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what an evaluation costs.")
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
