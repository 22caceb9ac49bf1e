"""The list of tokens that a draft head with a cut vocabulary scores (FR-Spec, arXiv 2502.14856).

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "frequent.json"
    >>> _ = file.write_text("[7, 3, 5]")
    >>> read_draft_tokens(file, n_vocab=10)
    [7, 3, 5]

The order is free; the authors of FR-Spec publish the most frequent tokens of a vocabulary first, as .pt files.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from blockffn.errors import BlockffnError


def read_draft_tokens(path: Path, n_vocab: int) -> list[int]:
    """Read token ids: a JSON list, numbers separated by white space, or a list or vector that torch saved (.pt)."""
    wanted = f"expected a list of different token ids from 0 to {n_vocab - 1}"
    try:
        ids = _saved_list(path) if path.suffix in (".pt", ".pth", ".bin") else _listed(path.read_text())
    except OSError as error:
        raise BlockffnError(f"{path}: {wanted}: {error.strerror or error}") from error
    except (ValueError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise BlockffnError(f"{path}: {wanted} (JSON, or numbers with white space between): {reason}") from error
    if not ids:
        raise BlockffnError(f"{path}: {wanted}, found none")
    seen: set[int] = set()
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < n_vocab:
            raise BlockffnError(f"{path}: {wanted}, found {i!r}: a list for another vocabulary?")
        if i in seen:
            raise BlockffnError(f"{path}: {wanted}, found {i} twice")
        seen.add(i)
    return ids


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
    found = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(found, torch.Tensor):
        found = found.tolist()
    if not isinstance(found, list):
        raise ValueError(f"found a {type(found).__name__}")
    return found
