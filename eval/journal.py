"""What a long evaluation has done so far, in a file that survives a kill: one line of JSON for each finished piece.

    >>> import tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "run.jsonl")
    >>> with Journal(path, {"model": "m.gguf"}) as journal:
    ...     journal.add({"text": 0, "tokens": 256})
    >>> Journal(path, {"model": "m.gguf"}).records                 # the same command again
    [{'text': 0, 'tokens': 256}]

The first line holds the settings: another run with the same ones goes on after the last whole line, one with others is
refused. Without a path nothing is written, and nothing can be resumed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from blockffn.errors import BlockffnError

EDGE = 1 << 20  # bytes at both ends of a file that its fingerprint reads


class Journal:
    """`records` are the finished pieces, `add` appends one. Errors: BlockffnError for other settings, a full disk."""

    def __init__(self, path: str | PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.records: list[dict[str, Any]] = []
        self._file = -1
        if self.path is not None:
            self._open(self.path)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a finished piece: whole, or not at all."""
        self.records.append(json.loads(json.dumps(record)))
        if self._file >= 0:
            self._append(record)

    def _open(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise BlockffnError(f"{path}: another run is writing it; wait for it or name another file") from None
        try:
            lines = self._whole_lines(path)
            if not lines:
                self._append({"settings": self.settings})
            else:
                self._check(path, lines[0].get("settings"))
                self.records = lines[1:]
        except BaseException:
            self.close()
            raise

    def _whole_lines(self, path: Path) -> list[dict[str, Any]]:
        """Return the lines; the rest of one that a kill cut off is removed."""
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        lines = []
        for number, line in enumerate(data[:end].splitlines(), 1):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise BlockffnError(
                    f"{path}: line {number} is not JSON ({error}): expected a file that this command wrote; "
                    "name another one"
                ) from None
        if end == 0 and data and not b'{"settings": '.startswith(data[:13]):
            raise BlockffnError(f"{path}: expected a file that this command wrote, found another; name another one")
        os.ftruncate(self._file, end)
        return lines

    def _check(self, path: Path, found: Any) -> None:
        if not isinstance(found, dict):
            raise BlockffnError(f"{path}: expected the settings of a run in line 1, found none; name another file")
        for name, value in self.settings.items():
            if found.get(name) != value:
                raise BlockffnError(
                    f"{path}: was begun with {name} {found.get(name)!r}, this run has {value!r}; repeat the command "
                    "it was begun with, or name another file"
                )

    def _append(self, record: Mapping[str, Any]) -> None:
        size = os.fstat(self._file).st_size
        data = json.dumps(record).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            os.ftruncate(self._file, size)
            raise BlockffnError(
                f"{self.path}: {error.strerror}: what was done before is kept; make room and repeat the command"
            ) from error


def fingerprint(path: str | Path) -> str:
    """Return what tells one file from another without reading all of it: name, size, hash of both ends."""
    file = Path(path)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest.update(stream.read(EDGE))
        stream.seek(max(0, size - EDGE))
        digest.update(stream.read(EDGE))
    return f"{file.name}, {size} bytes, {digest.hexdigest()[:16]}"


def text_fingerprint(tokens: Sequence[int]) -> str:
    """Return what tells one text from another."""
    digest = hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()[:16]
    return f"{len(tokens)} tokens, {digest}"
