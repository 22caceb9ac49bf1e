"""What lm_eval's requests cost: log-likelihoods together and one by one, generated texts beside llama-server.

    $ blockffn bench harness -m model.gguf -f text.txt

Questions are pieces of the text, each with four endings from elsewhere in it: `together` is one call of the model
class of `blockffn eval lm-eval`, `prefix kept` answers request after request and evaluates again only what differs from
the one before, `one by one` evaluates every request from its first token on. Generated texts continue other pieces:
by the model class, and by lm_eval's own route to a server (local-completions) with as many requests at once as texts
run side by side, against llama-server of the same tree. llama-server has no log-probabilities of a prompt (`echo`),
so that it is no peer for the first part. Every round has texts of its own, since a server keeps prompts. All ways take
turns in one process; medians over the rounds, with the lowest and the highest. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from blockffn.commands.common import count
from blockffn.errors import BlockffnError
from blockffn.eval.bench import serving
from blockffn.threads import default_threads

ENDINGS = 4
LINE = "{name:<34} {n:9} {rate:10.2f} ({low:.2f}-{high:.2f})"
Task = tuple[str, int, Callable[[int], Any]]  # name, requests, what answers those of a round


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn bench harness`."""
    parser.add_argument("-m", "--model", required=True, metavar="M.gguf", help="model file")
    parser.add_argument("-f", "--file", required=True, metavar="FILE", help="text, UTF-8")
    parser.add_argument("--questions", type=count, default=12, metavar="N", help="with four endings each (default: 12)")
    parser.add_argument("--context", type=count, default=64, metavar="N", help="tokens before an ending (default: 64)")
    parser.add_argument("--ending", type=count, default=8, metavar="N", help="tokens of an ending (default: 8)")
    parser.add_argument("--texts", type=count, default=16, metavar="N", help="generated (default: 16)")
    parser.add_argument("--tokens", type=count, default=48, metavar="N", help="of a generated text (default: 48)")
    parser.add_argument("--rounds", type=count, default=3, metavar="N", help="default: 3")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")


def run(args: argparse.Namespace) -> int:
    """Measure; print a table and one line of JSON."""
    from blockffn.eval.environment import environment, headline
    from blockffn.eval.harness.generation import PARALLEL
    from blockffn.eval.harness.model import BlockffnLM

    threads = args.threads or default_threads()
    n_ctx = args.context + args.ending + args.tokens + 64
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(contextlib.closing(BlockffnLM(args.model, n_ctx=n_ctx, n_threads=threads)))
        questions, contexts = _pieces(model, args)
        command = serving.llama_server(args.model, PARALLEL, PARALLEL * n_ctx, threads)
        base = stack.enter_context(serving.serving("llama-server", command))
        tasks = scoring(model, questions) + generating(model, _client(base, PARALLEL), contexts, args.tokens)
        rates = measure(tasks, args.rounds)
    where = environment() | {"threads": threads, "model": args.model}
    rows = [figures(name, n, rates[name]) for name, n, _ in tasks]
    print(headline(where, threads))
    print(f"{'':<34} requests requests/s (range)")
    for row in rows:
        print(LINE.format(**row))
    print(json.dumps({"environment": where, "rows": rows}))
    return 0


def measure(tasks: Sequence[Task], rounds: int) -> dict[str, list[float]]:
    """Return requests per second by task, one figure a round; the first round of all is not counted."""
    rates: dict[str, list[float]] = {name: [] for name, _, _ in tasks}
    for number in range(1 + rounds):
        for name, n, answer in tasks:
            started = time.perf_counter()
            answer(number)
            rates[name].append(n / (time.perf_counter() - started))
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return {name: values[1:] for name, values in rates.items()}


def figures(name: str, n: int, values: Sequence[float]) -> dict[str, Any]:
    """Return the row of a task."""
    return {"name": name, "n": n, "rate": statistics.median(values), "low": min(values), "high": max(values)}


def scoring(model: Any, questions: Sequence[tuple[list[int], list[int]]]) -> list[Task]:
    """Return the ways to score (context, ending) pairs, neighbours with the same context."""
    from blockffn.eval.harness.scorer import Scorer

    together, single = Scorer(model.llm, model.batch_size), Scorer(model.llm, 1)

    def alone(forget: bool) -> None:
        for question in questions:
            if forget:
                single.score([([question[0][-1]], [question[1][0]])])  # a text that begins otherwise
            single.score([question])

    def at_once(_: int) -> None:
        together.score([([questions[0][0][-1]], [questions[0][1][0]])])
        together.score(questions)

    n = len(questions)
    return [
        ("log-likelihoods, together", n, at_once),
        ("log-likelihoods, prefix kept", n, lambda _: alone(False)),
        ("log-likelihoods, one by one", n, lambda _: alone(True)),
    ]


def generating(model: Any, client: Any, contexts: Sequence[Sequence[str]], n_tokens: int) -> list[Task]:
    """Return the ways to continue texts, others in every round, by at most `n_tokens` tokens."""
    from lm_eval.api.instance import Instance

    def requests(number: int) -> list[Any]:
        arguments: dict[str, Any] = {"until": [], "max_gen_toks": n_tokens, "do_sample": False}
        found = enumerate(contexts[number])
        return [Instance("generate_until", {}, (context, dict(arguments)), index) for index, context in found]

    n = len(contexts[0])
    return [
        ("texts, blockffn", n, lambda number: model.generate_until(requests(number), disable_tqdm=True)),
        ("texts, llama-server", n, lambda number: client.generate_until(requests(number), disable_tqdm=True)),
    ]


def _client(base: str, parallel: int) -> Any:
    """Return lm_eval's own model of a server."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    options: dict[str, Any] = {"tokenizer_backend": None, "tokenized_requests": False, "num_concurrent": parallel}
    return LocalCompletionsAPI(base_url=f"{base}/v1/completions", model="model", **options)


def _pieces(model: Any, args: argparse.Namespace) -> tuple[list[tuple[list[int], list[int]]], list[list[str]]]:
    """Return (context, ending) pairs, and by round the beginnings of texts to generate."""
    with open(args.file, encoding="utf-8") as file:
        tokens = model.tok_encode(file.read(), add_special_tokens=False)
    piece = args.context + ENDINGS * args.ending
    texts = (1 + args.rounds) * args.texts
    needed = args.questions * piece + texts * args.context
    if len(tokens) < needed:
        raise BlockffnError(f"{args.file}: expected at least {needed} tokens, found {len(tokens)}; give a longer text")
    questions = []
    for start in range(0, args.questions * piece, piece):
        context, endings = tokens[start : start + args.context], tokens[start + args.context : start + piece]
        questions += [(context, endings[i * args.ending : (i + 1) * args.ending]) for i in range(ENDINGS)]
    rest = tokens[args.questions * piece :]
    starts = range(0, texts * args.context, args.context)
    contexts = [model.llm.detokenize(rest[i : i + args.context]).decode(errors="replace") for i in starts]
    return questions, [contexts[i : i + args.texts] for i in range(0, texts, args.texts)]
