"""Quantization types of one model in one table: bits per weight, quality against the unquantized file, speed.

$ blockffn eval types model-F16.gguf -f text.txt --output types.jsonl --plot types
$ blockffn eval types examples/tiny-blockffn -f code.py --types Q8_0,Q4_0,IQ4_NL --rounds 0

MODEL is a GGUF of F32, F16 or BF16, or a checkpoint, which is converted to F32. The same command goes on after an
interruption. The quantized files lie beside the output until the run ends: as much disk as all of them take together.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from blockffn.commands.common import count
from blockffn.errors import BlockffnError
from blockffn.eval.commands.common import add_output, add_window, read_text, resumable
from blockffn.eval.progress import Progress
from blockffn.eval.types.measure import ROUNDS, TYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn eval types`."""
    parser.add_argument("model", metavar="MODEL", help="unquantized GGUF, or checkpoint folder")
    parser.add_argument("-f", "--file", required=True, metavar="FILE", help="text to evaluate, UTF-8")
    parser.add_argument("-n", "--max-tokens", type=count, metavar="N", help="quality on the first N tokens only")
    add_window(parser)
    parser.add_argument("--types", default=",".join(TYPES), metavar="T,T", help="default: %(default)s")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="of timing, 0 for none (default: 5)")
    add_output(parser, "result")
    parser.add_argument("--plot", metavar="STEM", help="write STEM.png and STEM.svg")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, then show everything."""
    from blockffn.eval.environment import environment, headline
    from blockffn.eval.types import report
    from blockffn.eval.types.measure import types
    from blockffn.threads import default_threads

    if args.rounds < 0:
        raise BlockffnError(f"--rounds: expected 0 or more, found {args.rounds}")
    threads = args.threads or default_threads()
    kinds = [kind for kind in args.types.split(",") if kind]
    with resumable(args.output):
        rows = types(
            args.model, read_text(args.file), kinds, n_ctx=args.ctx_size, max_tokens=args.max_tokens, threads=threads,
            rounds=args.rounds, output=args.output, progress=Shown(),
        )  # fmt: skip
    where = environment() | {"threads": threads, "model": Path(args.model).name, "window": args.ctx_size}
    title = f"{where['model']}, {headline(where, threads)}"
    if args.plot:
        for path in report.plot(rows, args.plot, title):
            print(f"{path} drawn", file=sys.stderr)
    print(json.dumps({"environment": where, "rows": rows}) if args.json else f"{title}\n{report.table(rows)}")
    return 0


class Shown:
    """Shows what `types` tells of, as a `Progress`; its first call says where the work begins."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._done = 0

    def __call__(self, done: int, total: int, what: str) -> None:
        """Show the state."""
        if self._progress is None:
            self._progress = Progress(total, "measurement", done)
        else:
            self._progress.step(done - self._done, what)
        self._done = done
        if done == total:
            self._progress.__exit__(None, None, None)
