"""Speculative decoding beside its peers, on the same prompts, in one run; or other engines at equal work.

$ blockffn bench peers -m model-Q4_0.gguf --draft draft.gguf -f code.py
$ blockffn bench peers --engine NAME=PATH/llama-bench          # see blockffn.eval.bench.engines

Contenders: blockffn.Llama plain, with n-grams and with the draft model (the automatic choice, and llama-cli's fixed
number of tokens); llama_cpp.Llama as it is, plain and with its own LlamaPromptLookupDecoding, on the patched library
because nothing else loads the model; llama-cli of the patched tree, plain and with the same draft model. Each prompt is
continued greedily by all of them in turn, before the next prompt. Speeds count from the first token to the last;
llama-cli's is its own figure. One that fails is reported with its error, and leaves the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from blockffn.commands.common import count
from blockffn.errors import BlockffnError
from blockffn.eval.bench import peer_program
from blockffn.eval.bench.process import Channel
from blockffn.eval.environment import PROFILES, environment, headline, profile_directory
from blockffn.threads import default_threads

LOOKUP = 10  # tokens, the default of LlamaPromptLookupDecoding
PROGRAM_DRAFT = 3  # tokens, the default of llama-cli

Answer = dict[str, Any]


class Runner(Protocol):
    """Continues prompts; see bench_peer_worker for the answer."""

    def generate(self, prompt: str, tokens: int) -> Answer:
        """Continue one prompt by so many tokens."""
        ...

    def close(self) -> None:
        """End."""
        ...


@dataclass(frozen=True)
class Contender:
    """Who runs with which drafter: rows carry both names."""

    program: str  # blockffn, llama_cpp.Llama or llama-cli
    drafter: str
    options: tuple[str, ...]  # of the worker, or of the program

    def start(self, model: str, threads: int, directory: Path | None) -> Runner:
        """Start it; a worker loads its model with the first prompt."""
        if self.program == "llama-cli":
            return peer_program.Program(model, threads, directory, self.options)
        command = [sys.executable, "-m", "blockffn.eval.bench.peer_worker", model, "--threads", str(threads)]
        return Worker(Channel(self.program, [*command, *self.options], directory))


class Worker:
    """A contender in Python."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def generate(self, prompt: str, tokens: int) -> Answer:
        """Continue one prompt."""
        return self.channel.ask({"prompt": prompt, "tokens": tokens})

    def close(self) -> None:
        """End the process."""
        self.channel.close()


def contenders(draft: str | None) -> list[Contender]:
    """Return who takes part; without a draft model, those that need none."""
    found = [Contender("blockffn", "none", ()), Contender("blockffn", "ngram", ("--draft", "ngram"))]
    stock = [Contender("llama_cpp.Llama", "none", ("--stock",))]
    stock += [Contender("llama_cpp.Llama", "prompt lookup", ("--stock", "--lookup", str(LOOKUP)))]
    program = [Contender("llama-cli", "none", ())]
    if draft is not None:
        name, chain = Path(draft).stem, f"chain {PROGRAM_DRAFT}"
        found += [Contender("blockffn", name, ("--draft", draft))]
        found += [Contender("blockffn", f"{name}, {chain}", ("--draft", draft, "--plan", chain))]
        program += [Contender("llama-cli", f"{name}, {chain}", peer_program.draft_options(draft, PROGRAM_DRAFT))]
    return [*found, *stock, *program]


def prompts(text: str, number: int, length: int) -> list[str]:
    """Return `number` pieces of about `length` characters from all over the text, each from the start of a line."""
    starts = [0, *(i + 1 for i, char in enumerate(text) if char == "\n" and i + 1 + length <= len(text))]
    if len(text) < length or len(starts) < number:
        raise BlockffnError(f"the text has {len(text)} characters: expected {number} lines with {length} after each")
    return [
        text[start : start + length].rstrip() for start in (starts[i * len(starts) // number] for i in range(number))
    ]


@dataclass
class Entry:
    """A contender at work: its answers by prompt, or why it left."""

    contender: Contender
    runner: Runner
    answers: dict[int, list[Answer]]
    failure: str = ""

    def run(self, number: int, prompt: str, tokens: int) -> None:
        """Continue one prompt and keep the answer."""
        if self.failure:
            return
        try:
            self.answers.setdefault(number, []).append(self.runner.generate(prompt, tokens))
        except BlockffnError as error:
            self.failure = str(error)


def measure(
    model: str, chosen: Sequence[Contender], texts: Sequence[str], tokens: int, rounds: int, threads: int,
    directory: Path | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return a row per contender. The first prompt is run once more beforehand, to warm up."""
    entries = [Entry(contender, contender.start(model, threads, directory), {}) for contender in chosen]
    try:
        for entry in entries:
            entry.run(0, texts[0], min(tokens, 16))
            entry.answers.clear()
        for turn in range(rounds):
            for number, prompt in enumerate(texts):
                for entry in entries if (turn + number) % 2 == 0 else reversed(entries):
                    entry.run(number, prompt, tokens)
        return [row(entry, entries[0], Path(model).name) for entry in entries]
    finally:
        for entry in entries:
            entry.runner.close()


def row(entry: Entry, first: Entry, model: str) -> dict[str, Any]:
    """Return the figures of one contender: all tokens over the sum of each prompt's median seconds."""
    found: dict[str, Any] = {"model": model, "ffn": "union", "program": entry.contender.program}
    found |= {"drafter": entry.contender.drafter, "phase": "decode", "n": None, "failure": entry.failure or None}
    if entry.failure or not entry.answers:
        return found
    per_token = {i: [a["seconds"] / (a["tokens"] - 1) for a in answers] for i, answers in entry.answers.items()}
    low, middle, high = np.percentile([values for values in per_token.values()], [25, 50, 75], axis=1).sum(axis=1)
    every = [answer for answers in entry.answers.values() for answer in answers]
    total = {name: sum(answer[name] for answer in every) for name in ("steps", "drafted", "accepted")}
    return found | {
        "tokens_per_second": len(per_token) / middle,
        "spread": (high - low) / 2 / middle,
        "tokens_per_step": (total["steps"] + total["accepted"]) / total["steps"],
        "acceptance": total["accepted"] / total["drafted"] if total["drafted"] else None,
        "peak_rss_mb": max(answer["peak_rss_mb"] for answer in every),
        "same_text": sum(a[0]["text"] == first.answers[i][0]["text"] for i, a in entry.answers.items()),
        "prompts": len(per_token),
        "samples": len(every),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as text."""
    width = max(len(f"{r['program']} {r['drafter']}") for r in rows) + 2
    lines = [f"{'':<{width}}    tokens/s       / plain  tokens/step  accepted  peak memory   text of the first"]
    plain = rows[0].get("tokens_per_second")
    for r in rows:
        name = f"{r['program']}, {r['drafter']}"
        if r["failure"]:
            lines.append(f"{name:<{width}}failed: {r['failure']}")
            continue
        accepted = "-" if r["acceptance"] is None else f"{100 * r['acceptance']:.0f} %"
        line = f"{name:<{width}}{r['tokens_per_second']:8.1f} +-{100 * r['spread']:3.0f} %"
        line += f"{r['tokens_per_second'] / plain:7.2f} x" if plain else ""
        line += f"{r['tokens_per_step']:13.2f}{accepted:>10}{r['peak_rss_mb']:10.0f} MB"
        lines.append(line + f"{r['same_text']:8} of {r['prompts']}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn bench peers`."""
    parser.add_argument("-m", "--model", metavar="M.gguf", help="model in the expert layout")
    parser.add_argument("--draft", metavar="D.gguf", help="draft model with the same vocabulary")
    parser.add_argument("-f", "--file", metavar="FILE", help="text that the prompts are cut from")
    parser.add_argument(
        "--engine", action="append", metavar="NAME=PATH", help="instead of -m: a llama-bench at equal work; repeatable"
    )
    parser.add_argument("--type", default="Q4_0", metavar="TYPE", help="with --engine: weight type (Q4_0)")
    parser.add_argument("--prompts", type=count, default=6, metavar="N", help="default: %(default)s")
    parser.add_argument("--length", type=count, default=400, metavar="N", help="characters of a prompt (400)")
    parser.add_argument("--tokens", type=count, default=128, metavar="N", help="per prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")
    parser.add_argument("--profile", choices=PROFILES, help="libraries of build/<profile>")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Let all contenders run, print the table and, on request, one line of JSON."""
    if args.engine:
        return _run_engines(args)
    if not args.model or not args.file:
        raise BlockffnError("expected -m M.gguf with -f FILE, or --engine NAME=PATH")
    for path in filter(None, (args.model, args.draft, args.file)):
        if not Path(path).is_file():
            raise BlockffnError(f"{path}: no such file")
    directory, threads = profile_directory(args.profile), args.threads or default_threads()
    texts = prompts(Path(args.file).read_text(encoding="utf-8"), args.prompts, args.length)
    rows = measure(args.model, contenders(args.draft), texts, args.tokens, args.rounds, threads, directory)
    where = environment(directory) | {"threads": threads, "tokens": args.tokens, "rounds": args.rounds}
    print(headline(where, threads))
    print(table(rows))
    if args.json:
        print(json.dumps({"environment": where, "rows": rows}))
    return 0


def _run_engines(args: argparse.Namespace) -> int:
    from blockffn.eval.bench import engines
    from blockffn.eval.planted.equal_work import equal_work

    if args.model or args.draft or args.file:
        raise BlockffnError("--engine: makes its files itself; -m, --draft and -f do not go with it")
    directory, threads = profile_directory(args.profile), args.threads or default_threads()
    for text in args.engine:  # before anything is written
        engines.parse_engine(text, Path())
    work = equal_work(kind=args.type, say=_say)
    rows = engines.measure(engines.engines(work, args.engine, directory), threads, args.rounds, say=_say)
    where = environment(directory) | {"threads": threads, "rounds": args.rounds, "type": args.type}
    where |= {"experts_per_token": work.n_used}
    print(headline(where, threads))
    print(engines.table(rows))
    if args.json:
        print(json.dumps({"environment": where, "rows": rows}))
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
