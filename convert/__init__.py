"""Checkpoints of BlockFFN, DECO, ReMoE and their dense twins -> GGUF.

>>> from blockffn.convert import load_canonical
>>> config, tensors = load_canonical("examples/tiny-blockffn")
"""

from __future__ import annotations

from blockffn.convert.tensor_map import load_canonical

__all__ = ["load_canonical"]
