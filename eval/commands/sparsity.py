"""How sparse the router is on a text, per layer and expert: sparsity, unions, dead experts, local consistency.

$ blockffn eval sparsity -m model.gguf -f text.txt --layers --plot build/model
$ blockffn eval sparsity -m model.gguf -f text.txt --write-metadata

--plot STEM draws STEM-experts and STEM-union, each as png and svg. --write-metadata stores the profile in the model
file, where `blockffn inspect` shows it and the choice of drafts begins with it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockffn.eval.commands import common

if TYPE_CHECKING:
    from blockffn.eval.quality.consistency import Consistency
    from blockffn.eval.quality.sparsity import Profile, Sparsity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn eval sparsity`."""
    common.add_arguments(parser)
    common.add_window(parser)
    common.add_output(parser, "window")
    parser.add_argument("--layers", action="store_true", help="print every layer")
    parser.add_argument("--plot", metavar="STEM", help="draw STEM-experts and STEM-union, png and svg")
    parser.add_argument("--write-metadata", action="store_true", help="store the profile in the model file")


def run(args: argparse.Namespace) -> int:
    """Print the figures, draw and store them as asked."""
    from blockffn.eval.progress import Shown
    from blockffn.eval.quality.sparsity import profile

    with common.open_model(args.model, args) as llm, common.resumable(args.output):
        found = profile(llm, common.text_tokens(llm, args), args.ctx_size, Shown("TLS", "window"), args.output)
    if args.plot:
        _draw(found, args.plot)
    if args.write_metadata:
        from blockffn.profile import write_profile

        tokens = found.sparsity.n_tokens
        write_profile(args.model, {"tokens": tokens, "tls": found.sparsity.tls, "union": found.union})
        print(f"{args.model}: profile stored", file=sys.stderr)
    text = "\n".join([describe_sparsity(found.sparsity, args.layers), describe_rest(found)])
    return common.print_result(args, found.to_dict(), text)


def _draw(found: Profile, stem: str) -> None:
    from blockffn.eval.quality.pictures import heat_map, union_curve

    for path in [*heat_map(found, f"{stem}-experts"), *union_curve(found, f"{stem}-union")]:
        print(f"{path} drawn", file=sys.stderr)


def describe_rest(found: Profile) -> str:
    """Return the union curve and local consistency in words."""
    n_experts = found.sparsity.n_experts
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n in found.union]
    union = ", ".join(f"{n}: {found.union[n]:.1f}" for n in sizes)
    return "\n".join([f"experts of {n_experts} that n tokens need: {union}", *_consistency(found.consistency)])


def _consistency(found: Consistency) -> list[str]:
    lines = []
    for length, srp in found.srp.items():
        rates = ", ".join(f"SCH({rho:g}) {rate:.3f}" for rho, rate in found.sch[length].items())
        lines.append(f"segments of {length:>3} tokens: SRP {srp:.3f}, {rates}")
    return lines


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
