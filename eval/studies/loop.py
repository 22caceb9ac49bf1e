"""What the Python around llama.cpp costs in one step of speculative decoding, by size and shape of the draft.

    $ python -m blockffn.eval.studies.loop -m model.gguf -f text.txt
    $ python -m blockffn.eval.studies.loop -m model.gguf -f text.txt --head head.gguf

A step's seconds less those of llama_decode and of waiting for its logits: filling the batch, greedy sampling, walking
the draft, clearing the cache, statistics, the choice of the plan; drafting is a column of its own (with `--head` that
of an EAGLE head, its evaluations left out; otherwise a drafter that looks tokens up). Medians over the steps of a text
that the model follows. The profiles list the functions with the most time of their own, as cProfile sees them. Ends
with a line of JSON.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import json
import pstats
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blockffn.cli import guarded
from blockffn.commands.common import count
from blockffn.eval.planted.guesses import GuessingDrafter
from blockffn.eval.studies.text import add_model_arguments, model_and_text
from blockffn.speculative.drafter import Drafter
from blockffn.speculative.loop import Loop, Sampling
from blockffn.speculative.policy import Plan, Policy

PLANS = {"plain": Plan(), "chain 4": Plan(4), "chain 8": Plan(8), "chain 16": Plan(16), "tree 32": Plan(31, True)}
AIMS = {"chain": 0.3, "tree": 0.8}  # milliseconds
PROMPT, SHOWN, ACCEPTANCE = 64, 12, 0.7
LINE = "{draft:<10} {steps:7} {loop_ms:18.3f} {loop_ms_90:6.3f} {drafting_ms:23.3f} {drafting_ms_90:6.3f}"


class TimedLibrary:
    """The native library; the time inside evaluations and inside waiting for their results is counted."""

    def __init__(self, api: Any) -> None:
        self._api, self.seconds = api, 0.0
        for name in ("llama_decode", "llama_get_logits"):
            setattr(self, name, self._timed(getattr(api, name)))

    def _timed(self, native: Any) -> Any:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            found = native(*arguments)
            self.seconds += time.perf_counter() - started
            return found

        return call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)


class MarkedPolicy(Policy):
    """A fixed plan; `marks` holds the clock at the beginning of every step."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(16, fixed=plan)
        self.marks: list[tuple[float, ...]] = []
        self.clocks: Any = None

    def plan(self) -> Plan:
        """Take the time; return the plan."""
        self.marks.append((time.perf_counter(), *self.clocks()))
        return super().plan()


def measure(llm: Any, drafter: Drafter, plan: Plan, text: Sequence[int], profile: cProfile.Profile | None) -> Any:
    """Return (loop, drafting) in seconds for every step, float64 [steps, 2], both without native evaluations."""
    policy = MarkedPolicy(plan)
    loop = Loop(llm, llm._loop.target, drafter, policy, llm._loop.union)
    target = TimedLibrary(loop.target._api)
    head = getattr(drafter, "_head", None)
    drafting = TimedLibrary(head._api) if head is not None else target
    policy.clocks = lambda: (target.seconds, loop.statistics.draft_seconds, drafting.seconds if head is not None else 0)
    plain_api: Any = loop.target._api
    at = PROMPT

    def follow(_row: int, logits: Any) -> int:
        nonlocal at
        logits.argmax()
        at += 1
        return text[at - 1]

    setattr(loop.target, "_api", target)  # noqa: B010
    if head is not None:
        head._api = drafting
    if profile is not None:
        profile.enable()
    for _ in itertools.islice(loop.run(text[:PROMPT], Sampling(follow)), len(text) - PROMPT - 32):
        pass
    if profile is not None:
        profile.disable()
    loop.target._api = plain_api
    if head is not None:
        head._api = plain_api
    step, native, draft, head_native = np.diff(np.array(policy.marks), axis=0).T  # each [steps]
    return np.stack([step - native - draft, draft - head_native], axis=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every plan, print table, profile and one line of JSON."""
    args = _parser().parse_args(argv)
    import blockffn
    from blockffn.eval.environment import environment

    path, text = model_and_text(args.shape, args.model, args.file)
    llm = blockffn.Llama(path, n_ctx=PROMPT + args.tokens + 64, n_threads=args.threads)
    tokens = text(llm, PROMPT + args.tokens + 32)
    rows = []
    print("draft        steps   loop, ms: median   90 %    drafting, ms: median   90 %")
    drafter: Any = None
    for name, plan in PLANS.items():
        if drafter is None or drafter.can_tree is not plan.tree:  # chains in a cache of one sequence
            drafter = open_drafter(llm, tokens, plan.tree, args.head)
        if plan.nodes <= drafter.max_chain or plan.tree:
            rows.append({"draft": name} | figures(1e3 * measure(llm, drafter, plan, tokens, None)))
            rows[-1]["aim_ms"] = AIMS.get(name.split()[0])
            print(LINE.format(**rows[-1]))
    for name, plan in (("chain 4", PLANS["chain 4"]), ("tree 32", PLANS["tree 32"])):
        profile = cProfile.Profile()
        steps = len(measure(llm, open_drafter(llm, tokens, plan.tree, args.head), plan, tokens, profile))
        show(name, profile, steps)
    where = environment() | {"model": Path(path).name, "head": args.head and Path(args.head).name}
    print(json.dumps({"environment": where, "rows": rows}))
    return 0


def open_drafter(llm: Any, tokens: Sequence[int], tree: bool, head: str | None) -> Any:
    """Return a drafter of chains or of trees, set up in `llm`."""
    import blockffn

    if head is not None:
        drafter: Any = blockffn.EagleDrafter(head, llm, tree=tree)
    else:
        drafter = GuessingDrafter(tokens, ACCEPTANCE, llm.n_vocab())
        drafter.can_tree, drafter.max_nodes = tree, drafter.max_nodes if tree else drafter.max_chain
    llm.set_up_speculation(drafter)
    return drafter


def figures(milliseconds: Any) -> dict[str, Any]:
    """Return medians and nine-tenths of (loop, drafting), float64 [steps, 2]."""
    middle, high = np.percentile(milliseconds, 50, axis=0), np.percentile(milliseconds, 90, axis=0)
    row = {"steps": len(milliseconds), "loop_ms": middle[0], "loop_ms_90": high[0]}
    return row | {"drafting_ms": middle[1], "drafting_ms_90": high[1]}


def show(name: str, profile: cProfile.Profile, steps: int) -> None:
    """Print the functions with the most time of their own, in milliseconds of one step."""
    print(f"own time of functions in a step with a {name}, ms (with the profiler)")
    entries: Any = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    ranked = sorted(entries.items(), key=lambda entry: -entry[1][2])[:SHOWN]
    for (file, number, function), (_, calls, own, _, _) in ranked:
        place = f"{Path(file).name}:{number} " if number else ""
        print(f"  {1e3 * own / steps:7.3f}  {calls / steps:7.1f} calls  {place}{function}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="the time of the Python loop of speculative decoding")
    add_model_arguments(parser)
    parser.add_argument("--head", metavar="H.gguf", help="draft with this EAGLE head")
    parser.add_argument("--tokens", type=count, default=800, metavar="N", help="of the text (default: 800)")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")
    return parser


if __name__ == "__main__":
    sys.exit(guarded(main))
