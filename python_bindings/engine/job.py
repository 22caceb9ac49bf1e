"""A text on its way through the engine (`Job`), and a place in the cache that serves one at a time (`Slot`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from blockffn.engine.budget import Record
from blockffn.engine.params import Token
from blockffn.engine.stream import Stream
from blockffn.engine.text import TextPieces
from blockffn.speculative.decoder import Floats
from blockffn.speculative.draft import Step, Tokens
from blockffn.speculative.drafter import Drafter
from blockffn.speculative.loop import Text
from blockffn.speculative.sampling import Chain, Draw
from blockffn.speculative.stats import Statistics
from blockffn.speculative.tree import log_total, top_k

NOTHING: Tokens = np.empty(0, dtype=np.int32)


@dataclass
class Job:
    """What a stream needs beyond its slot: it survives preemption, so that the text goes on as it would have."""

    stream: Stream
    text: Text  # verified; the last token is not evaluated yet
    longest: int  # tokens of the text at which it ends
    sampler: Chain | None  # None: greedy
    is_end: Any
    piece: Any  # token -> bytes
    pieces: TextPieces
    record: Record
    draw: Draw | None = None  # whose noise drafters share
    statistics: Statistics = field(default_factory=Statistics)
    submitted: float = field(default_factory=perf_counter)
    started: float = 0.0
    preempted: int = 0

    def __lt__(self, other: Job) -> bool:
        """Order by arrival."""
        return self.stream.number < other.stream.number

    def walk(self, step: Step, logits: Floats, best: Sequence[int], number: int) -> str | None:
        """Take the tokens of one evaluation; return why the text ends, or None.

        logits: float32 [1 + nodes, n_vocab]; best: the most likely token of each row. The draft is a chain; the walk
        goes on while it holds the token that is chosen, and counts in `step.path`.
        """
        draft, out, ends, place = step.draft.tokens.tolist(), [], None, -1
        count, accepted = self.stream.params.logprobs, True
        while accepted and ends is None:
            place += 1
            token = self._choose(step, logits[place], best[place])
            accepted = place < len(draft) and token == draft[place]
            text, ends = self._take(token)
            if text is not None:
                logprob, top = (None, None) if count is None else _log_probabilities(logits[place], token, count)
                source = "draft" if accepted else "verified" if draft else "plain"
                out.append(Token(token, text, logprob, top, source, number))
        step.tokens, step.complete = place + 1, not accepted
        step.path = list(range(place))
        self.statistics.add(step)
        self.stream.put(out)
        return ends

    def _choose(self, step: Step, row: Floats, best: int) -> int:
        """Return the next token: the best one, or one that the sampler draws; the draw's seconds count in `step`."""
        if self.sampler is not None:
            began = perf_counter()
            best = self.sampler.sample(self.text.n, row)
            step.sample_seconds += perf_counter() - began
        elif self.stream.params.ignore_eos:
            while self.is_end(best):  # of the tokens that do not end the text
                row = row.copy()
                row[best] = -np.inf
                best = int(row.argmax())
        return best

    def _take(self, token: int) -> tuple[str | None, str | None]:
        """Add a token to the text; return what the answer gains and why it ends, each None where it does not."""
        if not self.stream.params.ignore_eos and self.is_end(token):
            return self.pieces.finish() or None, "stop"
        self.text.add(token)
        gained = self.pieces.add(self.piece(token))
        if self.pieces.stopped:
            return gained, "stop"
        if self.text.n >= self.longest:
            return gained + self.pieces.finish(), "length"
        return gained, None

    def summary(self) -> dict[str, Any]:
        """Return the figures of the stream."""
        queued = (self.started or perf_counter()) - self.submitted
        return self.statistics.as_dict() | {"queue_ms": 1e3 * queued, "preempted": self.preempted}


def _log_probabilities(row: Floats, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return the log-probability of a token and the `count` largest, of the model's own distribution."""
    total = float(log_total(row[None])[0])
    best = top_k(row[None], count)[0].tolist() if count else []
    return float(row[token]) - total, tuple((one, float(row[one]) - total) for one in best)


@dataclass
class Slot:
    """A place in the cache: one sequence, and what it holds. `job` is None while it only remembers an old text."""

    index: int  # the sequence
    held: Tokens = field(default_factory=lambda: NOTHING)  # int32 [cached], positions 0, ...
    cells: list[int] = field(default_factory=list)  # [cached] numbers; texts that share a cell have the same one
    job: Job | None = None
    drafter: Drafter | None = None
    used: int = 0  # number of the step of its last use
    step: Step = field(default_factory=lambda: Step(None))  # with the draft of the next evaluation

    @property
    def cached(self) -> int:
        """How many positions the cache holds."""
        return len(self.held)

    @property
    def waiting(self) -> Tokens:
        """The tokens of the job that are not evaluated yet."""
        assert self.job is not None
        return self.job.text.tokens[self.cached :]
