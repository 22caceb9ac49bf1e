"""Table and plot of `blockffn eval types`.

>>> print(table([{"type": "Q4_0", "nominal_bits": 4.5, "bits_per_weight": 5.1}]))       # doctest: +NORMALIZE_WHITESPACE
type      nominal    bits
Q4_0         4.50    5.10
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blockffn.eval.quality import columns

Row = dict[str, Any]
# key, head, format
COLUMNS = (
    ("nominal_bits", "nominal", "{:.2f}"),
    ("bits_per_weight", "bits", "{:.2f}"),
    ("file_mb", "MB", "{:.1f}"),
    *columns.COLUMNS,
    ("prefill_tokens_per_second", "prefill t/s", "{:.1f}"),
)
SPEEDS = (("decode_tokens_per_second", "decode", "o"), ("verify8_tokens_per_second", "verify 8", "s"))


def table(rows: Sequence[Row]) -> str:
    """Return the figures as text, a line per type; what was not measured has no column."""
    shown = [column for column in COLUMNS if any(column[0] in row for row in rows)]
    width = max(len(row["type"]) for row in rows)
    lines = ["type".ljust(width) + "".join(head.rjust(_width(head)) for _, head, _ in shown)]
    for row in rows:
        cells = [(form.format(row[key]) if key in row else "-").rjust(_width(head)) for key, head, form in shown]
        lines.append(row["type"].ljust(width) + "".join(cells))
    return "\n".join(lines)


def _width(head: str) -> int:
    return max(10, len(head) + 2)


def plot(rows: Sequence[Row], stem: str | Path, title: str) -> list[str]:
    """Draw divergence over size, and speed over divergence, as STEM.png and STEM.svg; return both names."""
    from blockffn.eval.quality.pictures import pyplot, save

    timed = any(SPEEDS[0][0] in row for row in rows)
    figure, axes = pyplot().subplots(1, 1 + timed, figsize=(5.5 * (1 + timed), 4.2), squeeze=False)
    size, *rest = axes[0]
    shown = [row for row in rows if row["kld_mean"] > 0]  # not the reference itself
    size.plot([row["bits_per_weight"] for row in shown], [row["kld_mean"] for row in shown], "o", markersize=4)
    _name(size, shown, "bits_per_weight", "kld_mean")
    size.set(xlabel="bits per weight, whole file", ylabel="mean KL divergence, nats", yscale="log")
    for axis in rest:
        for key, label, marker in SPEEDS:
            relative = [row[key] / rows[0][key] for row in shown]
            axis.plot([row["kld_mean"] for row in shown], relative, marker, markersize=4, label=label)
            _name(axis, [row | {"relative": y} for row, y in zip(shown, relative, strict=True)], "kld_mean", "relative")
        axis.set(xlabel="mean KL divergence, nats", ylabel=f"speed, {rows[0]['type']} = 1", xscale="log")
        axis.legend(fontsize=8)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        axis.margins(x=0.12)
    figure.suptitle(title, fontsize=8)
    return save(figure, stem)


def _name(axis: Any, rows: Sequence[Row], x: str, y: str) -> None:
    for row in rows:
        axis.annotate(row["type"], (row[x], row[y]), xytext=(3, 3), textcoords="offset points", fontsize=6.5)
