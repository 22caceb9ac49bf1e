"""Drafts, drafters, the tree builder, kept rows and statistics: everything that needs no model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from blockffn.errors import BlockffnError
from blockffn.speculative import Combination, Context, Draft, Drafter, ModelDrafter, NGramDrafter, ScriptedDrafter
from blockffn.speculative.draft import EMPTY, PLAIN, Plan, Step
from blockffn.speculative.rows import Rows
from blockffn.speculative.scripted import guesses
from blockffn.speculative.stats import Statistics
from blockffn.speculative.tree import AUTHORS, TreeGrower, TreeShape, log_total, top_k


def array(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def test_tree_knows_depths_and_leaves() -> None:
    tree = Draft.tree([5, 6, 7, 8, 9], [-1, 0, 0, -1, 2])
    assert tree.depth().tolist() == [1, 2, 2, 1, 3]
    below = tree.leaf_sets()  # leaves are the nodes 1, 3 and 4
    assert below.astype(int).tolist() == [[1, 0, 1], [1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert not tree.is_chain and Draft.tree([1, 2], [-1, 0]).is_chain
    assert tree.first(3).parents.tolist() == [-1, 0, 0] and tree.first(9) is tree


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([1, 2], [1, -1], "before its children"),
        ([1], [-2], "before its children"),
        ([1, 1], [-1, -1], "same token"),
        ([1, 2], [-1], "equal vectors"),
    ],
)
def test_bad_trees_are_refused(tokens: list[int], parents: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Draft.tree(tokens, parents)


def test_ngram_prefers_the_longest_match_and_the_latest() -> None:
    text = array(1, 2, 3, 50, 9, 2, 3, 60, 8, 2, 3, 70, 1, 2, 3)
    assert NGramDrafter((3, 2)).propose(Context(text), 2).tokens.tolist() == [50, 9]
    assert NGramDrafter((2,)).propose(Context(text), 2).tokens.tolist() == [70, 1]


def test_ngram_continues_a_period() -> None:
    assert NGramDrafter((2,)).propose(Context(array(7, 4, 5, 4, 5)), 5).tokens.tolist() == [4, 5, 4, 5, 4]


def test_ngram_without_a_match_proposes_nothing() -> None:
    assert len(NGramDrafter().propose(Context(array(1, 2, 3)), 4)) == 0
    assert len(NGramDrafter().propose(Context(array(1)), 4)) == 0


def test_ngram_tree_merges_occurrences() -> None:
    text = array(1, 2, 10, 11, 1, 2, 20, 21, 1, 2)
    draft = NGramDrafter((2,)).propose(Context(text, tree=True), 6)
    assert {20, 10} <= set(draft.tokens[draft.parents == -1].tolist())


def test_ngram_begin_keeps_the_index_of_a_continued_text_only() -> None:
    drafter = NGramDrafter((2,))
    drafter.begin(array(1, 2, 3, 1, 2))
    drafter.begin(array(1, 2, 3, 1, 2, 3, 4))
    assert drafter.propose(Context(array(1, 2, 3, 1, 2, 3, 4, 1, 2)), 1).tokens.tolist() == [3]
    drafter.begin(array(9, 8, 7, 9, 8))
    assert drafter.propose(Context(array(9, 8, 7, 9, 8)), 1).tokens.tolist() == [7]
    assert len(drafter.propose(Context(array(9, 8, 7, 9, 8, 1, 2)), 1)) == 0


def test_ngram_against_a_scan() -> None:
    random = np.random.default_rng(3)
    text = random.integers(0, 6, 400).astype(np.int32)
    drafter = NGramDrafter((3, 2))
    for n in range(5, 400):
        expected: list[int] = []
        for size in (3, 2):
            ends = [i for i in range(size, n) if np.array_equal(text[i - size : i], text[n - size : n])]
            if ends:
                expected = text[ends[-1] : min(n, ends[-1] + 2)].tolist()
                break
        assert drafter.propose(Context(text[:n]), 2).tokens.tolist()[: len(expected)] == expected


class Watched(np.ndarray[Any, np.dtype[np.int32]]):
    """A text that counts how many of its tokens are looked at."""

    seen = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        Watched.seen += np.size(found)
        return found

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        Watched.seen += self.size
        return getattr(ufunc, method)(*(np.asarray(each) for each in inputs), **options)


def test_ngram_step_does_not_depend_on_the_length() -> None:
    text = np.random.default_rng(0).integers(0, 50, 40_000).astype(np.int32)

    def tokens_seen(start: int) -> int:
        drafter = NGramDrafter()
        drafter.begin(text[:start])
        views = [text[:n].view(Watched) for n in range(start, start + 500)]
        Watched.seen = 0
        for view in views:
            drafter.propose(Context(view), 8)
        return Watched.seen

    assert 0 < tokens_seen(39_000) < 1.5 * tokens_seen(500)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("branch", [1, 3])
def test_scripted_drafter_is_right_as_often_as_asked(probability: float, branch: int) -> None:
    truth = np.random.default_rng(1).integers(0, 200, 500)
    drafter = ScriptedDrafter(truth, probability, 200, branch=branch)
    right = 0
    for n in range(10, 410):
        draft = drafter.propose(Context(truth[:n].astype(np.int32), tree=branch > 1), 9)
        assert len(draft) == 9
        right += int(truth[n]) in draft.tokens[draft.parents == -1].tolist()
    assert abs(right / 400 - sum(guesses(probability, branch))) < 0.03


def test_scripted_tree_holds_the_true_path() -> None:
    truth = list(range(50))
    draft = ScriptedDrafter(truth, 1.0, 200, branch=3).propose(Context(array(*truth[:5]), tree=True), 15)
    node, path = -1, []
    while True:
        step = [i for i in range(15) if draft.parents[i] == node and draft.tokens[i] == 5 + len(path)]
        if not step:
            break
        node = step[0]
        path.append(node)
    assert len(path) >= 2  # 15 nodes hold two full levels


def test_combination_takes_the_first_that_has_something() -> None:
    class Constant(Drafter):
        name = "constant"
        seen: tuple[int, int] | None = None

        def propose(self, context: Context, n: int) -> Draft:
            return Draft.chain([42] * n, self.name)

        def observe(self, proposed: int, accepted: int) -> None:
            self.seen = (proposed, accepted)

    constant = Constant()
    both = Combination([NGramDrafter((2,)), constant])
    assert both.propose(Context(array(1, 2, 3)), 3).source == "constant"
    both.observe(3, 1)
    assert constant.seen == (3, 1)
    assert both.propose(Context(array(1, 2, 3, 1, 2)), 3).source == "ngram"
    assert both.name == "ngram+constant"


def test_a_missing_draft_model_is_named(tmp_path) -> None:
    with pytest.raises(BlockffnError, match=r"none\.gguf: no such file"):
        ModelDrafter(tmp_path / "none.gguf").attach(None)


def _tree_by_hand(shape: TreeShape, score) -> set[tuple[int, ...]]:
    """The dynamic tree with plain Python sets: paths of the best nodes."""
    level: dict[tuple[int, ...], float] = {(): 0.0}
    tried: dict[tuple[int, ...], float] = {}
    for _ in range(shape.iterations):
        children = {}
        for path, value in level.items():
            row = score(path)
            for token in np.argsort(-row)[: shape.top_k].tolist():
                children[(*path, token)] = value + float(row[token])
        tried |= children
        level = dict(sorted(children.items(), key=lambda item: -item[1])[: shape.top_k])
    return {path for path, _ in sorted(tried.items(), key=lambda item: -item[1])[: shape.size - 1]}


@pytest.mark.parametrize("shape", [AUTHORS, TreeShape(2, 3, 8), TreeShape(5, 4, 20), TreeShape(1, 7, 33)])
@pytest.mark.parametrize("n_vocab", [7, 50, 4097])
def test_tree_equals_a_tree_grown_by_hand(shape: TreeShape, n_vocab: int) -> None:
    def score(path: tuple[int, ...]) -> np.ndarray:
        random = np.random.default_rng([17, n_vocab, *path])
        logits = 3 * random.standard_normal((1, n_vocab)).astype(np.float32)
        return (logits - log_total(logits)[:, None])[0]

    grower = TreeGrower(shape)
    paths: list[tuple[int, ...]] = [()]
    for _ in range(shape.iterations):
        level = grower.expand(np.stack([score(path) for path in paths]))
        paths = [(*paths[row], token) for row, token in zip(level.rows.tolist(), level.tokens.tolist(), strict=True)]
    draft = grower.draft()
    found = []
    for token, parent in zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    assert set(found) == _tree_by_hand(shape, score)
    Draft.tree(draft.tokens, draft.parents)  # parents first, siblings differ


@pytest.mark.parametrize("columns", [3, 100, 640, 5000, 32_771])
@pytest.mark.parametrize("k", [1, 3])
def test_top_k(columns: int, k: int) -> None:
    values = np.random.default_rng(columns).standard_normal((5, columns)).astype(np.float32)
    assert top_k(values, k).tolist() == np.argsort(-values, axis=1)[:, :k].tolist()


def test_rows_are_indexed_by_place() -> None:
    rows = Rows.of(np.arange(12.0).reshape(3, 4), first=5)
    assert rows[6, 1] == 5.0 and rows[-1].tolist() == [8, 9, 10, 11]
    assert (np.exp(rows) - 1)[6:].shape == (2, 4) and rows[:6].shape == (1, 4)
    with pytest.raises(IndexError, match="row 4 was not kept: rows 5 to 7 were"):
        rows[4]


def test_statistics_add_up() -> None:
    stats = Statistics()
    tree = Draft.tree(range(9), [-1, -1, -1, 0, 0, 0, 3, 3, 3], "eagle")
    stats.add(Step(Plan(3), 3, Draft.chain([7, 8, 9], "ngram"), path=[0, 1], verify_seconds=0.01, union=5.0))
    stats.add(Step(PLAIN))
    stats.add(Step(Plan(9, True), 9, tree, path=[0, 3, 6]))
    found = stats.as_dict()
    assert found["steps"] == 3 and found["plain_steps"] == 1 and found["tree_steps"] == 1
    assert found["drafted_by_position"] == [2, 2, 2] and found["accepted_by_position"] == [2, 2, 1]
    assert found["draft_n"] == 12 and found["draft_n_accepted"] == 5
    assert found["union_by_size"] == {4: 5.0} and found["steps_by_source"] == {"ngram": 1, "eagle": 1}


def test_the_base_drafter_proposes_nothing() -> None:
    assert Drafter().propose(Context(array(1)), 4) is EMPTY
