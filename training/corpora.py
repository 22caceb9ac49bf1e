"""Documents to train on, from the sources that a training file names, and the split into training and validation.

    >>> sources = open_sources(["stdlib"])
    >>> name, text = next(iter(sources[0]))
    >>> len(choose_validation(sources, share=0.12))
    28

A source is ``stdlib`` (the standard library and the help topics of pydoc_data), ``package:NAME`` (the Python sources of
an installed package), or a path: a text file, a ``.jsonl`` file, a folder of both, a pattern like ``docs/**/*.md``.

A document is a candidate for the validation split when the SHA-256 of its text says so, hence the split never depends
on file order or dates. Two kinds of candidates train all the same. A long one would dominate the validation loss: os.py
and ntpath.py alone would be half of it. A near-copy of another document would measure memory: ntpath.py says much of
what posixpath.py says, and most help topics are parts of longer ones.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockffn.errors import BlockffnError

# Tests repeat one pattern, the others are tables or stubs that say little about the language.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "encodings", "__pycache__", "pydoc_data", "lib2to3", "ensurepip"}
)
VALIDATION_CHARS = (1_000, 15_000)  # shortest and longest document of the validation split
NEAR_COPY = 0.2  # a candidate that shares more of its distinct lines with one other document trains
SHORT_LINE = 12  # characters; shorter lines, like `return None`, occur everywhere and do not count
SPLIT = (*VALIDATION_CHARS, NEAR_COPY, SHORT_LINE)  # another split needs other tokens
MODULE_CHARS = (200, 200_000)  # shortest and longest module; longer ones are generated tables

Document = tuple[str, str]  # name, text


@dataclass(frozen=True)
class Source:
    """Documents that can be read again and again, in one order. key: what changes when the text may have changed."""

    name: str
    key: Any  # JSON types
    read: Callable[[], Iterator[Document]]

    def __iter__(self) -> Iterator[Document]:
        return self.read()


def open_sources(names: Sequence[str], json_field: str = "text", package_mb: float = 8.0) -> list[Source]:
    """Return the sources in the order of `names`. json_field: where a line of a .jsonl file has its text.

    package_mb: of each package so much text at most, 10^6 characters, in the order of its files. Raises BlockffnError
    for a source that does not exist; reading one, for a file that is not UTF-8 or a line that is not JSON.
    """
    if not names:
        raise BlockffnError("[corpus] sources: expected at least one source, found none")
    return [_open(name, json_field, package_mb) for name in names]


def _open(name: str, json_field: str, package_mb: float) -> Source:
    if name == "stdlib":
        return Source(name, sys.version.split()[0], stdlib_documents)
    if name.startswith("package:"):
        return _package(name, package_mb)
    path = Path(name)
    if path.is_dir():
        files = sorted(_text_files(path))
    else:
        files = [path] if path.is_file() else sorted(map(Path, glob.glob(name, recursive=True)))
        if not files:
            raise BlockffnError(
                f"[corpus] sources: {name}: no such file or folder, and neither stdlib nor package:NAME"
            )
    if not files:
        raise BlockffnError(f"[corpus] sources: {name}: the folder holds no file (hidden ones are left out)")
    stats = [(str(file), file.stat()) for file in files]
    key = [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]
    return Source(name, [key, json_field], lambda: (found for file in files for found in _read(file, json_field)))


def _text_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _read(path: Path, json_field: str) -> Iterator[Document]:
    """Yield the documents of one file: the whole text, or a document per line of a .jsonl file."""
    if path.suffix != ".jsonl":
        yield str(path), _decode(path, path.read_bytes(), 0)
        return
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}:{number}", _field(f"{path}:{number}", _decode(path, line, offset), json_field)
            offset += len(line)


def _decode(path: Path, raw: bytes, offset: int) -> str:
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as err:
        raise BlockffnError(
            f"{path}: expected UTF-8 text, found byte 0x{raw[err.start]:02x} at offset {offset + err.start}; "
            "convert the file, or take it out of the source"
        ) from err


def _field(where: str, line: str, json_field: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as err:
        raise BlockffnError(f"{where}: not a line of JSON: {err}") from err
    text = row.get(json_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise BlockffnError(
            f"{where}: expected a text in the field {json_field!r}, found {found}; see json_field in [corpus]"
        )
    return text


def stdlib_documents() -> Iterator[Document]:
    """Yield (name, text) of every module of the standard library, sorted by name, and of every help topic."""
    yield from _modules(Path(sysconfig.get_paths()["stdlib"]))
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield f"pydoc_data/topics/{name}", topics[name]


def _package(name: str, package_mb: float) -> Source:
    module = name.partition(":")[2]
    found = importlib.util.find_spec(module) if module.isidentifier() else None
    folders = list(found.submodule_search_locations or []) if found else []
    if not folders:
        raise BlockffnError(f"[corpus] sources: {name}: no such package in this environment; install it, or remove it")
    distributions = importlib.metadata.packages_distributions().get(module, [module])
    versions = sorted({f"{d}=={importlib.metadata.version(d)}" for d in distributions})

    def read() -> Iterator[Document]:
        left = 1e6 * package_mb
        for path, text in _modules(Path(folders[0])):
            left -= len(text)
            if left < 0:
                return
            yield f"{module}/{path}", text

    return Source(name, [versions, package_mb], read)


def _modules(root: Path) -> Iterator[Document]:
    """Yield the Python sources below `root`, sorted by name; files that are not UTF-8 are left out."""
    low, high = MODULE_CHARS
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or any(part.startswith("config-") for part in relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if low <= len(text) <= high:
            yield relative.as_posix(), text.replace("\r\n", "\n")


def choose_validation(sources: Sequence[Iterable[Document]], share: float) -> frozenset[bytes]:
    """Return the SHA-256 of the texts that validate; `share` of all documents are candidates.

    Reads the sources twice and keeps the candidates' lines only.
    """
    low, high = VALIDATION_CHARS
    lines: dict[bytes, frozenset[str]] = {}
    for _, text in _all(sources):
        if low <= len(text) <= high and is_candidate(text, share):
            lines[digest(text)] = _lines(text)
    having: dict[str, list[bytes]] = {}  # line -> candidates
    for candidate, own in lines.items():
        for line in own:
            having.setdefault(line, []).append(candidate)

    copies: set[bytes] = {candidate for candidate, own in lines.items() if not own}
    seen: set[bytes] = set()
    for _, text in _all(sources):
        document = digest(text)
        itself = None if document in seen else document  # a second time it is a copy
        if document in lines:
            seen.add(document)
        shared = Counter(c for line in _lines(text) for c in having.get(line, ()) if c != itself)
        copies.update(candidate for candidate, n in shared.items() if n > NEAR_COPY * len(lines[candidate]))
    return frozenset(lines.keys() - copies)


def _all(sources: Sequence[Iterable[Document]]) -> Iterator[Document]:
    return (document for source in sources for document in source)


def _lines(text: str) -> frozenset[str]:
    """The distinct lines of a document, white space apart, without the short ones."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return frozenset(line for line in lines if len(line) >= SHORT_LINE)


def digest(text: str) -> bytes:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8")).digest()


def is_candidate(text: str, share: float) -> bool:
    """Whether a document is a candidate for the validation split, by the hash of its text."""
    return int.from_bytes(digest(text)[:4], "big") < share * 2**32
