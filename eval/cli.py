"""`blockffn eval`: what a model is worth, and whether a GGUF computes what its checkpoint computes.

$ blockffn eval ppl -m model.gguf -f text.txt
$ blockffn eval kld -m model-Q4_0.gguf --reference model-F16.gguf -f text.txt
$ blockffn eval sparsity -m model.gguf -f text.txt
$ blockffn eval parity -m model.gguf --checkpoint folder
$ blockffn eval spec-bench -m model.gguf --questions question.jsonl --output answers.jsonl
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockffn.commands.common import count
from blockffn.errors import BlockffnError

if TYPE_CHECKING:
    from blockffn.eval.quality.sparsity import Sparsity
    from blockffn.llama import Llama

OWN = {"spec-bench": "blockffn.eval.spec_bench.cli"}  # measures with a module of their own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn eval`."""
    measures = parser.add_subparsers(dest="measure", metavar="MEASURE", required=True)
    ppl = _measure(measures, "ppl", "perplexity on a text, by llama-perplexity's convention", text=True)
    _add_window(ppl)
    kld = _measure(measures, "kld", "KL divergence from a reference model on a text", text=True)
    kld.add_argument("--reference", required=True, metavar="R.gguf", help="model to compare with, usually F16 or F32")
    _add_window(kld)
    sparse = _measure(measures, "sparsity", "token- and chunk-level sparsity (TLS, CLS_c) on a text", text=True)
    sparse.add_argument("--layers", action="store_true", help="print every layer")
    parity = _measure(measures, "parity", "logits, router and greedy text against the checkpoint in torch", text=False)
    parity.add_argument("--checkpoint", required=True, metavar="SRC", help="checkpoint folder or hub id")
    _add_own(measures, "spec-bench", "Spec-Bench or SPEED-Bench: plain and speculative answers, speeds, texts")


def _add_own(measures: Any, name: str, summary: str) -> None:
    """Add a measure that has a module of its own for its arguments and its run."""
    parser: argparse.ArgumentParser = measures.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback")
    _own(name).add_arguments(parser)


def _own(name: str) -> Any:
    return importlib.import_module(OWN[name])


def _measure(measures: Any, name: str, summary: str, text: bool) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = measures.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.add_argument("-m", "--model", required=True, metavar="M.gguf", help="model file")
    parser.add_argument("-f", "--file", required=text, metavar="FILE", help="text to evaluate, UTF-8")
    parser.add_argument("-n", "--max-tokens", type=count, metavar="N", help="use the first N tokens only")
    parser.add_argument("--ffn", choices=("union", "dense"), default="union", help="sparse op or every expert")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback")
    return parser


def _add_window(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--ctx-size", type=count, default=512, metavar="N", help="window (default: 512)")


def run(args: argparse.Namespace) -> int:
    """Run one measure; exit code 1 when parity is outside its bounds."""
    if args.measure in OWN:
        return int(_own(args.measure).run(args))
    return {"ppl": _ppl, "kld": _kld, "sparsity": _sparsity, "parity": _parity}[args.measure](args)


def _ppl(args: argparse.Namespace) -> int:
    from blockffn.eval.quality.perplexity import perplexity

    llm = _open(args.model, args)
    try:
        result = perplexity(llm, _tokens(llm, args), args.ctx_size, _progress("perplexity"))
    finally:
        llm.close()
    text = f"perplexity {result.perplexity:.4f} +- {result.error:.4f}, {result.n_scored} tokens scored in "
    return _print(args, result.to_dict(), text + f"{result.n_windows} windows of {result.n_ctx}")


def _kld(args: argparse.Namespace) -> int:
    from blockffn.eval.quality.perplexity import divergence

    llm, reference = _open(args.model, args), _open(args.reference, args)
    try:
        result = divergence(llm, reference, _tokens(reference, args), args.ctx_size, _progress("mean KL divergence"))
    finally:
        llm.close()
        reference.close()
    lines = [
        f"KL divergence  mean {result.mean:.6f} +- {result.error:.6f}, median {result.median:.6f}, "
        f"99 % {result.percentile_99:.6f}, largest {result.largest:.6f} nats",
        f"top-1          {100 * result.top1:.2f} % agree",
        f"perplexity     {result.perplexity:.4f}, reference {result.reference_perplexity:.4f}",
        f"scored         {result.n_scored} tokens in {result.n_windows} windows of {result.n_ctx}",
    ]
    return _print(args, result.to_dict(), "\n".join(lines))


def _sparsity(args: argparse.Namespace) -> int:
    from blockffn.eval.quality.sparsity import sparsity

    llm = _open(args.model, args)
    try:
        result = sparsity(llm, _tokens(llm, args))
    finally:
        llm.close()
    return _print(args, result.to_dict(), describe_sparsity(result, args.layers))


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


def _parity(args: argparse.Namespace) -> int:
    from blockffn.eval.quality.parity import verify

    report = verify(args.model, args.checkpoint, _read(args.file) if args.file else None, ffn=args.ffn)
    _print(args, report.to_dict(), str(report))
    return 0 if report.passed else 1


def _open(path: str, args: argparse.Namespace) -> Llama:
    import blockffn

    llm: Llama = blockffn.Llama(path, ffn=args.ffn, n_threads=args.threads)
    return llm


def _tokens(llm: Llama, args: argparse.Namespace) -> list[int]:
    tokens = llm.tokenize(_read(args.file).encode(), add_bos=True)
    return tokens[: args.max_tokens] if args.max_tokens else tokens


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BlockffnError(f"{path}: expected UTF-8 text: {error}") from error


def _progress(name: str) -> Any:
    """Return a callback that keeps one line on a terminal up to date, and is quiet elsewhere."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int, value: float) -> None:
        end = "\n" if done == total else ""
        print(f"\r{done}/{total} windows, {name} {value:.4f}", end=end, file=sys.stderr, flush=True)

    return show


def _print(args: argparse.Namespace, figures: dict[str, Any], text: str) -> int:
    print(json.dumps(figures) if args.json else text)
    return 0
