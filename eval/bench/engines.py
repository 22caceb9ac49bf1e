"""Other engines beside ours at equal work: `blockffn bench peers --engine NAME=PATH/llama-bench`.

    $ blockffn bench peers --engine "ik=/opt/ik_llama.cpp/build/bin/llama-bench -rtr 1" --json

Every engine is a llama-bench, called with the same arguments in turn: n tokens at once for some n, then decoding. It
gets the qwen3moe file of blockffn.eval.planted.equal_work; ours runs its own file of the same matrices. "llama.cpp" is
the llama-bench of the patched tree on the stock file: on stock kernels.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blockffn import library
from blockffn.errors import BlockffnError
from blockffn.eval.planted.equal_work import EqualWork

SIZES = (1, 2, 4, 8, 16, 32, 128)  # tokens at once
DECODE = 32  # tokens
REPETITIONS = 3  # of every size within a turn
OURS, STOCK = "blockffn", "llama.cpp"

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Engine:
    """A llama-bench, the file that it runs, and options of its own."""

    name: str
    program: Path
    model: Path
    options: tuple[str, ...] = ()

    def run(self, threads: int, sizes: Sequence[int] = SIZES, decode: int = DECODE) -> list[Row]:
        """Return llama-bench's own entries, one per size and one for decoding, each with `samples_ts`.

        Errors: BlockffnError with the program's last words.
        """
        command = [str(self.program), "-m", str(self.model), "-t", str(threads), "-r", str(REPETITIONS), "-o", "json"]
        command += ["-p", ",".join(map(str, sizes)), "-n", str(decode), *self.options]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
            raise BlockffnError(f"engine {self.name}: {self.program} ended with code {done.returncode}: {lines[-1]}")
        return self._parse(done.stdout, len(sizes) + 1)

    def _parse(self, output: str, expected: int) -> list[Row]:
        start = output.find("[\n")  # some write other lines before it
        try:
            entries: list[Row] = json.JSONDecoder().raw_decode(output[max(start, 0) :])[0]
            found = [{key: entry[key] for key in ("n_prompt", "n_gen", "samples_ts")} for entry in entries]
        except (ValueError, KeyError, TypeError):
            found = []
        if len(found) != expected:
            raise BlockffnError(
                f"engine {self.name}: expected {expected} results in the JSON of llama-bench, found {len(found)}: "
                f"is {self.program} a llama-bench?"
            )
        return found


def parse_engine(text: str, model: Path) -> Engine:
    """Return the engine of one --engine: NAME=PATH, options of the program may follow the path."""
    name, _, rest = text.partition("=")
    words = shlex.split(rest)
    if not name or not words:
        raise BlockffnError(f"--engine: expected NAME=PATH/llama-bench, found {text!r}")
    program = Path(words[0])
    if not program.is_file():
        raise BlockffnError(f"--engine: {program}: no such file; give the path of a llama-bench")
    return Engine(name, program, model, tuple(words[1:]))


def engines(work: EqualWork, others: Sequence[str], directory: Path | None) -> list[Engine]:
    """Return ours, the patched tree on the stock file, and the others. directory: of our programs, None: the usual."""
    program = (directory or library.directory()) / "llama-bench"
    if not program.is_file():
        raise BlockffnError(f"{program}: no such program: build it with `make setup`")
    found = [Engine(OURS, program, work.ours), Engine(STOCK, program, work.stock)]
    found += [parse_engine(text, work.stock) for text in others]
    names = [engine.name for engine in found]
    if len(set(names)) < len(names):
        raise BlockffnError(f"--engine: every engine needs a name of its own, found {', '.join(names)}")
    return found


def measure(
    chosen: Sequence[Engine], threads: int, rounds: int, sizes: Sequence[int] = SIZES, say: Say = lambda line: None
) -> list[Row]:
    """Let all engines run in turn, in alternating order; return a row per engine and size: tokens per second."""
    samples: dict[tuple[str, str, int], list[float]] = {}
    for turn in range(rounds):
        for engine in chosen if turn % 2 == 0 else reversed(chosen):
            say(f"round {turn + 1} of {rounds}: {engine.name}")
            for entry in engine.run(threads, sizes):
                phase, n = ("decode", 1) if entry["n_gen"] else ("at once", entry["n_prompt"])
                samples.setdefault((engine.name, phase, n), []).extend(entry["samples_ts"])
    order = [("at once", n) for n in sizes] + [("decode", 1)]
    return [_row(engine, phase, n, samples[engine.name, phase, n]) for engine in chosen for phase, n in order]


def _row(engine: Engine, phase: str, n: int, speeds: Sequence[float]) -> Row:
    low, middle, high = np.percentile(speeds, [25, 50, 75])
    return {
        "engine": engine.name, "model": engine.model.name, "phase": phase, "n": n, "tokens_per_second": float(middle),
        "spread": float((high - low) / 2 / middle), "samples": len(speeds),
    }  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table: an engine per line, tokens per second; ours over it in brackets."""
    columns = list(dict.fromkeys((row["phase"], row["n"]) for row in rows))
    speeds = {(row["engine"], row["phase"], row["n"]): row["tokens_per_second"] for row in rows}
    first = rows[0]["engine"]
    names = [str(n) if phase == "at once" else phase for phase, n in columns]
    lines = [f"| tokens at once | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for engine in dict.fromkeys(row["engine"] for row in rows):
        cells = []
        for phase, n in columns:
            speed, ours = speeds[engine, phase, n], speeds[first, phase, n]
            cells.append(f"{speed:.0f}" if engine == first else f"{speed:.0f} ({ours / speed:.2f}x)")
        lines.append(f"| {engine} | {' | '.join(cells)} |")
    return "\n".join(lines)
