"""How many threads a model should use.

>>> from blockffn.threads import default_threads, physical_cores
>>> 1 <= default_threads() <= physical_cores()
True

llama.cpp hands the rows of a matrix to its threads in equal parts, so a step takes as long as the slowest core needs
for its part. On processors with big and little cores, more of them can therefore be slower.
"""

from __future__ import annotations

import os
from pathlib import Path

FULL = 1024  # capacity of the largest core of a system, as Linux counts it; of every core where it says nothing


def default_threads() -> int:
    """Return the number of threads where nobody says one: physical cores, little ones only where they help."""
    return fastest([_capacity(cpus) for cpus in _cores()][: physical_cores()])


def fastest(capacities: list[int]) -> int:
    """Return how many cores compute equal parts of a task in the shortest time, the largest ones first.

    >>> fastest([1024] * 4 + [397] * 4), fastest([1024, 1024, 620, 620, 250, 250, 250, 250]), fastest([1024] * 8)
    (4, 4, 8)
    """
    ranked = sorted(capacities, reverse=True)
    return max(range(1, len(ranked) + 1), key=lambda n: (n * ranked[n - 1], n))


def physical_cores() -> int:
    """Return the number of cores this process may use: siblings count once, the limit of a container is respected."""
    cores, limit = len(_cores()), _container_limit()
    return max(1, min(cores, limit) if limit else cores)


def _cores() -> list[list[int]]:
    """Return the hardware threads that this process may use, by core, the largest core first; at least one core."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores: dict[str, list[int]] = {}
    for cpu in sorted(allowed):
        cores.setdefault(_siblings(cpu), []).append(cpu)
    return sorted(cores.values(), key=_capacity, reverse=True) or [[0]]


def _capacity(cpus: list[int]) -> int:
    """Return what a core computes, FULL for the largest of the system; 0 for an efficiency core of Intel's."""
    try:
        return int(Path(f"/sys/devices/system/cpu/cpu{cpus[0]}/cpu_capacity").read_text())
    except (OSError, ValueError):  # not ARM: Intel's hybrids list their efficiency cores
        return 0 if cpus[0] in _listed("/sys/devices/cpu_atom/cpus") else FULL


def _listed(path: str) -> set[int]:
    """Return the numbers of a list such as 0-3,8; none where the file is missing."""
    try:
        parts = [part.split("-") for part in Path(path).read_text().strip().split(",") if part]
        return {number for part in parts for number in range(int(part[0]), int(part[-1]) + 1)}
    except (OSError, ValueError):
        return set()


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
