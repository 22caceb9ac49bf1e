"""How many threads a model should use.

>>> from blockffn.threads import physical_cores
>>> physical_cores() >= 1
True
"""

from __future__ import annotations

import os
from pathlib import Path


def physical_cores() -> int:
    """Return the number of cores this process may use: siblings count once, the limit of a container is respected."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in allowed}
    limit = _container_limit()
    return max(1, min(len(cores), limit) if limit else len(cores))


def _siblings(cpu: int) -> str:
    """Return a name of the core that hardware thread `cpu` belongs to."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _container_limit() -> int | None:
    """Return the processor limit of the control group in whole cores, None where there is none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None
