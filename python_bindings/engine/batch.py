"""One llama_batch for parts of several texts: drafts to verify, and pieces of prompts. Each text is one sequence."""

from __future__ import annotations

from typing import NamedTuple

from blockffn.speculative.decoder import Batch


class Part(NamedTuple):
    """Rows of a batch that belong to one text: `n` tokens from row `row` on, logits from output row `output` on."""

    row: int
    n: int
    output: int
    n_outputs: int


class SharedBatch(Batch):
    """A batch that is filled part by part: `clear`, `add_text` for each text, `close`."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self.n = self.n_outputs = 0
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._sequences: list[int] = []
        self._wanted: list[int] = []

    @property
    def room(self) -> int:
        """How many more tokens fit."""
        return self.capacity - self.n

    def add_text(self, tokens: list[int], first: int, seq: int, n_outputs: int) -> Part:
        """Add tokens at positions `first`, ... of a sequence, with logits for the last `n_outputs` of them."""
        n = len(tokens)
        part = Part(self.n, n, self.n_outputs, n_outputs)
        self.n += n
        self.n_outputs += n_outputs
        self._tokens += tokens
        self._positions += range(first, first + n)
        self._sequences += [seq] * n
        self._wanted += [0] * (n - n_outputs) + [1] * n_outputs
        return part

    def close(self) -> None:
        """Write what was added into the arrays that llama.cpp reads."""
        n = self.n
        self.token[:n], self.pos[:n] = self._tokens, self._positions
        self.seq_id[:n, 0], self.logits[:n] = self._sequences, self._wanted
        self.native.n_tokens = n
