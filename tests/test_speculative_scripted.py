"""The scripted drafter as an instrument: exact rates from few draws, the best tree, the cost of a drafter beside it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from blockffn.speculative import Context, Draft, Drafter, ScriptedDrafter
from blockffn.speculative.scripted import best_tree, guesses

TRUTH = np.arange(1000, 3000, dtype=np.int32)


def accepted(draft: Draft, truth: list[int]) -> int:
    """Return how many tokens of the truth the draft holds."""
    node = -1
    for depth, token in enumerate(truth):
        below = np.flatnonzero((draft.parents == node) & (draft.tokens == token))
        if not len(below):
            return depth
        node = int(below[0])
    return len(truth)


def mean_accepted(drafter: ScriptedDrafter, nodes: int, tree: bool, draws: int) -> float:
    """Return the mean over `draws` proposals, each at another place of the text."""
    total = 0
    for known in range(10, 10 + draws):
        draft = drafter.propose(Context(TRUTH[:known], tree), nodes)
        assert len(draft) == nodes
        total += accepted(draft, TRUTH[known : known + nodes].tolist())
    return total / draws


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("nodes", [1, 2, 5, 8])
def test_few_draws_give_the_rate_of_a_chain(probability: float, nodes: int) -> None:
    expected = sum(probability**i for i in range(1, nodes + 1))
    found = mean_accepted(ScriptedDrafter(TRUTH, probability, 5000), nodes, False, 60)
    assert found == pytest.approx(expected, abs=0.2)  # independent draws would miss by 0.35 in one of three cases


@pytest.mark.parametrize(("probability", "nodes", "depth"), [(0.6, 8, 6), (0.7, 17, 3), (0.9, 31, 5)])
def test_few_draws_give_the_rate_of_a_tree(probability: float, nodes: int, depth: int) -> None:
    drafter = ScriptedDrafter(TRUTH, probability, 5000, branch=4, depth=depth, max_nodes=31, near=32)
    expected = drafter.expected(nodes, tree=True) - 1  # the sampled token
    assert mean_accepted(drafter, nodes, True, 200) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("tree", [False, True])
def test_luck_by_place_has_the_rate_that_is_promised(tree: bool) -> None:
    truth = np.random.default_rng(1).integers(0, 500, 6000)
    drafter = ScriptedDrafter(truth.tolist(), 0.6, 500, branch=4, by_place=True)
    given = []
    for at in range(1, 5900, 3):
        draft = drafter.propose(Context(truth[:at].astype(np.int32), tree), 8)
        assert len(draft) == 8 and len(set(zip(draft.parents.tolist(), draft.tokens.tolist(), strict=True))) == 8
        given.append(1 + accepted(draft, truth[at : at + 8].tolist()))
    assert np.mean(given) == pytest.approx(drafter.expected(8, tree), rel=0.05)


def test_drafters_of_one_seed_are_right_in_the_same_places() -> None:
    """A better drafter is right wherever a worse one is; other plans and later calls change nothing."""
    worse, better = (ScriptedDrafter(TRUTH, p, 5000, branch=3, by_place=True) for p in (0.4, 0.7))
    right = [np.array(drafter.right) == 0 for drafter in (worse, better)]
    assert (right[1] | ~right[0]).all() and right[1].sum() > right[0].sum()
    context = Context(TRUTH[:50])
    first = accepted(better.propose(context, 8), TRUTH[50:58].tolist())
    assert accepted(better.propose(context, 8), TRUTH[50:58].tolist()) == first
    assert accepted(better.propose(context, 2), TRUTH[50:52].tolist()) == min(first, 2)
    other = ScriptedDrafter(TRUTH, 0.7, 5000, seed=1, branch=3, by_place=True)
    assert other.right != better.right


def test_the_best_tree_is_the_best() -> None:
    """No tree of five nodes holds more true tokens, by trying them all."""
    rates, n = (0.5, 0.3, 0.1), 5

    def worth(parents: tuple[int, ...], ranks: tuple[int, ...]) -> float:
        found: list[float] = []
        for parent, rank in zip(parents, ranks, strict=True):
            found.append((1.0 if parent < 0 else found[parent]) * rates[rank])
        return sum(found)

    shapes = itertools.product(*(range(-1, node) for node in range(n)))
    every = ((parents, ranks) for parents in shapes for ranks in itertools.product(range(3), repeat=n))
    distinct = (pair for pair in every if len(set(zip(*pair, strict=True))) == n)
    parents, ranks = best_tree(rates, n, n)
    assert worth(tuple(parents), tuple(ranks)) == pytest.approx(max(worth(*pair) for pair in distinct))
    assert best_tree((0.9,), 4, 2) == ([-1, 0], [0, 0])  # nothing deeper to add


def test_wrong_tokens_are_near_and_different() -> None:
    drafter = ScriptedDrafter(TRUTH, 0.0, 5000, branch=3, near=8)
    for known in range(10, 60):
        draft = drafter.propose(Context(TRUTH[:known], True), 15)
        away = draft.tokens - (TRUTH[known] + draft.depth() - 1)
        assert len(draft) == 15 and away.min() >= 1 and away.max() <= 8


def test_guesses() -> None:
    assert guesses(0.8, 1) == [0.8]
    assert guesses(0.6, 3) == pytest.approx([0.6, 0.4 * 0.3, 0.4 * 0.7 * 0.2])
    assert sum(guesses(1.0, 4)) == 1.0 and guesses(0.0, 2) == [0.0, 0.0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"probability": 1.5},
        {"probability": -0.1},
        {"probability": 0.5, "branch": 0},
        {"probability": 0.5, "branch": 4, "near": 3},
        {"probability": 0.5, "near": 100},
        {"probability": 0.5, "depth": 0},
    ],
)
def test_bad_arguments(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="ScriptedDrafter: bad"):
        ScriptedDrafter([1, 2, 3], n_vocab=100, **arguments)  # type: ignore[arg-type]


class Costly(Drafter):
    """Writes down what it is asked; proposes at most three tokens."""

    name, wants_hidden, max_nodes, max_chain, can_tree = "costly", True, 7, 4, True

    def __init__(self) -> None:
        self.seen: list[str] = []

    def propose(self, context: Context, n: int) -> Draft:
        self.seen.append(f"propose {n}")
        return Draft.chain([0] * min(n, 3))

    def begin(self, tokens: object) -> None:
        self.seen.append("begin")

    def observe(self, proposed: int, accepted: int) -> None:
        self.seen.append(f"observe {proposed} {accepted}")

    def known_states(self) -> int:
        return 42


def test_the_drafter_beside_runs_and_its_tokens_do_not_count() -> None:
    costly = Costly()
    drafter = ScriptedDrafter(TRUTH, 1.0, 5000, beside=costly)
    assert drafter.name == "scripted+costly" and drafter.wants_hidden and not drafter.can_tree
    assert (drafter.max_nodes, drafter.max_chain, drafter.known_states()) == (7, 4, 42)
    drafter.begin(TRUTH[:10])
    assert drafter.propose(Context(TRUTH[:10]), 5).tokens.tolist() == TRUTH[10:13].tolist()
    drafter.observe(3, 3)
    assert costly.seen == ["begin", "propose 5", "observe 3 3"]
