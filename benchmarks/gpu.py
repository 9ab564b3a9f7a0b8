"""What the program costs on one GPU: everything in one run of at most six minutes.

    python3 benchmarks/gpu.py --out gpu.json
    python3 benchmarks/gpu.py --quick                     what matters most, in 90 seconds
    python3 benchmarks/gpu.py --only train evaluation     some of the sections
    python3 benchmarks/gpu.py --record PATH               the published script, too: 2 minutes more
    python3 benchmarks/gpu.py --tiny                      tiny shapes on any device, for the tests

It needs a copy of this checkout and a Python with torch (2.11 or newer), numpy, sentencepiece and
tqdm, but no network: the text is that of tests/conformance, over and over, unless --data names
another folder of shards. The documents that are scored have lengths like those of FineWeb.

Sections, in this order:

rates        of the machine
conformance  what tests/conformance scores, beside what the published code printed; how far losses
             move when they are computed twice, with and without deterministic algorithms
train        the baseline's training step
evaluation   `ttt` and `stream`, by the documents at a time: as the script does them (`eager`), and
             in each variant of gpu_variants.py
program      all of it once through torchrun
record       the published script on the same tokens, and its artifact in ours

Each part of them is guarded: an error is printed, the others go on, and the exit status is 1. Parts
for which no time is left are skipped. The file always holds what was found so far.

`idle` is the share of the time in which the GPU computes nothing. `a turn` is the mean of full
turns: of the first documents, cut to some chunks, less the same cut to one. `host ahead` counts the
steps that the GPU still has to do when the host has started the last one. `off` is a score less that
of the first variant. `program` finds kernels that `train` compiled, in PyTorch's cache on disk.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch._dynamo
import torch._functorch.config
from bench_tools import (
    Bench,
    Profile,
    Run,
    print_head,
    print_row,
    reset_peak,
    run_python,
    time_calls,
    time_limit,
)
from gpu_variants import varied
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_step import make_trainer, model_flops
from ttt_eval import synthetic

import train_gpt as tg

SCRIPT = Path(tg.__file__).resolve()
CONFORMANCE = SCRIPT.parent / "tests" / "conformance"
ARTIFACT = CONFORMANCE / "final_model.int8.ptz"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", SCRIPT]
KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}

# ==== Scales ======================================================================================


class Group(NamedTuple):
    """Evaluations by one variant, which is warmed up once."""

    variant: str
    conditions: tuple = ("stream", "ttt")
    batches: tuple = (256,)
    chunk: int = 0  # of `stream`; 0: the script's


@dataclass(frozen=True)
class Scale:
    """How much is measured. The defaults are those of the full run."""

    seconds: float = 330.0  # after which parts are skipped
    settings: dict = field(default_factory=dict)  # of the model, beside the baseline's
    matmul: int = 8192  # rows of the matrices
    copied: int = 2**30  # numbers
    steps: int = 20
    kernels: tuple = ("flash", "cudnn")  # of attention in training
    lessons: int = 30  # steps behind the weights that are evaluated
    documents: int = 1024
    median: int = 600  # of their tokens
    few: int = 8  # so many documents at a time, or fewer, are all long
    backend: str = "inductor"
    conformance: dict = field(default_factory=dict)  # settings of that run
    program: dict = field(default_factory=dict)
    plan: tuple = (
        Group("eager", batches=(256, 8)),
        Group("blocks", batches=(256, 1024, 64, 8)),
        Group("eager", batches=(1024, 64)),
        Group("all", ("stream",), (256, 64)),
        Group("graphs", ("stream",), (8,)),
        Group("eager", ("stream",), chunk=64),
        Group("all", ("stream",), chunk=64),
        Group("sdpa", ("stream",)),
        Group("adam", ("stream",)),
    )


PROGRAM = {
    "MAX_WALLCLOCK_SECONDS": "8",
    "CALIBRATION_SECONDS": "3",
    "WARMUP_STEPS": "3",
    "VAL_LOSS_EVERY": "0",
    "MAX_VAL_DOCS": "20",
}
TINY = {
    "DTYPE": "float32",
    "COMPILE": "0",
    "NUM_LAYERS": "2",
    "MODEL_DIM": "32",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "TRAIN_BATCH_TOKENS": "512",
    "TRAIN_SEQ_LEN": "64",
    "GRAD_ACCUM_STEPS": "2",
    "TTT_CHUNK_SIZE": "32",
    "TTT_STREAM_CHUNK": "16",
    "TTT_EVAL_SEQ_LEN": "64",
    "MAX_WALLCLOCK_SECONDS": "0",
    "MAX_VAL_DOCS": "1",
}
SCALES = {
    "full": Scale(program=PROGRAM),
    "quick": Scale(
        seconds=90.0,
        kernels=("flash",),
        documents=512,
        conformance={"EVAL": "stride,ttt,stream"},
        program=PROGRAM | {"COMPILE": "0"},
        plan=(Group("eager"), Group("blocks"), Group("all", ("stream",))),
    ),
    "tiny": Scale(
        seconds=3600.0,
        settings=TINY,
        matmul=64,
        copied=1024,
        steps=2,
        lessons=2,
        documents=6,
        median=60,
        few=1,
        backend="eager",
        conformance={"EVAL": "flat,doc", "MAX_VAL_DOCS": "1"},
        program=TINY | {"ITERATIONS": "2", "WARMUP_STEPS": "0", "CALIBRATION_SECONDS": "1e-3"},
        plan=(
            Group("eager", batches=(4,)),
            Group("all", ("stream",), (4,)),
            Group("blocks", ("ttt",), (4,)),
            Group("graphs", ("stream",), (4,)),
        ),
    ),
}


# ==== Report ======================================================================================


class Skip(Exception):
    """Why a part is not measured."""


def describe(numbers: dict) -> str:
    """Names and numbers in a line, without lists."""
    words = []
    for name, value in numbers.items():
        if isinstance(value, (int, float)):
            value = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"
        if isinstance(value, str):
            words.append(f"{name} {value}")
    return ", ".join(words)


def free_memory():
    """Return memory that an earlier part used to the GPU."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@dataclass
class Report:
    """What was found: each part is printed at once, and all of it is kept in a file."""

    out: Path
    seconds: float
    sections: dict = field(default_factory=dict)  # numbers by name, of each part of each section
    section: str = ""
    began: float = field(default_factory=time.perf_counter)
    until: float = 0.0  # the clock after which parts are skipped

    def run(self, section: str, share: float, work: Callable):
        """Run a section. It must end in this share of the seconds."""
        began = time.perf_counter()
        self.section = section
        self.until = self.began + share * self.seconds
        self.attempt("section", work)
        self.add("section", {"seconds": time.perf_counter() - began})

    def attempt(self, part: str, work: Callable):
        """Add the numbers that work() returns, by name, or why there are none."""
        left = self.until - time.perf_counter()
        try:
            if left < 0:
                raise Skip("no time left")
            free_memory()  # here, since after some errors this fails, too
            with time_limit(left + 20):
                numbers = work()
        except Skip as reason:
            numbers = {"skipped": str(reason)}
        except Exception as error:
            traceback.print_exc()
            numbers = {"failed": f"{error!r:.200}"}
        self.add(part, numbers or {})

    def add(self, part: str, numbers: dict):
        """Print numbers of a part, and write the file."""
        parts = self.sections.setdefault(self.section, {})
        parts.setdefault(part, {}).update(numbers)
        if numbers:
            print_row(self.section, part, describe(numbers))
        for name, spent, count in numbers.get("kernels", ()):
            print(f"    {spent:9.2f} ms {count:6d}x {name[:90]}")
        content = {"status": self.status(), "sections": self.sections}
        tg.write_atomically(self.out, json.dumps(content, indent=1).encode())

    def status(self) -> dict:
        """Of each section: failed if a part of it did, else skipped or done."""
        found = {}
        for section, parts in self.sections.items():
            found[section] = "skipped" if "skipped" in parts.get("section", {}) else "done"
            if any("failed" in numbers for numbers in parts.values()):
                found[section] = "failed"
        return found

    def print_table(self):
        """All that was found, once more."""
        print()
        print_head("section", "part", "found")
        for section, status in self.status().items():
            print_row(section, "", status)
            for part, numbers in self.sections[section].items():
                print_row(section, part, describe(numbers))


@dataclass
class Lab:
    """What all sections share."""

    scale: Scale
    report: Report
    device: torch.device
    data: Path
    record: Path | None
    references: dict = field(default_factory=dict)  # bpb by what is scored

    def load(self) -> Bench:
        """The baseline's shape, untrained, and the text."""
        env = {"PRESET": "baseline", "DEVICE": self.device.type}
        return Bench.create(self.data, **env | self.scale.settings)

    def require_cuda(self):
        """Skip this part on a CPU."""
        if self.device.type == "cpu":
            raise Skip("needs CUDA")

    def run(self, arguments: list, folder: str, **settings: str) -> Run:
        """Run Python in a folder, with settings of the script beside where it finds what."""
        env = {"DATA_PATH": str(self.data), "TOKENIZER_PATH": str(self.data / "tokenizer.model")}
        env |= {"PRESET": "baseline", "DEVICE": self.device.type, "OUT_DIR": folder}
        return run_python(arguments, folder, env | settings)


# ==== Rates =======================================================================================


def measure_matmul(lab: Lab) -> dict:
    """The rate of a product of square bf16 matrices."""
    rt = tg.Runtime(lab.device, torch.bfloat16)
    size = lab.scale.matmul
    a = torch.randn(size, size, device=rt.device, dtype=rt.dtype)
    time_calls(rt, lambda: a @ a, 3)
    return {"TFLOP/s": 2e-12 * size**3 / time_calls(rt, lambda: a @ a, 20)}


def measure_copy(lab: Lab) -> dict:
    """The rate of a copy within the memory, what is read and what is written."""
    rt = tg.Runtime(lab.device, torch.float32)
    source = torch.rand(lab.scale.copied, device=rt.device)
    target = source.clone()
    return {"TB/s": 2e-12 * source.nbytes / time_calls(rt, lambda: target.copy_(source), 10)}


def measure_launch(lab: Lab) -> dict:
    """The time of the smallest operation, one after the other."""
    rt = tg.Runtime(lab.device, torch.float32)
    x = torch.zeros(16, device=rt.device)
    time_calls(rt, lambda: x.add_(1), 10)
    return {"microseconds": 1e6 * time_calls(rt, lambda: x.add_(1), 2000)}


def measure_rates(lab: Lab):
    """The section on the machine."""
    hardware = tg.describe_hardware(lab.device.type)
    lab.report.add("machine", {"is": hardware, "torch": torch.__version__})
    lab.report.attempt("bf16 matmul", partial(measure_matmul, lab))
    lab.report.attempt("copy", partial(measure_copy, lab))
    lab.report.attempt("launch", partial(measure_launch, lab))


# ==== Conformance =================================================================================


def add_results(lab: Lab, done: Run, published: dict) -> dict:
    """Add a part for each condition that the script scored. Returns how many there were."""
    found = [json.loads(text) for text in re.findall(r"(?m)^result: (.*)", done.text)]
    for result in found:
        name = result["condition"]
        numbers = {"bpb": result["val_bpb"], "seconds": result["seconds"]}
        if name in published:
            loss, bpb = np.mean(published[name], axis=0)
            numbers |= {"nats off": result["val_loss"] - loss, "bpb off": result["val_bpb"] - bpb}
        lab.report.add(name, numbers)
    done.check()
    audits = re.findall(r"(?m)^audit .* PASS", done.text)
    return {"conditions": len(found), "audits passed": len(audits)}


def score_artifact(lab: Lab) -> dict:
    """Score the published artifact with the script, under all conditions but mixtures.

    These need shards to calibrate on.
    """
    scores = json.loads((CONFORMANCE / "expected.json").read_text())["evaluation"]["scores"]
    scores["flat"] = scores.pop("flat_seq_len_512")
    settings = {"EVAL_ONLY": "1", "MODEL_PATH": str(ARTIFACT), "TRAIN_SEQ_LEN": "512"}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("fineweb_val_000000.bin", "tokenizer.model"):
            shutil.copy(CONFORMANCE / name, folder)
        settings |= {"DATA_PATH": folder, "TOKENIZER_PATH": f"{folder}/tokenizer.model"}
        done = lab.run([SCRIPT], folder, **settings | lab.scale.conformance)
    return add_results(lab, done, scores)


def score_twice(bench: Bench, name: str, deterministic: bool) -> dict:
    """How far the losses of two evaluations of the same text are from each other."""
    work = partial(tg.score_documents, bench.model, bench.docs, bench.condition(name), bench.rt)
    with tg.deterministic() if deterministic else contextlib.nullcontext():
        first = work()[0]
        began = bench.rt.seconds()
        second, times = work()
        seconds = bench.rt.seconds() - began
    moved = (first - second).abs()[times > 0]
    return {"most nats": moved.max().item(), "mean": moved.mean().item(), "seconds": seconds}


def check_conformance(lab: Lab):
    """The section on scores and their noise."""
    lab.report.attempt("artifact", partial(score_artifact, lab))
    few = int(lab.scale.settings.get("MAX_VAL_DOCS", 8))
    bench = Bench.load(ARTIFACT, CONFORMANCE, few, PRESET="baseline", DEVICE=lab.device.type)
    for deterministic in (False, True):
        for name in ("ttt", "stream", "stride"):
            how = "deterministic" if deterministic else "as it is"
            work = partial(score_twice, bench, name, deterministic)
            lab.report.attempt(f"{name} twice, {how}", work)


# ==== Train =======================================================================================


def time_training(lab: Lab, bench: Bench, kernel: str) -> dict:
    """The training step with one of KERNELS in its attention."""
    if kernel == "cudnn":
        lab.require_cuda()
    rt = bench.rt
    cfg = bench.model.cfg
    steps = lab.scale.steps
    torch._dynamo.reset()
    # What is cached for one kernel would be taken for the other, too.
    uncached = torch._functorch.config.patch(enable_autograd_cache=False)
    with uncached, sdpa_kernel([KERNELS[kernel]]):
        trainer = make_trainer(cfg, rt)
        compiling = time_calls(rt, trainer.compile_forward)
        reset_peak(rt)
        time_calls(rt, trainer.train_step, 3)
        trainer.mark = began = rt.seconds()
        for _ in range(steps):
            loss = trainer.train_step()
            trainer.check_finite(behind=2)
            trainer.tick(time.perf_counter())
        started = time.perf_counter()
        ended = rt.seconds()
        step = (ended - began) / steps
        numbers = {
            "ms a step": 1000 * step,
            "tokens/s": cfg.train_batch_tokens / step,
            "peak MB": rt.peak_memory() / 1e6,
            "host ahead, steps": (ended - started) / step,
            "TFLOP/s": model_flops(cfg) / step / 1e12,
            "compiling, s": compiling,
            "compiled": int(trainer.forward is not trainer.model),
            "loss": loss.item(),
        }
        numbers["of matmul"] = numbers["TFLOP/s"] / measure_matmul(lab)["TFLOP/s"]
        lab.report.add(kernel, numbers)
        profile = Profile.measure(rt, trainer.train_step)
    idle = 1 - profile.busy / step
    return {"launches": profile.launches, "idle": idle, "kernels": profile.kernels}


def measure_training(lab: Lab):
    """The section on the baseline's training step."""
    bench = lab.load()
    for kernel in lab.scale.kernels:
        lab.report.attempt(kernel, partial(time_training, lab, bench, kernel))


# ==== Evaluation ==================================================================================


def train_briefly(lab: Lab) -> Bench:
    """The baseline after a few small steps, so that every weight matters, and documents for it."""
    bench = lab.load()
    cfg = bench.model.cfg
    tokens = min(cfg.train_batch_tokens, 16 * cfg.train_seq_len)
    trainer = make_trainer(replace(cfg, train_batch_tokens=tokens, grad_accum_steps=1), bench.rt)
    for _ in range(lab.scale.lessons):
        trainer.train_step()
    # The mean is twice the median. None is so long that it would set the time alone.
    median = lab.scale.median
    spread = (2 * np.log(2)) ** 0.5
    lengths = np.random.default_rng(0).lognormal(np.log(median), spread, lab.scale.documents)
    docs = synthetic(bench.docs, lengths.clip(2, 14 * median).astype(int))
    return Bench(trainer.model, docs, bench.rt)


def warm_up(bench: Bench, how: tg.Condition, chunks: list):
    """Compile what documents of so many chunks need, on random ids."""
    docs = synthetic(bench.docs, [how.chunk * count for count in chunks])
    noise = torch.randint_like(docs.tokens, bench.model.cfg.vocab_size)
    tg.score_documents(bench.model, replace(docs, tokens=noise), how, bench.rt)


def profile_turns(bench: Bench, how: tg.Condition) -> dict:
    """What a turn takes, see the top of this file."""
    turns = min(16, how.window // how.chunk)
    docs = bench.docs
    found = []
    for chunks in (1, 1 + turns):
        predictions = np.minimum(docs.predictions[: how.batch], chunks * how.chunk)
        few = replace(docs, starts=docs.starts[: how.batch], predictions=predictions)
        work = partial(tg.score_documents, bench.model, few, how, bench.rt)
        found.append((time_calls(bench.rt, work), Profile.measure(bench.rt, work)))
    (start, first), (whole, last) = found
    return {
        "ms a turn": 1000 * (whole - start) / turns,
        "launches a turn": (last.launches - first.launches) / turns,
        "idle": 1 - (last.busy - first.busy) / (whole - start),
        "kernels": last.kernels,
    }


def score_case(lab: Lab, bench: Bench, how: tg.Condition, part: str) -> dict:
    """Evaluate once, timed; then profile."""
    rt = bench.rt
    docs = bench.docs
    chunks = -(-docs.predictions // how.chunk)
    plan = tg.plan_slots(np.arange(len(chunks)), chunks, min(how.batch, len(chunks)))
    graphs = counters["stats"]["unique_graphs"]
    reset_peak(rt)
    began = rt.seconds()
    score = tg.evaluate(bench.model, docs, how, rt)
    seconds = rt.seconds() - began
    reference = lab.references.setdefault((how.stream, how.chunk, len(docs.tokens)), score.bpb)
    numbers = {
        "seconds": seconds,
        "tokens/s": score.tokens / seconds,
        "turns": len(list(plan)),
        "peak MB": rt.peak_memory() / 1e6,
        "bpb": score.bpb,
        "off": score.bpb - reference,
        "new graphs": counters["stats"]["unique_graphs"] - graphs,
    }
    lab.report.add(part, numbers)
    return profile_turns(bench, how)


def run_group(lab: Lab, bench: Bench, group: Group, label: str):
    """The evaluations of one variant."""
    if group.variant == "graphs":
        lab.require_cuda()
    few = lab.scale.few
    # Many documents, then one; or always the same number.
    lessons = [6] * group.batches[0] if group.batches[0] <= few else [2, 2, 2, 4]
    hows = {name: bench.condition(name) for name in group.conditions}
    if group.chunk:
        hows["stream"] = replace(hows["stream"], chunk=group.chunk)
    with varied(group.variant, lab.device.type, lab.scale.backend):
        began = bench.rt.seconds()
        for how in hows.values():
            warm_up(bench, replace(how, batch=len(lessons)), lessons)
        lab.report.add(label, {"warm-up, s": bench.rt.seconds() - began})
        for batch, (name, how) in itertools.product(group.batches, hows.items()):
            docs = bench.docs
            if batch <= few:
                docs = synthetic(docs, [2 * how.window] * batch)
            part = f"{label}, {name}, {batch} at a time"
            case = (replace(bench, docs=docs), replace(how, batch=batch))
            lab.report.attempt(part, partial(score_case, lab, *case, part))


def measure_evaluation(lab: Lab):
    """The section on evaluation."""
    bench = train_briefly(lab)
    for group in lab.scale.plan:
        label = f"{group.variant}, chunk {group.chunk}" if group.chunk else group.variant
        lab.report.attempt(label, partial(run_group, lab, bench, group, label))


# ==== Program and record ==========================================================================

# Each phase ends where the script prints a line with these words.
PHASES = {
    "start": "model_params:",
    "compiling": "compile:done",
    "training": "train_tokens:",
    "calibration": "calibration:",
    "export": "Total submission size int8",
    "scoring": "total_eval_time:",
}

# Lines that the published script and ours have in common.
SCORES = {
    "flat": "final_int8_zlib_roundtrip",
    "ttt": "final_int8_ttt_lora",
    "stream": "final_int8_ttt_stream",
}


def run_program(lab: Lab) -> dict:
    """The section on the whole program."""
    settings = lab.scale.program | {"RUN_ID": "gpu", "SCORES_PATH": "scores.csv"}
    with tempfile.TemporaryDirectory() as folder:
        done = lab.run(TORCHRUN, folder, **settings)
    phases = {}
    before = 0.0
    for phase, words in PHASES.items():
        times = [seconds for seconds, line in done.lines if words in line]
        if times:
            phases[phase] = times[0] - before
            before = times[0]
    lab.report.add("seconds", phases)
    wrote = int("\nscores:" in done.text)
    return add_results(lab, done, {}) | {"exit status": done.status, "scores written": wrote}


def run_and_read(lab: Lab, name: str, arguments: list, folder: str, **settings: str):
    """Run the published script or ours, and add a part with what it prints of pace and scores."""
    steps = {"ITERATIONS": "22", "WARMUP_STEPS": "3", "MAX_WALLCLOCK_SECONDS": "0"}
    quiet = {"VAL_LOSS_EVERY": "0", "TRAIN_LOG_EVERY": "2", "RUN_ID": name}
    done = lab.run(arguments, folder, **lab.scale.settings | steps | quiet | settings)
    forms = {"ms a step": r"step_avg:([\d.]+)ms", "peak MiB": r"peak memory allocated: (\d+)"}
    for condition, words in SCORES.items():
        forms[f"{condition} bpb"] = rf"{words} val_loss:\S+ val_bpb:([\d.]+)"
        forms[f"{condition} ms"] = rf"{words} val_loss.* eval_time:(\d+)ms"
    found = {key: re.findall(form, done.text) for key, form in forms.items()}
    lab.report.add(name, {key: float(values[-1]) for key, values in found.items() if values})
    done.check()


def run_record(lab: Lab):
    """The section on the published script: it trains, and both score its artifact."""
    if not lab.record:
        raise Skip("no --record")
    with tempfile.TemporaryDirectory() as folder:
        copied = shutil.copy(lab.record, Path(folder, "train_gpt.py"))
        theirs = partial(run_and_read, lab, "published", [*TORCHRUN[:-1], copied], folder)
        lab.report.attempt("published", theirs)
        shutil.copy(Path(folder, "final_model.int8.ptz"), Path(folder, "theirs.ptz"))
        ours = {"EVAL_ONLY": "1", "MODEL_PATH": "theirs.ptz", "EVAL": "flat,ttt,stream"}
        for chunk in ("64", "32"):
            name = f"ours-chunk{chunk}"
            settings = ours | {"TTT_STREAM_CHUNK": chunk}
            work = partial(run_and_read, lab, name, [SCRIPT], folder, **settings)
            lab.report.attempt(name, work)


# ==== Main ========================================================================================

# Each section, and the share of the seconds after which it starts no part.
SECTIONS = {
    "rates": (measure_rates, 0.1),
    "conformance": (check_conformance, 0.25),
    "train": (measure_training, 0.5),
    "evaluation": (measure_evaluation, 0.85),
    "program": (run_program, 1.0),
    "record": (run_record, 1.35),
}


def main() -> int:
    """Run the sections. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    scales = parser.add_mutually_exclusive_group()
    for name in ("quick", "tiny"):
        scales.add_argument(f"--{name}", dest="scale", action="store_const", const=name)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS])
    parser.add_argument("--out", type=Path, default="gpu.json", help="JSON file of what was found")
    parser.add_argument("--data", type=Path, default=CONFORMANCE, help="folder of shards")
    parser.add_argument("--record", type=Path, help="the published script")
    options = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    if not has_gpu and options.scale != "tiny":
        print("error: torch finds no GPU, which this measures; --tiny needs none", file=sys.stderr)
        return 1
    # For deterministic products; it counts only before CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    scale = SCALES[options.scale or "full"]
    report = Report(options.out.resolve(), scale.seconds)
    device = torch.device("cuda" if has_gpu else "cpu")
    record = options.record and options.record.resolve()
    lab = Lab(scale, report, device, options.data.resolve(), record)
    for section in options.only:
        work, share = SECTIONS[section]
        report.run(section, share, partial(work, lab))
    report.print_table()
    return int("failed" in report.status().values())


if __name__ == "__main__":
    gc.freeze()  # what is imported lives to the end: the collector can skip it
    sys.exit(main())
