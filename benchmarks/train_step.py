"""What a training step costs: the recipe's loop written plainly, and this script's.

    python benchmarks/train_step.py --data data/demo                  4 x 256, rows of 1,024 tokens
    python benchmarks/train_step.py --data data/demo --shape cpu      the cpu preset's model, batch
    python benchmarks/train_step.py --data data/demo --ranks 2        bytes on the wire
    python benchmarks/train_step.py --data data/demo --loader         the wait for tokens

`plain` is written here from the description of the recipe: its micro-batches, torch's attention,
one matrix at a time through Newton-Schulz in bf16, torch's Adam, one all-reduce of the gradients
and one of the bf16 updates. It runs the model of train_gpt.py. `plain, fp32 NS` differs in one
thing, for CPUs without bf16: it orthogonalises in the compute dtype. All variants start from the
same weights and tokens and run in turns, a step each; the table has the median of their seconds.
Their losses may differ by 0.02 over 40 steps; else the exit status is 1.

Model FLOPs of a step: 6 x tokens x (numbers in the matrices + layers x T x dim), the head among the
matrices, the embedding's look-up not: 2 for each multiplication and addition forward and 4
backward. Attention multiplies twice (scores and values) with T / 2 keys on average: the causal half
counts once. Optimizers, norms and activations do not count.

Operations are those of aten that torch's profiler sees, the ones inside others included. On a busy
machine, `--threads 1` and the column of CPU time, which other processes lengthen little, compare
better than seconds.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench_tools import matmul_rate, open_stream, peak_memory, print_head, print_row, timed
from torch import Tensor

import train_gpt as tg

AGREEMENT = 0.02  # nats by which two trajectories may differ
SHAPES = {
    "issue": dict(
        num_layers=4,
        model_dim=256,
        num_heads=4,
        num_kv_heads=2,
        train_seq_len=1024,
        train_batch_tokens=16384,
        grad_accum_steps=8,
    ),
    "cpu": {},
}


def settings(data: Path, shape: str, **changes: object) -> tg.Config:
    """The cpu preset on `data` with the model and batch of `shape`, constant rates and no cap."""
    cfg = tg.read_config({"PRESET": "cpu", "DEVICE": "cpu", "DATA_PATH": str(data)})
    steady = dict(max_wallclock_seconds=0.0, warmdown_iters=0)
    return replace(cfg, **SHAPES[shape] | steady | changes)


# ==== The two loops ===============================================================================


def make_trainer(cfg: tg.Config, rt: tg.Runtime) -> tg.Trainer:
    """Ours."""
    model = tg.build_model(cfg, rt.dtype).to(rt.device)
    return tg.Trainer(model, open_stream(cfg), rt, tg.RunLog(rt.rank), hashes={})


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What `causal_attention` computes, by torch's kernel."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class PlainLoop:
    """The recipe's loop (spec, sections 1, 3 and 4): one matrix, one micro-step after the other."""

    def __init__(self, cfg: tg.Config, rt: tg.Runtime, ns_dtype: torch.dtype = torch.bfloat16):
        self.cfg = cfg
        self.rt = rt
        self.ns_dtype = ns_dtype  # of Newton-Schulz
        self.step = 0
        self.stream = open_stream(cfg)
        self.model = tg.build_model(cfg, rt.dtype)
        self.forward = self.model
        self.matrices = []
        scalars = []
        for name, p in self.model.blocks.named_parameters():
            group = self.matrices if name.endswith("weight") else scalars
            group.append(p)
        scalars.append(self.model.skip_weights)
        self.buffers = [torch.zeros_like(p) for p in self.matrices]
        groups = [
            {"params": [self.model.tok_emb.weight], "lr": cfg.tied_embed_lr},
            {"params": scalars, "lr": cfg.scalar_lr},
        ]
        self.adam = torch.optim.Adam(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps)

    def train_step(self) -> Tensor:
        """One step. Returns this rank's mean loss, () fp32."""
        total = torch.zeros(())
        for _ in range(self.cfg.grad_accum_steps):
            inputs, targets = self.next_batch()
            loss = self.forward(inputs, targets).mean() / self.cfg.grad_accum_steps
            loss.backward()
            total += loss.detach()
        if self.rt.world > 1:
            self.average_gradients()
        self.muon_step(*tg.schedule(self.step, 0.0, self.cfg))
        self.adam.step()
        self.model.zero_grad()
        self.step += 1
        return total

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a micro-step, each (B, T)."""
        cfg = self.cfg
        rt = self.rt
        span = cfg.train_batch_tokens // (rt.world * cfg.grad_accum_steps) + 1
        tokens = torch.from_numpy(self.stream.read(self.stream.position + rt.rank * span, span))
        self.stream.position += span * rt.world
        inputs = tokens[:-1].view(-1, cfg.train_seq_len)
        return inputs, tokens[1:].view(-1, cfg.train_seq_len)

    def average_gradients(self):
        """Replace the gradients by their means over the ranks."""
        grads = [p.grad for p in self.model.parameters()]
        joined = torch.cat([g.flatten().float() for g in grads])
        dist.all_reduce(joined)
        means = (joined / self.rt.world).split([g.numel() for g in grads])
        for g, mean in zip(grads, means, strict=True):
            g.copy_(mean.view_as(g))

    def newton_schulz(self, g: Tensor) -> Tensor:
        """A matrix like g, its singular values near 1."""
        x = g.to(self.ns_dtype)
        x = x / (x.norm() + 1e-7)
        tall = x.size(0) > x.size(1)
        x = x.T if tall else x
        for _ in range(self.cfg.muon_backend_steps):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x.T if tall else x

    @torch.no_grad()
    def muon_step(self, scale: float, momentum: float):
        """One step on the matrices; the ranks share them in turns."""
        sizes = [p.numel() for p in self.matrices]
        updates = torch.zeros(sum(sizes), dtype=torch.bfloat16)
        parts = updates.split(sizes)
        for j, (p, buffer) in enumerate(zip(self.matrices, self.buffers, strict=True)):
            buffer.mul_(momentum).add_(p.grad)
            if j % self.rt.world == self.rt.rank:
                update = self.newton_schulz(p.grad + momentum * buffer)
                update = update * max(1.0, p.size(0) / p.size(1)) ** 0.5
                parts[j].copy_(update.flatten())
        if self.rt.world > 1:
            dist.all_reduce(updates)
        for p, part in zip(self.matrices, parts, strict=True):
            p.add_(part.view_as(p), alpha=-self.cfg.matrix_lr * scale)


# ==== The numbers of a model ======================================================================


class Counts(NamedTuple):
    """Numbers in the parameters of a model with a tied head."""

    matrices: int  # inside the blocks
    embedding: int
    vectors: int


def count_numbers(cfg: tg.Config) -> Counts:
    """The numbers in a model of this shape."""
    with torch.device("meta"):
        model = tg.GPT(cfg, torch.float32)
    total = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.parameters() if p.role == tg.MATRIX)
    embedding = model.tok_emb.weight.numel()
    return Counts(matrices, embedding, total - matrices - embedding)


def model_flops(cfg: tg.Config) -> int:
    """FLOPs of one step over all ranks; the formula is in this file's docstring."""
    counts = count_numbers(cfg)
    # Two products x T / 2 keys seen on average x dim.
    pairs = cfg.num_layers * cfg.train_seq_len * cfg.model_dim
    return 6 * cfg.train_batch_tokens * (counts.matrices + counts.embedding + pairs)


# ==== The table of variants =======================================================================


@dataclass
class Variant:
    """One way to train, and what it took."""

    name: str
    loop: PlainLoop | tg.Trainer
    attention: Callable  # what the model calls while this variant runs
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # seconds of all threads
    operations: int = 0
    memory: float = 0.0  # MB

    def step(self):
        """One step of the loop, timed, with this variant's attention in the shared model."""
        with mock.patch.object(tg, "causal_attention", self.attention):
            cpu = time.process_time()
            seconds, loss = timed(self.loop.train_step)
            self.cpu.append(time.process_time() - cpu)
        self.seconds.append(seconds)
        self.losses.append(loss.item())

    def warm_up(self):
        """Two steps that are not timed: the first compiles, the second one counts."""
        self.step()
        peak_memory(reset=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self.step()
        self.memory = peak_memory()
        for event in profile.key_averages():
            if event.key.startswith("aten::"):
                self.operations += event.count
        self.seconds.clear()
        self.cpu.clear()


def make_variants(cfg: tg.Config, rt: tg.Runtime, compiled: bool) -> list[Variant]:
    """Eager and, if wanted, compiled; no step has run yet."""
    variants = []
    for how in ("eager", "compiled")[: 1 + compiled]:
        loops = {"plain": PlainLoop(cfg, rt)}
        if rt.dtype != torch.bfloat16:
            loops["plain, fp32 NS"] = PlainLoop(cfg, rt, rt.dtype)
        for name, loop in loops.items():
            if how == "compiled":
                loop.forward = torch.compile(loop.model, dynamic=False, fullgraph=True)
            variants.append(Variant(f"{name}, {how}", loop, flash_attention))
        trainer = make_trainer(replace(cfg, compile=str(int(how == "compiled"))), rt)
        trainer.compile_forward()
        variants.append(Variant(f"ours, {how}", trainer, tg.causal_attention))
    return variants


def compare(cfg: tg.Config, rt: tg.Runtime, steps: int, compiled: bool) -> float:
    """Run the variants in turns and print their table.

    Returns the largest difference of two losses of a step, in nats.
    """
    variants = make_variants(cfg, rt, compiled)
    for variant in variants:
        variant.warm_up()
    rates = []
    for _ in range(steps - 2):
        rates.append(matmul_rate(rt.dtype, seconds=0.1))
        for variant in variants:
            variant.step()
    rate = statistics.median(rates)
    print(
        f"layers:{cfg.num_layers} dim:{cfg.model_dim} T:{cfg.train_seq_len}"
        f" tokens:{cfg.train_batch_tokens} micro-steps:{cfg.grad_accum_steps}"
        f" {model_flops(cfg) / 1e9:.1f} GFLOP a step, {rt.dtype},"
        f" threads:{torch.get_num_threads()} matmul:{rate:.0f} GFLOP/s"
    )
    print_head(
        "variant",
        "ms a step",
        "least",
        "least of CPU time",
        "tokens/s",
        "GFLOP/s",
        "of matmul",
        "peak MB",
        "operations a step",
        "last loss",
    )
    for variant in variants:
        print_variant(variant, cfg, rate)
    apart = np.ptp([variant.losses for variant in variants], axis=0).max()
    verdict = "PASS" if apart <= AGREEMENT else "FAIL"
    print(
        f"largest difference of two losses in {steps} steps: {apart:.4f}, promised {AGREEMENT}:"
        f" {verdict}"
    )
    return apart


def print_variant(variant: Variant, cfg: tg.Config, rate: float):
    """Print the row of one variant; `rate` is that of matrix products, in GFLOP/s."""
    seconds = statistics.median(variant.seconds)
    reached = model_flops(cfg) / seconds / 1e9
    print_row(
        variant.name,
        f"{1000 * seconds:.0f}",
        f"{1000 * min(variant.seconds):.0f}",
        f"{1000 * min(variant.cpu):.0f}",
        f"{cfg.train_batch_tokens / seconds:.0f}",
        f"{reached:.0f}",
        f"{reached / rate:.0%}",
        f"{variant.memory:.0f}",
        variant.operations,
        f"{variant.losses[-1]:.4f}",
    )


# ==== Bytes on the wire ===========================================================================


def bytes_received(descriptor: int) -> int:
    """Bytes that have arrived at this open file if it is a TCP socket: payload, no headers."""
    target = os.readlink(f"/proc/self/fd/{descriptor}")
    if not target.startswith("socket:"):
        return 0
    with socket.socket(fileno=os.dup(descriptor)) as end:
        if end.type != socket.SOCK_STREAM or end.family not in (socket.AF_INET, socket.AF_INET6):
            return 0
        info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
    return struct.unpack_from("Q", info, 128)[0]  # tcpi_bytes_received in linux/tcp.h


def received() -> int:
    """Bytes that have arrived at all TCP sockets of this process, as the kernel counts them."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # listing the folder opens and closes one itself
            total += bytes_received(int(name))
    return total


def least_bytes(cfg: tg.Config, world: int) -> int:
    """Bytes that all ranks together must receive in a step of either loop.

    In an all-reduce every number crosses the wire twice for each rank but one: to where it is
    added up, and back. Gradients are fp32, updates of matrices bf16. Sending each gradient to the
    owner of its matrix alone would halve this, at the price of more code (records/NOTES.md).
    """
    counts = count_numbers(cfg)
    gradients = 2 * 4 * sum(counts)
    updates = 2 * 2 * counts.matrices
    return (gradients + updates) * (world - 1)


class Wire(NamedTuple):
    """What one loop moves between the ranks."""

    name: str
    count: float  # bytes a step that all ranks receive together
    seconds: float  # of a step
    equal: bool  # whether the weights are the same on every rank afterwards


def count_loop(name: str, loop: PlainLoop | tg.Trainer, rt: tg.Runtime, steps: int) -> Wire:
    """Count what arrives on all ranks in a step, the mean of `steps`."""

    def take_steps():
        for _ in range(steps):
            loop.train_step()
        dist.barrier()

    loop.train_step()
    dist.barrier()
    before = received()
    seconds, _ = timed(take_steps)
    count = rt.sum(torch.tensor((received() - before) / steps))
    weights = [p.detach().double().sum().item() for p in loop.model.parameters()]
    replicas = rt.gather(weights)
    equal = replicas == [weights] * rt.world
    return Wire(name, count.item(), seconds / steps, equal)


def count_wire(rank: int, world: int, cfg: tg.Config, steps: int, folder: str):
    """One rank, a process of its own; rank 0 writes a `Wire` for each loop into `folder`."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    dtype = tg.choose_dtype(cfg)
    rt = tg.Runtime(torch.device("cpu"), dtype, rank, world)
    rows = []
    for name, make in (("plain", partial(PlainLoop, ns_dtype=dtype)), ("ours", make_trainer)):
        rows.append(count_loop(name, make(cfg, rt), rt, steps))
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()
    time.sleep(0.1)  # gloo's threads need the interpreter to drop their last tensors


def wire(cfg: tg.Config, world: int, steps: int) -> list[Wire]:
    """Print the bytes a step that all ranks receive, beside the minimum. Returns the rows."""
    cfg = replace(cfg, grad_accum_steps=max(1, cfg.grad_accum_steps // world))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(count_wire, (world, cfg, steps, folder), nprocs=world)
        found = json.loads(Path(folder, "rows.json").read_text())
    rows = [Wire(*row) for row in found]
    least = least_bytes(cfg, world)
    print(
        f"ranks:{world} layers:{cfg.num_layers} dim:{cfg.model_dim} steps:{steps},"
        " MB received by all ranks together"
    )
    print_head(
        "loop", "MB a step, counted", "least", "counted / least", "replicas equal", "ms a step"
    )
    for row in rows:
        print_row(
            row.name,
            f"{row.count / 1e6:.3f}",
            f"{least / 1e6:.3f}",
            f"{row.count / least:.3f}",
            "yes" if row.equal else "NO",
            f"{1000 * row.seconds:.0f}",
        )
    return rows


# ==== The loader ==================================================================================


def sparse_shard(path: Path, count: int):
    """Write a shard of `count` zeros that takes no room on the disk."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, count
    path.write_bytes(header.tobytes())
    os.truncate(path, 1024 + 2 * count)


def time_reads(cfg: tg.Config, rt: tg.Runtime, steps: int) -> list[float]:
    """Milliseconds that each of `steps` steps waits for its tokens.

    The stream switches to the next shard halfway, if the first is so long.
    """
    stream = open_stream(cfg)
    before = cfg.train_batch_tokens * (steps // 2)
    stream.position = max(0, len(stream.shards[0]) - before)
    found = []
    for _ in range(steps):
        began = time.perf_counter()
        for _ in range(cfg.grad_accum_steps):
            stream.next_batch(cfg, rt)
        found.append(1000 * (time.perf_counter() - began))
    return found


def waits(
    cfg: tg.Config, rt: tg.Runtime, steps: int, tokens: int = 100_000_000
) -> dict[str, list[float]]:
    """What `time_reads` finds on the shards of `cfg`, and between two of `tokens` tokens."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            sparse_shard(Path(folder, f"fineweb_train_{number:06d}.bin"), tokens)
        return {
            "demo": time_reads(cfg, rt, steps),
            f"switch at {tokens} tokens": time_reads(replace(cfg, data_path=folder), rt, steps),
        }


def loader(cfg: tg.Config, rt: tg.Runtime, steps: int):
    """Print the table of waits, beside the time of a step."""
    trainer = make_trainer(cfg, rt)
    trainer.train_step()
    seconds, _ = timed(trainer.train_step)
    step = 1000 * seconds
    print_head("shards", "ms a step waits", "longest", f"of a step ({step:.0f} ms)", "longest")
    for name, times in waits(cfg, rt, steps).items():
        median = statistics.median(times)
        most = max(times)
        print_row(
            name, f"{median:.3f}", f"{most:.3f}", f"{median / step:.3%}", f"{most / step:.3%}"
        )


def main() -> int:
    """Print one of the tables. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of training shards")
    parser.add_argument(
        "--shape", choices=SHAPES, default="issue", help="model and batch (default: the issue's)"
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--eager", action="store_true", help="leave out the compiled variants, which take minutes"
    )
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument(
        "--ranks", type=int, default=0, help="count bytes between so many ranks instead"
    )
    parser.add_argument("--loader", action="store_true", help="time the reading of tokens instead")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    cfg = settings(options.data, options.shape, dtype=options.dtype)
    if options.ranks:
        wire(cfg, options.ranks, min(options.steps, 5))
        return 0
    rt = tg.Runtime.create(cfg, {})
    if options.loader:
        loader(cfg, rt, options.steps)
        return 0
    apart = compare(cfg, rt, options.steps, not options.eager)
    return int(apart > AGREEMENT)


if __name__ == "__main__":
    sys.exit(main())
