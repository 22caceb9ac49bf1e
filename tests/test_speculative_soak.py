"""A soak: random prompts, interruptions and changing drafters, the cache held against a fresh evaluation bit by bit.

BLOCKFFN_SOAK_TOKENS=200000 pytest tests/test_speculative_soak.py      # the long run; the default is a short one
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
from pathlib import Path

import numpy as np
from tiny_llama import N_VOCAB

import blockffn
from blockffn.speculative import ModelDrafter, NGramDrafter, ScriptedDrafter
from blockffn.speculative.cost import Plan

TOKENS = int(os.environ.get("BLOCKFFN_SOAK_TOKENS", "3000"))
CHECK_EVERY = 1000


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def test_soak(stock_model: Path) -> None:
    llm = blockffn.Llama(stock_model, n_ctx=512, n_threads=1, n_batch=64, exact=True)
    random = np.random.default_rng(0)
    truth = random.integers(3, N_VOCAB, 512)
    model = ModelDrafter(stock_model, max_nodes=4)
    kinds = [
        (NGramDrafter((2, 1)), None),
        (ScriptedDrafter(truth, 0.5, N_VOCAB, branch=3), Plan(16, True)),
        (model, Plan(4)),
        (NGramDrafter((1,), tree=True), Plan(10, True)),
        (None, None),
    ]
    produced, checked, memory = 0, 0, []
    for turn in itertools.count():
        if produced >= TOKENS:
            break
        if turn % 5 == 0:
            drafter, plan = kinds[turn // 5 % len(kinds)]
            llm.set_up_speculation(drafter, True, plan)
        prompt = [1, *random.integers(3, N_VOCAB, int(random.integers(1, 60))).tolist()]
        wanted = int(random.integers(5, 300))
        produced += len(list(itertools.islice(llm.generate(prompt, temp=float(random.choice([0.0, 0.8]))), wanted)))
        if produced // CHECK_EVERY > checked:
            checked = produced // CHECK_EVERY
            llm._loop.settle()
            text = llm.input_ids[: llm.n_tokens].tolist()
            assert llm._loop.target.length() == len(text)
            llm.eval([5])
            kept = llm._loop._logits[-1].copy()
            llm.n_tokens = 0
            llm.eval([*text, 5])
            assert np.array_equal(llm._loop._logits[-1], kept)
            gc.collect()
            if sys.platform == "linux":
                memory.append(resident_megabytes())
    assert checked >= TOKENS // CHECK_EVERY
    if len(memory) > 20:
        assert memory[-1] < memory[10] + 5.0, memory
    llm.close()
    model.close()
