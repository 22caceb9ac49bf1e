"""Where a step goes: what every kind of node of the graph takes, ours beside the stock graph.

    $ blockffn bench --ops                                          # 1, 4, 8, 32 tokens after 128, 1k, 4k, 8k
    $ blockffn bench --ops --shape deco-1.2b --verify 8 --past 128,3072 --plot step

Nodes are timed inside the loop of ggml's threads (patches/0033-node-times.patch), so that the step is the one that
everybody runs. A kind's time is the mean over the threads; "barriers" is what they wait behind a node, for each other
and for the barrier itself; "outside" is the rest of the step: building the graph, copying logits, Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blockffn.eval.bench.models import Candidate, Process

SIZES = (4, 8, 32)  # tokens at once, beside 1
PASTS = (128, 1024, 4096, 8192)  # tokens before
ROUNDS = 3
STEPS = 16  # of one token, per round; fewer of more tokens

EXPERTS, ROUTER, PRODUCTS, HEADS = "experts", "router", "attention products", "per-head products"
CACHE, HEAD, REST, BARRIERS, OUTSIDE = "attention over the cache", "head", "norms and rest", "barriers", "outside"
KINDS = (EXPERTS, ROUTER, PRODUCTS, HEADS, CACHE, HEAD, REST, BARRIERS, OUTSIDE)

Row = dict[str, Any]
Say = Callable[[str], None]

_MATRICES = {
    "attn_k_b.weight": HEADS, "attn_v_b.weight": HEADS, "output.weight": HEAD, "token_embd.weight": HEAD,
    "ffn_gate_inp.weight": ROUTER,
}  # fmt: skip
_NAMES = {"kq": CACHE, "kq_soft_max": CACHE, "kqv": CACHE, "ffn_hidden": EXPERTS, "ffn_activated": EXPERTS,
          "ffn_plain_hidden": EXPERTS}  # fmt: skip


def kind(op: str, label: str) -> str:
    """Return the kind of a node of our graph or of the stock graph of the same model.

    >>> kind("MUL_MAT", "attn_q_a.weight"), kind("UNION_FFN", "ffn_experts"), kind("RMS_NORM", "norm")
    ('attention products', 'experts', 'norms and rest')
    """
    if op == "UNION_FFN":
        return EXPERTS
    if op == "RELU_ROUTER" or label.startswith("ffn_router"):
        return ROUTER
    if op == "FLASH_ATTN_EXT":
        return CACHE
    if op in ("MUL_MAT", "MUL_MAT_ID"):
        if label in _MATRICES:
            return _MATRICES[label]
        if label.endswith(".weight"):
            return EXPERTS if label.startswith("ffn_") else PRODUCTS
    return _NAMES.get(label, REST)


def by_kind(nodes: Iterable[Sequence[Any]]) -> dict[str, float]:
    """Return the milliseconds of every kind from (op, label, n_nodes, work_ms, wait_ms)."""
    found = dict.fromkeys(KINDS, 0.0)
    for op, label, _, work_ms, wait_ms in nodes:
        found[kind(op, label)] += work_ms
        found[BARRIERS] += wait_ms
    return found


def measure(
    candidates: Sequence[Candidate], text: dict[str, Any], threads: int, rounds: int = ROUNDS,
    sizes: Sequence[int] = SIZES, pasts: Sequence[int] = PASTS, directory: Path | None = None,
    say: Say = lambda line: None,
) -> list[Row]:  # fmt: skip
    """Return a row per (tokens before, tokens at once, candidate): milliseconds per step by kind.

    A row is the round of median length. The candidates take turns, in alternating order; a round before the first is
    not counted. text: see models.run. Errors: BlockffnError when a model cannot be loaded.
    """
    workers: list[Process] = []
    rows = []
    try:
        for candidate in candidates:
            say(f"loading {candidate.path}")
            workers.append(Process(candidate, threads, max(pasts), directory))
            workers[-1].ask(text)
        for past in sorted(pasts):
            for n in dict.fromkeys((1, *sizes)):
                say(f"{n} at once after {past}")
                rows += _interleaved(workers, past, n, rounds)
    finally:
        for worker in workers:
            worker.close()
    return rows


def _interleaved(workers: Sequence[Process], past: int, n: int, rounds: int) -> list[Row]:
    request = {"phase": "nodes", "n": n, "past": past, "steps": max(2, STEPS // n)}
    answers: dict[str, list[dict[str, Any]]] = {worker.candidate.ffn: [] for worker in workers}
    for number in range(rounds + 1):
        for worker in workers if number % 2 else reversed(workers):
            answer = worker.ask(request | ({"steps": 1} if number == 0 else {}))
            if number:
                answers[worker.candidate.ffn].append(answer)
    return [row(ffn, past, n, found) for ffn, found in answers.items()]


def row(ffn: str, past: int, n: int, answers: Sequence[dict[str, Any]]) -> Row:
    """Return one row from the answers of the rounds: {"seconds": of every step, "nodes": sums over these steps}."""
    parts = []
    for answer in answers:
        steps = len(answer["seconds"])
        part = {name: ms / steps for name, ms in by_kind(answer["nodes"]).items()}
        part[OUTSIDE] = 1e3 * sum(answer["seconds"]) / steps - sum(part.values())
        parts.append(part)
    totals = [sum(part.values()) for part in parts]
    low, middle, high = np.percentile(totals, [25, 50, 75])
    chosen = parts[int(np.argmin(np.abs(np.asarray(totals) - middle)))]  # one round's parts add up to its step
    last = answers[-1]
    return {
        "ffn": ffn, "past": past, "n": n, "step_ms": sum(chosen.values()),
        "spread": float((high - low) / 2 / middle), "ms": chosen,
        "nodes": sum(node[2] for node in last["nodes"]) / len(last["seconds"]),
    }  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table, milliseconds per step."""
    names = ["after", "n", "graph", "step", *KINDS, "nodes"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for found in rows:
        cells = [str(found["past"]), str(found["n"]), found["ffn"], f"{found['step_ms']:.1f}"]
        cells += [f"{found['ms'][name]:.2f}" for name in KINDS] + [f"{found['nodes']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], stem: Path, title: str) -> list[Path]:
    """Draw stacked bars of milliseconds per token, a panel per number of tokens before: STEM.png and STEM.svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pasts = list(dict.fromkeys(found["past"] for found in rows))
    figure, axes = pyplot.subplots(1, len(pasts), figsize=(4.2 * len(pasts), 4.2), squeeze=False)
    colors = {name: f"C{number}" for number, name in enumerate(KINDS)}
    for axis, past in zip(axes[0], pasts, strict=True):
        panel = [found for found in rows if found["past"] == past]
        sizes = list(dict.fromkeys(found["n"] for found in panel))
        for found in panel:
            at = sizes.index(found["n"]) + (-0.2 if found["ffn"] == "union" else 0.2)
            bottom = 0.0
            for name in KINDS:
                height = max(0.0, found["ms"][name]) / found["n"]
                axis.bar(at, height, 0.36, bottom, color=colors[name], label=name)
                bottom += height
            axis.annotate(
                "ours" if found["ffn"] == "union" else "stock", (at, bottom), ha="center", va="bottom", fontsize=6
            )
        axis.set_xticks(range(len(sizes)), [str(n) for n in sizes])
        axis.set_title(f"after {past} tokens", fontsize=9)
        axis.set_xlabel("tokens at once", fontsize=8)
    axes[0][0].set_ylabel("ms per token", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="lower center", ncols=len(unique), fontsize=7)
    figure.suptitle(title, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    written = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    for file in written:
        figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return written
