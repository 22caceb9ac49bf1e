"""The cache that all texts of an engine share: one llama_context, one sequence for each place.

A cell may belong to several sequences: a beginning that texts have in common lies there once.
"""

from __future__ import annotations

from typing import Any

from blockffn import library
from blockffn.speculative.decoder import REASONS

FULL = 1  # llama_decode: no room in the cache


class SharedCache:
    """A llama_context with `n_seq` sequences."""

    def __init__(self, ctx: int, n_seq: int) -> None:
        self._api = library.load()
        self.ctx, self.n_seq = ctx, n_seq
        self.memory = self._api.llama_get_memory(ctx)
        self.n_cells = int(self._api.llama_n_ctx(ctx))

    def evaluate(self, batch: Any) -> bool:
        """Evaluate a llama_batch; False, and nothing is changed, where the cache has no room for it."""
        code = int(self._api.llama_decode(self.ctx, batch))
        if code not in (0, FULL):
            raise RuntimeError(f"evaluating {batch.n_tokens} tokens: {REASONS.get(code, f'llama_decode gave {code}')}")
        return code == 0

    def share(self, source: int, target: int, n: int) -> None:
        """Give the first `n` positions of a sequence to another one, which is empty."""
        self._api.llama_memory_seq_cp(self.memory, source, target, 0, n)

    def forget(self, seq: int, n: int) -> None:
        """Forget the positions of a sequence from `n` on."""
        if not self._api.llama_memory_seq_rm(self.memory, seq, n, -1):
            raise RuntimeError(f"the cache of this model cannot forget positions from {n} on")
