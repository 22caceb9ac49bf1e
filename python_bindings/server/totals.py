"""Sums over all answers, and the figures of one: what /metrics, `timings` and `metrics.speculative_decoding` show.

>>> from blockffn.server.totals import timings
>>> timings([{"predicted_n": 4, "predicted_ms": 20.0}])["predicted_per_second"]
200.0
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SUMS = (
    "prompt_n", "reused_n", "prompt_ms", "predicted_n", "predicted_ms", "drafted", "accepted", "steps", "plain_steps",
    "preempted",
)  # fmt: skip
Figures = Mapping[str, Any]


def summed(figures: Iterable[Figures]) -> dict[str, Any]:
    """Return the sums over the statistics of several answers; positions and sizes are added one by one."""
    total: dict[str, Any] = {name: 0 for name in SUMS}
    total |= {"drafted_by_position": [], "accepted_by_position": [], "union": 0.0, "union_steps": 0}
    for one in figures:
        for name in SUMS:
            total[name] += one.get(name) or 0
        for name in ("drafted_by_position", "accepted_by_position"):
            counts = one.get(name) or []
            total[name] += [0] * (len(counts) - len(total[name]))
            for position, count in enumerate(counts):
                total[name][position] += count
        steps = one.get("steps_by_size") or {}
        for size, union in (one.get("union_by_size") or {}).items():
            total["union"] += union * steps.get(size, 0)
            total["union_steps"] += steps.get(size, 0)
    return total


class Totals:
    """Sums since the server started."""

    def __init__(self) -> None:
        self.sums = summed(())
        self.answers = self.cancelled = self.refused = 0

    def add(self, statistics: Figures, ended: bool) -> None:
        """Count an answer."""
        self.sums = _added(self.sums, summed([statistics]))
        self.answers += ended
        self.cancelled += not ended


def _added(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    result = {}
    for name, value in a.items():
        other = b[name]
        if isinstance(value, list):
            longer, shorter = sorted((value, other), key=len, reverse=True)
            other_counts = [*shorter, *[0] * (len(longer) - len(shorter))]
            result[name] = [left + right for left, right in zip(longer, other_counts, strict=True)]
        else:
            result[name] = value + other
    return result


def timings(figures: Sequence[Figures]) -> dict[str, Any]:
    """Return llama-server's `timings` of an answer."""
    total = summed(figures)
    result = {"cache_n": total["reused_n"]}
    for kind in ("prompt", "predicted"):
        n, ms = total[f"{kind}_n"], total[f"{kind}_ms"]
        result |= {
            f"{kind}_n": n,
            f"{kind}_ms": ms,
            f"{kind}_per_token_ms": ms / n if n else None,
            f"{kind}_per_second": 1e3 * n / ms if ms else None,
        }
    return result | {"draft_n": total["drafted"], "draft_n_accepted": total["accepted"]}


def speculative(figures: Sequence[Figures], n_experts: int) -> dict[str, Any]:
    """Return what drafts were worth, with the names of vLLM's counters, and the experts that a step read."""
    total = summed(figures)
    drafts = total["steps"] - total["plain_steps"]
    union = total["union"] / total["union_steps"] if total["union_steps"] else None
    return {
        "num_drafts": drafts,
        "num_draft_tokens": total["drafted"],
        "num_accepted_tokens": total["accepted"],
        "num_accepted_tokens_per_pos": total["accepted_by_position"],
        "acceptance_rate": total["accepted"] / total["drafted"] if total["drafted"] else None,
        "mean_acceptance_length": 1 + total["accepted"] / drafts if drafts else None,
        "tokens_per_step": (total["steps"] + total["accepted"]) / total["steps"] if total["steps"] else None,
        "union_size": union,
        "experts_read_share": union / n_experts if union is not None and n_experts else None,
    }
