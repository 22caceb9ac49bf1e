"""`blockffn.replace_llama`: programs that construct llama_cpp.Llama themselves get ours.

    import blockffn
    blockffn.replace_llama(drafter="ngram", exact=True)     # before the program imports llama_cpp
    from llama_cpp.server.app import create_app             # or langchain_community, llama_index, ...

What the program passes to the constructor has precedence over what is given here.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from blockffn.llama import Llama

import llama_cpp  # isort: skip  # after blockffn.llama, which loads the patched library
import llama_cpp.llama

STOCK = llama_cpp.llama.Llama


class ReplacedLlama(Llama):
    """blockffn.Llama with arguments of the constructor that programs do not know of."""

    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, model_path: Any, **arguments: Any) -> None:
        given = copy.deepcopy(self.defaults)  # a drafter serves one model: every model gets its own
        if arguments.get("draft_model") is not None:
            given.pop("drafter", None)
        super().__init__(model_path, **(given | arguments))


def replace_llama(**defaults: Any) -> type[ReplacedLlama]:
    """Make `llama_cpp.Llama` ours, with these arguments of blockffn.Llama as defaults; returns the class.

    Call it before a program says ``from llama_cpp import Llama``: what was imported by name stays as it was.
    `restore_llama` undoes it. Models that exist already are not touched.
    """
    ReplacedLlama.defaults = defaults
    for module in (llama_cpp, llama_cpp.llama):
        vars(module)["Llama"] = ReplacedLlama
    return ReplacedLlama


def restore_llama() -> None:
    """Make `llama_cpp.Llama` the binding's own class again."""
    for module in (llama_cpp, llama_cpp.llama):
        vars(module)["Llama"] = STOCK
