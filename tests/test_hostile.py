"""Hostile and broken input: strangers' weights and checkpoints, damaged shards, bad settings, and a fuzzer.

What is expected everywhere: success, or one clear line. No code runs, nothing hangs, memory stays bounded, and a
refused run writes nothing but its log.
"""

import _codecs
import contextlib
import functools
import io
import json
import os
import pickle
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import make_shards
import numpy as np
import pytest
import torch
from conftest import CONFORMANCE, CPU, TINY_RUN, run_script, tiny_config, tiny_model, write_shard
from rate_distortion import record_content

import train_gpt as tg

# --- What is damaged here: a small model, whole ----------------------------------------------------------------------


def good_state():
    """The weights of a small model."""
    return dict(tiny_model(tiny_config(), tg.Runtime(CPU, torch.float32)).state_dict())


def good_content():
    """An artifact's content, with two tensors quantised although they are small."""
    state = good_state()
    content = record_content(state)
    for name in ("tok_emb.weight", "blocks.0.mlp.fc.weight"):
        scale = state[name].float().abs().amax(1) / 127
        content["quantized"][name] = (state[name].float() / scale[:, None]).round().to(torch.int8)
        content["scales"][name] = scale.half()
        content["dtypes"][name] = content["passthrough_orig_dtypes"].pop(name)
        content["qmeta"][name] = {"scheme": "per_row", "axis": 0}
        del content["passthrough"][name]
    return content


def new_trainer(path=""):
    """A training of a small model that has not begun, to go on from the checkpoint at the path."""
    cfg, rt = tiny_config(resume=str(path), seed=7), tg.Runtime(CPU, torch.float32)
    return tg.Trainer(
        tiny_model(cfg, rt),
        tg.TokenStream([np.arange(999) % 96]),
        cfg,
        rt,
        {"tokenizer": "ab" * 32},
    )


def good_checkpoint():
    """What a checkpoint of that training holds, made of tensors of its own."""
    trainer = new_trainer()
    tensors = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    counts = (2, 1.5, 512)
    return {
        "identity": trainer.identity,
        "tensors": tensors,
        "rng": torch.get_rng_state(),
        "counts": counts,
    }


GOOD = {"ptz": good_content, "pt": good_state, "state": good_checkpoint}


def saved(content):
    """The bytes of torch.save."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, buffer := io.BytesIO())
    return buffer.getvalue()


def in_form(kind, blob):
    """The file that holds what torch.save gave: .ptz compressed, .pt and checkpoints (.state here) as it is."""
    return zlib.compress(blob) if kind == "ptz" else blob


def use(path):
    """All that the program does with a file of this kind before its content is used."""
    if path.suffix == ".state":
        return new_trainer(path).resume()
    if path.suffix == ".bin":
        return int(tg.open_shard(path).max())
    state = tg.read_weights(path)
    model = tg.GPT(tg.shape_from_weights(state, tg.Config(), path), torch.float32)
    return tg.copy_tensors(model.state_dict(), state, path)


def assert_one_line(error):
    """A message for a person: one line, not empty, nothing that moves the cursor, of bounded length."""
    line = str(error)
    clean = bool(line) and line.isprintable() and len(line) < 1300
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


# --- Pickles and zip files that torch.save would not write -----------------------------------------------------------


class Call:
    """Pickles to a call, as a hostile file would."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


class Pickler(pickle.Pickler):
    """Writes a tuple that begins with "storage" as torch.save refers to a storage."""

    def persistent_id(self, value):
        return value if isinstance(value, tuple) and value[:1] == ("storage",) else None


def tensor(size, stride, numel, kind=torch.FloatStorage):
    """A tensor over storage 0, whatever is claimed about it."""
    storage = ("storage", kind, "0", "cpu", numel)
    return Call(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, OrderedDict())


def doubled(times, value=None, join=lambda a: [a, a]):
    """A few bytes that stand for 2 ** times values."""
    return functools.reduce(
        lambda inner, _: join(inner), range(times), {} if value is None else value
    )


def zipped(content, storages=None, protocol=2):
    """A file as torch.save lays it out, around an object, or the bytes of a pickle, and storages of our own."""
    if not isinstance(content, bytes):
        Pickler(pickled := io.BytesIO(), protocol).dump(content)
        content = pickled.getvalue()
    entries = {"data.pkl": content, "version": b"3\n", "byteorder": b"little", "data/0": storages}
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name in filter(entries.get, entries):
            archive.writestr(f"archive/{name}", entries[name])
    return buffer.getvalue()


def rezipped(blob, change, compression=zipfile.ZIP_STORED):
    """A torch.save file whose entries went through `change`, a function of a dict from names to bytes."""
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", compression, compresslevel=1) as archive:
        for name, data in change(entries).items():
            archive.writestr(name, data)
    return buffer.getvalue()


# --- 1. Artifacts, state dicts and checkpoints -----------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
BREAKS = "a\nerror: b\r\x1b[2Jc"
EMB, FC, GAIN, Q = (
    "tok_emb.weight",
    "blocks.0.mlp.fc.weight",
    "blocks.0.attn.q_gain",
    "blocks.0.attn.c_q.weight",
)
WEIGHT, MUON, ADAM, STEP = (
    "model.blocks.0.mlp.fc.weight",
    "Muon.0.buffer",
    "Adam.0.exp_avg",
    "Adam.0.step",
)


def put(part, name, value):
    """A change of a nest of dicts: `value`, or value(what was there), at content[part][name]."""

    def change(content):
        old = content[part][name] if callable(value) else None
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
    return lambda content: content.update(
        {key: value(content.get(key)) if callable(value) else value}
    )


def strange_names(where=None):
    """Changes that add an entry under a name that is none, at content[where] or in the content itself."""
    names = {
        "a number": 5,
        "None": None,
        "a tuple": ("a", "b"),
        "line breaks": BREAKS,
        "half a pair": "a\ud800",
        "no end": "a" * 100_000,
    }
    made = {
        what: put(where, name, torch.ones(1)) if where else to(name, torch.ones(1))
        for what, name in names.items()
    }
    return {f"name of {what}": change for what, change in made.items()}


STRANGE_TENSORS = {
    "sparse": lambda t: t.float().to_sparse(),
    "sparse csr": lambda t: t.float().reshape(-1, 1).to_sparse_csr(),
    "meta": lambda t: t.to("meta"),
    "qint8": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
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
CHANGES = {
    "ptz": {
        "unknown format": to("__quant_format__", "int4_clean_per_row_v1"),
        "format of another type": to("__quant_format__", ["int8_clean_per_row_v1"]),
        "format with line breaks": to("__quant_format__", "int8\nerror: all is well\x1b[2J"),
        "format without end": to("__quant_format__", "x" * 10**6),
        "no format": without("__quant_format__"),
        **{
            f"no {part}": without(part) for part in ("quantized", "scales", "passthrough", "dtypes")
        },
        **{f"{part} is a list": to(part, []) for part in ("quantized", "scales", "passthrough")},
        **{
            f"{part} is None": to(part, None)
            for part in ("quantized", "scales", "passthrough", "dtypes")
        },
        **{
            f"dtype {name!r}": put("dtypes", FC, name)
            for name in (
                "__class__",
                "nn",
                "int64",
                "float64",
                "int8",
                "load",
                "",
                None,
                5,
                ["float32"],
                "float32\n",
            )
        },
        **{
            f"passthrough dtype {name!r}": put("passthrough_orig_dtypes", Q, name)
            for name in ("__class__", "nn", "int64", "float64", 5, ["float32"])
        },
        "quantised without dtype": without("dtypes", FC),
        "quantised without scale": without("scales", FC),
        "scale of nothing": put("scales", "nothing", torch.ones(3)),
        "twice": lambda c: c["passthrough"].update({FC: torch.ones(64, 32)}),
        "missing in both": lambda c: [
            c[part].pop(FC) for part in ("quantized", "scales", "dtypes")
        ],
        "missing passthrough": without("passthrough", Q),
        "extra passthrough": put("passthrough", "surprise", torch.ones(1)),
        "extra quantised": lambda c: [
            c["quantized"].update(x=torch.ones(2, 2, dtype=torch.int8)),
            c["scales"].update(x=torch.ones(2)),
            c["dtypes"].update(x="float32"),
        ],
        "no tensors at all": lambda c: [
            c[part].clear() for part in ("quantized", "scales", "dtypes", "passthrough")
        ],
        "NaN in one scale": put("scales", FC, lambda s: s.index_fill(0, torch.tensor([7]), NAN)),
        "inf in one scale": put("scales", FC, lambda s: s.index_fill(0, torch.tensor([7]), INF)),
        "-inf in one scale": put("scales", FC, lambda s: s.index_fill(0, torch.tensor([7]), -INF)),
        "scale that overflows": put("scales", FC, lambda s: torch.full(s.shape, 3e38)),
        "scale of int8": put("scales", FC, lambda s: torch.ones(s.shape, dtype=torch.int8)),
        "scale too short": put("scales", FC, lambda s: s[1:]),
        "scale of one": put("scales", FC, lambda s: s[:1]),
        "scale of columns": put("scales", FC, lambda s: torch.ones(32)),
        "scale of two dimensions": put("scales", FC, lambda s: s[:, None]),
        **{
            f"quantised {name}": put(
                "quantized", FC, lambda q, name=name: q.to(getattr(torch, name))
            )
            for name in ("uint8", "int16", "float32", "bool")
        },
        "NaN in passthrough": put(
            "passthrough", Q, lambda t: t.index_fill(0, torch.tensor([3]), NAN)
        ),
        **{
            f"passthrough {name}": put("passthrough", Q, change)
            for name, change in STRANGE_TENSORS.items()
        },
        **{
            f"quantised {name} instead": put("quantized", FC, STRANGE_TENSORS[name])
            for name in (
                "sparse",
                "meta",
                "qint8",
                "nested",
                "text",
                "none",
                "flat",
                "number",
                "repeated",
                "repeated rows",
            )
        },
        **{
            f"scale {name} instead": put("scales", FC, STRANGE_TENSORS[name])
            for name in ("sparse", "meta", "qint8", "nested", "text", "none", "complex", "repeated")
        },
        **strange_names("passthrough"),
        "block without a number": put("passthrough", "blocks.", torch.ones(1)),
        "heads of nothing": put("passthrough", GAIN, torch.ones(0)),
    },
    "pt": {
        "is a list": lambda s: list(s.values()),
        "is a tensor": lambda s: s[EMB],
        "is a number": lambda s: 5,
        "is empty": lambda s: {},
        "missing": without(FC),
        "missing embedding": without(EMB),
        "extra": to("surprise", torch.ones(1)),
        **{
            f"{name} in place of a matrix": to(FC, change)
            for name, change in STRANGE_TENSORS.items()
        },
        **{
            f"{name} in place of the embedding": to(EMB, change)
            for name, change in STRANGE_TENSORS.items()
            if name not in ("cut", "no elements")
        },  # another vocabulary, which the tokenizer is held against
        **{
            f"{name} in place of the gains": to(GAIN, change)
            for name, change in STRANGE_TENSORS.items()
            if name not in ("flat", "sparse csr", "NaN")
        },
        "one storage under many names": lambda s: (
            s | {f"x{i}": s[FC].view(-1) for i in range(1000)}
        ),
        "5000 blocks": lambda s: s | {f"blocks.{i}.x": torch.ones(1) for i in range(5000)},
        **strange_names(),
    },
    "state": {
        "is a list": lambda s: [1, 2],
        "is a tensor": lambda s: torch.ones(3),
        "is empty": lambda s: {},
        **{f"no {key}": without(key) for key in ("identity", "tensors", "rng", "counts")},
        **{
            f"{key} is {value!r}": to(key, value)
            for key in ("identity", "tensors", "rng", "counts")
            for value in (None, 5, "text", [], [1, 2, 3, 4])
        },
        "no weight": without("tensors", WEIGHT),
        "no momentum": without("tensors", MUON),
        "an extra tensor": put("tensors", "model.surprise", torch.ones(1)),
        **{
            f"{name} in place of {what}": put("tensors", what, change)
            for name, change in STRANGE_TENSORS.items()
            for what in (WEIGHT, MUON, ADAM, STEP)
            if name not in ("NaN", "inf")
            and (what, name)
            not in ((STEP, "cut"), (STEP, "sparse csr"), (STEP, "no elements"), (STEP, "number"))
        },
        "random state of garbage": put("rng", slice(None), 255),
        "random state cut short": to("rng", lambda t: t[:100]),
        "random state of floats": to("rng", lambda t: t.float()),
        **{
            f"counts {counts}": to("counts", counts)
            for counts in (
                (-(10**30), 1.5, 512),
                (10**30, 1.5, 512),
                (NAN, 1.5, 512),
                (INF, 1.5, 512),
                (2, NAN, 512),
                (2, -1e300, 512),
                (2, INF, 512),
                (2, 1.5, -1),
                (2, 1.5, 10**30),
                (2, 1.5, NAN),
                ("2", 1.5, 512),
                (None, 1.5, 512),
                (2, 1.5),
                (2, 1.5, 512, 4),
                (2, torch.ones(2), 512),
                (2, [1], 512),
            )
        },
        "other settings": put("identity", "SEED", "7\n\x1b[2J" + "x" * 10_000),
        "settings that are numbers": put("identity", "SEED", 7),
        "settings that are tensors": put("identity", "SEED", torch.ones(3)),
        "a setting less": without("identity", "SEED"),
        "many more settings": lambda s: s["identity"].update(
            {f"A{i}": "x" * 100 for i in range(1000)}
        ),
        "a setting without a name": put("identity", None, "7"),
        "a setting with line breaks": put("identity", BREAKS, "7"),
    },
}


def changed(content, change):
    """`content` after the change, which works in place or returns a new one."""
    result = change(content)
    return content if result is None or (isinstance(result, list) and None in result) else result


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    """Every test works in its own folder, where `touch executed` would show."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "executed").exists()


def test_what_is_damaged_here_is_good_before(tmp_path):
    for kind, make_good in GOOD.items():
        for name, blob in (
            ("good", saved(make_good())),
            ("again", rezipped(saved(make_good()), dict)),
        ):
            (tmp_path / f"{name}.{kind}").write_bytes(in_form(kind, blob))
            use(tmp_path / f"{name}.{kind}")
    (tmp_path / "hand.pt").write_bytes(zipped({"w": tensor((2, 3), (3, 1), 6)}, bytes(24)))
    assert torch.equal(tg.read_weights(tmp_path / "hand.pt")["w"], torch.zeros(2, 3))


@pytest.mark.parametrize("kind", CHANGES)
def test_what_is_not_ours_is_refused(kind, tmp_path):
    names = {f"{number_}.{kind}": name for number_, name in enumerate(CHANGES[kind])}
    for path, name in names.items():
        (tmp_path / path).write_bytes(
            in_form(kind, saved(changed(GOOD[kind](), CHANGES[kind][name])))
        )
    assert not {
        names[path]: wrong for path, wrong in not_refused(map(tmp_path.joinpath, names)).items()
    }


@pytest.mark.parametrize("name", [WEIGHT, MUON, ADAM])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_training_that_goes_on_from_such_numbers_stops(name, value, tmp_path):
    state = good_checkpoint()
    state["tensors"][name].fill_(value)
    tg.Runtime(CPU, torch.float32).save(tmp_path / "a.state", state)
    trainer = new_trainer(tmp_path / "a.state")
    trainer.resume()
    trainer.train_step()
    with pytest.raises(tg.AgreedError, match=r"step 3: .* is not finite; .*; nothing was exported"):
        trainer.refuse_faults()


def code_everywhere():
    """Contents with a call in one place: as a whole, as a part, a name, a value, inside a tensor's description."""
    run = Call(os.system, "touch executed")
    yield run
    yield {run: torch.ones(1)}
    for good in (good_content(), good_checkpoint()):
        for part in good:
            yield from (good | {part: inside} for inside in (run, {"w": run}, {run: torch.ones(1)}))
    for function, argument in (
        (eval, "open('executed', 'w')"),
        (exec, "open('executed', 'w')"),
        (open, "executed"),
        (__import__, "antigravity"),
        (getattr, "x"),
        (torch.load, "x"),
        (print, "x"),
        (subprocess.getoutput, "touch executed"),
        (torch.hub.load, "x"),
    ):
        yield {"w": Call(function, argument)}


def test_no_code_is_executed_from_any_part(tmp_path):
    for number_, content in enumerate(code_everywhere()):
        for kind in GOOD:
            (tmp_path / f"{number_}.{kind}").write_bytes(in_form(kind, saved(content)))
    paths = sorted(tmp_path.iterdir())
    assert not not_refused(paths) and len(paths) == 3 * (2 + 3 * (7 + 4) + 9)


def pickles():
    """(name, bytes of a torch.save file) with a pickle that no torch.save writes: too deep, too often, of itself."""
    itself = {}
    itself["tensors"] = itself
    yield "itself", zipped(itself)
    yield "deep", zipped(b"\x80\x02}(X\1\0\0\0w" + b"]" * 20_000 + b"a" * 19_999 + b"u.")
    yield (
        "doubled",
        zipped({"junk": doubled(60), "tensors": doubled(60, join=lambda a: {"a": a, "b": a})}),
    )
    yield "protocol", zipped({}, protocol=4)
    yield "no-storage", zipped({"w": tensor((2,), (1,), 2)})


def plain_files():
    """(name, bytes) of files that are no archive, or a damaged one, by the ending of what they claim to be."""
    torch.save({"w": torch.ones(3)}, legacy := io.BytesIO(), _use_new_zipfile_serialization=False)
    for kind, make_good in GOOD.items():
        file = in_form(kind, blob := saved(make_good()))
        yield f"empty.{kind}", b""
        yield f"an-artifact-or-a-state.{kind}", saved(GOOD["pt" if kind == "state" else "state"]())
        yield (
            f"torchscript.{kind}",
            in_form(kind, rezipped(blob, lambda e: e | {"archive/constants.pkl": b"."})),
        )
        no_pickle = rezipped(
            blob, lambda e: {name: data for name, data in e.items() if "pkl" not in name}
        )
        for name, inside in (
            ("legacy", legacy.getvalue()),
            ("legacy-and-zip", legacy.getvalue() + blob),
            ("behind-text", b"text" + blob),
            ("no-pickle", no_pickle),
            *pickles(),
        ):
            yield f"{name}.{kind}", in_form(kind, inside)
        for share in (0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999):
            yield f"cut-{share}.{kind}", file[: max(1, int(share * len(file)))]
            yield (
                f"cut-inside-{share}.{kind}",
                in_form(kind, blob[: max(1, int(share * len(blob)))]),
            )
        yield f"cut-1.{kind}", file[:-1]
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            parts = {entry.filename: archive.read(entry) for entry in archive.infolist()[:9]}
        for number_, part in enumerate(
            parts.values() if kind != "ptz" else ()
        ):  # a single bit of whatever is held
            at = blob.index(part) + len(part) // 2
            yield f"bit-{number_}.{kind}", blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :]
    yield "longer.ptz", in_form("ptz", saved(good_content())) + b"x"


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
@pytest.mark.parametrize("kind", [torch.FloatStorage, torch.CharStorage])
def test_impossible_shapes_are_refused(case, kind, tmp_path):
    one, parts = tensor(*SHAPES[case], kind), {part: {} for part in good_content()}
    parts |= {
        "__quant_format__": tg.QUANT_FORMAT,
        "dtypes": {"w": "float32"},
        "quantized": {"w": one},
    }
    parts["scales"] = {"w": tensor((), (), 6)}
    for name, content in (("a.pt", {"w": one}), ("a.ptz", parts)):
        (tmp_path / name).write_bytes(in_form(name[2:], zipped(content, bytes(24))))
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


@pytest.mark.parametrize("kind", [*GOOD, "bin"])
def test_what_is_no_file_is_refused(kind, tmp_path):
    (tmp_path / f"folder.{kind}").mkdir()
    (tmp_path / f"link.{kind}").symlink_to("nowhere")
    (tmp_path / f"loop.{kind}").symlink_to(f"loop.{kind}")
    names = [
        "pipe",
        "folder",
        "absent",
        "link",
        "loop",
        *["x" * 300] * (kind != "bin"),
    ]  # shards come from a listing
    with fifo(tmp_path / f"pipe.{kind}") as readers:
        assert not not_refused([tmp_path / f"{name}.{kind}" for name in names])
    assert not readers


# --- 1b. Bombs: small files that ask for much memory or time ---------------------------------------------------------

BIG = 1000 * 2**20  # what the bombs would fill


def deflated(start, size):
    """A zlib stream of `start` and then `size` zeros."""
    packer = zlib.compressobj(1)
    zeros = (packer.compress(bytes(2**20)) for _ in range(size // 2**20))
    return b"".join([packer.compress(start), *zeros, packer.flush()])


def bombs():
    """(name, bytes of a torch.save file) of small files that a careless reader pays for with memory or minutes."""
    absent = zipped({"w": tensor((BIG // 4,), (1,), BIG // 4)}, bytes(1000))
    yield "zip-entry-absent", absent
    packed = rezipped(absent, lambda e: e | {"archive/data/0": bytes(BIG)}, zipfile.ZIP_DEFLATED)
    yield "zip-entry", packed
    yield "zip-entry-claims-little", packed.replace(struct.pack("<I", BIG), struct.pack("<I", 1000))
    yield "pickle-large", zipped(b"\x80\x02](" + b"]" * 10_000_000 + b"e.")
    yield "pickle-almost-large", zipped(b"\x80\x02](" + b"]" * (2**20 - 10) + b"e.")
    torch.save({"w": torch.ones(3)}, legacy := io.BytesIO(), _use_new_zipfile_serialization=False)
    yield "legacy-large", legacy.getvalue()[:10] + b"\x80\x02](" + b"]" * 10_000_000 + b"e."
    yield "bytearray", zipped({"w": Call(bytearray, BIG)})
    yield (
        "punycode",
        zipped(
            {"w": Call(_codecs.encode, "".join(map(chr, range(0x100, 0xD000))) * 8, "punycode")}
        ),
    )
    yield "doubled", zipped({"a": doubled(40)})
    form = {
        part: {}
        for part in ("quantized", "scales", "dtypes", "passthrough", "passthrough_orig_dtypes")
    }
    yield "doubled-format", zipped(form | {"__quant_format__": doubled(40)})
    yield "ten-thousand-layers", saved(claimed_layers(10_000))
    yield "one-entry-listed-often", listed_often(saved({"w": torch.ones(10**6)}), 4000)
    nothing = {f"archive/{i}": b"" for i in range(70_000)}  # more than 16 bits count
    yield "empty-entries", rezipped(saved({"w": torch.ones(3)}), lambda entries: entries | nothing)
    rows = torch.ones(1).expand(2**20)
    yield (
        "repeated",
        saved({f"w{i}": rows for i in range(1000)} | {EMB: torch.ones(1).expand(20_000, 20_000)}),
    )


def listed_often(blob, times):
    """The zip file `blob` with every line of its table of contents there so many times."""
    end = blob.rindex(b"PK\5\6")
    count, size, start = struct.unpack_from("<HII", blob, end + 10)
    table = blob[start : start + size] * times
    counts = struct.pack("<HHII", *(min(count * times, 65535),) * 2, len(table), start)
    return blob[:start] + table + blob[end : end + 8] + counts + blob[end + 20 :]


def claimed_layers(count, vocab_size=4):
    """A state dict of a few bytes a layer that claims to be a GPT of very many layers, all but the first empty."""
    state = {
        EMB: torch.ones(vocab_size, 2),
        GAIN: torch.ones(1),
        "blocks.0.attn.c_k.weight": torch.ones(2, 2),
    }
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


def test_bombs_cost_neither_memory_nor_time(tmp_path):
    """Refused, in seconds and with memory that their size explains."""
    content = saved(good_content())
    (tmp_path / "good.ptz").write_bytes(in_form("ptz", content))
    names = ["good.ptz"]
    slow = (
        "pickle-almost-large",
        "empty-entries",
    )  # seconds each, and in a .ptz, once inflated, the same again
    files = [
        (f"{name}.{kind}", in_form(kind, blob))
        for name, blob in bombs()
        for kind in ("pt", "ptz")[: 1 if name in slow else 2]
    ]
    files += [
        ("zeros.ptz", billion := deflated(b"", BIG)),
        ("good-and-zeros.ptz", deflated(content, BIG)),
    ]
    files += [("good-then-zeros.ptz", in_form("ptz", content) + billion)]
    for name, blob in files:
        (tmp_path / name).write_bytes(blob)
        names.append(name)
    command = [sys.executable, "-c", CHILD, *(str(tmp_path / name) for name in names)]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # no threads: it forks
    done = subprocess.run(command, capture_output=True, text=True, timeout=2000, env=env)
    rows = {
        Path(name).name: tuple(rest) for name, *rest in map(json.loads, done.stdout.splitlines())
    }
    assert len(rows) == len(names), done.stderr
    assert rows["good.ptz"][0] == "success"
    bad = {}
    for name, (outcome, seconds, peak) in rows.items():
        more = peak - rows["good.ptz"][2]
        print(f"{name:32} {seconds:5.1f} s {more:6.0f} MB  {outcome[:150]}")
        fine = outcome.startswith("refused: ") and outcome.isprintable()
        if not (fine or name == "good.ptz") or more > 600 or seconds > 15:
            bad[name] = outcome[:200], seconds, more
    assert not bad


# --- 2. Shards and tokenizers ----------------------------------------------------------------------------------------


def shard(magic=20240520, version=1, count=4, tokens=(1, 5, 6, 7), rest=b"", order="<"):
    """A shard with any header."""
    header = np.zeros(256, dtype=f"{order}i4")
    header[:3] = magic, version, count
    return header.tobytes() + np.asarray(tokens, dtype=f"{order}u2").tobytes() + rest


SHARDS = {
    "magic": shard(magic=20240521),
    "magic 0": shard(magic=0),
    "magic of the other byte order": shard(order=">"),
    "version 0": shard(version=0),
    "version 2": shard(version=2),
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
    (tmp_path / "a.bin").write_bytes(SHARDS[case])
    assert_refused(tmp_path / "a.bin")


def put_data(folder, **damaged):
    """Settings for a run on a new folder of two shards, in which other content has been put in place of some files."""
    (data := Path(folder)).mkdir()
    for split in ("train", "val"):
        write_shard(data / f"fineweb_{split}_000000.bin", [1, 5, 6, 7] * 300)
    for name, content in damaged.items():
        (data / name.replace("__", ".")).write_bytes(content)
    own = {"TOKENIZER_PATH": str(data / "own.model")} if "own__model" in damaged else {}
    return {"DATA_PATH": str(data), "MAX_VAL_DOCS": "0", "ITERATIONS": "1", "EVAL": "flat"} | own


HEADER, TOKENIZER = (
    "found 1032 bytes, magic 20240520, version 1, 5 tokens; expected magic",
    "own.model: unusable (",
)
MODEL = (CONFORMANCE / "tokenizer.model").read_bytes()
DATA = {  # files that are put in place, and what is said of them
    "last id of the train shards": (
        {"fineweb_train_000001__bin": shard(count=2, tokens=(1, 1024))},
        "token id 1024, ",
    ),
    "last id of the last val shard": (
        {"fineweb_val_000001__bin": shard(tokens=(1, 5, 6, 65535))},
        "token id 65535, ",
    ),
    "header of the last train shard": ({"fineweb_train_000001__bin": shard(count=5)}, HEADER),
    "header of the last val shard": ({"fineweb_val_000001__bin": shard(count=5)}, HEADER),
    "tokenizer empty": ({"own__model": b""}, TOKENIZER),
    "tokenizer text": ({"own__model": b"no model at all\n" * 1000}, TOKENIZER),
    "tokenizer cut": ({"own__model": MODEL[:10_000]}, TOKENIZER),
}


@pytest.mark.parametrize("case", DATA)
def test_damaged_data_is_named(case, tmp_path, rt):
    files, words = DATA[case]
    settings = put_data(tmp_path / "data", **files)
    with pytest.raises(tg.UserError) as refused_:
        tg.load_inputs(tg.read_config(TINY_RUN | settings), rt)
    assert_one_line(refused_.value)
    name = next(iter(files)).replace("__", ".")
    assert re.search(f"{re.escape(name)}: (found|unusable|token id)", str(refused_.value))
    assert words in str(refused_.value)
    assert "token id" not in words or "expected ids up to 1023" in str(refused_.value)


@pytest.mark.parametrize("name", ["fineweb_val_000001.bin", "own.model"])
def test_data_that_is_no_file_is_named(name, tmp_path, rt):
    settings = put_data(tmp_path / "data") | {
        "TOKENIZER_PATH": str(tmp_path / "data" / "own.model")
    }
    if name != "own.model":
        settings |= {"TOKENIZER_PATH": TINY_RUN["TOKENIZER_PATH"]}
    cfg, path = tg.read_config(TINY_RUN | settings), tmp_path / "data" / name
    with fifo(path) as readers, pytest.raises(tg.UserError, match=f"{name}: found"):
        tg.load_inputs(cfg, rt)
    path.unlink()
    for damage in (path.mkdir, lambda: (path.rmdir(), path.symlink_to("nowhere"))):
        damage()
        with pytest.raises(tg.UserError, match=f"{name}: found"):
            tg.load_inputs(cfg, rt)
    assert not readers


# --- 3. JSONL for data/make_shards.py --------------------------------------------------------------------------------


def make(folder, jsonl, *options):
    """make_shards.py as a process of 3 GB at most: (status, stdout, stderr)."""
    command = [
        "bash",
        "-c",
        'ulimit -v 3000000; exec "$@"',
        "-",
        sys.executable,
        make_shards.__file__,
    ]
    command += ["--jsonl", str(jsonl), "--out", str(folder / "set"), "--val-docs", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


GOOD_LINES = b'{"text": "three good words, and nine bad ones beside them"}\n' * 3
LINES = {
    "a raw NUL in a string": (b'{"text": "a\0b"}\n', "line 4: found invalid JSON"),
    "a raw NUL between lines": (b"\0\n", "line 4: found invalid JSON"),
    "a byte-order mark": (b'\xef\xbb\xbf{"text": "words"}\n', "line 4: found invalid JSON"),
    "a lone surrogate as a name": (b'{"\\ud800": 1}\n', 'without a "text" entry'),
    "a number of 5000 digits": (
        b'{"text": "words", "n": ' + b"9" * 5000 + b"}\n",
        "line 4: found invalid JSON",
    ),
    "50 MB without an end": (
        b'{"text": "' + b"x " * 25_000_000 + b"\n",
        "line 4: found invalid JSON",
    ),
    "50 MB of another type": (b'{"text": [' + b"1," * 25_000_000 + b"1]}\n", "type list"),
    "50 MB of names": (b'{"' + b"x" * 50_000_000 + b'": 1}\n', 'without a "text" entry'),
}


@pytest.mark.parametrize("case", LINES)
def test_bad_lines_are_named_and_nothing_is_written(case, tmp_path, capsys):
    (docs := tmp_path / "docs.jsonl").write_bytes(GOOD_LINES + LINES[case][0] + GOOD_LINES)
    if "50 MB" in case:
        status, out, err = make(tmp_path, docs)
    else:
        status = make_shards.main(
            ["--jsonl", str(docs), "--out", str(tmp_path / "set"), "--val-docs", "1"]
        )
        out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (1, "", 1), err[:2000]
    assert (
        err.startswith(f"error: {docs}: line 4: found")
        and LINES[case][1] in err
        and "; expected " in err
    )
    assert_one_line(err.rstrip("\n"))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("option", ["--jsonl", "--tokenizer"])
def test_what_is_no_file_makes_no_set(option, tmp_path, capsys):
    (tmp_path / "docs.jsonl").write_bytes(GOOD_LINES)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    arguments = [
        "--jsonl",
        str(tmp_path / "docs.jsonl"),
        "--out",
        str(tmp_path / "set"),
        "--val-docs",
        "1",
        option,
    ]
    with fifo(tmp_path / "pipe") as readers:
        for kind in ("pipe", "folder", "loop"):  # of two --jsonl the last one counts
            status, (out, err) = (
                make_shards.main([*arguments, str(tmp_path / kind)]),
                capsys.readouterr(),
            )
            assert (status, out, err.count("\n")) == (1, "", 1), err
            assert (
                err.startswith("error: ") and f"{tmp_path / kind}: " in err and "; expected " in err
            )
    assert not readers and not (tmp_path / "set").exists()


def test_odd_lines_that_are_fine(tmp_path):
    """As data/README.md says: a 50 MB line is one document; NULs, names given twice and other entries are allowed."""
    rng = random.Random(3)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 8))) for _ in range(300)]
    texts = [" ".join(rng.choices(words, k=100)) for _ in range(20)]
    lines = [json.dumps({"text": words_}) for words_ in texts]
    lines[3] = json.dumps({"text": "nul \0 " + texts[3], "more": None})
    lines[4] = '{"text": 5, "n": NaN, "text": ' + json.dumps(texts[4]) + "}"
    lines[5] = json.dumps(
        {"text": ("word" + " " * 96) * 500_000}
    )  # folded to one space a word: quick to encode
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    assert (tmp_path / "docs.jsonl").stat().st_size > 49_000_000
    model = str(CONFORMANCE / "tokenizer.model")
    status, out, err = make(tmp_path, tmp_path / "docs.jsonl", "--tokenizer", model)
    assert (status, err) == (0, "") and "train: 19 documents" in out
    total = sum(make_shards.shard_token_count(path) for path in (tmp_path / "set").glob("*.bin"))
    assert total > 500_000


# --- 4. The environment ----------------------------------------------------------------------------------------------

VALUES = [
    "",
    "-1",
    "-0",
    "0",
    "1",
    str(10**18),
    str(10**30),
    "9" * 5000,
    "1e300",
    "-1e300",
    "1e-300",
    "abc",
    "nan",
    "NaN",
    "inf",
    "-inf",
    "infinity",
    " 1",
    "1 ",
    "0x10",
    "1,2",
    ",",
    "1_000",
    "\u0663",
    "\u00bd",
    "True",
    "a\nb",
    "\x1b[2J",
    "\0",
    "\udcff",
    "../..",
    "/dev/null",
    "x" * 5000,
]


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
        (
            {"TTT_CHUNK_SIZE": "129", "TTT_EVAL_SEQ_LEN": "128"},
            ["TTT_CHUNK_SIZE=129", "TTT_EVAL_SEQ_LEN=128"],
        ),
        ({"TTT_LORA_RANK": "0"}, ["TTT_LORA_RANK='0'", "from 1"]),
        ({"TTT_STREAM_RANK": "0"}, ["TTT_STREAM_RANK='0'", "from 1"]),
        ({"TTT_BATCH_SIZE": "0"}, ["TTT_BATCH_SIZE='0'", "from 1"]),
        ({"VAL_BATCH_SIZE": "0"}, ["VAL_BATCH_SIZE='0'", "from 1"]),
        ({"TRAIN_BATCH_TOKENS": "0"}, ["TRAIN_BATCH_TOKENS='0'", "from 1"]),
        ({"TRAIN_SEQ_LEN": "0"}, ["TRAIN_SEQ_LEN='0'", "from 1"]),
        ({"TRAIN_BATCH_TOKENS": str(10**18)}, ["TRAIN_BATCH_TOKENS"]),
        ({"NUM_HEADS": "0"}, ["NUM_HEADS='0'", "from 1"]),
        ({"EVAL": "flat,ttt,flat"}, ["EVAL='flat,ttt,flat'"]),
        ({"WORLD_SIZE": "-2"}, ["WORLD_SIZE='-2'"]),
        ({"RUN_ID": "../../escaped"}, ["RUN_ID='../../escaped'"]),
        ({"RUN_ID": "/tmp/escaped"}, ["RUN_ID='/tmp/escaped'"]),
        ({"RUN_ID": ".."}, ["RUN_ID='..'"]),
        ({"SCORES_PATH": "../escaped.csv"}, ["SCORES_PATH='../escaped.csv'"]),
        ({"RANK": "abc"}, ["RANK=abc"]),
        ({"RANK": "-1"}, ["RANK=-1"]),
        ({"RANK": "1"}, ["RANK=1", "WORLD_SIZE=0"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK=2", "WORLD_SIZE=2"]),
        ({"LOCAL_RANK": "\u0663", "RANK": "x"}, ["LOCAL_RANK="]),
    ],
)
def test_settings_that_cannot_work_are_named(settings, named):
    with pytest.raises(tg.UserError) as refused_:
        tg.Runtime.create(
            tg.read_config({"PRESET": "baseline", "DEVICE": "cpu"} | settings), settings
        )
    assert_one_line(refused_.value)
    assert all(word in str(refused_.value) for word in named), refused_.value


# What the environments of desktops, clusters, containers and build services hold, nearest to ours.
ORDINARY = """
DATA DATASET MODEL EVALS RESUMED DEVICES SEEDS COMPILER OUTPUT_DIR LOG_DIR BATCH_SIZE NUM_WORKERS MODULEPATH MANPATH
CONDA_DEFAULT_ENV CI_JOB_ID CI_RUNNER_ID GITHUB_RUN_ID KERNEL_ID NODE_NAME BUILD_ID WANDB_RUN_ID MLFLOW_RUN_ID HF_HOME
TORCHELASTIC_RUN_ID CUDA_VISIBLE_DEVICES MKL_NUM_THREADS NUMEXPR_MAX_THREADS SLURM_NTASKS SLURM_STEP_ID
ROLE_RANK ROLE_WORLD_SIZE TOKENIZERS_PARALLELISM TERM LANG LC_ALL XDG_DATA_DIRS LD_LIBRARY_PATH PYTHONPATH_OLD
""".split()  # noqa: SIM905
MISSPELT = {
    "TTT_LORA_RNK": "TTT_LORA_RANK",
    "TTT_LORA_RANKS": "TTT_LORA_RANK",
    "NUM_LAYER": "NUM_LAYERS",
    "EVALONLY": "EVAL_ONLY",
    "MODELPATH": "MODEL_PATH",
    "OUTDIR": "OUT_DIR",
    "CHECKPOINT_EVRY": "CHECKPOINT_EVERY",
    "MAX_WALLCLOCK_SECOND": "MAX_WALLCLOCK_SECONDS",
    "TTT_STREAM_TARGET": "TTT_STREAM_TARGETS",
    "TRAIN_BATCH_TOKEN": "TRAIN_BATCH_TOKENS",
}
# The most that these take. A run is not asked whether it can afford them: none of them costs anything by being large.
HUGE = dict.fromkeys(
    (
        "VAL_BATCH_SIZE",
        "VAL_LOSS_EVERY",
        "TRAIN_LOG_EVERY",
        "MAX_VAL_DOCS",
        "SEED",
        "WARMDOWN_ITERS",
        "MUON_MOMENTUM_WARMUP_STEPS",
        "TTT_BATCH_SIZE",
        "CHECKPOINT_EVERY",
        "CHECKPOINT_SECONDS",
        "EVAL_MAX_SECONDS",
        "MAX_WALLCLOCK_SECONDS",
        "ROPE_BASE",
        "GRAD_CLIP_NORM",
        "ADAM_EPS",
    ),
    str(10**18),
)


# --- 5. The whole program: one error line, status 1, nothing written but the log --------------------------------------


def files_below(folder):
    """Names of all files below a folder."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()
    )


def complaint(done):
    """The error line of a run that must have printed nothing else on stderr, and written its log at most."""
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines)) == (1, 1), (
        f"status {done.returncode}: {done.stderr[-3000:]}"
    )
    assert lines[0].startswith("error: ")
    assert_one_line(lines[0])
    assert files_below(done.out) in ([], ["logs/test.txt"])
    return lines[0]


# Files of weights that the program is to score, settings for a whole run, and what either ends with.
HOSTILE_WEIGHTS = {
    "code.ptz": lambda: in_form(
        "ptz", saved(good_content() | {"scales": Call(os.system, "touch executed")})
    ),
    "names.pt": lambda: saved(
        torch.load(CONFORMANCE / "init.pt", weights_only=True) | {BREAKS: torch.ones(1)}
    ),
    "zeros.ptz": lambda: deflated(b"", 2**30),
}
HOSTILE_CHECKPOINTS = {  # what is changed, and what is said
    "code": (lambda s: s | {"rng": Call(os.system, "touch executed")}, ": unusable ("),
    "other settings": (
        put("identity", "SEED", BREAKS),
        ": unusable (it was made under SEED=a?error: b??[2Jc (now ",
    ),
    "not finite": (put("tensors", "Adam.0.exp_avg", lambda t: t * NAN), "is not finite"),
}
SETTINGS = {
    "misspelt": dict.fromkeys(ORDINARY, "")
    | dict.fromkeys(MISSPELT, "4")
    | {"ITERATIONS": "0", "HOME": "/\udcff"},
    "huge": HUGE,
    "tiny": {
        "VAL_BATCH_SIZE": "1",
        "TTT_BATCH_SIZE": "1",
        "MAX_VAL_DOCS": "1",
        "SEED": "0",
        "TTT_LORA_RANK": "1",
        "TTT_STREAM_RANK": "1",
        "TTT_CHUNK_SIZE": "1",
        "TTT_STREAM_CHUNK": "1",
        "TTT_EVAL_SEQ_LEN": "8",
        "EVAL": "flat,ttt",
        "TRAIN_SEQ_LEN": "1",
        "TRAIN_BATCH_TOKENS": "8",
        "ITERATIONS": "1",
    },
    "huge rates": dict.fromkeys(("MATRIX_LR", "SCALAR_LR", "TIED_EMBED_LR"), "1e18"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """How the program ends with each hostile input: {name: finished process, with its OUT_DIR as `out`}."""
    folder, cases = tmp_path_factory.mktemp("program"), dict(SETTINGS)

    def start(name):
        (out := folder / f"out-{name.replace(' ', '-')}").mkdir()
        done = run_script(out, **{"COMPILE": "0", "HOME": str(folder)} | cases[name])
        done.out = out
        return done

    cases["trained"] = {"CHECKPOINT_EVERY": "2", "EVAL": "flat"}
    checkpoint = tg.load_state(
        (trained := start("trained")).out / "checkpoints/test.step000000002.pt"
    )
    for name, make_blob in HOSTILE_WEIGHTS.items():
        (folder / name).write_bytes(make_blob())
        cases[name] = {"EVAL_ONLY": "1", "MODEL_PATH": str(folder / name)}
    for name, (change, _) in HOSTILE_CHECKPOINTS.items():
        state = torch.load(io.BytesIO(saved(checkpoint)), weights_only=True)
        (folder / f"{name}.pt").write_bytes(saved(changed(state, change)))
        cases[name] = {"RESUME": str(folder / f"{name}.pt"), "EVAL": "flat"}
    cases["last id"] = put_data(folder / "data", **DATA["last id of the last val shard"][0])
    cases["pipe"] = put_data(folder / "data-pipe")
    del cases["trained"]
    with (
        fifo(folder / "data-pipe/fineweb_val_000001.bin") as readers,
        ThreadPoolExecutor(2) as pool,
    ):
        runs = dict(zip(cases, pool.map(start, cases), strict=True))
    assert not readers and trained.returncode == 0
    return runs


@pytest.mark.parametrize("case", HOSTILE_WEIGHTS)
def test_hostile_weights_stop_the_program(case, ended):
    done = ended[case]
    assert not (done.out / "executed").exists()
    line = complaint(done)
    assert f"/{case}: " in line and (done.out / "logs" / "test.txt").read_text().endswith(
        f"{line}\n"
    )


@pytest.mark.parametrize("case", HOSTILE_CHECKPOINTS)
def test_hostile_checkpoints_stop_the_program(case, ended):
    assert not (ended[case].out / "executed").exists()
    assert HOSTILE_CHECKPOINTS[case][1] in complaint(ended[case])


@pytest.mark.parametrize(
    ("case", "words"),
    [("last id", "token id 65535, expected"), ("pipe", "fineweb_val_000001.bin: found 0 bytes")],
)
def test_damaged_data_stops_the_program(case, words, ended):
    assert words in complaint(ended[case])


def test_settings_work_or_say_why_not(ended):
    for case in ("misspelt", "huge", "tiny"):
        assert (ended[case].returncode, ended[case].stderr) == (0, ""), case
        assert "final_int8_ttt_lora val_loss:" in ended[case].stdout
    assert "not finite" in complaint(ended["huge rates"])
    warned = {
        line.removesuffix(" partial")
        for line in ended["misspelt"].stdout.splitlines()
        if "warning: " in line
    }
    assert warned == {
        f"warning: {name} is no setting of this script; {meant} is"
        for name, meant in MISSPELT.items()
    }


def test_more_ranks_than_matrices_and_documents(tmp_path):
    """Seven ranks, a layer of six matrices, two documents: those without work still take part."""
    settings = {
        "NUM_LAYERS": "1",
        "TRAIN_BATCH_TOKENS": str(7 * 128),
        "ITERATIONS": "2",
        "MAX_VAL_DOCS": "2",
    }
    done = run_script(tmp_path, 7, **settings, EVAL="flat,ttt", COMPILE="0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "world_size:7" in done.stdout and "num_layers:1" in done.stdout
    assert all(f"ladder condition:{name} " in done.stdout for name in ("flat", "ttt"))
    assert " docs:2 " in done.stdout


# --- 6. The fuzzer ---------------------------------------------------------------------------------------------------


class TooLong(BaseException):
    """A case that took more than ten seconds. No `Exception`, lest what is tested swallows it."""

    @classmethod
    def ring(cls, *_):
        raise cls


NUMBERS = (0, 1, 2, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)


def mutated(rng, data, other):
    """`data` with one to four mistakes: bits, numbers, blocks cut, doubled, moved, or taken from `other`."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, start = rng.randrange(len(data) + 1), rng.randrange(len(other) + 1)
        size, bit = rng.choice((1, 2, 4, 8, 16, 100, 1000)), 1 << rng.randrange(8)
        end, new = rng.choice(
            (
                (at + 1, bytes(byte ^ bit for byte in data[at : at + 1])),
                (len(data), b""),
                (at + size, b""),
                (at, data[at : at + size]),
                (at + size, other[start : start + size]),
                (len(data), other[start:]),
                (at + 4, struct.pack("<I", rng.choice(NUMBERS))),
                (at + size, rng.randbytes(size)),
            )
        )
        data[at:end] = new
    return bytes(data)


JUNK = [
    None,
    0,
    -1,
    10**30,
    1.5,
    NAN,
    "",
    "int8",
    "a\nb",
    "\ud800",
    b"x",
    [],
    {},
    (),
    [1],
    {"a": 1},
    True,
]


def restructured(rng, content):
    """A nest of dicts with an entry lost, renamed, or made into something else; sometimes in two places."""
    inside = content
    while (
        (key := rng.choice([*inside, None]) if inside else None)
        and isinstance(inside[key], dict)
        and inside[key]
    ):
        inside = inside[key]
    key, kind = rng.choice([*inside] or [""]), rng.randrange(6)
    old = inside.pop(key, None)
    if kind == 1:
        inside[rng.choice([f"{key}x", "", BREAKS, 5, None, ("a",), *inside])] = old
    elif kind > 2 and isinstance(old, torch.Tensor):
        inside[key] = STRANGE_TENSORS[rng.choice([*STRANGE_TENSORS])](old)
    elif kind > 2 and isinstance(old, tuple):
        inside[key] = tuple(rng.choice([*JUNK, *old, *old, *old]) for _ in old)
    elif kind > 1:
        inside[key] = rng.choice([*JUNK, old])
    return content if rng.random() < 0.7 else restructured(rng, content)


def damaged_file(rng, kind, good, others):
    """(how, bytes) of a file of weights or a checkpoint with mistakes in one of its layers."""
    how, other = (
        rng.choice(("file", "zip", "pickle", "storage", "content", "content")),
        rng.choice(others),
    )
    if how == "content":
        with (
            contextlib.suppress(Exception),
            warnings.catch_warnings(),
        ):  # what cannot be saved is no file
            warnings.simplefilter("ignore")
            return how, in_form(
                kind, saved(restructured(rng, torch.load(io.BytesIO(good), weights_only=True)))
            )
        how = "pickle"
    if how == "file":
        return how, mutated(rng, in_form(kind, good), in_form(kind, other))
    if how == "zip":
        return how, in_form(kind, mutated(rng, good, other))
    name = "data.pkl" if how == "pickle" else f"data/{rng.randrange(4)}"
    with zipfile.ZipFile(io.BytesIO(other)) as archive:
        theirs = next(archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))
    return how, in_form(
        kind,
        rezipped(
            good,
            lambda entries: {
                n: mutated(rng, data, theirs) if n.endswith(name) else data
                for n, data in entries.items()
            },
        ),
    )


def damaged_environment(rng):
    """Some settings with values that may be good, of the wrong kind, out of range, or mutated."""
    names = [f.name for f in fields(tg.Config)]
    env = {
        "DEVICE": rng.choice(("cpu", "cpu", "cpu", "auto", "tpu")),
        "PRESET": rng.choice(("cpu", "baseline")),
    }
    for name in rng.sample(names, rng.choice((1, 1, 2, 3, 8))):
        value = rng.choice(
            [*VALUES, *(tg.spell(getattr(tg.Config(), rng.choice(names))) for _ in range(20))]
        )
        if rng.random() < 0.5:
            value = tg.spell(getattr(tg.Config(), name))
            value = mutated(rng, value.encode(), b"-1e9,nan.5").decode("utf-8", "surrogateescape")
        env[name.upper()] = value
    env |= (
        {"WORLD_SIZE": rng.choice(("1", "2", "3", "8", "0", "x", "-1", str(10**30)))}
        if rng.random() < 0.2
        else {}
    )
    return env


WRITES = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "shutil.",
    "socket.",
    "ctypes.dlopen",
    "pty.spawn",
)
WATCH = {"on": False, "seen": []}


def watch(event, arguments):
    """An audit hook: note what runs, connects, or writes while the watch is on."""
    if WATCH["on"] and threading.current_thread() is threading.main_thread():
        flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
        compiler = "torchinductor" in str(
            arguments[:1]
        )  # where torch keeps its own, made once at any odd moment
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or (
            event.startswith(WRITES) and not compiler
        ):
            WATCH["seen"].append((event, str(arguments)[:200]))


def outcome_of(work):
    """success, refused, or what went wrong."""
    signal.alarm(10)
    WATCH["on"] = True
    try:
        work()
        return "success"
    except tg.UserError as error:
        line = str(error)
        return (
            "refused"
            if line and line.isprintable() and len(line) < 1300
            else f"no clean line: {line!r:.300}"
        )
    except BaseException as error:  # SystemExit and TooLong too
        return f"escaped: {type(error).__name__}: {error}"[:300]
    finally:
        WATCH["on"] = False
        signal.alarm(0)


COUNTS = {"ptz": 760, "pt": 340, "state": 260, "bin": 330, "env": 420}


def fuzz_cases(folder, rng):
    """(kind, how it was damaged, the work to do, bytes or settings) of every case of the fuzzer."""
    good = {kind: saved(make_good()) for kind, make_good in GOOD.items()}
    whole = shard(count=500, tokens=np.arange(500) % 90)
    for kind, count in COUNTS.items():
        for number_ in range(count):
            path = folder / f"{number_}.{kind}"
            if kind == "env":
                env = damaged_environment(rng)
                yield kind, "settings", (lambda env=env: tg.read_config(env)), env
            elif kind == "bin":
                how = rng.choice(("header", "file"))
                head = (
                    mutated(rng, whole[:12], struct.pack("<4i", 20240520, 1, 500, -1)) + whole[12:]
                )
                path.write_bytes(
                    blob := head if how == "header" else mutated(rng, whole, good["pt"][:3000])
                )
                yield kind, how, (lambda path=path: use(path)), blob
            else:
                how, blob = damaged_file(rng, kind, good[kind], [*good.values()])
                path.write_bytes(blob)
                yield kind, how, (lambda path=path: use(path)), blob


def test_thousands_of_damaged_inputs_succeed_or_end_in_one_line(tmp_path, capsys, monkeypatch):
    (folder := tmp_path / "inputs").mkdir()
    (work := tmp_path / "work").mkdir()
    os.chdir(work)
    sys.addaudithook(watch)
    monkeypatch.setattr(warnings, "warn", lambda *_, **__: None)
    before = signal.signal(signal.SIGALRM, TooLong.ring)
    counts, wrong = Counter(), []
    for kind, how, act, what in fuzz_cases(folder, random.Random(20260605)):
        WATCH["seen"].clear()
        outcome = outcome_of(act)
        counts[kind, how, outcome if outcome in ("success", "refused") else "wrong"] += 1
        if outcome not in ("success", "refused") or WATCH["seen"]:
            wrong.append(
                (
                    kind,
                    how,
                    counts.total(),
                    outcome,
                    WATCH["seen"][:3],
                    what if kind == "env" else "",
                )
            )
    signal.signal(signal.SIGALRM, before)
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
        assert {outcome for _, outcome in found} == {
            "success",
            "refused",
        }  # some of the damage is harmless
