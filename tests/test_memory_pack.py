"""llama_memory_seq_pack of the patched library: of a tree one path is kept, and other sequences lose nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kv_cache import Cache, Row

from blockffn import library

A, BRANCH_1, BRANCH_2, TAIL, B = 0, 1, 2, 3, 5  # sequences of one cache
TEXT_A, TEXT_B = [1, 40, 41, 42, 43, 44], [1, 90, 91, 92, 93, 94, 95]
PATH = [50, 51]  # what is accepted after TEXT_A


def converse(cache: Cache, tree: bool, late: bool = False) -> None:
    """Evaluate both texts in turns; `tree`: with two branches after A; `late`: B's second turn inside it."""
    cache.decode(TEXT_A[:3], 0, A, BRANCH_1, BRANCH_2)
    cache.decode(TEXT_B[:4], 0, B)
    cache.decode(TEXT_A[3:], 3, A, BRANCH_1, BRANCH_2)
    if not late:
        cache.decode(TEXT_B[4:], 4, B)
    if tree:
        cache.decode([60, 61], 6, BRANCH_1)
        cache.decode([PATH[0]], 6, BRANCH_2)
    if late:
        cache.decode(TEXT_B[4:], 4, B)
    if tree:
        cache.decode(PATH[1:], 7, BRANCH_2)


@pytest.fixture(params=["stock", "blockffn"])
def model(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"{request.param}_model")
    return path


@pytest.fixture
def cache(model: Path) -> Iterator[Cache]:
    cache = Cache(model)
    yield cache
    cache.close()


@pytest.fixture
def expected(model: Path) -> dict[str, Row]:
    """What comes after both texts where no tree was ever evaluated."""
    cache = Cache(model)
    converse(cache, tree=False)
    cache.decode(PATH, 6, A)
    rows = {"B": cache.decode([71], 7, B), "A": cache.decode([70], 8, A)}
    cache.close()
    return rows


def test_the_path_is_kept_as_if_there_had_been_no_tree(cache: Cache, expected: dict[str, Row]) -> None:
    converse(cache, tree=True)
    assert cache.pack(BRANCH_2, 6)
    assert cache.lengths() == [8, 8, 8, 0, 0, 7, 0, 0]
    assert np.array_equal(cache.decode([71], 7, B), expected["B"])
    assert np.array_equal(cache.decode([70], 8, A), expected["A"])


def test_another_conversation_loses_nothing(cache: Cache, expected: dict[str, Row]) -> None:
    """The tree has cells before and after those of the other conversation, which stay where they are."""
    converse(cache, tree=True, late=True)
    before = cache.sequence_state(B)
    assert cache.pack(BRANCH_2, 6)
    assert cache.lengths() == [8, 8, 8, 0, 0, 7, 0, 0]
    assert cache.sequence_state(B) == before
    assert np.allclose(cache.decode([71], 7, B), expected["B"], atol=1e-2)  # other cells: sums in another order
    assert np.allclose(cache.decode([70], 8, A), expected["A"], atol=1e-2)


def test_nothing_to_keep(cache: Cache, expected: dict[str, Row]) -> None:
    """Sequence A holds nothing from position 6 on: both branches are dropped."""
    converse(cache, tree=True)
    assert cache.pack(A, 6)
    assert cache.lengths() == [6, 6, 6, 0, 0, 7, 0, 0]
    cache.decode(PATH, 6, A)
    assert np.array_equal(cache.decode([71], 7, B), expected["B"])
    assert np.array_equal(cache.decode([70], 8, A), expected["A"])


@pytest.mark.parametrize(
    ("sequence", "first"), [(-1, 6), (8, 6), (255, 6), (256, 6), (10**6, 6), (4, 6), (A, 0), (A, -3)]
)
def test_refusal_changes_nothing(cache: Cache, sequence: int, first: int) -> None:
    """No such sequence, or no token before the position."""
    converse(cache, tree=True)
    before = cache.state()
    assert not cache.pack(sequence, first)
    assert cache.state() == before


def test_a_cell_that_another_sequence_holds_may_not_move(cache: Cache) -> None:
    converse(cache, tree=True)
    cache.low.llama_memory_seq_cp(cache.memory, BRANCH_2, TAIL, 6, -1)  # but not what comes before
    before = cache.state()
    assert not cache.pack(BRANCH_2, 6)
    assert cache.state() == before


def test_tokens_of_another_sequence_stay(cache: Cache, expected: dict[str, Row]) -> None:
    """A sequence that holds the end of a dropped branch alone keeps it."""
    converse(cache, tree=True)
    cache.low.llama_memory_seq_cp(cache.memory, BRANCH_1, TAIL, 6, -1)
    assert cache.pack(BRANCH_2, 6)
    assert cache.lengths() == [8, 8, 8, 8, 0, 7, 0, 0]
    assert np.allclose(cache.decode([70], 8, A), expected["A"], atol=1e-2)


def test_several_streams_are_refused(stock_model: Path) -> None:
    low = library.load()
    model = low.llama_model_load_from_file(str(stock_model).encode(), low.llama_model_default_params())
    params = low.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = 256, 4, False
    ctx: Any = low.llama_init_from_model(model, params)
    pack = low._lib.llama_memory_seq_pack
    pack.argtypes, pack.restype = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32], ctypes.c_bool
    assert not pack(low.llama_get_memory(ctx), 0, 1)
    low.llama_free(ctx)
    low.llama_model_free(model)
