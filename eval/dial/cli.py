"""`blockffn eval dial`: perplexity and KL divergence against speed and union size, for thresholds and union budgets.

    $ blockffn eval dial -m model.gguf -f text.txt --output dial.json --plot dial     # dial.json, dial.png, dial.svg
    $ blockffn eval dial --shape 1.2b                                                 # speed alone: random weights

A run that was interrupted goes on where its --output file ends.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from blockffn.commands.common import count
from blockffn.errors import BlockffnError
from blockffn.eval.dial.points import THRESHOLDS, Point, Record, default_budgets, points

Value = TypeVar("Value", int, float)
SPEED_KEY, QUALITY_KEY = "decode_tokens_per_second", "kld_mean"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn eval dial`."""
    from blockffn.eval.planted.model import SHAPES

    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("-m", "--model", metavar="M.gguf", help="model file")
    model.add_argument("--shape", choices=tuple(SHAPES), help="random model of this shape: speed alone")
    parser.add_argument("-f", "--file", metavar="FILE", help="text to evaluate, UTF-8; goes with -m")
    parser.add_argument("-n", "--max-tokens", type=count, metavar="N", help="use the first N tokens only")
    parser.add_argument("-c", "--ctx-size", type=count, default=512, metavar="N", help="window (default: 512)")
    default = ",".join(f"{value:g}" for value in THRESHOLDS)
    parser.add_argument("--thresholds", metavar="T,T", help=f"default: {default}")
    parser.add_argument("--budgets", metavar="N,N", help="experts per layer of 8 tokens (default: 50 to 20 %% of them)")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")
    parser.add_argument("--past", type=count, default=128, metavar="N", help="tokens before those timed (default: 128)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of timing, 0 for none (default: 5)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the figures here; an interrupted run goes on")
    parser.add_argument("--plot", type=Path, metavar="STEM", help="write STEM.png and STEM.svg")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, then show everything."""
    from blockffn.eval.dial import report
    from blockffn.eval.environment import environment, headline
    from blockffn.threads import default_threads

    _check(args)
    threads = args.threads or default_threads()
    path, text, known = _model(args)
    import blockffn

    with blockffn.Llama(path, n_threads=threads, n_ctx=64) as llm:
        wanted = _points(args, llm)
        tokens = llm.tokenize(text, add_bos=True) if isinstance(text, bytes) else text
        tokens = tokens[: args.max_tokens] if args.max_tokens else tokens
        record = Record(args.output, _header(args, path, threads, tokens))
        record.environment = record.environment or environment() | {"threads": threads}
        if not known:
            _measure_quality(llm, tokens, args, wanted, record)
    missing = record.missing(wanted, SPEED_KEY)
    if missing and args.rounds:
        _measure_speed(path, tokens, known, threads, args, wanted, record)
    rows = [record.rows[point] for point in wanted if point in record.rows]
    title = f"{Path(path).name}, {headline(record.environment, threads)}"
    if args.plot:
        report.plot(rows, [args.plot.with_name(args.plot.name + suffix) for suffix in (".png", ".svg")], title)
    print(json.dumps(record.to_dict()) if args.json else f"{title}\n{report.table(rows)}")
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.shape and args.file:
        raise BlockffnError("--file: goes with -m; the weights of --shape are random, their text has no quality")
    if args.model and not args.file:
        raise BlockffnError("--file: expected the text to evaluate")
    if args.rounds < 0 or (args.shape and not args.rounds):
        raise BlockffnError(f"--rounds: expected a positive number, or 0 with -m; found {args.rounds}")


def _model(args: argparse.Namespace) -> tuple[str, bytes | list[int], bool]:
    """Return the model file, its text, and whether the text is the model's own (of random weights)."""
    if args.shape:
        from blockffn.eval.planted import files, model

        (path,) = files.files(model.shape_named(args.shape), ("expert",), "Q4_0", say=_say)
        return str(path), list(model.text(model.shape_named(args.shape), 4096 + args.past)), True
    try:
        return args.model, Path(args.file).read_text(encoding="utf-8").encode(), False
    except UnicodeDecodeError as error:
        raise BlockffnError(f"{args.file}: expected UTF-8 text: {error}") from error


def _points(args: argparse.Namespace, llm: Any) -> list[Point]:
    if not llm.has_relu_router:
        raise BlockffnError(f"{llm.model_path}: no layer of this model has ReLU-routed experts: there is no dial")
    thresholds = _values("--thresholds", args.thresholds, float, THRESHOLDS)
    return points(thresholds, _values("--budgets", args.budgets, int, default_budgets(llm.n_experts)))


def _values(name: str, text: str | None, kind: Callable[[str], Value], default: Any) -> list[Value]:
    try:
        return list(default) if text is None else [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise BlockffnError(f"{name}: expected numbers with commas between, found {text!r}") from error


def _header(args: argparse.Namespace, path: str, threads: int, tokens: list[int]) -> dict[str, Any]:
    """Return what has to be the same for a run to go on."""
    import hashlib

    digest = hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()
    header = {"model": Path(path).name, "model_bytes": Path(path).stat().st_size, "tokens": len(tokens)}
    return header | {"tokens_sha256": digest, "window": args.ctx_size, "threads": threads, "past": args.past}


def _measure_quality(
    llm: Any, tokens: list[int], args: argparse.Namespace, wanted: list[Point], record: Record
) -> None:
    from blockffn.eval.dial.measure import Quality

    quality = Quality(llm, tokens, args.ctx_size)
    missing = record.missing(wanted, QUALITY_KEY)
    for number, point in enumerate(missing, 1):
        _say(f"quality of {point.name}, {number} of {len(missing)}")
        record.add(point, quality.of(point))
    quality.close()


def _measure_speed(
    path: str,
    tokens: list[int],
    known: bool,
    threads: int,
    args: argparse.Namespace,
    wanted: list[Point],
    record: Record,
) -> None:
    """All points in turn, whatever the record holds of them: speeds of two runs do not compare."""
    from blockffn.eval.dial.measure import open_worker, speeds

    worker = open_worker(path, threads, args.past, tokens, known)
    try:
        for point, figures in speeds(worker, wanted, args.rounds, _say).items():
            record.add(point, figures)
    finally:
        worker.llm.close()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
