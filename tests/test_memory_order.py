"""The cells of a sequence lie in the order of its positions in exact mode, whoever else comes and goes in the cache."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kv_cache import Cache, Row

A, B, C = 0, 1, 2  # sequences of one cache of 256 cells


def words(seed: int, n: int) -> list[int]:
    return [1, *random.Random(seed).choices(range(3, 250), k=n - 1)]


@pytest.fixture(params=["stock", "blockffn"])
def model(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"{request.param}_model")
    return path


@pytest.fixture
def cache(model: Path) -> Iterator[Cache]:
    cache = Cache(model)
    yield cache
    cache.close()


def alone(model: Path, tokens: list[int]) -> Row:
    """The logits after a text that has a cache for itself."""
    cache = Cache(model)
    row = cache.decode(tokens, 0, A)
    cache.close()
    return row


def test_holes_before_a_text_are_left_to_others(cache: Cache, model: Path) -> None:
    first, second, third = words(1, 100), words(2, 190), words(3, 70)
    cache.decode(first, 0, A)
    cache.decode(second[:100], 0, B)
    cache.forget(A)
    cache.decode(third[:50], 0, C)
    for n in range(100, 120):  # in turns: cells of both lie between one another's
        cache.decode(second[n : n + 1], n, B)
        cache.decode(third[n - 50 : n - 49], n - 50, C)
    assert np.array_equal(cache.decode(second[120:140], 120, B), alone(model, second[:140]))
    assert np.array_equal(cache.decode([5], 70, C), alone(model, [*third, 5]))


def test_gaps_are_closed_when_no_cell_is_left_behind_a_text(cache: Cache, model: Path) -> None:
    first, second = words(1, 100), words(2, 250)
    cache.decode(first, 0, A)
    cache.decode(second[:150], 0, B)
    cache.forget(A)
    assert np.array_equal(cache.decode(second[150:], 150, B), alone(model, second))
    assert cache.lengths()[:2] == [0, 250]


def test_shared_cells_stay_shared(cache: Cache, model: Path) -> None:
    first, second, end, other = words(1, 60), words(2, 100), words(3, 90), words(4, 30)
    cache.decode(first, 0, A)
    cache.decode(second, 0, B)
    cache.share(B, C, 80)
    cache.forget(A)
    assert np.array_equal(cache.decode(end, 80, C), alone(model, second[:80] + end))
    assert np.array_equal(cache.decode(other, 100, B), alone(model, second + other))
    assert cache.lengths()[:3] == [0, 130, 170]  # 80 cells of both, 50 of one, 90 of the other


def test_a_full_cache_says_so_and_keeps_all(cache: Cache, model: Path) -> None:
    first, second = words(1, 100), words(2, 140)
    cache.decode(first, 0, A)
    cache.decode(second, 0, B)
    before = cache.state()
    assert cache.try_decode(words(3, 17), 0, C) == 1
    assert cache.state() == before
    assert np.array_equal(cache.decode([7] * 16, 0, C), alone(model, [7] * 16))
    assert cache.forget(C)
    assert np.array_equal(cache.decode([9], 140, B), alone(model, [*second, 9]))
