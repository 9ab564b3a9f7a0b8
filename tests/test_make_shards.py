"""make_shards.py: real files in, real shards out, and what a user sees when something is wrong."""

import hashlib
import json
import random
import re
import resource
import shutil
import subprocess
import sys

import make_shards
import numpy as np
import pytest
import sentencepiece as spm
from conftest import folder_bytes, train_tokenizer, write_jsonl

VAL_DOCS = 12
VOCAB = 400
WORDS = """A tokenizer learns the pieces that texts repeat, so these words are parts of each other: learn,
learner, learning; token, tokens; document, documents, documented; train, trained, trainer, training;
valid, validate, validation; compress, compressed, compression; number, numbers, numbered; whole and
half, long or short, good and bad, the first of many and the last of all, where nothing else is left."""


def make_texts():
    """Documents of shuffled English words, each with something that tokenizers trip over."""
    rng = random.Random(7)
    odd = [
        "naïve",
        "ﬁne",
        "tab\there",
        "two  spaces",
        "line\nbreak",
        "▅",
        "nul\0byte",
        "日本",
        "🙂",
        "<s>",
    ]
    texts = []
    for number in range(200):
        chosen = rng.choices(WORDS.split(), k=rng.randint(20, 120))
        chosen += [odd[number % len(odd)], f"doc{number}", "2024 2024 2024 2024"]
        texts.append(" ".join(chosen))
    return texts


TEXTS = make_texts()


def build(jsonl, out, *more):
    """A set made in this process, which tests may have patched; returns its manifest."""
    arguments = ["--input", jsonl, "--out", out, "--val-docs", VAL_DOCS, "--vocab-size", VOCAB]
    arguments += more
    assert make_shards.main([str(argument) for argument in arguments]) == 0
    return json.loads((out / "manifest.json").read_text())


def read_tokens(folder, split):
    """The split's token stream, read as train_gpt.py does: shards in sorted order."""
    shards = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    return np.concatenate([np.fromfile(path, dtype="<u2", offset=1024) for path in shards])


def read_documents(folder, split):
    """The split's documents, decoded."""
    tokenizer = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = read_tokens(folder, split)
    starts = np.flatnonzero(tokens == tokenizer.bos_id())
    return [tokenizer.decode(ids.tolist()) for ids in np.split(tokens, starts)[1:]]


def encode(tokenizer, texts):
    """The token stream of these texts, as a list."""
    stream = []
    for batch in make_shards.encoding_batches(texts):
        for ids in make_shards.encode_parts(tokenizer, batch):
            stream += ids.tolist()
    return stream


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("source") / "docs.jsonl", TEXTS)


@pytest.fixture(scope="module")
def made(tmp_path_factory, jsonl):
    """A folder filled by the script as a user runs it. Tests only read it."""
    out = tmp_path_factory.mktemp("made") / "deep" / "set"
    command = [sys.executable, make_shards.__file__, "--input", jsonl, "--out", out]
    command += [f"--val-docs={VAL_DOCS}", f"--vocab-size={VOCAB}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"val: {VAL_DOCS} documents" in done.stdout
    return out


@pytest.fixture(scope="module")
def tokenizer(made):
    return spm.SentencePieceProcessor(model_file=str(made / "tokenizer.model"))


# --- What is in a set -----------------------------------------------------------------------------


def test_documents_survive_the_round_trip(made, tokenizer):
    """Decoding gives each normalised text once, in validation or in training, shuffled."""
    val = read_documents(made, "val")
    train = read_documents(made, "train")
    expected = [tokenizer.normalize(text).replace("▁", " ") for text in TEXTS]
    assert sorted(val + train) == sorted(expected)
    assert train != [text for text in expected if text in train]


def test_shards_hold_the_published_format(made):
    header = np.fromfile(made / "fineweb_train_000000.bin", dtype="<i4", count=256)
    tokens = read_tokens(made, "train")
    assert header.tolist() == [20240520, 1, len(tokens)] + [0] * 253
    assert not np.isin([0, 2, 3], tokens).any()  # padding, EOS, unknown


def test_tokenizer_has_the_published_settings(tokenizer):
    ids = [tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()]
    assert ids == [0, 1, 2, 3]
    assert tokenizer.encode("2024", out_type=str) == list("2024")  # digits split
    assert not tokenizer.encode("the", out_type=str)[0].startswith("▁")  # no dummy prefix
    assert tokenizer.normalize("ﬁ") == "fi"  # nmt_nfkc
    ids = tokenizer.encode("Ж日")  # never seen, and too rare for a coverage of 0.999
    assert all(tokenizer.is_byte(i) for i in ids)


def test_manifest_agrees_with_the_files(made, jsonl):
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["source"]["sha256"] == hashlib.sha256(jsonl.read_bytes()).hexdigest()
    assert manifest["tokenizer"]["vocab_size"] == VOCAB
    files = folder_bytes(made)
    assert set(files) == {*manifest["files"], "manifest.json"}  # and no temporary file was left
    for name, facts in manifest["files"].items():
        assert facts["bytes"] == len(files[name])
    splits = manifest["splits"]
    stats = splits["train"]
    documents = read_documents(made, "train")
    tokens = len(read_tokens(made, "train"))
    decoded = len("".join(documents).encode())
    assert stats["documents"] == len(documents)
    assert stats["tokens"] == tokens
    assert stats["decoded_bytes"] == decoded
    assert stats["tokens_per_byte"] == pytest.approx(tokens / decoded, abs=1e-6)
    text_bytes = splits["val"]["text_bytes"] + splits["train"]["text_bytes"]
    assert text_bytes == len("".join(TEXTS).encode())


def test_seed_decides_the_split(made, jsonl, tmp_path):
    build(jsonl, tmp_path / "same")
    assert folder_bytes(tmp_path / "same") == folder_bytes(made)
    assert build(jsonl, tmp_path / "other", "--seed", 1)["seed"] == 1
    assert set(read_documents(tmp_path / "other", "val")) != set(read_documents(made, "val"))


def test_tokenizer_never_sees_validation_text(made, jsonl, tmp_path):
    """Other validation documents leave tokenizer and training shards as they are."""
    source = make_shards.index_documents(jsonl)
    texts = [*TEXTS]
    for row in make_shards.split_rows(source, VAL_DOCS, 1337)["val"]:
        texts[row] = f"zz {row} " * 40
    build(write_jsonl(tmp_path / "docs.jsonl", texts), tmp_path / "set")
    before = folder_bytes(made)
    after = folder_bytes(tmp_path / "set")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"fineweb_val_000000.bin", "manifest.json"}


def test_tokenizer_sample_is_capped(jsonl, monkeypatch):
    """The document that reaches the limit is the last one."""
    source = make_shards.index_documents(jsonl)
    monkeypatch.setattr(make_shards, "SAMPLE_BYTES", len(TEXTS[0].encode()) + 1)
    assert list(make_shards.training_sample(source, np.arange(9))) == TEXTS[:2]


def test_no_document_is_too_odd_to_teach_the_tokenizer(tmp_path):
    """SentencePiece's trainer ignores texts above 4192 bytes, or with a NUL or U+2585 in them."""
    for odd in ("\0", "▅", "long text " * 420):
        jsonl = write_jsonl(tmp_path / "docs.jsonl", [f"{text} {odd}" for text in TEXTS])
        build(jsonl, tmp_path / "set")


# --- Long and many --------------------------------------------------------------------------------


def test_full_shards_and_replaced_sets(jsonl, made, tmp_path, monkeypatch):
    """Small shards join to the same stream, and go away when a set with fewer replaces them."""
    size = len(read_tokens(made, "val"))  # so that validation fills its only shard to the last id
    monkeypatch.setattr(make_shards, "SHARD_TOKENS", size)
    files = build(jsonl, tmp_path)["files"]
    counts = [facts["tokens"] for facts in files.values() if "tokens" in facts]
    # All are full but the last one of training.
    assert sorted(counts)[1:] == [size] * (len(counts) - 1)
    assert np.array_equal(read_tokens(tmp_path, "train"), read_tokens(made, "train"))
    (tmp_path / "docs.jsonl").touch()  # a neighbour that is none of our business
    monkeypatch.undo()
    build(jsonl, tmp_path)
    assert set(folder_bytes(tmp_path)) == {*folder_bytes(made), "docs.jsonl"}


@pytest.mark.parametrize("prefix", [True, False])
def test_long_documents_are_cut_without_a_trace(prefix, tmp_path, monkeypatch):
    """Encoding in parts gives the ids of the whole, also if the tokenizer adds a dummy prefix."""
    path = tmp_path / "other.model"
    train_tokenizer(path, TEXTS[:40], vocab_size=VOCAB, add_dummy_prefix=prefix)
    tokenizer = spm.SentencePieceProcessor(model_file=str(path))
    whole = encode(tokenizer, TEXTS)
    monkeypatch.setattr(make_shards, "BATCH_CHARS", 150)
    monkeypatch.setattr(make_shards, "PART_CHARS", 37)
    assert encode(tokenizer, TEXTS) == whole


def test_word_longer_than_a_part_keeps_its_letters(tokenizer, monkeypatch):
    monkeypatch.setattr(make_shards, "PART_CHARS", 10)
    text = "short " + "letters" * 40 + " end"
    assert max(map(len, make_shards.split_long(text))) == 10
    assert tokenizer.decode(encode(tokenizer, [text])) == text


# --- Input that is odd but fine -------------------------------------------------------------------


def test_blank_lines_and_empty_documents_are_counted(tmp_path):
    lines = [json.dumps({"text": text, "url": "kept out"}, ensure_ascii=False) for text in TEXTS]
    lines[3:3] = ["", "   ", '{"text": ""}', '{"text": " \\n\\u200b\\u0001 \\ufffd"}']
    jsonl = tmp_path / "docs.jsonl"
    jsonl.write_bytes("\r\n".join(lines).encode())  # CRLF, and no newline at the end
    source = build(jsonl, tmp_path / "set")["source"]
    assert source["blank_lines"] == 2
    assert source["empty_documents"] == 2
    assert len(read_documents(tmp_path / "set", "train")) == len(TEXTS) - VAL_DOCS


def test_given_tokenizer_is_used_as_it_is(jsonl, made, tmp_path):
    manifest = build(jsonl, tmp_path, "--tokenizer", made / "tokenizer.model")
    assert not manifest["tokenizer"]["trained_here"]
    assert (tmp_path / "tokenizer.model").read_bytes() == (made / "tokenizer.model").read_bytes()


# --- What a user can get wrong --------------------------------------------------------------------


def assert_refused(capsys, arguments, *words):
    """Exit status 1, nothing on stdout, and one line on stderr that holds all the words."""
    assert make_shards.main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch("error: .*\n", err)
    for word in (*words, "; expected "):
        assert word in err


@pytest.fixture
def earlier_set(made, tmp_path):
    """A good set in a folder of its own, to be found untouched after a run that fails."""
    return shutil.copytree(made, tmp_path / "earlier")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"text": "cut of', "invalid JSON"),
        (b"[" * 200_000, "invalid JSON"),
        (b'["text"]', 'without a "text" entry'),
        (b'{"body": "words"}', 'without a "text" entry'),
        (b'{"text": 5}', "type int"),
        (b'{"text": "half \\ud800"}', r"'\ud800', one half of a surrogate pair"),
    ],
    ids=range(6),
)
def test_bad_line_is_named(line, found, tmp_path, capsys):
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b'{"text": "three good words"}\n\n' + line)
    arguments = ["--input", path, "--out", tmp_path / "set"]
    assert_refused(capsys, arguments, f"{path}: line 3: found", found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--val-docs 200", "--val-docs 200|200 documents|fewer"),
        ("--val-docs 0", "--val-docs 0|at least 1"),
        ("--vocab-size 0", "--vocab-size 0|expected at least 3"),
        ("--vocab-size 65537", "--vocab-size 65537|expected at most 65536"),
        ("--vocab-size 60000", "--vocab-size 60000|expected at most"),
        ("--seed 4294967296", "--seed 4294967296|from 0 to 4294967295"),
        ("--tokenizer earlier/tokenizer.model --vocab-size 401", "400 pieces|--vocab-size 401"),
        ("--tokenizer other.model", "other.model|no BOS"),
        ("--tokenizer spaceless.model", "spaceless.model|no '▁'"),
        ("--tokenizer docs.jsonl", "docs.jsonl|no SentencePiece model"),
        ("--tokenizer empty.jsonl", "empty.jsonl|no SentencePiece model"),
        ("--input absent.jsonl", "absent.jsonl|No such file"),
        ("--input empty.jsonl", "empty.jsonl|no documents"),
    ],
)
def test_bad_option_leaves_the_earlier_set(
    options, words, earlier_set, made, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    train_tokenizer(tmp_path / "other.model", TEXTS[:40], vocab_size=VOCAB, bos_id=-1)
    train_tokenizer(tmp_path / "spaceless.model", ["abcabc"], vocab_size=264)
    write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    (tmp_path / "empty.jsonl").touch()
    arguments = ["--input", "docs.jsonl", "--out", "earlier", *options.split()]
    assert_refused(capsys, arguments, *words.split("|"))
    assert folder_bytes(earlier_set) == folder_bytes(made)


def test_write_that_fails_half_way_leaves_the_earlier_set(earlier_set, made, tmp_path, capsys):
    """A file-size limit stands in for a full disk: the tokenizer fits, the training shard not."""
    jsonl = write_jsonl(
        tmp_path / "docs.jsonl", [f"{n} {text}" for n in range(20) for text in TEXTS]
    )
    arguments = ["--input", jsonl, "--tokenizer", made / "tokenizer.model", "--out", earlier_set]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        assert_refused(capsys, arguments, f"{earlier_set}: File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert folder_bytes(earlier_set) == folder_bytes(made)


def test_shards_from_elsewhere_are_neither_mixed_nor_deleted(jsonl, tmp_path, capsys):
    """For example the published ones: no manifest of ours lists them."""
    (tmp_path / "fineweb_train_000079.bin").write_bytes(b"8 billion tokens")
    (tmp_path / "manifest.json").write_text('{"datasets": []}')
    before = folder_bytes(tmp_path)
    arguments = ["--input", jsonl, "--out", tmp_path]
    assert_refused(capsys, arguments, "fineweb_train_000079.bin")
    assert folder_bytes(tmp_path) == before


def test_given_vocabulary_must_fit_16_bits(made, monkeypatch):
    monkeypatch.setattr(make_shards, "MAX_VOCAB", VOCAB - 1)
    model = (made / "tokenizer.model").read_bytes()
    with pytest.raises(ValueError, match=f"big: found {VOCAB} pieces; expected at most"):
        make_shards.load_tokenizer(model, "big", None)
