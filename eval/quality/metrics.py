"""How far two models' logits lie apart: normalised squared error, KL divergence, top-1 agreement, log-likelihood.

    >>> import numpy as np
    >>> from blockffn.eval.quality.metrics import nmse, top1_agreement
    >>> a = np.array([[1.0, 2.0, 4.0]]); b = np.array([[1.0, 2.0, 3.0]])
    >>> round(nmse(b, a), 4), top1_agreement(b, a)
    (0.0476, 1.0)

All arrays of logits are [n_tokens, n_vocab]; sums run in float64, a few rows at a time. What a row gives does not
depend on the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

PIECE = 8 << 20  # bytes of logits that are widened to float64 at a time: 8 rows of 122,753

Logits = npt.NDArray[np.floating[Any]]


def nmse(found: Logits, expected: Logits) -> float:
    """Return sum (found - expected)^2 / sum expected^2."""
    error = power = 0.0
    for a, b in _pieces(found, expected):
        error += float(np.square(a - b).sum())
        power += float(np.square(b).sum())
    return error / power if power > 0 else float(error > 0)


def kl_divergence(found: Logits, expected: Logits) -> npt.NDArray[np.float64]:
    """Return KL(expected || found) of the token distributions in nats, float64 [n_tokens]."""
    rows = []
    for a, b in _pieces(found, expected):
        log_found, log_expected = log_softmax(a), log_softmax(b)
        rows.append((np.exp(log_expected) * (log_expected - log_found)).sum(axis=-1))
    return np.concatenate(rows) if rows else np.zeros(0)


def top1_agreement(found: Logits, expected: Logits) -> float:
    """Return the share of tokens after which both models find the same token likeliest."""
    if len(expected) == 0:
        return float("nan")
    return float((found.argmax(axis=-1) == expected.argmax(axis=-1)).mean())


def log_likelihood(logits: Logits, targets: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Return ln p(target) after each row, float64 [n_tokens]; `targets` int32 [n_tokens] are the tokens that follow."""
    rows = []
    for piece in _slices(logits):
        wide = log_softmax(logits[piece].astype(np.float64))  # [rows, n_vocab]
        rows.append(np.take_along_axis(wide, targets[piece, None], axis=-1)[:, 0])
    return np.concatenate(rows) if rows else np.zeros(0)


def log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return ln softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _pieces(found: Logits, expected: Logits) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    if found.shape != expected.shape:
        raise ValueError(f"logits of one shape expected, found {found.shape} and {expected.shape}")
    for rows in _slices(expected):
        yield found[rows].astype(np.float64), expected[rows].astype(np.float64)


def _slices(logits: Logits) -> Iterator[slice]:
    """Yield slices of rows that take PIECE bytes as float64, at least one row each."""
    rows = max(1, PIECE // (8 * max(1, logits.shape[-1])))
    return (slice(start, start + rows) for start in range(0, len(logits), rows))
