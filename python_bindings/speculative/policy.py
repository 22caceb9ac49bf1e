"""Knowing the cost: how many tokens are worth drafting, learned while generating.

`Policy` picks the draft that promises the most tokens per second, nothing at all when plain decoding is faster, and
tries again later. What it knows is measured (measured.py): the time of a step by the number of its tokens, the time of
drafting, how often the i-th drafted token is right, and what trees give.

    >>> from blockffn.speculative.policy import PLAIN, Policy
    >>> policy = Policy(max_nodes=8)
    >>> policy.plan() is PLAIN                       # the yardstick: what a plain step costs
    True
    >>> for _ in range(3):
    ...     policy.times.add(1, 0.010)
    >>> policy.plan()
    Plan(nodes=2, tree=False)

docs/speculative.md has the measurements.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from blockffn.speculative.drafter import Drafter
from blockffn.speculative.measured import Acceptance, StepTimes, TreeGain

log = logging.getLogger("blockffn.speculative")

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)  # of the chains that are compared
STAY = 1.03  # another plan must promise so much more than the present one
LONGEST_STAY = 8  # steps with one plan between two comparisons, once it is settled
EXPLORE_EVERY = 48  # drafted steps until another plan than the best is tried for a few steps,
CURIOSITY = 0.05  # if it would be the best were it so much faster; after n measurements, 1/sqrt(n + 1) of this
SETTLE = 3  # steps at once with a plan whose time is not known: the first one also builds a new graph
FIRST_PLAIN = 2  # measurements of a plain step before the first draft
YARDSTICK = 10  # plain steps at once when they are measured again: the later ones are what plain decoding is like
OFTEN = 32  # such steps take the drafts between two measurements, at least; more, by the square of a draft's lead
HOPE = 0.7  # speculation is given up when it loses even if the acceptance is so many standard errors higher; half of it
# is granted to a plan that is to be tried
LEAST_TRIAL = 4  # drafted steps before it is given up
SHARE = 0.02  # of the time that yardsticks may take, and trials may lose
FIRST_PAUSE, LONGEST_PAUSE = 64, 2048  # plain steps after a failed trial; at least doubled with each one


@dataclass(frozen=True)
class Plan:
    """What to draft in this step."""

    nodes: int = 0
    tree: bool = False


PLAIN = Plan()


def tree_sizes(max_nodes: int) -> tuple[int, ...]:
    """Return the sizes of trees that are compared where the largest has `max_nodes` nodes: a quarter, half and all.

    >>> tree_sizes(31)
    (8, 16, 31)
    """
    return tuple(size for size in sorted({-(-max_nodes // 4), -(-max_nodes // 2), max_nodes}) if size > 1)


def limits(drafter: Drafter) -> tuple[int, tuple[int, ...]]:
    """Return the longest chain and the sizes of trees that are compared with this drafter."""
    return min(drafter.max_nodes, drafter.max_chain), tree_sizes(drafter.max_nodes) if drafter.can_tree else ()


class Policy:
    """Chooses the plan of each step.

    Chains of up to `max_nodes` tokens are compared by expected tokens per second; trees of `tree_sizes` nodes by the
    mean number of tokens that trees of that size gave. With `fixed` the plan never changes.
    """

    def __init__(self, max_nodes: int, tree_sizes: tuple[int, ...] = (), fixed: Plan | None = None) -> None:
        self.chains = [Plan(n) for n in sorted({*(n for n in LENGTHS if n < max_nodes), max_nodes})]
        self.plans = self.chains + [Plan(size, tree=True) for size in tree_sizes]
        self.max_nodes, self.tree_sizes, self.fixed = max_nodes, tree_sizes, fixed
        self.times = StepTimes()
        self.draft_times: dict[bool, StepTimes] = {False: StepTimes(), True: StepTimes()}
        self.acceptance = Acceptance(max_nodes)
        self.trees = TreeGain()
        self.switched_off = 0  # how often speculation was given up
        self.reason = ""  # why it was given up the last time
        self._chosen, self._stay = PLAIN, 0  # the present plan, and for how many steps it still holds
        self._trial = 0  # steps with a draft since speculation was switched on
        self._since_plain = 0.0  # what the drafted steps since a plain one took, in plain steps
        self._since_other = 0  # drafted steps since another plan was tried
        self._pause = 0  # after the last failed trial
        self._lost = 0.0  # plain steps that the present trial has cost

    def plan(self) -> Plan:
        """Return the plan of the next step."""
        if self.fixed is not None:
            return self.fixed
        if self._stay == 0:
            self._chosen, self._stay = self._choose()
        self._stay -= 1
        return self._chosen

    def _choose(self) -> tuple[Plan, int]:
        """Return the next plan and for how many steps."""
        plain = self.times.predict(1)
        if self.times.count(1) < FIRST_PLAIN:
            return PLAIN, 1
        best, rate = self._best(self.acceptance.rates())
        lead = rate * plain
        loss = YARDSTICK * max(0.0, lead - 1.0) + 2 * self.times.switch() / plain  # in plain steps
        if self._since_plain >= max(OFTEN, loss / SHARE) * max(1.0, lead) ** 2:
            return PLAIN, YARDSTICK
        if lead < 1.0:
            best, rate = self._best(self.acceptance.rates(HOPE))
            if rate * plain >= 1.0:
                return best, self._settling(best)
            if self._trial >= LEAST_TRIAL:
                return PLAIN, self._give_up()
            return self.chains[0], 1  # the cheapest way to look again
        if self._since_other >= EXPLORE_EVERY:
            self._since_other = 0
            other, _ = self._best(self.acceptance.rates(HOPE / 2), CURIOSITY)
            if other != best:
                return other, SETTLE
        return best, max(self._settling(best), min(LONGEST_STAY, self._trial // 2, self.times.count(1 + best.nodes)))

    def _settling(self, plan: Plan) -> int:
        """Return the fewest steps with a plan: more where its time is not known yet."""
        return max(1, SETTLE - self.times.count(1 + plan.nodes))

    def _best(self, rates: list[float], curiosity: float = 0.0) -> tuple[Plan, float]:
        """Return the plan with the most expected tokens per second and these, given the acceptance by position."""
        best, best_rate = PLAIN, 0.0
        tokens, product, position = 1.0, 1.0, 0
        change = self.times.switch() / LONGEST_STAY  # each step's part of it
        for plan in self.plans:
            if plan.tree:
                gain = self.trees.hoped(plan.nodes, rates) if curiosity else self.trees.expected(plan.nodes, rates)
            else:
                for right in rates[position : plan.nodes]:
                    product *= right
                    tokens += product
                gain, position = tokens, plan.nodes
            seconds = self.times.predict(1 + plan.nodes) + self._drafting(plan) + change * (plan != self._chosen)
            rate = self._bonus(plan, curiosity) * gain / seconds
            if rate > best_rate:
                best, best_rate = plan, rate
        return best, best_rate

    def _bonus(self, plan: Plan, curiosity: float) -> float:
        """Return the factor for the present plan, or what is hoped for where a plan is hardly known."""
        if curiosity:
            return 1.0 + curiosity / math.sqrt(1 + self.times.count(1 + plan.nodes))
        return STAY if plan == self._chosen else 1.0

    def _drafting(self, plan: Plan) -> float:
        """Return the expected seconds of drafting; a tree that was never drawn is taken for a chain of four."""
        known = self.draft_times[plan.tree].predict(plan.nodes)
        return known if known or not plan.tree else self.draft_times[False].predict(4)

    def _give_up(self) -> int:
        """Switch speculation off; return for how many steps."""
        self.switched_off += 1
        least = 2 * self._pause if self._lost > 0.0 else FIRST_PAUSE
        self._pause = int(min(max(least, FIRST_PAUSE, self._lost / SHARE), LONGEST_PAUSE))
        self._lost = 2 * self.times.switch() / self.times.predict(1)  # of the next trial
        self.reason = (
            f"speculation off: {100 * self.acceptance.rate(0):.0f} % of first drafts right, a step of 2 tokens takes "
            f"{self.times.predict(2) / self.times.predict(1):.2f} of a plain one; next trial in {self._pause} tokens"
        )
        log.info(self.reason)
        self.acceptance.forget()
        self._trial = 0
        return self._pause

    def observe(self, plan: Plan, nodes: int, depth: int, accepted: int) -> None:
        """Learn from a verified step: a draft of `nodes` nodes and `depth` of which `accepted` tokens were right."""
        if nodes == 0:
            self._since_plain = 0.0
            return
        self._trial += 1
        self._since_other += 1
        plain = self.times.predict(1)
        if plain:
            took = (self.times.predict(1 + nodes) + self._drafting(plan)) / plain
            self._since_plain += took
            self._lost += took - 1 - accepted
        self.trees.fade()
        if plan.tree:
            self.trees.add(plan.nodes, depth, 1 + accepted)
        else:
            self.acceptance.add(depth, accepted)
