"""What is asked of a drafter (`Plan`), what it proposes (`Draft`), and what became of it (`Step`).

A draft is a chain or a tree of tokens that may follow the verified text:

    >>> from blockffn.speculative.draft import Draft
    >>> chain = Draft.chain([7, 8, 9])
    >>> len(chain), chain.is_chain, chain.depth().tolist()
    (3, True, [1, 2, 3])
    >>> tree = Draft.tree([7, 4, 8], [-1, -1, 0])      # 7 and 4 may follow the text, 8 may follow 7
    >>> tree.is_chain, tree.depth().tolist()
    (False, [1, 1, 2])

Parent -1 is the root: the last verified token, which is always evaluated together with the draft. A step is one
evaluation of the target: the loop fills the record from the plan to the accepted path and closes it once; then the
policy and the statistics learn from it, and from nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
ROOT = -1


@dataclass(frozen=True)
class Plan:
    """What to draft in a step: so many nodes, as a chain or as a tree."""

    nodes: int = 0
    tree: bool = False


PLAIN = Plan()


@dataclass(frozen=True)
class Draft:
    """Proposed tokens; a parent stands before its children, so that every prefix of the arrays is a draft too."""

    tokens: Tokens  # int32 [n]
    parents: npt.NDArray[np.int32]  # int32 [n], index of the parent node or ROOT
    is_chain: bool
    source: str = field(default="", compare=False)  # name of the drafter, for the statistics

    def __post_init__(self) -> None:
        """Check the order of the nodes, which positions and sequences follow from. ValueError when it is wrong."""
        n, above = len(self.tokens), self.parents
        if len(above) != n or (not self.is_chain and bool((above >= np.arange(n)).any() or (above < ROOT).any())):
            raise ValueError(f"draft tree: a parent must stand before its children, found parents {above.tolist()}")

    @staticmethod
    def chain(tokens: Sequence[int] | Tokens, source: str = "") -> Draft:
        """Return a draft in which every token follows the one before it."""
        array = np.asarray(tokens, dtype=np.int32)
        return Draft(array, np.arange(-1, len(array) - 1, dtype=np.int32), True, source)

    @staticmethod
    def tree(tokens: Sequence[int] | Tokens, parents: Sequence[int] | npt.NDArray[np.int32], source: str = "") -> Draft:
        """Return a tree. Raises ValueError when a node stands before its parent or repeats a sibling's token."""
        array, above = np.asarray(tokens, dtype=np.int32), np.asarray(parents, dtype=np.int32)
        if array.shape != above.shape or array.ndim != 1:
            raise ValueError(f"draft tree: expected equal vectors, found {array.shape} tokens, {above.shape} parents")
        if len(set(zip(above.tolist(), array.tolist(), strict=True))) < len(array):
            raise ValueError("draft tree: two children of one node carry the same token")
        return Draft(array, above, bool(np.array_equal(above, np.arange(-1, len(array) - 1))), source)

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, n: int) -> Draft:
        """Return the draft of the first `n` nodes."""
        if n >= len(self.tokens):
            return self
        return Draft(self.tokens[:n], self.parents[:n], self.is_chain, self.source)

    @property
    def levels(self) -> int:
        """How deep the draft is, 0 for an empty one."""
        return len(self.tokens) if self.is_chain else int(self._depth.max())

    def depth(self) -> npt.NDArray[np.int32]:
        """Return the distance of each node from the root, int32 [n], from 1."""
        return self._depth

    @cached_property
    def _depth(self) -> npt.NDArray[np.int32]:
        if self.is_chain:
            return np.arange(1, len(self.tokens) + 1, dtype=np.int32)
        depth = [0] * (len(self.tokens) + 1)  # the last entry is the root, reached as index -1
        for node, parent in enumerate(self.parents.tolist()):
            depth[node] = depth[parent] + 1
        return np.array(depth[:-1], dtype=np.int32)

    def leaf_sets(self) -> npt.NDArray[np.bool_]:
        """Return bool [n, leaves]: which leaves lie at or below each node. One leaf is one sequence of the cache."""
        n = len(self.tokens)
        is_leaf = np.ones(n + 1, dtype=bool)
        is_leaf[self.parents] = False
        masks = [0] * (n + 1)  # bit i of a node: leaf i lies at or below it; the last entry collects the root's
        n_leaves = 0
        for node in np.flatnonzero(is_leaf[:n]).tolist():
            masks[node], n_leaves = 1 << n_leaves, n_leaves + 1
        for node, parent in zip(range(n - 1, -1, -1), self.parents[::-1].tolist(), strict=True):
            masks[parent] |= masks[node]
        width = (n_leaves + 7) // 8
        raw = np.frombuffer(b"".join(mask.to_bytes(width, "little") for mask in masks[:n]), dtype=np.uint8)
        return np.unpackbits(raw.reshape(n, width), axis=1, count=n_leaves, bitorder="little").view(np.bool_)


EMPTY = Draft.chain([])


def children_of(draft: Draft) -> dict[tuple[int, int], int]:
    """Return (parent, token) -> node."""
    parents, tokens = draft.parents.tolist(), draft.tokens.tolist()
    return {edge: node for node, edge in enumerate(zip(parents, tokens, strict=True))}


@dataclass
class Step:
    """One evaluation of the target: what was asked, proposed and accepted, and where the time went, in seconds.

    The caller's own time is in none of the parts. `plan` is None for the evaluation of a given text (the prompt, or
    tokens that the caller sent): its last row gives one token, and nothing was drafted.
    """

    plan: Plan | None
    asked: int = 0  # nodes asked of the drafter: those of the plan, fewer at the end of the context
    draft: Draft = EMPTY
    position: int = 0  # of the root in the text
    path: list[int] = field(default_factory=list)  # accepted nodes, from the root down
    tokens: int = 0  # sampled and given to the caller
    complete: bool = False  # did the walk end where the draft did? Otherwise the caller or the end of the text cut it
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    sample_seconds: float = 0.0
    loop_seconds: float = 0.0  # everything else inside the loop
    union: float | None = None  # experts read, a mean over the layers

    @property
    def nodes(self) -> int:
        """How many nodes were verified."""
        return len(self.draft)

    @property
    def accepted(self) -> int:
        """How many of them were right."""
        return len(self.path)
