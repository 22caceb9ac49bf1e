"""`blockffn convert`: checkpoint folder or hub id -> GGUF.

$ blockffn convert BlockFFN-XLarge --outfile xlarge.gguf --outtype bf16 --verify
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from typing import NoReturn

from blockffn.convert.plan import OUTTYPES
from blockffn.errors import BlockffnError
from blockffn.gguf_contract import EXPERT_LAYOUTS

UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("src", metavar="SRC", help="checkpoint folder (config.json beside the weights), or a hub id")
    parser.add_argument("--outfile", required=True, metavar="M.gguf", help="file to write")
    parser.add_argument(
        "--target",
        metavar="TARGET",
        help="SRC is an EAGLE draft head: the checkpoint or GGUF of the model it drafts for",
    )
    parser.add_argument(
        "--draft-tokens",
        metavar="FILE",
        help="with --target: the head scores only the token ids in FILE (FR-Spec), the most frequent ones",
    )
    parser.add_argument("--outtype", choices=OUTTYPES, default="auto", help="type of the matrices (auto: as stored)")
    parser.add_argument(
        "--layout", choices=EXPERT_LAYOUTS, default="expert", help="experts contiguous (expert) or side by side (dense)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan, write nothing")
    parser.add_argument("--verify", action="store_true", help="compare the file in llama.cpp with the torch reference")
    parser.add_argument("--vocab-only", action="store_true", help="write metadata and tokenizer only")
    parser.add_argument(
        "--split-max-size", type=parse_size, default=0, metavar="SIZE", help="largest file, such as 500M or 2G"
    )
    parser.add_argument(
        "--metadata", metavar="FILE", help="JSON object of general.* keys to add, such as general.license"
    )


def parse_size(text: str) -> int:
    """Read a size with a decimal unit, ``2G`` = 2e9 bytes, as llama.cpp's tools do."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip().upper())
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 500M or 2G, found {text!r}")
    return int(match[1]) * UNITS[match[2]]


def run(args: argparse.Namespace) -> int:
    """Convert, print the report, and verify on request. Errors are raised as BlockffnError."""
    signal.signal(signal.SIGTERM, _terminate)
    _check_combinations(args)
    if args.target is not None:
        from blockffn.convert.eagle import convert_head

        report = convert_head(
            args.src,
            args.target,
            args.outfile,
            outtype=args.outtype,
            dry_run=args.dry_run,
            draft_tokens=args.draft_tokens,
        )
        for line in report.lines():
            print(line)
        return 0
    from blockffn.convert.convert import convert_checkpoint

    report = convert_checkpoint(
        args.src,
        args.outfile,
        outtype=args.outtype,
        layout=args.layout,
        dry_run=args.dry_run,
        split_max_size=args.split_max_size,
        metadata=args.metadata,
        vocab_only=args.vocab_only,
    )
    for line in report.lines():
        print(line)
    return _verify(str(report.files[0]), args.src) if args.verify else 0


def _terminate(*_: object) -> None:
    """End through the exception handlers, so that a partial file is removed; 143 is what shells report."""
    raise SystemExit(143)


def _check_combinations(args: argparse.Namespace) -> None:
    """Wrong combinations of options are wrong usage (exit code 2), as argparse's own errors are."""
    for other in ("dry_run", "vocab_only"):
        if args.verify and getattr(args, other):
            _usage(f"--verify needs a whole file; it does not go with --{other.replace('_', '-')}")
    if args.target is None:
        if args.draft_tokens is not None:
            _usage("--draft-tokens cuts the output matrix of a draft head; it needs --target")
        return
    for other in ("verify", "vocab_only", "split_max_size", "metadata"):
        if getattr(args, other):
            _usage(f"--{other.replace('_', '-')} is not for draft heads; it does not go with --target")
    if args.layout != "expert":
        _usage("--layout is about experts, which a draft head lacks; it does not go with --target")


def _usage(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _verify(gguf: str, src: str) -> int:
    """Compare with the torch reference; outside the bound of the type the command fails and names the file."""
    from blockffn.eval.quality.parity import verify

    sys.stdout.flush()
    report = verify(gguf, src)
    print(report)
    if not report.passed:
        raise BlockffnError(f"{gguf}: does not compute what {src} computes: {'; '.join(report.failures)}")
    return 0
