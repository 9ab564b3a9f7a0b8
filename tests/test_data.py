"""Shards, the training stream, the validation documents, and the bytes of their text."""

import contextlib
import hashlib
import json
import random

import check_shards
import numpy as np
import pytest
import torch
from conftest import (
    CONFORMANCE,
    CPU,
    TINY_RUN,
    tiny_config,
    tiny_table,
    train_tokenizer,
    write_shard,
)

import train_gpt as tg

TOKENIZER = CONFORMANCE / "tokenizer.model"

# --- Shards and the training stream ----------------------------------------------------------------


@pytest.mark.parametrize("read", [tg.open_shard, check_shards.shard_token_count])
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
def test_damaged_shards_are_refused(tmp_path, read, numbers, size, found):
    """By the program and by the tools in data/."""
    path = tmp_path / "fineweb_train_000001.bin"
    header = np.array(numbers, dtype="<i4").tobytes()
    path.write_bytes(header.ljust(size, b"\0"))
    with pytest.raises(ValueError) as refused:
        read(path)
    line = str(refused.value)
    assert line.startswith(f"{path}: found ")
    assert found in line
    assert "; expected " in line


def test_stream_reads_shards_in_order_and_wraps(tmp_path):
    tokens = np.arange(65506, 65536)
    for i, part in enumerate(np.split(tokens, [7, 10])):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", part)
    stream = tg.TokenStream(tg.open_shards(str(tmp_path), "train"), 65536)
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
        stream = tg.TokenStream([tokens], 1024)
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
    env = {name: value for name, value in env.items() if value is not None}
    return tg.load_inputs(tg.read_config(env), rt, tg.RunLog())


def write_set(folder, *last):
    """A validation shard, two training shards, and after each of them these ids."""
    write_shard(folder / "fineweb_val_000000.bin", [1, 5, *last])
    write_shard(folder / "fineweb_train_000000.bin", [1, 5, 6] * 50)
    write_shard(folder / "fineweb_train_000001.bin", [1, 7, *last])


def test_ids_are_checked_where_they_are_read(rt, tmp_path):
    """All of the validation text at once, training text with the batch that holds it."""
    write_set(tmp_path, 1023)
    assert load(rt, tmp_path).stream.read(150, 3).tolist() == [1, 7, 1023]
    write_set(tmp_path, 1024)
    with pytest.raises(OSError, match=r"val_000000\.bin: token id 1024, expected at most 1023"):
        load(rt, tmp_path)
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, 5])
    stream = load(rt, tmp_path).stream
    stream.read(0, 152)
    with pytest.raises(OSError, match=r"train_000001\.bin: token id 1024, expected at most 1023"):
        stream.read(0, 153)


def test_shards_are_numbered_without_gaps(rt, tmp_path):
    """And all of them are whole, before a training begins, which needs some."""
    for name in ("val_000000", "train_000000"):
        with pytest.raises(tg.UserError, match=rf"found no fineweb_{name}\.bin; expected"):
            load(rt, tmp_path)
        write_shard(tmp_path / f"fineweb_{name}.bin", [1, 5])
    last = write_shard(tmp_path / "fineweb_train_000002.bin", [1, 5, 6])
    with pytest.raises(tg.UserError, match=r"found no fineweb_train_000001\.bin; expected"):
        load(rt, tmp_path)
    last.with_name("fineweb_train_000001.bin").write_bytes(b"")
    with pytest.raises(tg.UserError, match=r"train_000001\.bin: found 0 bytes"):
        load(rt, tmp_path)


def test_equal_shards_are_refused_without_reading_them_whole(rt, tmp_path):
    """The validation text among the training text, above all; long shards differ at their ends."""
    write_set(tmp_path)
    write_shard(tmp_path / "fineweb_train_000002.bin", [1, 5])
    with pytest.raises(tg.UserError, match=r"train_000002\.bin: it equals an earlier shard"):
        load(rt, tmp_path)
    long = np.zeros(3_000_000, dtype=np.uint16)
    marks = {tg.fingerprint(long), tg.fingerprint(long[1:])}
    for place in (0, -1, 1_500_000):
        other = long.copy()
        other[place] = 1
        marks.add(tg.fingerprint(other))
    assert len(marks) == 4  # the middle is not read


def test_sidecars_are_named_and_not_read(rt, tmp_path, capsys):
    write_set(tmp_path)
    load(rt, tmp_path)
    assert "warning" not in capsys.readouterr().out
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", [1, 2, 3])
    assert len(load(rt, tmp_path).docs.tokens) == 2
    said = "warning: not read, since no shard has such a name: fineweb_val_bytes_000000.bin\n"
    assert said in capsys.readouterr().out


def test_a_tokenizer_is_that_of_the_manifest(rt, tmp_path):
    write_set(tmp_path)
    found = hashlib.sha256(TOKENIZER.read_bytes()).hexdigest()
    for listed, fits in ((found, True), ("0" * 64, False)):
        files = {"tokenizer.model": {"sha256": listed}}
        (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
        with contextlib.nullcontext() if fits else pytest.raises(tg.UserError, match="manifest"):
            load(rt, tmp_path)


def conformance_texts():
    """The validation documents of the conformance set."""
    tokenizer = tg.load_tokenizer(str(TOKENIZER), 1024)
    stream = tg.open_shards(str(CONFORMANCE), "val")[0]
    parts = np.split(stream, np.flatnonzero(stream == 1))[1:]
    return [tokenizer.decode(part.tolist()) for part in parts]


def test_another_tokenizer_of_the_same_size_is_found(rt, tmp_path):
    """Its table and its text agree with each other; only the shards disagree."""
    texts = conformance_texts()
    backwards = [text[::-1] for text in texts]
    other = train_tokenizer(tmp_path / "other.model", backwards, vocab_size=1024)
    with pytest.raises(tg.UserError, match=r"audit bytes: only \d+ of \d+ words are encoded as"):
        load(rt, CONFORMANCE, TOKENIZER_PATH=str(other))


def test_what_a_tokenizer_loses_is_said(rt, tmp_path, capsys):
    """Case, here, and letters that it has no pieces for: both flatter the score."""
    texts = conformance_texts()
    fold = {"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": False}
    path = tmp_path / "tokenizer.model"
    train_tokenizer(path, texts, character_coverage=0.99, vocab_size=512, **fold)
    ids = tg.load_tokenizer(str(path), 512).encode("The cafe \u6f22 \u5b57 closes")
    write_set(tmp_path)
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, *ids])
    env = {"VOCAB_SIZE": "512", "TOKENIZER_PATH": None}
    load(rt, tmp_path, **env)
    said = capsys.readouterr().out
    assert "warning: the tokenizer loses text, which flatters the score: 'le caf" in said
    assert f" unknown_pieces:{ids.count(3)} " in said and ids.count(3) >= 2


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
    stream = tg.open_shards(str(CONFORMANCE), "val")[0][:400]
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
