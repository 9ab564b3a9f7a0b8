"""What the tests share: a small model with every weight alive, real text, and the script run as users run it."""

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = (
    "1"  # two workers run side by side: threads that wait for each other would spin
)

import numpy as np
import pytest
import sentencepiece
import torch
from make_shards import TOKENIZER_SETTINGS

import train_gpt as tg

ROOT = Path(__file__).resolve().parent.parent
CONFORMANCE = (
    Path(__file__).resolve().parent / "conformance"
)  # copies of the project's conformance set
CPU = torch.device("cpu")

# A model of 0.5 M parameters on the conformance shards: small enough to start, train and score in seconds.
TINY_SHAPE = {"NUM_LAYERS": "3", "MODEL_DIM": "64", "NUM_HEADS": "4", "NUM_KV_HEADS": "2"}
TINY_RUN = TINY_SHAPE | {
    "DEVICE": "cpu",
    "PRESET": "baseline",
    "DATA_PATH": str(CONFORMANCE),
    "TOKENIZER_PATH": str(CONFORMANCE / "tokenizer.model"),
    "TRAIN_BATCH_TOKENS": "4096",
    "TRAIN_SEQ_LEN": "128",
    "ITERATIONS": "4",
    "WARMUP_STEPS": "1",
    "MAX_WALLCLOCK_SECONDS": "0",
    "CALIBRATION_SECONDS": "1e-3",
    "EVAL": "flat,ttt,stream",
    "VAL_LOSS_EVERY": "0",
    "VAL_BATCH_SIZE": "16384",
    "TTT_CHUNK_SIZE": "64",
    "TTT_EVAL_SEQ_LEN": "128",
    "MAX_VAL_DOCS": "6",
}
EVAL_ARTIFACT = {
    "EVAL_ONLY": "1",
    "MODEL_PATH": str(CONFORMANCE / "final_model.int8.ptz"),
    "TRAIN_SEQ_LEN": "512",
}


def invocation(out_dir, ranks=0, script=ROOT / "train_gpt.py", restarts=0, **settings):
    """(command, environment) that start the script as a user does; ranks=0 without torchrun, None unsets a setting."""
    ours = {f.upper() for f in tg.Config.__dataclass_fields__} | {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
    }
    env = {key: value for key, value in os.environ.items() if key not in ours}
    env |= {"OMP_NUM_THREADS": "1", "OUT_DIR": str(out_dir), "RUN_ID": "test"} | TINY_RUN
    if "MODEL_PATH" in settings:  # a model brings its shape
        env = {name: value for name, value in env.items() if name not in TINY_SHAPE}
    env |= settings
    env = {key: value for key, value in env.items() if value is not None}
    command = [sys.executable]
    if ranks:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={ranks}", f"--max-restarts={restarts}"]
    return [*command, str(script)], env


def run_script(out_dir, ranks=0, **settings):
    """Run the script as a user does, see invocation. Returns the finished process."""
    command, env = invocation(out_dir, ranks, **settings)
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=1500, cwd=out_dir
    )


def script_behind(folder, line):
    """A script that runs `line`, which may use os and time, and then the program."""
    path = folder / "behind.py"
    path.write_text(f"""import os, runpy, time
{line}
runpy.run_path({str(ROOT / "train_gpt.py")!r}, run_name="__main__")
""")
    return path


@functools.cache
def fork_server():
    """A process that has made the slow imports; what it forks is the program in a tenth of a second.

    `torch._dynamo` is what torch itself imports when the program makes its first model.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_gpt", "torch._dynamo", "pytest"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        forkserver.ensure_running()
    return context


def fork_ranks(ranks, folder, env, hook=""):
    """Start the program as `ranks` forked processes, which meet as they do under torchrun.

    `hook` is Python text that each of them runs first; it may use os, signal, time and tg.
    Returns [(process, path of its output, path of its errors)]. ranks=1 is a run without torchrun.
    """
    started = []
    store = None
    if ranks > 1:
        store = torch.distributed.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=True
        )
        env = env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        env |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    for rank in range(ranks):
        mine = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if store else env
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder.with_name(f"{folder.name}.{time.monotonic_ns()}")
        paths = [Path(f"{stem}.out"), Path(f"{stem}.err")]
        for path in paths:
            path.touch()
        process = fork_server().Process(target=be_the_program, args=(mine, folder, paths, hook))
        process.daemon = True  # so that it dies with the tests
        process.start()
        process.store = store  # which lives as long as the processes that meet there
        started.append((process, *paths))
    return started


def be_the_program(env, folder, paths, hook):
    """What a forked process does: take this environment, folder and these files, run the program."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for number, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    exec(hook, {"os": os, "signal": signal, "time": time, "tg": tg})
    sys.exit(tg.main())


def run_forked(out_dir, ranks=1, hook="", **settings):
    """Like run_script, but ten times as fast: see fork_ranks. The errors are those of all ranks."""
    _, env = invocation(out_dir, **settings)
    started = fork_ranks(ranks, Path(out_dir), env, hook)
    for process, _, _ in started:
        process.join(1500)
    codes = [process.exitcode for process, _, _ in started]
    errors = "".join(path.read_text() for _, _, path in started)
    worst = next((code for code in codes if code != 0), 0)
    return subprocess.CompletedProcess("fork", worst, started[0][1].read_text(), errors)


def shard_bytes(tokens):
    """A shard as the format describes it, written here independently of data/make_shards.py."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes()


def write_shard(path, tokens):
    path.write_bytes(shard_bytes(tokens))
    return path


def write_jsonl(path, texts, key="text"):
    """A document on every line."""
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def train_tokenizer(path, texts, **options):
    """A tokenizer of these texts, the published one but for these options."""
    settings = TOKENIZER_SETTINGS | {"model_prefix": path.with_suffix("")} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), **settings)
    return path


def folder_bytes(folder):
    """{relative path: content} of every file below a folder, hidden ones included."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def tiny_config(**settings):
    """A three-layer model of width 32 with chunks of 8 in windows of 24."""
    base = tg.Config(
        device="cpu",
        num_layers=3,
        model_dim=32,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=96,
        train_seq_len=32,
        train_batch_tokens=256,
        grad_accum_steps=2,
        val_batch_size=256,
        ttt_chunk_size=8,
        ttt_eval_seq_len=24,
        ttt_lora_rank=2,
        ttt_batch_size=4,
        warmup_steps=0,
        max_wallclock_seconds=0.0,
        iterations=3,
    )
    return replace(base, **settings)


def tiny_condition(cfg, learn=True, stream=False, **settings):
    """Chunks of 8 in windows of 24, the recipe's adapters or none, with or without a memory in place of windows."""
    learner = tg.Learner(("c_q", "c_v", "lm_head"), cfg.ttt_lora_rank, cfg.ttt_lora_lr)
    how = tg.Condition(8, 24, cfg.ttt_batch_size, learner if learn else None, stream=stream)
    return replace(how, **settings)


def tiny_model(cfg, rt, seed=0):
    """A GPT in which no weight is zero, so that every path through it matters."""
    torch.manual_seed(seed)
    model = tg.GPT(cfg, rt.dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.3 * torch.randn(p.shape) / p.shape[-1] ** 0.5)
    return model


def tiny_table(vocab_size):
    """A byte table in which every token stands for a different, recognisable number of bytes."""
    base = np.arange(vocab_size)
    return tg.ByteTable(base, base % 3 == 0, base > 3)


def tiny_score(nats, tokens, size):
    """A score of one chunk."""
    losses = np.array([nats])
    columns = {"tokens": np.array([tokens]), "bytes": np.array([size]), "loss_nats": losses}
    return tg.Score(columns, losses)


def tiny_documents(lengths, vocab_size=96, lead=()):
    """Documents of the given numbers of tokens (BOS = 1 included), random text, closed by the stream's end.

    lead: tokens in front of them, which belong to none.
    """
    rng = np.random.default_rng(0)
    parts = [np.append(1, rng.integers(4, vocab_size, n - 1)) for n in lengths]
    stream = np.concatenate([lead, *parts]).astype(np.uint16)
    return tg.split_documents(stream, 1, 0, tiny_table(vocab_size), CPU)


@pytest.fixture
def rt():
    """One rank, CPU, fp32: exact enough to compare two ways of computing the same thing."""
    return tg.Runtime(CPU, torch.float32)


class Ended(NamedTuple):
    """What came of a run."""

    status: int
    out: str
    err: str


@pytest.fixture
def run_here(monkeypatch, capfd):
    """Run the program in this process, which saves the start of another.

    A function of OUT_DIR and of settings, as `run_script` is. The lock on OUT_DIR and the handlers
    of signals are left out, since this process would keep both until its own end.
    """

    def run(out_dir, **settings):
        _, env = invocation(out_dir, **settings)
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", env)
            patch.setattr(tg.fcntl, "flock", lambda *_: None)
            patch.setattr(signal, "signal", lambda *_: None)
            status = tg.main()
        return Ended(status, *capfd.readouterr())

    return run


def pytest_collection_modifyitems(items):
    """The files that take longest first, so that no worker ends with one alone."""
    slow = ("test_faults.py", "test_conformance.py", "test_program.py")
    items.sort(key=lambda item: slow.index(item.path.name) if item.path.name in slow else len(slow))
