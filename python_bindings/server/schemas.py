"""The bodies of requests: names and ranges, checked by pydantic before anything else sees them.

>>> from blockffn.server.schemas import CompletionRequest
>>> CompletionRequest.model_validate_json('{"prompt": "abc", "max_tokens": 4}').max_tokens
4

Types are strict: "4" is no number. Unknown fields are refused; fields of OpenAI's that mean nothing here are taken and
have no effect (`Ignored`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(max_length=16 << 20)]
Id = Annotated[int, Field(ge=0, lt=1 << 31)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    """A model that refuses unknown fields, other types and numbers that are none."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Ignored(Strict):
    """Fields of OpenAI's interface without effect here: bookkeeping, and services that one model does not have."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: list[Literal["text"]] | None = None


class StreamOptions(Strict):
    """include_usage: one more chunk, with the numbers of tokens."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingRequest(Ignored):
    """What completions and chat have in common; None stands for llama_cpp's default."""

    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    mirostat_mode: Literal[0, 1, 2] | None = None
    mirostat_tau: Annotated[float, Field(ge=0, le=100)] | None = None
    mirostat_eta: Annotated[float, Field(ge=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Text | list[Text] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-1000, le=1000)]] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionRequest(SamplingRequest):
    """Body of /v1/completions: texts, or token ids."""

    prompt: Text | list[Text] | list[Id] | list[list[Id]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: None = None


class Part(Strict):
    """A part of a message; models of this project read text."""

    type: Literal["text"]
    text: Text


class FunctionCall(Strict):
    """A call that the model made earlier; arguments are JSON as text."""

    name: Name
    arguments: Text


class ToolCall(Strict):
    """A call in a message of the assistant."""

    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[Part] | None = None
    name: Name | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Name | None = None
    refusal: str | None = None


class Function(Strict):
    """A function that the model may call; parameters are a JSON schema."""

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool: a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The name of a function."""

    name: Name


class NamedTool(Strict):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """A schema that the answer has to follow."""

    name: Name
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """Text, any JSON object, or JSON of a schema; `schema` beside json_object is llama_cpp's form."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ChatRequest(SamplingRequest):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None


class EmbeddingRequest(Ignored):
    """Body of /v1/embeddings."""

    model: str | None = None
    input: Text | list[Text] | list[Id] | list[list[Id]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None


class TokenizeRequest(Strict):
    """Body of /tokenize, as llama-server has it."""

    content: Text
    add_special: bool = False
    with_pieces: bool = False
    parse_special: bool = True


class DetokenizeRequest(Strict):
    """Body of /detokenize."""

    tokens: list[Id]


class SettingsRequest(Strict):
    """Body of /settings: how the texts that come are generated."""

    draft: bool | None = None
    exact: bool | None = None
