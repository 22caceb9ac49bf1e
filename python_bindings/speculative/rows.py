"""Logits kept for log-probabilities: only the rows that the answer needs, indexed by their place in the text.

>>> import numpy as np
>>> from blockffn.speculative.rows import Rows
>>> kept = Rows.of(np.arange(6.0, dtype=np.float32).reshape(2, 3), first=10)
>>> kept[11].tolist(), kept[10:].shape
([3.0, 4.0, 5.0], (2, 3))
"""

from __future__ import annotations

from typing import Any

import numpy as np


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
