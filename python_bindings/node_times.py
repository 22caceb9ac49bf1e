"""What the kinds of nodes of a step took on the CPU backend: a context's timing, switched on and read.

>>> switch(llm.ctx, True)                                   # doctest: +SKIP
>>> llm.logits(tokens)                                      # doctest: +SKIP
>>> read(llm.ctx)[0]                                        # doctest: +SKIP
NodeTime(op='RMS_NORM', label='norm', n_nodes=70, work_ms=0.31, wait_ms=0.02)

`blockffn bench --ops` shows it. Off unless switched on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from blockffn import _capi
from blockffn.errors import BlockffnError


class NodeTime(NamedTuple):
    """The nodes of one op and label since timing was switched on; times are means over the threads.

    label: the weight that is read, else the node's name, without the layer. wait_ms: at the barrier behind the node.
    """

    op: str
    label: str
    n_nodes: int
    work_ms: float
    wait_ms: float


def switch(ctx: Any, on: bool) -> None:
    """Switch timing on, with all sums at zero, or off. ctx: a llama_context."""
    if not _capi.function("blockffn_times_enable")(ctx, on):
        raise BlockffnError("the CPU backend of this library cannot time nodes: run `make setup` for the patched one")


def read(ctx: Any) -> list[NodeTime]:
    """Return the sums since timing was switched on, in the order of the graph."""
    native = _capi.function("blockffn_times")
    found = (_capi.NodeTime * native(ctx, None, 0))()
    native(ctx, found, len(found))
    return [
        NodeTime(entry.op.decode(), entry.label.decode(), entry.n_nodes, entry.work_ns / 1e6, entry.wait_ns / 1e6)
        for entry in found
    ]
