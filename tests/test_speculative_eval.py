"""The experiments of docs/speculative.md run on a tiny model, and their figures mean what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockffn import library
from blockffn.cli import main
from blockffn.eval.planted import files as planted_files
from blockffn.eval.planted import head as planted_head
from blockffn.eval.studies import choice, differences, exact, loop, temperature
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
    assert main(["bench", "choice", *command, "--acceptance", "0,1", "--all", "--repeats", "2"]) == 0
    none, every = last_line(capsys)["rows"]
    assert none["acceptance"] == 0.0 and len(none["rates"]) == 2 + len(choice.PLANS)
    assert none["tokens"] >= 40 and every["tokens"] >= 40
    assert [sum(steps.values()) for steps in none["steps_by_size"]] == 2 * [none["tokens"]]  # nothing is ever right
    assert max(sum(steps.values()) for steps in every["steps_by_size"]) <= 20  # everything is
    median, lowest, highest = every["to_best"]
    assert lowest <= median <= highest and lowest <= every["automatic"] / every["best_rate"] <= highest


def test_choice_beside_a_head(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plans asked for, with a head whose time counts and whose tokens do not."""
    models = planted_files.models("tiny", folder=tmp_path)
    head = planted_head.head(models, n_draft=500)
    command = ["-m", str(models.union), "-f", str(text), "-t", "1", "--past", "16", "--tokens", "24", "--segment", "12"]
    command += ["--acceptance", "1", "--repeats", "1", "--plans", "chain 2,chain 3"]
    assert main(["bench", "choice", *command, "--head", str(head)]) == 0
    found = last_line(capsys)
    assert found["environment"]["head"] == str(head)
    assert list(found["rows"][0]["rates"]) == ["plain", "automatic", "chain 2", "chain 3"]
    with pytest.raises(SystemExit):
        main(["bench", "choice", *command, "--plans", "chain two"])
    assert "expected auto, chain N or tree N" in capsys.readouterr().err


def test_exact_cost(stock_model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["-m", str(stock_model), "-f", str(text), "-t", "1", "--rounds", "1", "--past", "16"]
    assert main(["bench", "exact", *command]) == 0
    rows = last_line(capsys)["rows"]
    assert [row["phase"] for row in rows] == ["decode", "verify 4", "verify 8", "tree 31", "prefill 512"]
    assert [row["samples"] for row in rows] == [16, 8, 6, 4, 1]  # the round that warms up is not counted


def test_exact_cost_compares_the_modes() -> None:
    """The ratio is exact over default, of medians over all counted rounds."""

    class Clock:
        def __init__(self, exact: bool) -> None:
            self.exact, self.calls = exact, 0

        def run(self, phase: str) -> list[float]:
            self.calls += 1
            return [100.0] if self.calls <= len(exact.REPEATS) else [0.003] if self.exact else [0.001, 0.002, 9.0]

    modes: Any = [Clock(False), Clock(True)]
    row = exact.measure(modes, 2)[0]
    assert (row["default_ms"], row["exact_ms"], row["ratio"], row["samples"]) == (2.0, 3.0, 1.5, 6)


@pytest.mark.parametrize("mode", ["default", "exact"])
def test_differences(stock_model: Path, text: Path, capsys: pytest.CaptureFixture[str], mode: str) -> None:
    command = ["-m", str(stock_model), "-f", str(text), "-t", "1", "--texts", "2", "--length", "40"]
    assert main(["bench", "differences", *command, *(["--exact"] if mode == "exact" else [])]) == 0
    rows = last_line(capsys)["rows"]
    assert {row["mode"] for row in rows} == {mode} and len(rows) == len(differences.PLANS)
    assert all(row["different"] <= row["tokens"] == 80 for row in rows)
    if mode == "exact":
        assert all(row["error_max"] == 0.0 and row["different"] == 0 for row in rows)
    else:
        assert max(row["error_max"] for row in rows) > 0.0  # the control: batches do change the last bits


def test_loop_overhead(stock_model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "loop", "-m", str(stock_model), "-f", str(text), "-t", "1", "--tokens", "60"]) == 0
    output = capsys.readouterr().out
    rows = json.loads(output.splitlines()[-1])["rows"]
    assert [row["draft"] for row in rows] == [*loop.PLANS, "streams 8", "streams 8 x chain 4"]
    assert all(row["loop_ms"] > 0.0 for row in rows)
    assert "leaf_sets" in output  # the profile names functions of ours


def test_native_time_is_taken_off_by_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step of 10 s, 3 s pass in llama_decode of the model, 2 s in that of a head."""
    now, low_level = [0.0], library.load()
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])

    def decode(_ctx: int, seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(low_level, "llama_decode", decode)
    clock = loop.NativeClock()
    with clock:
        low_level.llama_decode(1, 3.0)
        low_level.llama_decode(2, 2.0)
        now[0] += 5.0
    low_level.llama_decode(1, 1.0)  # outside the block nothing is counted
    assert clock.split(1) == (3.0, 2.0) and clock.split(7) == (0.0, 5.0)


def test_a_text_is_needed(stock_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "choice", "-m", str(stock_model)]) == 1
    assert "-m: needs -f" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("ab")
    assert main(["bench", "choice", "-m", str(stock_model), "-f", str(tmp_path / "short.txt")]) == 1
    assert re.search(r"short.txt: expected at least \d+ tokens, found 3", capsys.readouterr().err)


def test_a_study_with_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "choise"])
    assert stop.value.code == 2 and "differences" in capsys.readouterr().err


def test_temperature(stock_model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A drafter with the target's own weights is always right with the shared noise, and not by best guesses."""
    command = ["-m", str(stock_model), "-f", str(text), "-t", "1", "--draft", str(stock_model), "--temperatures", "0,1"]
    assert main(["bench", "temperature", *command, "--texts", "2", "--tokens", "24", "--rounds", "2"]) == 0
    rows = last_line(capsys)["rows"]
    assert [(row["temperature"], row["way"]) for row in rows] == [
        (0.0, "plain"), (0.0, "coupled"), (1.0, "plain"), (1.0, "coupled"), (1.0, "stock"),
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["low"] <= row["rate"] <= row["high"]
        assert (row["tokens_per_step"] == 1.0) == (row["way"] == "plain")
        assert row["by_position"] == sorted(row["by_position"], reverse=True)
    assert rows[1]["by_position"][0] > 0.9 and rows[3]["by_position"][0] > 0.9 > rows[4]["by_position"][0]


def test_temperature_of_a_planted_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script drafts with the luck asked for; its text is the same at every temperature."""
    models = planted_files.models("tiny", folder=tmp_path)
    monkeypatch.setattr(planted_files, "models", lambda name: models)
    sums: dict[Any, Any] = {}
    monkeypatch.setattr(temperature, "measure", lambda *a, real=temperature.measure: sums.update(real(*a)) or sums)
    command = ["--shape", "tiny", "-t", "1", "--acceptance", "1", "--texts", "2", "--tokens", "40", "--rounds", "1"]
    assert main(["bench", "temperature", *command]) == 0
    for (_, way), found in sums.items():
        assert found.figures()["tokens_per_step"] == (1.0 if way == "plain" else pytest.approx(4.0, abs=0.2))


def test_temperature_refuses(stock_model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--shape", "tiny", "--draft", "ngram"], "--draft: goes with -m"),
        (["-m", str(stock_model), "-f", str(text)], "--draft: goes with -m, and -m needs it"),
        (["--shape", "tiny", "--temperatures", "0,warm"], "expected numbers from 0 on with commas between"),
    ):
        assert main(["bench", "temperature", *arguments]) == 1
        assert message in capsys.readouterr().err
