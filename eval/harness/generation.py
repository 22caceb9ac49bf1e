"""Texts that tasks ask a model to write: side by side, or one after another where a drafter speeds up each.

for number, text in generate(llm, jobs, 8, seed=0):
    ...
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockffn.llama import Llama

PARALLEL = 8  # texts that are written side by side at most
CACHE = 8192  # tokens of all of them together, unless one alone has more
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@dataclass(frozen=True)
class Job:
    """A prompt, the most tokens that may follow it, texts that end what follows, and arguments of a sampler."""

    number: int
    tokens: list[int]
    limit: int
    stop: tuple[str, ...]
    sampling: dict[str, Any] = field(default_factory=dict)


def generate(llm: Llama, jobs: Sequence[Job], parallel: int, seed: int) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of each job, sorted by prompt; a text may still have a stop text at its end."""
    ordered = sorted(jobs, key=lambda job: job.tokens)
    if parallel > 1 and len(ordered) > 1 and llm.drafter is None:
        yield from _side_by_side(llm, ordered, min(parallel, PARALLEL, len(ordered)), seed)
    else:
        for job in ordered:
            yield job.number, _alone(llm, job, seed)


def _side_by_side(llm: Llama, jobs: Sequence[Job], parallel: int, seed: int) -> Iterator[tuple[int, str]]:
    from blockffn.engine import Engine
    from blockffn.engine.params import GenerationParams

    longest = max(len(job.tokens) + job.limit for job in jobs) + 1
    n_ctx = max(longest, min(CACHE, parallel * longest))
    with Engine(llm, n_parallel=parallel, exact=llm.exact, n_ctx=n_ctx, max_queue=len(jobs)) as engine:
        streams = []
        for job in jobs:
            options = {**GREEDY, **job.sampling}
            params = GenerationParams(max_tokens=job.limit, seed=seed + job.number, stop=job.stop, **options)
            streams.append(engine.submit(job.tokens, params))
        for job, stream in zip(jobs, streams, strict=True):
            yield job.number, stream.wait().text


def _alone(llm: Llama, job: Job, seed: int) -> str:
    import llama_cpp

    llm.set_seed(seed + job.number)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    options = {**GREEDY, **job.sampling}
    text = ""
    generation = llm.generate(job.tokens, temp=options.pop("temperature"), **options)
    for count, token in enumerate(generation, 1):
        if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
            break
        text += decoder.decode(llm.detokenize([token]))
        if count >= job.limit or any(word in text for word in job.stop):
            break
    generation.close()
    return text + decoder.decode(b"", final=True)
