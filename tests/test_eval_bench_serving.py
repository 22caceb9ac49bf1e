"""`blockffn bench streams` and `bench harness`: what is written and answered beside real servers; failures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from blockffn.cli import main
from blockffn.errors import BlockffnError
from blockffn.eval.bench import serving
from blockffn.eval.studies import harness, streams

TEXT = "".join(f"def f{i}(x):\n    return x + {i * 37 % 11}\n" for i in range(60))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.py"
    file.write_text(TEXT)
    return file


def rows(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    assert main(["bench", *map(str, words)]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    return found


def test_streams(capsys: pytest.CaptureFixture[str], stock_model: Path, text: Path) -> None:
    few = ("--streams", 2, "--tokens", 6, "--prompt", 8, "--rounds", 2, "-t", 1)
    found = rows(capsys, "streams", "-m", stock_model, "-f", text, *few)
    assert [row["way"] for row in found] == list(streams.WAYS)
    for row in found:
        assert 0 < row["one_low"] <= row["one"] <= row["one_high"] and row["ratio"] == row["all"] / row["one"]


def test_streams_count_whole_texts() -> None:
    """Each way writes the same prompts, first one at a time and then others of the same length all at once."""
    asked: list[list[list[int]]] = []

    def write(prompts: Any) -> int:
        asked.append([list(prompt) for prompt in prompts])
        return 5 * len(prompts)

    rates = streams.measure({"way": write}, [[i, i + 1] for i in range(6)], 2, 2)
    assert asked == [[[0, 1]], [[2, 3]], [[3, 4]], [[3, 2], [4, 3]], [[4, 5]], [[5, 6]], [[5, 4], [6, 5]]]
    assert len(rates["way"][0]) == len(rates["way"][1]) == 2 and min(rates["way"][0]) > 0


def test_harness(capsys: pytest.CaptureFixture[str], stock_model: Path, text: Path) -> None:
    pytest.importorskip("lm_eval")
    few = ("--questions", 2, "--context", 12, "--ending", 3, "--texts", 2, "--tokens", 4, "--rounds", 1, "-t", 1)
    found = rows(capsys, "harness", "-m", stock_model, "-f", text, *few)
    assert [row["n"] for row in found] == [8, 8, 8, 2, 2] and all(row["rate"] > 0 for row in found)


def test_figures_are_medians_with_ranges() -> None:
    assert harness.figures("a", 3, [2.0, 9.0, 1.0]) == {"name": "a", "n": 3, "rate": 2.0, "low": 1.0, "high": 9.0}
    row = streams.figures("a", [1.0, 3.0, 2.0], [4.0, 9.0, 6.0])
    assert (row["one"], row["one_low"], row["one_high"], row["all"], row["ratio"]) == (2.0, 1.0, 3.0, 6.0, 3.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("streams", "--ways", "engine,server"), "--ways: expected some of engine, serve, llama-server, found server"),
        (("streams", "--rounds", "500"), "expected at least 128256 tokens"),
        (("harness", "--questions", "9999"), "give a longer text"),
        (("harness", "-f", "missing.txt"), "missing.txt: No such file"),
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str], stock_model: Path, text: Path, words: tuple[str, ...], message: str
) -> None:
    study, *more = words
    assert main(["bench", study, "-m", str(stock_model), "-f", str(text), "-t", "1", *more]) == 1
    assert message in capsys.readouterr().err


def test_server_that_ends_at_once() -> None:
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    with pytest.raises(BlockffnError, match="mine: the server ended with code 3: no such model"):
        with serving.serving("mine", command):
            pass


def test_answer_of_a_server_is_heard(stock_model: Path) -> None:
    with serving.serving("llama-server", serving.llama_server(str(stock_model), 1, 64, 1)) as base:
        answer = serving.complete(base, {"prompt": [1, 5], "max_tokens": 2, "ignore_eos": True})
        assert answer["usage"]["completion_tokens"] == 2
        with pytest.raises(BlockffnError, match="status 400"):
            serving.complete(base, {"max_tokens": 2})
    with pytest.raises(BlockffnError, match="refused"):
        serving.complete(base, {"prompt": [1]})
