"""Many texts at once: `Engine` generates them in one batch over the sequences of one context.

    >>> import blockffn
    >>> with blockffn.Engine("model.gguf", n_parallel=8) as engine:          # doctest: +SKIP
    ...     for token in engine.submit("def add(a, b):", blockffn.GenerationParams(max_tokens=32)):
    ...         print(token.text, end="")

docs/python.md is the reference.
"""

from __future__ import annotations

from blockffn.engine.engine import Engine
from blockffn.engine.params import GenerationParams, Token
from blockffn.engine.stream import QueueFull, Stream

__all__ = ["Engine", "GenerationParams", "QueueFull", "Stream", "Token"]
