"""Generation with drafters: the same text as without, whatever is sampled, streamed, stopped or interrupted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_llama import N_VOCAB, write_llama

import blockffn
from blockffn.errors import BlockffnError
from blockffn.speculative import Combination, ModelDrafter, NGramDrafter, ScriptedDrafter
from blockffn.speculative import loop as loop_module
from blockffn.speculative.policy import Plan

PROMPT = [1, 50, 60, 70]
SETTINGS: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_batch": 64}


def tokens_of(llm: Any, n: int, prompt: list[int] = PROMPT, **kwargs: Any) -> list[int]:
    return list(itertools.islice(llm.generate(prompt, **kwargs), n))


@pytest.fixture(scope="module")
def llm(stock_model: Path) -> Iterator[Any]:
    """One model in exact mode: its text must be equal, not only nearly so."""
    model = blockffn.Llama(stock_model, exact=True, **SETTINGS)
    yield model
    model.close()


@pytest.fixture(scope="module")
def truth(llm: Any) -> list[int]:
    llm.speculate(None, True)
    return PROMPT + tokens_of(llm, 300, temp=0.0)


def drafter_of(kind: str, truth: list[int]) -> tuple[Any, Plan | None]:
    if kind == "ngram":
        return NGramDrafter((2, 1)), None
    if kind == "tree":
        return ScriptedDrafter(truth, 0.7, N_VOCAB, branch=3), Plan(16, True)
    if kind == "ngram-tree":
        return NGramDrafter((1,), tree=True), Plan(12, True)
    probability = {"truth": 1.0, "mixture": 0.6, "garbage": 0.0}[kind]
    return ScriptedDrafter(truth, probability, N_VOCAB), Plan(7) if kind != "mixture" else None


KINDS = ("ngram", "ngram-tree", "truth", "mixture", "garbage", "tree")


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_same(llm: Any, truth: list[int], kind: str) -> None:
    drafter, plan = drafter_of(kind, truth)
    llm.speculate(drafter, True, plan)
    assert tokens_of(llm, 300, temp=0.0) == truth[4:]
    found = llm.statistics()
    assert found["predicted_n"] == 300
    if kind == "truth":
        assert found["tokens_per_step"] > 7.5
    if kind == "garbage":
        assert found["accepted"] < 0.05 * found["drafted"]
    if kind == "tree":
        assert found["tree_steps"] > 0 and found["tokens_per_step"] > 1.8


@pytest.mark.parametrize(
    "sampling",
    [
        {"temp": 0.9},
        {"temp": 1.3, "top_k": 7, "top_p": 0.8, "min_p": 0.01},
        {"temp": 0.0, "repeat_penalty": 1.3},
        {"temp": 0.7, "frequency_penalty": 0.4, "presence_penalty": 0.2},
        {"temp": 1.0, "mirostat_mode": 2},
        {"temp": 1.0, "typical_p": 0.7},
    ],
    ids=str,
)
def test_sampled_text_is_the_same_for_a_seed(llm: Any, sampling: dict[str, Any]) -> None:
    texts = []
    for kind in ("plain", *KINDS):
        llm.set_seed(11)
        if kind == "plain":
            llm.speculate(None, True)
        else:
            llm.speculate(*_at(drafter_of(kind, PROMPT + texts[0])))
        texts.append(tokens_of(llm, 100, **sampling))
    assert all(text == texts[0] for text in texts[1:])


def _at(pair: tuple[Any, Plan | None]) -> tuple[Any, bool, Plan | None]:
    return pair[0], True, pair[1]


def test_processors_see_verified_text_only(llm: Any, truth: list[int]) -> None:
    from llama_cpp import LogitsProcessorList

    seen: list[list[int]] = []

    def watch(ids: Any, scores: Any) -> Any:
        seen.append(list(ids))
        scores[ids[-1]] -= 100.0  # depends on the history: no token twice in a row
        return scores

    texts, histories = [], []
    for drafter, plan in ((None, None), (ScriptedDrafter(truth, 0.8, N_VOCAB), Plan(5))):
        llm.speculate(drafter, True, plan)
        seen.clear()
        texts.append(tokens_of(llm, 60, temp=0.0, logits_processor=LogitsProcessorList([watch])))
        histories.append([list(ids) for ids in seen])
    assert texts[0] == texts[1]
    assert histories[0] == histories[1]
    assert histories[1][10] == PROMPT + texts[1][:10]


def test_a_grammar_holds(llm: Any, truth: list[int]) -> None:
    from llama_cpp import LlamaGrammar

    grammar = 'root ::= "a" [b-d]* "z"'
    texts = []
    for drafter, plan in ((None, None), (ScriptedDrafter(truth, 0.5, N_VOCAB), Plan(4)), (NGramDrafter((1,)), Plan(6))):
        llm.speculate(drafter, True, plan)
        out = llm.create_completion(
            "x", max_tokens=40, temperature=0.0, grammar=LlamaGrammar.from_string(grammar, verbose=False)
        )
        texts.append(out["choices"][0]["text"])
    assert texts[0] == texts[1] == texts[2] and texts[0].startswith("a")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {"max_tokens": 30},
        {"max_tokens": 1},
        {"max_tokens": 40, "logprobs": 3},
        {"max_tokens": 20, "echo": True},
        {"max_tokens": 12, "echo": True, "logprobs": 2},
        {"max_tokens": 40, "stop": ["e", "\n"]},
        {"max_tokens": 25, "logit_bias": {100: 50.0}},
    ],
    ids=str,
)
def test_completions_are_the_same(llm: Any, truth: list[int], arguments: dict[str, Any], stream: bool) -> None:
    if stream and arguments.get("echo"):
        pytest.skip("llama_cpp does not echo in streams")
    results = []
    for kind in ("plain", "truth", "tree"):
        drafter, plan = (None, None) if kind == "plain" else drafter_of(kind, truth)
        llm.speculate(drafter, True, plan)
        out = llm.create_completion("once upon", temperature=0.0, stream=stream, **arguments)
        chunks = list(out) if stream else [out]
        assert "speculation" in chunks[-1] and all("speculation" not in chunk for chunk in chunks[:-1])
        results.append([chunk["choices"][0] for chunk in chunks])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_answers_carry_statistics(llm: Any, truth: list[int], stream: bool) -> None:
    llm.speculate(ScriptedDrafter(truth, 0.5, N_VOCAB), True, Plan(4))
    messages = [{"role": "user", "content": "once"}]
    out = llm.create_chat_completion(messages=messages, max_tokens=12, temperature=0.0, stream=stream)
    chunks = list(out) if stream else [out]
    assert all("speculation" not in chunk for chunk in chunks[:-1])
    assert chunks[-1]["speculation"]["predicted_n"] == 12 and chunks[-1]["speculation"]["drafted"] > 0


def test_logprobs_equal_those_of_logits_all(llm: Any, stock_model: Path) -> None:
    import llama_cpp

    llm.speculate(None, True)
    ours = llm.create_completion("hello", max_tokens=6, temperature=0.0, logprobs=2, echo=True)
    stock = llama_cpp.Llama(str(stock_model), logits_all=True, verbose=False, n_ctx=512, n_threads=1)
    theirs = stock.create_completion("hello", max_tokens=6, temperature=0.0, logprobs=2, echo=True)
    a, b = ours["choices"][0]["logprobs"], theirs["choices"][0]["logprobs"]
    assert a["tokens"] == b["tokens"] and a["text_offset"] == b["text_offset"]
    np.testing.assert_allclose(a["token_logprobs"][1:], b["token_logprobs"][1:], atol=0.02)
    assert llm.scores.shape[0] <= llm.n_batch  # no n_ctx x n_vocab buffer


def test_the_context_may_be_filled_to_the_end(stock_model: Path) -> None:
    llm = blockffn.Llama(stock_model, n_ctx=256, n_threads=1, drafter=NGramDrafter((1,)))
    out = llm.create_completion("ab", max_tokens=None, temperature=0.0, logit_bias={2: -1000.0})
    assert out["usage"]["total_tokens"] in (256, 257) and out["choices"][0]["finish_reason"] == "length"
    assert len(list(llm.generate(PROMPT, temp=0.0))) == 256 - len(PROMPT) + 1  # the last one is not evaluated
    with pytest.raises(RuntimeError, match="the context is full"):
        tokens_of(llm, 5, [60] * 300, temp=0.0)
    assert tokens_of(llm, 20, temp=0.0) == tokens_of(llm, 20, temp=0.0)


def test_turns_reuse_the_cache(llm: Any, truth: list[int]) -> None:
    for kind in ("plain", "mixture", "tree"):
        drafter, plan = (None, None) if kind == "plain" else drafter_of(kind, truth)
        llm.speculate(drafter, True, plan)
        llm.reset()
        first = tokens_of(llm, 40, temp=0.0)
        turn = PROMPT + first + [90, 91, 92]
        second = tokens_of(llm, 30, turn, temp=0.0)
        assert llm.statistics()["reused_n"] >= len(PROMPT) + len(first) - 1
        assert llm.statistics()["prompt_n"] <= 5
        llm.reset()
        assert tokens_of(llm, 30, turn, temp=0.0) == second
        shorter = tokens_of(llm, 20, turn[:20], temp=0.0)
        llm.reset()
        assert tokens_of(llm, 20, turn[:20], temp=0.0) == shorter


@pytest.mark.parametrize("kind", ["truth", "tree"])
def test_an_abandoned_generator_harms_nothing(llm: Any, truth: list[int], kind: str) -> None:
    drafter, plan = drafter_of(kind, truth)
    llm.speculate(drafter, True, plan)
    left = [llm.generate(PROMPT, temp=0.0) for _ in range(8)]
    for n, generator in enumerate(left):
        assert list(itertools.islice(generator, n + 1)) == truth[4 : 5 + n]
    assert tokens_of(llm, 60, temp=0.0) == truth[4:64]
    with pytest.raises(RuntimeError, match="ended by another one"):
        next(left[3])
    left.clear()
    assert tokens_of(llm, 60, truth[:30], temp=0.0) == truth[30:90]


@pytest.mark.parametrize("kind", ["truth", "mixture", "tree"])
def test_interruption_leaves_a_valid_cache(llm: Any, truth: list[int], kind: str) -> None:
    drafter, plan = drafter_of(kind, truth)
    llm.speculate(drafter, True, plan)
    random = np.random.default_rng(2)
    for _ in range(12):
        n = int(random.integers(1, 30))
        generator = llm.generate(PROMPT, temp=0.0)
        assert list(itertools.islice(generator, n)) == truth[4 : 4 + n]
        generator.close()
        assert llm.input_ids[: llm.n_tokens].tolist() == truth[: llm.n_tokens]
        assert llm.n_tokens <= 4 + n
        fresh = llm.logits(truth[: llm.n_tokens + 1])[-1]
        llm.eval([truth[llm.n_tokens]])
        np.testing.assert_allclose(llm._loop._logits[-1], fresh, atol=0.03)  # the yardstick keeps float32 in its cache


def test_tokens_can_be_sent(llm: Any, truth: list[int]) -> None:
    texts = []
    for kind in ("plain", "truth", "tree"):
        drafter, plan = (None, None) if kind == "plain" else drafter_of(kind, truth)
        llm.speculate(drafter, True, plan)
        generator = llm.generate(PROMPT, temp=0.0)
        text = [next(generator) for _ in range(9)]
        text += [generator.send([80, 81]), *itertools.islice(generator, 8)]
        texts.append(text)
    assert texts[0] == texts[1] == texts[2]


def test_stopping_criteria(llm: Any, truth: list[int]) -> None:
    from llama_cpp import StoppingCriteriaList

    for kind in ("truth", "tree"):
        llm.speculate(*_at(drafter_of(kind, truth)))
        stop = StoppingCriteriaList([lambda ids, logits: len(ids) >= 20])
        assert list(llm.generate(PROMPT, temp=0.0, stopping_criteria=stop)) == truth[4:20]


def test_switching_drafters_keeps_the_cache_in_step(llm: Any, truth: list[int]) -> None:
    for kind in ("tree", "plain", "tree", "mixture", "ngram-tree"):
        drafter, plan = (None, None) if kind == "plain" else drafter_of(kind, truth)
        llm.speculate(drafter, True, plan)
        assert tokens_of(llm, 50, temp=0.0) == truth[4:54]


def test_plain_steps_chains_and_trees_take_turns(llm: Any, truth: list[int]) -> None:
    """Trees need the text in every sequence of the cache, the other steps in the first one only."""
    llm.speculate(ScriptedDrafter(truth, 0.8, N_VOCAB, branch=3), True)
    plans = itertools.cycle([Plan(4), Plan(12, True), Plan(), Plan(12, True), Plan(9, True), Plan(2)])
    llm._loop.policy.plan = lambda: next(plans)
    assert tokens_of(llm, 200, temp=0.0) == truth[4:204]
    llm._loop.settle()
    state = llm.save_state()
    assert tokens_of(llm, 60, truth[:40], temp=0.0) == truth[40:100]
    llm.load_state(state)  # behind the loop's back
    assert tokens_of(llm, 60, truth[:204], temp=0.0) == truth[204:264]
    assert llm.statistics()["reused_n"] > 190 and llm.statistics()["tree_steps"] > 0


@pytest.mark.parametrize("same", [True, False], ids=["same-model", "other-model"])
def test_draft_model(llm: Any, truth: list[int], tmp_path: Path, stock_model: Path, same: bool) -> None:
    path = stock_model if same else write_llama(tmp_path / "draft.gguf", seed=9, n_layer=1)
    drafter = ModelDrafter(path, max_nodes=6)
    llm.speculate(drafter, True, Plan(6) if same else None)
    assert tokens_of(llm, 200, temp=0.0) == truth[4:204]
    if same:  # it drafts its own text: nearly every token is right
        assert llm.statistics()["tokens_per_step"] > 6
    assert tokens_of(llm, 50, truth[:120], temp=0.0) == truth[120:170]
    both = Combination([NGramDrafter((3,)), drafter])
    llm.speculate(both, True)
    assert tokens_of(llm, 100, temp=0.0) == truth[4:104]
    drafter.close()


def test_draft_model_cache_is_in_step(llm: Any, truth: list[int], stock_model: Path) -> None:
    drafter = ModelDrafter(stock_model, max_nodes=5)
    llm.speculate(drafter, True, Plan(5))
    evaluated: list[int] = []
    original = drafter._evaluate

    def count(tokens: Any) -> Any:
        evaluated.append(len(tokens))
        return original(tokens)

    drafter._evaluate = count  # type: ignore[method-assign]
    tokens_of(llm, 120, temp=0.0)
    # one evaluation per drafted token; verified tokens that were drafted are not evaluated again
    assert sum(evaluated) <= 1.5 * llm.statistics()["drafted"] + 10
    drafter.close()


def test_another_vocabulary_is_refused_with_the_first_difference(llm: Any, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "other.gguf", n_layer=1, vocab_edit={77: b"boo"})
    with pytest.raises(BlockffnError, match=r"token 77 is b'boo', expected b'<0x4A>'"):
        llm.speculate(ModelDrafter(path), True)
    llm.speculate(None, True)


def test_llama_cpps_own_text_without_exact_mode(stock_model: Path) -> None:
    import llama_cpp

    stock = llama_cpp.Llama(str(stock_model), verbose=False, **SETTINGS)
    ours = blockffn.Llama(stock_model, drafter=NGramDrafter(), **SETTINGS)
    assert tokens_of(ours, 60, temp=0.0) == tokens_of(stock, 60, temp=0.0)


class Clock:
    """A clock that moves by a millisecond whenever it is read, and as far as it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


@pytest.mark.parametrize("kind", ["plain", "truth"])
def test_statistics_leave_the_callers_time_out(
    llm: Any, truth: list[int], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A pause at a token, and one before the generator is closed, a thousand seconds each, count for nothing."""
    clock = Clock()
    monkeypatch.setattr(loop_module, "perf_counter", clock)
    llm.speculate(*((None, True) if kind == "plain" else _at(drafter_of(kind, truth))))
    generator = llm.generate(PROMPT, temp=0.0)
    for _ in range(20):
        next(generator)
        clock.now += 1000.0
    generator.close()
    found = llm.statistics()
    assert 0.0 < found["loop_ms"] < found["predicted_ms"] < 1000.0
