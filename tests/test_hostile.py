"""Hostile and broken input: strangers' weights and checkpoints, what is no file, bad settings, and a fuzzer.

What is expected everywhere: success, or one clear line. No code from a file runs, nothing hangs, an artifact
inflates to a bounded size, and a refused run writes nothing but its log.
"""

import contextlib
import copy
import io
import os
import pickle
import pickletools
import random
import re
import struct
import threading
import tracemalloc
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import fields

import make_shards
import numpy as np
import pytest
import torch
from conftest import (
    CPU,
    TINY_RUN,
    run_script,
    tiny_config,
    tiny_model,
    write_shard,
)

import train_gpt as tg

pytestmark = pytest.mark.filterwarnings("ignore")

# --- What is damaged here: a small model, whole ----------------------------------------------------

EMB = "tok_emb.weight"
FC = "blocks.0.mlp.fc.weight"
GAIN = "blocks.0.attn.q_gain"
Q = "blocks.0.attn.c_q.weight"


def good_state():
    """The weights of a small model."""
    return dict(tiny_model(tiny_config(), tg.Runtime(CPU, torch.float32)).state_dict())


def good_content():
    """An artifact's content, with one matrix quantised although it is small."""
    state = good_state()
    content = tg.quantize(state, [], 0)
    matrix = content["passthrough"].pop(FC)
    content["quantized"][FC] = (100 * matrix).round().char()
    content["scales"][FC] = torch.full((len(matrix),), 0.01)
    content["dtypes"][FC] = "float32"
    content["passthrough"][Q] = content["passthrough"][Q].half()
    content["passthrough_orig_dtypes"][Q] = "float32"
    return content


def new_trainer(path=""):
    """A training of a small model, to go on from the checkpoint at the path."""
    rt = tg.Runtime(CPU, torch.float32)
    cfg = tiny_config(resume=str(path), seed=7)
    stream = tg.TokenStream([np.arange(999) % 96])
    return tg.Trainer(tiny_model(cfg, rt), stream, rt, tg.RunLog(), {"tokenizer": "ab" * 32})


def good_checkpoint():
    """What a checkpoint of that training holds after a step."""
    trainer = new_trainer()
    trainer.train_step()
    return copy.deepcopy(trainer.state() | {"identity": trainer.identity})


GOOD = {"ptz": good_content, "pt": good_state, "state": good_checkpoint}


def saved(content, **options):
    """The bytes of torch.save."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, buffer, **options)
    return buffer.getvalue()


def in_form(kind, blob):
    """A file of this kind around what torch.save gave; checkpoints are called .state here."""
    return zlib.compress(blob) if kind == "ptz" else blob


def use(path):
    """All that the program does with a file before its content is used."""
    if path.suffix == ".state":
        return new_trainer(path).resume()
    if path.suffix == ".bin":
        return tg.open_shard(path).max()
    if path.suffix == ".model":
        return tg.load_tokenizer(str(path), 1024)
    return tg.load_model(path, tiny_config())


def assert_one_line(error):
    """A message for a person: one line that cannot move the cursor, of bounded length."""
    line = str(error)
    assert line.isprintable(), line
    assert 0 < len(line) <= 1500


def assert_refused(path):
    """A `UserError` of one line that names the file."""
    with pytest.raises(tg.UserError) as refused:
        use(path)
    assert_one_line(refused.value)
    assert f"{path}: " in str(refused.value)


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    """Every test works in its own folder, where `touch executed` would show."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "executed").exists()


def test_what_is_damaged_here_is_good_before(tmp_path):
    for kind, make_good in GOOD.items():
        path = tmp_path / f"good.{kind}"
        path.write_bytes(in_form(kind, saved(make_good())))
        use(path)


# --- Contents that cannot be used ------------------------------------------------------------------

BREAKS = "a\nerror: b\r\x1b[2Jc"
GONE = object()  # stands for an entry that is lost
ODD = [
    lambda t: GONE,
    lambda t: None,
    lambda t: "text",
    lambda t: t.tolist(),
    lambda t: t.float().to_sparse(),
    lambda t: t.to("meta"),
    lambda t: t[1:],
    lambda t: t[None],
    lambda t: torch.ones(1, dtype=t.dtype).expand(10**6, 10**6),
]
ODD_WEIGHTS = [
    *ODD,
    lambda t: torch.full_like(t.float(), torch.nan),
    lambda t: torch.full_like(t.float(), -torch.inf),
]
ODD_DTYPES = [
    *ODD_WEIGHTS,
    lambda t: t.double(),
    lambda t: t.long(),
    lambda t: t.to(torch.complex64),
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t: torch.nested.nested_tensor([t.float(), t.float()[:1]]),
]
NAMES = ("extra", BREAKS, "a" * 10**5, 5, None)
# (kind, place, what is refused there, as a value or as a function of what was there); the empty place
# is the whole file.
VALUES = [
    ("ptz", ("quantized", FC), ODD_DTYPES),
    ("ptz", ("scales", FC), ODD_WEIGHTS),
    ("ptz", ("passthrough", Q), ODD_WEIGHTS),
    ("pt", (FC,), ODD_DTYPES),
    ("pt", (GAIN,), ODD_DTYPES),
    ("state", ("model", FC), ODD),
    ("ptz", ("__quant_format__",), ("int4", ["int8"], BREAKS, "x" * 10**6)),
    ("ptz", ("dtypes", FC), (GONE, "__class__", "int64", None, ["float32"])),
    ("ptz", ("passthrough_orig_dtypes", Q), ("load",)),
    ("pt", (), ([1], 5, None, torch.ones(3), {})),
    ("pt", (EMB,), (torch.ones(0, 2**40), torch.ones(2**40, 0))),
    ("pt", (GAIN,), (torch.ones(0),)),
    ("pt", ("model",), ([1], {}, torch.ones(3), {FC: 5})),  # as MODEL_PATH takes a checkpoint
    ("state", (), ([1], torch.ones(3), {}, good_state())),
    ("state", ("step",), (torch.nan, 10**30, BREAKS)),
    ("state", ("rng",), (torch.ones(9),)),
    ("state", ("model", "extra"), (torch.ones(1),)),
    ("state", ("identity", "SEED"), (GONE, BREAKS, torch.ones(3), [1])),
]
VALUES += [("ptz", ("passthrough", name), (torch.ones(1),)) for name in NAMES]
VALUES += [("pt", (name,), (torch.ones(1),)) for name in NAMES]
VALUES += [("state", ("identity", name), ("7",)) for name in NAMES]
for kind, make_good in GOOD.items():
    VALUES += [(kind, (part,), (GONE, None, [1, 2])) for part in make_good() if part != "qmeta"]


def entry(content, place):
    """The dict that holds the entry at this place of a nest of dicts."""
    for key in place[:-1]:
        content = content[key]
    return content


def replaced(content, place, value):
    """The content with another value in this place."""
    if not place:
        return value
    inside = entry(content, place)
    old = inside.pop(place[-1], None)
    new = value(old) if callable(value) else value
    if new is not GONE:
        inside[place[-1]] = new
    return content


@pytest.mark.parametrize("kind", GOOD)
def test_a_value_that_is_odd_is_refused(kind, tmp_path, capsys):
    good = saved(GOOD[kind]())
    for _, place, values in (case for case in VALUES if case[0] == kind):
        for value in values:
            content = replaced(torch.load(io.BytesIO(good)), place, value)
            path = tmp_path / f"odd.{kind}"
            path.write_bytes(in_form(kind, saved(content)))
            assert_refused(path)
    assert not capsys.readouterr().out  # where nothing of a stranger's may appear


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    """RESUME=auto takes the one before it."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    good = saved(good_checkpoint() | {"step": 41})
    broken = (good[:-1000], b"", saved([1]), saved({"identity": 5}))
    for number, blob in enumerate((good, *broken)):
        path = folder / f"run.step{number:09d}.pt"
        path.write_bytes(blob)
        os.utime(path, (number, number))
    trainer = new_trainer("auto")
    trainer.log.run_id = "run"
    trainer.resume()
    assert trainer.step == 41
    assert capsys.readouterr().out.count("warning: skipped") == len(broken)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [("model", FC), ("optimizers", 0, "state", 0, "momentum_buffer")])
def test_a_training_that_goes_on_from_such_numbers_stops(value, place, tmp_path):
    content = good_checkpoint()
    entry(content, place)[place[-1]].fill_(value)
    path = tmp_path / "a.state"
    path.write_bytes(saved(content))
    trainer = new_trainer(path)
    trainer.resume()
    trainer.train_step()
    with pytest.raises(tg.UserError, match=r"step 2: .* is not finite; .*; nothing was exported"):
        trainer.check_finite()


# --- Files that torch.save would not write ---------------------------------------------------------


class Call:
    """Pickles to a call, as a hostile file would."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


RUN = Call(os.system, "touch executed")
CODE = [
    RUN,
    {RUN: torch.ones(1)},
    {"w": Call(eval, "open('executed', 'w')")},
    {"w": Call(open, "executed", "w")},
    *[good_content() | {part: RUN} for part in good_content()],
    *[good_checkpoint() | {part: {"w": RUN}} for part in good_checkpoint()],
]


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("is_zip", [True, False])
def test_no_code_is_executed_from_any_part(kind, is_zip, tmp_path):
    for number, content in enumerate(CODE):
        path = tmp_path / f"{number}.{kind}"
        blob = saved(content, _use_new_zipfile_serialization=is_zip)
        path.write_bytes(in_form(kind, blob))
        assert_refused(path)


def rezipped(blob, change):
    """A torch.save file whose entries, a dict from names to bytes, went through `change`."""
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in change(entries).items():
            archive.writestr(name, data)
    return buffer.getvalue()


PICKLE = "archive/data.pkl"
SHAPES = {  # what is claimed of a tensor of shape (2, 3)
    "sizes that overflow to 0": ((2, 3), (2**62, 4)),
    "sizes that are negative": ((2, 3), (-2, -3)),
    "larger than its storage": ((2, 3), (1000, 1000)),
    "a stride that overflows": ((3, 1), (2**63 - 1, 1)),
    "a storage larger than its bytes": (6, 10**8),
}


def opcodes(value):
    """What stands for a value inside a pickle."""
    return pickletools.optimize(pickle.dumps(value, 2))[2:-1]


@pytest.mark.parametrize("case", SHAPES)
def test_impossible_tensors_are_refused(case, tmp_path):
    old, new = map(opcodes, SHAPES[case])

    def claim(entries):
        assert old in entries[PICKLE]
        return entries | {PICKLE: entries[PICKLE].replace(old, new)}

    path = tmp_path / "a.pt"
    path.write_bytes(rezipped(saved({"w": torch.ones(2, 3)}), claim))
    assert_refused(path)


@pytest.mark.parametrize("kind", GOOD)
def test_files_that_are_no_whole_archives_are_refused(kind, tmp_path):
    blob = saved(GOOD[kind]())
    file = in_form(kind, blob)
    deep = b"]" * 20_000 + b"a" * 19_999 + b"."
    inside = [
        b"text" + blob,
        blob[: len(blob) // 2],
        rezipped(blob, lambda entries: {PICKLE: deep}),
        rezipped(blob, lambda entries: entries | {"archive/constants.pkl": b"."}),  # TorchScript
    ]
    files = [file[: int(share * len(file))] for share in (0, 0.001, 0.1, 0.9, 0.999)]
    files += [in_form(kind, content) for content in inside]
    if kind == "ptz":
        files += [file + b"x", file[:-1], blob]
    for content in files:
        path = tmp_path / f"damaged.{kind}"
        path.write_bytes(content)
        assert_refused(path)


@contextlib.contextmanager
def fifo(path):
    """A FIFO, and the list of who opened it: a reader would wait for ever, and is let go here."""
    os.mkfifo(path)
    done = threading.Event()
    readers = []

    def watch():
        while not done.wait(0.05):
            with contextlib.suppress(OSError):  # which says that nobody reads
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                readers.append(path)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield readers
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("kind", [*GOOD, "bin", "model"])
def test_what_is_no_file_is_refused(kind, tmp_path):
    (tmp_path / f"folder.{kind}").mkdir()
    (tmp_path / f"link.{kind}").symlink_to("nowhere")
    (tmp_path / f"loop.{kind}").symlink_to(f"loop.{kind}")
    with fifo(tmp_path / f"pipe.{kind}") as readers:
        for name in ("pipe", "folder", "absent", "link", "loop"):
            assert_refused(tmp_path / f"{name}.{kind}")
    assert not readers


# --- Bombs: small files that claim to be large -----------------------------------------------------


def test_a_zlib_bomb_stays_bounded(tmp_path):
    """Half a megabyte that would inflate to 512: no more than 64 of them are made."""
    packer = zlib.compressobj(9)
    start = packer.compress(saved(good_content())) + packer.flush(zlib.Z_FULL_FLUSH)
    zeros = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    path = tmp_path / "bomb.ptz"
    path.write_bytes(start + 512 * zeros)
    tracemalloc.start()
    assert_refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 160 * 2**20


def test_repeated_numbers_are_refused_before_they_are_computed_with(tmp_path, monkeypatch):
    """A tensor of one number says that it is of any size, and would be once it is dequantised."""
    monkeypatch.setattr(tg, "dequantize", lambda content: pytest.fail("dequantised"))
    content = good_content()
    content["quantized"][FC] = torch.ones(1, dtype=torch.int8).expand(64, 10**6)
    path = tmp_path / "large.ptz"
    path.write_bytes(in_form("ptz", saved(content)))
    assert_refused(path)


SIZES = {
    "layers": good_state() | {f"blocks.{i}.": torch.ones(()) for i in range(tg.MAX_LAYERS + 1)},
    "empty layers": good_state() | {f"blocks.{i}.": torch.ones(()) for i in range(tg.MAX_LAYERS)},
    "width": good_state() | {EMB: torch.ones(2, 2**20)},
    "heads": good_state() | {GAIN: torch.ones(2**20)},
    "hidden": good_state() | {FC: torch.ones(2**17, 32)},
}


@pytest.mark.parametrize("case", SIZES)
def test_impossible_shapes_are_refused_before_a_model_is_built(case, tmp_path, monkeypatch):
    """On the meta device alone, where parameters take no memory."""
    original = tg.GPT

    def build(cfg, dtype):
        is_bounded = cfg.num_layers <= tg.MAX_LAYERS
        if not is_bounded or torch.get_default_device().type != "meta":
            pytest.fail("a model was built")
        return original(cfg, dtype)

    monkeypatch.setattr(tg, "GPT", build)
    path = tmp_path / "large.pt"
    path.write_bytes(saved(SIZES[case]))
    assert_refused(path)


# --- JSONL for data/make_shards.py ------------------------------------------------------------------

GOOD_LINES = b'{"text": "three good words, and nine bad ones beside them"}\n' * 3


@pytest.mark.parametrize("line", [b'{"n": ' + b"9" * 5000 + b"}", b'{"text": "' + b"x " * 10**7])
def test_hostile_jsonl_makes_no_shards(line, tmp_path, capsys):
    arguments = ["--jsonl", "docs.jsonl", "--out", "set", "--val-docs", "1"]
    docs = tmp_path / "docs.jsonl"
    docs.write_bytes(GOOD_LINES + line + b"\n" + GOOD_LINES)
    assert make_shards.main(arguments) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: docs\.jsonl: line 4: found invalid JSON.*\n", error)
    docs.unlink()
    with fifo(docs) as readers:
        assert make_shards.main(arguments) == 1
    assert not readers
    assert not (tmp_path / "set").exists()


# --- The environment -------------------------------------------------------------------------------

TEXTS = ["", "-1", "-0", "0", "1", "9" * 5000, "1e300", "-1e300", "1e-300", "nan", "-inf", " 1"]
TEXTS += ["0x10", ",", "1_000", "\u0663", "\u00bd", "True", "a\nb", "\x1b[2J", "\0", "\udcff"]
TEXTS += ["../..", "/dev/null", "x" * 5000, str(10**18), str(10**30)]


def test_every_setting_takes_or_names_every_value():
    for spec in fields(tg.Config):
        for text in TEXTS:
            name = spec.name.upper()
            try:
                cfg = tg.read_config({"PRESET": "baseline", "DEVICE": "cpu", name: text})
            except tg.UserError as error:
                assert_one_line(error)
                assert name in str(error) or name.lower().replace("_", " ") in str(error)
                continue
            value = getattr(cfg, spec.name)
            assert isinstance(value, type(spec.default))
            assert not isinstance(value, float) or abs(value) <= 1e18


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"RANK": "abc"}, "RANK='abc'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2'"),
        ({"WORLD_SIZE": "\u0663x"}, "WORLD_SIZE="),
        ({"RANK": "1"}, "cannot join the process group"),
        ({"WORLD_SIZE": "1"}, "cannot join the process group"),
    ],
)
def test_an_environment_that_cannot_work_is_refused(settings, words, tmp_path, run_here):
    ended = run_here(tmp_path, **settings)
    assert_complaint(ended, words)
    assert not list(tmp_path.iterdir())


# What the environments of desktops, clusters and build services hold, nearest to ours.
ORDINARY = """DATA DATASET MODEL EVALS RESUMED DEVICES SEEDS COMPILER OUTPUT_DIR LOG_DIR BATCH_SIZE
MODULEPATH CONDA_DEFAULT_ENV CI_RUNNER_ID GITHUB_RUN_ID KERNEL_ID NODE_NAME BUILD_ID WANDB_RUN_ID
TORCHELASTIC_RUN_ID CUDA_VISIBLE_DEVICES MKL_NUM_THREADS SLURM_NTASKS ROLE_RANK ROLE_WORLD_SIZE"""
MISSPELT = {
    "TTT_LORA_RNK": "TTT_LORA_RANK",
    "NUM_LAYER": "NUM_LAYERS",
    "EVALONLY": "EVAL_ONLY",
    "MODELPATH": "MODEL_PATH",
    "OUTDIR": "OUT_DIR",
    "CHECKPOINT_EVRY": "CHECKPOINT_EVERY",
    "MAX_WALLCLOCK_SECOND": "MAX_WALLCLOCK_SECONDS",
}


def test_misspelt_settings_are_pointed_out(tmp_path, rt, capsys):
    env = TINY_RUN | dict.fromkeys([*ORDINARY.split(), *MISSPELT, "HOME\x1b"], "4")
    cfg = tg.read_config(env)
    log = tg.RunLog()
    log.path = tmp_path / "log.txt"
    log.write_header(cfg, rt, env, 1)
    warned = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    expected = [f"warning: unknown setting {n}; did you mean {m}?" for n, m in MISSPELT.items()]
    assert sorted(warned) == sorted(expected)


# --- The whole program -----------------------------------------------------------------------------


def files_below(folder):
    """Every file below a folder and its bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_complaint(ended, words):
    """Status 1, and nothing on stderr but one error line that holds the words."""
    assert ended.status == 1
    assert re.fullmatch(r"error: .*\n", ended.err), ended.err
    assert_one_line(ended.err.rstrip("\n"))
    assert words in ended.err


EVAL = {"EVAL_ONLY": "1"}
ENDS = [  # settings, one of which names a file, and what is said of it
    (EVAL | {"MODEL_PATH": "code.pt"}, "code.pt: unusable ("),
    (EVAL | {"MODEL_PATH": "width.pt"}, "width.pt: blocks.0.attn.c_k.weight: found (16, 32)"),
    ({"RESUME": "code.pt"}, "code.pt: unusable ("),
    ({"RESUME": "other.pt"}, "other.pt: it was made under "),
]


@pytest.mark.parametrize(("settings", "words"), ENDS)
def test_hostile_files_stop_the_program(settings, words, tmp_path, run_here):
    """One line, and no file of an earlier run is touched."""
    files = {"code.pt": {"w": RUN}, "width.pt": SIZES["width"], "other.pt": good_checkpoint()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(saved(content))
    (tmp_path / "checkpoints").mkdir()
    earlier = "final_model.pt final_model.int8.ptz a.csv checkpoints/a.step000000001.pt"
    for name in earlier.split():
        (tmp_path / name).write_text("earlier")
    before = files_below(tmp_path)
    ended = run_here(tmp_path, SCORES_PATH="a.csv", **settings)
    assert_complaint(ended, words)
    after = files_below(tmp_path)
    assert after.pop("logs/test.txt").decode().endswith(ended.err)
    assert after == before


def test_a_hostile_artifact_stops_a_fresh_process(tmp_path):
    """As a user starts it, where nothing filters what libraries print."""
    path = tmp_path / "code.ptz"
    path.write_bytes(in_form("ptz", saved(good_content() | {"scales": RUN})))
    done = run_script(tmp_path, EVAL_ONLY="1", MODEL_PATH=str(path))
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*/code\.ptz: unusable .*\n", done.stderr)


HUGE = """VAL_BATCH_SIZE VAL_LOSS_EVERY TRAIN_LOG_EVERY MAX_VAL_DOCS SEED WARMDOWN_ITERS
MUON_MOMENTUM_WARMUP_STEPS TTT_BATCH_SIZE CHECKPOINT_EVERY MAX_WALLCLOCK_SECONDS ROPE_BASE
GRAD_CLIP_NORM ADAM_EPS"""
ONE = """VAL_BATCH_SIZE TTT_BATCH_SIZE MAX_VAL_DOCS TTT_LORA_RANK TTT_STREAM_RANK TTT_CHUNK_SIZE
TTT_STREAM_CHUNK TRAIN_SEQ_LEN TRAIN_BATCH_TOKENS GRAD_ACCUM_STEPS NUM_LAYERS"""


@pytest.mark.parametrize(("names", "value"), [(HUGE, str(10**18)), (ONE, "1")])
def test_the_largest_and_the_smallest_settings_work(names, value, tmp_path, run_here):
    short = {"TTT_EVAL_SEQ_LEN": "64", "COMPILE": "0", "ITERATIONS": "1"}
    short["DATA_PATH"] = str(tmp_path)
    for split in ("train", "val"):
        write_shard(tmp_path / f"fineweb_{split}_000000.bin", [1, *range(5, 30)] * 5)
    ended = run_here(tmp_path, **short, **dict.fromkeys(names.split(), value))
    assert (ended.status, ended.err) == (0, "")
    assert "ladder condition:stream " in ended.out


# --- The fuzzer ------------------------------------------------------------------------------------

COUNTS = {"ptz": 120, "pt": 70, "state": 70, "bin": 40}


def mutated(rng, data):
    """`data` with one to four mistakes: a bit, a number, bytes lost, doubled, or made up."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        size = rng.choice((1, 4, 16, 100))
        part = bytes(data[at : at + size])
        number = rng.choice((0, 1, 255, 2**16 - 1, 2**31, 2**32 - 1))
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in part[:1]) + part[1:]
        choices = (flipped, b"", 2 * part, struct.pack("<I", number), rng.randbytes(size))
        data[at : at + size] = rng.choice(choices)
    return bytes(data)


def restructured(rng, content):
    """A nest of dicts with an entry lost, renamed, or made into something else."""
    inside = content
    key = rng.choice([*inside])
    while isinstance(inside[key], dict) and inside[key]:
        inside = inside[key]
        key = rng.choice([*inside])
    old = inside.pop(key)
    kind = rng.randrange(4)
    if kind == 1:
        inside[rng.choice([f"{key}x", *NAMES, *inside])] = old
    elif kind == 2 and isinstance(old, torch.Tensor):
        inside[key] = rng.choice(ODD_DTYPES[1:])(old)
    elif kind > 1:
        inside[key] = rng.choice([None, -1, 10**30, 1.5, torch.nan, "", BREAKS, b"x", [1], {}, ()])
    return content


def damaged_file(rng, kind, good):
    """A file of this kind with mistakes in one of its layers."""
    how = rng.choice(("file", "archive", "entry", "content", "content"))
    if kind == "bin" or how == "file":
        return mutated(rng, in_form(kind, good))
    if how == "archive":
        blob = mutated(rng, good)
    elif how == "entry":
        name = rng.choice((PICKLE, "archive/data/0"))
        blob = rezipped(good, lambda entries: entries | {name: mutated(rng, entries[name])})
    else:
        blob = saved(restructured(rng, torch.load(io.BytesIO(good))))
    return in_form(kind, blob)


def fuzz_files(folder, rng):
    """The damaged files, one after another."""
    good = {kind: saved(make_good()) for kind, make_good in GOOD.items()}
    good["bin"] = write_shard(folder / "good", np.arange(50)).read_bytes()
    for kind, count in COUNTS.items():
        for number in range(count):
            path = folder / f"{number}.{kind}"
            path.write_bytes(damaged_file(rng, kind, good[kind]))
            yield path


def test_damaged_files_work_or_end_in_one_line(tmp_path):
    """Whatever is no `UserError` ends this test, as it would end a run with a traceback."""
    counts = Counter()
    for path in fuzz_files(tmp_path, random.Random(20260605)):
        try:
            use(path)
            counts[path.suffix, "works"] += 1
        except tg.UserError as error:
            assert_one_line(error)
            counts[path.suffix, "is refused"] += 1
    assert counts.total() == 300
    assert len(counts) == 2 * len(COUNTS), counts  # some of the damage is harmless
