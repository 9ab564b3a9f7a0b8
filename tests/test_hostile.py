"""Hostile and broken input: strangers' weights and checkpoints, damaged shards, bad settings, and a fuzzer.

What is expected everywhere: success, or one clear line. No code runs, nothing hangs, memory stays bounded, and a
refused run writes nothing but its log.
"""

import contextlib
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import warnings
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path

import make_shards
import numpy as np
import pytest
import torch
from conftest import CONFORMANCE, CPU, ROOT, TINY_RUN, run_script, tiny_config, tiny_model, write_shard

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


@contextlib.contextmanager
def fifo(path):
    """A FIFO, and the list of who opened it for reading: whoever does would wait for ever, and is let go here."""
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
        yield readers
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("kind", ["ptz", "pt", "state", "bin"])
def test_what_is_no_file_is_refused(kind, tmp_path):
    with fifo(tmp_path / f"pipe.{kind}") as readers:
        assert_refused(tmp_path / f"pipe.{kind}")
    assert not readers
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
    brackets = b"\x80\x02](" + b"]" * 10_000_000 + b"e."
    yield "zip-entry", packed
    yield "zip-entry-hidden", two_directories(packed, b"archive/data/0", 10)
    yield "zip-entry-claims-little", packed.replace(struct.pack("<I", BIG), struct.pack("<I", 1000))
    yield "zip-entry-absent", stored
    yield "pickle-packed", zipped(b"](" + b"]" * 10_000_000 + b"e", compression=zipfile.ZIP_DEFLATED)
    yield "pickle-large", zipped(b"](" + b"]" * 10_000_000 + b"e")
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
    yield "repeated", saved({f"w{i}": rows for i in range(1000)} | {EMB: torch.ones(1).expand(20_000, 20_000)})


def claimed_layers(count, vocab_size=4):
    """A state dict of a few bytes a layer that claims to be a GPT of very many layers, all but the first empty."""
    state = {EMB: torch.ones(vocab_size, 2), GAIN: torch.ones(1), "blocks.0.attn.c_k.weight": torch.ones(2, 2)}
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
        signal.alarm(12)
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


# Runs the script as `python train_gpt.py` does, but in forks of an interpreter that has loaded the libraries already.
FORKS = """
import json, os, runpy, signal, sys, time
import numpy, sentencepiece, torch, torch._dynamo, torch.distributed, tqdm
script, folder = sys.argv[1:]
for number, (out, env) in enumerate(json.load(sys.stdin)):
    if not (pid := os.fork()):
        os.environ.clear()
        os.environ.update(env)
        os.chdir(out)
        for stream in (1, 2):
            os.dup2(os.open(f"{folder}/{number}.{stream}", os.O_CREAT | os.O_WRONLY), stream)
        signal.alarm(60)
        sys.argv = [script]
        runpy.run_path(script, run_name="__main__")
    began, status = time.monotonic(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said = [open(f"{folder}/{number}.{stream}", errors="replace").read() for stream in (1, 2)]
    print(json.dumps([status, *said, time.monotonic() - began]), flush=True)
"""


@dataclass
class Run:
    """A run that has ended; status -14: it took more than a minute."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    out: Path


def run_forked(folder, cases, script=ROOT / "train_gpt.py"):
    """{name: Run} of {name: settings}, each with `folder`/out-NAME as its OUT_DIR; two processes share the work."""
    outs = {name: folder / f"out-{name.replace(' ', '-')}" for name in cases}

    def work(names, half):
        tasks = []
        (half := folder / f"streams-{half}").mkdir()
        for name in names:
            outs[name].mkdir()
            env = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1", "COMPILE": "0"}
            env |= {"OUT_DIR": str(outs[name]), "RUN_ID": "test"} | TINY_RUN | cases[name]
            tasks.append((str(outs[name]), {key: value for key, value in env.items() if value is not None}))
        done = subprocess.run([sys.executable, "-c", FORKS, str(script), str(half)], input=json.dumps(tasks),
                              capture_output=True, text=True, timeout=1200, env=os.environ | {"OMP_NUM_THREADS": "1"},
                              cwd=folder)  # fmt: skip
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(rows) == len(names), done.stderr
        return {name: Run(*row, outs[name]) for name, row in zip(names, rows, strict=True)}

    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(work, ([*cases][::2], [*cases][1::2]), (0, 1)))
    return halves[0] | halves[1]


def files_below(folder):
    """Names of all files below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def complaint(done):
    """The error line of a run that must have printed nothing else on stderr, and written its log at most."""
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines)) == (1, 1), f"status {done.returncode}: {done.stderr[-3000:]}"
    assert lines[0].startswith("error: ")
    assert_one_line(lines[0])
    assert files_below(done.out) in ([], ["logs/test.txt"])
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint after step 2 of the tiny run, and what it holds."""
    folder = tmp_path_factory.mktemp("trained")
    done = run_script(folder, CHECKPOINT_EVERY="2", EVAL="flat")
    assert done.returncode == 0, done.stderr
    path = folder / "checkpoints" / "test.step0000002.pt"
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
    """How the program ends that is to go on from each of the damaged checkpoints."""
    folder, (good, state) = tmp_path_factory.mktemp("checkpoints"), trained
    cases = {name: in_form("state", blob) for name, blob in checkpoint_cases(state)}
    whole = good.read_bytes()
    cases |= {"wrong digest": bytes(32) + whole[32:], "zero length": b"", "cut short": whole[:-9]}
    cases |= {"an artifact": (CONFORMANCE / "final_model.int8.ptz").read_bytes(), "a folder": None}

    for name, blob in cases.items():
        path = folder / f"{name.replace(' ', '-')}.pt"
        path.mkdir() if blob is None else path.write_bytes(blob)
        cases[name] = {"RESUME": str(path), "EVAL": "flat"}
    return run_forked(folder, cases)


HARMLESS = {"a negative position", "a position beyond 64 bits"}  # another place in the data, which is endless
CHECKPOINTS = [*CHECKPOINT_CHANGES, "code", "itself", "deep", "twice and twice again", "wrong digest", "zero length",
               "cut short", "an artifact", "a folder"]  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_damaged_checkpoints_stop_the_program(case, resumed):
    done = resumed[case]
    assert not (done.out / "executed").exists()
    if case in HARMLESS and done.returncode == 0:
        return
    line = complaint(done)
    if case.startswith("NaN in the"):
        assert "is not finite" in line and "nothing was exported" in line
    else:
        assert f"/{case.replace(' ', '-')}.pt: " in line


def published():
    """Weights that fit the tokenizer of the runs here."""
    return torch.load(CONFORMANCE / "init.pt", weights_only=True)


PROGRAM_FILES = {
    "code.ptz": lambda: in_form("ptz", saved(good_content() | {"scales": Call(os.system, "touch executed")})),
    "code.pt": lambda: saved({"w": Call(print, "executed")}),
    "legacy.ptz": lambda: in_form("ptz", [*plain_files()][1][1]),
    "names.pt": lambda: saved(published() | {"a\nerror: b\x1b[2J": torch.ones(1)}),
    "surrogate.pt": lambda: saved(published() | {"a\ud800": torch.ones(1)}),
    "torchscript.pt": lambda: rezipped(saved(good_state()), lambda e: e | {"archive/constants.pkl": b"."}),
    "protocol.pt": lambda: zipped(b"}", protocol=4),
    "layers.pt": lambda: saved(claimed_layers(5000, 1024)),
    "zeros.ptz": lambda: deflated(b"", 2**30),
    "empty.ptz": lambda: b"",
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """How the program ends that is to score each hostile file."""
    folder = tmp_path_factory.mktemp("artifacts")
    for name, make in PROGRAM_FILES.items():
        (folder / name).write_bytes(make())
    return run_forked(folder, {name: {"EVAL_ONLY": "1", "MODEL_PATH": str(folder / name)} for name in PROGRAM_FILES})


@pytest.mark.parametrize("case", PROGRAM_FILES)
def test_hostile_weights_stop_the_program(case, refused):
    done = refused[case]
    assert not (done.out / "executed").exists() and "executed" not in done.stdout
    line = complaint(done)
    assert case in line and (done.out / "logs" / "test.txt").read_text().endswith(f"{line}\n")


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
    with pytest.raises(tg.UserError, match=r"fineweb_val_000001\.bin: found .* expected magic"):
        tg.open_shards(str(tmp_path), "fineweb_val_*.bin")


def test_folders_that_are_none_are_refused(tmp_path):
    (tmp_path / "file").write_bytes(shard())
    (tmp_path / "loop").symlink_to("loop")
    with fifo(tmp_path / "pipe") as readers:
        for name in ("file", "absent", "loop", "pipe", "", "a b"):
            folder = tmp_path / name
            with pytest.raises(tg.UserError) as refused_:
                tg.open_shards(str(folder), "fineweb_val_*.bin")
            assert str(refused_.value).startswith(f"DATA_PATH={folder}: found no ")
    assert not readers


@pytest.fixture(scope="module")
def data_runs(tmp_path_factory):
    """How the program ends with each damaged folder of data, and who opened the FIFOs."""
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

    readers = {}
    with contextlib.ExitStack() as stack:
        for name, damage in cases.items():
            (data := folder / name.replace(" ", "-")).mkdir()
            for split, ids in pieces.items():
                write_shard(data / f"fineweb_{split}_000000.bin", ids)
            damage(data)
            settings = {"DATA_PATH": str(data), "MAX_VAL_DOCS": None, "ITERATIONS": "1"}
            if "tokenizer" in name:
                settings["TOKENIZER_PATH"] = str(data / "own.model")
            if "pipe" in name:
                pipe = data / ("own.model" if "tokenizer" in name else "fineweb_val_000001.bin")
                readers[name] = stack.enter_context(fifo(pipe))
            cases[name] = settings
        runs = run_forked(folder, cases)
    return runs, readers


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
    runs, readers = data_runs
    line = complaint(runs[case])
    assert all(word in line for word in words) and not readers.get(case), line


# --- 4. JSONL for data/make_shards.py --------------------------------------------------------------------------------


def make(folder, jsonl, *options):
    """make_shards.py as a process: (status, stdout, stderr, peak MB)."""
    command = [sys.executable, make_shards.__file__, "--jsonl", str(jsonl), "--out", str(folder / "set"), *options]
    with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
    killer = threading.Timer(120, process.kill)
    killer.start()
    _, status, usage = os.wait4(process.pid, 0)
    killer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    said = (folder / "stdout").read_text(), (folder / "stderr").read_text()
    return process.returncode, *said, usage.ru_maxrss / 1024


GOOD_LINES = b'{"text": "three good words, and nine bad ones beside them"}\n' * 3
LINES = {
    "a raw NUL in a string": (b'{"text": "a\0b"}\n', "line 4: found invalid JSON"),
    "a raw NUL between lines": (b"\0\n", "line 4: found invalid JSON"),
    "UTF-16": ('{"text": "words"}\n'.encode("utf-16"), "line 4: found invalid JSON"),
    "a byte-order mark": (b'\xef\xbb\xbf{"text": "words"}\n', "line 4: found invalid JSON"),
    "a lone surrogate as a name": (b'{"\\ud800": 1}\n', 'without a "text" entry'),
    "a text that is a list": (b'{"text": ["words"]}\n', "type list"),
    "a text that is true": (b'{"text": true}\n', "type bool"),
    "a number of 5000 digits": (b'{"text": "words", "n": ' + b"9" * 5000 + b"}\n", "line 4: found invalid JSON"),
    "a bare string": (b'"text"\n', "line 4: found"),
    "50 MB without an end": (b'{"text": "' + b"x " * 25_000_000 + b"\n", "line 4: found invalid JSON"),
    "50 MB of another type": (b'{"text": [' + b"1," * 25_000_000 + b"1]}\n", "type list"),
    "50 MB of names": (b'{"' + b"x" * 50_000_000 + b'": 1}\n', 'without a "text" entry'),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_bad_lines_are_named_and_nothing_is_written(case, tmp_path):
    (tmp_path / "docs.jsonl").write_bytes(GOOD_LINES + LINES[case][0] + GOOD_LINES)
    status, out, err, peak = make(tmp_path, tmp_path / "docs.jsonl", "--val-docs", "1")
    assert (status, out, err.count("\n")) == (1, "", 1), err[:2000]
    assert err.startswith(f"error: {tmp_path / 'docs.jsonl'}: line 4: found") and LINES[case][1] in err
    assert "; expected " in err and peak < 1500
    assert_one_line(err.rstrip("\n"))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("option", ["--jsonl", "--tokenizer"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_what_is_no_file_makes_no_set(option, kind, tmp_path):
    (tmp_path / "docs.jsonl").write_bytes(GOOD_LINES)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with fifo(tmp_path / "pipe") as readers:
        options = [option, str(tmp_path / kind)]  # of two --jsonl the last one counts
        status, out, err, _ = make(tmp_path, tmp_path / "docs.jsonl", "--val-docs", "1", *options)
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("error: ") and f"{tmp_path / kind}: " in err and "; expected " in err
    assert not readers
    assert not (tmp_path / "set").exists()


def test_a_set_is_not_put_where_a_file_is(tmp_path):
    (tmp_path / "docs.jsonl").write_bytes(b'{"text": "one two three four"}\n' * 40)
    (tmp_path / "set").write_bytes(b"mine")
    status, out, err, _ = make(tmp_path, tmp_path / "docs.jsonl", "--val-docs", "1", "--vocab-size", "300")
    assert (status, out, err.count("\n")) == (1, "", 1) and err.startswith("error: "), err
    assert (tmp_path / "set").read_bytes() == b"mine"


def test_odd_lines_that_are_fine(tmp_path):
    """As data/README.md says: a 50 MB line is one document; NULs, names given twice and other entries are allowed."""
    rng = random.Random(3)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 8))) for _ in range(300)]
    texts = [" ".join(rng.choices(words, k=100)) for _ in range(20)]
    lines = [json.dumps({"text": words_}) for words_ in texts]
    lines[3] = json.dumps({"text": "nul \0 " + texts[3], "more": None})
    lines[4] = '{"text": 5, "n": NaN, "text": ' + json.dumps(texts[4]) + "}"
    lines[5] = json.dumps({"text": ("word" + " " * 96) * 500_000})  # folded to one space a word: quick to encode
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    assert (tmp_path / "docs.jsonl").stat().st_size > 49_000_000
    model = str(CONFORMANCE / "tokenizer.model")
    status, out, err, peak = make(tmp_path, tmp_path / "docs.jsonl", "--val-docs", "1", "--tokenizer", model)
    assert (status, err) == (0, "") and "train: 19 documents" in out and peak < 1500, (err, peak)
    total = sum(make_shards.shard_token_count(path) for path in (tmp_path / "set").glob("*.bin"))
    assert total > 500_000


# --- 5. The environment ----------------------------------------------------------------------------------------------

VALUES = ["", "-1", "-0", "0", "1", str(10**18), str(10**30), "9" * 5000, "1e300", "-1e300", "1e-300", "abc", "nan",
          "NaN", "inf", "-inf", "infinity", " 1", "1 ", "0x10", "1,2", ",", "1_000", "\u0663", "\u00bd", "True", "a\nb",
          "\x1b[2J", "\0", "\udcff", "../..", "/dev/null", "x" * 5000]  # fmt: skip


@pytest.mark.parametrize("name", [f.name for f in fields(tg.Config)] + ["world_size"])
def test_every_setting_takes_or_names_every_value(name):
    variable = name.upper()
    for value in VALUES:
        env = {"PRESET": "baseline", "DEVICE": "cpu", variable: value}
        try:
            cfg = tg.read_config(env)
        except tg.UserError as error:
            assert_one_line(error)
            named = variable in str(error) or variable.lower().replace("_", " ") in str(error)
            assert named, (value, error)
            continue
        if name != "world_size":
            kept = getattr(cfg, name)
            assert isinstance(kept, type(getattr(tg.Config(), name)))
            assert not isinstance(kept, float) or abs(kept) <= 1e18


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"TTT_CHUNK_SIZE": "129", "TTT_EVAL_SEQ_LEN": "128"}, ["TTT_CHUNK_SIZE=129", "TTT_EVAL_SEQ_LEN=128"]),
        ({"TTT_LORA_RANK": "0"}, ["TTT_LORA_RANK='0'", "from 1"]),
        ({"TTT_STREAM_RANK": "0"}, ["TTT_STREAM_RANK='0'", "from 1"]),
        ({"TTT_BATCH_SIZE": "0"}, ["TTT_BATCH_SIZE='0'", "from 1"]),
        ({"VAL_BATCH_SIZE": "0"}, ["VAL_BATCH_SIZE='0'", "from 1"]),
        ({"TRAIN_BATCH_TOKENS": "0"}, ["TRAIN_BATCH_TOKENS='0'", "from 1"]),
        ({"TRAIN_SEQ_LEN": "0"}, ["TRAIN_SEQ_LEN='0'", "from 1"]),
        ({"TRAIN_BATCH_TOKENS": str(10**18)}, ["TRAIN_BATCH_TOKENS"]),  # a multiple of 8 x 1024, and no memory for it
        ({"NUM_HEADS": "0"}, ["NUM_HEADS='0'", "from 1"]),
        ({"EVAL": "flat,ttt,flat"}, ["EVAL='flat,ttt,flat'"]),
        ({"WORLD_SIZE": "-2"}, ["WORLD_SIZE='-2'"]),
    ],
)
def test_settings_that_cannot_work_are_named(settings, named):
    with pytest.raises(tg.UserError) as refused_:
        tg.read_config({"PRESET": "baseline", "DEVICE": "cpu"} | settings)
    assert_one_line(refused_.value)
    assert all(word in str(refused_.value) for word in named), refused_.value


# What the environments of desktops, clusters, containers and build services hold.
ORDINARY = """
_ BROWSER CLASSPATH COLORTERM COLUMNS DBUS_SESSION_BUS_ADDRESS DEBIAN_FRONTEND DISPLAY EDITOR GPG_AGENT_INFO HISTSIZE
HOSTNAME INVOCATION_ID JOURNAL_STREAM LANG LANGUAGE LC_ALL LD_LIBRARY_PATH LESS LINES LOGNAME LS_COLORS MAIL MANPATH
OLDPWD OSTYPE PAGER PKG_CONFIG_PATH PS1 PWD QT_QPA_PLATFORM SHELL SHLVL SSH_AUTH_SOCK SSH_CLIENT SSH_CONNECTION
SSH_TTY SUDO_USER TERM TERM_PROGRAM TMPDIR TZ USER VISUAL WAYLAND_DISPLAY XAUTHORITY XDG_CONFIG_HOME XDG_DATA_DIRS
XDG_RUNTIME_DIR XDG_SESSION_ID CC CFLAGS CPATH CXX LDFLAGS LIBRARY_PATH MAKEFLAGS MAKELEVEL MFLAGS MODULEPATH
LOADEDMODULES CONDA_DEFAULT_ENV CONDA_EXE CONDA_PREFIX CONDA_PYTHON_EXE CONDA_SHLVL PIP_CACHE_DIR PIP_INDEX_URL
PYENV_ROOT PYENV_VERSION PYTEST_CURRENT_TEST PYTHONHASHSEED PYTHONPATH PYTHONUNBUFFERED VIRTUAL_ENV UV_CACHE_DIR
JUPYTER_SERVER_ROOT KERNEL_ID CI CI_COMMIT_SHA CI_JOB_ID CI_JOB_NAME CI_PIPELINE_ID CI_PROJECT_DIR CI_RUNNER_ID
GITHUB_ACTION GITHUB_ACTIONS GITHUB_ENV GITHUB_JOB GITHUB_PATH GITHUB_REF GITHUB_RUN_ATTEMPT GITHUB_RUN_ID
GITHUB_RUN_NUMBER GITHUB_SHA GITHUB_WORKSPACE RUNNER_ARCH RUNNER_OS RUNNER_TEMP RUNNER_TOOL_CACHE BUILD_ID
BUILD_NUMBER JENKINS_HOME JOB_NAME NODE_NAME WORKSPACE BUILDKITE_BUILD_ID CIRCLE_BUILD_NUM TRAVIS_BUILD_ID
KUBERNETES_PORT KUBERNETES_SERVICE_HOST CONTAINER_ID CUDA_HOME CUDA_VERSION CUDA_VISIBLE_DEVICES
NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NCCL_DEBUG NCCL_SOCKET_IFNAME NCCL_VERSION OMP_NUM_THREADS
MKL_NUM_THREADS OPENBLAS_NUM_THREADS NUMEXPR_MAX_THREADS GLOO_SOCKET_IFNAME MASTER_ADDR MASTER_PORT RANK LOCAL_RANK
WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE LOCAL_WORLD_SIZE ROLE_NAME ROLE_RANK ROLE_WORLD_SIZE TORCHELASTIC_ERROR_FILE
TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RESTART_COUNT TORCHELASTIC_RUN_ID TORCH_HOME TORCH_LOGS TORCHINDUCTOR_CACHE_DIR
TORCH_CUDA_ARCH_LIST PYTORCH_VERSION TRITON_CACHE_DIR HF_ENDPOINT HF_HOME HF_TOKEN TOKENIZERS_PARALLELISM
TRANSFORMERS_CACHE WANDB_API_KEY WANDB_DIR WANDB_PROJECT WANDB_RUN_ID MLFLOW_RUN_ID AWS_DEFAULT_REGION AWS_REGION
GOOGLE_APPLICATION_CREDENTIALS SLURM_ARRAY_TASK_ID SLURM_CPUS_ON_NODE SLURM_JOB_ID SLURM_JOB_NAME SLURM_JOB_NODELIST
SLURM_LOCALID SLURM_NNODES SLURM_NODEID SLURM_NTASKS SLURM_PROCID SLURM_STEP_ID SLURM_SUBMIT_DIR PBS_JOBID LSB_JOBID
RUNPOD_POD_ID http_proxy https_proxy no_proxy PROMPT_COMMAND EPOCHREALTIME DATA DATASET MODEL OUTPUT_DIR LOG_DIR
BATCH_SIZE NUM_WORKERS
""".split()  # noqa: SIM905
MISSPELT = {
    "TTT_LORA_RNK": "TTT_LORA_RANK",
    "TTT_LORA_RANKS": "TTT_LORA_RANK",
    "NUM_LAYER": "NUM_LAYERS",
    "ITERATION": "ITERATIONS",
    "EVALONLY": "EVAL_ONLY",
    "MODELPATH": "MODEL_PATH",
    "OUTDIR": "OUT_DIR",
    "MAX_WALLCLOCK_SECOND": "MAX_WALLCLOCK_SECONDS",
    "CHECKPOINT_EVRY": "CHECKPOINT_EVERY",
    "TTT_STREAM_TARGET": "TTT_STREAM_TARGETS",
    "TRAIN_BATCH_TOKEN": "TRAIN_BATCH_TOKENS",
}
# The most that these take. A run is not asked whether it can afford them: none of them costs anything by being large.
HUGE = dict.fromkeys((
    "VAL_BATCH_SIZE", "VAL_LOSS_EVERY", "TRAIN_LOG_EVERY", "MAX_VAL_DOCS", "SEED", "WARMDOWN_ITERS",
    "MUON_MOMENTUM_WARMUP_STEPS", "TTT_BATCH_SIZE", "CHECKPOINT_EVERY", "CHECKPOINT_SECONDS", "EVAL_MAX_SECONDS",
    "MAX_WALLCLOCK_SECONDS", "ROPE_BASE", "GRAD_CLIP_NORM", "ADAM_EPS"), str(10**18))  # fmt: skip
ENVIRONMENTS = {
    "misspelt": dict.fromkeys(ORDINARY, "") | dict.fromkeys(MISSPELT, "4"),
    "huge": HUGE,
    "tiny": {"VAL_BATCH_SIZE": "1", "TTT_BATCH_SIZE": "1", "MAX_VAL_DOCS": "1", "SEED": "0", "TTT_LORA_RANK": "1",
             "TTT_STREAM_RANK": "1", "TTT_CHUNK_SIZE": "1", "TTT_STREAM_CHUNK": "1", "TTT_EVAL_SEQ_LEN": "8",
             "EVAL": "flat,ttt",
             "TRAIN_SEQ_LEN": "1", "TRAIN_BATCH_TOKENS": "8", "ITERATIONS": "1"},
    "no steps": {"ITERATIONS": "0", "WARMUP_STEPS": "0"},
    "huge rates": dict.fromkeys(("MATRIX_LR", "SCALAR_LR", "TIED_EMBED_LR"), "1e18"),
    "huge gain": {"QK_GAIN_INIT": "1e18", "LOGIT_SOFTCAP": "0.001", "TIED_EMBED_INIT_STD": "1e18"},
    "names in no encoding": {"HOME": "/\udcff", "DATA_PATH": str(CONFORMANCE) + "/\udcff/.."},
    "a rank that is no number": {"RANK": "abc"},
    "a rank without a world": {"RANK": "1"},
    "a log that escapes": {"RUN_ID": "../../escaped"},
}  # fmt: skip
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    del ENVIRONMENTS["misspelt"][_name]  # torchrun's, with meaning


@pytest.fixture(scope="module")
def environments(tmp_path_factory):
    """How the program ends in each environment."""
    return run_forked(tmp_path_factory.mktemp("environments"), ENVIRONMENTS)


def test_misspelt_settings_earn_a_warning_and_others_none(environments):
    done = environments["misspelt"]
    warned = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    expected = [f"warning: {name} is no setting of this script; {meant} is" for name, meant in MISSPELT.items()]
    assert done.returncode == 0 and sorted(line.removesuffix(" partial") for line in warned) == sorted(expected)


@pytest.mark.parametrize("case", ["huge", "tiny", "no steps"])
def test_extreme_settings_work(case, environments):
    done = environments[case]
    assert (done.returncode, done.stderr) == (0, "") and "final_int8_ttt_lora val_loss:" in done.stdout


@pytest.mark.parametrize("case", ["huge rates", "huge gain", "a rank that is no number", "a rank without a world",
                                  "a log that escapes"])  # fmt: skip
def test_settings_that_end_badly_say_so(case, environments):
    line = complaint(environments[case])
    named = {"a rank that is no number": "RANK=", "a rank without a world": "RANK", "a log that escapes": "RUN_ID="}
    assert named.get(case, "not finite") in line


def test_paths_in_no_encoding_are_used_or_refused(environments):
    done = environments["names in no encoding"]
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert "DATA_PATH" in complaint(done)


def test_more_ranks_than_matrices_and_documents(tmp_path):
    """Seven ranks, a layer of six matrices, two documents: those without work still take part."""
    settings = {"NUM_LAYERS": "1", "TRAIN_BATCH_TOKENS": str(7 * 128), "ITERATIONS": "2", "MAX_VAL_DOCS": "2"}
    done = run_script(tmp_path, 7, **settings, EVAL="flat,ttt,stream", COMPILE="0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "world_size:7" in done.stdout and "num_layers:1" in done.stdout
    assert all(f"ladder condition:{name} " in done.stdout for name in ("flat", "ttt", "stream"))
    assert "ladder condition:ttt" in done.stdout and " docs:2 " in done.stdout


# --- 6. The fuzzer ---------------------------------------------------------------------------------------------------


class TooLong(BaseException):
    """A case that took more than ten seconds. No `Exception`, lest what is tested swallows it."""


@contextlib.contextmanager
def ten_seconds():
    """`TooLong` in whatever runs for more than ten seconds."""

    def ring(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


NUMBERS = [0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]


def mutated(rng, data, other):
    """`data` with one to four mistakes: bits, numbers, blocks cut, doubled, moved, or taken from `other`."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 16, 100, 1000))
        kind = rng.randrange(8)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[at : at + size]
        elif kind == 4:
            start = rng.randrange(len(other) + 1)
            data[at : at + size] = other[start : start + size]
        elif kind == 5:
            data[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS))
        elif kind == 6:
            data[at : at + size] = rng.randbytes(size)
        else:
            start = rng.randrange(len(other) + 1)
            data[at:] = other[start:]
    return bytes(data)


JUNK = [None, 0, -1, 10**30, 1.5, NAN, "", "int8", "a\nb", "\ud800", b"x", [], {}, (), [1], {"a": 1}, True]


def places(nest_, path=()):
    """The paths of all entries in a nest of dicts."""
    for key, value in nest_.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def restructured(rng, nest_):
    """A nest of dicts with one or two entries lost, renamed, exchanged, or made into something else."""
    for _ in range(rng.choice((1, 1, 2))):
        if not (paths := list(places(nest_))):
            break
        *way, key = rng.choice(paths)
        inside = nest_
        for step in way:
            inside = inside[step]
        old, kind = inside[key], rng.randrange(7)
        if kind == 0:
            del inside[key]
        elif kind == 1:
            inside[rng.choice([f"{key}x", "", "a\nb", 5, None, ("a",), *inside])] = inside.pop(key)
        elif kind == 2:
            inside[key] = rng.choice(JUNK)
        elif kind == 3:
            *other, last = rng.choice(paths)
            there = nest_
            for step in other:
                there = there.get(step, {}) if isinstance(there, dict) else {}
            inside[key] = there.get(last) if isinstance(there, dict) else None
        elif isinstance(old, torch.Tensor):
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                inside[key] = STRANGE_TENSORS[rng.choice([*STRANGE_TENSORS])](old)
        elif isinstance(old, (int, float)):
            inside[key] = rng.choice([-1, 0, 1, 10**30, NAN, INF, old + 1])
        else:
            inside[key] = rng.choice([old * 2, {}, []]) if isinstance(old, str) else old
    return nest_


def damaged_file(rng, kind, good, others):
    """(how, bytes) of a file of weights or a checkpoint with mistakes in one of its layers."""
    how, other = rng.choice(("file", "zip", "pickle", "storage", "content", "content")), rng.choice(others)
    if how == "content":
        with contextlib.suppress(Exception), warnings.catch_warnings():  # what cannot be saved is no file
            warnings.simplefilter("ignore")
            return how, in_form(kind, saved(restructured(rng, torch.load(io.BytesIO(good), weights_only=True))))
        how = "pickle"
    if how == "file":
        return how, mutated(rng, in_form(kind, good), in_form(kind, other))
    if how == "zip":
        return how, in_form(kind, mutated(rng, good, other))
    name = "data.pkl" if how == "pickle" else f"data/{rng.randrange(4)}"
    with zipfile.ZipFile(io.BytesIO(other)) as archive:
        theirs = next(archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))
    return how, in_form(kind, rezipped(good, lambda entries: {
        n: mutated(rng, data, theirs) if n.endswith(name) else data for n, data in entries.items()}))  # fmt: skip


def damaged_environment(rng):
    """Some settings with values that may be good, of the wrong kind, out of range, or mutated."""
    names = [f.name for f in fields(tg.Config)]
    env = {"DEVICE": rng.choice(("cpu", "cpu", "cpu", "auto", "tpu")), "PRESET": rng.choice(("cpu", "baseline"))}
    for name in rng.sample(names, rng.choice((1, 1, 2, 3, 8))):
        value = rng.choice([*VALUES, *(tg.spell(getattr(tg.Config(), rng.choice(names))) for _ in range(20))])
        if rng.random() < 0.5:
            value = tg.spell(getattr(tg.Config(), name))
            value = mutated(rng, value.encode(), b"-1e9,nan.5").decode("utf-8", "surrogateescape")
        env[name.upper()] = value
    env |= {"WORLD_SIZE": rng.choice(("1", "2", "3", "8", "0", "x", "-1", str(10**30)))} if rng.random() < 0.2 else {}
    return env


WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
          "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "shutil.", "socket.",
          "ctypes.dlopen", "pty.spawn")  # fmt: skip
WATCH = {"on": False, "seen": []}


def watch(event, arguments):
    """An audit hook: note what runs, connects, or writes while the watch is on."""
    if WATCH["on"] and threading.current_thread() is threading.main_thread():
        flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
        compiler = "torchinductor" in str(arguments[:1])  # where torch keeps its own, made once at any odd moment
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or (event.startswith(WRITES) and not compiler):
            WATCH["seen"].append((event, str(arguments)[:200]))


def outcome_of(work):
    """success, refused, or what went wrong."""
    WATCH["on"] = True
    try:
        with ten_seconds(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
        return "success"
    except tg.UserError as error:
        line = str(error)
        return "refused" if line and line.isprintable() and len(line) < 1000 else f"no clean line: {line!r:.300}"
    except TooLong:
        return "took more than ten seconds"
    except BaseException as error:  # SystemExit too
        return f"escaped: {type(error).__name__}: {error}"[:300]
    finally:
        WATCH["on"] = False


COUNTS = {"ptz": 900, "pt": 400, "state": 300, "bin": 400, "env": 500}


def fuzz_cases(folder, rng):
    """(kind, how it was damaged, the work to do, bytes or settings) of every case of the fuzzer."""
    trained_ = {"model": good_state(), "rng": torch.get_rng_state(), "step": 4, "elapsed_ms": 1.5, "run": {"SEED": "7"}}
    good = {"ptz": saved(good_content()), "pt": saved(good_state()), "state": saved(trained_)}
    whole = shard(count=500, tokens=np.arange(500) % 90)
    for kind, count in COUNTS.items():
        for number_ in range(count):
            path = folder / f"{number_}.{kind}"
            if kind == "env":
                env = damaged_environment(rng)
                yield kind, "settings", (lambda env=env: tg.read_config(env)), env
            elif kind == "bin":
                how = rng.choice(("header", "file"))
                head = mutated(rng, whole[:12], struct.pack("<4i", 20240520, 1, 500, -1)) + whole[12:]
                path.write_bytes(blob := head if how == "header" else mutated(rng, whole, good["pt"][:3000]))
                yield kind, how, (lambda path=path: [tokens.max() for tokens in [tg.open_shard(path)]]), blob
            else:
                how, blob = damaged_file(rng, kind, good[kind], [*good.values()])
                path.write_bytes(blob)
                yield kind, how, (lambda path=path: use(path)), blob


def test_thousands_of_damaged_inputs_succeed_or_end_in_one_line(tmp_path, capsys):
    (folder := tmp_path / "inputs").mkdir()
    (work := tmp_path / "work").mkdir()
    os.chdir(work)
    sys.addaudithook(watch)
    counts, wrong = Counter(), []
    for kind, how, act, what in fuzz_cases(folder, random.Random(20260605)):
        WATCH["seen"].clear()
        outcome = outcome_of(act)
        counts[kind, how, outcome if outcome in ("success", "refused") else "wrong"] += 1
        if outcome not in ("success", "refused") or WATCH["seen"]:
            wrong.append((kind, how, counts.total(), outcome, WATCH["seen"][:3], what if kind == "env" else ""))
    os.chdir(tmp_path)
    with capsys.disabled():
        print(f"\nfuzz: {counts.total()} cases")
        for (kind, how, outcome), count in sorted(counts.items()):
            print(f"    {kind:6} {how:9} {outcome:8} {count}")
    assert not wrong, f"{len(wrong)} of {counts.total()}: " + "\n".join(map(repr, wrong[:20]))
    assert counts.total() == sum(COUNTS.values()) >= 2000
    assert not list(work.iterdir())  # nothing was written where the reader stood
    for kind, hows in (("ptz", 5), ("pt", 5), ("state", 5), ("bin", 2), ("env", 1)):
        found = [(how, outcome) for k, how, outcome in counts if k == kind]
        assert len({how for how, _ in found}) == hows  # every layer was reached
        assert {outcome for _, outcome in found} == {"success", "refused"}  # some of the damage is harmless


def test_the_program_under_damaged_inputs(tmp_path, trained):
    """Eight whole runs, two of each kind: success, or one line and nothing but a log."""
    rng, cases, data = random.Random(11), {}, {}
    artifact = zlib.decompress((CONFORMANCE / "final_model.int8.ptz").read_bytes())
    checkpoint = trained[0].read_bytes()[32:]
    for number_ in range(2):
        (tmp_path / f"{number_}.ptz").write_bytes(damaged_file(rng, "ptz", artifact, [checkpoint])[1])
        cases[f"artifact {number_}"] = {"EVAL_ONLY": "1", "MODEL_PATH": str(tmp_path / f"{number_}.ptz")}
        (tmp_path / f"{number_}.pt").write_bytes(damaged_file(rng, "state", checkpoint, [artifact])[1])
        cases[f"checkpoint {number_}"] = {"RESUME": str(tmp_path / f"{number_}.pt"), "EVAL": "flat"}
        (data := tmp_path / f"data{number_}").mkdir()
        for split in ("train", "val"):
            whole = (CONFORMANCE / f"fineweb_{split}_000000.bin").read_bytes()
            (data / f"fineweb_{split}_000000.bin").write_bytes(mutated(rng, whole, whole))
        cases[f"shards {number_}"] = {"DATA_PATH": str(data), "EVAL": "flat"}
        env = {name: value for name, value in damaged_environment(rng).items() if "\0" not in value}
        cases[f"settings {number_}"] = env | {"DEVICE": "cpu", "EVAL": "flat", "ITERATIONS": "1"}
    before = files_below(tmp_path)
    (runs := tmp_path / "runs").mkdir()
    for name, done in run_forked(runs, cases).items():
        if done.returncode:
            complaint(done)
        else:
            assert not done.stderr and "final_int8_zlib_roundtrip_exact" in done.stdout, name
    assert [name for name in files_below(tmp_path) if not name.startswith("runs/")] == before
