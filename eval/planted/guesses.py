"""A drafter for experiments whose luck is drawn beforehand: every candidate of a comparison meets the same one.

    >>> import numpy as np
    >>> from blockffn.eval.planted.guesses import GuessingDrafter
    >>> from blockffn.speculative.drafter import Context
    >>> drafter = GuessingDrafter([4, 5, 6, 7], acceptance=1.0, n_vocab=100)
    >>> drafter.propose(Context(np.array([4], dtype=np.int32)), 2).tokens.tolist()
    [5, 6]
    >>> round(GuessingDrafter([4, 5, 6], acceptance=0.5, n_vocab=100).expected(2, tree=False), 2)
    1.75

It holds a ranked list of guesses for every token of a known text. The first guess is right with probability p; where it
is wrong, the second is right with probability p/2, the third with p/4, and so on. A chain holds first guesses; a tree
of n nodes holds the n likeliest paths, as EAGLE-2's trees do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from blockffn.speculative.draft import EMPTY, ROOT, Draft
from blockffn.speculative.drafter import Context, Drafter
from blockffn.speculative.scripted import best_tree

RANKS = 10  # guesses per token


class GuessingDrafter(Drafter):
    """Guesses the tokens of `truth` (prompt included) as the module's docstring says."""

    name = "guesses"
    can_tree = True
    max_nodes = 31
    max_chain = 16

    def __init__(self, truth: Sequence[int], acceptance: float, n_vocab: int, seed: int = 0) -> None:
        if not 0.0 <= acceptance <= 1.0 or n_vocab < 2 * RANKS:
            raise ValueError(f"GuessingDrafter: bad acceptance {acceptance} or n_vocab {n_vocab}")
        random = np.random.default_rng(seed)
        first, any_later = random.random((2, len(truth)))  # the same draw for every acceptance
        later = np.where(any_later < acceptance, random.geometric(0.5, len(truth)), RANKS)
        self.chances = np.array([acceptance, *((1 - acceptance) * acceptance * 0.5 ** np.arange(1, RANKS))])
        self.right: list[int] = np.where(first < acceptance, 0, later).tolist()  # [text] which guess is right
        wrong = random.integers(1, n_vocab - RANKS, (len(truth), 1)) + np.arange(RANKS)
        self._wrong = ((np.asarray(truth)[:, None] + wrong) % n_vocab).astype(np.int32)  # [text, ranks]
        self._truth = np.asarray(truth, dtype=np.int32)
        self._shapes: dict[int, tuple[list[int], list[int], list[int]]] = {}

    def propose(self, context: Context, n: int) -> Draft:
        """Return a chain of `n` first guesses, or the tree of the `n` likeliest paths when the context allows it."""
        at = len(context.tokens)
        n = min(n, len(self._truth) - at)
        if n < 1:
            return EMPTY
        if not context.tree:
            wrong, right = self._wrong[at : at + n, 0], self.right[at : at + n]
            return Draft.chain(np.where(np.array(right) == 0, self._truth[at : at + n], wrong), self.name)
        return self._tree(at, n)

    def _tree(self, at: int, n: int) -> Draft:
        parents, ranks, depths = self.shape(n)
        tokens: npt.NDArray[np.int32] = self._wrong[[at + depth for depth in depths], ranks]
        on_path = ROOT
        for node, (parent, rank, depth) in enumerate(zip(parents, ranks, depths, strict=True)):
            if parent == on_path and self.right[at + depth] == rank:
                tokens[node], on_path = self._truth[at + depth], node
        return Draft(tokens, np.array(parents, dtype=np.int32), parents == list(range(-1, n - 1)), self.name)

    def shape(self, n: int) -> tuple[list[int], list[int], list[int]]:
        """Return parent, rank among siblings and depth (from 0) of each of the `n` likeliest nodes, parents first."""
        if n not in self._shapes:
            parents, ranks = best_tree(tuple(self.chances.tolist()), n, depth=n)
            depths: list[int] = []
            for parent in parents:
                depths.append(0 if parent == ROOT else depths[parent] + 1)
            self._shapes[n] = parents, ranks, depths
        return self._shapes[n]

    def expected(self, n: int, tree: bool) -> float:
        """Return the mean number of tokens that a step with a draft of `n` nodes gives."""
        if not tree:
            return float((self.chances[0] ** np.arange(n + 1)).sum())
        chance: list[float] = []
        for parent, rank, _ in zip(*self.shape(n), strict=True):
            chance.append(float(self.chances[rank]) * (1.0 if parent == ROOT else chance[parent]))
        return 1.0 + sum(chance)
