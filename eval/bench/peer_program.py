"""llama-cli of the patched tree as a contender: one process per prompt, its own figures read from its log.

>>> found = parse("eval time =  802.88 ms /  64 tokens ( 12.7 ms per token, 78 tokens per second)")
>>> found["tokens"], found["seconds"]
(64, 0.80288)

The program knows chats only, so a template passes the prompt on as it is.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from blockffn import library
from blockffn.errors import BlockffnError

NAME = "llama-cli"
AS_IT_IS = "{% for m in messages %}{{ m.content }}{% endfor %}"  # chat template
CONTEXT = 1024


def draft_options(draft: str, n_tokens: int) -> tuple[str, ...]:
    """Return the options for a draft model that proposes `n_tokens` at a time."""
    return ("-md", draft, "--spec-type", "draft-simple", "--spec-draft-n-max", str(n_tokens))


class Program:
    """Runs llama-cli; `options` are its own."""

    def __init__(self, model: str, threads: int, directory: Path | None, options: tuple[str, ...]) -> None:
        program = (directory or library.directory()) / NAME
        if not program.is_file():
            raise BlockffnError(f"{program}: no such program: build it with `make setup`")
        self.command = [str(program), "-m", model, "-t", str(threads), "-c", str(CONTEXT), *options]

    def generate(self, prompt: str, tokens: int) -> dict[str, Any]:
        """Continue one prompt by `tokens` tokens; BlockffnError with the program's last words when it fails."""
        with tempfile.TemporaryDirectory() as folder:
            log, out = Path(folder) / "log.txt", Path(folder) / "out.txt"
            command = [*self.command, "-n", str(tokens), "--temp", "0", "--ignore-eos", "--single-turn", "--simple-io"]
            command += ["--jinja", "--chat-template", AS_IT_IS, "--no-escape", "-p", prompt]
            command += ["--log-file", str(log), "--verbosity", "4"]
            with out.open("w") as output:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.DEVNULL)
                code, peak = wait(process)
            written = log.read_text(errors="replace") if log.exists() else ""
            found = parse(written)
            if code or not found["tokens"]:
                lines = (written or out.read_text(errors="replace")).strip().splitlines()
                raise BlockffnError(f"{NAME} ended with code {code}: {lines[-1] if lines else 'no message'}")
            return found | {"text": _text(out.read_text(errors="replace"), prompt), "peak_rss_mb": peak}

    def close(self) -> None:
        """Nothing is left running between prompts."""


def wait(process: subprocess.Popen[Any]) -> tuple[int, float]:
    """Wait for a process; return its exit code and its peak resident memory in MB of 10^6 bytes (Linux)."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * 1024 / 1e6


def parse(log: str) -> dict[str, Any]:
    """Return tokens, seconds, steps, drafted and accepted tokens from the log; zeros where it says nothing."""
    timing = re.findall(r"(?<!prompt) eval time =\s*([\d.]+) ms /\s*(\d+) tokens", " " + log)
    seconds, tokens = (float(timing[-1][0]) / 1e3, int(timing[-1][1])) if timing else (0.0, 0)
    draft = re.findall(r"draft acceptance = [\d.]+ \(\s*(\d+) accepted /\s*(\d+) generated\)", log)
    accepted, drafted = (int(draft[-1][0]), int(draft[-1][1])) if draft else (0, 0)
    steps = tokens - accepted  # each gives one token beyond the accepted ones
    return {"tokens": tokens, "seconds": seconds, "steps": steps, "drafted": drafted, "accepted": accepted}


def _text(output: str, prompt: str) -> str:
    """Return what the program wrote after the prompt, without the line break that it adds."""
    start = output.rfind("> " + prompt)
    end = output.rfind("\n\n[ Prompt:")
    return output[start + len("> " + prompt) : end].removeprefix("\n") if 0 <= start < end else ""
