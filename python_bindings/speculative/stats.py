"""Statistics of one generation: what was drafted, what was accepted, where the time went.

    >>> from blockffn.speculative.draft import Draft, Plan, Step
    >>> from blockffn.speculative.stats import Statistics
    >>> stats = Statistics()
    >>> stats.add(Step(Plan(3), 3, Draft.chain([7, 8, 9]), path=[0, 1], tokens=3))
    >>> stats.as_dict()["accepted_by_position"], stats.as_dict()["tokens_per_step"]
    ([1, 1, 0], 3.0)

Names of llama.cpp's own timings are kept where they exist: prompt_n, prompt_ms, predicted_n, predicted_ms,
predicted_per_second, draft_n, draft_n_accepted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from blockffn.speculative.draft import Step


@dataclass
class Statistics:
    """Counters and seconds of one generation: sums over its closed steps."""

    steps: int = 0  # evaluations of the target after the prompt
    plain_steps: int = 0  # of these without a draft
    tree_steps: int = 0  # of these with a tree
    prompt_n: int = 0  # prompt tokens evaluated
    reused_n: int = 0  # prompt tokens found in the cache
    predicted_n: int = 0
    drafted: int = 0  # nodes verified
    accepted: int = 0
    drafted_by_position: list[int] = field(default_factory=list)  # steps whose draft reached depth i + 1
    accepted_by_position: list[int] = field(default_factory=list)
    accepted_by_step: list[int] = field(default_factory=list)  # in the order of the steps; not in `as_dict`
    steps_by_size: Counter[int] = field(default_factory=Counter)  # tokens in the batch -> steps
    seconds_by_size: dict[int, float] = field(default_factory=dict)  # tokens in the batch -> seconds of evaluation
    union_by_size: dict[int, float] = field(default_factory=dict)  # tokens in the batch -> experts read, summed
    steps_by_source: Counter[str] = field(default_factory=Counter)  # drafter -> drafts verified
    prompt_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    sample_seconds: float = 0.0
    loop_seconds: float = 0.0  # everything else inside the loop
    switched_off: int = 0
    switched_off_reason: str = ""  # of the last time

    def add(self, step: Step) -> None:
        """Count a closed step."""
        self.predicted_n += step.tokens
        self.draft_seconds += step.draft_seconds
        self.verify_seconds += step.verify_seconds
        self.sample_seconds += step.sample_seconds
        self.loop_seconds += step.loop_seconds
        if step.plan is None:
            return
        draft, nodes, accepted = step.draft, step.nodes, step.accepted
        size = 1 + nodes
        self.steps += 1
        self.plain_steps += nodes == 0
        self.tree_steps += not draft.is_chain
        self.drafted += nodes
        self.accepted += accepted
        self.accepted_by_step.append(accepted)
        if nodes:
            levels = draft.levels
            _count(self.drafted_by_position, levels, levels)
            _count(self.accepted_by_position, accepted, levels)
        self.steps_by_size[size] += 1
        self.seconds_by_size[size] = self.seconds_by_size.get(size, 0.0) + step.verify_seconds
        if step.union is not None:
            self.union_by_size[size] = self.union_by_size.get(size, 0.0) + step.union
        if nodes and draft.source:
            self.steps_by_source[draft.source] += 1

    @property
    def predicted_seconds(self) -> float:
        """Seconds of generation, the prompt and the caller's own time left out."""
        return self.draft_seconds + self.verify_seconds + self.sample_seconds + self.loop_seconds

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and dictionaries; times in milliseconds."""
        seconds = self.predicted_seconds
        sizes = sorted(self.steps_by_size)
        return {
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance": self.accepted / self.drafted if self.drafted else None,
            "drafted_by_position": list(self.drafted_by_position),
            "accepted_by_position": list(self.accepted_by_position),
            "steps": self.steps,
            "plain_steps": self.plain_steps,
            "tree_steps": self.tree_steps,
            "tokens_per_step": (self.steps + self.accepted) / self.steps if self.steps else None,
            "steps_by_size": {size: self.steps_by_size[size] for size in sizes},
            "verify_ms_by_size": {size: 1e3 * self.seconds_by_size[size] / self.steps_by_size[size] for size in sizes},
            "union_by_size": {
                size: self.union_by_size[size] / self.steps_by_size[size]
                for size in sizes
                if size in self.union_by_size
            },
            "steps_by_source": dict(self.steps_by_source),
            "switched_off": self.switched_off,
            "switched_off_reason": self.switched_off_reason,
            "draft_ms": 1e3 * self.draft_seconds,
            "verify_ms": 1e3 * self.verify_seconds,
            "sample_ms": 1e3 * self.sample_seconds,
            "loop_ms": 1e3 * self.loop_seconds,
            "prompt_n": self.prompt_n,
            "reused_n": self.reused_n,
            "prompt_ms": 1e3 * self.prompt_seconds,
            "predicted_n": self.predicted_n,
            "predicted_ms": 1e3 * seconds,
            "predicted_per_second": self.predicted_n / seconds if seconds > 0 else None,
            "draft_n": self.drafted,
            "draft_n_accepted": self.accepted,
        }


def _count(counts: list[int], reached: int, length: int) -> None:
    """Add 1 to the first `reached` counts, of which there are at least `length` then."""
    counts.extend([0] * (length - len(counts)))
    for position in range(reached):
        counts[position] += 1
