"""Bar chart of a run: speedup and tokens per step of each group and overall.

plot(summarize(records), "spec-bench.svg", "model, n-grams")
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from blockffn.errors import BlockffnError
from blockffn.eval.spec_bench.report import OVERALL

PANELS = (
    ("speedup", "speedup over plain decoding, prompt included"),
    ("mean_acceptance_length", "tokens per step, bonus token included"),
)


def plot(figures: dict[str, Any], path: str | Path, title: str) -> None:
    """Write the chart; the ending of `path` chooses the format (png, svg, pdf)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {**figures["groups"], OVERALL: figures[OVERALL]}
    canvas, axes = pyplot.subplots(
        2, 1, figsize=(max(7.0, 1.6 + 1.1 * len(rows)), 5.6), sharex=True, layout="constrained"
    )
    for axis, (key, label) in zip(axes, PANELS, strict=True):
        heights = [row[key] or 0.0 for row in rows.values()]
        colors = ["tab:blue"] * (len(rows) - 1) + ["tab:gray"]
        bars = axis.bar(range(len(rows)), heights, color=colors)
        axis.bar_label(bars, fmt="%.2f")
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        axis.set_title(label, fontsize=9)
        axis.margins(y=0.15)
    axes[-1].set_xticks(range(len(rows)), rows, rotation=20)
    canvas.suptitle(textwrap.fill(title, 80), fontsize=9)
    try:
        canvas.savefig(path, dpi=120)
    except ValueError as error:  # an ending that matplotlib does not know
        raise BlockffnError(f"{path}: {error}") from error
    finally:
        pyplot.close(canvas)
