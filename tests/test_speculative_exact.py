"""Exact mode: greedy text equal to plain decoding, token for token, for every type of weights and any draft.

The prompt-sized, chain-sized and tree-sized batches below take different kernels in the default mode: llamafile's from
2 rows on, packed gemm from 4, tiled K-quants from 8, tiled attention from many; attention over more than 512 cells is
split between threads for single tokens only.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoints import write_checkpoint
from tiny_llama import N_VOCAB, write_llama

import blockffn
from blockffn import BlockffnError, _capi, library, logs
from blockffn.speculative import ScriptedDrafter
from blockffn.speculative.policy import Plan

PROMPT = [1, 50, 60, 70]
NATIVE = ("F32", "F16", "BF16", "Q8_0", "Q4_0")


def build(kind: str, folder: Path) -> Path:
    """Write a model of one kind: a type of the stock architecture, or attention and type of ours."""
    path = folder / "model.gguf"
    if kind in NATIVE:
        return write_llama(path, seed=3, n_embd=256, n_ff=256, kind=gguf.GGMLQuantizationType[kind])
    if kind in ("Q4_K", "Q6_K", "IQ4_NL"):
        write_llama(folder / "f32.gguf", seed=3, n_embd=256, n_ff=256)
        command = [library.program("llama-quantize"), folder / "f32.gguf", path, kind]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        return path
    attention, outtype = kind.split("-")
    write_checkpoint(folder / "source", attention=attention, n_embd=256, n_head=4, n_layer=2)
    blockffn.convert.convert_checkpoint(folder / "source", path, outtype=outtype)
    return path


@pytest.mark.parametrize("kind", [*NATIVE, "Q4_K", "IQ4_NL", "mla-f32", "mla-q8_0", "gqa-bf16"])
def test_greedy_text_is_bit_exact(kind: str, tmp_path: Path) -> None:
    n_vocab = N_VOCAB if "-" not in kind else 512
    n = 700 if kind == "F16" else 150
    llm = blockffn.Llama(build(kind, tmp_path), n_ctx=256 if n == 150 else 1024, n_threads=2, exact=True)

    def text(drafter: Any = None, plan: Plan | None = None) -> list[int]:
        llm.speculate(drafter, True, plan)
        llm.reset()
        return list(itertools.islice(llm.generate(PROMPT, temp=0.0, stopping_criteria=None), n))

    plain = text()
    truth = PROMPT + plain
    assert text(ScriptedDrafter(truth, 0.0, n_vocab), Plan(9)) == plain
    assert text(ScriptedDrafter(truth, 1.0, n_vocab), Plan(3)) == plain
    assert text(ScriptedDrafter(truth, 0.85, n_vocab, max_nodes=20), Plan(20)) == plain
    assert text(ScriptedDrafter(truth, 0.7, n_vocab, branch=3), Plan(16, True)) == plain
    llm.close()


@pytest.mark.parametrize(
    ("kind", "ffn"), [("F16", "union"), ("Q4_0", "union"), ("Q4_K", "dense"), ("mla-q8_0", "union")]
)
def test_logits_do_not_depend_on_the_batch(kind: str, ffn: str, tmp_path: Path) -> None:
    """The same tokens one by one and in pieces: bit-equal in exact mode, on our kernels and ("dense") on stock ones.

    A control: in default mode F16 and stock Q4_K differ. Others need not: our kernels are invariant in every mode.
    """
    path = build(kind, tmp_path)
    tokens = np.random.default_rng(0).integers(3, 250, 64).astype(np.int32)
    differs = {}
    for exact in (True, False):
        llm = blockffn.Llama(path, n_ctx=128, n_threads=1, flash_attn=True, ffn=ffn)
        llm.speculate(None, exact)
        found = []
        for size in (1, 3, 16, 64):
            llm.n_tokens = 0
            rows = []
            for start in range(0, 64, size):
                llm._loop.target.truncate(start)
                llm._loop.target.evaluate_text(tokens[start : start + size], start, slice(None))
                rows.append(llm._loop.target.logits(len(tokens[start : start + size])).copy())
            found.append(np.concatenate(rows))
        differs[exact] = [int((rows != found[0]).any(axis=1).sum()) for rows in found]
        llm.close()
    assert differs[True] == [0, 0, 0, 0]
    assert sum(differs[False]) > 0 or kind not in ("F16", "Q4_K")


def test_another_backend_refuses_exact_mode(stock_model: Path) -> None:
    """A program that registers an accelerator, as BLAS or a GPU would be: only the CPU alone promises exact mode."""
    result = subprocess.run(
        [library.program("test-exact-mode"), stock_model], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and re.search(r"[1-9]\d* checks, 0 failed", result.stdout), result.stdout


def test_refusal_names_the_reason_and_changes_nothing(stock_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = blockffn.Llama(stock_model, n_ctx=64, n_threads=1)
    text = llm.create_completion("a", max_tokens=4, temperature=0.0)["choices"][0]["text"]
    real = _capi.function

    def refuse(_ctx: int, _exact: bool) -> bool:
        logs._receive(logs.ERROR, b"set_batch_invariant: results of backend BLAS may depend on the batch\n", None)
        return False

    monkeypatch.setattr(_capi, "function", lambda name: refuse if name == "llama_set_batch_invariant" else real(name))
    with pytest.raises(BlockffnError, match="exact mode is not possible here: results of backend BLAS may depend"):
        llm.speculate(None, exact=True)
    assert not llm.exact
    assert llm.create_completion("a", max_tokens=4, temperature=0.0)["choices"][0]["text"] == text
    llm.close()
