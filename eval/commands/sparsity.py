"""How sparse the router is on a text: token- and chunk-level sparsity, dead and always-on experts.

$ blockffn eval sparsity -m model.gguf -f text.txt --layers
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockffn.eval.commands import common

if TYPE_CHECKING:
    from blockffn.eval.quality.sparsity import Sparsity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn eval sparsity`."""
    common.add_arguments(parser)
    parser.add_argument("--layers", action="store_true", help="print every layer")


def run(args: argparse.Namespace) -> int:
    """Print the figures."""
    from blockffn.eval.quality.sparsity import sparsity

    with common.open_model(args.model, args) as llm:
        result = sparsity(llm, common.text_tokens(llm, args))
    return common.print_result(args, result.to_dict(), describe_sparsity(result, args.layers))


def describe_sparsity(result: Sparsity, layers: bool = False) -> str:
    """Return a table of TLS and CLS_c in percent over all and over live experts, and on request every MoE layer."""
    n_layers, n_experts = len(result.layer_tls), result.n_experts
    dead, always_on = int(result.layer_dead.sum()), int(result.layer_always_on.sum())
    total = n_layers * n_experts
    head = ["layer ", "   TLS", *(f"CLS_{size}".rjust(7) for size in result.layer_cls), "  dead always   sets"]
    rows: list[tuple[str, float | None, Sequence[float | None], str]] = [
        ("mean  ", result.tls, list(result.cls.values()), ""),
        ("live  ", result.live_tls, list(result.live_cls.values()), ""),
    ]
    for i in range(n_layers if layers else 0):
        counts = f"{result.layer_dead[i]:6} {result.layer_always_on[i]:6} {result.layer_sets[i]:6}"
        rows.append((f"{i:<6}", result.layer_tls[i], [values[i] for values in result.layer_cls.values()], counts))
    lines = [
        f"{result.n_tokens} tokens, {n_layers} layers of {n_experts} experts, in percent",
        f"{dead} of {total} experts are dead (no token activates them), {always_on} are always on (over 99 % of the "
        "tokens); live: without the dead ones",
        " ".join(head if layers else head[:-1]),
    ]
    for name, tls, rest, counts in rows:
        lines.append(" ".join([name, _percent(tls, 6), *(_percent(value, 7) for value in rest), counts]).rstrip())
    return "\n".join(lines)


def _percent(share: float | None, width: int) -> str:
    return "-".rjust(width) if share is None else f"{100 * share:{width}.2f}"
