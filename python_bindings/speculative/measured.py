"""What the choice of a draft is based on, learned while generating; what is old is forgotten.

`StepTimes`: the time of an evaluation by its number of tokens. `Acceptance`: how often the i-th drafted token is right,
given that those before it were. `TreeGain`: how many tokens a tree of some size gives.

    >>> from blockffn.speculative.measured import Acceptance, StepTimes
    >>> times = StepTimes()
    >>> for tokens, seconds in ((1, 0.010), (1, 0.010), (4, 0.016), (4, 0.016)):
    ...     times.add(tokens, seconds)
    >>> round(times.predict(2), 4)
    0.012
    >>> acceptance = Acceptance(2)
    >>> for _ in range(9):
    ...     acceptance.add(reached=2, accepted=2)
    >>> [round(rate, 2) for rate in acceptance.rates()]
    [0.94, 0.96]
"""

from __future__ import annotations

from bisect import bisect, bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from blockffn.speculative.draft import Plan, Step

KEPT = 30  # measurements of one size that count,
RECENT = 200  # if they are not older than so many steps: a longer context slows large steps more than small ones
CLOCK = 1e-9  # seconds; nothing takes less
FOLLOW, LEAP = 0.6, 1.05  # share of a step's surprise that is put down to the machine; what counts of it at most: what
# disturbs a step makes it longer, never shorter, and the pace would creep up with every outlier
PRIOR_SLOPE = 0.2  # before any measurement: each further token costs this part of a plain step, if no profile says more
PRIOR_RATE, PRIOR_WEIGHT = 0.6, 2.0  # acceptance before any measurement, and how many observations it counts for
MEMORY = 24.0  # drafts after which evidence about a position counts for a third: luck comes in bursts
POSITION_WEIGHT = 20.0  # how many observations the position before counts for


def median(values: deque[float]) -> float:
    """Return the median, the lower one of two: what disturbs a measurement makes it longer."""
    return sorted(values)[(len(values) - 1) // 2]


@dataclass
class Size:
    """What is known of one size: its last relative times and the steps that they were measured in."""

    last: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    when: deque[int] = field(default_factory=lambda: deque(maxlen=KEPT))
    median: float = 0.0
    steady: bool = False  # known by other than first steps

    def keep(self, relative: float, step: int) -> None:
        """Take a measurement, forget the old ones."""
        self.last.append(relative)
        self.when.append(step)
        while self.when[0] <= step - RECENT:
            self.last.popleft()
            self.when.popleft()
        self.median = median(self.last)


class StepTimes:
    """Seconds of an evaluation by its number of tokens: what a size takes relative to the others, times the pace.

    The pace follows every step: a busy machine, and to a part a longer context, slows all sizes alike, so that a size
    measured long ago stays comparable. A relative time is a median of the last few, drawn a little towards the line
    between its neighbours, the more the fewer there are; what was never measured lies on the line.
    The first step of another size than the one before counts only until better is known: llama.cpp builds a new graph
    for it. `slope`: what a further token is believed to cost before two sizes are known, in plain steps.
    """

    def __init__(self, slope: float = PRIOR_SLOPE) -> None:
        self._slope = slope
        self._pace = 0.0  # seconds of one unit
        self._of: dict[int, Size] = {}  # by tokens
        self._sizes: list[int] = []  # the measured ones, ascending
        self._extra: deque[float] = deque(maxlen=KEPT)  # what first steps took beyond the others, relative
        self._previous, self._step = -1, 0  # the last size, and how many steps there were

    def count(self, tokens: int) -> int:
        """Return how many measurements of this size count."""
        return len(self._of[tokens].last) if tokens in self._of else 0

    def largest(self) -> int:
        """Return the largest size that is known, 0 before the first measurement."""
        return self._sizes[-1] if self._sizes else 0

    def begin(self) -> None:
        """Start a generation: the next step is a first one."""
        self._previous = -1

    def switch(self) -> float:
        """Return the seconds that the first step of another size takes beyond those that follow."""
        return self._pace * max(0.0, median(self._extra)) if self._extra else 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Learn from one evaluation; outliers are outvoted."""
        first, self._previous = tokens != self._previous, tokens
        self._step += 1
        seconds = max(seconds, CLOCK)
        self._pace = self._pace or seconds
        relative = seconds / self._pace
        if tokens not in self._of:
            self._of[tokens] = Size()
            insort(self._sizes, tokens)
        size = self._of[tokens]
        if size.steady:
            if first:
                self._extra.append(relative - size.median)
                return
            surprise = relative / size.median
            self._pace *= min(max(surprise, 1 / LEAP), LEAP) ** FOLLOW
        elif not first:
            self._extra.append(size.last[-1] - relative)
            size = self._of[tokens] = Size(steady=True)
        size.keep(relative, self._step)
        self._forget()

    def _forget(self) -> None:
        """Forget the sizes, but the smallest, that were not measured of late."""
        for tokens in self._sizes[1:]:
            if self._of[tokens].when[-1] <= self._step - RECENT:
                self._sizes.remove(tokens)
                del self._of[tokens]

    def predict(self, tokens: int) -> float:
        """Return the expected seconds of one size; 0 before the first measurement."""
        if not self._sizes:
            return 0.0
        known = self._of.get(tokens)
        smaller, larger = bisect_left(self._sizes, tokens) - 1, bisect(self._sizes, tokens)
        if smaller < 0 or larger == len(self._sizes):
            return self._pace * (known.median if known else self._beyond(tokens))
        line = self._line(self._sizes[smaller], self._sizes[larger], tokens)
        if known is None:
            return self._pace * line
        count = len(known.last)
        return self._pace * (count * known.median + PRIOR_WEIGHT * line) / (count + PRIOR_WEIGHT)

    def _line(self, low: int, high: int, tokens: int) -> float:
        """Return the relative time on the line through two measured sizes."""
        slope = (self._of[high].median - self._of[low].median) / (high - low)
        return self._of[low].median + slope * (tokens - low)

    def _beyond(self, tokens: int) -> float:
        """Return the relative time of a size beyond the measured ones, where the time is a line.

        A part of the tokens never costs less than its share: one step of n tokens is no slower than n of one.
        """
        first, last = self._sizes[0], self._sizes[-1]
        if first == last:
            slope = self._slope * self._of[first].median / (1 + self._slope * (first - 1))
        else:
            slope = max(0.0, (self._of[last].median - self._of[first].median) / (last - first))
        end = first if tokens < first else last
        known = self._of[end].median
        line = known + slope * (tokens - end)
        return max(line, known * tokens / end) if tokens < end else line


class Acceptance:
    """How often the i-th token of a draft is right when those before it were, with old drafts forgotten.

    The same counts how often a source gives an i-th token when it gave those before it (`first` = `lean` = 1).
    """

    def __init__(self, positions: int, first: float = PRIOR_RATE, lean: float = POSITION_WEIGHT) -> None:
        self._first, self._lean = first, lean  # the rate before any measurement; weight of the position before
        self._keep = 1.0 - 1.0 / MEMORY
        self._tried = [0.0] * positions
        self._right = [0.0] * positions
        self._prior = PRIOR_WEIGHT  # forgotten like all evidence

    def add(self, reached: int, accepted: int) -> None:
        """Learn from a draft of depth `reached` whose first `accepted` tokens were right."""
        self._prior *= self._keep
        for position in range(min(reached, accepted + 1, len(self._tried))):
            self._tried[position] = self._tried[position] * self._keep + 1.0
            self._right[position] = self._right[position] * self._keep + (position < accepted)

    def rates(self) -> list[float]:
        """Return the conditional acceptance of every position (from 0), each shrunk towards the position before."""
        expected, weight, rates = self._first, self._prior, []
        for right, tried in zip(self._right, self._tried, strict=True):
            expected = (right + weight * expected) / (tried + weight)
            rates.append(expected)
            weight = self._lean
        return rates

    def forget(self) -> None:
        """Make the past count for less, so that a fresh trial can change the estimate quickly."""
        for counts in (self._tried, self._right):
            counts[:] = [0.2 * count for count in counts]
        self._prior = PRIOR_WEIGHT


class TreeGain:
    """Tokens that a step with a tree gives, by the size of the tree.

    Before a size is measured it is believed to give what a good tree would: at every level, half of the misses of a
    chain are right in a sibling. So a tree is tried where this could pay, and only there.
    """

    def __init__(self) -> None:
        self._sum: dict[int, float] = {}
        self._seen: dict[int, float] = {}
        self._levels: dict[int, int] = {}  # of the last tree of each size
        self._nodes: dict[int, int] = {}

    def seen(self, size: int) -> float:
        """Return how many trees of this size were verified; old ones count for less."""
        return self._seen.get(size, 0.0)

    def nodes(self, plan: Plan) -> Plan:
        """Return the plan with as many nodes as the last tree had that was asked for with it."""
        return Plan(self._nodes.get(plan.nodes, plan.nodes), True)

    def add(self, size: int, levels: int, nodes: int, tokens: int) -> None:
        """Learn that a tree of at most `size` nodes had `nodes` nodes in `levels` levels and gave `tokens` tokens."""
        self._sum[size] = self._sum.get(size, 0.0) + tokens
        self._seen[size] = self._seen.get(size, 0.0) + 1.0
        self._levels[size], self._nodes[size] = levels, nodes

    def fade(self) -> None:
        """Let one drafted step pass."""
        for counts in (self._sum, self._seen):
            for size in counts:
                counts[size] *= 1.0 - 1.0 / RECENT

    def expected(self, size: int, rates: list[float]) -> float:
        """Return the mean number of tokens of a step, given the chain's acceptance by position."""
        tokens, product = 1.0, 1.0
        for rate in rates[: self._levels.get(size, usual_levels(size))]:
            product *= rate + 0.5 * (1.0 - rate) * rate
            tokens += product
        return (self._sum.get(size, 0.0) + PRIOR_WEIGHT * tokens) / (self._seen.get(size, 0.0) + PRIOR_WEIGHT)


class Source:
    """One source of drafts: how long drafting takes, how many nodes it gives of those asked, how many are right."""

    def __init__(self, max_nodes: int) -> None:
        self.acceptance = Acceptance(max_nodes)
        self.given = Acceptance(max_nodes, first=1.0, lean=1.0)  # nodes of a chain
        self.trees = TreeGain()
        self.drafting = {False: StepTimes(), True: StepTimes()}  # by nodes given, of chains and of trees
        self.weight = 0.0  # drafts from here; old ones count for less

    def learn(self, plan: Plan, step: Step) -> None:
        """Learn from a closed step whose draft came from here."""
        self.drafting[plan.tree].add(step.nodes, step.draft_seconds)
        if not plan.tree:
            self.given.add(step.asked, step.nodes)
        if step.complete and plan.tree:
            self.trees.add(plan.nodes, step.draft.levels, step.nodes, 1 + step.accepted)
        elif step.complete:
            self.acceptance.add(step.nodes, step.accepted)

    def expected(self, times: StepTimes, plans: Sequence[Plan]) -> list[tuple[float, float]]:
        """Return the expected tokens and seconds of a step with each plan; chains come first, the shortest first."""
        rates, given = self.acceptance.rates(), self.given.rates()
        tokens, shorter, reach, right, n = 1.0, 0.0, 1.0, 1.0, 0
        found = []
        for plan in plans:
            if plan.tree:
                found.append((self.trees.expected(plan.nodes, rates), self._seconds(times, self.trees.nodes(plan))))
                continue
            while n < plan.nodes:
                if n and given[n] < 1.0:  # drafts that end here
                    shorter += reach * (1.0 - given[n]) * self._seconds(times, Plan(n))
                    reach *= given[n]
                right *= rates[n]
                tokens += reach * right
                n += 1
            found.append((tokens, shorter + reach * self._seconds(times, plan)))
        return found

    def nothing(self, times: StepTimes) -> tuple[float, float]:
        """Return the same where nothing was proposed, whatever the plan."""
        return 1.0, self._seconds(times, Plan())

    def _seconds(self, times: StepTimes, plan: Plan) -> float:
        """Return the expected seconds of drafting and verifying; a tree never drawn is taken for a chain of four."""
        drafting = self.drafting[plan.tree].predict(plan.nodes)
        if plan.tree and not drafting:
            drafting = self.drafting[False].predict(4)
        return drafting + times.predict(1 + plan.nodes)


class Sources:
    """The sources of drafts by name, each with its share of the last drafts.

    A `Combination` has several. Proposals of nothing are a source of their own, None: they cost time, too.
    """

    def __init__(self, max_nodes: int) -> None:
        self._max_nodes = max_nodes
        self._of: dict[str | None, Source] = {}
        self._unknown = Source(max_nodes)  # what is believed before the first draft

    def learn(self, plan: Plan, step: Step) -> None:
        """Learn from a closed step that asked for a draft."""
        name = step.draft.source if step.nodes else None
        if name not in self._of:
            self._of[name] = Source(self._max_nodes)
        for source in self._of.values():
            source.weight *= 1.0 - 1.0 / MEMORY
            source.trees.fade()
        self._of[name].weight += 1.0
        self._of[name].learn(plan, step)

    def expected(self, times: StepTimes, plans: Sequence[Plan]) -> list[tuple[float, float]]:
        """Return the expected tokens and seconds of a step with each plan, over all sources."""
        sources = self._of or {"": self._unknown}
        total = sum(source.weight for source in sources.values()) or 1.0
        sums = [(0.0, 0.0)] * len(plans)
        for name, source in sources.items():
            share = source.weight / total if self._of else 1.0
            each = source.expected(times, plans) if name is not None else [source.nothing(times)] * len(plans)
            sums = [(a + share * b, c + share * d) for (a, c), (b, d) in zip(sums, each, strict=True)]
        return sums

    def trees_seen(self, size: int) -> float:
        """Return how many trees of this size were verified; old ones count for less."""
        return sum(source.trees.seen(size) for source in self._of.values())

    def forget(self) -> None:
        """Make what is known of the acceptance count for less."""
        for source in self._of.values():
            source.acceptance.forget()


def usual_levels(size: int) -> int:
    """Return how deep a tree of `size` nodes usually is: 3 levels for 8 nodes, 5 for 31."""
    return (size + 1).bit_length() - 1
