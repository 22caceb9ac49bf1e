"""Local routing consistency: how well a fixed set of experts would serve a segment of tokens (arXiv 2505.16056).

    >>> import numpy as np
    >>> active = np.zeros((1, 4, 3), bool)               # one layer, four tokens, three experts
    >>> active[0, :, 0] = active[0, :2, 1] = active[0, 2:, 2] = True
    >>> found = consistency(active, lengths=(2,))
    >>> round(found.srp[2], 4), found.sch[2]
    (0.9412, {1.0: 0.8333, 2.0: 1.0})

SRP, segment routing best performance: for every segment a router that must take an expert for all of its tokens or none
takes those that at least t tokens activate; the best F1 over t against what the tokens activate, summed over segments.
SCH, segment cache best hit rate: for every segment the rho * k experts that it activates most stay in a cache, where k
is the mean number of active experts of a token; the share of activations that hit. Segments begin at every token and
end inside their window. The definitions are those of the authors' programs, where every token activates k experts: here
a token may activate any number, so that counts replace k times the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LENGTHS = (4, 16, 64, 256)  # tokens of a segment, those of the paper; its windows have 512
CACHES = (1.0, 2.0)  # rho: experts in the cache, in mean active ones of a token
BLOCK = 1024  # segments that are sorted at a time

Counts = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Consistency:
    """By segment length: SRP and SCH of the whole model, and of every layer."""

    srp: dict[int, float]
    sch: dict[int, dict[float, float]]  # length -> rho -> hit rate; one cache for all layers
    layer_srp: dict[int, list[float]]
    layer_sch: dict[int, dict[float, list[float]]]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain Python values, for JSON."""
        return {
            "srp": {str(length): value for length, value in self.srp.items()},
            "sch": {str(length): _named(rates) for length, rates in self.sch.items()},
            "layer_srp": {str(length): values for length, values in self.layer_srp.items()},
            "layer_sch": {str(length): _named(rates) for length, rates in self.layer_sch.items()},
        }


def consistency(active: Bools, lengths: Sequence[int] = LENGTHS, window: int = 0) -> Consistency:
    """Return SRP and SCH of choices bool [n_moe_layers, n_tokens, n_experts]; lengths above the window are left out.

    window: the tokens are texts of `window` tokens each, and no segment crosses from one to the next; 0: one text.
    """
    n_layers, n_tokens, _ = active.shape
    window = window or n_tokens
    found = Consistency({}, {}, {}, {})
    for length in (length for length in lengths if length <= window):
        seen = np.zeros((n_layers, length + 1), np.int64)  # per layer: (segment, expert) pairs by tokens that use it
        hits = {rho: np.zeros(n_layers + 1) for rho in CACHES}  # per layer, then of all layers together
        total = np.zeros(n_layers + 1)
        sizes = {rho: _cache_sizes(active, rho) for rho in CACHES}
        for counts in _segments(active, length, window):  # [L, segments, E]
            for layer in range(n_layers):
                seen[layer] += np.bincount(counts[layer].ravel(), minlength=length + 1)
            for row, values in enumerate([*counts, counts.transpose(1, 0, 2).reshape(counts.shape[1], -1)]):
                best = -np.sort(-values, axis=1)  # [segments, E or L * E]
                total[row] += values.sum()
                for rho in CACHES:
                    hits[rho][row] += best[:, : sizes[rho][row]].sum()
        found.srp[length] = _best_f1(seen.sum(axis=0))
        found.layer_srp[length] = [_best_f1(row) for row in seen]
        rates = {rho: np.round(hits[rho] / np.maximum(total, 1), 4) for rho in CACHES}
        found.sch[length] = {rho: float(values[-1]) for rho, values in rates.items()}
        found.layer_sch[length] = {rho: values[:-1].tolist() for rho, values in rates.items()}
    return found


def _segments(active: Bools, length: int, window: int) -> Any:
    """Yield how many tokens of each segment activate each expert, int64 [n_moe_layers, segments, n_experts]."""
    for start in range(0, active.shape[1] - window + 1, window):
        text = active[:, start : start + window]
        sums = np.concatenate([np.zeros_like(text[:, :1], np.int64), text.cumsum(axis=1, dtype=np.int64)], axis=1)
        counts = sums[:, length:] - sums[:, :-length]
        for first in range(0, counts.shape[1], BLOCK):
            yield counts[:, first : first + BLOCK]


def _cache_sizes(active: Bools, rho: float) -> list[int]:
    """Return the experts that a cache holds, for every layer and for all layers together; at least one."""
    mean = active.mean(axis=1).sum(axis=1)  # [L]: active experts of a token
    return [max(1, round(rho * value)) for value in [*mean.tolist(), float(mean.sum())]]


def _best_f1(seen: Counts) -> float:
    """Return the best F1 over thresholds; seen[c]: (segment, expert) pairs of which c tokens are active."""
    length = len(seen) - 1
    counts = np.arange(length + 1)
    right = (seen * counts)[::-1].cumsum()[::-1]  # activations of the pairs that reach a threshold
    given = seen[::-1].cumsum()[::-1] * length  # (token, expert) pairs that the segment router activates
    scores = 2 * right / np.maximum(1, given + right[0])
    return float(scores[1:].max()) if right[0] else 0.0


def _named(rates: dict[float, Any]) -> dict[str, Any]:
    return {f"{rho:g}": value for rho, value in rates.items()}
