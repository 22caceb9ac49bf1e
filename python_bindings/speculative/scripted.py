"""A drafter for experiments: it knows the true text and proposes it with a given probability.

With it the acceptance rate is a dial, so that speed and exactness can be measured at any rate.

    >>> import numpy as np
    >>> from blockffn.speculative import ScriptedDrafter
    >>> from blockffn.speculative.drafter import Context
    >>> drafter = ScriptedDrafter([1, 2, 3, 4, 5], probability=1.0, n_vocab=100)
    >>> drafter.propose(Context(np.array([1, 2], dtype=np.int32)), 2).tokens.tolist()
    [3, 4]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blockffn.speculative.draft import ROOT, Draft
from blockffn.speculative.drafter import Context, Drafter


class ScriptedDrafter(Drafter):
    """Proposes the true continuation, each token right with `probability`, given that those before it were.

    `truth` is the whole text, prompt included. Once the verified text leaves it, the proposals are garbage.
    With `branch` > 1 it proposes trees: every node has `branch` children, one of them true with `probability`.
    """

    name = "scripted"

    def __init__(
        self,
        truth: Sequence[int],
        probability: float,
        n_vocab: int,
        seed: int = 0,
        branch: int = 1,
        max_nodes: int = 16,
    ) -> None:
        if not 0.0 <= probability <= 1.0 or branch < 1 or n_vocab < branch + 1:
            raise ValueError(f"ScriptedDrafter: bad probability {probability}, branch {branch} or n_vocab {n_vocab}")
        self.truth = np.asarray(truth, dtype=np.int32)
        self.probability, self.n_vocab, self.branch, self.max_nodes = probability, n_vocab, branch, max_nodes
        self.can_tree = branch > 1
        self._random = np.random.default_rng(seed)

    def propose(self, context: Context, n: int) -> Draft:
        """Return a chain of `n` tokens, or a tree of `n` nodes when the context allows it."""
        known = len(context.tokens)
        if context.tree and self.branch > 1:
            return self._tree(known, n)
        wanted = self._true(known, n)
        wrong = (wanted + 1 + self._random.integers(0, self.n_vocab - 1, n)) % self.n_vocab
        return Draft.chain(np.where(self._random.random(n) < self.probability, wanted, wrong), self.name)

    def _true(self, start: int, n: int) -> np.ndarray:
        found = self.truth[start : start + n]
        return np.concatenate([found, self._random.integers(0, self.n_vocab, n - len(found))])

    def _tree(self, known: int, n: int) -> Draft:
        """Grow level by level; the children of a true node hold the true token with `probability`."""
        wanted = self._true(known, n).tolist()
        tokens: list[int] = []
        parents: list[int] = []
        level, depth, on_path = [ROOT], 0, ROOT
        while len(tokens) < n:
            following: list[int] = []
            true_child = None
            for parent in level:
                right = parent == on_path and self._random.random() < self.probability
                for token in self._children(wanted[depth], right)[: n - len(tokens)]:
                    following.append(len(tokens))
                    true_child = len(tokens) if right and token == wanted[depth] else true_child
                    tokens.append(token)
                    parents.append(parent)
            # The first nodes of a level are expanded; the true one is among them wherever there is one.
            level = [true_child, *following[:1]] if true_child not in (None, following[0]) else following[:2]
            on_path, depth = (len(tokens) if true_child is None else true_child), depth + 1
        return Draft.tree(tokens, parents, self.name)

    def _children(self, true: int, right: bool) -> list[int]:
        others = (true + 1 + self._random.permutation(min(self.n_vocab - 1, 4 * self.branch))) % self.n_vocab
        children = others[: self.branch].tolist()
        if right:
            children[int(self._random.integers(self.branch))] = true
        return children
