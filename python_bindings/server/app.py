"""The routes of the server: bodies are read and checked, answers put into their form.

>>> from blockffn.server.app import make_app
>>> make_app(service, Access(keys=("secret",)))        # doctest: +SKIP
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from blockffn.server import answers, embeddings, metrics, prompts, schemas
from blockffn.server.access import Access, Guard
from blockffn.server.errors import ApiError, invalid
from blockffn.server.forms import Chat, Completion, Form
from blockffn.server.params import generation
from blockffn.server.prompts import Prompt
from blockffn.server.service import Service

PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = (  # the page loads nothing and talks to this server alone
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Model = TypeVar("Model", bound=BaseModel)
Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(service: Service, access: Access) -> ASGIApp:
    """Return the ASGI application."""
    handlers = _Handlers(service)
    routes = [
        Route("/", handlers.page),
        Route("/health", handlers.health),
        Route("/metrics", handlers.metrics),
        Route("/v1/models", handlers.models),
        Route("/v1/models/{model:path}", handlers.model),
        Route("/v1/completions", handlers.completions, methods=["POST"]),
        Route("/v1/chat/completions", handlers.chat, methods=["POST"]),
        Route("/v1/embeddings", handlers.embeddings, methods=["POST"]),
        Route("/tokenize", handlers.tokenize, methods=["POST"]),
        Route("/detokenize", handlers.detokenize, methods=["POST"]),
        Route("/settings", handlers.settings),
        Route("/settings", handlers.change_settings, methods=["POST"]),
    ]
    failures: dict[Any, Any] = {
        ApiError: lambda _request, error: error.response(),
        HTTPException: _http_error,
        ClientDisconnect: _gone,
        answers.ClientGone: _gone,
        Exception: _unexpected,
    }
    return Guard(Starlette(routes=routes, exception_handlers=failures), access, service.limits.connections)


class _Handlers:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._embedder = embeddings.Embedder(service.llm)

    async def page(self, _request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": PAGE_POLICY})

    async def health(self, _request: Request) -> Response:
        if self._service.stopping:
            return ApiError(503, "the server is stopping", code="stopping").response()
        return JSONResponse({"status": "ok"})

    async def metrics(self, _request: Request) -> Response:
        return Response(metrics.text(self._service), media_type=metrics.CONTENT_TYPE)

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        wanted = request.path_params["model"]
        if wanted != self._service.name:
            message = f"model: expected {self._service.name}, found {wanted[:80]}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        service = self._service
        return {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "blockffn",
            "meta": {
                "n_ctx": service.engine.n_ctx,
                "n_vocab": service.llm.n_vocab(),
                "n_embd": service.llm.n_embd(),
                "n_experts": service.llm.n_experts,
                "n_moe_layers": service.llm.n_moe_layers,
            },
        }

    async def completions(self, request: Request) -> Response:
        body = await self._body(request, schemas.CompletionRequest)
        if body.echo and body.logprobs is not None:
            raise ApiError(400, "echo: log-probabilities of prompts are not served", param="echo")
        service = self._service
        found = await asyncio.to_thread(prompts.of_completion, service.llm, body, service.limits)
        expected = [prompt for prompt in found for _ in range(self._n(body.n))]
        form = Completion(service.llm, service.name, expected, bool(body.echo))
        return await self._answer(request, body, form, expected, body.logprobs)

    async def chat(self, request: Request) -> Response:
        body = await self._body(request, schemas.ChatRequest)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: expected logprobs: true beside it", param="top_logprobs")
        service = self._service
        found = await asyncio.to_thread(prompts.of_chat, service.llm, body, service.limits)
        expected = [found] * self._n(body.n)
        form = Chat(service.llm, service.name, expected)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return await self._answer(request, body, form, expected, logprobs)

    def _n(self, n: int | None) -> int:
        most = self._service.limits.n
        if (n or 1) > most:
            raise ApiError(400, f"n: expected 1 to {most}, found {n}", param="n")
        return n or 1

    async def _answer(
        self, request: Request, body: schemas.SamplingRequest, form: Form, expected: list[Prompt], logprobs: int | None
    ) -> Response:
        service = self._service
        n_ctx = service.engine.n_ctx
        for prompt in expected:
            if len(prompt.tokens) >= n_ctx:
                message = f"the prompt has {len(prompt.tokens)} tokens, and with an answer at most {n_ctx} fit"
                raise ApiError(400, message, code="context_length_exceeded")
        texts = [
            (prompt.tokens, generation(body, prompt, index, logprobs, service.llm.n_vocab(), service.limits))
            for index, prompt in enumerate(expected)
        ]
        streams = await service.submit(texts)
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            return answers.events(service, form, streams, with_usage)
        return await answers.whole(service, form, streams, request)

    async def embeddings(self, request: Request) -> Response:
        body = await self._body(request, schemas.EmbeddingRequest)
        answer = await asyncio.to_thread(self._embedder.answer, body, self._service.name, self._service.limits)
        return JSONResponse(answer)

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request, schemas.TokenizeRequest)
        llm = self._service.llm
        tokens = await asyncio.to_thread(
            llm.tokenize, body.content.encode(), add_bos=body.add_special, special=body.parse_special
        )
        if not body.with_pieces:
            return JSONResponse({"tokens": tokens})
        pieces = [llm.tokenizer_.piece(token, True).decode("utf-8", errors="replace") for token in tokens]
        return JSONResponse({"tokens": [{"id": i, "piece": p} for i, p in zip(tokens, pieces, strict=True)]})

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request, schemas.DetokenizeRequest)
        llm = self._service.llm
        tokens = prompts.token_ids(llm, body.tokens, "tokens") if body.tokens else []
        return JSONResponse({"content": llm.detokenize(tokens).decode("utf-8", errors="replace")})

    async def settings(self, _request: Request) -> Response:
        service = self._service
        figures = service.engine.statistics()
        return JSONResponse(
            {
                "model": service.name,
                "chat_template": "tokenizer.chat_template" in service.llm.metadata,
                "draft": service.draft,
                "can_draft": service.has_drafter,
                "exact": service.exact,
                "running": figures["running"],
                "waiting": figures["waiting"],
                "union": {"n_experts": service.llm.n_experts, "layers": service.union_by_layer()},
            }
        )

    async def change_settings(self, request: Request) -> Response:
        body = await self._body(request, schemas.SettingsRequest)
        service = self._service
        await service.change(
            service.draft if body.draft is None else body.draft, service.exact if body.exact is None else body.exact
        )
        return await self.settings(request)

    async def _body(self, request: Request, model: type[Model]) -> Model:
        """Return the checked body of a request, which has to be JSON of a bounded size that comes in time."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"content-type: expected application/json, found {kind[:80] or 'none'}")
        limits = self._service.limits
        try:
            data = await asyncio.wait_for(_read(request, limits.body_bytes), limits.body_seconds)
        except asyncio.TimeoutError as error:
            raise ApiError(408, f"the body has not arrived within {limits.body_seconds:g} s") from error
        try:
            return await asyncio.to_thread(model.model_validate_json, data)
        except ValidationError as error:
            raise invalid(error) from error


async def _read(request: Request, most: int) -> bytes:
    """Return the body; ApiError 413 as soon as it is longer than allowed."""
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > most:
            raise ApiError(413, f"the body is longer than {most} bytes", code="body_too_large")
    return bytes(data)


def _http_error(request: Request, error: Any) -> Response:
    """Return starlette's own errors (unknown path, wrong method) in OpenAI's form."""
    messages = {
        404: f"no such path: {request.url.path[:80]}",
        405: f"{request.method} is not for {request.url.path[:80]}",
    }
    shown = ApiError(error.status_code, messages.get(error.status_code, str(error.detail)))
    return shown.response(error.headers)


def _gone(_request: Request, _error: Any) -> Response:
    return Response(status_code=answers.CLIENT_GONE)


def _unexpected(_request: Request, error: Any) -> Response:
    return ApiError(500, f"{type(error).__name__}: {error}", code="internal").response()
