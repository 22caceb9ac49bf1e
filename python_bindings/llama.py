"""The model class: llama_cpp.Llama on the patched library, with what BlockFFN models need beside it.

>>> import blockffn
>>> llm = blockffn.Llama("model.gguf", n_ctx=2048)                        # doctest: +SKIP
>>> llm.create_completion("def add(a, b):", max_tokens=16)["choices"]     # doctest: +SKIP
>>> llm.active_experts(llm.tokenize(b"import os")).mean()                 # doctest: +SKIP
0.19
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from blockffn import _capi, gguf_contract, library, logs
from blockffn.errors import BlockffnError
from blockffn.evaluation import Evaluator
from blockffn.threads import physical_cores

library.load()
import llama_cpp  # noqa: E402  only after `load`

from blockffn.pieces import PieceTokenizer  # noqa: E402
from blockffn.speculative.drafter import Drafter, LlamaDraftModelDrafter  # noqa: E402
from blockffn.speculative.generate import Speculative  # noqa: E402

DEFAULT_CONTEXT = 4096  # upper bound of the context that is reserved when none is asked for
FFN_KINDS = ("union", "dense")


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


class Llama(Speculative, llama_cpp.Llama):
    """llama_cpp.Llama with the router's choices, memory-bounded evaluation and working speculative decoding.

    Beyond the arguments of llama_cpp.Llama:
    drafter: proposes tokens that are verified in one batch (NGramDrafter, ModelDrafter, EagleDrafter); results carry
        ``out["speculation"]``. One that needs the model (EagleDrafter) is set later, with `set_up_speculation`.
    exact: greedy text with a drafter equals plain greedy text of the same mode, token for token.
    draft_model: a llama_cpp.llama_speculative.LlamaDraftModel, as llama_cpp.Llama takes it; used like a drafter.
    ffn: "union" (sparse op) or "dense" (every expert, stock ops).
    flash_attn: on, as llama.cpp itself chooses on CPUs; llama_cpp.Llama has it off, which is slower here.
    n_ctx: None takes the context the model was trained with, at most 4096; n_threads: None takes all physical cores.
    Errors: BlockffnError for a file that is missing, damaged or of an unknown architecture, and for a context that the
    model cannot have.
    """

    _evaluator: Evaluator | None = None

    def __init__(
        self,
        model_path: str | Path,
        *,
        drafter: Drafter | None = None,
        exact: bool = False,
        draft_model: Any = None,
        ffn: str = "union",
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        flash_attn: bool = True,
        kv_overrides: dict[str, bool | int | float | str] | None = None,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        self._lock = RLock()
        if ffn not in FFN_KINDS:
            raise BlockffnError(f"ffn: expected one of {', '.join(FFN_KINDS)}, found {ffn!r}")
        if drafter is not None and draft_model is not None:
            raise BlockffnError("drafter and draft_model: expected one of them, found both")
        overrides = dict(kv_overrides or {})
        if ffn == "dense":
            overrides[gguf_contract.key(gguf_contract.FFN_DENSE)] = True
        threads = n_threads or physical_cores()
        logs.install(verbose)
        context = _checked_context(model_path, n_ctx)
        with logs.collect() as lines:
            try:
                super().__init__(
                    str(model_path),
                    n_ctx=context,
                    n_threads=threads,
                    n_threads_batch=n_threads_batch or threads,
                    flash_attn=flash_attn,
                    kv_overrides=overrides or None,
                    verbose=verbose,
                    **kwargs,
                )
            except (ValueError, RuntimeError) as error:
                raise BlockffnError(f"{model_path}: {logs.reason(lines) or error}") from error
        if kwargs.get("tokenizer") is None:
            self.tokenizer_ = PieceTokenizer(self)
        self.ffn = ffn
        self.default_cache = kwargs.get("type_k") is None and kwargs.get("type_v") is None
        self.set_up_rows()
        self.set_up_speculation(drafter if draft_model is None else LlamaDraftModelDrafter(draft_model), exact)

    def close(self) -> None:
        """Free the model, its drafter and everything that was made from it; ``with`` does so at its end."""
        if not hasattr(self, "_stack"):  # the constructor refused its arguments
            return
        with self._lock:
            if self._evaluator is not None:
                self._evaluator.close()
                self._evaluator = None
            super().close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Return the arguments of the constructor, for pickle and copy; the copy loads the model and has no text yet.

        Drafters are copied too: a drafter serves one model.
        """
        state: dict[str, Any] = super().__getstate__()
        state |= {"logits_all": self.logits_all, "ffn": self.ffn, "exact": self.exact, "draft_model": None}
        state["drafter"] = copy.deepcopy(self.drafter)
        if self.default_cache:
            state |= {"type_k": None, "type_v": None}
        return state

    @property
    def n_moe_layers(self) -> int:
        """Number of layers with routed experts (0 for a dense twin or another architecture)."""
        return int(_capi.function("blockffn_n_moe_layers")(self.model))

    @property
    def n_experts(self) -> int:
        """Number of routed experts per layer."""
        return int(_capi.function("blockffn_n_experts")(self.model))

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits after every token, float32 [n_tokens, n_vocab]; the conversation is not touched."""
        with self._lock:
            return self._evaluation().logits(tokens)

    def hidden_states(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the hidden states float32 [n_tokens, n_embd], after the final norm."""
        with self._lock:
            return self._evaluation().hidden_states(tokens)

    def active_experts(self, tokens: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Return the router's choices, bool [n_moe_layers, n_tokens, n_experts]; the conversation is not touched."""
        with self._lock:
            return self._evaluation().active_experts(tokens)

    def union_stats(self, reset: bool = False) -> UnionStats:
        """Return the expert counters of the conversation since the last reset (see UnionStats)."""
        arrays = [np.zeros(self.n_moe_layers, np.int64) for _ in range(4)]
        pointers = [array.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)) for array in arrays]
        _capi.function("blockffn_stats")(self.ctx, *pointers)
        if reset:
            _capi.function("blockffn_stats_reset")(self.ctx)
        evaluations, n_tokens, active_pairs, union_size = arrays
        return UnionStats(evaluations, n_tokens, active_pairs, union_size, self.n_experts)

    def apply_adapters(self, ctx: Any) -> None:
        """Give another context of this model the LoRA adapter that the conversation has."""
        if self._lora_adapter is None:
            return
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._lora_adapter)  # type: ignore[misc]
        llama_cpp.llama_set_adapters_lora(ctx, adapters, 1, (ctypes.c_float * 1)(self.lora_scale))

    def _evaluation(self) -> Evaluator:
        self._running()
        if self._evaluator is None:
            self._evaluator = Evaluator(self)
        return self._evaluator


def _checked_context(model_path: str | Path, n_ctx: int | None) -> int:
    """Return the context length to reserve, after a look at the header of the file."""
    header = _capi.read_header(model_path)
    if header.architecture == gguf_contract.ARCH_EAGLE:
        raise BlockffnError(
            f"{model_path}: this is a draft head ({header.architecture}), not a model: load the model it was made for "
            f"and give it drafter=blockffn.EagleDrafter({str(model_path)!r}, llm)"
        )
    if n_ctx is None:
        return min(header.context_length or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if n_ctx < 0:
        raise BlockffnError(f"n_ctx: expected a number of tokens, or 0 for the trained context; found {n_ctx}")
    return n_ctx
