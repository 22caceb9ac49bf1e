"""The engine: many texts in one batch, each as it would be alone."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blockffn
from blockffn import BlockffnError, Engine, GenerationParams, ModelDrafter, NGramDrafter, QueueFull, library

library.load()
from llama_cpp import LlamaGrammar  # noqa: E402  only after `load`

LONG = GenerationParams(max_tokens=700, ignore_eos=True)
PROMPTS = ["abc", "a longer prompt than the others", "abd", "x", "yz" * 20, "0123"]


@pytest.fixture(scope="module")
def engine(stock_model: Path) -> Iterator[Engine]:
    with Engine(stock_model, n_parallel=4, n_ctx=1024, n_threads=1, exact=True) as engine:
        yield engine


def alone(
    model: Path, prompt: str, n: int, seed: int = 0, temperature: float = 0.0, sampling: str = "stock", **arguments: Any
) -> list[int]:
    """The tokens that blockffn.Llama gives, in exact mode too."""
    with blockffn.Llama(model, n_ctx=256, n_threads=1, exact=True, sampling=sampling) as llm:
        llm.set_seed(seed)
        tokens = llm.tokenize(prompt.encode(), special=True)
        found = itertools.islice(llm.generate(tokens, temp=temperature, **arguments), n)
        return list(itertools.takewhile(lambda token: token != llm.token_eos(), found))


def idle(engine: Engine, seconds: float = 20) -> bool:
    """Does nothing run or wait any more? Waits for it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        figures = engine.statistics()
        if not figures["running"] and not figures["waiting"]:
            return True
        time.sleep(0.005)
    return False


def test_greedy_texts_are_those_of_one_model(engine: Engine, stock_model: Path) -> None:
    params = GenerationParams(max_tokens=40, temperature=0.0)
    for prompt, stream in zip(PROMPTS, engine.generate_many(PROMPTS, params), strict=True):
        assert [token.id for token in stream.tokens] == alone(stock_model, prompt, 40)
        assert stream.finish_reason == ("length" if len(stream.tokens) == 40 else "stop")


def test_stock_sampling_keeps_the_seeds_of_llama_cpp(engine: Engine, stock_model: Path) -> None:
    chain: dict[str, Any] = {
        "temperature": 1.3, "top_k": 60, "top_p": 0.97, "min_p": 0.01, "typical_p": 0.98, "repeat_penalty": 1.2,
        "frequency_penalty": 0.1, "presence_penalty": 0.1, "seed": 7,
    }  # fmt: skip
    for extra in ({}, {"mirostat_mode": 2}, {"mirostat_mode": 1}, {"temperature": -1.0}):
        arguments = chain | extra
        stream = engine.submit("abc", GenerationParams(**arguments, max_tokens=30, sampling="stock")).wait()
        assert [token.id for token in stream.tokens] == alone(stock_model, "abc", 30, **arguments), extra


def test_coupled_texts_are_those_of_one_model(engine: Engine, stock_model: Path) -> None:
    for temperature, seed in ((0.8, 1), (1.0, 2), (-1.0, 3)):
        params = GenerationParams(temperature=temperature, seed=seed, max_tokens=30, repeat_penalty=1.1)
        found = [token.id for token in engine.submit("abc", params).wait().tokens]
        assert found == alone(stock_model, "abc", 30, seed, temperature, "coupled", repeat_penalty=1.1)


def test_logit_bias_and_ignore_eos(engine: Engine) -> None:
    biased = engine.submit("abc", GenerationParams(max_tokens=9, logit_bias={70: 100.0})).wait()
    assert {token.id for token in biased.tokens} == {70}
    ends = engine.llm.token_eos()
    ended = engine.submit("abc", GenerationParams(max_tokens=9, logit_bias={ends: 100.0})).wait()
    assert not ended.tokens and ended.finish_reason == "stop"
    on = engine.submit("abc", GenerationParams(max_tokens=9, logit_bias={ends: 100.0}, ignore_eos=True)).wait()
    assert len(on.tokens) == 9 and on.finish_reason == "length"


def test_greedy_text_past_its_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the end is ignored, the most likely token of those that do not end a text is taken."""
    monkeypatch.setattr(engine, "_is_end", lambda token: token % 3 > 0)  # two of three tokens would end it
    stream = engine.submit("abc", GenerationParams(max_tokens=12, temperature=0.0, ignore_eos=True)).wait()
    text = [*stream.prompt, *(token.id for token in stream.tokens)]
    logits = engine.llm.logits(text)[len(stream.prompt) - 1 : -1]
    logits[:, np.arange(logits.shape[1]) % 3 > 0] = -np.inf
    assert [token.id for token in stream.tokens] == logits.argmax(axis=1).tolist()


def test_tokens_carry_log_probabilities_and_add_up_to_the_text(engine: Engine) -> None:
    stream = engine.submit("abc", GenerationParams(max_tokens=12, temperature=0.0, logprobs=3))
    read = list(stream)
    assert read == stream.tokens and "".join(token.text for token in read) == stream.text
    logits = engine.llm.logits([*stream.prompt, *(token.id for token in read)])
    for place, token in enumerate(read, len(stream.prompt) - 1):
        row = logits[place].astype(np.float64)
        expected = row - np.log(np.exp(row - row.max()).sum()) - row.max()
        assert token.logprob == pytest.approx(expected[token.id], abs=0.02)
        assert token.top_logprobs is not None and len(token.top_logprobs) == 3
        assert token.top_logprobs[0][0] == token.id  # greedy


def test_a_stop_text_ends_the_answer_before_itself(engine: Engine) -> None:
    whole = engine.submit("abc", GenerationParams(max_tokens=40, temperature=0.0)).wait().text
    stop = whole[10:13]
    stream = engine.submit("abc", GenerationParams(max_tokens=40, temperature=0.0, stop=[stop])).wait()
    assert stream.text == whole[: whole.index(stop)] and stream.finish_reason == "stop"


def test_a_grammar_is_followed_and_a_broken_one_refused(engine: Engine) -> None:
    grammar = LlamaGrammar.from_string('root ::= "ab" [0-9]+ "."', verbose=False)
    stream = engine.submit("x", GenerationParams(grammar=grammar, max_tokens=200, seed=1)).wait()
    assert stream.text.startswith("ab") and stream.text.strip("ab.").isdigit()
    with pytest.raises(BlockffnError, match="grammar"):
        engine.submit("x", GenerationParams(grammar=LlamaGrammar.from_string("root ::= (", verbose=False)))


def test_an_error_of_one_text_is_its_own(engine: Engine) -> None:
    def fail(_ids: Any, _scores: Any) -> Any:
        raise ZeroDivisionError("in a processor")

    bad = engine.submit("abc", GenerationParams(max_tokens=5, logits_processor=[fail]))
    good = engine.submit("abc", GenerationParams(max_tokens=5, ignore_eos=True))
    assert len(good.wait().tokens) == 5
    with pytest.raises(ZeroDivisionError, match="in a processor"):
        bad.wait()
    assert bad.finish_reason == "error"


def test_async_readers_and_threads(engine: Engine) -> None:
    async def read(prompt: str) -> str:
        stream = engine.submit(prompt, GenerationParams(max_tokens=10, temperature=0.0))
        return "".join([token.text async for token in stream])

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*map(read, PROMPTS))

    texts = asyncio.run(all_of_them())
    expected = [
        stream.text for stream in engine.generate_many(PROMPTS, GenerationParams(max_tokens=10, temperature=0.0))
    ]
    assert texts == expected


def test_many_streams_are_read_as_one(engine: Engine) -> None:
    params = GenerationParams(max_tokens=10, temperature=0.0)
    expected = [stream.text for stream in engine.generate_many(PROMPTS, params)]

    async def read() -> list[str]:
        texts = [""] * len(PROMPTS)
        async for number, token in engine.stream_many(PROMPTS, params):
            texts[number] += token.text
        return texts

    async def leave() -> int:
        async for number, _token in (streams := engine.stream_many(PROMPTS, LONG)):
            await streams.aclose()
            return number
        raise AssertionError("no token came")

    assert asyncio.run(read()) == expected
    assert asyncio.run(leave()) in range(4)  # one of those that run
    assert idle(engine)  # not a word of 700 was needed to notice
    with pytest.raises(BlockffnError, match="expected one for each of 6 prompts, found 2"):
        engine.stream_many(PROMPTS, [params, params])
    with pytest.raises(BlockffnError, match="at least one token"):
        engine.stream_many([[1, 40], []], LONG)
    assert idle(engine)  # the text before the one that was refused is taken back


def test_an_error_ends_the_common_reading(engine: Engine) -> None:
    def fail(_ids: Any, _scores: Any) -> Any:
        raise ZeroDivisionError("in a processor")

    async def read() -> None:
        params = [LONG, GenerationParams(max_tokens=5, logits_processor=[fail])]
        async for _number, _token in engine.stream_many(["abc", "abd"], params):
            pass

    with pytest.raises(ZeroDivisionError, match="in a processor"):
        asyncio.run(read())
    assert idle(engine)


def test_a_model_generates_many_beside_its_conversation(stock_model: Path) -> None:
    params = GenerationParams(max_tokens=20, temperature=0.0)
    with blockffn.Llama(stock_model, n_ctx=512, n_threads=1, exact=True, drafter=ModelDrafter(stock_model)) as llm:
        talk = llm.generate(llm.tokenize(b"abc", special=True), temp=0.0)
        begun = list(itertools.islice(talk, 7))
        many = llm.generate_many(PROMPTS, params, n_parallel=3)
        for prompt, stream in zip(PROMPTS, many, strict=True):
            assert [token.id for token in stream.tokens] == alone(stock_model, prompt, 20)
        assert sum(stream.statistics["drafted"] for stream in many) > 0

        async def read() -> list[int]:
            return [token.id async for number, token in llm.stream_many(PROMPTS, params) if number == 1]

        assert asyncio.run(read()) == [token.id for token in many[1].tokens]
        assert begun + list(itertools.islice(talk, 13)) == alone(stock_model, "abc", 20)  # not touched


def test_cancelled_texts_end_and_the_others_go_on(engine: Engine) -> None:
    streams = [engine.submit(prompt, GenerationParams(max_tokens=100, temperature=0.0)) for prompt in PROMPTS]
    next(streams[0])
    streams[0].cancel()
    streams[5].cancel()  # waits still, or has just begun
    assert streams[0].wait().finish_reason == "cancelled" and len(streams[0].tokens) < 100
    assert streams[5].wait().finish_reason == "cancelled"
    for prompt, stream in zip(PROMPTS[1:5], streams[1:5], strict=True):
        again = engine.submit(prompt, GenerationParams(max_tokens=100, temperature=0.0)).wait()
        assert stream.wait().text == again.text


def test_shared_beginnings_are_evaluated_once(engine: Engine) -> None:
    common = "a common beginning of all of these texts: "
    engine.submit(common, GenerationParams(max_tokens=1)).wait()
    streams = engine.generate_many([common + str(i) for i in range(4)], GenerationParams(max_tokens=3))
    for stream in streams:
        assert stream.statistics["reused_n"] >= len(common) and stream.statistics["prompt_n"] < 5


def test_a_full_cache_preempts_the_youngest_and_changes_no_text(stock_model: Path) -> None:
    params = GenerationParams(max_tokens=120, temperature=0.9, seed=5)
    prompts = [f"{i} text" for i in range(6)]
    with Engine(stock_model, n_parallel=4, n_ctx=256, n_threads=1, exact=True) as small:
        crowded = small.generate_many(prompts, params)
        assert small.statistics()["preemptions"] > 0 and crowded[0].statistics["preempted"] == 0
        for prompt, stream in zip(prompts, crowded, strict=True):
            assert small.submit(prompt, params).wait().text == stream.text


def test_queue_limit_and_close(stock_model: Path) -> None:
    engine = Engine(stock_model, n_parallel=1, n_ctx=256, n_threads=1, max_queue=1)
    gate = threading.Event()

    def hold(_ids: Any, scores: Any) -> Any:
        gate.wait(10)
        return scores

    first = engine.submit("a", GenerationParams(max_tokens=2, ignore_eos=True, logits_processor=[hold]))
    deadline = time.monotonic() + 10
    while not engine.statistics()["running"] and time.monotonic() < deadline:
        time.sleep(0.001)
    second = engine.submit("b", GenerationParams(max_tokens=2, ignore_eos=True))
    with pytest.raises(QueueFull, match="1 texts wait already"):
        engine.submit("c")
    gate.set()
    assert len(first.wait().tokens) == 2 and len(second.wait().tokens) == 2
    engine.close()
    with pytest.raises(BlockffnError, match="closed"):
        engine.submit("d")


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "at least one token"),
        ([10**6], {}, "expected tokens from 0 to"),
        ("a" * 2000, {}, "do not fit into n_ctx = 1024"),
        ("a", {"top_p": 1.5}, "top_p: expected 0 to 1, found 1.5"),
        ("a", {"temperature": float("nan")}, "temperature: expected a finite number"),
        ("a", {"mirostat_mode": 3}, "mirostat_mode"),
        ("a", {"sampling": "other"}, "expected one of coupled, stock"),
        ("a", {"logit_bias": {10**6: 1.0}}, "logit_bias: expected tokens"),
    ],
)
def test_bad_requests_are_refused_in_one_line(
    engine: Engine, prompt: Any, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(BlockffnError, match=message):
        engine.submit(prompt, GenerationParams(**params))


@pytest.mark.parametrize("drafter", ["ngram", "model"])
def test_drafts_change_no_text(drafter: str, stock_model: Path) -> None:
    made = NGramDrafter((1,)) if drafter == "ngram" else ModelDrafter(stock_model)
    with (
        Engine(stock_model, n_parallel=3, n_ctx=1024, n_threads=1) as plain,
        Engine(stock_model, n_parallel=3, n_ctx=1024, n_threads=1, drafter=made, draft_tokens=3) as drafting,
    ):
        for temperature in (0.0, 0.8):
            params = GenerationParams(max_tokens=30, temperature=temperature, seed=2)
            expected, found = (engine.generate_many(PROMPTS, params) for engine in (plain, drafting))
            assert [stream.text for stream in found] == [stream.text for stream in expected]
            assert sum(stream.statistics["drafted"] for stream in found) > 0
