"""Plots of the report as SVG text, to stand inside the page.

>>> from blockffn.eval.report.plots import Lines, lines
>>> lines([Lines("union", [1, 8], [0.1, 0.3])], "tokens at once", "ms", "ops").startswith("<svg")
True
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

COLORS = {"union": "#1f6fb4", "dense": "#8a8a8a", "mul_mat_id": "#c9b458"}


@dataclass(frozen=True)
class Lines:
    """One curve."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "o-"
    color: str | None = None


def lines(curves: Sequence[Lines], x_label: str, y_label: str, name: str, logarithmic: bool = False) -> str:
    """Draw curves, with ticks at x values that all share; logarithmic: both axes.

    `name` makes the ids of the drawing its own within the page.
    """
    from matplotlib.ticker import LogLocator

    def draw(axis: Any) -> None:
        for curve in curves:
            axis.plot(curve.x, curve.y, curve.style, label=curve.label, color=curve.color, markersize=4)
        ticks = curves[0].x if all(list(curve.x) == list(curves[0].x) for curve in curves) else ()
        if logarithmic:
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
        else:
            axis.set_ylim(bottom=0)
        if 0 < len(ticks) <= 9:
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.legend(fontsize=8)

    return drawing(draw, name)


def points(labels: Sequence[str], x: Sequence[float], y: Sequence[float], x_label: str, y_label: str, name: str) -> str:
    """Draw points with their names beside them, y logarithmic."""

    def draw(axis: Any) -> None:
        axis.plot(x, y, "o", color=COLORS["union"], markersize=4)
        for label, *place in zip(labels, x, y, strict=True):
            axis.annotate(label, place, xytext=(4, 4), textcoords="offset points", fontsize=8)
        axis.set_yscale("log")
        axis.margins(x=0.12, y=0.15)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)

    return drawing(draw, name)


def bars(labels: Sequence[str], values: Sequence[float], x_label: str, name: str) -> str:
    """Draw horizontal bars with their values, the first one on top."""

    def draw(axis: Any) -> None:
        places = range(len(labels))
        axis.barh(places, values, color=COLORS["union"], height=0.65)
        axis.set_yticks(places, labels)
        axis.invert_yaxis()
        axis.bar_label(axis.containers[0], fmt="%.3g", padding=3, fontsize=8)
        axis.margins(x=0.12)
        axis.set_xlabel(x_label)

    return drawing(draw, name, height=0.9 + 0.32 * len(labels))


def drawing(draw: Callable[[Any], None], name: str, height: float = 3.4) -> str:
    """Return what `draw` puts on an axis as the text of an <svg> element."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9}):
        figure, axis = pyplot.subplots(figsize=(7.2, height))
        draw(axis)
        axis.grid(alpha=0.3)
        figure.tight_layout()
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return inline(text.getvalue(), name)


def inline(svg: str, name: str) -> str:
    """Return the <svg> element of a file, its ids made those of `name`, without what only a file needs."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'\bid="', f'id="{name}-', element)
    element = re.sub(r'((?:xlink:)?href=")#', rf"\1#{name}-", element)
    return re.sub(r"url\(#", f"url(#{name}-", element).strip()
