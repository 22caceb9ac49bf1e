"""Is speculative greedy text the plain one? Token for token, with any drafter.

$ blockffn eval equal -m model.gguf -f text.txt --draft ngram --exact --tokens 100000 --output equal.jsonl

The same command goes on after an interruption. Exit code 1: exact mode, and a token differs.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from blockffn.commands.common import count
from blockffn.eval.commands import common

if TYPE_CHECKING:
    from blockffn.eval.quality.equal import Equality


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn eval equal`."""
    common.add_arguments(parser)
    parser.add_argument("--draft", default="ngram", metavar="ngram|PATH", help="drafter (default: ngram)")
    parser.add_argument("--plan", default="auto", metavar="PLAN", help="auto, chain N or tree N (default: auto)")
    parser.add_argument("--exact", action="store_true", help="exact mode: no token may differ")
    parser.add_argument("--tokens", type=count, default=10_000, metavar="N", help="compared (default: 10000)")
    parser.add_argument("--length", type=count, default=256, metavar="N", help="tokens of a text (default: 256)")
    parser.add_argument("--prompt", type=count, default=32, metavar="N", help="tokens of a prompt (default: 32)")
    common.add_output(parser, "text")


def run(args: argparse.Namespace) -> int:
    """Compare, print the counts."""
    from blockffn.eval.bench.plans import parse_plan
    from blockffn.eval.progress import Shown
    from blockffn.eval.quality.equal import equal

    plan = parse_plan(args.plan)
    with common.open_model(args.model, args, n_ctx=args.prompt + args.length + 64, exact=args.exact) as llm:
        tokens = common.text_tokens(llm, args)
        with common.resumable(args.output):
            result = equal(
                llm, tokens, args.draft, args.tokens, args.exact, plan, args.length, args.prompt, args.output,
                Shown("differences", "token"),
            )  # fmt: skip
    common.print_result(args, result.to_dict(), describe(result))
    return 1 if args.exact and result.differences else 0


def describe(result: Equality) -> str:
    """Return the counts in words."""
    mode = "exact mode" if result.exact else "default mode"
    lines = [
        f"{mode}, drafts by {result.drafter}: {result.differences} of {result.tokens} tokens differ "
        f"({result.per_thousand:.3f} per 1000)",
        f"texts          {result.texts - result.texts_that_part} of {result.texts} equal token for token, "
        f"{result.texts_equal} as decoded text (Spec-Bench's rule)",
        f"speculation    {result.accepted} of {result.drafted} drafted tokens accepted in {result.steps} steps",
    ]
    if result.largest_lead is not None:
        lines.insert(1, f"largest lead   {result.largest_lead:.4f}: of the plain choice, where another one was made")
    return "\n".join(lines)
