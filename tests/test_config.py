"""The settings: defaults of the record, presets, and a reader that refuses in one line."""

import math
import re
from dataclasses import fields

import pytest
from conftest import CONFORMANCE

import train_gpt as tg

# The table of spec.md section 4, written down here once more and independently.
PUBLISHED = """
DATA_PATH=./data/datasets/fineweb10B_sp1024 TOKENIZER_PATH=./data/tokenizers/fineweb_1024_bpe.model
SEED=1337 VAL_BATCH_SIZE=524288 VAL_LOSS_EVERY=1000 TRAIN_LOG_EVERY=200 ITERATIONS=20000
WARMDOWN_ITERS=1200 WARMUP_STEPS=20 TRAIN_BATCH_TOKENS=524288 TRAIN_SEQ_LEN=1024
MAX_WALLCLOCK_SECONDS=600 QK_GAIN_INIT=1.5 VOCAB_SIZE=1024 NUM_LAYERS=9 MODEL_DIM=512 NUM_HEADS=8
NUM_KV_HEADS=4 MLP_MULT=2 TIE_EMBEDDINGS=1 ROPE_BASE=10000 LOGIT_SOFTCAP=30 EMBED_LR=0.6
HEAD_LR=0.008 TIED_EMBED_LR=0.05 TIED_EMBED_INIT_STD=0.005 MATRIX_LR=0.04 SCALAR_LR=0.04
MUON_MOMENTUM=0.95 MUON_BACKEND_STEPS=5 MUON_MOMENTUM_WARMUP_START=0.85
MUON_MOMENTUM_WARMUP_STEPS=500 BETA1=0.9 BETA2=0.95 ADAM_EPS=1e-8 GRAD_CLIP_NORM=0 TTT_LORA_RANK=8
TTT_LORA_LR=0.01 TTT_CHUNK_SIZE=256 TTT_EVAL_SEQ_LEN=1024 TTT_BATCH_SIZE=64
"""
SPECS = {spec.name.upper(): spec for spec in fields(tg.Config)}


def configure(**env):
    """The settings that this environment gives, of the baseline if it names no other preset."""
    return tg.read_config({"PRESET": "baseline", "DEVICE": "cpu"} | env)


def refusal(**env):
    """The one line that refuses this environment."""
    with pytest.raises(tg.UserError) as refused:
        configure(**env)
    line = str(refused.value)
    assert "\n" not in line
    return line


def test_baseline_is_the_published_recipe():
    cfg = configure()
    for pair in PUBLISHED.split():
        name, text = pair.split("=")
        assert getattr(cfg, name.lower()) == tg.parse_setting(name, text, SPECS[name])


def test_auto_preset_follows_the_device():
    assert tg.read_config({"DEVICE": "cpu"}).preset == "cpu"
    assert tg.read_config({"DEVICE": "cuda", "WORLD_SIZE": "8"}).preset == "baseline"


def test_the_gpu_preset_is_the_baseline_s_model_for_an_hour():
    cfg = configure(PRESET="gpu")
    assert tg.spell_settings(cfg, "travels") == tg.spell_settings(configure(), "travels")
    assert cfg.training_seconds == 0.98 * 3600


def test_explicit_variables_win_over_the_preset():
    assert configure(PRESET="cpu").num_layers == tg.PRESETS["cpu"]["num_layers"]
    assert configure(PRESET="cpu", NUM_LAYERS="7").num_layers == 7
    cfg = configure(PRESET="cpu", GRAD_ACCUM_STEPS="4")
    assert cfg.grad_accum_steps == 4


@pytest.mark.parametrize(
    ("preset", "world", "accum"),
    [
        ("baseline", 1, 8),
        ("baseline", 2, 4),
        ("baseline", 8, 1),
        ("baseline", 3, 1),
        ("baseline", 16, 1),
        ("cpu", 1, 2),
        ("cpu", 2, 1),
    ],
)
def test_micro_steps_keep_the_batch_whole(preset, world, accum):
    batch = str(48 * 1024)
    cfg = configure(PRESET=preset, WORLD_SIZE=str(world), TRAIN_BATCH_TOKENS=batch)
    assert cfg.grad_accum_steps == accum


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        (
            "EVAL",
            "flat,best",
            "some of flat, doc, stride, ttt, stream, stride+copy, mix, none twice",
        ),
        ("EVAL", "flat,flat", "none twice"),
        ("EVAL", "", "none twice"),
        ("ITERATIONS", "1.5", "a whole number from 0 to 1e+18"),
        ("ITERATIONS", "-1", "a whole number"),
        ("ITERATIONS", "", "a whole number"),
        ("NUM_LAYERS", "0", "from 1 to 300"),
        ("MATRIX_LR", "nan", "a number from 0 to 1e+18"),
        ("MATRIX_LR", "inf", "a number"),
        ("BETA1", "1", "a number from 0 to 0.999999"),
        ("TIE_EMBEDDINGS", "yes", "0 or 1"),
        ("DEVICE", "tpu", "one of auto, cpu, cuda"),
        ("RUN_ID", "../escape", "since it names files"),
        ("RUN_ID", ".hidden", "since it names files"),
        ("SCORES_PATH", "train_gpt.py", "the name of a file in OUT_DIR, ending in .csv"),
        ("SCORES_PATH", "../escape.csv", "the name of a file in OUT_DIR"),
        ("EVAL_ONLY", "1", "MODEL_PATH"),
        ("WORLD_SIZE", "0", "a whole number from 1 to 1e+18"),
        ("TTT_CHUNK_SIZE", "4096", "TTT_EVAL_SEQ_LEN="),
        ("TTT_STREAM_CHUNK", "4096", "TTT_EVAL_SEQ_LEN="),
        ("MODEL_DIM", "100", "a multiple of twice NUM_HEADS=8"),
        ("NUM_KV_HEADS", "3", "a multiple of NUM_KV_HEADS=3"),
    ],
)
def test_bad_values_are_named_and_explained(variable, value, expected):
    line = refusal(**{variable: value})
    assert variable in line
    assert value in line
    assert expected in line


def test_three_ranks_explain_themselves():
    """As in `torchrun --nproc_per_node=3` of a recipe for a power of two."""
    env = {"WORLD_SIZE": "3", "TRAIN_SEQ_LEN": "128"}
    line = refusal(TRAIN_BATCH_TOKENS="4096", **env)
    assert line == (
        "TRAIN_BATCH_TOKENS=4096: expected a multiple of 384 (world size 3 x GRAD_ACCUM_STEPS 1 x"
        " TRAIN_SEQ_LEN 128); the nearest is 4224"
    )
    assert configure(TRAIN_BATCH_TOKENS="4224", **env).train_batch_tokens == 4224


def test_arguments_are_refused(capsys):
    """Not ignored, as if `--iterations 5` had been understood."""
    assert tg.main(["--iterations", "5"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert re.fullmatch(r"error: command line: found '--iterations 5', expected nothing; .*\n", err)


def test_a_value_survives_being_spelled():
    """The log's config line and the command of a resumed run are read back by the parsers."""
    for name, spec in SPECS.items():
        assert tg.parse_setting(name, tg.spell(spec.default), spec) == spec.default


def test_the_tokenizer_beside_the_shards_is_the_default():
    env = {"PRESET": "cpu", "DATA_PATH": str(CONFORMANCE)}
    assert tg.read_config(env).tokenizer_path == str(CONFORMANCE / "tokenizer.model")
    assert tg.read_config(env | {"TOKENIZER_PATH": "mine.model"}).tokenizer_path == "mine.model"


def test_training_leaves_time_for_calibration():
    """2 % of the limit, or CALIBRATION_SECONDS, but never more than half; without a limit all of it."""
    assert tg.Config().training_seconds == 588
    assert tg.read_config({"PRESET": "cpu"}).training_seconds == 157
    assert tg.Config(max_wallclock_seconds=10.0, calibration_seconds=8.0).training_seconds == 5
    assert tg.Config(max_wallclock_seconds=0.0).training_seconds == math.inf


def test_what_decides_a_checkpoint_is_declared():
    """Forgotten, a resumed training would go on under another rate or shape without a word."""
    published = {pair.split("=")[0] for pair in PUBLISHED.split()}
    free = {name for name in published if not SPECS[name].metadata.get("decides")}
    harmless = {"VAL_BATCH_SIZE", "VAL_LOSS_EVERY", "TRAIN_LOG_EVERY", "WARMUP_STEPS"}
    hashed = {"DATA_PATH", "TOKENIZER_PATH"}
    assert {name for name in free if not name.startswith("TTT_")} == harmless | hashed
