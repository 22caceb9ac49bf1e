"""Does the automatic choice of the draft find the best fixed one? Measured on a model, at controlled acceptance.

    $ blockffn bench choice --shape 1.2b           # a planted model (eval/planted/model.py)
    $ blockffn bench choice -m model.gguf -f text.txt --acceptance 0,0.6,0.9
    $ blockffn bench choice --head head.gguf --plans 'chain 2,chain 3,chain 4' --acceptance 0.9

The model follows a given text (its logits are computed, the next token is the text's), and a drafter that knows the
text guesses each token with the given probability. Which tokens it guesses is drawn beforehand, so that all candidates
meet the same luck: plain decoding (in a model of its own, with one sequence), fixed chains and trees, and the automatic
choice, which starts knowing nothing. They take turns on every segment of the text, and only whole steps are counted.
All this is repeated with other luck: the ratios are medians over the repeats, with the lowest and the highest.

The drafter is blockffn.speculative.ScriptedDrafter, whose second and later guesses make trees worth their nodes.
Fixed plans that a short calibration finds hopeless are left out; `--all` measures every one, `--plans` those named.
`--head` lets an EAGLE head draft beside it, for its time: chains only. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from blockffn.commands.common import count
from blockffn.errors import BlockffnError
from blockffn.eval.bench.plans import named, plan_name, plan_names
from blockffn.eval.studies.text import Text, add_model_arguments, model_and_text
from blockffn.speculative import ScriptedDrafter
from blockffn.speculative.drafter import Context, Drafter
from blockffn.speculative.loop import Loop, Sampling
from blockffn.speculative.policy import PLAIN, Plan, Policy, limits, tree_sizes
from blockffn.speculative.scripted import CHILDREN

ACCEPTANCE = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
LARGEST = 31  # nodes of a tree
CHAINS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
PLANS = (*(Plan(n) for n in CHAINS), *(Plan(n, True) for n in tree_sizes(LARGEST)))
WORTH = 0.88  # fixed plans that calibration puts below this share of the best one are not measured
MOST = 5  # nor more than so many


class Ended(Exception):
    """A segment is over: raised at the start of a step, when nothing of it has been evaluated yet."""


class TimedPolicy(Policy):
    """A policy that times whole steps: from the first step of a segment to the first one after `limit` tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens = 0  # sampled in this segment, counted by the caller
        self._wanted, self._first, self._started = 0, 0, 0.0

    def begin_segment(self, limit: int) -> None:
        """Start a segment of at least `limit` tokens."""
        self.tokens, self._wanted, self._started = 0, limit, 0.0

    def plan(self) -> Plan:
        """Return the plan of the next step, or end the segment."""
        now = time.perf_counter()
        if not self._started:
            self._first, self._started = self.tokens, now
        elif self.tokens - self._first >= self._wanted:
            self.measured = self.tokens - self._first, now - self._started
            raise Ended
        return super().plan()


@dataclass
class Candidate:
    """One way to decode, and what it took so far."""

    name: str
    loop: Loop
    tokens: list[int] = field(default_factory=list)  # of each segment
    seconds: list[float] = field(default_factory=list)
    steps: dict[int, int] = field(default_factory=dict)  # tokens in the batch -> steps

    @property
    def rate(self) -> float:
        """Tokens per second over all segments."""
        return sum(self.tokens) / sum(self.seconds)

    def run(self, truth: Sequence[int], start: int, length: int) -> None:
        """Decode the segment of the text that follows its first `start` tokens."""
        policy = self.loop.policy
        assert isinstance(policy, TimedPolicy)
        policy.begin_segment(length)

        def follow(_row: int, logits: Any) -> int:
            logits.argmax()  # what greedy decoding does
            policy.tokens += 1
            return truth[start + policy.tokens - 1]

        try:
            for _ in self.loop.run(truth[:start], Sampling(follow)):
                pass
        except Ended:
            pass
        tokens, seconds = policy.measured
        self.tokens.append(tokens)
        self.seconds.append(seconds)
        for size, steps in self.loop.statistics.steps_by_size.items():
            self.steps[size] = self.steps.get(size, 0) + steps


class Experiment:
    """A model twice (for plain decoding with one sequence, and for drafts), and the text that both follow."""

    def __init__(self, path: str, text: Text, threads: int | None, settings: Settings):
        import blockffn

        n_ctx = settings.past + settings.tokens + 64
        n_ctx += -n_ctx % 256
        self.settings = settings
        self.plain: Any = blockffn.Llama(path, n_ctx=n_ctx, n_threads=threads)
        self.drafting: Any = blockffn.Llama(path, n_ctx=n_ctx, n_threads=threads)
        self.truth = text(self.drafting, n_ctx)
        self.n_threads = int(self.drafting.n_threads)
        self.head: Drafter | None = None
        self.drafting.speculate(self.drafter(0.5))
        self.seconds = self.calibrate()
        if settings.head is not None:
            self.head = blockffn.EagleDrafter(settings.head, self.drafting)
            self.drafting.speculate(self.drafter(0.5))

    def drafter(self, acceptance: float, seed: int = 0) -> ScriptedDrafter:
        """Return a drafter that guesses a token with this probability; the draw depends on the seed only."""
        n_vocab = self.drafting.n_vocab()
        return ScriptedDrafter(
            self.truth, acceptance, n_vocab, seed, CHILDREN, LARGEST, by_place=True, beside=self.head
        )

    def candidate(self, name: str, drafter: Drafter, fixed: Plan | None) -> Candidate:
        """Return a way to decode with a policy of its own."""
        llm = self.plain if fixed is PLAIN else self.drafting
        policy = TimedPolicy(*limits(drafter), fixed)
        return Candidate(name, Loop(llm, llm.loop.target, drafter, policy, llm.loop.union))

    def calibrate(self) -> dict[Plan, float]:
        """Return the seconds of one step of every plan, the median of a few."""
        target, drafter, past = self.drafting.loop.target, self.drafter(0.5), self.settings.past
        self.drafting.eval(self.truth[: past - 1])
        text = np.asarray(self.truth[:past], dtype=np.int32)
        found = {}
        for plan in (PLAIN, *PLANS):
            seconds = []
            for _ in range(4):
                draft = drafter.propose(Context(text, plan.tree), plan.nodes)
                started = time.perf_counter()
                target.evaluate_draft(int(text[-1]), draft, past - 1)
                target.logits(1 + len(draft))
                seconds.append(time.perf_counter() - started)
                target.truncate(past - 1)
            found[plan] = float(np.median(seconds))
        return found

    def promising(self, drafter: ScriptedDrafter) -> list[Plan]:
        """Return the fixed plans worth measuring: those asked for, or the best by calibration and those near it."""
        if self.settings.plans:
            return list(named(*self.settings.plans).values())
        longest, sizes = limits(drafter)
        plans = [plan for plan in PLANS if (plan.nodes in sizes if plan.tree else plan.nodes <= longest)]
        rate = {plan: drafter.expected(plan.nodes, plan.tree) / self.seconds[plan] for plan in plans}
        order = sorted(plans, key=lambda plan: -rate[plan])
        if self.settings.every:
            return order
        best = max(rate[order[0]], 1 / self.seconds[PLAIN])
        return [plan for plan in order if plan == order[0] or rate[plan] > WORTH * best][:MOST]

    def measure(self, acceptance: float, seed: int) -> list[Candidate]:
        """Let plain decoding, the automatic choice and fixed plans take turns on the text; returned in this order."""
        drafter = self.drafter(acceptance, seed)
        candidates = [self.candidate("plain", Drafter(), PLAIN), self.candidate("automatic", drafter, None)]
        candidates += [self.candidate(plan_name(plan), drafter, plan) for plan in self.promising(drafter)]
        self.plain.reset()
        self.drafting.reset()
        first, last = self.settings.past, self.settings.past + self.settings.tokens
        for turn, start in enumerate(range(first, last, self.settings.segment)):
            at = turn % len(candidates)
            for candidate in candidates[at:] + candidates[:at]:
                candidate.run(self.truth, start, min(self.settings.segment, last - start))
        return candidates


@dataclass(frozen=True)
class Settings:
    """How much is decoded: `tokens` after `past` others, by turns of `segment`; and with which fixed plans and head."""

    past: int
    tokens: int
    segment: int
    every: bool = False
    plans: tuple[str, ...] = ()
    head: str | None = None


def compare(acceptance: float, repeats: Sequence[Sequence[Candidate]]) -> dict[str, Any]:
    """Return one line of the table: the automatic choice beside the best other candidate and beside plain decoding.

    `repeats`: what `Experiment.measure` returned, several times. The best is the fastest one over all of them.
    """
    names = [candidate.name for candidate in repeats[0]]
    rates = np.array([[candidate.rate for candidate in repeat] for repeat in repeats])  # [repeats, candidates]
    middle = 1 / (1 / rates).mean(axis=0)  # tokens/s of all repeats together
    automatic = names.index("automatic")
    best = max((index for index in range(len(names)) if index != automatic), key=lambda index: middle[index])
    return {
        "acceptance": acceptance,
        "plain": middle[0],
        "best": names[best],
        "best_rate": middle[best],
        "automatic": middle[automatic],
        "to_best": spread(rates[:, automatic] / rates[:, best]),
        "to_plain": spread(rates[:, automatic] / rates[:, 0]),
        "tokens": sum(repeats[0][automatic].tokens),
        "steps_by_size": [dict(sorted(repeat[automatic].steps.items())) for repeat in repeats],
        "switched_off": [repeat[automatic].loop.policy.switched_off for repeat in repeats],
        "rates": dict(zip(names, middle.tolist(), strict=True)),
    }


def spread(values: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """Return median, lowest and highest."""
    return float(np.median(values)), float(values.min()), float(values.max())


def line(row: dict[str, Any]) -> str:
    """Return one line of the table."""
    fixed = [f"{name} {rate:.1f}" for name, rate in row["rates"].items() if name not in ("plain", "automatic")]
    shares = ["{:5.1f} % ({:.1f} to {:.1f})".format(*(100 * value for value in row[key])) for key in RATIOS]
    return (
        f"{row['acceptance']:10.2f} {row['plain']:8.1f} {row['best_rate']:8.1f} {row['best']:<9} "
        f"{row['automatic']:9.1f}  {shares[0]:<24} {shares[1]:<24} {', '.join(fixed)}"
    )


RATIOS = ("to_best", "to_plain")
HEAD = f"acceptance    plain     best           automatic  {'of best':<24} {'of plain':<24} fixed plans, tokens/s"


def run(args: argparse.Namespace) -> int:
    """Run the experiment for every acceptance, print the table and one line of JSON."""
    from blockffn.eval.environment import environment, headline

    settings = Settings(args.past, args.tokens, args.segment, args.all, args.plans, args.head)
    path, text = model_and_text(args.shape, args.model, args.file)
    experiment = Experiment(path, text, args.threads, settings)
    where = environment() | {"threads": experiment.n_threads, "model": Path(path).name} | vars(settings)
    print(f"{headline(where, experiment.n_threads)}; {path}")
    steps = {plan_name(plan): round(1e3 * seconds, 3) for plan, seconds in experiment.seconds.items()}
    print("one step, ms: " + ", ".join(f"{name} {value:.2f}" for name, value in steps.items()) + f"\n{HEAD}")
    rows = []
    for acceptance in args.acceptance:
        rows.append(
            compare(
                acceptance,
                [experiment.measure(acceptance, seed) for seed in range(args.seed, args.seed + args.repeats)],
            )
        )
        print(line(rows[-1]), flush=True)
    print(json.dumps({"environment": where, "step_ms": steps, "rows": rows}))
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn bench choice`."""
    add_model_arguments(parser)
    parser.add_argument("--acceptance", type=_rates, default=ACCEPTANCE, metavar="P,P", help="default: 0 to 0.95")
    parser.add_argument("--tokens", type=count, default=1024, metavar="N", help="of a repeat (default: 1024)")
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="with other luck (default: 3)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the luck of the first (default: 0)")
    parser.add_argument("--segment", type=count, default=64, metavar="N", help="tokens of one turn (default: 64)")
    parser.add_argument("--past", type=count, default=128, metavar="N", help="tokens before (default: 128)")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")
    parser.add_argument("--all", action="store_true", help="measure every fixed plan")
    parser.add_argument("--plans", type=_plans, default=(), metavar="P,P", help="measure these: chain 3, tree 8, ...")
    parser.add_argument("--head", metavar="H.gguf", help="an EAGLE head that drafts beside, for its time")


def _plans(text: str) -> tuple[str, ...]:
    try:
        return tuple(plan_names(text))
    except BlockffnError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _rates(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if not values or not all(0.0 <= value <= 1.0 for value in values):
        raise argparse.ArgumentTypeError(f"expected numbers from 0 to 1 with commas between, found {text}")
    return values
