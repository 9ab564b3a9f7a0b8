"""Hostile and broken input: strangers' weights and checkpoints, damaged shards, bad settings, and a fuzzer.

What is expected everywhere: success, or one clear line. No code runs, nothing hangs, memory stays bounded, and a
refused run writes nothing but its log.
"""

import copy
import io
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import make_shards
import numpy as np
import pytest
import torch
from conftest import CONFORMANCE, CPU, EVAL_ARTIFACT, ROOT, TINY_RUN, run_script, tiny_config, tiny_model, write_shard

import train_gpt as tg

# --- What is damaged here: a small model, whole ----------------------------------------------------------------------


def good_state():
    """The weights of a small model."""
    return dict(tiny_model(tiny_config(), tg.Runtime(CPU, torch.float32)).state_dict())


def good_content():
    """An artifact's content, with two tensors quantised although they are small."""
    state = good_state()
    content = tg.quantize_state(state)
    for name in ("tok_emb.weight", "blocks.0.mlp.fc.weight"):
        scale = state[name].float().abs().amax(1) / 127
        content["quantized"][name] = (state[name].float() / scale[:, None]).round().to(torch.int8)
        content["scales"][name] = scale.half()
        content["dtypes"][name] = content["passthrough_orig_dtypes"].pop(name)
        content["qmeta"][name] = {"scheme": "per_row", "axis": 0}
        del content["passthrough"][name]
    return content


def saved(content):
    """The bytes of torch.save."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, buffer := io.BytesIO())
    return buffer.getvalue()


def in_form(kind, blob):
    """The file that holds what torch.save gave: .ptz compressed, .pt as it is, .state behind its digest."""
    return {"ptz": zlib.compress, "pt": bytes, "state": lambda b: sha256(b).digest() + b}[kind](blob)


def use_weights(path):
    """All that the program does with a file of weights before it uses them."""
    state = tg.read_weights(path)
    model = tg.GPT(tg.shape_from_weights(state, tg.Config(), path), torch.float32)
    tg.load_weights(model, state, path)


def use(path):
    """Read a file of any kind by the function that is meant for it."""
    reader = {".state": tg.load_state, ".bin": tg.open_shard}.get(path.suffix, use_weights)
    return reader(path)


def assert_one_line(error):
    """A message for a person: one line, not empty, nothing that moves the cursor, of bounded length."""
    line = str(error)
    clean = bool(line) and line.isprintable() and len(line) < 1000
    assert clean, f"{len(line)} characters: {line!r:.300}"


def assert_refused(path):
    """A `UserError` of one line that begins with the file's name."""
    with pytest.raises(tg.UserError) as refused:
        use(path)
    assert_one_line(refused.value)
    assert str(refused.value).startswith(f"{path}: ")


def not_refused(paths):
    """{name: what is wrong with how it was refused} of those files that were not, or not in one line."""
    wrong = {}
    for path in paths:
        try:
            assert_refused(path)
        except (Exception, pytest.fail.Exception) as error:
            wrong[path.name] = f"{type(error).__name__}: {error}"[:200]
    return wrong


# --- Pickles and zip files written by hand ---------------------------------------------------------------------------


def text(value):
    """Pickle instructions that push a string, half surrogates included."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    """Pickle instructions that push an integer of any size."""
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def several(*parts):
    """Pickle instructions that push a tuple."""
    return b"(" + b"".join(parts) + b"t"


def call(function, *arguments):
    """Pickle instructions that call a function, named "module name", with arguments that are instructions."""
    return b"c" + function.replace(" ", "\n").encode() + b"\n" + several(*arguments) + b"R"


def mapping(**entries):
    """Pickle instructions that push a dict of instructions."""
    return b"}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u"


def tensor(size, stride, numel, kind="FloatStorage", offset=0):
    """Pickle instructions that push a tensor over storage 0, whatever is claimed about it."""
    kind = b"ctorch\n" + kind.encode() + b"\n"
    storage = several(text("storage"), kind, text("0"), text("cpu"), number(numel)) + b"Q"
    sizes = (several(*map(number, numbers)) for numbers in (size, stride))
    hooks = call("collections OrderedDict")
    return call("torch._utils _rebuild_tensor_v2", storage, number(offset), *sizes, b"\x89", hooks)


def nest(depth, value=b"}", join=lambda a: b"h" + a + b"h" + a + b"\x86"):
    """Instructions for a list of `depth` objects, each made of the one before it twice; the last is at its memo."""
    layers = [value + b"q\x00"] + [join(bytes([i])) + b"q" + bytes([i + 1]) for i in range(depth)]
    return b"](" + b"".join(layers) + b"e"


def last_of(depth):
    """Instructions that push the last object of `nest`."""
    return b"h" + bytes([depth])


def zipped(pickle, storages=None, compression=zipfile.ZIP_STORED, protocol=2):
    """A file as torch.save lays it out, around a pickle and storages of our own."""
    entries = {"data.pkl": b"\x80" + bytes([protocol]) + pickle + b".", "version": b"3\n", "byteorder": b"little"}
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", compression) as archive:
        for name, data in (entries | {f"data/{key}": data for key, data in (storages or {}).items()}).items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def rezipped(blob, change):
    """A torch.save file whose entries went through `change`, a function of a dict from names to bytes."""
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name, data in change(entries).items():
            archive.writestr(name, data)
    return buffer.getvalue()


def with_pickle(blob, change):
    """A torch.save file whose data.pkl went through `change`, a function of bytes."""
    return rezipped(blob, lambda e: {n: change(d) if n.endswith("data.pkl") else d for n, d in e.items()})


def two_directories(blob, name, claimed):
    """A zip file with two directories: the one that zipfile reads, right before the end, claims a size of `name`."""
    end = blob[-22:]
    size, offset = struct.unpack("<II", end[12:20])
    real, fake, at = blob[offset : offset + size], bytearray(blob[offset : offset + size]), 0
    while at < size:
        lengths = struct.unpack("<HHH", fake[at + 28 : at + 34])
        if fake[at + 46 : at + 46 + lengths[0]] == name:
            fake[at + 24 : at + 28] = struct.pack("<I", claimed)
        at += 46 + sum(lengths)
    return blob[:offset] + real + fake + end


class Call:
    """Pickles to a call, as a hostile file would."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


# --- 1. Artifacts and state dicts ------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
EMB, FC, GAIN, Q = "tok_emb.weight", "blocks.0.mlp.fc.weight", "blocks.0.attn.q_gain", "blocks.0.attn.c_q.weight"


def put(part, name, value):
    """A change of an artifact's content: `value`, or value(what was there), at content[part][name]."""

    def change(content):
        old = content[part].get(name)
        content[part][name] = value(old) if callable(value) else value

    return change


def without(*path):
    """A change of a nest of dicts: the entry at the path is gone."""

    def change(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def to(key, value):
    """A change of a dict: another value, or value(what was there)."""
    return lambda content: content.update({key: value(content.get(key)) if callable(value) else value})


def of_qint(t):
    """A quantised tensor, in torch's sense."""
    return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)


def nested(t):
    """A nested tensor of two rows of different lengths."""
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


STRANGE_TENSORS = {
    "sparse": lambda t: t.float().to_sparse(),
    "sparse csr": lambda t: t.float().reshape(-1, 1).to_sparse_csr(),
    "meta": lambda t: t.to("meta"),
    "qint8": of_qint,
    "nested": nested,
    "complex": lambda t: t.to(torch.complex64),
    "int64": lambda t: t.long(),
    "float64": lambda t: t.double(),
    "bool": lambda t: t.bool(),
    "float8": lambda t: t.float().to(torch.float8_e4m3fn),
    "text": lambda t: "text",
    "none": lambda t: None,
    "list": lambda t: t.tolist(),
    "NaN": lambda t: torch.full_like(t.float(), NAN),
    "inf": lambda t: torch.full_like(t.float(), INF),
    "cut": lambda t: t[1:],
    "flat": lambda t: t.flatten()[None, None],
    "no elements": lambda t: t[:0],
    "number": lambda t: torch.tensor(1.0),
    "repeated": lambda t: torch.ones(1).expand(10**9),
    "repeated rows": lambda t: torch.ones(1).expand(10**5, 10**5),
}
CONTENT_CHANGES = {
    "unknown format": to("__quant_format__", "int4_clean_per_row_v1"),
    "format of another type": to("__quant_format__", ["int8_clean_per_row_v1"]),
    "format with line breaks": to("__quant_format__", "int8\nerror: all is well\x1b[2J"),
    "format without end": to("__quant_format__", "x" * 10**6),
    "no format": without("__quant_format__"),
    **{f"no {part}": without(part) for part in ("quantized", "scales", "passthrough", "dtypes")},
    **{f"{part} is a list": to(part, []) for part in ("quantized", "scales", "passthrough")},
    **{f"{part} is None": to(part, None) for part in ("quantized", "scales", "passthrough", "dtypes")},
    **{f"dtype {name!r}": put("dtypes", FC, name)
       for name in ("__class__", "nn", "int64", "float64", "int8", "load", "", None, 5, ["float32"], "float32\n")},
    **{f"passthrough dtype {name!r}": put("passthrough_orig_dtypes", Q, name)
       for name in ("__class__", "nn", "int64", "float64", 5, ["float32"])},
    "quantised without dtype": without("dtypes", FC),
    "quantised without scale": without("scales", FC),
    "scale of nothing": put("scales", "nothing", torch.ones(3)),
    "twice": lambda c: c["passthrough"].update({FC: torch.ones(64, 32)}),
    "missing in both": lambda c: [c[part].pop(FC) for part in ("quantized", "scales", "dtypes")],
    "missing passthrough": without("passthrough", Q),
    "extra passthrough": put("passthrough", "surprise", torch.ones(1)),
    "extra quantised": lambda c: [c["quantized"].update(x=torch.ones(2, 2, dtype=torch.int8)),
                                  c["scales"].update(x=torch.ones(2)), c["dtypes"].update(x="float32")],
    "no tensors at all": lambda c: [c[part].clear() for part in ("quantized", "scales", "dtypes", "passthrough")],
    "NaN in one scale": put("scales", FC, lambda s: s.index_fill(0, torch.tensor([7]), NAN)),
    "inf in one scale": put("scales", FC, lambda s: s.index_fill(0, torch.tensor([7]), INF)),
    "-inf in one scale": put("scales", FC, lambda s: s.index_fill(0, torch.tensor([7]), -INF)),
    "scale that overflows": put("scales", FC, lambda s: torch.full(s.shape, 3e38)),
    "scale of int8": put("scales", FC, lambda s: torch.ones(s.shape, dtype=torch.int8)),
    "scale of int32": put("scales", FC, lambda s: torch.ones(s.shape, dtype=torch.int32)),
    "scale of bool": put("scales", FC, lambda s: torch.ones(s.shape, dtype=torch.bool)),
    "scale too short": put("scales", FC, lambda s: s[1:]),
    "scale too long": put("scales", FC, lambda s: torch.cat((s, s))),
    "scale of one": put("scales", FC, lambda s: s[:1]),
    "scale of columns": put("scales", FC, lambda s: torch.ones(32)),
    "scale of two dimensions": put("scales", FC, lambda s: s[:, None]),
    **{f"quantised {name}": put("quantized", FC, lambda q, name=name: q.to(getattr(torch, name)))
       for name in ("uint8", "int16", "float32", "bool")},
    "NaN in passthrough": put("passthrough", Q, lambda t: t.index_fill(0, torch.tensor([3]), NAN)),
    **{f"passthrough {name}": put("passthrough", Q, change) for name, change in STRANGE_TENSORS.items()},
    **{f"quantised {name} instead": put("quantized", FC, STRANGE_TENSORS[name]) for name in (
        "sparse", "meta", "qint8", "nested", "text", "none", "flat", "number", "repeated", "repeated rows")},
    **{f"scale {name} instead": put("scales", FC, STRANGE_TENSORS[name]) for name in (
        "sparse", "meta", "qint8", "nested", "text", "none", "complex", "repeated")},
    "name is a number": put("passthrough", 5, torch.ones(1)),
    "name is None": put("passthrough", None, torch.ones(1)),
    "name is a tuple": put("quantized", ("a", "b"), torch.ones(1, dtype=torch.int8)),
    "name with line breaks": put("passthrough", "a\nerror: b\r\x1b[2Jc", torch.ones(1)),
    "name with half a surrogate pair": put("passthrough", "a\ud800", torch.ones(1)),
    "name without end": put("passthrough", "a" * 100_000, torch.ones(1)),
    "block without a number": put("passthrough", "blocks.", torch.ones(1)),
    "heads of nothing": put("passthrough", GAIN, torch.ones(0)),
}  # fmt: skip
STATE_CHANGES = {
    "is a list": lambda s: list(s.values()),
    "is a tensor": lambda s: s[EMB],
    "is a number": lambda s: 5,
    "is empty": lambda s: {},
    "missing": without(FC),
    "missing embedding": without(EMB),
    "extra": to("surprise", torch.ones(1)),
    "one value is code": to(FC, Call(os.system, "touch executed")),
    **{f"{name} in place of a matrix": to(FC, change) for name, change in STRANGE_TENSORS.items()},
    **{f"{name} in place of the embedding": to(EMB, change) for name, change in STRANGE_TENSORS.items()
       if name not in ("cut", "no elements")},  # another vocabulary, which the tokenizer is held against
    **{f"{name} in place of the gains": to(GAIN, change) for name, change in STRANGE_TENSORS.items()
       if name not in ("flat", "sparse csr", "NaN")},
    "one storage under many names": lambda s: s | {f"x{i}": s[FC].view(-1) for i in range(1000)},
    "5000 blocks": lambda s: s | {f"blocks.{i}.x": torch.ones(1) for i in range(5000)},
    "name is a number": to(5, torch.ones(1)),
    "name is a tuple": to(("a", "b"), torch.ones(1)),
    "name with line breaks": to("a\nerror: b\r\x1b[2Jc", torch.ones(1)),
    "name with half a surrogate pair": to("a\ud800", torch.ones(1)),
    "name without end": to("a" * 100_000, torch.ones(1)),
}  # fmt: skip


def changed(content, change):
    """`content` after the change, which works in place or returns a new one."""
    result = change(content)
    return content if result is None or (isinstance(result, list) and "__quant_format__" in content) else result


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    """Every test works in its own folder, where `touch executed` would show."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "executed").exists()


def test_what_is_damaged_here_is_good_before(tmp_path):
    for kind, blob in (("ptz", saved(good_content())), ("pt", saved(good_state())), ("state", saved({"a": 1}))):
        (tmp_path / f"good.{kind}").write_bytes(in_form(kind, blob))
        use(tmp_path / f"good.{kind}")
        (tmp_path / f"again.{kind}").write_bytes(in_form(kind, rezipped(blob, dict)))
        use(tmp_path / f"again.{kind}")
    weights = {"w": tensor((2, 3), (3, 1), 6)}
    (tmp_path / "hand.pt").write_bytes(zipped(mapping(**weights), {"0": bytes(24)}))
    assert torch.equal(tg.read_weights(tmp_path / "hand.pt")["w"], torch.zeros(2, 3))


@pytest.mark.parametrize("case", CONTENT_CHANGES)
def test_artifacts_that_are_not_ours_are_refused(case, tmp_path):
    (tmp_path / "a.ptz").write_bytes(in_form("ptz", saved(changed(good_content(), CONTENT_CHANGES[case]))))
    assert_refused(tmp_path / "a.ptz")


@pytest.mark.parametrize("case", STATE_CHANGES)
def test_state_dicts_that_are_not_ours_are_refused(case, tmp_path):
    (tmp_path / "a.pt").write_bytes(saved(changed(good_state(), STATE_CHANGES[case])))
    assert_refused(tmp_path / "a.pt")


def code_everywhere():
    """Contents with a call in one place: as a whole, as a part, a name, a value, inside a tensor's description."""
    run = Call(os.system, "touch executed")
    yield run
    yield {run: torch.ones(1)}
    for part in good_content():
        yield good_content() | {part: run}
        yield good_content() | {part: {"w": run}}
        yield good_content() | {part: {run: torch.ones(1)}}
    for function, argument in ((eval, "open('executed', 'w')"), (exec, "open('executed', 'w')"), (open, "executed"),
                               (__import__, "antigravity"), (getattr, "x"), (torch.load, "x"), (print, "x"),
                               (subprocess.getoutput, "touch executed"), (torch.hub.load, "x")):  # fmt: skip
        yield {"w": Call(function, argument)}


def test_no_code_is_executed_from_any_part(tmp_path):
    for number_, content in enumerate(code_everywhere()):
        for kind in ("ptz", "pt", "state"):
            (tmp_path / f"{number_}.{kind}").write_bytes(in_form(kind, saved(content)))
    paths = sorted(tmp_path.iterdir())
    assert not not_refused(paths) and len(paths) == 3 * 32


def plain_files():
    """(name, bytes) of files that are no archive, or a damaged one, by the ending of what they claim to be."""
    for kind, blob in (("ptz", saved(good_content())), ("pt", saved(good_state())), ("state", saved({"a": 1}))):
        file = in_form(kind, blob)
        torch.save({"w": torch.ones(3)}, legacy := io.BytesIO(), _use_new_zipfile_serialization=False)
        yield f"empty.{kind}", b""
        yield f"legacy.{kind}", in_form(kind, legacy.getvalue())
        yield f"legacy-and-zip.{kind}", in_form(kind, legacy.getvalue() + blob)
        yield f"zip-behind-text.{kind}", in_form(kind, b"text" + blob)
        no_pickle = rezipped(blob, lambda e: {name: data for name, data in e.items() if "pkl" not in name})
        yield f"no-pickle.{kind}", in_form(kind, no_pickle)
        yield f"torchscript.{kind}", in_form(kind, rezipped(blob, lambda e: e | {"archive/constants.pkl": b"."}))
        yield f"no-storage.{kind}", in_form(kind, zipped(mapping(w=tensor((2,), (1,), 2))))
        for share in (0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999):
            yield f"cut-{share}.{kind}", file[: max(1, int(share * len(file)))]
            yield f"cut-inside-{share}.{kind}", in_form(kind, blob[: max(1, int(share * len(blob)))])
        yield f"cut-1.{kind}", file[:-1]
        if kind != "pt":  # torch reads a zip file from its end, and other bytes behind it are a comment at most
            yield f"longer.{kind}", file + b"x"
    yield "digest.state", bytes(32) + saved({"a": 1})


def test_files_that_are_no_whole_archives_are_refused(tmp_path):
    for name, blob in plain_files():
        (tmp_path / name).write_bytes(blob)
    paths = sorted(tmp_path.iterdir())
    assert not not_refused(paths) and len(paths) > 70


SHAPES = {  # (size, stride, numbers in the storage) of tensors over 24 bytes
    "sizes that overflow to 0": ((2**62, 4), (1, 1), 6),
    "sizes that overflow": ((2**33, 2**33), (2**33, 1), 6),
    "a size that is negative": ((-1, 6), (1, 1), 6),
    "sizes both negative": ((-2, -3), (1, 1), 6),
    "a stride that is negative": ((2, 3), (-3, 1), 6),
    "a stride that overflows": ((2, 3), (2**63 - 1, 1), 6),
    "larger than the storage": ((1000, 1000), (1000, 1), 6),
    "a storage larger than its bytes": ((2, 3), (3, 1), 10**12),
    "a storage of negative size": ((2, 3), (3, 1), -6),
    "repeated": ((10**6, 10**6), (0, 0), 6),
    "beyond 64 bits": ((2**70,), (1,), 6),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("kind", ["FloatStorage", "CharStorage"])
def test_impossible_shapes_are_refused(case, kind, tmp_path):
    one = tensor(*SHAPES[case], kind)
    parts = dict.fromkeys(("dtypes", "passthrough_orig_dtypes", "qmeta"), mapping(w=text("float32")))
    parts |= {"__quant_format__": text("int8_clean_per_row_v1"), "passthrough": mapping()}
    parts |= {"quantized": mapping(w=one), "scales": mapping(w=tensor((), (), 6))}
    for name, blob in (("a.pt", zipped(mapping(w=one), {"0": bytes(24)})),
                       ("a.ptz", in_form("ptz", zipped(mapping(**parts), {"0": bytes(24)})))):  # fmt: skip
        (tmp_path / name).write_bytes(blob)
        assert_refused(tmp_path / name)


@contextmanager
def fifo(path):
    """A FIFO that nobody may open for reading: whoever does would wait for ever, is let go here, and is counted."""
    os.mkfifo(path)
    done, readers = threading.Event(), []

    def watch():
        while not done.wait(0.05):
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                readers.append(path)
            except OSError:  # nobody reads
                pass

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield path
    finally:
        done.set()
        thread.join()
    assert not readers, f"{path} was opened, and would have been waited for"


@pytest.mark.parametrize("kind", ["ptz", "pt", "state", "bin"])
def test_what_is_no_file_is_refused(kind, tmp_path):
    with fifo(tmp_path / f"pipe.{kind}") as path:
        assert_refused(path)
    (tmp_path / f"folder.{kind}").mkdir()
    (tmp_path / f"link.{kind}").symlink_to("nowhere")
    (tmp_path / f"loop.{kind}").symlink_to(f"loop.{kind}")
    for name in ("folder", "absent", "link", "loop"):
        assert_refused(tmp_path / f"{name}.{kind}")
    if kind != "bin":  # shards come from a listing of a folder
        assert_refused(tmp_path / f"{'x' * 300}.{kind}")


# --- 1b. Bombs: small files that ask for much memory or time ---------------------------------------------------------

BIG = 1900 * 2**20  # what the bombs would fill


def deflated(start, size):
    """A zlib stream of `start` and then `size` zeros."""
    packer = zlib.compressobj(1)
    zeros = (packer.compress(bytes(2**20)) for _ in range(size // 2**20))
    return b"".join([packer.compress(start), *zeros, packer.flush()])


def bombs():
    """(name, bytes of a torch.save file) of small files that a careless reader pays for with memory or minutes."""
    content, zeros = saved(good_content()), bytes(2**20)
    one = mapping(w=tensor((BIG // 4,), (1,), BIG // 4))
    stored = zipped(one, {"0": bytes(1000)})
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in {"data.pkl": b"\x80\x02" + one + b".", "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"archive/{name}", data)
        with archive.open("archive/data/0", "w") as entry:
            for _ in range(BIG // len(zeros)):
                entry.write(zeros)
    packed = buffer.getvalue()
    long = "".join(map(chr, range(0x100, 0xD000))) * 8
    torch.save({"w": torch.ones(3)}, legacy := io.BytesIO(), _use_new_zipfile_serialization=False)
    brackets = b"\x80\x02](" + b"]" * 30_000_000 + b"e."
    yield "zip-entry", packed
    yield "zip-entry-hidden", two_directories(packed, b"archive/data/0", 10)
    yield "zip-entry-claims-little", packed.replace(struct.pack("<I", BIG), struct.pack("<I", 1000))
    yield "zip-entry-absent", stored
    yield "pickle-packed", zipped(b"](" + b"]" * 30_000_000 + b"e", compression=zipfile.ZIP_DEFLATED)
    yield "pickle-large", zipped(b"](" + b"]" * 30_000_000 + b"e")
    yield "pickle-2MB", zipped(b"](" + b"]" * (2**21 - 100) + b"e")
    yield "pickle-strings", zipped(b"](" + text("x" * 200) * 10_000 + b"e")
    yield "pickle-other-name", rezipped(content, lambda e: e | {"archive/other.pkl": b"]" * 5_000_000})
    yield "legacy-large", legacy.getvalue()[:10] + brackets
    yield "legacy-large-and-zip", legacy.getvalue()[: legacy.getvalue().index(b"}q") - 2] + brackets * 2 + content
    yield "bytearray", zipped(mapping(w=call("builtins bytearray", number(BIG))))
    yield "tensor-class", zipped(mapping(w=call("torch FloatTensor", number(BIG // 4))))
    yield "punycode", zipped(mapping(w=call("_codecs encode", text(long), text("punycode"))))
    yield "nested-key", zipped(b"}(" + text("a") + nest(40, b"K\x01") + last_of(40) + b"K\x01u")
    yield "nested-list", zipped(b"}(" + text("a") + nest(40) + text("w") + last_of(40) + b"u")
    twice = nest(40, join=lambda a: b"}(" + text("a") + b"h" + a + text("b") + b"h" + a + b"u")
    yield "nested-dict", zipped(b"}(" + text("junk") + twice + text("model") + last_of(40) + b"u")
    form = {part: b"}" for part in ("quantized", "scales", "dtypes", "passthrough", "passthrough_orig_dtypes")}
    laughing = mapping(junk=nest(40), **form, __quant_format__=last_of(40))
    yield "nested-format", zipped(laughing)
    yield "deep-list", zipped(b"]" * 500_000 + b"a" * 499_999)
    yield "itself", zipped(b"}q\x00(" + text("a") + b"h\x00" + text("model") + b"h\x00u")
    yield "ten-thousand-layers", saved(claimed_layers(10_000))
    rows = torch.ones(1).expand(2**20)
    yield "repeated", saved({f"w{i}": rows for i in range(1000)} | {EMB: torch.ones(1).expand(10**5, 10**5)})


def claimed_layers(count):
    """A state dict of a few bytes a layer that claims to be a GPT of very many layers, all but the first empty."""
    state = {EMB: torch.ones(4, 2), GAIN: torch.ones(1), "blocks.0.attn.c_k.weight": torch.ones(2, 2)}
    state |= {FC: torch.ones(2, 2), "padding": torch.ones(40 * count)}
    return state | {f"blocks.{i}.": torch.ones(()) for i in range(1, count)}


# Reads every file in a fork of its own and prints what came of it, seconds, and the peak of its memory in MB.
CHILD = """
import json, os, signal, sys, time, warnings
import torch, train_gpt as tg, test_hostile as t
from pathlib import Path
torch.set_num_threads(1)
warnings.simplefilter("ignore")
for name in sys.argv[1:]:
    began, (read, write) = time.monotonic(), os.pipe()
    if not (pid := os.fork()):
        signal.alarm(20)
        try:
            t.use(Path(name))
            outcome = "success"
        except tg.UserError as error:
            outcome = f"refused: {error}"
        except BaseException as error:
            outcome = f"escaped: {type(error).__name__}: {error}"[:300]
        os.write(write, outcome.encode("utf-8", "replace")[:5000])
        os._exit(0)
    os.close(write)
    _, status, usage = os.wait4(pid, 0)
    outcome = os.read(read, 5000).decode() if not status else f"killed by signal {status}"
    os.close(read)
    print(json.dumps([name, outcome, time.monotonic() - began, usage.ru_maxrss / 1024]), flush=True)
"""


@pytest.fixture(scope="module")
def bombed(tmp_path_factory):
    """What became of each bomb in each kind of file: {name: (outcome, seconds, MB more than a good file takes)}."""
    folder = tmp_path_factory.mktemp("bombs")
    content = saved(good_content())
    (folder / "good.ptz").write_bytes(in_form("ptz", content))
    names = ["good.ptz"]
    files = [(f"{name}.{kind}", in_form(kind, blob)) for name, blob in bombs() for kind in ("ptz", "pt", "state")]
    files += [("zeros.ptz", billion := deflated(b"", BIG)), ("good-and-zeros.ptz", deflated(content, BIG))]
    files += [("good-then-zeros.ptz", in_form("ptz", content) + billion)]
    for name, blob in files:
        (folder / name).write_bytes(blob)
        names.append(name)
    command = [sys.executable, "-c", CHILD, *(str(folder / name) for name in names)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}  # no threads: it forks
    done = subprocess.run(command, capture_output=True, text=True, timeout=2000, env=env)
    rows = {Path(name).name: tuple(rest) for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert len(rows) == len(names), done.stderr
    return {name: (*row[:2], row[2] - rows["good.ptz"][2]) for name, row in rows.items()}


def test_bombs_cost_neither_memory_nor_time(bombed):
    """Refused, or read if that is harmless, in seconds and with memory that their size explains."""
    assert bombed["good.ptz"][0] == "success"
    bad = {}
    for name, (outcome, seconds, more) in bombed.items():
        print(f"{name:32} {seconds:5.1f} s {more:6.0f} MB  {outcome[:150]}")
        harmless = name == "good.ptz" or name.endswith(".state")  # what a state holds, its reader compares
        fine = outcome.startswith("refused: ") and outcome.isprintable()
        fine |= harmless and outcome == "success"
        if not fine or more > 1500 or seconds > 15:
            bad[name] = outcome[:200], seconds, more
    assert not bad


# --- 2. The whole program: one error line, status 1, nothing written but the log --------------------------------------


def pooled(work, cases):
    """{name: work(name, case)} for a dict of cases, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cases, pool.map(work, cases, cases.values()), strict=True))


def files_below(folder):
    """Names of all files below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def complaint(done, out):
    """The error line of a run that must have printed nothing else on stderr, and written its log at most."""
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines)) == (1, 1), f"status {done.returncode}: {done.stderr[-3000:]}"
    assert lines[0].startswith("error: ")
    assert_one_line(lines[0])
    assert files_below(out) in ([], ["logs/test.txt"])
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint after step 4 of the tiny run, and what it holds."""
    folder = tmp_path_factory.mktemp("trained")
    done = run_script(folder, CHECKPOINT_EVERY="4", EVAL="flat")
    assert done.returncode == 0, done.stderr
    path = folder / "checkpoints" / "test.step0000004.pt"
    return path, tg.load_state(path)


def deep(*path, value):
    """A change of a nest of dicts: `value`, or value(what was there), at the path."""

    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value(state[path[-1]]) if callable(value) else value

    return change


MUON, ADAM = ("muon", 0, "buffer"), ("adam", 0, "exp_avg")
CHECKPOINT_CHANGES = {
    "not a dict": lambda s: [1, 2],
    "a tensor": lambda s: torch.ones(3),
    "empty": lambda s: {},
    **{f"no {key}": without(key) for key in ("model", "muon", "rng", "step", "run")},
    "no tensor": without("model", FC),
    "an extra key": to("surprise", 1),
    "an extra tensor": lambda s: s["model"].update(surprise=torch.ones(1)),
    "another dtype": deep("model", FC, value=lambda t: t.half()),
    "another shape": deep("model", FC, value=lambda t: t[1:]),
    "a sparse weight": deep("model", FC, value=lambda t: t.to_sparse()),
    "a meta weight": deep("model", FC, value=lambda t: t.to("meta")),
    "a nested weight": deep("model", FC, value=nested),
    "a sparse momentum": deep(*MUON, value=lambda t: t.to_sparse()),
    "a meta moment": deep(*ADAM, value=lambda t: t.to("meta")),
    "a repeated weight": deep("model", FC, value=lambda t: torch.ones(1).expand(10**5, 10**5)),
    "NaN in the weights": deep("model", FC, value=lambda t: torch.full_like(t, NAN)),
    "NaN in the momentum": deep(*MUON, value=lambda t: torch.full_like(t, NAN)),
    "random state of garbage": deep("rng", value=lambda t: torch.full_like(t, 255)),
    "a step before the first": deep("step", value=-(10**30)),
    "a time that is no number": deep("elapsed_ms", value=NAN),
    "a negative time": deep("elapsed_ms", value=-1e300),
    "a negative position": deep("position", value=-1),
    "a position beyond 64 bits": deep("position", value=10**30),
    "other settings": deep("run", "SEED", value="7\n\x1b[2J" + "x" * 10_000),
    "settings that are numbers": deep("run", "SEED", value=5),
}  # fmt: skip


def checkpoint_cases(good):
    """(name, bytes after the digest) of checkpoints that no training may go on from."""
    for name, change in CHECKPOINT_CHANGES.items():
        state = saved_and_loaded(good)
        yield name, saved(state if (new := change(state)) is None else new)
    yield "code", saved(good | {"run": Call(os.system, "touch executed")})
    yield "itself", zipped(b"}q\x00(" + text("model") + b"h\x00u")
    yield "deep", zipped(b"}(" + text("model") + (b"}(" + text("a")) * 20_000 + b"}" + b"u" * 20_001)
    twice = nest(60, join=lambda a: b"}(" + text("a") + b"h" + a + text("b") + b"h" + a + b"u")
    yield "twice and twice again", zipped(b"}(" + text("junk") + twice + text("model") + last_of(60) + b"u")


def saved_and_loaded(state):
    """A copy that shares nothing with the state."""
    return torch.load(io.BytesIO(saved(state)), weights_only=True)


@pytest.fixture(scope="module")
def resumed(trained, tmp_path_factory):
    """How the program ends that is to go on from each of the damaged checkpoints: {name: (process, its OUT_DIR)}."""
    folder, (good, state) = tmp_path_factory.mktemp("checkpoints"), trained
    cases = {name: in_form("state", blob) for name, blob in checkpoint_cases(state)}
    cases |= {"wrong digest": bytes(32) + good.read_bytes()[32:], "zero length": b"", "cut short": good.read_bytes()[:-9]}
    cases |= {"an artifact": (CONFORMANCE / "final_model.int8.ptz").read_bytes(), "a folder": None}

    def go_on(name, blob):
        out = folder / name.replace(" ", "-")
        out.mkdir()
        path = folder / f"{out.name}.pt"
        path.mkdir() if blob is None else path.write_bytes(blob)
        return run_script(out, RESUME=str(path), ITERATIONS="8", EVAL="flat", COMPILE="0"), out

    return pooled(go_on, cases)


HARMLESS = {"a negative position", "a position beyond 64 bits"}  # another place in the data, which is endless
CHECKPOINTS = [*CHECKPOINT_CHANGES, "code", "itself", "deep", "twice and twice again", "wrong digest", "zero length",
               "cut short", "an artifact", "a folder"]  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_damaged_checkpoints_stop_the_program(case, resumed):
    done, out = resumed[case]
    assert not (out / "executed").exists()
    if case in HARMLESS and done.returncode == 0:
        return
    line = complaint(done, out)
    if case.startswith("NaN in the"):
        assert "is not finite" in line and "nothing was exported" in line
    else:
        assert f"{out}.pt" in line


PROGRAM_FILES = {
    "code.ptz": lambda: in_form("ptz", saved(good_content() | {"scales": Call(os.system, "touch executed")})),
    "code.pt": lambda: saved({"w": Call(print, "executed")}),
    "legacy.ptz": lambda: in_form("ptz", [*plain_files()][1][1]),
    "names.pt": lambda: saved(good_state() | {"a\nerror: b\x1b[2J": torch.ones(1)}),
    "surrogate.pt": lambda: saved(good_state() | {"a\ud800": torch.ones(1)}),
    "torchscript.pt": lambda: rezipped(saved(good_state()), lambda e: e | {"archive/constants.pkl": b"."}),
    "protocol.pt": lambda: zipped(b"}", protocol=4),
    "layers.pt": lambda: saved(claimed_layers(5000)),
    "zeros.ptz": lambda: deflated(b"", 2**30),
    "empty.ptz": lambda: b"",
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """How the program ends that is to score each hostile file: {name: (process, its OUT_DIR)}."""
    folder = tmp_path_factory.mktemp("artifacts")

    def score(name, make):
        (out := folder / f"out-{name}").mkdir()
        (folder / name).write_bytes(make())
        return run_script(out, EVAL_ONLY="1", MODEL_PATH=str(folder / name), VOCAB_SIZE=None), out

    return pooled(score, PROGRAM_FILES)


@pytest.mark.parametrize("case", PROGRAM_FILES)
def test_hostile_weights_stop_the_program(case, refused):
    done, out = refused[case]
    assert not (out / "executed").exists() and "executed" not in done.stdout
    assert case in complaint(done, out)
    assert "Traceback" not in (out / "logs" / "test.txt").read_text().rsplit("=" * 100, 1)[1]


# --- 3. Shards and tokenizers ----------------------------------------------------------------------------------------


def shard(magic=20240520, version=1, count=4, tokens=(1, 5, 6, 7), rest=b"", order="<"):
    """A shard with any header."""
    header = np.zeros(256, dtype=f"{order}i4")
    header[:3] = magic, version, count
    return header.tobytes() + np.asarray(tokens, dtype=f"{order}u2").tobytes() + rest


SHARDS = {
    "magic": shard(magic=20240521),
    "magic 0": shard(magic=0),
    "negative magic": shard(magic=-20240520),
    "magic of the other byte order": shard(order=">"),
    "version 0": shard(version=0),
    "version 2": shard(version=2),
    "negative version": shard(version=-1),
    "no tokens": shard(count=0, tokens=()),
    "no tokens claimed": shard(count=0),
    "negative": shard(count=-4),
    "most negative": shard(count=-(2**31)),
    "more than the file": shard(count=5),
    "most of all": shard(count=2**31 - 1),
    "less than the file": shard(count=3),
    "odd": shard(rest=b"\0"),
    "odd and short": shard()[:-1],
    "header cut": shard()[:1023],
    "header alone": shard()[:1024],
    "zero length": b"",
    "one byte": b"\0",
    "text": b"tokens\n" * 1000,
    "packed": zlib.compress(shard()),
}


@pytest.mark.parametrize("case", SHARDS)
def test_every_field_of_a_shard_is_checked(case, tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, 5, 6])
    (tmp_path / "fineweb_val_000001.bin").write_bytes(SHARDS[case])
    assert_refused(tmp_path / "fineweb_val_000001.bin")
    with pytest.raises(tg.UserError, match="fineweb_val_000001.bin: found .* expected magic"):
        tg.open_shards(str(tmp_path), "fineweb_val_*.bin")


def test_folders_that_are_none_are_refused(tmp_path):
    (tmp_path / "file").write_bytes(shard())
    (tmp_path / "loop").symlink_to("loop")
    with fifo(tmp_path / "pipe") as pipe:
        for folder in (tmp_path / "file", tmp_path / "absent", tmp_path / "loop", pipe, tmp_path, tmp_path / "a\nb"):
            with pytest.raises(tg.UserError) as refused_:
                tg.open_shards(str(folder), "fineweb_val_*.bin")
            assert str(refused_.value).startswith(f"DATA_PATH={folder}: found no ")


@pytest.fixture(scope="module")
def data_runs(tmp_path_factory):
    """How the program ends with each damaged folder of data: {name: (process, its OUT_DIR)}."""
    folder = tmp_path_factory.mktemp("data")
    pieces = {"train": [1, 5, 6, 7] * 300, "val": [1, 5, 6, 7] * 300}
    cases = {
        "last train": lambda data: write_shard(data / "fineweb_train_000001.bin", [*pieces["train"], 1024]),
        "last val": lambda data: write_shard(data / "fineweb_val_000001.bin", [*pieces["val"], 65535]),
        "header": lambda data: (data / "fineweb_train_000001.bin").write_bytes(shard(count=5)),
        "pipe": lambda data: None,
        "tokenizer pipe": lambda data: None,
        "tokenizer folder": lambda data: (data / "own.model").mkdir(),
        "tokenizer empty": lambda data: (data / "own.model").write_bytes(b""),
        "tokenizer text": lambda data: (data / "own.model").write_bytes(b"no model at all\n" * 1000),
        "tokenizer cut": lambda data: (data / "own.model").write_bytes(
            (CONFORMANCE / "tokenizer.model").read_bytes()[:10_000]),
        "tokenizer absent": lambda data: None,
    }  # fmt: skip

    def start(name, damage):
        data, out = folder / name.replace(" ", "-"), folder / f"out-{name}"
        data.mkdir()
        out.mkdir()
        for split, ids in pieces.items():
            write_shard(data / f"fineweb_{split}_000000.bin", ids)
        damage(data)
        settings = {"DATA_PATH": str(data), "MAX_VAL_DOCS": None, "ITERATIONS": "1"}
        if "tokenizer" in name:
            settings["TOKENIZER_PATH"] = str(data / "own.model")
        if "pipe" not in name:
            return run_script(out, **settings), out, ""
        try:
            with fifo(data / ("own.model" if "tokenizer" in name else "fineweb_val_000001.bin")):
                done = run_script(out, **settings)
            return done, out, ""
        except AssertionError as error:
            return done, out, str(error)

    return pooled(start, cases)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("last train", ["token id 1024, expected ids below 1024"]),
        ("last val", ["token id 65535, expected ids below 1024"]),
        ("header", ["fineweb_train_000001.bin: found", "expected magic"]),
        ("pipe", ["fineweb_val_000001.bin: found", "expected magic"]),
        *[(f"tokenizer {name}", ["TOKENIZER_PATH=", "own.model: found", "; expected"])
          for name in ("pipe", "folder", "empty", "text", "cut", "absent")],
    ],
)  # fmt: skip
def test_damaged_data_stops_the_program(case, words, data_runs):
    done, out, waited = data_runs[case]
    line = complaint(done, out)
    assert all(word in line for word in words) and not waited, (line, waited)
