"""tokenizer.json (the tokenizers library) -> tokens, scores and types of a GGUF.

    kind, tokens, scores, types, values = read_tokenizer_json(Path("tokenizer.json"))

Three kinds are understood: BPE with byte fallback, which is SentencePiece BPE exported by transformers (llama); Unigram
(t5); and byte-level BPE whose splitting pattern llama.cpp knows by name (gpt2). Anything else is refused by name.
"""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any, NoReturn

from gguf import Keys

from blockffn.convert.checkpoint import read_json
from blockffn.convert.fields import shown
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
        _wrong(path, "model", "an object with a vocabulary", model)
    kind = model.get("type")
    if kind is None:
        kind = "Unigram" if isinstance(model["vocab"], list) else "BPE"
    if kind not in ("BPE", "Unigram"):
        _wrong(path, "model.type", "BPE or Unigram, as llama.cpp cannot run others", kind)
    if model.get("byte_fallback") not in (None, True, False):
        _wrong(path, "model.byte_fallback", "true or false", model["byte_fallback"])
    if kind == "Unigram":
        parts = _unigram(path, content, model)
    elif model.get("byte_fallback"):
        parts = _sentencepiece_bpe(path, content, model)
    else:
        parts = _byte_level(path, content, model)
    parts[4].update(_adds_bos(path, content))
    return parts


def _wrong(path: Path, where: str, expected: str, found: Any) -> NoReturn:
    raise BlockffnError(f"{path}: {where}: expected {expected}, found {shown(found)}; restore the original file")


def _steps(path: Path, content: dict[str, Any], name: str, inner: str) -> list[dict[str, Any]]:
    """Return the steps of content[name] in their order; a step that lists others under `inner` stands for them."""
    steps, todo = [], [content.get(name)]
    while todo:
        step = todo.pop(0)
        if step is None:
            continue
        if not isinstance(step, dict) or not isinstance(step.get(inner) or [], list):
            _wrong(path, name, f"an object, or one with a list {inner}", step)
        if children := step.get(inner):
            todo = [*children, *todo]
        else:
            steps.append(step)
    return steps


def _regex(path: Path, step: dict[str, Any]) -> str | None:
    """The regular expression of a step's pattern; None where it has none."""
    pattern = step.get("pattern")
    if pattern is not None and not isinstance(pattern, dict | str):
        _wrong(path, "pattern", "an object with Regex or String", pattern)
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    return regex if isinstance(regex, str) else None


def _adds_bos(path: Path, content: dict[str, Any]) -> dict[str, bool]:
    """A template that begins with a special token puts the begin-of-text token before every text."""
    for step in _steps(path, content, "post_processor", "processors"):
        if step.get("type") == "TemplateProcessing" and step.get("single"):
            single = step["single"]
            if not isinstance(single, list) or not isinstance(single[0], dict):
                _wrong(path, "post_processor.single", "a list of objects", single)
            return {Keys.Tokenizer.ADD_BOS: "SpecialToken" in single[0]}
    return {}


def _table(path: Path, vocab: Any) -> list[str]:
    """Token -> id becomes a list by id; gaps (filled by added tokens later) become unused names."""
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    wrong = [index for index in ids if type(index) is not int or index < 0]
    if not isinstance(vocab, dict) or wrong:
        _wrong(path, "model.vocab", "an object token: id", wrong[0] if wrong else vocab)
    size = 1 + max(ids, default=-1)
    if size > len(vocab) + 100_000:
        _wrong(path, "model.vocab", f"ids near {len(vocab)}", size - 1)
    if len(set(ids)) < len(ids):
        _wrong(path, "model.vocab", "every id once", next(index for index in ids if ids.count(index) > 1))
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


def _merges(path: Path, model: dict[str, Any]) -> list[tuple[str, str]]:
    """Merges come as "a b" or as ["a", "b"]."""
    listed = model.get("merges")
    if listed is not None and not isinstance(listed, list):
        _wrong(path, "model.merges", "a list", listed)
    pairs = []
    for merge in listed or []:
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            _wrong(path, "model.merges", "pairs of texts", merge)
        pairs.append((pair[0], pair[1]))
    return pairs


def _sentencepiece_bpe(path: Path, content: dict[str, Any], model: dict[str, Any]) -> Parts:
    """Scores are minus the rank of the first merge that makes a token: llama.cpp merges the best score first."""
    tokens = _table(path, model["vocab"])
    rank: dict[str, int] = {}
    for position, (left, right) in enumerate(_merges(path, model)):
        rank.setdefault(left + right, position)
    scores = [-float(rank[text]) if text in rank else 0.0 for text in tokens]
    types = _types(tokens, set(model["vocab"]), model.get("unk_token"))
    if BYTE not in types:
        raise BlockffnError(f"{path}: expected byte tokens <0x00> to <0xFF> (byte_fallback is set), found none")
    values = {Keys.Tokenizer.PRE: "default", Keys.Tokenizer.ADD_PREFIX: _adds_prefix(path, content)}
    return "llama", tokens, scores, types, values


def _adds_prefix(path: Path, content: dict[str, Any]) -> bool:
    """Whether a space is put before the text: by a Metaspace pre-tokenizer, or by a Prepend normalizer."""
    for step in _steps(path, content, "pre_tokenizer", "pretokenizers"):
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme")
            if scheme not in (None, "always", "first", "never"):
                _wrong(path, "pre_tokenizer.prepend_scheme", "always, first or never", scheme)
            return scheme != "never" if scheme is not None else bool(step.get("add_prefix_space", True))
    steps = _steps(path, content, "normalizer", "normalizers")
    return any(step.get("type") == "Prepend" and step.get("prepend") == "\u2581" for step in steps)


def _unigram(path: Path, content: dict[str, Any], model: dict[str, Any]) -> Parts:
    vocab = model["vocab"]
    if not isinstance(vocab, list):
        _wrong(path, "model.vocab", "a list of [token, score]", vocab)
    tokens, scores = [], []
    for entry in vocab:
        good = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
        if not good or isinstance(entry[1], bool) or not isinstance(entry[1], int | float):
            _wrong(path, "model.vocab", "entries [token, score]", entry)
        tokens.append(entry[0])
        scores.append(float(entry[1]) if abs(entry[1]) < 1e30 else math.inf)  # inf is refused with all other values
    unknown = model.get("unk_id")
    if unknown is not None and (type(unknown) is not int or not 0 <= unknown < len(tokens)):
        _wrong(path, "model.unk_id", f"an id below {len(tokens)}", unknown)
    types = _types(tokens, set(tokens), None if unknown is None else tokens[unknown])
    values: dict[str, Any] = {Keys.Tokenizer.PRE: "default", Keys.Tokenizer.ADD_PREFIX: _adds_prefix(path, content)}
    for step in _steps(path, content, "normalizer", "normalizers"):
        if step.get("type") == "Precompiled" and step.get("precompiled_charsmap"):
            values[Keys.Tokenizer.PRECOMPILED_CHARSMAP] = _charsmap(path, step["precompiled_charsmap"])
        if step.get("type") == "Replace" and _regex(path, step) == " {2,}":
            values[Keys.Tokenizer.REMOVE_EXTRA_WS] = True
    return "t5", tokens, scores, types, values


def _charsmap(path: Path, text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        _wrong(path, "normalizer.precompiled_charsmap", "base64", text)


def _byte_level(path: Path, content: dict[str, Any], model: dict[str, Any]) -> Parts:
    """GPT-2 style BPE; llama.cpp has the splitting pattern built in and knows it by name."""
    steps = _steps(path, content, "pre_tokenizer", "pretokenizers")
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" not in kinds:
        _wrong(path, "pre_tokenizer", "ByteLevel for BPE without byte_fallback", kinds)
    patterns = [_regex(path, step) or "?" for step in steps if step.get("type") == "Split"]
    pattern = "".join(patterns)
    if pattern not in PATTERNS or any(kind not in ("ByteLevel", "Split") for kind in kinds):
        known = ", ".join(PATTERNS.values())
        _wrong(
            path, "pre_tokenizer", f"the splitting pattern of one of {known}, as llama.cpp knows these only", pattern
        )
    tokens = _table(path, model["vocab"])
    types = _types(tokens, set(model["vocab"]), model.get("unk_token"))
    types = [NORMAL if kind in (BYTE, CONTROL) else kind for kind in types]
    merges = [f"{left} {right}" for left, right in _merges(path, model)]
    values = {Keys.Tokenizer.PRE: PATTERNS[pattern], Keys.Tokenizer.MERGES: merges}
    return "gpt2", tokens, [0.0] * len(tokens), types, values
