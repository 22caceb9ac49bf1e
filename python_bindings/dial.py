"""The dial that ReLU routing offers: leave out experts with small scores, at run time, for speed.

>>> llm = blockffn.Llama("model.gguf", router_threshold=0.1, drafter="ngram")     # doctest: +SKIP
>>> llm.router_threshold = 0.0                     # the model as it was trained  # doctest: +SKIP
>>> llm.union_budget = 16                          # experts per verified batch   # doctest: +SKIP

Threshold: a token's experts whose |score| is below threshold times its largest are skipped. A token's result stays
independent of the other tokens of its batch. Budget: of a verified batch each layer computes the experts
with the largest sum of |score| over the tokens. A token's result then depends on the batch: exact mode refuses that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from blockffn import _capi, logs
from blockffn.errors import BlockffnError


def checked_threshold(value: float | None) -> float | None:
    """Return a threshold as a float, None for that of the file; BlockffnError outside 0 <= value < 1."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise BlockffnError(f"router_threshold: expected a number from 0 to less than 1, found {value!r}")
    return float(value)


def checked_budget(value: int, exact: bool) -> int:
    """Return a budget; BlockffnError for what is no number of experts, and for any in exact mode."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BlockffnError(f"union_budget: expected a number of experts, or 0 for no bound; found {value!r}")
    if value and exact:
        raise BlockffnError(
            f"union_budget: found {value} in exact mode, whose results must not depend on the batch; use "
            "router_threshold, which keeps that, or exact=False"
        )
    return value


def set_threshold(ctx: Any, value: float | None) -> None:
    """Set the threshold of a llama_context, None for that of the file; BlockffnError where its model has no router."""
    _call("router_threshold", "blockffn_set_router_threshold", ctx, -1.0 if value is None else value)


def threshold(ctx: Any) -> float:
    """Return the threshold in force in a llama_context."""
    return float(_capi.function("blockffn_router_threshold")(ctx))


@contextlib.contextmanager
def union_budget(ctx: Any, n_experts: int) -> Iterator[None]:
    """Let the batches of two tokens or more that are evaluated inside have this budget; 0: none."""
    _call("union_budget", "blockffn_set_union_budget", ctx, n_experts)
    try:
        yield
    finally:
        _capi.function("blockffn_set_union_budget")(ctx, 0)


def _call(name: str, function: str, ctx: Any, value: float) -> None:
    with logs.collect() as lines:
        done = _capi.function(function)(ctx, value)
    if not done:
        raise BlockffnError(f"{name}: {logs.reason(lines) or f'llama.cpp refuses {value}'}")
