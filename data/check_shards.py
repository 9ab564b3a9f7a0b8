"""Check a folder of shards for what train_gpt.py has no time to look at on every start.

    python data/check_shards.py data/mine
    T=data/tokenizers/fineweb_1024_bpe.model
    python data/check_shards.py data/datasets/fineweb10B_sp1024 --tokenizer $T

Prints what the set holds, then one line a check: `ok`, `note` for what one should know, or `WRONG`.
The exit status is 1 if anything is wrong. Every byte is read once and nothing is written.
make_shards.py runs the same checks on what it has made, before it gives it its name.
"""

import argparse
import hashlib
import json
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece as spm
from tqdm import tqdm

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
SHARD_NAME = re.compile(r"fineweb_(train|val)_(\d{6})\.bin")
LENGTHS = (256, 1024, 4096, 16384)  # tokens: up to these in the table of documents
SAMPLE = 32  # documents of each shard that go through the tokenizer and back
PROBE = "Le Café in ZÜRICH, mixed Case"
PUBLISHED_VALIDATION = (50_000, 62_021_846)  # documents and tokens of the game's validation set


# --- One shard, one tokenizer ---------------------------------------------------------------------


def shard_token_count(path: str | Path) -> int:
    """Number of tokens that the shard's header promises and its file holds.

    A file that was cut short would otherwise train on less data than its log says, so size and
    header must agree.
    """
    path = Path(path)
    size = path.stat().st_size
    remedy = "make or download this shard again"
    if size < HEADER_BYTES:
        expected = f"expected a header of {HEADER_BYTES} bytes"
        raise ValueError(f"{path}: found {size} bytes; {expected}; {remedy}")
    header = np.fromfile(path, dtype="<i4", count=3)
    magic, version = header[:2].tolist()
    count = int(header[2])
    if (magic, version) != (MAGIC, VERSION):
        found = f"found magic {magic} and version {version}; expected {MAGIC} and {VERSION}"
        raise ValueError(f"{path}: {found}; {remedy}")
    if count < 1 or size != HEADER_BYTES + 2 * count:
        found = f"found {size} bytes and {count} tokens in the header"
        expected = f"expected {HEADER_BYTES} + 2 bytes a token, at least one"
        raise ValueError(f"{path}: {found}; {expected}; {remedy}")
    return count


def open_tokenizer(proto: bytes, name: str) -> spm.SentencePieceProcessor:
    """The tokenizer in these bytes. ValueError unless it is one that val_bpb can be computed with."""
    try:
        if not proto:  # SentencePiece takes an empty file for a tokenizer without pieces
            raise RuntimeError
        tokenizer = spm.SentencePieceProcessor(model_proto=proto)
    except RuntimeError:
        raise ValueError(
            f"{name}: found no SentencePiece model; expected a .model file; give another file"
        ) from None
    found = f"{name}: found {tokenizer.get_piece_size()} pieces"
    if tokenizer.bos_id() < 0:
        raise ValueError(
            f"{found} but no BOS; expected BOS, which starts every document; use another tokenizer"
        )
    # Without it byte fallback spells a lone space as three bytes, and all three would count.
    if tokenizer.piece_to_id("▁") == tokenizer.unk_id():
        raise ValueError(
            f"{found} but no '▁'; expected that piece, else spaces miscount; use another tokenizer"
        )
    return tokenizer


class ByteCounter:
    """Counts the UTF-8 bytes of documents from their ids, as val_bpb does.

    Pieces that stand for no text (control, unknown, unused) count 0, byte pieces 1, every other one
    what it spells, with `▁` for a space.
    """

    def __init__(self, tokenizer: spm.SentencePieceProcessor):
        ids = list(range(tokenizer.get_piece_size()))
        pieces = tokenizer.id_to_piece(ids)
        silent = np.array(tokenizer.is_control(ids)) | tokenizer.is_unknown(ids)
        sizes = np.array([len(piece.replace("▁", " ").encode()) for piece in pieces])
        sizes[tokenizer.is_byte(ids)] = 1
        self.is_text = ~(silent | tokenizer.is_unused(ids))
        self.is_spaced = np.array([piece.startswith("▁") for piece in pieces])
        self.sizes = sizes * self.is_text  # (vocabulary,) bytes, a leading space included

    def count(self, document: np.ndarray) -> int:
        """Bytes of the text of one document: (n,) ids, BOS first.

        A space behind what is no text, as BOS is, does not count: a tokenizer with a dummy prefix
        adds one in front of every document.
        """
        added = self.is_spaced[document[1:]] & ~self.is_text[document[:-1]]
        return int(self.sizes[document].sum() - added.sum())


def progress(label: str, total: int | None, **options) -> tqdm:
    """A bar on stderr if that is a terminal, otherwise one that shows nothing."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(desc=label, total=total, disable=not is_terminal, **options)


# --- One pass over the set ------------------------------------------------------------------------


class Shard(NamedTuple):
    """What the checks need to know of one file."""

    name: str
    sha256: str
    top_id: int
    has_bos: bool
    begins_with_bos: bool


@dataclass
class Split:
    """What the shards of one split hold, after `survey`."""

    shards: list[Shard] = field(default_factory=list)
    lengths: array = field(default_factory=lambda: array("I"))  # tokens, BOS included
    digests: array = field(default_factory=lambda: array("Q"))  # documents without unknown pieces
    sample: list[np.ndarray] = field(default_factory=list)
    tokens: int = 0
    text_bytes: int = 0
    unknown: int = 0

    def describe(self) -> str:
        """Documents, tokens and bytes in words."""
        sizes = (
            f"{len(self.lengths):,} documents, {self.tokens:,} tokens, {self.text_bytes:,} bytes"
        )
        return f"{sizes}, {self.text_bytes / max(1, self.tokens):.3f} bytes a token"


def shard_paths(folder: Path, split: str) -> list[Path]:
    """The shards of a split, in order."""
    paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    return [path for path in paths if SHARD_NAME.fullmatch(path.name)]


def read_documents(paths: list[Path], split: Split, bos: int, vocabulary: int) -> Iterator:
    """Every document, (n,) ids with BOS first; one may go on in the next shard.

    Notes in `split` what each shard is. What stands before the first BOS, often
    nothing, comes as a document, too.
    """
    document = np.zeros(0, dtype="<u2")
    for path in paths:
        content = path.read_bytes()
        tokens = np.frombuffer(content, dtype="<u2", offset=HEADER_BYTES)
        starts = np.flatnonzero(tokens == bos)
        digest = hashlib.sha256(content).hexdigest()
        begins = tokens[0] == bos
        split.shards.append(Shard(path.name, digest, int(tokens.max()), starts.size > 0, begins))
        # Ids beyond the vocabulary are reported by themselves; the rest is still looked at.
        pieces = np.split(np.minimum(tokens, vocabulary - 1), starts)
        document = np.append(document, pieces[0])
        for following in pieces[1:]:
            yield document
            document = following
    yield document


def survey(folder: Path, name: str, tokenizer: spm.SentencePieceProcessor) -> Split:
    """Read the shards of the split `name` once. ValueError if one is no shard."""
    split = Split()
    counter = ByteCounter(tokenizer)
    paths = shard_paths(folder, name)
    total = sum(2 * shard_token_count(path) for path in paths)
    sampled = Counter()
    vocabulary = tokenizer.get_piece_size()
    with progress(f"checking {name}", total, unit="B", unit_scale=True) as bar:
        for document in read_documents(paths, split, tokenizer.bos_id(), vocabulary):
            if document.size == 0:
                continue
            unknown = int((document == tokenizer.unk_id()).sum())
            split.lengths.append(document.size)
            split.tokens += document.size
            split.text_bytes += counter.count(document)
            split.unknown += unknown
            # Unknown pieces stand for any text, so that equal ids would not show equal documents.
            if unknown == 0:
                digest = hashlib.blake2b(document.tobytes(), digest_size=8).digest()
                split.digests.append(int.from_bytes(digest))
            shard = len(split.shards)
            if unknown == 0 and sampled[shard] < SAMPLE:
                sampled[shard] += 1
                split.sample.append(document)
            bar.update(2 * document.size)
    return split


# --- The checks -----------------------------------------------------------------------------------


class Check(NamedTuple):
    """One line of the report."""

    verdict: str  # "ok", "note" or "WRONG"
    subject: str
    finding: str


def judge(subject: str, wrong: object, good: str) -> Check:
    """`good`, unless something is wrong, in words or in a list of which the first few are named."""
    if not wrong:
        return Check("ok", subject, good)
    if isinstance(wrong, str):
        return Check("WRONG", subject, wrong)
    named = ", ".join(wrong[:5])
    return Check("WRONG", subject, f"{named} ({len(wrong)} in all)")


def missing_shards(folder: Path) -> list[str]:
    """Names that are lacking between 000000 and the last shard of each split."""
    missing = []
    for split in ("val", "train"):
        names = [path.name for path in shard_paths(folder, split)]
        last = int(SHARD_NAME.fullmatch(names[-1])[2]) if names else 0
        expected = [f"fineweb_{split}_{number:06d}.bin" for number in range(last + 1)]
        missing += [name for name in expected if name not in names]
    return missing


def equal_files(shards: list[Shard]) -> list[str]:
    """Pairs of shards with the same bytes."""
    seen = {}
    pairs = []
    for shard in shards:
        first = seen.setdefault(shard.sha256, shard.name)
        if first != shard.name:
            pairs.append(f"{first} = {shard.name}")
    return pairs


def miscounted_documents(sample: list[np.ndarray], tokenizer: spm.SentencePieceProcessor) -> int:
    """How many documents of the sample have other bytes when they are decoded than when counted.

    The decoder knows nothing of the table in ByteCounter, so that the two check each other.
    Documents with byte pieces, which may be invalid UTF-8, are left out.
    """
    counter = ByteCounter(tokenizer)
    ids = list(range(tokenizer.get_piece_size()))
    is_byte = np.array(tokenizer.is_byte(ids))
    # Text is decoded behind an anchor: by itself the decoder would drop a leading space.
    anchor = next(i for i in ids if tokenizer.decode([i]).strip().isalnum())
    before = len(tokenizer.decode([anchor]).encode())
    wrong = 0
    for document in sample:
        if is_byte[document].any():
            continue
        spelled = len(tokenizer.decode([anchor, *document.tolist()]).encode()) - before
        added = counter.is_spaced[document[1:2]].sum()  # right behind BOS
        wrong += counter.count(document) != spelled - added
    return wrong


def surviving_share(sample: list[np.ndarray], tokenizer: spm.SentencePieceProcessor) -> float:
    """Share of the ids that come back when documents are decoded and encoded again.

    Their order is not looked at. Another tokenizer of the same size spells other text with the same
    ids, and would have split that text otherwise. A lossy tokenizer passes: its text is lost already.
    """
    same = 0
    total = 0
    for document in sample:
        ids = Counter(document[1:].tolist())
        again = Counter(tokenizer.encode(tokenizer.decode(document.tolist())))
        same += (ids & again).total()
        total += ids.total()
    return same / total if total else 1.0


def check_tokenizer(splits: dict[str, Split], tokenizer: spm.SentencePieceProcessor) -> list[Check]:
    """Whether this tokenizer made the shards, counts their bytes right and loses no text."""
    sample = splits["val"].sample + splits["train"].sample
    share = surviving_share(sample, tokenizer)
    lossy = (
        "" if share >= 0.99 else f"only {share:.1%} of the ids: another tokenizer made the shards"
    )
    miscounted = miscounted_documents(sample, tokenizer)
    wrong = f"{miscounted} documents decode to another number of bytes" if miscounted else ""
    silent = [f"{name} has none" for name in splits if splits[name].text_bytes == 0]
    checks = [
        judge("text", silent, "in every split"),
        judge("round trip", lossy, f"{share:.2%} of the ids of {len(sample)} documents come back"),
        judge("byte counts", wrong, "those of the decoded text"),
    ]
    spelled = tokenizer.decode(tokenizer.encode(PROBE))
    if spelled != PROBE:
        lost = f"the tokenizer loses text, which flatters the score: {spelled!r} of {PROBE!r}"
        checks.append(Check("note", "lossy tokenizer", lost))
    unknown = sum(split.unknown for split in splits.values())
    if unknown:
        checks.append(Check("note", "unknown pieces", f"{unknown:,}, which count as 0 bytes"))
    return checks


def check_manifest(folder: Path, splits: dict[str, Split], proto: bytes) -> Check:
    """Whether shards and tokenizer, whose bytes are `proto`, are those of the manifest beside them."""
    hashes = {shard.name: shard.sha256 for split in splits.values() for shard in split.shards}
    hashes["tokenizer.model"] = hashlib.sha256(proto).hexdigest()
    try:
        listed = json.loads((folder / "manifest.json").read_bytes())["files"]
        expected = {name: facts["sha256"] for name, facts in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Check("note", "manifest", "no manifest.json here that lists hashes")
    differing = sorted(expected.items() ^ hashes.items())
    names = sorted({name for name, _ in differing})
    return judge("manifest", names, f"{len(hashes)} files have the hashes that it lists")


def check_files(folder: Path, splits: dict[str, Split], vocabulary: int) -> list[Check]:
    """What can be said of the shards without decoding them."""
    val, train = splits["val"], splits["train"]
    shards = val.shards + train.shards
    beyond = [f"{shard.name} has {shard.top_id}" for shard in shards if shard.top_id >= vocabulary]
    without_bos = [shard.name for shard in shards if not shard.has_bos]
    for split in (val, train):
        without_bos += [shard.name for shard in split.shards[:1] if not shard.begins_with_bos]
    shared = int(np.isin(train.digests, val.digests).sum())
    overlap = f"{shared:,} documents of training are in validation, too" if shared else ""
    known = {shard.name for shard in shards}
    others = sorted(path.name for path in folder.glob("*.bin") if path.name not in known)
    sizes = (len(val.lengths), val.tokens)
    is_published = (
        "the published set's" if sizes == PUBLISHED_VALIDATION else "not the published set's"
    )
    checks = [
        judge("missing shards", missing_shards(folder), "none"),
        judge("equal files", equal_files(shards), "none"),
        judge("ids", beyond, f"all below {vocabulary}, the size of the vocabulary"),
        judge("BOS", without_bos, "in every shard, and first in each split"),
        judge("training on validation", overlap, "no document is in both"),
        Check("note", "validation", f"documents and tokens are {is_published}"),
    ]
    if others:
        checks.append(Check("note", "other files", f"{', '.join(others[:5])}: never read"))
    return checks


def check_set(
    folder: Path, tokenizer: spm.SentencePieceProcessor
) -> tuple[dict[str, Split], list[Check]]:
    """Read a whole set; return what its splits hold, and every check that needs no manifest.

    ValueError if a file is no shard at all.
    """
    splits = {name: survey(folder, name, tokenizer) for name in ("val", "train")}
    checks = check_files(folder, splits, tokenizer.get_piece_size())
    return splits, checks + check_tokenizer(splits, tokenizer)


# --- The report and the command line --------------------------------------------------------------


def print_report(splits: dict[str, Split], checks: list[Check]) -> None:
    """What the set holds, documents by length, and one line a check."""
    for name, split in splits.items():
        print(f"{name}: {split.describe()}")
    print("\ndocuments by tokens         val       train")
    counts = {
        name: np.digitize(split.lengths, LENGTHS, right=True) for name, split in splits.items()
    }
    for row, label in enumerate([*(f"up to {limit:,}" for limit in LENGTHS), "more"]):
        val, train = ((counts[name] == row).sum() for name in ("val", "train"))
        print(f"{label:<19}{val:>12,}{train:>12,}")
    print()
    for check in checks:
        print(f"{check.verdict:<7}{check.subject:<24}{check.finding}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status, 1 if something is wrong."""
    parser = argparse.ArgumentParser(description="Check a folder of shards for train_gpt.py.")
    parser.add_argument("folder", type=Path, help="what DATA_PATH names")
    parser.add_argument(
        "--tokenizer", type=Path, help="the SentencePiece model; default: FOLDER/tokenizer.model"
    )
    options = parser.parse_args(arguments)
    model = options.tokenizer or options.folder / "tokenizer.model"
    try:
        proto = model.read_bytes()
        splits, checks = check_set(options.folder, open_tokenizer(proto, str(model)))
        checks.append(check_manifest(options.folder, splits, proto))
    except OSError as error:
        expected = "expected a folder of shards and, there or by --tokenizer, their tokenizer"
        print(f"error: {error.filename}: {error.strerror}; {expected}; check it", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_report(splits, checks)
    wrong = sum(check.verdict == "WRONG" for check in checks)
    print(f"\n{options.folder}: {wrong} of {len(checks)} checks found something wrong")
    return min(1, wrong)


if __name__ == "__main__":
    sys.exit(main())
