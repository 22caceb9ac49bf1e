"""What llama.cpp writes to its log: kept quiet, and turned into error messages when something fails.

>>> from blockffn import logs
>>> with logs.collect() as lines:
...     pass                       # calls into llama.cpp
>>> logs.reason(lines)
''
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from blockffn import library

WARN, ERROR, CONTINUED = 3, 4, 5  # enum ggml_log_level
_PREFIX = re.compile(r"^(?:[A-Za-z_][\w:~]*: |error loading model[\w ]*: )*")  # "llama_model_load: error ..."


@dataclass
class Lines:
    """Messages of llama.cpp, in order."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class _Sink:
    """State of the one log callback of the process."""

    verbose = False
    level = 0
    lines: Lines | None = None
    callback: Any = None


def _receive(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    if level != CONTINUED:
        _Sink.level = level
    message = text.decode("utf-8", errors="replace")
    if _Sink.lines is not None and _Sink.level in (WARN, ERROR):
        (_Sink.lines.errors if _Sink.level == ERROR else _Sink.lines.warnings).append(message.strip())
    if _Sink.verbose:
        print(message, end="", file=sys.stderr, flush=True)


def install(verbose: bool | None = None, low_level: Any = None) -> None:
    """Send llama.cpp's log to stderr when `verbose`, nowhere when not; None leaves that as it is (nowhere at first).

    low_level: the binding, where `library.load` itself asks.
    """
    low_level = low_level or library.load()
    if verbose is not None:
        _Sink.verbose = verbose
    if _Sink.callback is None:
        import llama_cpp._logger  # noqa: F401  sets its own callback when first imported; ours has to come after it

        _Sink.callback = low_level.llama_log_callback(_receive)
        low_level.llama_log_set(_Sink.callback, ctypes.c_void_p(0))


def verbose() -> bool:
    """Does llama.cpp's log go to stderr?"""
    return _Sink.verbose


@contextlib.contextmanager
def collect() -> Iterator[Lines]:
    """Collect the warnings and errors that llama.cpp logs inside the block."""
    before, lines = _Sink.lines, Lines()
    _Sink.lines = lines
    try:
        yield lines
    finally:
        _Sink.lines = before


def reason(lines: Lines) -> str:
    """Return the first message that says why something failed, errors before warnings, without function names."""
    for line in (*lines.errors, *lines.warnings):
        text = _PREFIX.sub("", line)
        if text and not text.startswith(("failed to load model", "exiting due to")):
            return text
    return ""
