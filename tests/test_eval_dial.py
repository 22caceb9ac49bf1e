"""`blockffn eval dial`: figures, resuming, refusals; what is fast is not asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from conftest import Runner

import blockffn
from blockffn import BlockffnError
from blockffn.cli import main
from blockffn.eval.dial import measure, report
from blockffn.eval.dial.points import Point, Record, points

TEXT = "def add(a, b):\n    return a + b\n\n" * 40
OPTIONS = ["-c", "64", "-n", "192", "-t", "1", "--past", "32", "--thresholds", "0.3,0.6", "--budgets", "3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dial")
    source = write_checkpoint(folder / "source", n_embd=256, n_head=2, n_layer=2, n_expert=16)
    blockffn.convert.convert_checkpoint(source, folder / "model.gguf", outtype="f32")
    (folder / "text.py").write_text(TEXT)
    return folder / "model.gguf"


def dial(model: Path, *arguments: str | Path) -> list[str]:
    return ["eval", "dial", "-m", str(model), "-f", str(model.parent / "text.py"), *OPTIONS, *map(str, arguments)]


def test_figures(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "dial.json"
    assert main(dial(model, "--rounds", "1", "--output", output, "--plot", tmp_path / "plot", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(output.read_text())
    assert found["environment"]["cpu"] and found["window"] == 64
    plain, low, high, budget = found["rows"]
    assert [(row["threshold"], row["budget"]) for row in found["rows"]] == [(0, 0), (0.3, 0), (0.6, 0), (0, 3)]
    assert plain["kld_mean"] == 0 and plain["top1"] == 1
    assert 0 < low["kld_mean"] < high["kld_mean"] and budget["kld_mean"] > 0
    assert plain["union1"] > low["union1"] > high["union1"] and budget["union8"] <= 3 < plain["union8"]
    assert all(row["decode_tokens_per_second"] > 0 < row["verify8_tokens_per_second"] for row in found["rows"])
    with blockffn.Llama(model, n_threads=1, n_ctx=64) as llm:
        tokens = llm.tokenize(TEXT.encode())[:192]
        wanted = blockffn.eval.quality.perplexity.perplexity(llm, tokens, 64)
        assert plain["perplexity"] == pytest.approx(wanted.perplexity)
        llm.router_threshold = 0.6
        assert high["perplexity"] == blockffn.eval.quality.perplexity.perplexity(llm, tokens, 64).perplexity
    assert (tmp_path / "plot.png").stat().st_size > 5000
    drawn = (tmp_path / "plot.svg").read_text()
    assert "experts read per layer" in drawn and "verify 8, budget" in drawn and "<dc:date>" not in drawn


def test_resuming_measures_what_is_missing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "dial.json"
    whole = measure.Quality.of
    asked: list[Point] = []

    def of(self: measure.Quality, point: Point) -> dict[str, Any]:
        asked.append(point)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return whole(self, point)

    monkeypatch.setattr(measure.Quality, "of", of)
    assert main(dial(model, "--rounds", "0", "--output", output)) != 0
    assert len(json.loads(output.read_text())["rows"]) == 2
    assert main(dial(model, "--rounds", "0", "--output", output)) == 0
    assert asked == [Point(0), Point(0.3), Point(0.6), Point(0.6), Point(0, 3)]
    first = output.read_text()
    assert main(dial(model, "--rounds", "0", "--output", output)) == 0  # nothing left to do
    assert len(asked) == 5 and output.read_text() == first
    output.unlink()
    assert main(dial(model, "--rounds", "0", "--output", output)) == 0  # two runs, the same figures bit for bit
    assert json.loads(output.read_text())["rows"] == json.loads(first)["rows"]
    assert "threshold 0.6" in capsys.readouterr().out
    assert main(dial(model, "--rounds", "0", "--output", output, "-c", "32")) == 1
    assert "was measured with window 64, now asked for 32" in capsys.readouterr().err


def test_shape_has_speed_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    from blockffn.eval.planted import files
    from blockffn.eval.planted import model as planted

    monkeypatch.setattr(files, "files", lambda *_args, **_options: [model])
    monkeypatch.setattr(planted, "text", lambda _shape, n: [3 + i % 200 for i in range(n)])
    arguments = ["eval", "dial", "--shape", "tiny", "--rounds", "1", "-t", "1", "--past", "8", "--thresholds", "0.5"]
    assert main([*arguments, "--json"]) == 0
    plain, high, *_ = json.loads(capsys.readouterr().out)["rows"]
    assert "perplexity" not in plain and plain["union8"] > high["union8"]


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(tmp_path / "dial.json", {"model": "m"})
    record.add(Point(0), {"perplexity": 3.0})

    def full(*_arguments: Any, **_options: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BlockffnError, match=r"dial\.json: cannot be written: No space left on device; what it held"):
        record.add(Point(0.1), {"perplexity": 3.1})
    assert [path.name for path in tmp_path.iterdir()] == ["dial.json"]
    assert len(Record(tmp_path / "dial.json", {"model": "m"}).rows) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "MODEL"], "--file: expected the text to evaluate"),
        (["--shape", "tiny", "-f", "TEXT"], "--file: goes with -m"),
        (["-m", "MODEL", "-f", "TEXT", "--thresholds", "0.1,x"], "--thresholds: expected numbers with commas between"),
        (["-m", "MODEL", "-f", "TEXT", "--thresholds", "1.5"], "router_threshold: expected a number from 0 to less"),
        (["-m", "MODEL", "-f", "TEXT", "--budgets", "-2"], "union_budget: expected a number of experts"),
        (["-m", "MODEL", "-f", "TEXT", "-c", "100000"], "one window needs 100000"),
        (["-m", "MODEL", "-f", "TEXT", "--output", "TEXT"], "expected a file that `blockffn eval dial` wrote"),
    ],
)
def test_bad_input(arguments: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"MODEL": str(model), "TEXT": str(model.parent / "text.py")}
    assert main(["eval", "dial", *(names.get(part, part) for part in arguments)]) == 1
    assert message in capsys.readouterr().err


def test_models_without_experts(stock_model: Path, blockffn_cli: Runner) -> None:
    run = blockffn_cli("eval", "dial", "-m", stock_model, "-f", __file__)
    assert run.returncode == 1 and "no layer of this model has ReLU-routed experts: there is no dial" in run.stderr


def test_table_has_the_columns_that_were_measured() -> None:
    rows: list[dict[str, Any]] = [{"threshold": 0.0, "budget": 0, "union8": 9.0}, {"threshold": 0.1, "budget": 4}]
    lines = report.table(rows).splitlines()
    assert lines[0].split() == ["dial", "union", "8"] and lines[2].split()[-1] == "-"
    assert points([0.1, 0.0], [4, 4]) == [Point(0.0), Point(0.1), Point(0.0, 4)]
