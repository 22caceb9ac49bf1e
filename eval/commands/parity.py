"""Logits, router choices and greedy text of a GGUF against its checkpoint in torch.

$ blockffn eval parity -m model.gguf --checkpoint folder
"""

from __future__ import annotations

import argparse

from blockffn.eval.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn eval parity`."""
    common.add_arguments(parser, text=False)
    parser.add_argument("--checkpoint", required=True, metavar="SRC", help="checkpoint folder or hub id")


def run(args: argparse.Namespace) -> int:
    """Print the report; exit code 1 when something is outside its bounds."""
    from blockffn.eval.quality.parity import verify

    text = common.read_text(args.file) if args.file else None
    report = verify(args.model, args.checkpoint, text, ffn=args.ffn, n_threads=args.threads)
    common.print_result(args, report.to_dict(), str(report))
    return 0 if report.passed else 1
