"""Every value of every JSON file that a conversion reads, replaced by odd ones: converted, or refused in one line.

Binary files are damaged at random. Each refusal is a BlockffnError (exit code 1) that leaves nothing behind; nothing
takes 300 MB more memory than the test had, or 10 seconds.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from tiny_head import N_EMBD, write_head

from blockffn.convert import convert_checkpoint
from blockffn.convert.draft_tokens import read_draft_tokens
from blockffn.convert.eagle import convert_head
from blockffn.errors import BlockffnError

REMOVED = object()
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
ODD: list[Any] = [
    REMOVED, None, True, 0, -1, 7, 10**12, 10**30, 0.5, 1e300, 1e-60, float("nan"), float("inf"), "", "\ud800", "a\nb",
    "x" * 100_000, "../../secret", [], [1], [None], {}, {"x": 1}, DEEP,
]  # fmt: skip
TINY: dict[str, Any] = {"n_layer": 1, "n_embd": 16, "n_vocab": 16, "expert_dim": 8, "n_expert": 3}
DECO: dict[str, Any] = {"family": "deco", "norm": "simple", "attention": "gqa", "n_head": 2, **TINY, "n_layer": 2}
SPECIAL = {"content": "<s>", "lstrip": False, "special": True}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def with_tokenizer_files(folder: Path) -> None:
    """All small files that may stand beside a tokenizer."""
    SENTENCEPIECE(folder)
    write_json(folder / "added_tokens.json", {"<|turn|>": 8, "word": 10})
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, 5], "temperature": 0.7})
    write_json(folder / "special_tokens_map.json", {"bos_token": SPECIAL, "eos_token": "</s>"})
    write_json(folder / "chat_template.json", {"chat_template": "{{ messages }}"})
    settings = {"add_bos_token": True, "add_eos_token": False, "add_prefix_space": True, "bos_token": SPECIAL}
    settings |= {"eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>", "model_max_length": 10**30}
    settings["added_tokens_decoder"] = {"11": {"content": "<mask>", "special": True}}
    settings["chat_template"] = [{"name": "default", "template": "T"}, {"name": "tool", "template": "U"}]
    write_json(folder / "tokenizer_config.json", settings)


def tokenizer_json(model: dict[str, Any], **parts: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        added = [{"id": 7, "content": "<|end|>", "special": True}]
        write_json(folder / "tokenizer.json", {"model": model, "added_tokens": added, **parts})

    return write


PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}]}
TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}
CLEAN = {"normalizers": [{"type": "Precompiled", "precompiled_charsmap": "AAAA"}]}
CLEAN["normalizers"].append({"type": "Replace", "pattern": {"Regex": " {2,}"}})  # type: ignore[dict-item]
SENTENCEPIECE = tokenizer_json(
    {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "merges": ["a b", ["ab", "c"]],
     "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x00>": 3, "a": 4, "ab": 5, "abc": 6}},
    normalizer=PREPEND, post_processor=TEMPLATE, pre_tokenizer={"type": "Metaspace", "prepend_scheme": "first"},
)  # fmt: skip
BYTE_LEVEL = tokenizer_json(
    {"type": "BPE", "merges": [["a", "b"]], "vocab": {"a": 0, "b": 1, "ab": 2}},
    pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]},
)
UNIGRAM = tokenizer_json(
    {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5]]},
    normalizer=CLEAN, pre_tokenizer={"type": "Metaspace", "add_prefix_space": True},
)  # fmt: skip

TOKENIZER_FILES = (
    "added_tokens.json", "generation_config.json", "special_tokens_map.json", "chat_template.json",
    "tokenizer_config.json",
)  # fmt: skip

# (name, checkpoint, further files, the JSON files to change, the keys to change where another case has the rest)
CONFIG = ("config.json",)
ROPE = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
CASES: list[tuple[str, dict[str, Any], Callable[[Path], None] | None, tuple[str, ...], tuple[str, ...]]] = [
    ("blockffn", {**TINY, "config": {"rope_scaling": {"type": "linear", "factor": 2.0}}}, None, CONFIG, ()),
    ("rope_parameters", {**TINY, "config": ROPE}, None, CONFIG, ("rope_parameters",)),
    ("remoe", {**TINY, "family": "remoe", "attention": "gqa"}, None, CONFIG,
     ("ffn_type", "moe_routing_strategy", "num_experts", "num_shared_experts", "intermediate_size")),
    ("vanilla", {**TINY, "family": "vanilla", "attention": "gqa", "n_head": 2}, None, CONFIG,
     ("ffn_type", "ffn_gated", "intermediate_size", "num_key_value_heads", "num_attention_heads")),
    ("bmtrain", {**TINY, "layout": "bmtrain"}, None, CONFIG, ()),
    ("deco", {**DECO, "bias": "base"}, None, CONFIG, ()),
    ("tokenizer files", TINY, with_tokenizer_files, TOKENIZER_FILES, ()),
    ("sentencepiece json", TINY, SENTENCEPIECE, ("tokenizer.json",), ()),
    ("byte level json", TINY, BYTE_LEVEL, ("tokenizer.json",), ()),
    ("unigram json", TINY, UNIGRAM, ("tokenizer.json",), ()),
    ("index", {**TINY, "fmt": "safetensors_sharded"}, None, ("model.safetensors.index.json",), ()),
    ("pickle index", {**TINY, "fmt": "pickle_sharded"}, None, ("pytorch_model.bin.index.json",), ()),
]  # fmt: skip


def places(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value, the whole content included."""
    yield at
    children = content.items() if isinstance(content, dict) else enumerate(content if isinstance(content, list) else ())
    for key, value in children:
        yield from places(value, (*at, key))


def changed(content: Any, at: tuple[Any, ...], value: Any) -> Any:
    """A copy of the content with another value in one place, or without it."""
    if not at:
        return None if value is REMOVED else value
    copy = dict(content) if isinstance(content, dict) else list(content)
    if len(at) == 1 and value is REMOVED:
        del copy[at[0]]
    else:
        copy[at[0]] = changed(copy[at[0]], at[1:], value)
    return copy


def memory(field: str) -> int:
    """A line of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) // 1000


@contextmanager
def bounded() -> Iterator[None]:
    """At most 300 MB more memory than before, and no allocation that could hurt the machine."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before, limits = memory("VmRSS"), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, ((memory("VmSize") + 2000) * 1_000_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert memory("VmHWM") - before < 300


def hangs(*_: object) -> None:
    raise TimeoutError("no answer within 10 seconds")


def mutate(
    file: Path,
    target: Path,
    convert: Callable[[Path, bool], Any],
    monkeypatch: pytest.MonkeyPatch,
    keys: tuple[str, ...] = (),
) -> int:
    """Try every mutation of one file (of these keys); returns how many were refused. `convert(path, dry_run)`."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    signal.signal(signal.SIGALRM, hangs)
    original, refused = json.loads(file.read_text()), 0
    with bounded():
        for at in (at for at in places(original) if not keys or (at and at[0] in keys)):
            for value in ODD:
                write_json(file, changed(original, at, value))
                signal.setitimer(signal.ITIMER_REAL, 10)
                where = f"{file.name}: {at} = {'removed' if value is REMOVED else repr(value)[:50]}"
                try:
                    convert(target, True)
                except BlockffnError as error:
                    assert str(error) and "\n" not in str(error) and len(str(error)) < 1000, where
                    refused += 1
                    assert not list(target.parent.iterdir()), where
                    continue
                except BaseException as error:
                    raise AssertionError(f"{where}: {error!r}") from error
                assert not list(target.parent.iterdir()), where
                if isinstance(value, float | int) or value == "\ud800":  # what a dry run accepts can be written
                    convert(target, False)
                    target.unlink()
    write_json(file, original)
    return refused


@pytest.mark.parametrize(
    ("shape", "more", "files", "keys"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_odd_values(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: dict[str, Any],
    more: Callable[[Path], None] | None,
    files: tuple[str, ...],
    keys: tuple[str, ...],
) -> None:
    source, target = write_checkpoint(tmp_path / "m", with_tokenizer=False, **shape), tmp_path / "out" / "m.gguf"
    target.parent.mkdir()
    (more or SENTENCEPIECE)(source)
    convert_checkpoint(source, target, dry_run=True)
    for file in (source / name for name in files):
        refused = mutate(
            file,
            target,
            lambda path, dry_run: convert_checkpoint(source, path, dry_run=dry_run, vocab_only=not dry_run),
            monkeypatch,
            keys,
        )
        assert refused >= 5 or file.name == "special_tokens_map.json"  # which nobody reads


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Other bytes, flipped bits, large numbers, missing bytes, or a missing end."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(min(len(data), 4000))  # headers lie at the beginning
        size = rng.choice((1, 8))
        data[at : at + size] = rng.choice((rng.randbytes(size), b"\xff" * size, bytes(size), b""))
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)


def test_damaged_binary_files(tmp_path: Path) -> None:
    """Weights, tokenizers, targets and lists of draft tokens with random damage."""
    plain = {**TINY, "n_vocab": 512}
    safe = write_checkpoint(tmp_path / "safe", **plain)
    pickled = write_checkpoint(tmp_path / "pickle", fmt="pickle", **plain)
    target = write_checkpoint(tmp_path / "target", **plain | {"n_embd": N_EMBD, "attention": "gqa"})
    convert_checkpoint(target, tmp_path / "t.gguf")
    head, ids, out = write_head(tmp_path / "head"), tmp_path / "freq_3.pkl", tmp_path / "out" / "m.gguf"
    out.parent.mkdir()
    ids.write_bytes(pickle.dumps([1, 2, 3]))
    readers: list[tuple[Path, Callable[[], Any]]] = [
        (safe / "model.safetensors", lambda: convert_checkpoint(safe, out, dry_run=True)),
        (safe / "tokenizer.model", lambda: convert_checkpoint(safe, out, dry_run=True)),
        (pickled / "pytorch_model.bin", lambda: convert_checkpoint(pickled, out, dry_run=True)),
        (tmp_path / "t.gguf", lambda: convert_head(head, tmp_path / "t.gguf", out, dry_run=True)),
        (ids, lambda: read_draft_tokens(ids, 512)),
    ]
    rng = random.Random(3)
    with bounded():
        for file, read in readers:
            original = file.read_bytes()
            refused = sum(refuses(file, damaged(original, rng), read) for _ in range(150))
            assert refused > 20, file
            file.write_bytes(original)
            assert not list(out.parent.iterdir())


def refuses(file: Path, content: bytes, read: Callable[[], Any]) -> bool:
    """Whether reading this content ends with an error, which must be one of ours, in one line."""
    file.write_bytes(content)
    signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, 10)
    try:
        read()
    except BlockffnError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return True
    return False


def test_odd_values_of_a_metadata_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write_checkpoint(tmp_path / "m", with_tokenizer=False, **TINY), tmp_path / "out" / "m.gguf"
    target.parent.mkdir()
    SENTENCEPIECE(source)
    extra = tmp_path / "extra.json"
    write_json(extra, {"general.name": "x", "general.tags": ["a"], "general.sampling.temp": 0.5, "general.size": 3})

    def convert(path: Path, dry_run: bool) -> None:
        convert_checkpoint(source, path, metadata=extra, dry_run=dry_run, vocab_only=not dry_run)

    assert mutate(extra, target, convert, monkeypatch) > 50


def test_odd_values_of_a_draft_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = (
        write_checkpoint(tmp_path / "m", with_tokenizer=False, **{**TINY, "n_embd": N_EMBD}),
        tmp_path / "out" / "m.gguf",
    )
    target.parent.mkdir()
    SENTENCEPIECE(source)
    head = write_head(tmp_path / "head", n_layer=1, head_dim=16)

    def convert(path: Path, dry_run: bool) -> None:
        convert_head(head, source, path, dry_run=dry_run)

    assert mutate(head / "config.json", target, convert, monkeypatch) > 50
