"""Perplexity of a model on a text, and KL divergence of one model from another, window by window in bounded memory.

    >>> from blockffn.eval.quality.perplexity import perplexity
    >>> perplexity(llm, llm.tokenize(b"..."), n_ctx=512).perplexity      # doctest: +SKIP
    7.31

The convention is llama-perplexity's: disjoint windows of n_ctx tokens, the incomplete last one dropped, the first
token of each replaced by the begin-of-text token where the model's texts begin with one, and only the second half of a
window scored, so that every scored token has at least n_ctx / 2 tokens before it. Nothing is written to disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from blockffn.errors import BlockffnError
from blockffn.eval.quality import metrics

if TYPE_CHECKING:
    from blockffn.llama import Llama

Progress = Callable[[int, int, float], None]  # windows done, windows in all, the figure so far


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood; `error` is its standard error."""

    perplexity: float
    error: float
    n_scored: int
    n_windows: int
    n_ctx: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain Python values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) in nats over the scored tokens, and how often the likeliest token is the same."""

    mean: float
    error: float  # standard error of the mean
    median: float
    percentile_99: float
    largest: float
    top1: float
    perplexity: float
    reference_perplexity: float
    n_scored: int
    n_windows: int
    n_ctx: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain Python values, for JSON."""
        return asdict(self)


class TorchReference:
    """A checkpoint in torch float32 as the reference of `divergence`; a window is evaluated at once."""

    def __init__(self, src: str | PathLike[str]) -> None:
        from blockffn.training.model import ReferenceModel

        self.model_path = str(src)
        self._model = ReferenceModel.from_checkpoint(src)

    def n_vocab(self) -> int:
        """Return the number of tokens."""
        return int(self._model.config.n_vocab)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits after every token, float32 [n_tokens, n_vocab]."""
        found: npt.NDArray[np.float32] = self._model.forward(tokens).logits.numpy()
        return found


def perplexity(llm: Llama, tokens: Sequence[int], n_ctx: int = 512, progress: Progress | None = None) -> Perplexity:
    """Return the perplexity of `llm` on a text. Errors: BlockffnError for a text shorter than one window."""
    scores: list[npt.NDArray[np.float64]] = []
    windows = list(_windows(llm, tokens, n_ctx))
    for done, window in enumerate(windows, 1):
        logits, targets = _scored(llm, window)
        scores.append(metrics.log_likelihood(logits, targets))
        if progress is not None:
            progress(done, len(windows), math.exp(-float(np.concatenate(scores).mean())))
    value, error = _perplexity(np.concatenate(scores))
    return Perplexity(value, error, sum(map(len, scores)), len(windows), n_ctx)


def divergence(
    llm: Llama,
    reference: Llama | TorchReference,
    tokens: Sequence[int],
    n_ctx: int = 512,
    progress: Progress | None = None,
) -> Divergence:
    """Return how far `llm` is from `reference` on a text; both evaluate one window, then the next.

    Errors: BlockffnError for a text shorter than one window and for two vocabularies.
    """
    if llm.n_vocab() != reference.n_vocab():
        raise BlockffnError(
            f"{llm.model_path}: expected a vocabulary of {reference.n_vocab()} as in {reference.model_path}, "
            f"found {llm.n_vocab()}; compare models of one tokenizer"
        )
    kl, same, own, theirs = [], [], [], []
    windows = list(_windows(llm, tokens, n_ctx))
    for done, window in enumerate(windows, 1):
        found, targets = _scored(llm, window)
        expected, _ = _scored(reference, window)
        kl.append(metrics.kl_divergence(found, expected))
        same.append(metrics.top1_agreement(found, expected))
        own.append(metrics.log_likelihood(found, targets))
        theirs.append(metrics.log_likelihood(expected, targets))
        if progress is not None:
            progress(done, len(windows), float(np.concatenate(kl).mean()))
    values = np.concatenate(kl)
    return Divergence(
        mean=float(values.mean()),
        error=_standard_error(values),
        median=float(np.median(values)),
        percentile_99=float(np.percentile(values, 99)),
        largest=float(values.max()),
        top1=float(np.mean(same)),
        perplexity=_perplexity(np.concatenate(own))[0],
        reference_perplexity=_perplexity(np.concatenate(theirs))[0],
        n_scored=len(values),
        n_windows=len(windows),
        n_ctx=n_ctx,
    )


def _windows(llm: Llama, tokens: Sequence[int], n_ctx: int) -> Iterator[npt.NDArray[np.int32]]:
    """Yield the windows, int32 [n_ctx]."""
    if n_ctx < 4:
        raise BlockffnError(f"window: expected at least 4 tokens, found {n_ctx}")
    if len(tokens) < n_ctx:
        raise BlockffnError(
            f"the text has {len(tokens)} tokens, one window needs {n_ctx}; give a longer text or a smaller --ctx-size"
        )
    ids, bos = np.asarray(tokens, np.int32), _first_token(llm)
    for start in range(0, len(ids) - n_ctx + 1, n_ctx):
        window = ids[start : start + n_ctx].copy()
        if bos >= 0:
            window[0] = bos
        yield window


def _first_token(llm: Llama) -> int:
    """Return the token that texts of this model begin with; -1 for none, whatever token the vocabulary has for it."""
    return int(llm.token_bos()) if llm._model.add_bos_token() else -1


def _scored(
    llm: Llama | TorchReference, window: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Return the logits [n_ctx / 2 - 1, n_vocab] of the second half of a window and the tokens that follow them."""
    first = len(window) // 2
    return llm.logits(window.tolist())[first:-1], window[first + 1 :]


def _perplexity(scores: npt.NDArray[np.float64]) -> tuple[float, float]:
    value = math.exp(-float(scores.mean()))
    return value, value * _standard_error(scores)


def _standard_error(values: npt.NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else float("nan")
