"""A command that is killed at a known place, however fast or slow the machine is."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

CODE = """
import importlib, os, signal, sys
module, _, name = {place!r}.partition(":")
owner = importlib.import_module(module)
*path, name = name.split(".")
for part in path:
    owner = getattr(owner, part)
original, left = getattr(owner, name), [{calls}]

def until_the_kill(*args, **kwargs):
    original(*args, **kwargs)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, name, until_the_kill)
from blockffn.cli import main
sys.exit(main({arguments!r}))
"""


def run_until_killed(arguments: list[str | Path], place: str, calls: int) -> None:
    """Run a `blockffn` command that is killed right after the given call of `place`, "package.module:name"."""
    code = CODE.format(arguments=[str(word) for word in arguments], place=place, calls=calls)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
