"""Many greedy texts at once: tokens per second of one stream and of several, in Python and over HTTP.

    $ blockffn bench streams --shape 1.2b
    $ blockffn bench streams -m model.gguf -f text.txt --streams 8 --draft ngram
    $ blockffn bench streams --shape 1.2b --shared 256

Ways: `blockffn.Engine` in this process, `blockffn serve`, and llama-server of the same tree, each with its weights
loaded once. In every round each way writes the same texts, first one after another, then all at once; ways take turns.
Prompts are pieces of the text that no way has seen before; with `--shared` those of a round begin alike, as requests
behind one system prompt do. The time is that of all texts, prompts included; speeds are medians over the rounds, with
the lowest and the highest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from blockffn.commands.common import count
from blockffn.errors import BlockffnError
from blockffn.eval.bench import serving
from blockffn.eval.studies.text import add_model_arguments, model_and_text
from blockffn.threads import default_threads

WAYS = ("engine", "serve", "llama-server")
LINE = "{way:<14} {one:12.1f} ({one_low:.1f}-{one_high:.1f}) {all:12.1f} ({all_low:.1f}-{all_high:.1f}) {ratio:8.2f}"
Prompts = Sequence[Sequence[int]]
Write = Callable[[Prompts], int]  # prompts at once -> tokens written
Timed = tuple[int, float]  # tokens, seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn bench streams`."""
    add_model_arguments(parser)
    parser.add_argument("--streams", type=count, default=8, metavar="N", help="texts at once (default: 8)")
    parser.add_argument("--tokens", type=count, default=48, metavar="N", help="of a text (default: 48)")
    parser.add_argument("--prompt", type=count, default=32, metavar="N", help="tokens of a prompt (default: 32)")
    parser.add_argument("--shared", type=int, default=0, metavar="N", help="tokens before that all prompts share (0)")
    parser.add_argument("--rounds", type=count, default=5, metavar="N", help="default: 5")
    parser.add_argument("--ways", default=",".join(WAYS), help="of %(default)s (default: all)")
    parser.add_argument("--draft", metavar="ngram|PATH", help="drafter of engine and serve")
    parser.add_argument("--exact", action="store_true", help="exact mode of engine and serve")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")


def run(args: argparse.Namespace) -> int:
    """Measure; print a table and one line of JSON."""
    from blockffn.eval.environment import environment, headline

    ways = args.ways.split(",")
    if unknown := set(ways) - set(WAYS):
        raise BlockffnError(f"--ways: expected some of {', '.join(WAYS)}, found {', '.join(sorted(unknown))}")
    threads = args.threads or default_threads()
    path, text = model_and_text(args.shape, args.model, args.file)
    if args.shared < 0:
        raise BlockffnError(f"--shared: expected 0 or more tokens, found {args.shared}")
    with contextlib.ExitStack() as stack:
        prompts = _prompts(path, text, args)
        writers = {way: stack.enter_context(OPEN[way](path, args, threads)) for way in ways}
        rates = measure(writers, prompts)
    where = environment() | {"threads": threads, "model": path, "streams": args.streams, "tokens": args.tokens}
    where["shared"] = args.shared
    rows = [figures(way, *rates[way]) for way in ways]
    print(headline(where, threads))
    print(f"{'':<14} tokens/s: one after another (range) {args.streams:>6} at once (range)    ratio")
    for row in rows:
        print(LINE.format(**row))
    print(json.dumps({"environment": where, "rows": rows}))
    return 0


def measure(
    writers: dict[str, Write], rounds: Sequence[tuple[Prompts, Prompts]]
) -> dict[str, tuple[list[float], list[float]]]:
    """Return, by way, tokens per second of each round: its first prompts one after another, its second ones at once.

    The first round is for warming up: graphs are built, weights read.
    """
    rates: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in writers}
    for write in writers.values():
        write(rounds[0][0][:1])
    for number, (single, together) in enumerate(rounds[1:], 1):
        alone: dict[str, list[Timed]] = {way: [] for way in writers}
        for prompt in single:  # text by text, so that a slow minute of the machine meets all ways
            for way, write in writers.items():
                alone[way].append(_timed(write, [prompt]))
        for way, write in writers.items():
            rates[way][0].append(sum(n for n, _ in alone[way]) / sum(seconds for _, seconds in alone[way]))
            tokens, seconds = _timed(write, together)
            rates[way][1].append(tokens / seconds)
        print(f"round {number} of {len(rounds) - 1}", file=sys.stderr, flush=True)
    return rates


def figures(way: str, one: Sequence[float], several: Sequence[float]) -> dict[str, Any]:
    """Return medians and ranges of a way, and the median ratio of several to one."""
    row: dict[str, Any] = {"way": way}
    for name, values in (("one", one), ("all", several)):
        row |= {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}
    return row | {"ratio": row["all"] / row["one"]}


def _timed(write: Write, prompts: Prompts) -> Timed:
    started = time.perf_counter()
    return write(prompts), time.perf_counter() - started


def _prompts(path: str, text: Any, args: argparse.Namespace) -> list[tuple[Prompts, Prompts]]:
    """Return the prompts of a round to warm up and of all others: those to ask one by one, and those to ask at once."""
    import blockffn

    n = args.shared + args.streams * args.prompt
    with blockffn.Llama(path, n_ctx=64, n_threads=1) as llm:
        tokens = text(llm, (1 + args.rounds) * n)
    rounds: list[tuple[Prompts, Prompts]] = []
    for start in range(0, len(tokens), n):
        shared, own = tokens[start : start + args.shared], tokens[start + args.shared : start + n]
        pieces = [own[i : i + args.prompt] for i in range(0, len(own), args.prompt)]
        # backwards they are other texts
        rounds.append(([shared + piece for piece in pieces], [shared[::-1] + piece[::-1] for piece in pieces]))
    return rounds


def _n_ctx(args: argparse.Namespace) -> int:
    """Return the tokens that the caches hold: every text whole."""
    return int(args.streams * (args.shared + args.prompt + args.tokens + 16))


@contextlib.contextmanager
def _engine(path: str, args: argparse.Namespace, threads: int) -> Iterator[Write]:
    import blockffn
    from blockffn.engine.params import GenerationParams

    params = GenerationParams(max_tokens=args.tokens, temperature=0.0, ignore_eos=True)
    options: dict[str, Any] = {"n_parallel": args.streams, "n_ctx": _n_ctx(args), "n_threads": threads}
    with blockffn.Engine(path, drafter=args.draft, exact=args.exact, **options) as engine:
        yield lambda prompts: sum(len(stream.tokens) for stream in engine.generate_many(prompts, params))


@contextlib.contextmanager
def _over_http(way: str, command: list[str], args: argparse.Namespace) -> Iterator[Write]:
    body = {"max_tokens": args.tokens, "temperature": 0, "ignore_eos": True}
    with serving.serving(way, command) as base, ThreadPoolExecutor(args.streams) as pool:

        def ask(prompt: Sequence[int]) -> int:
            return int(serving.complete(base, {"prompt": list(prompt), **body})["usage"]["completion_tokens"])

        yield lambda prompts: sum(pool.map(ask, prompts))


def _serve(path: str, args: argparse.Namespace, threads: int) -> contextlib.AbstractContextManager[Write]:
    command = serving.our_server(path, args.streams, _n_ctx(args), threads)
    command += ["--draft", args.draft] if args.draft else []
    return _over_http("serve", command + (["--exact"] if args.exact else []), args)


def _llama_server(path: str, args: argparse.Namespace, threads: int) -> contextlib.AbstractContextManager[Write]:
    return _over_http("llama-server", serving.llama_server(path, args.streams, _n_ctx(args), threads), args)


OPEN = {"engine": _engine, "serve": _serve, "llama-server": _llama_server}
