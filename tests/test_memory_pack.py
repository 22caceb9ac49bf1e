"""llama_memory_seq_pack of the patched library: of a tree one path is kept, and other sequences lose nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from blockffn import _capi, library, logs

A, BRANCH_1, BRANCH_2, TAIL, B = 0, 1, 2, 3, 5  # sequences of one cache
TEXT_A, TEXT_B = [1, 40, 41, 42, 43, 44], [1, 90, 91, 92, 93, 94, 95]
PATH = [50, 51]  # what is accepted after TEXT_A

Row = npt.NDArray[np.float32]


class Cache:
    """A context in exact mode with 8 sequences in one cache."""

    def __init__(self, path: Path) -> None:
        self.low = low = library.load()
        logs.install(False)
        self.model = low.llama_model_load_from_file(str(path).encode(), low.llama_model_default_params())
        params = low.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified, params.n_threads = 256, 8, True, 1
        params.flash_attn_type = low.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.ctx = low.llama_init_from_model(self.model, params)
        self.memory = low.llama_get_memory(self.ctx)
        self.n_vocab = low.llama_vocab_n_tokens(low.llama_model_get_vocab(self.model))
        assert _capi.function("llama_set_batch_invariant")(self.ctx, True)
        self._pack = low._lib.llama_memory_seq_pack
        self._pack.argtypes, self._pack.restype = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32], ctypes.c_bool

    def close(self) -> None:
        self.low.llama_free(self.ctx)
        self.low.llama_model_free(self.model)

    def decode(self, tokens: list[int], first: int, *sequences: int) -> Row:
        """Evaluate tokens at positions first, ... of the sequences; return the logits of the last one."""
        batch = self.low.llama_batch_init(len(tokens), 0, 8)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, first + i, True
            batch.n_seq_id[i] = len(sequences)
            for j, sequence in enumerate(sequences):
                batch.seq_id[i][j] = sequence
        assert self.low.llama_decode(self.ctx, batch) == 0
        self.low.llama_batch_free(batch)
        rows = self.low.llama_get_logits_ith(self.ctx, -1)
        return np.ctypeslib.as_array(rows, (self.n_vocab,)).copy()

    def pack(self, sequence: int, first: int) -> bool:
        return bool(self._pack(self.memory, sequence, first))

    def lengths(self) -> list[int]:
        return [self.low.llama_memory_seq_pos_max(self.memory, i) + 1 for i in range(8)]

    def state(self) -> bytes:
        """Cells, positions, sequences, keys and values."""
        size = self.low.llama_state_get_size(self.ctx)
        data = (ctypes.c_uint8 * size)()
        return bytes(data[: self.low.llama_state_get_data(self.ctx, data, size)])

    def sequence_state(self, sequence: int) -> bytes:
        """Positions, keys and values of one sequence."""
        size = self.low.llama_state_seq_get_size(self.ctx, sequence)
        data = (ctypes.c_uint8 * size)()
        return bytes(data[: self.low.llama_state_seq_get_data(self.ctx, data, size, sequence)])

    def converse(self, tree: bool, late: bool = False) -> None:
        """Evaluate both texts in turns; `tree`: with two branches after A; `late`: B's second turn inside it."""
        self.decode(TEXT_A[:3], 0, A, BRANCH_1, BRANCH_2)
        self.decode(TEXT_B[:4], 0, B)
        self.decode(TEXT_A[3:], 3, A, BRANCH_1, BRANCH_2)
        if not late:
            self.decode(TEXT_B[4:], 4, B)
        if tree:
            self.decode([60, 61], 6, BRANCH_1)
            self.decode([PATH[0]], 6, BRANCH_2)
        if late:
            self.decode(TEXT_B[4:], 4, B)
        if tree:
            self.decode(PATH[1:], 7, BRANCH_2)


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
    cache.converse(tree=False)
    cache.decode(PATH, 6, A)
    rows = {"B": cache.decode([71], 7, B), "A": cache.decode([70], 8, A)}
    cache.close()
    return rows


def test_the_path_is_kept_as_if_there_had_been_no_tree(cache: Cache, expected: dict[str, Row]) -> None:
    cache.converse(tree=True)
    assert cache.pack(BRANCH_2, 6)
    assert cache.lengths() == [8, 8, 8, 0, 0, 7, 0, 0]
    assert np.array_equal(cache.decode([71], 7, B), expected["B"])
    assert np.array_equal(cache.decode([70], 8, A), expected["A"])


def test_another_conversation_loses_nothing(cache: Cache, expected: dict[str, Row]) -> None:
    """The tree has cells before and after those of the other conversation, which stay where they are."""
    cache.converse(tree=True, late=True)
    before = cache.sequence_state(B)
    assert cache.pack(BRANCH_2, 6)
    assert cache.lengths() == [8, 8, 8, 0, 0, 7, 0, 0]
    assert cache.sequence_state(B) == before
    assert np.allclose(cache.decode([71], 7, B), expected["B"], atol=1e-2)  # other cells: sums in another order
    assert np.allclose(cache.decode([70], 8, A), expected["A"], atol=1e-2)


def test_nothing_to_keep(cache: Cache, expected: dict[str, Row]) -> None:
    """Sequence A holds nothing from position 6 on: both branches are dropped."""
    cache.converse(tree=True)
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
    cache.converse(tree=True)
    before = cache.state()
    assert not cache.pack(sequence, first)
    assert cache.state() == before


def test_a_cell_that_another_sequence_holds_may_not_move(cache: Cache) -> None:
    cache.converse(tree=True)
    cache.low.llama_memory_seq_cp(cache.memory, BRANCH_2, TAIL, 6, -1)  # but not what comes before
    before = cache.state()
    assert not cache.pack(BRANCH_2, 6)
    assert cache.state() == before


def test_tokens_of_another_sequence_stay(cache: Cache, expected: dict[str, Row]) -> None:
    """A sequence that holds the end of a dropped branch alone keeps it."""
    cache.converse(tree=True)
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
