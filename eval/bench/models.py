"""The same weights run by the union op and densely, in one run: decoding, verification of n tokens, prefill, memory,
and speculative decoding.

    >>> from blockffn.eval.bench.models import Candidate, run
    >>> pair = [Candidate("model-Q4_0.gguf", "union"), Candidate("model-dense-Q4_0.gguf", "dense")]
    >>> rows = run(pair, tokens, threads=2)                            # doctest: +SKIP
    >>> rows[0]["phase"], rows[0]["tokens_per_second"]                 # doctest: +SKIP
    ('decode', 41.3)

Every candidate is loaded in a process of its own (blockffn.eval.bench.worker), so that its peak memory is its own. The
phases of one round run one after another, and within a phase the candidates take turns, in alternating order: whatever
else the machine does meets all of them. Figures are medians over all steps of all rounds; the spread is half the
distance of the quartiles divided by the median.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockffn.eval.bench.process import Channel

VERIFY = (2, 4, 8, 16, 32)
PREFILL = 512
DECODE_STEPS = 32  # one-token steps per round
PAST = 128  # tokens in the cache before decoding and verification
ROUNDS = 7
TOKENS = 48  # generated per text
LONGEST = 512  # text that a worker has room for
LEARNING = 4  # times as many tokens in the warm-up where the plan is chosen automatically

Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A model file and how its FFN runs: "union" or "dense" (a dense-layout file, or all experts of the other).

    draft: None, "ngram", "scripted", or the file of a draft model or EAGLE head; scripted: the tokens of that file's
    drafts are replaced by the true ones with the probability of the phase. trees: may an EAGLE head draft trees?
    """

    path: str
    ffn: str
    draft: str | None = None
    scripted: bool = False
    trees: bool = False

    @property
    def drafter(self) -> str:
        """Name of the drafter in rows and tables: "none", "ngram", "scripted", or the name of the file."""
        if self.draft is None:
            return "none"
        name = Path(self.draft).stem if self.draft.endswith(".gguf") else self.draft
        return f"scripted+{name}" if self.scripted and name != "scripted" else name

    @property
    def label(self) -> str:
        """Short name for tables."""
        return self.ffn if self.drafter == "none" else f"{self.ffn}+{self.drafter}"


@dataclass(frozen=True)
class Phase:
    """What is timed: `steps` evaluations of `n` tokens each, or (with a plan) the generation of `steps` tokens.

    plan: "" for a given text, "plain", "auto", "chain 4", "tree 8" for the model's own. probability: of a scripted
    drafter's first guess.
    """

    name: str  # decode, verify or prefill
    n: int
    steps: int
    plan: str = ""
    probability: float | None = None

    def suits(self, candidate: Candidate) -> bool:
        """Return whether the candidate runs this phase."""
        if candidate.draft is None:
            return self.plan in ("", "plain")
        if self.plan in ("", "plain") or candidate.scripted != (self.probability is not None):
            return False
        return candidate.trees or not self.plan.startswith("tree")

    def request(self, scale: int = 1) -> dict[str, Any]:
        """Return the request of one round to the worker."""
        wanted: dict[str, Any] = {"phase": self.name, "n": self.n, "steps": self.steps * scale}
        return wanted | ({"plan": self.plan, "probability": self.probability} if self.plan else {})


def phases(verify: Sequence[int] = VERIFY, prefill: int = PREFILL) -> list[Phase]:
    """Return the phases of one round; about as many tokens per phase whatever n is, but at least 4 steps."""
    found = [Phase("decode", 1, DECODE_STEPS)]
    found += [Phase("verify", n, max(4, 2 * DECODE_STEPS // n)) for n in verify]
    return [*found, Phase("prefill", prefill, 1)] if prefill else found


def speculative_phases(
    plain: Sequence[Phase], plans: Sequence[str], probabilities: Sequence[float | None], tokens: int
) -> list[Phase]:
    """Return the phases with decoding replaced by generation, plain and by every plan at every probability."""
    found = [Phase("decode", 1, tokens, "plain")]
    found += [Phase("decode", 1, tokens, plan, chance) for chance in probabilities for plan in plans]
    return found + [phase for phase in plain if phase.name != "decode"]


class Process(Channel):
    """A worker process of one candidate, and what it measured."""

    def __init__(
        self, candidate: Candidate, threads: int, past: int, directory: Path | None, exact: bool = False
    ) -> None:
        command = [sys.executable, "-m", "blockffn.eval.bench.worker", candidate.path, "--ffn", candidate.ffn]
        command += ["--threads", str(threads), "--past", str(past)]
        command += ["--draft", candidate.draft] if candidate.draft else []
        flags = {"--scripted": candidate.scripted, "--trees": candidate.trees, "--exact": exact}
        super().__init__(candidate.path, [*command, *(flag for flag, wanted in flags.items() if wanted)], directory)
        self.candidate = candidate
        self.seconds: dict[Phase, list[float]] = {}  # of a step; of a token where there is a plan
        self.statistics: dict[Phase, list[dict[str, Any]]] = {}  # of generations

    def time(self, phase: Phase, scale: int = 1) -> None:
        """Run one phase and keep its seconds per step, or per token, and its statistics."""
        answer = self.ask(phase.request(scale))
        self.seconds.setdefault(phase, []).extend(answer["seconds"])
        if "statistics" in answer:
            self.statistics.setdefault(phase, []).append(answer["statistics"])

    def forget(self) -> None:
        """Drop what was measured so far."""
        self.seconds.clear()
        self.statistics.clear()


@dataclass(frozen=True)
class Result:
    """Rows in the form of `blockffn bench --json`, and what the router chose on the text."""

    rows: list[dict[str, Any]]
    activity: dict[str, Any]
    buffers: dict[str, dict[str, float]]


def run(
    candidates: Sequence[Candidate],
    text: dict[str, Any],
    threads: int,
    rounds: int = ROUNDS,
    timed: Sequence[Phase] | None = None,
    past: int = PAST,
    directory: Path | None = None,
    say: Say = lambda line: None,
    exact: bool = False,
) -> Result:
    """Time all candidates. text: {"tokens": the model's own greedy text} or {"text": words}.

    directory: of the libraries, None for the usual. The first round warms up and is not counted.
    Errors: BlockffnError when a model cannot be loaded.
    """
    from blockffn.eval.bench.report import rows

    chosen = list(timed if timed is not None else phases())
    workers: list[Process] = []
    try:
        for candidate in candidates:
            say(f"loading {candidate.path}" + (f" with {candidate.drafter}" if candidate.draft else ""))
            workers.append(Process(candidate, threads, past, directory, exact))
            workers[-1].ask(text)
        for number in range(rounds + 1):
            say(f"round {number} of {rounds}" if number else "warming up")
            _round(workers, chosen, number)
        memory = [worker.ask({"phase": "memory"}) for worker in workers]  # before `activity`, which adds a context
        activity = workers[0].ask({"phase": "activity", "n": past + 2 * PREFILL})
        found = [row for worker, used in zip(workers, memory, strict=True) for row in rows(worker, used, chosen)]
        return Result(found, activity, {worker.candidate.label: worker.buffers() for worker in workers})
    finally:
        for worker in workers:
            worker.close()


def _round(workers: Sequence[Process], chosen: Sequence[Phase], number: int) -> None:
    """Run every phase on every worker it suits; round 0 warms up, and gives the automatic plan time to learn."""
    for phase in chosen:
        for worker in workers if number % 2 else reversed(workers):
            if phase.suits(worker.candidate):
                learns = number == 0 and phase.plan == "auto"
                worker.time(phase, max(1, min(LEARNING, LONGEST // phase.steps)) if learns else 1)
    if number == 0:
        for worker in workers:
            worker.forget()
