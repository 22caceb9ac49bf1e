"""TLS and CLS_c against a count by hand, and through a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import blockffn
from blockffn.errors import BlockffnError
from blockffn.eval.quality.sparsity import of_activity


def test_by_hand() -> None:
    """One layer, five tokens, four experts: the fifth token belongs to no chunk of 2 or 4."""
    active = np.zeros((1, 5, 4), np.bool_)
    active[0, 0, 0] = active[0, 1, 0] = active[0, 2, 1] = active[0, 3, 2] = True
    active[0, 4, :] = True
    found = of_activity(active, (1, 2, 4, 5, 8))
    assert found.tls == pytest.approx(1 - 8 / 20)
    assert found.cls == pytest.approx({1: 1 - 8 / 20, 2: 1 - (1 + 2) / 8, 4: 1 - 3 / 4, 5: 0.0})
    assert 8 not in found.cls  # longer than the text


@pytest.mark.parametrize(("n_layers", "n_tokens", "n_experts"), [(1, 1, 1), (2, 9, 7), (3, 33, 42), (1, 65, 77)])
def test_against_a_plain_count(n_layers: int, n_tokens: int, n_experts: int) -> None:
    active = np.random.default_rng(n_tokens).random((n_layers, n_tokens, n_experts)) < 0.2
    found = of_activity(active)
    assert found.n_tokens == n_tokens and found.n_experts == n_experts
    for size, layers in found.layer_cls.items():
        for layer in range(n_layers):
            shares = [
                np.mean([active[layer, start : start + size, e].any() for e in range(n_experts)])
                for start in range(0, n_tokens - size + 1, size)
            ]
            assert layers[layer] == pytest.approx(1 - np.mean(shares))
    assert sorted(found.cls) == [size for size in (2, 4, 8, 16, 32, 64) if size <= n_tokens]
    assert found.to_dict()["tls"] == pytest.approx(1 - active.mean())


def test_through_a_model(blockffn_model: Path) -> None:
    llm = blockffn.Llama(str(blockffn_model), n_threads=1)
    tokens = llm.tokenize(b"for name in sorted(names):\n    print(name)")
    found = blockffn.eval.sparsity(llm, tokens)
    active = llm.active_experts(tokens)
    assert found.layer_tls.shape == (2,) and found.n_experts == 7
    assert found.tls == pytest.approx(1 - active.mean())
    assert found.tls >= found.cls[2] >= found.cls[4] >= found.cls[8]
    with pytest.raises(BlockffnError, match="at least one token"):
        blockffn.eval.sparsity(llm, [])
    with pytest.raises(BlockffnError, match="chunk size: expected a positive number"):
        blockffn.eval.sparsity(llm, tokens, [0])
    llm.close()


def test_a_dense_model_is_an_error(stock_model: Path) -> None:
    llm = blockffn.Llama(str(stock_model), n_threads=1)
    with pytest.raises(BlockffnError, match="no layer of this model has ReLU-routed experts"):
        blockffn.eval.sparsity(llm, [1, 2, 3])
    llm.close()
