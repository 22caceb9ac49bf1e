"""A text on its way through the engine (`Job`), and a place in the cache that serves one at a time (`Slot`)."""

from __future__ import annotations

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
    limit: int  # tokens to generate at most
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
    reused: int = 0

    def __lt__(self, other: Job) -> bool:
        """Order by arrival."""
        return self.stream.number < other.stream.number

    def walk(self, step: Step, logits: Floats, number: int) -> str | None:
        """Take the tokens of one evaluation, logits float32 [1 + nodes, n_vocab]; return why the text ends, or None.

        The draft is a chain; the walk goes on while it holds the token that is sampled, and counts in `step.path`.
        """
        draft, path, out = step.draft.tokens.tolist(), step.path, []
        params, ends = self.stream.params, None
        while ends is None:
            row = logits[len(path)]
            began = perf_counter()
            token = self._greedy(row) if self.sampler is None else self.sampler.sample(self.text.n, row)
            step.sample_seconds += perf_counter() - began
            step.tokens += 1
            accepted = len(path) < len(draft) and token == draft[len(path)]
            ended = not params.ignore_eos and self.is_end(token)
            rest = self.pieces.finish() if ended else self.pieces.add(self.piece(token))
            if ended:
                ends = "stop"
            else:
                self.text.append((token,))
                ends = self._ends()
                if ends == "length":
                    rest += self.pieces.finish()
            source = "draft" if accepted else "verified" if draft else "plain"
            if rest or not ended:
                logprob, top = _log_probabilities(row, token, params.logprobs)
                out.append(Token(token, rest, logprob, top, source, number))
            step.complete = not accepted
            if not accepted:
                break
            if ends is None:
                path.append(len(path))
        self.statistics.add(step)
        self.stream.put(out, None)
        return ends

    def _greedy(self, row: Floats) -> int:
        """Return the most likely token; where the text goes on past its end, of those that do not end it."""
        token = int(row.argmax())
        while self.stream.params.ignore_eos and self.is_end(token):
            row = row.copy()
            row[token] = -np.inf
            token = int(row.argmax())
        return token

    def _ends(self) -> str | None:
        """Return why the text ends with its last token, if it does."""
        if self.pieces.stopped:
            return "stop"
        return "length" if self.generated >= self.limit or self.text.room < 0 else None

    @property
    def generated(self) -> int:
        """How many tokens were generated."""
        return self.text.n - len(self.stream.prompt)

    def summary(self) -> dict[str, Any]:
        """Return the figures of the stream."""
        queued = (self.started or perf_counter()) - self.submitted
        return self.statistics.as_dict() | {"queue_ms": 1e3 * queued, "preempted": self.preempted}


def _log_probabilities(
    row: Floats, token: int, count: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...] | None]:
    """Return the log-probability of a token and the `count` largest, of the model's own distribution."""
    if count is None:
        return None, None
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
