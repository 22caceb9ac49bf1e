"""The list of tokens that a draft head with a cut vocabulary scores (FR-Spec, arXiv 2502.14856).

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "frequent.json"
    >>> _ = file.write_text("[7, 3, 5]")
    >>> read_draft_tokens(file, n_vocab=10)
    [7, 3, 5]

The order is free; the authors of FR-Spec publish the most frequent tokens of a vocabulary first, as .pt files. Those of
BlockFFN keep `freq_N.pkl`, a plain pickle, inside the head's folder.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from blockffn.convert.fields import shown
from blockffn.convert.pickles import check_archive
from blockffn.errors import BlockffnError

LARGEST_BYTES = 64 << 20  # of the file: 250,000 ids take 2 MB


def read_draft_tokens(path: Path, n_vocab: int) -> list[int]:
    """Read token ids: a JSON list, numbers separated by white space, a plain pickle (.pkl) of a list or of a mapping
    from ids to counts, or a list or vector that torch saved (.pt)."""
    wanted = f"expected a list of different token ids from 0 to {n_vocab - 1}"
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ValueError(f"the file has more than {LARGEST_BYTES >> 20} MiB")
        ids = _read(path)
    except OSError as error:
        raise BlockffnError(f"{path}: {wanted}: {error.strerror or error}") from error
    except BlockffnError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        reason = str(error).partition("\n")[0]
        raise BlockffnError(f"{path}: {wanted} (JSON, or numbers with white space between): {reason}") from error
    if not ids:
        raise BlockffnError(f"{path}: {wanted}, found none")
    seen: set[int] = set()
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < n_vocab:
            raise BlockffnError(f"{path}: {wanted}, found {shown(i)}: a list for another vocabulary?")
        if i in seen:
            raise BlockffnError(f"{path}: {wanted}, found {i} twice")
        seen.add(i)
    return ids


def _read(path: Path) -> list[Any]:
    if path.suffix in (".pt", ".pth", ".bin"):
        return _saved_list(path)
    return _pickled(path.read_bytes()) if path.suffix in (".pkl", ".pickle") else _listed(path.read_text("utf-8"))


class _PlainUnpickler(pickle.Unpickler):
    """Loads lists, mappings, numbers and texts; no class but Counter, and no function."""

    def find_class(self, module: str, name: str) -> type[Counter[Any]]:
        if (module, name) == ("collections", "Counter"):
            return Counter
        _refuse(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        _refuse(f"the reference {shown(pid)}")


def _refuse(what: str) -> NoReturn:
    raise pickle.UnpicklingError(f"refused: the pickle asks for {what}, and loading that could run code")


def _pickled(content: bytes) -> list[Any]:
    """Read a plain pickle without running code from it."""
    for code, argument, _ in pickletools.genops(content):
        if "PUT" in code.name and int(argument or 0) > len(content):  # pickle would make a table of that length
            raise ValueError(f"{code.name} {argument}: a damaged pickle")
    found = _PlainUnpickler(io.BytesIO(content)).load()
    if not isinstance(found, list | dict):
        raise ValueError(f"found a {type(found).__name__}")
    return list(found)


def _listed(text: str) -> list[Any]:
    if not text.lstrip().startswith(("[", "{")):
        return [int(word) for word in text.split()]
    found = json.loads(text)
    if not isinstance(found, list):
        raise ValueError(f"found a JSON {type(found).__name__}")
    return found


def _saved_list(path: Path) -> list[Any]:
    """Read what torch.save wrote, without running code from the file."""
    try:
        import torch
    except ImportError as error:
        raise ValueError("reading torch files needs torch: pip install 'blockffn[train]'") from error
    if path.read_bytes()[:4] == b"PK\x03\x04":
        check_archive(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(found, torch.Tensor):
        found = found.tolist()
    if not isinstance(found, list):
        raise ValueError(f"found a {type(found).__name__}")
    return found
