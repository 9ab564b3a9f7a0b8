"""The downloader, run as a user runs it, against a hub on 127.0.0.1 that can fail in the ways a real one does."""

import json
import os
import pty
import re
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from download_fineweb import files_of_variant
from hub_server import COMMIT, HubServer

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "download_fineweb.py"
REPO = "willdepueoai/parameter-golf"
SHARDS = "datasets/fineweb10B_sp1024"
VAL, TRAIN = f"{SHARDS}/fineweb_val_000000.bin", f"{SHARDS}/fineweb_train_{{:06d}}.bin"
MODEL, VOCAB = "tokenizers/fineweb_1024_bpe.model", "tokenizers/fineweb_1024_bpe.vocab"
CHUNK = (
    10 * 1024 * 1024
)  # the client writes in such chunks: of a broken transfer, whole chunks are kept


def shard(tokens: int, seed: int) -> bytes:
    """The bytes of a valid shard; different seeds differ, so that mixed-up files would show."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, tokens
    ids = np.random.default_rng(seed).integers(0, 1024, tokens)
    return header.tobytes() + ids.astype("<u2").tobytes()


def manifest(**tokenizer_changes) -> bytes:
    tokenizer = {
        "name": "sp_bpe_1024",
        "model_path": MODEL,
        "vocab_path": VOCAB,
    } | tokenizer_changes
    stats = {"files_train": 3, "files_val": 2}
    names = ("fineweb10B_sp1024", "fineweb10B_byte260")
    datasets = [{"name": name, "tokenizer_name": "sp_bpe_1024", "stats": stats} for name in names]
    return json.dumps({"datasets": datasets, "tokenizers": [tokenizer]}).encode()


@pytest.fixture
def hub():
    """A healthy hub with two validation and three train shards; its paths start with the root prefix `datasets/`."""
    files = {"manifest.json": manifest(), MODEL: b"model" * 50, VOCAB: b"<pad>\t0\n"}
    files |= {f"{SHARDS}/fineweb_val_{i:06d}.bin": shard(1000 + i, seed=i) for i in range(2)}
    files |= {TRAIN.format(i): shard(2000 + i, seed=10 + i) for i in range(3)}
    with HubServer(REPO, {f"datasets/{name}": data for name, data in files.items()}) as server:
        yield server


def run(
    endpoint: str, out: Path, *args: str, stderr: int = subprocess.PIPE
) -> subprocess.CompletedProcess:
    """The script in a process of its own: no proxy, and a home that would show a second copy of the data."""
    env = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(out.parent / "home"), "HF_TOKEN": "hf_test"}
    env["HF_HUB_DISABLE_TELEMETRY"] = "1"  # so that the hub sees our requests only
    command = [
        sys.executable,
        str(SCRIPT),
        "--variant",
        "sp1024",
        "--train-shards",
        "2",
        "--out",
        str(out),
        *args,
    ]
    return subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=60
    )


def refused(result: subprocess.CompletedProcess, *fragments: str) -> None:
    """Exit 1 and a single line on stderr that says what the fragments say."""
    assert result.returncode == 1, result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(fragment in result.stderr for fragment in fragments), result.stderr
    assert "signature" not in result.stderr and "hf_test" not in result.stderr


def files_in(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
    }


def wanted(hub: HubServer, train_shards: int = 2) -> dict[str, bytes]:
    """What a complete folder holds: everything the hub has, but only the first train shards."""
    unwanted = {f"datasets/{TRAIN.format(i)}" for i in range(train_shards, 3)}
    return {
        path.removeprefix("datasets/"): data
        for path, data in hub.files.items()
        if path not in unwanted
    }


def shard_bytes(hub: HubServer) -> int:
    return sum(count for path, count in hub.bytes_sent.items() if path.endswith(".bin"))


def test_the_folder_is_the_published_one_and_a_second_run_downloads_nothing(hub, tmp_path):
    out = tmp_path / "data"
    result = run(hub.endpoint, out)
    assert (result.returncode, result.stderr) == (0, "")  # no terminal, no progress bars
    assert files_in(out) == wanted(hub)
    assert not [
        path for path in (tmp_path / "home").rglob("*") if path.is_file()
    ]  # no second copy in the cache
    assert {request.token for request in hub.requests} == {"Bearer hf_test"}
    assert {request.token for request in hub.storage_requests} == {
        None
    }  # the token stays with the hub
    first, *rest = hub.requests
    assert "/main/" in first.path and all(
        COMMIT in request.path for request in rest
    )  # one commit for all files

    hub.bytes_sent.clear()
    again = run(hub.endpoint, out)
    assert again.returncode == 0 and "0 files fetched" in again.stdout
    assert hub.bytes_sent.total() == 0

    assert run(hub.endpoint, out, "--train-shards", "3").returncode == 0
    assert files_in(out) == wanted(hub, train_shards=3)
    assert shard_bytes(hub) == len(hub.files[f"datasets/{TRAIN.format(2)}"])  # only the new one


def test_a_terminal_gets_progress_bars(hub, tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, 100))
    assert (
        run(hub.endpoint, tmp_path / "data", "--train-shards", "0", stderr=theirs).returncode == 0
    )
    assert "[3/4] fineweb_val_000000.bin: 100%" in os.read(ours, 100_000).decode()
    os.close(ours)
    os.close(theirs)


def test_a_broken_transfer_continues_where_it_stopped(hub, tmp_path):
    path, out = f"datasets/{VAL}", tmp_path / "data"
    hub.files[path] = shard(6_000_000, seed=1)
    hub.cut[path] = CHUNK + 5
    assert run(hub.endpoint, out, "--train-shards", "0").returncode == 0
    assert [request.range for request in hub.storage_requests if VAL in request.path] == [
        None,
        f"bytes={CHUNK}-",
    ]
    assert files_in(out) == wanted(hub, train_shards=0)


def test_a_run_that_dies_leaves_no_half_shard_and_the_next_one_goes_on_from_there(hub, tmp_path):
    name, out = TRAIN.format(0), tmp_path / "data"
    path = f"datasets/{name}"
    hub.files[path] = shard(6_000_000, seed=1)
    hub.cut[path], hub.status_after_cut = CHUNK + 5, 503
    refused(run(hub.endpoint, out), name, "HTTP 503", "3 attempts")
    assert len(hub.files[path]) > (out / f"{name}.part").stat().st_size == CHUNK
    assert (
        files_in(out).keys() - {f"{name}.part"} == wanted(hub, train_shards=0).keys()
    )  # the rest is whole

    hub.status.clear()
    hub.bytes_sent.clear()
    hub.storage_requests.clear()
    assert run(hub.endpoint, out).returncode == 0
    assert files_in(out) == wanted(hub)
    assert {path for path, count in hub.bytes_sent.items() if count} == {
        path,
        f"datasets/{TRAIN.format(1)}",
    }
    assert hub.storage_requests[0].range == f"bytes={CHUNK}-"


@pytest.mark.parametrize(
    ("name", "damage", "complaint"),
    [
        (VAL, lambda good: b"", "got 0 bytes"),
        (VAL, lambda good: good[:-2], "expected 3024"),
        (VAL, lambda good: good[:-2] + b"\xff\xff", "hash"),
        (VOCAB, lambda good: good[:-1] + b"!", "hash"),
    ],
    ids=["zero-byte shard", "truncated shard", "altered shard", "altered vocabulary"],
)
def test_bytes_that_are_not_those_the_hub_lists_never_get_a_final_name(
    hub, tmp_path, name, damage, complaint
):
    path, out = f"datasets/{name}", tmp_path / "data"
    hub.sent_instead[path] = damage(hub.files[path])
    refused(run(hub.endpoint, out), name, complaint, "3 attempts")
    assert not [
        found for found in files_in(out) if found.startswith(name)
    ]  # not as NAME.part either


@pytest.mark.parametrize(
    ("name", "published", "complaint"),
    [
        (VAL, b"", "never 0"),
        (VAL, b"\0" * 3024, "magic"),
        (VAL, shard(1000, seed=0)[:-2], "1000 tokens"),
        (MODEL, b"", "never 0"),
    ],
    ids=["zero-byte shard", "not a shard", "cut shard", "zero-byte model"],
)
def test_a_file_that_was_published_broken_is_refused_although_it_is_what_the_hub_lists(
    hub, tmp_path, name, published, complaint
):
    hub.files[f"datasets/{name}"] = published
    refused(run(hub.endpoint, tmp_path / "data"), name, complaint)
    assert name not in files_in(tmp_path / "data")


@pytest.mark.parametrize("tail", [b"", b"\0\0"], ids=["cut short", "tail of zeros"])
def test_a_damaged_local_file_is_fetched_again_and_only_that_one(hub, tmp_path, tail):
    """The tail of zeros is what a copy onto a full disk can look like: the right length, the wrong bytes."""
    out = tmp_path / "data"
    assert run(hub.endpoint, out).returncode == 0
    (out / VAL).write_bytes((out / VAL).read_bytes()[:-2] + tail)
    (out / f"{VAL}.part").write_bytes(b"x" * 9999)  # longer than the file: no use to anybody
    hub.bytes_sent.clear()
    assert run(hub.endpoint, out).returncode == 0
    assert files_in(out) == wanted(hub)
    assert (
        hub.bytes_sent.total()
        == hub.bytes_sent[f"datasets/{VAL}"]
        == len(hub.files[f"datasets/{VAL}"])
    )


def test_a_mistake_in_the_arguments_is_one_line_with_the_remedy(hub, tmp_path):
    out = tmp_path / "data"
    refused(run(hub.endpoint, out, "--variant", "sp99"), "sp99", "available: sp1024, byte260")
    refused(run(hub.endpoint, out, "--train-shards", "4"), "4", "only 3 train shards")
    refused(run(hub.endpoint, out, "--train-shards", "-1"), "-1")
    hub.listed_size[f"datasets/{VAL}"] = 10**18
    refused(run(hub.endpoint, out), str(out), "1000000000.0 GB to fetch")
    assert shard_bytes(hub) == 0


def test_a_manifest_cannot_choose_where_files_go(hub, tmp_path):
    """Neither out of the folder, nor over a script that lives in it."""
    for hostile in (
        "../../x.model",
        "/tmp/x.model",
        "tokenizers/../x.model",
        "download_fineweb.py",
        "",
    ):
        with pytest.raises(ValueError, match=re.escape(repr(hostile))):
            files_of_variant(json.loads(manifest(vocab_path=hostile)), "sp1024", 1)

    hub.files["datasets/manifest.json"] = manifest(model_path="../../x.model")
    hub.files["datasets/../../x.model"] = b"harm"
    refused(run(hub.endpoint, tmp_path / "data"), "../../x.model")
    assert files_in(tmp_path).keys() == {"data/manifest.json"}


@pytest.mark.parametrize("text", [b"not json", b'{"datasets": [{}]}'])
def test_a_manifest_of_another_kind_is_one_line(hub, tmp_path, text):
    hub.files["datasets/manifest.json"] = text
    refused(run(hub.endpoint, tmp_path / "data"), "manifest.json")


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "HF_TOKEN"), (404, "manifest.json"), (503, "manifest.json")]
)
def test_a_hub_that_refuses_is_one_line(hub, tmp_path, status, hint):
    hub.status["datasets/manifest.json"] = status
    refused(run(hub.endpoint, tmp_path / "data"), f"HTTP {status}", hint)


def test_a_server_that_is_no_hub_is_one_line(hub, tmp_path):
    hub.commit_header = {}
    refused(run(hub.endpoint, tmp_path / "data"), hub.endpoint, "HF_ENDPOINT")


def test_a_shard_that_the_hub_lacks_is_named_before_anything_is_fetched(hub, tmp_path):
    del hub.files[f"datasets/{TRAIN.format(1)}"]
    refused(run(hub.endpoint, tmp_path / "data"), TRAIN.format(1))
    assert shard_bytes(hub) == 0


def test_an_unreachable_hub_is_one_line_soon(tmp_path):
    with socket.socket() as closed:
        closed.bind(
            ("127.0.0.1", 0)
        )  # bound but not listening: connections are refused, and nobody else gets the port
        start, endpoint = time.monotonic(), f"http://127.0.0.1:{closed.getsockname()[1]}"
        refused(run(endpoint, tmp_path / "data"), endpoint)
    assert time.monotonic() - start < 30
