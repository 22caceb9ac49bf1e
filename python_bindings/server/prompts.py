"""What a request wants said, as the engine takes it: token ids, stop texts, a grammar, and what becomes of the text.

Messages go through the chat format that llama_cpp chose for the model: its handler is called with a stand-in for the
model that takes the prompt it makes. Templates of model files run in jinja2's sandbox there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blockffn.server import grammars
from blockffn.server.errors import ApiError
from blockffn.server.limits import Limits
from blockffn.server.schemas import ChatRequest, CompletionRequest, Message, NamedTool

# Handlers of llama_cpp that ask the model several times for one answer.
SEVERAL_CALLS = ("functionary", "functionary-v1", "functionary-v2", "chatml-function-calling")


@dataclass(frozen=True)
class Prompt:
    """tokens: the prompt. text: it as text, where it came as such. tool: the function whose arguments the answer is.

    calls: "" for text alone; "json" when the answer is one call as JSON; "tags" when it may hold <tool_call> blocks.
    """

    tokens: list[int]
    text: str = ""
    stops: tuple[str, ...] = ()
    grammar: Any = None
    tool: str | None = None
    calls: str = ""


def of_completion(llm: Any, request: CompletionRequest, limits: Limits) -> list[Prompt]:
    """Return the prompts of /v1/completions."""
    given: Any = request.prompt
    several = isinstance(given, list) and (not given or isinstance(given[0], (str, list)))
    prompts = given if several else [given]
    _bound("prompt", "texts", len(prompts), 1, limits.prompts)
    stops = stop_texts(request.stop, limits)
    return [
        Prompt(token_ids(llm, prompt, "prompt"), prompt if isinstance(prompt, str) else "", stops) for prompt in prompts
    ]


def of_chat(llm: Any, request: ChatRequest, limits: Limits) -> Prompt:
    """Return the prompt of /v1/chat/completions."""
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools or []]
    _bound("tools", "tools", len(tools), 0, limits.tools)
    choice = request.tool_choice or ("auto" if tools else "none")
    if not tools and choice not in ("none", "auto"):
        raise ApiError(400, "tool_choice: expected tools beside it, found none", param="tool_choice")
    shown = tools if choice != "none" else []
    named = choice.function.name if isinstance(choice, NamedTool) else None
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    if named is not None and named not in functions:
        raise ApiError(400, f"tool_choice: expected one of {', '.join(functions)}, found {named}", param="tool_choice")
    asked = _ask(
        llm, request, shown, "required" if isinstance(choice, NamedTool) else choice
    )  # a name: its handler makes a grammar unbounded
    tokens = token_ids(llm, asked["prompt"], "messages")
    stops = (*stop_texts(request.stop, limits), *(stop for stop in asked["stop"] or [] if stop))
    if named is not None:
        schema = functions[named].get("parameters") or {"type": "object"}
        grammar = grammars.from_schema(llm, schema, limits, "tools")
        return Prompt(tokens, stops=stops, grammar=grammar, tool=named)
    if choice == "required":
        grammar = grammars.from_schema(llm, grammars.of_calls(tools), limits, "tools")
        return Prompt(tokens, stops=stops, grammar=grammar, calls="json")
    return Prompt(tokens, stops=stops, grammar=_format(llm, request, limits), calls="tags" if shown else "")


def token_ids(llm: Any, prompt: str | list[int], param: str) -> list[int]:
    """Return the tokens of a text, begin-of-text first where the model wants it; ids are checked and stay."""
    if isinstance(prompt, str):
        tokens = llm.tokenize(prompt.encode(), add_bos=bool(llm._model.add_bos_token()), special=True)
    else:
        n_vocab = llm.n_vocab()
        for token in prompt:
            if not 0 <= token < n_vocab:
                raise ApiError(400, f"{param}: expected token ids from 0 to {n_vocab - 1}, found {token}", param)
        tokens = prompt
    if not tokens:
        raise ApiError(400, f"{param}: expected at least one token, found none", param)
    return list(tokens)


def stop_texts(stop: str | list[str] | None, limits: Limits) -> tuple[str, ...]:
    """Return the stop texts of a request."""
    stops = [stop] if isinstance(stop, str) else list(stop or [])
    _bound("stop", "texts", len(stops), 0, limits.stops)
    return tuple(text for text in stops if text)


def _bound(param: str, what: str, found: int, least: int, most: int) -> None:
    if not least <= found <= most:
        raise ApiError(400, f"{param}: expected {least} to {most} {what}, found {found}", param=param)


def _format(llm: Any, request: ChatRequest, limits: Limits) -> Any:
    """Return the grammar that response_format asks for, or None."""
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    schema = wanted.schema_
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise ApiError(400, "response_format.json_schema: missing", param="response_format")
        schema = wanted.json_schema.schema_
    return grammars.from_schema(llm, schema, limits, "response_format")


class _Asked(Exception):
    """What a chat handler wants completed."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__("asked")
        self.arguments = arguments


class _StandIn:
    """The model as chat handlers see it: its tokenizer, and a completion that tells what it was asked for."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def create_completion(self, **arguments: Any) -> None:
        raise _Asked(arguments)


def _ask(llm: Any, request: ChatRequest, tools: list[dict[str, Any]], choice: str) -> dict[str, Any]:
    """Return what the chat format of the model asks for: prompt, stop."""
    messages = [_message(message) for message in request.messages]
    choices: dict[str, Any] = {"tools": tools, "tool_choice": choice} if tools else {}
    try:
        handler(llm)(llama=_StandIn(llm), messages=messages, stop=[], **choices)
    except _Asked as asked:
        return asked.arguments
    except Exception as error:  # a template refuses conversations in many ways; the text of the request decides
        found = str(error)[:300] or type(error).__name__
        raise ApiError(
            400, f"messages: the chat format of this model refuses them: {found}", param="messages"
        ) from error
    raise ApiError(500, "the chat format of this model asks for nothing")


def handler(llm: Any) -> Any:
    """Return llama_cpp's chat handler for the model."""
    from llama_cpp import llama_chat_format

    own = llm.chat_handler or llm._chat_handlers.get(llm.chat_format)
    return own or llama_chat_format.get_chat_completion_handler(llm.chat_format)


def _message(message: Message) -> dict[str, Any]:
    """Return a message as templates know it: text as one string, "system" for OpenAI's newer "developer"."""
    found = message.model_dump(exclude_none=True, exclude={"refusal"})
    content = message.content
    found["content"] = content if isinstance(content, str) else "".join(part.text for part in content or [])
    if found["role"] == "developer":
        found["role"] = "system"
    return found
