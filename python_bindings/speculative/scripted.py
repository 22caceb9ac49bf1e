"""A drafter of known acceptance: it knows the true text and proposes it with a given probability.

With it the acceptance rate is a dial, so that speed and exactness can be measured at any rate.

    >>> import numpy as np
    >>> from blockffn.speculative import ScriptedDrafter
    >>> from blockffn.speculative.drafter import Context
    >>> drafter = ScriptedDrafter([1, 2, 3, 4, 5], probability=1.0, n_vocab=100)
    >>> drafter.propose(Context(np.array([1, 2], dtype=np.int32)), 2).tokens.tolist()
    [3, 4]
    >>> round(ScriptedDrafter([1, 2, 3], probability=0.5, n_vocab=100).expected(2, tree=False), 2)
    1.75

One law holds everywhere (`guesses`): the first guess is right with probability p, given that the tokens before it were
right; where it is wrong the second is right with probability p/2, where both are the third with p/3, and so on. A chain
holds first guesses, a tree the nodes that are right most often. The cost of a real drafter is not hidden: `beside`
names one that runs in full at every step, and whose tokens are then replaced by the script's.
"""

from __future__ import annotations

import bisect
import functools
import heapq
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from blockffn.speculative.draft import EMPTY, ROOT, Draft, Tokens
from blockffn.speculative.drafter import Context, Drafter

GOLDEN = 0.6180339887498949  # multiples of it fill 0..1 evenly, however few they are
CHILDREN = 4  # guesses per place that the experiments with trees use


class ScriptedDrafter(Drafter):
    """Proposes the true continuation, each token right with `probability`, given that those before it were.

    `truth` is the whole text, prompt included. Once the verified text leaves it, the proposals are wrong.
    `branch`: guesses per place; with more than one it proposes trees, of at most `depth` levels.
    `by_place`: what is right is drawn beforehand for every place of the text, so that drafters of one seed are right in
        the same places, a better one wherever a worse one is. Otherwise each draft has a draw of its own, and the draws
        are spread evenly, so that the mean of a few drafts is near the true mean.
    `near`: wrong tokens are at most so many ids away from the true one (default: anywhere in the vocabulary).
    `beside`: a drafter that runs too, for its time; it bounds the size of the draft.
    """

    def __init__(
        self,
        truth: Sequence[int],
        probability: float,
        n_vocab: int,
        seed: int = 0,
        branch: int = 1,
        max_nodes: int = 16,
        depth: int = 16,
        near: int | None = None,
        beside: Drafter | None = None,
        by_place: bool = False,
    ) -> None:
        span = n_vocab - 1 if near is None else near
        if not 0.0 <= probability <= 1.0 or branch < 1 or not branch <= span < n_vocab or depth < 1:
            raise ValueError(
                f"ScriptedDrafter: bad probability {probability}, branch {branch}, depth {depth}, near {near} or "
                f"n_vocab {n_vocab}"
            )
        self.n_vocab, self.branch, self.depth, self.by_place, self.seed = n_vocab, branch, depth, by_place, seed
        self._span = span
        self.can_tree, self.max_nodes = branch > 1, max_nodes
        self.name, self.beside = "scripted", beside
        if beside is not None:
            self.name = f"scripted+{beside.name}"
            self.max_nodes, self.max_chain = beside.max_nodes, beside.max_chain
            self.wants_hidden, self.can_tree = beside.wants_hidden, self.can_tree and beside.can_tree
        self._random = np.random.default_rng(seed)
        self._draw = float(self._random.random())
        self.aim(truth, probability)

    def aim(self, truth: Sequence[int], probability: float) -> None:
        """Take another text and another probability."""
        self.truth, self.rates = np.asarray(truth, dtype=np.int32), tuple(guesses(probability, self.branch))
        edges = np.cumsum(self.rates)
        draws = np.random.default_rng(self.seed).random(len(self.truth) if self.by_place else 0)
        self.right: list[int] = np.searchsorted(edges, draws, side="right").tolist()  # [text] guess; `branch`: none

    def propose(self, context: Context, n: int) -> Draft:
        """Return a chain of `n` tokens, or a tree of `n` nodes when the context allows it."""
        if self.beside is not None:
            n = min(n, len(self.beside.propose(context, n)))
        if n < 1:
            return EMPTY
        tree = context.tree and self.can_tree
        parents, ranks = best_tree(self.rates, n, self.depth) if tree else _chain(n)
        tokens = self._tokens(parents, ranks, len(context.tokens), self.rates if tree else self.rates[:1])
        return Draft.tree(tokens, parents, self.name) if tree else Draft.chain(tokens, self.name)

    def shape(self, n: int) -> tuple[list[int], list[int], list[int]]:
        """Return parent, rank among siblings and depth (from 0) of every node of a tree of `n`, parents first."""
        parents, ranks = best_tree(self.rates, n, self.depth)
        depths: list[int] = []
        for parent in parents:
            depths.append(0 if parent == ROOT else depths[parent] + 1)
        return parents, ranks, depths

    def expected(self, n: int, tree: bool) -> float:
        """Return the mean number of tokens that a step with a draft of `n` nodes gives, the sampled one included."""
        parents, ranks = best_tree(self.rates, n, self.depth) if tree else _chain(n)
        chance: list[float] = []
        for parent, rank in zip(parents, ranks, strict=True):
            chance.append(self.rates[rank] * (1.0 if parent == ROOT else chance[parent]))
        return 1.0 + sum(chance)

    def _tokens(self, parents: Sequence[int], ranks: Sequence[int], known: int, rates: Sequence[float]) -> Tokens:
        """Return the tokens of a tree: the truth along the drawn path, something else everywhere off it."""
        n = len(parents)
        wanted = self._true(known, n)
        start = self._random.integers(0, self._span, n + 1)  # by parent; the last is the root's
        step = self._span // len(rates)  # keeps the children of one node apart
        depth = [0] * (n + 1)  # the last is the root's
        tokens = np.empty(n, dtype=np.int32)
        path, on_path = self.right[known : known + n] if self.by_place else self._even_draw(rates, n), ROOT
        for node, (parent, rank) in enumerate(zip(parents, ranks, strict=True)):
            level = depth[parent]
            depth[node] = level + 1
            true = int(wanted[level])
            if parent == on_path and level < len(path) and rank == path[level]:
                tokens[node], on_path = true, node
            else:
                tokens[node] = (true + 1 + (start[parent] + rank * step) % self._span) % self.n_vocab
        return tokens

    def _even_draw(self, rates: Sequence[float], levels: int) -> list[int]:
        """Return which guess is the true one at level 1, 2, ... as far as any is; one even draw decides them all."""
        edges = list(itertools.accumulate(rates))
        self._draw = draw = (self._draw + GOLDEN) % 1.0
        path: list[int] = []
        while len(path) < levels and draw < edges[-1]:
            rank = bisect.bisect_right(edges, draw)
            draw = max(0.0, draw - edges[rank] + rates[rank]) / rates[rank]  # uniform again, given this rank
            path.append(rank)
        return path

    def _true(self, start: int, n: int) -> Tokens:
        found = self.truth[start : start + n]
        return np.concatenate([found, self._random.integers(0, self.n_vocab, n - len(found), dtype=np.int32)])

    def attach(self, llm: Any) -> None:
        """Pass on to the drafter beside."""
        if self.beside is not None:
            self.beside.attach(llm)

    def reset(self) -> None:
        """Pass on to the drafter beside."""
        if self.beside is not None:
            self.beside.reset()

    def begin(self, tokens: Tokens) -> None:
        """Pass on to the drafter beside."""
        if self.beside is not None:
            self.beside.begin(tokens)

    def observe(self, proposed: int, accepted: int) -> None:
        """Pass on to the drafter beside."""
        if self.beside is not None:
            self.beside.observe(proposed, accepted)

    def hidden(self, text: Tokens, first: int, states: npt.NDArray[np.float32]) -> None:
        """Pass on to the drafter beside."""
        if self.beside is not None:
            self.beside.hidden(text, first, states)

    def known_states(self) -> int:
        """Return what the drafter beside knows."""
        return 0 if self.beside is None else self.beside.known_states()

    def close(self) -> None:
        """Close the drafter beside."""
        if self.beside is not None:
            self.beside.close()


def guesses(probability: float, n: int) -> list[float]:
    """Return how often the truth is the first, second, ... n-th guess of a drafter whose first is right so often.

    The r-th guess is right with probability / r, given that those before it were wrong: a rule of thumb that
    docs/benchmarks.md compares with trained heads.

    >>> [round(rate, 3) for rate in guesses(0.6, 3)]
    [0.6, 0.12, 0.056]
    """
    rates, left = [], 1.0
    for rank in range(1, n + 1):
        rates.append(left * probability / rank)
        left -= rates[-1]
    return rates


@functools.lru_cache(maxsize=256)
def best_tree(rates: tuple[float, ...], n: int, depth: int) -> tuple[list[int], list[int]]:
    """Return parents and ranks of the tree of at most `n` nodes that holds most true tokens, on average.

    rates: how often the truth is the first, second, ... child of a true node. A parent stands before its children.

    >>> best_tree((0.6, 0.2), 4, 3)
    ([-1, 0, 1, -1], [0, 0, 0, 1])
    """
    parents: list[int] = []
    ranks: list[int] = []
    waiting = [(-rate, ROOT, rank, 1) for rank, rate in enumerate(rates)]  # how often true, parent, rank, level
    heapq.heapify(waiting)
    while waiting and len(parents) < n:
        worth, parent, rank, level = heapq.heappop(waiting)
        node = len(parents)
        parents.append(parent)
        ranks.append(rank)
        if level < depth:
            for following, rate in enumerate(rates):
                heapq.heappush(waiting, (worth * rate, node, following, level + 1))
    return parents, ranks


def _chain(n: int) -> tuple[range, list[int]]:
    return range(-1, n - 1), [0] * n
