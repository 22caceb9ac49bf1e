"""The automatic choice of the draft length against the best fixed one, on simulated machines."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest

from blockffn.speculative.cost import PLAIN, Acceptance, Plan, Policy, StepTimes

Cost = Callable[[int], float]
MACHINES: dict[str, Cost] = {
    "flat": lambda n: 1 + 0.02 * (n - 1),  # verification nearly free
    "union": lambda n: 1 + 0.25 * (n - 1),
    "steep": lambda n: 1 + 0.6 * (n - 1),
    "linear": lambda n: 1.0 * n,  # nothing to gain
    "stairs": lambda n: 1 + 0.08 * (n - 1) + (0.4 if n > 4 else 0.0),
}


def simulate(policy: Policy, cost: Cost, draft_cost: float, p: float, tokens: int, seed: int) -> float:
    """Return the seconds per token of `tokens` tokens; whether the drafter guesses token i is drawn beforehand."""
    random = np.random.default_rng(seed)
    guessed = random.random(tokens + 100) < p
    noise = 1 + 0.03 * random.standard_normal(tokens)
    seconds, produced = 0.0, 0
    while produced < tokens:
        plan = policy.plan()
        accepted = 0
        while accepted < plan.nodes and guessed[produced + accepted]:
            accepted += 1
        verifying = cost(1 + plan.nodes) * float(noise[produced])
        policy.times.add(1 + plan.nodes, verifying)
        if plan.nodes:
            policy.draft_times[False].add(plan.nodes, draft_cost * plan.nodes)
        policy.observe(plan, plan.nodes, plan.nodes, accepted)
        seconds += verifying + draft_cost * plan.nodes
        produced += 1 + accepted
    return seconds / produced


def best_fixed(cost: Cost, draft_cost: float, p: float, longest: int, tokens: int, seed: int) -> float:
    """Return the seconds per token of the best fixed length for the same draw."""
    return min(
        simulate(Policy(longest, fixed=Plan(k)), cost, draft_cost, p, tokens, seed)
        for k in range(longest + 1)
        if 0.7 * cost(1 + k) < sum(p**i for i in range(k + 1)) + 1e-9 or k == 0
    )


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("draft_cost", [0.0, 0.1])
def test_choice_is_near_the_best_and_never_loses(machine: str, draft_cost: float) -> None:
    cost = MACHINES[machine]
    for p in (0.0, 0.3, 0.6, 0.8, 0.95):
        found = simulate(Policy(16), cost, draft_cost, p, 2500, seed=5)
        best = best_fixed(cost, draft_cost, p, 16, 2500, seed=5)
        assert found < 1.05 * best, (p, found, best)
        assert found < 1.03 * simulate(Policy(16, fixed=PLAIN), cost, draft_cost, p, 2500, seed=5), (p, found)


def test_switching_off_is_logged_once_per_trial_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(8)
    with caplog.at_level(logging.INFO, logger="blockffn.speculative"):
        simulate(policy, MACHINES["union"], 0.0, 0.0, 400, seed=1)
    assert policy.switched_off == len(caplog.records) >= 2
    assert "next trial in" in caplog.records[0].getMessage()


def test_comes_back_when_drafts_become_right() -> None:
    policy = Policy(8)
    simulate(policy, MACHINES["union"], 0.0, 0.0, 200, seed=1)
    simulate(policy, MACHINES["union"], 0.0, 0.95, 1500, seed=2)
    assert simulate(policy, MACHINES["union"], 0.0, 0.95, 1000, seed=3) < 0.5


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
            policy.times.add(1 + plan.nodes, 1 + 0.05 * plan.nodes)
            policy.observe(plan, plan.nodes, plan.nodes, accepted)
        assert bool(np.mean([plan.tree for plan in plans[100:]]) > 0.5) is expected


def test_times_interpolate_and_clip_outliers() -> None:
    times = StepTimes()
    assert times.predict(3) == 0.0
    for tokens, seconds in ((1, 1.0), (5, 3.0), (1, 1.0), (1, 1.0)):
        times.add(tokens, seconds)
    assert times.predict(3) == pytest.approx(2.0)
    assert times.predict(7) == pytest.approx(4.0)
    times.add(1, 100.0)
    assert times.predict(1) < 1.5


def test_acceptance_forgets() -> None:
    acceptance = Acceptance(4)
    for _ in range(300):
        acceptance.add(4, 4)
    assert acceptance.rate(3) > 0.95
    acceptance.forget()
    for _ in range(60):
        acceptance.add(4, 0)
    assert acceptance.rate(0) < 0.5


def test_starts_with_the_yardstick() -> None:
    assert Policy(8).plan() is PLAIN
