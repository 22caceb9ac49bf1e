"""Several streams read as one: `merged`, what `Engine.stream_many` and the server read.

async for number, token in merged(streams):    # in the order in which they come
    print(number, "has ended" if token is None else token.text)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from blockffn.engine.params import Token
from blockffn.engine.stream import Stream


async def merged(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Token | None], None]:
    """Yield (number of a stream, its next token), and (number, None) when one has ended, until all have.

    Raises what went wrong in one of them. Whoever leaves the iteration cancels the streams that still run.
    """
    arrived: asyncio.Queue[tuple[int, Token | BaseException | None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(number, stream, arrived)) for number, stream in enumerate(streams)]
    try:
        running = len(streams)
        while running:
            number, token = await arrived.get()
            if isinstance(token, BaseException):
                raise token
            running -= token is None
            yield number, token
    finally:
        for task in tasks:
            task.cancel()
        for stream in streams:
            stream.cancel()


async def _pump(number: int, stream: Stream, arrived: asyncio.Queue[tuple[int, Token | BaseException | None]]) -> None:
    """Pass the tokens of a stream on, then None or what went wrong."""
    try:
        async for token in stream:
            arrived.put_nowait((number, token))
        arrived.put_nowait((number, None))
    except Exception as error:
        arrived.put_nowait((number, error))
