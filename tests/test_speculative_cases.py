"""Drafts where a loop may go wrong unseen: LoRA adapters, large vocabularies, sampled text, unsure draft models."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_llama import N_VOCAB, write_llama

import blockffn
from blockffn.speculative import Context, ModelDrafter, ScriptedDrafter
from blockffn.speculative.model import probability
from blockffn.speculative.policy import Plan

PROMPT = [1, 50, 60, 70]
SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_batch": 64}


def text(llm: Any, n: int, prompt: list[int] = PROMPT, **sampling: Any) -> list[int]:
    return list(itertools.islice(llm.generate(prompt, **{"temp": 0.0, **sampling}), n))


def write_lora(path: Path, rank: int = 4) -> Path:
    """A random adapter of tiny_llama's first query matrix and last FFN matrix."""
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for name, n_out, n_in in (("blk.0.attn_q", 64, 64), ("blk.1.ffn_down", 64, 96)):
        writer.add_tensor(f"{name}.weight.lora_a", rng.standard_normal((rank, n_in)).astype(np.float32) / 8)
        writer.add_tensor(f"{name}.weight.lora_b", rng.standard_normal((n_out, rank)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_adapter_stays_when_trees_need_another_context(stock_model: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora.gguf")
    with blockffn.Llama(stock_model, exact=True, **SETTINGS) as llm:
        without = text(llm, 60)
    with blockffn.Llama(stock_model, exact=True, lora_path=str(lora), **SETTINGS) as llm:
        adapted, context = text(llm, 60), llm._ctx
        assert adapted != without
        for truth, accepted in ((adapted, 20), (without, 0)):
            drafter = ScriptedDrafter(PROMPT + truth, 0.8, N_VOCAB, branch=3)
            llm.speculate(drafter, True, Plan(12, tree=True))
            assert llm._ctx is not context
            assert text(llm, 60) == adapted
            assert llm.statistics()["tree_steps"] > 0 and llm.statistics()["accepted"] >= accepted


def test_a_large_vocabulary(tmp_path: Path) -> None:
    n_vocab = 73_440
    path = write_llama(tmp_path / "large.gguf", n_vocab=n_vocab, n_layer=1)
    with blockffn.Llama(path, exact=True, **SETTINGS) as llm:
        plain = text(llm, 40)
        assert max(plain) > N_VOCAB
        for plan in (Plan(5), Plan(12, tree=True)):
            llm.speculate(ScriptedDrafter(PROMPT + plain, 0.8, n_vocab, branch=3), True, plan)
            assert text(llm, 40) == plain and llm.statistics()["accepted"] > 10
        out = llm.create_completion(PROMPT, max_tokens=3, temperature=0.0, logprobs=1, logit_bias={2: -1000.0})
        for position, found in enumerate(out["choices"][0]["logprobs"]["token_logprobs"]):
            row = llm.logits(PROMPT + plain[:position])[-1]
            assert found == pytest.approx(np.log(probability(row, plain[position])), abs=0.02)
        drafter = ModelDrafter(path)
        llm.speculate(drafter, True, Plan(4))
        assert text(llm, 40) == plain and llm.statistics()["accepted"] > 20


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_sampled_tokens_have_the_models_distribution(stock_model: Path, tree: bool) -> None:
    """Chi-square of the tokens after an accepted draft and after a rejected one, in the default mode."""
    runs, top_k = 2400, 6
    with blockffn.Llama(stock_model, **SETTINGS) as llm:
        first = int(llm.logits(PROMPT)[-1].argmax())
        second = int(llm.logits([*PROMPT, first])[-1].argmax())
        truth = [*PROMPT, first, second, second, second]
        drafter = ScriptedDrafter(truth, 1.0, N_VOCAB, branch=3 if tree else 1)
        llm.speculate(drafter, plan=Plan(3, tree))
        seen: dict[tuple[int, ...], dict[int, int]] = {}
        for seed in range(runs):
            llm.set_seed(seed)
            tokens = text(llm, 3, temp=1.0, top_k=top_k, top_p=1.0, min_p=0.0)
            for n in range(3):
                counts = seen.setdefault(tuple(tokens[:n]), {})
                counts[tokens[n]] = counts.get(tokens[n], 0) + 1
        assert llm.statistics()["drafted"] > 0
        tested = [before for before, counts in seen.items() if sum(counts.values()) >= 100]
        assert () in tested and (first,) in tested and any(before[:1] not in ((), (first,)) for before in tested)
        for before in tested:
            logits = llm.logits([*PROMPT, *before])[-1]
            assert chi_square(seen[before], logits, top_k) < 27.0  # 5 degrees of freedom: 1 in 17,000
        assert chi_square(seen[()], llm.logits(PROMPT)[-1] / 1.5, top_k) > 27.0  # a control


def chi_square(counts: dict[int, int], logits: np.ndarray, top_k: int) -> float:
    """How far counts are from the softmax of the `top_k` largest logits; infinite where another token was seen."""
    likeliest = np.argsort(-logits)[:top_k].tolist()
    if set(counts) - set(likeliest):
        return np.inf
    shares = np.exp(logits[likeliest] - logits.max())
    expected = shares / shares.sum() * sum(counts.values())
    found = np.array([counts.get(token, 0) for token in likeliest])
    return float(((found - expected) ** 2 / expected).sum())


def test_a_draft_model_stops_where_it_is_unsure(stock_model: Path) -> None:
    with blockffn.Llama(stock_model, exact=True, **SETTINGS) as llm:
        plain = text(llm, 60)
        lengths = {}
        for p_min in (0.0, 0.3, 0.99):
            drafter = ModelDrafter(stock_model, max_nodes=4, p_min=p_min)
            llm.speculate(drafter, True, Plan(4))
            assert text(llm, 60) == plain
            lengths[p_min] = llm.statistics()["drafted"]
        assert lengths[0.0] > lengths[0.3] > lengths[0.99]
        tokens = [*PROMPT, *plain[:20]]
        sure = ModelDrafter(stock_model, max_nodes=4, p_min=0.3)
        sure.attach(llm)
        sure.begin(np.array(tokens, dtype=np.int32))
        for n in range(len(PROMPT), len(tokens)):
            draft = sure.propose(Context(np.array(tokens[:n], dtype=np.int32)), 4).tokens.tolist()
            rows = llm.logits(tokens[:n] + draft)
            chances = [probability(rows[n - 1 + i], int(rows[n - 1 + i].argmax())) for i in range(len(draft) + 1)]
            assert all(chance > 0.29 for chance in chances[:-1])
            assert len(draft) == 4 or chances[-1] < 0.31
        sure.close()
