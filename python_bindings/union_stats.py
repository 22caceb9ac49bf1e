"""How many experts a model computed and loaded: the counters of llama.cpp, read at two points and subtracted.

>>> before = llm.union_stats()                      # doctest: +SKIP
>>> (llm.union_stats() - before).union_share        # doctest: +SKIP
0.31
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class UnionStats:
    """What the routed experts of each MoE layer cost since the last reset, arrays of length n_moe_layers.

    evaluations: batches that passed the layer; n_tokens: tokens in them; active_pairs: (token, expert) pairs computed;
    union_size: experts needed by at least one token of a batch, summed over the batches.
    """

    evaluations: npt.NDArray[np.int64]
    n_tokens: npt.NDArray[np.int64]
    active_pairs: npt.NDArray[np.int64]
    union_size: npt.NDArray[np.int64]
    n_experts: int

    def __sub__(self, earlier: UnionStats) -> UnionStats:
        """Return what happened between two readings."""
        return UnionStats(
            self.evaluations - earlier.evaluations,
            self.n_tokens - earlier.n_tokens,
            self.active_pairs - earlier.active_pairs,
            self.union_size - earlier.union_size,
            self.n_experts,
        )

    @property
    def token_sparsity(self) -> float:
        """TLS: 1 - mean share of experts active for one token, mean over layers; nan before any token."""
        return 1.0 - self._share(self.active_pairs, self.n_tokens)

    @property
    def union_share(self) -> float:
        """Mean share of the experts that one evaluation loads, mean over layers; nan before any evaluation."""
        return self._share(self.union_size, self.evaluations)

    def _share(self, part: npt.NDArray[np.int64], times: npt.NDArray[np.int64]) -> float:
        if not len(times) or not times.all():
            return float("nan")
        return float((part / (times * self.n_experts)).mean())
