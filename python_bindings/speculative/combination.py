"""Several drafters in order of cost: the first that has a proposal is asked.

    >>> from blockffn.speculative import Combination, NGramDrafter
    >>> Combination([NGramDrafter(sizes=(4, 3)), NGramDrafter(sizes=(2,))]).name
    'ngram+ngram'

The usual pair is `Combination([NGramDrafter(sizes=(4, 3)), ModelDrafter("draft.gguf")])`: look the text up where it
repeats itself, run the draft model where it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from blockffn.speculative.draft import EMPTY, Draft, Tokens
from blockffn.speculative.drafter import Context, Drafter


class Combination(Drafter):
    """Asks its drafters in turn and takes the first proposal that is not empty."""

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        if not drafters:
            raise ValueError("Combination: expected at least one drafter")
        self.drafters = list(drafters)
        self.name = "+".join(drafter.name for drafter in self.drafters)
        self.can_tree = any(drafter.can_tree for drafter in self.drafters)
        self.max_chain = max(drafter.max_chain for drafter in self.drafters)
        self.max_nodes = max(drafter.max_nodes for drafter in self.drafters)
        self.wants_hidden = any(drafter.wants_hidden for drafter in self.drafters)
        self._asked: Drafter | None = None

    def attach(self, llm: Any) -> None:
        """Pass on to every drafter."""
        for drafter in self.drafters:
            drafter.attach(llm)

    def reset(self) -> None:
        """Pass on to every drafter."""
        for drafter in self.drafters:
            drafter.reset()

    def begin(self, tokens: Tokens) -> None:
        """Pass on to every drafter."""
        for drafter in self.drafters:
            drafter.begin(tokens)

    def propose(self, context: Context, n: int) -> Draft:
        """Return the first draft that is not empty."""
        for drafter in self.drafters:
            draft = drafter.propose(context, min(n, drafter.max_nodes))
            if len(draft):
                self._asked = drafter
                return draft
        self._asked = None
        return EMPTY

    def observe(self, proposed: int, accepted: int) -> None:
        """Tell the drafter whose draft was verified."""
        if self._asked is not None:
            self._asked.observe(proposed, accepted)

    def known_states(self) -> int:
        """Return the least of what the drafters know."""
        return min(drafter.known_states() for drafter in self.drafters if drafter.wants_hidden)

    def hidden(self, text: Tokens, first: int, states: npt.NDArray[np.float32]) -> None:
        """Pass on to the drafters that want hidden states."""
        for drafter in self.drafters:
            if drafter.wants_hidden:
                drafter.hidden(text, first, states)

    def fork(self) -> Combination:
        """Return a combination of forks."""
        return Combination([drafter.fork() for drafter in self.drafters])

    def close_context(self) -> None:
        """Pass on to every drafter."""
        for drafter in self.drafters:
            drafter.close_context()

    def close(self) -> None:
        """Close every drafter."""
        for drafter in self.drafters:
            drafter.close()
