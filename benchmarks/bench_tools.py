"""What the benchmarks share: an artifact with its documents, clocks and counters, Markdown tables.

Importing it makes train_gpt.py and what is in records/ importable.
"""

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
    def load(cls, weights: Path, data: Path, docs: int = 0) -> "Bench":
        """The model in file `weights` and the first `docs` documents in folder `data`, 0: all.

        Under the cpu preset, in the dtype that suits this machine. No parameter learns.
        """
        env = {
            "PRESET": "cpu",
            "DEVICE": "cpu",
            "EVAL_ONLY": "1",
            "MODEL_PATH": str(weights),
            "DATA_PATH": str(data),
            "TOKENIZER_PATH": str(data / "tokenizer.model"),
            "MAX_VAL_DOCS": str(docs),
        }
        cfg = tg.read_config(env)
        rt = tg.Runtime.create(cfg, {})
        inputs = tg.load_inputs(cfg, rt, tg.RunLog())
        return cls(inputs.model.requires_grad_(False), inputs.docs, rt)

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


def print_row(*cells: Any):
    """Print a row of a table in Markdown, at once."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_head(*names: str):
    """Print the names of a table's columns."""
    print_row(*names)
    print("|" + "---|" * len(names))
