"""`blockffn inspect`: print what a GGUF model is, or what it would run on here."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from blockffn.commands.common import count
from blockffn.errors import BlockffnError
from blockffn.inspection import SAMPLE_TEXT, describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn inspect`."""
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("model", metavar="M.gguf", nargs="?", help="model file; of a split model, the first part")
    subject.add_argument("--system", action="store_true", help="instead: libraries, CPU backend, threads")
    parser.add_argument(
        "--measure",
        nargs="?",
        const="",
        metavar="FILE",
        help="load the model and measure sparsity and active parameters on a text (default: a built-in one)",
    )
    parser.add_argument(
        "--speculation", action="store_true", help="load the model, time steps of 1 to 32 tokens: will drafting pay?"
    )
    parser.add_argument("--plot", metavar="STEM", help="with --speculation: draw STEM.png and STEM.svg")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="of --speculation (default: physical cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if args.system:
        found = _system()
        print(json.dumps(found) if args.json else "\n".join(f"{name:<12} {value}" for name, value in found.items()))
        return 0
    text = None
    if args.measure is not None:
        text = Path(args.measure).read_text(encoding="utf-8", errors="replace") if args.measure else SAMPLE_TEXT
    if args.plot and not args.speculation:
        raise BlockffnError("--plot: needs --speculation")
    report = describe(args.model, text)
    advice = _advice(args) if args.speculation else None
    if advice is not None:
        report["speculation"] = advice.to_dict()
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _print(report)
        if advice is not None:
            from blockffn.eval.quality import advisor

            print(f"\n{advisor.describe(advice)}")
    return 0


def _system() -> dict[str, Any]:
    """Return what a model would run on: see `blockffn.eval.environment`, and what was built."""
    from blockffn import backends, library
    from blockffn.eval.environment import environment
    from blockffn.threads import default_threads

    low_level, directory = library.load(), library.directory()
    return environment() | {
        "variants": " ".join(backends.variants(directory)) or None,
        "features": low_level.llama_print_system_info().decode().strip(),
        "libraries": str(directory),
        "threads": default_threads(),
    }


def _advice(args: argparse.Namespace) -> Any:
    """Measure steps of the model, and draw what was found as asked."""
    import blockffn
    from blockffn.eval.progress import Shown
    from blockffn.eval.quality import advisor

    with blockffn.Llama(args.model, n_threads=args.threads) as llm:
        found = advisor.measure(llm, Shown("ms", "step"))
    if args.plot:
        from blockffn.eval.quality.pictures import advice

        for path in advice(found, args.plot):
            print(f"{path} drawn", file=sys.stderr)
    return found


def _print(report: dict[str, Any]) -> None:
    parts = f" in {report['files']} files" if report["files"] > 1 else ""
    print(f"{report['file']}: {report['architecture']}, {report['name'] or 'no name'}")
    print(f"{_bytes(report['file_bytes'])}{parts}, {report['bits_per_weight']:.2f} bits per weight")
    _section("hyper-parameters", report["hyper_parameters"])
    _section("router", report["router"] or {"none": "no routed experts"})
    if report["profile"]:
        _print_profile(report["profile"])
    _section("tokenizer", report["tokenizer"])
    _section("source", {k: v for k, v in report["general"].items() if k not in ("architecture", "name")})
    print("\ntensor types")
    for kind, row in report["tensor_types"].items():
        print(f"  {kind:<8} {row['tensors']:>5} tensors {row['elements']:>15,} weights {_bytes(row['bytes']):>12}")
    _section("parameters", {name: f"{value:,}" for name, value in report["parameters"].items()})
    if "measured" in report:
        _print_measured(report["measured"])


def _print_profile(profile: dict[str, Any]) -> None:
    union = ", ".join(f"{n}: {experts:.1f}" for n, experts in profile["union"].items())
    _section(
        "sparsity profile, stored in the file",
        {
            "tokens": profile["tokens"],
            "sparsity (TLS)": f"{100 * profile['tls']:.1f} %",
            "experts by tokens in a batch": union,
            "growth of a step with a token": f"{100 * profile['step_growth']:.1f} % of a plain step, if reading bound",
        },
    )


def _print_measured(measured: dict[str, Any]) -> None:
    def row(name: str, text: str) -> None:
        print(f"  {name:<30} {text}")

    def both(kind: str, size: str = "") -> str:
        all_experts, live = measured[kind], measured[f"live_{kind}"]
        shares = (all_experts, live) if not size else (all_experts[size], live[size])
        return f"{100 * shares[0]:.1f} %" + (
            "" if shares[1] is None else f", {100 * shares[1]:.1f} % of the live experts"
        )

    print(f"\nmeasured on {measured['tokens']} tokens")
    row("sparsity (TLS)", both("tls"))
    if "8" in measured["cls"]:
        row("sparsity of 8 tokens (CLS_8)", both("cls", "8"))
    row("dead experts", f"{measured['dead']} of {measured['routed_experts']}: no token activates them")
    row("always-on experts", f"{measured['always_on']}: more than 99 % of the tokens activate them")
    row("active parameters per token", f"{measured['active_parameters']:,}")


def _section(title: str, values: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, value in values.items():
        text = f"{value:.7g}" if isinstance(value, float) else str(value)  # files hold float32
        print(f"  {name:<30} {text if len(text) <= 80 else text[:77] + '...'}")


def _bytes(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB"
