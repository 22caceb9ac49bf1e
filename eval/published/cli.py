"""`blockffn verify-published`: everything about one published checkpoint in one report.

    $ blockffn verify-published DECO-0.1B
    $ blockffn verify-published path/to/BlockFFN-XLarge --trust-remote-code --output reports

Downloads (a hub id, or the name of a checkpoint of SparseLLM), converts, compares the logits with the authors' code or
with our torch reference, measures sparsity and speed, and writes NAME.json and NAME.md, which can be sent as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from blockffn.commands.common import count
from blockffn.errors import BlockffnError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn verify-published`."""
    parser.add_argument("source", metavar="NAME|FOLDER", help="published checkpoint, hub id, or folder")
    parser.add_argument("--output", default="published", metavar="DIR", help="for the files (default: published)")
    parser.add_argument("-f", "--file", metavar="FILE", help="text to measure on (default: a module of Python)")
    parser.add_argument("--type", default="Q4_0", metavar="TYPE", help="weight type of the speeds (default: Q4_0)")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")
    parser.add_argument("--rounds", type=count, default=3, metavar="N", help="of the speeds (default: 3)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that the checkpoint carries, to compare"
    )
    parser.add_argument("--keep", action="store_true", help="keep the GGUF files")
    parser.add_argument("--json", action="store_true", help="print the report as JSON too")


def run(args: argparse.Namespace) -> int:
    """Make the report; exit code 1 when a step failed."""
    from blockffn.eval.published.report import STEPS, markdown
    from blockffn.eval.published.steps import OK, Options, verify_published
    from blockffn.quantize import canonical_type

    canonical_type(args.type)
    text = None if args.file is None else _read(Path(args.file))
    folder = Path(args.output)
    options = Options(folder, text, args.type, args.threads, args.rounds, args.trust_remote_code, args.keep, _say)
    report = verify_published(args.source, options)
    stem = report["checkpoint"]["result"]["name"]
    paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
    paths[0].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(markdown(report), encoding="utf-8")
    for name in STEPS:
        print(
            f"{name:<11} {report[name]['status']}" + (f": {report[name]['reason']}" if "reason" in report[name] else "")
        )
    print(f"wrote {paths[0]} and {paths[1]}")
    if args.json:
        print(json.dumps(report))
    return 0 if report["verdict"] == OK else 1


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BlockffnError(f"{path}: expected UTF-8 text ({error})") from error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
