"""Knowing the cost: how many tokens are worth drafting, learned while generating.

`Policy` picks the draft that promises the most tokens per second, nothing at all when plain decoding is faster, and
tries again later. What it knows is measured (estimates.py): the time of a step by the number of its tokens, the time of
drafting, how often the i-th drafted token is right, and what trees give.

    >>> from blockffn.speculative.cost import PLAIN, Policy
    >>> policy = Policy(max_nodes=8)
    >>> policy.plan() is PLAIN                       # the yardstick: what a plain step costs
    True
    >>> policy.times.add(1, 0.010)
    >>> policy.plan()
    Plan(nodes=4, tree=False)

It starts with a short draft, and lengthens it as far as drafts turn out right: a drafter that is always wrong costs
little, one that is always right is soon used fully. docs/speculative.md has the measurements.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from blockffn.speculative.estimates import Acceptance, StepTimes, TreeGain

log = logging.getLogger("blockffn.speculative")

STAY = 1.02  # another draft must promise so much more than the present one
COMPARE_EVERY, LEARNING = 4, 24  # steps between two comparisons of all plans, once so many drafts were verified
EXPLORE_EVERY = 12  # drafted steps until another length is measured: one more, one less, twice as many, all,
EXPLORE_ENOUGH, FAR_WORTH = 4, 0.8  # while it was measured less often, and promises this share of the best rate
FAR_COST = 1.3  # or a size of tree that was never verified, if a step with it takes no more than so many of the best
CHAIN_EVERY, CHAIN_ENOUGH = 24, 60  # drafted steps until a chain is verified although trees seem better; three times as
# often before so many chains were seen
YARDSTICK_EVERY = 128  # drafted steps until a plain step is measured again
FIRST_LENGTH = 4  # of the first chain; chains grow to this multiple of what was accepted at once
FIRST_TRIAL, LATER_TRIAL = 4, 2  # steps that a drafter gets to show that it is worth its time
FIRST_PAUSE, LONGEST_PAUSE = 64, 1024  # plain steps after a failed trial; doubled with each one


@dataclass(frozen=True)
class Plan:
    """What to draft in this step."""

    nodes: int = 0
    tree: bool = False


PLAIN = Plan()


class Policy:
    """Chooses the plan of each step.

    Chains of 1 to `max_nodes` tokens are compared by expected tokens per second; trees of `tree_sizes` nodes by the
    mean number of tokens that trees of that size gave. With `fixed` the plan never changes.
    """

    def __init__(self, max_nodes: int, tree_sizes: tuple[int, ...] = (), fixed: Plan | None = None) -> None:
        self.max_nodes, self.tree_sizes, self.fixed = max_nodes, tree_sizes, fixed
        self.times = StepTimes()
        self.draft_times: dict[bool, StepTimes] = {False: StepTimes(), True: StepTimes()}
        self.acceptance = Acceptance(max_nodes)
        self.trees = TreeGain()
        self.switched_off = 0  # how often speculation was given up
        self._pause, self._wait = FIRST_PAUSE, 0
        self._trial, self._trial_accepted = FIRST_TRIAL, 0  # drafted steps left, and what they brought
        self._longest = FIRST_LENGTH  # chains are not longer than this yet
        self._drafted = 0  # drafted steps
        self._since_plain = 0
        self._gain = 1.0  # of the best plan over plain decoding, expected
        self._chosen, self._chosen_for = PLAIN, 0  # the last comparison, and for how many steps it still holds

    def plan(self) -> Plan:
        """Return the plan of the next step."""
        if self.fixed is not None:
            return self.fixed
        if self._wait > 0:
            self._wait -= 1
            if self._wait == 0:
                self._begin_trial(LATER_TRIAL)
            return PLAIN
        if self._since_plain >= self._yardstick_after():
            return PLAIN
        if self._chosen_for == 0 or self._chosen is PLAIN:
            self._chosen, self._chosen_for = self._best(), COMPARE_EVERY if self._drafted >= LEARNING else 1
        self._chosen_for -= 1
        if self._chosen is not PLAIN:
            return self._explored(self._chosen)
        if self._trial > 0:
            return Plan(1)
        self._give_up()
        return PLAIN

    def _yardstick_after(self) -> int:
        """Return the number of drafted steps until a plain step is measured: at once, after 8, 32, ... or 128.

        It is measured often where drafts gain little: then it costs little, and a machine whose speed drifts fools us
        least.
        """
        known = self.times.count(1)
        return min(YARDSTICK_EVERY if self._gain > 1.2 else YARDSTICK_EVERY // 4, 2 * 4**known) if known else 0

    def _best(self) -> Plan:
        """Return the plan with the most expected tokens per second."""
        best, best_rate = PLAIN, 1.0 / self.times.predict(1)
        chain, rate = self._best_chain()
        self._gain = rate / best_rate
        if rate > best_rate:
            best, best_rate = chain, rate * self._stay(chain)
        if best is PLAIN or not self.tree_sizes or self._drafted < LEARNING:
            return best
        rates = self.acceptance.rates()
        for size in self.tree_sizes:
            plan = Plan(size, tree=True)
            rate = self.trees.expected(size, rates) / self._seconds(plan) * self._stay(plan)
            if rate > best_rate:
                best, best_rate = plan, rate
        return best

    def _best_chain(self) -> tuple[Plan, float]:
        """Return the chain with the most expected tokens per second, and these."""
        rates = self._chain_rates()
        present = -1 if self._chosen.tree or self._drafted < LEARNING else self._chosen.nodes - 1
        best = max(range(len(rates)), key=lambda i: rates[i] * (STAY if i == present else 1.0))
        return Plan(1 + best), rates[best]

    def _stay(self, plan: Plan) -> float:
        """Return the bonus of the present plan: another batch size makes llama.cpp build its graph anew."""
        return STAY if plan == self._chosen else 1.0

    def _chain_rates(self) -> list[float]:
        """Return the expected tokens per second of chains of 1, 2, ... tokens."""
        longest = min(self.max_nodes, self._longest)
        verify, draft = self.times.table(1 + longest), self.draft_times[False].table(longest)
        tokens, product, rates = 1.0, 1.0, []
        for nodes, right in enumerate(self.acceptance.rates()[:longest], start=1):
            product *= right
            tokens += product
            rates.append(tokens / (verify[nodes] + draft[nodes - 1]))
        return rates

    def _drafting(self, nodes: int, tree: bool) -> float:
        """Return the expected seconds of drafting; a tree that was never drawn is taken for a chain of four."""
        known = self.draft_times[tree].predict(nodes)
        return known if known or not tree else self.draft_times[False].predict(4)

    def _explored(self, best: Plan) -> Plan:
        """Return `best`, or now and then another plan that would be judged by old or no measurements otherwise."""
        every = CHAIN_EVERY if self.acceptance.tried > CHAIN_ENOUGH else CHAIN_EVERY // 3
        if best.tree and self._drafted % every == every - 1:
            return self._best_chain()[0]
        if self._drafted % EXPLORE_EVERY != EXPLORE_EVERY - 1:
            return best
        tree = self._rare_tree(best)
        if tree is None and not best.tree:
            return self._rare_chain(best)
        return tree or best

    def _rare_chain(self, best: Plan) -> Plan:
        """Return a chain that is a little or much longer or shorter than `best`, if its time is hardly known."""
        rates = self._chain_rates()
        worth = FAR_WORTH * max(rates)
        lengths = (best.nodes + 1, best.nodes - 1, 2 * best.nodes, len(rates))
        near = [
            length
            for length in lengths
            if 1 <= length <= len(rates) and (rates[length - 1] > worth or self.times.count(1 + length) == 1)
        ]  # one measurement is no evidence
        rare = min(near, key=lambda length: self.times.count(1 + length), default=best.nodes)
        return Plan(rare) if self.times.count(1 + rare) < EXPLORE_ENOUGH else best

    def _rare_tree(self, best: Plan) -> Plan | None:
        """Return a tree that costs little more than `best`, of a size that was hardly tried."""
        longest = FAR_COST * self._seconds(best)
        sizes = [size for size in self.tree_sizes if self._seconds(Plan(size, tree=True)) < longest]
        rare = min(sizes, key=self.trees.seen, default=0)
        return Plan(rare, tree=True) if rare and self.trees.seen(rare) < EXPLORE_ENOUGH - 1 else None

    def _seconds(self, plan: Plan) -> float:
        return self.times.predict(1 + plan.nodes) + self._drafting(plan.nodes, plan.tree)

    def _begin_trial(self, steps: int) -> None:
        self._trial, self._trial_accepted, self._chosen_for = steps, 0, 0
        self.acceptance.forget()

    def _give_up(self) -> None:
        self.switched_off += 1
        self._wait = self._pause
        log.info(
            "speculation off: %.0f %% of first drafts right, a step of 2 tokens takes %.2f of a plain one; "
            "next trial in %d tokens",
            100 * self.acceptance.rate(0),
            self.times.predict(2) / self.times.predict(1),
            self._wait,
        )
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def observe(self, plan: Plan, nodes: int, depth: int, accepted: int) -> None:
        """Learn from a verified step: a draft of `nodes` nodes and `depth` of which `accepted` tokens were right."""
        if nodes == 0:
            self._since_plain = 0
            return
        self._since_plain += 1
        self._drafted += 1
        self.trees.fade()
        if plan.tree:
            self.trees.add(plan.nodes, depth, 1 + accepted)
        else:
            self.acceptance.add(depth, accepted)
            self._longest = max(self._longest, FIRST_LENGTH * accepted)
        self._judge_trial(accepted)

    def _judge_trial(self, accepted: int) -> None:
        """Count a step of the trial; a later one that brought nothing at all ends at once."""
        if self._trial == 0:
            self._pause = FIRST_PAUSE if accepted else self._pause
            return
        self._trial -= 1
        self._trial_accepted += accepted
        if self._trial == 0 and self._trial_accepted == 0 and self.switched_off:
            self._give_up()
