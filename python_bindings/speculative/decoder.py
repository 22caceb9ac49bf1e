"""A llama_context with its cache and its batch: evaluate tokens, read rows, keep the accepted path in the cache.

The target, a draft model and a draft head each have one. One leaf of a tree is one sequence of the cache. The root
belongs to all sequences; a node belongs to the sequences of the leaves at or below it, so that it sees its ancestors
and nothing else. Text and chains lie in the first sequence. Before a tree is verified, the other sequences are given
what they lack of the text; only while it is verified do they differ otherwise. Nothing outside this file knows that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from blockffn import dial, library
from blockffn.errors import BlockffnError
from blockffn.speculative.draft import Draft, Tokens

Floats = npt.NDArray[np.float32]
MOST_VIEWS = 256
REASONS = {1: "the context is full", 2: "aborted", -1: "llama.cpp refuses the batch (a token outside the vocabulary?)"}


def rows_at(address: int | None, rows: int, columns: int) -> Floats:
    """Return a view of `rows` x `columns` floats at an address; valid until the next evaluation."""
    if not address:
        raise BlockffnError("llama.cpp returned no rows for the last evaluation")
    flat = (ctypes.c_float * (rows * columns)).from_address(address)
    return np.ctypeslib.as_array(flat).reshape(rows, columns)


class Views:
    """`rows_at`, made once for each place and shape: a step asks for the same few again and again."""

    def __init__(self) -> None:
        self._views: dict[tuple[int | None, int, int], Floats] = {}

    def at(self, address: int | None, rows: int, columns: int) -> Floats:
        """Return float32 [rows, columns] at an address."""
        if not rows:
            return np.empty((0, columns), dtype=np.float32)
        key = address, rows, columns
        if key not in self._views:
            if len(self._views) >= MOST_VIEWS:  # llama.cpp has moved its outputs
                self._views.clear()
            self._views[key] = rows_at(*key)
        return self._views[key]


class Decoder:
    """One llama_context and its cache of `n_seq` sequences; `alone`: text lies in the first one until a tree needs it.

    `hidden` asks for the states after the final norm, of every evaluated token. `n_embd_input` > 0: every token comes
    with a row of so many floats in batch.embd (draft heads).
    """

    def __init__(
        self,
        ctx: int,
        n_vocab: int,
        n_embd: int,
        capacity: int,
        n_seq: int = 1,
        hidden: bool = False,
        n_embd_input: int = 0,
        alone: bool = False,
    ) -> None:
        self._api = library.load()
        from llama_cpp import llama_cpp_ext

        self.ctx, self.n_vocab, self.n_embd, self.n_seq = ctx, n_vocab, n_embd, n_seq
        self._memory = self._api.llama_get_memory(ctx)
        self.batch = Batch(capacity, n_seq, n_embd_input, alone)
        self._alone, self._shared = alone, 0  # the first positions, which all sequences hold
        self._leaves: npt.NDArray[np.int32] | None = None
        self.first = 0  # position of the first token of the last evaluation
        self._pack = _pack_function(self._api._lib)
        self._logits_address = address_function(self._api.llama_get_logits)
        self._hidden_address = address_function(llama_cpp_ext.llama_get_embeddings_nextn)
        self._views = Views()
        llama_cpp_ext.llama_set_embeddings_nextn(ctx, hidden, False)
        self.evaluated = 0  # tokens of the last evaluation
        self.budget = 0  # experts per layer that a verified batch may compute; 0: no bound

    def begin(self) -> None:
        """Start a generation: the cache may have been changed from outside, as by llama_cpp.Llama.load_state."""
        self._shared = 0

    def truncate(self, n: int) -> None:
        """Forget every position from `n` on, in all sequences."""
        if self.n_seq == 1 and self.length() <= n:
            return  # caches that cannot be cut refuse even to forget nothing
        if not self._api.llama_memory_seq_rm(self._memory, -1, n, -1):
            raise BlockffnError(f"the cache of this model cannot forget positions from {n} on: speculation needs that")
        self._shared = min(self._shared, n)

    def rewind(self, n: int) -> int:
        """Forget every position from `n` on, or all of them where the cache cannot be cut; return how many are left."""
        try:
            self.truncate(n)
        except BlockffnError:
            self._api.llama_memory_clear(self._memory, True)
            self._shared = 0
            return 0
        return n

    def length(self) -> int:
        """Return the number of positions in the cache."""
        return int(self._api.llama_memory_seq_pos_max(self._memory, 0)) + 1

    def evaluate_text(self, tokens: Tokens, first: int, rows: slice) -> None:
        """Evaluate `tokens` int32 [n] (n <= capacity) from position `first`; logits for the rows of the slice."""
        self.batch.set_chain(tokens, first, rows)
        self._leaves = None
        self._decode(first)

    def evaluate_draft(self, root: int, draft: Draft, first: int) -> None:
        """Evaluate the root token at position `first` and the draft after it; logits for every row."""
        if not draft.is_chain:
            self._share_text(first)
        self._leaves = self.batch.set_draft(root, draft, first)
        if self.budget and len(draft):
            with dial.union_budget(self.ctx, self.budget):
                self._decode(first)
        else:
            self._decode(first)

    def evaluate_level(self, tokens: Tokens, position: int, sequences: npt.NDArray[np.int32]) -> None:
        """Evaluate `tokens` int32 [n], all at one position, each in a sequence of its own; logits for every row."""
        self.batch.set_level(tokens, position, sequences)
        self._leaves = None
        self._decode(position)

    def _share_text(self, n: int) -> None:
        """Let all sequences hold the first `n` positions."""
        if self._alone and self._shared < n:
            for seq in range(1, self.n_seq):
                self._api.llama_memory_seq_cp(self._memory, 0, seq, self._shared, n)
        self._shared = n

    def share(self, source: int, target: int, first: int) -> None:
        """Let sequence `target` see what `source` holds from position `first` on."""
        self._api.llama_memory_seq_cp(self._memory, source, target, first, -1)

    def _decode(self, first: int) -> None:
        self.first = first
        self.evaluated = int(self.batch.native.n_tokens)
        code = self._api.llama_decode(self.ctx, self.batch.native)
        if code == 0:
            return
        self.truncate(first)
        n, last = self.evaluated, first + self.evaluated - 1
        reason = REASONS.get(code, f"llama_decode returned {code}")
        raise RuntimeError(f"evaluating {n} tokens at positions {first} to {last}: {reason}")

    def logits(self, rows: int) -> Floats:
        """Return the logits of the last evaluation, float32 [rows, n_vocab]; waits for the evaluation to end."""
        return self._views.at(self._logits_address(self.ctx), rows, self.n_vocab)

    def hidden(self) -> Floats:
        """Return the states after the final norm of the last evaluation's tokens, float32 [evaluated, n_embd]."""
        return self._views.at(self._hidden_address(self.ctx), self.evaluated, self.n_embd)

    def keep(self, path: list[int], nodes: int) -> None:
        """Of the draft just evaluated keep the root and the nodes of `path`, forget the rest."""
        kept = self.first + 1 + len(path)
        if self._leaves is None or not path:
            if len(path) < nodes:
                self.truncate(kept)
            self._shared = self._shared if self._leaves is None else kept
            return
        leaf = int(self._leaves[path[-1]])
        self.truncate(kept)
        self._shared = kept
        if self._pack is not None and self._pack(self._memory, leaf, self.first + 1):
            return
        for seq in range(self.n_seq):
            if seq != leaf:
                self._api.llama_memory_seq_rm(self._memory, seq, self.first + 1, -1)
        for seq in range(self.n_seq):
            if seq != leaf:
                self._api.llama_memory_seq_cp(self._memory, leaf, seq, self.first + 1, kept)


class Batch:
    """A llama_batch whose arrays are numpy arrays, filled without a Python loop and reused for every evaluation.

    Up to `capacity` tokens, each in up to `n_seq` sequences; with `n_embd` rows of floats beside the tokens. Text and
    chains belong to all sequences, or with `alone` to the first one only, which costs the cache less.
    """

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


def _pack_function(library_handle: Any) -> Callable[[int, int, int], bool] | None:
    """Return llama_memory_seq_pack of the patched library (see patches/): keep one path, in order, in one call."""
    native = getattr(library_handle, "llama_memory_seq_pack", None)
    if native is None:
        return None
    native.argtypes, native.restype = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32], ctypes.c_bool
    return cast(Callable[[int, int, int], bool], native)


def address_function(native: Any) -> Callable[[int], int | None]:
    """Return a function of libllama that gives a pointer, as one that gives the address: a number costs less."""
    address = ctypes.cast(native, ctypes.c_void_p).value
    assert address is not None
    return cast("Callable[[int], int | None]", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address))
