"""The cache of a small model as llama.cpp has it, for tests of what lies in it: `Cache`."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import numpy.typing as npt

from blockffn import _capi, library, logs

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
        assert self.try_decode(tokens, first, *sequences) == 0
        rows = self.low.llama_get_logits_ith(self.ctx, -1)
        return np.ctypeslib.as_array(rows, (self.n_vocab,)).copy()

    def try_decode(self, tokens: list[int], first: int, *sequences: int) -> int:
        """Do the same; return the code of llama_decode: 1 where the cache is full."""
        batch = self.low.llama_batch_init(len(tokens), 0, 8)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, first + i, True
            batch.n_seq_id[i] = len(sequences)
            for j, sequence in enumerate(sequences):
                batch.seq_id[i][j] = sequence
        code = int(self.low.llama_decode(self.ctx, batch))
        self.low.llama_batch_free(batch)
        return code

    def pack(self, sequence: int, first: int) -> bool:
        return bool(self._pack(self.memory, sequence, first))

    def forget(self, sequence: int) -> bool:
        return bool(self.low.llama_memory_seq_rm(self.memory, sequence, -1, -1))

    def share(self, source: int, target: int, n: int) -> None:
        """Give the cells of the first `n` positions to another sequence as well."""
        self.low.llama_memory_seq_cp(self.memory, source, target, 0, n)

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
