"""`blockffn bench streams` and `bench harness`: what is written and answered beside real servers; failures."""

from __future__ import annotations

import argparse
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
    """Ways take turns text by text, then each writes others of the same length all at once."""
    asked: list[tuple[str, list[list[int]]]] = []

    def writer(way: str) -> streams.Write:
        def write(prompts: streams.Prompts) -> int:
            asked.append((way, [list(prompt) for prompt in prompts]))
            return 5 * len(prompts)

        return write

    rounds = [([[9, 4]], []), ([[1, 2], [1, 3]], [[6, 7], [6, 8]])]
    rates = streams.measure({"a": writer("a"), "b": writer("b")}, rounds)
    assert asked[2:] == [
        *(("a", [[1, 2]]), ("b", [[1, 2]]), ("a", [[1, 3]]), ("b", [[1, 3]])),
        *(("a", [[6, 7], [6, 8]]), ("b", [[6, 7], [6, 8]])),
    ]
    assert all(prompts == [[9, 4]] for _, prompts in asked[:2])
    assert all(len(one) == len(several) == 1 and one[0] > 0 for one, several in rates.values())


def test_prompts_that_begin_alike(stock_model: Path) -> None:
    """No prompt comes twice, not even its beginning in the other half of a round."""
    args = argparse.Namespace(streams=2, prompt=3, shared=4, rounds=1)
    rounds = streams._prompts(str(stock_model), lambda _llm, n: list(range(n)), args)
    single, together = rounds[1]
    assert single == [[10, 11, 12, 13, 14, 15, 16], [10, 11, 12, 13, 17, 18, 19]]
    assert together == [[13, 12, 11, 10, 16, 15, 14], [13, 12, 11, 10, 19, 18, 17]]


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
        (("streams", "--shared", "-1"), "--shared: expected 0 or more tokens, found -1"),
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
