"""Write an English corpus from the documentation inside the Python code that is installed here.

    python data/demo_corpus.py --out data/demo/docs.jsonl

One document a module: its docstring and those of its classes and functions, from the standard
library and from the packages that requirements.txt brings in; plus the topics of Python's help().
It is technical English with formulas and examples, in documents from a paragraph to a book chapter:
not FineWeb, but real text to try everything on without a download. Sources are parsed, never
imported. The same Python and package versions give the same bytes.
"""

import argparse
import ast
import hashlib
import inspect
import json
import os
import platform
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement

ROOTS = ("torch", "numpy", "sentencepiece", "huggingface_hub")
# Below this a document is a title or a licence line, with nothing to learn from its context.
MIN_CHARS = 200
# Test suites hold code to run, not prose, and many systems leave them out of their Python, as they
# do these parts of the standard library. Without them the corpus depends on the Python version, not
# on who packaged it.
SKIPPED_FOLDERS = {"test", "tests"}
OPTIONAL_STDLIB = {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo", "venv"}
# Installed with a CUDA build of torch only: the corpus must not depend on which build that is.
ACCELERATOR_PACKAGE = re.compile(r"nvidia-|cuda-|triton|pytorch-triton")


# --- Which files ----------------------------------------------------------------------------------


def installed_closure(roots: Iterable[str]) -> dict[str, metadata.Distribution]:
    """The roots and everything they require here, by normalised name.

    Whatever else is installed (pytest, say) stays out, so that a developer's corpus is the user's.
    """
    found, waiting = {}, list(roots)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found or ACCELERATOR_PACKAGE.match(name):
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise ValueError(
                f"{name}: found no such package; expected it beside {sys.executable}; "
                "run pip install -r requirements.txt"
            ) from None
        for requirement in map(Requirement, found[name].requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return dict(sorted(found.items()))


def module_name(relative: Path) -> str:
    """The dotted name that Python would import this file by."""
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_wanted(relative: Path) -> bool:
    """Whether this file, named relative to its import root, belongs to the corpus.

    ".." marks what pip put outside the import root: command-line scripts, which are a few lines of
    code.
    """
    return (
        relative.suffix == ".py"
        and ".." not in relative.parts
        and not SKIPPED_FOLDERS & set(relative.parts[:-1])
    )


def stdlib_files() -> Iterator[tuple[str, Path]]:
    """(module name, file) for the standard library.

    Its folder also holds site-packages and, on some systems, additions of the distributor, hence
    the list of names.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules = sys.stdlib_module_names - OPTIONAL_STDLIB
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if relative.with_suffix("").parts[0] in modules and is_wanted(relative):
            yield module_name(relative), path


def package_files(package: metadata.Distribution) -> Iterator[tuple[str, Path]]:
    """(module name, file) as pip's record lists this package: no caches, nothing added later."""
    for relative in package.files or []:
        if is_wanted(Path(relative)):
            yield module_name(Path(relative)), Path(package.locate_file(relative))


# --- What they say --------------------------------------------------------------------------------


def docstrings(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, cleaned docstring) of classes and functions below this node, in source order.

    Definitions under "if" and "try" count too. Expressions cannot hold any, and skipping them
    halves the time.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            continue
        name = prefix
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{child.name}" if prefix else child.name
            if text := ast.get_docstring(child):
                yield name, text
        yield from docstrings(child, name)


def module_document(source: bytes) -> str:
    """All docstrings of a module as plain text.

    The module's own comes first, then each name on a line above what it says.
    SyntaxError or ValueError for what is no Python source. Code and comments are left out: the
    corpus is English.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # old code with "\d" in a plain string is no concern of ours
        tree = ast.parse(source)
    sections = [ast.get_docstring(tree) or ""]
    sections += [f"{name}\n{text}" for name, text in docstrings(tree)]
    return "\n\n".join(section.strip() for section in sections if section.strip())


def read_module(file: tuple[str, Path]) -> tuple[str, str | None]:
    """(module name, document); None where Python cannot read the file (a template, say)."""
    name, path = file
    try:
        text = module_document(path.read_bytes())
        text.encode(
            "utf-8"
        )  # a docstring may spell half a surrogate pair, which no UTF-8 file can hold
    except (OSError, SyntaxError, ValueError):
        return name, None
    return name, text


def help_topics() -> Iterator[tuple[str, str]]:
    """(name, text) of the language reference behind help("TOPIC"), a dictionary in a module."""
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                yield f"help {topic}", inspect.cleandoc(text)


# --- Writing the corpus ---------------------------------------------------------------------------


def keep(
    documents: Iterable[tuple[str, str | None]], dropped: Counter
) -> Iterator[tuple[str, str]]:
    """The documents worth having, each text once; counts the others by reason.

    Packages carry copies of each other (setuptools those of packaging, say): a copy in validation
    of a training document would make every score on this corpus look better than it is.
    """
    seen = set()
    for name, text in documents:
        digest = hashlib.sha256((text or "").encode("utf-8")).digest()
        if text is None:
            dropped["unreadable"] += 1
        elif len(text) < MIN_CHARS:
            dropped["short" if text else "without_docstrings"] += 1
        elif digest in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(digest)
            yield name, text


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Write under a temporary name and rename at the end: the final name never holds half a file.

    The temporary name is in the same folder, as a rename between two disks would be a copy.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def build_corpus(
    out: Path, topics: Iterable[tuple[str, str]], files: list[tuple[str, Path]]
) -> dict:
    """Write these topics and the documents of these (module name, file) pairs; return their facts.

    Parsing takes nearly all the time, so it is spread over the cores; map() keeps the order of the
    files whatever finishes first.
    """
    out.parent.mkdir(
        parents=True, exist_ok=True
    )  # first of all: a bad path should not cost the whole run
    lines, sizes, dropped = [], [], Counter()
    with ProcessPoolExecutor() as pool:
        documents = chain(topics, pool.map(read_module, files, chunksize=32))
        for name, text in keep(documents, dropped):
            lines.append(
                json.dumps({"source": name, "text": text}, ensure_ascii=False).encode("utf-8")
                + b"\n"
            )
            sizes.append(len(text.encode("utf-8")))
    write_atomically(out, lines)
    return {
        "documents": len(sizes),
        "text_bytes": sum(sizes),
        "median_bytes": sorted(sizes)[len(sizes) // 2],
        "longest_bytes": max(sizes),
        "dropped": dict(sorted(dropped.items())),
        "sha256": hashlib.sha256(b"".join(lines)).hexdigest(),
    }


def make_demo_corpus(out: Path) -> dict:
    """Write the corpus of this installation and, beside it, the manifest that is also returned."""
    packages = installed_closure(ROOTS)
    files = sorted(stdlib_files())
    for (
        package
    ) in packages.values():  # in order of name; packages and folders list their files in any order
        files += sorted(package_files(package))
    manifest = {
        "python": platform.python_version(),
        "packages": {name: package.version for name, package in packages.items()},
        **build_corpus(out, help_topics(), files),
    }
    write_atomically(
        out.with_suffix(".manifest.json"), [(json.dumps(manifest, indent=2) + "\n").encode("utf-8")]
    )
    return manifest


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status. What a user can get wrong is one line on stderr."""
    parser = argparse.ArgumentParser(
        description="Write an English corpus from the documentation on this machine."
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="JSONL file to write; its manifest goes beside it"
    )
    out = parser.parse_args(arguments).out
    try:
        manifest = make_demo_corpus(out)
    except OSError as error:
        print(
            f"error: {error.filename or out}: {error.strerror}; expected a usable path; check it",
            file=sys.stderr,
        )
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    dropped = ", ".join(f"{count} {reason}" for reason, count in manifest["dropped"].items())
    print(
        f"{out}: {manifest['documents']:,} documents, {manifest['text_bytes']:,} bytes"
        f" (dropped: {dropped})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
