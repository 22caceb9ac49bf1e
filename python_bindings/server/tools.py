"""Calls of tools in the text of a model: `Calls` turns text into deltas of OpenAI's chat objects.

Three ways a call comes: as the arguments of a function that the request named; as one JSON object {"name",
"arguments"}, where some call is required; in <tool_call> blocks, which models with tools in their template write.

>>> from blockffn.server.tools import Calls
>>> calls = Calls(None, "tags")
>>> calls.add("Let me see. <tool"), calls.add('_call>{"name": "f", "arguments": {"x": 1}}</tool_call>')
({'content': 'Let me see. '}, {'content': ''})
>>> calls.finish()["tool_calls"][0]["function"]
{'name': 'f', 'arguments': '{"x": 1}'}
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
Delta = dict[str, Any]


class Calls:
    """tool: the function whose arguments the text is. how: "json", "tags" or "" (see `prompts.Prompt`)."""

    def __init__(self, tool: str | None, how: str) -> None:
        self._tool, self._how = tool, how
        self._held = ""  # text that is a call, or may become one
        self.made = False  # has the text made a call?

    def add(self, text: str) -> Delta:
        """Return what a piece of text adds to the message."""
        if self._tool is not None:
            first, self.made = not self.made, True
            return {
                "tool_calls": [_call(0, self._tool, text) if first else {"index": 0, "function": {"arguments": text}}]
            }
        if not self._how:
            return {"content": text}
        self._held += text
        return {"content": "" if self._how == "json" else self._certain()}

    def finish(self) -> Delta:
        """Return what was held back: calls, or text where it is none."""
        held, self._held = self._held, ""
        found = _parse(held) if self._how == "json" else _blocks(held)
        if found:
            self.made = True
            return {"tool_calls": [_call(index, name, arguments) for index, (name, arguments) in enumerate(found)]}
        return {"content": held} if held else {}

    def _certain(self) -> str:
        """Let go of the text before a block, or before what may begin one."""
        place = self._held.find(OPEN)
        if place < 0:
            ends = range(min(len(self._held), len(OPEN) - 1), 0, -1)
            place = len(self._held) - next((n for n in ends if self._held.endswith(OPEN[:n])), 0)
        text, self._held = self._held[:place], self._held[place:]
        return text


def _blocks(text: str) -> list[tuple[str, str]]:
    """Return the calls of a text that is <tool_call> blocks and nothing else; none where one of them is no call."""
    blocks = re.findall(rf"{OPEN}(.*?)(?:{CLOSE}|\Z)", text, re.DOTALL)
    calls = [call for block in blocks for call in _parse(block)]
    return calls if len(calls) == len(blocks) else []


def _parse(text: str) -> list[tuple[str, str]]:
    """Return (name, arguments as JSON text) of a call, or nothing."""
    try:
        call = json.loads(text)
        return [(str(call["name"]), json.dumps(call.get("arguments", {}), ensure_ascii=False))]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _call(index: int, name: str, arguments: str) -> dict[str, Any]:
    identity = f"call_{uuid.uuid4().hex[:24]}"
    return {"index": index, "id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
