"""How often does greedy text differ between plain decoding and speculative decoding in the default mode?

    $ blockffn bench differences -m model-f16.gguf -f text.txt --types F16,Q8_0,Q4_0,Q4_K_M
    $ blockffn bench differences --shape 1.2b --texts 4

Greedy texts are generated plainly from pieces of the text, then followed once more with drafts of several shapes: at
every token the choice of the speculative batch is compared with the plain one, and the plain one is taken, so that a
difference counts once. In exact mode (`--exact`) there must be none. `lead` is the smallest and the median distance of
the two largest logits in plain decoding, `error` the largest and the median change of the largest logit: a choice
differs where its lead is below the error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blockffn.commands.common import count
from blockffn.eval.bench.plans import named
from blockffn.eval.studies.text import Text, add_model_arguments, model_and_text
from blockffn.speculative import ScriptedDrafter
from blockffn.speculative.loop import Sampling
from blockffn.speculative.policy import Plan
from blockffn.speculative.scripted import CHILDREN

PLANS = named("chain 3", "chain 7", "chain 15", "tree 31")
ACCEPTANCE = 0.7  # of the drafts; a mixture of right and wrong ones
PROMPT = 32


@dataclass(frozen=True)
class Greedy:
    """Plain greedy texts: tokens with their prompts, and the lead of every choice."""

    texts: list[list[int]]
    tops: list[list[float]]  # of every generated token: the largest logit
    leads: list[float]  # how far it is above the second


def generate(llm: Any, prompts: Sequence[Sequence[int]], length: int, exact: bool) -> Greedy:
    """Generate plainly; a text may be shorter where the model ends it."""
    llm.speculate(None, exact)
    found = Greedy([], [], [])

    def choose(_row: int, logits: Any) -> int:
        second, first = np.partition(logits, -2)[-2:].tolist()
        found.tops[-1].append(first)
        found.leads.append(first - second)
        return int(logits.argmax())

    for prompt in prompts:
        found.tops.append([])
        found.texts.append([*prompt, *itertools.islice(llm.loop.run(prompt, Sampling(choose)), length)])
    return found


@dataclass
class Followed:
    """What a speculative run of one text chose otherwise than the plain one."""

    different: int = 0
    errors: list[float] = field(default_factory=list)


def follow(llm: Any, text: Sequence[int], tops: Sequence[float], plan: Plan, exact: bool, seed: int) -> Followed:
    """Follow `text` with drafts, from the token on that the first of `tops` belongs to."""
    drafter = ScriptedDrafter(text, ACCEPTANCE, llm.n_vocab(), seed, CHILDREN, max_nodes=31, by_place=True)
    llm.speculate(drafter, exact, plan)
    found, start = Followed(), len(text) - len(tops)

    def compare(_row: int, logits: Any) -> int:
        at = len(found.errors)
        found.errors.append(abs(float(logits.max()) - tops[at]))
        found.different += int(logits.argmax()) != text[start + at]
        return text[start + at]

    for _ in itertools.islice(llm.loop.run(text[:start], Sampling(compare)), len(tops)):
        pass
    return found


def rows(path: str, name: str, text: Text, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of one model file, one row for each shape of the draft."""
    import blockffn

    llm = blockffn.Llama(path, n_ctx=PROMPT + args.length + 64, n_threads=args.threads)
    tokens = text(llm, args.texts * PROMPT)
    prompts = [tokens[i * PROMPT : (i + 1) * PROMPT] for i in range(args.texts)]
    greedy = generate(llm, prompts, args.length, args.exact)
    total = sum(len(whole) - PROMPT for whole in greedy.texts)
    for label, plan in PLANS.items():
        pairs = enumerate(zip(greedy.texts, greedy.tops, strict=True))
        found = [follow(llm, whole, tops, plan, args.exact, i) for i, (whole, tops) in pairs]
        errors = np.concatenate([one.errors for one in found])
        yield {
            "model": name,
            "mode": "exact" if args.exact else "default",
            "draft": label,
            "tokens": total,
            "different": sum(one.different for one in found),
            "texts": len(found),
            "texts_that_part": sum(one.different > 0 for one in found),
            "lead_min": min(greedy.leads),
            "lead_median": float(np.median(greedy.leads)),
            "error_max": float(errors.max()),
            "error_median": float(np.median(errors)),
        }
    llm.close()


def files(path: str, types: Sequence[str], folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (file, name) of the model in each type; without types as it is."""
    if not types:
        yield path, Path(path).stem
    for kind in types:
        from blockffn.quantize import canonical_type, quantize

        target = folder / f"{Path(path).stem}-{kind}.gguf"
        quantize(Path(path), target, canonical_type(kind))
        yield str(target), f"{Path(path).stem} {kind}"
        target.unlink()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn bench differences`."""
    add_model_arguments(parser)
    parser.add_argument("--types", default="", metavar="T,T", help="quantize the model of -m to each of these first")
    parser.add_argument("--texts", type=count, default=16, metavar="N", help="greedy texts (default: 16)")
    parser.add_argument("--length", type=count, default=256, metavar="N", help="tokens of each (default: 256)")
    parser.add_argument("--exact", action="store_true", help="the control: exact mode")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")


def run(args: argparse.Namespace) -> int:
    """Count the differences of every type, print a table and one line of JSON."""
    from blockffn.eval.environment import environment

    path, text = model_and_text(args.shape, args.model, args.file)
    found: list[dict[str, Any]] = []
    print(
        "model                     draft     tokens  different  per 1000  texts that part   lead, nats: least, median"
    )
    with tempfile.TemporaryDirectory() as folder:
        for file, name in files(path, [kind for kind in args.types.split(",") if kind], Path(folder)):
            for row in rows(file, name, text, args):
                found.append(row)
                print(
                    f"{name:<25} {row['draft']:<8} {row['tokens']:7} {row['different']:10} "
                    f"{1000 * row['different'] / row['tokens']:9.2f}  {row['texts_that_part']:6} of {row['texts']:<6}"
                    f"{row['lead_min']:10.4f} {row['lead_median']:8.2f} "
                    f"{row['error_max']:14.4f} {row['error_median']:8.4f}",
                    flush=True,
                )
    print(json.dumps({"environment": environment(), "rows": found}))
    return 0
