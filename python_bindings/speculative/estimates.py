"""What the choice of a draft is based on, learned while generating, with slow forgetting.

`StepTimes`: the time of an evaluation by its number of tokens. `Acceptance`: how often the i-th drafted token is right,
given that those before it were. `TreeGain`: how many tokens a tree of some size gives.

    >>> from blockffn.speculative.estimates import Acceptance, StepTimes
    >>> times = StepTimes()
    >>> for tokens, seconds in ((1, 0.010), (4, 0.016)):
    ...     times.add(tokens, seconds)
    >>> round(times.predict(2), 4)
    0.012
    >>> acceptance = Acceptance(2)
    >>> for _ in range(9):
    ...     acceptance.add(reached=2, accepted=2)
    >>> [round(rate, 2) for rate in acceptance.rates()]
    [0.9, 0.97]
"""

from __future__ import annotations

from bisect import bisect, insort
from collections import deque

KEPT = 9  # measurements of one size that count
PRIOR_SLOPE = 0.2  # before any measurement: each further token costs this part of a plain step
PRIOR_RATE, PRIOR_WEIGHT = 0.6, 3.0  # acceptance before any measurement, and how many observations it counts for
POSITION_WEIGHT = 8.0  # how many observations the position before counts for
TREE_WEIGHT = 2.0  # the same for the tokens that a tree gives
TREE_MEMORY = 400.0  # drafted steps after which evidence about trees counts for a third


class StepTimes:
    """Seconds of an evaluation by its number of tokens: medians of the last few, interpolated between sizes seen."""

    def __init__(self) -> None:
        self._last: dict[int, deque[float]] = {}
        self._median: dict[int, float] = {}
        self._sizes: list[int] = []  # measured ones, ascending
        self._count: dict[int, int] = {}

    def count(self, tokens: int) -> int:
        """Return how often this size was measured."""
        return self._count.get(tokens, 0)

    def add(self, tokens: int, seconds: float) -> None:
        """Learn from one evaluation; outliers are outvoted."""
        if tokens not in self._last:
            self._last[tokens] = deque(maxlen=KEPT)
            insort(self._sizes, tokens)
        last = self._last[tokens]
        last.append(seconds)
        self._median[tokens] = sorted(last)[(len(last) - 1) // 2]
        self._count[tokens] = self._count.get(tokens, 0) + 1

    def predict(self, tokens: int) -> float:
        """Return the expected seconds of one size; 0 before the first measurement."""
        if not self._median:
            return 0.0
        known = self._median.get(tokens)
        return self._between(tokens) if known is None else known

    def table(self, longest: int) -> list[float]:
        """Return the expected seconds of the sizes 1 to `longest`."""
        return [self.predict(tokens) for tokens in range(1, longest + 1)]

    def _between(self, tokens: int) -> float:
        """Interpolate between the measured sizes; beyond them the time is a line."""
        at = bisect(self._sizes, tokens)
        if 0 < at < len(self._sizes):
            low, high = self._sizes[at - 1], self._sizes[at]
            part = (tokens - low) / (high - low)
            return self._median[low] + part * (self._median[high] - self._median[low])
        first, last = self._sizes[0], self._sizes[-1]
        if first == last:
            slope = PRIOR_SLOPE * self._median[first] / (1 + PRIOR_SLOPE * (first - 1))
        else:
            slope = max(0.0, (self._median[last] - self._median[first]) / (last - first))
        end = last if at else first
        return max(0.0, self._median[end] + slope * (tokens - end))


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

    @property
    def tried(self) -> float:
        """How many drafts the first rate rests on; old ones count for less."""
        return self._tried[0]

    def rate(self, position: int) -> float:
        """Return the conditional acceptance at `position` (from 0)."""
        return self.rates()[position]

    def rates(self) -> list[float]:
        """Return the conditional acceptance of every position, each shrunk towards that of the position before."""
        expected, weight, rates = PRIOR_RATE, PRIOR_WEIGHT, []
        for right, tried in zip(self._right, self._tried, strict=True):
            expected = (right + weight * expected) / (tried + weight)
            weight = POSITION_WEIGHT
            rates.append(expected)
        return rates

    def forget(self) -> None:
        """Make the past count for little, so that a fresh trial can change the mind quickly."""
        for counts in (self._tried, self._right):
            counts[:] = [count * 0.2 for count in counts]


class TreeGain:
    """Tokens that a step with a tree gives, by the size of the tree.

    Before a size is measured it is believed to give what a good tree would: at every level, half of the misses of a
    chain are right in a sibling. So a tree is tried where this could pay, and only there.
    """

    def __init__(self) -> None:
        self._sum: dict[int, float] = {}
        self._seen: dict[int, float] = {}
        self._levels: dict[int, int] = {}  # of the last tree of each size

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
