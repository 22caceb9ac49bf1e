"""Log-probabilities: those of llama_cpp with logits_all, complete, streamed and echoed, with and without drafts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_llama import N_VOCAB

import blockffn
from blockffn.speculative import NGramDrafter, ScriptedDrafter
from blockffn.speculative.policy import Plan
from blockffn.speculative.rows import KeptRows

SETTINGS: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_batch": 64}
JUNK = 7.0  # what fresh memory is filled with: log-probabilities of it would all be -ln(N_VOCAB)


@pytest.fixture(scope="module")
def stock(stock_model: Path) -> Any:
    import llama_cpp

    return llama_cpp.Llama(str(stock_model), logits_all=True, verbose=False, **SETTINGS)


@pytest.fixture(scope="module", params=[True, False], ids=["logits_all", "default"])
def llm(request: pytest.FixtureRequest, stock_model: Path) -> Iterator[Any]:
    model = blockffn.Llama(stock_model, logits_all=request.param, **SETTINGS)
    model.scores[:] = JUNK
    yield model
    model.close()


def drafters(llm: Any) -> list[tuple[Any, Plan | None]]:
    truth = [1, *b"hello", *itertools.islice(llm.generate([1, *b"hello"], temp=0.0), 60)]
    return [
        (None, None),
        (NGramDrafter((2, 1)), Plan(4)),
        (ScriptedDrafter(truth, 0.7, N_VOCAB, branch=3), Plan(8, True)),
    ]


def log_probabilities(model: Any, **arguments: Any) -> list[dict[str, Any]]:
    """All chunks' log-probabilities of a greedy completion."""
    out = model.create_completion("hello", temperature=0.0, logprobs=2, **arguments)
    chunks = list(out) if arguments.get("stream") else [out]
    return [found for chunk in chunks if (found := chunk["choices"][0]["logprobs"]) is not None]


@pytest.mark.parametrize("arguments", [{}, {"stream": True}, {"echo": True}], ids=["complete", "stream", "echo"])
def test_they_are_those_of_stock_llama_cpp(llm: Any, stock: Any, arguments: dict[str, Any]) -> None:
    expected = log_probabilities(stock, max_tokens=12, **arguments)
    for drafter, plan in drafters(llm):
        llm.speculate(drafter, plan=plan)
        for _ in range(2):  # the second time the prompt is in the cache
            found = log_probabilities(llm, max_tokens=12, **arguments)
            assert len(found) == len(expected)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours["tokens"] == theirs["tokens"] and ours["text_offset"] == theirs["text_offset"]
                assert [list(top or ()) for top in ours["top_logprobs"]] == [
                    list(top or ()) for top in theirs["top_logprobs"]
                ]
                np.testing.assert_allclose(
                    [x for x in ours["token_logprobs"] if x is not None],
                    [x for x in theirs["token_logprobs"] if x is not None],
                    atol=0.02,  # flash attention against plain attention
                )


def test_scores_hold_every_position_with_logits_all(stock_model: Path, stock: Any) -> None:
    with blockffn.Llama(stock_model, logits_all=True, **SETTINGS) as llm:
        llm.scores[:] = JUNK
        tokens = [1, *b"some text that is longer than one batch of sixty-four tokens, or so it is hoped"]
        for model in (stock, llm):
            model.reset()
            model.eval(tokens)
        np.testing.assert_allclose(llm._scores, stock._scores, atol=0.05)
        assert len(llm.eval_logits) == len(tokens)
        ours = list(itertools.islice(llm.generate(tokens, temp=0.0), 20))
        assert list(itertools.islice(stock.generate(tokens, temp=0.0), 20)) == ours
        assert llm.n_tokens == len(tokens) + 19
        np.testing.assert_allclose(llm._scores, stock._scores, atol=0.05)
        saved = llm.save_state()
        llm.reset()
        llm.scores[:] = JUNK
        llm.load_state(saved)
        np.testing.assert_allclose(llm._scores, stock._scores, atol=0.05)


def test_without_logits_all_only_the_last_row_is_there(stock_model: Path) -> None:
    with blockffn.Llama(stock_model, **SETTINGS) as llm:
        assert llm.scores.shape == (1, N_VOCAB)
        llm.eval([1, 50, 60])
        np.testing.assert_allclose(llm.eval_logits[0], llm.logits([1, 50, 60])[-1], atol=0.03)
        seen = []
        out = llm.create_completion(
            "ab", max_tokens=4, temperature=0.0, stopping_criteria=lambda ids, row: seen.append((list(ids), row.copy()))
        )
        assert len(seen) == 5 and out["usage"]["completion_tokens"] == 4  # asked once more at the end
        for ids, row in seen:
            np.testing.assert_allclose(row, llm.logits(ids)[-1], atol=0.03)


def test_streams_that_overlap_leave_no_mark(stock_model: Path) -> None:
    with blockffn.Llama(stock_model, exact=True, **SETTINGS) as llm:
        whole = log_probabilities(llm, max_tokens=9, stream=True)
        first, second = (
            llm.create_completion("hello", max_tokens=9, temperature=0.0, logprobs=2, stream=True) for _ in range(2)
        )
        next(first)
        head = next(second)
        first.close()  # in another order than they were opened
        found = [chunk["choices"][0]["logprobs"] for chunk in (head, *second)]
        assert [chunk for chunk in found if chunk is not None] == whole
        second.close()
        assert llm._loop.kept is None and not llm.logits_all
        assert log_probabilities(llm, max_tokens=3)[0]["token_logprobs"][0] == whole[0]["token_logprobs"][0]


def test_a_stream_copies_each_row_once(stock_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with blockffn.Llama(stock_model, **SETTINGS) as llm:
        copied, views = [], []
        put, rows = KeptRows.put, KeptRows.rows
        monkeypatch.setattr(KeptRows, "put", lambda self, at, found: (copied.append(at), put(self, at, found))[1])
        monkeypatch.setattr(KeptRows, "rows", lambda self: (views.append(rows(self)), views[-1])[1])
        n = len(log_probabilities(llm, max_tokens=100, stream=True))
        assert len(copied) == n and len(views) == n
        assert all(np.shares_memory(view, llm_memory) for view, llm_memory in itertools.pairwise(views[70:]))
        assert llm._loop.kept is None  # free once the answer is there


def test_kept_rows_grow_and_forget() -> None:
    kept = KeptRows(n_vocab=2)
    assert kept.begin(5) == 5
    for position in range(4, 60):
        kept.put(position, np.full(2, position, dtype=np.float32))
    assert kept.rows()[4:].tolist() == [[p, p] for p in range(4, 60)]
    kept.put(10, np.zeros((1, 2), dtype=np.float32))
    assert kept.rows().shape == (7, 2) and kept.rows()[9].tolist() == [9, 9]
    with pytest.raises(IndexError, match="row 3 was not kept: rows 4 to 10 were"):
        kept.rows()[3]
