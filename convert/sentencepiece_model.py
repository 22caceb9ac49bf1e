"""Read tokenizer.model: pieces, scores, types and the normalizer, straight from the protobuf wire format.

    model = read_sentencepiece(Path("tokenizer.model"))
    model.pieces[1].text, model.add_dummy_prefix    # ('<s>', True)

The sentencepiece library checks the file, but shows the normalizer's settings only through generated protobuf classes,
which need another package; the few fields wanted here are quickly read by hand (sentencepiece_model.proto).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blockffn.errors import BlockffnError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the same numbers in SentencePiece and GGUF
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What llama.cpp needs to know of a SentencePiece model."""

    pieces: list[Piece]
    kind: str  # a value of MODEL_TYPES
    charsmap: bytes  # compiled normalization rules, empty for identity
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Parse the file; a damaged one raises BlockffnError."""
    from sentencepiece import SentencePieceProcessor

    content = path.read_bytes()
    try:
        SentencePieceProcessor().LoadFromSerializedProto(content)
        return _parse(content)
    except (RuntimeError, ValueError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise BlockffnError(
            f"{path}: not a complete SentencePiece model ({error}); restore the original file"
        ) from error


def _parse(content: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    kind, charsmap, prefix, squeeze = 1, b"", True, True
    for number, value in _fields(content):
        if number == 1 and isinstance(value, bytes):
            pieces.append(_piece(value))
        elif number == 2 and isinstance(value, bytes):
            kind = next((int(inner) for n, inner in _fields(value) if n == 3 and isinstance(inner, int)), kind)
        elif number == 3 and isinstance(value, bytes):
            for inner_number, inner in _fields(value):
                if inner_number == 2 and isinstance(inner, bytes):
                    charsmap = inner
                elif inner_number == 3:
                    prefix = bool(inner)
                elif inner_number == 4:
                    squeeze = bool(inner)
    return SentencePieceModel(pieces, MODEL_TYPES.get(kind, str(kind)), charsmap, prefix, squeeze)


def _piece(content: bytes) -> Piece:
    size = content[1] if content[:1] == b"\n" else 0x80
    if size < 0x80 and content[2 + size : 3 + size] == b"\x15" and len(content) == size + 7:  # text, score: nearly all
        return Piece(content[2 : 2 + size].decode("utf-8"), struct.unpack_from("<f", content, size + 3)[0], NORMAL)
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(content):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    if not NORMAL <= kind <= BYTE:
        raise ValueError(f"piece {text!r} of type {kind}")
    return Piece(text, score, kind)


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a protobuf message: varints as int, everything else as bytes."""
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(content, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            length, at = _varint(content, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(content):
            raise ValueError("field reaches beyond the end")
        yield tag >> 3, content[at : at + length]
        at += length


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
