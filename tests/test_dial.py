"""The dial of ReLU routing: threshold and union budget against the torch reference, invariance, refusals."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from conftest import Runner
from edited_gguf import edit_gguf

import blockffn
from blockffn import BlockffnError, dial, gguf_contract, inspection
from blockffn.eval.quality.metrics import nmse
from blockffn.speculative import ScriptedDrafter
from blockffn.speculative.policy import Plan
from blockffn.training.model import ReferenceModel

TOKENS = np.random.default_rng(5).integers(3, 250, 24).tolist()
MODELS: dict[str, dict[str, Any]] = {
    "blockffn": {"attention": "mla", "n_head": 2},
    "deco": {"family": "deco", "attention": "gqa", "n_head": 4, "norm": "simple", "bias": "rms"},
}


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReferenceModel]:
    """A GGUF in float32, and its checkpoint in torch."""
    folder = tmp_path_factory.mktemp(request.param)
    source = write_checkpoint(folder / "source", n_embd=256, n_layer=3, n_expert=42, **MODELS[request.param])
    blockffn.convert.convert_checkpoint(source, folder / "m.gguf", outtype="f32")
    return folder / "m.gguf", ReferenceModel.from_checkpoint(source)


@pytest.mark.parametrize("ffn", ["union", "dense"])
def test_threshold_against_torch(pair: tuple[Path, ReferenceModel], ffn: str) -> None:
    path, reference = pair
    shares = []
    with blockffn.Llama(path, n_ctx=64, ffn=ffn, n_threads=2) as llm:
        plain = llm.logits(TOKENS)
        for threshold in (0.0, 0.05, 0.3, 0.9):
            llm.router_threshold = threshold
            assert llm.router_threshold == pytest.approx(threshold)
            wanted = reference.forward(TOKENS, threshold=threshold)
            active = llm.active_experts(TOKENS)
            assert np.array_equal(active, wanted.active.numpy())
            assert nmse(llm.logits(TOKENS), wanted.logits.numpy()) < 1e-6
            shares.append(active.mean())
        assert shares == sorted(shares, reverse=True) and shares[-1] < 0.6 * shares[0]
        llm.router_threshold = 0.0
        assert np.array_equal(llm.logits(TOKENS), plain)  # the same bits as a model that knows no dial


def decode(llm: blockffn.Llama, sizes: list[int], budget: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Evaluate TOKENS in batches of these sizes, each with the budget: logits [tokens, n_vocab]."""
    target, at, found = llm.loop.target, 0, []
    target.truncate(0)
    for size in sizes:
        with dial.union_budget(llm.ctx, budget):
            target.evaluate_text(np.array(TOKENS[at : at + size], np.int32), at, slice(None))
        found.append(target.logits(size).copy())
        at += size
    return np.concatenate(found)


@pytest.mark.parametrize("ffn", ["union", "dense"])
def test_budget_against_torch(pair: tuple[Path, ReferenceModel], ffn: str) -> None:
    path, reference = pair
    budget = 9
    wanted = reference.forward(TOKENS[:8], threshold=0.05, budget=budget)
    with blockffn.Llama(path, n_ctx=64, ffn=ffn, router_threshold=0.05) as llm:
        llm.union_stats(reset=True)
        assert nmse(decode(llm, [8], budget), wanted.logits.numpy()) < 1e-6
        stats = llm.union_stats(reset=True)
        assert stats.union_size.tolist() == wanted.active.any(dim=1).sum(dim=1).tolist() == [budget] * llm.n_moe_layers
        assert np.array_equal(decode(llm, [1] * 8, budget), decode(llm, [1] * 8, 0))  # single tokens have none
        assert nmse(decode(llm, [8], 0), wanted.logits.numpy()) > 1e-4  # and it is gone with its batch


def test_threshold_keeps_tokens_independent(pair: tuple[Path, ReferenceModel]) -> None:
    """In exact mode a token has the same bits in any batch, with a threshold; with a budget it has not."""
    with blockffn.Llama(pair[0], n_ctx=64, n_threads=2, exact=True, router_threshold=0.3) as llm:
        single = decode(llm, [1] * 24, 0)
        for sizes in ([3] * 8, [8, 16], [24]):
            assert np.array_equal(decode(llm, sizes, 0), single)
    with blockffn.Llama(pair[0], n_ctx=64, n_threads=2) as llm:
        assert not np.array_equal(decode(llm, [8] * 3, 9), decode(llm, [3] * 8, 9))


def text(llm: blockffn.Llama, drafter: Any, plan: Plan | None = None, exact: bool = False) -> list[int]:
    llm.speculate(drafter, exact, plan)
    llm.reset()
    return list(itertools.islice(llm.generate(TOKENS[:6], temp=0.0), 48))


def test_speculation_with_the_dial(pair: tuple[Path, ReferenceModel]) -> None:
    """Exact greedy text stays equal with a threshold; the budget bounds the unions of verified batches alone."""
    with blockffn.Llama(pair[0], n_ctx=128, n_threads=2, router_threshold=0.2) as llm:
        plain = text(llm, None, exact=True)
        truth, n_vocab = TOKENS[:6] + plain, llm.n_vocab()
        assert text(llm, ScriptedDrafter(truth, 0.9, n_vocab), Plan(5), exact=True) == plain
        assert llm.router_threshold == pytest.approx(0.2)

        llm.speculate(None, exact=False)

        def largest_union(budget: int) -> float:
            llm.union_budget = budget
            assert len(text(llm, ScriptedDrafter(truth, 0.9, n_vocab), Plan(7))) == 48
            sizes = llm.statistics()["union_by_size"]
            return max(float(union) for size, union in sizes.items() if int(size) > 1)

        assert largest_union(6) == 6 < largest_union(0)


def test_a_new_threshold_forgets_the_text(pair: tuple[Path, ReferenceModel]) -> None:
    """What the cache holds was computed with the old one."""
    with blockffn.Llama(pair[0], n_ctx=128, router_threshold=0.6) as llm:
        text(llm, None)
        llm.router_threshold = 0.0
        found = list(itertools.islice(llm.generate(TOKENS[:6], temp=0.0), 8))
        assert llm.statistics()["reused_n"] == 0
        assert found == text(llm, None)[:8]


def test_copy_keeps_the_dial(pair: tuple[Path, ReferenceModel]) -> None:
    with blockffn.Llama(pair[0], n_ctx=64, router_threshold=0.3, union_budget=5) as llm, copy.copy(llm) as other:
        assert (other.router_threshold, other.union_budget) == (llm.router_threshold, 5)
        assert other.loop.target.budget == 5
        assert np.array_equal(other.logits(TOKENS), llm.logits(TOKENS))


@pytest.mark.parametrize("value", [-0.1, 1.0, 7.5, float("nan"), float("inf"), True, "0.1"])
def test_thresholds_that_are_refused(value: Any, blockffn_model: Path) -> None:
    expected = "router_threshold: expected a number from 0 to less than 1, found"
    with pytest.raises(BlockffnError, match=expected):
        blockffn.Llama(blockffn_model, n_ctx=64, router_threshold=value)
    with blockffn.Llama(blockffn_model, n_ctx=64) as llm:
        with pytest.raises(BlockffnError, match=expected):
            llm.router_threshold = value
        assert llm.router_threshold == 0


@pytest.mark.parametrize("value", [-1, 2.5, True, "8"])
def test_budgets_that_are_refused(value: Any, blockffn_model: Path) -> None:
    with pytest.raises(BlockffnError, match="union_budget: expected a number of experts, or 0 for no bound; found"):
        blockffn.Llama(blockffn_model, n_ctx=64, union_budget=value)


def test_exact_mode_refuses_a_budget(blockffn_model: Path, blockffn_cli: Runner) -> None:
    refusal = "union_budget: found 4 in exact mode, whose results must not depend on the batch"
    with pytest.raises(BlockffnError, match=refusal):
        blockffn.Llama(blockffn_model, n_ctx=64, union_budget=4, exact=True)
    with blockffn.Llama(blockffn_model, n_ctx=64, exact=True) as llm:
        with pytest.raises(BlockffnError, match=refusal):
            llm.union_budget = 4
        with pytest.raises(BlockffnError, match=r"union_budget: .*exact mode rules out"), dial.union_budget(llm.ctx, 4):
            pass
        llm.speculate(None, False)
        llm.union_budget = 4
        with pytest.raises(BlockffnError, match=refusal):
            llm.speculate(None, True)
        assert not llm.exact
    run = blockffn_cli("run", "-m", blockffn_model, "-p", "a", "--exact", "--union-budget", "4")
    assert run.returncode == 1 and refusal in run.stderr and "Traceback" not in run.stderr


def test_models_without_experts_have_no_dial(stock_model: Path) -> None:
    for argument in ({"router_threshold": 0.1}, {"union_budget": 3}):
        with pytest.raises(BlockffnError, match="no layer of this model has ReLU-routed experts"):
            blockffn.Llama(stock_model, n_ctx=64, **argument)
    with blockffn.Llama(stock_model, n_ctx=64, router_threshold=0.0, union_budget=0) as llm:
        assert llm.router_threshold == 0


def test_key_of_the_file(pair: tuple[Path, ReferenceModel], tmp_path: Path) -> None:
    """The file's threshold holds where nothing else is said; inspect shows it."""
    key = gguf_contract.key(gguf_contract.ROUTER_THRESHOLD)
    path = edit_gguf(pair[0], tmp_path / "m.gguf", keys={key: 0.3})
    assert inspection.describe(path)["router"]["threshold"] == pytest.approx(0.3)
    wanted = pair[1].forward(TOKENS, threshold=0.3).active.numpy()
    with blockffn.Llama(path, n_ctx=64) as llm:
        assert llm.router_threshold == pytest.approx(0.3)
        assert np.array_equal(llm.active_experts(TOKENS), wanted)
        llm.router_threshold = 0.0
        assert llm.active_experts(TOKENS).sum() > wanted.sum()
        llm.router_threshold = None
        assert np.array_equal(llm.active_experts(TOKENS), wanted)
    with blockffn.Llama(path, n_ctx=64, router_threshold=0.0) as llm:
        assert llm.router_threshold == 0
    with blockffn.Llama(pair[0], n_ctx=64, kv_overrides={key: 0.3}) as llm:
        assert np.array_equal(llm.active_experts(TOKENS), wanted)


@pytest.mark.parametrize(("value", "found"), [(-0.5, "-0.5"), (1.0, "1.0"), (float("nan"), "nan")])
def test_keys_that_are_refused(value: float, found: str, blockffn_model: Path) -> None:
    key = gguf_contract.key(gguf_contract.ROUTER_THRESHOLD)
    with pytest.raises(BlockffnError, match=f"{key}: expected a number from 0 to less than 1; found {found}"):
        blockffn.Llama(blockffn_model, n_ctx=64, kv_overrides={key: value})


def test_command_line(pair: tuple[Path, ReferenceModel], blockffn_cli: Runner) -> None:
    def sparsity(*arguments: str) -> float:
        run = blockffn_cli(
            "run", "-m", pair[0], "-p", "abc def", "-n", "16", "--temp", "0", "-c", "128", "--json", *arguments
        )
        assert run.returncode == 0, run.stderr
        return float(json.loads(run.stdout)["token_sparsity"])

    assert sparsity("--router-threshold", "0.5") > sparsity("--router-threshold", "0") == sparsity()
    run = blockffn_cli("run", "-m", pair[0], "-p", "a", "--router-threshold", "nan")
    assert run.returncode == 1 and "router_threshold: expected a number from 0 to less than 1, found nan" in run.stderr
