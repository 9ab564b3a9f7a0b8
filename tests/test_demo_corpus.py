"""demo_corpus.py: which files it reads, what it takes from them, and one run for real."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import demo_corpus
import pytest

PROSE = (
    "A sentence long enough to be worth keeping, said again in other words so that it counts. " * 3
)
TOPIC = "Help is a function of the language that its users call. " * 5


def module(text):
    return f'"""{text}"""\n'


def corpus(out, sources):
    """Facts and documents, by name, of a corpus from these modules and one topic."""
    files = []
    for name, source in sources.items():
        path = out.parent / f"{name}.py"
        path.write_text(source, encoding="latin-1")
        files.append((name, path))
    facts = demo_corpus.build_corpus(out, [("help me", TOPIC)], files)
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return facts, {record["source"]: record["text"] for record in records}


# --- What a module says ----------------------------------------------------------------------------------------------


def test_docstrings_come_in_source_order_under_their_names():
    source = '''
"""About the module.

Like this:

    an indented example
"""
class Outer(dict):
    """A class."""
    async def method(self):
        """
        First line.

            deeper
        """
    class Inner:
        def silent(self): return lambda: "no docstring"
        def told(self): r"""Of \\d digits."""
if True:
    try:
        def hidden():
            def nested(): "Single quotes."
    finally:
        pass
value = "an old pattern: \\d"
"""A string that documents a value, for other tools."""
'''
    assert demo_corpus.module_document(source.encode()) == (
        "About the module.\n\nLike this:\n\n    an indented example\n\nOuter\nA class.\n\n"
        "Outer.method\nFirst line.\n\n    deeper\n\nOuter.Inner.told\nOf \\d digits.\n\n"
        "hidden.nested\nSingle quotes."
    )


# --- What is kept ----------------------------------------------------------------------------------------------------


def test_dropped_documents_are_counted_by_reason(tmp_path):
    limit = demo_corpus.MIN_CHARS
    sources = {
        "a_good": module(PROSE),
        "b_copy": module(PROSE) + "raise SystemExit('imported')\n",
        "c_just_enough": module("y" * limit),
        "d_short": module("z" * (limit - 1)),
        "e_silent": "x = 1\n",
        "f_template": "def {{ name }}(:\n",
        "g_not_utf8": module(PROSE + "é"),
        "h_surrogate": module(PROSE + "\\ud800"),
    }
    facts, documents = corpus(tmp_path / "docs.jsonl", sources)
    assert documents == {"help me": TOPIC, "a_good": PROSE.strip(), "c_just_enough": "y" * limit}
    counts = {"duplicate": 1, "short": 1, "unreadable": 3, "without_docstrings": 1}
    assert facts["dropped"] == counts


def test_equal_runs_give_equal_bytes(tmp_path):
    """With several chunks of modules for several processes."""
    sources = {f"m{i:03}": module(f"{PROSE} {i}") for i in range(100)}
    _, documents = corpus(tmp_path / "one.jsonl", sources)
    corpus(tmp_path / "two.jsonl", sources)
    assert list(documents) == ["help me", *sources]
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


# --- Which files -----------------------------------------------------------------------------------------------------


def test_accelerator_packages_stay_out(monkeypatch):
    """A CUDA build of torch requires more than the CPU build; both must give the same corpus."""
    torch = Mock(requires=["triton==3.4; platform_system == 'Linux'", "nvidia-cublas==1", "sympy"])
    distributions = {"torch": torch, "sympy": Mock(requires=None)}
    monkeypatch.setattr(demo_corpus.metadata, "distribution", distributions.get)
    assert list(demo_corpus.installed_closure(["torch"])) == ["sympy", "torch"]


def test_missing_package_is_named():
    with pytest.raises(ValueError, match=r"^no-such-thing: found no such .* expected .*install -r"):
        demo_corpus.installed_closure(["No_Such.Thing"])


def test_scripts_of_a_package_stay_out():
    assert not demo_corpus.is_wanted(Path("../../../bin/tool.py"))


# --- The command -----------------------------------------------------------------------------------------------------


def test_writing_that_fails_keeps_the_earlier_file(tmp_path):
    def chunks():
        yield b"half a document"
        raise OSError("disk full")

    (tmp_path / "docs.jsonl").write_bytes(b"earlier")
    with pytest.raises(OSError, match="disk full"):
        demo_corpus.write_atomically(tmp_path / "docs.jsonl", chunks())
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]
    assert (tmp_path / "docs.jsonl").read_bytes() == b"earlier"


def run_script(out):
    return subprocess.run(
        [sys.executable, demo_corpus.__file__, "--out", out], capture_output=True, text=True
    )


def test_bad_path_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run_script(tmp_path / "file" / "docs.jsonl")
    assert done.returncode == 1
    assert re.fullmatch(f"error: {tmp_path / 'file'}: .*; expected .*\n", done.stderr)


def test_whole_corpus(tmp_path):
    """The one real run: what it reads and what not, the manifest's numbers, sizes as in README.md."""
    out = tmp_path / "new" / "docs.jsonl"
    done = run_script(out)
    assert (done.returncode, done.stderr) == (0, "")
    manifest = json.loads((out.parent / "docs.manifest.json").read_text())
    content = out.read_bytes()
    records = [json.loads(line) for line in content.splitlines()]
    names = [record["source"] for record in records]
    texts = [record["text"] for record in records]
    assert {"argparse", "json", "asyncio.events", "help with", "torch", "numpy.linalg"} <= set(
        names
    )
    assert {"jinja2", "markupsafe", "tqdm", "huggingface-hub"} <= set(manifest["packages"])
    others = r"site-packages|\btests?\.|^(idlelib|pip|pytest)\b"
    assert not re.search(others, "\n".join(names), re.MULTILINE)
    assert f"{len(texts):,} documents" in done.stdout
    assert manifest["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest["documents"] == len(texts) == len(set(texts))
    sizes = sorted(len(text.encode()) for text in texts)
    assert manifest["text_bytes"] == sum(sizes)
    assert manifest["median_bytes"] == sizes[len(sizes) // 2]
    assert manifest["longest_bytes"] == sizes[-1]
    assert manifest["python"] == sys.version.split()[0]
    assert 3000 < len(texts) < 6000
    assert 14e6 < manifest["text_bytes"] < 25e6
