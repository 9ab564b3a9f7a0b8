"""The settings: defaults of the record, presets, and a reader that refuses in one line."""

import dataclasses
import re

import pytest

import train_gpt as tg

# The table of spec.md section 4, written down here once more and independently.
PUBLISHED = {
    "DATA_PATH": "./data/datasets/fineweb10B_sp1024",
    "TOKENIZER_PATH": "./data/tokenizers/fineweb_1024_bpe.model",
    "SEED": 1337,
    "VAL_BATCH_SIZE": 524288,
    "VAL_LOSS_EVERY": 1000,
    "TRAIN_LOG_EVERY": 200,
    "ITERATIONS": 20000,
    "WARMDOWN_ITERS": 1200,
    "WARMUP_STEPS": 20,
    "TRAIN_BATCH_TOKENS": 524288,
    "TRAIN_SEQ_LEN": 1024,
    "MAX_WALLCLOCK_SECONDS": 600,
    "QK_GAIN_INIT": 1.5,
    "VOCAB_SIZE": 1024,
    "NUM_LAYERS": 9,
    "MODEL_DIM": 512,
    "NUM_HEADS": 8,
    "NUM_KV_HEADS": 4,
    "MLP_MULT": 2,
    "TIE_EMBEDDINGS": True,
    "ROPE_BASE": 10000,
    "LOGIT_SOFTCAP": 30,
    "EMBED_LR": 0.6,
    "HEAD_LR": 0.008,
    "TIED_EMBED_LR": 0.05,
    "TIED_EMBED_INIT_STD": 0.005,
    "MATRIX_LR": 0.04,
    "SCALAR_LR": 0.04,
    "MUON_MOMENTUM": 0.95,
    "MUON_BACKEND_STEPS": 5,
    "MUON_MOMENTUM_WARMUP_START": 0.85,
    "MUON_MOMENTUM_WARMUP_STEPS": 500,
    "BETA1": 0.9,
    "BETA2": 0.95,
    "ADAM_EPS": 1e-8,
    "GRAD_CLIP_NORM": 0,
    "TTT_LORA_RANK": 8,
    "TTT_LORA_LR": 0.01,
    "TTT_CHUNK_SIZE": 256,
    "TTT_EVAL_SEQ_LEN": 1024,
    "TTT_BATCH_SIZE": 64,
}


def test_baseline_is_the_published_recipe():
    cfg = tg.read_config({"PRESET": "baseline", "DEVICE": "cpu"})
    assert {name: getattr(cfg, name.lower()) for name in PUBLISHED} == PUBLISHED
    assert cfg.grad_accum_steps == 8


def test_auto_preset_follows_the_device():
    assert tg.read_config({"DEVICE": "cpu"}).preset == "cpu"
    assert tg.read_config({"DEVICE": "cuda", "WORLD_SIZE": "8"}).preset == "baseline"


def test_explicit_variables_win_over_the_preset():
    preset = tg.PRESETS["cpu"]["num_layers"]
    assert tg.read_config({"PRESET": "cpu", "DEVICE": "cpu"}).num_layers == preset
    assert (
        tg.read_config({"PRESET": "cpu", "DEVICE": "cpu", "NUM_LAYERS": str(preset + 1)}).num_layers
        == preset + 1
    )


def test_presets_only_name_settings_that_exist():
    names = {f.name for f in dataclasses.fields(tg.Config)}
    assert all(set(preset) <= names for preset in tg.PRESETS.values())


@pytest.mark.parametrize(("world", "accum"), [(1, 8), (2, 4), (4, 2), (8, 1), (3, 1), (16, 1)])
def test_micro_steps_keep_the_batch_whole(world, accum):
    env = {
        "PRESET": "baseline",
        "DEVICE": "cpu",
        "WORLD_SIZE": str(world),
        "TRAIN_BATCH_TOKENS": str(48 * 1024),
    }
    cfg = tg.read_config(env)
    assert cfg.grad_accum_steps == accum


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("ITERATIONS", "many", "a whole number from 0 to 1e+18"),
        ("EVAL", "flat,best", "some of flat, doc, stride, ttt, stream, none twice"),
        ("EVAL", "flat,flat", "some of flat, doc, stride, ttt, stream, none twice"),
        ("EVAL", "", "some of flat, doc, stride, ttt, stream, none twice"),
        ("SCORES_PATH", "train_gpt.py", "the name of a file in OUT_DIR, ending in .csv"),
        ("ITERATIONS", "1.5", "a whole number"),
        ("ITERATIONS", "-1", "a whole number from 0 to 1e+18"),
        ("ITERATIONS", "", "a whole number"),
        ("ITERATIONS", "9" * 40, "a whole number"),
        ("NUM_LAYERS", "0", "from 1 to 300"),
        ("MATRIX_LR", "fast", "a number from 0 to 1e+18"),
        ("MATRIX_LR", "nan", "a number from 0 to 1e+18"),
        ("MATRIX_LR", "inf", "a number from 0 to 1e+18"),
        ("QK_GAIN_INIT", "-inf", "a number from 0 to 1e+18"),
        ("TIE_EMBEDDINGS", "yes", "0 or 1"),
        ("DEVICE", "tpu", "one of auto, cpu, cuda"),
        ("PRESET", "gpu", "one of auto, baseline, cpu"),
        ("RUN_ID", "../escape", "since it names files"),
        ("RUN_ID", ".hidden", "since it names files"),
        ("RUN_ID", "/tmp/escape", "since it names files"),
        ("SCORES_PATH", "../escape.csv", "the name of a file in OUT_DIR"),
        ("EVAL_ONLY", "1", "MODEL_PATH"),
        ("BETA1", "1", "a number from 0 to 0.999999"),
        ("WORLD_SIZE", "abc", "a whole number from 1 to 1e+18"),
        ("WORLD_SIZE", "0", "a whole number from 1 to 1e+18"),
        ("TTT_CHUNK_SIZE", "4096", "TTT_EVAL_SEQ_LEN="),
        ("TTT_STREAM_CHUNK", "4096", "TTT_EVAL_SEQ_LEN="),
        ("MODEL_DIM", "100", "a multiple of twice NUM_HEADS=8"),
        ("NUM_KV_HEADS", "3", "a multiple of NUM_KV_HEADS=3"),
        ("TRAIN_BATCH_TOKENS", "500000", "the nearest is 499712"),
    ],
)
def test_bad_values_are_named_and_explained(variable, value, expected):
    with pytest.raises(tg.UserError) as refused:
        tg.read_config({"PRESET": "baseline", "DEVICE": "cpu", variable: value})
    line = str(refused.value)
    assert variable in line and expected in line and "\n" not in line
    assert value in line or variable == "NUM_KV_HEADS"


@pytest.mark.parametrize(("world", "accum"), [(1, 2), (2, 1), (4, 1)])
def test_cpu_preset_keeps_the_order_of_tokens_on_two_ranks(world, accum):
    env = {"PRESET": "cpu", "DEVICE": "cpu", "WORLD_SIZE": str(world)}
    assert tg.read_config(env).grad_accum_steps == accum
    assert (
        tg.read_config(env | {"GRAD_ACCUM_STEPS": "4", "TRAIN_SEQ_LEN": "128"}).grad_accum_steps
        == 4
    )


def test_nearest_batch_works():
    env = {"PRESET": "baseline", "DEVICE": "cpu", "WORLD_SIZE": "3"}
    with pytest.raises(tg.UserError, match=r"world size 3 .* the nearest is (\d+)") as refused:
        tg.read_config(env)
    nearest = str(refused.value).split()[-1]
    assert tg.read_config(env | {"TRAIN_BATCH_TOKENS": nearest}).train_batch_tokens == int(nearest)


def test_arguments_are_refused(capsys):
    """Not ignored, as if `--iterations 5` had been understood."""
    assert tg.main(["--iterations", "5"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert re.fullmatch(r"error: command line: found '--iterations 5', expected nothing; .*\n", err)


def test_a_value_survives_being_spelled():
    """The log's config line and the command of a resumed run are read back by the parsers."""
    cfg = tg.Config()
    for spec in dataclasses.fields(cfg):
        value = getattr(cfg, spec.name)
        assert tg.parse_setting(spec.name, tg.spell(value), spec) == value


def test_what_decides_a_checkpoint_is_declared():
    """Forgotten, a resumed training would go on under another rate or shape without a word."""
    free = {spec.name for spec in dataclasses.fields(tg.Config) if not spec.metadata["decides"]}
    named = {name for name in free if name.upper() in PUBLISHED and not name.startswith("ttt_")}
    harmless = {"val_batch_size", "val_loss_every", "train_log_every", "warmup_steps"}
    assert named == harmless | {"data_path", "tokenizer_path"}  # whose files are hashed


def test_three_ranks_explain_themselves():
    """As in `torchrun --nproc_per_node=3` of a recipe for a power of two."""
    settings = {
        "PRESET": "baseline",
        "DEVICE": "cpu",
        "TRAIN_BATCH_TOKENS": "4096",
        "TRAIN_SEQ_LEN": "128",
    }
    with pytest.raises(tg.UserError) as refused:  # which rank 0 alone prints
        tg.read_config(settings | {"WORLD_SIZE": "3"})
    assert str(refused.value) == (
        "TRAIN_BATCH_TOKENS=4096: expected a multiple of 384 (world size 3 x GRAD_ACCUM_STEPS 1 x TRAIN_SEQ_LEN 128);"
        " the nearest is 4224"
    )
