"""Many texts on one engine that come, go away and give way at random: is each what it is alone, bit for bit?

    python tests/crowd.py MODEL.gguf --tokens 50000 --streams 8

Greedy and sampled texts, with beginnings in common, on a cache that is too small for all. The tokens of each, and their
log-probabilities, are compared with those of a blockffn.Llama in exact mode. Prints one line of figures; 1 where a text
differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blockffn
from blockffn import Engine, GenerationParams, Stream
from blockffn.engine.engine import N_BATCH
from blockffn.speculative import target
from blockffn.speculative.tree import log_total

N_CTX = 256
SAMPLED = {"temperature": 0.9, "top_k": 100}


@dataclass(frozen=True)
class Request:
    """A text that somebody asks for; it is cancelled after so many tokens, if at all."""

    prompt: tuple[int, ...]
    params: GenerationParams
    leaves: int | None


def requests(draw: random.Random, n_tokens: int, n_vocab: int) -> list[Request]:
    """Return requests for `n_tokens` tokens in all; half of the prompts begin as an earlier one does."""
    made: list[Request] = []
    wanted = 0
    while wanted < n_tokens:
        prompt = tuple(draw.randrange(3, n_vocab) for _ in range(draw.choice((1, 3, 10, 40))))
        if made and draw.random() < 0.5:
            earlier = draw.choice(made[-12:]).prompt
            prompt = (earlier[: draw.randint(1, len(earlier))] + prompt)[: N_CTX // 4]
        length = draw.choice((5, 20, 60, 120))
        sampling: dict[str, Any] = SAMPLED if draw.random() < 0.5 else {"temperature": 0.0}
        params = GenerationParams(max_tokens=length, logprobs=0, seed=draw.randrange(1 << 31), **sampling)
        made.append(Request(prompt, params, draw.randrange(length) if draw.random() < 0.2 else None))
        wanted += length if made[-1].leaves is None else made[-1].leaves
    return made


def crowd(engine: Engine, wanted: Sequence[Request], draw: random.Random) -> list[Stream]:
    """Ask for all, some at a time, in any order of asking, reading and leaving; return the ended streams."""
    coming, streams, open_ = list(wanted), [], dict[int, Stream]()
    while coming or open_:
        if coming and len(open_) < 2 * engine.n_parallel and (not open_ or draw.random() < 0.2):
            request = coming.pop(0)
            streams.append(engine.submit(request.prompt, request.params))
            open_[len(streams) - 1] = streams[-1]
            if request.leaves == 0:
                streams[-1].cancel()
            continue
        number = draw.choice(list(open_)[: engine.n_parallel])
        stream, leaves = open_[number], wanted[number].leaves
        read = list(itertools.islice(stream, draw.randint(1, 9)))
        if leaves is not None and len(stream.tokens) >= leaves:
            stream.cancel()
        if not read:
            del open_[number]
    return streams


def differences(llm: blockffn.Llama, wanted: Sequence[Request], streams: Sequence[Stream]) -> list[int]:
    """Return the numbers of the texts that are not those of the model alone."""
    is_end = target.end_of_text(llm)
    different = []
    for number, (request, stream) in enumerate(zip(wanted, streams, strict=True)):
        # the token that ends a text is there where it carries the last character
        found = [(token.id, token.logprob) for token in stream.tokens if not is_end(token.id)]
        n = len(found) if stream.finish_reason == "cancelled" else request.params.max_tokens
        text = itertools.islice(alone(llm, request), n)
        if found != list(itertools.takewhile(lambda token: not is_end(token[0]), text)):
            different.append(number)
    return different


def alone(llm: blockffn.Llama, request: Request) -> Iterator[tuple[int, float]]:
    """Return the tokens of a text on the model alone, and their log-probabilities."""
    params = request.params
    llm.set_seed(params.seed or 0)
    for token in llm.generate(
        list(request.prompt), temp=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p
    ):
        row = llm.loop.row
        assert row is not None
        yield token, float(row[token]) - float(log_total(row[None])[0])


def serve(model: Path, n_tokens: int, streams: int, seed: int, n_threads: int, **more: Any) -> dict[str, Any]:
    """Return the figures of a crowd of texts: how many there were, and how many differ."""
    draw = random.Random(seed)
    with Engine(model, n_parallel=streams, n_ctx=N_CTX, n_threads=n_threads, exact=True, **more) as engine:
        wanted = requests(draw, n_tokens, engine.llm.n_vocab())
        found = crowd(engine, wanted, draw)
        figures = engine.statistics()
    with blockffn.Llama(model, n_ctx=N_CTX, n_batch=N_BATCH, n_threads=n_threads, exact=True) as llm:
        different = differences(llm, wanted, found)
    ends = [stream.finish_reason for stream in found]
    return {
        "texts": len(found),
        "tokens": sum(len(stream.tokens) for stream in found),
        "sampled": sum(not request.params.greedy for request in wanted),
        "cancelled": ends.count("cancelled"),
        "errors": ends.count("error"),
        "preemptions": figures["preemptions"],
        "reused_tokens": sum(stream.statistics["reused_n"] for stream in found),
        "different": len(different),
    }


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draft", help="drafter, as blockffn.Engine takes it")
    args = parser.parse_args()
    more = {"drafter": args.draft, "draft_tokens": 3} if args.draft else {}
    found = serve(args.model, args.tokens, args.streams, args.seed, args.threads, **more)
    print(json.dumps({"model": args.model.name, "streams": args.streams, **found}))
    return int(found["different"] + found["errors"] > 0)


if __name__ == "__main__":
    sys.exit(main())
