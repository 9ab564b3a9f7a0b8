"""make_shards.py: real files in, real shards out, and what a user sees when something is wrong."""

import hashlib
import io
import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import make_shards
import numpy as np
import pytest
import sentencepiece as spm

SCRIPT = Path(make_shards.__file__)
VAL_DOCS, VOCAB = 12, 400


def make_texts(count=200):
    """Documents of made-up words, with the things that tokenizers trip over sprinkled in."""
    rng = random.Random(7)
    words = ["".join(rng.choices("etaoinshrdlucmwx", k=rng.randint(1, 8))) for _ in range(500)]
    odd = ["naïve", "ﬁne", "tab\there", "two  spaces", "line\nbreak"]
    odd += ["▅", "nul\0byte", "日本", "🙂", "<s>"]
    texts = []
    for number in range(count):
        chosen = rng.choices(words, k=rng.randint(20, 120))
        chosen += [odd[number % len(odd)], f"doc{number}", "2024"]
        rng.shuffle(chosen)
        texts.append(" ".join(chosen))
    for number in range(20, 24):  # in training whatever the seed, and rare
        texts[number % count] += " Ω"
    return texts


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def make_tokenizer(path, **options):
    """A tokenizer other than the one that the script would make."""
    settings = {"model_type": "bpe", "vocab_size": 300, "byte_fallback": True, "minloglevel": 2}
    settings |= options
    model = io.BytesIO()
    sentences = iter(make_texts(40))
    spm.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    return path


def run_script(*arguments, **options):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, **options
    )


def build(jsonl, out, *more):
    """A set made in this process, which tests may have patched; returns its manifest."""
    arguments = ["--jsonl", jsonl, "--out", out, "--val-docs", VAL_DOCS, *more]
    if "--tokenizer" not in more:
        arguments += ["--vocab-size", VOCAB]
    assert make_shards.main([str(argument) for argument in arguments]) == 0
    return json.loads((out / "manifest.json").read_text())


def folder_bytes(folder):
    """Every file below the folder, hidden ones included."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def read_tokens(folder, split):
    """The split's token stream, read as train_gpt.py does: shards in sorted order."""
    shards = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    return np.concatenate([np.fromfile(path, dtype="<u2", offset=1024) for path in shards])


def read_documents(folder, split):
    """The split's documents, decoded."""
    tokenizer = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = read_tokens(folder, split)
    starts = np.flatnonzero(tokens == tokenizer.bos_id())
    assert starts[0] == 0
    return [tokenizer.decode(ids[1:].tolist()) for ids in np.split(tokens, starts[1:])]


@pytest.fixture(scope="module")
def texts():
    return make_texts()


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory, texts):
    return write_jsonl(tmp_path_factory.mktemp("source") / "docs.jsonl", texts)


@pytest.fixture(scope="module")
def made(tmp_path_factory, jsonl):
    """A folder filled by the script as a user runs it. Tests only read it."""
    out = tmp_path_factory.mktemp("made") / "deep" / "set"
    done = run_script("--jsonl", jsonl, "--out", out, "--val-docs", VAL_DOCS, "--vocab-size", VOCAB)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"val: {VAL_DOCS} documents" in done.stdout
    assert f"train: {200 - VAL_DOCS} documents" in done.stdout
    return out


@pytest.fixture(scope="module")
def tokenizer(made):
    return spm.SentencePieceProcessor(model_file=str(made / "tokenizer.model"))


# --- What is in a set ------------------------------------------------------------------------------------------------


def test_documents_survive_the_round_trip(made, texts, tokenizer):
    """Decoding gives each document's normalised text, each once, in validation or in training, shuffled."""
    val, train = read_documents(made, "val"), read_documents(made, "train")
    expected = [tokenizer.normalize(text).replace("▁", " ") for text in texts]
    assert len(val) == VAL_DOCS
    assert sorted(val + train) == sorted(expected)
    assert set(val) != set(expected[:VAL_DOCS])
    assert train != [text for text in expected if text not in val]


def test_shards_hold_the_published_format(made, tokenizer):
    for split in ("val", "train"):
        path = made / f"fineweb_{split}_000000.bin"
        header = np.fromfile(path, dtype="<i4", count=256)
        tokens = read_tokens(made, split)
        assert header.tolist() == [20240520, 1, len(tokens)] + [0] * 253
        assert make_shards.shard_token_count(path) == len(tokens)
        assert tokens.max() < VOCAB
        assert not np.isin([0, 2, 3], tokens).any()  # padding, EOS, unknown


def test_tokenizer_has_the_published_settings(tokenizer):
    ids = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    assert (*ids, tokenizer.get_piece_size()) == (0, 1, 2, 3, VOCAB)
    assert tokenizer.encode("2024", out_type=str) == list("2024")  # digits split
    assert not tokenizer.encode("the", out_type=str)[0].startswith("▁")  # no dummy prefix
    assert tokenizer.normalize("ﬁ") == "fi"  # nmt_nfkc
    for text in ("Ж", "Ω"):  # never seen, and too rare for a coverage of 0.999
        assert all(tokenizer.is_byte(i) for i in tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_manifest_agrees_with_the_files(made, jsonl, texts):
    manifest = json.loads((made / "manifest.json").read_text())
    source = jsonl.read_bytes()
    assert manifest["source"]["sha256"] == hashlib.sha256(source).hexdigest()
    assert manifest["source"]["bytes"] == len(source)
    assert (manifest["seed"], manifest["tokenizer"]["vocab_size"]) == (1337, VOCAB)
    files = folder_bytes(made)
    assert set(files) == {*manifest["files"], "manifest.json"}  # and no temporary file was left
    for name, facts in manifest["files"].items():
        assert facts["bytes"] == len(files[name])
        assert facts["sha256"] == hashlib.sha256(files[name]).hexdigest()
    for split, stats in manifest["splits"].items():
        documents, tokens = read_documents(made, split), len(read_tokens(made, split))
        decoded = sum(len(document.encode()) for document in documents)
        assert (stats["documents"], stats["tokens"]) == (len(documents), tokens)
        assert stats["decoded_bytes"] == decoded
        assert stats["tokens_per_byte"] == pytest.approx(tokens / decoded, abs=1e-6)
        assert manifest["files"][f"fineweb_{split}_000000.bin"]["tokens"] == tokens
    counted = sum(stats["text_bytes"] for stats in manifest["splits"].values())
    assert counted == sum(len(text.encode()) for text in texts)


def test_equal_runs_give_equal_bytes(made, jsonl, tmp_path):
    build(jsonl, tmp_path / "again")
    assert folder_bytes(tmp_path / "again") == folder_bytes(made)


def test_seed_changes_the_split(made, jsonl, tmp_path):
    build(jsonl, tmp_path / "other", "--seed", 1)
    assert set(read_documents(tmp_path / "other", "val")) != set(read_documents(made, "val"))


def test_tokenizer_never_sees_validation_text(made, texts, tmp_path, tokenizer):
    """Other validation documents leave tokenizer and training shards as they are; another training one does not."""
    val = set(read_documents(made, "val"))
    is_val = [tokenizer.normalize(text).replace("▁", " ") in val for text in texts]
    pairs = zip(texts, is_val, strict=True)
    other_val = [f"zz {text[:9]} " * 40 if inside else text for text, inside in pairs]
    build(write_jsonl(tmp_path / "docs.jsonl", other_val), tmp_path / "val")
    before, after = folder_bytes(made), folder_bytes(tmp_path / "val")
    assert before["fineweb_val_000000.bin"] != after["fineweb_val_000000.bin"]
    for name in ("tokenizer.model", "fineweb_train_000000.bin"):
        assert before[name] == after[name]
    other_train = [*texts]
    other_train[is_val.index(False)] = "zz qq " * 400
    build(write_jsonl(tmp_path / "docs.jsonl", other_train), tmp_path / "train")
    assert folder_bytes(tmp_path / "train")["tokenizer.model"] != before["tokenizer.model"]


def test_tokenizer_sample_is_capped(jsonl, monkeypatch):
    """The sample is a prefix of the shuffled training text, one document past the limit at most."""
    source = make_shards.index_documents(jsonl)
    rows = make_shards.split_rows(source, VAL_DOCS, 1337)["train"]
    everything = list(make_shards.training_sample(source, rows))
    monkeypatch.setattr(make_shards, "SAMPLE_BYTES", 5000)
    sample = list(make_shards.training_sample(source, rows))
    sizes = [len(text.encode()) for text in sample]
    assert sample == everything[: len(sample)]
    assert sum(sizes) >= 5000 > sum(sizes[:-1])


def test_long_documents_teach_the_tokenizer(texts, tmp_path):
    """By default SentencePiece's trainer ignores any text above 4192 bytes; here every text is longer."""
    joined = [" ".join(texts[start : start + 20]) for start in range(0, 100, 5)]
    assert min(map(len, joined)) > 4192
    build(write_jsonl(tmp_path / "docs.jsonl", joined), tmp_path / "set")


def test_reserved_characters_do_not_cost_their_document(tmp_path):
    """SentencePiece's trainer ignores any text with a NUL or U+2585 in it; here every text has one."""
    jsonl = write_jsonl(tmp_path / "docs.jsonl", [f"{text} \0 ▅" for text in make_texts(60)])
    build(jsonl, tmp_path / "set")
    for text in read_documents(tmp_path / "set", "train"):
        assert "\0" in text and "▅" in text


# --- Long and many ---------------------------------------------------------------------------------------------------


def test_full_shards_and_replaced_sets(jsonl, made, tmp_path, monkeypatch):
    """Small shards join to the same stream, and go away when a set with fewer shards replaces them."""
    monkeypatch.setattr(make_shards, "SHARD_TOKENS", 5000)
    build(jsonl, tmp_path)
    paths = sorted(tmp_path.glob("fineweb_train_*.bin"))
    counts = [make_shards.shard_token_count(path) for path in paths]
    assert len(counts) > 2 and set(counts[:-1]) == {5000} and 0 < counts[-1] <= 5000
    assert (read_tokens(tmp_path, "train") == read_tokens(made, "train")).all()
    (tmp_path / "docs.jsonl").write_text("a neighbour that is none of our business")
    monkeypatch.undo()
    build(jsonl, tmp_path)
    assert set(folder_bytes(tmp_path)) == {*folder_bytes(made), "docs.jsonl"}


def test_last_shard_may_end_exactly(tmp_path, monkeypatch):
    """A stream that fills its last shard leaves no empty one behind."""
    monkeypatch.setattr(make_shards, "SHARD_TOKENS", 4)
    writer = make_shards.ShardWriter(tmp_path, "val")
    writer.write(np.arange(8))
    writer.close()
    assert [make_shards.shard_token_count(path) for path in sorted(tmp_path.iterdir())] == [4, 4]
    assert read_tokens(tmp_path, "val").tolist() == list(range(8))


def test_long_documents_are_cut_without_a_trace(jsonl, made, tmp_path, monkeypatch):
    """Encoding in parts gives the tokens of the whole, wherever the parts end."""
    monkeypatch.setattr(make_shards, "BATCH_CHARS", 150)
    monkeypatch.setattr(make_shards, "PART_CHARS", 37)
    build(jsonl, tmp_path, "--tokenizer", made / "tokenizer.model")
    for split in ("val", "train"):
        assert np.array_equal(read_tokens(tmp_path, split), read_tokens(made, split))


def test_word_longer_than_a_part_keeps_its_letters(tokenizer, monkeypatch):
    monkeypatch.setattr(make_shards, "PART_CHARS", 10)
    text = "short " + "".join(random.Random(1).choices("etaoinshrdlucmwx", k=300)) + " end"
    (batch,) = make_shards.encoding_batches([text])
    ids = np.concatenate(make_shards.encode_parts(tokenizer, batch))
    assert max(len(part.text) for part in batch) <= 10
    assert tokenizer.decode(ids[1:].tolist()) == text


# --- Input that is odd but fine --------------------------------------------------------------------------------------


def test_blank_lines_and_empty_documents_are_counted(tmp_path, texts):
    lines = [json.dumps({"text": text, "url": "kept out"}, ensure_ascii=False) for text in texts]
    lines[3:3] = ["", "   ", '{"text": ""}', '{"text": " \\n\\u200b\\u0001 \\ufffd"}']
    jsonl = tmp_path / "docs.jsonl"
    jsonl.write_bytes("\r\n".join(lines).encode())  # CRLF, and no newline at the end
    manifest = build(jsonl, tmp_path / "set")
    assert (manifest["source"]["blank_lines"], manifest["source"]["empty_documents"]) == (2, 2)
    assert sum(stats["documents"] for stats in manifest["splits"].values()) == len(texts)
    assert len(read_documents(tmp_path / "set", "train")) == len(texts) - VAL_DOCS


def test_given_tokenizer_is_used_as_it_is(jsonl, made, tmp_path):
    manifest = build(
        jsonl, tmp_path, "--tokenizer", made / "tokenizer.model", "--vocab-size", VOCAB
    )
    assert (tmp_path / "tokenizer.model").read_bytes() == (made / "tokenizer.model").read_bytes()
    assert manifest["tokenizer"] == {
        "vocab_size": VOCAB,
        "trained_here": False,
        "training_text_limit_bytes": None,
    }


def test_other_tokenizers_leave_no_trace_of_a_cut_either(tmp_path, texts, monkeypatch):
    """A tokenizer with a dummy prefix puts a space in front of a text, but not in front of its later parts."""
    path = make_tokenizer(
        tmp_path / "prefix.model", model_type="unigram", byte_fallback=False, vocab_size=60
    )
    tokenizer = make_shards.load_tokenizer(path.read_bytes(), "prefix", None)
    (whole,) = make_shards.encode_parts(tokenizer, next(make_shards.encoding_batches([texts[0]])))
    monkeypatch.setattr(make_shards, "PART_CHARS", 50)
    parts = make_shards.encode_parts(tokenizer, next(make_shards.encoding_batches([texts[0]])))
    assert len(parts) > 2 and np.concatenate(parts).tolist() == whole.tolist()


# --- What a user can get wrong ---------------------------------------------------------------------------------------


GOOD_LINE = b'{"text": "three good words"}\n'
BAD_LINES = [
    (b'{"text": "cut of\n', "invalid JSON"),
    (b'{"text": "\xff\xfe"}\n', "invalid JSON"),
    (b'["text"]\n', 'without a "text" entry'),
    (b'{"body": "words"}\n', 'without a "text" entry'),
    (b'{"text": 5}\n', "type int"),
    (b'{"text": "half \\ud800"}\n', r"'\ud800', one half of a surrogate pair"),
    (b"[" * 200_000 + b"\n", "invalid JSON"),
]


def assert_refused(capsys, arguments, *words):
    """Exit status 1, nothing on stdout, and one line on stderr that holds all the words."""
    capsys.readouterr()
    assert make_shards.main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    for word in (*words, "; expected "):
        assert word in err


@pytest.fixture
def earlier_set(made, tmp_path):
    """A good set in a folder of its own, to be found untouched after a run that fails."""
    out = tmp_path / "earlier"
    out.mkdir()
    for name, content in folder_bytes(made).items():
        (out / name).write_bytes(content)
    return out


@pytest.mark.parametrize(("line", "found"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_line_is_named(line, found, earlier_set, tmp_path, made, capsys):
    path = tmp_path / "docs.jsonl"
    path.write_bytes(GOOD_LINE + b"\n" + line + GOOD_LINE)
    arguments = ["--jsonl", path, "--out", earlier_set, "--val-docs", 1]
    assert_refused(capsys, arguments, f"{path}: line 3: found", found)
    assert folder_bytes(earlier_set) == folder_bytes(made)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--val-docs 200", "--val-docs 200|200 documents|fewer"),
        ("--val-docs 0", "--val-docs 0|at least 1"),
        ("--vocab-size 100", "--vocab-size 100|expected at least 2"),
        ("--vocab-size 0", "--vocab-size 0|expected at least 2"),
        ("--vocab-size 65537", "--vocab-size 65537|expected at most 65536"),
        ("--vocab-size 60000", "--vocab-size 60000|expected at most"),
        ("--seed -1", "--seed -1|from 0 to 4294967295"),
        ("--seed 4294967296", "--seed 4294967296|from 0 to 4294967295"),
        ("--tokenizer earlier/tokenizer.model --vocab-size 401", "400 pieces|--vocab-size 401"),
        ("--tokenizer nobos.model", "nobos.model|no BOS"),
        ("--tokenizer docs.jsonl", "docs.jsonl|no SentencePiece model"),
        ("--tokenizer empty.jsonl", "empty.jsonl|no SentencePiece model"),
        ("--jsonl absent.jsonl", "absent.jsonl|No such file"),
        ("--jsonl blank.jsonl", "blank.jsonl|no documents"),
    ],
)
def test_bad_option_leaves_the_earlier_set(
    options, words, earlier_set, made, jsonl, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    make_tokenizer(Path("nobos.model"), bos_id=-1)
    Path("docs.jsonl").write_bytes(jsonl.read_bytes())
    Path("empty.jsonl").touch()
    Path("blank.jsonl").write_bytes(b'\n{"text": " "}\n')
    arguments = ["--jsonl", "docs.jsonl", "--out", "earlier", "--val-docs", VAL_DOCS]
    assert_refused(capsys, arguments + options.split(), *words.split("|"))
    assert folder_bytes(earlier_set) == folder_bytes(made)


def test_write_that_fails_half_way_leaves_the_earlier_set(earlier_set, made, texts, tmp_path):
    """A file-size limit stands in for a full disk: the tokenizer still fits, the training shard does not."""
    limit = 400_000
    done = run_script(
        "--jsonl",
        write_jsonl(tmp_path / "docs.jsonl", [f"{n} {text}" for n in range(20) for text in texts]),
        "--out",
        earlier_set,
        "--tokenizer",
        make_tokenizer(tmp_path / "other.model"),
        "--val-docs",
        VAL_DOCS,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {earlier_set}: File too large; expected ")
    assert done.stderr.count("\n") == 1
    assert folder_bytes(earlier_set) == folder_bytes(made)


def test_shards_from_elsewhere_are_neither_mixed_nor_deleted(jsonl, tmp_path, capsys):
    """For example the published ones: no manifest of ours lists them."""
    (tmp_path / "fineweb_train_000079.bin").write_bytes(b"8 billion tokens")
    (tmp_path / "manifest.json").write_text('{"datasets": []}')
    before = folder_bytes(tmp_path)
    arguments = ["--jsonl", jsonl, "--out", tmp_path]
    assert_refused(capsys, arguments, str(tmp_path), "fineweb_train_000079.bin")
    assert folder_bytes(tmp_path) == before


def test_vocabulary_must_fit_16_bits(jsonl, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_shards, "MAX_VOCAB", VOCAB - 1)
    new = tmp_path / "new"
    arguments = ["--jsonl", jsonl, "--out", new, "--tokenizer", made / "tokenizer.model"]
    words = f"found {VOCAB} pieces; expected at most {VOCAB - 1}"
    assert_refused(capsys, arguments, words)
    assert not new.exists()


# --- Reading a header ------------------------------------------------------------------------------------------------


def shard_bytes(magic=20240520, version=1, count=5, tokens=5):
    return np.array([magic, version, count] + [0] * 253, dtype="<i4").tobytes() + bytes(2 * tokens)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (shard_bytes()[:1023], "found 1023 bytes"),
        (shard_bytes(magic=20240521), "found magic 20240521"),
        (shard_bytes(version=2), "version 2"),
        (shard_bytes()[:-1], "found 1033 bytes and 5 tokens"),
        (shard_bytes(tokens=6), "found 1036 bytes and 5 tokens"),
        (shard_bytes(count=0, tokens=0), "found 1024 bytes and 0 tokens"),
    ],
)
def test_bad_shard_is_refused(content, found, tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        make_shards.shard_token_count(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: found") and found in message
    assert "; expected" in message and "again" in message and "\n" not in message
