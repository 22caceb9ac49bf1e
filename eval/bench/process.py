"""A process that answers requests, one line of JSON each: every candidate of a benchmark is loaded in one of its own.

>>> import sys
>>> channel = Channel("echo", [sys.executable, "-c", "import sys; [print(line) for line in sys.stdin]"])
>>> channel.ask({"number": 7})                        # doctest: +SKIP
{'number': 7}
>>> channel.close()
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from blockffn.errors import BlockffnError


class Channel:
    """Starts `command`; `name` stands in errors, `directory` holds the libraries (None: the usual ones)."""

    def __init__(self, name: str, command: Sequence[str], directory: Path | None = None) -> None:
        self.name, self.log = name, tempfile.TemporaryFile("w+")
        environment = os.environ | ({"BLOCKFFN_LIB_DIR": str(directory)} if directory else {})
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            list(command), stdin=pipe, stdout=pipe, stderr=self.log, text=True, env=environment
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and return its answer; BlockffnError with the cause when the process fails."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the process has gone: its last line or its log says why
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise BlockffnError(f"{self.name}: {answer['error']}")
        return answer

    def buffers(self) -> dict[str, float]:
        """Return the buffer types that llama.cpp chose for the weights, with their sizes in MiB."""
        self.log.seek(0)
        found = re.findall(r"(\S+) model buffer size =\s*([\d.]+) MiB", self.log.read())
        return {name: float(size) for name, size in found}

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # a request that a dead process never read
                self.process.stdin.close()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()

    def _last_words(self) -> str:
        self.process.wait()
        return f"the benchmark process ended with code {self.process.returncode}: {last_line(self.log)}"


def last_line(log: IO[str]) -> str:
    """Return the last line of a log that says something."""
    log.seek(0)
    lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
