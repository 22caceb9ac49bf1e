"""Logits kept for log-probabilities: only the rows that the answer needs, indexed by their position in the text.

>>> import numpy as np
>>> from blockffn.speculative.rows import KeptRows
>>> kept = KeptRows(n_vocab=3)
>>> kept.begin(11)                                # a prompt of 11 tokens: all of it may come from the cache
11
>>> kept.put(10, np.arange(6.0).reshape(2, 3))    # the rows of positions 10 and 11
>>> rows = kept.rows()
>>> rows[11].tolist(), rows[10:].shape
([3.0, 4.0, 5.0], (2, 3))
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
FIRST_GROWTH = 16  # rows of the first memory; each next one is twice as large


class KeptRows:
    """Rows of logits, the one at position p scoring token p + 1, in one array that grows; `rows` are views of it.

    prompt: keep the rows of the prompt, not only those of the generated tokens. memory: float32 [n_ctx, n_vocab] that
    holds the rows of all positions from one generation to the next (llama_cpp's `scores` with logits_all).
    """

    def __init__(self, n_vocab: int, prompt: bool = False, memory: Floats | None = None) -> None:
        self.prompt = prompt or memory is not None
        self.known = 0  # rows that are there
        self._first = 0  # position of the first of them
        self._memory = np.zeros((0, n_vocab), dtype=np.float32) if memory is None else memory

    def begin(self, n_prompt: int) -> int:
        """Start with a prompt of so many tokens; return how many of them need not be evaluated for their rows."""
        if self.prompt:
            return self.known
        self._first, self.known = n_prompt - 1, 0
        return n_prompt

    def put(self, position: int, rows: Floats) -> None:
        """Copy the rows of positions position, ... float32 [n, n_vocab] (or one row); later ones are forgotten."""
        rows = np.atleast_2d(rows)
        start = position - self._first
        self.known = start + len(rows)
        if self.known > len(self._memory):
            larger = np.zeros((max(FIRST_GROWTH, 2 * len(self._memory), self.known), rows.shape[1]), dtype=np.float32)
            larger[:start] = self._memory[:start]
            self._memory = larger
        self._memory[start : self.known] = rows

    def rows(self) -> Rows:
        """Return a view of the rows, indexed by position."""
        return Rows.of(self._memory[: self.known], self._first)


class Rows(np.ndarray[Any, np.dtype[np.float32]]):
    """float32 [n, n_vocab] whose first row carries the index `first`; arithmetic keeps the index."""

    first: int = 0

    @staticmethod
    def of(array: Any, first: int) -> Rows:
        """View an array as rows first, first + 1, ..."""
        rows: Rows = np.asarray(array, dtype=np.float32).view(Rows)
        rows.first = first
        return rows

    def __array_finalize__(self, source: Any) -> None:
        """Inherit the index in arithmetic."""
        self.first = getattr(source, "first", 0)

    def __getitem__(self, key: Any) -> Any:
        """Index by place in the text; slices and rows come back as plain arrays."""
        plain = self.view(np.ndarray)
        head, rest = (key[0], key[1:]) if isinstance(key, tuple) else (key, ())
        place: Any = head
        if isinstance(head, slice):
            start = None if head.start is None else max(0, head.start - self.first)
            stop = None if head.stop is None else max(0, head.stop - self.first)
            place = slice(start, stop, head.step)
        elif isinstance(head, (int, np.integer)) and head >= 0:
            if not self.first <= head < self.first + len(plain):
                raise IndexError(f"row {head} was not kept: rows {self.first} to {self.first + len(plain) - 1} were")
            place = head - self.first
        index = (place, *rest)
        return plain[index]
