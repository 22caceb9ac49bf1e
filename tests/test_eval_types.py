"""`blockffn eval types`: figures, resuming, refusals; how fast a type is, no test asks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint

import blockffn
from blockffn.cli import main
from blockffn.errors import BlockffnError
from blockffn.eval.quality.perplexity import divergence
from blockffn.eval.types import measure
from blockffn.eval.types.measure import types
from blockffn.quantize import plan

TEXT = "def add(a, b):\n    return a + b\n\n" * 40
KINDS = ["Q8_0", "Q4_K_M", "Q4_0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("types")
    source = write_checkpoint(folder / "source", n_embd=256, n_head=2, n_layer=2, n_expert=16)
    blockffn.convert.convert_checkpoint(source, folder / "model.gguf", outtype="f32")
    (folder / "text.py").write_text(TEXT)
    return folder / "model.gguf"


def command(model: Path, *more: object) -> list[str]:
    line = ["eval", "types", model, "-f", model.parent / "text.py", "-c", 64, "-n", 192, "-t", 1]
    return [str(word) for word in (*line, "--types", ",".join(KINDS), *more)]


@pytest.fixture
def quick_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PHASES", (("decode", 1, 2), ("verify8", 8, 1), ("prefill", 16, 1)))


@pytest.mark.usefixtures("quick_phases")
def test_figures(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "types.jsonl"
    assert main(command(model, "--rounds", 2, "--output", output, "--plot", tmp_path / "plot", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["environment"]["cpu"]
    source, q8, k4, q4 = found["rows"]
    assert [row["type"] for row in found["rows"]] == ["F32", *KINDS]
    assert source["kld_mean"] == 0 and source["top1"] == 1 and source["bits_per_weight"] == 32
    assert 0 < q8["kld_mean"] < q4["kld_mean"] and q8["kld_99"] > q8["kld_mean"]
    assert (q4["nominal_bits"], k4["nominal_bits"]) == (4.5, 4.5)
    assert k4["bits_per_weight"] == plan(model, "Q4_K_M").bits_per_weight > 4.5 and k4["fallbacks"] > 0
    for row in found["rows"]:
        assert min(row[f"{phase}_tokens_per_second"] for phase in ("decode", "verify8", "prefill")) > 0
    blockffn.quantize.quantize(model, tmp_path / "q4.gguf", "Q4_0")
    options: dict[str, Any] = {"n_ctx": 64, "n_threads": 1}
    with blockffn.Llama(tmp_path / "q4.gguf", **options) as small, blockffn.Llama(model, **options) as whole:
        wanted = divergence(small, whole, whole.tokenize(TEXT.encode())[:192], 64)
    assert (q4["perplexity"], q4["kld_99"], q4["top1"]) == (wanted.perplexity, wanted.percentile_99, wanted.top1)
    assert (tmp_path / "plot.png").stat().st_size > 5000 and "verify 8" in (tmp_path / "plot.svg").read_text()
    assert not list(tmp_path.glob("*.files"))


@pytest.mark.usefixtures("quick_phases")
@pytest.mark.parametrize("step", ["_quality", "_seconds"])
def test_resuming_measures_what_is_missing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    """Interrupted in the third piece of either kind: two are kept, two are left; quality comes out bit for bit."""
    output, asked, whole = tmp_path / "types.jsonl", [], getattr(measure, step)

    def interrupted(path: Path, *rest: Any) -> Any:
        asked.append(path.stem)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return whole(path, *rest)

    monkeypatch.setattr(measure, step, interrupted)
    line = command(model, "--rounds", 1, "--output", output)
    assert main(line) == 130
    assert f"{output} has what was done" in capsys.readouterr().err
    assert Path(f"{output}.files").is_dir()
    assert main([*line, "--json"]) == 0
    assert asked == ["model", "Q8_0", "Q4_K_M", "Q4_K_M", "Q4_0"]
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert main(command(model, "--rounds", 0, "--json")) == 0
    for row, same in zip(rows, json.loads(capsys.readouterr().out)["rows"], strict=True):
        assert {name: row[name] for name in same} == same
    assert main([*line, "-c", "32"]) == 1
    assert "was begun with window 64, this run has 32" in capsys.readouterr().err


def test_a_checkpoint_is_converted(model: Path) -> None:
    rows = types(model.parent / "source", TEXT, ["Q8_0"], n_ctx=64, max_tokens=64, threads=1, rounds=0)
    assert [row["type"] for row in rows] == ["F32", "Q8_0"] and rows[0]["kld_mean"] == 0


def test_a_stock_model(stock_model: Path) -> None:
    rows = types(stock_model, TEXT, ["Q8_0"], n_ctx=64, max_tokens=64, threads=1, rounds=0)
    assert rows[1]["kld_mean"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: types(model, TEXT, ["Q4_00"]), "unknown type 'Q4_00': did you mean Q4_0"),
        (lambda model: types(model, "short", ["Q8_0"], n_ctx=64, rounds=0), "one window needs 64"),
        (lambda model: types(model.with_name("missing"), TEXT), "missing"),
    ],
)
def test_bad_input(model: Path, change: Callable[[Path], Any], message: str) -> None:
    with pytest.raises(BlockffnError, match=message):
        change(model)


def test_a_quantized_model_is_refused(model: Path, tmp_path: Path) -> None:
    blockffn.quantize.quantize(model, tmp_path / "q4.gguf", "Q4_0")
    with pytest.raises(BlockffnError, match="most weights are Q4_0 already: give the F32, F16 or BF16 file"):
        types(tmp_path / "q4.gguf", TEXT)
