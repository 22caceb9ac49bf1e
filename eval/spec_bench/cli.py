"""`blockffn eval spec-bench`: plain and speculative answers to a question file, in turns, with their speeds.

    $ blockffn eval spec-bench -m model.gguf --questions question.jsonl --output answers.jsonl --draft ngram
    $ blockffn eval spec-bench ... --temp 1 --workers 2 --plot chart.png
    $ blockffn eval spec-bench ... --ray auto --workers 8 --threads 4

The same command again goes on where the last one ended, and prints the table when nothing is left.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from blockffn.commands.common import count
from blockffn.errors import BlockffnError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("-m", "--model", required=True, metavar="M.gguf", help="model file")
    parser.add_argument("--questions", required=True, metavar="F.jsonl", help="questions of Spec-Bench or SPEED-Bench")
    parser.add_argument(
        "--output", required=True, metavar="O.jsonl", help="answers with drafts; the plain ones go to O-baseline.jsonl"
    )
    parser.add_argument("--draft", default="ngram", metavar="ngram|PATH", help="drafter (default: ngram)")
    parser.add_argument("--chain", type=count, metavar="N", help="drafts of N tokens (default: as many as pay)")
    parser.add_argument("--exact", action="store_true", help="greedy text with drafts equals plain greedy text")
    parser.add_argument("--temp", type=_temperature, default=0.0, metavar="T", help="temperature, 0 = greedy (default)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sampler, for both runs (default: 0)")
    parser.add_argument("-n", "--max-tokens", type=count, default=1024, metavar="N", help="of a turn (default: 1024)")
    parser.add_argument("--categories", default="", metavar="A,B", help="only these categories or groups (mt_bench)")
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N questions")
    parser.add_argument("--per-category", type=count, metavar="N", help="only the first N questions of each category")
    parser.add_argument("--plain", action="store_true", help="turns as they are, without the model's chat template")
    parser.add_argument("-c", "--ctx-size", type=count, metavar="N", help="context (default: the trained one, <= 4096)")
    parser.add_argument("--workers", type=count, default=1, metavar="N", help="processes, each with cores of its own")
    parser.add_argument("--ray", metavar="ADDRESS", help="workers of a Ray cluster (auto, or HOST:PORT)")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads of a worker (default: its cores)")
    parser.add_argument("--ffn", choices=("union", "dense"), default="union", help="sparse op or every expert")
    parser.add_argument("--plot", metavar="FILE", help="bar chart (png, svg, pdf)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected 0 or a positive number, found {text}")
    return value


def run(args: argparse.Namespace) -> int:
    """Answer what is left and print the table; returns the exit code."""
    from blockffn import _capi
    from blockffn.eval.environment import environment, headline
    from blockffn.eval.progress import Progress
    from blockffn.eval.spec_bench.answers import AnswerFiles
    from blockffn.eval.spec_bench.questions import read_questions, select
    from blockffn.eval.spec_bench.report import summarize, table
    from blockffn.eval.spec_bench.workers import Crew, answers, describe

    names = [name.strip() for name in args.categories.split(",") if name.strip()]
    questions = select(read_questions(args.questions), names, args.limit, args.per_category)
    settings = _settings(args)
    _capi.read_header(args.model)
    crew = Crew(settings, args.workers, args.threads, args.ctx_size, args.ray)
    files = AnswerFiles(args.output)
    done = files.open(settings.stamp(), questions)
    left = [question for question in questions if question.id not in files.records]
    with Progress(len(questions), "question", done) as progress:
        for records in answers(left, crew):
            files.add(records)
            progress.step()
    figures = summarize(files.records)
    where = environment()
    figures |= {"settings": settings.stamp(), "crew": describe(crew), "environment": where}
    if args.plot:
        from blockffn.eval.spec_bench.plot import plot

        plot(figures, args.plot, _title(figures))
    if args.json:
        print(json.dumps(figures))
    else:
        print(_title(figures), headline(where, crew.threads_each()), "", table(figures), sep="\n")
    return 0


def _settings(args: argparse.Namespace) -> Any:
    from blockffn.eval.spec_bench.session import Settings

    if args.draft != "ngram" and not os.path.isfile(args.draft):
        raise BlockffnError(f"--draft {args.draft}: no such file; expected ngram, a draft model or an EAGLE head")
    return Settings(
        model=os.path.abspath(args.model),
        draft=args.draft if args.draft == "ngram" else os.path.abspath(args.draft),
        exact=args.exact,
        temperature=args.temp,
        seed=args.seed,
        max_tokens=args.max_tokens,
        plain=args.plain,
        ffn=args.ffn,
        chain=args.chain,
    )


def _title(figures: dict[str, Any]) -> str:
    settings, crew = figures["settings"], figures["crew"]
    mode = f" of {settings['chain']} tokens" if settings["chain"] else ""
    mode += ", exact mode" if settings["exact"] else ""
    workers = f", {crew['workers']} workers" if crew["workers"] > 1 else ""
    return (
        f"{settings['model']}, drafts by {settings['draft']}{mode}, temperature {settings['temperature']:g}, "
        f"up to {settings['max_tokens']} tokens a turn{workers}"
    )
