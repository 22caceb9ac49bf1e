"""Tokens to text, piece by piece: whole characters only, and nothing that may belong to a stop text.

>>> from blockffn.engine.text import TextPieces
>>> pieces = TextPieces(("END",))
>>> pieces.add(b"one E"), pieces.add(b"N"), pieces.stopped
('one ', '', False)
>>> pieces.add(b"D two"), pieces.stopped
('', True)
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextPieces:
    """Decodes the bytes of an answer. What follows the first stop text, and that itself, is never given out."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = tuple(stops)
        self._held = ""  # the beginning of a stop text, perhaps
        self.stopped = False

    def add(self, data: bytes) -> str:
        """Return the text that is certain after these bytes."""
        text = self._decoder.decode(data)
        return self._take(text) if self._stops else text

    def finish(self) -> str:
        """Return what was held back: the answer ends here."""
        rest = self._take(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _take(self, text: str) -> str:
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
