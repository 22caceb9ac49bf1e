"""Token-level and chunk-level sparsity of a model on a text (BlockFFN arXiv 2507.08771, section 3.2).

    >>> import blockffn
    >>> llm = blockffn.Llama("model.gguf")                                # doctest: +SKIP
    >>> blockffn.eval.sparsity(llm, llm.tokenize(b"import os")).tls       # doctest: +SKIP
    0.81

The figures themselves are those of blockffn.sparsity, which the trainer and `blockffn inspect --measure` share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockffn.errors import BlockffnError
from blockffn.sparsity import CHUNKS, Sparsity, of_activity

if TYPE_CHECKING:
    from blockffn.llama import Llama

__all__ = ["Sparsity", "sparsity"]


def sparsity(llm: Llama, tokens: Sequence[int], chunks: Sequence[int] = CHUNKS) -> Sparsity:
    """Measure the sparsity of `llm` on a text of `tokens`, as the router inside llama.cpp chose.

    Errors: BlockffnError for an empty text, and for a model without routed experts.
    """
    if len(tokens) == 0:
        raise BlockffnError("sparsity: expected a text of at least one token, found none")
    return of_activity(llm.active_experts(tokens), chunks)
