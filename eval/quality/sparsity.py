"""Token-level and chunk-level sparsity of a model on a text (BlockFFN arXiv 2507.08771, section 3.2).

    >>> import blockffn
    >>> llm = blockffn.Llama("model.gguf")                                # doctest: +SKIP
    >>> blockffn.eval.sparsity(llm, llm.tokenize(b"import os")).tls       # doctest: +SKIP
    0.81

TLS = 1 - mean share of experts that one token activates. CLS_c = 1 - mean share of experts that at least one of c
consecutive tokens activates, over disjoint chunks; an incomplete last chunk is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from blockffn.errors import BlockffnError

if TYPE_CHECKING:
    from blockffn.llama import Llama

CHUNKS = (2, 4, 8, 16, 32, 64)  # tokens per chunk, the sizes that both papers report


@dataclass(frozen=True)
class Sparsity:
    """What `sparsity` measured, per MoE layer (arrays of length n_moe_layers) and as means over the layers."""

    n_tokens: int
    n_experts: int
    layer_tls: npt.NDArray[np.float64]
    layer_cls: dict[int, npt.NDArray[np.float64]]  # chunk size -> per layer; sizes longer than the text are absent

    @property
    def tls(self) -> float:
        """Token-level sparsity, mean over layers."""
        return float(self.layer_tls.mean())

    @property
    def cls(self) -> dict[int, float]:
        """Chunk-level sparsity per chunk size, mean over layers."""
        return {size: float(layers.mean()) for size, layers in self.layer_cls.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain Python values, for JSON."""
        return {
            "n_tokens": self.n_tokens,
            "n_experts": self.n_experts,
            "tls": self.tls,
            "cls": {str(size): value for size, value in self.cls.items()},
            "layer_tls": self.layer_tls.tolist(),
            "layer_cls": {str(size): layers.tolist() for size, layers in self.layer_cls.items()},
        }


def sparsity(llm: Llama, tokens: Sequence[int], chunks: Sequence[int] = CHUNKS) -> Sparsity:
    """Measure the sparsity of `llm` on a text of `tokens`, as the router inside llama.cpp chose.

    Errors: BlockffnError for an empty text, and for a model without routed experts.
    """
    if len(tokens) == 0:
        raise BlockffnError("sparsity: expected a text of at least one token, found none")
    return of_activity(llm.active_experts(tokens), chunks)


def of_activity(active: npt.NDArray[np.bool_], chunks: Sequence[int] = CHUNKS) -> Sparsity:
    """Return the sparsity of choices bool [n_moe_layers, n_tokens, n_experts]."""
    n_layers, n_tokens, n_experts = active.shape
    layer_cls = {}
    for size in chunks:
        if size < 1:
            raise BlockffnError(f"chunk size: expected a positive number of tokens, found {size}")
        n_chunks = n_tokens // size
        if n_chunks:
            chunked = active[:, : n_chunks * size].reshape(n_layers, n_chunks, size, n_experts)
            layer_cls[size] = 1.0 - chunked.any(axis=2).mean(axis=(1, 2))
    return Sparsity(n_tokens, n_experts, 1.0 - active.mean(axis=(1, 2)), layer_cls)
