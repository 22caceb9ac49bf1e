"""EAGLE-2's dynamic tree: grow the most likely nodes, keep the best of all that were tried (arXiv 2406.16858, 4.1).

    >>> import numpy as np
    >>> from blockffn.speculative.tree import TreeGrower, TreeShape
    >>> grower = TreeGrower(TreeShape(iterations=2, top_k=2, size=4))
    >>> grower.expand(np.log(np.array([[0.6, 0.3, 0.1]], dtype=np.float32))).tokens.tolist()
    [0, 1]
    >>> grower.expand(np.log(np.array([[0.1, 0.8, 0.1], [0.5, 0.3, 0.2]], dtype=np.float32))).tokens.tolist()
    [1, 0]
    >>> draft = grower.draft()
    >>> draft.tokens.tolist(), draft.parents.tolist()
    ([0, 1, 1], [-1, 0, -1])

The paths 0, 0-1 and 1 have the probabilities 0.6, 0.48 and 0.3: the best three of the six nodes tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from blockffn.speculative.draft import ROOT, Draft, Tokens

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]


MAX_SEQUENCES = 256  # of one cache, llama.cpp's LLAMA_MAX_SEQ: one for each leaf


@dataclass(frozen=True)
class TreeShape:
    """`iterations` levels, `top_k` children of each of `top_k` nodes, of which the best `size` stay, root included."""

    iterations: int = 3
    top_k: int = 10
    size: int = 32

    def __post_init__(self) -> None:
        if min(self.iterations, self.top_k) < 1 or self.size < 2:
            raise ValueError(f"tree: expected iterations >= 1, top_k >= 1, size >= 2, found {self}")
        if self.size > MAX_SEQUENCES + 1:
            raise ValueError(f"tree: expected a size of at most {MAX_SEQUENCES + 1}, found {self.size}")
        if (self.iterations - 1) * self.top_k > MAX_SEQUENCES:
            raise ValueError(
                f"tree: expected at most {MAX_SEQUENCES} sequences in the head's cache, (iterations - 1) x top_k; "
                f"found {self.iterations - 1} x {self.top_k}"
            )

    @property
    def nodes(self) -> int:
        """How many nodes the largest such tree has, the root not counted."""
        return min(self.size - 1, self.top_k + (self.iterations - 1) * self.top_k**2)


AUTHORS = TreeShape(3, 10, 32)  # the setting of the published head


@dataclass(frozen=True)
class Level:
    """The nodes to expand next."""

    nodes: Indices  # [f], numbers among all nodes tried
    tokens: Tokens  # int32 [f]
    rows: Indices  # [f], the row of the last `expand` that each node descends from


class TreeGrower:
    """Grows one tree. `expand` takes the logits of the last level's nodes and returns the next level."""

    def __init__(self, shape: TreeShape) -> None:
        self.shape = shape
        self._tokens: list[Tokens] = []
        self._parents: list[Indices] = []
        self._scores: list[Floats] = []
        self._level = Level(np.array([ROOT]), np.empty(0, dtype=np.int32), np.zeros(1, dtype=np.intp))
        self._level_scores: Floats = np.zeros(1, dtype=np.float32)
        self._count = 0

    def expand(self, logits: Floats) -> Level:
        """Add the best children of each node of the last level; return the best of them.

        `logits` is float32 [f, n_vocab], one row for each node of the last level, or one row for the root.
        """
        k = min(self.shape.top_k, logits.shape[1])
        tokens = top_k(logits, k)  # [f, k]
        # In this order rounding keeps a child at or below its parent: the log-probability is never above 0.
        scores: Floats = take(logits, tokens) - log_total(logits)[:, None]  # [f, k]
        scores += self._level_scores[:, None]
        flat = scores.ravel()
        self._tokens.append(tokens.ravel().astype(np.int32))
        self._parents.append(np.repeat(self._level.nodes, k))
        self._scores.append(flat)
        best = np.argsort(-flat, kind="stable")[: self.shape.top_k]
        best = best[np.isfinite(flat[best])]
        self._level = Level(best + self._count, self._tokens[-1][best], best // k)
        self._level_scores = flat[best]
        self._count += len(flat)
        return self._level

    def draft(self, nodes: int | None = None, source: str = "") -> Draft:
        """Return the tree of the best `nodes` nodes tried (the shape's size without the root), parents first."""
        wanted = self.shape.size - 1 if nodes is None else min(nodes, self.shape.size - 1)
        scores = np.concatenate(self._scores)
        # A child never scores above its parent (`expand`) and comes later: a stable sort keeps parents before children.
        chosen = np.argsort(-scores, kind="stable")[:wanted]
        chosen = chosen[np.isfinite(scores[chosen])]
        place = np.full(len(scores) + 1, ROOT, dtype=np.int32)  # the last entry maps the root, index -1, to itself
        place[chosen] = np.arange(len(chosen), dtype=np.int32)
        parents = place[np.concatenate(self._parents)[chosen]]
        is_chain = bool(np.array_equal(parents, np.arange(-1, len(chosen) - 1)))
        return Draft(np.concatenate(self._tokens)[chosen], parents, is_chain, source)


def top_k(values: Floats, k: int) -> Indices:
    """Return the columns of the `k` largest values of each row, the largest first, [rows, k].

    Wide rows are folded first: the k largest values lie in the k folds with the largest maxima.
    """
    rows, columns = values.shape
    folds = 64
    width = columns // folds
    if width <= 4 * k:
        return _sorted_top(values, k)
    folded = values[:, : folds * width].reshape(rows, folds, width)
    best = np.argpartition(-folded.max(axis=1), k - 1, axis=1)[:, :k]  # [rows, k] folds
    index = (best[:, None, :] + np.arange(folds)[:, None] * width).reshape(rows, -1)
    rest = np.broadcast_to(np.arange(folds * width, columns), (rows, columns - folds * width))
    index = np.concatenate([index, rest], axis=1)
    return take(index, _sorted_top(take(values, index), k))


def _sorted_top(values: Floats, k: int) -> Indices:
    if k < values.shape[1]:
        part = np.argpartition(-values, k - 1, axis=1)[:, :k]
    else:
        part = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    order = np.argsort(-take(values, part), axis=1, kind="stable")
    return take(part, order)


def take(values: npt.NDArray[Any], columns: Indices) -> npt.NDArray[Any]:
    """Return values[i, columns[i, j]], [rows, k], with less ado than numpy.take_along_axis."""
    return values[np.arange(len(values))[:, None], columns]


def log_total(logits: Floats) -> Floats:
    """Return log(sum(exp(logits))) of each row, float32 [n]: logits less this are log-probabilities."""
    largest = logits.max(axis=1)
    shifted = logits - largest[:, None]
    np.exp(shifted, out=shifted)
    total: Floats = largest + np.log(shifted.sum(axis=1))
    return total
