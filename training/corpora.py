"""Text that any environment carries: the sources of the standard library and the help topics of pydoc_data.

    >>> name, text = next(stdlib_documents())

A document belongs to the validation split when the SHA-256 of its text says so, hence the split never depends on file
order or dates.
"""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Tests repeat one pattern, the others are tables or stubs that say little about the language.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "encodings", "__pycache__", "pydoc_data", "lib2to3", "ensurepip"}
)
VALIDATION_SHARE = 0.03
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


def is_validation(text: str, share: float = VALIDATION_SHARE) -> bool:
    """Whether a document belongs to the validation split, by the hash of its text."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32
