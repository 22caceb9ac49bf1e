"""What one request, and all of them together, may take: `Limits`, every value a flag of `blockffn serve`.

>>> from blockffn.server.limits import Limits
>>> Limits(parallel=2, queue=3).streams
5
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on requests. Sizes of prompts are bounded by the context besides."""

    parallel: int = 8  # answers that are generated at the same time
    queue: int = 64  # answers that wait for their turn; the next ones get status 429
    body_bytes: int = 4 << 20
    body_seconds: float = 30.0  # for a request to arrive whole
    prompts: int = 32  # texts in one request
    n: int = 8  # answers per prompt
    max_tokens: int | None = None  # per answer; None: what the context holds
    seconds: float = 600.0  # per answer; what there is by then is the answer, with finish_reason "length"
    stop_seconds: float = 10.0  # for running answers to end after SIGTERM
    connections: int = 1024
    stops: int = 16
    biases: int = 1024
    schema_bytes: int = 64 << 10  # of one JSON schema, as text
    grammar_bytes: int = 1 << 20  # of the grammar made from it
    tools: int = 128

    @property
    def streams(self) -> int:
        """Answers that are generated or wait."""
        return self.parallel + self.queue
