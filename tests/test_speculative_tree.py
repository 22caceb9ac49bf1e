"""Drafts keep parents before children, however sure the head is; trees of the user's size are the ones compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from tiny_head import N_EMBD, write_head

import blockffn
from blockffn.convert.eagle import convert_head
from blockffn.speculative import Draft, EagleDrafter, TreeShape
from blockffn.speculative.policy import Plan, tree_sizes
from blockffn.speculative.tree import AUTHORS, TreeGrower


@pytest.mark.parametrize("lead", [0.0, 16.0, 25.0, 60.0])
def test_a_sure_head_keeps_parents_before_children(lead: float) -> None:
    """Log-probabilities near 0: a score that rounds above its parent's would put the child first."""
    random = np.random.default_rng(0)

    def logits(rows: int) -> np.ndarray:
        found = (2 * random.standard_normal((rows, 500))).astype(np.float32)
        found[np.arange(rows), random.integers(0, 500, rows)] += np.float32(lead)
        return found

    for _ in range(100):
        grower = TreeGrower(AUTHORS)
        level = grower.expand(logits(1))
        for _ in range(AUTHORS.iterations - 1):
            level = grower.expand(logits(len(level.tokens)))
        draft = grower.draft()
        assert (draft.parents < np.arange(len(draft))).all()
        assert draft.depth().max() <= AUTHORS.iterations


def test_a_draft_checks_its_order() -> None:
    tokens, parents = np.array([5, 6], dtype=np.int32), np.array([1, -1], dtype=np.int32)
    with pytest.raises(ValueError, match="a parent must stand before its children, found parents"):
        Draft(tokens, parents, False)
    with pytest.raises(ValueError, match="a parent must stand before its children, found parents"):
        Draft(tokens, parents[:1], True)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 10, 32), "iterations >= 1"),
        ((3, 10, 1), "size >= 2"),
        ((3, 10, 400), "at most 257, found 400"),
        ((5, 100, 32), r"at most 256 sequences .*; found 4 x 100"),
    ],
)
def test_impossible_shapes_are_refused_by_name(shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreeShape(*shape)


def test_a_shape_knows_how_many_nodes_it_can_have() -> None:
    assert AUTHORS.nodes == 31
    assert TreeShape(2, 3, 64).nodes == 12  # 3 and 3 x 3
    assert TreeShape(1, 7, 33).nodes == 7


def test_sizes_compared_follow_the_largest() -> None:
    assert tree_sizes(31) == (8, 16, 31)
    assert tree_sizes(63) == (16, 32, 63)
    assert tree_sizes(7) == (2, 4, 7) and tree_sizes(5) == (2, 3, 5)
    assert tree_sizes(2) == (2,) and tree_sizes(1) == ()


@pytest.mark.parametrize("shape", [TreeShape(2, 3, 8), TreeShape(3, 5, 6), TreeShape(2, 3, 64), TreeShape(4, 10, 64)])
def test_trees_of_any_size_are_drafted_and_verified(shape: TreeShape, tmp_path: Path) -> None:
    """The automatic choice compares the user's size, and a tree of that size gives plain decoding's text."""
    write_checkpoint(tmp_path / "target", n_embd=N_EMBD, n_head=2, n_layer=2, attention="gqa")
    blockffn.convert.convert_checkpoint(tmp_path / "target", tmp_path / "target.gguf", outtype="f32")
    convert_head(write_head(tmp_path / "head"), tmp_path / "target.gguf", tmp_path / "head.gguf", outtype="f32")
    llm = blockffn.Llama(tmp_path / "target.gguf", n_ctx=128, n_threads=1, n_batch=64, exact=True)
    head = EagleDrafter(tmp_path / "head.gguf", llm, tree=shape)
    llm.speculate(head, True)
    assert Plan(shape.nodes, True) in llm._loop.policy.plans
    assert llm._sequences == shape.nodes
    llm.speculate(None, True)
    plain = [token for token, _ in zip(llm.generate([1, 9, 8], temp=0.0), range(40), strict=False)]
    llm.speculate(head, True, Plan(shape.nodes, True))
    found = [token for token, _ in zip(llm.generate([1, 9, 8], temp=0.0), range(40), strict=False)]
    statistics = llm.statistics()
    assert found == plain
    assert statistics["tree_steps"] > 0 and max(statistics["steps_by_size"]) == 1 + shape.nodes
    llm.close()
    head.close()
