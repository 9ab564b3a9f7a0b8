"""Download the published FineWeb shards and their tokenizer from the Hugging Face hub.

    python data/download_fineweb.py --variant sp1024 --train-shards 80     # 16 GB: 8 billion tokens
    python data/download_fineweb.py --variant sp1024 --train-shards 1      # 0.3 GB, to try things

The folder looks like the published one, so the defaults of train_gpt.py find it:

    OUT/manifest.json                                       which datasets and tokenizers exist
    OUT/datasets/fineweb10B_sp1024/fineweb_val_000000.bin   every validation shard, always
    OUT/datasets/fineweb10B_sp1024/fineweb_train_000000.bin the first --train-shards training shards
    OUT/tokenizers/fineweb_1024_bpe.model (and .vocab)

Run it again after any failure. What is whole on disk is not fetched again, and a file that broke
off continues where it stopped: it grows as NAME.part and gets its name only once its bytes are
known to be the published ones, so a trainer that reads fineweb_train_*.bin never meets half a
shard. HF_ENDPOINT and HF_TOKEN work as in every program that uses the hub.

Two variables choose another dataset repo of the same layout, as for the published downloader:
MATCHED_FINEWEB_REPO_ID, and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX, the folder of manifest.json there.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path, PurePosixPath

from check_shards import shard_token_count
from huggingface_hub import RepoFile, get_hf_file_metadata, get_paths_info, hf_hub_url
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.sha import git_hash

REPO = os.environ.get("MATCHED_FINEWEB_REPO_ID", "willdepueoai/parameter-golf")
# ROOT/NAME in the repo becomes OUT/NAME here; the root of the repo itself is "".
ROOT = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
MANIFEST = "manifest.json"
# Per file; within an attempt the client reconnects up to five times in a row without progress.
ATTEMPTS = 3

# --------------------------------------------------------------------------------------------------
# What to fetch: names are relative to ROOT on the hub and to OUT here
# --------------------------------------------------------------------------------------------------


def files_of_variant(manifest: dict, variant: str, train_shards: int) -> list[str]:
    """Every file the variant needs, small ones first: mistakes show before gigabytes have moved."""
    datasets = {entry["name"]: entry for entry in manifest["datasets"]}
    dataset = datasets.get(f"fineweb10B_{variant}")
    if dataset is None:
        available = ", ".join(name.removeprefix("fineweb10B_") for name in datasets)
        raise ValueError(f"--variant {variant} does not exist; available: {available}")
    stats = dataset["stats"]
    if train_shards > stats["files_train"]:
        raise ValueError(
            f"--train-shards {train_shards}: {variant} has only {stats['files_train']} train shards"
        )
    tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
    names = tokenizer_files(tokenizers[dataset["tokenizer_name"]], variant)
    for split, count in (("val", stats["files_val"]), ("train", train_shards)):
        names += [f"datasets/{dataset['name']}/fineweb_{split}_{i:06d}.bin" for i in range(count)]
    for name in names:
        refuse_outside(name)
    return names


def tokenizer_files(entry: dict, variant: str) -> list[str]:
    """The files of a tokenizer entry; published manifests name them by one key or another."""
    keys = ("model_path", "vocab_path", "path")
    names = list(dict.fromkeys(entry[key] for key in keys if entry.get(key) is not None))
    if not any(PurePosixPath(name).suffix == ".model" for name in names):
        found = ", ".join(names) or "no file"
        raise ValueError(
            f"--variant {variant}: found a tokenizer with {found}; expected a SentencePiece .model,"
            " which train_gpt.py reads; choose another variant"
        )
    return names


def remote_path(name: str) -> str:
    """Where the repo keeps a file."""
    return f"{ROOT}/{name}".lstrip("/")


def refuse_outside(name: str) -> None:
    """A manifest is a stranger's text: it may name data, not `../.bashrc` or a script of ours."""
    parts = PurePosixPath(name).parts
    if not parts or parts[0] not in ("datasets", "tokenizers") or ".." in parts:
        raise ValueError(
            f"{MANIFEST} names {name!r}, which is not beneath datasets/ or tokenizers/;"
            " nothing fetched"
        )


def look_up(names: list[str], revision: str) -> dict[str, RepoFile]:
    """Size and content hash of each file at that revision, from one request for all of them."""
    paths = {remote_path(name): name for name in names}
    found = get_paths_info(REPO, list(paths), revision=revision, repo_type="dataset")
    files = [info for info in found if isinstance(info, RepoFile)]
    remote = {paths[info.path]: info for info in files if info.path in paths}
    missing = [name for name in names if name not in remote]
    if missing:
        raise ValueError(
            f"{ENDPOINT} has no {remote_path(missing[0])} in {REPO}"
            f" ({len(missing)} of {len(names)} missing)"
        )
    return remote


# --------------------------------------------------------------------------------------------------
# Fetching one file
# --------------------------------------------------------------------------------------------------


def verify(path: Path, remote: RepoFile) -> None:
    """Raise ValueError unless the file holds exactly what the hub lists, and a shard is a shard.

    The hash is checked on files that were already here too: a copy that lost its tail to a full
    disk often keeps its length. The hub lists sha256 for large files and git's own hash for small
    ones.
    """
    size = path.stat().st_size
    if size == 0 or size != remote.size:
        raise ValueError(f"got {size} bytes; expected {remote.size}, and never 0")
    with path.open("rb") as file:
        if remote.lfs is not None:
            found, expected = hashlib.file_digest(file, "sha256").hexdigest(), remote.lfs.sha256
        else:
            found, expected = git_hash(file.read()), remote.blob_id
    if found != expected:
        raise ValueError(f"got bytes with hash {found}; expected {expected}")
    if remote.path.endswith(".bin"):
        shard_token_count(path)


def is_whole(path: Path, remote: RepoFile) -> bool:
    """Whether a file under its final name can stay."""
    try:
        verify(path, remote)
    except (ValueError, FileNotFoundError):
        return False
    return True


def transfer(partial: Path, remote: RepoFile, revision: str, label: str) -> None:
    """Append to the partial file what it still lacks.

    This is the transfer inside hf_hub_download, which we do not call: it deletes a partial file
    when it fails, so that nothing could continue in the next run. Nothing passes through ~/.cache
    either.
    """
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as file:
        here = file.tell()
        # Otherwise nothing is lacking, and verify says whether the bytes are right.
        if here < remote.size:
            url = hf_hub_url(REPO, remote.path, revision=revision, repo_type="dataset")
            headers = build_hf_headers()
            http_get(url, file, resume_size=here, headers=headers, displayed_filename=label)


def fetch(target: Path, remote: RepoFile, revision: str, label: str) -> None:
    """Bring one verified file to its final name, or raise ValueError after a few attempts.

    A broken connection keeps the partial file, because its bytes are worth continuing; bytes that
    arrived and are wrong are thrown away, because nothing tells which of them are.
    """
    partial = target.with_name(f"{target.name}.part")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            transfer(partial, remote, revision, label)
            try:
                verify(partial, remote)
            except ValueError:
                partial.unlink()
                raise
            os.replace(partial, target)  # same folder, hence same filesystem, hence all or nothing
            return
        # HTTPError: whatever goes wrong on the wire.
        except (ValueError, OSError, HTTPError) as error:
            if attempt == ATTEMPTS:
                raise ValueError(
                    f"{remote.path}: {describe(error)} ({ATTEMPTS} attempts)"
                ) from error
            if isinstance(error, HTTPError):
                time.sleep(1)  # a host that stumbled needs a moment; wrong bytes do not


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


def fetch_manifest(out: Path) -> str:
    """Bring the current manifest here; return its commit, from which all other files come, too."""
    url = hf_hub_url(REPO, remote_path(MANIFEST), repo_type="dataset")
    # Also the request that finds out, in bounded time, who answers.
    revision = get_hf_file_metadata(url).commit_hash
    if revision is None:  # a login page of some network, for example
        raise ValueError(
            f"{ENDPOINT} does not answer like a hub; check HF_ENDPOINT and the proxy settings"
        )
    remote = look_up([MANIFEST], revision)[MANIFEST]
    if not is_whole(out / MANIFEST, remote):
        fetch(out / MANIFEST, remote, revision, MANIFEST)
    return revision


def require_space(out: Path, todo: dict[str, RepoFile]) -> None:
    """Refuse now what would otherwise fill the disk an hour from now."""
    partials = [out / f"{name}.part" for name in todo]
    needed = sum(file.size for file in todo.values()) - sum(
        path.stat().st_size for path in partials if path.exists()
    )
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(f"--out {out}: {needed / 1e9:.1f} GB to fetch, {free / 1e9:.1f} GB free")


def download(variant: str, train_shards: int, out: Path) -> None:
    """Everything the variant needs, in OUT: look first, then fetch what is not there."""
    if train_shards < 0:
        raise ValueError(f"--train-shards {train_shards}: must be 0 or more")
    out.mkdir(parents=True, exist_ok=True)
    revision = fetch_manifest(out)
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        names = files_of_variant(manifest, variant, train_shards)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{out / MANIFEST} is not a manifest this script can read: {error!r}"
        ) from error
    remote = look_up(names, revision)
    total = sum(file.size for file in remote.values())
    print(
        f"{variant}: {len(names)} files, {total / 1e9:.2f} GB; checking what is here already",
        flush=True,
    )
    todo = {name: remote[name] for name in names if not is_whole(out / name, remote[name])}
    require_space(out, todo)
    for i, (name, file) in enumerate(todo.items(), start=1):
        fetch(out / name, file, revision, label=f"[{i}/{len(todo)}] {PurePosixPath(name).name}")
    print(
        f"{out}: complete, {len(todo)} files fetched and verified,"
        f" {len(names) - len(todo)} were here already"
    )


def describe(error: Exception) -> str:
    """One line a user can act on; the client's messages run over several and repeat signed URLs."""
    if isinstance(error, HfHubHTTPError):
        status, url = error.response.status_code, str(error.response.url).split("?")[0]
        return f"HTTP {status} from {url}" + (
            "; a private repo needs HF_TOKEN" if status in (401, 403) else ""
        )
    text = " ".join(str(error).split()) or type(error).__name__
    return f"no transfer from {ENDPOINT}: {text}" if isinstance(error, HTTPError) else text


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Download published FineWeb shards and their tokenizer."
    )
    parser.add_argument(
        "--variant", default="sp1024", help="which published tokenization (default %(default)s)"
    )
    parser.add_argument(
        "--train-shards", type=int, default=80, help="first N train shards (default %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="default: beside this script",
    )
    args = parser.parse_args()
    # The client warns about every reconnect; our one line says what came of it.
    hub_logging.set_verbosity_error()
    try:
        download(args.variant, args.train_shards, args.out)
    except (ValueError, OSError, HTTPError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
