"""How many tokens each text drafts in a step that all of them share.

A drafted token is worth the probability that it is accepted: the product of the acceptance rates up to its place, of
its own text. The most valuable ones of all texts are taken, as many as give the most tokens per second: the time of a
step is measured by all its tokens, so that it contains what the experts' union of all texts costs. Where many texts
fill the batch already, further tokens cost more than they give, and none is drafted.

    >>> from blockffn.engine.budget import Budget
    >>> budget = Budget(longest=4)
    >>> for _ in range(3):
    ...     budget.learn_step(1, 0.010, 0, 0.0)
    >>> record = budget.record()
    >>> for _ in range(9):
    ...     record.add(asked=2, drafted=2, accepted=2)
    >>> budget.plan([record])
    [4]
"""

from __future__ import annotations

from collections.abc import Sequence

from blockffn.speculative.measured import Acceptance, StepTimes

SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)  # drafted tokens of a step, compared
HOLD = 8  # steps with one plan between two comparisons
ADVANTAGE = 1.03  # what drafts must promise over none
FIRST_PAUSE, LONGEST_PAUSE = 32, 2048  # steps without drafts before a trial, doubled after each that was lost
TRIAL = 3  # steps of a trial, of one token each


class Record:
    """What is known of the drafts of one text."""

    def __init__(self, longest: int, first: float) -> None:
        self.acceptance = Acceptance(longest, first)
        self.pause, self.silent, self.trial = FIRST_PAUSE, 0, 0

    def add(self, asked: int, drafted: int, accepted: int) -> None:
        """Learn from a step: so many tokens were asked for, drafted and accepted. None drafted counts for nothing."""
        if drafted:
            self.acceptance.add(drafted, accepted)

    def values(self, longest: int) -> list[float]:
        """Return what each drafted token is worth: the probability that it is accepted."""
        value, values = 1.0, []
        for rate in self.acceptance.rates()[:longest]:
            value *= rate
            values.append(value)
        return values


class Budget:
    """Distributes the drafts of a step. fixed: so many for every text, always."""

    def __init__(self, longest: int, fixed: int | None = None) -> None:
        self.longest, self.fixed = longest, fixed
        self.times, self.drafting = StepTimes(), StepTimes()
        self._all = Acceptance(longest)  # of all texts: where a new one begins
        self._plan: list[int] = []
        self._for: list[Record] = []
        self._hold = 0

    def record(self) -> Record:
        """Return the record of a new text."""
        return Record(self.longest, self._all.rates()[0] if self.longest else 0.0)

    def plan(self, records: Sequence[Record]) -> list[int]:
        """Return how many tokens each of these texts drafts in the next step."""
        if self.fixed is not None:
            return [self.fixed] * len(records)
        self._hold -= 1
        if self._hold <= 0 or self._for != list(records):
            self._plan, self._for, self._hold = self._choose(records), list(records), HOLD
        return [max(n, _trial(record)) if not n else n for n, record in zip(self._plan, records, strict=True)]

    def _choose(self, records: Sequence[Record]) -> list[int]:
        """Compare the sizes; return the best distribution."""
        n = len(records)
        if not self.times.predict(n):
            return [0] * n  # the time of a step without drafts comes first
        values = sorted(
            ((value, i) for i, record in enumerate(records) for value in record.values(self.longest)), reverse=True
        )
        best, rate, total, taken = 0, ADVANTAGE * n / self.times.predict(n), float(n), 0
        for size in (size for size in SIZES if size <= len(values)):
            total += sum(value for value, _ in values[taken:size])
            taken = size
            promised = total / (self.times.predict(n + size) + self.drafting.predict(size))
            if promised > rate:
                best, rate = size, promised
        plan = [0] * n
        for _, i in values[:best]:
            plan[i] += 1
        return plan

    def learn_step(self, tokens: int, seconds: float, asked: int, drafting: float) -> None:
        """Learn what a step took: `tokens` evaluated in `seconds`, `asked` drafted ones beforehand."""
        self.times.add(tokens, seconds)
        if asked:
            self.drafting.add(asked, drafting)

    def learn_draft(self, record: Record, asked: int, drafted: int, accepted: int) -> None:
        """Learn what became of the draft of one text."""
        if drafted:
            self._all.add(drafted, accepted)
        record.add(asked, drafted, accepted)
        if accepted:
            record.pause = FIRST_PAUSE


def _trial(record: Record) -> int:
    """Return 1 for a few steps after a pause, so that a text whose drafts have become good is noticed."""
    record.silent += 1
    if record.silent <= record.pause:
        return 0
    record.trial += 1
    if record.trial == TRIAL:
        record.silent, record.trial, record.pause = 0, 0, min(2 * record.pause, LONGEST_PAUSE)
    return 1
