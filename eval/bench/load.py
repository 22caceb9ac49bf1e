"""How long a model takes from nothing to its first token, and the memory that it then holds.

    $ blockffn bench load -m model-Q4_0.gguf -m model-dense-Q4_0.gguf --rounds 5
    $ blockffn bench load -m model-Q4_0.gguf --cold         # the file is dropped from the page cache before each start

Every start is a process of its own: import of blockffn and its libraries, load of the model, evaluation of one token.
The models take turns; figures are medians. Weights in packed buffers (CPU_REPACK) are rewritten at load and count as
anonymous memory; the others stay mapped pages of the file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from blockffn.commands.common import count
from blockffn.errors import BlockffnError

STAGES = ("import", "load", "first_token")


def start(model: str, threads: int) -> dict[str, Any]:
    """Load the model in this process: seconds of each stage, memory in MB."""
    started = time.perf_counter()
    import blockffn

    llama = blockffn.Llama  # imports the libraries
    imported = time.perf_counter()
    with llama(model, n_ctx=512, n_threads=threads) as llm:
        loaded = time.perf_counter()
        llm.eval([max(0, llm.token_bos())])
        evaluated = time.perf_counter()
        from blockffn.eval.bench.worker import memory

        seconds = (imported - started, loaded - imported, evaluated - loaded)
        return dict(zip((f"{stage}_seconds" for stage in STAGES), seconds, strict=True)) | memory()


def measure(models: list[str], threads: int, rounds: int, cold: bool) -> list[dict[str, Any]]:
    """Return a row per model. Round 0 fills the page cache and is not counted."""
    found: dict[str, list[dict[str, Any]]] = {model: [] for model in models}
    for number in range(rounds + 1):
        for model in models:
            if cold:
                _drop(model)
            answer = _run(model, threads)
            if number:
                found[model].append(answer)
    return [_row(model, starts) for model, starts in found.items()]


def _run(model: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "blockffn.eval.bench.load", model, str(threads)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise BlockffnError(f"{model}: the process ended with code {done.returncode}: {lines[-1] if lines else ''}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer | {"process_seconds": time.perf_counter() - started}


def _drop(model: str) -> None:
    """Drop the clean pages of a file from the page cache."""
    with open(model, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _row(model: str, starts: list[dict[str, Any]]) -> dict[str, Any]:
    from blockffn.eval.bench.report import median_and_spread

    row: dict[str, Any] = {"model": Path(model).name, "file_size_mb": Path(model).stat().st_size / 1e6}
    for name in starts[0]:
        row[name], spread = median_and_spread([one[name] for one in starts])
        if name == "load_seconds":
            row["spread"] = spread
    return row | {"samples": len(starts)}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as text."""
    width = max(len(row["model"]) for row in rows)
    lines = ["model".ljust(width) + "    file MB  import s    load s      first token s   peak MB  anonymous MB"]
    for row in rows:
        stages = (row["import_seconds"], row["load_seconds"], row["spread"], row["first_token_seconds"])
        line = "{:10.2f}{:10.3f} +-{:3.0%}{:12.4f}".format(*stages)
        memory = f"{row['peak_rss_mb']:10.0f}{row['anonymous_mb']:14.0f}"
        lines.append(f"{row['model']:<{width}}{row['file_size_mb']:11.1f}{line}{memory}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn bench load`."""
    parser.add_argument("-m", "--model", action="append", required=True, metavar="M.gguf", help="may be repeated")
    parser.add_argument("--rounds", type=count, default=5, metavar="N", help="starts of each (default: %(default)s)")
    parser.add_argument("--cold", action="store_true", help="read the file from the disk each time")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Start every model, print the table and, on request, one line of JSON."""
    from blockffn.eval.environment import environment, headline
    from blockffn.threads import default_threads

    for path in args.model:
        if not Path(path).is_file():
            raise BlockffnError(f"{path}: no such file")
    threads = args.threads or default_threads()
    rows = measure(args.model, threads, args.rounds, args.cold)
    where = environment() | {"threads": threads, "rounds": args.rounds, "cold": args.cold}
    print(headline(where, threads) + (", file not in memory" if args.cold else ", file in memory"))
    print(table(rows))
    if args.json:
        print(json.dumps({"environment": where, "rows": rows}))
    return 0


if __name__ == "__main__":
    print(json.dumps(start(sys.argv[1], int(sys.argv[2]))))
