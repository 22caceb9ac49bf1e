"""The same weights run by the union op and densely, in one run: decoding, verification of n tokens, prefill, memory.

    >>> from blockffn.eval.bench import Candidate, run
    >>> pair = [Candidate("model-Q4_0.gguf", "union"), Candidate("model-dense-Q4_0.gguf", "dense")]
    >>> rows = run(pair, tokens, threads=2)                            # doctest: +SKIP
    >>> rows[0]["phase"], rows[0]["tokens_per_second"]                 # doctest: +SKIP
    ('decode', 41.3)

Every candidate is loaded in a process of its own (blockffn.eval.bench_worker), so that its peak memory is its own. The
phases of one round run one after another, and within a phase the candidates take turns, in alternating order: whatever
else the machine does meets all of them. Figures are medians over all steps of all rounds; the spread is half the
distance of the quartiles divided by the median.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blockffn.errors import BlockffnError

VERIFY = (2, 4, 8, 16, 32)
PREFILL = 512
DECODE_STEPS = 32  # one-token steps per round
PAST = 128  # tokens in the cache before decoding and verification
ROUNDS = 7

Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A model file and how its FFN runs: "union" or "dense" (a dense-layout file, or all experts of the other)."""

    path: str
    ffn: str
    drafter: str = "none"

    @property
    def label(self) -> str:
        """Short name for tables."""
        return self.ffn if self.drafter == "none" else f"{self.ffn}+{self.drafter}"


@dataclass(frozen=True)
class Phase:
    """What is timed: `steps` evaluations of `n` tokens each."""

    name: str  # decode, verify or prefill
    n: int
    steps: int

    @property
    def label(self) -> str:
        """Short name for tables."""
        return self.name if self.name == "decode" else f"{self.name} {self.n}"


def phases(verify: Sequence[int] = VERIFY, prefill: int = PREFILL) -> list[Phase]:
    """Return the phases of one round; about as many tokens per phase whatever n is, but at least 4 steps."""
    found = [Phase("decode", 1, DECODE_STEPS)]
    found += [Phase("verify", n, max(4, 2 * DECODE_STEPS // n)) for n in verify]
    return [*found, Phase("prefill", prefill, 1)] if prefill else found


@dataclass
class Process:
    """A worker process of one candidate."""

    candidate: Candidate
    threads: int
    past: int
    directory: Path | None
    seconds: dict[Phase, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.log = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", "blockffn.eval.bench_worker", self.candidate.path, "--ffn", self.candidate.ffn]
        command += ["--threads", str(self.threads), "--past", str(self.past)]
        environment = os.environ | ({"BLOCKFFN_LIB_DIR": str(self.directory)} if self.directory else {})
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and return its answer; BlockffnError with the cause when the process fails."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the process has gone: its last line or its log says why
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise BlockffnError(f"{self.candidate.path}: {answer['error']}")
        return answer

    def time(self, phase: Phase) -> None:
        """Run one phase and keep its seconds per step."""
        answer = self.ask({"phase": phase.name, "n": phase.n, "steps": phase.steps})
        self.seconds.setdefault(phase, []).extend(answer["seconds"])

    def buffers(self) -> dict[str, float]:
        """Return the buffer types that llama.cpp chose for the weights, with their sizes in MiB."""
        self.log.seek(0)
        found = re.findall(r"(\S+) model buffer size =\s*([\d.]+) MiB", self.log.read())
        return {name: float(size) for name, size in found}

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # a request that a dead process never read
                self.process.stdin.close()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()

    def _last_words(self) -> str:
        self.process.wait()
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        return (
            f"the benchmark process ended with code {self.process.returncode}: {lines[-1] if lines else 'no message'}"
        )


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
) -> Result:
    """Time all candidates. text: {"tokens": ids} or {"text": words}; directory: of the libraries, None for the usual.

    The first round warms up and is not counted. Errors: BlockffnError when a model cannot be loaded.
    """
    chosen = list(timed if timed is not None else phases())
    workers: list[Process] = []
    try:
        for candidate in candidates:
            say(f"loading {candidate.path}")
            worker = Process(candidate, threads, past, directory)
            workers.append(worker)
            worker.ask(text)
        for number in range(rounds + 1):
            say(f"round {number} of {rounds}" if number else "warming up")
            for phase in chosen:
                for worker in workers if number % 2 else reversed(workers):
                    worker.time(phase)
            if number == 0:
                for worker in workers:
                    worker.seconds.clear()
        memory = [worker.ask({"phase": "memory"}) for worker in workers]  # before `activity`, which adds a context
        activity = workers[0].ask({"phase": "activity", "n": past + 2 * PREFILL})
        rows = [row for pair in zip(workers, memory, strict=True) for row in _rows(*pair, chosen)]
        return Result(rows, activity, {worker.candidate.label: worker.buffers() for worker in workers})
    finally:
        for worker in workers:
            worker.close()


def _rows(worker: Process, memory: dict[str, float], chosen: Sequence[Phase]) -> list[dict[str, Any]]:
    rows = []
    for phase in chosen:
        seconds = np.asarray(worker.seconds[phase])
        low, middle, high = np.percentile(seconds, [25, 50, 75])
        rows.append(
            {
                "model": Path(worker.candidate.path).name,
                "ffn": worker.candidate.ffn,
                "drafter": worker.candidate.drafter,
                "phase": phase.name,
                "n": phase.n,
                "tokens_per_second": phase.n / middle,
                "spread": (high - low) / 2 / middle,
                "tokens_per_step": 1.0 if phase.name == "decode" else None,
                "acceptance": None,
                "step_ms": 1e3 * middle,
                "samples": len(seconds),
                **memory,
            }
        )
    return rows


def table(result: Result) -> str:
    """Return the figures as text: a line per phase, a column per candidate, and how many times faster union is."""
    labels = list(dict.fromkeys(_label(row) for row in result.rows))
    by_key = {(_label(row), row["phase"], row["n"]): row for row in result.rows}
    lines = ["phase        " + "".join(f"{label:>24}" for label in labels) + "   union / dense"]
    for phase, n in dict.fromkeys((row["phase"], row["n"]) for row in result.rows):
        line = f"{phase if phase == 'decode' else f'{phase} {n}':<13}"
        found = [by_key[label, phase, n] for label in labels]
        line += "".join(f"{row['tokens_per_second']:12.1f} t/s +-{100 * row['spread']:4.0f} %" for row in found)
        speeds = {row["ffn"]: row["tokens_per_second"] for row in found}
        lines.append(line + (f"{speeds['union'] / speeds['dense']:13.2f} x" if len(speeds) == 2 else ""))
    first = [next(row for row in result.rows if _label(row) == label) for label in labels]
    lines.append("peak memory  " + "".join(f"{row['peak_rss_mb']:21.0f} MB" for row in first))
    return "\n".join(lines)


def _label(row: dict[str, Any]) -> str:
    return str(row["ffn"]) if row["drafter"] == "none" else f"{row['ffn']}+{row['drafter']}"
