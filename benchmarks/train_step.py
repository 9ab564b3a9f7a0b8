"""What a training step costs: the recipe's loop written plainly and this script's, on the same weights and tokens.

    python benchmarks/train_step.py --data data/demo                          4 layers x 256, rows of 1,024 tokens
    python benchmarks/train_step.py --data data/demo --shape cpu              the cpu preset's model and batch
    python benchmarks/train_step.py --data data/demo --ranks 2                bytes on the wire, beside the minimum
    python benchmarks/train_step.py --data data/demo --loader                 how long a step waits for its tokens

`plain` is written here from the description of the recipe: its micro-batches, torch's attention, one matrix at a time
through Newton-Schulz in bf16, torch's Adam, one all-reduce of the gradients and one of the bf16 updates. It runs the
model of train_gpt.py. `plain, fp32 NS` differs in one thing, for CPUs without bf16: it orthogonalises in the compute
dtype. All variants run in turns, a step each; the table has the median of their seconds. The losses of the variants may
differ by 0.02 over 40 steps; else the exit status is 1.

Model FLOPs of a step: 6 x tokens x (numbers in the matrices, with the head, without the embedding's look-up, + layers x
T x dim): 2 for each multiplication and addition forward and 4 backward. Attention multiplies twice (scores and values)
with T / 2 keys on average: the causal half counts once. Optimizers, norms and activations do not count.

Operations are those of aten that torch's profiler sees, the ones inside others included. On a busy machine, `--threads
1` and the column of CPU time, which other processes lengthen little, compare better than seconds.
"""

import argparse
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

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ttt_eval import matmul_rate, peak_memory  # which puts the script's folder on the path

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
    """The cpu preset on `data`, with the model and batch of `shape`; no warm-up, no cap, constant rates."""
    cfg = tg.read_config({"PRESET": "cpu", "DEVICE": "cpu", "DATA_PATH": str(data)})
    return replace(
        cfg, **SHAPES[shape] | dict(max_wallclock_seconds=0.0, warmdown_iters=0) | changes
    )


def make_trainer(cfg: tg.Config, rt: tg.Runtime) -> tg.Trainer:
    """Ours: the same weights for every variant."""
    torch.manual_seed(cfg.seed)
    stream = tg.TokenStream(tg.open_shards(cfg.data_path, "fineweb_train_*.bin"))
    return tg.Trainer(tg.GPT(cfg, rt.dtype), stream, cfg, rt, {})


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class PlainLoop:
    """The recipe's loop (spec, sections 1, 3 and 4), one matrix and one micro-step after the other."""

    def __init__(
        self, cfg: tg.Config, rt: tg.Runtime, ns_dtype: torch.dtype = torch.bfloat16
    ) -> None:
        base = make_trainer(cfg, rt)  # for its weights and tokens
        self.cfg, self.rt, self.ns_dtype, self.step = cfg, rt, ns_dtype, 0
        self.stream, self.model, self.forward = base.stream, base.model, base.model
        inside = list(self.model.blocks.named_parameters())
        self.matrices = [p for name, p in inside if name.endswith("weight")]
        scalars = [p for name, p in inside if not name.endswith("weight")] + [
            self.model.skip_weights
        ]
        self.buffers = [torch.zeros_like(p) for p in self.matrices]
        embed = {"params": [self.model.tok_emb.weight], "lr": cfg.tied_embed_lr}
        self.adam = torch.optim.Adam(
            [embed, {"params": scalars, "lr": cfg.scalar_lr}],
            betas=(cfg.beta1, cfg.beta2),
            eps=cfg.adam_eps,
        )

    def newton_schulz(self, g: torch.Tensor) -> torch.Tensor:
        x = g.to(self.ns_dtype)
        x = x / (x.norm() + 1e-7)
        tall = x.size(0) > x.size(1)
        x = x.T if tall else x
        for _ in range(self.cfg.muon_backend_steps):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x.T if tall else x

    def train_step(self) -> torch.Tensor:
        cfg, rt, total = self.cfg, self.rt, torch.zeros(())
        for _ in range(cfg.grad_accum_steps):
            span = cfg.train_batch_tokens // (rt.world * cfg.grad_accum_steps) + 1
            tokens = torch.from_numpy(self.stream.read(self.stream.position + rt.rank * span, span))
            self.stream.position += span * rt.world
            x, y = tokens[:-1].view(-1, cfg.train_seq_len), tokens[1:].view(-1, cfg.train_seq_len)
            loss = self.forward(x, y).mean() / cfg.grad_accum_steps
            loss.backward()
            total += loss.detach()
        if rt.world > 1:
            grads = [p.grad for p in self.model.parameters()]
            joined = torch.cat([g.flatten().float() for g in grads])
            dist.all_reduce(joined)
            for g, mean in zip(
                grads, (joined / rt.world).split([g.numel() for g in grads]), strict=True
            ):
                g.copy_(mean.view_as(g))
        self.muon_step(*tg.schedule(self.step, 0.0, cfg))
        self.adam.step()
        self.model.zero_grad()
        self.step += 1
        return total

    @torch.no_grad()
    def muon_step(self, scale: float, momentum: float) -> None:
        updates = torch.zeros(sum(p.numel() for p in self.matrices), dtype=torch.bfloat16)
        parts = updates.split([p.numel() for p in self.matrices])
        for j, (p, buffer, part) in enumerate(zip(self.matrices, self.buffers, parts, strict=True)):
            buffer.mul_(momentum).add_(p.grad)
            if j % self.rt.world == self.rt.rank:
                update = (
                    self.newton_schulz(p.grad + momentum * buffer)
                    * max(1.0, p.size(0) / p.size(1)) ** 0.5
                )
                part.copy_(update.flatten())
        if self.rt.world > 1:
            dist.all_reduce(updates)
        for p, part in zip(self.matrices, parts, strict=True):
            p.add_(part.view_as(p), alpha=-self.cfg.matrix_lr * scale)


def model_flops(cfg: tg.Config) -> int:
    """Of one step over all ranks; the formula is in this file's docstring."""
    vectors = (
        cfg.num_layers * (4 * cfg.model_dim + cfg.num_heads) + cfg.num_layers // 2 * cfg.model_dim
    )
    matrices = tg.count_parameters(cfg) - vectors  # tied: the embedding's numbers are the head's
    pairs = (
        cfg.num_layers * cfg.train_seq_len * cfg.model_dim
    )  # 2 products x T/2 keys seen on average x dim
    return 6 * cfg.train_batch_tokens * (matrices + pairs)


@dataclass
class Variant:
    """One way to train, and what it took."""

    name: str
    loop: PlainLoop | tg.Trainer
    attention: Callable  # what the model calls while this variant runs
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # of all threads
    operations: int = 0
    memory: float = 0.0

    def step(self) -> None:
        """One step of the loop, timed, with this variant's attention inside the shared model code."""
        ours, tg.causal_attention = tg.causal_attention, self.attention
        began, cpu = time.perf_counter(), time.process_time()
        loss = self.loop.train_step()
        self.seconds.append(time.perf_counter() - began)
        self.cpu.append(time.process_time() - cpu)
        tg.causal_attention = ours
        self.losses.append(loss.item())


def make_variants(cfg: tg.Config, rt: tg.Runtime, compiled: bool) -> list[Variant]:
    """Eager and, if wanted, compiled; nothing has run yet."""
    variants = []
    for how in ("eager", "compiled")[: 1 + compiled]:
        variants.append(Variant(f"plain, {how}", PlainLoop(cfg, rt), flash_attention))
        if rt.dtype != torch.bfloat16:
            variants.append(
                Variant(f"plain, fp32 NS, {how}", PlainLoop(cfg, rt, rt.dtype), flash_attention)
            )
        variants.append(Variant(f"ours, {how}", make_trainer(cfg, rt), tg.causal_attention))
    for variant in variants:
        if variant.name.endswith("compiled"):
            if isinstance(variant.loop, tg.Trainer):
                variant.loop.forward = tg.compile_forward(
                    variant.loop.model, replace(cfg, compile="1"), rt
                )
            else:
                variant.loop.forward = torch.compile(
                    variant.loop.model, dynamic=False, fullgraph=True
                )
    return variants


def compare(cfg: tg.Config, rt: tg.Runtime, steps: int, compiled: bool) -> float:
    """Run the variants in turns and print their table. Returns the largest difference of two losses of a step."""
    variants, rates = make_variants(cfg, rt, compiled), []
    for variant in variants:  # the first step compiles, the second one counts; neither is timed
        variant.step()
        peak_memory(reset=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            variant.step()
        variant.operations = sum(
            event.count for event in profile.key_averages() if event.key.startswith("aten::")
        )
        variant.memory = peak_memory()
        variant.seconds.clear(), variant.cpu.clear()
    for _ in range(steps - 2):
        rates.append(matmul_rate(rt.dtype, seconds=0.1))
        for variant in variants:
            variant.step()
    rate, flops = statistics.median(rates), model_flops(cfg)
    spread = np.ptp([variant.losses for variant in variants], axis=0)
    print(
        f"layers:{cfg.num_layers} dim:{cfg.model_dim} T:{cfg.train_seq_len} tokens:{cfg.train_batch_tokens} "
        f"micro-steps:{cfg.grad_accum_steps} {flops / 1e9:.1f} GFLOP a step, {rt.dtype}, threads:"
        f"{torch.get_num_threads()} matmul:{rate:.0f} GFLOP/s"
    )
    print(
        "| variant | ms a step | least | least of CPU time | tokens/s | GFLOP/s | of matmul | peak MB "
        "| operations a step | last loss |\n|" + "---|" * 10
    )
    for variant in variants:
        spent, least, cpu = (
            statistics.median(variant.seconds),
            min(variant.seconds),
            min(variant.cpu),
        )
        print(
            f"| {variant.name} | {1000 * spent:.0f} | {1000 * least:.0f} | {1000 * cpu:.0f} "
            f"| {cfg.train_batch_tokens / spent:.0f} | {flops / spent / 1e9:.0f} | {flops / spent / 1e9 / rate:.0%} "
            f"| {variant.memory:.0f} | {variant.operations} | {variant.losses[-1]:.4f} |",
            flush=True,
        )
    print(
        f"largest difference of two losses in {steps} steps: {spread.max():.4f}, promised {AGREEMENT}: "
        f"{'PASS' if spread.max() <= AGREEMENT else 'FAIL'}"
    )
    return spread.max()


def received() -> int:
    """Bytes that have arrived at the TCP sockets of this process, as the kernel counted them: payload, no headers."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as end:
                    if end.type == socket.SOCK_STREAM and end.family in (
                        socket.AF_INET,
                        socket.AF_INET6,
                    ):
                        info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
                        total += struct.unpack_from("Q", info, 128)[
                            0
                        ]  # tcpi_bytes_received in linux/tcp.h
        except OSError:
            continue  # listing the folder opens and closes one itself
    return total


def least_bytes(cfg: tg.Config, world: int) -> tuple[int, int]:
    """(ours, plain): bytes that all ranks together must receive in a step, if each crosses the wire once.

    Ours: a matrix's gradient goes to its owner (4 bytes a number) and its bf16 update from there to all (2); the
    others' go to one rank (4) and their means return in their dtype (2 for the bf16 embedding, else 4). Plain: an
    all-reduce of every gradient in fp32 (8) and one of the matrices' updates in bf16 (4). All times (world - 1).
    """
    embedding = cfg.vocab_size * cfg.model_dim
    vectors = (
        cfg.num_layers * (4 * cfg.model_dim + cfg.num_heads) + cfg.num_layers // 2 * cfg.model_dim
    )
    matrices = tg.count_parameters(cfg) - embedding - vectors
    ours, plain = (
        6 * (matrices + embedding) + 8 * vectors,
        12 * matrices + 8 * (embedding + vectors),
    )
    return ours * (world - 1), plain * (world - 1)


def count_wire(rank: int, world: int, cfg: tg.Config, steps: int, folder: str) -> None:
    """One rank of a run that counts what it receives in training steps: a process of its own."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    rt = tg.Runtime(torch.device("cpu"), tg.choose_dtype(cfg)[0], rank, world)
    rows = []
    for name, make in (("plain", partial(PlainLoop, ns_dtype=rt.dtype)), ("ours", make_trainer)):
        loop = make(cfg, rt)
        loop.train_step()
        dist.barrier()
        before, began = received(), time.perf_counter()
        for _ in range(steps):
            loop.train_step()
        dist.barrier()
        count, spent = (
            torch.tensor((received() - before) / steps),
            (time.perf_counter() - began) / steps,
        )
        dist.all_reduce(count)
        weights = torch.stack(
            [p.detach().double().sum() for p in loop.model.parameters() if p.numel()]
        )
        rows.append(
            (name, count.item(), spent, len({tuple(w) for w in rt.gather(weights.tolist())}) == 1)
        )
    if rank == 0:
        np.save(Path(folder, "rows.npy"), np.array(rows, dtype=object), allow_pickle=True)
    dist.destroy_process_group()
    time.sleep(0.1)


def wire(cfg: tg.Config, world: int, steps: int) -> list[tuple]:
    """Bytes a step that all ranks receive, by the kernel's counters, beside the minimum. Returns the table's rows."""
    cfg = replace(cfg, grad_accum_steps=max(1, cfg.grad_accum_steps // world))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(count_wire, (world, cfg, steps, folder), nprocs=world)
        rows = np.load(Path(folder, "rows.npy"), allow_pickle=True).tolist()
    least = dict(zip(("ours", "plain"), least_bytes(cfg, world), strict=True))
    print(
        f"ranks:{world} layers:{cfg.num_layers} dim:{cfg.model_dim} steps:{steps}, MB received by all ranks together"
    )
    print(
        "| loop | MB a step, counted | least for this way | counted / least of ours | replicas equal | ms a step |\n"
        + "|"
        + "---|" * 6
    )
    for name, count, spent, same in rows:
        print(
            f"| {name} | {count / 1e6:.3f} | {least[name] / 1e6:.3f} | {count / least['ours']:.3f} "
            f"| {'yes' if same else 'NO'} | {1000 * spent:.0f} |"
        )
    return rows


def sparse_shard(path: Path, count: int) -> None:
    """A shard of `count` zeros that takes no room on the disk."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, count
    path.write_bytes(header.tobytes())
    os.truncate(path, 1024 + 2 * count)


def waits(
    cfg: tg.Config, rt: tg.Runtime, steps: int, tokens: int = 100_000_000
) -> dict[str, tuple[float, float]]:
    """(median, longest) milliseconds that a step waits for its tokens: on `cfg`'s shards, and from one to the next."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            sparse_shard(Path(folder, f"fineweb_train_{number:06d}.bin"), tokens)
        for name, where in (("demo", cfg.data_path), (f"switch at {tokens} tokens", folder)):
            stream = tg.TokenStream(tg.open_shards(str(where), "fineweb_train_*.bin"))
            stream.position = max(
                0, len(stream.shards[0]) - cfg.train_batch_tokens * (steps // 2)
            )  # then a switch
            taken = []
            for _ in range(steps):
                began = time.perf_counter()
                for _ in range(cfg.grad_accum_steps):
                    stream.next_batch(cfg, rt)
                taken.append(1000 * (time.perf_counter() - began))
            found[name] = statistics.median(taken), max(taken)
    return found


def loader(cfg: tg.Config, rt: tg.Runtime, steps: int) -> None:
    """The table of waits, beside the time of a step."""
    trainer = make_trainer(cfg, rt)
    trainer.train_step()
    began = time.perf_counter()
    trainer.train_step()
    step = 1000 * (time.perf_counter() - began)
    print(
        f"| shards | ms a step waits | longest | of a step ({step:.0f} ms) | longest |\n|"
        + "---|" * 5
    )
    for name, (median, most) in waits(cfg, rt, steps).items():
        print(f"| {name} | {median:.3f} | {most:.3f} | {median / step:.3%} | {most / step:.3%} |")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what a training step costs.")
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
    torch.set_num_threads(options.threads or torch.get_num_threads())
    cfg = settings(options.data, options.shape, dtype=options.dtype)
    with tempfile.TemporaryDirectory() as folder:  # for a log that nobody reads
        rt = replace(tg.Runtime.create(replace(cfg, out_dir=folder), {}), log_path=None)
    if options.ranks:
        wire(cfg, options.ranks, min(options.steps, 5))
    elif options.loader:
        loader(cfg, rt, options.steps)
    else:
        return int(compare(cfg, rt, options.steps, not options.eager) > AGREEMENT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
