"""Stock mixtures of experts have the same counters as ours: who chose whom, unions, sparsity, the advisor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from tiny_llama import write_llama

import blockffn
from blockffn.errors import BlockffnError
from blockffn.eval.quality import advisor
from blockffn.eval.quality.sparsity import profile
from blockffn.inspection import describe
from blockffn.profile import write_profile

EXPERTS, USED, LAYERS = 6, 2, 3
TOKENS = [1, *range(60, 90)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("mixture") / "m.gguf", n_layer=LAYERS, experts=(EXPERTS, USED))


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[blockffn.Llama]:
    with blockffn.Llama(path, n_ctx=256, n_threads=1) as opened:
        yield opened


def chosen_by_hand(path: Path, token: int) -> set[int]:
    """Return the experts that layer 0 chooses for a text of one token, which attends to itself alone."""
    weights = {tensor.name: np.asarray(tensor.data, np.float64) for tensor in GGUFReader(path).tensors}

    def norm(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x) + 1e-5)

    x = weights["token_embd.weight"][token]  # [n_embd]
    values = (weights["blk.0.attn_v.weight"] @ norm(x)).reshape(2, -1).repeat(2, axis=0).ravel()  # 4 heads share 2
    x = x + weights["blk.0.attn_output.weight"] @ values
    return set(np.argsort(-(weights["blk.0.ffn_gate_inp.weight"] @ norm(x)))[:USED].tolist())


def test_who_chose_whom(llm: blockffn.Llama, path: Path) -> None:
    assert (llm.n_moe_layers, llm.n_experts, llm.has_relu_router) == (LAYERS, EXPERTS, False)
    for token in (5, 77, 200):
        active = llm.active_experts([token])
        assert set(np.flatnonzero(active[0, 0]).tolist()) == chosen_by_hand(path, token)
    active = llm.active_experts(TOKENS)
    assert active.shape == (LAYERS, len(TOKENS), EXPERTS) and (active.sum(axis=2) == USED).all()
    assert np.array_equal(active[:, :7], llm.active_experts(TOKENS[:7]))  # causal


def test_unions(llm: blockffn.Llama) -> None:
    active = llm.active_experts(TOKENS)
    llm.speculate("ngram")  # whose loop counts
    llm.reset()
    llm.eval(TOKENS[:-8])
    before = llm.union_stats()
    llm.loop.target.evaluate_text(np.asarray(TOKENS[-8:], np.int32), len(TOKENS) - 8, slice(None))
    found = llm.union_stats() - before
    assert found.union_size.tolist() == active[:, -8:].any(axis=1).sum(axis=1).tolist()
    assert found.active_pairs.tolist() == [8 * USED] * LAYERS and found.evaluations.tolist() == [1] * LAYERS
    llm.speculate(None)


def test_sparsity_and_profile(llm: blockffn.Llama, path: Path, tmp_path: Path) -> None:
    found = profile(llm, TOKENS)
    assert found.sparsity.tls == pytest.approx(1 - USED / EXPERTS) and found.union[1] == pytest.approx(USED)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    write_profile(copy, {"tokens": len(TOKENS), "tls": found.sparsity.tls, "union": found.union})
    assert describe(copy)["profile"]["tls"] == pytest.approx(1 - USED / EXPERTS)


def test_advisor_counts_experts(path: Path) -> None:
    with blockffn.Llama(path, n_ctx=256, n_threads=1) as llm:
        found = advisor.measure(llm)
    assert found.n_experts == EXPERTS
    for context in found.contexts:
        assert context.union is not None and context.union[1] == USED <= context.union[32] <= EXPERTS


def test_there_is_no_dial(llm: blockffn.Llama) -> None:
    with pytest.raises(BlockffnError, match="no layer of this model has ReLU-routed experts"):
        llm.router_threshold = 0.1
    assert llm.router_threshold == 0.0
    with pytest.raises(BlockffnError, match="no layer of this model has ReLU-routed experts"):
        llm.union_budget = 3


def test_counting_changes_nothing(path: Path) -> None:
    with blockffn.Llama(path, n_ctx=256, n_threads=1) as llm:
        plain = llm.logits(TOKENS)
        llm.active_experts(TOKENS)
        assert np.array_equal(llm.logits(TOKENS), plain)
