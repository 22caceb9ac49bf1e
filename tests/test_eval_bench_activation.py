"""NormSiLU beside SiLU in whole models: equal weights and routing, and the arithmetic of the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

import blockffn
from blockffn.cli import main
from blockffn.errors import BlockffnError
from blockffn.eval.bench import activation as bench_activation
from blockffn.eval.bench import models as bench
from blockffn.eval.planted import files as planted_files
from blockffn.eval.planted import model as planted
from blockffn.gguf_file import read_gguf

TINY = planted.SHAPES["tiny-deco"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("activation")


@pytest.fixture(scope="module")
def pair(folder: Path) -> list[Path]:
    """The tiny DECO shape with NormSiLU and with SiLU."""
    shapes = (TINY, planted.with_activation(TINY, "silu"))
    return [planted_files.files(shape, ("expert",), "Q4_0", folder)[0] for shape in shapes]


def test_only_the_activation_differs(pair: list[Path]) -> None:
    first, second = (read_gguf(path) for path in pair)
    assert [file.get("expert_activation") for file in (first, second)] == list(bench_activation.ACTIVATIONS)
    names = [{tensor.name: tensor for tensor in file.tensors} for file in (first, second)]
    only = {name.split(".", 2)[2] for name in set(names[0]) - set(names[1])}
    assert only == {"ffn_act_mean.weight", "ffn_act_norm.weight"} and set(names[1]) < set(names[0])
    values = [{tensor.name: tensor.data for tensor in GGUFReader(path).tensors} for path in pair]
    assert all(np.array_equal(values[0][name], values[1][name]) for name in names[1])
    assert [path.name for path in pair] == ["tiny-deco-Q4_0.gguf", "tiny-deco-silu-Q4_0.gguf"]


def test_routing_is_the_same_and_logits_are_not(pair: list[Path]) -> None:
    text, active, logits = planted.text(TINY, 64), [], []
    for path in pair:
        llm = blockffn.Llama(str(path), n_ctx=256, n_threads=1)
        active.append(llm.active_experts(text))
        logits.append(llm.logits(text))
        llm.close()
    assert np.array_equal(*active) and 0.1 < active[0].mean() < 0.3
    assert not np.allclose(*logits, rtol=1e-3, atol=1e-3)


def test_figures(pair: list[Path], folder: Path) -> None:
    timed = bench.phases([3], prefill=0)
    rows = bench_activation.compare(TINY, "Q4_0", 1, 1, timed, folder=folder)
    assert [(row["phase"], row["n"]) for row in rows] == [("decode", 1), ("verify", 3)]
    for row in rows:
        assert row["samples"] >= 4 and row["silu_spread"] >= 0
    text = bench_activation.table(rows)
    assert "decode" in text and "verify 3" in text and len(text.splitlines()) == 3


def test_rows_pair_the_models_by_phase() -> None:
    """The ratio is NormSiLU over SiLU, whatever the order of the rows."""
    rows = [
        {"model": name, "phase": phase, "n": 1, "step_ms": ms, "spread": 0.1, "samples": 3}
        for name, phase, ms in (("b", "decode", 2.0), ("a", "verify", 9.0), ("a", "decode", 3.0), ("b", "verify", 6.0))
    ]
    found = bench_activation.rows_of(rows, ["a", "b"])
    assert [(row["phase"], row["norm_silu_ms"], row["silu_ms"], row["ratio"]) for row in found] == [
        ("decode", 3.0, 2.0, 1.5), ("verify", 9.0, 6.0, 1.5)
    ]  # fmt: skip


def test_only_deco_has_such_a_twin(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BlockffnError, match="expected one of family deco, found tiny of family blockffn"):
        planted.with_activation(planted.SHAPES["tiny"], "silu")
    with pytest.raises(SystemExit) as stop:
        main(["bench", "activation", "--shape", "1.2b"])
    assert stop.value.code == 2 and "deco-1.2b" in capsys.readouterr().err


def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"phase": "decode", "n": 1, "samples": 5, "norm_silu_ms": 2.0, "norm_silu_spread": 0.1, "silu_ms": 1.6}
    monkeypatch.setattr(bench_activation, "compare", lambda *_, **__: [row | {"silu_spread": 0.0, "ratio": 1.25}])
    assert main(["bench", "activation", "--shape", "tiny-deco", "--threads", "1", "--json"]) == 0
    *_, table, last = capsys.readouterr().out.splitlines()
    assert table.split()[0] == "decode" and table.endswith("1.250")
    report = json.loads(last)
    assert report["rows"][0]["ratio"] == 1.25 and report["environment"]["threads"] == 1
