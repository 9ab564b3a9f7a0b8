#!/usr/bin/env python3
"""Train a small GPT under a hard budget, save it in 16,000,000 bytes, and score it by test-time training.

    python train_gpt.py                                       one process, on whatever device there is
    torchrun --standalone --nproc_per_node=8 train_gpt.py     the full run on eight GPUs; 2 for two CPU cores (gloo)
    EVAL_ONLY=1 MODEL_PATH=final_model.int8.ptz python train_gpt.py       score an artifact, train nothing

Every setting is an environment variable: the fields of `Config`, in capitals. The number to read is `val_bpb`, bits per
UTF-8 byte of the validation text; lower is better. The `ladder` lines at the end score the artifact as read back from
disk under the conditions that EVAL names; under `ttt` every document teaches its own throw-away adapters. The `audit`
lines are checks that stop the run when they fail.

Contents, in reading order; each band leans only on those above it:

    config        what can be set, and the reader that refuses what it cannot use
    runtime       the one place that knows devices, ranks, clocks and log files
    byte metric   the UTF-8 bytes that a token stands for
    data          shards, the training stream, the validation documents
    model         the GPT; its forward returns one loss per token
    optimizers    Muon for matrices, Adam for the rest, and the schedule
    artifact      int8 + zlib, written and read
    adapters      per-document low-rank adapters and their batched Adam
    evaluation    the ladder of conditions: score first, learn after, forget at the end
    audits        bytes against the decoded text, scores against altered futures
    training      warm-up, steps, wallclock
    main          the order of events

Shapes: B rows (sequences or documents), T tokens of input, S scored positions, D model dim, H heads, N head dim,
R adapter rank, V vocabulary, P adapter numbers of one document. Losses are in nats.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import io
import math
import os
import platform
import re
import shlex
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from tqdm import tqdm

# ==== Config: what can be set =========================================================================================


class UserError(ValueError):
    """Something a user can put right: shown as one line, without a traceback, with exit status 1."""


class AgreedError(UserError):
    """A `UserError` that every rank raises alike, so that rank 0 alone shows it."""


def _opt(default: Any, unit: str, least: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A field of `Config`: its default, what it counts, and the smallest value or the words that it accepts."""
    return field(default=default, metadata={"unit": unit, "least": least, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every setting of a run, with the published record's defaults; its variable is its name in capitals."""

    # What to run, and where
    preset: str = _opt("auto", "baseline with CUDA, cpu elsewhere", choices=("auto", "baseline", "cpu"))
    device: str = _opt("auto", "cuda where there is one", choices=("auto", "cpu", "cuda"))
    dtype: str = _opt("auto", "compute dtype; bfloat16 where it is fast", choices=("auto", "bfloat16", "float32"))
    compile: str = _opt("auto", "torch.compile for training; auto: where it pays", choices=("auto", "0", "1"))
    eval_only: bool = _opt(False, "1: score MODEL_PATH, train nothing")
    model_path: str = _opt("", "start from the weights and the shape of this .pt or .ptz file")
    data_path: str = _opt("./data/datasets/fineweb10B_sp1024", "folder of shards")
    tokenizer_path: str = _opt("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model")
    out_dir: str = _opt(".", "folder for everything the run writes")
    run_id: str = _opt("", "name of the log file; a uuid4 if empty")
    seed: int = _opt(1337, "seed of weights and adapters", 0)
    eval: tuple[str, ...] = _opt(("flat", "ttt"), "conditions, in order", choices=("flat", "doc", "stride", "ttt"))
    scores_path: str = _opt("", "in OUT_DIR: a .csv with the scores of every chunk; none if empty")
    # How long
    iterations: int = _opt(20000, "steps at most", 0)
    max_wallclock_seconds: float = _opt(600.0, "seconds of training; 0: no cap", 0)
    warmup_steps: int = _opt(20, "steps that prime the machine and are undone", 0)
    warmdown_iters: int = _opt(1200, "steps over which the rates fall to 0", 0)
    train_batch_tokens: int = _opt(524288, "tokens per step, all ranks and micro-steps", 1)
    train_seq_len: int = _opt(1024, "tokens per row in training and flat evaluation", 1)
    grad_accum_steps: int = _opt(0, "micro-steps per step; 0: 8 (cpu: 2) / world size where whole, else 1", 0)
    val_batch_size: int = _opt(524288, "tokens per flat-evaluation step, all ranks and micro-steps", 1)
    val_loss_every: int = _opt(1000, "steps between validations; 0: only the last", 0)
    train_log_every: int = _opt(200, "steps between loss lines; 0: none", 0)
    max_val_docs: int = _opt(0, "evaluate only the first N documents; 0: all", 0)
    # Model
    vocab_size: int = _opt(1024, "pieces", 4)
    num_layers: int = _opt(9, "blocks", 1)
    model_dim: int = _opt(512, "width", 2)
    num_heads: int = _opt(8, "query heads", 1)
    num_kv_heads: int = _opt(4, "key/value heads", 1)
    mlp_mult: int = _opt(2, "MLP width / model width", 1)
    tie_embeddings: bool = _opt(True, "1: the head is the embedding")
    rope_base: float = _opt(10000.0, "rotary base", 1)
    logit_softcap: float = _opt(30.0, "logits stay within plus and minus this", 1e-3)
    qk_gain_init: float = _opt(1.5, "initial query gain per head")
    tied_embed_init_std: float = _opt(0.005, "initial spread of a tied embedding", 0)
    # Optimizers
    embed_lr: float = _opt(0.6, "Adam, untied embedding", 0)
    head_lr: float = _opt(0.008, "Adam, untied head", 0)
    tied_embed_lr: float = _opt(0.05, "Adam, tied embedding", 0)
    matrix_lr: float = _opt(0.04, "Muon", 0)
    scalar_lr: float = _opt(0.04, "Adam, vectors and gains", 0)
    muon_momentum: float = _opt(0.95, "momentum after its warm-up", 0)
    muon_momentum_warmup_start: float = _opt(0.85, "momentum at step 0", 0)
    muon_momentum_warmup_steps: int = _opt(500, "steps from the first to the second", 0)
    muon_backend_steps: int = _opt(5, "Newton-Schulz iterations", 0)
    beta1: float = _opt(0.9, "Adam", 0)
    beta2: float = _opt(0.95, "Adam", 0)
    adam_eps: float = _opt(1e-8, "Adam", 0)
    grad_clip_norm: float = _opt(0.0, "global norm; 0: no clipping", 0)
    # Test-time training
    ttt_lora_rank: int = _opt(8, "adapter rank", 1)
    ttt_lora_lr: float = _opt(0.01, "Adam rate of the adapters", 0)
    ttt_chunk_size: int = _opt(256, "predictions scored, then learned from, at once", 1)
    ttt_eval_seq_len: int = _opt(1024, "tokens of context at most", 1)
    ttt_batch_size: int = _opt(64, "documents side by side", 1)


# Overrides of the defaults above. `cpu` was chosen by measurement on two cores; records/NOTES.md has the tries.
PRESETS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "cpu": dict(data_path="./data/demo", tokenizer_path="./data/demo/tokenizer.model", max_wallclock_seconds=175.0,
                num_layers=4, model_dim=192, num_heads=3, num_kv_heads=1, train_seq_len=512, train_batch_tokens=4096,
                grad_accum_steps=2, val_batch_size=16384, matrix_lr=0.03, scalar_lr=0.02, tied_embed_lr=0.03,
                warmup_steps=1, warmdown_iters=500, muon_momentum_warmup_steps=60, val_loss_every=0,
                train_log_every=50, ttt_eval_seq_len=512, eval=("flat", "doc", "stride", "ttt")),
}  # fmt: skip


def _parse(name: str, text: str, spec: Any) -> Any:
    """The value that `text` spells for the field `spec`, or `AgreedError` saying what was expected."""
    kind, least, choices = type(spec.default), spec.metadata["least"], spec.metadata["choices"]
    expected = {bool: "0 or 1", int: "a whole number", float: "a finite number", str: "one of", tuple: "some of"}[kind]
    expected += " " + ", ".join(choices) if choices else ""
    expected += f" of at least {least:g}" if least is not None else ""
    try:
        value = {"0": False, "1": True}[text] if kind is bool else kind(text.split(",") if kind is tuple else text)
        lowest, words = -(2**62) if least is None else least, value if kind is tuple else (value,)
        if choices:
            fits = set(words) <= set(choices) and len(set(words)) == len(words)
        else:
            fits = kind is str or lowest <= value < 2**62
    except (ValueError, KeyError):
        fits = False
    if not fits:
        raise AgreedError(f"{name}={text!r}: expected {expected}; set it so or unset it")
    return value


def spell(value: Any) -> str:
    """The text that stands for a setting's value in the environment: what `_parse` reads back."""
    return ",".join(value) if isinstance(value, tuple) else str(int(value) if isinstance(value, bool) else value)


def read_config(env: Mapping[str, str]) -> Config:
    """Settings from the environment: explicit variables win over the preset, the preset over the defaults.

    Raises `AgreedError` for a value that does not parse and for settings that cannot work together.
    """
    given = {f.name: _parse(f.name.upper(), env[f.name.upper()], f) for f in fields(Config) if f.name.upper() in env}
    device, preset = given.get("device", "auto"), given.get("preset", "auto")
    device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    preset = preset if preset != "auto" else "baseline" if device == "cuda" else "cpu"
    cfg = replace(Config(), **PRESETS[preset] | given | {"device": device, "preset": preset})
    world = _parse("WORLD_SIZE", env.get("WORLD_SIZE", "1"), _opt(1, "ranks", 1))
    if not given.get("grad_accum_steps"):
        alone = PRESETS[preset].get("grad_accum_steps", 8)  # of one rank; more share them, and tokens keep their order
        cfg = replace(cfg, grad_accum_steps=alone // world if alone % world == 0 else 1)
    check_config(cfg, world)
    return cfg


def check_config(cfg: Config, world: int) -> None:
    """Refuse settings that parse one by one but cannot work together (`AgreedError`)."""
    unit = world * cfg.grad_accum_steps * cfg.train_seq_len
    nearest = max(unit, round(cfg.train_batch_tokens / unit) * unit)
    rules = (
        (re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}|", cfg.run_id),
         f"RUN_ID={cfg.run_id!r}: expected letters, digits, '.', '_' and '-', since it names the log file; rename it"),
        (not cfg.scores_path or (cfg.scores_path.endswith(".csv") and not Path(cfg.out_dir, cfg.scores_path).is_dir()),
         f"SCORES_PATH={cfg.scores_path!r}: expected the name of a file, ending in .csv; rename it"),
        (cfg.model_path or not cfg.eval_only,
         "EVAL_ONLY=1 without MODEL_PATH: expected the .ptz or .pt file to score; set MODEL_PATH"),
        (cfg.ttt_chunk_size <= cfg.ttt_eval_seq_len,
         f"TTT_CHUNK_SIZE={cfg.ttt_chunk_size}: expected at most TTT_EVAL_SEQ_LEN={cfg.ttt_eval_seq_len}, the window"
         " that a chunk is scored in; lower the first or raise the second"),
        (cfg.model_dim % (2 * cfg.num_heads) == 0,
         f"MODEL_DIM={cfg.model_dim}: expected a multiple of {2 * cfg.num_heads}, since NUM_HEADS={cfg.num_heads} and"
         " rotary embedding needs an even head dim"),
        (max(cfg.beta1, cfg.beta2) < 1,
         f"BETA1={cfg.beta1:g}, BETA2={cfg.beta2:g}: expected numbers below 1, the shares that Adam's averages keep"),
        (cfg.num_heads % cfg.num_kv_heads == 0,
         f"NUM_HEADS={cfg.num_heads}: expected a multiple of NUM_KV_HEADS={cfg.num_kv_heads}; change one of them"),
        (cfg.eval_only or cfg.train_batch_tokens % unit == 0,
         f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: expected a multiple of {unit} (world size {world} x"
         f" GRAD_ACCUM_STEPS {cfg.grad_accum_steps} x TRAIN_SEQ_LEN {cfg.train_seq_len}); the nearest is {nearest}"),
    )  # fmt: skip
    for holds, line in rules:
        if not holds:
            raise AgreedError(line)


# ==== Runtime: devices, ranks, clocks and log files live here and nowhere else ========================================


@dataclass
class Runtime:
    """Device, precision, rank, world, reductions and logging of this process. The rest of the file never asks."""

    device: torch.device
    dtype: torch.dtype  # of matrix products and attention
    rank: int = 0
    world: int = 1
    log_path: Path | None = None
    noise: float = 0.0  # nats by which a score may differ if computed twice: on CPUs kernels repeat to the bit
    suffix: str = ""  # " partial" when only some documents are evaluated, so that no line can be mistaken

    @classmethod
    def create(cls, cfg: Config, env: Mapping[str, str]) -> Runtime:
        """Claim the device and join the other ranks that torchrun started. `AgreedError` where GPUs are lacking."""
        rank, world, local = (int(env.get(key, "0")) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        rt = cls(torch.device("cpu"), choose_dtype(cfg)[0], rank, world or 1)
        if cfg.device == "cuda":
            needed, found = int(env.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
            if needed > found:
                raise AgreedError(f"DEVICE=cuda: {needed} ranks on this machine, found {found} GPUs; start fewer ranks")
            rt.device = torch.device("cuda", local)
            torch.cuda.set_device(rt.device)
            rt.noise = 1e-2  # atomic additions in backward kernels come in any order
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = rt.dtype != torch.float32
            # Only flash attention, so that a slow fallback fails loudly; fp32 has no flash kernel and needs the other.
            torch.backends.cuda.enable_cudnn_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(False)
            torch.backends.cuda.enable_math_sdp(rt.dtype == torch.float32)
        else:
            keep_freed_memory()
        if world:
            # gloo carries what lives on the CPU (clock, error lines), so that agreeing on them never waits for a GPU.
            dist.init_process_group("cpu:gloo,cuda:nccl" if cfg.device == "cuda" else "gloo")
        rt.together(lambda: rt.open_log(cfg, env))
        return rt

    def open_log(self, cfg: Config, env: Mapping[str, str]) -> None:
        """Start the log file with what identifies the run, this script first. `OSError` where it cannot be written."""
        self.suffix = " partial" if cfg.max_val_docs else ""
        if self.rank != 0:
            return
        self.log_path = Path(cfg.out_dir) / "logs" / f"{cfg.run_id or uuid.uuid4()}.txt"
        for path in (self.log_path, Path(cfg.out_dir, cfg.scores_path)):
            path.parent.mkdir(parents=True, exist_ok=True)
        settings = {f.name.upper(): shlex.quote(spell(getattr(cfg, f.name))) for f in fields(cfg)}
        given = [f"{name}={shlex.quote(env[name])}" for name in settings if name in env]
        launcher = f"torchrun --standalone --nproc_per_node={self.world}" if "WORLD_SIZE" in env else "python"
        rule, versions = "=" * 100, f"numpy:{np.__version__} sentencepiece:{sentencepiece.__version__}"
        head = [source_code(), rule, f"Running Python {sys.version}", f"Running PyTorch {torch.__version__}"]
        head += [describe_device(self.device), rule, time.strftime("started:%Y-%m-%dT%H:%M:%SZ", time.gmtime())]
        head += [" ".join(["command:", *given, launcher, "train_gpt.py"])]
        head += ["config: " + " ".join(f"{name}={value}" for name, value in settings.items())]
        head += [f"versions: python:{platform.python_version()} torch:{torch.__version__} {versions}"]
        self.log("\n".join(head), console=False)
        dtype, why = choose_dtype(cfg)
        self.log(f"preset:{cfg.preset} device:{self.device} world_size:{self.world} dtype:{dtype} ({why})")
        self.log(f"data:{cfg.data_path} tokenizer:{cfg.tokenizer_path} log:{self.log_path}")
        self.log(f"sha256 script:{sha256(source_code().encode())}")

    def log(self, text: str, console: bool = True) -> None:
        """Write to the log file and, unless told otherwise, to standard output. Rank 0 only, which has a log file."""
        if self.log_path:
            if console:
                text += self.suffix
                with tqdm.external_write_mode():  # lifts a running progress bar out of the way
                    print(text, flush=True)
            with self.log_path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def together(self, work: Callable[[], Any]) -> Any:
        """work() on every rank. If any refuses it, all of them raise `AgreedError` with the first refusal."""
        result, problem = None, None
        try:
            result = work()
        except (UserError, OSError) as error:
            problem = str(error)
        problems = [problem] * self.world
        if self.world > 1:
            dist.all_gather_object(problems, problem)
        for rank, line in enumerate(problems):
            if line:
                raise AgreedError(line if problems == [line] * self.world else f"rank {rank}: {line}")
        return result

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def average(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks: one reduction for each dtype."""
        # dict.fromkeys keeps the order in which dtypes appear, the same on every rank; a set would not.
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors) if self.world > 1 else ():
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            joined = self.sum(torch.cat([tensor.flatten() for tensor in same])).div_(self.world)
            for tensor, mean in zip(same, joined.split([tensor.numel() for tensor in same]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def upload(self, array: np.ndarray) -> Tensor:
        """The array on the device, without waiting for the copy where the device can overlap it."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def from_rank0(self, value: float) -> float:
        """Rank 0's `value`, on every rank: replicas that read their own clocks would drift apart."""
        box = torch.tensor(value, dtype=torch.float64, device="cpu")
        if self.world > 1:
            dist.broadcast(box, src=0)
        return box.item()

    def seconds(self, wait: bool = True) -> float:
        """The clock, read when the device has done all that was asked of it unless told not to `wait`."""
        if wait and self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def progress(self, total: float, what: str) -> tqdm:
        """A progress bar for a person at a terminal; silent in pipes, in files and on other ranks."""
        layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        hidden = not self.log_path or not sys.stderr.isatty()
        return tqdm(total=total, desc=what, disable=hidden, leave=False, bar_format=layout)


def keep_freed_memory() -> None:
    """Ask glibc to keep what it frees: asking the kernel for every tensor anew costs up to a third of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the top of the heap


def causal_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 256) -> Tensor:
    """softmax(q k^T / sqrt(N)) v under a causal mask: q (B, H, T, N), k and v (B, G, T, N), G dividing H -> like q.

    CUDA has a flash kernel. The one for CPUs loses to plain bf16 matrix products, half of which a causal mask saves
    when queries are taken in blocks that see the keys up to their own end (records/NOTES.md).
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    rows, (length, dim), share = q.size(0) * k.size(1), q.shape[2:], q.size(1) // k.size(1)
    k, v = k.reshape(rows, length, dim), v.reshape(rows, length, dim)
    out = []
    for part in (q * dim**-0.5).view(rows, share, length, dim).split(block, dim=2):
        begin, size = sum(o.size(2) for o in out), part.size(2)
        future = torch.full((size, begin + size), -math.inf, dtype=q.dtype, device=q.device).triu(begin + 1)
        keys, values = k[:, : begin + size], v[:, : begin + size]
        scores = torch.baddbmm(future.repeat(share, 1), part.reshape(rows, -1, dim), keys.mT)
        out.append((scores.softmax(-1) @ values).view(rows, share, size, dim))
    return torch.cat(out, dim=2).view(q.shape)


def choose_dtype(cfg: Config) -> tuple[torch.dtype, str]:
    """(compute dtype, why). DTYPE=auto is bf16 where the hardware multiplies it natively, else fp32."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype), "DTYPE"
    if cfg.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU has bf16"
    found = torch.cpu.get_capabilities() if cfg.device == "cpu" else {}
    native = [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if found.get(flag)]
    return (torch.bfloat16, f"processor has {native[0]}") if native else (torch.float32, f"{cfg.device} has no bf16")


@functools.cache
def source_code() -> str:
    """This file's own text, which heads every log and counts towards the budget: read once, lest it be edited."""
    return Path(__file__).read_bytes().decode()


def sha256(data: bytes | memoryview) -> str:
    """The hash by which logs name files."""
    return hashlib.sha256(data).hexdigest()


def describe_device(device: torch.device) -> str:
    """What CUDA, or the kernel, says about the hardware."""
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    cpu_info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", cpu_info.read_text() if cpu_info.exists() else "")
    return f"{name[1] if name else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path` entirely or not at all: a temporary name, flushed to the disk, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ==== Byte metric: the UTF-8 bytes that a token stands for ===========================================================


def load_tokenizer(path: str, vocab_size: int) -> SentencePieceProcessor:
    """The SentencePiece model at `path`. `UserError` if it is missing, damaged or of another vocabulary."""
    try:
        tokenizer = SentencePieceProcessor(model_proto=Path(path).read_bytes())
        found = f"{tokenizer.vocab_size()} pieces, BOS id {tokenizer.bos_id()}"
        fits = tokenizer.vocab_size() == vocab_size and tokenizer.bos_id() >= 0
    except (OSError, RuntimeError) as error:
        found, fits = f"no usable file ({type(error).__name__})", False
    if not fits:
        raise UserError(
            f"TOKENIZER_PATH={path}: found {found}; expected the SentencePiece .model that made the shards, with BOS"
            f" and the model's {vocab_size} pieces; correct the path or VOCAB_SIZE"
        )
    return tokenizer


@dataclass(frozen=True)
class ByteTable:
    """UTF-8 bytes that a target token stands for.

    Control, unknown and unused pieces stand for 0 bytes, byte-fallback pieces for 1, any other for the UTF-8 length of
    its text, in which every `▁` is a space; a leading one counts only after a token that itself stands for text.
    """

    base: np.ndarray  # (V,) int64, bytes without the leading space
    leading_space: np.ndarray  # (V,) bool
    is_text: np.ndarray  # (V,) bool, false for the 0-byte pieces

    @classmethod
    def build(cls, tokenizer: SentencePieceProcessor) -> ByteTable:
        """The table of a tokenizer. `UserError` if it has no piece for a space on its own.

        Byte fallback spells a `▁` that has no piece as three bytes, so that every such space would count three times.
        """
        rows = []
        for i in range(tokenizer.vocab_size()):
            piece, byte = tokenizer.id_to_piece(i), tokenizer.is_byte(i)
            text = not (tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i))
            size = 1 if byte else len(piece.removeprefix("▁").replace("▁", " ").encode())
            rows.append((size if text else 0, text and not byte and piece.startswith("▁"), text))
        base, space, text = np.array(rows, dtype=np.int64).T
        if not text[tokenizer.piece_to_id("▁")]:
            raise UserError("TOKENIZER_PATH: found no piece '▁', expected one, else spaces miscount; train it with one")
        return cls(base, space.astype(bool), text.astype(bool))

    def count(self, previous: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Bytes of each `target` given the token before it: ids of any shape -> int64 of that shape."""
        return self.base[target] + (self.leading_space[target] & self.is_text[previous])


# ==== Data: shards, the training stream, the validation documents =====================================================

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped: (n,) uint16. `UserError` unless header, version and size agree."""
    size = path.stat().st_size if path.is_file() else 0
    header = np.fromfile(path, dtype="<i4", count=3).tolist() if size >= HEADER_BYTES else [0, 0, 0]
    magic, version, count = header
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION) or count <= 0 or size != HEADER_BYTES + 2 * count:
        raise UserError(
            f"{path}: found {size} bytes, magic {magic}, version {version}, {count} tokens; expected magic"
            f" {SHARD_MAGIC}, version {SHARD_VERSION} and {HEADER_BYTES} + 2 x tokens bytes; see data/README.md"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def open_shards(folder: str, pattern: str) -> list[np.ndarray]:
    """All shards of `folder` that match, in sorted order; every header is checked now, not when its turn comes."""
    paths = sorted(Path(folder).glob(pattern))
    if not paths:
        raise UserError(f"DATA_PATH={folder}: found no {pattern}; expected shards, see data/README.md for making them")
    return [open_shard(path) for path in paths]


class TokenStream:
    """The training tokens of all shards in order, wrapping forever. Its whole state is `position`."""

    def __init__(self, shards: list[np.ndarray]) -> None:
        self.shards, self.position = shards, 0
        self.ends = np.cumsum([len(shard) for shard in shards])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the endless stream: (count,) int64."""
        parts = []
        while count:
            start %= int(self.ends[-1])
            shard = int(np.searchsorted(self.ends, start, side="right"))
            offset = start - int(self.ends[shard]) + len(self.shards[shard])
            parts.append(self.shards[shard][offset : offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts).astype(np.int64)

    def next_batch(self, cfg: Config, rt: Runtime) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of the next micro-step, each (B, T).

        A micro-step consumes (local + 1) * world tokens and rank r takes the r-th span. The order of tokens depends on
        world size times GRAD_ACCUM_STEPS alone, which by default stays the same for every world size that divides it.
        """
        span = cfg.train_batch_tokens // (rt.world * cfg.grad_accum_steps) + 1
        tokens = rt.upload(self.read(self.position + rt.rank * span, span))
        self.position += span * rt.world
        return tokens[:-1].view(-1, cfg.train_seq_len), tokens[1:].view(-1, cfg.train_seq_len)


@dataclass(frozen=True)
class Documents:
    """The validation stream on the device, and its documents in stream order.

    Position p of the stream predicts token p + 1. Document d owns the `predictions[d]` positions from its BOS at
    `starts[d]`: its last target is the next BOS.
    """

    tokens: Tensor  # (n,) int32
    bytes: Tensor  # (n - 1,) int32, UTF-8 bytes of each position's target
    starts: np.ndarray  # (docs,) int64
    predictions: np.ndarray  # (docs,) int64, all >= 1
    short: int = 0  # how many documents have no text
    beyond: int = 0  # targets beyond the last document, should there be a limit


def split_documents(stream: np.ndarray, bos: int, limit: int, table: ByteTable, device: torch.device) -> Documents:
    """Cut the validation `stream` (n,) at BOS and put it on the device; `UserError` if that leaves nothing to predict.

    `limit` > 0 keeps the first so many documents and the BOS that closes the last of them.
    """
    total, starts = len(stream), np.flatnonzero(stream == bos)
    if 0 < limit < len(starts):
        stream, starts = stream[: starts[limit] + 1], starts[:limit]
    predictions = np.append(starts[1:], len(stream) - 1) - starts if len(starts) else starts
    sizes, scored = table.count(stream[:-1], stream[1:]), predictions > 0
    if not scored.any() or not sizes.any():
        found = f"{len(starts)} BOS (id {bos}) and {sizes.sum()} bytes of text in {len(stream)} tokens"
        raise UserError(f"validation shards: {found}: nothing to predict; expected BOS, then text; see data/README.md")
    tokens, sizes = (torch.from_numpy(array.astype(np.int32)).to(device) for array in (stream, sizes))
    return Documents(tokens, sizes, starts[scored], predictions[scored], int((~scored).sum()), total - len(stream))


# ==== Model ===========================================================================================================

# The LoRA pair of each adapted projection by its name: A (B, R, in) and B (B, out, R). One not named has none.
Adapters = Mapping[str, tuple[Tensor, Tensor]]
NO_LORA: Adapters = {}


def rms_norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension, without a weight, in the dtype of x."""
    return F.rms_norm(x, (x.size(-1),))


def project(x: Tensor, weight: Tensor, lora: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x W^T, plus each row's own x A^T B^T: (B, T, in) -> (B, T, out), all in the dtype of x."""
    out = F.linear(x, weight.to(x.dtype))
    return out if lora is None else out + x @ lora[0].to(x.dtype).mT @ lora[1].to(x.dtype).mT


class Linear(nn.Linear):
    """A projection without bias: fp32 master weight, computed in its input's dtype, adapted under its name."""

    def __init__(self, in_dim: int, out_dim: int, name: str, zero: bool = False) -> None:
        super().__init__(in_dim, out_dim, bias=False, device="cpu", dtype=torch.float32)
        self.name = name
        if zero:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, adapters: Adapters) -> Tensor:
        """(B, T, in) -> (B, T, out)."""
        return project(x, self.weight, adapters.get(self.name))


def rope_tables(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each (length, N/2) fp32, built in fp64."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    angle = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), base**-exponent)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves convention: (B, H, T, N) with tables (T, N/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class Attention(nn.Module):
    """Causal attention: grouped key/value heads, normed and rotated queries and keys, a gain per query head."""

    def __init__(self, cfg: Config, name: str) -> None:
        super().__init__()
        dim, self.head_dim = cfg.model_dim, cfg.model_dim // cfg.num_heads
        kv_dim = cfg.num_kv_heads * self.head_dim
        self.c_q, self.c_k = Linear(dim, dim, f"{name}.c_q"), Linear(dim, kv_dim, f"{name}.c_k")
        self.c_v, self.proj = Linear(dim, kv_dim, f"{name}.c_v"), Linear(dim, dim, f"{name}.proj", zero=True)
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init, dtype=torch.float32, device="cpu"))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, adapters: Adapters) -> Tensor:
        """(B, T, D) -> (B, T, D), in the dtype of x."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (proj(x, adapters).view(heads).transpose(1, 2) for proj in (self.c_q, self.c_k, self.c_v))
        q = (rotate(rms_norm(q.float()), cos, sin) * self.q_gain[:, None, None]).to(x.dtype)
        k = rotate(rms_norm(k.float()), cos, sin).to(x.dtype)
        return self.proj(causal_attention(q, k, v).transpose(1, 2).reshape(x.shape), adapters)


class MLP(nn.Module):
    """relu squared between two projections."""

    def __init__(self, cfg: Config, name: str) -> None:
        super().__init__()
        hidden = cfg.mlp_mult * cfg.model_dim
        self.fc = Linear(cfg.model_dim, hidden, f"{name}.fc")
        self.proj = Linear(hidden, cfg.model_dim, f"{name}.proj", zero=True)

    def forward(self, x: Tensor, adapters: Adapters) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.proj(F.relu(self.fc(x, adapters)).square(), adapters)


class Block(nn.Module):
    """Attention, then MLP, on a residual stream that can mix the embedding back in."""

    def __init__(self, cfg: Config, name: str) -> None:
        super().__init__()
        ones = torch.ones(cfg.model_dim, dtype=torch.float32, device="cpu")
        self.attn, self.mlp = Attention(cfg, f"{name}.attn"), MLP(cfg, f"{name}.mlp")
        self.attn_scale, self.mlp_scale = nn.Parameter(ones.clone()), nn.Parameter(ones.clone())
        self.resid_mix = nn.Parameter(torch.stack((ones, torch.zeros_like(ones))))

    def forward(self, x: Tensor, x0: Tensor, rope: tuple[Tensor, Tensor], adapters: Adapters) -> Tensor:
        """Residual stream x and normed embedding x0 -> residual stream, all (B, T, D) in one dtype."""
        mix, attn_scale, mlp_scale = (p.to(x.dtype) for p in (self.resid_mix, self.attn_scale, self.mlp_scale))
        x = mix[0] * x + mix[1] * x0
        x = x + attn_scale * self.attn(rms_norm(x), *rope, adapters)
        return x + mlp_scale * self.mlp(rms_norm(x), adapters)


class GPT(nn.Module):
    """The record's transformer: skip connections from its first half to its second, a soft-capped head.

    Precision is written out instead of left to autocast, whose lists of operations differ between CPU and CUDA. The
    residual stream, matrix products and attention are in `dtype` on every device: a bf16 stream agrees with the
    published code where that could be run (records/NOTES.md) and moves half the bytes of the fp32 one that autocast
    gave the record on CUDA. Query and key norms, rotation, softcap and cross-entropy are in fp32.
    """

    def __init__(self, cfg: Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.softcap, self.half = dtype, cfg.logit_softcap, cfg.num_layers // 2
        # Built on the CPU whatever the device, so that a seed means the same weights everywhere.
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.model_dim, device="cpu", dtype=torch.float32)
        if cfg.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, std=cfg.tied_embed_init_std)
        self.tok_emb.to(torch.bfloat16)
        self.skip_weights = nn.Parameter(torch.ones(self.half, cfg.model_dim, dtype=torch.float32, device="cpu"))
        self.blocks = nn.ModuleList(Block(cfg, f"blocks.{i}") for i in range(cfg.num_layers))
        self.lm_head = None if cfg.tie_embeddings else Linear(cfg.model_dim, cfg.vocab_size, "lm_head", zero=True)
        length = max(cfg.train_seq_len, cfg.ttt_eval_seq_len)
        cos, sin = rope_tables(length, cfg.model_dim // cfg.num_heads, cfg.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def head(self) -> nn.Parameter:
        """The output matrix, (V, D): the embedding itself when tied."""
        return self.tok_emb.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, ids: Tensor, targets: Tensor, at: Tensor | None = None, adapters: Adapters = NO_LORA) -> Tensor:
        """Cross-entropy of each target in nats, always one per token: (B, S) fp32. Callers reduce.

        ids (B, T); targets (B, S) are the tokens that follow the positions `at` (B, S) of each row, or every position
        when `at` is None (S = T). Only those positions reach the head.
        """
        rope = self.cos[: ids.size(1)], self.sin[: ids.size(1)]
        x = x0 = rms_norm(self.tok_emb(ids).to(self.dtype))
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i >= self.half and skips:
                x = x + self.skip_weights[i - self.half].to(x.dtype) * skips.pop()
            x = block(x, x0, rope, adapters)
            if i < self.half:
                skips.append(x)
        if at is not None:
            x = x.gather(1, at[:, :, None].expand(-1, -1, x.size(-1)))
        logits = project(rms_norm(x), self.head, adapters.get("lm_head")).float()
        logits = self.softcap * torch.tanh(logits / self.softcap)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


# ==== Optimizers ======================================================================================================


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Push the singular values of `matrix` (rows, cols) towards 1: quintic Newton-Schulz iterations in bf16.

    The coefficients trade exactness for speed: singular values end between about 0.7 and 1.2 (K. Jordan, Muon, 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    if tall := x.size(0) > x.size(1):
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz: for the matrices inside the blocks, not for embeddings or vectors.

    Matrix j is orthogonalised by rank j % world alone; summing the ranks' otherwise zero bf16 updates hands every rank
    the complete set. Source: K. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, steps: int, rt: Runtime) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.0})
        self.steps, self.rt = steps, rt

    @torch.no_grad()
    def step(self) -> None:
        """p -= lr * sqrt(max(1, rows / cols)) * orthogonalize(Nesterov momentum), for every matrix p."""
        params, lr, momentum = (self.param_groups[0][key] for key in ("params", "lr", "momentum"))
        sizes = [p.numel() for p in params]
        updates = torch.zeros(sum(sizes), dtype=torch.bfloat16, device=self.rt.device)
        views = [part.view_as(p) for part, p in zip(updates.split(sizes), params, strict=True)]
        for j in range(self.rt.rank, len(params), self.rt.world):
            p, state = params[j], self.state[params[j]]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffer = state["momentum_buffer"].mul_(momentum).add_(p.grad)
            update = orthogonalize(p.grad + momentum * buffer, self.steps)
            views[j].copy_(update * max(1.0, p.size(0) / p.size(1)) ** 0.5)
        self.rt.sum(updates)
        for p, update in zip(params, views, strict=True):
            p.add_(update.float(), alpha=-lr)


def build_optimizers(model: GPT, cfg: Config, rt: Runtime) -> tuple[Muon, torch.optim.Adam]:
    """(Muon, Adam), fresh. Every parameter belongs to exactly one group, and each group remembers its `base_lr`."""
    inside = list(model.blocks.named_parameters())
    matrices = [p for name, p in inside if p.ndim == 2 and "resid_mix" not in name]
    scalars = [p for name, p in inside if p.ndim < 2 or "resid_mix" in name]
    rates = (
        ([model.tok_emb.weight], cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr),
        ([*scalars, model.skip_weights], cfg.scalar_lr),
        ([] if model.lm_head is None else [model.lm_head.weight], cfg.head_lr),
    )
    groups = [{"params": params, "lr": lr} for params, lr in rates if params]
    adam = torch.optim.Adam(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)
    optimizers = Muon(matrices, cfg.matrix_lr, cfg.muon_backend_steps, rt), adam
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    owned = [id(p) for group in groups for p in group["params"]]
    assert sorted(owned) == sorted(map(id, model.parameters())), "a parameter has no optimizer, or two"
    for group in groups:
        group["base_lr"] = group["lr"]
    return optimizers


def lr_scale(step: int, elapsed_ms: float, cfg: Config) -> float:
    """Factor on every learning rate: 1, then linearly down to 0.

    Under a wallclock cap the fall fills WARMDOWN_ITERS steps at the mean pace so far; without one, the last
    WARMDOWN_ITERS of ITERATIONS.
    """
    if cfg.warmdown_iters == 0:
        return 1.0
    if cfg.max_wallclock_seconds == 0:
        return min(1.0, max(0.0, (cfg.iterations - step) / cfg.warmdown_iters))
    remaining = max(0.0, 1000 * cfg.max_wallclock_seconds - elapsed_ms)
    warmdown = cfg.warmdown_iters * elapsed_ms / max(step, 1)
    return remaining / max(warmdown, 1e-9) if remaining <= warmdown else 1.0


def muon_momentum(step: int, cfg: Config) -> float:
    """Muon's momentum at `step`, counted from 0: a linear climb over its warm-up."""
    way = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
    return (1 - way) * cfg.muon_momentum_warmup_start + way * cfg.muon_momentum


# ==== Artifact: int8 + zlib, written and read =========================================================================

QUANT_FORMAT = "int8_clean_per_row_v1"
KEEP_FLOAT_NUMEL = 65_536  # float tensors up to this size are stored as they are
CLIP_QUANTILE = 99.99984 / 100  # of |w| in a row; what lies above is clipped
SUBMISSION_BUDGET = 16_000_000  # bytes of code and artifact together
CONTROL_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights")  # small and touchy: kept in fp32


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(q int8 (rows, cols), scale fp16 (rows,)) with weight ~ q * scale.

    The scale never falls below 1/127. That is a rate choice, not a guard: it makes the typical row coarse enough for
    zlib to bring the record's model to 15.8 MB, and costs about 0.0075 bpb there.
    """
    w = weight.float()
    clip = torch.quantile(w.abs(), CLIP_QUANTILE, dim=1, keepdim=True)
    scale = (clip / 127).clamp_min(1 / 127)
    return (w.clamp(-clip, clip) / scale).round().clamp(-127, 127).to(torch.int8), scale[:, 0].half()


def quantize_state(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The artifact's content, in the published layout (spec section 5), from a state dict on the CPU."""
    parts = ("quantized", "scales", "dtypes", "passthrough", "qmeta", "passthrough_orig_dtypes")
    out: dict[str, Any] = {"__quant_format__": QUANT_FORMAT} | {part: {} for part in parts}
    for name, tensor in state.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.numel() > KEEP_FLOAT_NUMEL:
            assert tensor.ndim == 2, name
            out["quantized"][name], out["scales"][name] = quantize_rows(tensor)
            out["dtypes"][name], out["qmeta"][name] = dtype, {"scheme": "per_row", "axis": 0}
        elif any(control in name for control in CONTROL_NAMES):
            out["passthrough"][name] = tensor.float()
        else:
            out["passthrough"][name], out["passthrough_orig_dtypes"][name] = tensor.half(), dtype
    return out


def dequantize_state(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict from an artifact's content, each tensor in the dtype that it was trained in."""
    state = {}
    for name, q in content["quantized"].items():
        scale = content["scales"][name].float()
        state[name] = (q.float() * scale.view(-1, *[1] * (q.ndim - 1))).to(getattr(torch, content["dtypes"][name]))
    for name, tensor in content["passthrough"].items():
        original = content["passthrough_orig_dtypes"].get(name)
        state[name] = tensor.to(getattr(torch, original)) if original else tensor
    return state


def serialize(content: Any) -> bytes:
    """torch.save to bytes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def export(model: GPT, cfg: Config, rt: Runtime) -> Path:
    """Rank 0 writes the weights and the artifact, atomically, and logs their sizes. Returns the artifact's path.

    They are called final_model.pt and final_model.int8.ptz; under EVAL_ONLY, which has a .pt already, only the artifact
    is written, under a name that no training uses.
    """
    name = f"eval_{Path(cfg.model_path).stem}" if cfg.eval_only else "final_model"
    path = Path(cfg.out_dir) / f"{name}.int8.ptz"
    if rt.rank != 0:
        return path
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    content = quantize_state(state)
    for name, tensor in dequantize_state(content).items():
        if not tensor.isfinite().all():
            raise UserError(f"{name}: holds values that are not finite; expected a sound model, nothing was exported")
    raw, quantized, code = serialize(state), serialize(content), len(source_code().encode())
    if not cfg.eval_only:
        write_atomically(path.with_name("final_model.pt"), raw)
    blob = zlib.compress(quantized, level=9)
    write_atomically(path, blob)
    held = [*content["quantized"].values(), *content["scales"].values(), *content["passthrough"].values()]
    before, after = (sum(tensor.nbytes for tensor in tensors) for tensors in (state.values(), held))
    rt.log(f"Serialized model: {len(raw)} bytes")
    rt.log(f"Code size: {code} bytes")
    rt.log(f"Total submission size: {len(raw) + code} bytes")
    sizes = f"payload:{after} raw_torch:{len(quantized)} payload_ratio:{before / after:.2f}x"
    rt.log(f"Serialized model int8+zlib: {len(blob)} bytes ({sizes})")
    rt.log(f"Total submission size int8+zlib: {len(blob) + code} bytes")
    return path


def report_artifact(path: Path, rt: Runtime) -> None:
    """Log which artifact is scored, and whether it and this script fit the budget."""
    blob = path.read_bytes()
    total = len(blob) + len(source_code().encode())
    verdict = "PASS" if total <= SUBMISSION_BUDGET else "FAIL"
    rt.log(f"sha256 artifact:{sha256(blob)} {path.name}")
    rt.log(f"submission_size:{total} budget:{SUBMISSION_BUDGET} headroom:{SUBMISSION_BUDGET - total} {verdict}")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file: an artifact if its name ends in .ptz, else a plain torch.save.

    `UserError` when it is neither. Nothing in the file is executed (weights_only).
    """
    try:
        blob, packed = Path(path).read_bytes(), str(path).endswith(".ptz")
        blob = zlib.decompress(blob) if packed else blob
        content = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
        if packed and content["__quant_format__"] != QUANT_FORMAT:
            raise ValueError(f"its format is {content['__quant_format__']!r:.40}, not {QUANT_FORMAT}")
        state = dequantize_state(content) if packed else content
        if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise ValueError("an entry is not a tensor")
    except Exception as error:  # whatever the file system, zlib and torch.load find wrong with a stranger's file
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise UserError(f"{path}: unusable ({reason}); expected an artifact (.ptz) or a state dict (.pt)") from None
    return state


def shape_from_weights(state: Mapping[str, Tensor], cfg: Config, path: str) -> Config:
    """`cfg` with the model shape of the weights in file `path`. `UserError` if they are not this GPT's."""
    try:
        (vocab_size, dim), heads = state["tok_emb.weight"].shape, len(state["blocks.0.attn.q_gain"])
        return replace(
            cfg, vocab_size=vocab_size, model_dim=dim, num_heads=heads, tie_embeddings="lm_head.weight" not in state,
            num_kv_heads=max(1, len(state["blocks.0.attn.c_k.weight"]) * heads // dim),
            num_layers=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
            mlp_mult=len(state["blocks.0.mlp.fc.weight"]) // dim,
        )  # fmt: skip
    except (KeyError, ValueError, ZeroDivisionError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not the weights of this model ({reason}); expected its tensor names") from None


def load_weights(model: GPT, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy the weights of file `path` into the model. `UserError` naming the first tensor that does not fit."""
    shapes = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in (model.state_dict(), state)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        expected, found = (shape.get(name, "no such tensor") for shape in shapes)
        if expected != found:
            raise UserError(f"{path}: {name}: found {found}, expected {expected}; it does not fit the other tensors")
    model.load_state_dict(state)


# ==== Adapters: a low-rank correction per document, and its optimizer =================================================


class DocumentAdapters:
    """Rank-R adapters of B documents side by side, with the Adam state that trains them.

    All numbers of a document are one row of `flat` (B, P), so that one update serves every adapter of every document,
    and documents that have ended are left out by taking the first rows. Every document starts from the same seeded
    A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0, so that its score does not depend on its neighbours.
    Source: LoRA, https://arxiv.org/abs/2106.09685.
    """

    def __init__(self, model: GPT, cfg: Config, rt: Runtime) -> None:
        targets = {p.name: p.weight for block in model.blocks for p in (block.attn.c_q, block.attn.c_v)}
        targets["lm_head"] = model.head
        generator = torch.Generator(device="cpu").manual_seed(cfg.seed)
        self.names, self.lr, self.shapes, start = list(targets), cfg.ttt_lora_lr, [], []
        for out_dim, in_dim in (weight.shape for weight in targets.values()):
            self.shapes += [(cfg.ttt_lora_rank, in_dim), (out_dim, cfg.ttt_lora_rank)]
            a = torch.rand(cfg.ttt_lora_rank * in_dim, generator=generator, device="cpu") * 2 - 1
            start += [a / math.sqrt(in_dim), torch.zeros(out_dim * cfg.ttt_lora_rank, device="cpu")]
        self.start = torch.cat(start).to(rt.device)

    def reset(self, documents: int) -> None:
        """Forget everything: fresh adapters and optimizer state for a new batch of documents."""
        self.flat, self.steps = self.start.repeat(documents, 1), 0
        self.mean, self.square = torch.zeros_like(self.flat), torch.zeros_like(self.flat)

    def pairs(self, flat: Tensor) -> Adapters:
        """The (A, B) pairs inside rows of `flat` (b, P), by projection."""
        parts = flat.split([rows * cols for rows, cols in self.shapes], dim=1)
        parts = [part.view(len(flat), *shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return dict(zip(self.names, zip(parts[::2], parts[1::2], strict=True), strict=True))

    @torch.no_grad()
    def adam(self, grad: Tensor, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-10) -> None:
        """One Adam step for the first b documents, whose gradient is `grad` (b, P); all have taken equally many."""
        self.steps += 1
        flat, mean, square = (tensor[: len(grad)] for tensor in (self.flat, self.mean, self.square))
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        spread = (square / (1 - beta2**self.steps)).sqrt_().add_(eps)
        flat.addcdiv_(mean, spread, value=-self.lr / (1 - beta1**self.steps))


# ==== Evaluation ======================================================================================================


@dataclass(frozen=True)
class Condition:
    """A rung of the ladder: `chunk` predictions scored at once, in windows of `window` inputs, `batch` side by side."""

    chunk: int
    window: int
    batch: int
    learn: bool = False  # after each chunk, the document's adapters take a step on it
    isolated: bool = True  # False: rows of the stream, whatever documents they cut, take the place of documents
    final: str = ""  # what the record calls this rung in a line of its own

    def spans(self, docs: Documents) -> tuple[np.ndarray, np.ndarray]:
        """(starts, predictions) of what is scored by itself: the documents, or the whole rows of the stream."""
        rows = (len(docs.tokens) - 1) // self.chunk
        alone = np.arange(rows) * self.chunk, np.full(rows, self.chunk)
        return (docs.starts, docs.predictions) if self.isolated else alone


def ladder(docs: Documents, cfg: Config, rt: Runtime) -> dict[str, Condition]:
    """What each word in EVAL means. `flat` has one row, should the stream be shorter than TRAIN_SEQ_LEN."""
    row = min(cfg.train_seq_len, len(docs.tokens) - 1)
    rows = max(1, cfg.val_batch_size // (rt.world * cfg.grad_accum_steps * row))
    chunk, window, batch = cfg.ttt_chunk_size, cfg.ttt_eval_seq_len, cfg.ttt_batch_size
    return {
        "flat": Condition(row, row, rows, isolated=False, final="final_int8_zlib_roundtrip"),
        "doc": Condition(window, window, batch),
        "stride": Condition(chunk, window, batch),
        "ttt": Condition(chunk, window, batch, learn=True, final="final_int8_ttt_lora"),
    }


@dataclass(frozen=True)
class Score:
    """Cross-entropy of scored tokens, in columns with one entry for each piece of a document that has any."""

    columns: dict[str, np.ndarray]  # doc, chunk, start (in the document), tokens, bytes: int64; loss_nats: float64

    @classmethod
    def tally(cls, ledger: Tensor, docs: Documents, how: Condition, size: int) -> Score:
        """From all ranks' `ledger` (2, n - 1): for each position of the stream, its loss and how often it was scored.

        This is also the audit of coverage: `AgreedError` unless every position that `how` covers was scored exactly
        once, no other ever was, and every loss is finite. Rows are pieces of `size` positions, the same under every
        condition, so that conditions compare; tokens before the first BOS count as document -1.
        """
        losses, times = ledger.cpu().numpy()
        starts, predictions = how.spans(docs)
        due = np.zeros_like(times)
        due[starts[0] : starts[-1] + predictions[-1]] = 1
        for p in np.flatnonzero((times != due) | ~np.isfinite(losses))[:1]:
            found = f"scored {times[p]:g} times, loss {losses[p]:g}"
            raise AgreedError(f"audit coverage: position {p}: {found}; expected {due[p]:g} times and a finite loss")
        begins = np.unique(np.append(0, docs.starts))  # documents touch; before the first one there may be a rest
        pieces = -(-np.diff(begins, append=len(times)) // size)
        doc = np.repeat(np.arange(len(pieces)), pieces)
        chunk = np.arange(len(doc)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        edges, doc = begins[doc] + chunk * size, doc - (len(begins) - len(docs.starts))
        count = docs.bytes.cpu().numpy() * (times > 0)
        tokens, count = (np.add.reduceat(part, edges, dtype=np.int64) for part in (times, count))
        if not count.any():
            raise AgreedError("audit coverage: the scored tokens stand for 0 bytes; expected text, check the tokenizer")
        nats = np.add.reduceat(losses, edges, dtype=np.float64)
        columns = dict(doc=doc, chunk=chunk, start=chunk * size, tokens=tokens, bytes=count, loss_nats=nats)
        return cls({name: column[tokens > 0] for name, column in columns.items()})

    @functools.cached_property
    def totals(self) -> tuple[float, int, int]:
        """(nats, tokens, bytes). The sum of nats is rounded once, so that no order of chunks can move it."""
        tokens, count = (int(self.columns[name].sum()) for name in ("tokens", "bytes"))
        return math.fsum(self.columns["loss_nats"]), tokens, count

    @property
    def loss(self) -> float:
        """Mean cross-entropy, nats per scored token."""
        return self.totals[0] / self.totals[1]

    @property
    def bpb(self) -> float:
        """Bits per byte: all nats / ln 2, divided by all UTF-8 bytes of the scored text."""
        return self.totals[0] / math.log(2) / self.totals[2]

    def __str__(self) -> str:
        return f"val_loss:{self.loss:.4f} val_bpb:{self.bpb:.4f}"


def write_scores(path: Path, scores: Mapping[str, Score], rt: Runtime) -> None:
    """Rank 0 writes the columns of every score as CSV, from which anyone can add up the printed totals."""
    if rt.rank == 0:
        rows = [("condition", *next(iter(scores.values())).columns)]
        for name, score in scores.items():
            rows += [(name, *row) for row in zip(*(c.tolist() for c in score.columns.values()), strict=True)]
        data = "".join(",".join(map(str, row)) + "\n" for row in rows).encode()
        write_atomically(path, data)
        rt.log(f"scores:{path} rows:{len(rows) - 1} sha256:{sha256(data)}")


def share_documents(chunks: np.ndarray, world: int) -> list[np.ndarray]:
    """Documents of each rank, most chunks first: the longest remaining document goes to the least loaded rank."""
    loads, shares = np.zeros(world, dtype=np.int64), [[] for _ in range(world)]
    for document in np.argsort(-chunks, kind="stable"):
        rank = loads.argmin()
        shares[rank].append(document)
        loads[rank] += chunks[document]
    return [np.array(share, dtype=np.int64) for share in shares]


@dataclass(frozen=True)
class ChunkBatch:
    """Chunk c of B documents, gathered for one forward pass."""

    rows: slice  # which rows of the adapters they own
    ids: Tensor  # (B, T) the windows; right of its end a shorter one repeats its last token, where nothing looks
    at: Tensor  # (B, S) where in its window each prediction is made
    positions: Tensor  # (B, S) and where in the stream
    targets: Tensor  # (B, S) the tokens to predict
    live: Tensor  # (B, S) bool, false where a row has no prediction


def gather_chunk(
    tokens: Tensor, starts: np.ndarray, predictions: np.ndarray, rows: slice, c: int, how: Condition, rt: Runtime
) -> ChunkBatch:
    """Windows of chunk `c` of those `rows` of a group of documents, each of which has such a chunk.

    A document of n predictions has its chunk c at predictions [cC, min((c+1)C, n)); they are made inside the window of
    inputs [max(0, end - W), end), where end is the chunk's end.
    """
    ends = np.minimum(predictions[rows], (c + 1) * how.chunk)
    begins = np.maximum(ends - how.window, 0)
    # Sizes are settled on the host, so that the device never has to be asked.
    longest, widest = int((ends - begins).max()), int(ends.max()) - c * how.chunk
    start, begin, end = rt.upload(np.stack((starts[rows], begins, ends)))[:, :, None]
    ids = tokens[start + torch.minimum(begin + torch.arange(longest, device=rt.device), end - 1)].long()
    place = c * how.chunk + torch.arange(widest, device=rt.device)[None, :]
    live, place = place < end, torch.minimum(place, end - 1)
    positions = start + place
    return ChunkBatch(rows, ids, place - begin, positions, tokens[positions + 1].long(), live)


def score_then_learn(model: GPT, batch: ChunkBatch, adapters: DocumentAdapters | None, learn: bool) -> Tensor:
    """Losses (B, S) of a chunk under the adapters as they are; only then, if `learn`, one step on those same tokens.

    This order is the law of the game, and this is the only place that learns: the score of a token must come from a
    state that has never seen it. The returned losses belong to the forward pass that ran before the update.
    """
    with torch.set_grad_enabled(learn):
        flat = adapters.flat[batch.rows].detach().requires_grad_(learn) if adapters else None
        losses = model(batch.ids, batch.targets, batch.at, adapters.pairs(flat) if adapters else NO_LORA)
        if learn:
            # The sum keeps documents apart: no document's mean loss reaches another's row of `flat`.
            mean_losses = (losses * batch.live).sum(1) / batch.live.sum(1)
            adapters.adam(torch.autograd.grad(mean_losses.sum(), flat)[0])
    return losses.detach()


def fill_ledger(model: GPT, docs: Documents, how: Condition, cfg: Config, rt: Runtime) -> Tensor:
    """Score every document by itself, chunk after chunk, each chunk inside its window of earlier tokens.

    If `how.learn`, each document owns adapters that take one Adam step after each of its chunks but the last, whose
    lesson nobody would hear. Documents are shared over the ranks by chunks and run `how.batch` at a time, longest
    first; one that has ended leaves the batch. Returns the `ledger` of `Score.tally`, the same on every rank.
    """
    starts, predictions = how.spans(docs)
    chunks = -(-predictions // how.chunk)
    mine = share_documents(chunks, rt.world)[rt.rank]
    adapters = DocumentAdapters(model, cfg, rt) if how.learn else None
    ledger, done = torch.zeros(2, len(docs.tokens) - 1, device=rt.device), 0
    model.requires_grad_(False)  # only adapters learn; spares the backward pass every weight gradient
    with rt.progress(int(chunks[mine].sum()), "evaluating") as bar:
        for group in np.split(mine, range(how.batch, len(mine), how.batch)):
            if adapters:
                adapters.reset(len(group))
            for c in range(chunks[group].max(initial=0)):
                # Longest first: the documents still running are the first rows, and of those the first have a next
                # chunk and learn; the others only score, without the cost of a backward pass.
                live, more = (int((chunks[group] > c + ahead).sum()) for ahead in (0, 1))
                learners = more if how.learn else 0
                for rows in (slice(0, learners), slice(learners, live)):
                    if len(group[rows]):
                        batch = gather_chunk(docs.tokens, starts[group], predictions[group], rows, c, how, rt)
                        losses = score_then_learn(model, batch, adapters, rows.stop == learners)
                        entry = torch.stack((losses, torch.ones_like(losses))) * batch.live
                        ledger.index_add_(1, batch.positions.flatten(), entry.flatten(1))
                done += live - more
                if bar.update(live):  # only when just redrawn, so that the device is seldom asked, and never in silence
                    bits, count = ledger[0].sum().item() / math.log(2), (ledger[1] * docs.bytes).sum().item()
                    bar.set_postfix_str(f"documents:{done} bpb:{bits / count:.4f}", refresh=False)
    model.requires_grad_(True)
    return rt.sum(ledger)


def evaluate(model: GPT, docs: Documents, how: Condition, cfg: Config, rt: Runtime) -> Score:
    """The score of the whole validation stream under one condition, the same on every rank."""
    return Score.tally(fill_ledger(model, docs, how, cfg, rt), docs, how, cfg.ttt_chunk_size)


# ==== Audits: what makes a score worth believing ======================================================================


def audit_bytes(docs: Documents, table: ByteTable, tokenizer: SentencePieceProcessor, rt: Runtime) -> None:
    """Compare the bytes counted in up to 256 documents, evenly spread, with the text that the tokenizer decodes.

    `UserError` where they differ, naming the first piece that is counted wrong. Nothing is taken from the table: pieces
    are decoded, behind an anchor, since the decoder drops spaces at the start of a text. A space that opens a document
    or follows a control piece is no text. Byte pieces are counted apart, since they need not be valid UTF-8.
    """
    ids = range(tokenizer.vocab_size())
    silent = [tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i) for i in ids]
    text, byte = ~np.array(silent), np.array([tokenizer.is_byte(i) for i in ids])
    anchor = next(i for i in np.flatnonzero(text & ~byte).tolist() if tokenizer.decode([i]).strip())

    def spell_out(pieces: list[int]) -> str:
        return tokenizer.decode([anchor, *pieces])[len(tokenizer.decode([anchor])) :]

    opening = np.array([text[i] and not byte[i] and spell_out([i]).startswith(" ") for i in ids])
    picks, counted, spelled = np.unique(np.linspace(0, len(docs.starts) - 1, 256).astype(np.int64)), 0, 0
    for begin, end in zip(docs.starts[picks], docs.starts[picks] + docs.predictions[picks], strict=True):
        pieces = docs.tokens[begin : end + 1].cpu().numpy()  # the first is the document's BOS: no target, no text
        plain, dropped = pieces[text[pieces] & ~byte[pieces]], opening[pieces[1:]] & ~text[pieces[:-1]]
        spelled += len(spell_out(plain.tolist()).encode()) + int(byte[pieces].sum()) - int(dropped.sum())
        counted += int(docs.bytes[begin:end].sum())
        if counted != spelled:
            sizes = {i: 1 if byte[i] else text[i] * len(spell_out([i]).encode()) for i in pieces.tolist()}
            wrong = [i for i, size in sizes.items() if size != table.base[i] + table.leading_space[i]]
            cause = f"piece {tokenizer.id_to_piece(wrong[0])!r}" if wrong else "how pieces join"
            found = f"{counted} bytes were counted where the decoded text has {spelled}, because of {cause}"
            raise UserError(f"audit bytes: up to token {end} {found}; no bpb is right; take another tokenizer")
    rt.log(f"audit bytes: documents:{len(picks)} of:{len(docs.starts)} table_bytes:{counted} text_bytes:{spelled} PASS")


def audit_causality(model: GPT, docs: Documents, how: Condition, cfg: Config, rt: Runtime) -> str:
    """Score three documents twice; the second time all tokens of one and those after a cut in the others are random.

    What precedes a cut must score the same to the last bit (on GPUs, within `Runtime.noise`), else `UserError`: it saw
    a later token or another document. The first document, two chunks longer than a window, has the random one beside
    it; the third, of two chunks, runs after both, where it would meet what they left behind. Cuts fall inside the last
    chunk that is learned from, so that learning before scoring shows (unless chunks are single tokens). Every rank does
    this by itself. Returns what was compared.
    """
    picks = np.resize(np.argsort(-docs.predictions, kind="stable")[:3], 3)
    long = how.window // how.chunk + 2
    predictions = np.minimum(docs.predictions[picks], np.array([long, long, 2]) * how.chunk)
    starts = np.cumsum(predictions + 1) - predictions - 1
    where = np.concatenate([docs.starts[d] + np.arange(n + 1) for d, n in zip(picks, predictions, strict=True)])
    tokens, kept = docs.tokens[rt.upload(where)], np.zeros(len(where), dtype=bool)
    for start, n in zip(starts[::2], predictions[::2], strict=True):
        lesson = (n - 1) // how.chunk - 1  # the last chunk that is learned from, if any
        cut = lesson * how.chunk + (how.chunk + 1) // 2 if lesson >= 0 else n // 2
        kept[start : start + cut + 1] = True
    noise = np.random.default_rng(cfg.seed).integers(cfg.vocab_size, size=len(where))
    altered = torch.where(rt.upload(kept), tokens, rt.upload(noise).int())
    compared = rt.upload(kept[:-1] & kept[1:])  # position p predicts token p + 1 from token p
    alone = replace(rt, rank=0, world=1, log_path=None)
    few = (replace(docs, tokens=version, starts=starts, predictions=predictions) for version in (tokens, altered))
    how = replace(how, batch=2, isolated=True)
    once, again = (fill_ledger(model, version, how, cfg, alone)[0][compared] for version in few)
    moved = (once - again).abs().max().item() if len(once) else 0.0
    if not moved <= rt.noise:  # not a number is no agreement either
        found = f"later tokens or other documents moved scores by up to {moved:g} nats"
        raise UserError(f"audit causality: {found}; expected no change: this evaluation leaks, its score is void")
    return f"documents:{len(set(picks))} compared:{len(once)}"


# ==== Training ========================================================================================================


def compile_forward(model: GPT, cfg: Config, rt: Runtime) -> Callable[[Tensor, Tensor], Tensor]:
    """The model's forward, compiled if COMPILE says so and the compiler manages on every rank; else the model itself.

    COMPILE=auto compiles on CUDA, and on CPUs for trainings of some length: on two cores it takes a minute and then
    saves a quarter of every step (records/NOTES.md). Runs once forward and backward on zeros, so that neither the
    compiler's time nor its failure falls into training. Evaluations never run compiled code, so that a score is the
    same whether or not the run that prints it could compile.
    """
    long = (cfg.max_wallclock_seconds or math.inf) >= 120 and cfg.iterations >= 200
    if cfg.compile == "0" or (cfg.compile == "auto" and rt.device.type == "cpu" and not long):
        return model
    rt.log("compile:started")
    began, failure = rt.seconds(), ""
    forward = torch.compile(model, dynamic=False, fullgraph=True)
    rows = cfg.train_batch_tokens // (rt.world * cfg.grad_accum_steps * cfg.train_seq_len)
    x = torch.zeros(rows, cfg.train_seq_len, dtype=torch.int64, device=rt.device)
    try:
        forward(x, x).mean().backward()
    except Exception as error:  # no C++ compiler, an unsupported operator: eager trains the same way, slower
        failure = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    model.zero_grad(set_to_none=True)
    if rt.sum(torch.tensor(float(bool(failure)), device=rt.device)).item():
        rt.log(f"compile:failed ({failure or 'on another rank'}); running eager")
        return model
    rt.log(f"compile:done time:{rt.seconds() - began:.1f}s")
    return forward


class Trainer:
    """What changes while training: weights, optimizers, place in the token stream, step, milliseconds spent."""

    def __init__(self, model: GPT, forward: Callable, stream: TokenStream, cfg: Config, rt: Runtime) -> None:
        self.model, self.forward, self.stream, self.cfg, self.rt = model, forward, stream, cfg, rt
        self.step, self.elapsed_ms, self.mark = 0, 0.0, 0.0
        self.params = {name: p for name, p in model.named_parameters() if p.numel()}  # one layer: no skip weights
        # Step and place of the first gradient or weight that is not finite, as one number: on the device, seldom read.
        self.fault = self.no_fault = torch.tensor(2**62, device=rt.device)
        self.optimizers = build_optimizers(model, cfg, rt)

    def train_step(self) -> Tensor:
        """One optimizer step over TRAIN_BATCH_TOKENS. Returns this rank's mean loss, () fp32, still on the device."""
        cfg, total = self.cfg, torch.zeros((), device=self.rt.device)
        for _ in range(cfg.grad_accum_steps):
            loss = self.forward(*self.stream.next_batch(cfg, self.rt)).mean() / cfg.grad_accum_steps
            loss.backward()
            total += loss.detach()
        grads = [p.grad for p in self.params.values()]
        self.rt.average(grads)
        if cfg.grad_clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip_norm)
        scale = lr_scale(self.step, self.elapsed_ms, cfg)
        self.optimizers[0].param_groups[0]["momentum"] = muon_momentum(self.step, cfg)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
            optimizer.step()
        norms = torch.stack([norm.float() for norm in torch._foreach_norm([*grads, *self.params.values()])])
        place = self.step * len(norms) + torch.arange(len(norms), device=self.rt.device)
        self.fault = torch.minimum(self.fault, torch.where(norms.isfinite(), self.no_fault, place).min())
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def refuse_faults(self) -> None:
        """`AgreedError` if a gradient or a weight has not been finite; a loss that is not makes such gradients."""
        if (fault := int(self.fault)) < int(self.no_fault):
            what = [f"the gradient of {name}" for name in self.params] + [f"the weight {name}" for name in self.params]
            step, place = divmod(fault, len(what))
            lost = f"the last good state is that after step {step}; nothing was exported"
            raise AgreedError(f"step {step + 1}: {what[place]} is not finite; {lost}; lower the learning rates")

    def warm_up(self) -> None:
        """WARMUP_STEPS real steps, which prime allocators and kernels; then everything goes back to the start."""
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for _ in range(self.cfg.warmup_steps):
            self.train_step()
        self.model.load_state_dict(weights)
        self.optimizers = build_optimizers(self.model, self.cfg, self.rt)
        self.stream.position, self.step, self.fault = 0, 0, self.no_fault

    def tick(self, now: float) -> None:
        """Count the time since the last tick as training time, by rank 0's clock on every rank."""
        self.elapsed_ms, self.mark = self.rt.from_rank0(self.elapsed_ms + 1000 * (now - self.mark)), now

    def finished(self) -> bool:
        """Whether ITERATIONS are done or the wallclock cap is reached; the same on every rank."""
        cap = 1000 * self.cfg.max_wallclock_seconds
        return self.step >= self.cfg.iterations or (cap > 0 and self.elapsed_ms >= cap)

    def report(self, what: str) -> None:
        """Log `what` with step and time, in the form that existing tools read, unless the training has gone wrong."""
        self.refuse_faults()
        pace = f"train_time:{self.elapsed_ms:.0f}ms step_avg:{self.elapsed_ms / max(self.step, 1):.2f}ms"
        self.rt.log(f"step:{self.step}/{self.cfg.iterations} {what} {pace}")

    def show_pace(self, bar: tqdm) -> None:
        """Move the bar to the larger used share of the two budgets, with tokens per second."""
        seconds, cap = self.elapsed_ms / 1000, self.cfg.max_wallclock_seconds or math.inf
        bar.set_postfix_str(f"{self.step * self.cfg.train_batch_tokens / seconds:,.0f} tokens/s", refresh=False)
        bar.update(max(self.step / self.cfg.iterations, seconds / cap) - bar.n)


def train(trainer: Trainer, validate: Callable[[], Score]) -> None:
    """Train until ITERATIONS or MAX_WALLCLOCK_SECONDS, validating on the way; validation is outside the clock."""
    cfg, rt = trainer.cfg, trainer.rt
    trainer.warm_up()
    trainer.mark = rt.seconds()
    with rt.progress(1.0, "training") as bar:
        while not trainer.finished():
            if cfg.val_loss_every and trainer.step % cfg.val_loss_every == 0:
                trainer.tick(rt.seconds())
                trainer.refuse_faults()
                trainer.report(str(validate()))
                trainer.mark = rt.seconds()
            loss = trainer.train_step()
            trainer.tick(rt.seconds(wait=False))
            if trainer.step % 10 == 0:  # not more often, since it waits for the device
                trainer.refuse_faults()
            if cfg.train_log_every and (trainer.step <= 10 or trainer.step % cfg.train_log_every == 0):
                trainer.report(f"train_loss:{rt.sum(loss).item() / rt.world:.4f}")
            trainer.show_pace(bar)
    trainer.tick(rt.seconds())
    trainer.refuse_faults()
    if trainer.step < cfg.iterations:
        where = f"train_time:{trainer.elapsed_ms:.0f}ms step:{trainer.step}/{cfg.iterations}"
        rt.log(f"stopping_early: wallclock_cap {where}")


# ==== Main: the order of events =======================================================================================


@dataclass(frozen=True)
class Inputs:
    """What a run reads, checked before anything is compiled or trained."""

    cfg: Config  # with the model shape of MODEL_PATH, where that is given
    weights: dict[str, Tensor] | None
    stream: TokenStream  # empty under EVAL_ONLY
    docs: Documents


def load_inputs(cfg: Config, rt: Runtime) -> Inputs:
    """Read and check weights, tokenizer and shards. `UserError` for the first thing that is wrong."""
    weights = read_weights(cfg.model_path) if cfg.model_path else None
    if weights is not None:
        cfg = shape_from_weights(weights, cfg, cfg.model_path)
        check_config(cfg, rt.world)
    train = [] if cfg.eval_only else open_shards(cfg.data_path, "fineweb_train_*.bin")
    shards = open_shards(cfg.data_path, "fineweb_val_*.bin")
    val, tokenizer = np.concatenate(shards), load_tokenizer(cfg.tokenizer_path, cfg.vocab_size)
    for shard in (val, *train[rt.rank :: rt.world]):  # the ranks share the reading
        if (top := int(shard.max())) >= (most := cfg.vocab_size):
            raise UserError(f"{cfg.data_path}: token id {top}, expected ids below {most}; take its own tokenizer")
    table = ByteTable.build(tokenizer)
    docs = split_documents(val, tokenizer.bos_id(), cfg.max_val_docs, table, rt.device)
    rt.log(f"sha256 tokenizer:{sha256(Path(cfg.tokenizer_path).read_bytes())}")
    for shard in shards:
        path = Path(shard.filename)
        rt.log(f"sha256 val:{sha256(path.read_bytes())} {path.name}")
    audit_bytes(docs, table, tokenizer, rt)
    return Inputs(cfg, weights, TokenStream(train), docs)


def score_artifact(model: GPT, path: Path, inputs: Inputs, rt: Runtime) -> None:
    """Read the artifact back from disk and score it under every condition of EVAL; the record's final lines."""
    cfg, docs, scores, rungs = inputs.cfg, inputs.docs, {}, ladder(inputs.docs, inputs.cfg, rt)
    rt.together(lambda: load_weights(model, read_weights(path), path))
    report_artifact(path, rt)
    for name, how in ((name, rungs[name]) for name in cfg.eval):
        if how.learn or name == cfg.eval[-1]:
            began = rt.seconds()
            compared = rt.together(lambda how=how: audit_causality(model, docs, how, cfg, rt))
            spent = 1000 * (rt.seconds() - began)
            rt.log(f"audit causality: condition:{name} {compared} time:{spent:.0f}ms PASS")
        began = rt.seconds()
        score = scores[name] = evaluate(model, docs, how, cfg, rt)
        spent, (_, tokens, size) = 1000 * (rt.seconds() - began), score.totals
        delta, count = score.bpb - scores[cfg.eval[0]].bpb, len(np.unique(score.columns["doc"].clip(0)))
        counts, before = f"docs:{count} tokens:{tokens} bytes:{size}", int(docs.starts[0]) if how.isolated else 0
        after, targets = len(docs.tokens) - 1 - before - tokens, len(docs.tokens) - 1 + docs.beyond
        left_out = f"before_first_bos:{before} after_last_row:{after} beyond_max_val_docs:{docs.beyond}"
        rt.log(f"audit coverage: condition:{name} targets:{targets} scored_once:{tokens} {left_out} PASS")
        losses = f"val_loss:{score.loss:.6f} val_bpb:{score.bpb:.6f} delta_bpb:{delta:+.4f}"
        rt.log(f"ladder condition:{name} {losses} {counts} eval_time:{spent:.0f}ms")
        if how.final:
            rt.log(f"{how.final} {score} eval_time:{spent:.0f}ms")
        if name == "flat":
            rt.log(f"{how.final}_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
    if cfg.scores_path:
        path = Path(cfg.out_dir, cfg.scores_path)
        rt.together(lambda: write_scores(path, scores, rt))


def run(cfg: Config, rt: Runtime) -> None:
    """Load, train, export, score."""
    inputs = rt.together(lambda: load_inputs(cfg, rt))
    cfg, docs = inputs.cfg, inputs.docs
    rt.log(f"val_documents:{len(docs.starts)} predictions:{docs.predictions.sum()} documents_of_one_token:{docs.short}")
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, rt.dtype).to(rt.device)
    if inputs.weights is not None:
        rt.together(lambda: load_weights(model, inputs.weights, cfg.model_path))
    names = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "tie_embeddings")
    shape = " ".join(f"{name}:{getattr(cfg, name)}" for name in names)
    rt.log(f"model_params:{sum(p.numel() for p in model.parameters())} {shape}")
    artifact = Path(cfg.model_path)
    if not cfg.eval_only:
        trainer = Trainer(model, compile_forward(model, cfg, rt), inputs.stream, cfg, rt)
        flat = ladder(docs, cfg, rt)["flat"]
        train(trainer, lambda: evaluate(model, docs, flat, cfg, rt))
    if not cfg.eval_only or artifact.suffix != ".ptz":  # before any long evaluation: a finished training is never lost
        artifact = rt.together(lambda: export(model, cfg, rt))
    if not cfg.eval_only:
        trainer.report(str(evaluate(model, docs, flat, cfg, rt)))
    score_artifact(model, artifact, inputs, rt)


def main() -> int:
    """The program. Returns its exit status."""
    rt, status, agreed = None, 0, True
    try:
        cfg = read_config(os.environ)
        rt = Runtime.create(cfg, os.environ)
        run(cfg, rt)
    except (UserError, OSError) as error:
        status, agreed = 1, isinstance(error, AgreedError)
        if os.environ.get("RANK", "0") == "0" or not agreed:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if rt is not None:
            with contextlib.suppress(OSError):  # a full disk takes no last line
                rt.log(f"error: {error}", console=False)
    if agreed and dist.is_initialized():  # else another rank may be waiting for this one, and leaving would wait for it
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
