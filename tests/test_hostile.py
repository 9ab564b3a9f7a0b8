"""Hostile and broken input: strangers' weights and checkpoints, what is no file, bad settings, and a fuzzer.

What is expected everywhere: success, or one clear line. No code from a file runs, nothing hangs, an artifact
inflates to a bounded size, and a refused run writes nothing but its log.
"""

import io
import os
import random
import re
import signal
import tracemalloc
import zipfile
import zlib

import make_shards
import numpy as np
import pytest
import torch
from conftest import CONFORMANCE, CPU, run_forked, tiny_config, tiny_model, write_shard

import train_gpt as tg

pytestmark = pytest.mark.filterwarnings("ignore")

# --- What is damaged here: a small model, whole ----------------------------------------------------

EMB = "tok_emb.weight"
FC = "blocks.0.mlp.fc.weight"


def good_state():
    """The weights of a small model."""
    return dict(tiny_model(tiny_config(), tg.Runtime(CPU, torch.float32)).state_dict())


def good_content():
    """An artifact's content, with one matrix quantised although it is small."""
    content = tg.quantize(good_state(), {}, 0)
    matrix = content["passthrough"].pop(EMB)
    content["quantized"][EMB] = matrix.char()
    content["scales"][EMB] = matrix[:, 0]
    content["dtypes"][EMB] = "float32"
    return content


def new_trainer(path=""):
    """A training of a small model, to go on from the checkpoint at the path."""
    rt = tg.Runtime(CPU, torch.float32)
    model = tiny_model(tiny_config(resume=str(path)), rt)
    return tg.Trainer(model, tg.TokenStream([np.arange(999) % 96], 96), rt, tg.RunLog(), {})


def good_checkpoint():
    """What a checkpoint of that training holds after a step."""
    trainer = new_trainer()
    trainer.train_step()
    return trainer.state() | {"identity": trainer.identity}


GOOD = {"ptz": good_content, "pt": good_state, "state": good_checkpoint}


def saved(content, **options):
    """The bytes of torch.save."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def in_form(kind, blob):
    """A file of this kind around what torch.save gave; checkpoints are called .state here."""
    return zlib.compress(blob, 1) if kind == "ptz" else blob


def use(path):
    """All that the program does with a file before its content is used."""
    if path.suffix == ".state":
        return new_trainer(path).resume()
    if path.suffix == ".bin":
        return tg.open_shard(path)
    if path.suffix == ".model":
        return tg.load_tokenizer(str(path), 1024)
    return tg.load_model(path, tiny_config())


def assert_one_line(error):
    """A message for a person: one line that cannot move the cursor, of bounded length."""
    line = str(error)
    assert line.isprintable(), line
    assert 0 < len(line) <= 1500


def assert_refused(path, content=None, words=""):
    """A `UserError` of one line that names the file, into which this content is written first."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(tg.UserError) as refused:
        use(path)
    assert_one_line(refused.value)
    assert f"{path}: " in str(refused.value)
    assert words in str(refused.value)


@pytest.fixture(autouse=True)
def nothing_runs_or_hangs(tmp_path, monkeypatch):
    """Every test works in its own folder, where `touch executed` would show, for 100 s at most."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(100)
    monkeypatch.chdir(tmp_path)
    yield
    signal.alarm(0)
    assert not (tmp_path / "executed").exists()


# --- Contents that cannot be used ------------------------------------------------------------------

BREAKS = "a\nerror: b\r\x1b[2Jc"
GONE = object()  # stands for an entry that is lost
ODD = [
    GONE,
    "text",
    lambda t: t.to("meta"),
    lambda t: t[1:],
    lambda t: torch.full_like(t.float(), torch.nan),
    lambda t: t.long(),
]
# Where, and what is refused there, as a value or as a function of what was there; the empty place is
# the whole file. Besides, no part of it may be lost or be a list.
VALUES = {
    "ptz": [
        (["quantized", EMB], ODD),
        (["scales", EMB], ODD[:-1]),
        (["passthrough", FC], ODD),
        (["__quant_format__"], ["int4"]),
        (["dtypes", EMB], [GONE, "__class__"]),
    ],
    "pt": [
        ([FC], ODD),
        ([], [[1], {}]),
        (["model"], [{FC: 5}]),  # as MODEL_PATH takes a checkpoint
        ([BREAKS], [torch.ones(1)]),
    ],
    "state": [
        ([], [[1], {}]),
        (["step"], [torch.nan, BREAKS]),
        (["identity", "SEED"], [GONE, BREAKS, torch.ones(3)]),
    ],
}


def replaced(content, place, value):
    """The content with another value in this place of a nest of dicts."""
    if not place:
        return value
    inside = content
    for key in place[:-1]:
        inside = inside[key]
    old = inside.pop(place[-1], None)
    new = value(old) if callable(value) else value
    if new is not GONE:
        inside[place[-1]] = new
    return content


@pytest.mark.parametrize("kind", GOOD)
def test_a_value_that_is_odd_is_refused(kind, tmp_path):
    path = tmp_path / f"odd.{kind}"
    good = GOOD[kind]()
    blob = saved(good)
    path.write_bytes(in_form(kind, blob))
    use(path)
    parts = [([part], [GONE, [1, 2]]) for part in good.keys() - {"qmeta"}]
    for place, values in VALUES[kind] + parts:
        for value in values:
            content = replaced(torch.load(io.BytesIO(blob)), place, value)
            assert_refused(path, in_form(kind, saved(content)))


# --- Files that torch.save would not write ---------------------------------------------------------


class Run:
    """Pickles to a call, as a hostile file would."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("kind", GOOD)
def test_no_code_is_executed(kind, is_zip, tmp_path):
    blob = saved({"w": Run()}, _use_new_zipfile_serialization=is_zip)
    assert_refused(tmp_path / f"code.{kind}", in_form(kind, blob))


PICKLE = "archive/data.pkl"


def rezipped(blob, name, change):
    """A torch.save file in which the entry of this name went through `change`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(blob)) as before, zipfile.ZipFile(buffer, "w") as after:
        for entry in before.namelist():
            data = before.read(entry)
            after.writestr(entry, change(data) if entry == name else data)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", GOOD)
def test_files_that_are_no_whole_archives_are_refused(kind, tmp_path):
    blob = saved(GOOD[kind]())
    file = in_form(kind, blob)
    deep = b"]" * 20_000 + b"a" * 19_999 + b"."
    nested = rezipped(blob, PICKLE, lambda _: deep)
    files = [b"", b"text" + file, file[:-9], in_form(kind, nested)]
    if kind == "ptz":
        files.append(file + b"x")
    for content in files:
        assert_refused(tmp_path / f"damaged.{kind}", content)


@pytest.mark.parametrize("kind", [*GOOD, "bin", "model"])
def test_what_is_no_file_is_refused(kind, tmp_path):
    """A FIFO to which nobody writes would be waited for."""
    (tmp_path / f"folder.{kind}").mkdir()
    os.mkfifo(tmp_path / f"pipe.{kind}")
    for name in ("folder", "pipe", "absent"):
        assert_refused(tmp_path / f"{name}.{kind}")


# --- Bombs: small files that claim to be large -----------------------------------------------------


def claiming_much():
    """A file of a few bytes, in whose pickle a tensor has the shape (2**62, 4)."""
    size = b"\x8a\x08\0\0\0\0\0\0\0\x40"
    blob = saved({"w": torch.ones(2, 3)})
    return rezipped(blob, PICKLE, lambda data: data.replace(b"K\x02K\x03", size + b"K\x04"))


CLAIMS = [  # a file, and what is said of it before any memory is taken
    (
        saved(good_state() | {f"blocks.{i}.": torch.ones(()) for i in range(301)}),
        "NUM_LAYERS=301: expected",
    ),
    (saved(good_state() | {EMB: torch.ones(96, 2**20)}), "MODEL_DIM=1048576: expected"),
    (saved(good_state() | {EMB: torch.ones(1).expand(96, 10**6)}), "larger than the file"),
    (claiming_much(), "RuntimeError"),
]


@pytest.mark.parametrize(("content", "words"), CLAIMS)
def test_impossible_claims_are_refused(content, words, tmp_path):
    assert_refused(tmp_path / "large.pt", content, words)


def test_a_zlib_bomb_stays_bounded(tmp_path):
    """A quarter of a megabyte that would inflate to 256: no more than 64 of them are made."""
    bomb = zlib.compress(bytes(2**28))
    tracemalloc.start()
    assert_refused(tmp_path / "bomb.ptz", bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 160 * 2**20


# --- JSONL for data/make_shards.py ------------------------------------------------------------------


def test_a_pipe_makes_no_shards(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert make_shards.main(["--input", "pipe.jsonl", "--out", "set", "--val-docs", "1"]) == 1
    assert re.fullmatch("error: pipe.jsonl: .*\n", capsys.readouterr().err)
    assert not (tmp_path / "set").exists()


# --- The environment -------------------------------------------------------------------------------

TEXTS = """|-1|-0|1|1e300|1e-300|nan|-inf| 1|0x10|,|1_000|\u0663|\u00bd|True|a\nb|\x1b[2J|\0|\udcff
|../..|/dev/null|1000000000000000000|1000000000000000000000000000000"""


def test_every_setting_takes_or_names_every_value():
    for spec in tg.fields(tg.Config):
        name = spec.name.upper()
        for text in [*TEXTS.split("|"), "9" * 5000]:
            try:
                tg.read_config({"PRESET": "baseline", "DEVICE": "cpu", name: text})
            except tg.UserError as error:
                assert_one_line(error)
                assert name in str(error)


# What the environments of desktops, clusters and build services hold, nearest to ours.
ORDINARY = """DATA DATASET MODEL EVALS RESUMED DEVICES SEEDS COMPILER OUTPUT_DIR LOG_DIR BATCH_SIZE
MODULEPATH CONDA_DEFAULT_ENV CI_RUNNER_ID GITHUB_RUN_ID KERNEL_ID NODE_NAME BUILD_ID WANDB_RUN_ID
TORCHELASTIC_RUN_ID CUDA_VISIBLE_DEVICES MKL_NUM_THREADS SLURM_NTASKS ROLE_RANK ROLE_WORLD_SIZE"""
MISSPELT = """EVALONLY EVAL_ONLY MAX_WALLCLOCK_SECOND MAX_WALLCLOCK_SECONDS NUM_LAYER NUM_LAYERS
OUTDIR OUT_DIR TTT_LORA_RNK TTT_LORA_RANK"""


def test_misspelt_settings_are_pointed_out(tmp_path, rt, capsys):
    words = MISSPELT.split()
    env = dict.fromkeys([*ORDINARY.split(), *words[::2], "NUM_LAYER\x1b"], "4")
    log = tg.RunLog(path=tmp_path / "log.txt")
    log.write_header(tg.Config(), rt, env, 1)
    found = re.findall(r"warning: .* (\S+); did you mean (\S+)\?", capsys.readouterr().out)
    assert sum(found, ()) == tuple(words)


# --- The whole program -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"MODEL_PATH": "absent.pt"}, "absent.pt: expected a regular file"),
        ({"RANK": "1"}, "cannot join the process group"),
    ],
)
def test_what_is_refused_touches_nothing(settings, words, tmp_path):
    """One line, without what libraries print, and no file of an earlier run is touched."""
    earlier = tmp_path / "final_model.pt"
    earlier.write_text("earlier")
    done = run_forked(tmp_path, **settings)
    assert done.returncode == 1
    assert re.fullmatch(f"error: .*{words}.*\n", done.stderr), done.stderr
    assert earlier.read_text() == "earlier"


HUGE = """VAL_BATCH_SIZE VAL_LOSS_EVERY TRAIN_LOG_EVERY MAX_VAL_DOCS SEED WARMDOWN_ITERS
MUON_MOMENTUM_WARMUP_STEPS TTT_BATCH_SIZE CHECKPOINT_EVERY MAX_WALLCLOCK_SECONDS ROPE_BASE
GRAD_CLIP_NORM ADAM_EPS"""
ONE = """VAL_BATCH_SIZE TTT_BATCH_SIZE MAX_VAL_DOCS TTT_LORA_RANK TTT_STREAM_RANK TTT_CHUNK_SIZE
TTT_STREAM_CHUNK TRAIN_SEQ_LEN TRAIN_BATCH_TOKENS GRAD_ACCUM_STEPS NUM_LAYERS"""


@pytest.mark.parametrize(("names", "value"), [(HUGE, str(10**18)), (ONE, "1")])
def test_the_largest_and_the_smallest_settings_work(names, value, tmp_path, run_here):
    text = tg.open_shard(CONFORMANCE / "fineweb_val_000000.bin")
    write_shard(tmp_path / "fineweb_val_000000.bin", text[:100])
    write_shard(tmp_path / "fineweb_train_000000.bin", text[:130])
    short = {"TTT_EVAL_SEQ_LEN": "64", "COMPILE": "0", "ITERATIONS": "1"}
    short["DATA_PATH"] = str(tmp_path)
    ended = run_here(tmp_path, **short | dict.fromkeys(names.split(), value))
    assert (ended.status, ended.err) == (0, "")
    assert "ladder condition:stream " in ended.out


# --- The fuzzer ------------------------------------------------------------------------------------


def mutated(rng, data):
    """`data` with a mistake: bytes lost, added or replaced."""
    at = rng.randrange(len(data))
    lost = rng.choice((0, 1, 4, 100))
    made_up = rng.randbytes(rng.choice((0, 1, 4, 100)))
    return data[:at] + made_up + data[at + lost :]


def damaged_file(rng, kind, good):
    """A file of this kind with a mistake in one of its layers."""
    layer = rng.choice(("file", "archive", "pickle"))
    if layer == "file":
        return mutated(rng, in_form(kind, good))
    if layer == "archive":
        return in_form(kind, mutated(rng, good))
    return in_form(kind, rezipped(good, PICKLE, lambda data: mutated(rng, data)))


@pytest.mark.parametrize("kind", GOOD)
def test_damaged_files_work_or_end_in_one_line(kind, tmp_path):
    """Whatever is no `UserError` ends this test, as it would end a run with a traceback."""
    rng = random.Random(20260605)
    good = saved(GOOD[kind]())
    path = tmp_path / f"damaged.{kind}"
    refused = 0
    for _ in range(100):
        path.write_bytes(damaged_file(rng, kind, good))
        try:
            use(path)
        except tg.UserError as error:
            assert_one_line(error)
            refused += 1
    assert refused > 80  # some of the damage is harmless
