"""Speculative decoding: drafters guess the next tokens, the target verifies them in one batch.

    >>> from blockffn.speculative import NGramDrafter
    >>> NGramDrafter().name
    'ngram'

The text is the target's own whatever the drafter proposes: tokens are sampled from the target's logits and drafted
tokens are accepted while they are equal. docs/speculative.md is the guide.
"""

from __future__ import annotations

from blockffn.speculative.combination import Combination
from blockffn.speculative.draft import Draft
from blockffn.speculative.drafter import Context, Drafter, open_drafter
from blockffn.speculative.eagle import EagleDrafter
from blockffn.speculative.model import ModelDrafter
from blockffn.speculative.ngram import NGramDrafter
from blockffn.speculative.policy import Plan
from blockffn.speculative.scripted import ScriptedDrafter
from blockffn.speculative.tree import TreeShape

__all__ = [
    "Combination",
    "Context",
    "Draft",
    "Drafter",
    "EagleDrafter",
    "ModelDrafter",
    "NGramDrafter",
    "Plan",
    "ScriptedDrafter",
    "TreeShape",
    "open_drafter",
]
