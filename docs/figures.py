"""Draw the pictures of the documents; those of speeds from the committed JSON files.

    $ .venv/bin/python docs/figures.py          # docs/idea.png, docs/loop.png, docs/speed.png

Every bar of speed.png is a row of docs/bench-*.json; nothing is typed in.
"""

# ruff: noqa: E501  (coordinates beside words)
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

HERE = Path(__file__).resolve().parent
OURS, STOCK, QUIET, DRAFT = "#1f6fb4", "#b9b9b9", "#f2f2f2", "#e08a1e"
ACTIVE = ((1, 4, 9), (1, 4, 10), (1, 5, 9), (1, 4, 9))  # experts that four tokens choose, of 14: an example
N_EXPERTS = 14


def idea(target: Path) -> None:
    """Router, union and fused operation, for four tokens."""
    figure, axis = pyplot.subplots(figsize=(9.6, 3.9))
    union = sorted({expert for chosen in ACTIVE for expert in chosen})
    for token, chosen in enumerate(ACTIVE):
        y = 3.4 - token * 0.62
        axis.text(-0.25, y + 0.25, f"token {token + 1}", ha="right", va="center", fontsize=10)
        for expert in range(N_EXPERTS):
            on = expert in chosen
            axis.add_patch(Rectangle((expert * 0.52, y), 0.46, 0.5, color=OURS if on else QUIET, lw=0))
    axis.text(
        0, 4.35, "1  The ReLU router: each token activates as many experts as it needs", fontsize=10.5, weight="bold"
    )
    axis.text(-0.25, 0.75, "union", ha="right", va="center", fontsize=10, weight="bold")
    for expert in range(N_EXPERTS):
        used = expert in union
        axis.add_patch(Rectangle((expert * 0.52, 0.5), 0.46, 0.5, color=DRAFT if used else QUIET, lw=0))
    axis.text(0, 0.06, f"2  A batch needs the union: {len(union)} of {N_EXPERTS} experts, once each", fontsize=10.5,
              weight="bold")  # fmt: skip
    axis.add_patch(FancyArrowPatch((7.45, 2.1), (8.5, 2.1), arrowstyle="-|>", mutation_scale=18, color="black"))
    axis.add_patch(FancyBboxPatch((8.65, 0.2), 4.6, 3.7, boxstyle="round,pad=0.06", fc="white", ec="black"))
    axis.text(10.95, 3.62, "3  One fused operation", ha="center", fontsize=10.5, weight="bold")
    for row, expert in enumerate(union):
        y = 2.9 - row * 0.5
        axis.add_patch(Rectangle((8.85, y), 1.3, 0.36, color=DRAFT, lw=0))
        axis.text(9.5, y + 0.18, f"expert {expert + 1}", ha="center", va="center", fontsize=8.5, color="white")
        at = 10.5
        for token, chosen in enumerate(ACTIVE):
            if expert in chosen:
                axis.add_patch(Rectangle((at, y), 0.46, 0.36, color=OURS, lw=0))
                axis.text(at + 0.23, y + 0.18, str(token + 1), ha="center", va="center", fontsize=8.5, color="white")
                at += 0.55
    axis.text(
        10.95,
        0.2,
        "each expert is read once;\nonly the pairs chosen are computed",
        ha="center",
        va="bottom",
        fontsize=9,
    )
    axis.set_xlim(-1.3, 13.4)
    axis.set_ylim(-0.2, 4.75)
    axis.axis("off")
    _save(figure, target)


def loop(target: Path) -> None:
    """One step of speculation by a chain, and a tree with its accepted path."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9.6, 3.4))
    left, right = axes
    left.set_title("A chain: guess, verify in one batch, keep what is right", fontsize=10)
    words = [("the", "verified"), ("cat", "right"), ("sat", "right"), ("on", "wrong"), ("a", "unused")]
    colours = {"verified": "black", "right": OURS, "wrong": "#c0392b", "unused": STOCK}
    for place, (word, kind) in enumerate(words):
        _node(left, place * 1.15, 1.6, word, colours[kind])
        if place:
            _edge(left, (place - 1) * 1.15, 1.6, place * 1.15, 1.6, colours[kind])
    left.text(0, 2.0, "root", fontsize=9, ha="center")
    left.text(2.85, 2.0, "drafted: 4 tokens", fontsize=9, ha="center")
    left.text(2.3, 0.75, "One evaluation gives logits after the root and after every drafted token.\n"
              "The model samples \"cat\", \"sat\" and then \"by\": 3 tokens in one step.", fontsize=9, ha="center")  # fmt: skip
    left.set_xlim(-0.6, 5.2)
    left.set_ylim(0.3, 2.8)
    right.set_title("A tree: several guesses per place", fontsize=10)
    nodes = {"the": (0, 1.6), "cat": (1.4, 2.2), "dog": (1.4, 1.0), "sat": (2.8, 2.55), "ran": (2.8, 1.85),
             "ate": (2.8, 1.0), "off": (4.2, 1.85)}  # fmt: skip
    edges = [("the", "cat"), ("the", "dog"), ("cat", "sat"), ("cat", "ran"), ("dog", "ate"), ("ran", "off")]
    path = {"cat", "ran", "off"}
    for above, below in edges:
        _edge(right, *nodes[above], *nodes[below], OURS if below in path else STOCK)
    for word, (x, y) in nodes.items():
        _node(right, x, y, word, "black" if word == "the" else OURS if word in path else STOCK)
    right.text(2.1, 0.42, "A token attends to its ancestors only. The path that the model samples is kept.",
               fontsize=9, ha="center")  # fmt: skip
    right.set_xlim(-0.6, 4.9)
    right.set_ylim(0.3, 2.9)
    for axis in axes:
        axis.axis("off")
    _save(figure, target)


def speed(target: Path) -> None:
    """Whole models: union against dense, and speculation's part, from the committed runs."""
    figure, (models, drafts) = pyplot.subplots(1, 2, figsize=(10.4, 4.0), width_ratios=(3, 2))
    runs = (("1.2b-portable", "BlockFFN 1.2B\nAVX2"), ("1.2b-native", "BlockFFN 1.2B\nAVX512"),
            ("deco-1.2b-portable", "DECO 1.2B\nAVX2"))  # fmt: skip
    phases = (("decode", 1, "decode"), ("verify", 8, "8 at once"), ("prefill", 512, "prefill"))
    ticks, labels = [], []
    for group, (name, title) in enumerate(runs):
        rows = {(row["ffn"], row["phase"], row["n"]): row["tokens_per_second"] for row in _rows(f"bench-{name}")}
        for place, (phase, n, label) in enumerate(phases):
            x = group * 3.8 + place * 1.1
            ours, dense = rows["union", phase, n], rows["dense", phase, n]
            models.bar(x - 0.22, dense, 0.42, color=STOCK, label="stock, dense" if x == 0 else None)
            models.bar(x + 0.22, ours, 0.42, color=OURS, label="blockffn" if x == 0 else None)
            models.text(x + 0.22, ours + 2, f"{ours / dense:.1f}x", ha="center", fontsize=8)
            ticks.append(x)
            labels.append(label)
        models.text(group * 3.8 + 1.1, -0.27, title, ha="center", va="top", fontsize=9,
                    transform=models.get_xaxis_transform())  # fmt: skip
    models.set_xticks(ticks, labels, rotation=30, fontsize=8)
    models.set_ylabel("tokens per second")
    models.set_title("Without speculation", fontsize=10)
    models.legend(fontsize=8, loc="upper left")
    rows = [row for row in _rows("bench-speculative-1.2b-16384") if row["phase"] == "decode"]
    chosen = {
        "stock, dense": next(row for row in rows if row["ffn"] == "dense"),
        "blockffn": next(row for row in rows if row["ffn"] == "union" and row["drafter"] == "none"),
        "chain of 3,\nEAGLE head's time": next(r for r in rows if "eagle" in r["drafter"] and r["plan"] == "chain 3"),
        "chain of 3,\nfree drafts": next(r for r in rows if r["drafter"] == "scripted" and r["plan"] == "chain 3"),
    }
    for place, row in enumerate(chosen.values()):
        rate = row["tokens_per_second"]
        drafts.bar(place, rate, 0.6, color=(STOCK, OURS, DRAFT, DRAFT)[place])
        drafts.text(place, rate + 1, f"{rate:.0f}", ha="center", fontsize=9)
    drafts.set_xticks(range(len(chosen)), list(chosen), fontsize=8, rotation=20)
    chance = chosen["chain of 3,\nfree drafts"]["probability"]
    drafts.set_title(f"Decoding 1.2B, AVX2; scripted drafts, {chance:.0%} right", fontsize=10)
    for axis in (models, drafts):
        axis.margins(y=0.1)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Random weights in the published shapes, planted routing (80 % sparse), Q4_0, 2-core Xeon, 2 threads",
                    fontsize=9)  # fmt: skip
    _save(figure, target)


def _rows(stem: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((HERE / f"{stem}.json").read_text())["rows"]
    return found


def _node(axis: Any, x: float, y: float, word: str, colour: str) -> None:
    axis.text(x, y, word, ha="center", va="center", fontsize=10, color="white",
              bbox={"boxstyle": "round,pad=0.35", "fc": colour, "ec": colour})  # fmt: skip


def _edge(axis: Any, x0: float, y0: float, x1: float, y1: float, colour: str) -> None:
    axis.plot([x0, x1], [y0, y1], color=colour, lw=2, zorder=0)


def _save(figure: Any, target: Path) -> None:
    figure.tight_layout()
    figure.savefig(target, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    idea(HERE / "idea.png")
    loop(HERE / "loop.png")
    speed(HERE / "speed.png")
