"""Distances of logits against values computed by hand and by torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blockffn.eval.quality import metrics


@pytest.mark.parametrize(("n_tokens", "n_vocab"), [(1, 2), (3, 7), (64, 5), (65, 33), (130, 4)])
def test_against_torch(n_tokens: int, n_vocab: int) -> None:
    """More rows than one piece, odd sizes; float32 in, float64 inside."""
    rng = np.random.default_rng(n_tokens)
    expected = (5 * rng.standard_normal((n_tokens, n_vocab))).astype(np.float32)
    found = expected + rng.standard_normal(expected.shape).astype(np.float32)
    targets = rng.integers(0, n_vocab, n_tokens).astype(np.int32)
    a, b = torch.tensor(found).double(), torch.tensor(expected).double()
    assert metrics.nmse(found, expected) == pytest.approx(float((a - b).square().sum() / b.square().sum()))
    kl = torch.nn.functional.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(metrics.kl_divergence(found, expected), kl.numpy(), rtol=1e-9, atol=1e-12)
    likely = -torch.nn.functional.cross_entropy(a, torch.tensor(targets).long(), reduction="none")
    np.testing.assert_allclose(metrics.log_likelihood(found, targets), likely.numpy(), rtol=1e-9)
    assert metrics.top1_agreement(found, expected) == pytest.approx(
        float((a.argmax(-1) == b.argmax(-1)).double().mean())
    )


def test_equal_logits_have_no_distance() -> None:
    logits = np.array([[1.0, -3.0, 1e4], [0.0, 0.0, 0.0]], np.float32)
    assert metrics.nmse(logits, logits) == 0.0
    assert metrics.kl_divergence(logits, logits).tolist() == [0.0, 0.0]
    assert metrics.top1_agreement(logits, logits) == 1.0


def test_edges() -> None:
    """No rows, an expectation of zeros, two shapes."""
    none = np.zeros((0, 4), np.float32)
    assert metrics.kl_divergence(none, none).shape == (0,)
    assert metrics.log_likelihood(none, np.zeros(0, np.int32)).shape == (0,)
    assert np.isnan(metrics.top1_agreement(none, none))
    zeros = np.zeros((2, 3), np.float32)
    assert metrics.nmse(zeros, zeros) == 0.0 and metrics.nmse(zeros + 1, zeros) == 1.0
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        metrics.nmse(zeros, zeros.T)
