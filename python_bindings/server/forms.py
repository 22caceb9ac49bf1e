"""OpenAI's objects: `Completion` and `Chat` turn the tokens of streams into choices, whole or piece by piece.

A whole answer is the sum of its pieces, so both ways give the same text, calls and log-probabilities.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from blockffn.server import totals
from blockffn.server.prompts import Prompt
from blockffn.server.tools import Calls

Choice = dict[str, Any]
ENDS = {"stop": "stop", "length": "length"}  # an answer that was cut has what fitted into its time


class Form:
    """What completions and chat have in common. `prompts`: one for each stream."""

    prefix = object_name = chunk_name = ""

    def __init__(self, llm: Any, model: str, prompts: Sequence[Prompt]) -> None:
        self.llm, self.prompts = llm, prompts
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def chunk(self, choices: list[Choice], **more: Any) -> dict[str, Any]:
        """Return one event of a stream."""
        return self._head | {"object": self.chunk_name, "choices": choices} | more

    def whole(self, choices: list[Choice], streams: Sequence[Any]) -> dict[str, Any]:
        """Return a complete answer."""
        body = {"object": self.object_name, "choices": choices, "usage": self.usage(streams)}
        return self._head | body | figures(self.llm, streams)

    def start(self, index: int) -> list[Choice]:
        """Return what a stream begins with."""
        return []

    def piece(self, index: int, token: Any) -> Choice:
        """Return the choice that a token adds to."""
        raise NotImplementedError

    def end(self, index: int, stream: Any) -> list[Choice]:
        """Return the last pieces of a choice; the last one has its finish_reason."""
        raise NotImplementedError

    def merged(self, index: int, pieces: Sequence[Choice]) -> Choice:
        """Return the choice that its pieces make."""
        raise NotImplementedError

    def usage(self, streams: Sequence[Any]) -> dict[str, Any]:
        """Return the numbers of tokens; a prompt that several answers share counts once."""
        prompt = sum(len(one.tokens) for one in {id(one): one for one in self.prompts}.values())
        answer = sum(len(stream.tokens) for stream in streams)
        cached = sum(stream.statistics.get("reused_n", 0) for stream in streams)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": min(cached, prompt)},
        }

    def _text(self, token: int) -> str:
        return str(self.llm.tokenizer_.piece(token).decode("utf-8", errors="replace"))


class Completion(Form):
    """text_completion."""

    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, llm: Any, model: str, prompts: Sequence[Prompt], echo: bool) -> None:
        super().__init__(llm, model, prompts)
        self._echo = echo
        self._offset = [len(prompt.text) for prompt in prompts]

    def start(self, index: int) -> list[Choice]:
        """Return the prompt, where it is to be repeated."""
        if not self._echo:
            return []
        prompt = self.prompts[index]
        text = prompt.text or self.llm.detokenize(prompt.tokens, special=True).decode("utf-8", errors="replace")
        return [_text_choice(index, text)]

    def piece(self, index: int, token: Any) -> Choice:
        """Return the text of a token."""
        logprobs = None
        if token.logprob is not None:
            top = {self._text(one): value for one, value in token.top_logprobs or ()}
            own = self._text(token.id)
            logprobs = {
                "tokens": [own],
                "token_logprobs": [token.logprob],
                "top_logprobs": [top | {own: token.logprob}],
                "text_offset": [self._offset[index]],
            }
        self._offset[index] += len(token.text)
        return _text_choice(index, token.text, logprobs)

    def end(self, index: int, stream: Any) -> list[Choice]:
        """Return the reason of the end."""
        return [_text_choice(index, "", None, ENDS.get(stream.finish_reason, "length"))]

    def merged(self, index: int, pieces: Sequence[Choice]) -> Choice:
        """Join texts and log-probabilities."""
        found = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
        logprobs = {name: [one[name][0] for one in found] for name in found[0]} if found else None
        text = "".join(piece["text"] for piece in pieces)
        return _text_choice(index, text, logprobs, pieces[-1]["finish_reason"])


class Chat(Form):
    """chat.completion."""

    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, llm: Any, model: str, prompts: Sequence[Prompt]) -> None:
        super().__init__(llm, model, prompts)
        self._calls = [Calls(prompt.tool, prompt.calls) for prompt in prompts]

    def start(self, index: int) -> list[Choice]:
        """Return the role."""
        return [_delta(index, {"role": "assistant", "content": None if self.prompts[index].tool else ""})]

    def piece(self, index: int, token: Any) -> Choice:
        """Return the text of a token, or what it adds to a call."""
        logprobs = None
        if token.logprob is not None:
            own = self._logprob(token.id, token.logprob)
            top = [self._logprob(one, value) for one, value in token.top_logprobs or ()]
            logprobs = {"content": [own | {"top_logprobs": top}], "refusal": None}
        return _delta(index, self._calls[index].add(token.text), logprobs)

    def end(self, index: int, stream: Any) -> list[Choice]:
        """Return calls that were held back, and the reason of the end."""
        reason = ENDS.get(stream.finish_reason, "length")
        calls = self._calls[index]
        rest = calls.finish()
        reason = "tool_calls" if reason == "stop" and calls.made else reason
        return [*([_delta(index, rest)] if rest else []), _delta(index, {}, None, reason)]

    def merged(self, index: int, pieces: Sequence[Choice]) -> Choice:
        """Join the deltas to a message."""
        content, logprobs = "", []
        calls: list[dict[str, Any]] = []
        for piece in pieces:
            delta = piece["delta"]
            content += delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(calls):
                    calls.append({**call, "function": dict(call["function"])})
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            if piece["logprobs"] is not None:
                logprobs += piece["logprobs"]["content"]
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
        if calls:
            message["tool_calls"] = [{name: value for name, value in call.items() if name != "index"} for call in calls]
        shown = {"content": logprobs, "refusal": None} if logprobs else None
        return {
            "index": index,
            "message": message,
            "logprobs": shown,
            "finish_reason": pieces[-1]["finish_reason"],
        }

    def _logprob(self, token: int, value: float) -> dict[str, Any]:
        data = self.llm.tokenizer_.piece(token)
        return {"token": data.decode("utf-8", errors="replace"), "bytes": list(data), "logprob": value}


def figures(llm: Any, streams: Sequence[Any]) -> dict[str, Any]:
    """Return the speeds of an answer and what its drafts were worth."""
    statistics = [stream.statistics for stream in streams]
    return {
        "timings": totals.timings(statistics),
        "metrics": {"speculative_decoding": totals.speculative(statistics, llm.n_experts)},
    }


def _text_choice(index: int, text: str, logprobs: Any = None, reason: str | None = None) -> Choice:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _delta(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> Choice:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
