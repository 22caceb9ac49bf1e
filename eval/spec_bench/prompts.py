"""The prompt of a turn: the conversation so far in the chat template of the model, as token ids.

    conversation = Conversation(llm, template(llm))
    conversation.ask("Why is the sky blue?")            # token ids
    conversation.answered([464, 6766])

The template is the one of the file, rendered by llama_cpp as in `create_chat_completion`. A turn that is a list of
token ids is appended as it is. Both kinds cannot be mixed in one conversation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blockffn.errors import BlockffnError
from blockffn.eval.spec_bench.questions import Turn

if TYPE_CHECKING:
    from blockffn.llama import Llama

TEMPLATE = "tokenizer.chat_template"


def template(llm: Llama, cure: str = "--plain sends every turn as it is") -> Any:
    """Return the formatter of the model's own chat template; BlockffnError, with the `cure`, where it has none."""
    source = llm.metadata.get(TEMPLATE)
    if not source:
        raise BlockffnError(f"{llm.model_path}: this model has no chat template (key {TEMPLATE}); {cure}")
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    def text(token: int) -> str:
        return llm.detokenize([token], special=True).decode("utf-8", errors="replace") if token >= 0 else ""

    return Jinja2ChatFormatter(source, eos_token=text(llm.token_eos()), bos_token=text(llm.token_bos()))


class Conversation:
    """The turns and answers of one question; without a template turns and answers are put one after another."""

    def __init__(self, llm: Llama, formatter: Any | None) -> None:
        self._llm, self._formatter = llm, formatter
        self._messages: list[dict[str, str]] = []
        self._tokens: list[int] = []  # the conversation where no template is used

    def ask(self, turn: Turn) -> list[int]:
        """Return the prompt of the next turn."""
        if not isinstance(turn, str):
            if self._messages:
                raise BlockffnError("token ids after a text: expected all turns of a question to be of one kind")
            self._tokens += turn
            return list(self._tokens)
        if self._formatter is None or (self._tokens and not self._messages):
            if self._formatter is not None:
                raise BlockffnError("a text after token ids: expected all turns of a question to be of one kind")
            self._tokens += self._llm.tokenize(turn.encode(), add_bos=not self._tokens, special=False)
            return list(self._tokens)
        self._messages.append({"role": "user", "content": turn})
        prompt = self._formatter(messages=self._messages).prompt
        return self._llm.tokenize(prompt.encode(), add_bos=False, special=True)

    def answered(self, tokens: list[int]) -> str:
        """Take the answer to the last turn, without the token that ended it, and return its text."""
        text = self._llm.detokenize(tokens).decode("utf-8", errors="replace")
        if self._messages:
            self._messages.append({"role": "assistant", "content": text})
        else:
            self._tokens += tokens
        return text
