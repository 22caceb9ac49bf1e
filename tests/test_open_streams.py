"""What happens to the cache while a stream is left at a token: reset, states, embeddings, prompt caches, closing.

A step with a draft that holds accepted tokens is open then. Every case must leave a model that generates what a fresh
one does, and a drafter in step with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from tiny_head import N_EMBD, write_head

import blockffn
from blockffn.convert.eagle import convert_head
from blockffn.errors import BlockffnError
from blockffn.speculative import ScriptedDrafter
from blockffn.speculative.policy import Plan

PROMPT = [1, 50, 60, 70]
OTHER = [1, 90, 91, 92, 93]
N_VOCAB = 512
LEFT_AT = (3, 4, 5, 7, 10)  # tokens after which a stream is left: at the end and in the middle of drafts
SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_batch": 32}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    write_checkpoint(folder / "target", n_embd=N_EMBD, n_head=2, n_layer=2, attention="gqa")
    blockffn.convert.convert_checkpoint(folder / "target", folder / "target.gguf", outtype="f32")
    write_head(folder / "head")
    convert_head(folder / "head", folder / "target", folder / "head.gguf", outtype="f32")
    return folder


def text(llm: Any, prompt: list[int], n: int = 40) -> list[int]:
    return list(itertools.islice(llm.generate(prompt, temp=0.0), n))


@pytest.fixture(scope="module")
def truth(place: Path) -> dict[str, list[int]]:
    with blockffn.Llama(place / "target.gguf", exact=True, **SETTINGS) as llm:
        return {"prompt": PROMPT + text(llm, PROMPT), "other": OTHER + text(llm, OTHER)}


@pytest.fixture(params=["chain", "tree", "head-chain", "head-tree"])
def llm(request: pytest.FixtureRequest, place: Path, truth: dict[str, list[int]]) -> Iterator[Any]:
    """A model in exact mode whose drafts are right most of the time; with a head beside, which runs in full."""
    model = blockffn.Llama(place / "target.gguf", exact=True, **SETTINGS)
    beside = blockffn.EagleDrafter(place / "head.gguf", model) if "head" in request.param else None
    tree = "tree" in request.param
    drafter = ScriptedDrafter(truth["prompt"], 0.9, N_VOCAB, branch=3 if tree else 1, beside=beside)
    model.speculate(drafter, True, Plan(8, True) if tree else Plan(5))
    yield model
    model.close()


def left_at(llm: Any, truth: dict[str, list[int]], n: int) -> Any:
    """A stream that was left after `n` tokens."""
    stream = llm.generate(PROMPT, temp=0.0)
    assert list(itertools.islice(stream, n)) == truth["prompt"][4 : 4 + n]
    return stream


def reset(llm: Any) -> None:
    llm.reset()


def rewind(llm: Any) -> None:
    llm.n_tokens = 2  # as some callers do, behind everybody's back


def evaluate(llm: Any) -> None:
    llm.n_tokens = 0
    llm.eval(OTHER)


DISTURB: list[Callable[[Any], None]] = [reset, rewind, evaluate]


@pytest.mark.parametrize("disturb", DISTURB)
def test_a_change_of_the_text(llm: Any, truth: dict[str, list[int]], disturb: Callable[[Any], None]) -> None:
    for n in LEFT_AT:
        stream = left_at(llm, truth, n)
        disturb(llm)
        for prompt, name in ((OTHER, "other"), (PROMPT, "prompt")):
            assert prompt + text(llm, prompt, 12) == truth[name][: len(prompt) + 12]
        with pytest.raises(RuntimeError, match="ended by another one"):
            next(stream)


def test_a_saved_state(llm: Any, truth: dict[str, list[int]]) -> None:
    for n in LEFT_AT:
        stream = left_at(llm, truth, n)
        state = llm.save_state()
        assert state.scores.shape == (0, N_VOCAB) and state.n_tokens < 4 + n
        assert list(itertools.islice(stream, 10)) == truth["prompt"][4 + n : 14 + n]  # the stream goes on
        llm.load_state(state)
        with pytest.raises(RuntimeError, match="ended by another one"):
            next(stream)
        assert llm.n_tokens == state.n_tokens
        assert text(llm, truth["prompt"][: 4 + n], 10) == truth["prompt"][4 + n : 14 + n]
        if not llm.drafter.wants_hidden:
            assert llm.statistics()["reused_n"] == state.n_tokens


def test_a_loaded_state(llm: Any, truth: dict[str, list[int]]) -> None:
    text(llm, OTHER, 12)
    state = llm.save_state()
    for n in LEFT_AT:
        stream = left_at(llm, truth, n)
        llm.load_state(state)
        assert OTHER + text(llm, OTHER, 20) == truth["other"][: len(OTHER) + 20]
        del stream


def test_a_prompt_cache(llm: Any, truth: dict[str, list[int]]) -> None:
    from llama_cpp import LlamaRAMCache

    def complete(prompt: list[int], logprobs: int | None = None) -> str:
        out = llm.create_completion(prompt, max_tokens=9, temperature=0.0, logprobs=logprobs)
        return str(out["choices"][0]["text"])

    expected = complete(OTHER), complete(PROMPT)
    llm.set_cache(LlamaRAMCache())
    for n in (3, 4):
        for logprobs in (1, None):
            stream = left_at(llm, truth, n)
            assert complete(OTHER, logprobs) == expected[0]
            stream.close()
            assert complete(PROMPT, logprobs) == expected[1]
            for chunk in llm.create_completion(OTHER, max_tokens=9, temperature=0.0, stream=True):
                if n % 2:
                    break  # left open
                assert chunk
    states = llm.cache.cache_state.values()
    assert states and all(state.scores.size == 0 for state in states)


def test_streams_of_any_kind_may_be_closed(llm: Any, truth: dict[str, list[int]]) -> None:
    for n in (2, 5, 6):
        for logprobs in (None, 2):
            stream = llm.create_completion(PROMPT, max_tokens=20, temperature=0.0, stream=True, logprobs=logprobs)
            list(itertools.islice(stream, n))
            stream.close()
        chat = llm.create_chat_completion([{"role": "user", "content": "a"}], max_tokens=20, stream=True)
        list(itertools.islice(chat, n))
        chat.close()
        assert llm._loop.kept is None and llm._loop._open is None
        assert text(llm, PROMPT, 12) == truth["prompt"][4:16]


def test_a_refused_state_leaves_an_empty_text(llm: Any, truth: dict[str, list[int]]) -> None:
    stream = left_at(llm, truth, 6)
    state = llm.save_state()
    state.llama_state, state.llama_state_size = state.llama_state[:100], 100
    with pytest.raises(RuntimeError, match="Failed to set llama state"):
        llm.load_state(state)
    assert llm.n_tokens == 0
    del stream
    assert text(llm, PROMPT, 12) == truth["prompt"][4:16]


def test_a_state_that_is_longer_than_the_context(place: Path) -> None:
    with blockffn.Llama(place / "target.gguf", **SETTINGS) as large:
        text(large, [1, *range(40, 200)], 3)
        state = large.save_state()
    with blockffn.Llama(place / "target.gguf", **{**SETTINGS, "n_ctx": 128}) as small:
        with pytest.raises(BlockffnError, match=r"holds 163 tokens, the context 128: .*n_ctx=163"):
            small.load_state(state)
        assert len(text(small, PROMPT, 9)) == 9


def test_embeddings(place: Path) -> None:
    settings = {**SETTINGS, "embedding": True}
    with blockffn.Llama(place / "target.gguf", **settings) as llm:
        expected = llm.embed("some text")
        plain = text(llm, PROMPT, 20)
        llm.speculate(ScriptedDrafter(PROMPT + plain, 1.0, N_VOCAB), plan=Plan(5))
        for n in (3, 5, 8):
            stream = llm.generate(PROMPT, temp=0.0)
            list(itertools.islice(stream, n))
            np.testing.assert_allclose(llm.embed("some text"), expected, rtol=1e-5)
            assert text(llm, PROMPT, 8) == plain[:8]
            with pytest.raises(RuntimeError, match="ended by another one"):
                next(stream)
