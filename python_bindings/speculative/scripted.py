"""A drafter for experiments: it knows the true text and proposes it with a given probability.

With it the acceptance rate is a dial, so that speed and exactness can be measured at any rate.

    >>> import numpy as np
    >>> from blockffn.speculative import ScriptedDrafter
    >>> from blockffn.speculative.drafter import Context
    >>> drafter = ScriptedDrafter([1, 2, 3, 4, 5], probability=1.0, n_vocab=100)
    >>> drafter.propose(Context(np.array([1, 2], dtype=np.int32)), 2).tokens.tolist()
    [3, 4]

The cost of a real drafter is not hidden: `beside` names one that runs in full at every step, and whose tokens are then
replaced by the script's.
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


class ScriptedDrafter(Drafter):
    """Proposes the true continuation, each token right with `probability`, given that those before it were.

    `truth` is the whole text, prompt included. Once the verified text leaves it, the proposals are garbage.
    With `branch` > 1 it proposes trees: every node has up to `branch` children, one of them true with `probability`.
    `probability` may also be a sequence: how often the truth is the first guess, the second, ... (`guesses`); a tree
    then holds the nodes that are true most often, at most `depth` levels of them.
    `near`: wrong tokens are at most so many ids away from the true one (default: anywhere in the vocabulary).
    `beside`: a drafter that runs too, for its time; it bounds the size of the draft.
    """

    def __init__(
        self,
        truth: Sequence[int],
        probability: float | Sequence[float],
        n_vocab: int,
        seed: int = 0,
        branch: int = 1,
        max_nodes: int = 16,
        depth: int = 16,
        near: int | None = None,
        beside: Drafter | None = None,
    ) -> None:
        rates = list(probability) if isinstance(probability, Sequence) else [probability / branch] * branch
        span = n_vocab - 1 if near is None else near
        if not rates or min(rates) < 0.0 or sum(rates) > 1.0 + 1e-9 or not len(rates) <= span < n_vocab or depth < 1:
            raise ValueError(
                f"ScriptedDrafter: bad probability {probability}, branch {branch}, depth {depth}, near {near} or "
                f"n_vocab {n_vocab}"
            )
        self.truth = np.asarray(truth, dtype=np.int32)
        self.rates, self.n_vocab, self.depth, self._span = tuple(rates), n_vocab, depth, span
        self.can_tree, self.max_nodes = len(rates) > 1, max_nodes
        self.name, self.beside = "scripted", beside
        if beside is not None:
            self.name = f"scripted+{beside.name}"
            self.max_nodes, self.max_chain = beside.max_nodes, beside.max_chain
            self.wants_hidden, self.can_tree = beside.wants_hidden, self.can_tree and beside.can_tree
        self._random = np.random.default_rng(seed)
        self._draw = float(self._random.random())

    def aim(self, truth: Sequence[int], rates: Sequence[float]) -> None:
        """Take another text, and other rates of as many guesses."""
        if len(rates) != len(self.rates):
            raise ValueError(f"ScriptedDrafter: expected {len(self.rates)} rates, found {len(rates)}")
        self.truth, self.rates = np.asarray(truth, dtype=np.int32), tuple(rates)

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

    def _tokens(self, parents: Sequence[int], ranks: Sequence[int], known: int, rates: Sequence[float]) -> Tokens:
        """Return the tokens of a tree: the truth along the drawn path, something else everywhere off it."""
        n = len(parents)
        wanted = self._true(known, n)
        start = self._random.integers(0, self._span, n + 1)  # by parent; the last is the root's
        step = self._span // len(rates)  # keeps the children of one node apart
        depth = [0] * (n + 1)  # the last is the root's
        tokens = np.empty(n, dtype=np.int32)
        path, on_path = self._fate(rates, n), ROOT
        for node, (parent, rank) in enumerate(zip(parents, ranks, strict=True)):
            level = depth[parent]
            depth[node] = level + 1
            true = int(wanted[level])
            if parent == on_path and level < len(path) and rank == path[level]:
                tokens[node], on_path = true, node
            else:
                tokens[node] = (true + 1 + (start[parent] + rank * step) % self._span) % self.n_vocab
        return tokens

    def _fate(self, rates: Sequence[float], levels: int) -> list[int]:
        """Return which guess is the true one at level 1, 2, ... as far as any is; one even draw decides it all."""
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
