"""How a model's router behaves on a text: sparsity, unions, use of every expert, local consistency.

    >>> import blockffn
    >>> llm = blockffn.Llama("model.gguf")                                # doctest: +SKIP
    >>> blockffn.eval.sparsity(llm, llm.tokenize(b"import os")).tls       # doctest: +SKIP
    0.81
    >>> profile(llm, tokens).union[8]                                     # doctest: +SKIP
    22.4

TLS and CLS_c (BlockFFN arXiv 2507.08771, section 3.2) are those of blockffn.sparsity, which the trainer and
`blockffn inspect --measure` share; SRP and SCH are in consistency.py.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from blockffn.errors import BlockffnError
from blockffn.eval.journal import Journal, fingerprint, text_fingerprint
from blockffn.eval.quality.consistency import Consistency, consistency
from blockffn.sparsity import CHUNKS, Sparsity, of_activity

if TYPE_CHECKING:
    from blockffn.llama import Llama

__all__ = ["Profile", "Sparsity", "profile", "profile_of", "sparsity"]

UNIONS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # tokens of a batch whose union is stated
Progress = Callable[[int, int, float], None]  # windows done, windows in all, TLS so far


@dataclass(frozen=True)
class Profile:
    """What a text says about a router."""

    sparsity: Sparsity
    consistency: Consistency
    window: int  # tokens that were evaluated together, from an empty cache
    usage: npt.NDArray[np.float64]  # share of the tokens that activate an expert, [n_moe_layers, n_experts]
    union: dict[int, float]  # tokens of a batch -> experts that at least one of them activates, mean over the layers
    layer_union: dict[int, npt.NDArray[np.float64]]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain Python values, for JSON."""
        figures = self.sparsity.to_dict() | self.consistency.to_dict()
        return figures | {
            "window": self.window,
            "union": {str(n): value for n, value in self.union.items()},
            "layer_union": {str(n): values.tolist() for n, values in self.layer_union.items()},
            "usage": self.usage.tolist(),
        }


def sparsity(llm: Llama, tokens: Sequence[int], chunks: Sequence[int] = CHUNKS) -> Sparsity:
    """Measure the sparsity of `llm` on a text of `tokens`, as the router inside llama.cpp chose.

    Errors: BlockffnError for an empty text, and for a model without routed experts.
    """
    if len(tokens) == 0:
        raise BlockffnError("sparsity: expected a text of at least one token, found none")
    return of_activity(llm.active_experts(tokens), chunks)


def profile(
    llm: Llama,
    tokens: Sequence[int],
    window: int = 512,
    progress: Progress | None = None,
    output: str | PathLike[str] | None = None,
) -> Profile:
    """Evaluate a text in windows and return its profile; an incomplete last window is dropped, a short text is one.

    output: a file that takes the choices of each window, with which a run goes on after an interruption. Memory: one
    byte for each token, layer and expert, beside one batch of logits. Errors: as `sparsity`, and BlockffnError for the
    file of another run and for a full disk.
    """
    if len(tokens) == 0:
        raise BlockffnError("sparsity: expected a text of at least one token, found none")
    window = min(window, len(tokens))
    starts = range(0, len(tokens) - window + 1, window)
    shape = (llm.n_moe_layers, window, llm.n_experts)
    active = np.zeros((shape[0], len(starts) * window, shape[2]), np.bool_)
    with Journal(output, _settings(llm, tokens, window) if output else {}) as journal:
        for done, start in enumerate(starts, 1):
            if len(journal.records) < done:
                journal.add({"active": _packed(llm.active_experts(tokens[start : start + window]))})
            active[:, start : start + window] = _unpacked(journal.records[done - 1]["active"], shape)
            if progress is not None and len(journal.records) == done:
                progress(done, len(starts), 1.0 - float(active[:, : start + window].mean()))
    return profile_of(active, window)


def _settings(llm: Llama, tokens: Sequence[int], window: int) -> dict[str, Any]:
    """Return what has to be the same for a run to go on."""
    text, model = text_fingerprint(tokens), fingerprint(llm.model_path)
    return {"measure": "sparsity", "model": model, "text": text, "window": window, "ffn": llm.ffn}


def _packed(active: npt.NDArray[np.bool_]) -> str:
    """Return choices as text: one bit each, compressed."""
    return base64.b64encode(zlib.compress(np.packbits(active).tobytes())).decode()


def _unpacked(text: str, shape: tuple[int, int, int]) -> npt.NDArray[np.bool_]:
    bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return np.unpackbits(bits, count=int(np.prod(shape))).astype(np.bool_).reshape(shape)


def profile_of(active: npt.NDArray[np.bool_], window: int = 0) -> Profile:
    """Return the profile of choices bool [n_moe_layers, n_tokens, n_experts], as `of_activity` takes them."""
    n_tokens, n_experts = active.shape[1:]
    window = window or n_tokens
    sizes = [n for n in UNIONS if n <= window]
    shares = of_activity(active, sizes, window).layer_cls
    layer_union = {n: (1.0 - layers) * n_experts for n, layers in shares.items()}
    return Profile(
        sparsity=of_activity(active, CHUNKS, window),
        consistency=consistency(active, window=window),
        window=window,
        usage=active.mean(axis=1),
        union={n: float(layers.mean()) for n, layers in layer_union.items()},
        layer_union=layer_union,
    )
