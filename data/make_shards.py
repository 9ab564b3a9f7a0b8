"""Turn documents into a tokenizer and shards for train_gpt.py.

    python data/make_shards.py --input docs.jsonl --out data/mine --val-docs 1000
    python data/make_shards.py --input docs.jsonl.gz --text-key content --out data/mine
    python data/make_shards.py --input folder/ --out data/mine
    T=data/tokenizers/fineweb_1024_bpe.model
    python data/make_shards.py --input docs.jsonl --out data/mine --tokenizer $T

A JSONL file holds one {"text": ...} a line; a folder holds such files (.jsonl, .jsonl.gz) and
documents of their own (.txt, .md), at any depth. Exact doubles are dropped. The rest is shuffled
with a seed; the first --val-docs documents are validation, the others training text. Each one
becomes BOS + pieces. Only an index is kept in memory (20 bytes a document), and long documents are
encoded in parts, so neither a 100 GB file nor a 50 MB line needs more than a few hundred MB.

A set appears as a whole or not at all: it is built in a hidden folder inside --out, checked as
check_shards.py does, and moved into place at the end, manifest.json last. data/README.md describes
the formats.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import sentencepiece as spm
from check_shards import (
    HEADER_INTS,
    MAGIC,
    SHARD_NAME,
    VERSION,
    Check,
    Split,
    check_set,
    open_tokenizer,
    print_report,
    progress,
    shard_token_count,
)

SHARD_TOKENS = 100_000_000  # a shard of 200 MB, the size of the published ones
MAX_VOCAB = 2**16  # ids are stored in 16 bits

# The settings of the published tokenizer. Splitting digits keeps numbers of any length readable
# with ten pieces; byte fallback makes every text encodable, so that no document ever holds the
# unknown piece.
TOKENIZER_SETTINGS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "nmt_nfkc",
    "add_dummy_prefix": False,
    "character_coverage": 0.999,
    "pad_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "unk_id": 3,
    "max_sentence_length": 2**30,  # bytes; the default of 4192 drops longer documents in silence
    "num_threads": 1,  # the same merges on every machine; BPE training would hardly use more
    "minloglevel": 2,  # errors come as exceptions: hundreds of log lines would only hide them
}
DEFAULT_VOCAB = 1024
# Training text shown to the tokenizer; more changes hardly a merge and costs memory.
SAMPLE_BYTES = 32_000_000
# How the published tokenizer, and one that is made here, sees a text: spaces come as `▁`.
PUBLISHED = spm.SentencePieceNormalizer(
    rule_name=TOKENIZER_SETTINGS["normalization_rule_name"],
    add_dummy_prefix=False,
    escape_whitespaces=True,
    remove_extra_whitespaces=True,
)

# Encoding takes up to 100 bytes of memory a character, so that long documents are cut (at one of
# these blanks) and short ones handed over in batches, which SentencePiece spreads over all cores.
PART_CHARS = 1_000_000
BATCH_CHARS = 4_000_000
BLANKS = " \n"
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".md")  # what a folder may hold; the rest is not read


# --- Shards ---------------------------------------------------------------------------------------


class ShardWriter:
    """Appends token ids to fineweb_{split}_000000.bin, ...; a document may straddle two shards.

    The number of tokens is known only at the end of a shard, so its header is written last.
    """

    def __init__(self, folder: Path, split: str):
        self.folder = folder
        self.split = split
        self.file = None
        self.shards = 0
        self.count = 0

    def write(self, ids: np.ndarray) -> None:
        """Append ids (any integer type, all below 65536), starting new shards as they fill."""
        while ids.size:
            if self.file is None:
                path = self.folder / f"fineweb_{self.split}_{self.shards:06d}.bin"
                self.file = path.open("wb")
                self.file.write(bytes(4 * HEADER_INTS))
                self.shards += 1
                self.count = 0
            room = SHARD_TOKENS - self.count
            # Little-endian by name, so that a set made anywhere can be read anywhere.
            self.file.write(ids[:room].astype("<u2").tobytes())
            self.count += min(room, ids.size)
            ids = ids[room:]
            if self.count == SHARD_TOKENS:
                self.close()

    def close(self) -> None:
        """Finish the open shard, if any."""
        if self.file is None:
            return
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = MAGIC, VERSION, self.count
        self.file.seek(0)
        self.file.write(header.tobytes())
        sync_and_close(self.file)
        self.file = None


def sync_and_close(file) -> None:
    """Force the file to disk before it gets its final name: no power cut leaves that name empty."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


# --- Documents ------------------------------------------------------------------------------------


class InputFile(NamedTuple):
    """A file of the input."""

    path: Path
    is_document: bool  # one document, as plain text; otherwise JSONL

    @property
    def is_packed(self) -> bool:
        return self.path.suffix == ".gz"

    def read(self, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """Where each document starts in the open file, from its position on, and its bytes."""
        offset = file.tell()
        if self.is_document:
            yield offset, file.read()
            return
        for line in file:
            yield offset, line
            offset += len(line)

    def text(self, content: bytes, text_key: str) -> str:
        """The text of a document that `read` gave. ValueError says what is wrong with it."""
        if self.is_document:
            return plain_text(content)
        return document_text(content, text_key)


@dataclass
class Source:
    """Where the documents of the input start, and what was left out of them.

    The texts stay in their files: a shuffled order is read by seeking, so that memory grows with
    the number of documents and not with their length. What is compressed cannot be read so: it is
    unpacked into one file without a name, which goes when the program ends.
    """

    path: Path
    text_key: str
    files: list[InputFile]
    numbers: np.ndarray = None  # (documents,) int32, which of the files
    offsets: np.ndarray = None  # (documents,) int64
    bytes_read: int = 0
    sha256: str = ""
    left_out: Counter = field(default_factory=Counter)
    unpacked: BinaryIO = field(default_factory=tempfile.TemporaryFile)

    def facts(self) -> dict:
        """What the manifest says about the source; no path: equal runs have equal manifests."""
        facts = {"name": self.path.name, "files": len(self.files), "bytes": self.bytes_read}
        facts["sha256"] = self.sha256
        left_out = ("blank_lines", "empty_documents", "doubles")
        return facts | {reason: self.left_out[reason] for reason in left_out}

    def unpack(self, path: Path) -> None:
        """Append the text of a .gz file to `unpacked`, which then stands at its start."""
        self.unpacked.seek(0, os.SEEK_END)
        try:
            self.unpacked.write(b"\n")  # ends the last line of an earlier file
            start = self.unpacked.tell()
            with gzip.open(path) as packed:
                shutil.copyfileobj(packed, self.unpacked)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path}: found that it cannot be unpacked ({error}); expected a whole .gz file and"
                f" room for its text in {tempfile.gettempdir()}; fetch it again, or set TMPDIR"
            ) from None
        self.unpacked.seek(start)

    def open(self, source_file: InputFile) -> AbstractContextManager[BinaryIO]:
        """The file, or `unpacked`, which stays open, if that holds its text."""
        if source_file.is_packed:
            return nullcontext(self.unpacked)
        return open(source_file.path, "rb")

    def contents(self) -> Iterator[tuple[int, str, int, bytes]]:
        """Every document: number of its file, its place in words, its offset and its bytes."""
        for number, source_file in enumerate(self.files):
            path = source_file.path
            if source_file.is_packed:
                self.unpack(path)
            with self.open(source_file) as file:
                for line, (offset, content) in enumerate(source_file.read(file), start=1):
                    place = path if source_file.is_document else f"{path}: line {line}"
                    yield number, str(place), offset, content

    def texts(self, rows: np.ndarray) -> Iterator[str]:
        """The documents with these row numbers, in this order.

        Each is parsed a second time; that costs little beside its encoding, and nothing has to be
        kept.
        """
        for number, offset in zip(self.numbers[rows], self.offsets[rows], strict=True):
            source_file = self.files[number]
            with self.open(source_file) as file:
                file.seek(offset)
                _, content = next(source_file.read(file))
            yield source_file.text(content, self.text_key)


def list_files(path: Path) -> list[InputFile]:
    """The file itself, as JSONL; of a folder, every file of a known kind that is not hidden."""
    if not path.is_dir():
        return [InputFile(path, is_document=False)]
    names = sorted(found.relative_to(path) for found in path.rglob("*") if found.is_file())
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    names = [name for name in names if name.name.endswith(SUFFIXES)]
    if not names:
        raise ValueError(
            f"{path}: found no documents; expected files that end in {', '.join(SUFFIXES)};"
            " give another folder"
        )
    return [InputFile(path / name, name.suffix in (".txt", ".md")) for name in names]


def plain_text(content: bytes) -> str:
    """The text of a file that is one document."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"found no UTF-8 ({error.reason} at byte {error.start}); expected text in UTF-8;"
            " convert this file or take it away"
        ) from None


def document_text(line: bytes, text_key: str = "text") -> str:
    """The text of one JSONL line; ValueError says what is wrong with it, the caller where it is.

    Nothing is repaired or skipped: a corpus that is not what its maker thinks should be noticed
    now. Other entries of the object are allowed, as most corpora carry a source or a date.
    """
    entry = json.dumps(text_key)
    expected = f'expected a JSON object {{{entry}: "..."}} on every line'
    remedy = f"{expected}; fix or remove this line, or give another --text-key"
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"found invalid JSON ({error}); {remedy}") from None
    if not isinstance(record, dict) or text_key not in record:
        raise ValueError(f"found JSON without a {entry} entry; {remedy}")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"found a {entry} of type {type(text).__name__}; {remedy}")
    try:
        # "\\ud800" is valid JSON but no character; SentencePiece would fail on it.
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"found {half!r}, one half of a surrogate pair; {remedy}") from None
    return text


def text_digest(text: str, normalize: Callable[[str], str]) -> int | None:
    """64 bits of a hash of the text as the tokenizer sees it; None if it sees nothing to read.

    At 100 million documents two different ones share a digest with a chance of 0.03 %.
    """
    digest = hashlib.blake2b(digest_size=8)
    is_empty = True
    for part in split_long(text):
        seen = normalize(part)
        digest.update(seen.encode("utf-8"))
        if any(c.isprintable() and c != "▁" for c in seen):
            is_empty = False
    return None if is_empty else int.from_bytes(digest.digest())


def index_documents(
    path: Path, text_key: str = "text", normalize: Callable[[str], str] = PUBLISHED.normalize
) -> Source:
    """Check every document and note where it starts, before any long work begins.

    Blank lines are no documents. Text of which the tokenizer keeps nothing to read (empty, spaces,
    control codes) is dropped: it would be BOS alone, with nothing to predict. So are exact doubles,
    texts that are the same for the tokenizer: one of them might validate what another one taught.
    The manifest counts all three. `normalize` is the tokenizer's.
    """
    source = Source(path, text_key, list_files(path))
    numbers = array("i")
    offsets = array("q")
    digests = array("Q")
    hasher = hashlib.sha256()
    sizes = [source_file.path.stat().st_size for source_file in source.files]
    total = None if any(source_file.is_packed for source_file in source.files) else sum(sizes)
    with progress("reading", total, unit="B", unit_scale=True) as bar:
        for number, place, offset, content in source.contents():
            hasher.update(content)
            source.bytes_read += len(content)
            bar.update(len(content))
            source_file = source.files[number]
            if not content.strip() and not source_file.is_document:
                source.left_out["blank_lines"] += 1
                continue
            try:
                text = source_file.text(content, text_key)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            digest = text_digest(text, normalize)
            if digest is None:
                source.left_out["empty_documents"] += 1
                continue
            numbers.append(number)
            offsets.append(offset)
            digests.append(digest)
    source.sha256 = hasher.hexdigest()
    _, first = np.unique(np.array(digests), return_index=True)
    first.sort()
    source.left_out["doubles"] = len(digests) - len(first)
    source.numbers = np.array(numbers)[first]
    source.offsets = np.array(offsets)[first]
    return source


def split_rows(source: Source, val_docs: int, seed: int) -> dict[str, np.ndarray]:
    """Row numbers of the validation and training documents, shuffled.

    RandomState rather than default_rng: NumPy promises that its stream never changes between
    versions.
    """
    documents = len(source.offsets)
    if documents == 0:
        expected = f'lines of {{"{source.text_key}": "..."}}'
        raise ValueError(
            f"{source.path}: found no documents; expected {expected}; give another file"
        )
    if not 1 <= val_docs < documents:
        raise ValueError(
            f"--val-docs {val_docs}: found {documents} documents in {source.path}; expected at"
            " least 1, and fewer than all of them, as training needs the rest; choose another number"
        )
    # One order for everything: which documents validate, and the order in which training reads the
    # others.
    order = np.random.RandomState(seed).permutation(documents)
    return {"val": order[:val_docs], "train": order[val_docs:]}


# --- Tokenizer ------------------------------------------------------------------------------------


def split_long(text: str) -> Iterator[str]:
    """The text in parts of at most PART_CHARS, cut before a blank.

    Pieces never reach across a blank, so the parts encode like the whole. A word longer than a part
    is cut anywhere.
    """
    start = 0
    while len(text) - start > PART_CHARS:
        end = start + PART_CHARS
        cut = max(text.rfind(blank, start, end) for blank in BLANKS)
        cut = cut if cut > start else end
        yield text[start:cut]
        start = cut
    yield text[start:]


def training_sample(source: Source, rows: np.ndarray) -> Iterator[str]:
    """The first SAMPLE_BYTES of the shuffled training documents, for the tokenizer.

    The trainer skips any text that holds a NUL or U+2585, which it uses itself; a space in their
    place saves the rest.
    """
    budget = SAMPLE_BYTES
    for text in source.texts(rows):
        for part in split_long(text):
            if budget <= 0:
                return
            budget -= len(part.encode("utf-8"))
            yield part.translate({0: " ", 0x2585: " "})


def train_tokenizer(source: Source, rows: np.ndarray, vocab_size: int) -> bytes:
    """A new SentencePiece model, as bytes.

    It sees training documents only: pieces fitted to validation text would make its score look
    better than it is.
    """
    model = io.BytesIO()
    # With a size below 4 it fails before it has counted how many pieces it needs.
    size = max(vocab_size, 4)
    sample = training_sample(source, rows)
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=sample, model_writer=model, vocab_size=size, **TOKENIZER_SETTINGS
        )
    except RuntimeError as error:
        limit = f"usable text ({error})"
        # "100 vs 346." when the bytes and characters alone need 346, "<= 900." when the text has no
        # more merges.
        bound = re.search(r"(vs|<=) (\d+)\.", str(error))
        if bound:
            direction = "least" if bound[1] == "vs" else "most"
            limit = f"at {direction} {bound[2]}"
        raise ValueError(
            f"--vocab-size {vocab_size}: found that SentencePiece cannot make it from"
            f" {source.path}; expected {limit}; choose another size"
        ) from None
    return model.getvalue()


def load_tokenizer(proto: bytes, name: str, vocab_size: int | None) -> spm.SentencePieceProcessor:
    """The tokenizer in these bytes, fit for shards; vocab_size None accepts any size."""
    tokenizer = open_tokenizer(proto, name)
    pieces = tokenizer.get_piece_size()
    found = f"{name}: found {pieces} pieces"
    if vocab_size not in (None, pieces):
        raise ValueError(f"{found}; expected --vocab-size {vocab_size}; change it or leave it out")
    if pieces > MAX_VOCAB:
        raise ValueError(
            f"{found}; expected at most {MAX_VOCAB}, as shards hold 16-bit ids;"
            " use a smaller vocabulary"
        )
    return tokenizer


def lost_words(
    tokenizer: spm.SentencePieceProcessor, texts: list[str]
) -> tuple[Counter[str], Counter[str]]:
    """All words of the texts, and those that are spelled otherwise after encoding and decoding.

    Shards cannot show that a tokenizer folds case or drops characters: their bytes are those that
    are left. Both sides are seen as the published tokenizer sees them, so that its folding of white
    space and ligatures is no loss.
    """
    words = Counter()
    lost = Counter()
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        expected = Counter(PUBLISHED.normalize(text).split("▁"))
        kept = Counter(PUBLISHED.normalize(tokenizer.decode(ids)).split("▁"))
        words += expected
        lost += expected - kept
    return words, lost


# --- Writing a set --------------------------------------------------------------------------------


@dataclass
class Part:
    """A stretch of one document, at most PART_CHARS long; most documents are a single part."""

    text: str
    starts_document: bool


def encoding_batches(texts: Iterable[str]) -> Iterator[list[Part]]:
    """The texts as lists of parts with about BATCH_CHARS characters in each list."""
    batch, size = [], 0
    for text in texts:
        for number, part in enumerate(split_long(text)):
            batch.append(Part(part, number == 0))
            size += len(part)
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
    yield batch


def encode_parts(tokenizer: spm.SentencePieceProcessor, parts: list[Part]) -> list[np.ndarray]:
    """Token ids of each part, with BOS in front of every document.

    A later part that begins with a blank is encoded behind a guard word, whose ids are cut off
    again: the tokenizer drops a blank at the edge of a text, and the document would lose a space
    where we happened to cut it.
    """
    guard = "x"
    bos = np.array([tokenizer.bos_id()], dtype=np.int32)
    skip = len(tokenizer.encode(guard))
    guarded = [not part.starts_document and part.text[0] in BLANKS for part in parts]
    texts = []
    for part, is_guarded in zip(parts, guarded, strict=True):
        texts.append(guard + part.text if is_guarded else part.text)
    # As many threads as there are cores; the ids are the same with any number.
    encoded = tokenizer.encode(texts, return_type="numpy", num_threads=os.cpu_count())
    pieces = []
    for part, ids, is_guarded in zip(parts, encoded, guarded, strict=True):
        if part.starts_document:
            ids = np.concatenate([bos, ids])
        pieces.append(ids[skip:] if is_guarded else ids)
    return pieces


def write_split(
    tokenizer: spm.SentencePieceProcessor, texts: Iterable[str], writer: ShardWriter
) -> int:
    """Write every text as BOS + pieces; returns the bytes of the texts in UTF-8."""
    text_bytes = 0
    for parts in encoding_batches(texts):
        for ids in encode_parts(tokenizer, parts):
            writer.write(ids)
        text_bytes += sum(len(part.text.encode("utf-8")) for part in parts)
    writer.close()
    return text_bytes


def split_facts(split: Split, text_bytes: int) -> dict:
    """What the manifest says about a split.

    text_bytes counts the input's text, decoded_bytes what the tokens spell: nmt_nfkc folds runs of
    white space, so the second is smaller. It is what val_bpb divides by, and what tokens_per_byte
    refers to.
    """
    return {
        "documents": len(split.lengths),
        "tokens": split.tokens,
        "text_bytes": text_bytes,
        "decoded_bytes": split.text_bytes,
        "tokens_per_byte": round(split.tokens / split.text_bytes, 6),
        "unknown_pieces": split.unknown,
    }


def file_facts(path: Path) -> dict:
    """Size and SHA-256 of a finished file, and the tokens of a shard, which checks the file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    facts = {"bytes": path.stat().st_size, "sha256": digest}
    if SHARD_NAME.fullmatch(path.name):
        facts["tokens"] = shard_token_count(path)
    return facts


def refuse_endless(path: Path) -> None:
    """ValueError for a pipe or a device: it might never end, and documents are read twice."""
    # What is absent fails when it is opened.
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(
            f"{path}: found a pipe or a device; expected a file; write it to one first"
        )


def earlier_shards(out: Path) -> set[str]:
    """Names of the shards that this run will replace.

    Shards that no manifest of ours lists came from elsewhere (16 GB of published ones, say):
    deleting those would be rude, and leaving them beside ours would mix two data sets, so they are
    an error.
    """
    shards = {path.name for path in out.glob("fineweb_*.bin") if SHARD_NAME.fullmatch(path.name)}
    try:
        listed = set(json.loads((out / "manifest.json").read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):  # no manifest, or one of another kind
        listed = set()
    if shards - listed:
        raise ValueError(
            f"{out}: found {min(shards - listed)}, which no manifest.json of make_shards.py lists;"
            " expected a new folder or an earlier set; choose another --out, or delete those shards"
        )
    return shards


def write_file(path: Path, content: bytes) -> None:
    """Write a small file and force it to disk."""
    with open(path, "wb") as file:
        file.write(content)
        sync_and_close(file)


class MadeSet(NamedTuple):
    """What `make_shards` has put in place."""

    manifest: dict
    splits: dict[str, Split]
    checks: list[Check]
    lost_words: Counter[str]


def check_options(options: argparse.Namespace) -> None:
    """ValueError for the first option that cannot be."""
    for path in filter(None, (options.input, options.tokenizer)):
        refuse_endless(path)
    if not 0 <= options.seed < 2**32:
        raise ValueError(
            f"--seed {options.seed}: found no seed of numpy; expected a number from 0 to {2**32 - 1}"
        )
    if options.vocab_size and options.vocab_size > MAX_VOCAB:
        raise ValueError(
            f"--vocab-size {options.vocab_size}: found more ids than 16 bits hold;"
            f" expected at most {MAX_VOCAB}"
        )


def make_shards(options: argparse.Namespace) -> MadeSet:
    """Put a set for these documents into options.out; see `parse_arguments`.

    Everything that a user can get wrong is checked before the first byte is written.
    """
    check_options(options)
    earlier = earlier_shards(options.out)
    proto = None
    normalize = PUBLISHED.normalize
    if options.tokenizer:  # refuse a wrong tokenizer now, not after an hour of indexing
        proto = options.tokenizer.read_bytes()
        given = load_tokenizer(proto, str(options.tokenizer), options.vocab_size)
        normalize = given.normalize
    source = index_documents(options.input, options.text_key, normalize)
    rows = split_rows(source, options.val_docs, options.seed)
    if proto is None:
        size = DEFAULT_VOCAB if options.vocab_size is None else options.vocab_size
        proto = train_tokenizer(source, rows["train"], size)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=options.out) as folder:
        build = Path(folder)
        made = build_set(build, source, rows, proto, options)
        publish(build, options.out, list(made.manifest["files"]), earlier)
    return made


def build_set(
    build: Path,
    source: Source,
    rows: dict[str, np.ndarray],
    proto: bytes,
    options: argparse.Namespace,
) -> MadeSet:
    """Write tokenizer, shards and manifest into the folder `build`, and check them."""
    tokenizer = load_tokenizer(proto, "new tokenizer", options.vocab_size)
    sample = next(encoding_batches(source.texts(np.concatenate([rows["val"], rows["train"]]))))
    words, lost = lost_words(tokenizer, [part.text for part in sample])
    write_file(build / "tokenizer.model", proto)
    text_bytes = {}
    for name, chosen in rows.items():
        texts = source.texts(chosen)
        label = f"encoding {name}"
        with progress(label, len(chosen), iterable=texts, unit=" documents") as shown:
            text_bytes[name] = write_split(tokenizer, shown, ShardWriter(build, name))
    splits, checks = check_set(build, tokenizer)
    for check in checks:
        if check.verdict == "WRONG":
            raise ValueError(
                f"{options.out}: found that the new set fails a check, {check.subject}:"
                f" {check.finding}; expected none to fail, so nothing was replaced"
            )
    manifest = {
        "source": source.facts(),
        "seed": options.seed,
        "tokenizer": {
            "vocab_size": tokenizer.get_piece_size(),
            "trained_here": options.tokenizer is None,
            "training_text_limit_bytes": None if options.tokenizer else SAMPLE_BYTES,
        },
        "words": {"compared": words.total(), "lost": lost.total()},
        "splits": {name: split_facts(splits[name], text_bytes[name]) for name in rows},
        "files": {path.name: file_facts(path) for path in sorted(build.iterdir())},
    }
    write_file(build / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode("utf-8"))
    return MadeSet(manifest, splits, checks, lost)


def publish(build: Path, out: Path, files: list[str], earlier: set[str]) -> None:
    """Move a finished set into place; shards of a longer earlier set go, lest training read them.

    The manifest moves last, so that its checksums tell a set from a mixture that a crash left
    behind.
    """
    for name in files:
        os.replace(build / name, out / name)
    for name in earlier - set(files):
        (out / name).unlink()
    os.replace(build / "manifest.json", out / "manifest.json")


# --- Command line ---------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The options. --vocab-size is None unless given: only then can it contradict a tokenizer."""
    parser = argparse.ArgumentParser(
        description="Make token shards and a tokenizer from documents."
    )
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        help='file with one {"text": "..."} a line, .gz or not; or a folder of .txt, .md and such files',
    )
    parser.add_argument(
        "--text-key", default="text", help='name of the entry with the text (default "text")'
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the set; an earlier set is replaced"
    )
    parser.add_argument(
        "--vocab-size", type=int, help=f"pieces of the tokenizer (default {DEFAULT_VOCAB})"
    )
    parser.add_argument(
        "--val-docs", type=int, default=128, help="documents kept for validation (default 128)"
    )
    parser.add_argument(
        "--seed", type=int, default=1337, help="order of the documents (default 1337)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="use this SentencePiece model instead of training one"
    )
    return parser.parse_args(arguments)


def report(made: MadeSet, out: Path, seconds: float) -> None:
    """Say what was made: the checks, a warning if the tokenizer loses text, and what was dropped."""
    print_report(made.splits, made.checks)
    words = made.manifest["words"]
    if words["lost"]:
        examples = ", ".join(repr(word) for word, _ in made.lost_words.most_common(3))
        print(
            f"warning: the tokenizer loses text, which flatters val_bpb: of {words['compared']:,} words"
            f" {words['lost']:,} ({words['lost'] / words['compared']:.2%}) come back otherwise, like"
            f" {examples}; use one with byte fallback that keeps case",
            file=sys.stderr,
        )
    source = made.manifest["source"]
    print(
        f"\n{out}: complete in {seconds:.0f} s; dropped {source['doubles']:,} exact doubles,"
        f" {source['empty_documents']:,} empty documents and {source['blank_lines']:,} blank lines"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status. What a user can get wrong is one line on stderr."""
    start = time.monotonic()
    options = parse_arguments(arguments)
    try:
        made = make_shards(options)
    except OSError as error:
        place = error.filename or options.out  # a full disk is reported without a name
        print(
            f"error: {place}: {error.strerror}; expected a usable path; check it", file=sys.stderr
        )
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report(made, options.out, time.monotonic() - start)
    return 0


if __name__ == "__main__":
    sys.exit(main())
