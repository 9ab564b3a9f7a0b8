"""The downloader, run as a user runs it, against a hub on 127.0.0.1 that can fail in the ways a real one does."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
from threading import Thread

import download_fineweb
import numpy as np
import pytest
from conftest import folder_bytes, shard_bytes
from hub_server import COMMIT, HubServer, describe
from huggingface_hub import RepoFile

VAL = "datasets/fineweb10B_sp1024/fineweb_val_000000.bin"
VAL_2 = "datasets/fineweb10B_sp1024/fineweb_val_000001.bin"
TRAIN = [f"datasets/fineweb10B_sp1024/fineweb_train_{i:06d}.bin" for i in range(3)]
MODEL = "tokenizers/fineweb_1024_bpe.model"
VOCAB = "tokenizers/fineweb_1024_bpe.vocab"
CHUNK = 10 * 2**20  # the client writes in such chunks: of a broken transfer, whole chunks are kept


def shard(tokens):
    """The bytes of a valid shard; different lengths differ, so that mixed-up files would show."""
    return shard_bytes(np.arange(tokens))


def manifest(vocab=VOCAB):
    tokenizer = {"name": "sp_bpe_1024", "model_path": MODEL, "vocab_path": vocab}
    dataset = {"name": "fineweb10B_sp1024", "tokenizer_name": "sp_bpe_1024"}
    dataset["stats"] = {"files_train": 3, "files_val": 2}
    return json.dumps({"datasets": [dataset], "tokenizers": [tokenizer]}).encode()


@pytest.fixture
def hub():
    """A healthy hub with two validation and three train shards."""
    files = {"manifest.json": manifest(), MODEL: b"model", VOCAB: b"<pad>\t0\n", VAL: shard(1000)}
    files |= {name: shard(2000 + i) for i, name in enumerate([VAL_2, *TRAIN])}
    with HubServer(files) as server:
        Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield server
        server.shutdown()


def run(hub, out, *args, stderr=subprocess.PIPE):
    """The script in a process of its own, with a home that would show a second copy of the data."""
    env = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_test", "no_proxy": "*"}
    env |= {"HF_HOME": str(out.parent / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, download_fineweb.__file__, "--train-shards", "2", "--out", out]
    return subprocess.run(
        [*command, *args], env=env, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=30
    )


def assert_refused(result, *fragments):
    """Exit 1 and a single line on stderr that says what the fragments say, and no secrets."""
    assert result.returncode == 1
    assert re.fullmatch("error: .*\n", result.stderr)
    for fragment in fragments:
        assert fragment in result.stderr
    assert not re.search("signature|hf_test", result.stderr)


def wanted(hub, train_shards=2):
    """What a complete folder holds: everything the hub has, but only the first train shards."""
    files = hub.files.items()
    return {name: data for name, data in files if name not in TRAIN[train_shards:]}


def downloaded(hub):
    """Names of the files whose bytes were asked for since the last call."""
    names = [request.name for request in hub.downloads]
    hub.downloads.clear()
    return names


def test_the_folder_is_the_published_one_and_a_second_run_downloads_nothing(hub, tmp_path):
    out = tmp_path / "data"
    result = run(hub, out)
    assert (result.returncode, result.stderr) == (0, "")  # no terminal, no progress bars
    assert folder_bytes(out) == wanted(hub)
    assert folder_bytes(tmp_path / "home") == {}  # no second copy in the cache
    assert {request.token for request in hub.requests} == {"Bearer hf_test"}
    assert {request.token for request in hub.downloads} == {None}  # the token stays with the hub
    assert all(COMMIT in request.url for request in hub.requests[1:])  # one commit for all files
    downloaded(hub)
    again = run(hub, out)
    assert again.returncode == 0
    assert "0 files fetched" in again.stdout
    hub.files["manifest.json"] += b" "
    assert run(hub, out, "--train-shards", "3").returncode == 0
    assert folder_bytes(out) == wanted(hub, train_shards=3)
    assert downloaded(hub) == ["manifest.json", TRAIN[2]]


def test_a_terminal_gets_progress_bars(hub, tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, 100))
    run(hub, tmp_path / "data", stderr=theirs)
    assert "[3/6] fineweb_val_000000.bin: 100%" in os.read(ours, 100_000).decode()


def test_a_run_that_dies_leaves_no_half_shard_and_the_next_one_goes_on_from_there(hub, tmp_path):
    out = tmp_path / "data"
    broken = TRAIN[0]
    hub.files[broken] = shard(6_000_000)
    hub.cut[broken] = CHUNK + 5
    assert_refused(run(hub, out), broken, "HTTP 503", "3 attempts")
    assert (out / f"{broken}.part").stat().st_size == CHUNK
    assert folder_bytes(out).keys() - {f"{broken}.part"} == wanted(hub, train_shards=0).keys()
    hub.status.clear()
    hub.downloads.clear()
    assert run(hub, out).returncode == 0
    assert folder_bytes(out) == wanted(hub)
    assert hub.downloads[0].range == f"bytes={CHUNK}-"
    assert downloaded(hub) == TRAIN[:2]


def test_bytes_that_are_not_those_the_hub_lists_never_get_a_final_name(hub, tmp_path):
    out = tmp_path / "data"
    hub.claims[VAL] = describe(f"datasets/{VAL}", bytes(len(hub.files[VAL])))
    assert_refused(run(hub, out), VAL, "hash", "3 attempts")
    assert folder_bytes(out).keys() == {"manifest.json", MODEL, VOCAB}  # not as VAL.part either
    assert downloaded(hub).count(VAL) == 3


def test_a_damaged_local_file_is_fetched_again_and_only_that_one(hub, tmp_path):
    out = tmp_path / "data"
    assert run(hub, out).returncode == 0
    (out / VAL).write_bytes(b"damaged")
    (out / f"{VAL}.part").write_bytes(b"x" * 9999)  # longer than the file: no use to anybody
    downloaded(hub)
    assert run(hub, out).returncode == 0
    assert folder_bytes(out) == wanted(hub)
    assert downloaded(hub) == [VAL]


@pytest.mark.parametrize(
    ("name", "listed", "found", "complaint"),
    [
        (VAL, shard(1000), b"", "0 bytes; expected 3024"),
        (VAL, shard(1000), shard(1000)[:-2], "3022 bytes; expected 3024"),
        (VAL, shard(1000), shard(1000)[:-2] + b"\0\0", "bytes with hash .*; expected"),
        (VOCAB, b"<pad>", b"<PAD>", "bytes with hash .*; expected"),
        # What was published broken.
        (MODEL, b"", b"", "0 bytes; expected 0, and never 0"),
        (VAL, b"\0" * 3024, b"\0" * 3024, "magic"),
    ],
    ids=range(6),
)
def test_what_is_no_published_file_is_named(name, listed, found, complaint, tmp_path):
    (tmp_path / "file").write_bytes(found)
    with pytest.raises(ValueError, match=complaint):
        download_fineweb.verify(tmp_path / "file", RepoFile(**describe(name, listed)))


def test_a_mistake_in_the_arguments_is_one_line_with_the_remedy(hub, tmp_path):
    out = tmp_path / "data"
    assert_refused(run(hub, out, "--variant", "sp99"), "sp99", "available: sp1024")
    assert_refused(run(hub, out, "--train-shards", "4"), "4", "only 3 train shards")
    assert_refused(run(hub, out, "--train-shards", "-1"), "-1")
    hub.claims[VAL] = {"size": 10**18}
    assert_refused(run(hub, out), str(out), "1000000000.0 GB to fetch")
    assert folder_bytes(out).keys() == {"manifest.json"}


def test_another_repository_whose_tokenizer_has_a_path(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "some/where")
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "else")
    text = manifest().replace(b"model_path", b"path")
    hub.files["manifest.json"] = text
    assert run(hub, tmp_path / "data").returncode == 0
    assert folder_bytes(tmp_path / "data") == wanted(hub)
    assert all("/datasets/some/where/" in request.url for request in hub.requests)
    assert all("/else/" in request.url for request in hub.downloads)
    other = json.loads(text.replace(b".model", b".json"))
    with pytest.raises(ValueError, match=r"sp1024: found .*\.json; expected a SentencePiece"):
        download_fineweb.files_of_variant(other, "sp1024", 0)


@pytest.mark.parametrize(
    "name", ["/tmp/x.vocab", "tokenizers/../x.vocab", "download_fineweb.py", ""]
)
def test_a_manifest_cannot_choose_where_files_go(name):
    """Neither out of the folder, nor over a script that lives in it."""
    with pytest.raises(ValueError, match=f"manifest.json names '{name}'"):
        download_fineweb.files_of_variant(json.loads(manifest(name)), "sp1024", 1)


@pytest.mark.parametrize("text", [b"not json", b'{"datasets": [{}]}'])
def test_a_manifest_of_another_kind_is_one_line(hub, tmp_path, text):
    hub.files["manifest.json"] = text
    assert_refused(run(hub, tmp_path / "data"), "manifest.json")


def test_a_hub_that_refuses_is_one_line(hub, tmp_path):
    hub.status["manifest.json"] = 401
    assert_refused(run(hub, tmp_path / "data"), "HTTP 401", "HF_TOKEN")


def test_a_server_that_is_no_hub_is_one_line(hub, tmp_path):
    hub.commit_header = {}
    assert_refused(run(hub, tmp_path / "data"), hub.endpoint, "HF_ENDPOINT")


def test_a_shard_that_the_hub_lacks_is_named_before_anything_is_fetched(hub, tmp_path):
    del hub.files[TRAIN[1]]
    assert_refused(run(hub, tmp_path / "data"), TRAIN[1])
    assert downloaded(hub) == ["manifest.json"]


def test_an_unreachable_hub_is_one_line_soon(hub, tmp_path):
    hub.endpoint = "http://127.0.0.1:1"  # where nobody listens
    assert_refused(run(hub, tmp_path / "data"), hub.endpoint)
