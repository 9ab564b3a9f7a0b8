"""What the benchmarks share: a model with its documents, clocks and counters, Markdown tables.

Importing it makes train_gpt.py and what is in records/ importable.
"""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "records"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as tg


@dataclass
class Bench:
    """A model, the documents that it is scored on, and the runtime."""

    model: tg.GPT
    docs: tg.Documents
    rt: tg.Runtime

    @classmethod
    def create(cls, data: Path, **settings: str) -> "Bench":
        """The model and the documents that the script would load from folder `data`.

        No parameter learns.
        """
        env = {"DATA_PATH": str(data), "TOKENIZER_PATH": str(data / "tokenizer.model")}
        cfg = tg.read_config(env | settings)
        rt = tg.Runtime.create(cfg, {})
        inputs = tg.load_inputs(cfg, rt, tg.RunLog())
        return cls(inputs.model.requires_grad_(False), inputs.docs, rt)

    @classmethod
    def load(cls, weights: Path, data: Path, docs: int = 0, **settings: str) -> "Bench":
        """The model in file `weights` and the first `docs` documents in folder `data`, 0: all.

        By default under the cpu preset, in the dtype that suits this machine.
        """
        env = {"EVAL_ONLY": "1", "MODEL_PATH": str(weights), "MAX_VAL_DOCS": str(docs)}
        env |= {"PRESET": "cpu", "DEVICE": "cpu"} | settings
        return cls.create(data, **env)

    def condition(self, name: str) -> tg.Condition:
        """The condition that EVAL calls by this name."""
        return tg.ladder(self.docs, self.model, self.rt)[name]


def open_stream(cfg: tg.Config) -> tg.TokenStream:
    """The training tokens in DATA_PATH."""
    return tg.TokenStream(tg.open_shards(cfg.data_path, "train"), cfg.vocab_size)


def timed(work: Callable) -> tuple[float, Any]:
    """(seconds that work() took, what it returned)."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def time_calls(rt: tg.Runtime, work: Callable, times: int = 1) -> float:
    """Seconds that a call of work() takes, the mean of some, with what it starts on the device."""
    began = rt.seconds()
    for _ in range(times):
        work()
    return (rt.seconds() - began) / times


def reset_peak(rt: tg.Runtime):
    """Count peak memory from now on. That of a process on a CPU is counted from its start."""
    if rt.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory(reset: bool = False) -> float:
    """The highest resident size of this process in MB, since the last reset."""
    if reset:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def matmul_rate(dtype: torch.dtype, size: int = 1024, seconds: float = 0.5) -> float:
    """GFLOP/s of a square matrix product."""
    a = torch.randn(size, size).to(dtype)
    count = 0
    spent = 0.0
    began = time.perf_counter()
    while spent < seconds:
        a = (a @ a).clamp(-1, 1)
        count += 1
        spent = time.perf_counter() - began
    return count * 2 * size**3 / spent / 1e9


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in the block after so many seconds, and again every 10.

    Once may not be enough, since compilers swallow errors.
    """

    def ring(number: int, frame: Any):
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    earlier = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


class Profile(NamedTuple):
    """What the device did during a call."""

    busy: float  # seconds
    launches: int  # of kernels, graphs of kernels and copies; on a CPU, operations
    kernels: list  # the ten that took longest: name, milliseconds, count

    @classmethod
    def measure(cls, rt: tg.Runtime, work: Callable) -> "Profile":
        """Profile one call of work()."""
        on_gpu = rt.device.type == "cuda"
        activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
        with torch.profiler.profile(activities=[activity]) as profile:
            work()
            rt.seconds()  # waits for the device
        launches = 0
        kernels = []
        for event in profile.key_averages():
            # Waits and what spans kernels are listed with the kernels.
            is_span = event.is_user_annotation or event.key.endswith(" Sync")
            if event.device_type == kind and not is_span:
                spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                kernels.append((event.key, spent / 1000, event.count))
            if not on_gpu or re.search("Launch|MemcpyAsync|MemsetAsync", event.key):
                launches += event.count
        kernels.sort(key=lambda kernel: -kernel[1])
        return cls(sum(kernel[1] for kernel in kernels) / 1000, launches, kernels[:10])


class Run(NamedTuple):
    """A process that has ended."""

    status: int
    lines: list  # of its output, each after the seconds since its start

    @property
    def text(self) -> str:
        """Its output."""
        return "".join(line for _, line in self.lines)

    def check(self):
        """Raise `RuntimeError` if it failed."""
        if self.status:
            raise RuntimeError(f"exit status {self.status}: ...{self.text[-2000:]}")


def run_python(arguments: list, folder: str, settings: Mapping) -> Run:
    """Run Python in a folder, with these settings of the script and no others."""
    env = {name: value for name, value in os.environ.items() if name not in tg.SETTINGS}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=env | settings,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines = []
    try:
        for line in process.stdout:
            lines.append((time.perf_counter() - began, line))
        return Run(process.wait(), lines)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the ranks that torchrun started, too


def print_row(*cells: Any):
    """Print a row of a table in Markdown, at once."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_head(*names: str):
    """Print the names of a table's columns."""
    print_row(*names)
    print("|" + "---|" * len(names))
