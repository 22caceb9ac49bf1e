"""`blockffn eval`: every measure prints figures and JSON; bad input is one message."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint

from blockffn.cli import main


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("import os\n\nfor name in os.listdir():\n    print(name, 42)  # caf\u00e9\n" * 8, encoding="utf-8")
    return file


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["eval", *map(str, arguments)])
    output = capsys.readouterr()
    return code, output.out, output.err


def both(capsys: pytest.CaptureFixture[str], arguments: Sequence[object]) -> tuple[str, dict[str, Any]]:
    """Return the text and the JSON object of one measure."""
    code, lines, _ = evaluate(capsys, *arguments)
    assert code == 0
    code, output, _ = evaluate(capsys, *arguments, "--json")
    assert code == 0 and output.count("\n") == 1
    return lines, json.loads(output)


def test_ppl(capsys: pytest.CaptureFixture[str], blockffn_model: Path, text: Path) -> None:
    lines, figures = both(capsys, ["ppl", "-m", blockffn_model, "-f", text, "-c", 64, "-t", 1])
    assert f"perplexity {figures['perplexity']:.4f}" in lines
    assert figures["n_ctx"] == 64 and figures["n_scored"] == 31 * figures["n_windows"]


def test_kld(capsys: pytest.CaptureFixture[str], blockffn_model: Path, text: Path) -> None:
    arguments = ["kld", "-m", blockffn_model, "--reference", blockffn_model, "-f", text, "-c", 64, "-t", 1, "-n", 130]
    lines, figures = both(capsys, arguments)
    assert "100.00 % agree" in lines and figures["n_windows"] == 2 and abs(figures["mean"]) < 1e-9


def test_kld_from_the_checkpoint_in_torch(capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path) -> None:
    """Its own checkpoint: nothing but the order of summation is left. Another one with the same shapes: far away."""
    from blockffn.convert import convert_checkpoint

    own = write_checkpoint(tmp_path / "own", n_layer=1)
    other = write_checkpoint(tmp_path / "other", n_layer=1, seed=1)
    convert_checkpoint(own, tmp_path / "m.gguf", outtype="f32")
    arguments = ["kld", "-m", tmp_path / "m.gguf", "-f", text, "-c", 64, "-t", 1, "-n", 130, "--json"]
    code, output, _ = evaluate(capsys, *arguments, "--reference", own)
    figures = json.loads(output)
    assert code == 0 and figures["top1"] == 1.0 and abs(figures["mean"]) < 1e-6 and figures["largest"] < 1e-5
    assert figures["perplexity"] == pytest.approx(figures["reference_perplexity"], rel=1e-4)
    _, output, _ = evaluate(capsys, *arguments, "--reference", other)
    assert json.loads(output)["mean"] > 1e-3


def test_sparsity(capsys: pytest.CaptureFixture[str], blockffn_model: Path, text: Path) -> None:
    lines, figures = both(capsys, ["sparsity", "-m", blockffn_model, "-f", text, "-n", 70, "--layers", "-t", 1])
    assert figures["n_tokens"] == 70 and list(figures["cls"]) == ["2", "4", "8", "16", "32", "64"]
    # headings, means over all and over live experts, two layers, union, segments of 4, 16 and 64 tokens
    assert len(lines.splitlines()) == 3 + 2 + 2 + 1 + 3
    assert f"{100 * figures['tls']:.2f}" in lines and f"{100 * figures['live_tls']:.2f}" in lines
    assert f"{sum(figures['layer_dead'])} of 14 experts are dead" in lines
    assert 0 <= figures["dead_share"] <= 1 and 0 <= figures["always_on_share"] <= 1
    assert set(figures["live_cls"]) == set(figures["cls"]) and len(figures["layer_sets"]) == 2


def test_parity(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Passes for the model's own checkpoint; another one with the same shapes fails with exit code 1."""
    from blockffn.convert import convert_checkpoint

    own = write_checkpoint(tmp_path / "own", n_layer=1)
    other = write_checkpoint(tmp_path / "other", n_layer=1, seed=1)
    gguf = tmp_path / "model.gguf"
    convert_checkpoint(own, gguf, outtype="f32")
    lines, figures = both(capsys, ["parity", "-m", gguf, "--checkpoint", own])
    assert "verdict  passed" in lines and figures["passed"] and figures["nmse"] <= figures["bound"] == 1e-6
    assert figures["greedy_equal"] == 64
    code, output, _ = evaluate(capsys, "parity", "-m", gguf, "--checkpoint", other)
    assert code == 1 and "FAILED: NMSE of the logits" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ppl", "-m", "missing.gguf", "-f", "{text}"], "missing.gguf: no such file"),
        (["ppl", "-m", "{model}", "-f", "missing.txt"], "missing.txt: No such file"),
        (["ppl", "-m", "{model}", "-f", "{text}", "-c", "4000"], "one window needs 4000"),
        (["sparsity", "-m", "{stock}", "-f", "{text}"], "no layer of this model has routed experts"),
        (["sparsity", "-m", "{model}", "-f", "{model}"], "expected UTF-8 text"),
        (["parity", "-m", "{model}", "--checkpoint", "{text}"], "text.txt"),
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str],
    blockffn_model: Path,
    stock_model: Path,
    text: Path,
    arguments: list[str],
    message: str,
) -> None:
    places = {"model": blockffn_model, "stock": stock_model, "text": text}
    code, _, error = evaluate(capsys, *(word.format(**places) for word in arguments))
    assert code == 1 and message in error and error.startswith("error: ") and "Traceback" not in error


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate(capsys, "sparsty", "-m", "x")
    assert stop.value.code == 2
