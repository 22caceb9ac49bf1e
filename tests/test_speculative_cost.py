"""The automatic choice of the draft against the best fixed one, on simulated machines."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest

from blockffn.eval.guesses import GuessingDrafter
from blockffn.speculative.cost import PLAIN, Plan, Policy
from blockffn.speculative.estimates import Acceptance, StepTimes, TreeGain

Cost = Callable[[int], float]
TOKENS, SEEDS = 2000, 3
TREES = (8, 16, 31)
LEVELS = 3  # of a tree whose drafting costs time: one evaluation of the head for each


def measured(points: dict[int, float]) -> Cost:
    return lambda n: float(np.interp(n, list(points), list(points.values())))


MACHINES: dict[str, Cost] = {
    "flat": lambda n: 1 + 0.02 * (n - 1),  # verification nearly free
    "union": lambda n: 1 + 0.25 * (n - 1),
    "steep": lambda n: 1 + 0.6 * (n - 1),
    "linear": lambda n: 1.0 * n,  # nothing to gain
    "stairs": lambda n: 1 + 0.08 * (n - 1) + (0.4 if n > 4 else 0.0),
    "bumpy": measured({1: 1.13, 2: 1.35, 3: 1.65, 5: 1.95, 6: 2.1, 7: 2.4, 9: 2.95, 13: 3.6, 17: 4.4, 32: 6.4}),
}


class Simulation:
    """A drafter of known luck on a machine of known cost, noisy as a real one."""

    def __init__(self, cost: Cost, draft_cost: float, p: float, seed: int) -> None:
        self.cost, self.draft_cost, self.seed = cost, draft_cost, seed
        self.drafter = GuessingDrafter(range(TOKENS + 100), p, 2 * TOKENS, seed)

    def seconds(self, policy: Policy, tokens: int = TOKENS) -> float:
        """Return the seconds per token."""
        random = np.random.default_rng(self.seed)
        seconds, produced = 0.0, 0
        while produced < tokens:
            plan = policy.plan()
            accepted, depth = self.verify(produced, plan)
            noise = 1 + 0.03 * random.standard_normal() + (random.random() < 0.02)
            verifying, drafting = noise * self.cost(1 + plan.nodes), 0.0
            if plan.nodes:
                drafting = self.draft_cost * (depth if plan.tree else plan.nodes)
                policy.draft_times[plan.tree].add(plan.nodes, drafting)
            policy.times.add(1 + plan.nodes, verifying)
            policy.observe(plan, plan.nodes, depth, accepted)
            seconds += verifying + drafting
            produced += 1 + accepted
        return seconds / produced

    def verify(self, at: int, plan: Plan) -> tuple[int, int]:
        """Return how many nodes of the draft at token `at` are right, and how deep it is."""
        right = self.drafter.right
        if not plan.tree:
            accepted = 0
            while accepted < plan.nodes and right[at + accepted] == 0:
                accepted += 1
            return accepted, plan.nodes
        parents, ranks, depths = self.drafter.shape(plan.nodes)
        levels = min(LEVELS if self.draft_cost else plan.nodes, max(depths) + 1)
        node, accepted = -1, 0
        for child, (parent, rank, depth) in enumerate(zip(parents, ranks, depths, strict=True)):
            if parent == node and depth < levels and right[at + depth] == rank:
                node, accepted = child, accepted + 1
        return accepted, levels

    def best_fixed(self, trees: tuple[int, ...]) -> float:
        """Return the seconds per token of the best fixed plan."""
        plans = [PLAIN, *map(Plan, (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16)), *(Plan(size, True) for size in trees)]
        expected = {plan: self.drafter.expected(plan.nodes, plan.tree) / self.cost(1 + plan.nodes) for plan in plans}
        worth = 0.8 * max(expected.values()) if not self.draft_cost else 0.0
        return min(self.seconds(Policy(16, fixed=plan)) for plan in plans if expected[plan] >= worth)


@pytest.mark.parametrize(
    ("machine", "draft_cost", "trees"),
    [(machine, draft_cost, ()) for machine in MACHINES for draft_cost in (0.0, 0.1)]
    + [("union", 0.1, TREES), ("bumpy", 0.0, TREES), ("bumpy", 0.1, TREES)],
)
def test_choice_is_near_the_best_and_never_loses(machine: str, draft_cost: float, trees: tuple[int, ...]) -> None:
    for p in (0.0, 0.3, 0.6, 0.8, 0.9 if trees else 0.95):
        to_best, to_plain = [], []
        for seed in range(SEEDS):
            simulation = Simulation(MACHINES[machine], draft_cost, p, seed)
            found = simulation.seconds(Policy(16, trees))
            to_best.append(found / simulation.best_fixed(trees))
            to_plain.append(found / simulation.seconds(Policy(16, fixed=PLAIN)))
        assert np.mean(to_best) < 1.05, (p, to_best)
        assert max(to_plain) < 1.03, (p, to_plain)


def test_switching_off_is_logged_once_per_trial_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(8)
    with caplog.at_level(logging.INFO, logger="blockffn.speculative"):
        Simulation(MACHINES["union"], 0.0, 0.0, seed=1).seconds(policy, 400)
    assert policy.switched_off == len(caplog.records) >= 2
    assert "next trial in" in caplog.records[0].getMessage()


def test_comes_back_when_drafts_become_right() -> None:
    policy = Policy(8)
    Simulation(MACHINES["union"], 0.0, 0.0, seed=1).seconds(policy, 200)
    Simulation(MACHINES["union"], 0.0, 0.95, seed=2).seconds(policy, 1500)
    assert Simulation(MACHINES["union"], 0.0, 0.95, seed=3).seconds(policy, 1000) < 0.5


def test_a_fixed_plan_never_changes() -> None:
    plan = Plan(5)
    policy = Policy(8, fixed=plan)
    assert all(policy.plan() is plan for _ in range(10))


def test_trees_are_used_only_where_they_win() -> None:
    for gain, expected in ((4.0, True), (1.0, False)):
        policy = Policy(4, tree_sizes=(16,))
        plans = []
        for _ in range(400):
            plan = policy.plan()
            plans.append(plan)
            accepted = 0 if not plan.nodes else int(gain) if plan.tree else 1
            policy.times.add(1 + plan.nodes, 1 + 0.02 * plan.nodes)
            policy.observe(plan, plan.nodes, 4 if plan.tree else plan.nodes, accepted)
        assert bool(np.mean([plan.tree for plan in plans[100:]]) > 0.5) is expected


def test_times_interpolate_and_clip_outliers() -> None:
    times = StepTimes()
    assert times.predict(3) == 0.0
    for tokens, seconds in ((1, 1.0), (5, 3.0), (1, 1.0), (1, 1.0)):
        times.add(tokens, seconds)
    assert times.predict(3) == pytest.approx(2.0)
    assert times.predict(7) == pytest.approx(4.0)
    times.add(1, 100.0)
    assert times.predict(1) == 1.0
    for _ in range(9):
        times.add(1, 1.5)  # the machine became slower for good
    assert times.predict(1) == 1.5


def test_acceptance_forgets() -> None:
    acceptance = Acceptance(4)
    for _ in range(300):
        acceptance.add(4, 4)
    assert acceptance.rate(3) > 0.95
    acceptance.forget()
    for _ in range(60):
        acceptance.add(4, 0)
    assert acceptance.rate(0) < 0.5


def test_trees_are_believed_in_until_they_are_measured() -> None:
    gain, rates = TreeGain(), [0.5] * 8
    assert gain.seen(8) == 0 and gain.expected(8, rates) > 1 + 0.5 + 0.25 + 0.125
    for _ in range(20):
        gain.add(8, 3, 1)
    assert gain.seen(8) == 20 and gain.expected(8, rates) < 1.2
    for _ in range(2000):
        gain.fade()
    assert gain.expected(8, rates) > 1.7


def test_starts_with_the_yardstick_and_grows_with_success() -> None:
    policy, lengths = Policy(16), []
    assert policy.plan() is PLAIN
    policy.times.add(1, 1.0)
    for _ in range(10):
        plan = policy.plan()
        lengths.append(plan.nodes)
        policy.times.add(1 + plan.nodes, 1.0)
        policy.observe(plan, plan.nodes, plan.nodes, plan.nodes)
    assert lengths[0] <= 4 and lengths[-1] == 16


def test_a_useless_drafter_costs_a_few_steps_only() -> None:
    policy, drafted = Policy(16, TREES), 0
    for _ in range(500):
        plan = policy.plan()
        drafted += plan.nodes > 0
        policy.times.add(1 + plan.nodes, 1.0 + 0.5 * plan.nodes)
        policy.observe(plan, plan.nodes, plan.nodes, 0)
    assert drafted <= 15
