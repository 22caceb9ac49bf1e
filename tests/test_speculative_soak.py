"""A soak: random prompts, interruptions and changing drafters, the cache held against a fresh evaluation bit by bit.

BLOCKFFN_SOAK_TOKENS=200000 pytest -s tests/test_speculative_soak.py     # the long run; the default is a short one

Two models: one of the stock architecture with a draft model, and a BlockFFN model with an EAGLE head and its trees.
Drafters take turns, each with fixed plans and with the automatic choice; half of the texts are sampled.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from tiny_head import write_head

import blockffn
from blockffn.convert.eagle import convert_head
from blockffn.speculative import (
    Combination,
    Context,
    Draft,
    EagleDrafter,
    ModelDrafter,
    NGramDrafter,
    ScriptedDrafter,
)
from blockffn.speculative.policy import Plan

TOKENS = int(os.environ.get("BLOCKFFN_SOAK_TOKENS", "2000"))  # of each model
CHECK_EVERY = 1000
TURNS = 5  # generations until the next drafter takes over
GROWTH = 5.0  # megabytes allowed after the tenth check

Kind = tuple[Any, Plan | None]


class Bushy(ModelDrafter):
    """The draft model's continuation with a wrong sibling before every right token: trees that are mostly accepted."""

    name = "bushy"
    can_tree = True

    def propose(self, context: Context, n: int) -> Draft:
        chain = super().propose(context, n // 2).tokens.tolist()
        tokens = [token for right in chain for token in (abs(right - 1), right)]
        parents = [max(-1, 2 * (i // 2) - 1) for i in range(len(tokens))]
        return Draft.tree(tokens, parents, self.name)


@pytest.fixture(params=["stock", "blockffn"])
def soaked(request: pytest.FixtureRequest, stock_model: Path, tmp_path: Path) -> Iterator[tuple[Any, list[Kind]]]:
    """A model in exact mode and its drafters with their plans."""
    path = stock_model if request.param == "stock" else tmp_path / "model.gguf"
    if request.param == "blockffn":
        write_checkpoint(tmp_path / "source", n_embd=64, n_head=2, attention="gqa", n_ctx=512)
        blockffn.convert.convert_checkpoint(tmp_path / "source", path, outtype="f32")
        convert_head(write_head(tmp_path / "head"), path, tmp_path / "head.gguf", outtype="f32")
    llm = blockffn.Llama(path, n_ctx=512, n_threads=1, n_batch=64, exact=True)
    truth = np.random.default_rng(1).integers(3, llm.n_vocab(), 512)
    kinds: list[Kind] = [
        (NGramDrafter((2, 1)), None),
        (ScriptedDrafter(truth, 0.5, llm.n_vocab(), branch=3), Plan(16, True)),
        (ModelDrafter(path, max_nodes=4), Plan(4)),
        (Bushy(path, max_nodes=16), Plan(12, True)),
        (NGramDrafter((1,), tree=True), Plan(10, True)),
        (None, None),
    ]
    if request.param == "blockffn":
        head = EagleDrafter(tmp_path / "head.gguf", llm)
        kinds += [(head, Plan(4)), (head, Plan(31, True)), (Combination([NGramDrafter((3,)), head]), None)]
    yield llm, kinds
    llm.close()
    for drafter, _ in kinds:
        if drafter is not None:
            drafter.close()


@dataclass
class Record:
    """What was produced, and the memory at each check."""

    produced: int = 0
    checked: int = 0
    drafted: int = 0
    accepted: int = 0
    trees: int = 0
    megabytes: list[float] = field(default_factory=list)


def test_soak(soaked: tuple[Any, list[Kind]]) -> None:
    llm, kinds = soaked
    random = np.random.default_rng(0)
    record = Record()
    for turn in itertools.count():
        if record.produced >= TOKENS:
            break
        if turn % TURNS == 0:
            drafter, plan = kinds[turn // TURNS % len(kinds)]
            llm.speculate(drafter, True, plan)
        generate(llm, random, record)
        if record.produced // CHECK_EVERY > record.checked:
            record.checked = record.produced // CHECK_EVERY
            check_cache(llm)
            gc.collect()
            record.megabytes.append(resident_megabytes())
    report(record)
    assert record.checked >= TOKENS // CHECK_EVERY and record.trees > 0 and record.drafted > 0
    if len(record.megabytes) > 20:
        assert record.megabytes[-1] < record.megabytes[10] + GROWTH, record.megabytes


def generate(llm: Any, random: np.random.Generator, record: Record) -> None:
    """A random prompt, sampled or greedy, left at a random token."""
    prompt = [1, *random.integers(3, llm.n_vocab(), int(random.integers(1, 60))).tolist()]
    wanted, temperature = int(random.integers(5, 300)), float(random.choice([0.0, 0.8]))
    record.produced += len(list(itertools.islice(llm.generate(prompt, temp=temperature), wanted)))
    statistics = llm.statistics()
    record.drafted += statistics["drafted"]
    record.accepted += statistics["accepted"]
    record.trees += statistics["tree_steps"]


def check_cache(llm: Any) -> None:
    """The logits after the cached text equal, bit by bit, those of the same text evaluated afresh."""
    llm._loop.settle()
    text = llm.input_ids[: llm.n_tokens].tolist()
    assert llm._loop.target.length() == len(text)
    llm.eval([5])
    kept = llm._loop._logits[-1].copy()
    llm.n_tokens = 0
    llm.eval([*text, 5])
    assert np.array_equal(llm._loop._logits[-1], kept)


def resident_megabytes() -> float:
    if sys.platform != "linux":
        return 0.0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def report(record: Record) -> None:
    """Printed for `pytest -s`: the counts, and the memory at the start, at every tenth of the run, and at the end."""
    curve = record.megabytes[:: max(1, len(record.megabytes) // 10)] + record.megabytes[-1:]
    print(
        f"\n{record.produced} tokens, {record.checked} checks, {record.accepted} of {record.drafted} drafted tokens "
        f"accepted, {record.trees} trees; resident MB: " + " ".join(f"{value:.1f}" for value in curve)
    )
