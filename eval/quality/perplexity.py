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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from blockffn.errors import BlockffnError
from blockffn.eval.journal import Journal, fingerprint, text_fingerprint
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

    def figures(self) -> dict[str, Any]:
        """Return what tables of several variants of a model show, under their names."""
        return {
            "perplexity": self.perplexity,
            "kld_mean": self.mean,
            "kld_error": self.error,
            "kld_99": self.percentile_99,
            "top1": self.top1,
            "n_scored": self.n_scored,
        }

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

    def logit_rows(self, tokens: Sequence[int], first: int = 0) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield the logits after the tokens from `first` on, all at once: (first, float32 [rows, n_vocab])."""
        yield first, self._model.forward(tokens).logits.numpy()[first:]


def perplexity(
    llm: Llama,
    tokens: Sequence[int],
    n_ctx: int = 512,
    progress: Progress | None = None,
    output: str | PathLike[str] | None = None,
) -> Perplexity:
    """Return the perplexity of `llm` on a text. output: a file that takes each window, with which a run goes on.

    Errors: BlockffnError for a text shorter than one window, for the file of another run and for a full disk.
    """
    windows = list(_windows(llm, tokens, n_ctx))
    with Journal(output, _settings("ppl", llm, tokens, n_ctx) if output else {}) as journal:
        for window in _missing(journal, windows, "scores", progress, lambda mean: math.exp(-mean)):
            pieces = [metrics.log_likelihood(logits, targets) for logits, targets in _scored(llm, window)]
            journal.add({"scores": np.concatenate(pieces).tolist()})
        scores = _values(journal, "scores")
    value, error = _perplexity(scores)
    return Perplexity(value, error, len(scores), len(windows), n_ctx)


def divergence(
    llm: Llama,
    reference: Llama | TorchReference,
    tokens: Sequence[int],
    n_ctx: int = 512,
    progress: Progress | None = None,
    output: str | PathLike[str] | None = None,
) -> Divergence:
    """Return how far `llm` is from `reference` on a text; both evaluate one window, then the next.

    output: as for `perplexity`. Errors: BlockffnError as there, and for two vocabularies.
    """
    if llm.n_vocab() != reference.n_vocab():
        raise BlockffnError(
            f"{llm.model_path}: expected a vocabulary of {reference.n_vocab()} as in {reference.model_path}, "
            f"found {llm.n_vocab()}; compare models of one tokenizer"
        )
    windows = list(_windows(llm, tokens, n_ctx))
    settings = _settings("kld", llm, tokens, n_ctx) | {"reference": _named(reference.model_path)} if output else {}
    with Journal(output, settings) as journal:
        for window in _missing(journal, windows, "kl", progress, lambda mean: mean):
            journal.add(_compared(llm, reference, window))
        kl, same = _values(journal, "kl"), _values(journal, "same")
        own, theirs = _values(journal, "scores"), _values(journal, "reference_scores")
    return Divergence(
        mean=float(kl.mean()),
        error=_standard_error(kl),
        median=float(np.median(kl)),
        percentile_99=float(np.percentile(kl, 99)),
        largest=float(kl.max()),
        top1=float(np.mean(same)),
        perplexity=_perplexity(own)[0],
        reference_perplexity=_perplexity(theirs)[0],
        n_scored=len(kl),
        n_windows=len(windows),
        n_ctx=n_ctx,
    )


def _compared(llm: Llama, reference: Llama | TorchReference, window: npt.NDArray[np.int32]) -> dict[str, Any]:
    """Return the divergence and both log-likelihoods of every scored token of a window."""
    expected = np.concatenate([logits.copy() for logits, _ in _scored(reference, window)])  # [n_ctx / 2 - 1, n_vocab]
    parts: dict[str, list[Any]] = {"kl": [], "same": [], "scores": [], "reference_scores": []}
    done = 0
    for found, targets in _scored(llm, window):
        wanted = expected[done : done + len(found)]
        parts["kl"] += metrics.kl_divergence(found, wanted).tolist()
        parts["same"] += (found.argmax(axis=-1) == wanted.argmax(axis=-1)).tolist()
        parts["scores"] += metrics.log_likelihood(found, targets).tolist()
        parts["reference_scores"] += metrics.log_likelihood(wanted, targets).tolist()
        done += len(found)
    return parts


def _settings(measure: str, llm: Llama, tokens: Sequence[int], n_ctx: int) -> dict[str, Any]:
    """Return what has to be the same for a run to go on."""
    params = llm.context_params
    cache = None if llm.default_cache else [int(params.type_k), int(params.type_v)]
    return {
        "measure": measure, "model": _named(llm.model_path), "text": text_fingerprint(tokens), "window": n_ctx,
        "ffn": llm.ffn, "cache": cache, "threads": int(llm.n_threads),
    }  # fmt: skip


def _named(path: str) -> str:
    """Return what tells one model file, or one checkpoint folder, from another."""
    files = sorted(file for file in Path(path).iterdir() if file.is_file()) if Path(path).is_dir() else [path]
    return "; ".join(map(fingerprint, files))


def _missing(
    journal: Journal,
    windows: Sequence[npt.NDArray[np.int32]],
    key: str,
    progress: Progress | None,
    figure: Callable[[float], float],
) -> Iterator[npt.NDArray[np.int32]]:
    """Yield the windows that the journal lacks; tell of the mean of `key` after each."""
    total = count = 0.0
    for done, window in enumerate(windows, 1):
        if len(journal.records) < done:
            yield window  # whoever asks adds its record
        values = journal.records[done - 1][key]
        total, count = total + sum(values), count + len(values)
        if progress is not None and len(journal.records) == done:
            progress(done, len(windows), figure(total / count))


def _values(journal: Journal, key: str) -> npt.NDArray[np.float64]:
    return np.asarray([value for record in journal.records for value in record[key]], np.float64)


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
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]]:
    """Yield the logits [rows, n_vocab] of the second half of a window and the tokens that follow, batch by batch.

    They are n_ctx / 2 - 1 rows in all, each valid until the next ones.
    """
    for start, rows in llm.logit_rows(window.tolist(), len(window) // 2):
        targets = window[start + 1 : start + 1 + len(rows)]
        yield rows[: len(targets)], targets


def _perplexity(scores: npt.NDArray[np.float64]) -> tuple[float, float]:
    value = math.exp(-float(scores.mean()))
    return value, value * _standard_error(scores)


def _standard_error(values: npt.NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else float("nan")
