"""Tokenizers: llama.cpp's token ids equal SentencePiece's, and every tokenizer file is read."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from checkpoints import DATA, N_VOCAB, write_checkpoint
from gguf import GGUFReader

import blockffn
from blockffn.convert import convert_checkpoint
from blockffn.convert.sentencepiece_model import read_sentencepiece
from blockffn.errors import BlockffnError

POOLS = [
    "abcdefghij klmnop ", "0123456789 +-*/=()[]{}:;.,\n\t",
    "\u4f60\u597d\u4e16\u754c\u4eca\u5929\u5929\u6c14\u5f88\u597d",
    "\U0001f600\U0001f389\U0001f44d\U0001f3fd\U0001f468\u200d\U0001f469", "\x00\x01\x07\x1b\x7f\u200b\u200d\ufeff",
    "e\u0301a\u0308\u0300\u20dd", "  \u00a0\u3000\u2581 ", "\u00e9\u00e0\u00fc\u00f1\u00e7\u00df\u0102\u0141",
    "\u043a\u0438\u0440\u0438\u043b\u043b \u05e2\u05d1\u05e8\u05d9\u05ea \u0627\u0644\u0639\u0631\u0628",
]  # fmt: skip


def texts(count: int) -> list[str]:
    """Code, prose, spaces, and random mixtures of scripts, emoji, control and combining characters."""
    rng = random.Random(7)
    found = ["", " ", "  ", "\n", "\t\t", " leading", "   three", "trailing  ", "a  b   c", "\r\n", "x" * 100_000]
    found += Path(random.__file__).read_text(encoding="utf-8").splitlines()[:500]
    while len(found) < count:
        letters = "".join(rng.sample(POOLS, rng.randint(1, 4)))
        found.append("".join(rng.choice(letters) for _ in range(rng.randint(1, 40))))
    return found


def keys(path: Path) -> dict[str, Any]:
    """All tokenizer keys but the normalization table, whose 240,000 bytes the reader returns one by one."""
    fields = GGUFReader(path).fields.items()
    return {
        name: field.contents() for name, field in fields if name.startswith("tokenizer.") and "charsmap" not in name
    }


def open_vocab(path: Path) -> blockffn.Llama:
    return blockffn.Llama(str(path), vocab_only=True, verbose=False)


def check_ids(path: Path, model: bytes, samples: list[str]) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    llm = open_vocab(path)
    for text in samples:
        assert llm.tokenize(text.encode(), add_bos=False, special=False) == processor.encode(text), repr(text[:80])
    llm.close()


def test_token_ids_equal_sentencepiece(tmp_path: Path) -> None:
    convert_checkpoint(write_checkpoint(tmp_path / "m"), tmp_path / "m.gguf", vocab_only=True)
    samples = texts(3000)
    samples.append("".join(samples[20:])[:100_000])
    check_ids(tmp_path / "m.gguf", (DATA / "tokenizer.model").read_bytes(), samples)


@pytest.mark.parametrize("normalized", [False, True])
def test_unigram_model(tmp_path: Path, normalized: bool) -> None:
    """A unigram SentencePiece model runs in llama.cpp's own unigram tokenizer, with its normalization."""
    rules = tmp_path / "rules.tsv"
    rules.write_text("FF21\t41\nFF22\t42\n")  # full-width A and B become plain ones
    normalization = {"normalization_rule_tsv": str(rules)} if normalized else {"normalization_rule_name": "identity"}
    lines = [line for line in texts(1500) if line.strip() and "\x00" not in line and len(line) < 1000]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "uni"), vocab_size=500, model_type="unigram",
        num_threads=1, minloglevel=2, **normalization,
    )  # fmt: skip
    source = write_checkpoint(tmp_path / "m")
    model = (tmp_path / "uni.model").read_bytes()
    (source / "tokenizer.model").write_bytes(model)
    convert_checkpoint(source, tmp_path / "m.gguf", vocab_only=True)
    assert keys(tmp_path / "m.gguf")["tokenizer.ggml.model"] == "t5"
    words = ["hello world", "def f(x):", "return x", "the values of a sequence", "\uff21\uff22 full width", "a  b"]
    unambiguous = [line for line in lines[:300] if line.isascii() and "--" not in line]  # "---": two equal scores
    check_ids(tmp_path / "m.gguf", model, words + unambiguous)


def test_reading_the_protobuf(tmp_path: Path) -> None:
    model = read_sentencepiece(DATA / "tokenizer.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(DATA / "tokenizer.model"))
    assert (model.kind, model.charsmap, model.add_dummy_prefix, model.remove_extra_whitespaces) == (
        "bpe",
        b"",
        True,
        False,
    )
    assert [piece.text for piece in model.pieces] == [processor.id_to_piece(i) for i in range(N_VOCAB)]
    assert [piece.score for piece in model.pieces] == [processor.get_score(i) for i in range(N_VOCAB)]
    assert sum(piece.type == 6 for piece in model.pieces) == 256


def test_rows_beyond_the_tokenizer_become_padding(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m", n_vocab=520, n_layer=1)
    convert_checkpoint(source, tmp_path / "m.gguf")
    found = keys(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.tokens"][512:] == [f"[PAD{i}]" for i in range(512, 520)]
    assert found["tokenizer.ggml.token_type"][512:] == [5] * 8  # unused
    llm = open_vocab(tmp_path / "m.gguf")
    assert llm.n_vocab() == 520


@pytest.mark.parametrize(
    "text", ["<pad>", "<mask>", "<unused0>", "<unused17>", "<|turn|>", "<\uff5cend\uff5c>", "[@BOS@]"]
)
def test_marks_are_control_tokens(tmp_path: Path, text: str) -> None:
    """Upstream's patterns, also where a file does not call the token special."""
    source = write_checkpoint(tmp_path / "m", n_vocab=518, n_layer=1)
    (source / "added_tokens.json").write_text(json.dumps({text: 514, f"x{text}": 515}))
    convert_checkpoint(source, tmp_path / "m.gguf", vocab_only=True)
    assert keys(tmp_path / "m.gguf")["tokenizer.ggml.token_type"][514:516] == [3, 4]


def add_tokens(folder: Path, where: str) -> None:
    """The same two added tokens in each of the files that may hold them."""
    if where == "added_tokens.json":
        (folder / where).write_text(json.dumps({"<|turn|>": 514, "extra word": 515}))
    elif where == "tokenizer_config.json":
        entries = {"514": {"content": "<|turn|>", "special": True}, "515": {"content": "extra word", "special": False}}
        config = json.loads((folder / where).read_text()) | {"added_tokens_decoder": entries}
        (folder / where).write_text(json.dumps(config))
    else:
        entries = [{"id": 514, "content": "<|turn|>", "special": True}, {"id": 515, "content": "extra word"}]
        (folder / where).write_text(json.dumps({"added_tokens": entries}))


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
def test_added_tokens(tmp_path: Path, where: str) -> None:
    source = write_checkpoint(tmp_path / "m", n_vocab=518, n_layer=1)
    add_tokens(source, where)
    convert_checkpoint(source, tmp_path / "m.gguf")
    found = keys(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.tokens"][512:517] == ["[PAD512]", "[PAD513]", "<|turn|>", "extra word", "[PAD516]"]
    assert found["tokenizer.ggml.token_type"][512:517] == [5, 5, 3, 4, 5]
    llm = open_vocab(tmp_path / "m.gguf")
    assert llm.tokenize(b"<|turn|>", add_bos=False, special=True) == [514]
    assert 514 not in llm.tokenize(b"<|turn|>", add_bos=False, special=False)
    assert 515 in llm.tokenize(b"an extra word", add_bos=False, special=False)


def test_chat_tokens_of_the_model_are_control_tokens(tmp_path: Path) -> None:
    """Text typed by a user must not turn into <|im_start|>."""
    convert_checkpoint(write_checkpoint(tmp_path / "m"), tmp_path / "m.gguf")
    found = keys(tmp_path / "m.gguf")
    start = found["tokenizer.ggml.tokens"].index("<|im_start|>")
    assert found["tokenizer.ggml.token_type"][start] == 3


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja", "chat_template.json", "named"])
def test_chat_template(tmp_path: Path, where: str) -> None:
    template, source = "{% for m in messages %}{{ m['content'] }}{% endfor %}", write_checkpoint(tmp_path / "m")
    config = json.loads((source / "tokenizer_config.json").read_text())
    if where == "chat_template.jinja":
        (source / where).write_text(template)
        config["chat_template"] = "stale"
    elif where == "chat_template.json":
        (source / where).write_text(json.dumps({"chat_template": template}))
    else:
        named = [{"name": "default", "template": template}, {"name": "tool-use", "template": "T"}]
        config["chat_template"] = named if where == "named" else template
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    convert_checkpoint(source, tmp_path / "m.gguf", vocab_only=True)
    found = keys(tmp_path / "m.gguf")
    assert found["tokenizer.chat_template"] == template
    if where == "named":
        assert found["tokenizer.chat_templates"] == ["tool_use"] and found["tokenizer.chat_template.tool_use"] == "T"


def test_further_chat_templates(tmp_path: Path) -> None:
    """transformers since 4.53 keeps named templates as files."""
    source = write_checkpoint(tmp_path / "m")
    (source / "chat_template.jinja").write_text("default one")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool-use.jinja").write_text("with tools")
    before = convert_checkpoint(source, tmp_path / "m.gguf", vocab_only=True).sha256
    found = keys(tmp_path / "m.gguf")
    assert found["tokenizer.chat_template"] == "default one" and found["tokenizer.chat_templates"] == ["tool_use"]
    assert found["tokenizer.chat_template.tool_use"] == "with tools"
    (source / "additional_chat_templates" / "tool-use.jinja").write_text("with other tools")
    assert convert_checkpoint(source, tmp_path / "m.gguf", vocab_only=True).sha256 != before


@pytest.mark.parametrize(("add_bos", "add_eos"), [(True, False), (False, True)])
def test_bos_and_eos_settings(tmp_path: Path, add_bos: bool, add_eos: bool) -> None:
    source = write_checkpoint(tmp_path / "m")
    (source / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": add_bos, "add_eos_token": add_eos}))
    convert_checkpoint(source, tmp_path / "m.gguf", vocab_only=True)
    found = keys(tmp_path / "m.gguf")
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (add_bos, add_eos)
    ids = open_vocab(tmp_path / "m.gguf").tokenize(b"x", add_bos=True)
    assert (ids[0] == 1, ids[-1] == 2) == (add_bos, add_eos)


def test_several_end_tokens(tmp_path: Path) -> None:
    """DECO lists two end tokens; both end a text in llama.cpp."""
    source = write_checkpoint(tmp_path / "m", config={"eos_token_id": [2, 4]})
    convert_checkpoint(source, tmp_path / "m.gguf", vocab_only=True)
    found = keys(tmp_path / "m.gguf")
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (2, 4)


def sentencepiece_json() -> dict[str, Any]:
    """tokenizer.json as transformers makes it from tests/data/tokenizer.model: merges from all splits, by score."""
    pieces = read_sentencepiece(DATA / "tokenizer.model").pieces
    vocab = {piece.text: index for index, piece in enumerate(pieces)}
    merges: list[tuple[float, str, str]] = []
    for piece in pieces:
        if piece.type == 1:
            cuts = [(piece.text[:k], piece.text[k:]) for k in range(1, len(piece.text))]
            merges += [(-piece.score, left, right) for left, right in cuts if left in vocab and right in vocab]
    merges.sort(key=lambda merge: merge[0])
    special = [{"id": i, "content": pieces[i].text, "special": True} for i in (0, 1, 2)]
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}]}
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocab}
    model["merges"] = [f"{left} {right}" for _, left, right in merges]
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}
    return {"model": model, "added_tokens": special, "normalizer": prepend, "post_processor": template}


def test_tokenizer_json_from_sentencepiece(tmp_path: Path) -> None:
    """A folder that has only tokenizer.json gives the ids that tokenizer.model gives."""
    source = write_checkpoint(tmp_path / "m")
    (source / "tokenizer.model").unlink()
    (source / "tokenizer.json").write_text(json.dumps(sentencepiece_json()))
    convert_checkpoint(source, tmp_path / "m.gguf", vocab_only=True)
    found = keys(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.token_type"][:3] == [2, 3, 3]
    check_ids(tmp_path / "m.gguf", (DATA / "tokenizer.model").read_bytes(), texts(1000))


def byte_level_json(pre_tokenizer: dict[str, Any]) -> dict[str, Any]:
    letters = [chr(code) for code in range(33, 127)] + ["\u0120", "\u010a"]
    vocab = {text: index for index, text in enumerate([*letters, "th", "the", "\u0120the"])}
    merges = [["t", "h"], ["th", "e"], ["\u0120", "the"]]
    return {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, "pre_tokenizer": pre_tokenizer}


def test_byte_level_bpe(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m")
    (source / "tokenizer.model").unlink()
    (source / "tokenizer_config.json").unlink()
    (source / "tokenizer.json").write_text(json.dumps(byte_level_json({"type": "ByteLevel"})))
    convert_checkpoint(source, tmp_path / "m.gguf", vocab_only=True)
    found = keys(tmp_path / "m.gguf")
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert found["tokenizer.ggml.add_bos_token"] is False
    ids = open_vocab(tmp_path / "m.gguf").tokenize(b"the the", add_bos=False)
    assert [found["tokenizer.ggml.tokens"][index] for index in ids] == ["the", "\u0120the"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {
                "type": "ByteLevel",
                "pretokenizers": [{"type": "Split", "pattern": {"Regex": "."}}, {"type": "ByteLevel"}],
            },
            "'.'",
        ),
        ({"type": "Whitespace"}, "expected ByteLevel"),
    ],
)
def test_unknown_splitting_is_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    source = write_checkpoint(tmp_path / "m")
    (source / "tokenizer.model").unlink()
    (source / "tokenizer.json").write_text(json.dumps(byte_level_json(content)))
    with pytest.raises(BlockffnError, match="pre_tokenizer") as caught:
        convert_checkpoint(source, tmp_path / "m.gguf")
    assert message in str(caught.value)


@pytest.mark.parametrize("model", [None, {"type": "WordPiece", "vocab": {}}, {"type": "Unigram", "vocab": [1]}])
def test_other_tokenizers_are_refused(tmp_path: Path, model: object) -> None:
    source = write_checkpoint(tmp_path / "m")
    (source / "tokenizer.model").unlink()
    (source / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(BlockffnError, match=r"tokenizer\.json: model"):
        convert_checkpoint(source, tmp_path / "m.gguf")


def test_normalizing_bpe_is_named(tmp_path: Path) -> None:
    lines = [line for line in texts(1500) if line.strip() and "\x00" not in line and len(line) < 1000]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "bpe"), vocab_size=500, model_type="bpe",
        byte_fallback=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    source = write_checkpoint(tmp_path / "m")
    (source / "tokenizer.model").write_bytes((tmp_path / "bpe.model").read_bytes())
    report = convert_checkpoint(source, tmp_path / "m.gguf", vocab_only=True)
    assert any("normalizes its input" in note for note in report.notes)


def test_generation_with_the_converted_vocabulary(tmp_path: Path) -> None:
    """A whole model loads with the padded vocabulary and decodes its own tokens."""
    source = write_checkpoint(tmp_path / "m", n_vocab=515, n_layer=1)
    convert_checkpoint(source, tmp_path / "m.gguf")
    llm = blockffn.Llama(str(tmp_path / "m.gguf"), n_ctx=64, verbose=False)
    ids = llm.tokenize("def f(x): \u4f60\u597d".encode(), add_bos=False)
    assert llm.detokenize(ids).decode().lstrip() == "def f(x): \u4f60\u597d"
    logits = llm.logits(ids)
    assert logits.shape == (len(ids), 515) and np.isfinite(logits).all()
    assert torch.from_numpy(logits).std() > 0
