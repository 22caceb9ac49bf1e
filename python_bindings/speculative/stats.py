"""Statistics of one generation: what was drafted, what was accepted, where the time went.

    >>> from blockffn.speculative.stats import Statistics
    >>> stats = Statistics()
    >>> stats.add_step(drafted=3, accepted=2, chain=True)
    >>> stats.as_dict()["accepted_by_position"], stats.as_dict()["tokens_per_step"]
    ([1, 1, 0], 3.0)

Names of llama.cpp's own timings are kept where they exist: prompt_n, prompt_ms, predicted_n, predicted_ms,
predicted_per_second, draft_n, draft_n_accepted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Statistics:
    """Counters and seconds of one generation."""

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
    steps_by_size: dict[int, int] = field(default_factory=dict)  # tokens in the batch -> steps
    seconds_by_size: dict[int, float] = field(default_factory=dict)  # tokens in the batch -> seconds of evaluation
    union_by_size: dict[int, float] = field(default_factory=dict)  # tokens in the batch -> experts read, summed
    steps_by_source: dict[str, int] = field(default_factory=dict)  # drafter -> drafts verified
    prompt_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    sample_seconds: float = 0.0
    loop_seconds: float = 0.0  # everything else inside the loop
    switched_off: int = 0
    switched_off_reason: str = ""  # of the last time

    def add_step(self, drafted: int, accepted: int, chain: bool, depth: int = 0, source: str = "") -> None:
        """Count one step that verified `drafted` nodes (of a tree of `depth`) and accepted the first `accepted`."""
        self.steps += 1
        self.plain_steps += drafted == 0
        self.tree_steps += drafted > 0 and not chain
        self.drafted += drafted
        self.accepted += accepted
        reached = drafted if chain else depth
        for counts in (self.drafted_by_position, self.accepted_by_position):
            counts.extend([0] * (reached - len(counts)))
        for position in range(reached):
            self.drafted_by_position[position] += 1
        for position in range(accepted):
            self.accepted_by_position[position] += 1
        if drafted and source:
            self.steps_by_source[source] = self.steps_by_source.get(source, 0) + 1

    def add_evaluation(self, tokens: int, seconds: float, union: float | None) -> None:
        """Count the evaluation of a batch of `tokens`, with the mean number of experts read per layer if known."""
        self.verify_seconds += seconds
        self.steps_by_size[tokens] = self.steps_by_size.get(tokens, 0) + 1
        self.seconds_by_size[tokens] = self.seconds_by_size.get(tokens, 0.0) + seconds
        if union is not None:
            self.union_by_size[tokens] = self.union_by_size.get(tokens, 0.0) + union

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
