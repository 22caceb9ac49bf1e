"""tokenizer.json (the tokenizers library) -> tokens, scores and types of a GGUF.

    kind, tokens, scores, types, values = read_tokenizer_json(Path("tokenizer.json"))

Three kinds are understood: BPE with byte fallback, which is SentencePiece BPE exported by transformers (llama); Unigram
(t5); and byte-level BPE whose splitting pattern llama.cpp knows by name (gpt2). Anything else is refused by name.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from gguf import Keys

from blockffn.convert.checkpoint import read_json
from blockffn.convert.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED
from blockffn.errors import BlockffnError

Parts = tuple[str, list[str], list[float], list[int], dict[str, Any]]

# Splitting patterns of byte-level BPE tokenizers -> tokenizer.ggml.pre. llama-bpe splits numbers after three digits,
# qwen2 after each one.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "": "gpt-2",
    _LETTERS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _LETTERS + r"\p{N}" + _REST: "qwen2",
}


def read_tokenizer_json(path: Path) -> Parts:
    """Return (kind, tokens, scores, types, further keys)."""
    content = read_json(path, "")
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or "vocab" not in model:
        raise BlockffnError(f"{path}: model: expected an object with a vocabulary, found {type(model).__name__}")
    kind = model.get("type", "Unigram" if isinstance(model["vocab"], list) else "BPE")
    if kind not in ("BPE", "Unigram"):
        raise BlockffnError(
            f"{path}: model.type: expected BPE or Unigram, found {kind!r}; llama.cpp cannot run it here"
        )
    if kind == "Unigram":
        parts = _unigram(path, content, model)
    elif model.get("byte_fallback"):
        parts = _sentencepiece_bpe(path, content, model)
    else:
        parts = _byte_level(path, content, model)
    parts[4].update(_adds_bos(content))
    return parts


def _adds_bos(content: dict[str, Any]) -> dict[str, bool]:
    """A template that begins with a special token puts the begin-of-text token before every text."""
    step = content.get("post_processor") or {}
    for item in [step, *(step.get("processors") or [])]:
        if item.get("type") == "TemplateProcessing" and item.get("single"):
            return {Keys.Tokenizer.ADD_BOS: "SpecialToken" in item["single"][0]}
    return {}


def _table(path: Path, vocab: Any) -> list[str]:
    """Token -> id becomes a list by id; gaps (filled by added tokens later) become unused names."""
    if not isinstance(vocab, dict) or not all(isinstance(index, int) and index >= 0 for index in vocab.values()):
        raise BlockffnError(f"{path}: model.vocab: expected an object token: id")
    size = 1 + max(vocab.values(), default=-1)
    if size > len(vocab) + 100_000:
        raise BlockffnError(f"{path}: model.vocab: expected ids near {len(vocab)}, found {size - 1}")
    tokens = [f"[PAD{index}]" for index in range(size)]
    for text, index in vocab.items():
        tokens[index] = text
    return tokens


def _types(tokens: list[str], present: set[str], unknown: str | None) -> list[int]:
    def of(text: str) -> int:
        if text not in present:
            return UNUSED
        if text == unknown:
            return UNKNOWN
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return BYTE
        return CONTROL if text in ("<s>", "</s>") else NORMAL

    return [of(text) for text in tokens]


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Merges come as "a b" or as ["a", "b"]."""
    pairs = []
    for merge in model.get("merges") or []:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        pairs.append((left, right))
    return pairs


def _sentencepiece_bpe(path: Path, content: dict[str, Any], model: dict[str, Any]) -> Parts:
    """Scores are minus the rank of the first merge that makes a token: llama.cpp merges the best score first."""
    tokens = _table(path, model["vocab"])
    rank: dict[str, int] = {}
    for position, (left, right) in enumerate(_merges(model)):
        rank.setdefault(left + right, position)
    scores = [-float(rank[text]) if text in rank else 0.0 for text in tokens]
    types = _types(tokens, set(model["vocab"]), model.get("unk_token"))
    if BYTE not in types:
        raise BlockffnError(f"{path}: expected byte tokens <0x00> to <0xFF> (byte_fallback is set), found none")
    values = {Keys.Tokenizer.PRE: "default", Keys.Tokenizer.ADD_PREFIX: _adds_prefix(content)}
    return "llama", tokens, scores, types, values


def _adds_prefix(content: dict[str, Any]) -> bool:
    """Whether a space is put before the text: by a Prepend normalizer, or by a Metaspace pre-tokenizer."""
    steps = [content.get("normalizer") or {}, content.get("pre_tokenizer") or {}]
    while steps:
        step = steps.pop()
        steps += step.get("normalizers") or step.get("pretokenizers") or []
        if step.get("type") == "Prepend" and step.get("prepend") == "\u2581":
            return True
        if step.get("type") == "Metaspace":
            return step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
    return False


def _unigram(path: Path, content: dict[str, Any], model: dict[str, Any]) -> Parts:
    vocab = model["vocab"]
    if not isinstance(vocab, list) or not all(isinstance(entry, list) and len(entry) == 2 for entry in vocab):
        raise BlockffnError(f"{path}: model.vocab: expected a list of [token, score]")
    tokens, scores = [str(entry[0]) for entry in vocab], [float(entry[1]) for entry in vocab]
    unknown = model.get("unk_id")
    types = _types(tokens, set(tokens), tokens[unknown] if isinstance(unknown, int) else None)
    values: dict[str, Any] = {Keys.Tokenizer.PRE: "default", Keys.Tokenizer.ADD_PREFIX: _adds_prefix(content)}
    normalizer = content.get("normalizer") or {}
    for step in [normalizer, *(normalizer.get("normalizers") or [])]:
        if step.get("type") == "Precompiled" and step.get("precompiled_charsmap"):
            values[Keys.Tokenizer.PRECOMPILED_CHARSMAP] = base64.b64decode(step["precompiled_charsmap"])
        if step.get("type") == "Replace" and step.get("pattern", {}).get("Regex") == " {2,}":
            values[Keys.Tokenizer.REMOVE_EXTRA_WS] = True
    return "t5", tokens, scores, types, values


def _byte_level(path: Path, content: dict[str, Any], model: dict[str, Any]) -> Parts:
    """GPT-2 style BPE; llama.cpp has the splitting pattern built in and knows it by name."""
    step = content.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers") or [step]
    if not any(item.get("type") == "ByteLevel" for item in steps):
        raise BlockffnError(
            f"{path}: pre_tokenizer: expected ByteLevel for BPE without byte_fallback, found {step.get('type')!r}"
        )
    patterns = [str((item.get("pattern") or {}).get("Regex", "?")) for item in steps if item.get("type") == "Split"]
    pattern = "".join(patterns)
    if pattern not in PATTERNS or any(item.get("type") not in ("ByteLevel", "Split") for item in steps):
        known = ", ".join(PATTERNS.values())
        raise BlockffnError(
            f"{path}: pre_tokenizer: expected the splitting pattern of one of {known}, found {pattern!r}; llama.cpp "
            "would split text differently"
        )
    tokens = _table(path, model["vocab"])
    types = _types(tokens, set(model["vocab"]), model.get("unk_token"))
    types = [NORMAL if kind in (BYTE, CONTROL) else kind for kind in types]
    merges = [f"{left} {right}" for left, right in _merges(model)]
    values = {Keys.Tokenizer.PRE: PATTERNS[pattern], Keys.Tokenizer.MERGES: merges}
    return "gpt2", tokens, [0.0] * len(tokens), types, values
