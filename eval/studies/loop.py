"""What the Python around llama.cpp costs in one step of speculative decoding, by size and shape of the draft.

    $ blockffn bench loop -m model.gguf -f text.txt
    $ blockffn bench loop -m model.gguf -f text.txt --head head.gguf

A step's seconds less those of llama_decode and of waiting for its logits: filling the batch, greedy sampling, walking
the draft, clearing the cache, statistics, the choice of the plan; drafting is a column of its own (with `--head` that
of an EAGLE head, its evaluations left out; otherwise a drafter that looks tokens up). Medians over the steps of a text
that the model follows. Of `blockffn.Engine` with 8 streams likewise: its loop less evaluation, the choice of the best
tokens, drafting and sampling. The profiles list the functions with the most time of their own, as cProfile sees them.
Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import itertools
import json
import pstats
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blockffn import library
from blockffn.commands.common import count
from blockffn.engine.scheduler import Scheduler
from blockffn.eval.bench.plans import named
from blockffn.eval.studies.text import add_model_arguments, model_and_text
from blockffn.speculative import ScriptedDrafter
from blockffn.speculative.drafter import Drafter
from blockffn.speculative.loop import Loop, Sampling
from blockffn.speculative.policy import Plan, Policy
from blockffn.speculative.scripted import CHILDREN

PLANS = named("plain", "chain 4", "chain 8", "chain 16", "tree 31")
AIMS = {"chain": 0.3, "tree": 0.8, "streams": 0.5}  # milliseconds
STREAMS, STREAM_TOKENS = 8, 400
PROMPT, SHOWN, ACCEPTANCE = 64, 12, 0.7
LINE = "{draft:<10} {steps:7} {loop_ms:18.3f} {loop_ms_90:6.3f} {drafting_ms:23.3f} {drafting_ms_90:6.3f}"


class NativeClock:
    """Counts the seconds inside llama_decode and inside waiting for its results, by context, within a `with` block."""

    NAMES = ("llama_decode", "llama_get_logits")

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}  # address of a llama_context -> seconds
        self._library = library.load()
        self._native = {name: getattr(self._library, name) for name in self.NAMES}

    def __enter__(self) -> NativeClock:
        for name, native in self._native.items():
            setattr(self._library, name, self._timed(native))
        return self

    def __exit__(self, *_: object) -> None:
        for name, native in self._native.items():
            setattr(self._library, name, native)

    def _timed(self, native: Any) -> Any:
        def call(ctx: int, *arguments: Any) -> Any:
            started = time.perf_counter()
            found = native(ctx, *arguments)
            self.seconds[ctx] = self.seconds.get(ctx, 0.0) + time.perf_counter() - started
            return found

        return call

    def split(self, ctx: int) -> tuple[float, float]:
        """Return the seconds of this context, and those of all others."""
        own = self.seconds.get(ctx, 0.0)
        return own, sum(self.seconds.values()) - own


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
    policy, clock = MarkedPolicy(plan), NativeClock()
    loop = Loop(llm, llm.loop.target, drafter, policy, llm.loop.union)
    policy.clocks = lambda: (*clock.split(loop.target.ctx), loop.statistics.draft_seconds)
    at = PROMPT

    def follow(_row: int, logits: Any) -> int:
        nonlocal at
        logits.argmax()
        at += 1
        return text[at - 1]

    with clock, profile or contextlib.nullcontext():
        for _ in itertools.islice(loop.run(text[:PROMPT], Sampling(follow)), len(text) - PROMPT - 32):
            pass
    step, native, drafter_native, draft = np.diff(np.array(policy.marks), axis=0).T  # each [steps]
    return np.stack([step - native - draft, draft - drafter_native], axis=1)


def run(args: argparse.Namespace) -> int:
    """Measure every plan, print table, profile and one line of JSON."""
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
    for name, nodes in (("streams 8", 0), ("streams 8 x chain 4", 4)):
        loop_ms, high = np.percentile(1e3 * np.array(of_streams(llm, tokens, nodes)), (50, 90))
        rows.append({"draft": name, "loop_ms": loop_ms, "loop_ms_90": high, "aim_ms": AIMS["streams"]})
        print(f"{name:<19}{loop_ms:17.3f} {high:6.3f}")
    for name, plan in (("chain 4", PLANS["chain 4"]), ("tree 31", PLANS["tree 31"])):
        profile = cProfile.Profile()
        steps = len(measure(llm, open_drafter(llm, tokens, plan.tree, args.head), plan, tokens, profile))
        show(name, profile, steps)
    where = environment() | {"model": Path(path).name, "head": args.head and Path(args.head).name}
    print(json.dumps({"environment": where, "rows": rows}))
    return 0


def of_streams(llm: Any, text: Sequence[int], nodes: int) -> list[float]:
    """Return the seconds of the engine's loop in each step of several texts with `nodes` drafted tokens each."""
    import blockffn
    from blockffn.engine.params import GenerationParams

    params = GenerationParams(max_tokens=STREAM_TOKENS, temperature=0.0, ignore_eos=True)
    n_ctx, drafter = STREAMS * (PROMPT + STREAM_TOKENS + 8), "ngram" if nodes else None
    with blockffn.Engine(llm, n_parallel=STREAMS, n_ctx=n_ctx, drafter=drafter, draft_tokens=nodes or None) as engine:
        seconds = timed_steps(engine._scheduler)
        engine.generate_many([text[at : at + PROMPT] for at in range(STREAMS)], params)
    return seconds


def timed_steps(scheduler: Scheduler) -> list[float]:
    """Return a list that takes the seconds of the loop in every step to come."""
    seconds: list[float] = []
    step = scheduler.step

    def timed() -> None:
        before = scheduler.loop_seconds
        step()
        seconds.append(scheduler.loop_seconds - before)

    scheduler.step = timed  # type: ignore[method-assign]
    return seconds


def open_drafter(llm: Any, tokens: Sequence[int], tree: bool, head: str | None) -> Any:
    """Return a drafter of chains or of trees, set up in `llm`."""
    import blockffn

    if head is not None:
        drafter: Any = blockffn.EagleDrafter(head, llm, tree=tree)
    else:
        branch, nodes = (CHILDREN, 31) if tree else (1, 16)
        drafter = ScriptedDrafter(tokens, ACCEPTANCE, llm.n_vocab(), 0, branch, nodes, by_place=True)
    llm.speculate(drafter)
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn bench loop`."""
    add_model_arguments(parser)
    parser.add_argument("--head", metavar="H.gguf", help="draft with this EAGLE head")
    parser.add_argument("--tokens", type=count, default=800, metavar="N", help="of the text (default: 800)")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")
