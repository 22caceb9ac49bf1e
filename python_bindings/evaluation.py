"""Teacher-forced evaluation of a token sequence: logits, hidden states, active experts, batch by batch.

An `Evaluator` has a llama_context of its own on the weights of a loaded model, so that the cache and the sampler of the
conversation are not touched. Its memory does not grow with the length times the vocabulary: llama.cpp holds the logits
of one batch, at most `MAX_LOGIT_BYTES`, and the caller's result array is the only thing of full size.

    >>> llm = blockffn.Llama("model.gguf")                        # doctest: +SKIP
    >>> Evaluator(llm).logits([1, 5, 7]).shape                    # doctest: +SKIP
    (3, 4096)
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from blockffn import _capi, dial, library, logs
from blockffn.errors import BlockffnError

if TYPE_CHECKING:
    from blockffn.llama import Llama

MAX_LOGIT_BYTES = 64 << 20  # logits that llama.cpp holds at a time
MIN_CONTEXT = 512  # smallest context that is created, so that short texts of growing length share it


def batch_size(n_vocab: int) -> int:
    """Return how many tokens are evaluated at a time, so that their float32 logits stay below MAX_LOGIT_BYTES."""
    return min(512, max(16, MAX_LOGIT_BYTES // (4 * n_vocab)))


class Evaluator:
    """Evaluates token sequences on the weights of `llm`, always from an empty cache. Free it with `close`.

    Unless the model was given cache types, its cache is float32 and attention runs in float32: what is measured is the
    model, not the rounding of keys and values to 11 bits.

    n_batch: tokens that are evaluated together, None for many. threshold, union_budget: see blockffn.dial; None has the
    threshold of `llm`, and its budget has no part in what is evaluated here.
    """

    def __init__(
        self, llm: Llama, n_batch: int | None = None, threshold: float | None = None, union_budget: int = 0
    ) -> None:
        self._threshold, self._budget = threshold, union_budget
        self._llm = cast("Llama", weakref.proxy(llm))  # the model owns this object
        self._low = library.load()
        self._n_batch = n_batch or batch_size(llm.n_vocab())
        self._n_ctx = 0
        self._ctx: Any = None
        self._batch: Any = None

    def close(self) -> None:
        """Free the native context and batch; they are created again when needed."""
        if self._ctx is not None:
            self._low.llama_free(self._ctx)
            self._low.llama_batch_free(self._batch)
        self._ctx = self._batch = None
        self._n_ctx = 0

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits after every token, float32 [n_tokens, n_vocab]."""
        result = np.empty((len(tokens), self._llm.n_vocab()), np.float32)
        for start, rows in self.logit_rows(tokens):
            result[start : start + len(rows)] = rows
        return result

    def logit_rows(self, tokens: Sequence[int], first: int = 0) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield the logits after the tokens from `first` on, a batch at a time: (token, float32 [rows, n_vocab]).

        The rows are llama.cpp's own memory, valid until the next batch.
        """
        n_vocab = self._llm.n_vocab()
        for start, count in self._decode(tokens, hidden=False, first=first):
            known = max(0, min(count, first - start))
            if known < count:
                rows = self._low.llama_get_logits(self._ctx)
                yield start + known, np.ctypeslib.as_array(rows, shape=(count - known, n_vocab))

    def hidden_states(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the hidden states after the final norm, float32 [n_tokens, n_embd]."""
        n_embd = self._llm.n_embd()
        result = np.empty((len(tokens), n_embd), np.float32)
        for start, count in self._decode(tokens, hidden=True):
            rows = self._low.llama_get_embeddings(self._ctx)
            result[start : start + count] = np.ctypeslib.as_array(rows, shape=(count, n_embd))
        return result

    def active_experts(self, tokens: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Return the experts that the router chose inside llama.cpp, bool [n_moe_layers, n_tokens, n_experts]."""
        n_layers, n_experts = self._llm.n_moe_layers, self._llm.n_experts
        if n_layers == 0:
            raise BlockffnError(f"{self._llm.model_path}: no layer of this model has routed experts")
        get = _capi.function("blockffn_active_experts")
        result = np.zeros((n_layers, len(tokens), n_experts), np.uint8)
        row = (ctypes.c_uint8 * n_experts)()
        # Every token asks for logits: the last FFN runs only on the rows that do.
        for start, count in self._decode(tokens, hidden=False, experts=True):
            for layer in range(n_layers):
                for i in range(count):
                    if not get(self._ctx, layer, i, row):
                        raise BlockffnError(f"router choices of layer {layer}, token {start + i} are not available")
                    result[layer, start + i] = row
        return result.astype(np.bool_)

    def _decode(
        self, tokens: Sequence[int], hidden: bool, experts: bool = False, first: int = 0
    ) -> Iterator[tuple[int, int]]:
        """Evaluate `tokens` from an empty cache; yield (start, count) after each batch.

        Its outputs are ready then: those of the tokens from `first` on.
        """
        ids = self._checked(tokens)
        self._reserve(len(ids))
        _capi.function("blockffn_stats_enable")(self._ctx, experts)
        self._low.llama_set_embeddings(self._ctx, hidden)
        self._low.llama_memory_clear(self._low.llama_get_memory(self._ctx), True)
        for start in range(0, len(ids), self._n_batch):
            piece = ids[start : start + self._n_batch]
            count = len(piece)
            self._batch.n_tokens = count
            np.ctypeslib.as_array(self._batch.token, (count,))[:] = piece
            positions = np.arange(start, start + count)
            np.ctypeslib.as_array(self._batch.pos, (count,))[:] = positions
            np.ctypeslib.as_array(self._batch.logits, (count,))[:] = positions >= first
            with self._bounded(), logs.collect() as lines:
                status = self._low.llama_decode(self._ctx, self._batch)
            if status != 0:
                raise BlockffnError(f"evaluation of token {start} failed: {logs.reason(lines) or f'status {status}'}")
            yield start, count

    def _bounded(self) -> contextlib.AbstractContextManager[None]:
        return dial.union_budget(self._ctx, self._budget) if self._budget else contextlib.nullcontext()

    def _checked(self, tokens: Sequence[int]) -> npt.NDArray[np.int32]:
        ids = np.asarray(tokens)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise BlockffnError(f"tokens: expected a list of token ids, found shape {ids.shape}, type {ids.dtype}")
        wrong = np.flatnonzero((ids < 0) | (ids >= self._llm.n_vocab()))
        if wrong.size:
            at = int(wrong[0])
            raise BlockffnError(f"tokens[{at}]: expected an id in 0..{self._llm.n_vocab() - 1}, found {ids[at]}")
        return ids.astype(np.int32)

    def _reserve(self, n_tokens: int) -> None:
        """Make sure that the context holds `n_tokens`."""
        if self._ctx is not None and n_tokens <= self._n_ctx:
            return
        self.close()
        params = self._low.llama_context_params.from_buffer_copy(self._llm.context_params)
        params.n_ctx = max(MIN_CONTEXT, 1 << (n_tokens - 1).bit_length()) if n_tokens > 1 else MIN_CONTEXT
        if n_tokens <= self._llm.n_ctx():
            params.n_ctx = min(params.n_ctx, self._llm.n_ctx())
        params.n_batch = params.n_ubatch = self._n_batch
        params.n_seq_max, params.n_outputs_max, params.kv_unified = 1, 0, False
        params.pooling_type = self._low.LLAMA_POOLING_TYPE_NONE
        params.embeddings = False
        if self._llm.default_cache:
            params.type_k = params.type_v = self._low.GGML_TYPE_F32
        with logs.collect() as lines:
            ctx = self._low.llama_init_from_model(self._llm.model, params)
        if not ctx:
            cause = logs.reason(lines) or "out of memory?"
            raise BlockffnError(f"no context for {n_tokens} tokens: {cause}; evaluate a shorter text")
        self._ctx, self._n_ctx = ctx, self._low.llama_n_ctx(ctx)
        self._batch = self._low.llama_batch_init(self._n_batch, 0, 1)
        for i in range(self._n_batch):
            self._batch.n_seq_id[i], self._batch.seq_id[i][0] = 1, 0
        self._llm.apply_adapters(ctx)
        if self._threshold is not None:
            dial.set_threshold(ctx, self._threshold)
