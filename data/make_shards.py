"""Turn a JSONL file of {"text": ...} documents into a tokenizer and shards for train_gpt.py.

    python data/make_shards.py --jsonl docs.jsonl --out data/mine --val-docs 1000
    T=data/tokenizers/fineweb_1024_bpe.model
    python data/make_shards.py --jsonl docs.jsonl --out data/mine --tokenizer $T

Documents are shuffled with a seed; the first --val-docs of them are validation, the rest is
training text. Each one becomes BOS + pieces. Only an index of line offsets is kept in memory (8
bytes a document), and long documents are encoded in parts, so neither a 100 GB file nor a 50 MB
line needs more than a few hundred MB.

A set appears as a whole or not at all: it is built in a hidden folder inside --out and moved into
place at the end, manifest.json last. data/README.md describes the formats.
"""

import argparse
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
SHARD_TOKENS = 100_000_000  # a shard of 200 MB, the size of the published ones
SHARD_NAME = re.compile(r"fineweb_(train|val)_\d{6}\.bin")
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
SAMPLE_BYTES = (
    32_000_000  # training text shown to the tokenizer; more changes hardly a merge and costs memory
)
# What the tokenizer reduces to nothing, besides the control characters and blanks that
# str.isprintable() knows.
VANISHING = " \u2581\ufffd"

# Encoding takes up to 100 bytes of memory a character, so that long documents are cut (at one of
# these blanks) and short ones handed over in batches, which SentencePiece spreads over all cores.
PART_CHARS, BATCH_CHARS, BLANKS = 1_000_000, 4_000_000, " \n"
EXPECTED_LINE = 'expected a JSON object {"text": "..."} on every line; fix or remove this line'


# --- Shards ---------------------------------------------------------------------------------------


def shard_token_count(path: str | Path) -> int:
    """Number of tokens that the shard's header promises and its file holds.

    A file that was cut short would otherwise train on less data than its log says, so size and
    header must agree.
    """
    path, header_bytes = Path(path), 4 * HEADER_INTS
    size = path.stat().st_size
    remedy = "make or download this shard again"
    if size < header_bytes:
        raise ValueError(
            f"{path}: found {size} bytes; expected a header of {header_bytes} bytes; {remedy}"
        )
    magic, version, count = np.fromfile(path, dtype="<i4", count=3).tolist()
    if (magic, version) != (MAGIC, VERSION):
        found = f"found magic {magic} and version {version}; expected {MAGIC} and {VERSION}"
        raise ValueError(f"{path}: {found}; {remedy}")
    if count < 1 or size != header_bytes + 2 * count:
        found = f"found {size} bytes and {count} tokens in the header"
        raise ValueError(
            f"{path}: {found}; expected {header_bytes} + 2 bytes a token, at least one; {remedy}"
        )
    return count


class ShardWriter:
    """Appends token ids to fineweb_{split}_000000.bin, ...; a document may straddle two shards.

    The number of tokens is known only at the end of a shard, so its header is written last.
    """

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        self.file, self.shards, self.count = None, 0, 0

    def write(self, ids: np.ndarray) -> None:
        """Append ids (any integer type, all below 65536), starting new shards as they fill."""
        while ids.size:
            if self.file is None:
                path = self.folder / f"fineweb_{self.split}_{self.shards:06d}.bin"
                self.file = path.open("wb")
                self.file.write(bytes(4 * HEADER_INTS))
                self.shards, self.count = self.shards + 1, 0
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


@dataclass
class Source:
    """Where the documents of a JSONL file start, and what was left out of them.

    The texts stay in the file: a shuffled order is read by seeking, so that memory grows with the
    number of documents (8 bytes each) and not with their length.
    """

    path: Path
    offsets: np.ndarray
    sha256: str
    blank_lines: int
    empty_documents: int

    def facts(self) -> dict:
        """What the manifest says about the source; no path: equal runs have equal manifests."""
        facts = {"name": self.path.name, "bytes": self.path.stat().st_size, "sha256": self.sha256}
        return facts | {"blank_lines": self.blank_lines, "empty_documents": self.empty_documents}

    def texts(self, rows: np.ndarray) -> Iterator[str]:
        """The documents with these row numbers, in this order.

        Each line is parsed a second time; that costs little beside its encoding, and nothing has to
        be kept.
        """
        with open(self.path, "rb") as file:
            for offset in self.offsets[rows]:
                file.seek(offset)
                yield document_text(file.readline())


def document_text(line: bytes) -> str:
    """The text of one JSONL line; ValueError says what is wrong with it, the caller where it is.

    Nothing is repaired or skipped: a corpus that is not what its maker thinks should be noticed
    now. Other entries of the object are allowed, as most corpora carry a source or a date.
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"found invalid JSON ({error}); {EXPECTED_LINE}") from None
    if not isinstance(record, dict) or "text" not in record:
        raise ValueError(f'found JSON without a "text" entry; {EXPECTED_LINE}')
    if not isinstance(record["text"], str):
        raise ValueError(f'found a "text" of type {type(record["text"]).__name__}; {EXPECTED_LINE}')
    try:
        record["text"].encode(
            "utf-8"
        )  # "\\ud800" is valid JSON but no character; SentencePiece would fail on it
    except UnicodeEncodeError as error:
        half = record["text"][error.start]
        raise ValueError(f"found {half!r}, one half of a surrogate pair; {EXPECTED_LINE}") from None
    return record["text"]


def index_documents(path: Path) -> Source:
    """Check every line and note where its document starts, before any long work begins.

    Blank lines are no documents. Text without one character that the tokenizer keeps (empty,
    spaces, control codes) is dropped as well: it would be BOS alone, with nothing to predict. The
    manifest counts both.
    """
    offsets, digest, blank, empty, offset = [], hashlib.sha256(), 0, 0, 0
    chunks = [np.zeros(0, dtype=np.int64)]
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            digest.update(line)
            try:
                if not line.strip():
                    blank += 1
                elif any(c.isprintable() and c not in VANISHING for c in document_text(line)):
                    offsets.append(offset)
                else:
                    empty += 1
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: {error}") from None
            offset += len(line)
            if (
                len(offsets) == 65536
            ):  # a list of integers takes 5 times the memory of an array: pack it now and then
                chunks.append(np.array(offsets, dtype=np.int64))
                offsets = []
    chunks.append(np.array(offsets, dtype=np.int64))
    return Source(path, np.concatenate(chunks), digest.hexdigest(), blank, empty)


def split_rows(source: Source, val_docs: int, seed: int) -> dict[str, np.ndarray]:
    """Row numbers of the validation and training documents, shuffled.

    RandomState rather than default_rng: NumPy promises that its stream never changes between
    versions.
    """
    documents = len(source.offsets)
    if documents == 0:
        raise ValueError(
            f'{source.path}: found no documents; expected lines of {{"text": "..."}};'
            " give another file"
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
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=training_sample(source, rows),
            model_writer=model,
            vocab_size=max(
                vocab_size, 4
            ),  # with less it fails before it has counted how many pieces it needs
            **TOKENIZER_SETTINGS,
        )
    except RuntimeError as error:
        # "100 vs 346." when the bytes and characters alone need 346, "<= 900." when the text has no
        # more merges.
        bound = re.search(r"(vs|<=) (\d+)\.", str(error))
        limit = (
            f"at {'least' if bound[1] == 'vs' else 'most'} {bound[2]}"
            if bound
            else f"usable text ({error})"
        )
        raise ValueError(
            f"--vocab-size {vocab_size}: found that SentencePiece cannot make it from"
            f" {source.path}; expected {limit}; choose another size"
        ) from None
    return model.getvalue()


def load_tokenizer(proto: bytes, name: str, vocab_size: int | None) -> spm.SentencePieceProcessor:
    """The tokenizer in these bytes, fit for shards; vocab_size None accepts any size."""
    try:
        if not proto:  # SentencePiece takes an empty file for a tokenizer without pieces
            raise RuntimeError
        tokenizer = spm.SentencePieceProcessor(model_proto=proto)
    except RuntimeError:
        raise ValueError(
            f"{name}: found no SentencePiece model; expected a .model file; give another file"
        ) from None
    found = f"{name}: found {tokenizer.get_piece_size()} pieces"
    if vocab_size not in (None, tokenizer.get_piece_size()):
        raise ValueError(f"{found}; expected --vocab-size {vocab_size}; change it or leave it out")
    if tokenizer.get_piece_size() > MAX_VOCAB:
        raise ValueError(
            f"{found}; expected at most {MAX_VOCAB}, as shards hold 16-bit ids;"
            " use a smaller vocabulary"
        )
    if tokenizer.bos_id() < 0:
        raise ValueError(
            f"{found} but no BOS; expected BOS, which starts every document; use another tokenizer"
        )
    return tokenizer


def piece_bytes(tokenizer: spm.SentencePieceProcessor) -> np.ndarray:
    """UTF-8 bytes that each id decodes to; control and unknown pieces count 0, as in val_bpb."""
    table = np.zeros(tokenizer.get_piece_size(), dtype=np.int64)
    for i in range(len(table)):
        if tokenizer.is_byte(i):
            table[i] = 1
        elif not (tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)):
            table[i] = len(tokenizer.id_to_piece(i).replace("▁", " ").encode("utf-8"))
    return table


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
    guard, bos = "x", np.array([tokenizer.bos_id()], dtype=np.int32)
    guards = [
        guard if not part.starts_document and part.text[0] in BLANKS else "" for part in parts
    ]
    skip = len(tokenizer.encode(guard))
    encoded = tokenizer.encode(
        [g + part.text for g, part in zip(guards, parts, strict=True)], return_type="numpy"
    )
    return [
        np.concatenate([bos, ids]) if part.starts_document else ids[skip if g else 0 :]
        for g, part, ids in zip(guards, parts, encoded, strict=True)
    ]


def write_split(
    tokenizer: spm.SentencePieceProcessor, texts: Iterable[str], writer: ShardWriter
) -> dict:
    """Write every text as BOS + pieces; returns what was written, for the manifest.

    text_bytes counts the JSONL's text, decoded_bytes what the tokens spell: nmt_nfkc folds runs of
    white space, so the second is smaller. It is what val_bpb divides by, and what tokens_per_byte
    refers to.
    """
    decoded_bytes = piece_bytes(tokenizer)
    stats = dict.fromkeys(("documents", "tokens", "text_bytes", "decoded_bytes"), 0)
    for parts in encoding_batches(texts):
        for part, ids in zip(parts, encode_parts(tokenizer, parts), strict=True):
            writer.write(ids)
            stats["documents"] += part.starts_document
            stats["tokens"] += ids.size
            stats["text_bytes"] += len(part.text.encode("utf-8"))
            stats["decoded_bytes"] += int(decoded_bytes[ids].sum())
    writer.close()
    return stats | {"tokens_per_byte": round(stats["tokens"] / stats["decoded_bytes"], 6)}


def file_facts(path: Path) -> dict:
    """Size and SHA-256 of a finished file, and the tokens of a shard, which checks the file."""
    with open(path, "rb") as file:
        facts = {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
    return facts | ({"tokens": shard_token_count(path)} if SHARD_NAME.fullmatch(path.name) else {})


def refuse_endless(path: Path) -> None:
    """ValueError for a pipe or a device: it might never end, and documents are read twice."""
    if path.exists() and not (
        path.is_file() or path.is_dir()
    ):  # what is absent or a folder fails when it is opened
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


def make_shards(
    jsonl: Path, out: Path, val_docs: int, seed: int, vocab_size: int | None, model: Path | None
) -> dict:
    """Put a set for these documents into out; return its manifest. model None trains a tokenizer.

    Everything that a user can get wrong is checked before the first byte is written.
    """
    for path in filter(None, (jsonl, model)):
        refuse_endless(path)
    if not 0 <= seed < 2**32:
        raise ValueError(
            f"--seed {seed}: found no seed of numpy; expected a number from 0 to {2**32 - 1}"
        )
    if vocab_size and vocab_size > MAX_VOCAB:
        raise ValueError(
            f"--vocab-size {vocab_size}: found more ids than 16 bits hold;"
            f" expected at most {MAX_VOCAB}"
        )
    earlier = earlier_shards(out)
    proto = model.read_bytes() if model else None
    if model:  # refuse a wrong tokenizer now, not after an hour of indexing
        load_tokenizer(proto, str(model), vocab_size)
    source = index_documents(jsonl)
    rows = split_rows(source, val_docs, seed)
    proto = proto or train_tokenizer(
        source, rows["train"], DEFAULT_VOCAB if vocab_size is None else vocab_size
    )
    tokenizer = load_tokenizer(proto, "new tokenizer", vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=out) as folder:
        build = Path(folder)
        write_file(build / "tokenizer.model", proto)
        splits = {
            split: write_split(tokenizer, source.texts(rows[split]), ShardWriter(build, split))
            for split in rows
        }
        manifest = {
            "source": source.facts(),
            "seed": seed,
            "tokenizer": {
                "vocab_size": tokenizer.get_piece_size(),
                "trained_here": model is None,
                "training_text_limit_bytes": None if model else SAMPLE_BYTES,
            },
            "splits": splits,
            "files": {path.name: file_facts(path) for path in sorted(build.iterdir())},
        }
        write_file(build / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode("utf-8"))
        publish(build, out, list(manifest["files"]), earlier)
    return manifest


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
        description="Make token shards and a tokenizer from a JSONL file of documents."
    )
    parser.add_argument(
        "--jsonl", type=Path, required=True, help='file with one {"text": "..."} a line'
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


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status. What a user can get wrong is one line on stderr."""
    options = parse_arguments(arguments)
    try:
        manifest = make_shards(
            options.jsonl,
            options.out,
            options.val_docs,
            options.seed,
            options.vocab_size,
            options.tokenizer,
        )
    except OSError as error:
        place = error.filename or options.out  # a full disk is reported without a name
        print(
            f"error: {place}: {error.strerror}; expected a usable path; check it", file=sys.stderr
        )
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for split, stats in manifest["splits"].items():
        documents, tokens, size = (stats[key] for key in ("documents", "tokens", "decoded_bytes"))
        print(f"{split}: {documents:,} documents, {tokens:,} tokens, {size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
