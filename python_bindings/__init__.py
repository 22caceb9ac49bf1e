"""BlockFFN and DECO models (sparse ReLU-routed mixture-of-experts) in llama.cpp, from Python.

    >>> import blockffn                            # before llama_cpp: it points the binding at the patched library
    >>> blockffn.NGramDrafter.__name__             # every name below is imported when it is first used
    'NGramDrafter'

Importing this package is cheap: no torch, no numpy, no native library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from blockffn import extras, library
from blockffn.errors import BlockffnError

if TYPE_CHECKING:
    from blockffn import convert, eval, training
    from blockffn.engine import Engine, GenerationParams, QueueFull, Stream, Token
    from blockffn.llama import Llama, UnionStats
    from blockffn.replacement import replace_llama, restore_llama
    from blockffn.speculative import EagleDrafter, ModelDrafter, NGramDrafter

__version__ = "0.1.0"
__all__ = [
    "BlockffnError",
    "EagleDrafter",
    "Engine",
    "GenerationParams",
    "Llama",
    "ModelDrafter",
    "NGramDrafter",
    "QueueFull",
    "Stream",
    "Token",
    "UnionStats",
    "convert",
    "eval",
    "replace_llama",
    "restore_llama",
    "training",
]

_NAMES = {
    "Llama": "blockffn.llama",
    "UnionStats": "blockffn.llama",
    "EagleDrafter": "blockffn.speculative",
    "ModelDrafter": "blockffn.speculative",
    "NGramDrafter": "blockffn.speculative",
    "Engine": "blockffn.engine",
    "GenerationParams": "blockffn.engine",
    "QueueFull": "blockffn.engine",
    "Stream": "blockffn.engine",
    "Token": "blockffn.engine",
    "replace_llama": "blockffn.replacement",
    "restore_llama": "blockffn.replacement",
}
_MODULES = ("convert", "eval", "training")

library.prepare()


def __getattr__(name: str) -> Any:
    """Import a public name or subpackage on first use (PEP 562)."""
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        try:
            return importlib.import_module(f"blockffn.{name}")
        except ModuleNotFoundError as error:
            if (cause := extras.missing(error)) is not None:
                raise cause from error
            raise
    raise AttributeError(f"module 'blockffn' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
