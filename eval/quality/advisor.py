"""Will drafting pay with this model on this machine? From a short measurement of steps, before any drafter exists.

    >>> found = measure(llm)                                  # doctest: +SKIP
    >>> found.contexts[0].pays_from, found.contexts[0].best[0.7]  # doctest: +SKIP
    (0.21, Best(chain=3, speedup=1.52))

A step of n tokens is timed at two lengths of the text before it. A draft of k tokens, each right with probability a
when those before it were, gives 1 + a + ... + a^k tokens in a step of 1 + k tokens. It pays where that is more than
what the step costs in plain steps. Drafting itself is taken to cost nothing, as n-grams do: a draft model's time comes
on top.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from blockffn.errors import BlockffnError
from blockffn.inspection import SAMPLE_TEXT

if TYPE_CHECKING:
    from blockffn.llama import Llama

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # tokens of the steps that are timed
CONTEXTS = (128, 1024)  # tokens before them, as far as the context of the model goes
ROUNDS, REPEATS = 4, 3  # turns of every size, and steps at once in a turn: the first of them also builds a new graph
RATES = (0.5, 0.7, 0.9)
Progress = Callable[[int, int, float], None]  # steps done, steps in all, milliseconds of the last


@dataclass(frozen=True)
class Best:
    """The chain of drafted tokens that is fastest at some acceptance; chain 0: plain decoding is."""

    chain: int
    speedup: float


@dataclass(frozen=True)
class Context:
    """Steps after `past` tokens: milliseconds and experts needed (None without routed experts) by tokens."""

    past: int
    step_ms: dict[int, float]
    union: dict[int, float] | None
    breaks_even: dict[int, float | None]  # by drafted tokens: acceptance from which this chain pays; None: at none
    pays_from: float | None  # the smallest of these
    best: dict[float, Best]

    def cost(self, n: int) -> float:
        """Return what a step of n tokens costs in plain steps, on the line between what was measured."""
        return cost(self.step_ms, n)


@dataclass(frozen=True)
class Advice:
    """The measurement and what follows from it."""

    threads: int
    n_experts: int
    contexts: list[Context]

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, for JSON."""
        return asdict(self)


def measure(llm: Llama, progress: Progress | None = None) -> Advice:
    """Time steps of `llm` on a built-in text. Errors: BlockffnError for a context too short for the largest step."""
    room = llm.n_ctx() - max(SIZES)
    if room < 1:
        raise BlockffnError(f"{llm.model_path}: the context has {llm.n_ctx()} tokens, steps of {max(SIZES)} need more")
    lengths = sorted({min(past, room) for past in CONTEXTS})
    text = llm.tokenize(SAMPLE_TEXT.encode(), add_bos=True)
    tokens = np.resize(np.asarray(text, np.int32), lengths[-1] + max(SIZES))
    llm.speculate(None)
    total = len(lengths) * len(SIZES) * ROUNDS
    contexts = []
    for number, past in enumerate(lengths):
        done = number * len(SIZES) * ROUNDS
        seconds, union = _steps(llm, tokens, past, _after(progress, done, total))
        contexts.append(advise(past, {n: 1e3 * value for n, value in seconds.items()}, union))
    llm.reset()
    return Advice(int(llm.n_threads), llm.n_experts if llm.n_moe_layers else 0, contexts)


def _after(progress: Progress | None, done: int, total: int) -> Callable[[int, float], None]:
    """Return a callback for the steps that follow `done` others."""
    return lambda i, milliseconds: None if progress is None else progress(done + i, total, milliseconds)


def _steps(
    llm: Llama, tokens: Any, past: int, tell: Callable[[int, float], Any]
) -> tuple[dict[int, float], dict[int, float] | None]:
    """Return the least seconds of steps by their tokens, and how many experts they needed.

    What disturbs a step makes it longer, so that the least of few is closer to the truth than their median.
    """
    target, count = llm.loop.target, llm.loop.union
    llm.reset()
    llm.eval(tokens[:past].tolist())
    seconds: dict[int, float] = {}
    union: dict[int, float] = {}
    for number in range(ROUNDS):
        for i, n in enumerate(SIZES, 1):
            for repeat in range(REPEATS):
                target.truncate(past)
                before = count() if count else 0.0
                started = time.perf_counter()
                target.evaluate_text(tokens[past : past + n], past, slice(None))
                target.logits(n)
                took = time.perf_counter() - started
                if repeat:
                    seconds[n] = min(took, seconds.get(n, took))
                if count:
                    union[n] = count() - before
            tell(number * len(SIZES) + i, 1e3 * took)
    target.truncate(past)
    return seconds, union if count else None


def advise(past: int, step_ms: dict[int, float], union: dict[int, float] | None = None) -> Context:
    """Return what measured steps say about drafts."""
    longest = max(step_ms) - 1
    even = {n - 1: break_even(n - 1, cost(step_ms, n)) for n in sorted(step_ms) if n > 1}
    known = [rate for rate in even.values() if rate is not None]
    best = {}
    for rate in RATES:
        speeds = [gain(chain, rate) / cost(step_ms, 1 + chain) for chain in range(longest + 1)]
        chain = int(np.argmax(speeds))
        best[rate] = Best(chain, speeds[chain])
    return Context(past, step_ms, union, even, min(known, default=None), best)


def cost(step_ms: dict[int, float], n: int) -> float:
    """Return what a step of n tokens costs in plain steps."""
    sizes = sorted(step_ms)
    return float(np.interp(n, sizes, [step_ms[size] for size in sizes])) / step_ms[1]


def gain(chain: int, rate: float) -> float:
    """Return the tokens that a step with a chain gives: 1 + a + ... + a^k.

    >>> gain(2, 0.5)
    1.75
    """
    return sum(rate**i for i in range(chain + 1))


def break_even(chain: int, steps: float) -> float | None:
    """Return the acceptance at which a chain gives as many tokens as its step costs plain steps; None where it cannot.

    >>> break_even(1, 1.25), break_even(1, 2.5)
    (0.25, None)
    """
    if steps > chain + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if gain(chain, middle) < steps else (low, middle)
    return round(high, 4)


def describe(found: Advice) -> str:
    """Return the advice as a table for each context."""
    lines = []
    for context in found.contexts:
        lines += ["", f"steps after {context.past} tokens, {found.threads} threads; drafts that cost nothing"]
        lines.append("tokens   step, ms   plain steps   experts   pays from acceptance")
        for n, milliseconds in context.step_ms.items():
            experts = f"{context.union[n]:.1f}" if context.union else "-"
            even = context.breaks_even.get(n - 1)
            words = "" if n == 1 else "never" if even is None else f"{even:.2f} (chain {n - 1})"
            lines.append(f"{n:6} {milliseconds:10.2f} {context.cost(n):13.2f} {experts:>9}   {words}")
        lines.append(_verdict(context))
    return "\n".join(lines[1:])


def _verdict(context: Context) -> str:
    if context.pays_from is None:
        return "drafting never pays: a step of n tokens costs more than n plain steps"
    best = ", ".join(
        f"at {rate:g} chain {found.chain} ({found.speedup:.2f} times)" if found.chain else f"at {rate:g} none"
        for rate, found in context.best.items()
    )
    return f"drafting pays from an acceptance of {context.pays_from:.2f}; best {best}"
