"""JSON schemas of requests to grammars, by llama_cpp's converter, within bounds.

The converter writes repetitions out and follows nesting by recursion, so numbers, patterns and sizes are bounded before
it runs. llama.cpp then reads the grammar once on trial: what it refuses must never reach the engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from blockffn.server.errors import ApiError
from blockffn.server.limits import Limits

REPETITIONS = ("minItems", "maxItems", "minLength", "maxLength")
MOST_REPETITIONS = 256
LONGEST_PATTERN = 512


def from_schema(llm: Any, schema: dict[str, Any] | None, limits: Limits, param: str) -> Any:
    """Return the llama_cpp.LlamaGrammar of a schema, or of any JSON object for None; ApiError where it cannot be."""
    from llama_cpp import llama_grammar

    if schema is None:
        return llama_grammar.LlamaGrammar.from_string(llama_grammar.JSON_GBNF, verbose=False)
    try:
        text = json.dumps(schema)
        if len(text) > limits.schema_bytes:
            raise ApiError(400, f"{param}: expected at most {limits.schema_bytes} bytes, found {len(text)}", param)
        for problem in _problems(schema):
            raise ApiError(400, f"{param}: {problem}", param)
        grammar = llama_grammar.LlamaGrammar.from_json_schema(text, verbose=False)
    except ApiError:
        raise
    except Exception as error:  # whatever the converter stumbles over is in the request
        found = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ApiError(400, f"{param}: this schema has no grammar: {found[:300]}", param) from error
    if len(grammar._grammar) > limits.grammar_bytes:
        raise ApiError(400, f"{param}: the grammar of this schema is longer than {limits.grammar_bytes} bytes", param)
    if not _readable(llm, grammar):
        raise ApiError(400, f"{param}: llama.cpp does not accept the grammar of this schema", param)
    return grammar


def of_calls(tools: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of a call: the name of one of the functions, and its arguments."""
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["function"]["name"]},
                    "arguments": tool["function"].get("parameters") or {"type": "object"},
                },
                "required": ["name", "arguments"],
            }
            for tool in tools
        ]
    }


def _problems(node: Any) -> Iterator[str]:
    """Yield what a schema asks for beyond the bounds of the converter."""
    if isinstance(node, list):
        for part in node:
            yield from _problems(part)
        return
    if not isinstance(node, dict):
        return
    for name in REPETITIONS:
        value = node.get(name)
        if isinstance(value, (int, float)) and not 0 <= value <= MOST_REPETITIONS:
            yield f"{name}: expected 0 to {MOST_REPETITIONS}, found {str(value)[:40]}"
    pattern = node.get("pattern")
    if isinstance(pattern, str):
        numbers = [int(number[:9]) for number in re.findall(r"\d+", " ".join(re.findall(r"\{[^}]*\}?", pattern)))]
        if len(pattern) > LONGEST_PATTERN or max(numbers, default=0) > MOST_REPETITIONS:
            yield f"pattern: expected at most {LONGEST_PATTERN} characters and {MOST_REPETITIONS} repetitions"
    for part in node.values():
        yield from _problems(part)


def _readable(llm: Any, grammar: Any) -> bool:
    """Does llama.cpp read this grammar?"""
    import llama_cpp.llama_cpp as low_level

    vocab = low_level.llama_model_get_vocab(llm.model)
    sampler = low_level.llama_sampler_init_grammar(vocab, grammar._grammar.encode(), grammar._root.encode())
    if not sampler:
        return False
    low_level.llama_sampler_free(sampler)
    return True
