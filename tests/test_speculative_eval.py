"""The experiments of docs/speculative.md run on a tiny model, and their figures mean what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockffn.errors import BlockffnError
from blockffn.eval.planted.guesses import GuessingDrafter
from blockffn.eval.studies import choice as spec_choice
from blockffn.eval.studies import differences as text_differences
from blockffn.eval.studies import exact as exact_cost
from blockffn.eval.studies import loop as loop_overhead
from blockffn.speculative.drafter import Context
from blockffn.speculative.measured import StepTimes


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(0).integers(97, 123, 4000).astype(np.uint8)
    path.write_bytes(words.tobytes())
    return path


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_choice(
    stock_model: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = StepTimes.add  # the choice sees the times of a machine that is never disturbed
    monkeypatch.setattr(StepTimes, "add", lambda times, tokens, _seconds: learn(times, tokens, 1e-3 + 1e-5 * tokens))
    command = ["-m", str(stock_model), "-f", str(text), "-t", "1", "--past", "16", "--tokens", "40", "--segment", "20"]
    assert spec_choice.main([*command, "--acceptance", "0,1", "--all", "--repeats", "2"]) == 0
    none, every = last_line(capsys)["rows"]
    assert none["acceptance"] == 0.0 and len(none["rates"]) == 2 + len(spec_choice.PLANS)
    assert none["tokens"] >= 40 and every["tokens"] >= 40
    assert [sum(steps.values()) for steps in none["steps_by_size"]] == 2 * [none["tokens"]]  # nothing is ever right
    assert max(sum(steps.values()) for steps in every["steps_by_size"]) <= 20  # everything is
    median, lowest, highest = every["to_best"]
    assert lowest <= median <= highest and lowest <= every["automatic"] / every["best_rate"] <= highest


def test_exact_cost(stock_model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exact_cost.main(["-m", str(stock_model), "-f", str(text), "-t", "1", "--rounds", "1", "--past", "16"]) == 0
    rows = last_line(capsys)["rows"]
    assert [row["phase"] for row in rows] == ["decode", "verify 4", "verify 8", "tree 32", "prefill 512"]
    assert all(row["ratio"] == pytest.approx(row["exact_ms"] / row["default_ms"]) for row in rows)


@pytest.mark.parametrize("mode", ["default", "exact"])
def test_differences(stock_model: Path, text: Path, capsys: pytest.CaptureFixture[str], mode: str) -> None:
    command = ["-m", str(stock_model), "-f", str(text), "-t", "1", "--texts", "2", "--length", "40"]
    assert text_differences.main([*command, *(["--exact"] if mode == "exact" else [])]) == 0
    rows = last_line(capsys)["rows"]
    assert {row["mode"] for row in rows} == {mode} and len(rows) == len(text_differences.PLANS)
    assert all(row["different"] <= row["tokens"] == 80 for row in rows)
    if mode == "exact":
        assert all(row["error_max"] == 0.0 and row["different"] == 0 for row in rows)
    else:
        assert max(row["error_max"] for row in rows) > 0.0  # the control: batches do change the last bits


def test_loop_overhead(stock_model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert loop_overhead.main(["-m", str(stock_model), "-f", str(text), "-t", "1", "--tokens", "60"]) == 0
    output = capsys.readouterr().out
    rows = json.loads(output.splitlines()[-1])["rows"]
    assert [row["draft"] for row in rows] == list(loop_overhead.PLANS)
    assert all(0.0 < row["loop_ms"] < 50.0 for row in rows)
    assert "leaf_sets" in output  # the profile names functions of ours


def test_a_text_is_needed(stock_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BlockffnError, match="-m: needs -f"):
        spec_choice.main(["-m", str(stock_model)])
    (tmp_path / "short.txt").write_text("ab")
    with pytest.raises(BlockffnError, match=r"short.txt: expected at least \d+ tokens, found 3"):
        spec_choice.main(["-m", str(stock_model), "-f", str(tmp_path / "short.txt")])


@pytest.mark.parametrize("tree", [False, True])
def test_guesses_are_right_as_often_as_they_promise(tree: bool) -> None:
    truth = np.random.default_rng(1).integers(0, 500, 6000).tolist()
    drafter = GuessingDrafter(truth, 0.6, 500)
    given = []
    for at in range(1, 5900, 3):
        draft = drafter.propose(Context(np.array(truth[:at], dtype=np.int32), tree), 8)
        assert len(draft) == 8 and len(set(zip(draft.parents.tolist(), draft.tokens.tolist(), strict=True))) == 8
        node, tokens = -1, 1
        for child in range(8):
            if draft.parents[child] == node and draft.tokens[child] == truth[at + draft.depth()[child] - 1]:
                node, tokens = child, tokens + 1
        given.append(tokens)
    assert np.mean(given) == pytest.approx(drafter.expected(8, tree), rel=0.05)


def test_a_better_drafter_knows_what_a_worse_one_knows() -> None:
    truth = list(range(100, 400))
    worse, better = (np.array(GuessingDrafter(truth, p, 1000).right) == 0 for p in (0.4, 0.7))
    assert (better | ~worse).all() and better.sum() > worse.sum()
