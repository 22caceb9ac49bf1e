"""A published model of another architecture, served by us: plainly, with n-grams, in exact mode."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from peer_perplexity import peer_perplexity

import blockffn
from blockffn.cli import main
from blockffn.speculative.policy import Plan

COUNTING = "List the numbers from 1 to 20:\n1, 2, 3, 4, 5, 6,"
LENGTH = 48


@pytest.fixture(scope="module")
def llm(real_model: Path) -> Iterator[blockffn.Llama]:
    with blockffn.Llama(str(real_model), n_ctx=256, n_threads=2) as found:
        yield found


def greedy(llm: blockffn.Llama, drafter: str | None, exact: bool) -> tuple[str, dict[str, int]]:
    """Return the greedy continuation of COUNTING and what its drafts were worth."""
    llm.speculate(drafter, exact, None if drafter is None else Plan(4))  # the automatic choice goes by the clock
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


def test_runs_on_our_kernels_and_on_stock_ones_if_asked(real_model: Path, llm: blockffn.Llama) -> None:
    """Rounding differs between the two, and nothing else."""
    tokens = llm.tokenize(COUNTING.encode())
    ours = llm.logits(tokens)
    with blockffn.Llama(str(real_model), n_ctx=256, n_threads=2, ffn="dense") as stock:
        theirs = stock.logits(tokens)
    assert not np.array_equal(ours, theirs)
    assert float(np.square(ours - theirs).sum() / np.square(theirs).sum()) < 1e-3
    assert (ours.argmax(1) == theirs.argmax(1)).mean() >= 0.9


def test_has_no_experts(llm: blockffn.Llama) -> None:
    assert llm.n_moe_layers == 0


def test_perplexity_is_that_of_llama_perplexity(
    real_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts of this model begin without a begin-of-text token, although its vocabulary has one."""
    file = tmp_path / "text.txt"
    file.write_text((Path(__file__).parent.parent / "LICENSE").read_text()[:900])
    assert main(["eval", "ppl", "-m", str(real_model), "-f", str(file), "-c", "64", "-t", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_windows"] >= 2
    assert found["perplexity"] == pytest.approx(peer_perplexity(real_model, file, 64, "-t", "2"), rel=1e-3)
