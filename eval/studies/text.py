"""A model and a text for it to follow: for experiments that compare ways of evaluating the same tokens.

    >>> path, text = model_and_text("tiny", None, None)          # doctest: +SKIP
    >>> text(llm, 4)                                             # doctest: +SKIP
    [1153, 1154, 1155, 1156]

Either a planted model (eval/planted/model.py), which is made when missing and whose greedy text is known, or a file
with a text.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blockffn.errors import BlockffnError

Text = Callable[[Any, int], list[int]]  # (Llama, n) -> the first n tokens


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add -m, --shape and -f, the arguments of `model_and_text`."""
    models = parser.add_mutually_exclusive_group()
    models.add_argument("-m", "--model", metavar="M.gguf", help="a model, with -f")
    models.add_argument("--shape", default="1.2b", help="a planted model, Q4_0, made when missing (default: 1.2b)")
    parser.add_argument("-f", "--file", metavar="FILE", help="text for the model of -m")


def model_and_text(shape: str, path: str | None, file: str | None) -> tuple[str, Text]:
    """Return a model file and its text. Errors: BlockffnError for an unknown shape, a missing file or a short text."""
    return _planted(shape) if path is None else _given(path, file)


def _planted(name: str) -> tuple[str, Text]:
    from blockffn.eval.planted import files as planted_files
    from blockffn.eval.planted import model as planted

    files = planted_files.models(name)
    return str(files.union), lambda _llm, n: planted.text(files.shape, n)


def _given(path: str, file: str | None) -> tuple[str, Text]:
    if file is None:
        raise BlockffnError("-m: needs -f with a text for the model")
    content = Path(file).read_bytes()

    def tokens(llm: Any, n: int) -> list[int]:
        found: list[int] = llm.tokenize(content, add_bos=True)
        if len(found) < n:
            raise BlockffnError(f"{file}: expected at least {n} tokens, found {len(found)}; give a longer text")
        return found[:n]

    return path, tokens
