#!/usr/bin/env python3
"""Train a small GPT under a hard budget, save it in 16,000,000 bytes, and score it by test-time training.

    python train_gpt.py                                       one process, on whatever device there is
    torchrun --standalone --nproc_per_node=8 train_gpt.py     the full run on eight GPUs; 2 for two CPU cores (gloo)
    EVAL_ONLY=1 MODEL_PATH=final_model.int8.ptz python train_gpt.py       score an artifact, train nothing

Every setting is an environment variable: the fields of `Config`, in capitals. The number to read is `val_bpb`, bits per
UTF-8 byte of the validation text; lower is better. The `ladder` lines at the end score the artifact as read back from
disk under the conditions that EVAL names; under `ttt` every document teaches its own throw-away adapters. The `audit`
lines are checks that stop the run when they fail. In reading order, each band leaning only on those above it: config,
runtime, byte metric, data, model, optimizers, artifact, adapters, evaluation, audits, training, main.

Shapes: B rows (sequences or documents), T tokens of input, S scored positions, D model dim, H heads, N head dim,
R adapter rank, V vocabulary, P adapter numbers of one document, C chunk, W window, G kv heads. Losses are in nats."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import difflib
import fcntl
import functools
import gc
import io
import itertools
import math
import os
import pickletools
import re
import shlex
import signal
import sys
import threading
import time
import traceback
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

# ==== Config: what can be set =========================================================================================
RUNGS = ("flat", "doc", "stride", "ttt", "stream_fast", "stream")
TARGETS = ("c_q", "c_k", "c_v", "attn.proj", "fc", "mlp.proj", "lm_head")
MOST_LAYERS = 300  # `unpack` takes a checkpoint's table of contents up to that of 364
# Overrides of the defaults in `Config`. `cpu` was chosen by measurement on two cores; records/NOTES.md has the tries.
PRESETS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "cpu": dict(
        data_path="./data/demo",
        tokenizer_path="./data/demo/tokenizer.model",
        max_wallclock_seconds=175.0,
        num_layers=4,
        model_dim=192,
        num_heads=3,
        num_kv_heads=1,
        train_seq_len=512,
        train_batch_tokens=2048,
        grad_accum_steps=2,
        val_batch_size=16384,
        matrix_lr=0.03,
        scalar_lr=0.02,
        tied_embed_lr=0.03,
        warmup_steps=1,
        warmdown_iters=600,
        muon_momentum=0.8,
        muon_momentum_warmup_steps=0,
        val_loss_every=0,
        train_log_every=50,
        ttt_eval_seq_len=512,
        eval=("flat", "doc", "stride", "ttt", "stream"),
        checkpoint_seconds=30.0,
        ttt_batch_size=16,
    ),
}


class UserError(ValueError):
    """Something a user can put right: shown as one line, without a traceback, with exit status 1."""

    def __str__(self) -> str:  # what a stranger's file says must not reach a terminal as it is
        return "".join(c if c.isprintable() else "?" for c in super().__str__())[:1500]


class AgreedError(UserError):
    """A `UserError` that every rank raises alike, so that rank 0 alone shows it."""


def require(holds: Any, line: str, kind: type[UserError] = UserError) -> None:
    """Refuse, with this line, what does not hold."""
    if not holds:
        raise kind(line)


def _opt(
    default: Any, unit: str, least: float = -1e18, most: float = 1e18, choices: tuple[str, ...] = ()
) -> Any:
    """A field of `Config`: its default, what it counts, and the numbers or the words that it accepts."""
    return field(
        default=default, metadata={"unit": unit, "least": least, "most": most, "choices": choices}
    )


@dataclass(frozen=True)
class Config:
    """Every setting of a run, with the published record's defaults; its variable is its name in capitals."""

    # What to run, and where
    preset: str = _opt(
        "auto", "baseline with CUDA, cpu elsewhere", choices=("auto", "baseline", "cpu")
    )
    device: str = _opt("auto", "cuda where there is one", choices=("auto", "cpu", "cuda"))
    dtype: str = _opt(
        "auto", "compute dtype; bfloat16 where it is fast", choices=("auto", "bfloat16", "float32")
    )
    compile: str = _opt(
        "auto", "torch.compile for training; auto: where it pays", choices=("auto", "0", "1")
    )
    eval_only: bool = _opt(False, "1: score MODEL_PATH, train nothing")
    model_path: str = _opt("", "start from the weights and the shape of this .pt or .ptz file")
    data_path: str = _opt("./data/datasets/fineweb10B_sp1024", "folder of shards")
    tokenizer_path: str = _opt("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model")
    out_dir: str = _opt(".", "folder for everything the run writes")
    artifact_budget: int = _opt(
        16_000_000, "bytes of script and artifact; the weights lose what does not fit", 1
    )
    run_id: str = _opt(
        "",
        "name of log and checkpoints; if empty, that of the checkpoint that auto finds, or a uuid4",
    )
    scores_path: str = _opt("", "in OUT_DIR: a .csv with the scores of every chunk; none if empty")
    resume: str = _opt(
        "", "auto: go on from the newest checkpoint in OUT_DIR, if any; or the path of one"
    )
    checkpoint_every: int = _opt(0, "steps between checkpoints; 0: none", 0)
    checkpoint_seconds: float = _opt(0.0, "seconds of training between checkpoints; 0: none", 0)
    rank_timeout_seconds: float = _opt(
        600.0, "how long a rank waits for the others before it gives up", 1, 1e6
    )
    # What is reported on the way
    warmup_steps: int = _opt(20, "steps that prime the machine and are undone", 0, 1e4)
    val_batch_size: int = _opt(
        524288, "tokens per flat-evaluation step, all ranks and micro-steps", 1
    )
    val_loss_every: int = _opt(1000, "steps between validations; 0: only the last", 0)
    train_log_every: int = _opt(200, "steps between loss lines; 0: none", 0)
    max_val_docs: int = _opt(0, "evaluate only the first N documents; 0: all", 0)
    # What decides the weights, from `seed` to `grad_clip_norm`: a checkpoint goes on under the same settings only
    seed: int = _opt(1337, "seed of weights and adapters", 0)
    iterations: int = _opt(20000, "steps at most", 0)
    max_wallclock_seconds: float = _opt(600.0, "seconds of training; 0: no cap", 0)
    warmdown_iters: int = _opt(1200, "steps over which the rates fall to 0", 0)
    train_batch_tokens: int = _opt(524288, "tokens per step, all ranks and micro-steps", 1, 1e9)
    train_seq_len: int = _opt(1024, "tokens per row in training and flat evaluation", 1, 65536)
    grad_accum_steps: int = _opt(
        0, "micro-steps per step; 0: 8 (cpu: 2) / world size where whole, else 1", 0
    )
    # Model
    vocab_size: int = _opt(1024, "pieces", 4, 65536)
    num_layers: int = _opt(9, "blocks", 1, MOST_LAYERS)
    model_dim: int = _opt(512, "width", 2, 65536)
    num_heads: int = _opt(8, "query heads", 1, 1000)
    num_kv_heads: int = _opt(4, "key/value heads", 1, 1000)
    mlp_mult: int = _opt(2, "MLP width / model width", 1, 1000)
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
    muon_momentum: float = _opt(0.95, "momentum after its warm-up", 0, 1)
    muon_momentum_warmup_start: float = _opt(0.85, "momentum at step 0", 0, 1)
    muon_momentum_warmup_steps: int = _opt(500, "steps from the first to the second", 0)
    muon_backend_steps: int = _opt(5, "Newton-Schulz iterations", 0, 100)
    beta1: float = _opt(0.9, "Adam", 0, 0.999999)
    beta2: float = _opt(0.95, "Adam", 0, 0.999999)
    adam_eps: float = _opt(1e-8, "Adam", 0)
    grad_clip_norm: float = _opt(0.0, "global norm; 0: no clipping", 0)
    # Evaluation and its test-time training
    eval: tuple[str, ...] = _opt(("flat", "ttt", "stream"), "conditions, in order", choices=RUNGS)
    eval_max_seconds: float = _opt(
        0.0, "seconds for each condition that learns, then a partial score; 0: no cap", 0
    )
    ttt_lora_rank: int = _opt(8, "adapter rank", 1, 1024)
    ttt_lora_lr: float = _opt(0.01, "Adam rate of the adapters", 0)
    ttt_chunk_size: int = _opt(256, "predictions scored, then learned from, at once", 1, 65536)
    ttt_eval_seq_len: int = _opt(1024, "tokens of context at most", 1, 65536)
    ttt_batch_size: int = _opt(64, "documents side by side", 1)
    ttt_stream_chunk: int = _opt(
        64, "stream: predictions scored, then learned from, at once", 1, 65536
    )
    ttt_stream_lr: float = _opt(0.0045, "stream: Adam rate at the start of a document", 0)
    ttt_stream_rank: int = _opt(32, "stream: adapter rank", 1, 1024)
    ttt_stream_targets: tuple[str, ...] = _opt(
        TARGETS[3:], "stream: projections with adapters", choices=TARGETS
    )


def _parse(name: str, text: str, spec: Any) -> Any:
    """The value that `text` spells for the field `spec`, or `AgreedError` saying what was expected."""
    least, most, choices = (spec.metadata[key] for key in ("least", "most", "choices"))
    kind, span, words = type(spec.default), f"from {least:g} to {most:g}", ", ".join(choices)
    with contextlib.suppress(ValueError, KeyError):
        require(text.isprintable(), "bytes that are no text")
        values = (
            text.split(",")
            if kind is tuple
            else [{"0": False, "1": True}[text] if kind is bool else kind(text)]
        )
        known = len(set(values) & set(choices)) == len(values)  # and none twice
        if known if choices else kind is str or least <= values[0] <= most:
            return tuple(values) if kind is tuple else values[0]
    expected = {
        bool: "0 or 1",
        int: f"a whole number {span}",
        float: f"a number {span}",
        str: f"one of {words}",
    }
    expected = "text" if kind is str and not choices else expected.get(kind, f"some of {words}")
    raise AgreedError(f"{name}={text!r:.60}: expected {expected}; set it so or unset it")


def spell(value: Any) -> str:
    """The text that stands for a setting's value in the environment: what `_parse` reads back."""
    plain = int(value) if isinstance(value, bool) else value
    return ",".join(map(spell, value)) if isinstance(value, tuple) else str(plain)


def read_config(env: Mapping[str, str]) -> Config:
    """Settings from the environment, else the preset's, else the defaults. `AgreedError` for what cannot be or work."""
    given = {
        f.name: _parse(f.name.upper(), env[f.name.upper()], f)
        for f in fields(Config)
        if f.name.upper() in env
    }
    device = given.get("device", "auto").replace(
        "auto", "cuda" if torch.cuda.is_available() else "cpu"
    )
    preset = given.get("preset", "auto").replace("auto", "baseline" if device == "cuda" else "cpu")
    world = _parse("WORLD_SIZE", env.get("WORLD_SIZE", "1"), _opt(1, "ranks", 1))
    alone = PRESETS[preset].get(
        "grad_accum_steps", 8
    )  # of one rank; more share them, and tokens keep their order
    steps = given.get("grad_accum_steps") or (alone // world if alone % world == 0 else 1)
    return check(
        Config(
            **PRESETS[preset] | given | dict(device=device, preset=preset, grad_accum_steps=steps)
        ),
        world,
    )


def count_parameters(cfg: Config) -> int:
    """Numbers in the model: embedding and head, skip weights, then matrices, vectors and gains of each block."""
    dim, kv_dim = cfg.model_dim, cfg.num_kv_heads * cfg.model_dim // cfg.num_heads
    block = dim * (2 * dim + 2 * kv_dim + 2 * cfg.mlp_mult * dim + 4) + cfg.num_heads
    return (
        dim * (cfg.vocab_size * (2 - cfg.tie_embeddings) + cfg.num_layers // 2)
        + cfg.num_layers * block
    )


def check(cfg: Config, world: int) -> Config:
    """The settings, unless they parse one by one but cannot work together (`AgreedError`)."""
    unit, scores = (
        world * cfg.grad_accum_steps * cfg.train_seq_len,
        Path(cfg.out_dir, cfg.scores_path),
    )
    name, ask = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,180}", functools.partial(require, kind=AgreedError)
    ask(
        re.fullmatch(f"({name})?", cfg.run_id),
        f"RUN_ID={cfg.run_id!r:.80}: expected letters, digits, '.', '_' and '-', since it names files; rename it",
    )
    ask(
        re.fullmatch(rf"({name}\.csv)?", cfg.scores_path)
        and not (cfg.scores_path and scores.is_dir()),
        f"SCORES_PATH={cfg.scores_path!r:.80}: expected the name of a file in OUT_DIR, ending in .csv; rename it",
    )
    ask(
        cfg.model_path or not cfg.eval_only,
        "EVAL_ONLY=1: found no MODEL_PATH, expected the .ptz or .pt file to score",
    )
    for key, chunk in (
        ("TTT_CHUNK_SIZE", cfg.ttt_chunk_size),
        ("TTT_STREAM_CHUNK", cfg.ttt_stream_chunk),
    ):
        ask(
            chunk <= cfg.ttt_eval_seq_len,
            f"{key}={chunk}: expected at most TTT_EVAL_SEQ_LEN={cfg.ttt_eval_seq_len}",
        )
    ask(
        cfg.model_dim % (2 * cfg.num_heads) == 0,
        f"MODEL_DIM={cfg.model_dim}: expected a multiple of {2 * cfg.num_heads}, an even dim for each of NUM_HEADS",
    )
    ask(
        cfg.num_heads % cfg.num_kv_heads == 0,
        f"NUM_HEADS={cfg.num_heads}: expected a multiple of NUM_KV_HEADS={cfg.num_kv_heads}; change one of them",
    )
    most = min(
        1e9, max(6e7, 15 * cfg.artifact_budget)
    )  # half a bit for each, and what `read_weights` unpacks
    ask(
        count_parameters(cfg) <= most,
        f"MODEL_DIM, NUM_LAYERS, MLP_MULT: found a model of {count_parameters(cfg)}"
        f" parameters, expected at most {most:.0f} for ARTIFACT_BUDGET={cfg.artifact_budget}",
    )
    ask(
        cfg.eval_only or cfg.train_batch_tokens % unit == 0,
        f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: expected a multiple of {unit} (world size {world} x"
        f" GRAD_ACCUM_STEPS {cfg.grad_accum_steps} x TRAIN_SEQ_LEN {cfg.train_seq_len}); the nearest is"
        f" {max(unit, round(cfg.train_batch_tokens / unit) * unit)}",
    )
    return cfg


# ==== Runtime: devices, ranks, clocks and log files live here and nowhere else ========================================
@dataclass
class Runtime:
    """Device, precision, rank, world, reductions and logging of this process. The rest of the file never asks."""

    device: torch.device
    dtype: torch.dtype  # of matrix products and attention
    rank: int = 0
    world: int = 1
    run_id: str = ""
    log_path: Path | None = None
    noise: float = (
        0.0  # nats by which a score may differ if computed twice: on CPUs kernels repeat to the bit
    )
    suffix: str = (
        ""  # " partial" when only some documents are evaluated, so that no line can be mistaken
    )
    heard: int = 0  # the signal that asked this rank to stop; 0: none did
    heard_at: float = math.inf  # seconds of the monotonic clock
    signal: int = 0  # what some rank has heard, and all have agreed on
    muted: bool = False  # whether lines of the log have been lost
    patience: float = 0.0  # seconds that this rank waits for the others

    @classmethod
    def create(cls, cfg: Config, env: Mapping[str, str]) -> Runtime:
        """Claim the device and join the other ranks that torchrun started. `AgreedError` where GPUs are lacking."""
        given = [
            env.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        ]
        found = "RANK={}, WORLD_SIZE={}, LOCAL_RANK={}, LOCAL_WORLD_SIZE={}".format(*given)
        sound = all(map(str.isdecimal, given)) and int(given[0]) < max(int(given[1]), 1)
        require(
            sound,
            f"{found}: expected whole numbers, the rank below the world size, as torchrun sets them",
        )
        rank, world, local, here = map(int, given)
        rt = cls(
            torch.device("cpu"),
            choose_dtype(cfg)[0],
            rank,
            world or 1,
            patience=cfg.rank_timeout_seconds,
        )
        if cfg.device == "cuda":
            if (needed := here or 1) > (gpus := torch.cuda.device_count()):
                raise AgreedError(
                    f"DEVICE=cuda: {needed} ranks on this machine, found {gpus} GPUs; start fewer ranks"
                )
            rt.device, rt.noise = (
                torch.device("cuda", local),
                1e-2,
            )  # backward kernels add atomically, in any order
            torch.cuda.set_device(rt.device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
                rt.dtype != torch.float32
            )
            # Only flash attention, so that a slow fallback fails loudly; fp32 has no flash kernel and needs the other.
            torch.backends.cuda.enable_cudnn_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(False)
            torch.backends.cuda.enable_math_sdp(rt.dtype == torch.float32)
        elif mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
            # glibc keeps what is freed: asking the kernel for every tensor anew costs up to a third of a step.
            mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the top of the heap
        if world:
            # gloo carries what lives on the CPU (clock, error lines), so that agreeing on them never waits for a GPU.
            backend = "cpu:gloo,cuda:nccl" if cfg.device == "cuda" else "gloo"
            try:
                # A store of its own for each attempt of torchrun, else it meets the addresses of the dead.
                wait, attempt = (
                    timedelta(seconds=rt.patience),
                    env.get("TORCHELASTIC_RESTART_COUNT", "0"),
                )
                rt.store = dist.PrefixStore(
                    attempt, next(dist.rendezvous("env://", timeout=wait))[0]
                )
                dist.init_process_group(
                    backend, store=rt.store, rank=rank, world_size=world, timeout=wait
                )
            except (ValueError, RuntimeError) as error:
                raise UserError(
                    f"{found}: cannot meet the other ranks ({error!r:.200}); start with torchrun"
                ) from None
        names = [
            path.name.rsplit(".", 2)[0] for path in find_checkpoints(cfg) if cfg.resume == "auto"
        ]
        rt.run_id = rt.gather(cfg.run_id or [*names, str(uuid.uuid4())][0])[0]
        rt.log_path, rt.suffix = (
            Path(cfg.out_dir, "logs", f"{rt.run_id}.txt"),
            " partial" * (cfg.max_val_docs > 0),
        )
        rt.together(lambda: rt.rank or rt.open_log(cfg, env))
        return rt

    def open_log(self, cfg: Config, env: Mapping[str, str]) -> None:
        """Claim the log file and start it with what identifies the run, this script first. `UserError`, `OSError`."""
        for folder in (
            folders := [Path(cfg.out_dir, name) for name in ("logs", "checkpoints", "")]
        ):
            folder.mkdir(parents=True, exist_ok=True)
        self.lock = self.log_path.open("a")
        try:
            fcntl.flock(
                self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # until this process ends, in whatever way
        except OSError as error:  # a file system that cannot lock stops nobody
            line = f"RUN_ID={self.run_id}: a run is writing {self.log_path}; choose another RUN_ID or OUT_DIR, or wait"
            require(not isinstance(error, BlockingIOError), line)
        if self.lock.tell():  # the log of an earlier run of that name gets a number
            names = (self.log_path.with_suffix(f".{number}.txt") for number in itertools.count(1))
            self.write(
                next(path for path in names if not path.exists()), self.log_path.read_bytes()
            )
            self.lock.truncate(0)
        for rest in (rest for folder in folders for rest in folder.glob(f".{self.run_id}~*.tmp")):
            rest.unlink()  # an attempt was killed while it wrote
        settings = {f.name.upper(): shlex.quote(spell(getattr(cfg, f.name))) for f in fields(cfg)}
        given = "".join(f"{name}={shlex.quote(env[name])} " for name in settings if name in env)
        launcher = (
            f"torchrun --standalone --nproc_per_node={self.world}"
            if "WORLD_SIZE" in env
            else "python"
        )
        info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
        cpu = [*re.findall(r"model name\s*:\s*(.+)", info), os.uname().machine][0]
        device = f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        if self.device.type == "cuda":
            device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        rule, (dtype, why) = "=" * 100, choose_dtype(cfg)
        self.log(
            "\n".join(
                (
                    source_code(),
                    rule,
                    f"Running Python {sys.version}",
                    f"Running PyTorch {torch.__version__}",
                    device,
                    rule,
                    time.strftime("started:%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    f"command: {given}{launcher} train_gpt.py",
                    "config: " + " ".join(f"{name}={value}" for name, value in settings.items()),
                    f"versions: python:{sys.version.split()[0]} torch:{torch.__version__} numpy:{np.__version__}"
                    f" sentencepiece:{spm.__version__}",
                )
            ),
            console=False,
        )
        self.log(
            f"preset:{cfg.preset} device:{self.device} world_size:{self.world} dtype:{dtype} ({why})"
        )
        self.log(f"data:{cfg.data_path} tokenizer:{cfg.tokenizer_path} log:{self.log_path}")
        self.log(f"sha256 script:{sha256(source_code().encode()).hexdigest()}")
        ours = [
            name for name in settings if "_" in name
        ]  # single words are other programs' as well
        for name in sorted(filter(str.isprintable, env.keys() - settings.keys())):
            for meant in difflib.get_close_matches(name, ours, 1, 0.85):
                self.log(f"warning: {name} is no setting of this script; {meant} is")

    def listen(self) -> None:
        """Begin to hear SIGTERM and SIGINT, in a thread: Python's handlers wait for what the main one is calling."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # only what has a handler goes through the pipe
        threading.Thread(target=self.hear, args=(reader,), daemon=True).start()

    def hear(self, pipe: int) -> None:
        """The first signal asks the run to stop at the next good moment, a second one ends the process."""
        while number := os.read(pipe, 1)[0]:
            if (
                time.monotonic() - self.heard_at > 0.5
            ):  # torchrun repeats at once what a terminal sends to all
                ctypes.CDLL(None).signal(
                    number, 0
                )  # the default action, which signal.signal sets in no thread
                os.kill(os.getpid(), number)
            self.heard, self.heard_at = number, min(self.heard_at, time.monotonic())

    def lost_ranks(self, wait: bool) -> str:
        """Tell the others that this rank ends; those that do not tell within 10 seconds, if it can `wait`, in words."""
        missing, end = (
            [rank for rank in range(self.world) if wait and rank != self.rank],
            time.monotonic() + 10,
        )
        with contextlib.suppress(RuntimeError):  # the store may be gone, too
            self.store.set(f"ended {self.rank}", "")
            while missing and time.monotonic() < end:
                missing = [rank for rank in missing if not self.store.check([f"ended {rank}"])]
                time.sleep(0.1)
        return f"no word from rank {', '.join(map(str, missing))}: " if missing else ""

    def log(self, text: str, console: bool = True) -> None:
        """Write to the log file and, unless told otherwise, to standard output, where only rank 0 speaks."""
        if self.log_path and not (console and self.rank):
            text += self.suffix * console + "\n"
            if console:
                with (
                    self.surviving("standard output"),
                    tqdm.external_write_mode(),
                ):  # lifts a bar out of the way
                    print(text, end="", flush=True)
            with (
                self.surviving(self.log_path, fatal=not console),
                self.log_path.open("a", encoding="utf-8") as file,
            ):
                file.write(text)

    @contextlib.contextmanager
    def surviving(self, what: str | Path, fatal: bool = False) -> Iterator[None]:
        """Where a log line is written: a full disk or a reader that has gone ends no run, but a log needs its head."""
        try:
            yield
        except OSError as error:
            require(not fatal, f"{what}: {error.strerror}; make room, or choose another OUT_DIR")
            if not self.muted:
                print(
                    f"warning: {what}: {error.strerror}; the run goes on, its log has gaps",
                    file=sys.stderr,
                )
            self.muted = True

    def write(self, path: Path, data: bytes | memoryview) -> None:
        """Put `data` at `path` entirely or not at all: a temporary name, flushed to the disk, then renamed."""
        temporary = path.with_name(f".{self.run_id}~{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise OSError(
                error.errno, f"{path}: {error.strerror}; not written, what was there still is"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    def save(self, path: Path, state: Mapping[str, Any]) -> None:
        """Write tensors and plain values for `load_state`. A full disk stops nothing but what a signal is stopping."""
        torch.save(state, buffer := io.BytesIO())
        try:
            self.write(path, buffer.getbuffer())
        except OSError as error:
            if self.heard:
                raise
            self.log(f"warning: the run goes on without this save: {error}")

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, on all of them."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], Any]) -> Any:
        """work() on every rank. If any refuses it, all of them raise `AgreedError` with the first refusal."""
        result, problem = None, ""
        try:
            result = work()
        except (UserError, OSError) as error:
            problem = str(error)
        for rank, line in enumerate(problems := self.gather(problem)):
            require(
                not line,
                line if problems == [line] * self.world else f"rank {rank}: {line}",
                AgreedError,
            )
        return result

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def average(self, shares: list[list[Tensor]]) -> None:
        """Replace the tensors of this rank's own share, `shares[rank]`, by their means over the ranks, made in fp32."""
        # All-to-all: gloo's reduce-scatter moves twice the bytes (records/NOTES.md), and shares may be of any size.
        if self.world > 1:
            sizes, own = (
                [sum(tensor.numel() for tensor in share) for share in shares],
                shares[self.rank],
            )
            sent = torch.cat([tensor.flatten().float() for share in shares for tensor in share])
            received = sent.new_empty(self.world, sizes[self.rank])
            dist.all_to_all_single(received.view(-1), sent, [sizes[self.rank]] * self.world, sizes)
            for tensor, mean in zip(
                own, received.mean(0).split([tensor.numel() for tensor in own]), strict=True
            ):
                tensor.copy_(mean.view_as(tensor))

    def exchange(self, shares: list[list[Tensor]]) -> None:
        """Make the tensors of each share those of its owner on every rank: an all-gather of any sizes and dtypes."""
        if self.world > 1:
            parts = [[tensor.view(-1).view(torch.uint8) for tensor in share] for share in shares]
            sizes, every = [sum(map(len, part)) for part in parts], list(itertools.chain(*parts))
            sent = torch.cat([every[0][:0], *parts[self.rank]]).repeat(self.world)
            received = sent.new_empty(sum(sizes))
            dist.all_to_all_single(received, sent, sizes, [sizes[self.rank]] * self.world)
            torch._foreach_copy_(every, list(received.split(list(map(len, every)))))

    def upload(self, array: np.ndarray) -> Tensor:
        """The array on the device, without waiting for the copy where the device can overlap it."""
        tensor = torch.from_numpy(array)
        return (
            tensor.pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else tensor
        )

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Copy what rank 0 has in these tensors into those of the other ranks."""
        for tensor in tensors if self.world > 1 else ():
            dist.broadcast(tensor, 0)

    def from_rank0(self, value: float) -> float:
        """Rank 0's `value`, not negative, on every rank: replicas that read their own clocks would drift apart."""
        box = torch.tensor(
            [0.0 if self.rank else value, self.heard], dtype=torch.float64, device="cpu"
        )
        if self.world > 1:
            dist.all_reduce(box, dist.ReduceOp.MAX)
        self.signal = int(box[1])  # so that all ranks stop after the same step
        return box[0].item()

    def seconds(self, wait: bool = True) -> float:
        """The clock, read when the device has done all that was asked of it unless told not to `wait`."""
        if wait and self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def progress(self, total: float, what: str) -> tqdm:
        """A progress bar for a person at a terminal; silent in pipes, in files and on other ranks."""
        layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        hidden = not self.log_path or self.rank > 0 or not sys.stderr.isatty()
        return tqdm(total=total, desc=what, disable=hidden, leave=False, bar_format=layout)


def share_documents(work: np.ndarray, count: int) -> list[np.ndarray]:
    """Documents of each of `count` ranks or seats, most work first: the longest one left goes to the least loaded."""
    loads, shares = np.zeros(count, dtype=np.int64), [[] for _ in range(count)]
    for document in np.argsort(-work, kind="stable"):
        least = loads.argmin()
        shares[least].append(document)
        loads[least] += work[document]
    return [np.array(share, dtype=np.int64) for share in shares]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 256) -> Tensor:
    """softmax(q k^T / sqrt(N)) v under a causal mask: q (B, H, T, N), k and v (B, G, T, N), G dividing H -> like q."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # The flash kernel for CPUs loses to plain bf16 matrix products, half of which a causal mask saves when queries are
    # taken in blocks that see the keys up to their own end (records/NOTES.md).
    rows, (length, dim), share = q.size(0) * k.size(1), q.shape[2:], q.size(1) // k.size(1)
    k, v, out, end = k.reshape(rows, length, dim), v.reshape(rows, length, dim), [], 0
    for part in (q * dim**-0.5).reshape(rows, share, length, dim).split(block, dim=2):
        begin, end = end, end + part.size(2)
        future = torch.full((end - begin, end), -math.inf, dtype=q.dtype, device=q.device).triu(
            begin + 1
        )
        scores = torch.baddbmm(future.repeat(share, 1), part.reshape(rows, -1, dim), k[:, :end].mT)
        out.append((scores.softmax(-1) @ v[:, :end]).view(part.shape))
    return torch.cat(out, dim=2).view(q.shape)


def choose_dtype(cfg: Config) -> tuple[torch.dtype, str]:
    """(compute dtype, why). DTYPE=auto is bf16 where the hardware multiplies it natively, else fp32."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype), "DTYPE"
    gpu = cfg.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    found = {"bf16": gpu} if cfg.device == "cuda" else torch.cpu.get_capabilities()
    native = [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if found.get(flag)]
    return (
        (torch.bfloat16, f"{cfg.device} has {native[0]}")
        if native
        else (torch.float32, f"{cfg.device} has no bf16")
    )


# What the pickle of a file with tensors may name.
PICKLED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Float", "BFloat16", "Half", "Char", "Byte", "Long")),
}


@functools.cache
def source_code() -> str:
    """This file's own text, which heads every log and counts towards the budget: read once, lest it be edited."""
    return Path(__file__).read_bytes().decode()


def read_file(path: str | Path) -> bytes:
    """The bytes of a regular file; `UserError` for anything else, since a pipe might never end."""
    found = "something else than a file" if Path(path).exists() else "nothing"
    require(Path(path).is_file(), f"{path}: found {found}, expected a file")
    return Path(path).read_bytes()


@contextlib.contextmanager
def refusing(path: str | Path, expected: str) -> Iterator[None]:
    """Whatever goes wrong with the file at `path`, which may be damaged or a stranger's, becomes a `UserError`."""
    try:
        yield
    except Exception as error:
        found = str(error) if isinstance(error, UserError) else f"{error!r:.300}"
        raise UserError(f"{path}: unusable ({found:.900}); expected {expected}") from None


def unpack(blob: bytes) -> Any:
    """What torch.save made of tensors and plain values, executing nothing. Any exception for what it did not make. Time
    and memory are bounded by the size of the file: torch reads a copy of the entries that were looked at, whose pickle
    names nothing but tensors and recalls nothing but names (else a few bytes could stand for anything)."""
    entries = (archive := zipfile.ZipFile(io.BytesIO(blob))).infolist()
    pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
    plain = blob[:4] == b"PK\3\4" and not any(entry.compress_type for entry in entries)
    apart = (
        len({entry.filename for entry in entries}) == len(entries) <= 2**15
    )  # one entry may be listed often
    small = sum(entry.file_size for entry in entries) <= len(blob) and len(pickles) == 1
    require(
        plain and apart and small and pickles[0].file_size <= 2**20,
        "not laid out as torch.save does",
    )
    names, before = set(), ""
    for op, value, _ in pickletools.genops(archive.read(pickles[0])):
        known = (
            value in PICKLED if op.name == "GLOBAL" else value == 2 if op.name == "PROTO" else True
        )
        require(known, f"it names {value!r:.80}, which no tensors need")
        if op.name.endswith("BINPUT"):
            names.add(value) if before in ("BINUNICODE", "GLOBAL") else names.discard(value)
        require(not op.name.endswith("BINGET") or value in names, "it holds something twice")
        before = op.name
    with zipfile.ZipFile(copied := io.BytesIO(), "w") as clean:
        for entry in entries:
            clean.writestr(entry.filename, archive.read(entry))  # which also checks the checksums
    copied.seek(0)
    return torch.load(copied, map_location="cpu", weights_only=True)


def load_state(path: Path) -> dict[str, Any]:
    """What `Runtime.save` wrote. `UserError` where the file is damaged or something else."""
    with refusing(path, "a checkpoint of this script"):
        return unpack(read_file(path))


def find_checkpoints(cfg: Config, run_id: str = "*") -> list[Path]:
    """The checkpoints of a run, or of any, in OUT_DIR, the newest first."""
    found = Path(cfg.out_dir, "checkpoints").glob(f"{run_id}.step{9 * '[0-9]'}.pt")
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


# ==== Byte metric: the UTF-8 bytes that a token stands for ===========================================================
def load_tokenizer(path: str, vocab_size: int) -> spm.SentencePieceProcessor:
    """The SentencePiece model at `path`. `UserError` if it is missing, damaged or of another vocabulary."""
    expected = f"the SentencePiece .model that made the shards, with BOS and the model's {vocab_size} pieces"
    with refusing(f"TOKENIZER_PATH={path}", f"{expected}; correct the path or VOCAB_SIZE"):
        require(proto := read_file(path), "an empty file")
        tokenizer = spm.SentencePieceProcessor(model_proto=proto)
        found = f"found {tokenizer.vocab_size()} pieces, BOS id {tokenizer.bos_id()}"
        require(tokenizer.vocab_size() == vocab_size and tokenizer.bos_id() >= 0, found)
        tokenizer.id_to_piece(list(range(vocab_size)))  # every one is text
        return tokenizer


class ByteTable(NamedTuple):
    """UTF-8 bytes that a target token stands for: those of its piece's text, in which every `▁` is a space."""

    base: np.ndarray  # (V,) int64, bytes without a leading space; byte-fallback pieces: 1
    leading_space: np.ndarray  # (V,) bool; it counts only after a token that itself stands for text
    is_text: (
        np.ndarray
    )  # (V,) bool, false for control, unknown and unused pieces, which stand for 0 bytes

    @classmethod
    def build(cls, tokenizer: spm.SentencePieceProcessor) -> ByteTable:
        """The table of a tokenizer. `UserError` if it has no piece for a space on its own."""
        ids = list(range(tokenizer.vocab_size()))
        byte, pieces = np.array(tokenizer.is_byte(ids)), tokenizer.id_to_piece(ids)
        text = ~(
            np.array(tokenizer.is_control(ids))
            | tokenizer.is_unknown(ids)
            | tokenizer.is_unused(ids)
        )
        sizes = np.array(
            [len(piece.removeprefix("▁").replace("▁", " ").encode()) for piece in pieces]
        )
        line = "TOKENIZER_PATH: found no piece '▁', expected one, else spaces miscount; train it with one"
        require(
            text[tokenizer.piece_to_id("▁")], line
        )  # byte fallback would spell, and count, a space as three bytes
        space = np.array([piece.startswith("▁") for piece in pieces])
        return cls(np.where(byte, 1, sizes) * text, space & text & ~byte, text)

    def count(self, previous: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Bytes of each `target` given the token before it: ids of any shape -> int64 of that shape."""
        return self.base[target] + (self.leading_space[target] & self.is_text[previous])


# ==== Data: shards, the training stream, the validation documents =====================================================
def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped: (n,) uint16. `UserError` unless header, version and size agree."""
    size = path.stat().st_size if path.is_file() else 0
    magic, version, count = (
        np.fromfile(path, dtype="<i4", count=3).tolist() if size >= 1024 else (0, 0, 0)
    )
    found = f"{path}: found {size} bytes, magic {magic}, version {version}, {count} tokens"
    expected = "magic 20240520, version 1 and 1024 + 2 x tokens bytes; see data/README.md"
    require(
        (magic, version, size) == (20240520, 1, 1024 + 2 * count) and count > 0,
        f"{found}; expected {expected}",
    )
    return np.memmap(path, dtype="<u2", mode="r", offset=1024, shape=(count,))


def open_shards(folder: str, pattern: str) -> list[np.ndarray]:
    """All shards of `folder` that match, in sorted order; every header is checked now, not when its turn comes."""
    paths = sorted(Path(folder).glob(pattern))
    require(
        paths,
        f"DATA_PATH={folder}: found no {pattern}; expected shards, see data/README.md for making them",
    )
    return [open_shard(path) for path in paths]


class TokenStream:
    """The training tokens of all shards in order, wrapping forever. Its whole state is `position`."""

    def __init__(self, shards: list[np.ndarray]) -> None:
        self.shards, self.position = shards, 0
        self.begins = np.cumsum([0, *map(len, shards)])  # and, last, where the stream begins anew

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the endless stream: (count,) int64."""
        parts = []
        while count:
            start %= int(self.begins[-1])
            shard = int(np.searchsorted(self.begins, start, side="right")) - 1
            parts.append(self.shards[shard][start - int(self.begins[shard]) :][:count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts).astype(np.int64)

    def next_batch(self, cfg: Config, rt: Runtime) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of the next micro-step, each (B, T)."""
        # A micro-step consumes (local + 1) * world tokens; rank r takes the r-th span. The order of tokens depends on
        # world size times GRAD_ACCUM_STEPS alone, which by default stays the same for every world size that divides it.
        span = cfg.train_batch_tokens // (rt.world * cfg.grad_accum_steps) + 1
        tokens = rt.upload(self.read(self.position + rt.rank * span, span))
        self.position += span * rt.world
        return tokens[:-1].view(-1, cfg.train_seq_len), tokens[1:].view(-1, cfg.train_seq_len)


@dataclass(frozen=True)
class Documents:
    """The validation stream on the device, and its documents in stream order. Position p predicts token p + 1."""

    tokens: Tensor  # (n,) int32
    bytes: Tensor  # (n - 1,) int32, UTF-8 bytes of each position's target
    starts: np.ndarray  # (docs,) int64, the position of each document's BOS, the first that it owns
    predictions: (
        np.ndarray
    )  # (docs,) int64, how many it owns, all >= 1; the target of the last is the next BOS
    short: int = 0  # how many documents have no text
    beyond: int = 0  # targets beyond the last document, should there be a limit


def split_documents(
    stream: np.ndarray, bos: int, limit: int, table: ByteTable, device: torch.device
) -> Documents:
    """Cut the validation `stream` (n,) at BOS and put it on the device. `UserError` if there is nothing to predict."""
    total, starts = len(stream), np.flatnonzero(stream == bos)
    if (
        0 < limit < len(starts)
    ):  # keep the first so many documents and the BOS that closes the last of them
        stream, starts = stream[: starts[limit] + 1], starts[:limit]
    predictions = np.append(starts[1:], len(stream) - 1) - starts if len(starts) else starts
    sizes, scored = table.count(stream[:-1], stream[1:]), predictions > 0
    found = f"{len(starts)} BOS (id {bos}) and {sizes.sum()} bytes of text in {len(stream)} tokens"
    expected = "expected BOS, then text; see data/README.md"
    require(
        scored.any() and sizes.any(), f"validation shards: {found}: nothing to predict; {expected}"
    )
    tokens, sizes = (
        torch.from_numpy(array.astype(np.int32)).to(device) for array in (stream, sizes)
    )
    return Documents(
        tokens,
        sizes,
        starts[scored],
        predictions[scored],
        int((~scored).sum()),
        total - len(stream),
    )


# ==== Model ===========================================================================================================
# The LoRA pair of each adapted projection by its name: A (B, R, in) and B (B, out, R). One not named has none.
Adapters = Mapping[str, tuple[Tensor, Tensor]]
NO_LORA: Adapters = {}


def project(x: Tensor, weight: Tensor, lora: tuple[Tensor, Tensor] | None) -> Tensor:
    """x W^T, plus each row's own x A^T B^T: (B, T, in) -> (B, T, out), all in the dtype of x, whatever that of W."""
    out = F.linear(x, weight.to(x.dtype))
    return out if lora is None else torch.baddbmm(out, torch.bmm(x, lora[0].mT), lora[1].mT)


def rope_tables(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Factors (T, N) fp32 of a rotation, [cos, cos] and [sin, -sin] of position (T,) x frequency, built in fp64."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angle = torch.outer(positions.double(), base**-exponent)
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)


class Block(nn.Module):
    """Causal attention with grouped heads, then an MLP with relu squared; it can mix the embedding back in first."""

    def __init__(self, cfg: Config, name: str) -> None:
        super().__init__()
        self.name, dim, self.head_dim = name, cfg.model_dim, cfg.model_dim // cfg.num_heads
        kv_dim, hidden = cfg.num_kv_heads * self.head_dim, cfg.mlp_mult * dim
        sizes = {"c_q": dim, "c_k": kv_dim, "c_v": kv_dim, "proj": dim}
        self.attn = nn.ModuleDict(
            {part: nn.Linear(dim, size, bias=False) for part, size in sizes.items()}
        )
        self.attn.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        self.mlp = nn.ModuleDict(
            {"fc": nn.Linear(dim, hidden, bias=False), "proj": nn.Linear(hidden, dim, bias=False)}
        )
        self.attn_scale, self.mlp_scale = (
            nn.Parameter(torch.ones(dim)),
            nn.Parameter(torch.ones(dim)),
        )
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))

    def forward(
        self, x: Tensor, x0: Tensor, rope: tuple, adapters: Adapters, attention: Callable
    ) -> Tensor:
        """Residual stream x, normed embedding x0 -> x, (B, T, D) of one dtype; rope: two (T, N) or (B, 1, T, N)."""
        attn, mlp, name, (cos, sin) = self.attn, self.mlp, self.name, rope
        mix, attn_scale, mlp_scale = (
            p.to(x.dtype) for p in (self.resid_mix, self.attn_scale, self.mlp_scale)
        )
        x = torch.addcmul(mix[0] * x, mix[1], x0)
        y = F.rms_norm(x, x.shape[-1:])
        q, k, v = (
            project(y, attn[part].weight, adapters.get(f"{name}.attn.{part}"))
            for part in ("c_q", "c_k", "c_v")
        )
        qk, v = (
            t.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
            for t in (torch.cat((q, k), -1), v)
        )
        gain = F.pad(attn.q_gain, (0, v.size(1)), value=1.0)[:, None, None]  # keys have none
        qk = F.rms_norm(qk.float(), (self.head_dim,))
        qk = (torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin) * gain).to(
            x.dtype
        )  # halves convention
        q, k = qk.split((len(attn.q_gain), v.size(1)), 1)
        y = attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = torch.addcmul(
            x, attn_scale, project(y, attn.proj.weight, adapters.get(f"{name}.attn.proj"))
        )
        y = project(F.rms_norm(x, x.shape[-1:]), mlp.fc.weight, adapters.get(f"{name}.mlp.fc"))
        y = project(F.relu(y).square(), mlp.proj.weight, adapters.get(f"{name}.mlp.proj"))
        return torch.addcmul(x, mlp_scale, y)


class GPT(nn.Module):
    """The record's transformer: skip connections from its first half to its second, a soft-capped head.
    Precision is written out, since autocast's lists differ between CPU and CUDA. Residual stream, matrix products and
    attention are in `dtype`: a bf16 stream agrees with the published code where that could be run (records/NOTES.md)
    and moves half the bytes of the record's fp32 one on CUDA. Query and key norms, rotation, softcap, losses: fp32."""

    def __init__(self, cfg: Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.half = dtype, cfg.num_layers // 2
        self.softcap, self.rope_base = cfg.logit_softcap, cfg.rope_base
        with torch.device(
            "cpu"
        ):  # whatever the device, so that a seed means the same weights everywhere
            self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.model_dim)
            if cfg.tie_embeddings:
                nn.init.normal_(self.tok_emb.weight, std=cfg.tied_embed_init_std)
            self.tok_emb.to(torch.bfloat16)
            self.skip_weights = nn.Parameter(torch.ones(self.half, cfg.model_dim))
            self.blocks = nn.ModuleList(Block(cfg, f"blocks.{i}") for i in range(cfg.num_layers))
            self.lm_head = (
                None if cfg.tie_embeddings else nn.Linear(cfg.model_dim, cfg.vocab_size, bias=False)
            )
            positions = torch.arange(max(cfg.train_seq_len, cfg.ttt_eval_seq_len))
        for name, weight in self.named_parameters():
            if name.endswith(("proj.weight", "lm_head.weight")):
                nn.init.zeros_(weight)
        rope = torch.stack(rope_tables(positions, cfg.model_dim // cfg.num_heads, cfg.rope_base))
        self.register_buffer("rope", rope, persistent=False)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor,
        at: Tensor | None = None,
        adapters: Adapters = NO_LORA,
        memory: Any = None,
    ) -> Tensor:
        """Cross-entropy of each target in nats, always one per token: (B, S) fp32. Callers reduce.
        ids (B, T); targets (B, S) follow the positions `at` (B, S) of each row, which alone reach the head; None stands
        for every position (S = T). With `memory`, rows go on where it ends."""
        rope = memory.rope if memory else self.rope[:, : ids.size(1)].unbind()
        x = self.tok_emb(ids).to(self.dtype)
        x = x0 = F.rms_norm(x, x.shape[-1:])
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i >= self.half and skips:
                x = x + self.skip_weights[i - self.half].to(x.dtype) * skips.pop()
            attention = functools.partial(memory.attend, i) if memory else causal_attention
            x = block(x, x0, rope, adapters, attention)
            if i < self.half:
                skips.append(x)
        if at is not None:
            x = x.gather(1, at[:, :, None].expand(-1, -1, x.size(-1)))
        head = (self.lm_head or self.tok_emb).weight  # (V, D)
        logits = project(F.rms_norm(x, x.shape[-1:]), head, adapters.get("lm_head")).float()
        logits = self.softcap * torch.tanh(logits / self.softcap)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(
            targets.shape
        )


def frozen(model: GPT) -> GPT:
    """A copy that only evaluates: its weights are in the compute dtype already, and none of them learns."""
    copied = copy.deepcopy(model).requires_grad_(False)
    for name, weight in copied.named_parameters():
        if not name.endswith("q_gain"):  # used in fp32
            weight.data = weight.data.to(model.dtype)
    return copied


# ==== Optimizers ======================================================================================================
# Classes of our own: the first use of torch.optim imports the whole compiler, seconds at every start of the program.
def orthogonalize(x: Tensor, steps: int) -> Tensor:
    """Push the singular values of each matrix in `x` (K, rows, cols) towards 1: quintic Newton-Schulz iterations."""
    # Source, of Muon as a whole too: K. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/.
    a, b, c = (
        3.4445,
        -4.7750,
        2.0315,
    )  # exactness traded for speed: singular values end between about 0.7 and 1.2
    if tall := x.size(1) > x.size(2):
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(
        steps
    ):  # x becomes a x + (b g + c g^2) x for the Gram matrices g = x x^T: three products, no more
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon:
    """Momentum, orthogonalised by Newton-Schulz: for the matrices inside the blocks, not for embeddings or vectors.
    Every matrix is the work of one rank, its owner, which alone has its mean gradient and its momentum; its update goes
    to all in bf16. `shares` are the matrices by owner; those of one shape are orthogonalised together."""

    def __init__(self, params: list[nn.Parameter], lr: float, steps: int, rt: Runtime) -> None:
        self.param_groups = [{"params": params, "lr": lr, "base_lr": lr, "momentum": 0.0}]
        shares = share_documents(np.array([p.numel() for p in params]), rt.world)
        self.shares = [
            sorted((params[i] for i in share), key=lambda p: p.shape) for share in shares
        ]
        self.steps, self.rt = steps, rt
        self.state = {p: {"buffer": torch.zeros_like(p)} for p in params}

    @torch.no_grad()
    def step(self) -> None:
        """p -= lr * sqrt(max(1, rows / cols)) * orthogonalize(Nesterov momentum), for every matrix p."""
        lr, momentum = (self.param_groups[0][key] for key in ("lr", "momentum"))
        updates = {
            p: torch.empty_like(p, dtype=torch.bfloat16) for share in self.shares for p in share
        }
        for (rows, cols), same in itertools.groupby(
            self.shares[self.rt.rank], key=lambda p: p.shape
        ):
            params = list(same)
            grads, buffers = [p.grad for p in params], [self.state[p]["buffer"] for p in params]
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, grads)
            # In the compute dtype: a CPU without bf16 takes a hundred times as long for it (records/NOTES.md).
            nesterov = torch.stack(torch._foreach_add(grads, buffers, alpha=momentum)).to(
                self.rt.dtype
            )
            batch = orthogonalize(nesterov, self.steps) * max(1.0, rows / cols) ** 0.5
            torch._foreach_copy_([updates[p] for p in params], list(batch))
        self.rt.exchange([[updates[p] for p in share] for share in self.shares])
        torch._foreach_add_(
            list(updates), [update.float() for update in updates.values()], alpha=-lr
        )


class Adam:
    """Adam, as fused in torch.optim: state in the dtype of the parameter, arithmetic in fp32. A group has one dtype.
    Source: https://arxiv.org/abs/1412.6980."""

    def __init__(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float
    ) -> None:
        self.param_groups, self.betas, self.eps = groups, betas, eps
        self.state = {
            p: {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
            for group in groups
            for p in group["params"]
        }

    @torch.no_grad()
    def step(self) -> None:
        """p -= lr * mean / (sqrt(mean square) + eps), both corrected for their start at 0."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]  # an empty one has none
            steps, *means = (
                [self.state[p][name] for p in params] for name in ("step", "exp_avg", "exp_avg_sq")
            )
            torch._foreach_add_(steps, 1)
            torch._fused_adam_(
                params,
                [p.grad for p in params],
                *means,
                [],
                steps,
                lr=group["lr"],
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=0.0,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
            )


def build_optimizers(model: GPT, cfg: Config, rt: Runtime) -> tuple[Muon, Adam]:
    """(Muon, Adam), fresh. Every parameter belongs to exactly one group, and each group remembers its `base_lr`."""
    inside = list(model.blocks.named_parameters())
    matrices = [p for name, p in inside if name.endswith("weight")]
    scalars = [p for name, p in inside if not name.endswith("weight")]
    rates = (
        ([model.tok_emb.weight], cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr),
        ([*scalars, model.skip_weights], cfg.scalar_lr),
        ([] if cfg.tie_embeddings else [model.lm_head.weight], cfg.head_lr),
    )
    groups = [{"params": params, "lr": lr, "base_lr": lr} for params, lr in rates if params]
    rest = [p for params, _ in rates for p in params]
    assert sorted(map(id, matrices + rest)) == sorted(map(id, model.parameters())), (
        "parameter has no optimizer, or two"
    )
    return Muon(matrices, cfg.matrix_lr, cfg.muon_backend_steps, rt), Adam(
        groups, (cfg.beta1, cfg.beta2), cfg.adam_eps
    )


def schedule(step: int, elapsed_ms: float, cfg: Config) -> tuple[float, float]:
    """(factor on every learning rate, Muon's momentum) at `step`, counted from 0; the fall and the climb are linear."""
    left, fall = cfg.iterations - step, cfg.warmdown_iters
    if (
        cfg.max_wallclock_seconds
    ):  # in milliseconds: so many steps before the cap, at the mean pace so far
        left, fall = 1000 * cfg.max_wallclock_seconds - elapsed_ms, fall * elapsed_ms / max(step, 1)
    way = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
    momentum = (1 - way) * cfg.muon_momentum_warmup_start + way * cfg.muon_momentum
    return min(1.0, max(0.0, left / fall)) if fall else 1.0, momentum


# ==== Artifact: int8 + zlib, written and read =========================================================================
QUANT_FORMAT = "int8_clean_per_row_v1"
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def calibrate(
    model: GPT, cfg: Config, rows: int, length: int = 256
) -> dict[str, tuple[Tensor, Tensor]]:
    """What the loss makes of errors in each matrix, as rows of tokens spread over the training shards show it.
    An error E (out, in) costs about the sum over i of S_i (E M E^T)_ii / 2 nats a token: M = E[x x^T] of the inputs,
    S_i = E[g_i^2] of the loss's gradients at the outputs, which are taken to know nothing of each other. Returns M
    (in, in) and S (out,) by name; an embedding that is no head has M = 1. `UserError` without shards that fit. Source:
    K-FAC, https://arxiv.org/abs/1503.05671."""
    missing = f"ARTIFACT_BUDGET={cfg.artifact_budget}: weights that exceed it are rounded as training shards teach"
    require(
        any(Path(cfg.data_path).glob("fineweb_train_*.bin")),
        f"{missing}, found none in DATA_PATH={cfg.data_path}",
    )
    stream = TokenStream(open_shards(cfg.data_path, "fineweb_train_*.bin"))
    model = frozen(model).to(
        "cpu", torch.float32
    )  # where it repeats to the bit, whatever the run's device
    model.dtype, length = torch.float32, min(length, model.rope.size(1))
    count = rows * length
    seen = {
        p: (torch.zeros(p.size(1), p.size(1)), torch.zeros(len(p)))
        for p in model.parameters()
        if p.ndim == 2
    }

    class Watch(TorchFunctionMode):
        """Sees every product with a matrix, and looks up what its inputs and its output's gradient are."""

        def __torch_function__(
            self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is F.linear:
                x, (moments, slopes) = args[0].detach().flatten(0, -2), seen[args[1]]
                moments += x.mT @ x / count
                out.requires_grad_().register_hook(
                    lambda grad: note(slopes, grad.square().sum((0, 1)))
                )
            elif func is F.embedding and model.lm_head:
                ids, (moments, slopes) = (
                    F.one_hot(args[0].flatten(), cfg.vocab_size).float(),
                    seen[args[1]],
                )
                moments.fill_diagonal_(1)
                out.requires_grad_().register_hook(
                    lambda grad: note(slopes, grad.square().mean(2).flatten() @ ids)
                )
            return out

    def note(slopes: Tensor, squares: Tensor) -> None:
        """For a hook, which must return nothing."""
        slopes += squares / count

    places = [int(stream.begins[-1]) * row // rows for row in range(rows)]
    for first in range(0, rows, 8):
        tokens = torch.from_numpy(
            np.stack([stream.read(place, length + 1) for place in places[first : first + 8]])
        )
        require(
            tokens.max() < cfg.vocab_size,
            f"DATA_PATH={cfg.data_path}: found tokens of another vocabulary",
        )
        with Watch():
            loss = model(tokens[:, :-1], tokens[:, 1:]).sum()
        loss.backward()
    found = {
        name: seen[p] for name, p in model.named_parameters() if p in seen and seen[p][0].any()
    }
    sound = all(part.isfinite().all() for pair in found.values() for part in pair)
    require(
        sound,
        "the weights make activations that are not finite; expected a sound model, no artifact was written",
    )
    return found


def plan_rounding(
    weights: Tensor, moments: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(W, feedback, care) of B matrices: what `round_matrices` goes by. W (B, in, out), M (B, in, in), S (B, out).
    Columns are rounded from the last to the first, and each makes up for what the errors of those before it do to the
    output: `feedback` (B, in, in). What its own error e then still costs is (care e)^2, `care` (B, in, out). Source:
    GPTQ, https://arxiv.org/abs/2210.17323, as nearest planes."""
    size = moments.diagonal(0, 1, 2).mean(1)[:, None, None]
    factor = torch.linalg.cholesky(moments + (0.1 * size + 1e-30) * torch.eye(moments.size(1))).mT
    pivots = factor.diagonal(0, 1, 2)[:, :, None]
    return (
        weights,
        factor / pivots,
        pivots * (slopes + 0.01 * slopes.mean(1, keepdim=True) + 1e-30).sqrt()[:, None],
    )


def round_matrices(
    w: Tensor, feedback: Tensor, care: Tensor, unit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(q (B, out, in), scales fp16 (B, out), whether q is too wide for int8 (B,)): W is about q^T * scales.
    Bits are spent best where every weight's step is unit / care. A row's scale is its finest step, as far as int8 goes,
    and columns that matter less take multiples of it, which entropy coding turns into fewer bits."""
    ideal, most, error = unit / care, w.abs().amax(1, keepdim=True), torch.zeros_like(w)
    fine = ideal.amin(1, keepdim=True).minimum(2 * most)
    scale = fine.maximum(most / 127)
    # Should int8 lose over ten times what `unit` asks for, fp16 pays: it takes 2 bits more, if its steps are octaves.
    wide = (scale / ideal).clamp_min(1).square().mean((1, 2), keepdim=True) > 10
    scale = torch.where(wide, fine, scale).clamp(2**-24, 2**15).log2()  # within fp16
    scale = (
        torch.where(wide, scale.round(), (4 * scale).ceil() / 4).exp2().half().float()
    )  # few values, which compress
    ticks = (ideal / scale).log2().round().exp2().clamp(1, 127)
    steps, limits = scale * ticks, torch.where(wide, math.inf, (127 / ticks).floor())
    for end in range(
        w.size(1), 0, -128
    ):  # in blocks, since one large product is faster than many small ones
        part = slice(max(0, end - 128), end)
        wanted, inside = (
            w[:, part] + feedback[:, part, end:] @ error[:, end:],
            feedback[:, part, part],
        )
        for j in reversed(range(wanted.size(1))):
            at = part.start + j
            column = wanted[:, j] + (inside[:, j : j + 1, j + 1 :] @ error[:, at + 1 : end])[:, 0]
            whole = (column / steps[:, at]).round().clamp(-limits[:, at], limits[:, at])
            error[:, at] = w[:, at] - whole * steps[:, at]
    return ((w - error) / scale).round().mT, scale[:, 0].half(), wide[:, 0, 0]


def quantize_state(
    state: Mapping[str, Tensor], plans: list[tuple], unit: float = 0.0
) -> dict[str, Any]:
    """The artifact's content, in the published layout (spec section 5), from a state dict on the CPU.
    `plans` hold names and what `plan_rounding` made of their matrices, which become int8, or fp16 where that is too
    coarse; other tensors, fp16 if they fit. Without plans all are as they were."""
    parts = ("quantized", "scales", "dtypes", "passthrough", "qmeta", "passthrough_orig_dtypes")
    out: dict[str, Any] = {"__quant_format__": QUANT_FORMAT} | {part: {} for part in parts}
    rounded: dict[str, Any] = {}
    for names, *plan in plans:
        rounded |= zip(names, zip(*round_matrices(*plan, unit), strict=True), strict=True)
    for name, tensor in state.items():
        dtype, (q, scale, wide) = (
            str(tensor.dtype).removeprefix("torch."),
            rounded.get(name, (None, None, False)),
        )
        if q is not None and not wide:
            out["quantized"][name], out["scales"][name], out["dtypes"][name] = (
                q.char().contiguous(),
                scale,
                dtype,
            )
            out["qmeta"][name] = {"scheme": "per_row", "axis": 0}
            continue
        half = (q * scale[:, None].float() if wide else tensor).half()
        exact = not plans or not half.isfinite().all()
        out["passthrough"][name] = tensor if exact else half.contiguous()
        if not exact:
            out["passthrough_orig_dtypes"][name] = dtype
    return out


def pack(content: Mapping[str, Any]) -> bytes:
    """The artifact: a zlib stream without the search for repeats, which costs rounded weights seconds and bytes."""
    torch.save(content, buffer := io.BytesIO())
    deflater = zlib.compressobj(9, strategy=zlib.Z_RLE)
    return deflater.compress(buffer.getbuffer()) + deflater.flush()


def fit(
    state: Mapping[str, Tensor], budget: int, calibrated: Callable[[int], Mapping]
) -> tuple[dict[str, Any], bytes]:
    """(content, artifact) that fits `budget` together with this script: exact if that does, else by search."""
    room, numbers = (
        budget - len(source_code().encode()),
        sum(tensor.numel() for tensor in state.values()),
    )
    small = sum(tensor.nbytes for tensor in state.values()) < 1.4 * room
    if small and len(blob := pack(content := quantize_state(state, []))) <= room:
        return content, blob
    refusal = (
        f"ARTIFACT_BUDGET={budget}: the script leaves {room} bytes, the coarsest artifact takes"
    )
    remedy = "raise it and go on from the .pt file with EVAL_ONLY=1"
    require(room > 0, f"{refusal} more; {remedy}")
    shapes, plans = {}, []
    for name, found in calibrated(min(64, max(4, 8 * 10**7 // numbers))).items():
        shapes.setdefault(state[name].shape, []).append((name, state[name].float().mT, *found))
    for names, *tensors in (
        zip(*same, strict=True) for same in shapes.values()
    ):  # those of one shape together
        plans.append((names, *plan_rounding(*map(torch.stack, tensors))))
    require(
        plans,
        f"ARTIFACT_BUDGET={budget}: found no matrix that any token reaches; expected a sound model",
    )
    # In octaves of `unit`: where artifacts are too large, the next try, where they fit. One octave is a bit a weight.
    low, high, slope, last, best, aim, tries = -60.0, 60.0, numbers / 8, None, (None, b""), 0.997, 0
    bits = torch.cat(
        [2 + (w.std(1, keepdim=True) * care).log2().flatten()[::61] for _, w, _, care in plans]
    )
    at = max(low + 1, bits.median().item())
    for _ in range(
        50
    ):  # int8 spends 7 bits at most; where that lost ten times as much as asked, fp16 takes 2 more
        wish = bits - at
        cost = torch.where(wish > 8.7, wish + 2, wish.clamp(0, 7)).clamp(max=16).mean()
        at = max(at + 0.5 * (cost.item() - 8 * room / numbers), low + 1)
    while (
        high - low > 0.05 and len(best[1]) < (2 * aim - 1) * room
    ):  # the tries grow less demanding
        size = len(blob := pack(content := quantize_state(state, plans, 2.0**at)))
        low, high, best = (low, at, (content, blob)) if size <= room else (at, high, best)
        slope = (
            min(max((last[1] - size) / (at - last[0]), numbers / 40), numbers) if last else slope
        )
        last, at, aim, tries = (
            (at, size),
            at + (size - aim * room) / slope,
            1 - 1.4 * (1 - aim),
            tries + 1,
        )
        at = at if low < at < high and tries < 10 else (low + high) / 2
    require(best[1], f"{refusal} {size}; {remedy}")
    return best


def dequantize_state(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict in the dtypes of training. `KeyError`, `ValueError` for what neither we nor the record can write."""
    state, scales, quantized = {}, content["scales"], content["quantized"]
    require(
        content["__quant_format__"] == QUANT_FORMAT,
        f"its format is {content['__quant_format__']!r:.40}",
    )
    twice = scales.keys() ^ quantized.keys() | quantized.keys() & content["passthrough"].keys()
    require(not twice, f"there twice, or half: {', '.join(map(str, twice)):.80}")
    for name, q in quantized.items():
        scale = scales[name]
        fits = (
            q.dtype == torch.int8
            and scale.dtype in FLOATS.values()
            and scale.shape in (q.shape[:1], ())
        )
        require(
            fits,
            f"{name} is {q.dtype} {tuple(q.shape)} with scales {scale.dtype} {tuple(scale.shape)}",
        )
        scale = scale.float().view(-1, *[1] * (q.ndim - 1))
        state[name] = (q.float() * scale).to(FLOATS[content["dtypes"][name]])
    for name, tensor in content["passthrough"].items():
        require(tensor.dtype in FLOATS.values(), f"{name} is {tensor.dtype}")
        original = content["passthrough_orig_dtypes"].get(name)
        state[name] = tensor.to(FLOATS[original]) if original else tensor
    return state


def export(model: GPT, cfg: Config, rt: Runtime) -> Path:
    """Rank 0 writes the weights and the artifact, atomically, and logs their sizes. Returns the artifact's path."""
    # EVAL_ONLY has a .pt already: then only the artifact is written, under a name that no training uses.
    name = f"eval_{Path(cfg.model_path).stem}" if cfg.eval_only else "final_model"
    path = Path(cfg.out_dir, f"{name}.int8.ptz")
    if rt.rank:
        return path
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        found = f"{name}: holds values that are not finite"
        require(tensor.isfinite().all(), f"{found}; expected a sound model, nothing was exported")
    torch.save(state, raw := io.BytesIO())
    raw, code = raw.getbuffer(), len(source_code().encode())
    if not cfg.eval_only:
        rt.write(path.with_name("final_model.pt"), raw)
    content, blob = fit(state, cfg.artifact_budget, functools.partial(calibrate, model, cfg))
    rt.write(path, blob)
    before = sum(tensor.nbytes for tensor in state.values())
    after = sum(
        tensor.nbytes
        for part in ("quantized", "scales", "passthrough")
        for tensor in content[part].values()
    )
    rt.log(f"Serialized model: {len(raw)} bytes")
    rt.log(f"Code size: {code} bytes")
    rt.log(f"Total submission size: {len(raw) + code} bytes")
    sizes = f"payload:{after} raw_torch:{len(zlib.decompress(blob))} payload_ratio:{before / after:.2f}x"
    rt.log(f"Serialized model int8+zlib: {len(blob)} bytes ({sizes})")
    rt.log(f"Total submission size int8+zlib: {len(blob) + code} bytes")
    return path


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file: an artifact if its name ends in .ptz, else a plain torch.save; else `UserError`."""
    with refusing(
        path, "an artifact (.ptz) or state dict (.pt)"
    ):  # never executed, bounded by its size
        blob, packed = read_file(path), str(path).endswith(".ptz")
        if packed:
            inflater, most = zlib.decompressobj(), max(2**26, 16 * len(blob))
            blob = inflater.decompress(blob, most)
            require(
                inflater.eof and not inflater.unused_data,
                f"cut short, followed by more, or over {most} bytes",
            )
        content = unpack(blob)
        parts = (
            [content[part] for part in ("quantized", "scales", "passthrough")]
            if packed
            else [content]
        )
        held = sum(
            tensor.nbytes for part in parts for tensor in part.values()
        )  # a view can repeat numbers
        require(held <= len(blob), "its tensors are larger than the file")
        state = dequantize_state(content) if packed else content
        for name, tensor in state.items():
            sound = (
                isinstance(name, str)
                and tensor.dtype in FLOATS.values()
                and tensor.isfinite().all()
            )
            require(sound, f"{name!r:.80} does not name finite floats")
    return state


def shape_from_weights(state: Mapping[str, Tensor], cfg: Config, path: str) -> Config:
    """`cfg` with the model shape of the weights in file `path`. `UserError` if they are not this GPT's."""
    with refusing(path, "the weights of this model, with its tensor names"):
        (vocab_size, dim), heads = state["tok_emb.weight"].shape, len(state["blocks.0.attn.q_gain"])
        cfg = replace(
            cfg,
            vocab_size=vocab_size,
            model_dim=dim,
            mlp_mult=len(state["blocks.0.mlp.fc.weight"]) // dim,
            num_heads=heads,
            num_kv_heads=max(1, len(state["blocks.0.attn.c_k.weight"]) * heads // dim),
            num_layers=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
            tie_embeddings="lm_head.weight" not in state,
        )
        needed, held = count_parameters(cfg), sum(tensor.numel() for tensor in state.values())
        # Before the model is built: a few hundred bytes can claim to be of any shape.
        found = f"{cfg.num_layers} layers, {held} numbers where a model of its shape has {needed}"
        require(needed <= 2 * held and cfg.num_layers <= MOST_LAYERS, found)
    return cfg


def copy_tensors(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy the `state` in file `path` into the tensors `own`. `UserError` naming the first one that does not fit."""
    shapes = [
        {name: tuple(t.shape) if t.is_floating_point() else t.dtype for name, t in tensors.items()}
        for tensors in (own, state)
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        expected, found = (shape.get(name, "no such tensor") for shape in shapes)
        require(
            expected == found,
            f"{path}: {name:.80}: found {found}, expected {expected}, as other tensors say",
        )
    for name, tensor in own.items():
        tensor.copy_(state[name])


# ==== Adapters: a low-rank correction per document, and its optimizer =================================================
@dataclass(frozen=True)
class Condition:
    """A rung of the ladder: `chunk` predictions scored at once, in windows of `window` inputs, `batch` side by side."""

    chunk: int
    window: int
    batch: int
    targets: tuple[
        str, ...
    ] = ()  # `DocumentAdapters` on projections whose names end so learn after each chunk
    rank: int = 0
    lr: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.95)
    spread: float = 1.0
    decay: float = 0.0
    stream: bool = False  # only the chunk is run: `Memory` stands for the tokens before it
    isolated: bool = (
        True  # False: rows of the stream, whatever documents they cut, take the place of documents
    )
    final: str = ""  # what the record calls this rung in a line of its own

    def spans(self, docs: Documents) -> tuple[np.ndarray, np.ndarray]:
        """(starts, predictions) of what is scored by itself: the documents, or the whole rows of the stream."""
        rows = np.arange(0, len(docs.tokens) - self.chunk, self.chunk)
        return (
            (docs.starts, docs.predictions)
            if self.isolated
            else (rows, np.full_like(rows, self.chunk))
        )

    def work(self, predictions: np.ndarray) -> np.ndarray:
        """Positions that must be computed to score documents of so many predictions: the inputs of all windows."""
        full = predictions // self.chunk
        growing = np.minimum(
            full, self.window // self.chunk
        )  # chunks whose window still begins with the document
        inputs = self.chunk * growing * (growing + 1) // 2 + (full - growing) * self.window
        inputs += np.minimum(predictions, self.window) * (predictions % self.chunk > 0)
        return predictions if self.stream else inputs


class DocumentAdapters:
    """Adapters of documents side by side, with the Adam state that trains them, as a `Condition` says. The document in
    a seat is one row of `flat` (seats, P), so that one update serves all. Every one starts from the same seeded values,
    A ~ U(-spread/sqrt(in), spread/sqrt(in)) and B = 0, so that no score depends on neighbours. The rate falls with the
    number t of tokens learned from as (1 + t/1000)^-decay: what a document is like is learned early, and a constant
    rate drowns it in noise. Source: LoRA, https://arxiv.org/abs/2106.09685."""

    def __init__(self, model: GPT, how: Condition, seats: int, seed: int, rt: Runtime) -> None:
        named = dict(model.named_parameters()) | {
            "lm_head.weight": (model.lm_head or model.tok_emb).weight
        }
        layers = {
            part: p
            for name, p in named.items()
            if (part := name.removesuffix(".weight")).endswith(how.targets)
        }
        generator = torch.Generator(device="cpu").manual_seed(seed)
        self.names, self.how, self.dtype, self.shapes, start = (
            list(layers),
            how,
            model.dtype,
            [],
            [],
        )
        for out_dim, in_dim in (weight.shape for weight in layers.values()):
            self.shapes += [(how.rank, in_dim), (out_dim, how.rank)]
            a = torch.rand(how.rank * in_dim, generator=generator, device="cpu") * 2 - 1
            start += [
                a * (how.spread / math.sqrt(in_dim)),
                torch.zeros(out_dim * how.rank, device="cpu"),
            ]
        self.start = torch.cat(start).to(rt.device)
        self.flat = self.start.repeat(seats, 1)
        self.square, self.steps = (
            torch.zeros_like(self.flat),
            torch.zeros(seats, 1, device=rt.device),
        )
        self.mean = (
            torch.zeros_like(self.flat) if how.betas[0] else self.flat.new_zeros(seats, 1)
        )  # else never read
        self.state = [self.flat, self.mean, self.square, self.steps]  # one row a seat

    def reset(self, rows: Tensor) -> None:
        """Forget everything: fresh adapters and optimizer state for the documents that sit down."""
        for state, value in zip(self.state, (self.start, 0, 0, 0), strict=True):
            state[rows] = value

    def pairs(self, flat: Tensor) -> Adapters:
        """The (A, B) pairs inside rows of `flat` (b, P), by projection, in the model's dtype."""
        parts = flat.to(self.dtype).split([rows * cols for rows, cols in self.shapes], dim=1)
        parts = [
            part.view(len(flat), *shape) for part, shape in zip(parts, self.shapes, strict=True)
        ]
        return dict(zip(self.names, zip(parts[::2], parts[1::2], strict=True), strict=True))

    @torch.no_grad()
    def adam(self, rows: Tensor | slice, grad: Tensor, eps: float = 1e-10) -> None:
        """One Adam step for the documents in `rows`, whose gradient is `grad` (b, P), each at its own step."""
        how, (beta1, beta2) = self.how, self.how.betas
        flat, mean, square, steps = parts = [
            state[rows] for state in self.state
        ]  # views, if rows is a slice
        steps += 1
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        spread = (square / (1 - beta2**steps)).sqrt_().add_(eps)
        rate = how.lr / (1 - beta1**steps) * (1 + steps * how.chunk / 1000) ** -how.decay
        flat.addcdiv_((mean.lerp_(grad, 1 - beta1) if beta1 else grad) * rate, spread, value=-1)
        if not isinstance(rows, slice):
            for state, part in zip(self.state, parts, strict=True):
                state[rows] = part


# ==== Evaluation ======================================================================================================
def ladder(docs: Documents, cfg: Config, rt: Runtime) -> dict[str, Condition]:
    """What each word in EVAL means. `flat` has one row, should the stream be shorter than TRAIN_SEQ_LEN."""
    row = min(cfg.train_seq_len, len(docs.tokens) - 1)
    rows = max(1, cfg.val_batch_size // (rt.world * cfg.grad_accum_steps * row))
    chunk, window, batch = cfg.ttt_chunk_size, cfg.ttt_eval_seq_len, cfg.ttt_batch_size
    recipe = ("c_q", "c_v", "lm_head"), cfg.ttt_lora_rank, cfg.ttt_lora_lr
    learner = (
        cfg.ttt_stream_targets,
        cfg.ttt_stream_rank,
        cfg.ttt_stream_lr,
        (0.0, 0.99),
        4.0,
        0.2,
    )  # records/NOTES.md
    best = Condition(cfg.ttt_stream_chunk, window, batch, *learner, stream=True)
    return {
        "flat": Condition(row, row, rows, isolated=False, final="final_int8_zlib_roundtrip"),
        "doc": Condition(window, window, batch),
        "stride": Condition(chunk, window, batch),
        "ttt": Condition(chunk, window, batch, *recipe, final="final_int8_ttt_lora"),
        "stream_fast": replace(
            best, chunk=2 * best.chunk, lr=math.sqrt(2) * best.lr
        ),  # half as many steps
        "stream": replace(best, final="final_int8_ttt_stream"),
    }


@dataclass
class Score:
    """Cross-entropy of scored tokens, in columns with one entry for each piece of a document that has any."""

    columns: dict[
        str, np.ndarray
    ]  # doc, chunk, start (in the document), tokens, bytes: int64; loss_nats: float64
    missing: int = 0  # positions that the time did not suffice for
    computed: int = (
        0  # positions that went through the model; `Condition.work` says how many had to
    )

    def __post_init__(self) -> None:
        nats = math.fsum(
            self.columns["loss_nats"]
        )  # rounded once, so that no order of chunks can move it
        tokens, size = (int(self.columns[name].sum()) for name in ("tokens", "bytes"))
        self.totals = nats, tokens, size
        self.loss = nats / tokens  # mean cross-entropy, nats per scored token
        self.bpb = (
            nats / math.log(2) / size
        )  # bits per byte: all bits, divided by all UTF-8 bytes of the scored text

    def __str__(self) -> str:
        return f"val_loss:{self.loss:.4f} val_bpb:{self.bpb:.4f}"

    @classmethod
    def tally(
        cls, ledger: Tensor, docs: Documents, how: Condition, size: int, limited: bool = False
    ) -> Score:
        """From all ranks' `ledger` (2, n - 1): for each position of the stream, its loss and how often it was scored.
        Also the audit of coverage: `AgreedError` unless what `how` covers was scored exactly once, nothing else was,
        and every loss is finite. Rows are pieces of `size` positions, the same under every condition, so that they can
        be compared; tokens before the first BOS count as document -1. When `limited`, positions may be missing."""
        (losses, times), (starts, predictions) = ledger.cpu().numpy(), how.spans(docs)
        due = np.zeros_like(times)
        due[starts[0] : starts[-1] + predictions[-1]] = 1
        missing = (due > times) & limited
        due[missing] = 0
        for p in np.flatnonzero((times != due) | ~np.isfinite(losses))[:1]:
            found = f"scored {times[p]:g} times, loss {losses[p]:g}"
            raise AgreedError(
                f"audit coverage: position {p}: {found}; expected {due[p]:g} times and a finite loss"
            )
        begins = np.unique(
            np.append(0, docs.starts)
        )  # documents touch; before the first one there may be a rest
        edges = np.concatenate(
            [np.arange(*span, size) for span in itertools.pairwise([*begins, len(times)])]
        )
        doc = np.searchsorted(docs.starts, edges, side="right") - 1
        start = edges - begins[np.searchsorted(begins, edges, side="right") - 1]
        count = docs.bytes.cpu().numpy() * (times > 0)
        tokens, count = (np.add.reduceat(part, edges, dtype=np.int64) for part in (times, count))
        require(
            count.any(),
            "audit coverage: the tokens scored are 0 bytes of text; check the tokenizer",
            AgreedError,
        )
        nats = np.add.reduceat(losses, edges, dtype=np.float64)
        columns = dict(
            doc=doc, chunk=start // size, start=start, tokens=tokens, bytes=count, loss_nats=nats
        )
        return cls(
            {name: column[tokens > 0] for name, column in columns.items()}, int(missing.sum())
        )


def write_scores(path: Path, scores: Mapping[str, Score], rt: Runtime) -> None:
    """Rank 0 writes the columns of every score as CSV, from which anyone can add up the printed totals."""
    if rt.rank == 0:
        rows = [("condition", *next(iter(scores.values())).columns)]
        rows += [
            (name, *row)
            for name, score in scores.items()
            for row in zip(*score.columns.values(), strict=True)
        ]
        rt.write(path, data := "".join(",".join(map(str, row)) + "\n" for row in rows).encode())
        rt.log(f"scores:{path} rows:{len(rows) - 1} sha256:{sha256(data).hexdigest()}")


class Memory:
    """Keys and values of the last W tokens of documents side by side, in every layer. They stay as they were when their
    chunk was scored, without gradients. Time counts from the start of the evaluation, rotary positions from that of the
    document, so that no rounding depends on who sat there before. A stream that learns nothing equals one pass over
    each document under a banded mask, which is more than windows give: text older than W reaches a token through the
    layers. Source: Transformer-XL, https://arxiv.org/abs/1901.02860."""

    def __init__(self, model: GPT, how: Condition, seats: int, rt: Runtime) -> None:
        attn, self.how, self.now, self.base = model.blocks[0].attn, how, 0, model.rope_base
        self.heads, self.dim = len(attn.q_gain), model.blocks[0].head_dim
        shape = seats, attn.c_k.out_features // self.dim, how.window, self.dim
        nothing = torch.zeros(shape, dtype=model.dtype, device=rt.device)
        self.past = [(nothing, nothing)] * len(
            model.blocks
        )  # keys and values (seats, G, W, N) of each layer
        self.began = torch.zeros(
            seats, dtype=torch.int64, device=rt.device
        )  # when each seat's document did

    def reset(self, rows: Tensor) -> None:
        """Nothing from before now is seen by the documents that sit down."""
        self.began[rows] = self.now

    def turn(self, rows: slice) -> None:
        """Before the next chunk of the documents in the first seats, `rows`: their rotation, and what is hidden."""
        keys, began = self.past[0][0], self.began[: rows.stop, None, None]
        times = torch.arange(
            self.now - self.how.window, self.now + self.how.chunk, device=began.device
        )
        new = times[self.how.window :]
        age = new[:, None] - times
        hidden = (age < 0) | (age >= self.how.window) | (times < began)  # (B, C, W + C)
        bias = torch.zeros(hidden.shape, dtype=keys.dtype, device=began.device).masked_fill_(
            hidden, -math.inf
        )
        self.bias = (
            bias[:, None].repeat(1, keys.size(1), self.heads // keys.size(1), 1).flatten(0, 1)
        )
        tables = rope_tables((new - began).flatten(), self.dim, self.base)
        self.rope = tuple(table.view(len(bias), 1, self.how.chunk, -1) for table in tables)
        self.now += self.how.chunk

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, C, N) over the memory and the chunk itself, whose k and v (B, G, C, N) are then remembered."""
        keys, values = (
            torch.cat((old[: len(q)], new), 2)
            for old, new in zip(self.past[layer], (k, v), strict=True)
        )
        self.past[layer] = tuple(
            every[:, :, -self.how.window :].detach() for every in (keys, values)
        )
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        weights = torch.baddbmm(
            self.bias, (q * self.dim**-0.5).reshape(len(keys), -1, self.dim), keys.mT
        ).softmax(-1)
        return torch.bmm(weights, values).view(q.shape)


def gather_chunk(
    tokens: Tensor,
    starts: np.ndarray,
    left: np.ndarray,
    places: np.ndarray,
    length: int,
    how: Condition,
    rt: Runtime,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """(ids (B, T), targets (B, S), where in the window they are predicted, where in the stream, whether they exist).
    Chunks of C predictions, or all that are `left`, begin `places` tokens into the documents at `starts`. Inputs are
    [max(0, end - W), end) before the chunk's end or, if streaming, the chunk; beyond, a last token that nobody sees."""
    ends = places + np.minimum(left, how.chunk)
    begins = places if how.stream else np.maximum(ends - how.window, 0)
    start, begin, end, place = rt.upload(np.stack((starts, begins, ends, places)))[:, :, None]
    ids = tokens[
        start + torch.minimum(begin + torch.arange(length, device=rt.device), end - 1)
    ].long()
    place = place + torch.arange(min(length, how.chunk), device=rt.device)
    live, place = place < end, torch.minimum(place, end - 1)
    at = (
        None if length <= how.chunk and (begins == places).all() else place - begin
    )  # None: everywhere
    return ids, tokens[start + place + 1].long(), at, start + place, live


def score_then_learn(
    model: GPT,
    chunk: tuple,
    rows: Tensor | slice,
    adapters: DocumentAdapters | None,
    memory: Memory | None,
    learn: bool,
) -> Tensor:
    """Losses (B, S) of a chunk under the adapters as they are; only then, if `learn`, one step on those same tokens.
    This order is the law of the game, and this is the only place that learns: the score of a token must come from a
    state that has never seen it. `rows` are the seats of the batch: all the first ones, as a slice, or those listed."""
    ids, targets, at, _, live = chunk
    with torch.set_grad_enabled(learn):
        flat = adapters.flat[rows].detach().requires_grad_(learn) if adapters else None
        if memory:
            memory.turn(rows)
        losses = model(ids, targets, at, adapters.pairs(flat) if adapters else NO_LORA, memory)
        if learn:
            mean_losses = (losses * live).sum(1) / live.sum(
                1
            )  # summed: no document's reaches another's row of `flat`
            adapters.adam(rows, torch.autograd.grad(mean_losses.sum(), flat)[0])
    return losses.detach()


def plan_seats(
    documents: np.ndarray, chunks: np.ndarray, seats: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(document, number of its chunk) for each seat still taken, turn after turn; the seats taken are the first ones.
    Every seat gets its `documents` in advance, the longest to the one that is free first: nobody waits for the longest
    of all, and what a seat owns never has to move."""
    lanes, done = (
        (documents[share] for share in share_documents(chunks[documents], seats)),
        np.zeros_like(chunks),
    )
    lanes = sorted((np.repeat(lane, chunks[lane]) for lane in lanes), key=len, reverse=True)
    for turn in itertools.zip_longest(*lanes, fillvalue=-1):
        taken = np.array([document for document in turn if document >= 0])
        yield taken, done[taken]
        done[taken] += 1


# Lengths that windows are filled up to: any length is at most 5 % below one of them.
LENGTHS = np.unique(np.floor(1.05 ** np.arange(250)).astype(np.int64))


def group_windows(
    left: np.ndarray, places: np.ndarray, how: Condition
) -> Iterator[tuple[np.ndarray, bool, int]]:
    """Rows whose windows run together, whether they are learned from, and the length that they are filled up to. A
    document's last chunk teaches nobody. A length never depends on the other documents, since rounding does on it. A
    stream is one group, in which a last chunk may be learned from, too; what it taught is forgotten unheard."""
    inputs = np.minimum(places + np.minimum(left, how.chunk), how.window)
    more = (left > how.chunk) & bool(how.targets)
    lengths = np.where(
        more, inputs, np.minimum(LENGTHS[np.searchsorted(LENGTHS, inputs)], how.window)
    )
    if how.stream:
        more, lengths = np.full_like(more, more.any()), np.full_like(lengths, how.chunk)
    for group in np.unique(2 * lengths + more):
        yield np.flatnonzero(2 * lengths + more == group), bool(group % 2), int(group // 2)


class Progress:
    """Documents that an evaluation has finished, on disk for the next attempt; and its seconds, which may be limited.
    Every rank of every attempt writes a file of its own, and rank 0 reads them all. Their names begin with `stem`,
    which holds a hash of all that decides the scores: a file that is found fits."""

    def __init__(self, stem: Path, limit: float, rt: Runtime) -> None:
        self.stem, self.limit, self.rt, self.earlier, self.turns, self.began = (
            stem,
            limit,
            rt,
            0.0,
            0,
            rt.seconds(),
        )
        self.path, self.due = (
            stem.with_name(f"{stem.name}.{time.time_ns()}.{rt.rank}.part"),
            self.began + 5,
        )

    def files(self) -> list[Path]:
        """Those of all ranks and attempts."""
        return sorted(self.stem.parent.glob(f"{self.stem.name}.*.part"))

    def recall(self, ledger: Tensor, starts: np.ndarray, predictions: np.ndarray) -> np.ndarray:
        """Enter what is known into rank 0's ledger. Returns the documents that are left to score, on every rank."""
        for path in self.files() if self.rt.rank == 0 else ():
            try:
                part = load_state(path)
                at, entries, seconds = (
                    part["at"],
                    part["entries"].to(ledger.device),
                    float(part["seconds"]),
                )
                require(
                    entries.isfinite().all() and (entries[1] == 1).all(),
                    "its scores are impossible",
                )
                ledger[:, at.to(ledger.device)] = entries
                self.earlier += seconds
            except Exception as error:  # what a damaged file held is scored again
                self.rt.log(f"warning: skipped {path}: {error!r:.300}")
        self.earlier = self.rt.from_rank0(self.earlier)
        times = np.add.reduceat(
            self.rt.sum(ledger[1].clone()).cpu().numpy(), starts, dtype=np.int64
        )  # documents touch
        self.first, self.sizes, self.done = (
            int(starts[0]),
            predictions,
            np.zeros(len(starts), dtype=bool),
        )
        return np.flatnonzero(times < predictions)

    def keep(self, ledger: Tensor) -> None:
        """Write what is finished. `UserError` where a signal came."""
        at, now = (
            torch.from_numpy(np.flatnonzero(np.repeat(self.done, self.sizes)) + self.first),
            self.rt.seconds(),
        )
        entries, seconds = (
            ledger[:, at.to(ledger.device)].cpu(),
            0.0 if self.rt.rank else now - self.began,
        )
        self.rt.save(self.path, {"at": at, "entries": entries, "seconds": seconds})
        self.due = now + max(
            5.0, 50 * (self.rt.seconds() - now)
        )  # so that it takes a fiftieth of the time at most
        require(not self.rt.heard, f"what is finished is kept in {self.stem.parent}")

    def turn(self, ledger: Tensor, finished: np.ndarray) -> bool:
        """After each turn: keep what is `finished` now and then. Returns whether there is time for one more."""
        self.done[finished], self.turns, now = (
            True,
            self.turns + 1,
            self.rt.seconds(wait=self.limit > 0),
        )
        over = 0 < self.limit < self.earlier + (now - self.began) * (1 + 1 / self.turns)
        if now > self.due or over or self.rt.heard:
            self.keep(ledger)
        return not over

    def wait(self, ledger: Tensor) -> None:
        """For the other ranks, after the last turn: here signals are heard, as they are not inside a reduction."""
        names, end = (
            [f"{self.stem.name} {rank}" for rank in range(self.rt.world)],
            time.monotonic() + self.rt.patience,
        )
        self.rt.store.set(names[self.rt.rank], "")
        while not self.rt.store.check(names) and time.monotonic() < end:
            if self.rt.heard:
                self.keep(ledger)
            time.sleep(0.02)


def fill_ledger(
    model: GPT,
    docs: Documents,
    how: Condition,
    cfg: Config,
    rt: Runtime,
    progress: Progress | None = None,
) -> tuple[Tensor, int]:
    """Score every document by itself, chunk after chunk, each chunk with its context of earlier tokens. With targets,
    each document owns adapters that take one Adam step after each chunk that another one follows. Documents, but those
    that `progress` knows, are shared over the ranks by work, and run side by side as `plan_seats` has it. Returns the
    `ledger` of `Score.tally` and how many positions were computed, the same on every rank."""
    starts, predictions = how.spans(docs)
    chunks = -(-predictions // how.chunk)
    ledger, computed = torch.zeros(2, len(docs.tokens) - 1, device=rt.device), 0
    todo = progress.recall(ledger, starts, predictions) if progress else np.arange(len(starts))
    mine = todo[share_documents(how.work(predictions[todo]), rt.world)[rt.rank]]
    model, seats = frozen(model), min(how.batch, len(mine))
    adapters = DocumentAdapters(model, how, seats, cfg.seed, rt) if how.targets else None
    memory = Memory(model, how, seats, rt) if how.stream else None
    with rt.progress(int(chunks[mine].sum()), "evaluating") as bar:
        for documents, numbers in plan_seats(mine, chunks, seats):
            if len(fresh := np.flatnonzero(numbers == 0)):
                for owned in filter(None, (adapters, memory)):
                    owned.reset(rt.upload(fresh))
            places, left = numbers * how.chunk, predictions[documents] - numbers * how.chunk
            for rows, learn, length in group_windows(left, places, how):
                chunk = gather_chunk(
                    docs.tokens, starts[documents[rows]], left[rows], places[rows], length, how, rt
                )
                seated = rt.upload(rows) if len(rows) < len(documents) else slice(len(rows))
                losses = score_then_learn(model, chunk, seated, adapters, memory, learn)
                ids, _, _, positions, live = chunk
                entry = torch.stack((losses, torch.ones_like(losses))) * live
                ledger.index_add_(1, positions.flatten(), entry.flatten(1))
                computed += ids.numel()
            if bar.update(
                len(documents)
            ):  # only when just redrawn, so that the device is seldom asked
                bits, count = (
                    ledger[0].sum().item() / math.log(2),
                    (ledger[1] * docs.bytes).sum().item(),
                )
                bar.set_postfix_str(f"bpb:{bits / count:.4f}", refresh=False)
            if progress and not progress.turn(ledger, documents[left <= how.chunk]):
                break
    if progress and rt.world > 1:
        progress.wait(ledger)
    return rt.sum(ledger), int(rt.sum(torch.tensor(computed, device=rt.device)).item())


def evaluate(
    model: GPT, docs: Documents, how: Condition, cfg: Config, rt: Runtime, progress: Any = None
) -> Score:
    """The score of the whole validation stream under one condition, the same on every rank."""
    ledger, computed = fill_ledger(model, docs, how, cfg, rt, progress)
    limited = progress is not None and progress.limit > 0
    return replace(Score.tally(ledger, docs, how, cfg.ttt_chunk_size, limited), computed=computed)


# ==== Audits: what makes a score worth believing ======================================================================
def audit_bytes(
    docs: Documents, table: ByteTable, tokenizer: spm.SentencePieceProcessor, rt: Runtime
) -> None:
    """Hold the bytes of up to 256 documents, evenly spread, against their decoded text; `UserError` names the piece."""
    ids = range(
        tokenizer.vocab_size()
    )  # what is expected comes from the tokenizer, nothing from the table
    silent = [
        tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i) for i in ids
    ]
    text, byte = ~np.array(silent), np.array([tokenizer.is_byte(i) for i in ids])
    anchor = next(i for i in np.flatnonzero(text & ~byte).tolist() if tokenizer.decode([i]).strip())

    def spell_out(pieces: list[int]) -> str:
        """Their text, decoded behind an anchor, since the decoder drops spaces at the start of a text."""
        return tokenizer.decode([anchor, *pieces])[len(tokenizer.decode([anchor])) :]

    opening = np.array([text[i] and not byte[i] and spell_out([i]).startswith(" ") for i in ids])
    picks, counted, spelled = (
        np.unique(np.linspace(0, len(docs.starts) - 1, 256).astype(np.int64)),
        0,
        0,
    )
    for begin, end in zip(
        docs.starts[picks], docs.starts[picks] + docs.predictions[picks], strict=True
    ):
        pieces = (
            docs.tokens[begin : end + 1].cpu().numpy()
        )  # the first is the document's BOS: no target, no text
        # A space that opens a document or follows a control piece is no text. Bytes, not always UTF-8, count apart.
        plain, dropped = (
            pieces[text[pieces] & ~byte[pieces]],
            opening[pieces[1:]] & ~text[pieces[:-1]],
        )
        spelled += (
            len(spell_out(plain.tolist()).encode()) + int(byte[pieces].sum()) - int(dropped.sum())
        )
        counted += int(docs.bytes[begin:end].sum())
        if counted != spelled:
            sizes = {
                i: 1 if byte[i] else text[i] * len(spell_out([i]).encode()) for i in pieces.tolist()
            }
            wrong = [
                i for i, size in sizes.items() if size != table.base[i] + table.leading_space[i]
            ]
            cause = f"piece {tokenizer.id_to_piece(wrong[0])!r}" if wrong else "how pieces join"
            found = f"{counted} bytes were counted where the decoded text has {spelled}, because of {cause}"
            raise UserError(
                f"audit bytes: up to token {end} {found}; no bpb is right; take another tokenizer"
            )
    rt.log(
        f"audit bytes: documents:{len(picks)} of:{len(docs.starts)} table_bytes:{counted} text_bytes:{spelled} PASS"
    )


def audit_causality(model: GPT, docs: Documents, how: Condition, cfg: Config, rt: Runtime) -> str:
    """Score three documents twice; the second time all tokens of one and those after a cut in the others are random.
    What precedes a cut must score the same to the last bit (on GPUs, within `Runtime.noise`), else `UserError`: it saw
    a later token or another document. The first document, two chunks longer than a window, has the random one beside
    it; the third, of two chunks, meets what both left behind. Cuts fall inside the last chunk that is learned from, so
    that learning before scoring shows (unless chunks are single tokens). Returns what every rank compared by itself."""
    picks, long = (
        np.resize(np.argsort(-docs.predictions, kind="stable")[:3], 3),
        how.window // how.chunk + 2,
    )
    predictions = np.minimum(docs.predictions[picks], np.array([long, long, 2]) * how.chunk)
    starts = np.cumsum(predictions + 1) - predictions - 1
    where = np.concatenate(
        [docs.starts[d] + np.arange(n + 1) for d, n in zip(picks, predictions, strict=True)]
    )
    tokens, kept = docs.tokens[rt.upload(where)], np.zeros(len(where), dtype=bool)
    for start, n in zip(starts[::2], predictions[::2], strict=True):
        lesson = (n - 1) // how.chunk - 1  # the last chunk that is learned from, if any
        cut = lesson * how.chunk + (how.chunk + 1) // 2 if lesson >= 0 else n // 2
        kept[start : start + cut + 1] = True
    noise = np.random.default_rng(cfg.seed).integers(cfg.vocab_size, size=len(where))
    altered = torch.where(rt.upload(kept), tokens, rt.upload(noise).int())
    compared = rt.upload(kept[:-1] & kept[1:])  # position p predicts token p + 1 from token p
    alone = replace(rt, rank=0, world=1, log_path=None)
    few = (
        replace(docs, tokens=version, starts=starts, predictions=predictions)
        for version in (tokens, altered)
    )
    how = replace(how, batch=2, isolated=True)
    once, again = (fill_ledger(model, version, how, cfg, alone)[0][0][compared] for version in few)
    moved = (once - again).abs().max().item() if len(once) else 0.0
    line = f"later tokens or other documents moved scores by up to {moved:g} nats, not 0: it leaks, its score is void"
    require(moved <= rt.noise, f"audit causality: {line}")  # not a number is no agreement either
    return f"documents:{len(set(picks))} compared:{len(once)}"


# ==== Training ========================================================================================================
def compile_forward(model: GPT, cfg: Config, rt: Runtime) -> Callable[[Tensor, Tensor], Tensor]:
    """The model's forward, compiled if COMPILE says so and the compiler manages on every rank; else the model."""
    # On two cores compiling takes a minute and then saves a quarter of every step (records/NOTES.md). Evaluations never
    # run compiled code, so that a score is the same whether or not the run that prints it could compile.
    long = (cfg.max_wallclock_seconds or math.inf) >= 120 and cfg.iterations >= 200
    if cfg.compile == "0" or (cfg.compile == "auto" and rt.device.type == "cpu" and not long):
        return model
    rt.log("compile:started")
    began, failure, forward = rt.seconds(), "", torch.compile(model, dynamic=False, fullgraph=True)
    rows = cfg.train_batch_tokens // (rt.world * cfg.grad_accum_steps * cfg.train_seq_len)
    zeros = torch.zeros(rows * cfg.train_seq_len + 1, dtype=torch.int64, device=rt.device)
    try:  # once, on two views as `next_batch` makes them, so that neither compiling nor its failure falls into training
        forward(*(part.view(rows, -1) for part in (zeros[:-1], zeros[1:]))).mean().backward()
    except (
        Exception
    ) as error:  # no C++ compiler, an unsupported operator: eager trains the same way, slower
        failure = f"{error!r:.160}"
    model.zero_grad(set_to_none=True)
    failure = max(rt.gather(failure))  # on any rank
    done = f"done time:{rt.seconds() - began:.1f}s"
    rt.log(f"compile:failed ({failure}); running eager" if failure else f"compile:{done}")
    return model if failure else forward


class Trainer:
    """What changes while training: weights, optimizers, place in the token stream, step, milliseconds spent. A
    checkpoint holds all of it, and `identity`: the settings and hashes that a training must share to go on from it."""

    def __init__(
        self, model: GPT, stream: TokenStream, cfg: Config, rt: Runtime, hashes: Mapping[str, str]
    ) -> None:
        self.model, self.forward, self.stream, self.cfg, self.rt = model, model, stream, cfg, rt
        self.step, self.elapsed_ms, self.mark, self.saved_ms = 0, 0.0, 0.0, 0.0
        self.params = {
            name: p for name, p in model.named_parameters() if p.numel()
        }  # one layer: no skip weights
        # Step and place of the first gradient or weight that is not finite, as one number: on the device, seldom read.
        self.fault = self.no_fault = torch.tensor(2**62, device=rt.device)
        self.optimizers, self.cap_ms = (
            build_optimizers(model, cfg, rt),
            1000 * (cfg.max_wallclock_seconds or math.inf),
        )
        others = [p for p in self.params.values() if p not in self.optimizers[0].state]
        self.others = [
            others[rank :: rt.world] for rank in range(rt.world)
        ]  # those of Adam, by who averages gradients
        names = (every := list(vars(cfg)))[every.index("seed") : every.index("grad_clip_norm") + 1]
        shared = {
            "grad_accum_steps": rt.world * cfg.grad_accum_steps,
            "dtype": rt.dtype,
        }  # ranks share micro-steps
        decisive = {name: getattr(cfg, name) for name in names} | shared
        self.identity = {name.upper(): spell(value) for name, value in decisive.items()} | dict(
            hashes
        )

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors that training changes, by name; they are the same on every rank."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for optimizer in self.optimizers:
            for i, state in enumerate(optimizer.state.values()):
                named |= {
                    f"{type(optimizer).__name__}.{i}.{name}": tensor
                    for name, tensor in state.items()
                }
        return named

    @property
    def finished(self) -> bool:
        """Whether ITERATIONS or MAX_WALLCLOCK_SECONDS are used up: the same on every rank."""
        return self.step >= self.cfg.iterations or self.elapsed_ms >= self.cap_ms

    def train_step(self) -> Tensor:
        """One optimizer step over TRAIN_BATCH_TOKENS. Returns this rank's mean loss, () fp32, still on the device."""
        cfg, muon, total = self.cfg, self.optimizers[0], torch.zeros((), device=self.rt.device)
        for _ in range(cfg.grad_accum_steps):
            loss = self.forward(*self.stream.next_batch(cfg, self.rt)).mean() / cfg.grad_accum_steps
            loss.backward()
            total += loss.detach()
        # A gradient's mean is one rank's to make: a matrix's its owner's, which alone needs it; others then go to all.
        grads = [
            [p.grad for p in (*own, *other)]
            for own, other in zip(muon.shares, self.others, strict=True)
        ]
        self.rt.average(grads)
        if cfg.grad_clip_norm:
            own = grads[self.rt.rank]
            norm = self.rt.sum(sum((grad.float().square().sum() for grad in own), 0 * total)).sqrt()
            torch._foreach_mul_(own, (cfg.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))
        self.rt.exchange([[p.grad for p in other] for other in self.others])
        scale, muon.param_groups[0]["momentum"] = schedule(self.step, self.elapsed_ms, cfg)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
            optimizer.step()
        seen = [*(p.grad for p in self.params.values()), *self.params.values()]
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(seen)])
        place = self.step * len(norms) + torch.arange(len(norms), device=self.rt.device)
        self.fault = torch.minimum(
            self.fault, torch.where(norms.isfinite(), self.no_fault, place).min()
        )
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def refuse_faults(self) -> None:
        """`AgreedError` if a gradient or a weight has not been finite; a loss that is not makes such gradients."""
        if (fault := min(self.rt.gather(int(self.fault)))) < int(
            self.no_fault
        ):  # of all: owners know more
            what = [
                f"{kind} {name}"
                for kind in ("the gradient of", "the weight")
                for name in self.params
            ]
            step, place = divmod(fault, len(what))
            lost = f"the last good state is that after step {step}; nothing was exported"
            raise AgreedError(
                f"step {step + 1}: {what[place]} is not finite; {lost}; lower the learning rates"
            )

    def warm_up(self) -> None:
        """WARMUP_STEPS real steps, which prime allocators and kernels; then everything goes back to the start."""
        start = {name: tensor.clone() for name, tensor in self.tensors().items()}
        step, position = self.step, self.stream.position
        for _ in range(self.cfg.warmup_steps):
            self.train_step()
        copy_tensors(self.tensors(), start, "")
        self.step, self.stream.position, self.fault = step, position, self.no_fault

    def save(self) -> None:
        """Rank 0 writes a checkpoint and keeps the last two of this run."""
        self.refuse_faults()
        muon = self.optimizers[
            0
        ]  # a checkpoint holds the momentum of all matrices, whatever the number of ranks
        self.rt.exchange([[muon.state[p]["buffer"] for p in share] for share in muon.shares])
        self.saved_ms, counts = self.elapsed_ms, (self.step, self.elapsed_ms, self.stream.position)
        state = {
            "identity": self.identity,
            "tensors": self.tensors(),
            "rng": torch.get_rng_state(),
            "counts": counts,
        }
        if self.rt.rank == 0:
            path = Path(self.cfg.out_dir, f"checkpoints/{self.rt.run_id}.step{self.step:09d}.pt")
            self.rt.save(path, state)
            for old in [old for old in find_checkpoints(self.cfg, self.rt.run_id) if old != path][
                1:
            ]:
                with contextlib.suppress(OSError):
                    old.unlink()

    def resume(self) -> None:
        """Go on from where RESUME says, on all ranks as rank 0 has read it. `AgreedError` for what does not fit."""
        self.rt.together(lambda: self.rt.rank or self.read_checkpoint())
        mine = self.step, self.elapsed_ms, self.stream.position, torch.get_rng_state()
        self.step, self.elapsed_ms, self.stream.position, rng = self.rt.gather(mine)[0]
        torch.set_rng_state(rng)
        self.rt.spread(self.tensors().values())

    def read_checkpoint(self) -> None:
        """Take everything from the checkpoint that RESUME names; `auto` passes over damaged ones. `UserError`."""
        auto = self.cfg.resume == "auto"
        found = find_checkpoints(self.cfg, self.rt.run_id) or find_checkpoints(
            self.cfg
        )  # its own before another's
        for path in found if auto else [Path(self.cfg.resume)]:
            try:
                state = load_state(path)
                break
            except UserError as error:
                require(auto, str(error))
                self.rt.log(f"warning: skipped {error}")
        else:
            return self.rt.log("resume: found no checkpoint; starting anew")
        with refusing(path, "the same settings and data; set them back, or leave out RESUME"):
            theirs, mine = state["identity"], self.identity
            differ = sorted(
                name for name in theirs.keys() | mine.keys() if theirs.get(name) != mine.get(name)
            )
            found = ", ".join(
                f"{name}={theirs.get(name)!s:.64} (now {mine.get(name)!s:.64})" for name in differ
            )
            require(not differ, f"it was made under {found}")
            require(
                all(0 <= count <= 1e18 for count in state["counts"]), "its counts are impossible"
            )
            copy_tensors(self.tensors(), state["tensors"], path)
            torch.set_rng_state(state["rng"])
            step, elapsed, position = state["counts"]
            self.step, self.elapsed_ms, self.stream.position = (
                int(step),
                float(elapsed),
                int(position),
            )
        self.rt.log(
            f"resume:{path} step:{self.step}/{self.cfg.iterations} train_time:{self.elapsed_ms:.0f}ms"
        )

    def tick(self, now: float) -> None:
        """Count the time since the last tick as training time, by rank 0's clock on every rank."""
        self.elapsed_ms, self.mark = (
            self.rt.from_rank0(self.elapsed_ms + 1000 * (now - self.mark)),
            now,
        )

    def report(self, what: str) -> None:
        """Log `what` with step and time, in the form that existing tools read, unless the training has gone wrong."""
        self.refuse_faults()
        pace = f"train_time:{self.elapsed_ms:.0f}ms step_avg:{self.elapsed_ms / max(self.step, 1):.2f}ms"
        self.rt.log(f"step:{self.step}/{self.cfg.iterations} {what} {pace}")


def train(trainer: Trainer, validate: Callable[[], Score]) -> None:
    """Train until the budget is used up, validating on the way, outside the clock. `AgreedError` after a signal."""
    cfg, rt, cap_ms = trainer.cfg, trainer.rt, trainer.cap_ms
    if not trainer.finished:
        trainer.forward = compile_forward(trainer.model, cfg, rt)
        trainer.warm_up()
    trainer.mark, trainer.saved_ms = rt.seconds(), trainer.elapsed_ms
    with rt.progress(1.0, "training") as bar:
        while not trainer.finished:
            if cfg.val_loss_every and trainer.step % cfg.val_loss_every == 0:
                trainer.tick(rt.seconds())
                trainer.refuse_faults()  # before a long evaluation
                trainer.report(str(validate()))
                trainer.mark = rt.seconds()
            loss = trainer.train_step()
            trainer.tick(rt.seconds(wait=False))
            if trainer.step % 10 == 0:  # not more often, since it waits for the device
                trainer.refuse_faults()
            if cfg.train_log_every and (
                trainer.step <= 10 or trainer.step % cfg.train_log_every == 0
            ):
                trainer.report(f"train_loss:{rt.sum(loss).item() / rt.world:.4f}")
            late = (
                cfg.checkpoint_seconds
                and trainer.elapsed_ms - trainer.saved_ms >= 1000 * cfg.checkpoint_seconds
            )
            if (
                late
                or rt.signal
                or (cfg.checkpoint_every and trainer.step % cfg.checkpoint_every == 0)
            ):
                trainer.save()
            require(not rt.signal, f"after step {trainer.step} of {cfg.iterations}", AgreedError)
            tokens = trainer.step * cfg.train_batch_tokens
            bar.set_postfix_str(
                f"{1000 * tokens / trainer.elapsed_ms:,.0f} tokens/s", refresh=False
            )
            bar.update(
                max(trainer.step / cfg.iterations, trainer.elapsed_ms / cap_ms) - bar.n
            )  # the scarcer budget
    trainer.tick(rt.seconds())
    trainer.refuse_faults()
    if trainer.step < (most := cfg.iterations):
        rt.log(
            f"stopping_early: wallclock_cap train_time:{trainer.elapsed_ms:.0f}ms step:{trainer.step}/{most}"
        )


# ==== Main: the order of events =======================================================================================
def load_inputs(
    cfg: Config, rt: Runtime
) -> tuple[Config, dict[str, Tensor] | None, TokenStream, Documents, dict]:
    """(`cfg` with MODEL_PATH's shape, its weights, training stream, documents, hashes by file), or `UserError`."""
    weights = read_weights(cfg.model_path) if cfg.model_path else None
    if weights is not None:
        cfg = check(shape_from_weights(weights, cfg, cfg.model_path), rt.world)
    train = [] if cfg.eval_only else open_shards(cfg.data_path, "fineweb_train_*.bin")
    val, tokenizer = (
        open_shards(cfg.data_path, "fineweb_val_*.bin"),
        load_tokenizer(cfg.tokenizer_path, cfg.vocab_size),
    )
    hashes = {"tokenizer": sha256(read_file(cfg.tokenizer_path)).hexdigest()}
    for shard in (*val, *train[rt.rank :: rt.world]):  # the ranks share the reading
        top, most = int(shard.max()), cfg.vocab_size - 1
        require(
            top <= most,
            f"{shard.filename}: token id {top}, expected ids up to {most}; take its own tokenizer",
        )
        hashes[Path(shard.filename).name] = sha256(Path(shard.filename).read_bytes()).hexdigest()
    table = ByteTable.build(tokenizer)
    docs = split_documents(
        np.concatenate(val), tokenizer.bos_id(), cfg.max_val_docs, table, rt.device
    )
    rt.log(f"sha256 tokenizer:{hashes['tokenizer']}")
    for name in (name for name in hashes if "_val_" in name):
        rt.log(f"sha256 val:{hashes[name]} {name}")
    audit_bytes(docs, table, tokenizer, rt)
    return cfg, weights, TokenStream(train), docs, hashes


def score_artifact(
    model: GPT, path: Path, docs: Documents, cfg: Config, rt: Runtime, hashes: Mapping
) -> None:
    """Read the artifact back from disk and score it under every condition of EVAL; the record's final lines."""
    scores, rungs, kept = {}, ladder(docs, cfg, rt), []
    rt.together(lambda: rt.rank or copy_tensors(model.state_dict(), read_weights(path), path))
    rt.spread(model.state_dict().values())  # only rank 0 needs to see OUT_DIR
    artifact, code = rt.gather(None if rt.rank else path.read_bytes())[0], source_code().encode()
    digest, size, budget = (
        sha256(artifact).hexdigest(),
        len(artifact) + len(code),
        cfg.artifact_budget,
    )
    rt.log(f"sha256 artifact:{digest} {path.name}")
    verdict = "PASS" if size <= budget else "FAIL"
    rt.log(f"submission_size:{size} budget:{budget} headroom:{budget - size} {verdict}")
    for name, how in ((name, rungs[name]) for name in cfg.eval):
        if how.targets or name == cfg.eval[-1]:
            began = rt.seconds()
            compared = rt.together(lambda how=how: audit_causality(model, docs, how, cfg, rt))
            rt.log(
                f"audit causality: condition:{name} {compared} time:{1000 * (rt.seconds() - began):.0f}ms PASS"
            )
        decisive = digest, code, hashes, how, cfg.seed, rt.dtype, rt.device.type, cfg.max_val_docs
        key = sha256(repr(decisive).encode()).hexdigest()
        stem = Path(cfg.out_dir, "checkpoints", f"{name}-{key[:16]}")
        kept.append(progress := Progress(stem, cfg.eval_max_seconds if how.targets else 0.0, rt))
        score = scores[name] = evaluate(model, docs, how, cfg, rt, progress)
        spent, (_, tokens, size) = (
            1000 * (progress.earlier + rt.seconds() - progress.began),
            score.totals,
        )
        rt.suffix = " partial" if cfg.max_val_docs or score.missing else ""
        before, targets = int(docs.starts[0]) if how.isolated else 0, len(docs.tokens) - 1
        left_out = (
            f"before_first_bos:{before} after_last_row:{targets - before - tokens - score.missing}"
        )
        left_out += f" beyond_max_val_docs:{docs.beyond}" + f" out_of_time:{score.missing}" * (
            score.missing > 0
        )
        covered = f"targets:{targets + docs.beyond} scored_once:{tokens} {left_out}"
        rt.log(f"audit coverage: condition:{name} {covered} PASS")
        rt.log(f"{name} positions:{score.computed}/{how.work(how.spans(docs)[1]).sum()}")
        delta, count = (
            score.bpb - scores[cfg.eval[0]].bpb,
            len(np.unique(score.columns["doc"].clip(0))),
        )
        losses = f"val_loss:{score.loss:.6f} val_bpb:{score.bpb:.6f} delta_bpb:{delta:+.4f}"
        rt.log(
            f"ladder condition:{name} {losses} docs:{count} tokens:{tokens} bytes:{size} eval_time:{spent:.0f}ms"
        )
        if how.final:
            rt.log(f"{how.final} {score} eval_time:{spent:.0f}ms")
        if name == "flat":
            rt.log(f"{how.final}_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
    if cfg.scores_path:
        rt.together(lambda: write_scores(Path(cfg.out_dir, cfg.scores_path), scores, rt))
    if rt.rank == 0 and not any(score.missing for score in scores.values()):
        for path in (path for progress in kept for path in progress.files()):
            path.unlink(missing_ok=True)


def run(cfg: Config, rt: Runtime) -> None:
    """Load, train, export, score."""
    cfg, weights, stream, docs, hashes = rt.together(lambda: load_inputs(cfg, rt))
    hashes = dict(sorted(item for part in rt.gather(hashes) for item in part.items()))
    rt.log(
        f"val_documents:{len(docs.starts)} predictions:{docs.predictions.sum()} documents_of_one_token:{docs.short}"
    )
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, rt.dtype).to(rt.device)
    if weights is not None:
        rt.together(lambda: copy_tensors(model.state_dict(), weights, cfg.model_path))
    names = (
        "vocab_size",
        "num_layers",
        "model_dim",
        "num_heads",
        "num_kv_heads",
        "mlp_mult",
        "tie_embeddings",
    )
    shape = " ".join(f"{name}:{getattr(cfg, name)}" for name in names)
    rt.log(f"model_params:{sum(p.numel() for p in model.parameters())} {shape}")
    artifact, flat = Path(cfg.model_path), ladder(docs, cfg, rt)["flat"]
    if not cfg.eval_only:
        trainer = Trainer(model, stream, cfg, rt, hashes)
        if cfg.resume:
            trainer.resume()
        train(trainer, lambda: evaluate(model, docs, flat, cfg, rt))
        trainer.save()
    if (
        not cfg.eval_only or artifact.suffix != ".ptz"
    ):  # before any long evaluation: a finished training is never lost
        artifact = rt.together(lambda: export(model, cfg, rt))
    if not cfg.eval_only:
        trainer.report(str(evaluate(model, docs, flat, cfg, rt)))
    score_artifact(
        model,
        artifact,
        docs,
        cfg,
        rt,
        {name: hashes[name] for name in hashes if "_train_" not in name},
    )


def main(arguments: Sequence[str] = ()) -> int:
    """The program, which takes no arguments. Returns its exit status: 0, 1 for an error, 75 for a signal's stop."""
    rt, status, agreed = None, 0, True
    try:
        require(
            not arguments,
            f"command line: found {' '.join(arguments)!r:.80}, expected nothing; settings are"
            " environment variables: ITERATIONS=500 python train_gpt.py",
            kind=AgreedError,
        )
        cfg = read_config(os.environ)
        rt = Runtime.create(cfg, os.environ)
        rt.listen()
        run(cfg, rt)
    except Exception as error:
        known, agreed, status = (
            isinstance(error, (UserError, OSError)),
            isinstance(error, AgreedError),
            1,
        )
        line, number, gone = (
            str(UserError(error)) if known else f"{error!r:.300}",
            rt and (rt.heard or rt.signal),
            "",
        )
        if rt and rt.world > 1:
            line = line if agreed else f"rank {rt.rank}: {line}"
            # torchrun sends SIGTERM, too, where another rank is gone; and a broken connection does not say whose.
            gone = rt.lost_ranks(wait=bool(number) or isinstance(error, RuntimeError))
        if number or gone:
            line, status = (
                f"{line}; go on with RESUME=auto and the same settings",
                1 if gone else 75,
            )
        line = (
            f"stopped by {signal.Signals(number).name}: {line}"
            if status == 75
            else f"error: {gone}{line}"
        )
        if os.environ.get("LOCAL_RANK" if rt is None else "RANK", "0") == "0" or not agreed:
            print(line, file=sys.stderr, flush=True)
            with contextlib.suppress(
                AttributeError, OSError, UserError
            ):  # no log yet; a full disk takes no last line
                rt.log(line, console=False)
        elif (
            rt is None
        ):  # torchrun ends all ranks with the first, which must be the one that speaks
            time.sleep(30)
        if not known and not number:
            traceback.print_exc()
    if (
        agreed and dist.is_initialized()
    ):  # else another rank may be waiting for this one, and leaving would wait for it
        dist.destroy_process_group()
        time.sleep(
            0.1
        )  # gloo's threads need the interpreter to drop their last tensors, and abort when it is gone
    return status


if __name__ == "__main__":
    gc.freeze()  # all that the imports made lives to the end: no collection, in a step or at the exit, looks at it
    sys.exit(main(sys.argv[1:]))
