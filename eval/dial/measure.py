"""One point of the dial: what it costs in quality, which experts it leaves, how fast it is.

    >>> from blockffn.eval.dial.measure import Quality
    >>> Quality(llm, tokens, n_ctx=256).of(Point(0.1))["kld_mean"]            # doctest: +SKIP
    0.0021

Quality: perplexity, and KL divergence from the same model without the dial, by the windows of `blockffn eval kld`. A
threshold is measured in large batches, since a token's result does not depend on them; a budget in batches of BATCH, as
speculation verifies.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from blockffn import dial
from blockffn.eval.bench.report import median_and_spread
from blockffn.eval.dial.points import PLAIN, Point
from blockffn.eval.quality.perplexity import divergence
from blockffn.evaluation import Evaluator

if TYPE_CHECKING:
    from blockffn.eval.bench.worker import Worker
    from blockffn.llama import Llama

BATCH = 8  # tokens that are verified together
DECODE_STEPS, VERIFY_STEPS = 16, 4  # per round
Say = Callable[[str], None]


class _View:
    """A model at one point of the dial, as `divergence` wants it; the weights are those of `llm`."""

    def __init__(self, llm: Llama, point: Point) -> None:
        self.model_path, self._model = llm.model_path, llm._model
        self.n_vocab, self.token_bos = llm.n_vocab, llm.token_bos
        batch = BATCH if point.budget else None
        self.evaluator = Evaluator(llm, batch, point.threshold, point.budget)

    def logit_rows(self, tokens: Sequence[int], first: int = 0) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield the logits after the tokens from `first` on, a batch at a time: (token, float32 [rows, n_vocab])."""
        return self.evaluator.logit_rows(tokens, first)


class Quality:
    """Quality on a text of `tokens`, in windows of `n_ctx`."""

    def __init__(self, llm: Llama, tokens: Sequence[int], n_ctx: int) -> None:
        self.llm, self.tokens, self.n_ctx = llm, tokens, n_ctx
        self.reference = _View(llm, PLAIN)

    def of(self, point: Point) -> dict[str, Any]:
        """Return the figures of one point. Errors: BlockffnError for a text shorter than a window."""
        view = _View(self.llm, point)
        try:
            return divergence(cast("Llama", view), cast("Llama", self.reference), self.tokens, self.n_ctx).figures()
        finally:
            view.evaluator.close()

    def close(self) -> None:
        """Free the context of the reference."""
        self.reference.evaluator.close()


def open_worker(path: str, threads: int, past: int, text: Sequence[int], known: bool) -> Worker:
    """Return the timed model of `blockffn bench`, in this process. known: `text` is the model's own greedy text."""
    from blockffn.eval.bench.worker import Worker

    options = {"model": path, "ffn": "union", "threads": threads, "past": past, "draft": None, "exact": False}
    return Worker(argparse.Namespace(**options, scripted=False, trees=False), text, known, verbose=False)


def speeds(worker: Worker, wanted: Sequence[Point], rounds: int, say: Say) -> dict[Point, dict[str, Any]]:
    """Time decoding and verification of BATCH tokens at every point, in turn; round 0 warms up.

    Returns tokens per second with their spread, experts per layer of one token and of a batch, share of pairs.
    """
    seconds: dict[tuple[Point, int], list[float]] = {}
    unions: dict[tuple[Point, int], float] = {}
    for number in range(rounds + 1):
        say(f"speed, round {number} of {rounds}" if number else "speed, warming up")
        for point in wanted if number % 2 else reversed(wanted):
            for n, steps in ((1, DECODE_STEPS), (BATCH, VERIFY_STEPS)):
                found, union = _steps(worker, point, n, steps)
                if number:
                    seconds.setdefault((point, n), []).extend(found)
                    unions[point, n] = unions.get((point, n), 0.0) + union / rounds
    worker.llm.router_threshold = 0.0
    return {point: _figures(point, seconds, unions, worker.llm.n_experts) for point in wanted}


def _steps(worker: Worker, point: Point, n: int, steps: int) -> tuple[list[float], float]:
    """Return the seconds of each step and the mean union of a layer in experts; the tokens before have no dial."""
    llm = worker.llm
    if worker.target.length() < worker.past:
        llm.router_threshold = 0.0
        worker.steps(n, 0)
    llm.router_threshold = point.threshold
    before = llm.union_stats()
    with dial.union_budget(llm.ctx, point.budget):
        seconds = worker.steps(n, steps)
    return seconds, (llm.union_stats() - before).union_share * llm.n_experts


def _figures(
    point: Point, seconds: dict[tuple[Point, int], list[float]], unions: dict[tuple[Point, int], float], n_experts: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"n_experts": n_experts, "samples": len(seconds[point, 1])}
    for name, n in (("decode", 1), (f"verify{BATCH}", BATCH)):
        middle, spread = median_and_spread(seconds[point, n])
        row |= {f"{name}_tokens_per_second": n / middle, f"{name}_spread": spread, f"union{n}": unions[point, n]}
    return row
