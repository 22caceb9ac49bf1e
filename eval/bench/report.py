"""Rows and tables of `blockffn bench`.

    print(table(result), speculation_table(result), position_table(result), sep="\n\n")

A row is what docs/benchmarks.md promises; the tables show the same figures to people.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from blockffn.eval.bench.models import Phase, Process, Result

Row = dict[str, Any]
COUNTS = ("steps", "plain_steps", "tree_steps", "drafted", "accepted", "switched_off")
POSITIONS = 8  # shown in a table
TIMES = ("draft_ms", "verify_ms", "sample_ms", "loop_ms")


def rows(worker: Process, memory: dict[str, float], chosen: Sequence[Phase]) -> list[Row]:
    """Return the rows of one candidate: medians over all steps, or over the rounds where text was generated."""
    found = []
    for phase in (phase for phase in chosen if phase.suits(worker.candidate)):
        seconds = worker.seconds[phase]
        middle, spread = median_and_spread(seconds)
        row: Row = {
            "model": Path(worker.candidate.path).name,
            "ffn": worker.candidate.ffn,
            "drafter": worker.candidate.drafter,
            "phase": phase.name,
            "n": phase.n,
            "tokens_per_second": (1 if phase.plan else phase.n) / middle,
            "spread": spread,
            "tokens_per_step": 1.0 if phase.name == "decode" else None,
            "acceptance": None,
            "step_ms": 1e3 * middle,
            "samples": len(seconds),
        }
        if worker.statistics.get(phase):
            row |= _speculation(phase, worker.statistics[phase], middle)
        found.append(row | memory)
    return found


def median_and_spread(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the median, and half the distance of the quartiles over the median."""
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return float(middle), float((high - low) / 2 / middle)


def _speculation(phase: Phase, rounds: Sequence[dict[str, Any]], seconds: float) -> Row:
    """Return what a generated text adds to its row. seconds: per token."""
    total = {
        name: sum(part[name] for part in rounds) for name in (*COUNTS, *TIMES, "measured_tokens", "measured_steps")
    }
    reached, right = (_sum([part[f"{name}_by_position"] for part in rounds]) for name in ("drafted", "accepted"))
    sizes = _sum([_listed(part["steps_by_size"]) for part in rounds])
    per_step = total["measured_tokens"] / total["measured_steps"]
    evaluated = sum(size * count for size, count in enumerate(sizes)) / max(1, sum(sizes))
    first = right[0] / reached[0] if reached else None
    return {
        "n": round(evaluated),
        "plan": phase.plan,
        "probability": phase.probability,
        "tokens_per_step": per_step,
        "acceptance": phase.probability if phase.probability is not None else first,
        "acceptance_by_position": [r / d for r, d in zip(right, reached, strict=True)],  # of drafts that reach so far
        "step_ms": 1e3 * seconds * per_step,
        "tokens_evaluated_per_step": evaluated,
        "steps_by_size": {str(size): count for size, count in enumerate(sizes) if count},
        "union_by_size": _means(rounds, "union_by_size"),  # experts read per layer
        "verify_ms_by_size": _means(rounds, "verify_ms_by_size"),
        **{name: total[name] for name in (*COUNTS, *TIMES)},
    }


def _means(rounds: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """Return the mean of a figure that every round gives as a mean by size of the batch."""
    total: dict[int, list[float]] = {}
    for part in rounds:
        for size, mean in part[name].items():
            count = part["steps_by_size"][size]
            so_far = total.setdefault(int(size), [0.0, 0.0])
            total[int(size)] = [so_far[0] + count * mean, so_far[1] + count]
    return {str(size): summed / count for size, (summed, count) in sorted(total.items())}


def _listed(counts: dict[str, int]) -> list[int]:
    """Return {"2": 5} as [0, 0, 5]."""
    by_size = {int(size): count for size, count in counts.items()}
    return [by_size.get(size, 0) for size in range(1 + max(by_size, default=0))]


def _sum(lists: Sequence[Sequence[int]]) -> list[int]:
    """Add lists of different lengths, element by element."""
    longest = max((len(values) for values in lists), default=0)
    return [sum(values[i] for values in lists if i < len(values)) for i in range(longest)]


def table(result: Result) -> str:
    """Return the figures as text: a line per phase, a column per candidate, and how many times faster union is."""
    plain = [row for row in result.rows if row["drafter"] == "none"]
    labels = list(dict.fromkeys(row["ffn"] for row in plain))
    by_key = {(row["ffn"], row["phase"], row["n"]): row for row in plain}
    lines = ["phase        " + "".join(f"{label:>24}" for label in labels) + "   union / dense"]
    for phase, n in dict.fromkeys((row["phase"], row["n"]) for row in plain):
        line = f"{phase if phase == 'decode' else f'{phase} {n}':<13}"
        found = [by_key[label, phase, n] for label in labels]
        line += "".join(f"{row['tokens_per_second']:12.1f} t/s +-{100 * row['spread']:4.0f} %" for row in found)
        speeds = {row["ffn"]: row["tokens_per_second"] for row in found}
        lines.append(line + (f"{speeds['union'] / speeds['dense']:13.2f} x" if len(speeds) == 2 else ""))
    first = [next(row for row in plain if row["ffn"] == label) for label in labels]
    lines.append("peak memory  " + "".join(f"{row['peak_rss_mb']:21.0f} MB" for row in first))
    return "\n".join(lines)


def speculation_table(result: Result) -> str:
    """Return the speculative figures as text, a line per drafter, acceptance and plan; empty without any."""
    plain = {row["ffn"]: row["tokens_per_second"] for row in result.rows if row.get("plan") == "plain"}
    drafted = [row for row in result.rows if row["drafter"] != "none"]
    if not drafted:
        return ""
    width = max(len(row["drafter"]) for row in drafted)
    head = f"{'drafter':<{width}}  accepted  plan      tokens/step  drafting      tokens/s        "
    lines = [head + "".join(f"{'/ ' + ffn:>9}" for ffn in plain)]
    for row in drafted:
        share = row["draft_ms"] / max(1e-9, sum(row[name] for name in TIMES))
        line = (
            f"{row['drafter']:<{width}}  {row['acceptance'] or 0:8.2f}  {row['plan']:<9}{row['tokens_per_step']:12.2f}"
        )
        line += f"{100 * share:8.0f} %{row['tokens_per_second']:14.1f} +-{100 * row['spread']:3.0f} %"
        lines.append(line + "".join(f"{row['tokens_per_second'] / speed:7.2f} x" for speed in plain.values()))
    return "\n".join(lines)


def position_table(result: Result) -> str:
    """Return the acceptance by position of real drafters as text; empty without any."""
    drafted = [row for row in result.rows if row["drafter"] != "none" and row["probability"] is None]
    lines = ["accepted at position 1, 2, ..., of the drafts that reach it"] if drafted else []
    for row in drafted:
        rates = " ".join(f"{rate:.2f}" for rate in row["acceptance_by_position"][:POSITIONS])
        lines.append(f"{row['drafter']} {row['plan']}: {rates}")
    return "\n".join(lines)
