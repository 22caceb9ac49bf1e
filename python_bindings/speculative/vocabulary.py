"""Do two models have the same vocabulary? A drafter's token numbers must mean the same text to the target."""

from __future__ import annotations

from typing import Any

from blockffn import library
from blockffn.errors import BlockffnError


def texts(vocab: Any, n: int) -> list[bytes]:
    """Return the text of the first `n` tokens of a llama_vocab."""
    text = library.load().llama_vocab_get_text
    return [bytes(text(vocab, token)) for token in range(n)]


def check_same(draft_path: str, draft_vocab: Any, target_vocab: Any) -> None:
    """Raise BlockffnError that shows the first difference between two vocabularies."""
    api = library.load()
    sizes = api.llama_vocab_n_tokens(draft_vocab), api.llama_vocab_n_tokens(target_vocab)
    n = min(sizes)
    cure = "a draft model needs the target's tokenizer: convert it from a checkpoint with the same vocabulary"
    for token, (drafted, wanted) in enumerate(zip(texts(draft_vocab, n), texts(target_vocab, n), strict=True)):
        if drafted != wanted:
            raise BlockffnError(
                f"{draft_path}: the vocabulary differs from the target's: token {token} is {drafted!r}, "
                f"expected {wanted!r}; {cure}"
            )
    if sizes[0] != sizes[1]:
        raise BlockffnError(
            f"{draft_path}: the vocabulary differs from the target's: it has {sizes[0]} tokens, expected {sizes[1]}; "
            f"the first {n} are equal; {cure}"
        )
