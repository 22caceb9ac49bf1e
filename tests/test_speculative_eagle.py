"""The EAGLE-2 head: conversion, its graph against torch, chains and trees against trees grown in torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from tiny_head import N_EMBD, write_head

import blockffn
from blockffn.cli import main
from blockffn.convert.eagle import convert_head
from blockffn.errors import BlockffnError
from blockffn.speculative import Context, TreeShape
from blockffn.speculative.policy import Plan
from blockffn.speculative.tree import TreeGrower
from blockffn.training.eagle import EagleReference
from blockffn.training.model import ReferenceModel

N_VOCAB = 512


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target and a head as checkpoints and as GGUF files, float32."""
    folder = tmp_path_factory.mktemp("eagle")
    write_checkpoint(folder / "target", n_embd=N_EMBD, n_head=2, n_layer=2, attention="gqa")
    blockffn.convert.convert_checkpoint(folder / "target", folder / "target.gguf", outtype="f32")
    write_head(folder / "head")
    convert_head(folder / "head", folder / "target", folder / "head.gguf", outtype="f32")
    return folder


@pytest.fixture(scope="module")
def llm(place: Path) -> Iterator[Any]:
    model = blockffn.Llama(place / "target.gguf", n_ctx=256, n_threads=1, n_batch=32, exact=True)
    yield model
    model.close()


@pytest.fixture(scope="module")
def reference(place: Path) -> EagleReference:
    target = ReferenceModel.from_checkpoint(place / "target")
    return EagleReference.from_checkpoint(place / "head", target)


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return np.random.default_rng(4).integers(3, N_VOCAB, 60).astype(np.int32)


def guess(reference: EagleReference, hidden: np.ndarray, tokens: np.ndarray, path: tuple[int, ...]) -> np.ndarray:
    """The head's logits after `tokens` and the drafted `path`, its own states taking the place of the target's."""
    with torch.no_grad():
        states = torch.from_numpy(hidden)[None]
        ids = torch.from_numpy(np.concatenate([tokens, np.array(path, dtype=np.int32)])).long()
        embedded = reference.target.decoder.embed[ids[1:]][None] * reference.target.config.embedding_scale
        for _ in range(len(path)):
            last = reference.head(embedded[:, : states.shape[1]], states)[:, -1:]
            states = torch.cat([states, last], dim=1)
        out = reference.head(embedded, states)[0, -1:]
        found: np.ndarray = reference.target.decoder.logits(out).numpy()
        return found


def test_logits_equal_torch(llm: Any, place: Path, reference: EagleReference, text: np.ndarray) -> None:
    head = blockffn.EagleDrafter(place / "head.gguf", llm)
    hidden = llm.hidden_states(text[:-1].tolist())
    expected = reference.draft_logits(torch.from_numpy(hidden), torch.from_numpy(text).long()).numpy()
    found = head.draft_logits(hidden, text.tolist())
    assert found.shape == (len(text) - 1, N_VOCAB)
    np.testing.assert_allclose(found, expected, atol=5e-3 * np.abs(expected).max())
    head.close()


@pytest.mark.parametrize("n_layer", [1, 3])
def test_other_depths(llm: Any, place: Path, text: np.ndarray, tmp_path: Path, n_layer: int) -> None:
    source = write_head(tmp_path / "head", seed=8, n_layer=n_layer)
    convert_head(source, place / "target.gguf", tmp_path / "head.gguf", outtype="f32")
    target = ReferenceModel.from_checkpoint(place / "target")
    reference = EagleReference.from_checkpoint(source, target)
    hidden = llm.hidden_states(text[:-1].tolist())
    expected = reference.draft_logits(torch.from_numpy(hidden), torch.from_numpy(text).long()).numpy()
    head = blockffn.EagleDrafter(tmp_path / "head.gguf", llm)
    np.testing.assert_allclose(head.draft_logits(hidden, text.tolist()), expected, atol=5e-3 * np.abs(expected).max())
    head.close()


def fed(place: Path, llm: Any, text: np.ndarray, **kwargs: Any) -> tuple[Any, np.ndarray]:
    """A drafter that knows the text, and the hidden states it was given."""
    head = blockffn.EagleDrafter(place / "head.gguf", llm, **kwargs)
    hidden = llm.hidden_states(text[:-1].tolist())
    head.begin(text)
    head.hidden(text, 0, hidden)
    return head, hidden


def test_chain_equals_torch(llm: Any, place: Path, reference: EagleReference, text: np.ndarray) -> None:
    head, hidden = fed(place, llm, text)
    path: tuple[int, ...] = ()
    for _ in range(5):
        path = (*path, int(guess(reference, hidden, text, path)[0].argmax()))
    assert head.propose(Context(text), 5).tokens.tolist() == list(path)
    head.close()


@pytest.mark.parametrize("shape", [TreeShape(3, 10, 32), TreeShape(4, 3, 20), TreeShape(1, 5, 6)])
def test_tree_equals_torch(
    llm: Any, place: Path, reference: EagleReference, text: np.ndarray, shape: TreeShape
) -> None:
    head, hidden = fed(place, llm, text, tree=shape)
    grower, paths = TreeGrower(shape), [()]
    for _ in range(shape.iterations):
        rows = np.concatenate([guess(reference, hidden, text, path) for path in paths])
        level = grower.expand(rows.astype(np.float32))
        paths = [(*paths[r], t) for r, t in zip(level.rows.tolist(), level.tokens.tolist(), strict=True)]
    expected = grower.draft()
    found = head.propose(Context(text, tree=True), shape.size - 1)
    assert _paths(found) == _paths(expected)
    head.close()


def _paths(draft: Any) -> set[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return set(paths)


@pytest.mark.parametrize("plan", [Plan(4), Plan(31, True), Plan(8, True), None], ids=str)
def test_text_is_the_same_and_the_cache_in_step(llm: Any, place: Path, plan: Plan | None) -> None:
    llm.speculate(None, True)
    plain = list(itertools.islice(llm.generate([1, 40, 41], temp=0.0), 120))
    head = blockffn.EagleDrafter(place / "head.gguf", llm)
    llm.speculate(head, True, plan)
    generator = llm.generate([1, 40, 41], temp=0.0)
    for n, token in enumerate(itertools.islice(generator, 120)):
        assert token == plain[n]
    generator.close()
    if plan is not None:
        assert llm.statistics()["drafted"] > 200
    known = head._rows + head._pending
    assert known == llm.n_tokens
    # what the head would draft now equals what a fresh head drafts from the same text
    tokens = np.array([1, 40, 41, *plain], dtype=np.int32)[: known + 1]
    fresh, _ = fed(place, llm, tokens)
    assert fresh.propose(Context(tokens), 4).tokens.tolist() == head.propose(Context(tokens), 4).tokens.tolist()
    # a second turn reuses target and head
    second = list(itertools.islice(llm.generate([*tokens.tolist(), 99], temp=0.0), 20))
    assert llm.statistics()["reused_n"] >= known - 1
    llm.speculate(None, True)
    llm.reset()
    assert list(itertools.islice(llm.generate([*tokens.tolist(), 99], temp=0.0), 20)) == second
    fresh.close()
    head.close()


def test_long_prompts_reach_the_head_in_pieces(llm: Any, place: Path) -> None:
    prompt = np.random.default_rng(6).integers(3, N_VOCAB, 100).tolist()  # n_batch is 32
    head = blockffn.EagleDrafter(place / "head.gguf", llm)
    llm.speculate(head, True, Plan(3))
    generator = llm.generate(prompt, temp=0.0)
    tokens = np.array([*prompt, next(generator)], dtype=np.int32)
    generator.close()
    drafted = head.propose(Context(tokens), 3).tokens.tolist()
    fresh = blockffn.EagleDrafter(place / "head.gguf", llm)
    fresh.begin(tokens)
    fresh.hidden(tokens, 0, llm.hidden_states(tokens[:-1].tolist()))
    assert fresh.propose(Context(tokens), 3).tokens.tolist() == drafted
    for drafter in (head, fresh):
        drafter.close()
    llm.speculate(None, True)


@pytest.mark.parametrize("form", ["json", "txt", "pt"])
def test_cut_vocabulary(llm: Any, place: Path, text: np.ndarray, tmp_path: Path, form: str) -> None:
    ids = np.random.default_rng(1).permutation(N_VOCAB)[:100].tolist()
    listed = tmp_path / f"frequent.{form}"
    if form == "pt":
        torch.save(ids, listed)
    else:
        listed.write_text(json.dumps(ids) if form == "json" else "\n".join(map(str, ids)))
    command = ["convert", place / "head", "--target", place / "target.gguf", "--outtype", "f32"]
    assert main([*map(str, [*command, "--outfile", tmp_path / "cut.gguf", "--draft-tokens", listed])]) == 0
    whole, hidden = fed(place, llm, text)
    cut = blockffn.EagleDrafter(tmp_path / "cut.gguf", llm)
    expected = whole.draft_logits(hidden, text.tolist())
    found = cut.draft_logits(hidden, text.tolist())
    np.testing.assert_allclose(found[:, ids], expected[:, ids], atol=1e-4)
    assert np.isneginf(np.delete(found, ids, axis=1)).all()
    cut.begin(text)
    cut.hidden(text, 0, hidden)
    assert set(cut.propose(Context(text, tree=True), 31).tokens.tolist()) <= set(ids)
    for drafter in (whole, cut):
        drafter.close()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "No such file"),
        ("empty.txt", "", "found none"),
        ("twice.txt", "1 2 2", "found 2 twice"),
        ("large.json", f"[1, {N_VOCAB}]", f"from 0 to {N_VOCAB - 1}, found {N_VOCAB}: a list for another vocabulary"),
        ("text.json", '["the", "a"]', "found 'the'"),
        ("fraction.json", "[1.0, 2.0]", "found 1.0"),
        ("true.json", "[1, true]", "found True"),
        ("object.json", '{"1": 2}', "found a JSON dict"),
        ("broken.json", "[1, 2", "expected a list of different token ids"),
        ("words.txt", "the a of", "invalid literal"),
        ("binary.txt", b"\xff\xfe\x00", "can't decode"),
        ("broken.pt", b"no torch file", "expected a list of different token ids"),
    ],
)
def test_bad_token_lists_are_refused(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str | bytes | None,
    message: str,
) -> None:
    listed = tmp_path / name
    if content is not None:
        listed.write_bytes(content if isinstance(content, bytes) else content.encode())
    command = ["convert", place / "head", "--target", place / "target.gguf", "--outfile", tmp_path / "out.gguf"]
    assert main([*map(str, [*command, "--draft-tokens", listed])]) == 1
    printed = capsys.readouterr().err
    assert name in printed and message in printed and printed.count("\n") == 1
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize(
    "options",
    [
        ["--draft-tokens", "list.json"],
        ["--target", "t.gguf", "--verify"],
        ["--target", "t.gguf", "--vocab-only"],
        ["--target", "t.gguf", "--split-max-size", "1G"],
        ["--target", "t.gguf", "--metadata", "m.json"],
        ["--target", "t.gguf", "--layout", "dense"],
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert", "head", "--outfile", "out.gguf", *options])
    assert ended.value.code == 2 and "--target" in capsys.readouterr().err


def test_target_as_gguf_or_checkpoint_gives_the_same_file(place: Path, tmp_path: Path) -> None:
    convert_head(place / "head", place / "target.gguf", tmp_path / "head.gguf", outtype="f32")
    assert (tmp_path / "head.gguf").read_bytes() == (place / "head.gguf").read_bytes()


def test_dry_run_writes_nothing(place: Path, tmp_path: Path) -> None:
    report = convert_head(place / "head", place / "target", tmp_path / "no.gguf", outtype="f16", dry_run=True)
    assert not (tmp_path / "no.gguf").exists() and any("fc.weight" in line for line in report.lines())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": None}, "num_attention_heads: expected an integer >= 1"),
        ({"intermediate_size": 50}, "mlp.gate_proj.weight: expected 50 x 64, found 48 x 64"),
        ({"num_hidden_layers": 3}, r"layers.2.self_attn.q_proj.weight: expected 64 x 64, found none"),
        ({"num_hidden_layers": 1}, r"unknown tensor layers.1"),
    ],
)
def test_bad_heads_are_refused(place: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    source = write_head(tmp_path / "bad")
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(BlockffnError, match=message):
        convert_head(source, place / "target", tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_wrong_files_are_refused(llm: Any, place: Path, tmp_path: Path, stock_model: Path) -> None:
    with pytest.raises(BlockffnError, match="expected a draft head"):
        blockffn.EagleDrafter(place / "target.gguf", llm)
    other = blockffn.Llama(stock_model, n_ctx=64, n_threads=1)
    with pytest.raises(BlockffnError, match="vocabulary differs"):
        blockffn.EagleDrafter(place / "head.gguf", other)
    with pytest.raises(BlockffnError, match="not a head of this target"):
        write_checkpoint(tmp_path / "wide", n_embd=128, n_head=2, n_layer=2, attention="gqa")
        convert_head(place / "head", tmp_path / "wide", tmp_path / "x.gguf")
