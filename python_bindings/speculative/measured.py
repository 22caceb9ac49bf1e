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

import math
from bisect import bisect, bisect_left, insort
from collections import deque
from dataclasses import dataclass, field

KEPT = 30  # measurements of one size that count,
RECENT = 200  # if they are not older than so many steps: a longer context slows large steps more than small ones
BLEND = 2.0  # how many measurements the line between the neighbouring sizes counts for
CLOCK = 1e-9  # seconds; nothing takes less
FOLLOW, LEAP = 0.6, 1.05  # share of a step's surprise that is put down to the machine; what counts of it at most: what
# disturbs a step makes it longer, never shorter, and the pace would creep up with every outlier
PRIOR_SLOPE = 0.2  # before any measurement: each further token costs this part of a plain step
PRIOR_RATE, PRIOR_WEIGHT = 0.6, 2.0  # acceptance before any measurement, and how many observations it counts for
MEMORY = 24.0  # drafts after which evidence about a position counts for a third: luck comes in bursts
POSITION_WEIGHT = 20.0  # how many observations the position before counts for
TREE_WEIGHT = 2.0  # the same for the tokens that a tree gives
TREE_MEMORY = 400.0  # drafted steps after which evidence about trees counts for a third


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
    for it.
    """

    def __init__(self) -> None:
        self._pace = 0.0  # seconds of one unit
        self._of: dict[int, Size] = {}  # by tokens
        self._sizes: list[int] = []  # the measured ones, ascending
        self._extra: deque[float] = deque(maxlen=KEPT)  # what first steps took beyond the others, relative
        self._previous, self._step = 0, 0  # the last size, and how many steps there were

    def count(self, tokens: int) -> int:
        """Return how many measurements of this size count."""
        return len(self._of[tokens].last) if tokens in self._of else 0

    def begin(self) -> None:
        """Start a generation: the next step is a first one."""
        self._previous = 0

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
        return self._pace * (count * known.median + BLEND * line) / (count + BLEND)

    def _line(self, low: int, high: int, tokens: int) -> float:
        """Return the relative time on the line through two measured sizes."""
        slope = (self._of[high].median - self._of[low].median) / (high - low)
        return self._of[low].median + slope * (tokens - low)

    def _beyond(self, tokens: int) -> float:
        """Return the relative time of a size beyond the measured ones, where the time is a line."""
        first, last = self._sizes[0], self._sizes[-1]
        if first == last:
            slope = PRIOR_SLOPE * self._of[first].median / (1 + PRIOR_SLOPE * (first - 1))
        else:
            slope = max(0.0, (self._of[last].median - self._of[first].median) / (last - first))
        end = first if tokens < first else last
        return max(0.0, self._of[end].median + slope * (tokens - end))


class Acceptance:
    """How often the i-th token of a draft is right when those before it were, with old steps forgotten."""

    def __init__(self, positions: int, memory: float = MEMORY) -> None:
        self._keep = 1.0 - 1.0 / memory
        self._tried = [0.0] * positions
        self._right = [0.0] * positions
        self._prior = PRIOR_WEIGHT  # forgotten like all evidence

    def add(self, reached: int, accepted: int) -> None:
        """Learn from a draft of depth `reached` whose first `accepted` tokens were right."""
        self._prior *= self._keep
        for position in range(min(reached, accepted + 1, len(self._tried))):
            self._tried[position] = self._tried[position] * self._keep + 1.0
            self._right[position] = self._right[position] * self._keep + (position < accepted)

    def rate(self, position: int) -> float:
        """Return the conditional acceptance at `position` (from 0)."""
        return self.rates()[position]

    def rates(self, hope: float = 0.0) -> list[float]:
        """Return the conditional acceptance of every position, each shrunk towards that of the position before.

        `hope`: so many standard errors above the mean.
        """
        expected, weight, rates, total = PRIOR_RATE, self._prior, [], sum(self._tried)
        for right, tried in zip(self._right, self._tried, strict=True):
            expected = (right + weight * expected) / (tried + weight)
            error = math.sqrt(expected * (1.0 - expected) / (total + weight)) if hope else 0.0
            rates.append(min(1.0, expected + hope * error))
            weight = POSITION_WEIGHT
        return rates

    def forget(self) -> None:
        """Make the past count for less, so that a fresh trial can change the mind quickly."""
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

    def hoped(self, size: int, rates: list[float]) -> float:
        """Return the same, but all its levels for a tree that was hardly seen: worth a trial where even so it pays."""
        return self.expected(size, rates) if self.seen(size) >= TREE_WEIGHT else 1.0 + usual_levels(size)

    def seen(self, size: int) -> float:
        """Return how many trees of this size were verified; old ones count for less."""
        return self._seen.get(size, 0.0)

    def add(self, size: int, levels: int, tokens: int) -> None:
        """Learn that a tree of `size` nodes and `levels` levels gave `tokens` tokens."""
        self._sum[size] = self._sum.get(size, 0.0) + tokens
        self._seen[size] = self._seen.get(size, 0.0) + 1.0
        self._levels[size] = levels

    def fade(self) -> None:
        """Let one drafted step pass."""
        for counts in (self._sum, self._seen):
            for size in counts:
                counts[size] *= 1.0 - 1.0 / TREE_MEMORY

    def expected(self, size: int, rates: list[float]) -> float:
        """Return the mean number of tokens of a step, given the chain's acceptance by position."""
        tokens, product = 1.0, 1.0
        for rate in rates[: self._levels.get(size, usual_levels(size))]:
            product *= rate + 0.5 * (1.0 - rate) * rate
            tokens += product
        return (self._sum.get(size, 0.0) + TREE_WEIGHT * tokens) / (self._seen.get(size, 0.0) + TREE_WEIGHT)


def usual_levels(size: int) -> int:
    """Return how deep a tree of `size` nodes usually is: 3 levels for 8 nodes, 5 for 31."""
    return (size + 1).bit_length() - 1
