"""Text generated with drafts, measured from step to step: what a worker of `blockffn bench` does with --draft.

    generation = Generation(llm, "scripted", scripted=True)
    generation.run(prompt, 48, "chain 4", truth=text, probability=0.8)["seconds"]     # per token

A measurement starts and ends where a step starts, so that no token is free and no step is counted half. Each pair of
plan and probability keeps what it learned (blockffn.speculative.policy.Policy) from one call to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from blockffn.errors import BlockffnError
from blockffn.eval.bench.plans import parse_plan
from blockffn.speculative import Drafter, EagleDrafter, ScriptedDrafter, TreeShape
from blockffn.speculative import drafter as drafters
from blockffn.speculative.policy import Policy, limits
from blockffn.speculative.scripted import CHILDREN

LEVELS = 6  # of a scripted tree
NEAR = 32  # ids: wrong tokens share experts with the text around them, as those of trained drafters do
SHAPE = TreeShape(LEVELS, CHILDREN, 32)  # of the head that runs beside the script


@dataclass
class Mark:
    """Where a step starts: tokens and steps so far, and when."""

    tokens: int
    steps: int
    seconds: float


class Generation:
    """Generates with one model and one drafter; `draft` as in blockffn.eval.bench.models.Candidate, None for none."""

    def __init__(self, llm: Any, draft: str | None = None, scripted: bool = False, trees: bool = False) -> None:
        self.llm, self.drafter = llm, open_drafter(llm, draft, scripted, trees)
        llm.speculate(self.drafter, llm.exact)
        self._policies: dict[tuple[str, float | None], Policy] = {}

    @property
    def target(self) -> Any:
        """Return the model's side of the loop (blockffn.speculative.decoder.Decoder)."""
        return self.llm.loop.target

    def forget(self) -> None:
        """Take nothing in the cache for known."""
        self.llm.n_tokens = 0

    def run(
        self,
        prompt: Sequence[int],
        n_tokens: int,
        plan: str,
        truth: Sequence[int] | None = None,
        probability: float | None = None,
    ) -> dict[str, Any]:
        """Generate greedily and measure at least `n_tokens`: {"seconds" in all, "statistics"}.

        truth: the whole text, which a scripted drafter needs; BlockffnError when the model writes something else.
        """
        loop = self.llm.loop
        loop.policy = self._policies.setdefault((plan, probability), self._policy(plan))
        if isinstance(self.drafter, ScriptedDrafter):
            assert truth is not None and probability is not None
            self.drafter.aim(truth, probability)
        found, tokens = self._generate(prompt, n_tokens)
        if truth is not None and tokens != list(truth[len(prompt) : len(prompt) + len(tokens)]):
            raise BlockffnError(
                f"{self.llm.model_path}: its greedy text is not the text given: expected a planted model"
            )
        return found

    def _policy(self, plan: str) -> Policy:
        """Return a fresh policy: a fixed plan, or the automatic choice with the limits of this drafter."""
        return Policy(*limits(self.drafter or Drafter()), parse_plan(plan))

    def _generate(self, prompt: Sequence[int], n_tokens: int) -> tuple[dict[str, Any], list[int]]:
        """Return what `run` returns, and the tokens."""
        loop, tokens, marks = self.llm.loop, list[int](), list[Mark]()
        stream = self.llm.generate(prompt, temp=0.0)
        for token in stream:
            steps = loop.statistics.steps
            if steps > (marks[-1].steps if marks else 0):
                marks.append(Mark(len(tokens), steps, perf_counter()))
                if len(tokens) - marks[0].tokens >= n_tokens:
                    break
            tokens.append(token)  # whatever it is: a benchmark goes on after the end of a text
        statistics = self.llm.statistics()  # before the last step is cut off
        stream.close()
        measured = {
            "measured_tokens": marks[-1].tokens - marks[0].tokens,
            "measured_steps": marks[-1].steps - marks[0].steps,
        }
        return {"seconds": marks[-1].seconds - marks[0].seconds, "statistics": statistics | measured}, tokens


def open_drafter(llm: Any, draft: str | None, scripted: bool, trees: bool) -> Drafter | None:
    """Return the drafter of a candidate."""
    if scripted:
        beside = None if draft in (None, "scripted") else EagleDrafter(str(draft), llm, tree=SHAPE if trees else False)
        branch = CHILDREN if trees else 1
        return ScriptedDrafter([], 0.5, llm.n_vocab(), 0, branch, 31, depth=LEVELS, near=NEAR, beside=beside)
    return drafters.open_drafter(draft, trees and draft != "ngram")
