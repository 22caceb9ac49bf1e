"""`blockffn serve` and the clients that people have: openai, curl, LangChain, LlamaIndex."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from serving import Local, chat_model

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
KEY = "sk-test"


class Weather(BaseModel):
    """Structured output."""

    city: Literal["Oslo", "Rome"]
    rain: bool


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    started = Local(chat_model(tmp_path_factory.mktemp("chat")), "--exact", "--parallel", "4", keys=(KEY,))
    yield started
    started.stop()


@pytest.fixture
def client(server: Local) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base + "/v1", api_key=KEY, max_retries=0) as opened:
        yield opened


def text(server: Local, **more: Any) -> str:
    """Return what the server says without a client."""
    body = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0, **more}
    return str(server.ok("/v1/chat/completions", **body)["choices"][0]["message"]["content"])


def test_openai(client: openai.OpenAI, server: Local) -> None:
    answer = client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=12, temperature=0, logprobs=True)
    choice = answer.choices[0]
    assert choice.message.content == text(server) and choice.finish_reason == "length"
    assert choice.logprobs is not None and len(choice.logprobs.content or []) == 12
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    assert (answer.model_extra or {})["metrics"]["speculative_decoding"]["tokens_per_step"] == 1.0
    completion = client.completions.create(model="any", prompt="def add", max_tokens=8, n=2, seed=3)
    assert len(completion.choices) == 2
    assert [model.id for model in client.models.list()] == ["chat"] and client.models.retrieve("chat").id == "chat"


def test_openai_streams(client: openai.OpenAI, server: Local) -> None:
    chunks = list(
        client.chat.completions.create(
            model="any",
            messages=MESSAGES,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text(server)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12
    long = client.chat.completions.create
    with server.held(after=4), long(model="any", messages=MESSAGES, max_tokens=900, stream=True) as stream:
        next(iter(stream))
    assert server.idle()  # left after the first chunk


def test_openai_async(server: Local) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.base + "/v1", api_key=KEY, max_retries=0) as client:

            async def one() -> str:
                found = ""
                async for chunk in await client.chat.completions.create(
                    model="any", messages=MESSAGES, max_tokens=12, temperature=0, stream=True
                ):
                    found += chunk.choices[0].delta.content or ""
                return found

            return await asyncio.gather(*(one() for _ in range(6)))

    assert asyncio.run(ask()) == [text(server)] * 6


def test_openai_structured_output(client: openai.OpenAI) -> None:
    for seed in range(5):
        try:
            answer = client.chat.completions.parse(
                model="any", messages=MESSAGES, response_format=Weather, max_tokens=200, seed=seed
            )
        except openai.LengthFinishReasonError:  # a random model may write spaces for ever
            continue
        parsed = answer.choices[0].message.parsed
        assert parsed is not None and parsed.city in ("Oslo", "Rome")
        return
    raise AssertionError("no answer ended")


def test_openai_tools(client: openai.OpenAI) -> None:
    tool: Any = openai.pydantic_function_tool(Weather, name="weather")
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for seed in range(5):
        answer = client.chat.completions.create(
            model="any", messages=MESSAGES, tools=[tool], tool_choice=named, max_tokens=200, seed=seed
        )
        if answer.choices[0].finish_reason == "length":
            continue
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function" and Weather.model_validate_json(call.function.arguments)
        said: list[Any] = [
            *MESSAGES,
            answer.choices[0].message,
            {"role": "tool", "tool_call_id": call.id, "content": "9"},
        ]
        assert client.chat.completions.create(model="any", messages=said, max_tokens=2).choices
        return
    raise AssertionError("no answer ended")


def test_openai_errors(client: openai.OpenAI, server: Local) -> None:
    with pytest.raises(openai.BadRequestError, match="n: expected 1 to 8, found 9") as found:
        client.completions.create(model="any", prompt="x", n=9)
    assert found.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with (
        openai.OpenAI(base_url=server.base + "/v1", api_key="wrong") as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: Local) -> None:
    body = json.dumps({"messages": MESSAGES, "max_tokens": 12, "temperature": 0, "stream": True})
    command = ["curl", "-sN", server.base + "/v1/chat/completions", "-H", "Content-Type: application/json"]
    command += ["-H", f"Authorization: Bearer {KEY}", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
    assert "".join(delta.get("content", "") for delta in deltas) == text(server) and "data: [DONE]" in lines


@pytest.mark.skipif(importlib.util.find_spec("langchain_openai") is None, reason="LangChain: make test-clients")
def test_langchain(server: Local) -> None:
    from langchain_openai import ChatOpenAI  # pyright: ignore[reportMissingImports]

    options: dict[str, Any] = {"base_url": server.base + "/v1", "api_key": KEY, "model": "chat", "max_retries": 0}
    llm = ChatOpenAI(temperature=0, max_tokens=12, **options)
    assert llm.invoke("hello").content == text(server)
    assert "".join(str(chunk.content) for chunk in llm.stream("hello")) == text(server)
    assert asyncio.run(llm.ainvoke("hello")).content == text(server)
    bound = ChatOpenAI(max_tokens=200, seed=1, **options).bind_tools([Weather], tool_choice="Weather")
    calls = [call for seed in range(5) for call in bound.bind(seed=seed).invoke("hello").tool_calls]
    assert calls and all(call["args"]["city"] in ("Oslo", "Rome") for call in calls)


@pytest.mark.skipif(importlib.util.find_spec("llama_index") is None, reason="LlamaIndex: make test-clients")
def test_llama_index(server: Local) -> None:
    from llama_index.core.llms import ChatMessage  # pyright: ignore[reportMissingImports]
    from llama_index.llms.openai_like import OpenAILike  # pyright: ignore[reportMissingImports]

    llm = OpenAILike(
        model="chat", api_base=server.base + "/v1", api_key=KEY, is_chat_model=True, temperature=0, max_tokens=12,
        max_retries=0,
    )  # fmt: skip
    hello = [ChatMessage(role="user", content="hello")]
    assert llm.chat(hello).message.content == text(server)
    assert "".join(chunk.delta or "" for chunk in llm.stream_chat(hello)) == text(server)
    assert asyncio.run(llm.achat(hello)).message.content == text(server)
