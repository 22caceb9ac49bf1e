"""`blockffn quantize`: make a smaller file, and say before writing how small it will really be."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from blockffn.inspection import bits_per_weight
from blockffn.quantize import PRESETS, TILED, TILED_X86, TYPES, Plan, bits, canonical_type, plan, quantize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn quantize`."""
    parser.add_argument("source", metavar="IN.gguf", help="F32, F16 or BF16 model")
    parser.add_argument("target", metavar="OUT.gguf", help="appears whole or not at all")
    parser.add_argument("type", metavar="TYPE", help=", ".join([*PRESETS, *TYPES]))
    parser.add_argument("--list-types", action=ListTypes, nargs=0, help="say what each type is, and where it is fast")
    parser.add_argument("--imatrix", metavar="F", help="importance matrix of llama-imatrix")
    parser.add_argument("--dry-run", action="store_true", help="print what would happen and write nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    kind = canonical_type(args.type)
    announce = (lambda steps: None) if args.json else announce_plan
    if args.dry_run:
        steps = plan(args.source, kind, args.imatrix)
        announce(steps)
        size = None
    else:
        with _Progress(quiet=args.json) as progress:
            steps = quantize(args.source, args.target, kind, args.imatrix, announce, progress.step)
        size = Path(args.target).stat().st_size
        if not args.json:
            print(f"{args.target}: {size / 1e6:.2f} MB, {steps.bits_per_weight:.2f} bits per weight")
    if args.json:
        print(json.dumps({**_report(steps), "target": None if size is None else args.target, "file_bytes": size}))
    return 0


class ListTypes(argparse.Action):
    """Prints the types and ends, as --help does: input, output and type are not asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print and end."""
        print(type_table())
        parser.exit()


def type_table() -> str:
    """Return a line for each type: bits per weight, and where products of several tokens have a fast kernel."""
    lines = [f"{name:<10} {preset.about}" for name, preset in PRESETS.items()]
    lines += ["", "type       bits   several tokens at once are fast"]
    for name, kind in TYPES.items():
        where = "on x86 and ARM" if kind in TILED else "on x86" if kind in TILED_X86 else "nowhere"
        lines.append(f"{name:<10} {bits(kind):5.2f}  {where}")
    lines += [
        "",
        "Rows of 64 and 128 cannot hold types of 256 values (all with K, IQ1 to IQ3, IQ4_XS): those tensors fall back.",
    ]
    return "\n".join(lines)


def announce_plan(steps: Plan) -> None:
    """Print nominal and actual bits per weight and the tensors that fall back."""
    source = bits_per_weight([tensor.source for tensor in steps.tensors])
    print(f"{steps.type}: nominal {steps.nominal_bits:.2f} bits per weight", end="")
    print(f", actual {steps.bits_per_weight:.2f} (source {source:.2f})")
    for kind, n_weights in steps.untiled.items():
        share = n_weights / sum(tensor.source.n_elements for tensor in steps.tensors)
        print(f"note: {kind} ({share:.0%} of the weights) has no fast kernel for several tokens; see --list-types")
    if not steps.fallbacks:
        print("every tensor gets the type it should")
        return
    n, total = len(steps.fallbacks), len(steps.tensors)
    print(f"{n} of {total} tensors fall back (without: {steps.bits_without_fallbacks:.2f} bits per weight):")
    for (name, row, wanted, given), layers in _grouped(steps).items():
        full = name.replace("*", ranges(layers)) if layers else name
        print(f"  {full:<40} rows of {row:>5} do not fit {wanted}: {given}")
    sys.stdout.flush()


def _grouped(steps: Plan) -> dict[tuple[str, int, str, str], list[int]]:
    """Return the layers of equal fallbacks, keyed by (name with * for the layer, row, wanted type, type)."""
    groups: dict[tuple[str, int, str, str], list[int]] = {}
    for tensor in steps.fallbacks:
        match = re.match(r"blk\.(\d+)\.", tensor.source.name)
        name = f"blk.*.{tensor.source.name[match.end() :]}" if match else tensor.source.name
        layers = groups.setdefault((name, tensor.source.shape[0], tensor.wanted, tensor.type), [])
        if match:
            layers.append(int(match[1]))
    return groups


def ranges(numbers: list[int]) -> str:
    """Return sorted numbers in short form.

    >>> ranges([0, 1, 2, 5])
    '{0-2,5}'
    >>> ranges([3])
    '3'
    """
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    text = ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return text if len(numbers) == 1 else f"{{{text}}}"


def _report(steps: Plan) -> dict[str, Any]:
    return {
        "type": steps.type,
        "nominal_bits_per_weight": steps.nominal_bits,
        "bits_per_weight": steps.bits_per_weight,
        "bits_per_weight_without_fallbacks": steps.bits_without_fallbacks,
        "fallbacks": [
            {"tensor": t.source.name, "row": t.source.shape[0], "wanted": t.wanted, "type": t.type}
            for t in steps.fallbacks
        ],
    }


class _Progress:
    """A bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Any = None
        self.last = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self, i: int, n: int, name: str) -> None:
        """Show that tensor `i` of `n` is being written."""
        if self.quiet:
            return
        if sys.stderr.isatty():
            self.bar = self.bar or tqdm(total=n, unit="tensor", leave=False)
            self.bar.update(i - self.bar.n)
        elif time.monotonic() - self.last > 5:
            self.last = time.monotonic()
            print(f"{i}/{n} {name}", file=sys.stderr)
