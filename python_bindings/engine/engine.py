"""`Engine`: many texts at once on one model, each a stream of its own.

    with blockffn.Engine("model.gguf", n_parallel=8) as engine:
        streams = [engine.submit(prompt, params) for prompt in prompts]

One thread of the engine's own evaluates; `submit`, `Stream.cancel` and reading are for any thread.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
import weakref
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from threading import Condition, Thread
from types import TracebackType
from typing import Any

from blockffn import library
from blockffn.engine.budget import Budget
from blockffn.engine.cache import SharedCache
from blockffn.engine.job import Job
from blockffn.engine.merged import merged
from blockffn.engine.params import GenerationParams, Token
from blockffn.engine.scheduler import Scheduler, Shape
from blockffn.engine.stream import QueueFull, Stream
from blockffn.engine.text import TextPieces
from blockffn.errors import BlockffnError
from blockffn.llama import Llama
from blockffn.pieces import PieceTokenizer
from blockffn.speculative import target
from blockffn.speculative.drafter import Drafter, DrafterLike, open_drafter
from blockffn.speculative.loop import Text
from blockffn.speculative.sampling import Chain, draw_of
from blockffn.union_stats import UnionStats

DEFAULT_CONTEXT = 4096  # tokens of all texts together, where none is asked for
OWN_CONTEXT = 64  # of the model that the engine loads: it is asked for its vocabulary only
N_BATCH = 512


class Engine:
    """Generates many texts in one batch: continuous batching over the sequences of one context.

    model: a file, or a blockffn.Llama, whose weights are shared; its own text is not touched. n_parallel: texts at
    once. n_ctx: tokens that the cache holds, of all texts together. max_queue: texts that may wait beyond those that
    run. drafter: as blockffn.Llama takes it; each text has its own, drafts are chains, and their length is chosen by
    measured speed, or fixed by draft_tokens. exact: the tokens of a text are those that it has alone, whoever else is
    served. Further arguments are those of blockffn.Llama.
    """

    def __init__(
        self,
        model: str | Path | Llama,
        *,
        n_parallel: int = 8,
        drafter: DrafterLike | Sequence[DrafterLike] | None = None,
        exact: bool = False,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_batch: int = N_BATCH,
        max_queue: int = 64,
        draft_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (("n_parallel", n_parallel), ("n_batch", n_batch)):
            if value < 1:
                raise BlockffnError(f"{name}: expected a positive number, found {value}")
        self._owned = not isinstance(model, Llama)
        self.llm = model if isinstance(model, Llama) else Llama(model, n_ctx=OWN_CONTEXT, n_threads=n_threads, **kwargs)
        trained = int(self.llm._model.n_ctx_train())
        self.n_ctx = n_ctx or min(trained * n_parallel, DEFAULT_CONTEXT)
        self.n_parallel, self.max_queue, self.exact = n_parallel, max_queue, exact
        self._drafters: list[Drafter] = []
        changes = {"n_ctx": self.n_ctx, "n_seq_max": n_parallel, "n_batch": n_batch, "n_ubatch": n_batch}
        if n_threads:
            changes |= {"n_threads": n_threads, "n_threads_batch": n_threads}
        self._context = target.new_context(self.llm, exact, **changes)
        self.n_ctx = int(library.load().llama_n_ctx(self._context.ctx))
        try:
            self._scheduler = self._set_up(n_batch, open_drafter(drafter), draft_tokens)
        except BaseException:
            self._free()
            raise
        self._pieces, self._is_end = PieceTokenizer(self.llm), target.end_of_text(self.llm)
        self._numbers = itertools.count()
        self._arrived: list[Job] = []
        self._changed = Condition()
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = Thread(target=_drive, args=(weakref.ref(self),), name="blockffn-engine", daemon=True)
        self._thread.start()

    def _set_up(self, n_batch: int, drafter: Drafter | None, draft_tokens: int | None) -> Scheduler:
        """Return the scheduler, with a drafter for each place; they share the weights of the first one."""
        ctx, llm = self._context.ctx, _Host(self.llm, self.n_ctx, self._context.params)
        if drafter is not None:
            target.check_chains_fit(self.llm, drafter)
            drafter.attach(llm)
            self._drafters.append(drafter)
            for _ in range(self.n_parallel - 1):
                self._drafters.append(drafter.fork())
                self._drafters[-1].attach(llm)
        longest = 0 if drafter is None else min(drafter.max_chain, drafter.max_nodes, n_batch // self.n_parallel - 1)
        budget = Budget(max(longest, 0), draft_tokens)
        cache = SharedCache(ctx, self.n_parallel, rewinds=not (self.llm._is_recurrent or self.llm._is_hybrid))
        shape = Shape(self.llm.n_vocab(), self.llm.n_embd(), n_batch)
        return Scheduler(cache, shape, budget, self._drafters, target.union_counter(self.llm, ctx))

    def submit(self, prompt: str | Sequence[int], params: GenerationParams | None = None) -> Stream:
        """Take a text, or its tokens, and return its stream at once. QueueFull when too many wait already.

        Raises BlockffnError for a prompt that is empty or does not fit, and for parameters that cannot be used.
        """
        return self._submit(prompt, params or GenerationParams(), self.max_queue)

    def generate_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: GenerationParams | Sequence[GenerationParams] | None = None,
    ) -> list[Stream]:
        """Return the ended streams of all prompts, in their order; `params` for all or one for each."""
        return [stream.wait() for stream in self._submit_many(prompts, params)]

    def stream_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: GenerationParams | Sequence[GenerationParams] | None = None,
    ) -> AsyncIterator[tuple[int, Token]]:
        """Return an asynchronous iteration over (number of the prompt, token) of all prompts, as the tokens come.

        Leaving it cancels what still runs; `generate_many` says what `params` are.
        """
        return _tokens(self._submit_many(prompts, params))

    def _submit_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: GenerationParams | Sequence[GenerationParams] | None,
    ) -> list[Stream]:
        """Take all texts, whatever the queue holds; none where one of them is refused."""
        each = list(params) if isinstance(params, Sequence) else [params or GenerationParams()] * len(prompts)
        if len(each) != len(prompts):
            raise BlockffnError(f"params: expected one for each of {len(prompts)} prompts, found {len(each)}")
        streams: list[Stream] = []
        try:
            for prompt, one in zip(prompts, each, strict=True):
                streams.append(self._submit(prompt, one, None))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return streams

    def _submit(self, prompt: str | Sequence[int], params: GenerationParams, most: int | None) -> Stream:
        self._check_open()
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        job = self._job(tokens, params)
        with self._changed:
            self._check_open()
            waiting = len(self._arrived) + len(self._scheduler.waiting)
            free = sum(slot.job is None for slot in self._scheduler.slots)
            if most is not None and waiting - free >= most:
                raise QueueFull(f"{waiting} texts wait already, and at most {most} may (max_queue)")
            self._arrived.append(job)
            self._changed.notify()
        return job.stream

    def _check_open(self) -> None:
        if self._closing:
            raise self._failure or BlockffnError("this engine was closed")

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a prompt as llama_cpp's completions see it: special tokens are read as such."""
        return list(self.llm.tokenize(text.encode("utf-8"), add_bos=self.llm._model.add_bos_token(), special=True))

    def _job(self, tokens: list[int], params: GenerationParams) -> Job:
        """Return a checked job."""
        n_vocab, llm = self.llm.n_vocab(), self.llm
        if not tokens:
            raise BlockffnError("prompt: expected at least one token")
        if not all(0 <= token < n_vocab for token in tokens):
            raise BlockffnError(f"prompt: expected tokens from 0 to {n_vocab - 1}")
        if len(tokens) >= self.n_ctx:
            raise BlockffnError(f"prompt: {len(tokens)} tokens and the answer do not fit into n_ctx = {self.n_ctx}")
        seed = random.getrandbits(32) if params.seed is None else params.seed & 0xFFFFFFFF
        stream = Stream(next(self._numbers), tokens, params, seed)
        text = Text(tokens, self.n_ctx)
        sampler, draw = None, draw_of(params, seed)
        if not params.greedy:
            sampler = Chain(llm._model, params, seed, lambda: text.tokens, draw, self._is_end)
        record = self._scheduler.budget.record()
        limit = params.max_tokens if params.max_tokens and params.max_tokens > 0 else self.n_ctx
        longest = min(text.n + limit, self.n_ctx + 1)
        return Job(
            stream, text, longest, sampler, self._is_end, self._pieces.piece, TextPieces(params.stops), record, draw
        )

    def statistics(self) -> dict[str, Any]:
        """Return figures of the engine: texts that run and wait, steps, tokens, preemptions, cells in use."""
        scheduler = self._scheduler
        running = sum(slot.job is not None for slot in scheduler.slots)
        return {
            "running": running,
            "waiting": len(self._arrived) + len(scheduler.waiting),
            "steps": scheduler.steps,
            "tokens": scheduler.tokens,
            "preemptions": scheduler.preemptions,
            "seconds": scheduler.seconds,
            "loop_seconds": scheduler.loop_seconds,
            "cached": sum(slot.cached for slot in scheduler.slots),
            "n_ctx": self.n_ctx,
        }

    def union_stats(self) -> UnionStats:
        """Return the expert counters of all texts since the engine was opened (see UnionStats)."""
        return self.llm.union_stats(ctx=self._context.ctx)

    def close(self) -> None:
        """End every text ("cancelled") and free the context; the model too where the engine loaded it."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._free()

    def _free(self) -> None:
        if self._context is not None:
            for drafter in self._drafters:
                drafter.close_context()
            for drafter in self._drafters:
                drafter.close()
            self._context.close()
            self._context = None
            if self._owned:
                self.llm.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _turn(self) -> bool:
        """Serve everyone once, or wait a moment for work; False when the engine is closed."""
        scheduler = self._scheduler
        with self._changed:
            if not self._arrived and scheduler.idle and not self._closing:
                self._changed.wait(1.0)
            for job in self._arrived:
                heapq.heappush(scheduler.waiting, job)
            self._arrived.clear()
            if self._closing:
                scheduler.end_all("cancelled")
                return False
        try:
            scheduler.step()
        except BaseException as error:
            with self._changed:
                self._closing, self._failure = True, error
                scheduler.end_all("error", error)
                for job in self._arrived:
                    job.stream.finish("error", job.summary(), error)
            return False
        return True


async def _tokens(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, Token]]:
    """Yield the tokens of several streams without saying which have ended."""
    async with contextlib.aclosing(merged(streams)) as read:
        async for number, token in read:
            if token is not None:
                yield number, token


class _Host:
    """The model as drafters of an engine see it: with the engine's context."""

    def __init__(self, llm: Llama, n_ctx: int, params: Any) -> None:
        self._llm, self._n_ctx, self.context_params = llm, n_ctx, params

    def n_ctx(self) -> int:
        return self._n_ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)


def _drive(engine: weakref.ref[Engine]) -> None:
    """Run an engine until it is closed or forgotten."""
    while (alive := engine()) is not None and alive._turn():
        del alive
