"""Loss curves from log.jsonl files.

>>> plot_curve({"tiny-blockffn": Path("build/runs/tiny-blockffn/log.jsonl")}, Path("curve.png"))
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from blockffn.errors import BlockffnError


def plot_curve(logs: Mapping[str, Path], target: Path) -> None:
    """Draw the losses of one or several runs over tokens, and sparsity or a draft head's agreement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, shares) = pyplot.subplots(1, 2, figsize=(10, 4))
    for name, path in logs.items():
        rows = read_log(path)
        line = losses.plot([r["tokens"] / 1e6 for r in rows], [r["loss"] for r in rows], alpha=0.35)[0]
        checks = [r for r in rows if "validation" in r]
        x, y = [r["tokens"] / 1e6 for r in checks], [r["validation"] for r in checks]
        losses.plot(x, y, color=line.get_color(), marker=".", label=f"{name}, validation")
        for key, style in (("tls", "-"), ("cls_8", "--"), ("agreement", "-")):
            known = [r for r in checks if key in r]
            share = [float(np.mean(r[key])) for r in known]
            if known:
                label = f"{name}, {key if key == 'agreement' else key.upper()}"
                shares.plot([r["tokens"] / 1e6 for r in known], share, style, color=line.get_color(), label=label)
    for axes, title in ((losses, "loss"), (shares, "sparsity or agreement")):
        axes.set(xlabel="million tokens", title=title)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=90)
    pyplot.close(figure)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a log.jsonl. Raises BlockffnError when there is none."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as err:
        raise BlockffnError(f"{path}: no training log ({err.strerror})") from err
