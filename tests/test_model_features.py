"""What llama.cpp offers has to work with our graph: attention kinds, caches, sequences, states, embeddings, mmap."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from tiny_llama import write_llama

import blockffn
from blockffn import library

TEXT = [1, *range(30, 70)]  # 41 tokens
KINDS: dict[str, dict[str, Any]] = {
    "mla": {"attention": "mla", "n_embd": 128, "n_head": 2, "kv_lora": 32, "rope": 32},
    "gqa": {"attention": "gqa", "n_embd": 128, "n_head": 4, "n_head_kv": 2, "tied": True},
    "remoe": {"family": "remoe", "layout": "hf", "attention": "gqa", "n_embd": 128, "n_head": 2},
    "vanilla": {"family": "vanilla", "layout": "hf", "n_embd": 128, "n_head": 2, "kv_lora": 32, "rope": 32},
    "deco": {"family": "deco", "attention": "gqa", "n_embd": 128, "n_head": 2, "n_layer": 3},
}


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 GGUF of each kind of FFN and attention."""
    folder = tmp_path_factory.mktemp(request.param)
    source = write_checkpoint(folder / "source", **KINDS[request.param])
    blockffn.convert.convert_checkpoint(source, folder / "model.gguf", outtype="f32")
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[blockffn.Llama]:
    # float32 throughout: what differs is then the feature under test, not the rounding of cache and flash attention
    opened = blockffn.Llama(model, n_threads=1, type_k=0, type_v=0, flash_attn=False)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def reference(llm: blockffn.Llama) -> np.ndarray:
    """Logits of TEXT: [tokens, vocabulary]."""
    return llm.logits(TEXT)


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


def opened_with(model: Path, **options: Any) -> np.ndarray:
    """Logits of TEXT from a model opened with other options."""
    llm = blockffn.Llama(model, n_threads=1, **options)
    try:
        return llm.logits(TEXT)
    finally:
        llm.close()


class Batch:
    """A llama_batch of (token, position, sequences) rows, all with logits, on a context of its own."""

    def __init__(self, llm: blockffn.Llama, n_seq: int, **params: Any) -> None:
        self.low: Any = library.load()
        context = self.low.llama_context_params.from_buffer_copy(llm.context_params)
        context.n_seq_max, context.n_ctx, context.n_batch, context.n_ubatch = n_seq, 512, 256, 64
        for name, value in params.items():
            setattr(context, name, value)
        self.ctx = self.low.llama_init_from_model(llm.model, context)
        self.memory = self.low.llama_get_memory(self.ctx)
        self.batch = self.low.llama_batch_init(256, 0, n_seq)
        self.n_vocab = llm.n_vocab()

    def decode(self, rows: Sequence[tuple[int, int, Sequence[int]]]) -> np.ndarray:
        """Evaluate the rows in one call and return their logits: [rows, vocabulary]."""
        self.batch.n_tokens = len(rows)
        for i, (token, position, sequences) in enumerate(rows):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, 1
            self.batch.n_seq_id[i] = len(sequences)
            for j, sequence in enumerate(sequences):
                self.batch.seq_id[i][j] = sequence
        assert self.low.llama_decode(self.ctx, self.batch) == 0
        logits = self.low.llama_get_logits(self.ctx)
        return np.ctypeslib.as_array(logits, (len(rows), self.n_vocab)).copy()

    def close(self) -> None:
        self.low.llama_batch_free(self.batch)
        self.low.llama_free(self.ctx)


@pytest.fixture(params=[False, True], ids=["split", "unified"])
def batch(llm: blockffn.Llama, request: pytest.FixtureRequest) -> Iterator[Batch]:
    made = Batch(llm, 4, kv_unified=request.param)
    yield made
    made.close()


def rows(tokens: Sequence[int], start: int = 0, sequence: int = 0) -> list[tuple[int, int, list[int]]]:
    return [(token, start + i, [sequence]) for i, token in enumerate(tokens)]


def test_flash_attention(model: Path, reference: np.ndarray) -> None:
    assert nmse(opened_with(model, flash_attn=True), reference) < 1e-5


@pytest.mark.parametrize(("kind", "bound"), [("F16", 1e-5), ("Q8_0", 1e-3), ("Q4_0", 0.2)])
def test_quantized_cache(model: Path, reference: np.ndarray, kind: str, bound: float) -> None:
    low: Any = library.load()
    type_id = {"F16": low.GGML_TYPE_F16 if hasattr(low, "GGML_TYPE_F16") else 1, "Q8_0": 8, "Q4_0": 2}[kind]
    found = opened_with(model, type_k=type_id, type_v=type_id, flash_attn=True)
    assert nmse(found, reference) < bound


@pytest.mark.parametrize("use_mmap", [True, False])
def test_mmap_on_and_off(model: Path, reference: np.ndarray, use_mmap: bool) -> None:
    assert np.array_equal(opened_with(model, use_mmap=use_mmap, flash_attn=False), reference)


def test_threads_agree(model: Path, reference: np.ndarray) -> None:
    llm = blockffn.Llama(model, n_threads=2)
    assert nmse(llm.logits(TEXT), reference) < 1e-8
    llm.close()


def test_several_sequences_in_one_batch(batch: Batch, llm: blockffn.Llama) -> None:
    texts = [TEXT, TEXT[::-1], TEXT[7:29], [1]]
    mixed = [row for i, text in enumerate(texts) for row in rows(text, 0, i)]
    order = np.random.default_rng(0).permutation(len(mixed))
    # any order is allowed as long as each sequence's positions ascend
    keyed = sorted(range(len(mixed)), key=lambda i: (mixed[i][1], order[i]))
    found = batch.decode([mixed[i] for i in keyed])
    for i, text in enumerate(texts):
        picked = np.array([found[k] for k, j in enumerate(keyed) if mixed[j][2] == [i]])
        assert nmse(picked, llm.logits(text)) < 1e-6, i


def test_shared_prefix(batch: Batch, reference: np.ndarray) -> None:
    if not batch.low.llama_n_seq_max(batch.ctx) == 4:
        pytest.skip("needs four sequences")
    found = [batch.decode(rows(TEXT[:20]))[-1]]
    batch.low.llama_memory_seq_cp(batch.memory, 0, 1, -1, -1)
    batch.decode(rows([99, 98, 97], 20, 0))
    found = list(batch.decode(rows(TEXT[20:], 20, 1)))
    assert nmse(np.array(found), reference[20:]) < 1e-6


def test_removed_part(batch: Batch, reference: np.ndarray) -> None:
    batch.decode(rows(TEXT[:25]))
    batch.decode(rows([101, 102, 103], 25))
    assert batch.low.llama_memory_seq_rm(batch.memory, 0, 25, -1)
    assert batch.low.llama_memory_seq_pos_max(batch.memory, 0) == 24
    assert nmse(batch.decode(rows(TEXT[25:], 25)), reference[25:]) < 1e-6


def test_removed_sequence_leaves_the_others(batch: Batch, reference: np.ndarray) -> None:
    batch.decode([*rows(TEXT[:25]), *rows([5, 6, 7], 0, 1)])
    assert batch.low.llama_memory_seq_rm(batch.memory, 1, -1, -1)
    assert nmse(batch.decode(rows(TEXT[25:], 25)), reference[25:]) < 1e-6


def test_shifted_text(batch: Batch) -> None:
    """Dropping the oldest tokens and moving the rest: RoPE is relative, so it equals positions without a gap."""
    if not batch.low.llama_memory_can_shift(batch.memory):
        pytest.skip("the cache cannot shift")
    batch.decode(rows(TEXT[:12]))
    whole = batch.decode(rows(TEXT[12:], 12))
    batch.low.llama_memory_seq_add(batch.memory, 0, 0, -1, 3)
    assert batch.low.llama_memory_seq_rm(batch.memory, 0, 15, -1)
    moved = batch.decode(rows(TEXT[12:], 15))
    assert nmse(moved, whole) < 1e-4  # the cache is F16


def test_state_of_one_sequence(batch: Batch, reference: np.ndarray) -> None:
    batch.decode(rows(TEXT[:25]))
    size = batch.low.llama_state_seq_get_size(batch.ctx, 0)
    buffer = (ctypes.c_uint8 * size)()
    assert batch.low.llama_state_seq_get_data(batch.ctx, buffer, size, 0) == size
    batch.low.llama_memory_clear(batch.memory, True)
    assert batch.low.llama_state_seq_set_data(batch.ctx, buffer, size, 2) > 0
    assert nmse(batch.decode(rows(TEXT[25:], 25, 2)), reference[25:]) < 1e-6


def test_saved_and_restored_state(llm: blockffn.Llama) -> None:
    llm.reset()
    llm.eval(TEXT[:30])
    state = llm.save_state()
    expected = llm.create_completion(TEXT, max_tokens=8, temperature=0.0)["choices"][0]["text"]
    llm.reset()
    llm.eval(TEXT[::-1])
    llm.load_state(state)
    assert llm.n_tokens == 30
    assert llm.create_completion(TEXT, max_tokens=8, temperature=0.0)["choices"][0]["text"] == expected


def test_state_file(llm: blockffn.Llama, reference: np.ndarray, tmp_path: Path) -> None:
    first, second = Batch(llm, 1), Batch(llm, 1)
    first.decode(rows(TEXT[:25]))
    path = str(tmp_path / "state").encode()
    tokens = (ctypes.c_int32 * 25)(*TEXT[:25])
    assert first.low.llama_state_save_file(first.ctx, path, tokens, 25)
    loaded, count = (ctypes.c_int32 * 64)(), ctypes.c_size_t()
    assert second.low.llama_state_load_file(second.ctx, path, loaded, 64, ctypes.byref(count))
    assert list(loaded[: count.value]) == TEXT[:25]
    assert nmse(second.decode(rows(TEXT[25:], 25)), reference[25:]) < 1e-6
    first.close()
    second.close()


@pytest.mark.parametrize("pooling", ["none", "mean", "last"])
def test_embeddings(model: Path, llm: blockffn.Llama, pooling: str) -> None:
    low: Any = library.load()
    kinds = {"none": 0, "mean": 1, "last": 3}
    embedder = blockffn.Llama(model, n_threads=1, embedding=True, pooling_type=kinds[pooling])
    assert low is not None
    text = "def add(a, b):"
    found = np.array(embedder.embed(text))
    expected = llm.hidden_states(embedder.tokenize(text.encode()))
    embedder.close()
    pooled = {"none": expected, "mean": expected.mean(0), "last": expected[-1]}[pooling]
    assert found.shape == pooled.shape and nmse(found, pooled) < 1e-5


def test_only_wanted_rows_cost_the_head(llm: blockffn.Llama) -> None:
    """Rows without logits are not there to read, and the wanted ones equal those of a full evaluation."""
    single = Batch(llm, 1)
    full = single.decode(rows(TEXT))
    single.low.llama_memory_clear(single.memory, True)
    single.batch.n_tokens = len(TEXT)
    wanted = [3, 17, 40]
    for i in range(len(TEXT)):
        single.batch.logits[i] = i in wanted
    assert single.low.llama_decode(single.ctx, single.batch) == 0
    for i in wanted:
        row = np.ctypeslib.as_array(single.low.llama_get_logits_ith(single.ctx, i), (llm.n_vocab(),))
        assert nmse(row, full[i]) < 1e-6
    single.close()


ADAPTED = {  # kind -> name in GGUF, part of the name in the checkpoint, shape of a product of rank 4
    "experts": ("ffn_up_exps", "mlp.up_proj", (7, 32, 64)),
    "router": ("ffn_gate_inp", "mlp.router_proj", (7, 64)),
}


@pytest.mark.parametrize("kind", list(ADAPTED))
def test_an_adapter_counts(tmp_path: Path, kind: str) -> None:
    """A LoRA on the router, or on expert matrices, which the sparse op does not see: as a checkpoint with it merged."""
    rng, rank, (name, part, shape) = np.random.default_rng(0), 4, ADAPTED[kind]
    a = rng.normal(size=(*shape[:-2], rank, shape[-1])).astype(np.float32)
    b = rng.normal(size=(*shape[:-1], rank), scale=0.05).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "blockffn")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    writer.add_tensor(f"blk.0.{name}.weight.lora_a", a)
    writer.add_tensor(f"blk.0.{name}.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def merge(tensors: dict[str, torch.Tensor]) -> None:
        found = next(found for found in tensors if f"layers.0.{part}" in found)
        tensors[found] += torch.from_numpy((b @ a).reshape(tensors[found].shape))

    for file, edit in (("plain", None), ("merged", merge)):
        source = write_checkpoint(tmp_path / file, edit=edit)
        blockffn.convert.convert_checkpoint(source, tmp_path / f"{file}.gguf", outtype="f32")
    plain, merged = opened_with(tmp_path / "plain.gguf"), opened_with(tmp_path / "merged.gguf")
    assert nmse(opened_with(tmp_path / "plain.gguf", lora_path=str(tmp_path / "adapter.gguf")), merged) < 1e-9
    assert nmse(plain, merged) > 1e-3


@pytest.mark.parametrize("stock", [True, False], ids=["llama", "blockffn"])
def test_attention_does_not_depend_on_the_place_in_the_cache(stock: bool, tmp_path: Path) -> None:
    """Bit-equal behind and between cells of another sequence, in stock architectures too: ggml's own kernel is not."""
    path = tmp_path / "model.gguf"
    if stock:
        write_llama(path, n_embd=128)
    else:
        source = write_checkpoint(tmp_path / "source", **KINDS["mla"])
        blockffn.convert.convert_checkpoint(source, path, outtype="f32")
    llm = blockffn.Llama(path, n_threads=2, n_threads_batch=2, flash_attn=True)
    text = np.random.default_rng(0).integers(3, 250, 601).tolist()
    found = []
    for before, between in ((0, 0), (1, 0), (130, 3)):
        batch = Batch(llm, 2, kv_unified=True, n_ctx=1024)
        if before:
            batch.decode(rows([9] * before, 0, 1))
        for i in range(3):
            batch.decode(rows(text[200 * i : 200 * i + 200], 200 * i))
            if between:
                batch.decode(rows([9] * between, before + between * i, 1))
        found.append(batch.decode(rows(text[600:], 600)))
        batch.close()
    llm.close()
    assert all(np.array_equal(logits, found[0]) for logits in found)
