"""Where a figure was measured: processor, threads, build, commit. Part of every benchmark's JSON line.

>>> from blockffn.eval.environment import environment
>>> sorted(environment())[:3]
['commit', 'cores', 'cpu']
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import blockffn
from blockffn import backends, library
from blockffn.errors import BlockffnError
from blockffn.threads import physical_cores

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ("native", "portable", "dispatch")
AMX_PROFILES = ("amx-emulated", "amx-free")  # the Makefile's; no wheel and no default has them


def environment(directory: Path | None = None) -> dict[str, Any]:
    """Return what has to be known beside a figure; `directory` holds the libraries (default: the usual ones)."""
    found = directory or library.find()
    profile = found.parent.name if found is not None and found.name == "bin" else None
    return {
        "version": blockffn.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": physical_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "profile": profile if profile in PROFILES + AMX_PROFILES else "other",
        "cpu_variant": backends.variant(),
    }


def headline(where: dict[str, Any], threads: int) -> str:
    """Return the line that stands above a table of figures."""
    variant = f" ({where['cpu_variant']})" if where.get("cpu_variant") else ""
    return f"{where['cpu']}, {threads} threads, profile {where['profile']}{variant}, commit {where['commit']}"


def profile_directory(profile: str | None) -> Path | None:
    """Return build/<profile>/bin of the checkout; None for None. BlockffnError when it is not built."""
    if profile is None:
        return None
    found = ROOT / "build" / profile / "bin"
    if not (found / library.LIBRARY).exists():
        raise BlockffnError(
            f"profile {profile}: {library.LIBRARY} not found in {found}; run `make BUILD_PROFILE={profile} setup`"
        )
    return found


def _commit() -> str | None:
    """Return the commit of the checkout, with + where tracked files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != ROOT:
            return None
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return match[1] if match else platform.processor()
    except OSError:
        return platform.processor()
