"""Coupled sampling: the target's own distribution, one text per seed whoever drafts, drafts that agree more often.

BLOCKFFN_DRAWS=20000 pytest tests/test_sampling.py     # the long run; the default is a short one
"""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import write_checkpoint
from tiny_head import write_head

import blockffn
from blockffn import BlockffnError, GenerationParams, library
from blockffn.convert.eagle import convert_head
from blockffn.speculative import Context, Draft, EagleDrafter, ModelDrafter, NGramDrafter
from blockffn.speculative.policy import Plan
from blockffn.speculative.sampling import Chain, Draw, Noise, draw_of

library.load()
from llama_cpp import LlamaGrammar  # noqa: E402  only after `load`

DRAWS = int(os.environ.get("BLOCKFFN_DRAWS", "3000"))
LOOP_DRAWS = int(os.environ.get("BLOCKFFN_DRAWS", "300"))  # through the whole loop, which takes longer
PROMPT = [1, 70, 80, 90]


def surprise(counts: npt.NDArray[np.int64], expected: npt.NDArray[np.float64]) -> float:
    """How many standard deviations a chi-square statistic lies above its mean (Wilson and Hilferty's approximation)."""
    order = np.argsort(expected)[::-1]
    counts, expected = counts[order], expected[order]
    common = expected >= 10
    cells = [(counts[common] - expected[common]) ** 2 / expected[common]]
    rest = expected[~common].sum()
    if rest > 1:
        cells.append(np.array([(counts[~common].sum() - rest) ** 2 / rest]))
    else:
        assert counts[~common].sum() <= 10
    found = np.concatenate(cells)
    k = len(found) - 1
    spread = 2 / (9 * k)
    return float(((found.sum() / k) ** (1 / 3) - (1 - spread)) / np.sqrt(spread))


@pytest.fixture(scope="module")
def llm(stock_model: Path) -> Any:
    with blockffn.Llama(stock_model, n_ctx=512, n_threads=1, exact=True) as llm:
        yield llm


def probabilities(llm: Any, row: Any, params: GenerationParams) -> npt.NDArray[np.float64]:
    """The distribution that llama.cpp's chain leaves, from its definition: top-k, top-p, min-p, temperature."""
    logits = np.asarray(row, dtype=np.float64)
    order = np.argsort(-logits, kind="stable")[: params.top_k]
    p = np.exp(logits[order] - logits[order[0]])
    p /= p.sum()
    kept = np.concatenate([[0.0], np.cumsum(p)[:-1]]) < params.top_p
    kept &= p >= params.min_p * p[0]
    weights = np.exp((logits[order] - logits[order[0]]) / params.temperature) * kept
    out = np.zeros(len(logits))
    out[order] = weights / weights.sum()
    return out


@pytest.mark.parametrize("temperature", [0.6, 0.8, 1.0])
def test_first_and_second_tokens_are_distributed_as_the_target_says(llm: Any, temperature: float) -> None:
    """Each seed draws the first token from one row, and the second from the row that follows that first token."""
    params = GenerationParams(temperature=temperature)
    first_row = llm.logits(PROMPT)[-1]
    expected = DRAWS * probabilities(llm, first_row, params)
    rows = {int(token): llm.logits([*PROMPT, int(token)])[-1] for token in np.flatnonzero(expected)}
    after = {token: probabilities(llm, row, params) for token, row in rows.items()}
    counts, seconds, expected_seconds = np.zeros(len(expected), np.int64), np.zeros(len(expected), np.int64), 0.0
    chain = Chain(llm._model, params, 0, lambda: None, draw_of(params, 0))
    for seed in range(DRAWS):
        chain.noise = Noise(seed)
        first = chain.sample(len(PROMPT), first_row)
        counts[first] += 1
        seconds[chain.sample(len(PROMPT) + 1, rows[first])] += 1
        expected_seconds = expected_seconds + after[first]
    assert surprise(counts, expected) < 4
    assert surprise(seconds, np.asarray(expected_seconds)) < 4
    wrong = expected ** (1 / 1.3)  # a control: a temperature that is off by 30 % is noticed
    assert surprise(counts, wrong * DRAWS / wrong.sum()) > 4


class Unsure(ModelDrafter):
    """Chains whose first token is wrong for every third token of the draft model."""

    name = "unsure"

    def propose(self, context: Context, n: int) -> Draft:
        chain = super().propose(context, n).tokens.tolist()
        return Draft.chain([abs(chain[0] - (chain[0] % 3 == 0)), *chain[1:]], self.name)


class Twigs(Unsure):
    """Trees: beside every token of such a chain a sibling that is wrong."""

    name, can_tree = "twigs", True

    def propose(self, context: Context, n: int) -> Draft:
        chain = super().propose(context, max(1, n // 2)).tokens.tolist()
        tokens = [token for right in chain for token in (abs(right - 1), right)]
        parents = [max(-1, 2 * (i // 2) - 1) for i in range(len(tokens))]
        return Draft.tree(tokens, parents, self.name)


def text(llm: Any, drafter: Any, plan: Plan | None, seed: int = 3, n: int = 60, **arguments: Any) -> list[int]:
    llm.speculate(drafter, True, plan)
    llm.set_seed(seed)
    return list(itertools.islice(llm.generate(PROMPT, **arguments), n))


@pytest.mark.parametrize("temperature", [0.6, 0.8, 1.0])
@pytest.mark.parametrize(("kind", "plan"), [(Unsure, Plan(2)), (Twigs, Plan(4, True))])
def test_verified_tokens_are_distributed_as_the_target_says(
    llm: Any, stock_model: Path, kind: type[ModelDrafter], plan: Plan, temperature: float
) -> None:
    """The second token comes from a batch with a draft, which is accepted or not."""
    params = GenerationParams(temperature=temperature)
    first = probabilities(llm, llm.logits(PROMPT)[-1], params)
    second = sum(
        first[token] * probabilities(llm, llm.logits([*PROMPT, int(token)])[-1], params)
        for token in np.flatnonzero(first)
    )
    expected = LOOP_DRAWS * np.array([first, second])
    counts, accepted = np.zeros(expected.shape, np.int64), 0
    with contextlib.closing(kind(stock_model, max_nodes=4)) as drafter:
        llm.speculate(drafter, True, plan)
        for seed in range(LOOP_DRAWS):
            llm.set_seed(seed)
            tokens = list(itertools.islice(llm.generate(PROMPT, temp=temperature), 3))
            counts[[0, 1], tokens[:2]] += 1
            accepted += llm.statistics()["accepted"] > 0
        llm.speculate(None)
    assert 0 < accepted < LOOP_DRAWS
    assert surprise(counts[0], expected[0]) < 4 and surprise(counts[1], expected[1]) < 4


GRAMMAR = 'root ::= ("ab" [0-9]+ " ")+'


@pytest.mark.parametrize(
    "arguments",
    [
        {"temp": 0.6}, {"temp": 1.0}, {"temp": -1.0},
        {"temp": 0.9, "repeat_penalty": 1.3, "presence_penalty": 0.2, "top_k": 20, "min_p": 0.02},
        {"temp": 0.8, "grammar": LlamaGrammar.from_string(GRAMMAR, verbose=False)},
        {"temp": 0.8, "mirostat_mode": 2},
    ],
)  # fmt: skip
def test_one_text_per_seed_whoever_drafts(llm: Any, stock_model: Path, arguments: dict[str, Any]) -> None:
    plain = text(llm, None, None, **arguments)
    assert text(llm, None, None, **arguments) == plain
    assert text(llm, None, None, seed=4, **arguments) != plain
    for drafter, plan in (
        (NGramDrafter((1,)), Plan(3)),
        (ModelDrafter(stock_model), Plan(4)),
        (Twigs(stock_model, max_nodes=8), Plan(8, True)),
    ):
        assert text(llm, drafter, plan, **arguments) == plain, drafter.name
        assert llm.statistics()["drafted"] > 0
        if drafter.can_tree:
            assert llm.statistics()["tree_steps"] > 0
        llm.speculate(None)
        drafter.close()


def test_a_drafter_that_knows_the_model_is_right_only_with_the_shared_noise(stock_model: Path) -> None:
    acceptance = {}
    for sampling in ("coupled", "stock"):
        with blockffn.Llama(stock_model, n_ctx=512, n_threads=1, sampling=sampling) as llm:
            text(llm, ModelDrafter(stock_model), Plan(3), n=150, temp=1.0, top_p=1.0)
            acceptance[sampling] = llm.statistics()["acceptance"]
    assert acceptance["coupled"] > 0.9 > 0.7 > acceptance["stock"]


def test_heads_draft_with_the_noise_in_chains_and_trees(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", n_embd=64, n_head=2, attention="gqa", n_ctx=512)
    blockffn.convert.convert_checkpoint(tmp_path / "source", tmp_path / "model.gguf", outtype="f32")
    convert_head(write_head(tmp_path / "head"), tmp_path / "model.gguf", tmp_path / "head.gguf", outtype="f32")
    with blockffn.Llama(tmp_path / "model.gguf", n_ctx=512, n_threads=1, exact=True) as llm:
        head = EagleDrafter(tmp_path / "head.gguf", llm)
        plain = text(llm, None, None, temp=0.8)
        assert text(llm, head, Plan(3), temp=0.8) == plain
        assert text(llm, head, Plan(20, True), temp=0.8) == plain and llm.statistics()["tree_steps"] > 0


def test_scores_for_drafters_keep_the_targets_candidates() -> None:
    """What is left of a row is what top-k, top-p and min-p leave; the largest of it is the target's own draw."""
    rows = np.random.default_rng(0).normal(0, 2, (50, 300)).astype(np.float32)
    params = GenerationParams(temperature=0.7, top_k=30, top_p=0.9, min_p=0.05)
    draw = Draw(Noise(5), params.temperature, params.top_k, params.top_p, params.min_p)
    for row in rows:
        scores = draw.scores(row[None], 9)[0]
        allowed = probabilities(None, row, params) > 0
        assert np.array_equal(np.isfinite(scores), allowed)
        noisy = np.where(allowed, row / params.temperature + Noise(5)(9, np.arange(300)), -np.inf)
        assert scores.argmax() == noisy.argmax()
    ids = np.arange(300)[::-1]
    assert ids[draw.scores(rows[:1, ::-1], 9, ids)[0].argmax()] == draw.scores(rows[:1], 9)[0].argmax()


def test_stock_draws_as_llama_cpp_does(stock_model: Path) -> None:
    import llama_cpp

    theirs = llama_cpp.Llama(str(stock_model), n_ctx=128, n_threads=1, seed=9, verbose=False, flash_attn=True)
    expected = list(itertools.islice(theirs.generate(PROMPT, temp=1.0), 20))
    theirs.close()
    with blockffn.Llama(stock_model, n_ctx=128, n_threads=1, seed=9, sampling="stock") as ours:
        assert list(itertools.islice(ours.generate(PROMPT, temp=1.0), 20)) == expected
    with blockffn.Llama(stock_model, n_ctx=128, n_threads=1, seed=9) as ours:
        assert list(itertools.islice(ours.generate(PROMPT, temp=1.0), 20)) != expected
    with pytest.raises(BlockffnError, match="sampling: expected one of coupled, stock, found 'other'"):
        blockffn.Llama(stock_model, sampling="other")
