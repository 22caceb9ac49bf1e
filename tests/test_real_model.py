"""A published model of another architecture, served by us: plainly, with n-grams, in exact mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import blockffn

COUNTING = "List the numbers from 1 to 20:\n1, 2, 3, 4, 5, 6,"
LENGTH = 48


@pytest.fixture(scope="module")
def llm(real_model: Path) -> Iterator[blockffn.Llama]:
    with blockffn.Llama(str(real_model), n_ctx=256, n_threads=2) as found:
        yield found


def greedy(llm: blockffn.Llama, drafter: str | None, exact: bool) -> tuple[str, dict[str, int]]:
    """Return the greedy continuation of COUNTING and what its drafts were worth."""
    llm.speculate(drafter, exact)
    out = llm.create_completion(COUNTING, max_tokens=LENGTH, temperature=0.0)
    return out["choices"][0]["text"], out["speculation"]


def test_answers_with_its_own_template(llm: blockffn.Llama) -> None:
    llm.speculate(None, False)
    question = {"role": "user", "content": "What is the capital of France? Answer in one word."}
    out = llm.create_chat_completion([question], temperature=0.0, max_tokens=16)
    assert "Paris" in out["choices"][0]["message"]["content"]
    assert out["choices"][0]["finish_reason"] == "stop"


def test_n_grams_draft_for_it(llm: blockffn.Llama) -> None:
    text, figures = greedy(llm, "ngram", exact=False)
    assert " 7, 8, 9, 10, 11, 12" in text
    assert figures["drafted"] >= figures["accepted"] > 0


def test_exact_mode_reproduces_its_plain_text(llm: blockffn.Llama) -> None:
    plain, _ = greedy(llm, None, exact=True)
    drafted, figures = greedy(llm, "ngram", exact=True)
    assert figures["accepted"] > 0
    assert drafted == plain
    assert " 7, 8, 9, 10, 11, 12" in plain


def test_has_no_experts(llm: blockffn.Llama) -> None:
    assert llm.n_moe_layers == 0
