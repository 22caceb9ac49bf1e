"""How many threads: siblings count once, affinity and the limit of a container are respected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from blockffn import threads

Machine = Callable[..., int]


@pytest.mark.parametrize(
    ("allowed", "per_core", "limit", "expected"),
    [
        (range(8), 2, None, 4),
        (range(8), 1, None, 8),
        (range(8), 2, 3, 3),
        (range(4), 1, 64, 4),
        ([2, 3], 2, None, 1),
        ([0], 1, None, 1),
        (range(8), 1, 1, 1),
    ],
)
def test_physical_cores(
    allowed: range | list[int], per_core: int, limit: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _pid: set(allowed), raising=False)
    monkeypatch.setattr(threads, "_siblings", lambda cpu: str(cpu // per_core))
    monkeypatch.setattr(threads, "_container_limit", lambda: limit)
    assert threads.physical_cores() == expected


@pytest.mark.parametrize(("content", "expected"), [("max 100000", None), ("250000 100000", 2), ("50000 100000", 1)])
def test_container_limit(content: str, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.Path, "read_text", lambda _self: content)
    assert threads._container_limit() == expected


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A function that lays out /sys for threads with these siblings and this cpu.max, and counts the cores.

    With `capacities` of the threads, or Intel's list of efficiency cores, it returns the default number of threads.
    """

    def count(
        siblings: list[str], limit: str | None, capacities: list[int] | None = None, atoms: str | None = None
    ) -> int:
        for cpu, names in enumerate(siblings):
            folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(names + "\n")
        if limit is not None:
            (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
            (tmp_path / "sys/fs/cgroup/cpu.max").write_text(limit + "\n")
        for cpu, capacity in enumerate(capacities or []):
            (tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity").write_text(f"{capacity}\n")
        if atoms is not None:
            (tmp_path / "sys/devices/cpu_atom").mkdir(parents=True)
            (tmp_path / "sys/devices/cpu_atom/cpus").write_text(atoms + "\n")
        monkeypatch.setattr(threads, "Path", lambda path: tmp_path / path.lstrip("/"))
        monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _pid: set(range(len(siblings))), raising=False)
        return threads.physical_cores() if capacities is atoms is None else threads.default_threads()

    return count


@pytest.mark.parametrize(
    ("siblings", "limit", "expected"),
    [
        (["0,2", "1,3", "0,2", "1,3"], None, 2),  # as Intel numbers them
        (["0-1", "0-1", "2-3", "2-3"], "max 100000", 2),  # as AMD does
        (["0", "1", "2", "3"], "250000 100000", 2),  # a container
        (["0-1", "0-1", "2-3", "2-3"], "800000 100000", 2),
        ([], None, 1),
    ],
)
def test_recorded_machines(machine: Machine, siblings: list[str], limit: str | None, expected: int) -> None:
    assert machine(siblings, limit) == expected


ALONE = [str(cpu) for cpu in range(8)]


@pytest.mark.parametrize(
    ("siblings", "limit", "capacities", "atoms", "expected"),
    [
        (ALONE, None, [397] * 4 + [1024] * 4, None, 4),  # as an RK3588: four little ones would slow the step
        (ALONE, None, [250] * 4 + [620] * 2 + [1024] * 2, None, 4),  # three sizes: the middle ones help
        (ALONE, None, [250] * 4 + [480] * 2 + [1024] * 2, None, 2),  # slower than half: they do not
        (ALONE, None, [900] * 7 + [1024], None, 8),
        (ALONE, "300000 100000", [397] * 4 + [1024] * 4, None, 3),
        (["0-1", "0-1", "2-3", "2-3", "4", "5", "6", "7"], "max 100000", None, "4-7", 2),  # as Intel's hybrids
        (["0-1", "0-1", "2-3", "2-3", "4", "5", "6", "7"], None, None, "4,6-7", 3),
        (ALONE, None, None, "0-7", 8),  # nothing but efficiency cores
        (ALONE, None, None, "nonsense", 8),
    ],
)
def test_little_cores(
    machine: Machine, siblings: list[str], limit: str | None, capacities: list[int] | None, atoms: str, expected: int
) -> None:
    assert machine(siblings, limit, capacities, atoms) == expected


def test_a_system_without_the_files(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine([], None)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _pid: {0, 1, 2}, raising=False)
    assert threads.physical_cores() == 3
