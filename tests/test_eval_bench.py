"""`blockffn bench` on tiny models: the JSON line that is promised, its arithmetic, and failures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blockffn.errors import BlockffnError
from blockffn.eval.bench import models as bench
from blockffn.eval.bench import report as bench_report
from blockffn.eval.bench.models import Candidate, Phase
from blockffn.eval.planted import files as planted_files
from blockffn.eval.planted import model as planted
from blockffn.eval.planted.files import PlantedModels

ROW = {
    "model",
    "ffn",
    "drafter",
    "phase",
    "n",
    "tokens_per_second",
    "spread",
    "tokens_per_step",
    "acceptance",
    "peak_rss_mb",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> PlantedModels:
    return planted_files.models("tiny", "F16", folder=tmp_path_factory.mktemp("bench"))


def test_json_line(models: PlantedModels, blockffn_cli: Callable[..., Any], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words to run through the model " * 20)
    arguments = ["-m", models.union, "--dense", models.dense, "-f", text, "-t", 1, "--rounds", 1, "--verify", "2,5"]
    result = blockffn_cli("bench", *arguments, "--prefill", 33, "--past", 17, "--json")
    assert result.returncode == 0, result.stderr
    *_, last = result.stdout.strip().splitlines()
    report = json.loads(last)
    assert set(report) == {"environment", "rows"}
    rows = report["rows"]
    assert all(set(row) >= ROW for row in rows)
    wanted = [("decode", 1), ("verify", 2), ("verify", 5), ("prefill", 33)]
    assert [(row["ffn"], row["phase"], row["n"]) for row in rows] == [
        (f, *w) for f in ("union", "dense") for w in wanted
    ]
    assert {row["model"] for row in rows} == {models.union.name, models.dense.name}
    for row in rows:
        assert row["peak_rss_mb"] > 20 and row["spread"] >= 0
    environment = report["environment"]
    assert environment["threads"] == 1 and environment["past"] == 17
    assert set(environment["buffers"]) == {"union", "dense"} and all(environment["buffers"].values())
    assert 0 < environment["tls"] < 1
    assert "union / dense" in result.stdout and "peak memory" in result.stdout


def test_rows_from_known_seconds() -> None:
    """Speeds are tokens over the median of all steps; the spread is half the distance of the quartiles over it."""
    phase = Phase("verify", 4, 5)
    worker: Any = SimpleNamespace(
        candidate=Candidate("folder/m.gguf", "union"), seconds={phase: [0.1, 0.2, 0.4, 0.5, 9.0]}, statistics={}
    )
    (row,) = bench_report.rows(worker, {"peak_rss_mb": 7.0}, [phase])
    assert (row["model"], row["samples"], row["peak_rss_mb"]) == ("m.gguf", 5, 7.0)
    assert row["tokens_per_second"] == pytest.approx(10.0) and row["step_ms"] == pytest.approx(400.0)
    assert row["spread"] == pytest.approx(0.375)


def test_steps_and_rounds(models: PlantedModels) -> None:
    """The warm-up round is not counted; texts shorter than the run start again."""
    timed = [Phase("decode", 1, 3), Phase("verify", 4, 2), Phase("prefill", 600, 1)]
    pair = [Candidate(str(models.union), "union"), Candidate(str(models.dense), "dense")]
    result = bench.run(pair, {"tokens": planted.text(models.shape, 50)}, 1, rounds=2, timed=timed, past=8)
    assert [row["samples"] for row in result.rows] == [6, 4, 2, 6, 4, 2]
    assert result.activity["tls"] == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "missing.gguf"], "missing.gguf: no such file"),
        (["--shape", "tiny", "--dense", "x.gguf"], "--dense and --file: these go with -m"),
        (["--shape", "tiny", "--verify", "1,8"], "--verify: expected numbers of tokens from 2 to 256"),
        (["--shape", "tiny", "--verify", "two"], "found 'two'"),
        (["--shape", "tiny", "--type", "Q3_X"], "Q3_X"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
) -> None:
    from blockffn.cli import main

    monkeypatch.setattr(planted_files, "CACHE", tmp_path)
    assert main(["bench", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    with pytest.raises(BlockffnError, match=r"broken.gguf: .*damaged or truncated"):
        bench.run([Candidate(str(broken), "union")], {"tokens": [1]}, 1, rounds=1)


def test_a_process_that_dies_says_why(models: PlantedModels) -> None:
    worker = bench.Process(Candidate(str(models.union), "union"), 1, 8, None)
    worker.ask({"tokens": planted.text(models.shape, 50)})
    worker.process.kill()
    with pytest.raises(BlockffnError, match="ended with code -9"):
        worker.time(Phase("decode", 1, 1))
    worker.close()


def test_a_process_that_raises_says_what(models: PlantedModels) -> None:
    worker = bench.Process(Candidate(str(models.union), "union"), 1, 8, None)
    worker.ask({"tokens": planted.text(models.shape, 50)})
    with pytest.raises(BlockffnError, match=r"ValueError: phase: found 'dance'"):
        worker.time(Phase("dance", 1, 1))
    worker.close()
