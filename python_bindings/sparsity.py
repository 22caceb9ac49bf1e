"""How sparse a router is: token- and chunk-level sparsity, dead and always-on experts, from its choices on a text.

    >>> import numpy as np
    >>> from blockffn.sparsity import of_activity
    >>> active = np.zeros((1, 4, 5), bool)               # one layer, four tokens, five experts
    >>> active[0, :, 0] = active[0, 1, 1] = True         # expert 0 always, expert 1 once, three never
    >>> figures = of_activity(active)
    >>> figures.tls, figures.dead_share, figures.live_tls
    (0.75, 0.6, 0.375)

`blockffn eval sparsity`, `blockffn inspect --measure` and the trainer all report what this module computes.

TLS = 1 - mean share of experts that one token activates. CLS_c = 1 - mean share of experts that at least one of c
consecutive tokens activates, over disjoint chunks; an incomplete last chunk is dropped (BlockFFN arXiv 2507.08771,
section 3.2). Both are means over all layers of experts, and both reward a router whose choice is constant: experts
that never run and experts that always run cost nothing in either. Hence the figures beside them: an expert is dead when
no token of the text activates it and always on when more than 99 % of the tokens do; live_tls and live_cls are TLS and
CLS_c over the experts that are not dead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from blockffn.errors import BlockffnError

CHUNKS = (2, 4, 8, 16, 32, 64)  # tokens per chunk, the sizes that both papers report
ALWAYS = 0.99  # an expert is always on when more than this share of the tokens activates it

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sparsity:
    """The figures, per layer of experts (arrays of length n_moe_layers) and as means over the layers."""

    n_tokens: int
    n_experts: int
    layer_tls: Floats
    layer_cls: dict[int, Floats]  # chunk size -> per layer; sizes longer than the text are absent
    layer_live_tls: Floats  # NaN where every expert of the layer is dead
    layer_live_cls: dict[int, Floats]
    layer_dead: Counts  # experts that no token activates
    layer_always_on: Counts  # experts that more than 99 % of the tokens activate
    layer_sets: Counts  # distinct active sets among the tokens; a collapsed router has few

    @property
    def tls(self) -> float:
        """Token-level sparsity, mean over layers."""
        return float(self.layer_tls.mean())

    @property
    def cls(self) -> dict[int, float]:
        """Chunk-level sparsity per chunk size, mean over layers."""
        return {size: float(layers.mean()) for size, layers in self.layer_cls.items()}

    @property
    def live_tls(self) -> float | None:
        """TLS over the experts that are not dead, mean over the layers that have any; None when no layer has."""
        return _mean(self.layer_live_tls)

    @property
    def live_cls(self) -> dict[int, float | None]:
        """CLS per chunk size over the experts that are not dead, as `live_tls`."""
        return {size: _mean(layers) for size, layers in self.layer_live_cls.items()}

    @property
    def dead_share(self) -> float:
        """Share of all experts of all layers that no token activates."""
        return float(self.layer_dead.mean()) / self.n_experts

    @property
    def always_on_share(self) -> float:
        """Share of all experts of all layers that more than 99 % of the tokens activate."""
        return float(self.layer_always_on.mean()) / self.n_experts

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain Python values, for JSON."""
        return {
            "n_tokens": self.n_tokens,
            "n_experts": self.n_experts,
            "tls": self.tls,
            "cls": _named(self.cls),
            "live_tls": self.live_tls,
            "live_cls": _named(self.live_cls),
            "dead_share": self.dead_share,
            "always_on_share": self.always_on_share,
            "layer_tls": self.layer_tls.tolist(),
            "layer_cls": {str(size): layers.tolist() for size, layers in self.layer_cls.items()},
            "layer_live_tls": _values(self.layer_live_tls),
            "layer_live_cls": {str(size): _values(layers) for size, layers in self.layer_live_cls.items()},
            "layer_dead": self.layer_dead.tolist(),
            "layer_always_on": self.layer_always_on.tolist(),
            "layer_sets": self.layer_sets.tolist(),
        }


def of_activity(active: npt.NDArray[np.bool_], chunks: Sequence[int] = CHUNKS, window: int = 0) -> Sparsity:
    """Return the sparsity of choices bool [n_moe_layers, n_tokens, n_experts].

    window: the tokens are texts of `window` tokens each, and no chunk crosses from one to the next; 0: one text.
    Errors: BlockffnError for no tokens, a chunk size below 1 and a number of tokens that is no multiple of `window`.
    """
    _, n_tokens, n_experts = active.shape
    window = window or n_tokens
    if n_tokens == 0 or n_tokens % window:
        raise BlockffnError(f"sparsity: expected a text, or windows of {window} tokens, found {n_tokens} tokens")
    uses = active.sum(axis=1)  # [L, E]: tokens per expert
    live = (uses > 0).sum(axis=1)  # [L]
    layer_cls, layer_live_cls = {}, {}
    for size in chunks:
        if size < 1:
            raise BlockffnError(f"chunk size: expected a positive number of tokens, found {size}")
        if size <= window:
            used = _chunk_share(active, size, window)  # [L]
            layer_cls[size], layer_live_cls[size] = 1.0 - used, _live(used, live, n_experts)
    share = active.mean(axis=(1, 2))  # [L]
    return Sparsity(
        n_tokens=n_tokens,
        n_experts=n_experts,
        layer_tls=1.0 - share,
        layer_cls=layer_cls,
        layer_live_tls=_live(share, live, n_experts),
        layer_live_cls=layer_live_cls,
        layer_dead=n_experts - live,
        layer_always_on=(uses > ALWAYS * n_tokens).sum(axis=1),
        layer_sets=np.array([len(np.unique(np.packbits(layer, axis=1), axis=0)) for layer in active], np.int64),
    )


def _chunk_share(active: npt.NDArray[np.bool_], size: int, window: int) -> Floats:
    """Per layer the mean share of experts that some token of a chunk activates: [L]."""
    n_layers, n_tokens, n_experts = active.shape
    n_chunks = window // size
    windows = active.reshape(n_layers, n_tokens // window, window, n_experts)[:, :, : n_chunks * size]
    chunked = windows.reshape(n_layers, -1, size, n_experts)  # [L, chunks, size, E]
    share: Floats = chunked.any(axis=2).mean(axis=(1, 2))
    return share


def _live(share: Floats, live: Counts, n_experts: int) -> Floats:
    """1 - share, where the share of all experts becomes one of the live ones; NaN for a layer without any: [L]."""
    return np.where(live > 0, 1.0 - share * n_experts / np.maximum(live, 1), np.nan)


def _mean(layers: Floats) -> float | None:
    return None if np.isnan(layers).all() else float(np.nanmean(layers))


def _values(layers: Floats) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in layers]


def _named(sizes: dict[int, Any]) -> dict[str, Any]:
    return {str(size): value for size, value in sizes.items()}
