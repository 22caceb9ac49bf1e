"""The answer files of a run: one JSON object a line and question, in Spec-Bench's schema, for each of the two runs.

    answers = AnswerFiles("answers.jsonl")          # and answers-baseline.jsonl
    answers.open(settings.stamp(), questions)       # reads what an earlier run has left
    answers.add(records)

A question is done when both files have its line. The baseline's line is written first, so a run that is killed between
the two leaves a line that the next run drops; so it does with a line that was cut in the middle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blockffn.errors import BlockffnError
from blockffn.eval.spec_bench.questions import Question
from blockffn.eval.spec_bench.session import RUNS, Record


class AnswerFiles:
    """The two files; `records` holds what they hold: question id -> run -> record."""

    def __init__(self, path: str | Path) -> None:
        speculative = Path(path)
        self.paths = {
            "baseline": speculative.with_name(f"{speculative.stem}-baseline{speculative.suffix}"),
            "speculative": speculative,
        }
        self.records: dict[int | str, dict[str, Record]] = {}

    def open(self, stamp: dict[str, Any], questions: Sequence[Question]) -> int:
        """Read what an earlier run has left and drop what it did not finish; return the number of questions done.

        Errors: BlockffnError for a file that is not of such a run, or of one with other settings.
        """
        for path in self.paths.values():  # before the model is loaded: may the answers be written there?
            path.open("ab").close()
        wanted = {question.id for question in questions}
        found = {name: _read(path, stamp) for name, path in self.paths.items()}
        done = [key for key in found["speculative"] if key in found["baseline"]]
        for name, path in self.paths.items():
            if path.exists():
                _replace(path, [found[name][key] for key in done])
        self.records = {key: {name: found[name][key] for name in RUNS} for key in done if key in wanted}
        return len(self.records)

    def add(self, records: dict[str, Record]) -> None:
        """Append one question. A line that cannot be written as a whole is taken back."""
        for name in RUNS:
            _append(self.paths[name], _line(records[name]), len(self.records))
        self.records[records["speculative"]["question_id"]] = records


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _append(path: Path, line: str, done: int) -> None:
    data = line.encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(descriptor, data[written:])
        except OSError as error:
            os.ftruncate(descriptor, size)
            raise BlockffnError(
                f"{path}: {error.strerror}; the {done} questions before are kept: make room and give the same command "
                "again to go on"
            ) from error
    finally:
        os.close(descriptor)


def _read(path: Path, stamp: dict[str, Any]) -> dict[int | str, Record]:
    """Return the records of one file by question; a last line without its end is left out."""
    found: dict[int | str, Record] = {}
    if not path.exists():
        return found
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            key, settings = record["question_id"], record["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise BlockffnError(
                f"{path}, line {number}: not an answer of `blockffn eval spec-bench`; give another --output"
            ) from error
        differing = [name for name in stamp if settings.get(name) != stamp[name]]
        if differing:
            name = differing[0]
            raise BlockffnError(
                f"{path} holds answers with {name} {settings.get(name)!r}, this run has {stamp[name]!r}: give another "
                "--output, or the same settings to go on"
            )
        found[key] = record
    return found


def _replace(path: Path, records: Sequence[Record]) -> None:
    """Write a file anew where that changes it, whole or not at all."""
    data = "".join(map(_line, records)).encode()
    if path.read_bytes() == data:
        return
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
