"""A llama_batch whose arrays are numpy arrays, filled without a Python loop and reused for every evaluation.

One leaf of a tree is one sequence of the cache. The root belongs to all sequences; a node belongs to the sequences of
the leaves at or below it, so that it sees its ancestors and nothing else. Text and chains belong to all sequences, or
with `alone` to the first one only, which costs the cache less.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from blockffn import library
from blockffn.speculative.draft import Draft, Tokens


class Batch:
    """Up to `capacity` tokens, each in up to `n_seq` sequences; with `n_embd` rows of floats beside the tokens."""

    def __init__(self, capacity: int, n_seq: int = 1, n_embd: int = 0, alone: bool = False) -> None:
        self.capacity, self.n_seq = capacity, n_seq
        self.token = np.zeros(capacity, dtype=np.int32)
        self.pos = np.zeros(capacity, dtype=np.int32)
        self._usual = 1 if alone else n_seq  # sequences of a token outside trees; the first ones
        self.n_seq_id = np.full(capacity, self._usual, dtype=np.int32)
        self.seq_id = np.tile(np.arange(n_seq, dtype=np.int32), (capacity, 1))  # [capacity, n_seq]
        self._rows = self.seq_id.ctypes.data + self.seq_id.strides[0] * np.arange(capacity + 1, dtype=np.uintp)
        self._rows[capacity] = 0
        self.logits = np.zeros(capacity, dtype=np.int8)
        self.embd = np.zeros((capacity, n_embd), dtype=np.float32) if n_embd else None
        self._all = np.arange(n_seq, dtype=np.int32)
        self._touched = 0  # rows whose sequences are not the usual ones
        self.native = self._native()

    def _native(self) -> Any:
        batch = library.load().llama_batch()
        fields: dict[str, npt.NDArray[Any]] = {
            "token": self.token,
            "pos": self.pos,
            "n_seq_id": self.n_seq_id,
            "seq_id": self._rows,
        }
        fields["logits"] = self.logits
        if self.embd is not None:
            fields["embd"] = self.embd
        kinds = dict(batch._fields_)
        for name, array in fields.items():
            setattr(batch, name, ctypes.cast(array.ctypes.data, kinds[name]))
        return batch

    def set_chain(self, tokens: Tokens, first: int, rows: slice) -> None:
        """Hold `tokens` int32 [n] at positions `first`, ... as text; logits for the rows of the slice."""
        n = len(tokens)
        self._usual_sequences()
        self.token[:n] = tokens
        self.pos[:n] = np.arange(first, first + n, dtype=np.int32)
        self.logits[:n] = 0
        self.logits[:n][rows] = 1
        self.native.n_tokens = n

    def set_draft(self, root: int, draft: Draft, first: int) -> npt.NDArray[np.int32] | None:
        """Hold the root token at position `first` and the draft after it, logits for every row.

        Returns one leaf below each node, int32 [nodes] (the node's sequence), or None for a chain.
        """
        n = 1 + len(draft)
        self._usual_sequences()
        self.token[0] = root
        self.token[1:n] = draft.tokens
        self.logits[:n] = 1
        self.native.n_tokens = n
        self.pos[0] = first
        if draft.is_chain:
            self.pos[1:n] = np.arange(first + 1, first + n, dtype=np.int32)
            return None
        self.pos[1:n] = draft.depth() + first
        self.n_seq_id[0] = self.n_seq
        return self._set_sequences(draft.leaf_sets())

    def set_level(self, tokens: Tokens, position: int, sequences: npt.NDArray[np.int32]) -> None:
        """Hold `tokens` int32 [n] at one position, row i in sequence sequences[i] only; logits for every row."""
        n = len(tokens)
        self._usual_sequences()
        self.token[:n] = tokens
        self.pos[:n] = position
        self.logits[:n] = 1
        self.seq_id[:n, 0] = sequences
        self.n_seq_id[:n] = 1
        self._touched = n
        self.native.n_tokens = n

    def _set_sequences(self, below: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
        """Write the leaves below each node, bool [nodes, leaves], as its sequences; return the first of each."""
        node, leaf = np.nonzero(below)
        count = below.sum(axis=1)
        start = np.cumsum(count) - count
        self.seq_id[1 + node, np.arange(len(node)) - start[node]] = leaf
        self.n_seq_id[1 : 1 + len(count)] = count
        self._touched = 1 + len(count)
        return leaf[start].astype(np.int32)

    def _usual_sequences(self) -> None:
        if self._touched:
            self.seq_id[: self._touched] = self._all
            self.n_seq_id[: self._touched] = self._usual
            self._touched = 0
