"""What exact mode costs: the same evaluations in both modes, in turns.

    $ blockffn bench exact --shape 1.2b
    $ blockffn bench exact -m model.gguf -f text.txt

Timed are one token, batches of 4 and of 8 tokens, a tree of 31 with its root, all after `--past` tokens, and a prompt
of 512. Figures are medians; the spread is half the distance of the quartiles over the median. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blockffn.commands.common import count
from blockffn.eval.bench.report import median_and_spread
from blockffn.eval.studies.text import add_model_arguments, model_and_text
from blockffn.speculative import ScriptedDrafter
from blockffn.speculative.drafter import Context
from blockffn.speculative.scripted import CHILDREN

MODES = ("default", "exact")
PROMPT = 512
DRAFTS = {"decode": (0, False), "verify 4": (3, False), "verify 8": (7, False), "tree 31": (31, True)}
REPEATS = {"decode": 16, "verify 4": 8, "verify 8": 6, "tree 31": 4, "prefill 512": 1}  # in one round


class Mode:
    """A model in one of the modes."""

    def __init__(self, path: str, exact: bool, threads: int | None, past: int) -> None:
        import blockffn

        self.llm: Any = blockffn.Llama(path, n_ctx=past + PROMPT + 64, n_threads=threads)
        self.exact, self.past = exact, past

    def prepare(self, tokens: Sequence[int]) -> None:
        """Take the text that is evaluated."""
        self.drafter = ScriptedDrafter(tokens, 0.7, self.llm.n_vocab(), branch=CHILDREN, max_nodes=31)
        self.llm.speculate(self.drafter, self.exact)
        self.tokens = np.asarray(tokens, dtype=np.int32)
        self.target = self.llm.loop.target

    def run(self, phase: str) -> list[float]:
        """Return the seconds of each evaluation of one phase."""
        if phase.startswith("prefill"):
            self.target.truncate(0)
            started = time.perf_counter()
            self.target.evaluate_text(self.tokens[:PROMPT], 0, slice(-1, None))
            self.target.logits(1)
            return [time.perf_counter() - started]
        if self.target.length() < self.past:
            self.target.evaluate_text(self.tokens[self.target.length() : self.past], self.target.length(), slice(0, 0))
        nodes, tree = DRAFTS[phase]
        seconds = []
        for _ in range(REPEATS[phase]):
            self.target.truncate(self.past)
            draft = self.drafter.propose(Context(self.tokens[: self.past + 1], tree), nodes)
            started = time.perf_counter()
            self.target.evaluate_draft(int(self.tokens[self.past]), draft, self.past)
            self.target.logits(1 + len(draft))
            seconds.append(time.perf_counter() - started)
        return seconds


def measure(modes: Sequence[Mode], rounds: int) -> list[dict[str, Any]]:
    """Return a row for every phase; the first round warms up."""
    seconds: dict[tuple[str, bool], list[float]] = {(phase, mode.exact): [] for phase in REPEATS for mode in modes}
    for number in range(rounds + 1):
        for phase in REPEATS:
            for mode in modes if number % 2 else reversed(modes):
                found = mode.run(phase)
                seconds[phase, mode.exact] += found if number else []
    return [{"phase": phase} | _row(seconds[phase, False], seconds[phase, True]) for phase in REPEATS]


def _row(default: list[float], exact: list[float]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, values in zip(MODES, (default, exact), strict=True):
        middle, row[f"{name}_spread"] = median_and_spread(values)
        row[f"{name}_ms"] = 1e3 * middle
    return row | {"ratio": row["exact_ms"] / row["default_ms"], "samples": len(default)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn bench exact`."""
    add_model_arguments(parser)
    parser.add_argument("--past", type=count, default=128, metavar="N", help="tokens before (default: 128)")
    parser.add_argument("--rounds", type=count, default=7, metavar="N", help="default: 7")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")


def run(args: argparse.Namespace) -> int:
    """Time both modes, print the table and one line of JSON."""
    from blockffn.eval.environment import environment, headline

    path, text = model_and_text(args.shape, args.model, args.file)
    modes = [Mode(path, exact, args.threads, args.past) for exact in (False, True)]
    for mode in modes:
        mode.prepare(text(mode.llm, args.past + PROMPT))
    rows = measure(modes, args.rounds)
    threads = int(modes[0].llm.n_threads)
    where = environment() | {"threads": threads, "model": Path(path).name, "past": args.past, "rounds": args.rounds}
    print(f"{headline(where, threads)}; {path}")
    print("phase          default, ms            exact, ms         exact / default")
    for row in rows:
        print(
            f"{row['phase']:<12} {row['default_ms']:9.2f} +-{100 * row['default_spread']:3.0f} %   "
            f"{row['exact_ms']:9.2f} +-{100 * row['exact_spread']:3.0f} %   {row['ratio']:8.2f}"
        )
    print(json.dumps({"environment": where, "rows": rows}))
    return 0
