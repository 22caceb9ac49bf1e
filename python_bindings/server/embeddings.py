"""/v1/embeddings, for models that pool (general.architecture.pooling_type in the file); others refuse."""

from __future__ import annotations

import base64
import threading
from typing import Any

import numpy as np

from blockffn.server.errors import ApiError
from blockffn.server.limits import Limits
from blockffn.server.prompts import token_ids
from blockffn.server.schemas import EmbeddingRequest


class Embedder:
    """A second context of the model, opened with the first request: llama.cpp embeds or generates, not both at once."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._model: Any = None
        self._lock = threading.Lock()

    @property
    def pools(self) -> bool:
        """Does the model have embeddings of texts?"""
        metadata = self._llm.metadata
        return int(metadata.get(f"{metadata.get('general.architecture')}.pooling_type", 0)) > 0

    def answer(self, body: EmbeddingRequest, name: str, limits: Limits) -> dict[str, Any]:
        """Return OpenAI's list of embeddings; runs in a thread of its own, one request at a time."""
        if not self.pools:
            raise ApiError(400, f"{name} has no embeddings: its file names no pooling", code="no_embeddings")
        given: Any = body.input
        several = isinstance(given, list) and (not given or isinstance(given[0], (str, list)))
        inputs = given if several else [given]
        if not 1 <= len(inputs) <= limits.prompts:
            raise ApiError(400, f"input: expected 1 to {limits.prompts} texts, found {len(inputs)}", param="input")
        tokens = [token_ids(self._llm, one, "input") for one in inputs]
        with self._lock:
            model = self._opened()
            for one in tokens:
                if len(one) > model.n_batch:
                    raise ApiError(400, f"input: expected at most {model.n_batch} tokens, found {len(one)}", "input")
            texts = [one if isinstance(one, str) else self._text(one) for one in inputs]
            rows = model.embed(texts, normalize=True)
        n = sum(map(len, tokens))
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(row, body.encoding_format)}
            for index, row in enumerate(rows)
        ]
        return {"object": "list", "model": name, "data": data, "usage": {"prompt_tokens": n, "total_tokens": n}}

    def _text(self, tokens: list[int]) -> str:
        return str(self._llm.detokenize(tokens, special=True).decode("utf-8", errors="replace"))

    def _opened(self) -> Any:
        if self._model is None:
            import blockffn

            n_ctx = min(int(self._llm._model.n_ctx_train()), 4096)
            self._model = blockffn.Llama(
                self._llm.model_path, n_ctx=n_ctx, n_batch=n_ctx, n_threads=self._llm.n_threads, embedding=True
            )
        return self._model


def _encoded(row: Any, form: str | None) -> Any:
    if form != "base64":
        return row
    return base64.b64encode(np.asarray(row, dtype=np.float32).tobytes()).decode()
