"""What an expert activation costs in a whole model: NormSiLU beside SiLU, all weights equal, one run.

    $ blockffn bench activation --profile portable --json      # DECO-1.2B in Q4_0, made when missing

Two random models of a DECO shape (eval/planted) differ in nothing but expert_act_func, so that tokens, routing
and bytes are the same. They are timed as `blockffn bench` times its candidates: in turn, a process each, medians over
all steps. The last column is the time of NormSiLU over that of SiLU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from blockffn.commands.common import count
from blockffn.eval.bench import models as bench
from blockffn.eval.environment import PROFILES, environment, headline, profile_directory
from blockffn.eval.planted import files as planted_files
from blockffn.eval.planted import model as planted
from blockffn.threads import default_threads

ACTIVATIONS = ("norm_silu", "silu")
Row = dict[str, Any]


def compare(
    shape: planted.PlantedShape,
    kind: str,
    threads: int,
    rounds: int,
    timed: list[bench.Phase],
    directory: Path | None = None,
    folder: Path | None = None,
) -> list[Row]:
    """Time both models; one row per phase: phase, n, milliseconds per step and spread of each, and their ratio.

    Errors: BlockffnError for a shape without DECO experts, a full disk, or a model that does not load.
    """
    silu = planted.with_activation(shape, "silu")
    paths = [planted_files.files(each, ("expert",), kind, folder, _say)[0] for each in (shape, silu)]
    text = {"tokens": planted.text(shape, 4096)}
    result = bench.run([bench.Candidate(str(path), "union") for path in paths], text, threads, rounds, timed,
                       directory=directory, say=_say)  # fmt: skip
    return rows_of(result.rows, [path.name for path in paths])


def rows_of(rows: list[Row], names: list[str]) -> list[Row]:
    """Pair the rows of `blockffn bench` by phase; `names` are the model files in the order of ACTIVATIONS."""
    by_key = {(row["model"], row["phase"], row["n"]): row for row in rows}
    found = []
    for phase, n in dict.fromkeys((row["phase"], row["n"]) for row in rows):
        pair = [by_key[name, phase, n] for name in names]
        row: Row = {"phase": phase, "n": n, "samples": pair[0]["samples"]}
        for activation, one in zip(ACTIVATIONS, pair, strict=True):
            row[f"{activation}_ms"], row[f"{activation}_spread"] = one["step_ms"], one["spread"]
        found.append(row | {"ratio": pair[0]["step_ms"] / pair[1]["step_ms"]})
    return found


def table(rows: list[Row]) -> str:
    """Return the figures as text, a line per phase."""
    lines = ["phase         norm_silu, ms per step      silu, ms per step    ratio"]
    for row in rows:
        name = row["phase"] if row["phase"] == "decode" else f"{row['phase']} {row['n']}"
        cells = "".join(f"{row[f'{a}_ms']:14.2f} +-{100 * row[f'{a}_spread']:4.1f} %" for a in ACTIVATIONS)
        lines.append(f"{name:<12}{cells}{row['ratio']:10.3f}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn bench activation`."""
    shapes = [name for name, shape in planted.SHAPES.items() if shape.family == "deco"]
    parser.add_argument("--shape", choices=shapes, default="deco-1.2b", help="default: %(default)s")
    parser.add_argument("--type", default="Q4_0", metavar="TYPE", help="weight type (default: %(default)s)")
    parser.add_argument("--profile", choices=PROFILES, help="libraries of build/<profile> (default: the usual ones)")
    parser.add_argument("--threads", type=count, metavar="N", help="threads (default: physical cores)")
    parser.add_argument("--rounds", type=count, default=bench.ROUNDS, metavar="N", help="default: %(default)s")
    parser.add_argument("--verify", type=count, nargs="*", default=[4, 8, 32], metavar="N", help="tokens at once")
    parser.add_argument("--prefill", type=int, default=0, metavar="N", help="default: left out")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(options: argparse.Namespace) -> int:
    """Time both models, print the table and, on request, one line of JSON."""
    directory, threads = profile_directory(options.profile), options.threads or default_threads()
    timed = bench.phases(options.verify, options.prefill)
    shape = planted.shape_named(options.shape)
    rows = compare(shape, options.type, threads, options.rounds, timed, directory)
    where = environment(directory) | {"threads": threads, "rounds": options.rounds, "type": options.type}
    print(headline(where, threads))
    print(table(rows))
    if options.json:
        print(json.dumps({"environment": where, "rows": rows}))
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
