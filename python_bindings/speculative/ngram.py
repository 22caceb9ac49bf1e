"""Drafts by looking up what followed the last tokens earlier in the text.

An index maps each n-gram to the positions after which it was seen; it grows by one entry per length for each verified
token, so that a step costs the same after ten tokens and after ten thousand.

    >>> import numpy as np
    >>> from blockffn.speculative import NGramDrafter
    >>> from blockffn.speculative.drafter import Context
    >>> text = np.array([5, 6, 7, 8, 9, 5, 6], dtype=np.int32)
    >>> NGramDrafter().propose(Context(text), 3).tokens.tolist()
    [7, 8, 9]
"""

from __future__ import annotations

from typing import Any

import numpy as np

from blockffn.speculative.draft import EMPTY, Draft, Tokens
from blockffn.speculative.drafter import Context, Drafter

REMEMBERED = 4  # positions kept for each n-gram, the latest first


class NGramDrafter(Drafter):
    """Proposes the continuation of the latest earlier occurrence of the longest matching n-gram.

    `sizes` are the lengths of n-grams, tried from the longest; `max_nodes` bounds the draft. With `tree` it may propose
    trees that merge the continuations of the last few occurrences.
    """

    name = "ngram"

    def __init__(self, sizes: tuple[int, ...] = (4, 3, 2), max_nodes: int = 16, tree: bool = False) -> None:
        if not sizes or min(sizes) < 1 or max_nodes < 1:
            raise ValueError(f"NGramDrafter: expected sizes >= 1 and max_nodes >= 1, found {sizes}, {max_nodes}")
        self.sizes = tuple(sorted(set(sizes), reverse=True))
        self.max_nodes, self.can_tree = max_nodes, tree
        self.reset()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.sizes, self.max_nodes, self.can_tree)

    def reset(self) -> None:
        """Forget the text."""
        self._text: Tokens = np.empty(0, dtype=np.int32)  # [n_indexed], the part of the text that the index covers
        self._index: list[dict[bytes, tuple[int, ...]]] = [{} for _ in self.sizes]

    def begin(self, tokens: Tokens) -> None:
        """Keep the index where `tokens` continues the indexed text; build it anew otherwise."""
        known = len(self._text)
        if len(tokens) < known or not np.array_equal(tokens[:known], self._text):
            self.reset()
        self._extend(tokens)

    def propose(self, context: Context, n: int) -> Draft:
        """Return up to `n` tokens: a chain, or a tree when the context allows it and the occurrences disagree."""
        tokens = context.tokens
        self._extend(tokens)
        starts = self._lookup(tokens)
        if not starts or n < 1:
            return EMPTY
        if context.tree and len(starts) > 1:
            return self._merge(tokens, starts, n)
        return Draft.chain(self._continuation(tokens, starts[0], n), self.name)

    def _extend(self, tokens: Tokens) -> None:
        """Index the positions of `tokens` that are not indexed yet."""
        known = len(self._text)
        if len(tokens) == known:
            return
        first = max(0, known - self.sizes[0])
        raw = tokens[first:].tobytes()
        for size, table in zip(self.sizes, self._index, strict=True):
            for position in range(max(known, size), len(tokens)):
                key = raw[4 * (position - size - first) : 4 * (position - first)]  # the tokens before `position`
                table[key] = (position, *table.get(key, ())[: REMEMBERED - 1])
        self._text = tokens

    def _lookup(self, tokens: Tokens) -> tuple[int, ...]:
        """Return the positions that followed the longest known n-gram at the end of `tokens`, the latest first."""
        for size, table in zip(self.sizes, self._index, strict=True):
            if len(tokens) >= size and (found := table.get(tokens[len(tokens) - size :].tobytes())):
                return found
        return ()

    @staticmethod
    def _continuation(tokens: Tokens, start: int, n: int) -> Tokens:
        """Return `n` tokens from `start`; where the text ends, it is continued with the period just found."""
        found = tokens[start : start + n]
        return found if len(found) == n else np.resize(tokens[start:], n)

    def _merge(self, tokens: Tokens, starts: tuple[int, ...], n: int) -> Draft:
        """Merge the continuations from `starts` into one tree of at most `n` nodes; the latest gets the most nodes."""
        nodes: dict[tuple[int, int], int] = {}
        share = max(1, n // 2)
        for rank, start in enumerate(starts):
            wanted = share if rank == 0 else max(1, (n - len(nodes)) // 2)
            parent = -1
            for token in self._continuation(tokens, start, wanted).tolist():
                if (parent, token) not in nodes and len(nodes) == n:
                    break
                parent = nodes.setdefault((parent, token), len(nodes))
        if not nodes:
            return EMPTY
        parents, children = zip(*nodes, strict=True)
        return Draft.tree(children, parents, self.name)
