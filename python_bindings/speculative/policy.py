"""How many tokens are worth drafting, learned while generating.

`Policy` picks the plan that promises the most tokens per second, and nothing at all while plain decoding is faster.
What it knows is measured (measured.py): the time of a step by the number of its tokens, and for each source of drafts
how long drafting takes and how many tokens it gives. It learns from closed steps only, one call each.

    >>> from blockffn.speculative.draft import PLAIN, Step
    >>> from blockffn.speculative.policy import Policy
    >>> policy = Policy(max_nodes=8)
    >>> policy.plan() is PLAIN                       # the baseline: what a plain step costs
    True
    >>> for _ in range(3):
    ...     policy.learn(Step(PLAIN, complete=True, tokens=1, verify_seconds=0.010))
    >>> policy.plan()
    Plan(nodes=2, tree=False)

docs/speculative.md has the measurements.
"""

from __future__ import annotations

import logging
import math

from blockffn.speculative.draft import PLAIN, Plan, Step
from blockffn.speculative.drafter import Drafter
from blockffn.speculative.measured import Sources, StepTimes, usual_levels

__all__ = ["PLAIN", "Plan", "Policy", "limits", "tree_sizes"]
log = logging.getLogger("blockffn.speculative")

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)  # of the chains that are compared
# Beside each, what another value does in 176 simulated cases of six or twelve texts: mean loss against the best fixed
# plan, and cases that miss 5 %, 12 % in a single text or 3 % of plain decoding. As it is: 1.44 %, 4 cases. Differences
# of 0.1 % and of two cases are within the noise of the seeds.
HYSTERESIS = 1.03  # another plan must promise so much more than the present one. Without: 1.45 %, 6 cases
HOLD = 8  # steps with one plan between two comparisons; plain steps measured at once. 16: 1.43 %, 5 cases
SETTLE = 3  # steps at once with a plan whose time is not known: the first one also builds a new graph. 2: 1.42 %, 4
BUDGET = (
    0.015  # share of the time that plain steps, exploration and trials may lose, each. 0.02: 1.28 %, 4, worst 7.9 %
)
OPTIMISM = 0.06  # confidence bound of a plan never measured. 0.05: 1.37 %, 4 cases; 0.10: 1.44 %, 1 case
OUTLIER = 1.5  # what counts of an evaluation at most, in expected ones. Without: 1.50 %, 6 cases
LIMIT = 3.5  # loss in plain steps since drafting last led, times the square of its lead, that stops it. 2.5: 1.35 %, 8
# cases, 24 % in one text; 5: 1.61 %, 6 cases, 12 % in rates that change
# The next two by short texts on a machine whose steps vary by 30 %, drafts free and at 0.1 of a step: 9.8 and 10.1 %
# behind the best plan; before there were such bounds 20.2 and 14.9 %
REACH = 2  # plans are compared up to so many times the tokens of the largest step measured
SURE = 8  # plain steps that must be known before drafting is given up
FIRST_PAUSE, LONGEST_PAUSE = (
    32,
    2048,
)  # plain steps after a lost trial, at least doubled with each. 16: 1.37 %, 4 cases;
# 64: 1.47 %, 4 cases


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
    """Chooses the plan of each step. With `fixed` it never changes.

    growth: what a further token adds to a step, in plain steps, before it is measured: from the profile of the model.
    """

    def __init__(
        self,
        max_nodes: int,
        tree_sizes: tuple[int, ...] = (),
        fixed: Plan | None = None,
        growth: float | None = None,
    ) -> None:
        chains = [Plan(n) for n in sorted({*(n for n in LENGTHS if n < max_nodes), max_nodes})]
        self.plans = chains + [Plan(size, tree=True) for size in tree_sizes]
        self.fixed = fixed
        self.times = StepTimes() if growth is None else StepTimes(growth)
        self.sources = Sources(max_nodes)
        self.switched_off = 0  # how often drafting was given up
        self.reason = ""  # why it was given up the last time
        self._chosen, self._hold = PLAIN, 0  # the present plan, and for how many steps it still holds
        self._drafted = 0  # steps since drafting was switched on
        self._tokens = self._seconds = 0.0  # of drafted steps since drafting last led
        self._gained = 0.0  # plain steps that drafting has gained since it was switched on
        self._took = 0.0  # plain steps that it has taken
        self._limit = LIMIT
        self._pause = 0
        self._since_plain = self._since_other = 0.0  # seconds of drafted steps since the last look at other plans

    def begin(self) -> None:
        """Start a generation: its first step also builds a graph."""
        self.times.begin()

    def plan(self) -> Plan:
        """Return the plan of the next step."""
        if self.fixed is not None:
            return self.fixed
        if self._hold == 0:
            self._chosen, self._hold = self._choose()
        self._hold -= 1
        return self._chosen

    def learn(self, step: Step) -> None:
        """Learn from a closed step."""
        if step.plan is None or self.fixed is not None:
            return
        plain = self.times.predict(1)
        expected = self.times.predict(1 + step.nodes)
        took = step.verify_seconds + step.loop_seconds
        self.times.add(1 + step.nodes, took)
        if step.asked == 0:
            self._since_plain = 0.0
            return
        self.sources.learn(step.plan, step)
        self._drafted += 1
        if not plain:
            return
        took = min(took, OUTLIER * expected) + step.draft_seconds
        self._since_plain += took
        self._since_other += took
        gain = step.tokens - took / plain
        self._gained += gain
        self._took += took / plain
        self._tokens, self._seconds = self._tokens + step.tokens, self._seconds + took
        lost = self._lost()
        if lost <= 0.0:
            self._tokens = self._seconds = 0.0
        elif lost > self._limit:
            self._hold = 0

    def _choose(self) -> tuple[Plan, int]:
        """Return the next plan and for how many steps."""
        if self.times.count(1) < 2:
            return PLAIN, 1
        if self._lost() > self._limit:
            return PLAIN, max(SURE - self.times.count(1), 0) or self._switch_off()
        plans = self._within_reach()
        expected = dict(zip(plans, self.sources.expected(self.times, plans), strict=True))
        switch = self.times.switch()
        best, rate = PLAIN, 0.0
        for plan, (tokens, seconds) in expected.items():
            promised = tokens / (seconds + (switch / HOLD if plan != self._chosen else 0.0))
            promised *= HYSTERESIS if plan == self._chosen else 1.0
            if promised > rate:
                best, rate = plan, promised
        lead = expected[best][0] / expected[best][1] * self.times.predict(1)
        self._limit = LIMIT * max(1.0, lead) ** 2
        other = self._explore(best, expected)
        if other is not None:
            return other
        return best, max(SETTLE - self.times.count(1 + best.nodes), min(HOLD, self._drafted // 2), 1)

    def _within_reach(self) -> list[Plan]:
        """Return the plans whose time can be told from what was measured, and the smallest tree."""
        known = max(REACH * self.times.largest(), 2 * REACH)
        smallest = next((plan for plan in self.plans if plan.tree), None)
        return [plan for plan in self.plans if 1 + plan.nodes <= known or plan is smallest]

    def _explore(self, best: Plan, expected: dict[Plan, tuple[float, float]]) -> tuple[Plan, int] | None:
        """Return another plan than the best for a few steps, where what this may lose is within the budget."""
        plain, change = self.times.predict(1), 2 * self.times.switch()
        rate = expected[best][0] / expected[best][1]
        loss = HOLD * max(0.0, plain - 1.0 / rate) + change
        if self._since_plain * BUDGET > loss * max(1.0, rate * plain) ** 2:
            return PLAIN, HOLD
        for plan, (tokens, seconds) in expected.items():
            loss = SETTLE * (seconds - tokens / rate) + change
            if plan != best and self._bound(plan, tokens) / seconds > rate and self._since_other * BUDGET > loss:
                self._since_other = 0.0
                return plan, SETTLE
        return None

    def _bound(self, plan: Plan, tokens: float) -> float:
        """Return an upper confidence bound of the tokens of a plan, in the time that is predicted for it."""
        if plan.tree and self.sources.trees_seen(plan.nodes) < SETTLE:
            return 1.0 + usual_levels(plan.nodes)
        return tokens * (1.0 + OPTIMISM / math.sqrt(1 + self.times.count(1 + plan.nodes)))

    def _lost(self) -> float:
        """Return the plain steps that drafting has lost since it last led, by what is known now of a plain step."""
        return self._seconds / self.times.predict(1) - self._tokens

    def _switch_off(self) -> int:
        """Stop drafting; return for how many steps."""
        self.switched_off += 1
        longer = 2 * self._pause if self._gained < 0.0 else 0
        self._pause = int(min(max(FIRST_PAUSE, longer, -self._gained / BUDGET), LONGEST_PAUSE))
        self.reason = (
            f"speculation off: {self._drafted} steps with drafts gave {self._took + self._gained:.0f} tokens in the "
            f"time of {self._took:.1f} plain steps; next trial in {self._pause} tokens"
        )
        log.info(self.reason)
        self.sources.forget()
        self._drafted, self._tokens, self._seconds, self._gained, self._took = 0, 0.0, 0.0, 0.0, 0.0
        return self._pause
