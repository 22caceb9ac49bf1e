"""Text that any environment carries: the sources of the standard library and the help topics of pydoc_data.

    >>> name, text = next(stdlib_documents())

    >>> train, validation = split([text for _, text in stdlib_documents()])

A document is a candidate for the validation split when the SHA-256 of its text says so, hence the split never depends
on file order or dates. Two kinds of candidates train all the same. A long one would dominate the validation loss: os.py
and ntpath.py alone would be half of it. A near-copy of another document would measure memory: ntpath.py says much of
what posixpath.py says, and most help topics are parts of longer ones.
"""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

# Tests repeat one pattern, the others are tables or stubs that say little about the language.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "encodings", "__pycache__", "pydoc_data", "lib2to3", "ensurepip"}
)
VALIDATION_SHARE = 0.12  # of the documents are candidates; 28 of 592 remain with CPython 3.11, 2 % of the text
VALIDATION_CHARS = (1_000, 15_000)  # shortest and longest document of the validation split
NEAR_COPY = 0.2  # a candidate that shares more of its distinct lines with one other document trains
SHORT_LINE = 12  # characters; shorter lines, like `return None`, occur everywhere and do not count
SPLIT = (VALIDATION_SHARE, *VALIDATION_CHARS, NEAR_COPY, SHORT_LINE)  # another split needs other tokens
MAX_DOCUMENT_CHARS = 200_000  # longer files are generated tables


def stdlib_documents() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document, sorted by name; files that are not UTF-8 are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or any(part.startswith("config-") for part in relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if 200 <= len(text) <= MAX_DOCUMENT_CHARS:
            yield relative.as_posix(), text.replace("\r\n", "\n")
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield f"pydoc_data/topics/{name}", topics[name]


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Return (train, validation), each in the order of `texts`; see the module's docstring for the rule."""
    lines = [_lines(text) for text in texts]
    validation = []
    for i, text in enumerate(texts):
        low, high = VALIDATION_CHARS
        others = (other for j, other in enumerate(lines) if j != i)
        if is_validation(text) and low <= len(text) <= high and not _is_near_copy(lines[i], others):
            validation.append(i)
    chosen = set(validation)
    return [text for i, text in enumerate(texts) if i not in chosen], [texts[i] for i in validation]


def _lines(text: str) -> frozenset[str]:
    """The distinct lines of a document, white space apart, without the short ones."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return frozenset(line for line in lines if len(line) >= SHORT_LINE)


def _is_near_copy(own: frozenset[str], others: Iterable[frozenset[str]]) -> bool:
    return any(len(own & other) > NEAR_COPY * len(own) for other in others)


def is_validation(text: str, share: float = VALIDATION_SHARE) -> bool:
    """Whether a document is a candidate for the validation split, by the hash of its text."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32
