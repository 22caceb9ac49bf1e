"""Table and plot of `blockffn eval dial`.

>>> from blockffn.eval.dial.report import table
>>> print(table([{"threshold": 0.0, "budget": 0, "perplexity": 3.25}]))       # doctest: +NORMALIZE_WHITESPACE
dial           perplexity
threshold 0        3.2500
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blockffn.eval.dial.points import Point
from blockffn.eval.quality import columns

Row = dict[str, Any]
# key, head, format
COLUMNS = (
    *columns.COLUMNS,
    ("union1", "union 1", "{:.1f}"),
    ("union8", "union 8", "{:.1f}"),
)
SPEEDS = (("decode_tokens_per_second", "decode"), ("verify8_tokens_per_second", "verify 8"))


def table(rows: Sequence[Row]) -> str:
    """Return the figures as text, a line per point; what was not measured has no column."""
    shown = [column for column in COLUMNS if any(column[0] in row for row in rows)]
    names = [_name(row) for row in rows]
    width = max(map(len, names))
    lines = ["dial".ljust(width) + "".join(f"{head:>14}" for _, head, _ in shown)]
    for name, row in zip(names, rows, strict=True):
        cells = [form.format(row[key]) if key in row else "-" for key, _, form in shown]
        lines.append(name.ljust(width) + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def _name(row: Row) -> str:
    return Point(row["threshold"], row["budget"]).name


def plot(rows: Sequence[Row], targets: Sequence[Path], title: str) -> None:
    """Draw quality against the threshold, speed against quality (or the threshold) and unions, into each target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "blockffn", "svg.fonttype": "none"}):
        figure, (quality, speed, union) = pyplot.subplots(1, 3, figsize=(13, 3.9))
        by_threshold = [row for row in rows if not row["budget"]]
        by_budget = [row for row in rows if row["budget"]]
        known = [row for row in by_threshold if "kld_mean" in row]
        if known:
            _quality(quality, known)
        else:
            quality.text(0.5, 0.5, "quality was not measured", ha="center", va="center")
            quality.axis("off")
        _speed(speed, by_threshold, by_budget)
        _unions(union, by_threshold)
        figure.suptitle(title, fontsize=8)
        figure.tight_layout()
        for target in targets:
            figure.savefig(target, dpi=110, metadata={"Date": None} if target.suffix == ".svg" else None)
        pyplot.close(figure)


def _quality(axis: Any, rows: Sequence[Row]) -> None:
    thresholds = [row["threshold"] for row in rows]
    axis.plot(thresholds, [row["kld_mean"] for row in rows], marker="o", markersize=3, label="KL divergence, nats")
    axis.set_ylabel("mean KL divergence, nats")
    other = axis.twinx()
    other.plot(thresholds, [row["perplexity"] for row in rows], color="tab:orange", marker="s", markersize=3)
    other.set_ylabel("perplexity", color="tab:orange")
    axis.set_xlabel("threshold")
    axis.grid(alpha=0.3)


def _speed(axis: Any, by_threshold: Sequence[Row], by_budget: Sequence[Row]) -> None:
    """Relative to the plain model, over the KL divergence where it is known, else over the threshold."""
    key = "kld_mean" if any("kld_mean" in row for row in by_threshold) else "threshold"
    for (speed, label), color in zip(SPEEDS, ("tab:blue", "tab:green"), strict=True):
        plain = next((row[speed] for row in by_threshold if row["threshold"] == 0 and speed in row), None)
        for rows, style, kind in ((by_threshold, "o-", "threshold"), (by_budget, "^--", "budget")):
            shown = [row for row in rows if speed in row and key in row]
            if plain and shown and not (kind == "budget" and key == "threshold"):
                values = [row[speed] / plain for row in shown]
                axis.plot(
                    [row[key] for row in shown], values, style, color=color, markersize=3, label=f"{label}, {kind}"
                )
    axis.set_xlabel("mean KL divergence, nats" if key == "kld_mean" else "threshold")
    axis.set_ylabel("speed, plain model = 1")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)


def _unions(axis: Any, rows: Sequence[Row]) -> None:
    shown = [row for row in rows if "union1" in row]
    for key, label in (("union1", "one token"), ("union8", "8 tokens")):
        axis.plot([r["threshold"] for r in shown], [r[key] for r in shown], marker="o", markersize=3, label=label)
    axis.set_xlabel("threshold")
    axis.set_ylabel("experts read per layer")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
