"""Tokens to bytes, in constant time per token.

llama_cpp's own tokenizer converts prompt and completion anew for every generated token and cuts pieces at 32 bytes;
this one remembers each piece after its first use and takes pieces of any length.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as low_level
from llama_cpp.llama_tokenizer import LlamaTokenizer


class PieceTokenizer(LlamaTokenizer):
    """Same results as llama_cpp.llama_tokenizer.LlamaTokenizer, for pieces of any length."""

    def __init__(self, llama: Any) -> None:
        super().__init__(llama)
        self._bos: int = self._model.token_bos()
        self._pieces: dict[tuple[int, bool], bytes] = {}

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """Return the bytes of `tokens`; a text that starts with the begin-of-text token loses its first space."""
        output = b"".join([self.piece(token, special) for token in tokens])
        starts = bool(tokens) and tokens[0] == self._bos and output[:1] == b" "
        return output[1:] if starts else output

    def piece(self, token: int, special: bool = False) -> bytes:
        """Return the bytes of one token; control tokens are empty unless `special`."""
        known = self._pieces.get((token, special))
        if known is not None:
            return known
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            written = low_level.llama_token_to_piece(self._model.vocab, token, buffer, size, 0, special)
            if written >= 0:
                break
            size = -written
        self._pieces[token, special] = buffer.raw[:written]
        return self._pieces[token, special]
