"""Tokenizer files of a checkpoint -> the tokenizer keys of the GGUF.

    vocab = read_vocab(checkpoint, config)
    vocab.values["tokenizer.ggml.model"], len(vocab.tokens)    # ('llama', 122753)

tokenizer.model (SentencePiece) is preferred; a folder that has only tokenizer.json is read by `tokenizer_json`. Added
tokens come from added_tokens.json, tokenizer.json and tokenizer_config.json; rows of the embedding beyond the tokenizer
become unused padding tokens, and fewer rows than tokens are an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import Keys

from blockffn.convert.chat_templates import read_chat_templates
from blockffn.convert.checkpoint import Checkpoint, optional_json
from blockffn.convert.fields import Fields, shown
from blockffn.convert.hugging_face import token_ids
from blockffn.convert.model import ModelConfig
from blockffn.convert.sentencepiece_model import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED, read_sentencepiece
from blockffn.convert.tokenizer_json import read_tokenizer_json
from blockffn.errors import BlockffnError

SPECIAL = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<pad>|<mask>|<unused\d*>|<2mass>|\[@BOS@\]", re.DOTALL)
UNLIKELY = -1000.0  # score of tokens that the merging algorithm never makes
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


@dataclass
class Vocab:
    """The vocabulary in GGUF terms; `values` holds everything but the three big arrays."""

    kind: str  # tokenizer.ggml.model: llama, t5 or gpt2
    tokens: list[str]
    scores: list[float]
    types: list[int]
    values: dict[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, Any]:
        """Return all tokenizer keys."""
        arrays: dict[str, Any] = {Keys.Tokenizer.LIST: self.tokens, Keys.Tokenizer.TOKEN_TYPE: self.types}
        if self.kind != "gpt2":
            arrays[Keys.Tokenizer.SCORES] = self.scores
        return {Keys.Tokenizer.MODEL: self.kind, **arrays, **self.values}


def read_vocab(checkpoint: Checkpoint, config: ModelConfig) -> Vocab:
    """Read the tokenizer of a checkpoint folder and fit it to the embedding's rows."""
    folder = checkpoint.folder
    if (folder / "tokenizer.model").is_file():
        vocab = _from_sentencepiece(checkpoint)
    elif (folder / "tokenizer.json").is_file():
        vocab = Vocab(*read_tokenizer_json(folder / "tokenizer.json"))
    else:
        raise BlockffnError(
            f"{folder}: no tokenizer found: expected tokenizer.model or tokenizer.json; copy it from the published "
            "model"
        )
    settings = optional_json(folder / "tokenizer_config.json")
    added = _added_tokens(folder, settings)
    _place_added(checkpoint, vocab, added)
    _pad(vocab, config.n_vocab, folder)
    _check_unique(vocab)
    _special_ids(checkpoint, config, vocab, settings)
    vocab.values[Keys.Tokenizer.ADD_BOS] = _flag(
        settings, "add_bos_token", bool(vocab.values.get(Keys.Tokenizer.ADD_BOS, vocab.kind == "llama"))
    )
    vocab.values[Keys.Tokenizer.ADD_EOS] = _flag(settings, "add_eos_token", False)
    if vocab.kind != "gpt2":
        prefix = bool(vocab.values.get(Keys.Tokenizer.ADD_PREFIX, True))
        vocab.values[Keys.Tokenizer.ADD_PREFIX] = _flag(settings, "add_prefix_space", prefix)
    vocab.values |= read_chat_templates(folder, settings)
    return vocab


def _flag(settings: dict[str, Any], key: str, default: bool) -> bool:
    value = settings.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise BlockffnError(
            f"tokenizer_config.json: {key}: expected true or false, found {shown(value)}; correct the file"
        )
    return value


def _from_sentencepiece(checkpoint: Checkpoint) -> Vocab:
    model = read_sentencepiece(checkpoint.folder / "tokenizer.model")
    if model.kind not in ("bpe", "unigram"):
        raise BlockffnError(
            f"tokenizer.model: expected a SentencePiece model of type bpe or unigram, found {model.kind}; llama.cpp "
            "cannot run this one"
        )
    spaced = [
        piece.text.replace("\u2581", " ") if piece.type == USER_DEFINED else piece.text for piece in model.pieces
    ]  # llama.cpp looks for user-defined tokens in the raw text, before spaces are escaped
    scores = [piece.score for piece in model.pieces]
    types = [
        CONTROL if piece.type == USER_DEFINED and _looks_special(piece.text) else piece.type for piece in model.pieces
    ]
    values: dict[str, Any] = {Keys.Tokenizer.PRE: "default", Keys.Tokenizer.ADD_PREFIX: model.add_dummy_prefix}
    has_bytes = BYTE in types
    if model.kind == "unigram":
        values[Keys.Tokenizer.REMOVE_EXTRA_WS] = model.remove_extra_whitespaces
        if model.charsmap:
            values[Keys.Tokenizer.PRECOMPILED_CHARSMAP] = model.charsmap
        if has_bytes:
            checkpoint.note(
                "WARNING: tokenizer.model is a unigram model with byte fallback; llama.cpp's unigram tokenizer has "
                "no byte fallback, so characters outside the vocabulary become the unknown token"
            )
        return Vocab("t5", spaced, scores, types, values)
    if not has_bytes:
        raise BlockffnError(
            "tokenizer.model: expected byte pieces <0x00> to <0xFF>, found none; llama.cpp needs them for characters "
            "outside the vocabulary: train the tokenizer with byte_fallback"
        )
    if model.charsmap or model.remove_extra_whitespaces:
        checkpoint.note(
            "WARNING: tokenizer.model normalizes its input (or removes extra spaces), which llama.cpp does not do "
            "for this kind of tokenizer: token ids differ on texts that normalization changes"
        )
    return Vocab("llama", spaced, scores, types, values)


def _added_tokens(folder: Path, settings: dict[str, Any]) -> dict[int, tuple[str, bool]]:
    """Return id -> (text, special) of the tokens that were added to the model's own vocabulary."""
    found: dict[int, tuple[str, bool]] = {}

    def add(file: str, text: Any, index: Any, special: bool) -> None:
        if not isinstance(text, str) or isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise BlockffnError(
                f"{file}: added token: expected a text and a token id, found {shown(text)} and {shown(index)}; correct "
                "the file"
            )
        found[index] = (text, special)

    for text, index in optional_json(folder / "added_tokens.json").items():
        add("added_tokens.json", text, index, _looks_special(text))
    for entry in _entries(optional_json(folder / "tokenizer.json"), "tokenizer.json", "added_tokens", list):
        add("tokenizer.json", entry.get("content"), entry.get("id"), bool(entry.get("special")))
    decoder = _entries(settings, "tokenizer_config.json", "added_tokens_decoder", dict)
    for index, entry in zip(settings.get("added_tokens_decoder") or (), decoder, strict=True):
        number = int(index) if re.fullmatch("[0-9]{1,9}", index) else index
        text = entry.get("content")
        add("tokenizer_config.json", text, number, bool(entry.get("special")) or _looks_special(text))
    return found


def _entries(content: dict[str, Any], file: str, key: str, kind: type[list[Any]] | type[dict[str, Any]]) -> list[Any]:
    """Return the objects that the list or the object `content[key]` holds; none where the key is missing or null."""
    value = content.get(key)
    if value is None:
        return []
    entries = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(value, kind) or not all(isinstance(entry, dict) for entry in entries):
        name = "a list" if kind is list else "an object"
        raise BlockffnError(f"{file}: {key}: expected {name} of objects, found {shown(value)}; correct the file")
    return list(entries)


def _looks_special(text: Any) -> bool:
    """Chat marks such as <|im_end|> are control tokens even where a file forgets to say so; upstream's patterns."""
    return isinstance(text, str) and SPECIAL.fullmatch(text) is not None


def _place_added(checkpoint: Checkpoint, vocab: Vocab, added: dict[int, tuple[str, bool]]) -> None:
    highest = max(added, default=-1)
    if highest >= len(vocab.tokens) + 100_000:
        raise BlockffnError(
            f"{checkpoint.folder}: added token {shown(added[highest][0])}: expected an id near {len(vocab.tokens)}, "
            f"found {shown(highest)}"
        )
    for index in range(len(vocab.tokens), highest + 1):
        vocab.tokens.append(f"[PAD{index}]")
        vocab.scores.append(UNLIKELY)
        vocab.types.append(UNUSED)
    for index, (text, special) in sorted(added.items()):
        kind = vocab.types[index]
        same = vocab.tokens[index] == text
        if not same and kind != UNUSED:
            checkpoint.note(f"token {index}: {shown(vocab.tokens[index])} is replaced by the added token {shown(text)}")
        if same and kind not in (NORMAL, USER_DEFINED, UNUSED):
            continue  # <s>, </s>, <unk>: the model itself says what they are
        vocab.tokens[index] = text
        vocab.types[index] = CONTROL if special else USER_DEFINED
        vocab.scores[index] = vocab.scores[index] if same else UNLIKELY


def _pad(vocab: Vocab, rows: int, folder: Path) -> None:
    if len(vocab.tokens) > rows:
        raise BlockffnError(
            f"{folder}: tokenizer: expected at most {rows} tokens, as the embedding has {rows} rows, found "
            f"{len(vocab.tokens)}; the tokenizer belongs to another model"
        )
    taken = set(vocab.tokens)
    for index in range(len(vocab.tokens), rows):
        text = f"[PAD{index}]"
        while text in taken:
            text = f"[{text}]"
        vocab.tokens.append(text)
        vocab.scores.append(UNLIKELY)
        vocab.types.append(UNUSED)


def _check_unique(vocab: Vocab) -> None:
    seen: dict[str, int] = {}
    for index, text in enumerate(vocab.tokens):
        if text in seen:
            raise BlockffnError(
                f"tokenizer: tokens {seen[text]} and {index} are both {shown(text)}; expected every text once, for "
                "llama.cpp refuses the file; correct the tokenizer files"
            )
        seen[text] = index


def _special_ids(checkpoint: Checkpoint, config: ModelConfig, vocab: Vocab, settings: dict[str, Any]) -> None:
    """Write bos, eos, end-of-turn, padding and unknown ids; all ids that end a text must be among them."""
    by_text = {text: index for index, text in enumerate(vocab.tokens)}
    named = {key: _named(settings, key, by_text) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    generation = Fields(
        optional_json(checkpoint.folder / "generation_config.json"), "generation_config.json", checkpoint.note
    )
    first = () if named["eos_token"] is None else (named["eos_token"],)
    eos = list(dict.fromkeys((*first, *config.eos_ids, *token_ids(generation, "eos_token_id"))))
    given = {"bos_token_id": (config.bos_id,), "pad_token_id": (config.pad_id,), "eos_token_id": eos}
    for key, values in given.items():
        for value in values:
            if value is not None and value >= len(vocab.tokens):
                raise BlockffnError(
                    f"config.json: {key}: expected an id below {len(vocab.tokens)}, the vocabulary size, found "
                    f"{shown(value)}; correct the file"
                )
    if not eos and "</s>" in by_text:
        eos = [by_text["</s>"]]
    if named["bos_token"] is not None and config.bos_id not in (None, named["bos_token"]):
        checkpoint.note(
            f"bos: tokenizer_config.json names token {named['bos_token']}, config.json {config.bos_id}; the former is "
            "used"
        )
    ids = {
        Keys.Tokenizer.BOS_ID: _first(named["bos_token"], config.bos_id, by_text.get("<s>")),
        **dict(zip((Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID), eos, strict=False)),
        Keys.Tokenizer.PAD_ID: _first(config.pad_id, named["pad_token"]),
        Keys.Tokenizer.UNK_ID: _first(named["unk_token"], by_text.get("<unk>")),
    }
    vocab.values |= {key: value for key, value in ids.items() if value is not None}
    if len(eos) > 3:
        checkpoint.note(f"only the first three end-of-text ids fit a GGUF: {eos[:3]} of {shown(eos)}")
    if not eos:
        checkpoint.note("WARNING: no end-of-text token found; generation ends at the token limit only")


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _named(settings: dict[str, Any], key: str, by_text: dict[str, int]) -> int | None:
    value = settings.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        return None
    if text not in by_text and key in ("pad_token", "unk_token"):
        return None  # often a leftover of training; the model never writes them
    if text not in by_text:
        raise BlockffnError(
            f"tokenizer_config.json: {key}: expected a token of the vocabulary, found {shown(text)}; correct the file"
        )
    return by_text[text]
