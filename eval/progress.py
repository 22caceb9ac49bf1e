"""Progress of long work: a bar with the time left on a terminal, a plain line every few seconds elsewhere.

>>> with Progress(2, "question") as progress:
...     progress.step()
...     progress.step()
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

EVERY = 10.0  # seconds between two lines


class Progress:
    """Counts `total` items, of which `done` are done already; writes to stderr."""

    def __init__(self, total: int, unit: str, done: int = 0) -> None:
        self._total, self._done, self._first, self._unit = total, done, done, unit
        self._started = self._said = time.monotonic()
        quiet = not sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit=unit, disable=quiet, leave=False)
        if done:
            print(f"{done} of {total} {unit}s were done before", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self) -> None:
        """Count one item."""
        self._bar.update(1)
        self._done += 1
        now = time.monotonic()
        if self._bar.disable and (now - self._said > EVERY or self._done == self._total):
            self._said = now
            left = (now - self._started) / (self._done - self._first) * (self._total - self._done)
            print(f"{self._done}/{self._total} {self._unit}s, {left:.0f} s left", file=sys.stderr, flush=True)
