"""The cache that all texts of an engine share: one llama_context, one sequence for each place.

A cell may belong to several sequences: a beginning that texts have in common lies there once.
"""

from __future__ import annotations

from typing import Any

from blockffn import library
from blockffn.speculative.decoder import REASONS

FULL = 1  # llama_decode: no room in the cache


class SharedCache:
    """A llama_context with `n_seq` sequences. rewinds: its memory can go back to an earlier token."""

    def __init__(self, ctx: int, n_seq: int, rewinds: bool = True) -> None:
        self._api = library.load()
        self.ctx, self.n_seq, self.rewinds = ctx, n_seq, rewinds
        self.memory = self._api.llama_get_memory(ctx)
        self.n_cells = int(self._api.llama_n_ctx(ctx))

    def evaluate(self, batch: Any) -> bool:
        """Evaluate a llama_batch; False, and nothing is changed, where the cache has no room for it."""
        code = int(self._api.llama_decode(self.ctx, batch))
        if code not in (0, FULL):
            raise RuntimeError(f"evaluating {batch.n_tokens} tokens: {REASONS.get(code, f'llama_decode gave {code}')}")
        return code == 0

    def reusable(self, seq: int, n: int, held: int) -> int:
        """Return how many of the first `n` positions can be gone on from, of a sequence that holds `held`.

        All or none where a recurrent state knows no earlier token, or a sliding window has left the first ones behind.
        """
        if n == held or (self.rewinds and self._api.llama_memory_seq_pos_min(self.memory, seq) <= 0):
            return n
        return 0

    def share(self, source: int, target: int, n: int) -> None:
        """Give the first `n` positions of a sequence to another one, which is empty."""
        self._api.llama_memory_seq_cp(self.memory, source, target, 0, n)

    def forget(self, seq: int, n: int) -> None:
        """Forget the positions of a sequence from `n` on."""
        if not self._api.llama_memory_seq_rm(self.memory, seq, n, -1):
            raise RuntimeError(f"the cache of this model cannot forget positions from {n} on")
