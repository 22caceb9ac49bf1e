"""Giving a model a drafter: what fails leaves it as it was; copies, closing, threads, models that cannot be cut."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from tiny_head import N_EMBD, write_head
from tiny_llama import N_VOCAB, write_llama
from tiny_mamba import write_mamba

import blockffn
from blockffn.convert.eagle import convert_head
from blockffn.errors import BlockffnError
from blockffn.speculative import (
    Combination,
    Context,
    Draft,
    Drafter,
    ModelDrafter,
    NGramDrafter,
    TreeShape,
    native,
    target,
)
from blockffn.speculative.decoder import Decoder
from blockffn.speculative.drafter import open_drafter
from blockffn.speculative.policy import Plan

PROMPT = [1, 50, 60, 70]
SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_batch": 64}


def text(llm: Any, n: int = 30, prompt: list[int] = PROMPT) -> list[int]:
    return list(itertools.islice(llm.generate(prompt, temp=0.0), n))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of ours and its head."""
    folder = tmp_path_factory.mktemp("speculate")
    write_checkpoint(folder / "target", n_embd=N_EMBD, n_head=2, n_layer=2, attention="gqa")
    blockffn.convert.convert_checkpoint(folder / "target", folder / "target.gguf", outtype="f32")
    write_head(folder / "head")
    convert_head(folder / "head", folder / "target", folder / "head.gguf", outtype="f32")
    return folder


@pytest.fixture
def llm(stock_model: Path) -> Iterator[Any]:
    with blockffn.Llama(stock_model, exact=True, **SETTINGS) as model:
        yield model


class Refusing(Drafter):
    """Meets no model."""

    def attach(self, llm: Any) -> None:
        raise BlockffnError("no")


@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        (Refusing(), "no"),
        (ModelDrafter("missing.gguf"), "no such file"),
        (NGramDrafter(tree=True, max_nodes=400), r"ngram: trees of up to 400 nodes.*at most 257, root included"),
    ],
    ids=["attach", "file", "tree"],
)
def test_a_drafter_that_is_refused_changes_nothing(llm: Any, drafter: Drafter, message: str) -> None:
    first = NGramDrafter((2, 1))
    llm.speculate(first, True, Plan(4))
    expected = text(llm)
    with pytest.raises(BlockffnError, match=message):
        llm.speculate(drafter, True)
    assert llm.drafter is first and llm.exact and llm.n_tokens > 0
    assert text(llm) == expected
    assert llm.statistics()["reused_n"] == len(PROMPT) - 1


def test_a_context_that_cannot_be_made_leaves_the_old_one(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_cpp import _internals

    expected, context = text(llm), llm._ctx

    def refuse(**_: Any) -> None:
        raise ValueError("Failed to create llama_context")

    with monkeypatch.context() as patch:
        patch.setattr(_internals, "LlamaContext", refuse)
        with pytest.raises(BlockffnError, match=r"no context of 256 tokens with 16 sequences.*nothing was changed"):
            llm.speculate(NGramDrafter(tree=True), True)
    assert llm._ctx is context and llm.drafter is None
    assert text(llm) == expected
    monkeypatch.setattr(target, "set_exact", lambda *_: refuse())
    with pytest.raises(ValueError, match="Failed"):
        llm.speculate(NGramDrafter(tree=True), True)
    assert llm._ctx is context and text(llm) == expected


@pytest.mark.parametrize(("n_batch", "largest"), [(512, 257), (64, 64), (8, 8), (1, 1)])
def test_the_largest_tree_works_and_the_next_is_refused(place: Path, n_batch: int, largest: int) -> None:
    settings = {**SETTINGS, "n_ctx": 512, "n_batch": n_batch, "exact": True}
    with blockffn.Llama(place / "target.gguf", **settings) as llm:
        expected = text(llm, 12)
        head = blockffn.EagleDrafter(place / "head.gguf", tree=TreeShape(2, 16, 257))
        llm.speculate(head, True, Plan(256, tree=True))
        assert text(llm, 12) == expected
        assert max(llm.statistics()["steps_by_size"]) == largest
    with pytest.raises(ValueError, match="size of at most 257"):
        TreeShape(3, 10, 400)


@pytest.mark.parametrize("copied", [copy.copy, lambda llm: pickle.loads(pickle.dumps(llm))], ids=["copy", "pickle"])
def test_copies_keep_drafter_and_mode(place: Path, stock_model: Path, copied: Any) -> None:
    shape = TreeShape(2, 3, 6)
    drafters: list[tuple[Path, Drafter, dict[str, Any]]] = [
        (stock_model, NGramDrafter((3, 1), 5, tree=True), {"sizes": (3, 1), "max_nodes": 5, "can_tree": True}),
        (stock_model, Combination([NGramDrafter((3,)), ModelDrafter(stock_model, 3)]), {"name": "ngram+model"}),
        (stock_model, ModelDrafter(stock_model, 5, 0.25), {"max_nodes": 5, "p_min": 0.25, "path": str(stock_model)}),
        (place / "target.gguf", blockffn.EagleDrafter(place / "head.gguf", tree=shape), {"shape": shape}),
    ]
    for path, drafter, attributes in drafters:
        with blockffn.Llama(path, drafter=drafter, exact=True, ffn="dense", **SETTINGS) as llm:
            expected = text(llm, 12)
            with copied(llm) as twin:
                assert twin.exact and twin.ffn == "dense" and twin.default_cache and not twin.logits_all
                assert type(twin.drafter) is type(drafter) and twin.drafter is not drafter
                for name, value in attributes.items():
                    assert getattr(twin.drafter, name) == value
                assert text(twin, 12) == expected
            assert text(llm, 12) == expected  # the copy and its end changed nothing here


def test_closing_a_model_closes_its_drafter(stock_model: Path, place: Path) -> None:
    drafter = ModelDrafter(stock_model)
    with blockffn.Llama(stock_model, drafter=drafter, **SETTINGS) as llm:
        expected = text(llm, 9)
        stream = llm.generate(PROMPT)
        next(stream)
    assert drafter._context is None and drafter._model is None
    stream.close()
    llm.close()
    for call in (lambda: text(llm), llm.reset, llm.save_state, llm.statistics, lambda: llm.logits([1])):
        with pytest.raises(BlockffnError, match="closed"):
            call()
    with pytest.raises(BlockffnError, match="this drafter was closed, or met no model yet"):
        drafter.propose(Context(np.array(PROMPT, dtype=np.int32)), 3)
    with blockffn.Llama(stock_model, drafter=drafter, **SETTINGS) as llm:  # it may be used again
        assert text(llm, 9) == expected
    head = blockffn.EagleDrafter(place / "head.gguf")
    with pytest.raises(BlockffnError, match="this drafter was closed, or met no model yet"):
        head.draft_logits(np.zeros((2, N_EMBD), dtype=np.float32), [1, 2, 3])
    for _ in range(2):
        with blockffn.Llama(place / "target.gguf", drafter=head, **SETTINGS) as llm:
            text(llm, 9)
        assert head._context is None


def test_a_drafter_that_is_replaced_stays_open(llm: Any, stock_model: Path) -> None:
    drafter = ModelDrafter(stock_model)
    llm.speculate(drafter, True)
    llm.speculate(None, True)
    assert drafter._model is not None
    drafter.close()


def test_draft_models_of_llama_cpp(stock_model: Path) -> None:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    lookup = LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=5)
    with blockffn.Llama(stock_model, exact=True, **SETTINGS) as plain:
        expected = text(plain, 60)
    with blockffn.Llama(stock_model, draft_model=lookup, exact=True, **SETTINGS) as llm:
        llm.speculate(llm.drafter, True, Plan(5))
        assert text(llm, 60) == expected
        found = llm.statistics()
        assert found["drafted"] > 0 and found["steps_by_source"].keys() == {"draft_model"}
        assert max(found["steps_by_size"]) <= 6
        assert llm.scores.shape == (1, N_VOCAB)  # llama_cpp would reserve all rows
        with copy.copy(llm) as twin:
            assert twin.drafter.draft_model.num_pred_tokens == 5
    with pytest.raises(BlockffnError, match=r"draft_model: expected a .*LlamaDraftModel, found 'draft.gguf'"):
        blockffn.Llama(stock_model, draft_model="draft.gguf", **SETTINGS)
    with pytest.raises(BlockffnError, match="drafter and draft_model: expected one of them"):
        blockffn.Llama(stock_model, draft_model=lookup, drafter=NGramDrafter(), **SETTINGS)


def test_threads_take_turns(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complete answers wait for each other; a stream that another one ended says so; evaluations never overlap."""
    decode, at_once, most = Decoder._decode, [], []

    def watched(self: Decoder, first: int) -> None:
        at_once.append(first)
        most.append(len(at_once))
        time.sleep(0.0005)  # lets other threads in, as a larger model does
        decode(self, first)
        at_once.pop()

    monkeypatch.setattr(Decoder, "_decode", watched)
    llm.speculate(NGramDrafter((2, 1)), True, Plan(4))

    def answer() -> str:
        return str(llm.create_completion("ab", max_tokens=25, temperature=0.0)["choices"][0]["text"])

    expected = answer()
    logits = llm.logits(PROMPT)
    answers, failures, ended = [], [], []

    def complete() -> None:
        for _ in range(4):
            answers.append(answer())

    def stream() -> None:
        for _ in range(4):
            try:
                answers.append(
                    "".join(
                        c["choices"][0]["text"]
                        for c in llm.create_completion("ab", max_tokens=25, temperature=0.0, stream=True)
                    )
                )
            except RuntimeError as error:
                ended.append(str(error))

    def others() -> None:
        for _ in range(6):
            assert np.array_equal(llm.logits(PROMPT), logits)
            llm.reset()
            llm.eval(PROMPT)

    def guarded(work: Any) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (complete, stream, others, complete)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and max(most) == 1
    assert set(answers) == {expected} and len(answers) == 12 - len(ended)
    assert all("ended by another one" in message for message in ended)


def test_the_chunks_of_a_stream_may_be_taken_by_several_threads(llm: Any) -> None:
    """As a web server does that runs each `next` in a pool."""
    llm.speculate("ngram", plan=Plan(4))
    arguments: dict[str, Any] = {"max_tokens": 25, "temperature": 0.0, "stream": True}
    expected = [chunk["choices"][0]["text"] for chunk in llm.create_completion("12345", **arguments)]
    stream, found = llm.create_completion("12345", **arguments), []
    while len(found) < len(expected):
        thread = threading.Thread(target=lambda: found.append(next(stream)["choices"][0]["text"]))
        thread.start()
        thread.join(10)
    assert found == expected
    thread = threading.Thread(target=stream.close)
    thread.start()
    thread.join(10)
    assert len(text(llm, 9)) == 9


def test_a_call_waits_for_the_running_one(llm: Any) -> None:
    started = threading.Event()

    class Slow(Drafter):
        def propose(self, context: Context, n: int) -> Draft:
            started.set()
            time.sleep(0.01)
            return super().propose(context, n)

    llm.speculate(Slow(), True, Plan(2))
    thread = threading.Thread(target=llm.create_completion, args=(PROMPT,), kwargs={"max_tokens": 10, "temperature": 0})
    thread.start()
    assert started.wait(10)
    llm.reset()
    assert llm.statistics()["predicted_n"] == 10 and llm.n_tokens == 0
    thread.join(10)


def test_models_whose_memory_cannot_be_cut(tmp_path: Path) -> None:
    path = write_mamba(tmp_path / "mamba.gguf")
    with blockffn.Llama(path, **SETTINGS) as llm:
        first = text(llm)
        longer = PROMPT + first[:5]
        assert text(llm, 20, longer) == first[5:25]  # evaluated anew
        assert llm.statistics()["reused_n"] == 0 and llm.statistics()["prompt_n"] == len(longer)
        turn = longer + first[5:25] + [77, 78]
        second = text(llm, 5, turn)
        assert llm.statistics()["reused_n"] == len(longer) + 19  # goes on where it stopped
        llm.reset()
        assert text(llm, 5, turn) == second
        with pytest.raises(BlockffnError, match=r"recurrent model cannot forget rejected tokens.*drafter=None"):
            llm.speculate(NGramDrafter())
        assert text(llm) == first
    with blockffn.Llama(write_llama(tmp_path / "llama.gguf"), **SETTINGS) as target:
        with pytest.raises(BlockffnError, match=r"mamba.gguf: a recurrent model cannot draft"):
            target.speculate(ModelDrafter(path))


def test_vocabularies_are_read_once(llm: Any, stock_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    texts = native.texts
    monkeypatch.setattr(native, "texts", lambda model, n: (read.append(n), texts(model, n))[1])
    drafter = ModelDrafter(stock_model)
    for _ in range(3):
        llm.speculate(drafter, True)
    assert read == [N_VOCAB, N_VOCAB]  # the draft model's and the target's
    drafter.close()


def test_editors_see_the_arguments_of_chat_completions() -> None:
    import llama_cpp

    assert "response_format" in inspect.signature(blockffn.Llama.create_chat_completion).parameters
    ours, theirs = blockffn.Llama.create_chat_completion, llama_cpp.Llama.create_chat_completion
    assert inspect.signature(ours) == inspect.signature(theirs) and ours.__doc__ == theirs.__doc__


def test_a_drafter_leaves_the_log_as_it_was(stock_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with blockffn.Llama(stock_model, verbose=True, **SETTINGS) as llm:
        capfd.readouterr()
        llm.speculate(ModelDrafter(stock_model))
        assert "llama_model_loader" in capfd.readouterr().err
    with blockffn.Llama(stock_model, **SETTINGS) as llm:
        capfd.readouterr()
        llm.speculate(ModelDrafter(stock_model))
        assert capfd.readouterr().err == ""


def test_drafters_by_name(place: Path, stock_model: Path) -> None:
    target = place / "target.gguf"
    with blockffn.Llama(target, drafter="ngram", exact=True, **SETTINGS) as llm:
        assert isinstance(llm.drafter, NGramDrafter)
        expected = text(llm, 12)
        for what, kind in (
            (place / "head.gguf", blockffn.EagleDrafter),
            (str(target), ModelDrafter),
            (["ngram", str(place / "head.gguf"), ModelDrafter(target)], Combination),
            (NGramDrafter(tree=True), NGramDrafter),
        ):
            llm.speculate(what, plan=Plan(3))
            assert type(llm.drafter) is kind and llm.exact  # the mode stays
            assert text(llm, 12) == expected
        assert not llm.drafter.wants_hidden
        llm.speculate(None)
        assert llm.drafter is None and text(llm, 12) == expected
        llm.speculate("ngram", exact=False)
        assert not llm.exact
    with blockffn.Llama(target, drafter=["ngram", place / "head.gguf"], **SETTINGS) as llm:
        assert llm.drafter.name == "ngram+eagle" and llm.drafter.can_tree
        assert len(text(llm, 12)) == 12


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("ngarm", 'drafter: ngarm: no such file; expected "ngram", a draft model or an EAGLE head'),
        (Path(__file__), "not a GGUF file"),
        ([], "expected at least one drafter"),
        (7, "drafter: expected .*found 7"),
    ],
)
def test_names_of_no_drafter(stock_model: Path, what: Any, message: str) -> None:
    with pytest.raises(BlockffnError, match=message):
        blockffn.Llama(stock_model, drafter=what, **SETTINGS)


def test_trees_by_name(place: Path, stock_model: Path) -> None:
    assert open_drafter(place / "head.gguf").can_tree and open_drafter(place / "head.gguf", tree=True).can_tree
    assert not open_drafter(place / "head.gguf", tree=False).can_tree
    for what in ("ngram", stock_model):
        assert not open_drafter(what).can_tree
        with pytest.raises(BlockffnError, match="tree: "):
            open_drafter(what, tree=True)


def test_old_names_work_and_warn(llm: Any) -> None:
    with pytest.warns(DeprecationWarning, match="set_up_speculation is now called speculate"):
        llm.set_up_speculation(NGramDrafter(), True, Plan(2))
    text(llm, 9)
    with pytest.warns(DeprecationWarning, match="speculation is now called statistics"):
        assert llm.speculation() == llm.statistics()
    with pytest.warns(DeprecationWarning):
        llm.set_up_speculation(NGramDrafter())
    assert not llm.exact  # as it was: without an argument the mode is the default one
