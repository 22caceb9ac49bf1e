"""Texts that begin alike are evaluated as one tree: every shared prefix once, the branches side by side.

    >>> [pack] = packs([(1, 2, 3), (1, 2, 4), (1, 5)], max_leaves=8, max_nodes=100)
    >>> pack.tokens.tolist(), pack.depths.tolist()
    ([1, 2, 3, 4, 5], [0, 1, 2, 2, 1])
    >>> pack.first.tolist(), pack.last.tolist()         # the leaves below each node
    ([0, 0, 0, 1, 2], [2, 1, 0, 1, 2])

The texts are sorted, so the leaves below a node are neighbours, and two packs that follow one another have the longest
prefix in common that any order would give them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Text = tuple[int, ...]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Pack:
    """The tree of some texts. A node stands after its ancestors, a leaf is one text."""

    texts: tuple[Text, ...]  # distinct, sorted; none is the beginning of another one
    tokens: Ints  # [nodes]
    depths: Ints  # [nodes], the position of the token
    first: Ints  # [nodes], the first leaf below the node
    last: Ints  # [nodes], the last leaf below it
    start: Ints  # [leaves], the first node that belongs to no leaf before
    shared: Ints  # [leaves], how many tokens a leaf shares with the one before

    def path(self, leaf: int) -> Ints:
        """Return the nodes of a leaf, int32 [tokens of its text]."""
        found = np.empty(len(self.texts[leaf]), np.int32)
        end = len(found)
        while end:
            begin = int(self.shared[leaf])
            if begin < end:
                found[begin:end] = self.start[leaf] + np.arange(end - begin, dtype=np.int32)
                end = begin
            leaf -= 1
        return found


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two texts begin with in common.

    >>> common((1, 2, 3), (1, 2, 4, 5))
    2
    """
    length = min(len(a), len(b))
    differs = np.flatnonzero(np.asarray(a[:length]) != np.asarray(b[:length]))
    return int(differs[0]) if len(differs) else length


def packs(texts: Sequence[Text], max_leaves: int, max_nodes: int) -> Iterator[Pack]:
    """Yield packs of sorted, distinct texts: up to `max_leaves` of them and `max_nodes` nodes, at least one text."""
    chosen: list[Text] = []
    shared: list[int] = []
    nodes = 0
    for text in leaves(texts):
        equal = common(chosen[-1], text) if chosen else 0
        new = len(text) - equal
        if chosen and (len(chosen) == max_leaves or nodes + new > max_nodes):
            yield _pack(chosen, shared)
            chosen, shared, nodes, equal, new = [], [], 0, 0, len(text)
        chosen.append(text)
        shared.append(equal)
        nodes += new
    if chosen:
        yield _pack(chosen, shared)


def leaves(texts: Sequence[Text]) -> list[Text]:
    """Return the sorted texts without those that another one begins with.

    >>> leaves([(1, 2), (3,), (1,), (1, 2)])
    [(1, 2), (3,)]
    """
    ordered = sorted(set(texts))
    return [a for a, b in zip(ordered, [*ordered[1:], ()], strict=True) if b[: len(a)] != a]


def _pack(texts: list[Text], shared: list[int]) -> Pack:
    counts = [len(text) - equal for text, equal in zip(texts, shared, strict=True)]
    start = np.cumsum([0, *counts[:-1]], dtype=np.int32)
    tokens = np.concatenate([np.asarray(text[equal:], np.int32) for text, equal in zip(texts, shared, strict=True)])
    depths = np.concatenate([np.arange(e, len(t), dtype=np.int32) for t, e in zip(texts, shared, strict=True)])
    first = np.repeat(np.arange(len(texts), dtype=np.int32), counts)
    last = first.copy()
    for leaf, count in enumerate(counts):
        # A later leaf is below a node as long as every leaf up to it shares more tokens than the node is deep.
        depth = shared[leaf]
        reach = len(texts[leaf])
        for later in range(leaf + 1, len(texts)):
            reach = min(reach, shared[later])
            if reach <= depth:
                break
            last[start[leaf] : start[leaf] + min(count, reach - depth)] = later
    return Pack(tuple(texts), tokens, depths, first, last, start, np.asarray(shared, np.int32))
