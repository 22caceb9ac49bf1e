"""One answer on its way: `Stream` is what `Engine.submit` returns.

for token in stream:                      # or: async for token in stream
    print(token.text, end="")
stream.finish_reason, stream.statistics["tokens_per_step"]
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from threading import Condition, Event
from typing import Any

from blockffn.engine.params import GenerationParams, Token
from blockffn.errors import BlockffnError


class Stream:
    """The tokens of one answer, in order, for one reader: a thread or a task.

    finish_reason: None while it runs; then "stop" (end of the text, or a stop text), "length" (max_tokens, or the
    context is full), "cancelled" or "error". statistics: figures, once it has ended (see docs/speculative.md). seed: of
    its random numbers, the one that was drawn where none was asked for. Reading raises what went wrong.
    """

    def __init__(self, number: int, prompt: list[int], params: GenerationParams, seed: int) -> None:
        self.number, self.prompt, self.params, self.seed = number, prompt, params, seed
        self.tokens: list[Token] = []
        self.finish_reason: str | None = None
        self.statistics: dict[str, Any] = {}
        self.cancelled = False  # asked for; the engine ends the stream before its next step
        self._changed, self._done = Condition(), Event()
        self._unread: deque[Token] = deque()
        self._error: BaseException | None = None
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join([token.text for token in self.tokens])

    def cancel(self) -> None:
        """End the answer before the next step; the tokens that are there stay readable. May be called by any thread."""
        self.cancelled = True

    def wait(self, timeout: float | None = None) -> Stream:
        """Return this stream when it has ended; TimeoutError after so many seconds, or what went wrong."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"the answer has not ended after {timeout} s")
        if self._error is not None:
            raise self._error
        return self

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        with self._changed:
            self._changed.wait_for(self._readable)
            if self._unread:
                return self._unread.popleft()
        self._ended()
        raise StopIteration

    def __aiter__(self) -> AsyncIterator[Token]:
        return self

    async def __anext__(self) -> Token:
        while True:
            with self._changed:
                if self._unread:
                    return self._unread.popleft()
                if self.finish_reason is None:
                    loop = asyncio.get_running_loop()
                    future: asyncio.Future[None] = loop.create_future()
                    self._waiter = loop, future
                else:
                    break
            await future
        self._ended()
        raise StopAsyncIteration

    def _readable(self) -> bool:
        return bool(self._unread) or self.finish_reason is not None

    def _ended(self) -> None:
        if self._error is not None:
            raise self._error

    def put(self, tokens: list[Token]) -> None:
        """Give tokens to the reader (the engine's side)."""
        with self._changed:
            self.tokens += tokens
            self._unread.extend(tokens)
            self._wake()

    def finish(self, reason: str, statistics: dict[str, Any], error: BaseException | None = None) -> None:
        """End the answer (the engine's side)."""
        with self._changed:
            if self.finish_reason is None:
                self.finish_reason, self.statistics, self._error = reason, statistics, error
                self._done.set()
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        if self._waiter is not None:
            (loop, future), self._waiter = self._waiter, None
            try:
                loop.call_soon_threadsafe(_resolve, future)
            except RuntimeError:  # the reader's event loop was closed: nobody waits
                pass


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class QueueFull(BlockffnError):
    """The engine takes no further text now: try again when one of the running ones has ended."""
