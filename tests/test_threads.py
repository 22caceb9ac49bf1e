"""How many threads: siblings count once, affinity and the limit of a container are respected."""

from __future__ import annotations

import pytest

from blockffn import threads


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


def test_this_machine() -> None:
    assert threads.physical_cores() >= 1
