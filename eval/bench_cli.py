"""`blockffn bench`: union against dense, the same weights in one run.

    $ blockffn bench --shape 1.2b                          # a random model of a published shape, made when missing
    $ blockffn bench -m model-Q4_0.gguf --dense model-dense-Q4_0.gguf --json

The honest dense baseline is a file of the dense layout (`blockffn convert --layout dense`), which stock llama.cpp runs
with plain matrix products in its best buffers. Without --dense the expert-layout file itself runs densely, which is
slower than that and says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from blockffn.commands.common import count
from blockffn.errors import BlockffnError
from blockffn.threads import physical_cores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn bench`."""
    from blockffn.eval import bench
    from blockffn.eval.environment import PROFILES
    from blockffn.eval.planted import SHAPES

    models = parser.add_mutually_exclusive_group()
    models.add_argument("-m", "--model", metavar="M.gguf", help="model in the expert layout")
    models.add_argument("--shape", choices=tuple(SHAPES), help="random model of this shape (default: 1.2b)")
    parser.add_argument("--dense", metavar="D.gguf", help="the same weights in the dense layout")
    parser.add_argument("--type", default="Q4_0", metavar="TYPE", help="weight type with --shape (default: Q4_0)")
    parser.add_argument("-f", "--file", metavar="FILE", help="text to run through the model of -m")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")
    parser.add_argument("--profile", choices=PROFILES, help="libraries of build/<profile> (default: BLOCKFFN_LIB_DIR)")
    parser.add_argument("--rounds", type=count, default=bench.ROUNDS, metavar="N", help=f"default: {bench.ROUNDS}")
    parser.add_argument(
        "--verify",
        default=",".join(map(str, bench.VERIFY)),
        metavar="N,N",
        help="tokens at once (default: %(default)s)",
    )
    parser.add_argument(
        "--prefill", type=int, default=bench.PREFILL, metavar="N", help="0 leaves it out (default: 512)"
    )
    parser.add_argument("--past", type=count, default=bench.PAST, metavar="N", help="tokens before (default: 128)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Make the models if needed, time them, print the table."""
    from blockffn.eval import bench
    from blockffn.eval.environment import environment, profile_directory

    directory = profile_directory(args.profile)
    candidates, text = _planted(args) if args.model is None else _given(args)
    threads = args.threads or physical_cores()
    timed = bench.phases(_sizes(args.verify), args.prefill)
    result = bench.run(candidates, text, threads, args.rounds, timed, args.past, directory, _say)
    where: dict[str, Any] = environment(directory) | {"threads": threads, "past": args.past, "rounds": args.rounds}
    where |= {"type": args.type if args.model is None else None, "buffers": result.buffers} | result.activity
    print(f"{where['cpu']}, {threads} threads, profile {where['profile']}, commit {where['commit']}")
    for label, buffers in result.buffers.items():
        print(f"{label:<6} weights in " + ", ".join(f"{name} {size:.0f} MiB" for name, size in buffers.items()))
    if result.activity:
        share = ", ".join(f"CLS_{size} {100 * value:.1f} %" for size, value in result.activity["cls"].items())
        print(f"text   TLS {100 * result.activity['tls']:.1f} %, {share}")
    print(bench.table(result))
    if args.json:
        print(json.dumps({"environment": where, "rows": result.rows}))
    return 0


def _planted(args: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    from blockffn.eval import planted, planted_files
    from blockffn.eval.bench import Candidate

    if args.dense or args.file:
        raise BlockffnError("--dense and --file: these go with -m; --shape makes both files and the text itself")
    files = planted_files.models(args.shape or "1.2b", args.type, say=_say)
    tokens = planted.text(files.shape, 4096)
    return [Candidate(str(files.union), "union"), Candidate(str(files.dense), "dense")], {"tokens": tokens}


def _given(args: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    from blockffn.eval.bench import Candidate
    from blockffn.inspection import SAMPLE_TEXT

    for path in (args.model, args.dense):
        if path is not None and not Path(path).is_file():
            raise BlockffnError(f"{path}: no such file")
    text = SAMPLE_TEXT if args.file is None else Path(args.file).read_text(encoding="utf-8")
    if args.dense is None:
        _say("note: dense runs the expert-layout file; give --dense a file of `blockffn convert --layout dense`")
    return [Candidate(args.model, "union"), Candidate(args.dense or args.model, "dense")], {"text": text}


def _sizes(value: str) -> list[int]:
    try:
        sizes = [int(part) for part in value.split(",") if part]
    except ValueError:
        sizes = [0]
    if any(not 1 < size <= 256 for size in sizes):
        raise BlockffnError(f"--verify: expected numbers of tokens from 2 to 256 with commas between, found {value!r}")
    return sizes


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
