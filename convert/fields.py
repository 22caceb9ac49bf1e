"""Typed reading of a JSON configuration: every access states what it expects, every error names key, found and cure.

fields = Fields({"num_experts": 7}, "config.json", notes.append)
fields.integer("num_experts")                           # 7
fields.choice("router_act", {"relu": "relu"}, default="relu")    # notes that the default was applied
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from blockffn.errors import BlockffnError

_REQUIRED: Any = object()
LARGEST_INTEGER = 2**31 - 1  # llama.cpp keeps sizes and counts in 32 bits
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def shown(value: Any) -> str:
    """Return a value as one short line, however long, deep or wide it is."""
    return _SHORT.repr(value)


def fits_f32(value: float) -> bool:
    """True when the number survives in float32, the type of every GGUF number: finite, and not rounded to 0."""
    if value != value or abs(value) > float(np.finfo(np.float32).max):
        return False
    return value == 0 or abs(value) >= float(np.finfo(np.float32).tiny)


class Fields:
    """A configuration object being read; remembers which keys were asked for."""

    def __init__(self, values: Mapping[str, Any], file: str, note: Callable[[str], None]) -> None:
        self.values = values
        self.file = file
        self.note = note
        self.asked: set[str] = set()

    def has(self, key: str) -> bool:
        """True when the key is there with a value other than null."""
        self.asked.add(key)
        return self.values.get(key) is not None

    def get(self, key: str, expected: str, default: Any = _REQUIRED) -> Any:
        """Return the raw value; a missing one is an error unless a default (the authors' own) is given."""
        if self.has(key):
            return self.values[key]
        if default is _REQUIRED:
            unread = [other for other in self.values if other not in self.asked]
            raise BlockffnError(
                f"{self.file}: {key}: expected {expected}, found nothing{suggest(key, unread)}; the value carries "
                "weight, so it has no default: add it from the model's original configuration"
            )
        if default is not None:
            self.note(f"{self.file} has no {key}; the authors' code then uses {default!r}")
        return default

    def integer(self, key: str, default: Any = _REQUIRED, low: int = 1) -> int:
        """Return an integer >= low that 32 bits can hold."""
        value = self.get(key, f"an integer >= {low}", default)
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or value < low:
            self.wrong(key, f"an integer >= {low}")
        if value > LARGEST_INTEGER:
            self.wrong(key, f"an integer up to {LARGEST_INTEGER}")
        return int(value)

    def number(self, key: str, default: Any = _REQUIRED, positive: bool = True) -> float:
        """Return a finite number, positive unless told otherwise."""
        expected = "a positive number" if positive else "a number"
        value = self.get(key, expected, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or (positive and value <= 0):
            self.wrong(key, expected)
        if not fits_f32(value):
            self.wrong(key, f"{expected} that float32 can hold")
        return float(value)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """Return true or false."""
        value = self.get(key, "true or false", default)
        if not isinstance(value, bool):
            self.wrong(key, "true or false")
        return bool(value)

    def choice(self, key: str, known: Mapping[str, str], default: Any = _REQUIRED) -> str:
        """Return known[value]; an unknown name lists the known ones."""
        value = self.get(key, "one of " + ", ".join(known), default)
        if not isinstance(value, str) or value not in known:
            self.wrong(key, "one of " + ", ".join(known) + suggest(value, known))
        return known[value]

    def refuse(self, key: str, allowed: tuple[Any, ...], why: str) -> None:
        """Raise unless the key is absent, null, or one of the values that change nothing."""
        if self.has(key) and self.values[key] not in allowed:
            self.wrong(key, " or ".join(map(repr, allowed)) + f" ({why})")

    def wrong(self, key: str, expected: str) -> None:
        """Raise the error of a wrong value."""
        raise BlockffnError(
            f"{self.file}: {key}: expected {expected}, found {shown(self.values.get(key))}; correct the file"
        )

    def check_unknown(self, harmless: Iterable[str], optional: Iterable[str]) -> None:
        """Name the keys that nobody read; one that looks like a misspelt optional key is an error."""
        leftover = [key for key in self.values if key not in self.asked and key not in set(harmless)]
        missing = [key for key in optional if key not in self.values]
        for key in leftover:
            close = difflib.get_close_matches(key, missing, 1, 0.85)
            if close:
                raise BlockffnError(f"{self.file}: unknown key {key}; did you mean {close[0]}? Rename or remove it")
        if leftover:
            self.note(f"{self.file}: keys that are not read: {', '.join(sorted(leftover))}")


def suggest(value: Any, known: Iterable[str]) -> str:
    """Return `` (did you mean X?)`` or an empty string."""
    if not isinstance(value, str) or len(value) > 100:
        return ""
    close = difflib.get_close_matches(value, list(known), 1, 0.75)
    return f" (did you mean {close[0]}?)" if close else ""


def check_option(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raise unless an option of the command has one of the known values."""
    if value not in known:
        raise BlockffnError(
            f"--{option}: expected one of {', '.join(known)}, found {shown(value)}{suggest(value, known)}; choose one "
            "of them"
        )
