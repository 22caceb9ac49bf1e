"""llama.cpp's models and contexts for drafters, and whether two models share their vocabulary.

>>> from blockffn.speculative import native
>>> model = native.load_model("draft.gguf")              # doctest: +SKIP
>>> native.check_same("draft.gguf", model, llm._model)   # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import weakref
from pathlib import Path
from typing import Any

from blockffn import library, logs
from blockffn.errors import BlockffnError

_digests: weakref.WeakKeyDictionary[Any, tuple[int, bytes]] = weakref.WeakKeyDictionary()


def not_attached(path: str) -> BlockffnError:
    """Return the error of a drafter that is used before it met a model, or after that model was closed."""
    return BlockffnError(f"{path}: this drafter was closed, or met no model yet: give it to a blockffn.Llama")


def load_model(path: str) -> Any:
    """Load a GGUF as llama_cpp's internal LlamaModel; BlockffnError with llama.cpp's reason when it cannot be."""
    api = library.load()
    from llama_cpp import _internals as internals

    if not Path(path).is_file():
        raise BlockffnError(f"{path}: no such file")
    logs.install()
    with logs.collect() as lines:
        try:
            params = api.llama_model_default_params()
            return internals.LlamaModel(path_model=path, params=params, verbose=logs.verbose())
        except ValueError as error:
            raise BlockffnError(f"{path}: {logs.reason(lines) or error}") from error


def open_context(model: Any, llm: Any, n_threads: int | None, **changes: Any) -> Any:
    """Make a context for a drafter: as long as the target's and with its threads, unless told otherwise."""
    api = library.load()
    from llama_cpp import _internals as internals

    params = api.llama_context_default_params()
    theirs = llm.context_params
    params.n_ctx = llm.n_ctx()
    params.n_batch, params.n_ubatch = theirs.n_batch, theirs.n_ubatch
    params.n_threads, params.n_threads_batch = n_threads or theirs.n_threads, n_threads or theirs.n_threads_batch
    params.kv_unified = True
    params.no_perf = True
    for name, value in changes.items():
        setattr(params, name, value)
    with logs.collect() as lines:
        try:
            return internals.LlamaContext(model=model, params=params, verbose=False)
        except ValueError as error:
            raise BlockffnError(
                f"{model.path_model}: no context of {params.n_ctx} tokens: {logs.reason(lines) or error}"
            ) from error


def texts(model: Any, n: int) -> list[bytes]:
    """Return the texts of the first `n` tokens of a llama_cpp LlamaModel."""
    text = library.load().llama_vocab_get_text
    return [bytes(text(model.vocab, token)) for token in range(n)]


def digest(model: Any) -> tuple[int, bytes]:
    """Return the number of tokens and a hash of their texts; they are read once per loaded model."""
    if model not in _digests:
        n = int(model.n_vocab())
        content = hashlib.sha256()
        for text in texts(model, n):
            content.update(len(text).to_bytes(4, "little") + text)
        _digests[model] = n, content.digest()
    return _digests[model]


def check_same(draft_path: str, draft: Any, target: Any) -> None:
    """Raise BlockffnError that shows the first difference between the vocabularies of two LlamaModels."""
    if digest(draft) == digest(target):
        return
    sizes = draft.n_vocab(), target.n_vocab()
    n = min(sizes)
    cure = "a draft model needs the target's tokenizer: convert it from a checkpoint with the same vocabulary"
    for token, (drafted, wanted) in enumerate(zip(texts(draft, n), texts(target, n), strict=True)):
        if drafted != wanted:
            raise BlockffnError(
                f"{draft_path}: the vocabulary differs from the target's: token {token} is {drafted!r}, "
                f"expected {wanted!r}; {cure}"
            )
    raise BlockffnError(
        f"{draft_path}: the vocabulary differs from the target's: it has {sizes[0]} tokens, expected {sizes[1]}; "
        f"the first {n} are equal; {cure}"
    )
