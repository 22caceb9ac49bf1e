"""The router inside a batch, in the default mode: logits and active experts do not depend on the number of tokens."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import write_checkpoint

import blockffn
from blockffn import library, logs

N_EMBD, N_TOKENS, MOE_LAYER = 256, 33, 0
Rows = npt.NDArray[np.float32]


class Watched:
    """A context whose router reads what we put there: rows of `inputs` instead of the layer's own."""

    def __init__(self, path: Path, inputs: Rows) -> None:
        self.low = low = library.load()
        logs.install(False)
        self.inputs, self.first = inputs, 0
        self.logits: Rows = np.empty((0, 0), np.float32)
        self.ops: set[str] = set()
        self.model = low.llama_model_load_from_file(str(path).encode(), low.llama_model_default_params())
        params = low.llama_context_default_params()
        params.n_ctx, params.n_threads = 128, 2
        self._callback = low.ggml_backend_sched_eval_callback(self._watch)
        params.cb_eval = self._callback
        self.ctx = low.llama_init_from_model(self.model, params)
        self._native = low._lib
        self._native.ggml_get_name.restype = self._native.ggml_op_desc.restype = ctypes.c_char_p
        self._native.ggml_nbytes.restype = ctypes.c_size_t

    def close(self) -> None:
        self.low.llama_free(self.ctx)
        self.low.llama_model_free(self.model)

    def _watch(self, tensor: Any, ask: bool, _user: Any) -> bool:
        node = ctypes.c_void_p(ctypes.cast(tensor, ctypes.c_void_p).value)
        name = self._native.ggml_get_name(node).decode()
        self.ops.add(self._native.ggml_op_desc(node).decode())
        if name not in (f"ffn_norm-{MOE_LAYER}", f"ffn_router_logits-{MOE_LAYER}"):
            return not ask
        if not ask:
            zero, size = ctypes.c_size_t(0), ctypes.c_size_t(self._native.ggml_nbytes(node))
            if name.startswith("ffn_norm"):
                n = size.value // (4 * N_EMBD)
                rows = np.ascontiguousarray(self.inputs[self.first : self.first + n])
                self._native.ggml_backend_tensor_set(node, rows.ctypes.data_as(ctypes.c_void_p), zero, size)
            else:
                self.logits = np.empty(size.value // 4, np.float32)
                self._native.ggml_backend_tensor_get(node, self.logits.ctypes.data_as(ctypes.c_void_p), zero, size)
        return True

    def evaluate(self, size: int) -> Rows:
        """Return the router's logits of all tokens, evaluated `size` at a time: [tokens, experts]."""
        low, found = self.low, []
        low.llama_memory_clear(low.llama_get_memory(self.ctx), True)
        for self.first in range(0, N_TOKENS, size):
            n = min(size, N_TOKENS - self.first)
            batch = low.llama_batch_init(n, 0, 1)
            batch.n_tokens = n
            for i in range(n):
                batch.token[i], batch.pos[i], batch.logits[i] = 7 + i, self.first + i, True
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            assert low.llama_decode(self.ctx, batch) == 0
            low.llama_batch_free(batch)
            found.append(self.logits.reshape(n, -1))
        return np.concatenate(found)


@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
@pytest.mark.parametrize("n_expert", [7, 56, 102])
def test_router_does_not_depend_on_the_batch(n_expert: int, outtype: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", attention="gqa", n_embd=N_EMBD, n_head=4, n_expert=n_expert)
    blockffn.convert.convert_checkpoint(tmp_path / "source", tmp_path / "m.gguf", outtype=outtype)
    inputs = np.random.default_rng(0).standard_normal((N_TOKENS, N_EMBD)).astype(np.float32)
    watched = Watched(tmp_path / "m.gguf", inputs)
    single = watched.evaluate(1)
    assert single.shape == (N_TOKENS, n_expert) and 0.2 < (single > 0).mean() < 0.8
    for size in (2, 3, 8, 33):
        assert np.array_equal(watched.evaluate(size), single), f"batches of {size}"
    assert "UNION_FFN" in watched.ops and "MUL_MAT_ID" not in watched.ops  # a callback watches the sparse graph
    watched.close()
