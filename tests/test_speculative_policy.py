"""The automatic choice of the draft against the best fixed one, on simulated machines (simulated.py)."""

from __future__ import annotations

import dataclasses
import itertools
import logging

import numpy as np
import pytest
from simulated import MACHINES, NONE, TREES, UNSEEN, Mixture, Silent, Simulation, Single, step

from blockffn.speculative import Draft
from blockffn.speculative.draft import Step
from blockffn.speculative.measured import Acceptance, Sources, StepTimes, TreeGain
from blockffn.speculative.policy import PLAIN, Plan, Policy

SEEDS = 6


def drafted(plan: Plan, right: int, seconds: float, drafting: float = 0.0) -> Step:
    """A closed step with a draft of the plan's size."""
    return step(plan, Draft.chain(np.zeros(plan.nodes, np.int32)), right, drafting, seconds)


def plain(seconds: float) -> Step:
    return step(PLAIN, NONE, 0, 0.0, seconds)


@pytest.mark.parametrize(
    ("machine", "draft_cost", "trees"),
    [(machine, draft_cost, ()) for machine in MACHINES for draft_cost in (0.0, 0.1)]
    + [("union", 0.1, TREES), ("bumpy", 0.0, TREES), ("bumpy", 0.1, TREES), ("1.2b", 0.0, TREES), ("tiny", 0.0, TREES)]
    + [("zen4", 0.0, TREES), ("tiles", 0.0, TREES), ("long", 0.0, TREES)]
    + [("long", 0.4, ()), ("tiny", 0.4, ())]  # the last: the bundled head beside its model
    + [(machine, draft_cost, TREES) for machine in UNSEEN for draft_cost in (0.0, 0.1)],
)
def test_choice_is_near_the_best_and_never_loses(machine: str, draft_cost: float, trees: tuple[int, ...]) -> None:
    on = (MACHINES | UNSEEN)[machine]
    for p in (0.0, 0.3, 0.6, 0.8, 0.9 if trees else 0.95):
        texts = [Simulation(on, Single(p, draft_cost, seed), seed).choose(trees) for seed in range(SEEDS)]
        to_best, to_plain = zip(*texts, strict=True)
        mean, single = (1.10, 1.18) if machine == "halls" else (1.05, 1.12)  # wide steps hide the best size
        assert np.mean(to_best) < mean and max(to_best) < single, (p, to_best)
        assert max(to_plain) < (1.05 if (machine, draft_cost) == ("long", 0.4) else 1.03), (p, to_plain)


@pytest.mark.parametrize("draft_cost", [0.0, 0.1])
def test_short_texts(draft_cost: float) -> None:
    """Four texts of 48 tokens, as `blockffn bench` generates them: the start included, less than 6 % are lost."""
    machine = "zen4"
    texts = [
        Simulation(MACHINES[machine], Single(0.91, draft_cost, seed, 400), seed, 48, 4).choose(()) for seed in range(12)
    ]
    assert np.mean([to_best for to_best, _ in texts]) < 1.06, texts


@pytest.mark.parametrize("draft_cost", [0.0, 0.1])
def test_short_texts_on_a_busy_machine(draft_cost: float) -> None:
    """Steps that vary by 30 %: a plain step of which little is known, and a time far beyond those measured, mislead."""
    machine = dataclasses.replace(MACHINES["zen4"], noise=0.3)
    texts = [Simulation(machine, Single(0.91, draft_cost, seed, 400), seed, 48, 4).choose(TREES) for seed in range(24)]
    to_best, to_plain = zip(*texts, strict=True)
    assert np.mean(to_best) < 1.14, to_best
    assert max(to_plain) < 0.95, to_plain


@pytest.mark.parametrize("machine", ["union", "tiny", "zen4", *UNSEEN])
@pytest.mark.parametrize(("p", "cost", "share"), [(0.0, 0.1, 0.0), (0.0, 1.0, 0.0), (0.9, 0.3, 0.2), (0.95, 1.0, 0.3)])
def test_a_drafter_that_costs_and_gives_little_never_loses(machine: str, p: float, cost: float, share: float) -> None:
    """What proposes nothing is switched off like any other draft that loses."""
    for seed in range(SEEDS):
        policy = Policy(16)
        text = Simulation((MACHINES | UNSEEN)[machine], Silent(p, cost, share, seed), seed)
        assert text.seconds(policy) / text.seconds(PLAIN) < 1.03
        assert share or policy.switched_off > 0


@pytest.mark.parametrize("machine", ["union", "1.2b", "tiny", "zen4", *UNSEEN])
@pytest.mark.parametrize(
    ("look_up", "model", "cost", "share"),
    [(0.95, 0.5, 0.1, 0.4), (0.5, 0.8, 0.1, 0.4), (0.9, 0.3, 0.3, 0.3), (0.1, 0.9, 0.05, 0.3), (0.95, 0.0, 0.1, 0.5)],
)
def test_mixtures_of_sources(machine: str, look_up: float, model: float, cost: float, share: float) -> None:
    on = (MACHINES | UNSEEN)[machine]
    texts = [Simulation(on, Mixture(look_up, model, cost, share, seed), seed).choose(()) for seed in range(SEEDS)]
    to_best, to_plain = zip(*texts, strict=True)
    assert np.mean(to_best) < 1.09, to_best
    assert max(to_plain) < 1.03, to_plain


def test_sources_are_learned_apart() -> None:
    """A free look-up that is always right and a dear model that never is: neither's figures reach the other's."""
    times, sources = StepTimes(), Sources(16)
    for _ in range(3):
        times.add(1, 1.0)
    for _ in range(40):
        sources.learn(Plan(16), step(Plan(16), Draft.chain(np.zeros(16, np.int32), "look-up"), 16, 0.0, 2.0))
        sources.learn(Plan(16), step(Plan(16), Draft.chain(np.zeros(8, np.int32), "model"), 0, 4.0, 1.5))
        times.add(9, 1.5)
        times.add(9, 1.5)
        times.add(17, 2.0)
        times.add(17, 2.0)
    tokens, seconds = sources.expected(times, [Plan(16)])[0]
    assert tokens == pytest.approx((17 + 1) / 2, rel=0.1)
    assert seconds == pytest.approx((2.0 + 5.5) / 2, rel=0.1)  # the model's share is costed with the 8 it gives


def test_time_of_drafting_counts_whatever_it_gave() -> None:
    """A drafter that takes two plain steps and proposes nothing is given up, and its time is no plain step's."""
    policy, seconds = Policy(16), 0.0
    for _ in range(1000):
        plan = policy.plan()
        policy.learn(step(plan, NONE, 0, 2.0 if plan.nodes else 0.0, 1.0))
        seconds += 3.0 if plan.nodes else 1.0
    assert policy.switched_off > 0 and seconds < 1030.0
    assert policy.times.predict(1) == pytest.approx(1.0)


@pytest.mark.parametrize("machine", ["1.2b", "tiny", "long", "union", "flat"])
def test_rates_that_change(machine: str) -> None:
    """Where the text changes every 200 tokens, no fixed plan is better by 5 %, and plain decoding not by 3 %."""
    for rates in ((0.95, 0.1), (0.1, 0.95)):
        texts = [Simulation(MACHINES[machine], Single(rates, 0.0, seed), seed).choose(()) for seed in range(SEEDS)]
        to_best, to_plain = zip(*texts, strict=True)
        assert np.mean(to_best) < 1.05, (rates, to_best)
        assert max(to_plain) < 1.03, (rates, to_plain)


def test_switching_off_is_logged_once_per_trial_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(8)
    with caplog.at_level(logging.INFO, logger="blockffn.speculative"):
        Simulation(MACHINES["union"], Single(0.0, 0.0, 1, 800), 1, 800).seconds(policy)
    assert policy.switched_off == len(caplog.records) >= 2
    assert "next trial in" in caplog.records[0].getMessage()


def test_comes_back_when_drafts_become_right() -> None:
    policy = Policy(8)
    Simulation(MACHINES["union"], Single(0.0, 0.0, 1, 200), 1, 200).seconds(policy)
    Simulation(MACHINES["union"], Single(0.95, 0.0, 2, 1500), 2, 1500).seconds(policy)
    assert Simulation(MACHINES["union"], Single(0.95, 0.0, 3, 1000), 3, 1000).seconds(policy) < 0.5


def test_a_bad_start_is_not_the_end() -> None:
    """Three misses of a drafter whose later guesses are all right do not switch it off."""
    policy, misses = Policy(8), 3
    for _ in range(80):
        plan = policy.plan()
        accepted = plan.nodes if misses <= 0 else 0
        misses -= plan.nodes > 0
        policy.learn(drafted(plan, accepted, 1.0 + 0.25 * plan.nodes))
    assert policy.switched_off == 0 and policy.plan().nodes == 8


def test_one_slow_step_does_not_decide() -> None:
    """The first step with a draft takes ten times as long as it should: not a reason to give up."""
    policy, n_drafted = Policy(8), 0
    for _ in range(40):
        plan = policy.plan()
        n_drafted += plan.nodes > 0
        slow = plan.nodes and n_drafted == 1
        policy.learn(drafted(plan, plan.nodes, 10.0 if slow else 1.0 + 0.1 * plan.nodes))
    assert policy.switched_off == 0 and policy.plan().nodes == 8


@pytest.mark.parametrize("machine", ["tiny", "long"])
def test_plans_do_not_alternate(machine: str) -> None:
    """Where a change of size costs half a step, fewer than one step in eight is a change."""
    policy = Policy(16, TREES)
    plans: list[Plan] = []
    choose = policy.plan
    policy.plan = lambda: plans.append(choose()) or plans[-1]  # type: ignore[method-assign,func-returns-value]
    Simulation(MACHINES[machine], Single(0.6, 0.0, 1, 1000), 1, 1000).seconds(policy)
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
            above = np.maximum(np.arange(plan.nodes) // 4 - 1, -1) if plan.tree else np.arange(plan.nodes) - 1
            draft = Draft(np.zeros(plan.nodes, np.int32), above, not plan.tree)
            policy.learn(step(plan, draft, accepted, 0.0, 1 + 0.02 * plan.nodes))
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


def test_a_smaller_step_costs_at_least_its_share() -> None:
    """The line through disturbed times may cross zero above one token."""
    times = StepTimes()
    for tokens, seconds in ((5, 1.0), (5, 1.0), (13, 9.0), (13, 9.0)):
        times.add(tokens, seconds)
    assert times.predict(1) == pytest.approx(0.2)
    assert times.predict(21) == pytest.approx(17.0)


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


def test_a_draft_of_nothing_is_a_size() -> None:
    """Times of drafting are kept by the nodes given, 0 included, from the first measurement on."""
    times = StepTimes()
    for seconds in (3.0, 2.0, 2.0):
        times.add(0, seconds)
    assert times.predict(0) == pytest.approx(2.0) and times.switch() == pytest.approx(1.0)


def test_acceptance_forgets() -> None:
    acceptance = Acceptance(4)
    for _ in range(300):
        acceptance.add(4, 4)
    assert acceptance.rates()[3] > 0.95
    acceptance.forget()
    for _ in range(60):
        acceptance.add(4, 0)
    assert acceptance.rates()[0] < 0.5


def test_trees_are_believed_in_until_they_are_measured() -> None:
    gain, rates = TreeGain(), [0.5] * 8
    assert gain.seen(8) == 0 and gain.expected(8, rates) > 1 + 0.5 + 0.25 + 0.125
    for _ in range(20):
        gain.add(8, 3, 8, 1)
    assert gain.seen(8) == 20 and gain.expected(8, rates) < 1.2
    for _ in range(2000):
        gain.fade()
    assert gain.expected(8, rates) > 1.7


def test_starts_with_plain_steps_and_grows_with_success() -> None:
    policy, lengths = Policy(16), []
    while policy.plan() is PLAIN:
        policy.learn(plain(1.0))
        assert policy.times.count(1) < 4
    for _ in range(10):
        plan = policy.plan()
        lengths.append(plan.nodes)
        policy.learn(drafted(plan, plan.nodes, 1.0))
    assert lengths[0] <= 4 and lengths[-1] == 16


def test_gives_up_where_losing_costs_little() -> None:
    """A step with a draft takes 2 % more than a plain one, and no draft is ever right: not enough to go on."""
    policy = Policy(16)
    simulation = Simulation(MACHINES["flat"], Single(0.0, 0.0, 3), 3)
    assert simulation.seconds(policy) < 1.01 and policy.switched_off > 0


def test_a_useless_drafter_costs_a_few_steps_only() -> None:
    policy, n_drafted = Policy(16, TREES), 0
    for _ in range(500):
        plan = policy.plan()
        n_drafted += plan.nodes > 0
        policy.learn(drafted(plan, 0, 1.0 + 0.5 * plan.nodes))
    assert n_drafted <= 20
