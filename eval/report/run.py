"""Run the commands of a report's sections, keeping every result in a folder: an interrupted report goes on.

>>> from blockffn.eval.report.run import Result
>>> Result("ops", ["bench", "ops"], {"rows": []}, "", 1.5).shown
'$ blockffn bench ops'
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blockffn.eval.environment import ROOT
from blockffn.eval.report.sections import Section
from blockffn.whole_file import write_text

Say = Callable[[str], None]
WRONG_USAGE = 2  # exit code: this version has no such command or option


@dataclass(frozen=True)
class Result:
    """What one command gave: its JSON, or why there is none."""

    label: str
    words: list[str]
    found: dict[str, Any] | None
    failure: str
    seconds: float

    @property
    def shown(self) -> str:
        """The command as a line to type; files of the checkout by their relative paths."""
        prefix = f"{ROOT}{os.sep}"
        return "$ blockffn " + shlex.join(word.removeprefix(prefix) for word in self.words)


def run_section(section: Section, folder: Path, say: Say) -> list[Result] | None:
    """Return the results of a section; None where this version does not have its command.

    Results lie in `folder`, by command: what is there is not measured again, failures are.
    """
    results = []
    for label, words in section.words.items():
        kept = folder / f"{section.name}-{_fingerprint(words)}.json"
        result = _read(kept)
        say(f"{section.title}: {label}" + (", kept from before" if result else ""))
        if result is None:
            result = _run(label, words)
            if result is None:
                return None
            if not result.failure:
                write_text(kept, json.dumps(asdict(result)))
        results.append(result)
    return results


def _fingerprint(words: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]


def _run(label: str, words: list[str]) -> Result | None:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "blockffn", *words], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode == WRONG_USAGE:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    if done.returncode:
        return Result(label, words, None, f"exit code {done.returncode}: {lines[-1]}", seconds)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        return Result(label, words, None, f"expected a last line of JSON: {error}", seconds)
    return Result(label, words, found, "", seconds)


def _read(path: Path) -> Result | None:
    try:
        return Result(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
