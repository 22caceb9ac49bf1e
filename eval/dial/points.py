"""The settings that `blockffn eval dial` measures, and the file that keeps what was measured so far.

>>> from blockffn.eval.dial.points import Point, points
>>> points([0.0, 0.1], [8])
[Point(threshold=0.0, budget=0), Point(threshold=0.1, budget=0), Point(threshold=0.0, budget=8)]
>>> Point(0.1, 0).name
'threshold 0.1'
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockffn.dial import checked_budget, checked_threshold
from blockffn.errors import BlockffnError
from blockffn.whole_file import write_text

THRESHOLDS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
BUDGET_SHARES = (0.5, 0.4, 0.3, 0.2)  # of the experts


@dataclass(frozen=True)
class Point:
    """One setting of the dial."""

    threshold: float
    budget: int = 0

    @property
    def name(self) -> str:
        """Return how tables and progress call it."""
        parts = [f"threshold {self.threshold:g}"] if self.threshold or not self.budget else []
        return ", ".join(parts + ([f"budget {self.budget}"] if self.budget else []))


PLAIN = Point(0.0)


def points(thresholds: Sequence[float], budgets: Sequence[int]) -> list[Point]:
    """Return the plain setting, every threshold without a budget and every budget without a threshold.

    Errors: BlockffnError for values that the dial refuses.
    """
    found = [PLAIN, *(Point(checked_threshold(value) or 0.0) for value in thresholds)]
    found += [Point(0.0, checked_budget(value, False)) for value in budgets]
    return list(dict.fromkeys(found))


def default_budgets(n_experts: int) -> list[int]:
    """Return some budgets below the number of experts."""
    return sorted({max(1, round(share * n_experts)) for share in BUDGET_SHARES}, reverse=True)


class Record:
    """Measured figures by point, in a JSON file that is written whole after every addition.

    A file of the same `header` (what was asked) is continued; one of another is refused with a BlockffnError.
    """

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self.rows: dict[Point, dict[str, Any]] = {}
        self.environment: dict[str, Any] = {}
        if path is not None and path.exists():
            self._continue(path)

    def _continue(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            rows, header = found["rows"], {name: found.get(name) for name in self.header}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BlockffnError(f"{path}: expected a file that `blockffn eval dial` wrote: {error}") from error
        differs = [name for name in self.header if header[name] != self.header[name]]
        if differs:
            name = differs[0]
            raise BlockffnError(
                f"{path}: was measured with {name} {header[name]!r}, now asked for {self.header[name]!r}; remove it or "
                "give another --output"
            )
        self.environment = found.get("environment", {})
        self.rows = {Point(row["threshold"], row["budget"]): row for row in rows}

    def missing(self, wanted: Sequence[Point], key: str) -> list[Point]:
        """Return the points that lack a figure."""
        return [point for point in wanted if key not in self.rows.get(point, {})]

    def add(self, point: Point, figures: dict[str, Any]) -> None:
        """Keep the figures of a point, in the file as well."""
        row = self.rows.setdefault(point, {"threshold": point.threshold, "budget": point.budget})
        row |= figures
        if self.path is not None:
            try:
                write_text(self.path, json.dumps(self.to_dict(), indent=1) + "\n")
            except OSError as error:
                raise BlockffnError(
                    f"{self.path}: cannot be written: {error.strerror}; what it held before is still there"
                ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return self.header | {"environment": self.environment, "rows": list(self.rows.values())}
