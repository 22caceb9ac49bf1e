"""Drafts by a small model with the target's vocabulary, one token after another.

    >>> from blockffn.speculative import ModelDrafter
    >>> ModelDrafter("no-such-file.gguf").max_nodes      # nothing is loaded before a target asks for it
    8

Its cache is kept in step with the verified text: what was drafted and accepted is not evaluated again.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

from blockffn import library
from blockffn.errors import BlockffnError
from blockffn.speculative.decoder import Decoder, Floats
from blockffn.speculative.draft import EMPTY, Draft, Tokens
from blockffn.speculative.drafter import Context, Drafter
from blockffn.speculative.native import check_same, load_model, not_attached, open_context


class ModelDrafter(Drafter):
    """Proposes the continuation of a draft model: greedy, or drawn with the noise that the target draws with.

    `max_nodes` bounds the draft. With `p_min` > 0 drafting stops before a token whose probability is lower.
    Raises BlockffnError when the file is no model, its vocabulary is not the target's, or its memory cannot forget
    rejected tokens.
    """

    name = "model"

    def __init__(self, path: str | Path, max_nodes: int = 8, p_min: float = 0.0, n_threads: int | None = None) -> None:
        if max_nodes < 1 or not 0.0 <= p_min < 1.0:
            raise ValueError(f"ModelDrafter: expected max_nodes >= 1 and 0 <= p_min < 1, found {max_nodes}, {p_min}")
        self.path, self.max_nodes, self.p_min, self.n_threads = str(path), max_nodes, p_min, n_threads
        self._model: Any = None
        self._context: Any = None
        self._target: Decoder | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.max_nodes, self.p_min, self.n_threads)

    def attach(self, llm: Any) -> None:
        """Load the model (once) and compare its vocabulary with the target's."""
        if self._model is None:
            self._model = load_model(self.path)
        check_same(self.path, self._model, llm._model)
        api = library.load()
        if api.llama_model_is_recurrent(self._model.model) or api.llama_model_is_hybrid(self._model.model):
            raise BlockffnError(f"{self.path}: a recurrent model cannot draft: its memory cannot forget tokens")
        self.close_context()
        self._context = open_context(self._model, llm, self.n_threads)
        capacity = int(self._context.params.n_batch)
        self._target = Decoder(self._context.ctx, self._model.n_vocab(), self._model.n_embd(), capacity)
        self._text = np.empty(llm.n_ctx() + 1, dtype=np.int32)
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        self._cached = 0  # tokens of self._text in the cache
        self._verified = 0  # of these known to be verified

    def begin(self, tokens: Tokens) -> None:
        """Keep the cache as far as it agrees with `tokens`."""
        self._verified = 0
        self._keep_common(tokens)

    def propose(self, context: Context, n: int) -> Draft:
        """Return up to `n` tokens, each the best one after those before it."""
        tokens = context.tokens
        n = min(n, len(self._text) - 1 - len(tokens))
        self._keep_common(tokens)
        if n < 1:
            return EMPTY
        logits = self._evaluate(tokens[self._cached :])
        drafted: list[int] = []
        while True:
            token = int(context.scores(logits[None], len(drafted))[0].argmax())
            if self.p_min > 0.0 and probability(logits, token) < self.p_min:
                break
            drafted.append(token)
            if len(drafted) == n:
                break
            logits = self._evaluate(np.array([token], dtype=np.int32))
        return Draft.chain(drafted, self.name)

    def _keep_common(self, tokens: Tokens) -> None:
        """Forget what the cache holds beyond its common beginning with `tokens`; at least the last token is redone."""
        target = self._attached()
        end = min(self._cached, len(tokens) - 1)
        start = min(self._verified, end)
        differs = np.flatnonzero(self._text[start:end] != tokens[start:end])
        common = start + int(differs[0]) if len(differs) else end
        if common < self._cached:
            target.truncate(common)
        self._cached = self._verified = common

    def _evaluate(self, tokens: Tokens) -> Floats:
        """Append tokens to the cache; return the logits after the last, float32 [n_vocab]."""
        target = self._attached()
        capacity = target.batch.capacity
        for start in range(0, len(tokens), capacity):
            part = tokens[start : start + capacity]
            target.evaluate_text(part, self._cached, slice(-1, None))
            self._text[self._cached : self._cached + len(part)] = part
            self._cached += len(part)
        row: Floats = target.logits(1)[0]
        return row

    def _attached(self) -> Decoder:
        if self._target is None:
            raise not_attached(self.path)
        return self._target

    def fork(self) -> ModelDrafter:
        """Return another one with the same weights."""
        forked = copy.deepcopy(self)
        forked._model = self._model
        return forked

    def close_context(self) -> None:
        """Free the context; `attach` makes another one."""
        if self._context is not None:
            self._context.close()
        self._context = self._target = None

    def close(self) -> None:
        """Free the model."""
        self.close_context()
        if self._model is not None:
            self._model.close()
            self._model = None


def probability(logits: Floats, token: int) -> float:
    """Return the softmax probability of one token."""
    return 1.0 / float(np.exp(logits - logits[token]).sum())
