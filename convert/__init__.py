"""Checkpoints of BlockFFN, DECO, ReMoE and their dense twins -> GGUF.

>>> import blockffn.convert
>>> report = blockffn.convert.convert_checkpoint("examples/tiny-blockffn", "tiny.gguf", outtype="f16")
>>> config, tensors = blockffn.convert.load_canonical("examples/tiny-blockffn")
"""

from __future__ import annotations

from blockffn.convert.convert import ConvertReport, convert_checkpoint
from blockffn.convert.tensor_map import load_canonical

__all__ = ["ConvertReport", "convert_checkpoint", "load_canonical"]
