"""Answers to clients: whole as one JSON object, or as server-sent events; either ends when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from blockffn.errors import BlockffnError
from blockffn.server.errors import ApiError
from blockffn.server.forms import Choice, Form, figures
from blockffn.server.service import Service

CLIENT_GONE = 499  # nginx's status, for the log; nobody reads it
T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


async def whole(service: Service, form: Form, streams: Sequence[Any], request: Request) -> Response:
    """Return the complete answer."""
    pieces: list[list[Choice]] = [form.start(index) for index in range(len(streams))]

    async def gather() -> None:
        async with contextlib.aclosing(service.tokens(streams)) as tokens:
            async for index, token in tokens:
                pieces[index] += form.end(index, streams[index]) if token is None else [form.piece(index, token)]

    try:
        await unless_gone(request, gather())
    finally:
        service.release(streams)
    choices = [form.merged(index, parts) for index, parts in enumerate(pieces)]
    return JSONResponse(form.whole(choices, streams))


def events(service: Service, form: Form, streams: Sequence[Any], with_usage: bool) -> Response:
    """Return the answer as server-sent events, one for each token."""
    return _Events(service, streams, _chunks(service, form, streams, with_usage))


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; ClientGone, and the work is cancelled, when the client goes away first."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, gone):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chunks(service: Service, form: Form, streams: Sequence[Any], with_usage: bool) -> AsyncIterator[bytes]:
    for index in range(len(streams)):
        if started := form.start(index):
            yield _event(form.chunk(started))
    left = len(streams)
    try:
        async with contextlib.aclosing(service.tokens(streams)) as tokens:
            async for index, token in tokens:
                if token is not None:
                    origin = {"source": token.source, "step": token.step}
                    yield _event(form.chunk([form.piece(index, token)], blockffn=origin))
                    continue
                left -= 1
                *rest, last = form.end(index, streams[index])
                for choice in rest:
                    yield _event(form.chunk([choice]))
                yield _event(form.chunk([last], **({} if left else figures(form.llm, streams))))
    except Exception as error:  # the status is sent: the error becomes an event
        known = isinstance(error, (ApiError, BlockffnError))
        shown = ApiError(500, str(error) if known else f"{type(error).__name__}: {error}")
        yield _event(shown.body())
        return
    if with_usage:
        yield _event(form.chunk([], usage=form.usage(streams)))
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class _Events(StreamingResponse):
    """Server-sent events that free their streams however they end, even before the first one was sent."""

    def __init__(self, service: Service, streams: Sequence[Any], content: AsyncIterator[bytes]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._service, self._streams = service, streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.release(self._streams)
