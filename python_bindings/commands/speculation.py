"""What drafts were worth, in words: for `--stats` of `blockffn run` and `blockffn chat`, live and at the end.

>>> from blockffn.commands.speculation import summary
>>> summary({"drafted": 8, "accepted": 6, "tokens_per_step": 2.5, "predicted_per_second": 41.0})
'41.0 tokens/s, 2.50 tokens per step, 6 of 8 drafted tokens accepted (75 %)'
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

POSITIONS = 8  # of a draft that the report lists
REFRESH = 0.2  # seconds between two updates of the live line


def summary(figures: dict[str, Any]) -> str:
    """Return one line about a generation that may still go on; `figures` as Llama.statistics() gives them."""
    speed, per_step = figures["predicted_per_second"], figures["tokens_per_step"]
    parts = [f"{speed:.1f} tokens/s"] if speed else []
    parts += [f"{per_step:.2f} tokens per step"] if per_step else []
    drafted, accepted = figures["drafted"], figures["accepted"]
    share = f" ({100 * accepted / drafted:.0f} %)" if drafted else ""
    return ", ".join([*parts, f"{accepted} of {drafted} drafted tokens accepted{share}"])


def lines(figures: dict[str, Any]) -> list[str]:
    """Return the report of a generation, one line per subject."""
    drafted, accepted, steps = figures["drafted"], figures["accepted"], figures["steps"]
    if not drafted:
        return [f"none made in {steps} steps{_given_up(figures)}"]
    reached, right = figures["drafted_by_position"], figures["accepted_by_position"]
    positions = [f"{100 * a / n:.0f}" for n, a in zip(reached, right, strict=True) if n][:POSITIONS]
    more = ", ..." if len(reached) > POSITIONS else ""
    with_draft = steps - figures["plain_steps"]
    trees = figures["tree_steps"]
    kinds = [f"{figures['plain_steps']} plain"] if figures["plain_steps"] else []
    kinds += [f"{with_draft - trees} chains"] if with_draft > trees else []
    kinds += [f"{trees} trees"] if trees else []
    found = [
        f"{accepted} of {drafted} tokens accepted ({100 * accepted / drafted:.0f} %); by position "
        f"{', '.join(positions)}{more} %",
        f"{figures['tokens_per_step']:.2f} tokens per step; {steps} steps: {', '.join(kinds)}, "
        f"{drafted / with_draft:.1f} tokens in a draft",
        f"a step takes {figures['draft_ms'] / steps:.2f} ms of drafting, {figures['verify_ms'] / steps:.2f} ms of "
        f"evaluation, {(figures['loop_ms'] + figures['sample_ms']) / steps:.2f} ms of the rest",
    ]
    sources = figures["steps_by_source"]
    if len(sources) > 1:
        found.append("drafts by " + ", ".join(f"{name} {count}" for name, count in sources.items()))
    return found + ([_given_up(figures).removeprefix("; ")] if figures["switched_off"] else [])


def report_given_up(figures: dict[str, Any], before: int = 0) -> None:
    """Say on stderr why speculation was switched off, if it was more than `before` times."""
    if figures["switched_off"] > before:
        print(f"note: {figures['switched_off_reason']}", file=sys.stderr)


def _given_up(figures: dict[str, Any]) -> str:
    times = figures["switched_off"]
    return f"; given up {times} time{'s' if times > 1 else ''}: plain decoding was faster" if times else ""


class Live:
    """A line at the bottom of a terminal that is kept up to date while text scrolls above it.

    Does nothing unless `stream` and stdout are terminals. Use it as a context manager and call `update` at any rate.
    """

    def __init__(self, text: Callable[[], str], stream: TextIO | None = None, wanted: bool = True) -> None:
        self._text, self._stream = text, stream or sys.stderr
        self._active = wanted and self._stream.isatty() and sys.stdout.isatty()
        self._next = 0.0

    def __enter__(self) -> Live:
        if self._active:
            self._rows = shutil.get_terminal_size().lines
            # a new line, so that the text does not stand in the last row; scroll all rows but the last; back up
            self._write(f"\n\033[1A\0337\033[1;{self._rows - 1}r\0338")
        return self

    def update(self) -> None:
        """Show the text of now, if the last one is old enough."""
        now = time.monotonic()
        if self._active and now >= self._next:
            self._next = now + REFRESH
            width = shutil.get_terminal_size().columns
            self._write(f"\0337\033[{self._rows};1H\033[7m{self._text()[: width - 1]}\033[0m\033[K\0338")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            self._write(f"\0337\033[{self._rows};1H\033[K\033[r\0338")

    def _write(self, codes: str) -> None:
        sys.stdout.flush()
        self._stream.write(codes)
        self._stream.flush()
