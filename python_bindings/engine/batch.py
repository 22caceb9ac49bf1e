"""One llama_batch for parts of several texts: drafts to verify, and pieces of prompts.

Each text has sequences of its own, `width` of them from `first_seq` on. Text and chains lie in the first of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blockffn.speculative.decoder import Batch
from blockffn.speculative.draft import Tokens


@dataclass(frozen=True)
class Part:
    """Rows of a batch that belong to one text: `n` tokens from row `row` on, logits from output row `output` on."""

    row: int
    n: int
    output: int
    n_outputs: int


class SharedBatch(Batch):
    """A batch that is filled part by part."""

    def __init__(self, capacity: int, width: int = 1) -> None:
        super().__init__(capacity, width, alone=True)
        self.n = self.n_outputs = 0

    def clear(self) -> None:
        """Start anew."""
        self._usual_sequences()
        self.n = self.n_outputs = 0

    @property
    def room(self) -> int:
        """How many more tokens fit."""
        return self.capacity - self.n

    def add_text(self, tokens: Tokens, first: int, seq: int, n_outputs: int) -> Part:
        """Add `tokens` int32 [n] at positions `first`, ... of a sequence, with logits for the last `n_outputs`."""
        start, end = self.n, self.n + len(tokens)
        self.token[start:end] = tokens
        self.pos[start:end] = np.arange(first, first + len(tokens), dtype=np.int32)
        self.seq_id[start:end, 0] = seq
        self.logits[start : end - n_outputs] = 0
        self.logits[end - n_outputs : end] = 1
        return self._part(len(tokens), n_outputs)

    def _part(self, n: int, n_outputs: int) -> Part:
        part = Part(self.n, n, self.n_outputs, n_outputs)
        self.n += n
        self.n_outputs += n_outputs
        self.native.n_tokens = self._touched = self.n
        return part
