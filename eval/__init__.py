"""Evaluation: parity with the torch reference, perplexity, KL divergence, sparsity, benchmarks.

>>> import blockffn
>>> llm = blockffn.Llama("model.gguf")                          # doctest: +SKIP
>>> blockffn.eval.sparsity(llm, llm.tokenize(b"text")).tls      # doctest: +SKIP
0.81
"""

from __future__ import annotations

from blockffn.eval.quality.sparsity import Sparsity, sparsity

__all__ = ["Sparsity", "sparsity"]
