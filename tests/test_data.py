"""Shards, the training stream, the validation documents, and the bytes of their text."""

import random

import numpy as np
import pytest
import torch
from conftest import CONFORMANCE, CPU, EVAL_ARTIFACT, TINY_RUN, tiny_config, tiny_table, write_shard

import train_gpt as tg

TOKENIZER = CONFORMANCE / "tokenizer.model"

# --- Shards and the training stream ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "size", "found"),
    [
        ((), 0, "found 0 bytes"),
        ((20240520, 1, 0), 1023, "found 1023 bytes"),
        ((7, 1, 2), 1028, "magic 7"),
        ((20240520, 2, 2), 1028, "version 2"),
        ((20240520, 1, 0), 1024, "0 tokens"),
        ((20240520, 1, -3), 1024, "-3 tokens"),
        ((20240520, 1, 1), 1028, "1028 bytes"),
        ((20240520, 1, 3), 1028, "1028 bytes"),
        ((20240520, 1, 2), 1029, "1029 bytes"),
    ],
)
def test_damaged_shards_are_refused(tmp_path, numbers, size, found):
    path = tmp_path / "fineweb_train_000001.bin"
    header = np.array(numbers, dtype="<i4").tobytes()
    path.write_bytes(header.ljust(size, b"\0"))
    with pytest.raises(tg.UserError) as refused:
        tg.open_shard(path)
    line = str(refused.value)
    assert line.startswith(f"{path}: found ")
    assert found in line
    assert "expected magic" in line


def test_all_shards_are_checked_at_once(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", [1, 2, 3])
    (tmp_path / "fineweb_train_000001.bin").mkdir()
    with pytest.raises(tg.UserError, match="fineweb_train_000001"):
        tg.open_shards(str(tmp_path), "train")
    with pytest.raises(tg.UserError, match=r"found no fineweb_val_\*.bin"):
        tg.open_shards(str(tmp_path), "val")


def test_stream_reads_shards_in_order_and_wraps(tmp_path):
    tokens = np.arange(65506, 65536)
    for i, part in enumerate(np.split(tokens, [7, 10])):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", part)
    stream = tg.TokenStream(tg.open_shards(str(tmp_path), "train"))
    everything = np.tile(tokens, 4).tolist()
    for start in range(45):
        for count in (1, 10, 64):
            assert stream.read(start, count).tolist() == everything[start : start + count]


@pytest.mark.parametrize("world", [1, 2, 8])
def test_micro_steps_follow_the_published_layout(world):
    """They read the stream span by span, rank after rank: its order is that of any world size."""
    tokens = np.arange(5000) % 90
    cfg = tiny_config(train_batch_tokens=512, train_seq_len=32, grad_accum_steps=8 // world)
    for rank in range(world):
        stream = tg.TokenStream([tokens])
        rt = tg.Runtime(CPU, torch.float32, rank=rank, world=world)
        for micro in range(2 * cfg.grad_accum_steps):
            span = tokens[65 * (micro * world + rank) :][:65]
            x, y = stream.next_batch(cfg, rt)
            assert x.tolist() == span[:-1].reshape(2, 32).tolist()
            assert y.tolist() == span[1:].reshape(2, 32).tolist()


# --- The validation documents ----------------------------------------------------------------------


def split(digits, limit=0):
    """The documents of a stream in which every digit is a token and 1 is BOS."""
    return tg.split_documents(np.array([*map(int, digits)]), 1, limit, tiny_table(96), CPU)


@pytest.mark.parametrize(
    ("digits", "limit", "starts", "predictions", "beyond"),
    [
        ("156117189", 0, [0, 3, 4, 6], [3, 1, 2, 2], 0),
        ("567181", 0, [3], [2], 0),
        ("156178914", 0, [0, 3, 7], [3, 4, 1], 0),
        ("156178914", 2, [0, 3], [3, 4], 1),
        ("156178914", 9, [0, 3, 7], [3, 4, 1], 0),
    ],
)
def test_documents_reach_to_the_next_bos(digits, limit, starts, predictions, beyond):
    docs = split(digits, limit)
    assert docs.starts.tolist() == starts
    assert docs.predictions.tolist() == predictions
    assert docs.beyond_limit == beyond
    assert len(docs.tokens) == len(digits) - beyond


@pytest.mark.parametrize("digits", ["567", "1", "51", "100"])
def test_nothing_to_predict_is_refused(digits):
    """Token 0 is a control piece, which stands for no text."""
    with pytest.raises(tg.UserError, match="nothing to predict"):
        split(digits)


def load(rt, folder, **env):
    """What the program starts from, with the shards in this folder."""
    env = TINY_RUN | {"DATA_PATH": str(folder)} | env
    return tg.load_inputs(tg.read_config(env), rt, tg.RunLog())


def test_ids_are_checked_to_the_last_token_of_the_last_shard(rt, tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, 5])
    write_shard(tmp_path / "fineweb_train_000000.bin", [1, 5, 6] * 50)
    write_shard(tmp_path / "fineweb_train_000001.bin", [1, 1023])
    assert load(rt, tmp_path).stream.read(150, 2).tolist() == [1, 1023]
    for name in ("train_000001", "val_000000"):
        write_shard(tmp_path / f"fineweb_{name}.bin", [1, 5, 1024])
        with pytest.raises(
            tg.UserError, match=rf"{name}.bin: token id 1024, expected at most 1023"
        ):
            load(rt, tmp_path)
        write_shard(tmp_path / f"fineweb_{name}.bin", [1, 5])


def test_eval_only_needs_no_training_shards(rt, tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, 5] * 150)
    assert load(rt, tmp_path, **EVAL_ARTIFACT).stream.shards == []
    with pytest.raises(tg.UserError, match="found no fineweb_train"):
        load(rt, tmp_path)


# --- Bytes -----------------------------------------------------------------------------------------

TEXTS = [
    "plain words, punctuation; and (brackets)!",
    "Crème brûlée für Ålesund, naïve façade — “quoted” … ½ ﬁne",
    "emoji 🙂🚀 and 👩‍👩‍👧 families, 漢字 עברית 🂡",
    "tabs\tbetween\twords\nand lines\n\n  indented",
    "a",
    "▁ a real low line ▁▁",
    "trailing space ",
    "x\u00a0y\u3000z\u200b",
]


@pytest.fixture(scope="module")
def tokenizer():
    return tg.load_tokenizer(str(TOKENIZER), 1024)


def table_bytes(tokenizer, ids):
    """Bytes of each token of a document, which BOS opens."""
    table = tg.ByteTable.build(tokenizer)
    ids = np.array([tokenizer.bos_id(), *ids])
    return table.count(ids[:-1], ids[1:]).tolist()


@pytest.mark.parametrize("text", TEXTS)
def test_table_counts_the_utf8_bytes_of_the_decoded_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert sum(table_bytes(tokenizer, ids)) == len(tokenizer.decode(ids).encode())


def test_pieces_by_kind(tokenizer):
    """The rules one by one. A leading space counts only after text, as the decoder has it."""
    ids = tokenizer.piece_to_id(["a", "▁the", "<0xE2>", "▁"])
    assert table_bytes(tokenizer, ids) == [1, 4, 1, 1]
    for silent in ("bos", "eos", "pad", "unk"):
        ids[0] = getattr(tokenizer, f"{silent}_id")()
        assert table_bytes(tokenizer, [5, *ids]) == [1, 0, 3, 1, 1]


def test_unusable_tokenizers_are_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    for content in (None, b"", b"not a model", TOKENIZER.read_bytes()[:10_000]):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(tg.UserError, match=r"TOKENIZER_PATH=.*expected the SentencePiece"):
            tg.load_tokenizer(str(path), 1024)
    with pytest.raises(tg.UserError, match=r"found 1024 pieces.*BOS and 512 pieces"):
        tg.load_tokenizer(str(TOKENIZER), 512)


def test_damaged_tokenizers_are_refused_or_work(tmp_path):
    """Copies with one bit flipped: some are no text any more, most still tokenise."""
    rng = random.Random(5)
    path = tmp_path / "damaged.model"
    stream = np.append(1, rng.choices(range(1024), k=200))
    refused = []
    for _ in range(60):
        damaged = bytearray(TOKENIZER.read_bytes())
        damaged[rng.randrange(20_000)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            tokenizer = tg.load_tokenizer(str(path), 1024)
            table = tg.ByteTable.build(tokenizer)
            docs = tg.split_documents(stream, 1, 0, table, CPU)
            tg.audit_bytes(docs, table, tokenizer)
        except tg.UserError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 60
    assert "TOKENIZER_PATH" in "".join(refused)
