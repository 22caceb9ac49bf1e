"""The model behind the server: one engine, who may use it now, and what its answers cost.

    service = Service(llm, drafter="ngram", limits=Limits())
    streams = await service.submit([(tokens, params)])

Everything here runs in the event loop; the engine has a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from blockffn.engine.merged import merged
from blockffn.errors import BlockffnError
from blockffn.server.errors import ApiError
from blockffn.server.limits import Limits
from blockffn.server.totals import Totals

RETRY_AFTER = 1  # seconds; a place in the queue becomes free with every answer that ends


class Service:
    """Admission to the engine.

    open_engine(draft, exact) makes one; `draft` and `exact` may change while nobody is served.
    """

    def __init__(
        self, llm: Any, open_engine: Callable[[bool, bool], Any], limits: Limits, name: str, draft: bool, exact: bool
    ) -> None:
        self.llm, self.limits, self.name = llm, limits, name
        self.created = int(time.time())
        self.has_drafter, self.draft, self.exact = draft, draft, exact
        self._open = open_engine
        self.engine = open_engine(draft, exact)
        self.running: set[Any] = set()  # streams that have not been released
        self.totals = Totals()
        self.stopping = False
        self.cut = 0  # answers that were ended by the server's stop
        self._changing = asyncio.Lock()

    async def submit(self, texts: Sequence[tuple[list[int], Any]]) -> list[Any]:
        """Return the streams of several texts, all or none; ApiError 429 when too many wait, 503 when stopping."""
        async with self._changing:
            if self.stopping:
                raise ApiError(503, "the server is stopping", code="stopping", retry_after=RETRY_AFTER)
            if len(texts) > self.limits.streams:
                raise ApiError(
                    400, f"n: expected at most {self.limits.streams} answers at once, found {len(texts)}", "n"
                )
            if len(self.running) + len(texts) > self.limits.streams:
                raise self._full()
            streams: list[Any] = []
            try:
                for tokens, params in texts:
                    streams.append(self.engine.submit(tokens, params))
            except BlockffnError as error:
                for stream in streams:
                    stream.cancel()
                from blockffn.engine import QueueFull

                raise (self._full() if isinstance(error, QueueFull) else ApiError(400, str(error))) from error
            self.running.update(streams)
            return streams

    def _full(self) -> ApiError:
        self.totals.refused += 1
        return ApiError(
            429,
            f"{len(self.running)} answers are generated or wait, and at most {self.limits.streams} may",
            code="queue_full",
            retry_after=RETRY_AFTER,
        )

    async def tokens(self, streams: Sequence[Any]) -> AsyncGenerator[tuple[int, Any], None]:
        """Yield (index, token) as tokens come, (index, None) when a stream has ended, until all have.

        Streams that are still open are cancelled after the time limit, and when the reader goes away.
        """
        timer = asyncio.get_running_loop().call_later(self.limits.seconds, _cancel, streams)
        try:
            async with contextlib.aclosing(merged(streams)) as read:
                async for pair in read:
                    yield pair
        finally:
            timer.cancel()
            self.release(streams)

    def release(self, streams: Sequence[Any]) -> None:
        """Free the places of streams, ended or not, and count what they cost; a second call does nothing."""
        for stream in streams:
            if stream in self.running:
                self.running.remove(stream)
                self.totals.add(stream.statistics, ended=stream.finish_reason in ("stop", "length"))
                stream.cancel()

    async def change(self, draft: bool, exact: bool) -> None:
        """Generate what comes with or without drafts, in exact mode or not; ApiError 409 while answers are running."""
        async with self._changing:
            if (draft, exact) == (self.draft, self.exact):
                return
            if draft and not self.has_drafter:
                raise ApiError(400, "draft: this server was started without --draft", param="draft")
            if self.running:
                raise ApiError(409, "answers are running: try again when they have ended", retry_after=RETRY_AFTER)
            await asyncio.to_thread(self.engine.close)
            self.engine = await asyncio.to_thread(self._open, draft, exact)
            self.draft, self.exact = draft, exact

    def union_by_layer(self) -> list[tuple[int, int]]:
        """Return (experts read, evaluations) of each layer since the engine was opened; none without routed experts."""
        if not self.llm.n_moe_layers:
            return []
        stats = self.engine.union_stats()
        return list(zip(stats.union_size.tolist(), stats.evaluations.tolist(), strict=True))

    def stop(self) -> None:
        """Take no further requests."""
        self.stopping = True

    def cut_running(self) -> None:
        """End the answers that are still running; what they have is their answer."""
        self.cut += len(self.running)
        _cancel(list(self.running))


def _cancel(streams: Sequence[Any]) -> None:
    for stream in streams:
        stream.cancel()
