"""Bits per byte: the table counts exactly the bytes of the decoded text, and sums divide what they say."""

import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from conftest import CONFORMANCE, CPU

import train_gpt as tg

TOKENIZER = str(CONFORMANCE / "tokenizer.model")
COPIES = 150
TEXTS = [
    "plain words, punctuation; and (brackets)!",
    "Crème brûlée für Ålesund, naïve façade — “quoted” … ½ ﬁne",
    "emoji 🙂🚀 and 👩‍👩‍👧 families",
    "digits 1234567890 and 3.14159, 2026-11-22",
    "tabs\tbetween\twords\nand lines\n\n  indented",
    "漢字 кириллица ελληνικά עברית 🂡 byte fallback \U0001f9ff",
    "a",
    "▁ a real low line ▁▁",
    "trailing space ",
    "x\u00a0y\u3000z\u200b",
]


@pytest.fixture(scope="module")
def tokenizer():
    return tg.load_tokenizer(TOKENIZER, 1024)


def table_bytes(tokenizer, ids):
    """Bytes of each token of a document, which BOS opens."""
    table = tg.ByteTable.build(tokenizer)
    ids = np.array([tokenizer.bos_id(), *ids])
    return table.count(ids[:-1], ids[1:])


@pytest.mark.parametrize("text", TEXTS)
def test_table_counts_the_utf8_bytes_of_the_decoded_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert int(table_bytes(tokenizer, ids).sum()) == len(tokenizer.decode(ids).encode())


def test_table_agrees_on_every_validation_document(tokenizer):
    stream = tg.open_shard(CONFORMANCE / "fineweb_val_000000.bin").astype(np.int64)
    docs = tg.split_documents(stream, tokenizer.bos_id(), 0, tg.ByteTable.build(tokenizer), CPU)
    for start, n in zip(docs.starts, docs.predictions, strict=True):
        ids = [int(i) for i in stream[start + 1 : start + 1 + n] if i != tokenizer.bos_id()]
        assert int(table_bytes(tokenizer, ids).sum()) == len(tokenizer.decode(ids).encode())


def test_pieces_by_kind(tokenizer):
    """The rules one by one, against the piece list itself."""
    word = tokenizer.piece_to_id("▁the")
    byte = tokenizer.piece_to_id("<0xE2>")
    assert tokenizer.is_byte(byte)
    assert not tokenizer.is_unknown(word)
    ids = [tokenizer.piece_to_id("a"), word, byte, tokenizer.piece_to_id("▁")]
    assert table_bytes(tokenizer, ids).tolist() == [1, 4, 1, 1]
    # A leading space counts only after text: the decoder drops it at the start of a document.
    for silent in ("bos", "eos", "pad", "unk"):
        ids = [word, getattr(tokenizer, f"{silent}_id")(), word]
        assert table_bytes(tokenizer, ids).tolist() == [3, 0, 3]


MODEL = Path(TOKENIZER).read_bytes()


@pytest.mark.parametrize("content", [None, b"", b"not a model", MODEL[:10_000]])
def test_unusable_tokenizers_are_refused(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(tg.UserError, match=r"TOKENIZER_PATH=.*expected the SentencePiece"):
        tg.load_tokenizer(str(path), 1024)


def test_damaged_tokenizers_are_refused_or_work(tmp_path):
    """Copies with one bit flipped: some are no text any more, most still tokenise and pass or fail the audit."""
    rng = random.Random(5)
    path = tmp_path / "damaged.model"
    refused = []
    for _ in range(COPIES):
        damaged = bytearray(MODEL)
        damaged[rng.randrange(20_000)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            tokenizer = tg.load_tokenizer(str(path), 1024)
            table = tg.ByteTable.build(tokenizer)
            stream = np.append(tokenizer.bos_id(), rng.choices(range(1024), k=200))
            docs = tg.split_documents(stream, tokenizer.bos_id(), 0, table, CPU)
            tg.audit_bytes(docs, table, tokenizer)
        except tg.UserError as error:
            refused.append(str(error))
    assert 0 < len(refused) < COPIES
    assert any("TOKENIZER_PATH" in line for line in refused)


def test_tokenizer_of_another_vocabulary_is_refused():
    with pytest.raises(tg.UserError, match=r"found 1024 pieces.*BOS and 512 pieces"):
        tg.load_tokenizer(TOKENIZER, 512)


def test_decoder_is_the_reference():
    """The tests above lean on SentencePiece's own decoder; it must give the text back where nothing is normalised."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=TOKENIZER)
    assert tokenizer.decode(tokenizer.encode("Hello, world: 42 🙂")) == "Hello, world: 42 🙂"
