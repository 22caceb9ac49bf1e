"""Do two models have the same vocabulary? A drafter's token numbers must mean the same text to the target."""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

from blockffn import library
from blockffn.errors import BlockffnError

_digests: weakref.WeakKeyDictionary[Any, tuple[int, bytes]] = weakref.WeakKeyDictionary()


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
