"""`inspect --speculation`: what measured steps say about drafts; models with experts and without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import blockffn
from blockffn.cli import main
from blockffn.eval.quality import advisor
from blockffn.eval.quality.advisor import SIZES, Best, advise, break_even, gain


def test_by_hand() -> None:
    """A step of 2 costs 1.2 plain ones, of 4 costs 1.6: a chain of 1 pays from 0.2."""
    found = advise(128, {1: 10.0, 2: 12.0, 4: 16.0})
    assert found.breaks_even[1] == pytest.approx(0.2, abs=1e-3)
    rate = found.breaks_even[3]
    assert rate is not None and gain(3, rate) == pytest.approx(1.6, abs=1e-3)
    assert found.pays_from == found.breaks_even[1]
    speeds = {chain: gain(chain, 0.9) / found.cost(1 + chain) for chain in range(4)}
    assert found.cost(3) == pytest.approx(1.4)
    assert found.best[0.9] == Best(3, pytest.approx(max(speeds.values())))
    assert found.best[0.5].speedup == pytest.approx(1.25)  # of a chain of 1 and of 2


def test_where_steps_are_as_dear_as_their_tokens() -> None:
    found = advise(128, {1: 10.0, 2: 21.0, 4: 43.0})
    assert found.pays_from is None and found.best[0.9].chain == 0 and break_even(3, 4.3) is None
    assert "drafting never pays" in advisor.describe(advisor.Advice(2, 0, [found]))


@pytest.mark.parametrize("kind", ["blockffn", "stock"])
def test_measures_any_model(kind: str, blockffn_model: Path, stock_model: Path) -> None:
    model = blockffn_model if kind == "blockffn" else stock_model
    with blockffn.Llama(model, n_threads=1) as llm:
        found = advisor.measure(llm)
        assert found.contexts[0].past < llm.n_ctx()
    for context in found.contexts:
        assert list(context.step_ms) == list(SIZES) and min(context.step_ms.values()) > 0
        if kind == "stock":
            assert context.union is None
            continue
        assert context.union is not None
        assert 0 < context.union[1] <= context.union[32] <= 7 and found.n_experts == 7
    table = advisor.describe(found)
    assert table.count("tokens   step, ms") == len(found.contexts)


def test_command(capsys: pytest.CaptureFixture[str], blockffn_model: Path, tmp_path: Path) -> None:
    arguments = [
        "inspect",
        str(blockffn_model),
        "--speculation",
        "-t",
        "1",
        "--plot",
        str(tmp_path / "advice"),
        "--json",
    ]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    context = report["speculation"]["contexts"][0]
    assert set(context["best"]) == {"0.5", "0.7", "0.9"} and report["parameters"]["routed"] > 0
    assert {file.name for file in tmp_path.iterdir()} == {"advice.png", "advice.svg"}
    assert main(["inspect", str(blockffn_model), "--plot", "x"]) == 1
    assert "--plot: needs --speculation" in capsys.readouterr().err
