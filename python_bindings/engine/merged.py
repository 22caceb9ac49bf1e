"""Several streams read as one: `merged`, what `Engine.stream_many` gives.

async for number, token in merged(streams):    # in the order in which they come
    texts[number] += token.text
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from blockffn.engine.params import Token
from blockffn.engine.stream import Stream


async def merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, Token]]:
    """Yield the number of a stream and its next token until all have ended.

    Raises what went wrong in one of them. Whoever leaves the iteration cancels the streams that still run.
    """
    waiting: dict[asyncio.Future[Token], int] = {}

    def ask(number: int) -> None:
        waiting[asyncio.ensure_future(streams[number].__anext__())] = number

    try:
        for number in range(len(streams)):
            ask(number)
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                number = waiting.pop(task)
                try:
                    token = task.result()
                except StopAsyncIteration:
                    continue
                yield number, token
                ask(number)
    finally:
        for task in waiting:
            task.cancel()
        for stream in streams:
            stream.cancel()
