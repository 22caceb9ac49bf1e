"""Knowing the cost: how many tokens are worth drafting, learned while generating.

Two things are measured: the time of an evaluation by the number of its tokens (`StepTimes`), and how often the i-th
drafted token is right, given that those before it were (`Acceptance`). `Policy` picks the draft that promises the
most tokens per second, nothing at all when plain decoding is faster, and tries again later.

    >>> from blockffn.speculative.cost import StepTimes
    >>> times = StepTimes()
    >>> for tokens, seconds in ((1, 0.010), (4, 0.016)):
    ...     times.add(tokens, seconds)
    >>> round(times.predict(2), 4)
    0.012
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

log = logging.getLogger("blockffn.speculative")

PRIOR_WEIGHT = 6.0  # observations that the position before counts for
COMPARE_EVERY = 3  # steps between two comparisons of all plans
EXPLORE_EVERY = 12  # drafted steps until a neighbour of the best length is measured, while it is not known well
PRIOR_SLOPE = 0.15  # before any measurement: each further token costs this part of a plain step


class StepTimes:
    """Seconds of an evaluation by its number of tokens: a smoothed table, interpolated between the sizes seen."""

    def __init__(self, weight: float = 0.1) -> None:
        self.weight = weight  # of a new measurement
        self._mean: dict[int, float] = {}
        self._count: dict[int, int] = {}

    def count(self, tokens: int) -> int:
        """Return how often this size was measured."""
        return self._count.get(tokens, 0)

    def add(self, tokens: int, seconds: float) -> None:
        """Learn from one evaluation; an outlier moves the mean by no more than a doubled time would."""
        count = self._count.get(tokens, 0)
        self._count[tokens] = count + 1
        if count == 0:
            self._mean[tokens] = seconds
            return
        mean = self._mean[tokens]
        weight = max(self.weight, 1.0 / (count + 1))
        self._mean[tokens] = mean + weight * (min(seconds, 2.0 * mean) - mean)

    def predict(self, tokens: int) -> float:
        """Return the expected seconds of one size; 0 before the first measurement."""
        return self.table(tokens)[-1]

    def table(self, longest: int) -> list[float]:
        """Return the expected seconds of the sizes 1 to `longest`: measured, interpolated, beyond that a line."""
        if not self._mean:
            return [0.0] * longest
        known = sorted(self._mean.items())
        slope = self._slope()
        (low, low_seconds), found = known[0], 0
        table = []
        for tokens in range(1, longest + 1):
            while found < len(known) and known[found][0] <= tokens:
                low, low_seconds = known[found]
                found += 1
            if tokens < known[0][0] or found == len(known):
                table.append(max(0.0, low_seconds + slope * (tokens - low)))
            else:
                high, high_seconds = known[found]
                table.append(low_seconds + (high_seconds - low_seconds) * (tokens - low) / (high - low))
        return table

    def _slope(self) -> float:
        """Return the seconds that one more token costs beyond the sizes seen."""
        first, last = min(self._mean), max(self._mean)
        if first == last:
            return PRIOR_SLOPE * self._mean[first] / (1 + PRIOR_SLOPE * (first - 1))
        return max(0.0, (self._mean[last] - self._mean[first]) / (last - first))


class Acceptance:
    """How often the i-th token of a draft is right when those before it were, with old steps slowly forgotten."""

    def __init__(self, positions: int, memory: float = 200.0) -> None:
        self._keep = 1.0 - 1.0 / memory
        self._tried = [0.0] * positions
        self._right = [0.0] * positions

    def add(self, reached: int, accepted: int) -> None:
        """Learn from a draft of depth `reached` whose first `accepted` tokens were right."""
        for position in range(min(reached, accepted + 1, len(self._tried))):
            self._tried[position] = self._tried[position] * self._keep + 1.0
            self._right[position] = self._right[position] * self._keep + (position < accepted)

    def rate(self, position: int) -> float:
        """Return the conditional acceptance at `position` (from 0)."""
        return self.rates()[position]

    def rates(self) -> list[float]:
        """Return the conditional acceptance of every position, each shrunk towards that of the position before."""
        expected, rates = 0.6, []
        for right, tried in zip(self._right, self._tried, strict=True):
            expected = (right + PRIOR_WEIGHT * expected) / (tried + PRIOR_WEIGHT)
            rates.append(expected)
        return rates

    def forget(self) -> None:
        """Make the past count for little, so that a fresh trial can change the mind quickly."""
        for counts in (self._tried, self._right):
            counts[:] = [count * 0.2 for count in counts]


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
        self._tree_tokens: dict[int, tuple[float, int]] = {}  # size -> (tokens of a step, steps seen)
        self.switched_off = 0  # how often speculation was given up
        self._pause = 64  # plain steps until the next trial; doubles with each failure
        self._wait = 0
        self._trial = 6  # drafted steps that a trial still has
        self._since_plain = 0
        self._chosen, self._chosen_for = PLAIN, 0  # the last comparison, and for how many steps it still holds

    def plan(self) -> Plan:
        """Return the plan of the next step."""
        if self.fixed is not None:
            return self.fixed
        if self._wait > 0:
            self._wait -= 1
            if self._wait == 0:
                self._trial, self._chosen_for = 3, 0
                self.acceptance.forget()
            return PLAIN
        if self.times.count(1) == 0 or self._since_plain >= 128:
            return PLAIN  # the yardstick: what a plain step costs
        if self._chosen_for == 0 or self._chosen is PLAIN:
            self._chosen, self._chosen_for = self._best(), COMPARE_EVERY
        self._chosen_for -= 1
        best = self._chosen
        if best is not PLAIN:
            return self._neighbour(best) if self._since_plain % EXPLORE_EVERY == EXPLORE_EVERY - 1 else best
        if self._trial > 0:
            return Plan(1)
        self._give_up()
        return PLAIN

    def _best(self) -> Plan:
        """Return the plan with the most expected tokens per second."""
        verify = self.times.table(1 + self.max_nodes)
        draft = self.draft_times[False].table(self.max_nodes)
        best, best_rate = PLAIN, 1.0 / verify[0]
        tokens, product = 1.0, 1.0
        for nodes, right in enumerate(self.acceptance.rates(), start=1):
            product *= right
            tokens += product
            rate = tokens / (verify[nodes] + draft[nodes - 1])
            if rate > best_rate:
                best, best_rate = Plan(nodes), rate
        for size in self.tree_sizes:
            mean, seen = self._tree_tokens.get(size, (0.0, 0))
            seconds = self.times.predict(1 + size) + self.draft_times[True].predict(size)
            if seen < 3 and best is not PLAIN:
                return Plan(size, tree=True)  # a few samples of each size decide
            if seen and mean / seconds > best_rate:
                best, best_rate = Plan(size, tree=True), mean / seconds
        return best

    def _neighbour(self, best: Plan) -> Plan:
        """Return a chain one longer or shorter whose time was hardly measured yet, or `best` itself."""
        if best.tree:
            return best
        sizes = [size for size in (best.nodes + 1, best.nodes - 1) if 1 <= size <= self.max_nodes]
        rare = min(sizes, key=lambda size: self.times.count(1 + size), default=best.nodes)
        return Plan(rare) if self.times.count(1 + rare) < 6 else best

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
        self._pause = min(2 * self._pause, 1024)

    def observe(self, plan: Plan, nodes: int, depth: int, accepted: int) -> None:
        """Learn from a verified step: a draft of `nodes` nodes and `depth` of which `accepted` tokens were right."""
        if nodes == 0:
            self._since_plain = 0
            return
        self._since_plain += 1
        self._trial = max(0, self._trial - 1)
        if plan.tree:
            mean, seen = self._tree_tokens.get(plan.nodes, (0.0, 0))
            weight = max(0.05, 1.0 / (seen + 1))
            self._tree_tokens[plan.nodes] = (mean + weight * (1 + accepted - mean), seen + 1)
        else:
            self.acceptance.add(depth, accepted)
            if accepted and self._trial == 0:
                self._pause = 64
