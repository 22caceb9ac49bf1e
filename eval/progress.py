"""Progress of long work: a bar with the time left on a terminal, a plain line every few seconds elsewhere.

>>> with Progress(2, "question") as progress:
...     progress.step()
...     progress.step()

Everything goes to stderr, so that stdout holds the result alone.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

EVERY = 10.0  # seconds between two lines


class Progress:
    """Counts `total` items, of which `done` are done already; `quiet` shows nothing."""

    def __init__(self, total: int, unit: str, done: int = 0, quiet: bool = False) -> None:
        self._total, self._done, self._first, self._unit = total, done, done, unit
        self._started = self._said = time.monotonic()
        self._lines = not sys.stderr.isatty() and not quiet
        self._bar = tqdm(total=total, initial=done, unit=f" {unit}", disable=quiet or self._lines, leave=False)
        if done:
            print(f"{done} of {total} {unit}s were done before", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self, count: int = 1, note: str = "") -> None:
        """Count items; `note` stands beside them, as the figure so far."""
        if note and not self._bar.disable:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        self._done += count
        now = time.monotonic()
        if self._lines and now - self._said > EVERY:
            self._said = now
            left = (now - self._started) / max(1, self._done - self._first) * (self._total - self._done)
            parts = [f"{self._done}/{self._total} {self._unit}s", *([note] if note else []), f"{duration(left)} left"]
            print(", ".join(parts), file=sys.stderr, flush=True)


class Shown:
    """A callback for functions that tell (items done, items in all, figure so far): shows them as a `Progress`."""

    def __init__(self, figure: str, unit: str) -> None:
        self._figure, self._unit = figure, unit
        self._progress: Progress | None = None
        self._done = 0

    def __call__(self, done: int, total: int, value: float) -> None:
        """Show the state. The first call tells where the work begins: after what an interrupted run had done."""
        if self._progress is None:
            self._done = done if done > 1 else 0  # 1: the first item of a run that began at none
            self._progress = Progress(total, self._unit, self._done)
        self._progress.step(done - self._done, f"{self._figure} {value:.5g}")
        self._done = done
        if done >= total:
            self._progress.__exit__(None, None, None)


def duration(seconds: float) -> str:
    """Return seconds in words.

    >>> duration(7.4), duration(125), duration(7300)
    ('7 s', '2 min', '2 h 02 min')
    """
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
