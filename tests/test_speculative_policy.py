"""The automatic choice of the draft against the best fixed one, on simulated machines."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from blockffn.speculative import ScriptedDrafter
from blockffn.speculative.measured import Acceptance, StepTimes, TreeGain
from blockffn.speculative.policy import PLAIN, Plan, Policy
from blockffn.speculative.scripted import CHILDREN

TOKENS, SEEDS = 2000, 6
PERIOD = 200
TREES = (8, 16, 31)
LEVELS = 3  # of a tree whose drafting costs time: one evaluation of the head for each


@dataclass(frozen=True)
class Machine:
    """What a step takes, in any unit: by its number of tokens, more after a change of size and later in the text."""

    cost: Callable[[int], float]
    change: float = 0.05  # of the first step of another size
    attention: float = 0.0  # what each token of a step costs more at the end of the text
    noise: float = 0.03


def measured(points: dict[int, float]) -> Callable[[int], float]:
    return lambda n: float(np.interp(n, list(points), list(points.values())))


LARGE = {1: 1.0, 2: 1.43, 3: 1.67, 4: 2.05, 5: 2.6, 6: 3.2, 7: 3.5, 9: 4.4, 13: 6.0, 17: 7.6, 32: 15.0}
SMALL = {1: 1.0, 2: 1.25, 3: 1.52, 4: 1.75, 5: 2.04, 6: 2.38, 7: 2.75, 9: 3.3, 11: 3.83, 13: 4.6, 17: 5.6, 32: 10.0}
STEEPER = {1: 1.0, 2: 1.43, 3: 1.94, 4: 2.4, 5: 2.7, 6: 3.0, 7: 3.4, 9: 4.85, 13: 5.8, 17: 7.9, 32: 17.0}
MACHINES = {
    "flat": Machine(lambda n: 1 + 0.02 * (n - 1)),  # verification nearly free
    "union": Machine(lambda n: 1 + 0.25 * (n - 1)),
    "steep": Machine(lambda n: 1 + 0.6 * (n - 1)),
    "linear": Machine(lambda n: 1.0 * n),  # nothing to gain
    "stairs": Machine(lambda n: 1 + 0.08 * (n - 1) + (0.4 if n > 4 else 0.0)),
    "bumpy": Machine(
        measured({1: 1.13, 2: 1.35, 3: 1.65, 5: 1.95, 6: 2.1, 7: 2.4, 9: 2.95, 13: 3.6, 17: 4.4, 32: 6.4})
    ),
    "1.2b": Machine(measured(LARGE), 0.03, 1.1, 0.07),  # this and the next: the models of docs/speculative.md
    "tiny": Machine(measured(SMALL), 0.6, 0.5, 0.1),
    "long": Machine(measured(STEEPER), 0.48, 1.8, 0.1),  # as a small model whose attention is slow
}


class Simulation:
    """A drafter of known luck on a machine of known cost; the policy sees times as noisy as real ones.

    p: how often a first guess is right; two rates take turns, `PERIOD` tokens each.
    """

    def __init__(
        self, machine: Machine, draft_cost: float, p: float | tuple[float, float], seed: int, tokens: int = TOKENS
    ) -> None:
        self.machine, self.draft_cost, self.seed, self.tokens = machine, draft_cost, seed, tokens
        rates = p if isinstance(p, tuple) else (p, p)
        text, n_vocab = range(tokens + 100), 2 * tokens + 200
        drafters = [ScriptedDrafter(text, rate, n_vocab, seed, CHILDREN, by_place=True) for rate in rates]
        self.steady, self.drafter = rates[0] == rates[1], drafters[0]
        self.drafter.right = [drafters[at // PERIOD % 2].right[at] for at in range(tokens + 100)]

    def seconds(self, policy: Policy) -> float:
        """Return the seconds per token, noise left out."""
        random = np.random.default_rng(self.seed)
        seconds, produced, before = 0.0, 0, PLAIN
        while produced < self.tokens:
            plan = policy.plan()
            accepted, depth = self.verify(produced, plan)
            verifying = self.machine.cost(1 + plan.nodes) + (self.machine.change if plan != before else 0.0)
            verifying += self.machine.attention * (1 + plan.nodes) * produced / self.tokens
            before, drafting = plan, 0.0
            if plan.nodes:
                drafting = self.draft_cost * (depth if plan.tree else plan.nodes)
                policy.draft_times[plan.tree].add(plan.nodes, drafting)
            noise = np.exp(self.machine.noise * random.standard_normal()) + (random.random() < 0.02)
            policy.times.add(1 + plan.nodes, verifying * float(noise))
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
        """Return the seconds per token of the best fixed plan, known afterwards."""
        plans = [PLAIN, *map(Plan, (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16)), *(Plan(size, True) for size in trees)]
        expected = {
            plan: self.drafter.expected(plan.nodes, plan.tree) / self.mean_cost(1 + plan.nodes) for plan in plans
        }
        worth = 0.8 * max(expected.values()) if self.steady and not self.draft_cost else 0.0
        return min(self.seconds(Policy(16, fixed=plan)) for plan in plans if expected[plan] >= worth)

    def mean_cost(self, n: int) -> float:
        """Return what a step of `n` tokens takes in the middle of the text."""
        return self.machine.cost(n) + 0.5 * self.machine.attention * n

    def choose(self, trees: tuple[int, ...]) -> tuple[float, float]:
        """Return the seconds of the automatic choice over those of the best fixed plan, and over plain decoding's."""
        found = self.seconds(Policy(16, trees))
        return found / self.best_fixed(trees), found / self.seconds(Policy(16, fixed=PLAIN))


@pytest.mark.parametrize(
    ("machine", "draft_cost", "trees"),
    [(machine, draft_cost, ()) for machine in MACHINES for draft_cost in (0.0, 0.1)]
    + [("union", 0.1, TREES), ("bumpy", 0.0, TREES), ("bumpy", 0.1, TREES), ("1.2b", 0.0, TREES), ("tiny", 0.0, TREES)]
    + [("long", 0.0, TREES), ("long", 0.4, ()), ("tiny", 0.4, ())],  # the last: the bundled head beside its model
)
def test_choice_is_near_the_best_and_never_loses(machine: str, draft_cost: float, trees: tuple[int, ...]) -> None:
    for p in (0.0, 0.3, 0.6, 0.8, 0.9 if trees else 0.95):
        texts = [Simulation(MACHINES[machine], draft_cost, p, seed).choose(trees) for seed in range(SEEDS)]
        to_best, to_plain = zip(*texts, strict=True)
        assert np.mean(to_best) < 1.05 and max(to_best) < 1.12, (p, to_best)
        assert max(to_plain) < (1.05 if (machine, draft_cost) == ("long", 0.4) else 1.03), (p, to_plain)


@pytest.mark.parametrize("machine", ["1.2b", "tiny", "long", "union", "flat"])
def test_bursts_of_luck(machine: str) -> None:
    """Where the text changes every 200 tokens, no fixed plan is better by 5 %, and plain decoding not by 3 %."""
    for rates in ((0.95, 0.1), (0.1, 0.95)):
        texts = [Simulation(MACHINES[machine], 0.0, rates, seed).choose(()) for seed in range(SEEDS)]
        to_best, to_plain = zip(*texts, strict=True)
        assert np.mean(to_best) < 1.05, (rates, to_best)
        assert max(to_plain) < 1.03, (rates, to_plain)


def test_switching_off_is_logged_once_per_trial_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(8)
    with caplog.at_level(logging.INFO, logger="blockffn.speculative"):
        Simulation(MACHINES["union"], 0.0, 0.0, seed=1, tokens=800).seconds(policy)
    assert policy.switched_off == len(caplog.records) >= 2
    assert "next trial in" in caplog.records[0].getMessage()


def test_comes_back_when_drafts_become_right() -> None:
    policy = Policy(8)
    Simulation(MACHINES["union"], 0.0, 0.0, seed=1, tokens=200).seconds(policy)
    Simulation(MACHINES["union"], 0.0, 0.95, seed=2, tokens=1500).seconds(policy)
    assert Simulation(MACHINES["union"], 0.0, 0.95, seed=3, tokens=1000).seconds(policy) < 0.5


def test_a_bad_start_is_not_the_end() -> None:
    """Three misses of a drafter whose later guesses are all right do not switch it off."""
    policy, misses = Policy(8), 3
    for _ in range(80):
        plan = policy.plan()
        accepted = plan.nodes if misses <= 0 else 0
        misses -= plan.nodes > 0
        policy.times.add(1 + plan.nodes, 1.0 + 0.25 * plan.nodes)
        policy.observe(plan, plan.nodes, plan.nodes, accepted)
    assert policy.switched_off == 0 and policy.plan().nodes == 8


def test_one_slow_step_does_not_decide() -> None:
    """The first step with a draft takes ten times as long as it should: not a reason to give up."""
    policy, drafted = Policy(8), 0
    for _ in range(40):
        plan = policy.plan()
        drafted += plan.nodes > 0
        policy.times.add(1 + plan.nodes, 10.0 if plan.nodes and drafted == 1 else 1.0 + 0.1 * plan.nodes)
        policy.observe(plan, plan.nodes, plan.nodes, plan.nodes)
    assert policy.switched_off == 0 and policy.plan().nodes == 8


@pytest.mark.parametrize("machine", ["tiny", "long"])
def test_plans_do_not_alternate(machine: str) -> None:
    """Where a change of size costs half a step, fewer than one step in eight is a change."""
    policy = Policy(16, TREES)
    plans: list[Plan] = []
    choose = policy.plan
    policy.plan = lambda: plans.append(choose()) or plans[-1]  # type: ignore[method-assign,func-returns-value]
    Simulation(MACHINES[machine], 0.0, 0.6, seed=1, tokens=1000).seconds(policy)
    assert sum(one != other for one, other in itertools.pairwise(plans)) < len(plans) / 8


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
    assert times.predict(3) == 0.0 and times.count(3) == 0
    for tokens, seconds in ((1, 1.0), (1, 1.0), (5, 3.0), (5, 3.0), (1, 1.0), (1, 1.0)):
        times.add(tokens, seconds)
    assert times.predict(3) == pytest.approx(2.0)
    assert times.predict(7) == pytest.approx(4.0)
    times.add(1, 100.0)
    assert times.predict(1) == pytest.approx(1.0, rel=0.05)


def test_a_slower_machine_slows_every_size() -> None:
    times = StepTimes()
    for tokens, seconds in ((1, 1.0), (5, 3.0)):
        for _ in range(40):
            times.add(tokens, seconds)
    for _ in range(40):
        times.add(1, 1.5)  # the machine became slower for good
    assert times.predict(1) == pytest.approx(1.5, rel=0.01)
    assert times.predict(5) == pytest.approx(4.5, rel=0.05)


def test_the_first_step_of_another_size_is_kept_apart() -> None:
    times = StepTimes()
    times.add(4, 3.0)
    assert times.predict(4) == 3.0  # nothing better is known
    for tokens, seconds in ((4, 2.0), (4, 2.0), (1, 1.5), (1, 1.0), (4, 3.0), (1, 1.5)):
        times.add(tokens, seconds)
    assert times.predict(4) == pytest.approx(2.0) and times.predict(1) == pytest.approx(1.0)
    assert times.count(4) == 2 and times.count(1) == 1
    assert times.switch() == pytest.approx(0.5)
    times.begin()
    times.add(1, 9.0)  # the first step of a generation
    assert times.predict(1) == pytest.approx(1.0)


def test_acceptance_forgets() -> None:
    acceptance = Acceptance(4)
    for _ in range(300):
        acceptance.add(4, 4)
    assert acceptance.rate(3) > 0.95
    acceptance.forget()
    for _ in range(60):
        acceptance.add(4, 0)
    assert acceptance.rate(0) < 0.5


def test_hope_fades_with_evidence() -> None:
    acceptance, hopes = Acceptance(2, memory=200.0), []
    for _ in range(3):
        hopes.append(acceptance.rates(hope=1.0)[0] - acceptance.rates()[0])
        for right in [1, 0, 0, 0] * 8:
            acceptance.add(1, right)
    assert hopes[0] > 0.3 and hopes == sorted(hopes, reverse=True) and hopes[2] < 0.08


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
    while policy.plan() is PLAIN:
        policy.times.add(1, 1.0)
        assert policy.times.count(1) < 4
    for _ in range(10):
        plan = policy.plan()
        lengths.append(plan.nodes)
        policy.times.add(1 + plan.nodes, 1.0)
        policy.observe(plan, plan.nodes, plan.nodes, plan.nodes)
    assert lengths[0] <= 4 and lengths[-1] == 16


def test_gives_up_where_losing_costs_little() -> None:
    """A step with a draft takes 2 % more than a plain one, and no draft is ever right: not enough to go on."""
    policy = Policy(16)
    simulation = Simulation(MACHINES["flat"], 0.0, 0.0, seed=3)
    assert simulation.seconds(policy) < 1.01 and policy.switched_off > 0


def test_a_useless_drafter_costs_a_few_steps_only() -> None:
    policy, drafted = Policy(16, TREES), 0
    for _ in range(500):
        plan = policy.plan()
        drafted += plan.nodes > 0
        policy.times.add(1 + plan.nodes, 1.0 + 0.5 * plan.nodes)
        policy.observe(plan, plan.nodes, plan.nodes, 0)
    assert drafted <= 15
