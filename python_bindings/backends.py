"""The CPU backend of a build that has one for every generation of processors: the best that runs here, or a named one.

    >>> from blockffn import backends
    >>> backends.variant()                        # doctest: +SKIP
    'zen4'

A wheel carries libggml-cpu-haswell.so, libggml-cpu-zen4.so and so on. ggml asks each whether this processor can run it,
and takes the one with the most instructions; BLOCKFFN_CPU_VARIANT=haswell takes that one. `make setup` builds for one
processor: there is nothing to choose.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from pathlib import Path
from typing import Any

from blockffn.errors import BlockffnError

VARIABLE = "BLOCKFFN_CPU_VARIANT"
_FILE = re.compile(r"libggml-cpu-(\w+)\.so$")


def variants(directory: Path) -> dict[str, Path]:
    """Return the CPU backends in a folder by name; empty where the libraries are linked to a single one."""
    found = ((_FILE.search(path.name), path) for path in sorted(directory.glob("libggml-cpu-*.so")))
    return {match[1]: path for match, path in found if match}


@functools.cache
def load(ggml: Any, directory: Path) -> None:
    """Load the CPU backend into libggml (a ctypes.CDLL), once, before anything else uses it.

    BlockffnError for a name that the folder does not hold, and for one that this processor cannot run.
    """
    known, wanted = variants(directory), os.environ.get(VARIABLE)
    if wanted and wanted not in known:
        expected = f"one of {', '.join(known)}" if known else "none: this build has a single CPU backend"
        raise BlockffnError(f"{VARIABLE}: expected {expected}, found {wanted!r}")
    if wanted:
        one = ggml.ggml_backend_load
        one.argtypes, one.restype = [ctypes.c_char_p], ctypes.c_void_p
        if not one(os.fsencode(known[wanted])):
            raise BlockffnError(
                f"{VARIABLE}: this processor cannot run {wanted!r}; leave the variable out, and the best one is taken"
            )
    elif known:
        best = ggml.ggml_backend_load_all_from_path
        best.argtypes, best.restype = [ctypes.c_char_p], None
        best(os.fsencode(directory))
        if variant() is None:
            raise BlockffnError(f"no CPU backend in {directory} runs on this processor; found {', '.join(known)}")


def variant() -> str | None:
    """Return the name of the CPU backend that this process has loaded, None for one without a name."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    match = re.search(_FILE.pattern, maps, re.MULTILINE)
    return match[1] if match else None
