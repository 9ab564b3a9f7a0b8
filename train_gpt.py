#!/usr/bin/env python3
"""Train a small GPT on a time budget, pack it into 16 MB, and score it with test-time training.

    python train_gpt.py                                       one process, on a GPU if there is one
    torchrun --standalone --nproc_per_node=8 train_gpt.py     the full run on eight GPUs
    DEVICE=cpu torchrun --standalone --nproc_per_node=2 train_gpt.py      two CPU ranks (gloo)
    EVAL_ONLY=1 MODEL_PATH=final_model.int8.ptz python train_gpt.py       only score an artifact

Every `Config` field is an environment variable, in upper case. The metric is `val_bpb`, bits per
UTF-8 byte of the validation text; lower is better. The final `ladder` lines score the artifact, as
read back from disk, under each condition in EVAL. Under `ttt` and `stream` each document trains its
own LoRA adapters on text that is already scored, then discards them. A failed `audit` aborts the
run.

Bands, each using only those above it: config, runtime, log, data and bytes, model, optimizers,
adapters, evaluation, mixtures, calibration, artifact, audits, training, main.

Shapes in docstrings: B batch rows (sequences or documents), T input tokens, S scored positions,
D model dim, H query heads, G key/value heads, N head dim, R adapter rank, V vocabulary, C chunk
length, W window length, P adapter parameters per document, n tokens of a shard or stream,
K matrices in a batch. Losses are in nats.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import ctypes
import difflib
import fcntl
import functools
import gc
import io
import itertools
import json
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
import traceback
import uuid
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor, nn
from tqdm import tqdm

# ==== Config ======================================================================================
# Every setting, its default, and the values it accepts.

RUNGS = ("flat", "doc", "stride", "ttt", "stream", "stride+copy", "mix")
TARGETS = ("c_q", "c_k", "c_v", "attn.proj", "fc", "mlp.proj", "lm_head")
MAX_LAYERS = 300

# Presets override the defaults of `Config`. `cpu` was tuned on two cores (records/NOTES.md); `gpu`,
# for one card of 12 to 24 GB, was not: its steps are a quarter of the record's, so that there are more.
PRESETS = {
    "baseline": {},
    "gpu": {
        "max_wallclock_seconds": 3600.0,
        "train_batch_tokens": 131072,
        "max_val_docs": 5000,
        "checkpoint_every": 250,
    },
    "cpu": {
        "data_path": "./data/demo",
        "max_wallclock_seconds": 175.0,
        "calibration_seconds": 18.0,
        "num_layers": 4,
        "model_dim": 192,
        "num_heads": 3,
        "num_kv_heads": 1,
        "train_seq_len": 512,
        "train_batch_tokens": 2048,
        "grad_accum_steps": 2,
        "val_batch_size": 16384,
        "matrix_lr": 0.03,
        "scalar_lr": 0.02,
        "tied_embed_lr": 0.03,
        "warmup_steps": 1,
        "warmdown_iters": 600,
        "muon_momentum": 0.8,
        "muon_momentum_warmup_steps": 0,
        "val_loss_every": 0,
        "train_log_every": 50,
        "checkpoint_every": 100,
        "ttt_eval_seq_len": 512,
        "ttt_batch_size": 16,
    },
}


class UserError(ValueError):
    """An error that the user can fix: one line, no traceback, exit status 1.

    Raised on every rank (see `Runtime.together`) and printed by rank 0 only.
    """

    def __str__(self) -> str:
        # It may quote an untrusted file: drop terminal control characters.
        line = super().__str__()[:1500]
        return "".join(c if c.isprintable() else "?" for c in line)


def require(condition: Any, message: str):
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def setting(
    default: Any,
    help: str,
    least: float = 0,
    most: float = 1e18,
    choices: tuple = (),
    **roles: bool,
) -> Any:
    """A field of `Config`: its default, its help text, and the range or choices that it accepts.

    Roles: `decides`, the setting affects training, so it must match when a run is resumed;
    `travels`, the weights mean nothing without it, so every artifact holds it.
    """
    metadata = dict(help=help, least=least, most=most, choices=choices, **roles)
    return field(default=default, metadata=metadata)


decisive = functools.partial(setting, decides=True)
architectural = functools.partial(decisive, travels=True)


@dataclass(frozen=True)
class Config:
    """Every setting of a run. The defaults are the published record's."""

    # What to run, and where
    preset: str = setting(
        "auto", "auto: baseline on CUDA, else cpu", choices=("auto", "baseline", "gpu", "cpu")
    )
    device: str = setting("auto", "auto: cuda if available", choices=("auto", "cpu", "cuda"))
    dtype: str = setting(
        "auto",
        "compute dtype; auto: bfloat16 if natively supported",
        choices=("auto", "bfloat16", "float32"),
    )
    compile: str = setting(
        "auto", "torch.compile for training; auto: when it pays off", choices=("auto", "0", "1")
    )
    eval_only: bool = setting(False, "1: only score MODEL_PATH")
    model_path: str = setting("", "load weights and model shape from this .ptz or .pt file")
    data_path: str = setting("./data/datasets/fineweb10B_sp1024", "folder of shards")
    tokenizer_path: str = setting(
        "./data/tokenizers/fineweb_1024_bpe.model",
        "SentencePiece model that encoded the shards; unset: DATA_PATH/tokenizer.model if there",
    )
    out_dir: str = setting(".", "output folder; one run at a time")
    artifact_budget: int = setting(16_000_000, "maximum bytes, script + artifact", 1)
    run_id: str = setting("", "names log and checkpoints; empty: the resumed run's, else a uuid4")
    scores_path: str = setting("", "losses by chunk (.csv) or token (.npz), in OUT_DIR")
    resume: str = setting("", "checkpoint path, or auto: the newest of RUN_ID in OUT_DIR, if any")
    checkpoint_every: int = setting(
        0, "steps between checkpoints; 0: only at the end or when stopped"
    )
    rank_timeout_seconds: float = setting(600.0, "how long ranks wait for each other", 1, 1e6)
    # Warm-up, validation and logging
    warmup_steps: int = setting(20, "warm-up steps, undone before training", 0, 1e4)
    val_batch_size: int = setting(
        524288, "tokens per flat-evaluation step over all ranks, times GRAD_ACCUM_STEPS", 1
    )
    val_loss_every: int = setting(1000, "steps between validations; 0: only at the end")
    train_log_every: int = setting(200, "steps between train-loss lines; 0: none")
    max_val_docs: int = setting(0, "evaluate only the first N documents; 0: all")
    # Training
    seed: int = decisive(1337, "seed of the initial weights")
    iterations: int = decisive(20000, "maximum steps")
    max_wallclock_seconds: float = decisive(600.0, "training time limit; 0: none")
    calibration_seconds: float = setting(
        0.0, "kept of that limit for calibration, at most half; 0: 2 %; without a limit: its own"
    )
    warmdown_iters: int = decisive(1200, "final steps over which the learning rates decay to 0")
    train_batch_tokens: int = decisive(524288, "tokens per step, over all ranks", 1, 1e9)
    train_seq_len: int = decisive(1024, "tokens per row in training and flat evaluation", 1, 65536)
    grad_accum_steps: int = setting(
        0, "micro-steps per rank and step; 0: 8 (preset cpu: 2) / world size if whole, else 1"
    )
    # Model
    vocab_size: int = architectural(1024, "vocabulary size", 4, 65536)
    num_layers: int = architectural(9, "blocks", 1, MAX_LAYERS)
    model_dim: int = architectural(512, "residual width", 2, 65536)
    num_heads: int = architectural(8, "query heads", 1, 1000)
    num_kv_heads: int = architectural(4, "key/value heads", 1, 1000)
    mlp_mult: int = architectural(2, "MLP width / model width", 1, 1000)
    tie_embeddings: bool = architectural(True, "1: tie the head to the embedding")
    rope_base: float = architectural(10000.0, "base of the rotary frequencies", 1)
    logit_softcap: float = architectural(30.0, "soft cap on the logits", 1e-3)
    qk_gain_init: float = decisive(1.5, "initial query gain per head")
    tied_embed_init_std: float = decisive(0.005, "initial standard deviation of a tied embedding")
    # Optimizers
    embed_lr: float = decisive(0.6, "Adam learning rate, untied embedding")
    head_lr: float = decisive(0.008, "Adam learning rate, untied head")
    tied_embed_lr: float = decisive(0.05, "Adam learning rate, tied embedding")
    matrix_lr: float = decisive(0.04, "Muon learning rate")
    scalar_lr: float = decisive(0.04, "Adam learning rate, vectors and gains")
    muon_momentum: float = decisive(0.95, "Muon momentum after its warm-up", 0, 1)
    muon_momentum_warmup_start: float = decisive(0.85, "Muon momentum at step 0", 0, 1)
    muon_momentum_warmup_steps: int = decisive(500, "steps of momentum warm-up")
    muon_backend_steps: int = decisive(5, "Newton-Schulz iterations", 0, 100)
    beta1: float = decisive(0.9, "Adam", 0, 0.999999)
    beta2: float = decisive(0.95, "Adam", 0, 0.999999)
    adam_eps: float = decisive(1e-8, "Adam")
    grad_clip_norm: float = decisive(0.0, "gradient clipping by global norm; 0: none")
    # Evaluation and test-time training
    eval: tuple[str, ...] = setting(RUNGS, "evaluation conditions, in order", choices=RUNGS)
    ttt_lora_rank: int = setting(8, "ttt: adapter rank", 1, 1024)
    ttt_lora_lr: float = setting(0.01, "ttt: Adam learning rate")
    ttt_chunk_size: int = setting(256, "ttt: tokens scored, then trained on, per step", 1)
    ttt_eval_seq_len: int = setting(1024, "maximum context length", 1, 65536)
    ttt_batch_size: int = setting(64, "documents per batch", 1)
    ttt_stream_chunk: int = setting(32, "stream: tokens scored, then trained on, per step", 1)
    ttt_stream_lr: str = setting(
        "auto", "stream: initial Adam learning rate; auto: found on training text, see calibration"
    )
    ttt_stream_rank: int = setting(32, "stream: adapter rank", 1, 1024)
    ttt_stream_targets: tuple[str, ...] = setting(
        TARGETS[3:], "stream: projections that get adapters", choices=TARGETS
    )

    @property
    def training_seconds(self) -> float:
        """The time limit of training, without what is kept for calibration. inf: none."""
        cap = self.max_wallclock_seconds
        if not cap:
            return math.inf
        return cap - min(self.calibration_seconds or 0.02 * cap, cap / 2)


SETTINGS = {spec.name.upper(): spec for spec in fields(Config)}

PARSERS = {
    bool: lambda text: {"0": False, "1": True}[text],
    int: int,
    float: float,
    str: str,
    tuple: lambda text: tuple(text.split(",")),
}


def is_allowed(value: Any, spec: Any) -> bool:
    """Whether the `Config` field `spec` accepts this value."""
    choices = spec.metadata["choices"]
    if isinstance(value, tuple):
        return set(value) <= set(choices) and len(set(value)) == len(value)
    if choices:
        return value in choices
    if isinstance(value, str):
        return value.isprintable()
    return spec.metadata["least"] <= value <= spec.metadata["most"]


def describe_allowed(spec: Any) -> str:
    """The values that the `Config` field `spec` accepts, in words."""
    kind = type(spec.default)
    choices = ", ".join(spec.metadata["choices"])
    if kind is tuple:
        return f"some of {choices}, none twice"
    if choices:
        return f"one of {choices}"
    span = "from {least:g} to {most:g}".format_map(spec.metadata)
    words = {bool: "0 or 1", int: f"a whole number {span}", float: f"a number {span}", str: "text"}
    return words[kind]


def parse_setting(name: str, text: str, spec: Any) -> Any:
    """Parse `text` for the field `spec`. `UserError` says what was expected."""
    try:
        value = PARSERS[type(spec.default)](text)
        allowed = is_allowed(value, spec)
    except (ValueError, KeyError):
        allowed = False
    expected = describe_allowed(spec)
    require(allowed, f"{name}={text!r:.60}: expected {expected}; give such a value or unset it")
    return value


def read_count(env: Mapping, name: str, default: int) -> int:
    """An integer that torchrun sets. `UserError` if it is malformed."""
    return parse_setting(name, env.get(name, str(default)), setting(default, "", least=default))


def spell(value: Any) -> str:
    """A setting's value as text: the inverse of `parse_setting`."""
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, bool):
        return str(int(value))
    return str(value)


def spell_settings(cfg: Config, role: str = "") -> dict:
    """The settings that have this role, by default all, as text by environment variable."""
    chosen = {}
    for name, spec in SETTINGS.items():
        if not role or role in spec.metadata:
            chosen[name] = spell(getattr(cfg, spec.name))
    return chosen


def read_config(env: Mapping) -> Config:
    """Settings from the environment, else the preset's, else the defaults.

    Raises `UserError` for values that are invalid, alone or together.
    """
    given = {}
    for name, spec in SETTINGS.items():
        if name in env:
            given[spec.name] = parse_setting(name, env[name], spec)
    world = read_count(env, "WORLD_SIZE", 1)
    device = given.get("device", "auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    preset = given.get("preset", "auto")
    if preset == "auto":
        preset = "baseline" if device == "cuda" else "cpu"
    accum = given.get("grad_accum_steps")
    if not accum:
        # Split micro-steps over ranks, so that token order does not depend on the world size.
        micro_steps = PRESETS[preset].get("grad_accum_steps", 8)
        accum = micro_steps // world if micro_steps % world == 0 else 1
    resolved = {"device": device, "preset": preset, "grad_accum_steps": accum}
    cfg = Config(**PRESETS[preset] | given | resolved)
    beside = f"{cfg.data_path}/tokenizer.model"
    if "tokenizer_path" not in given and os.path.exists(beside):
        cfg = replace(cfg, tokenizer_path=beside)
    check_config(cfg, world)
    return cfg


def check_config(cfg: Config, world: int):
    """Raise `UserError` for settings that conflict."""
    file_name = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,180}"
    require(
        re.fullmatch(f"({file_name})?", cfg.run_id),
        f"RUN_ID={cfg.run_id!r:.80}: expected letters, digits, '.', '_' and '-', since it names"
        " files; rename it",
    )
    require(
        re.fullmatch(rf"({file_name}\.(csv|npz))?", cfg.scores_path),
        f"SCORES_PATH={cfg.scores_path!r:.80}: expected the name of a file in OUT_DIR, ending in"
        " .csv or .npz; rename it",
    )
    require(
        cfg.model_path or not cfg.eval_only,
        "EVAL_ONLY=1: found no MODEL_PATH, expected the .ptz or .pt file to score",
    )
    if cfg.ttt_stream_lr != "auto":
        parse_setting("TTT_STREAM_LR", cfg.ttt_stream_lr, setting(0.0, ""))
    window = cfg.ttt_eval_seq_len
    longest = max(cfg.ttt_chunk_size, cfg.ttt_stream_chunk)
    require(
        longest <= window,
        f"TTT_CHUNK_SIZE or TTT_STREAM_CHUNK={longest}: expected at most TTT_EVAL_SEQ_LEN={window}",
    )
    check_shape(cfg)
    unit = world * cfg.grad_accum_steps * cfg.train_seq_len
    nearest = max(1, round(cfg.train_batch_tokens / unit)) * unit
    require(
        cfg.eval_only or cfg.train_batch_tokens % unit == 0,
        f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: expected a multiple of {unit} (world size"
        f" {world} x GRAD_ACCUM_STEPS {cfg.grad_accum_steps} x TRAIN_SEQ_LEN"
        f" {cfg.train_seq_len}); the nearest is {nearest}",
    )


def check_shape(cfg: Config):
    """Raise `UserError` unless the head counts divide evenly."""
    require(
        cfg.model_dim % (2 * cfg.num_heads) == 0,
        f"MODEL_DIM={cfg.model_dim}: expected a multiple of twice NUM_HEADS={cfg.num_heads}, since"
        " every head needs an even dim",
    )
    require(
        cfg.num_heads % cfg.num_kv_heads == 0,
        f"NUM_HEADS={cfg.num_heads}: expected a multiple of NUM_KV_HEADS={cfg.num_kv_heads};"
        " change one of them",
    )


# ==== Runtime =====================================================================================
# Devices, ranks, clocks and signals: everything that depends on the machine.


class Stopped(BaseException):
    """A signal (args[0]) stops the run. Not an `Exception`, so that no handler swallows it."""


@dataclass
class Signals:
    """Handling of SIGINT, SIGTERM and SIGHUP. Signals that are ignored (nohup) stay ignored.

    The first one raises `Stopped`: at once, or at the end of a `deferred()` block. Training polls
    `number` after every step. Signals within a second count as one, since torchrun forwards a
    Ctrl-C that the ranks already got. A later signal kills the process.
    """

    number: int = 0  # the first signal received; 0: none
    heard_at: float = 0.0  # time.monotonic() of that signal
    is_deferred: bool = False

    def install(self):
        """Handle the signals from now on."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number: int, frame):
        """The handler. Python runs it in the main thread, between bytecodes."""
        now = time.monotonic()
        if not self.number:
            self.number = number
            self.heard_at = now
            if not self.is_deferred:
                raise Stopped(number)
        elif now - self.heard_at > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Delay `Stopped` until the block ends."""
        self.is_deferred = True
        try:
            yield
        finally:
            self.is_deferred = False
        if self.number:
            raise Stopped(self.number)


def choose_dtype(cfg: Config) -> torch.dtype:
    """The compute dtype. DTYPE=auto is bf16 if natively supported, else fp32."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    if cfg.device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        native = any(found.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def claim_device(cfg: Config, env: Mapping) -> torch.device:
    """The device of this rank. `UserError` if the machine has fewer GPUs than ranks."""
    if cfg.device == "cpu":
        return torch.device("cpu")
    ranks = read_count(env, "LOCAL_WORLD_SIZE", 1)
    gpus = torch.cuda.device_count()
    require(
        ranks <= gpus,
        f"DEVICE=cuda: {ranks} ranks on this machine, found {gpus} GPUs that PyTorch can use; start"
        " fewer ranks, or set DEVICE=cpu",
    )
    # Both are read when CUDA starts: the first lets `deterministic` work.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if cfg.preset == "gpu":
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    torch.set_num_threads(os.cpu_count() // ranks or 1)  # torchrun sets 1: slow to quantize
    device = torch.device("cuda", read_count(env, "LOCAL_RANK", 0))
    torch.cuda.set_device(device)
    return device


def join_ranks(cfg: Config, device: torch.device):
    """Join the process group. CPU tensors use gloo: exchanging errors never waits for a GPU."""
    eager = device if device.type == "cuda" else None  # NCCL connects now, not in the first step
    backend = "cpu:gloo,cuda:nccl" if eager else "gloo"
    timeout = timedelta(seconds=cfg.rank_timeout_seconds)
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if one_machine and os.path.exists("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's name need not resolve
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        # One key prefix per restart, or new ranks read the addresses of dead ones.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world,
            timeout=timeout,
            device_id=eager,
        )
    except (ValueError, RuntimeError) as error:
        raise ConnectionError(
            f"cannot join the process group ({error!r:.200}); start the ranks with torchrun"
        ) from None


def set_up_backends(device: torch.device):
    """Set the performance flags of PyTorch and malloc."""
    try:
        os.makedirs(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "."), exist_ok=True)
    except OSError:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]  # PyTorch would fail where it makes a first model
    if device.type == "cuda":
        # Flash attention only, so that a missing kernel fails loudly.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_math_sdp(False)
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        # Make glibc keep freed memory: returning it to the kernel costs a third of a step.
        mallopt(-4, 0)  # M_MMAP_MAX: never use mmap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never trim the heap


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Repeat every computation to the last bit. `RuntimeError` names an operation that cannot."""
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")


@dataclass
class Runtime:
    """Device, precision, ranks, clock and collectives of this process."""

    device: torch.device
    dtype: torch.dtype  # of the residual stream, matrix products and attention
    rank: int = 0
    world: int = 1
    signals: Signals = field(default_factory=Signals)

    @classmethod
    def create(cls, cfg: Config, env: Mapping) -> Runtime:
        """Choose the device, join the other ranks, set up the backends."""
        rank = read_count(env, "RANK", 0)
        world = read_count(env, "WORLD_SIZE", 1)
        device = claim_device(cfg, env)
        dtype = choose_dtype(cfg)
        if rank or "WORLD_SIZE" in env:
            join_ranks(cfg, device)
        set_up_backends(device)
        return cls(device, dtype, rank, world)

    def gather(self, value: Any) -> list[Any]:
        """All-gather any value: a list with one entry per rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable) -> Any:
        """Run work() on every rank. If one fails, all raise the first error as `UserError`."""
        result = None
        problem = ""
        try:
            result = work()
        except (UserError, OSError) as error:
            problem = str(error) or repr(error)
        problems = self.gather(problem)
        for rank, line in enumerate(problems):
            everywhere = problems == [line] * self.world
            require(not line, line if everywhere else f"rank {rank}: {line}")
        return result

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce (sum) a tensor in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def average(self, tensors: list):
        """Average the tensors over the ranks, in place: one flat all-reduce."""
        if self.world == 1:
            return
        flat = torch.cat([tensor.flatten().float() for tensor in tensors])
        means = self.sum(flat).div_(self.world).split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))

    def from_rank0(self, work: Callable) -> Any:
        """Run work() on rank 0 and broadcast its result. All ranks raise its error."""
        box = [self.together(lambda: None if self.rank else work())]
        if self.world > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]

    def maximum(self, *values: float) -> list[float]:
        """All-reduce (max) a few numbers."""
        largest = torch.tensor(values, dtype=torch.float64, device="cpu")
        if self.world > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def upload(self, array: ndarray) -> Tensor:
        """Copy an array to the device, asynchronously on CUDA."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def record(self) -> Any:
        """An event that ends with what the device was given so far. On CPUs None: it is done."""
        if self.device.type == "cpu":
            return None
        return torch.cuda.current_stream().record_event()

    def seconds(self) -> float:
        """The clock, after a device synchronization."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_memory(self) -> int:
        """The most memory in use so far, in bytes: of this rank's GPU, or of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def progress(self, total: float, what: str) -> tqdm:
        """A progress bar, on rank 0's terminal only, for what takes more than a second."""
        layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        # A closed stderr is None.
        shown = self.rank == 0 and sys.stderr is not None and sys.stderr.isatty()
        return tqdm(None, what, total, False, disable=not shown, delay=1, bar_format=layout)


# ==== Log =========================================================================================
# The log, and how files are read and written.


@functools.cache
def source_code() -> bytes:
    """This file's own text. It heads every log and counts towards the artifact's budget."""
    return Path(__file__).read_bytes()


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return sha256(data).hexdigest()


def read_file(path: Path) -> bytes:
    """The bytes of a regular file. `UserError` otherwise: a pipe might never end."""
    require(path.is_file(), f"{path}: expected a regular file, found none")
    return path.read_bytes()


def write_atomically(path: Path, data: bytes | memoryview):
    """Write `data` to `path` atomically: temporary file, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path}: {error.strerror}; not written, any earlier file is unchanged",
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def torch_bytes(content: Any) -> memoryview:
    """The bytes that torch.save writes for `content`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


@contextlib.contextmanager
def refusing(path: str | Path, expected: str) -> Iterator[None]:
    """Turn any error while using `path`, an untrusted file, into a `UserError`."""
    try:
        yield
    except Exception as error:
        found = str(error) if isinstance(error, UserError) else f"{error!r:.300}"
        raise UserError(f"{path}: unusable ({found:.900}); expected {expected}") from None


def find_checkpoints(cfg: Config, run_id: str) -> list[Path]:
    """The checkpoints of a run ("*": of any run) in OUT_DIR, newest first."""
    pattern = f"{run_id}.step{9 * '[0-9]'}.pt"
    found = Path(cfg.out_dir, "checkpoints").glob(pattern)
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def launch_command(env: Mapping, **changes: Any) -> str:
    """The shell command that repeats this run, with `changes` to its settings."""
    settings = {name: env[name] for name in SETTINGS if name in env} | changes
    words = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    launcher = "python"
    if "WORLD_SIZE" in env:
        launcher = f"torchrun --standalone --nproc_per_node={env['WORLD_SIZE']}"
    return " ".join([*words, launcher, "train_gpt.py"])


def describe_hardware(device: str) -> str:
    """One line about the CPU or the GPUs."""
    if device == "cuda":
        gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        return f"{gpus}, CUDA {torch.version.cuda}"
    # ARM names no model: there the architecture has to do.
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    names.append(os.uname().machine)
    return f"{names[0]}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def choose_run_id(cfg: Config) -> str:
    """RUN_ID if set; else the newest checkpoint's run if RESUME=auto; else a UUID."""
    if cfg.run_id:
        return cfg.run_id
    found = []
    if cfg.resume == "auto" and not cfg.eval_only:
        found = find_checkpoints(cfg, "*")
    return found[0].name.rsplit(".", 2)[0] if found else str(uuid.uuid4())


@dataclass
class RunLog:
    """Writes to the console and, after `open`, to logs/{RUN_ID}.txt. Rank 0 only."""

    rank: int = 0
    run_id: str = ""
    path: Path | None = None
    suffix: str = ""  # " partial" if MAX_VAL_DOCS is set: not a full score
    artifact: Path | None = None  # what is scored, once it is there
    artifact_hash: str = ""  # its SHA-256
    has_gaps: bool = False

    def line(self, text: str, suffix: bool = True):
        """Write to the log and to standard output."""
        if self.rank:
            return
        if suffix:
            text += self.suffix
        with self.surviving(), tqdm.external_write_mode():  # clears progress bars
            print(text, flush=True)
        self.append(text + "\n")

    @contextlib.contextmanager
    def surviving(self) -> Iterator[None]:
        """Don't let a full disk or a closed pipe end the run."""
        try:
            yield
        except OSError as error:
            if not self.has_gaps:
                self.has_gaps = True
                warning = f"warning: {error.strerror}; the run goes on, its log has gaps"
                with contextlib.suppress(OSError):
                    print(warning, file=sys.stderr)

    def append(self, text: str):
        """Write to the file only, once it is open."""
        if self.path:
            with self.surviving(), self.path.open("a", encoding="utf-8") as file:
                file.write(text)

    def open(self, cfg: Config, rt: Runtime, env: Mapping):
        """Lock OUT_DIR and start the log, or a new attempt in it."""
        self.claim_folder(Path(cfg.out_dir))
        if cfg.max_val_docs:
            self.suffix = " partial"
        attempt = self.begin_attempt(cfg)
        self.write_header(cfg, rt, env, attempt)

    def claim_folder(self, folder: Path):
        """Create the folders; lock OUT_DIR until this process exits or crashes."""
        with refusing(f"OUT_DIR={folder}", "a folder to write in; choose another"):
            for name in ("", "logs", "checkpoints"):
                (folder / name).mkdir(parents=True, exist_ok=True)
        self.lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"OUT_DIR={folder}: another run is writing there; wait, or choose another OUT_DIR"
            ) from None
        except OSError:
            pass  # no locks on this file system: go on

    def begin_attempt(self, cfg: Config) -> int:
        """Start a new log, or return the number of the next attempt in it. `UserError` if refused."""
        path = Path(cfg.out_dir, "logs", f"{self.run_id}.txt")
        if not path.exists():
            rule = "=" * 100
            machine = describe_hardware(cfg.device)
            if cfg.device == "cuda":
                machine += "\n" + subprocess.getoutput("nvidia-smi")
            versions = f"Running Python {sys.version}\nRunning PyTorch {torch.__version__}"
            head = f"\n{rule}\n{versions}\n{machine}\n{rule}\n"
            write_atomically(path, source_code() + head.encode())
            self.path = path
            return 1
        require(
            cfg.resume,
            f"RUN_ID={self.run_id}: found {path}, the log of an earlier run; choose another RUN_ID,"
            " or resume with RESUME=auto",
        )
        self.path = path  # only now, so that a refusal is not written into the earlier run's log
        text = path.read_text(encoding="utf-8", errors="replace")
        return text.count("\nattempt:") + 1

    def write_header(self, cfg: Config, rt: Runtime, env: Mapping, attempt: int):
        """Log the command, settings, versions, machine and hash of the script."""
        values = spell_settings(cfg)
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in values.items())
        lines = [
            "",  # the last attempt may have died in mid-line
            f"attempt:{attempt}",
            time.strftime("started:%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            f"command: {launch_command(env)}",
            f"config: {settings}",
            f"versions: python:{sys.version.split()[0]} torch:{torch.__version__}"
            f" numpy:{np.__version__} sentencepiece:{spm.__version__}",
            f"hardware: {describe_hardware(cfg.device)}",
        ]
        self.append("\n".join(lines) + "\n")
        self.line(f"preset:{cfg.preset} device:{rt.device} world_size:{rt.world} dtype:{rt.dtype}")
        if rt.device.type == "cuda" and rt.dtype == torch.float32:
            self.line("attention: plain, since flash has no fp32: slower, and takes more memory")
        self.line(f"data:{cfg.data_path} tokenizer:{cfg.tokenizer_path} log:{self.path}")
        self.line(f"sha256 script:{digest(source_code())}")
        # Skip one-word names: other programs use them, too.
        ours = [name for name in values if "_" in name]
        for name in sorted(filter(str.isprintable, env.keys() - values.keys())):
            for meant in difflib.get_close_matches(name, ours, 1, 0.85):
                self.line(f"warning: unknown setting {name}; did you mean {meant}?")


# ==== Data and bytes ==============================================================================
# Shards, the training stream, the validation documents, and bytes per token.

FULL_VALIDATION = (50_000, 62_021_846)  # documents and tokens: what the game scores


def load_tokenizer(path: str, vocab_size: int) -> spm.SentencePieceProcessor:
    """The SentencePiece model at `path`. `UserError` if damaged or of another vocabulary."""
    expected = f"the SentencePiece .model that made the shards, with BOS and {vocab_size} pieces"
    with refusing(f"TOKENIZER_PATH={path}", f"{expected}; correct the path or VOCAB_SIZE"):
        proto = read_file(Path(path))
        require(proto, "an empty file")
        tokenizer = spm.SentencePieceProcessor(model_proto=proto)
        pieces = tokenizer.vocab_size()
        bos = tokenizer.bos_id()
        require(pieces == vocab_size and bos >= 0, f"found {pieces} pieces, BOS id {bos}")
        tokenizer.id_to_piece(list(range(pieces)))  # raises on invalid UTF-8
    return tokenizer


class ByteTable(NamedTuple):
    """UTF-8 bytes per target token. `▁` in a piece is a space."""

    base: ndarray  # (V,) int64, bytes without a leading space; byte-fallback pieces: 1
    leading_space: ndarray  # (V,) bool: starts with `▁`, counted only after text
    is_text: ndarray  # (V,) bool; control, unknown and unused pieces stand for 0 bytes

    @classmethod
    def build(cls, tokenizer: spm.SentencePieceProcessor) -> ByteTable:
        """The table of a tokenizer. `UserError` if it has no piece for a space on its own."""
        ids = list(range(tokenizer.vocab_size()))
        pieces = tokenizer.id_to_piece(ids)
        is_byte = np.array(tokenizer.is_byte(ids))
        silent = np.array(tokenizer.is_control(ids)) | tokenizer.is_unknown(ids)
        is_text = ~(silent | tokenizer.is_unused(ids))
        # Without a piece '▁', byte fallback spells it as three bytes, and all three would count.
        require(
            is_text[tokenizer.piece_to_id("▁")],
            "TOKENIZER_PATH: found no piece '▁', expected one, else spaces miscount; train it with one",
        )
        texts = [piece.removeprefix("▁").replace("▁", " ") for piece in pieces]
        sizes = np.array([len(text.encode()) for text in texts])
        spaced = np.array([piece.startswith("▁") for piece in pieces])
        return cls(np.where(is_byte, 1, sizes) * is_text, spaced & is_text, is_text)

    def count(self, previous: ndarray, target: ndarray) -> ndarray:
        """Bytes of each `target`, given the token before: ids of any shape -> int64."""
        return self.base[target] + (self.leading_space[target] & self.is_text[previous])


def open_shard(path: Path) -> ndarray:
    """The tokens of a shard, memory-mapped: (n,) uint16. `UserError` if its header is wrong."""
    size = path.stat().st_size if path.is_file() else 0
    header = [0, 0, 0]
    if size >= 1024:
        header = np.fromfile(path, dtype="<i4", count=3).tolist()
    magic, version = header[:2]
    count = header[2]
    require(
        (magic, version, size) == (20240520, 1, 1024 + 2 * count) and count > 0,
        f"{path}: found {size} bytes, magic {magic}, version {version}, {count} tokens; expected"
        " magic 20240520, version 1 and 1024 + 2 x tokens bytes; see data/README.md",
    )
    return np.memmap(path, dtype="<u2", mode="r", offset=1024, shape=(count,))


def open_shards(folder: str, split: str, required: bool = True) -> list[ndarray]:
    """All shards of the split, "train" or "val", in order. Checks their numbers and headers.

    `UserError` if one is damaged or missing, or if there are none although they are `required`.
    """
    count = len(list(Path(folder).glob(f"fineweb_{split}_{6 * '[0-9]'}.bin")))
    numbers = range(max(count, int(required)))
    paths = [Path(folder, f"fineweb_{split}_{number:06d}.bin") for number in numbers]
    missing = [path.name for path in paths if not path.exists()]
    require(
        not missing,
        f"DATA_PATH={folder}: found no {', '.join(missing[:5])}; expected shards from 000000 without"
        " gaps; data/README.md says how to make or fetch them",
    )
    return [open_shard(path) for path in paths]


def fingerprint(shard: ndarray) -> str:
    """SHA-256 of a shard's length, first MB and last MB: a start must not read 16 GB."""
    ends = np.append(shard[: 2**19], shard[-(2**19) :])
    return digest(b"%d" % len(shard) + ends.tobytes())


def check_ids(tokens: ndarray, shard: ndarray, vocab_size: int):
    """Raise `OSError` for an id beyond the vocabulary: in training a rank may find it alone."""
    top = tokens.max()
    if top >= vocab_size:
        raise OSError(
            f"{shard.filename}: token id {top}, expected at most {vocab_size - 1}; use its own"
            " tokenizer"
        )


class TokenStream:
    """All training shards as one endless stream. `position` is its only state."""

    def __init__(self, shards: list[ndarray], vocab_size: int):
        self.shards = shards
        self.vocab_size = vocab_size
        self.position = 0
        self.deadline = math.inf  # of time.perf_counter(): when reading must end
        # Where each shard begins; the last entry is the total length.
        self.begins = [0, *itertools.accumulate(map(len, shards))]

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.perf_counter()

    def read(self, start: int, count: int) -> ndarray:
        """Tokens [start, start + count) of the endless stream: (count,) int64. -1 is its last."""
        parts = []
        while count:
            start %= self.begins[-1]
            number = bisect.bisect(self.begins, start) - 1
            shard = self.shards[number]
            part = shard[start - self.begins[number] :][:count]
            check_ids(part, shard, self.vocab_size)
            parts.append(part)
            start += len(part)
            count -= len(part)
        return np.concatenate(parts).astype(np.int64)

    def next_batch(self, cfg: Config, rt: Runtime) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of the next micro-step, each (B, T)."""
        # A micro-step reads span * world tokens; rank r takes the r-th span.
        span = cfg.train_batch_tokens // (rt.world * cfg.grad_accum_steps) + 1
        tokens = rt.upload(self.read(self.position + rt.rank * span, span))
        self.position += span * rt.world
        inputs = tokens[:-1].view(-1, cfg.train_seq_len)
        return inputs, tokens[1:].view(-1, cfg.train_seq_len)


@dataclass(frozen=True)
class Documents:
    """The validation stream and its documents, in stream order. Position p predicts token p + 1."""

    tokens: Tensor  # (n,) int32
    bytes: ndarray  # (n - 1,) int32, UTF-8 bytes of each position's target
    starts: ndarray  # (docs,) int64, position of each document's BOS, its first input
    predictions: ndarray  # (docs,) int64, number of targets (>= 1), counting the next BOS
    beyond_limit: int = 0  # targets dropped by MAX_VAL_DOCS


def split_documents(
    stream: ndarray, bos: int, limit: int, table: ByteTable, device: torch.device
) -> Documents:
    """Cut the validation stream (n,) at BOS; keep the first `limit` documents, 0: all.

    Raises `UserError` if there is nothing to predict.
    """
    total = len(stream)
    starts = np.flatnonzero(stream == bos)
    if 0 < limit < len(starts):
        stream = stream[: starts[limit] + 1]  # up to the BOS that closes the last document
        starts = starts[:limit]
    predictions = np.diff(starts, append=len(stream) - 1)
    sizes = table.count(stream[:-1], stream[1:])
    kept = predictions > 0
    require(
        kept.any() and sizes[starts[0] :].any(),
        f"validation shards: found {len(starts)} BOS (id {bos}) and {sizes.sum()} bytes of text in"
        f" {total} tokens: nothing to predict; expected BOS, then text; see data/README.md",
    )
    return Documents(
        tokens=torch.from_numpy(stream.astype(np.int32)).to(device),
        bytes=sizes.astype(np.int32),
        starts=starts[kept],
        predictions=predictions[kept],
        beyond_limit=total - len(stream),
    )


# ==== Model =======================================================================================
# The record's transformer, its optional LoRA adapters and its KV cache.


class Role(NamedTuple):
    """How a parameter is trained: its optimizer and its learning-rate setting."""

    optimizer: str  # "muon" or "adam"
    rate: str  # a field of `Config`


MATRIX = Role("muon", "matrix_lr")
SCALAR = Role("adam", "scalar_lr")


def parameter(values: Tensor, role: Role = SCALAR) -> nn.Parameter:
    """A parameter tagged with its `Role`; by default Adam at SCALAR_LR."""
    created = nn.Parameter(values)
    created.role = role
    return created


class LoRA(NamedTuple):
    """A low-rank update of one projection, one per batch row: adds x A^T B^T.

    Source: https://arxiv.org/abs/2106.09685.
    """

    a: Tensor  # (B, R, in)
    b: Tensor  # (B, out, R)


class BlockLoRA(NamedTuple):
    """The updates of one block's projections; None: that projection has none."""

    c_q: LoRA | None = None
    c_k: LoRA | None = None
    c_v: LoRA | None = None
    attn_proj: LoRA | None = None
    fc: LoRA | None = None
    mlp_proj: LoRA | None = None


class Adapters(NamedTuple):
    """The updates of a whole model, one `BlockLoRA` per block; by default none."""

    blocks: Sequence = (BlockLoRA(),) * MAX_LAYERS
    lm_head: LoRA | None = None


NO_ADAPTERS = Adapters()


class Linear(nn.Linear):
    """A projection without bias: fp32 weights, cast to its input's dtype when used."""

    def __init__(self, in_dim: int, out_dim: int, zero_init: bool = False, role: Role = MATRIX):
        super().__init__(in_dim, out_dim, bias=False)
        self.weight.role = role
        if zero_init:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, lora: LoRA | None = None) -> Tensor:
        """x W^T plus each row's LoRA: (B, T, in) -> (B, T, out), all in the dtype of x."""
        out = F.linear(x, self.weight.to(x.dtype))
        if lora is None:
            return out
        return torch.baddbmm(out, torch.bmm(x, lora.a.mT), lora.b.mT)


class TiedHead(nn.Module):
    """Output head tied to the embedding, which owns the weight."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.embedding = (embedding,)  # a tuple hides it from the state dict

    @property
    def weight(self) -> nn.Parameter:
        """(V, D)."""
        return self.embedding[0].weight

    forward = Linear.forward  # of this weight: (B, T, D) -> (B, T, V)


def rms_norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension, without a weight, in the dtype of x."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves convention: (B, heads, T, N) with tables (..., T, N/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 256) -> Tensor:
    """softmax(q k^T / sqrt(N)) v under a causal mask; G divides H.

    q (B, H, T, N), k and v (B, G, T, N) -> (B, H, T, N).
    """
    if q.is_cuda and q.dtype != torch.float32:  # flash attention knows no fp32
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # On CPUs plain matmuls beat the flash kernel. Blocks of queries see only the keys up to their own
    # end, which saves about half the work (records/NOTES.md).
    _, kv_heads, length, dim = k.shape
    # Query heads that use the same keys share one product: (B * G, H / G, T, N).
    grouped = (q * dim**-0.5).unflatten(1, (kv_heads, -1)).flatten(0, 1)
    k = k.flatten(0, 1)
    v = v.flatten(0, 1)
    outputs = []
    for begin in range(0, length, block):
        end = min(begin + block, length)
        future = q.new_full((end - begin, end), -math.inf)
        queries = grouped[:, :, begin:end]
        keys = k[:, :end]
        mask = future.triu(begin + 1).repeat(queries.size(1), 1)
        scores = torch.baddbmm(mask, queries.flatten(1, 2), keys.mT)
        out = scores.softmax(-1) @ v[:, :end]
        outputs.append(out.view_as(queries))
    return torch.cat(outputs, dim=2).view(q.shape)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(N) + mask) v of a chunk and its cache.

    q (B, H, C, N), k and v (B, G, W + C, N), mask (B, C, W + C) -> (B, H, C, N).
    """
    batch, kv_heads, _, dim = k.shape
    queries = (q * dim**-0.5).reshape(batch, kv_heads, -1, dim)
    scores = (queries @ k.mT).unflatten(2, (-1, mask.size(1)))
    weights = (scores + mask[:, None, None]).softmax(-1)
    return (weights.flatten(2, 3) @ v).view(q.shape)


@dataclass
class KVCache:
    """Keys and values of each row's last W tokens, for every layer.

    Entries are never recomputed. Without learning, scoring in chunks equals one pass per document
    under a banded mask: text older than W still reaches a token through the layers. Source:
    Transformer-XL, https://arxiv.org/abs/1901.02860.
    """

    rows: int
    window: int  # W
    chunk: int  # C
    rt: Runtime
    now: int = 0  # time in tokens; `positions` restart with each document

    def __post_init__(self):
        self.began = torch.zeros(self.rows, dtype=torch.int64, device=self.rt.device)
        self.past = {}  # keys and values of each layer in turn, (2, rows, G, W, N)

    def restart(self, rows: Tensor):
        """Start new documents in these rows: hide everything that was cached before."""
        self.began[rows] = self.now

    def advance(self, batch: int):
        """Set `positions` (batch, C) and `mask` (batch, C, W + C) for the next chunk."""
        began = self.began[:batch]
        times = torch.arange(self.now - self.window, self.now + self.chunk, device=began.device)
        queries = times[self.window :]
        age = queries[:, None] - times
        hidden = (age < 0) | (age >= self.window) | (times < began[:, None, None])
        self.mask = torch.where(hidden, -math.inf, 0.0).to(self.rt.dtype)
        self.positions = queries - began[:, None]
        self.now += self.chunk
        self.layer = 0  # the next to be extended

    def extend(self, new: Tensor) -> Tensor:
        """Append the keys and values of a chunk, `new` (2, batch, G, C, N), to the next layer.

        Returns those that the chunk's queries may see, (2, batch, G, W + C, N); `mask` hides what
        belongs to an earlier document.
        """
        _, batch, heads, _, dim = new.shape
        layer = self.layer
        self.layer += 1
        if layer not in self.past:
            self.past[layer] = new.new_zeros(2, self.rows, heads, self.window, dim)
        past = self.past[layer][:, :batch]
        seen = torch.cat((past, new), dim=3)
        # The cache keeps what was computed when a chunk was scored: no gradient flows into it.
        self.past[layer] = seen[..., -self.window :, :].detach()
        return seen


class Attention(nn.Module):
    """Causal attention with grouped heads; queries and keys are normed and rotated."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.head_dim = cfg.model_dim // cfg.num_heads
        kv_dim = cfg.num_kv_heads * self.head_dim
        self.c_q = Linear(cfg.model_dim, cfg.model_dim)
        self.c_k = Linear(cfg.model_dim, kv_dim)
        self.c_v = Linear(cfg.model_dim, kv_dim)
        self.proj = Linear(cfg.model_dim, cfg.model_dim, zero_init=True)
        self.q_gain = parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * N) -> (B, heads, T, N)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor, rope: Tensor, lora: BlockLoRA, cache: KVCache | None) -> Tensor:
        """(B, T, D) -> (B, T, D), in the dtype of x."""
        q = self.split_heads(self.c_q(x, lora.c_q))
        k = self.split_heads(self.c_k(x, lora.c_k))
        v = self.split_heads(self.c_v(x, lora.c_v))
        q = rotate(rms_norm(q.float()), *rope) * self.q_gain[:, None, None]
        k = rotate(rms_norm(k.float()), *rope)
        q = q.to(x.dtype)
        k = k.to(x.dtype)
        if cache is None:
            y = causal_attention(q, k, v)
        else:
            k, v = cache.extend(torch.stack((k, v)))
            y = masked_attention(q, k, v, cache.mask)
        y = y.transpose(1, 2).reshape(x.shape)
        return self.proj(y, lora.attn_proj)


class MLP(nn.Module):
    """relu squared between two projections."""

    def __init__(self, cfg: Config):
        super().__init__()
        hidden = cfg.mlp_mult * cfg.model_dim
        self.fc = Linear(cfg.model_dim, hidden)
        self.proj = Linear(hidden, cfg.model_dim, zero_init=True)

    def forward(self, x: Tensor, lora: BlockLoRA) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = F.relu(self.fc(x, lora.fc)).square()
        return self.proj(x, lora.mlp_proj)


class Block(nn.Module):
    """Attention, then MLP, on a residual stream that can mix the embedding back in."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.attn = Attention(cfg)
        self.mlp = MLP(cfg)
        ones = torch.ones(cfg.model_dim)
        self.attn_scale = parameter(ones)
        self.mlp_scale = parameter(ones.clone())
        self.resid_mix = parameter(torch.stack((ones, torch.zeros_like(ones))))

    def forward(
        self, x: Tensor, x0: Tensor, rope: Tensor, lora: BlockLoRA, cache: KVCache | None
    ) -> Tensor:
        """Residual stream x, normed embedding x0 -> residual stream, (B, T, D) in one dtype."""
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        y = self.attn(rms_norm(x), rope, lora, cache)
        x = x + self.attn_scale.to(x.dtype) * y
        y = self.mlp(rms_norm(x), lora)
        return x + self.mlp_scale.to(x.dtype) * y


class GPT(nn.Module):
    """The record's transformer: skips from its first half to its second, a soft-capped head.

    The residual stream, matrix products and attention are in `dtype`; query and key norms, rotation,
    softcap and losses are in fp32. No autocast, whose op lists differ between CPU and CUDA: there
    it would keep an fp32 stream. A bf16 stream scores the same (records/NOTES.md) and moves half
    the bytes.
    """

    def __init__(self, cfg: Config, dtype: torch.dtype):
        super().__init__()
        self.cfg = cfg
        self.made_with = {}  # what the artifact says of its making
        self.dtype = dtype
        self.half = cfg.num_layers // 2
        self.head_dim = cfg.model_dim // cfg.num_heads
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        if cfg.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, std=cfg.tied_embed_init_std)
        role = Role("adam", "tied_embed_lr" if cfg.tie_embeddings else "embed_lr")
        self.tok_emb.weight = parameter(self.tok_emb.weight.data.bfloat16(), role)
        self.skip_weights = parameter(torch.ones(self.half, cfg.model_dim))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        if cfg.tie_embeddings:
            self.lm_head = TiedHead(self.tok_emb)
        else:
            role = Role("adam", "head_lr")
            self.lm_head = Linear(cfg.model_dim, cfg.vocab_size, zero_init=True, role=role)
        positions = torch.arange(max(cfg.train_seq_len, cfg.ttt_eval_seq_len))
        self.register_buffer("rope_table", self.rope(positions), persistent=False)

    def rope(self, positions: Tensor) -> Tensor:
        """cos and sin of position x frequency, fp32, built in fp64: (..., T) -> (2, ..., T, N/2)."""
        evens = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=positions.device)
        frequency = self.cfg.rope_base ** -(evens / self.head_dim)
        angle = positions.double()[..., None] * frequency
        return torch.stack((angle.cos(), angle.sin())).float()

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        at: Tensor | None = None,
        adapters: Adapters = NO_ADAPTERS,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Cross-entropy per target in nats, unreduced: targets (B, S) -> (B, S) fp32.

        Without targets, the soft-capped logits of the next token: (B, S, V) fp32. ids (B, T); `at`
        (B, S) picks the positions that reach the head, None: all, S = T. With a cache, `ids`
        continue it.
        """
        rope = self.rope_table[:, : ids.size(1)]
        if cache is not None:
            rope = self.rope(cache.positions[:, None])  # the same for all heads
        x = rms_norm(self.tok_emb(ids).to(self.dtype))
        x0 = x
        skips = []
        for layer, block in enumerate(self.blocks):
            if layer >= self.half and skips:
                x = x + self.skip_weights[layer - self.half].to(x.dtype) * skips.pop()
            x = block(x, x0, rope, adapters.blocks[layer], cache)
            if layer < self.half:
                skips.append(x)
        if at is not None:
            x = x.gather(1, at[:, :, None].expand(-1, -1, x.size(-1)))
        logits = self.lm_head(rms_norm(x), adapters.lm_head).float()
        logits = self.cfg.logit_softcap * torch.tanh(logits / self.cfg.logit_softcap)
        if targets is None:
            return logits
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape)


def build_model(cfg: Config, dtype: torch.dtype) -> GPT:
    """A fresh model on the CPU, the same on every machine for one SEED.

    Raises `UserError` if no artifact within ARTIFACT_BUDGET could hold it.
    """
    with torch.device("meta"):  # shapes only, no memory
        count = sum(p.numel() for p in GPT(cfg, dtype).parameters())
    # At least half a bit per parameter, except for small budgets.
    most = min(1e9, max(6e7, 15 * cfg.artifact_budget))
    require(
        count <= most,
        f"MODEL_DIM, NUM_LAYERS, MLP_MULT: found a model of {count} parameters, expected at most"
        f" {most:.0f} for ARTIFACT_BUDGET={cfg.artifact_budget}",
    )
    torch.manual_seed(cfg.seed)
    with torch.device("cpu"):
        return GPT(cfg, dtype)


def frozen(model: GPT) -> GPT:
    """A copy for evaluation: no gradients, matrices already in the compute dtype."""
    copied = copy.deepcopy(model).requires_grad_(False)
    for module in copied.modules():
        if isinstance(module, (Linear, nn.Embedding)):
            module.weight.data = module.weight.data.to(model.dtype)
    return copied


# ==== Optimizers ==================================================================================


def orthogonalize(x: Tensor, steps: int) -> Tensor:
    """Push the singular values of each matrix in `x` (K, rows, cols) towards 1.

    Quintic Newton-Schulz iterations, whose coefficients trade exactness for speed: singular values
    end between about 0.7 and 1.2. Source, also for Muon: K. Jordan et al., 2024,
    https://kellerjordan.github.io/posts/muon/.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = x.size(1) > x.size(2)
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        # x becomes a x + (b g + c g^2) x for the Gram matrix g = x x^T.
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized by Newton-Schulz: for the matrices in the blocks only.

    p -= lr * sqrt(max(1, rows / cols)) * orthogonalize(Nesterov momentum). Every rank keeps the
    momentum of all matrices, orthogonalizes its share of them, and shares its bf16 updates by
    all-reducing one flat buffer, which is zero outside its share.
    """

    def __init__(self, groups: list, steps: int, rt: Runtime):
        super().__init__(groups, {"momentum": 0.0})
        self.steps = steps
        self.rt = rt

    @torch.no_grad()
    def step(self):
        """One step on all matrices, from gradients already averaged over ranks."""
        for group in self.param_groups:
            params = group["params"]
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            nesterov = torch._foreach_add(grads, buffers, alpha=group["momentum"])
            sizes = [p.numel() for p in params]
            flat = torch.zeros(sum(sizes), dtype=torch.bfloat16, device=self.rt.device)
            updates = [part.view_as(p) for part, p in zip(flat.split(sizes), params, strict=True)]
            by_shape = {}
            for i in range(self.rt.rank, len(params), self.rt.world):
                by_shape.setdefault(params[i].shape, []).append(i)
            for same in by_shape.values():
                # In the compute dtype: bf16 is about 100x slower on CPUs without it.
                batch = torch.stack([nesterov[i] for i in same]).to(self.rt.dtype)
                rows, cols = params[same[0]].shape
                batch = orthogonalize(batch, self.steps) * max(1.0, rows / cols) ** 0.5
                torch._foreach_copy_([updates[i] for i in same], list(batch))
            self.rt.sum(flat)
            torch._foreach_add_(params, [update.float() for update in updates], alpha=-group["lr"])


def build_optimizers(model: GPT, rt: Runtime):
    """(Muon, Adam) by the `role` of every parameter. Each group remembers its `base_lr`."""
    cfg = model.cfg
    by_role = {}
    for name, p in model.named_parameters():
        assert hasattr(p, "role"), f"{name} has no Role: make it by Linear or parameter()"
        by_role.setdefault(p.role, []).append(p)
    groups = {"muon": [], "adam": []}
    for role, params in by_role.items():
        rate = getattr(cfg, role.rate)
        groups[role.optimizer].append({"params": params, "lr": rate, "base_lr": rate})
    muon = Muon(groups["muon"], cfg.muon_backend_steps, rt)
    betas = (cfg.beta1, cfg.beta2)
    adam = torch.optim.Adam(groups["adam"], betas=betas, eps=cfg.adam_eps, fused=True)
    return muon, adam


def schedule(step: int, elapsed_ms: float, cfg: Config) -> tuple[float, float]:
    """(factor on every learning rate, Muon's momentum) at `step`, counted from 0."""
    remaining = cfg.iterations - step
    warmdown = cfg.warmdown_iters
    if cfg.max_wallclock_seconds:
        # Both in milliseconds: WARMDOWN_ITERS steps at the mean pace so far.
        remaining = 1000 * cfg.training_seconds - elapsed_ms
        warmdown = cfg.warmdown_iters * elapsed_ms / max(step, 1)
    scale = min(1.0, max(0.0, remaining / warmdown)) if warmdown else 1.0
    progress = 1.0
    if cfg.muon_momentum_warmup_steps:
        progress = min(step / cfg.muon_momentum_warmup_steps, 1.0)
    start = cfg.muon_momentum_warmup_start
    return scale, (1 - progress) * start + progress * cfg.muon_momentum


# ==== Adapters ====================================================================================
# Low-rank adapters, trained per document by Adam while it is scored, then discarded.

ADAPTER_SEED = 1337  # fixed, so that an artifact's score does not depend on SEED

# Field of `BlockLoRA` -> module path in a block. Names in TARGETS are the ends of these paths.
PROJECTIONS = {
    "c_q": "attn.c_q",
    "c_k": "attn.c_k",
    "c_v": "attn.c_v",
    "attn_proj": "attn.proj",
    "fc": "mlp.fc",
    "mlp_proj": "mlp.proj",
}


@dataclass(frozen=True)
class Learner:
    """Which projections get adapters, and how these train. The defaults are the record's."""

    targets: tuple  # of TARGETS
    rank: int
    lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    init_scale: float = 1.0
    # The learning rate decays as (1 + t/1000)^-decay, t = tokens trained on. Most of the gain comes
    # early in a document; later a constant rate mostly adds noise (records/NOTES.md).
    decay: float = 0.0


class AdapterState(NamedTuple):
    """Adapters and Adam state of a batch, one row per document."""

    flat: Tensor  # (slots, P)
    mean: Tensor  # like flat; (slots, 1) and unused if beta1 is 0
    square: Tensor  # like flat
    steps: Tensor  # (slots, 1)


class DocumentAdapters:
    """One set of adapters per document, all from the same seeded initial values.

    A ~ U(-s, s) with s = init_scale / sqrt(in), B = 0. Each document is one row of `state.flat`, so
    that one update serves all, and documents stay independent of each other.
    """

    def __init__(self, model: GPT, learner: Learner, chunk: int, slots: int, rt: Runtime):
        self.learner = learner
        self.chunk = chunk
        self.dtype = model.dtype
        self.layers = len(model.blocks)
        paths = PROJECTIONS.items()
        self.adapted = [name for name, path in paths if path.endswith(learner.targets)]
        modules = []
        for block in model.blocks:
            modules += [block.get_submodule(PROJECTIONS[name]) for name in self.adapted]
        if "lm_head" in learner.targets:
            modules.append(model.lm_head)
        generator = torch.Generator(device="cpu").manual_seed(ADAPTER_SEED)
        values = []  # A and B of each module in turn
        for module in modules:
            out_dim, in_dim = module.weight.shape
            a = torch.rand(learner.rank, in_dim, generator=generator, device="cpu") * 2 - 1
            values.append(a * (learner.init_scale / math.sqrt(in_dim)))
            values.append(torch.zeros(out_dim, learner.rank, device="cpu"))
        self.shapes = [value.shape for value in values]
        self.start = torch.cat([value.flatten() for value in values]).to(rt.device)
        flat = self.start.repeat(slots, 1)
        steps = torch.zeros(slots, 1, device=rt.device)
        mean = torch.zeros_like(flat if learner.beta1 else steps)
        self.state = AdapterState(flat, mean, torch.zeros_like(flat), steps)

    def restart(self, rows: Tensor):
        """Reset adapters and optimizer state in these rows, for new documents."""
        for tensor in self.state:
            tensor[rows] = 0
        self.state.flat[rows] = self.start

    def unflatten(self, flat: Tensor) -> Adapters:
        """Split rows of `state.flat` (B, P) into LoRA matrices, in the model's dtype."""
        sizes = [shape.numel() for shape in self.shapes]
        parts = flat.to(self.dtype).split(sizes, dim=1)
        pairs = zip(parts, self.shapes, strict=True)
        matrices = [part.unflatten(1, shape) for part, shape in pairs]
        loras = map(LoRA, matrices[::2], matrices[1::2])
        blocks = []
        for _ in range(self.layers):
            blocks.append(BlockLoRA(**{name: next(loras) for name in self.adapted}))
        return Adapters(blocks, next(loras, None))  # the head's come last, if it has any

    @torch.no_grad()
    def step(self, rows: Tensor | slice, grad: Tensor):
        """One Adam step for `rows`, each with its own step count; grad (B, P)."""
        learner = self.learner
        state = AdapterState(*(tensor[rows] for tensor in self.state))  # views if `rows` is a slice
        state.steps.add_(1)
        state.square.mul_(learner.beta2).addcmul_(grad, grad, value=1 - learner.beta2)
        spread = (state.square / (1 - learner.beta2**state.steps)).sqrt_().add_(1e-10)
        direction = grad  # without momentum its bias correction below is 1
        if learner.beta1:
            direction = state.mean.lerp_(grad, 1 - learner.beta1)
        rate = learner.lr / (1 - learner.beta1**state.steps)
        rate *= (1 + state.steps * self.chunk / 1000) ** -learner.decay
        state.flat.addcdiv_(direction * rate, spread, value=-1)
        if not isinstance(rows, slice):
            for whole, part in zip(self.state, state, strict=True):
                whole[rows] = part


# ==== Evaluation ==================================================================================
# Every condition is a set of options for one loop, which scores first and then learns; mixtures
# average what several of them predict.

SAFE_RATE = 0.0005  # of `stream` without calibration: no model tried loses by it (records/NOTES.md)
ORDERS = 7  # the copy model's contexts: of 0 to 6 tokens
MIXTURES = {"stride+copy": ("stride", "copy"), "mix": ("stride", "stream", "copy")}


@dataclass(frozen=True)
class Condition:
    """One way to evaluate: `chunk` targets scored at a time, with up to `window` inputs."""

    chunk: int
    window: int
    batch: int  # documents per batch
    learner: Learner | None = None  # trains on each chunk after it is scored
    stream: bool = False  # feed only the chunk; a `KVCache` holds earlier tokens
    isolated: bool = True  # False: rows of fixed length instead of documents
    final: str = ""  # the record's name for this score in a log line of its own
    # A mixture averages the probabilities of these conditions and of the copy model.
    experts: tuple = ()
    weights: Tensor | None = None  # (ORDERS, experts + 1), by longest match: see `copy_model`

    def spans(self, docs: Documents) -> tuple[ndarray, ndarray]:
        """(starts, number of predictions) of each document, or of each row of the stream."""
        if self.isolated:
            return docs.starts, docs.predictions
        rows = np.arange(0, len(docs.tokens) - self.chunk, self.chunk)
        return rows, np.full_like(rows, self.chunk)


def ladder(docs: Documents, model: GPT, rt: Runtime) -> dict:
    """The conditions that EVAL can name, by name; mixtures only if calibration gave them weights."""
    cfg = model.cfg
    rate = cfg.ttt_stream_lr
    if rate == "auto":
        rate = model.made_with.get("stream_lr", SAFE_RATE)
    row = min(cfg.train_seq_len, len(docs.tokens) - 1)  # shorter if the stream is
    rows = max(1, cfg.val_batch_size // (rt.world * cfg.grad_accum_steps * row))
    chunk = cfg.ttt_chunk_size
    window = cfg.ttt_eval_seq_len
    batch = cfg.ttt_batch_size
    recipe = Learner(("c_q", "c_v", "lm_head"), cfg.ttt_lora_rank, cfg.ttt_lora_lr)
    # No momentum, a decaying rate, larger initial values: each was measured (records/NOTES.md).
    streamer = Learner(
        cfg.ttt_stream_targets,
        cfg.ttt_stream_rank,
        float(rate),
        beta1=0.0,
        beta2=0.99,
        init_scale=4.0,
        decay=0.2,
    )
    rungs = {
        "flat": Condition(row, row, rows, isolated=False, final="final_int8_zlib_roundtrip"),
        "doc": Condition(window, window, batch),
        "stride": Condition(chunk, window, batch),
        "ttt": Condition(chunk, window, batch, recipe, final="final_int8_ttt_lora"),
        "stream": Condition(
            cfg.ttt_stream_chunk,
            window,
            batch,
            streamer,
            stream=True,
            final="final_int8_ttt_stream",
        ),
    }
    for name, weights in model.made_with.get("weights", {}).items():
        experts = tuple(rungs[expert] for expert in MIXTURES[name][:-1])
        final = f"final_int8_ttt_{name}"
        rungs[name] = replace(experts[-1], experts=experts, weights=weights, final=final)
    return rungs


class Chunk(NamedTuple):
    """One chunk of each document in a batch. Rows are padded to one length."""

    ids: Tensor  # (B, T) inputs
    targets: Tensor  # (B, S)
    at: Tensor  # (B, S), input index of each target
    positions: Tensor  # (B, S), input positions in the stream
    live: Tensor  # (B, S), False for padding


def gather_chunk(tokens: Tensor, spans: ndarray, length: int, how: Condition, rt: Runtime) -> Chunk:
    """The chunk of each row in a batch, padded to `length` inputs.

    spans (3, B): where the document starts in the stream, where in the document the chunk's
    predictions begin and where they end. A window ends where its chunk ends; under `stream` the
    inputs are the chunk alone.
    """
    starts, places, ends = spans
    begins = places if how.stream else np.maximum(ends - how.window, 0)
    columns = rt.upload(np.stack((starts, begins, places, ends)))
    start, begin, place, end = columns[:, :, None]
    steps = torch.arange(length, device=rt.device)
    # Pad with the last input: the causal mask hides it from all targets.
    ids = tokens[start + torch.minimum(begin + steps, end - 1)].long()
    place = place + steps[: how.chunk]
    live = place < end
    place = torch.minimum(place, end - 1)
    positions = start + place
    return Chunk(ids, tokens[positions + 1].long(), place - begin, positions, live)


def score_then_learn(
    model: GPT,
    chunk: Chunk,
    rows: Tensor | slice,
    adapters: DocumentAdapters | None,
    cache: KVCache | None,
    learns: bool,
) -> Tensor:
    """Losses (B, S) of a chunk with the current adapters; only then one step on its tokens.

    Do not reorder: no token may be scored by a state that was trained on it. This is the only place
    that trains adapters. `rows` are the slots of the batch.
    """
    flat = None
    loras = NO_ADAPTERS
    if cache is not None:
        cache.advance(len(chunk.ids))
    with torch.set_grad_enabled(learns):
        if adapters is not None:
            flat = adapters.state.flat[rows].detach().requires_grad_(learns)
            loras = adapters.unflatten(flat)
        losses = model(chunk.ids, chunk.targets, chunk.at, loras, cache)
        if learns:
            means = (losses * chunk.live).sum(1) / chunk.live.sum(1)
            # A sum, so that each row's gradient is that of its own document's mean.
            adapters.step(rows, torch.autograd.grad(means.sum(), flat)[0])
    return losses.detach()


def share_documents(work: ndarray, count: int) -> list[ndarray]:
    """Split documents among `count` ranks or slots: longest first, to the least loaded."""
    loads = np.zeros(count, dtype=np.int64)
    shares = [[] for _ in range(count)]
    for document in np.argsort(-work, kind="stable"):
        least = loads.argmin()
        shares[least].append(document)
        loads[least] += work[document]
    return [np.array(share, dtype=np.int64) for share in shares]


def plan_slots(documents: ndarray, chunks: ndarray, slots: int) -> Iterator[tuple]:
    """For each turn, the documents in the busy slots and the numbers of their chunks.

    Slots are balanced in advance, so that all finish at about the same time. The fullest slots come
    first, so that busy slots are always a prefix.
    """
    lanes = [documents[share] for share in share_documents(chunks[documents], slots)]
    lanes = [np.repeat(lane, chunks[lane]) for lane in lanes]
    lanes.sort(key=len, reverse=True)
    done = np.zeros_like(chunks)
    for turn in itertools.zip_longest(*lanes, fillvalue=-1):
        used = np.array([document for document in turn if document >= 0])
        yield used, done[used]
        done[used] += 1


# Windows that are not learned from are padded to one of these lengths, at most 5 % longer.
LENGTHS = np.unique(np.floor(1.05 ** np.arange(250)).astype(np.int64))


def group_rows(ends: ndarray, predictions: ndarray, how: Condition) -> Iterator[tuple]:
    """Group a turn's rows, whose chunks end at `ends` (B,), by what they share in a forward pass.

    Yields (rows, length of the padded windows, whether the adapters learn from them).
    Floating-point results depend on the length, so it never depends on other documents. A document's
    last chunk is not learned from, except in a stream, where skipping it would split the batch.
    """
    learns = (ends < predictions) & (how.learner is not None)
    if how.stream:
        yield np.arange(len(ends)), how.chunk, bool(learns.any())
        return
    lengths = np.minimum(ends, how.window)
    filled = np.minimum(LENGTHS[np.searchsorted(LENGTHS, lengths)], how.window)
    lengths = np.where(learns, lengths, filled)
    for length, learning in sorted(set(zip(lengths.tolist(), learns.tolist(), strict=True))):
        yield np.flatnonzero((lengths == length) & (learns == learning)), length, learning


def score_documents(model: GPT, docs: Documents, how: Condition, rt: Runtime) -> Tensor:
    """Score each document by itself, chunk by chunk. Ranks split the documents.

    Returns each position's loss and how often it was scored, (2, n - 1) fp32, the same on every
    rank.
    """
    starts, predictions = how.spans(docs)
    chunks = -(-predictions // how.chunk)
    mine = share_documents(chunks, rt.world)[rt.rank]
    slots = min(how.batch, len(mine))
    model = frozen(model)
    adapters = cache = None
    if how.learner:
        adapters = DocumentAdapters(model, how.learner, how.chunk, slots, rt)
    if how.stream:
        cache = KVCache(slots, how.window, how.chunk, rt)
    ledger = torch.zeros(2, len(docs.tokens) - 1, device=rt.device)  # losses, times scored
    with rt.progress(int(chunks[mine].sum()), "evaluating") as bar:
        for documents, numbers in plan_slots(mine, chunks, slots):
            fresh = np.flatnonzero(numbers == 0)
            for owned in (adapters, cache):
                if owned is not None and len(fresh):
                    owned.restart(rt.upload(fresh))
            places = numbers * how.chunk
            ends = np.minimum(places + how.chunk, predictions[documents])
            spans = np.stack((starts[documents], places, ends))
            for rows, length, learns in group_rows(ends, predictions[documents], how):
                chunk = gather_chunk(docs.tokens, spans[:, rows], length, how, rt)
                is_full = len(rows) == len(documents)
                used = slice(len(rows)) if is_full else rt.upload(rows)
                losses = score_then_learn(model, chunk, used, adapters, cache, learns)
                entry = torch.stack((losses, torch.ones_like(losses))) * chunk.live
                ledger.index_add_(1, chunk.positions.flatten(), entry.flatten(1))
            bar.update(len(documents))
    return rt.sum(ledger)


@dataclass
class Score:
    """Cross-entropy of the scored tokens; a table with one row per piece of a document."""

    # doc, chunk, start (in the document), tokens, bytes: int64; loss_nats: float64
    columns: dict
    losses: ndarray  # (n - 1,) fp32, of every position of the stream; nan: not scored

    def __post_init__(self):
        self.nats = math.fsum(self.columns["loss_nats"])  # the same for any order of the pieces
        self.tokens = int(self.columns["tokens"].sum())
        self.bytes = int(self.columns["bytes"].sum())
        self.loss = self.nats / self.tokens  # nats per token
        self.bpb = self.nats / math.log(2) / self.bytes  # bits per UTF-8 byte

    def __str__(self) -> str:
        return f"val_loss:{self.loss:.4f} val_bpb:{self.bpb:.4f}"


def check_coverage(losses: ndarray, times: ndarray, docs: Documents, how: Condition):
    """The audit of coverage: `UserError` unless `how` scored each position it covers exactly once.

    No other position may have been scored, and every loss must be finite.
    """
    starts, predictions = how.spans(docs)
    due = np.zeros_like(times)
    due[starts[0] : starts[-1] + predictions[-1]] = 1
    wrong = np.flatnonzero((times != due) | ~np.isfinite(losses))
    if len(wrong):
        p = wrong[0]
        raise UserError(
            f"audit coverage: position {p}: scored {times[p]:g} times, loss {losses[p]:g}; expected"
            f" {due[p]:g} times and a finite loss"
        )


def tabulate(losses: ndarray, times: ndarray, docs: Documents, size: int) -> Score:
    """Sum losses (n - 1,) over pieces of `size` positions, the same for every condition.

    Tokens before the first BOS count as document -1.
    """
    begins = np.unique(np.append(0, docs.starts))  # documents are contiguous
    limits = np.append(begins, len(times))
    edges = np.concatenate([np.arange(*span, size) for span in itertools.pairwise(limits)])
    owner = np.searchsorted(begins, edges, side="right") - 1
    start = edges - begins[owner]
    sizes = docs.bytes * times
    columns = {
        "doc": owner - (docs.starts[0] > 0),
        "chunk": start // size,
        "start": start,
        "tokens": np.add.reduceat(times, edges, dtype=np.int64),
        "bytes": np.add.reduceat(sizes, edges, dtype=np.int64),
        "loss_nats": np.add.reduceat(losses, edges, dtype=np.float64),
    }
    kept = columns["tokens"] > 0
    columns = {name: column[kept] for name, column in columns.items()}
    return Score(columns, np.where(times, losses, np.nan))


# ==== Mixtures ====================================================================================
# A copy model of each document, and what several conditions predict together.


def sum_earlier(keys: Tensor, values: Tensor) -> Tensor:
    """For each entry, the sum of `values` over earlier entries with the same key; all (n,) int64."""
    order = keys.argsort(stable=True)
    ordered = keys[order]
    sums = values[order].cumsum(0) - values[order]
    sums -= sums[torch.searchsorted(ordered, ordered)]  # less what came before this key
    return torch.empty_like(sums).scatter_(0, order, sums)


def copy_model(tokens: Tensor, opens: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Probability of each token but the first by its document's earlier targets, (n - 1,) fp64.

    tokens (n,) int64; opens (n - 1,) bool: a document begins here. After each context of 0 to 6
    tokens, counts are blended with the prediction of the next shorter context: prediction by partial
    matching (Moffat 1990) with escapes that grow with the kinds of targets seen (Witten and Bell
    1991). Also returns the length of the longest context seen before, (n - 1,) int64.
    """
    inputs = tokens[:-1]
    targets = tokens[1:]
    ones = torch.ones_like(inputs)
    document = opens.cumsum(0)
    context = document
    longest = torch.zeros_like(inputs)
    p = 1 / vocab_size
    for order in range(ORDERS):
        if order:
            before = context.roll(1)
            before[opens] = -1 - document[opens]  # no context reaches beyond the document
            context = torch.unique(before * vocab_size + inputs, return_inverse=True)[1]
        seen = sum_earlier(context, ones)
        count = sum_earlier(context * vocab_size + targets, ones)
        kinds = sum_earlier(context, (count == 0).long())
        escape = 0.6 * kinds.double() + 0.2 if order else 0.5 * vocab_size
        p = (count + escape * p) / (seen + escape)
        longest[seen > 0] = order
    return p, longest


def copy_losses(docs: Documents, vocab_size: int, rt: Runtime) -> Tensor:
    """Each position's loss under the copy model, and its longest match, (2, n - 1) fp32.

    The same on every rank. Ranks take turns at groups of documents.
    """
    ledger = torch.zeros(2, len(docs.tokens) - 1, device=rt.device)
    size = 256
    for first in range(size * rt.rank, len(docs.starts), size * rt.world):
        starts = docs.starts[first : first + size]
        begin = starts[0]
        end = starts[-1] + docs.predictions[first : first + size][-1]
        tokens = docs.tokens[begin : end + 1].long()
        # What lies between two documents follows the earlier one, and so changes no score.
        opens = np.isin(np.arange(begin, end), starts)
        p, longest = copy_model(tokens, rt.upload(opens), vocab_size)
        ledger[:, begin:end] = torch.stack((-p.log(), longest))
    return rt.sum(ledger)


def score_tokens(model: GPT, docs: Documents, how: Condition, rt: Runtime, known: dict) -> Tensor:
    """Each position's loss under a condition or mixture, and how often it was scored.

    (2, n - 1) fp32 on the CPU. `known` keeps what was computed, for mixtures that need it again.
    """
    if how in known:
        return known[how]
    if how.experts:
        parts = [score_tokens(model, docs, expert, rt, known) for expert in how.experts]
        copied, match = copy_losses(docs, model.cfg.vocab_size, rt).cpu()
        losses = torch.stack([*(part[0] for part in parts), copied], 1)
        weights = F.normalize(how.weights, p=1)
        mixed = -(weights.log()[match.long()] - losses.double()).logsumexp(1)
        times = parts[0][1]
        ledger = torch.stack((mixed * times, times)).float()
    else:
        ledger = score_documents(model, docs, how, rt).cpu()
    known[how] = ledger
    return ledger


def evaluate(
    model: GPT, docs: Documents, how: Condition, rt: Runtime, known: dict | None = None
) -> Score:
    """The score of the validation stream under one condition or mixture, the same on every rank."""
    losses, times = score_tokens(model, docs, how, rt, {} if known is None else known).numpy()
    rt.together(lambda: check_coverage(losses, times, docs, how))
    return tabulate(losses, times, docs, model.cfg.ttt_chunk_size)


# ==== Calibration =================================================================================
# What is measured on training text: for test-time training, and for the quantizer.

TAIL = 2**18  # tokens at the end of the training text in which documents are looked for


def last_documents(
    stream: TokenStream, bos: int, longest: int, total: int, rt: Runtime
) -> Documents:
    """The last documents of the training text, each cut to `longest` targets, up to `total` in all."""
    size = min(stream.begins[-1], TAIL)
    tokens = stream.read(-size, size)
    is_start = tokens == bos
    is_start[0] = True  # a document may be longer than what is read here
    starts = np.flatnonzero(is_start)
    predictions = np.minimum(np.diff(starts, append=size - 1), longest)
    kept = (predictions > 0) & (predictions[::-1].cumsum()[::-1] <= total)
    # No score of these documents is in bits per byte: their bytes are left 0.
    return Documents(rt.upload(tokens), np.zeros(size - 1), starts[kept], predictions[kept])


def find_rate(loss_at: Callable) -> float:
    """The learning rate of least loss: a coarse search, its best's neighbours, a parabola.

    `loss_at(rate)` is inf once there is no time left.
    """
    losses = {rate: loss_at(rate) for rate in (0.0, 0.00007, 0.00028, 0.00112, 0.00448)}
    best = min(losses, key=losses.get)
    if losses[best] == math.inf:
        return SAFE_RATE
    below = loss_at(best / 2)
    above = loss_at(best * 2)
    bend = below - 2 * losses[best] + above
    shift = (below - above) / (2 * bend) if 0 < bend < math.inf else 0.0
    return best * 2 ** max(-1.0, min(1.0, shift))


def fit_weights(losses: Tensor, match: Tensor) -> Tensor:
    """Weights of experts for each length of a match, by expectation maximisation.

    losses (n, K), match (n,) -> (ORDERS, K). Two more targets, shared equally, keep a rare length
    near equal weights.
    """
    experts = losses.size(1)
    weights = losses.new_full((ORDERS, experts), 1 / experts)
    likelihoods = (-losses).softmax(1)
    for _ in range(300):  # experts that nearly agree need so many
        shares = F.normalize(weights[match] * likelihoods, p=1)
        counts = torch.full_like(weights, 2 / experts).index_add_(0, match, shares)
        weights = F.normalize(counts, p=1)
    return weights


def calibrate(model: GPT, stream: TokenStream, bos: int, rt: Runtime, log: RunLog):
    """Find the rate of `stream` and the weights of the mixtures on the end of the training text.

    Stops at the stream's deadline: what is then missing is left out.
    """
    docs = last_documents(stream, bos, 512, 2**13, rt)
    how = ladder(docs, model, rt)["stream"]
    tried = {}

    half = stream.seconds_left / 2  # is kept for the weights, which matter more than the rate

    def is_short(kept: float) -> bool:
        """Whether any rank has less than `kept` seconds left."""
        return rt.maximum(kept - stream.seconds_left)[0] > 0

    def loss_at(rate: float) -> float:
        """The loss of `stream` at this rate, in nats; inf if there is no time to find it."""
        if rate not in tried and not is_short(half):
            learner = replace(how.learner, lr=rate)
            ledger = score_documents(model, docs, replace(how, learner=learner), rt)
            tried[rate] = ledger[0].sum().item()
        return tried.get(rate, math.inf)

    rate = find_rate(loss_at)
    weights = {}
    model.made_with |= {"stream_lr": rate, "weights": weights}
    if not is_short(0.0):
        docs = last_documents(stream, bos, 4096, 20_000, rt)
        rungs = ladder(docs, model, rt)
        columns = {}
        for name in ("stride", "stream"):
            columns[name], times = score_documents(model, docs, rungs[name], rt).cpu()
        columns["copy"], match = copy_losses(docs, model.cfg.vocab_size, rt).cpu()
        for name, experts in MIXTURES.items():
            losses = torch.stack([columns[expert] for expert in experts], 1)
            weights[name] = fit_weights(losses[times > 0], match[times > 0].long())
    log.line(
        f"calibration: rate:{rate:.6f} rates_tried:{len(tried)}"
        f" trained_on:{stream.position > max(0, stream.begins[-1] - TAIL):d}"
        f" before_time_limit:{stream.seconds_left:.1f}s"
    )


class MatrixStats(NamedTuple):
    """A weight error D (out, in) costs about sum_i S_i (D M D^T)_ii / 2 nats per token.

    M = E[x x^T] of the inputs x, S_i = E[g_i^2] of the loss gradients g at the outputs; x and g are
    assumed to be uncorrelated. Source: K-FAC, https://arxiv.org/abs/1503.05671.
    """

    moments: Tensor  # M (in, in); the identity for an untied embedding
    slopes: Tensor  # S (out,)


def measure_matrices(
    model: GPT, stream: TokenStream, rows: int, log: RunLog, length: int = 256
) -> dict:
    """Statistics of every matrix that is used in a forward pass, by name.

    Uses `rows` rows of `length` tokens, evenly spaced over the training shards, on the CPU for
    reproducibility; fewer if the stream's deadline passes.
    """
    model = frozen(model).to("cpu", torch.float32)
    model.dtype = torch.float32
    length = min(length, model.rope_table.size(1))
    names = {p: name for name, p in model.named_parameters()}
    stats = {}
    # Of a tied embedding the head is watched alone: errors of look-ups are ignored.
    kinds = (Linear, TiedHead if model.cfg.tie_embeddings else nn.Embedding)
    for module in model.modules():
        if isinstance(module, kinds):
            stats[names[module.weight]] = watch(module)
    places = [stream.begins[-1] * row // rows for row in range(rows)]
    used = 0
    while used < rows and (not used or stream.seconds_left > 0):
        spans = [stream.read(place, length + 1) for place in places[used : used + 8]]
        tokens = torch.from_numpy(np.stack(spans))
        model(tokens[:, :-1], tokens[:, 1:]).sum().backward()
        used += len(spans)
    log.line(
        f"quantizer statistics: rows:{used} of:{rows} before_time_limit:{stream.seconds_left:.1f}s"
    )
    for stat in stats.values():
        for sums in stat:
            sums.div_(used * length)
    return stats


def watch(module: nn.Module) -> MatrixStats:
    """Statistics of one matrix, summed over all tokens by hooks."""
    out_dim, in_dim = module.weight.shape
    moments = torch.zeros(in_dim, in_dim, device="cpu")
    slopes = torch.zeros(out_dim, device="cpu")
    is_embedding = isinstance(module, nn.Embedding)

    def observe(module, args, output):
        inputs = args[0].detach().flatten(0, 1)
        if is_embedding:
            moments.diagonal().add_(len(inputs))
        else:
            moments.add_(inputs.mT @ inputs)

        def add_slopes(grad):
            squares = grad.square().flatten(0, 1)
            if is_embedding:
                slopes.index_add_(0, inputs, squares.mean(1))
            else:
                slopes.add_(squares.sum(0))

        output.requires_grad_().register_hook(add_slopes)

    module.register_forward_hook(observe)
    return MatrixStats(moments, slopes)


# ==== Artifact ====================================================================================
# int8 rows and zlib, in the published layout: written to fit the budget, read from any source.

QUANT_FORMAT = "int8_clean_per_row_v1"
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class RoundingPlan:
    """One matrix, prepared for `round_matrix`.

    Columns are rounded last to first; each corrects for the errors of those already rounded. The
    remaining error e of a weight costs (care e)^2. Source: GPTQ, https://arxiv.org/abs/2210.17323,
    as Babai's nearest plane.
    """

    weights: Tensor  # (in, out), transposed: a column is a row here
    feedback: Tensor  # (in, in)
    care: Tensor  # (in, out)


def plan_rounding(weight: Tensor, stats: MatrixStats) -> RoundingPlan:
    """The plan of one matrix (out, in), given its statistics."""
    moments, slopes = stats
    # Damping, so that directions which the sample missed still count.
    damping = 0.1 * moments.diagonal().mean() + 1e-30
    identity = torch.eye(len(moments), device="cpu")
    factor = torch.linalg.cholesky(moments + damping * identity).mT
    pivots = factor.diagonal()[:, None]
    slopes = slopes + 0.01 * slopes.mean() + 1e-30
    return RoundingPlan(weight.float().mT, factor / pivots, pivots * slopes.sqrt())


def round_matrix(plan: RoundingPlan, unit: float) -> tuple[Tensor, Tensor]:
    """(q (out, in) within +-127, scales fp16 (out,)): the matrix is about q * scales[:, None].

    The ideal step of each weight is unit / care. A row's scale is its finest step, within the range
    of int8; less sensitive columns use multiples of it, which compress better.
    """
    w = plan.weights
    ideal = unit / plan.care
    largest = w.abs().amax(0)
    finest = ideal.amin(0).minimum(2 * largest)
    scale = finest.maximum(largest / 127).clamp(2**-24, 2**15)  # within fp16
    # Round up to 2^(k/4): few values compress well.
    scale = ((4 * scale.log2()).ceil() / 4).exp2().half().float()
    ticks = (ideal / scale).log2().round().exp2().clamp(1, 127)
    steps = scale * ticks
    limits = (127 / ticks).floor()
    error = torch.zeros_like(w)
    for end in range(len(w), 0, -128):
        # In blocks, since one large product is faster than many small ones.
        begin = max(0, end - 128)
        wanted = w[begin:end] + plan.feedback[begin:end, end:] @ error[end:]
        for j in reversed(range(begin, end)):
            column = wanted[j - begin] + plan.feedback[j, j + 1 : end] @ error[j + 1 : end]
            whole = (column / steps[j]).round().clamp(-limits[j], limits[j])
            error[j] = w[j] - whole * steps[j]
    return ((w - error) / scale).round().mT, scale.half()


def quantize(state: dict, plans: dict, unit: float) -> dict:
    """The artifact's content in the published layout (spec section 5), from a state dict on the CPU.

    The matrices that have a plan, by name, become int8. Other tensors stay as they are.
    """
    parts = ("quantized", "scales", "dtypes", "passthrough", "qmeta", "passthrough_orig_dtypes")
    content = {"__quant_format__": QUANT_FORMAT} | {part: {} for part in parts}
    for name, tensor in state.items():
        if name not in plans:
            content["passthrough"][name] = tensor
            continue
        q, scale = round_matrix(plans[name], unit)
        content["quantized"][name] = q.char().contiguous()
        content["scales"][name] = scale
        content["dtypes"][name] = str(tensor.dtype).removeprefix("torch.")
        content["qmeta"][name] = {"scheme": "per_row", "axis": 0}
    return content


def pack(content: dict) -> bytes:
    """The artifact: a zlib stream. RLE only, since rounded weights hold no long matches."""
    deflater = zlib.compressobj(9, strategy=zlib.Z_RLE)
    return deflater.compress(torch_bytes(content)) + deflater.flush()


def search_artifact(artifact_at: Callable, room: int, slope: float) -> bytes:
    """The finest artifact of at most `room` bytes, to within 1 %; the coarsest if none fits.

    `artifact_at` takes log2 of the unit. Doubling the unit saves about a bit per weight: `slope`
    bytes in all. Steps of that slope, then bisection.
    """
    low = -60.0  # int8 has no finer steps
    high = 60.0  # every weight is 0
    best = artifact_at(low)
    if len(best) <= room:
        return best
    best = artifact_at(high)
    unit = -6.0  # about 3 bits per weight in a trained model
    tries = 0
    while len(best) < 0.99 * room and high - low > 0.05:
        blob = artifact_at(unit)
        tries += 1
        if len(blob) > room:
            low = unit
        else:
            high = unit
            best = blob
        unit += (len(blob) - 0.995 * room) / slope
        if tries > 8 or not low < unit < high:
            unit = (low + high) / 2
    return best


def fit_artifact(model: GPT, state: dict, stream: TokenStream, log: RunLog) -> bytes:
    """An artifact that fits ARTIFACT_BUDGET together with this script: lossless if possible.

    `state` is the model's state dict on the CPU. `UserError` if nothing fits.
    """
    made_with = {"made_with": model.made_with}
    budget = model.cfg.artifact_budget
    room = budget - len(source_code())
    exact = pack(quantize(state, {}, 0) | made_with)
    if len(exact) <= room:
        return exact
    count = sum(tensor.numel() for tensor in state.values())
    rows = min(64, max(4, 8 * 10**7 // count))
    with refusing(
        f"ARTIFACT_BUDGET={budget}: calibration",
        "a finite model and training shards that match it; no artifact was written",
    ):
        require(stream.shards, "no training shards")
        stats = measure_matrices(model, stream, rows, log)
        plans = {name: plan_rounding(state[name], stat) for name, stat in stats.items()}

    def artifact_at(unit: float) -> bytes:
        return pack(quantize(state, plans, 2.0**unit) | made_with)

    artifact = search_artifact(artifact_at, room, count / 8)
    require(
        len(artifact) <= room,
        f"ARTIFACT_BUDGET={budget}: the script leaves {room} bytes, the smallest artifact takes"
        f" {len(artifact)}; raise the budget and export the .pt file with EVAL_ONLY=1",
    )
    return artifact


def export(model: GPT, stream: TokenStream, log: RunLog):
    """Write the weights and the artifact, log their sizes. `stream` is for `measure_matrices`."""
    cfg = model.cfg
    # EVAL_ONLY writes only the artifact, under a name that no training uses.
    name = f"eval_{Path(cfg.model_path).stem}" if cfg.eval_only else "final_model"
    path = Path(cfg.out_dir, f"{name}.int8.ptz")
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    # All of it is finite: `Trainer.save` or `parse_weights` checked that.
    raw = torch_bytes(state)
    if not cfg.eval_only:
        write_atomically(path.with_name("final_model.pt"), raw)
    artifact = fit_artifact(model, state, stream, log)
    write_atomically(path, artifact)
    log.artifact = path
    log.artifact_hash = digest(artifact)
    content = zlib.decompress(artifact)
    payload = measure_payload(load_torch(content))
    ratio = sum(tensor.nbytes for tensor in state.values()) / payload
    code = len(source_code())
    log.line(f"Serialized model: {len(raw)} bytes")
    log.line(f"Code size: {code} bytes")
    log.line(f"Total submission size: {len(raw) + code} bytes")
    log.line(
        f"Serialized model int8+zlib: {len(artifact)} bytes (payload:{payload}"
        f" raw_torch:{len(content)} payload_ratio:{ratio:.2f}x)"
    )
    log.line(f"Total submission size int8+zlib: {len(artifact) + code} bytes")


def measure_payload(content: dict) -> int:
    """Bytes of all tensors in an artifact's content."""
    parts = ("quantized", "scales", "passthrough")
    return sum(tensor.nbytes for part in parts for tensor in content[part].values())


def dequantize(content: dict) -> dict:
    """The state dict of an artifact, in the dtypes of training.

    May raise any exception on a malformed artifact.
    """
    state = {}
    found = content["__quant_format__"]
    require(found == QUANT_FORMAT, f"its format is {found!r:.40}")
    for name, q in content["quantized"].items():
        scale = content["scales"][name]
        fits = q.dtype == torch.int8 and scale.shape in (q.shape[:1], ())
        require(fits, f"{name} is {q.dtype} {tuple(q.shape)} with scales {tuple(scale.shape)}")
        scale = scale.float().view(-1, *[1] * (q.ndim - 1))
        state[name] = (q.float() * scale).to(FLOATS[content["dtypes"][name]])
    for name, tensor in content["passthrough"].items():
        original = content["passthrough_orig_dtypes"].get(name)
        state[name] = tensor.to(FLOATS[original]) if original else tensor
    return state


def load_torch(blob: bytes) -> Any:
    """Load tensors and plain values, running no pickled code.

    The remaining risk is memory: an untrusted file can make torch allocate more than its size.
    """
    damaged = zipfile.ZipFile(io.BytesIO(blob)).testzip()  # torch looks at no checksum
    require(not damaged, f"{damaged} is damaged")
    return torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)


def parse_weights(blob: bytes, path: Path) -> tuple[dict, dict]:
    """The state dict in an artifact (.ptz), or in a state dict or checkpoint of this script (.pt).

    `blob` is the content of `path`. Also returns what an artifact says of its making. Drops the
    prefix `_orig_mod.`, which torch.compile adds to names. `UserError` for any other file and for
    weights that are not finite.
    """
    with refusing(path, "an artifact (.ptz), a state dict or a checkpoint (.pt)"):
        is_artifact = path.suffix == ".ptz"
        if is_artifact:
            inflater = zlib.decompressobj()
            most = max(2**26, 16 * len(blob))
            blob = inflater.decompress(blob, most)
            require(
                inflater.eof and not inflater.unused_data,
                f"truncated, with trailing data, or over {most} bytes",
            )
        content = load_torch(blob)
        if not is_artifact:
            content = quantize(content.get("model", content), {}, 0)  # no plans: nothing is rounded
        # Before anything is computed: a tensor with stride 0 can claim any size.
        require(measure_payload(content) <= len(blob), "its tensors are larger than the file")
        state = dequantize(content)
        state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
        for name, tensor in state.items():
            sound = tensor.dtype in FLOATS.values() and tensor.isfinite().all()
            require(sound, f"{name!r:.80} does not hold finite floats")
    return state, content.get("made_with", {})


def infer_shape(state: dict, made_with: dict, cfg: Config, path: Path) -> Config:
    """`cfg` with the shape of the weights in file `path`, and the settings that came with them.

    Raises `UserError` if that fails, or if the environment gives another value to one of them.
    """
    with refusing(path, "the weights of this model, with its tensor names"):
        vocab_size, dim = state["tok_emb.weight"].shape
        heads = len(state["blocks.0.attn.q_gain"])
        held = {
            "VOCAB_SIZE": vocab_size,
            "MODEL_DIM": dim,
            "NUM_LAYERS": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
            "NUM_HEADS": heads,
            "NUM_KV_HEADS": len(state["blocks.0.attn.c_k.weight"]) * heads // dim,
            "MLP_MULT": len(state["blocks.0.mlp.fc.weight"]) // dim,
            "TIE_EMBEDDINGS": spell("lm_head.weight" not in state),
        }
        for name, text in (held | made_with.get("settings", {})).items():
            spec = SETTINGS[name]
            require("travels" in spec.metadata, f"it sets {name}")
            value = parse_setting(name, text, spec)
            given = getattr(cfg, spec.name)
            require(
                name not in os.environ or given == value,
                f"it was made with {name}={text}, the environment says {given}; unset {name}",
            )
            cfg = replace(cfg, **{spec.name: value})
        check_shape(cfg)
    return cfg


def load_model(path: str | Path, cfg: Config) -> GPT:
    """The model in an artifact, a state dict or a checkpoint, on the CPU, ready to evaluate.

    Its shape comes from the file, and so do the settings that travel in it; `model.cfg` is `cfg`
    with both. Raises `UserError` for a file that is damaged or holds another kind of model.
    """
    path = Path(path)
    state, made_with = parse_weights(read_file(path), path)
    cfg = infer_shape(state, made_with, cfg, path)
    dtype = choose_dtype(cfg)
    # Shapes are compared without memory first: a few hundred bytes can claim to be of any size.
    with refusing(path, "the tensors of this model"), torch.device("meta"):
        GPT(cfg, dtype).load_state_dict(state, assign=True)
        for name, weights in made_with.get("weights", {}).items():
            shape = (ORDERS, len(MIXTURES[name]))
            require(weights.shape == shape, f"weights of {name}")
    model = build_model(cfg, dtype)
    model.load_state_dict(state)
    model.made_with = made_with
    return model


# ==== Audits ======================================================================================
# Checks that a score is valid. The third audit is `check_coverage`.


def split_words(ids: ndarray, opens: ndarray) -> list[ndarray]:
    """The ids of each word. A word begins at an id of `opens` (V,) bool; the first may lack it."""
    return np.split(ids, np.flatnonzero(opens[ids]))


def audit_bytes(docs: Documents, table: ByteTable, tokenizer: spm.SentencePieceProcessor) -> str:
    """Compare the byte counts of up to 256 evenly spaced documents with their decoded text.

    Expected counts come from the tokenizer alone, not from the table. Then the text is encoded
    again: unless 99 % of its words give the same pieces, another tokenizer made the shards. Returns
    the totals; `UserError` names the miscounted pieces.
    """
    ids = list(range(tokenizer.vocab_size()))
    is_unknown = np.array(tokenizer.is_unknown(ids))
    silent = np.array(tokenizer.is_control(ids)) | is_unknown | tokenizer.is_unused(ids)
    is_byte = np.array(tokenizer.is_byte(ids))
    opens = np.array([piece.startswith("▁") for piece in tokenizer.id_to_piece(ids)]) & ~silent
    # Every text is decoded behind an anchor: the decoder drops a leading space.
    anchor = next(i for i in ids if tokenizer.decode([i]).strip().isalnum())

    def decode(pieces: ndarray) -> str:
        return tokenizer.decode([anchor, *pieces.tolist()])

    def measure(pieces: ndarray) -> int:
        return len(decode(pieces).encode()) - len(decode(pieces[:0]).encode())

    picks = np.unique(np.linspace(0, len(docs.starts) - 1, 256).astype(np.int64))
    counted = 0
    spelled = 0
    words = 0
    same = 0
    for begin, count in zip(docs.starts[picks], docs.predictions[picks], strict=True):
        stretch = docs.tokens[begin : begin + count + 1].cpu().numpy()  # BOS first, not a target
        pieces = stretch[~silent[stretch]]
        # Byte pieces may be invalid UTF-8: they are counted, not decoded.
        plain = pieces[~is_byte[pieces]]
        spelled += measure(plain) + len(pieces) - len(plain)
        # A space right after BOS or a control piece is not text.
        spelled -= (opens[stretch[1:]] & silent[stretch[:-1]]).sum()
        counted += docs.bytes[begin : begin + count].sum()
        if counted != spelled:
            sizes = table.base + table.leading_space
            wrong = [int(i) for i in np.unique(plain) if measure(np.array([i])) != sizes[i]]
            raise UserError(
                f"audit bytes: up to token {begin + count} {counted} bytes were counted where the"
                f" decoded text has {spelled}; wrong are the pieces"
                f" {tokenizer.id_to_piece(wrong[:3])}, or how pieces join; no bpb is right; take"
                " another tokenizer"
            )
        # Words without a silent piece: of the others the text does not say enough.
        found = [word for word in split_words(stretch, opens)[1:] if not silent[word].any()]
        encoded = np.array(tokenizer.encode(decode(np.concatenate([pieces[:0], *found]))))
        again = Counter(map(tuple, split_words(encoded, opens)))
        words += len(found)
        same += (again & Counter(map(tuple, found))).total()
    require(
        same >= 0.99 * words,
        f"audit bytes: only {same} of {words} words are encoded as in the validation shards;"
        " TOKENIZER_PATH is not their tokenizer; give that",
    )
    unknown = is_unknown[docs.tokens.cpu().numpy()].sum()
    return (
        f"documents:{len(picks)} of:{len(docs.starts)} words:{words} same:{same}"
        f" unknown_pieces:{unknown} table_bytes:{counted} text_bytes:{spelled}"
    )


def audit_causality(model: GPT, docs: Documents, how: Condition, rt: Runtime) -> str:
    """Score three documents twice, the second time with later tokens and another document changed.

    In the second pass document 2 is random; documents 1 and 3 are random after a cut. Scores before
    a cut must be bitwise equal, else `UserError`: a score saw a later token or another document.
    Document 1, two chunks longer than a window, shares its batch with document 2. Document 3, two
    chunks long, follows them and would see leftover state. Cuts fall inside the last chunk that is
    learned from, to catch learning before scoring (unless chunks are single tokens). Where PyTorch
    has no deterministic kernel, as some forks may need, the mean move is bounded instead. Returns
    this rank's counts, and the name of such an operation.
    """
    # Fewer than three documents are repeated.
    picks = np.resize(np.argsort(-docs.predictions, kind="stable")[:3], 3)
    most = np.array([how.window // how.chunk + 2] * 2 + [2]) * how.chunk
    predictions = np.minimum(docs.predictions[picks], most)
    ends = np.cumsum(predictions + 1)
    starts = ends - predictions - 1
    spans = zip(docs.starts[picks], predictions, strict=True)
    tokens = torch.cat([docs.tokens[start : start + n + 1] for start, n in spans])
    noise = np.random.default_rng(0).integers(model.cfg.vocab_size, size=len(tokens))
    altered = rt.upload(noise).int()
    compared = np.zeros(len(tokens) - 1, dtype=bool)
    for i in (0, 2):
        start = starts[i]
        n = predictions[i]
        lesson = (n - 1) // how.chunk - 1  # the last chunk that is learned from; -1: none
        cut = start + n // 2
        if lesson >= 0:
            cut = start + lesson * how.chunk + (how.chunk + 1) // 2
        altered[start : cut + 1] = tokens[start : cut + 1]
        compared[start:cut] = True
    alone = replace(rt, rank=0, world=1)
    pairs = tuple(replace(expert, batch=2) for expert in how.experts)
    how = replace(how, batch=2, isolated=True, experts=pairs)

    def score(version: Tensor) -> ndarray:
        """The losses before the cuts."""
        few = replace(docs, tokens=version, starts=starts, predictions=predictions)
        return score_tokens(model, few, how, alone, {})[0].numpy()[compared]

    allowed = 0.0
    counts = f"documents:{len(set(picks))} compared:{compared.sum()}"
    try:
        with deterministic():
            moved = np.abs(score(tokens) - score(altered)).max(initial=0.0)
    except RuntimeError as error:
        # Rounding moves single losses by much, since Adam amplifies it, but their mean by little.
        if "deterministic" not in str(error):
            raise
        allowed = 0.001
        moved = np.abs(score(tokens) - score(altered)).sum() / max(compared.sum(), 1)
        counts += f" ({error!s:.60})"
    require(
        moved <= allowed,  # nan fails, too
        f"audit causality: later tokens or other documents moved scores by {moved:g} nats, allowed"
        f" are {allowed:g}: it leaks, its score is void ({counts})",
    )
    return counts


# ==== Training ====================================================================================

GROWING = ("ITERATIONS", "MAX_WALLCLOCK_SECONDS")  # may be larger when a run is resumed


@dataclass
class Trainer:
    """The state of training: weights, optimizers, stream position, step and time.

    It is identical on every rank. A checkpoint holds all of it, and `identity`: the settings and
    hashes that must match when a run is resumed.
    """

    model: GPT
    stream: TokenStream
    rt: Runtime
    log: RunLog
    hashes: dict
    step: int = 0
    elapsed_ms: float = 0.0
    mark: float = 0.0  # the clock at the last tick, seconds
    stop_signal: int = 0  # a signal that any rank got; 0: none

    def __post_init__(self):
        self.cfg = self.model.cfg
        self.forward = self.model
        # Skip empty parameters (a model of one layer has one): they get no gradient.
        self.params = {name: p for name, p in self.model.named_parameters() if p.numel()}
        self.optimizers = build_optimizers(self.model, self.rt)
        # The last steps, which the device may not have finished: for each, whether every gradient
        # and every weight is finite, and the event that ends it.
        self.unchecked = []
        self.identity = spell_settings(self.cfg, "decides") | self.hashes
        # Over all ranks: their number may change from one attempt to the next.
        self.identity["MICRO_STEPS"] = str(self.rt.world * self.cfg.grad_accum_steps)
        self.identity["DTYPE"] = str(self.rt.dtype)

    def state(self) -> dict:
        """Everything that training changes. Tensors are not copied."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "elapsed_ms": self.elapsed_ms,
            "position": self.stream.position,
            "rng": torch.get_rng_state(),
        }

    def load(self, state: dict):
        """Restore what `state` returned."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = int(state["step"])
        self.elapsed_ms = float(state["elapsed_ms"])
        self.stream.position = int(state["position"])
        torch.set_rng_state(state["rng"])
        self.unchecked.clear()

    @property
    def progress(self) -> float:
        """The fraction used of the steps or of the time, the larger of the two."""
        steps = self.step / self.cfg.iterations if self.cfg.iterations else 1.0
        return max(steps, self.elapsed_ms / (1000 * self.cfg.training_seconds))

    def train_step(self) -> Tensor:
        """One optimizer step on TRAIN_BATCH_TOKENS. Returns this rank's mean loss, () fp32."""
        cfg = self.cfg
        total = torch.zeros((), device=self.rt.device)
        for _ in range(cfg.grad_accum_steps):
            ids, targets = self.stream.next_batch(cfg, self.rt)
            loss = self.forward(ids, targets).mean() / cfg.grad_accum_steps
            loss.backward()
            total += loss.detach()
        params = list(self.params.values())
        grads = [p.grad for p in params]
        self.rt.average(grads)
        # Before clipping, which spreads a nan. In one dtype: mixed ones take hundreds of launches.
        norms = list(torch._foreach_norm([grad.float() for grad in grads]))
        if cfg.grad_clip_norm:
            nn.utils.clip_grad_norm_(params, cfg.grad_clip_norm)
        scale, momentum = schedule(self.step, self.elapsed_ms, cfg)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
                if "momentum" in group:
                    group["momentum"] = momentum
            optimizer.step()
        norms += torch._foreach_norm([p.float() for p in params])
        are_finite = torch.stack(norms).isfinite().to("cpu", non_blocking=True)
        self.unchecked.append((are_finite, self.rt.record()))
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def check_finite(self, behind: int = 0):
        """Wait until the device is at most `behind` steps late. Check the steps that it finished.

        `UserError` names the first gradient or weight that was not finite.
        """
        while len(self.unchecked) > behind:
            steps = self.step - len(self.unchecked)
            are_finite, end = self.unchecked.pop(0)
            if end:
                end.synchronize()
            if are_finite.all():
                continue
            index = are_finite.tolist().index(False)
            kind = "the gradient of" if index < len(self.params) else "the weight"
            name = list(self.params)[index % len(self.params)]
            raise UserError(
                f"step {steps + 1}: {kind} {name} is not finite; the last good state is that after"
                f" step {steps}; nothing was exported; lower the learning rates"
            )

    def compile_forward(self):
        """Compile the model's forward if COMPILE allows it and every rank succeeds.

        Evaluation is always eager: no score depends on the compiler.
        """
        cfg = self.cfg
        # On two CPU cores compiling takes a minute and saves 15 to 25 % of each step.
        is_long = cfg.training_seconds >= 120 and cfg.iterations >= 200
        pays = self.rt.device.type == "cuda" or is_long
        if cfg.compile == "0" or (cfg.compile == "auto" and not pays):
            return
        self.log.line("compile:started")
        began = self.rt.seconds()
        failure = ""
        try:
            self.forward = torch.compile(self.model, dynamic=False, fullgraph=True)
            ids, targets = self.stream.next_batch(cfg, self.rt)
            self.forward(ids, targets).mean().backward()
        except Exception as error:  # e.g. no C++ compiler: eager is only slower
            failure = f"{error!r:.160}"
        self.model.zero_grad(set_to_none=True)
        failure = max(self.rt.gather(failure))
        require(
            not failure or cfg.compile == "auto",
            f"COMPILE=1: torch.compile failed ({failure}); install what it lacks (a C++ compiler; for"
            " a GPU Triton), or set COMPILE=0",
        )
        outcome = f"compile:done time:{self.rt.seconds() - began:.1f}s"
        if failure:
            self.forward = self.model
            outcome = (
                f"compile:failed ({failure}); running eager: slower, on a GPU about 3 times, with 20"
                " GB more memory"
            )
        self.log.line(outcome)

    def warm_up(self):
        """Compile, then run WARMUP_STEPS steps, which prime allocators and kernels, and undo them.

        All of it on synthetic ids: no text is read before the clock starts.
        """
        stream = self.stream
        ids = np.random.default_rng(0).integers(self.cfg.vocab_size, size=2**16)
        self.stream = TokenStream([ids], self.cfg.vocab_size)
        self.compile_forward()
        start = copy.deepcopy(self.state())
        for _ in range(self.cfg.warmup_steps):
            self.train_step()
        self.load(start)
        self.stream = stream

    def save(self):
        """Rank 0 writes a checkpoint and keeps the last two of the run."""
        self.check_finite()
        if self.rt.rank:
            return
        run_id = self.log.run_id
        path = Path(self.cfg.out_dir, f"checkpoints/{run_id}.step{self.step:09d}.pt")
        try:
            write_atomically(path, torch_bytes(self.state() | {"identity": self.identity}))
        except OSError as error:
            if self.stop_signal:
                raise
            self.log.line(f"warning: checkpoint not written, the run goes on: {error}")
            return
        others = [old for old in find_checkpoints(self.cfg, run_id) if old != path]
        for old in others[1:]:
            with contextlib.suppress(OSError):
                old.unlink()

    def resume(self):
        """Load the checkpoint that RESUME names, if any. `UserError` if it does not match."""
        state = self.rt.from_rank0(self.read_checkpoint)
        if state is None:
            self.log.line("resume: found no checkpoint; starting anew")
            return
        path = state["path"]
        with refusing(path, "a whole checkpoint of this script"):
            self.load(state)
        spent = f"train_time:{self.elapsed_ms:.0f}ms"
        self.log.line(f"resume:{path} step:{self.step}/{self.cfg.iterations} {spent}")

    def read_checkpoint(self) -> dict | None:
        """The state in the checkpoint that RESUME names; `auto` skips damaged ones."""
        auto = self.cfg.resume == "auto"
        paths = [Path(self.cfg.resume)]
        if auto:
            paths = find_checkpoints(self.cfg, self.log.run_id)
        for path in paths:
            try:
                with refusing(path, "a checkpoint of this script"):
                    state = load_torch(read_file(path))
                    theirs = {str(name): str(value) for name, value in state["identity"].items()}
            except UserError as error:
                require(auto, str(error))
                self.log.line(f"warning: skipped {error}")
                continue
            for name in GROWING:
                before = theirs.get(name, "inf")
                now = self.identity[name]
                # 0 seconds are no limit.
                if (float(before) or math.inf) < (float(now) or math.inf):
                    self.log.line(f"resume: {name} was {before}, now {now}")
                    theirs[name] = now
            differ = sorted(dict(theirs.items() ^ self.identity.items()))
            found = [
                f"{name}={theirs.get(name)} (now {self.identity.get(name)})" for name in differ
            ]
            require(
                not differ,
                f"{path}: it was made under {', '.join(found)}; set them back, or leave out RESUME",
            )
            return state | {"path": path}
        return None

    def tick(self, now: float):
        """Add the time since the last tick, by rank 0's clock; share any signal."""
        elapsed = self.elapsed_ms + 1000 * (now - self.mark)
        mine = elapsed if self.rt.rank == 0 else 0.0
        self.elapsed_ms, number = self.rt.maximum(mine, self.rt.signals.number)
        self.stop_signal = int(number)
        self.mark = now

    def report(self, what: Any):
        """Check that all is finite, then log `what`, step and time as tools expect."""
        self.check_finite()
        self.log.line(
            f"step:{self.step}/{self.cfg.iterations} {what} train_time:{self.elapsed_ms:.0f}ms"
            f" step_avg:{self.elapsed_ms / max(self.step, 1):.2f}ms"
        )


def train(trainer: Trainer, validate: Callable):
    """Train until the budget is used up. Validation is not counted.

    Ends with a checkpoint. After a signal all ranks stop after the same step: rank 0 writes a
    checkpoint, then all raise `Stopped`.
    """
    cfg = trainer.cfg
    rt = trainer.rt
    if trainer.progress < 1:
        trainer.warm_up()
    with rt.signals.deferred(), rt.progress(1.0, "training") as bar:
        trainer.mark = rt.seconds()
        while trainer.progress < 1 and not trainer.stop_signal:
            if cfg.val_loss_every and trainer.step % cfg.val_loss_every == 0:
                trainer.tick(rt.seconds())
                if trainer.stop_signal:
                    break
                trainer.check_finite()  # before a long evaluation
                trainer.report(validate())
                trainer.mark = rt.seconds()
            loss = trainer.train_step()
            trainer.check_finite(behind=2)  # so little does the device lag behind the clock
            trainer.tick(time.perf_counter())
            every = cfg.train_log_every
            if every and (trainer.step <= 10 or trainer.step % every == 0):
                mean = rt.sum(loss).item() / rt.world
                trainer.report(f"train_loss:{mean:.4f}")
            if cfg.checkpoint_every and trainer.step % cfg.checkpoint_every == 0:
                trainer.save()
            bar.update(min(trainer.progress, 1.0) - bar.n)
        trainer.tick(rt.seconds())
        trainer.save()
        if trainer.stop_signal:
            raise Stopped(trainer.stop_signal)
        if trainer.step < cfg.iterations:
            trainer.log.line(
                f"stopping_early: wallclock_cap train_time:{trainer.elapsed_ms:.0f}ms"
                f" step:{trainer.step}/{cfg.iterations}"
            )
        spent = trainer.elapsed_ms / 1000
        limit = cfg.max_wallclock_seconds - spent
        if not cfg.max_wallclock_seconds:
            limit = cfg.calibration_seconds or math.inf
        trainer.stream.deadline = trainer.mark + limit
        seen = trainer.stream.position
        trainer.log.line(
            f"train_tokens:{seen} of:{trainer.stream.begins[-1]}"
            f" tokens_per_second:{seen / max(spent, 1e-3):.0f}"
            f" peak_memory:{rt.peak_memory() / 1e6:.0f}MB"
        )


# ==== Main ========================================================================================
# A run, in order.


class Inputs(NamedTuple):
    """What a run starts from."""

    model: GPT
    stream: TokenStream
    docs: Documents
    hashes: dict  # SHA-256 of the tokenizer, fingerprints of the shards


def load_inputs(cfg: Config, rt: Runtime, log: RunLog) -> Inputs:
    """Read and check every input file. `UserError` names the first bad one."""
    model = load_model(cfg.model_path, cfg) if cfg.model_path else build_model(cfg, rt.dtype)
    cfg = model.cfg
    val_shards = open_shards(cfg.data_path, "val")
    train_shards = open_shards(cfg.data_path, "train", required=not cfg.eval_only)
    tokenizer = load_tokenizer(cfg.tokenizer_path, cfg.vocab_size)
    tokenizer_hash = digest(read_file(Path(cfg.tokenizer_path)))
    log.line(f"sha256 tokenizer:{tokenizer_hash}")
    check_tokenizer(model, tokenizer, tokenizer_hash, log)
    hashes = {}
    for shard in (*val_shards, *train_shards):
        path = Path(shard.filename)
        found = fingerprint(shard)
        require(
            found not in hashes.values(),
            f"{path}: it equals an earlier shard; expected different ones; fetch or make it again",
        )
        hashes[path.name] = found
    for shard in val_shards:
        check_ids(shard, shard, cfg.vocab_size)
        path = Path(shard.filename)
        log.line(f"sha256 val:{digest(path.read_bytes())} {path.name}")
    others = {path.name for path in Path(cfg.data_path).glob("fineweb_*.bin")} - hashes.keys()
    if others:
        log.line(f"warning: not read, since no shard has such a name: {', '.join(sorted(others))}")
    table = ByteTable.build(tokenizer)
    tokens = np.concatenate(val_shards)
    docs = split_documents(tokens, tokenizer.bos_id(), cfg.max_val_docs, table, rt.device)
    log.line(f"audit bytes: {audit_bytes(docs, table, tokenizer)} PASS")
    model.made_with |= {
        "settings": spell_settings(cfg, "travels"),
        "tokenizer": tokenizer_hash,
        "train_seq_len": cfg.train_seq_len,
    }
    hashes["tokenizer"] = tokenizer_hash
    return Inputs(model.to(rt.device), TokenStream(train_shards, cfg.vocab_size), docs, hashes)


def check_tokenizer(model: GPT, tokenizer: spm.SentencePieceProcessor, found: str, log: RunLog):
    """Raise `UserError` unless the artifact and the manifest of the shards name its SHA-256 `found`.

    Of a tokenizer that loses text, a line warns.
    """
    cfg = model.cfg
    manifest = Path(cfg.data_path, "manifest.json")
    listed = manifest.read_text() if manifest.is_file() else ""
    theirs = model.made_with.get("tokenizer", found)
    require(
        theirs == found and (found in listed or '"tokenizer.model"' not in listed),
        f"TOKENIZER_PATH={cfg.tokenizer_path}: found SHA-256 {found}, expected that of"
        f" {cfg.model_path if theirs != found else manifest}; give the tokenizer of the shards",
    )
    if cfg.model_path and not model.made_with:
        log.line(f"settings: {cfg.model_path} holds none; the environment's hold")
    probe = "Le Café in ZÜRICH, mixed Case"
    spelled = tokenizer.decode(tokenizer.encode(probe))
    if spelled != probe:
        log.line(f"warning: the tokenizer loses text, which flatters the score: {spelled!r}")


def run(cfg: Config, rt: Runtime, log: RunLog):
    """Load, train, export, score."""
    if cfg.eval_only:
        log.artifact = Path(cfg.model_path)
        log.artifact_hash = rt.from_rank0(lambda: digest(read_file(log.artifact)))
    model, stream, docs, hashes = rt.together(lambda: load_inputs(cfg, rt, log))
    cfg = model.cfg
    size = (len(docs.starts), len(docs.tokens))
    full = "full FineWeb" if size == FULL_VALIDATION else "not the full FineWeb"
    log.line(f"validation: {full} ({size[0]:,} documents, {size[1]:,} tokens)")
    log.line(
        f"model_params:{sum(p.numel() for p in model.parameters())} num_layers:{cfg.num_layers}"
        f" model_dim:{cfg.model_dim}"
    )
    trainer = None
    if not cfg.eval_only:
        flat = ladder(docs, model, rt)["flat"]
        validate = functools.partial(evaluate, model, docs, flat, rt)
        trainer = Trainer(model, stream, rt, log, hashes)
        if cfg.resume:
            trainer.resume()
        train(trainer, validate)
    if trainer or (stream.shards and "weights" not in model.made_with):
        if cfg.eval_only:
            log.line("calibration: on training text, which the rules forbid after training")
        calibrate(model, stream, int(docs.tokens[docs.starts[0]]), rt, log)
    if trainer or log.artifact.suffix != ".ptz":
        # Before any long evaluation, which must not lose a trained model.
        with rt.signals.deferred():
            rt.from_rank0(lambda: export(model, stream, log))
    if trainer:
        trainer.report(validate())
    score_artifact(model, docs, rt, log)


def read_artifact(cfg: Config, log: RunLog) -> dict:
    """The weights in the artifact, as read back from disk. `UserError` if it changed meanwhile."""
    path = log.artifact
    blob = read_file(path)
    found = digest(blob)
    require(
        found == log.artifact_hash,
        f"{path}: its SHA-256 is {found}, expected {log.artifact_hash}: another program replaced it;"
        " give every run its own OUT_DIR",
    )
    size = len(blob) + len(source_code())
    room = cfg.artifact_budget - size
    verdict = "PASS" if room >= 0 else "FAIL"
    log.line(f"sha256 artifact:{found} {path.name}")
    log.line(f"submission_size:{size} budget:{cfg.artifact_budget} headroom:{room} {verdict}")
    return parse_weights(blob, path)[0]


def score_artifact(model: GPT, docs: Documents, rt: Runtime, log: RunLog):
    """Read the artifact back from disk and score it under every condition of EVAL."""
    cfg = model.cfg
    model.load_state_dict(rt.from_rank0(lambda: read_artifact(cfg, log)))
    log.line(
        "conditions: causal (audit causality), normalised (softmax over the vocabulary, mixed"
        " with weights that sum to 1; tests/test_model.py, tests/test_mixtures.py), score first"
        " (audit causality), one pass (audit coverage)"
    )
    rungs = ladder(docs, model, rt)
    names = [name for name in cfg.eval if name in rungs]
    if len(names) < len(cfg.eval):
        problem = f"{log.artifact} holds no weights of mixtures, and calibration found none"
        require("EVAL" not in os.environ, f"EVAL: {problem}; leave the mixtures out")
        log.line(f"left out of EVAL: the mixtures, since {problem}")
    scores = {}
    known = {}
    spent = {}  # seconds by condition or expert
    total = 0.0
    for name in names:
        how = rungs[name]
        began = rt.seconds()
        compared = rt.together(lambda how=how: audit_causality(model, docs, how, rt))
        auditing = rt.seconds() - began
        log.line(f"audit causality: condition:{name} {compared} PASS")
        parts = (*how.experts, how)
        for part in parts:
            began = rt.seconds()
            score_tokens(model, docs, part, rt, known)
            spent.setdefault(part, rt.seconds() - began)
        scores[name] = evaluate(model, docs, how, rt, known)
        seconds = sum(spent[part] for part in parts)
        report_condition(name, how, scores[name], scores[names[0]], seconds, docs, log)
        if name in ("flat", names[-1]):
            total += auditing + seconds
    verdict = ""
    if cfg.preset == "baseline":
        verdict = " limit:600s PASS" if total <= 600 else " limit:600s FAIL"
    log.line(f"total_eval_time:{total:.1f}s{verdict}")
    if cfg.scores_path:
        path = Path(cfg.out_dir, cfg.scores_path)
        rt.from_rank0(lambda: write_scores(path, scores, docs, log))


def report_condition(
    name: str,
    how: Condition,
    score: Score,
    first: Score,
    seconds: float,
    docs: Documents,
    log: RunLog,
):
    """Log coverage and score: for people, in the old tools' format, and as JSON."""
    before = docs.starts[0] if how.isolated else 0
    targets = len(docs.tokens) - 1
    log.line(
        f"audit coverage: condition:{name} targets:{targets + docs.beyond_limit}"
        f" scored_once:{score.tokens} before_first_bos:{before}"
        f" after_last_row:{targets - before - score.tokens}"
        f" beyond_max_val_docs:{docs.beyond_limit} PASS"
    )
    documents = len(np.unique(score.columns["doc"].clip(0)))
    spent = f"eval_time:{1000 * seconds:.0f}ms"
    log.line(
        f"ladder condition:{name} val_loss:{score.loss:.6f} val_bpb:{score.bpb:.6f}"
        f" delta_bpb:{score.bpb - first.bpb:+.4f} docs:{documents} tokens:{score.tokens}"
        f" bytes:{score.bytes} {spent}"
    )
    result = {
        "condition": name,
        "val_loss": score.loss,
        "val_bpb": score.bpb,
        "documents": documents,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "seconds": round(seconds, 3),
        "partial": bool(log.suffix),
    }
    log.line(f"result: {json.dumps(result)}", suffix=False)
    if how.final:
        log.line(f"{how.final} {score} {spent}")
    if name == "flat":
        log.line(f"{how.final}_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")


def write_scores(path: Path, scores: dict, docs: Documents, log: RunLog):
    """Write the losses of all conditions: sums by chunk as .csv, or those of all tokens as .npz.

    An .npz holds starts and predictions (docs,), bytes (n - 1,), and for every condition its losses
    (n - 1,) in nats, nan where it scores nothing.
    """
    if path.suffix == ".npz":
        buffer = io.BytesIO()
        losses = {name: score.losses for name, score in scores.items()}
        spans = {"starts": docs.starts, "predictions": docs.predictions, "bytes": docs.bytes}
        np.savez(buffer, **spans, **losses)
        data = buffer.getvalue()
    else:
        lines = [",".join(("condition", *next(iter(scores.values())).columns))]
        for name, score in scores.items():
            for row in zip(*score.columns.values(), strict=True):
                lines.append(",".join(map(str, (name, *row))))
        data = ("\n".join(lines) + "\n").encode()
    write_atomically(path, data)
    log.line(f"scores:{path} sha256:{digest(data)}")


def explain_stop(number: int, cfg: Config, log: RunLog) -> str:
    """The name of the signal and the commands that continue."""
    lines = [f"stopped by {signal.Signals(number).name}"]
    if not cfg.eval_only:
        resume = "auto"
        if cfg.resume and not find_checkpoints(cfg, log.run_id):
            resume = cfg.resume  # perhaps a path: this run has no checkpoint of its own yet
        command = launch_command(os.environ, RESUME=resume, RUN_ID=log.run_id)
        lines.append(f"go on with: {command}")
    if log.artifact:
        command = launch_command(
            os.environ, EVAL_ONLY="1", MODEL_PATH=str(log.artifact), RUN_ID=str(uuid.uuid4())
        )
        lines.append(f"score the artifact alone with: {command}")
    return "\n".join(lines)


def explain_error(error: Exception) -> str:
    """What happened, in one line. Prints a traceback if no user could know."""
    text = str(error)
    if re.search("out of memory|(annot|can't) allocate memory|Unable to allocate", text):
        return (
            f"out of memory ({text:.200}); lower TTT_BATCH_SIZE or VAL_BATCH_SIZE, or raise"
            " GRAD_ACCUM_STEPS"
        )
    if isinstance(error, OSError):
        return text
    if "gloo/transport" in text:
        return "lost another rank, which may have said why"
    traceback.print_exc()
    return f"{error!r:.300}"


def main(arguments: Sequence[str] = ()) -> int:
    """Run the program. Returns its exit status: 0 done, 1 error, 75 stopped by a signal."""
    log = RunLog()
    rt = None
    status = 0
    message = ""
    is_alone = False  # whether this rank fails by itself
    try:
        try:
            require(
                not arguments,
                f"command line: found {' '.join(arguments)!r:.80}, expected nothing; settings are"
                " environment variables: ITERATIONS=500 python train_gpt.py",
            )
            cfg = read_config(os.environ)
            rt = Runtime.create(cfg, os.environ)
            rt.signals.install()
            log.rank = rt.rank
            log.run_id = rt.from_rank0(lambda: choose_run_id(cfg))
            rt.from_rank0(lambda: log.open(cfg, rt, os.environ))
            run(cfg, rt, log)
        except UserError as error:
            status = 1
            if rt is None and os.environ.get("LOCAL_RANK", "0") != "0":
                time.sleep(30)  # torchrun kills all ranks once one exits: let rank 0 speak first
            elif log.rank == 0:
                message = f"error: {error}"
        except Exception as error:
            # This rank's own error: print it here.
            status = 1
            is_alone = True
            where = f"rank {rt.rank}: " if rt and rt.world > 1 else ""
            message = f"error: {where}{UserError(explain_error(error))}"
    except Stopped as stopped:
        # Perhaps out of an `except` above: a collective fails when another rank stops first.
        status = 75
        if rt.rank == 0:
            message = explain_stop(stopped.args[0], cfg, log)
    finally:
        if rt:
            rt.signals.is_deferred = True  # too late to stop
    if message:
        print(message, file=sys.stderr, flush=True)
        log.append(message + "\n")
    if dist.is_initialized() and not is_alone:
        dist.destroy_process_group()
        time.sleep(0.1)  # gloo's threads need the interpreter to free their tensors
    return status


if __name__ == "__main__":
    gc.freeze()  # imported objects live to the end: the collector can skip them
    sys.exit(main(sys.argv[1:]))
