"""What llama-perplexity, the peer of `blockffn eval ppl`, says of a text."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from blockffn import library


def peer_perplexity(model: Path, text: Path, n_ctx: int, *arguments: str) -> float:
    """Return its perplexity in windows of `n_ctx` tokens; AssertionError where it prints none."""
    command = [library.program("llama-perplexity"), "-m", model, "-f", text, "-c", n_ctx, "-b", n_ctx, *arguments]
    for _ in range(20):  # its log thread sometimes loses the last lines when the program ends
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=True)
        match = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
        if match is not None:
            return float(match[1])
    raise AssertionError(done.stdout + done.stderr)
