"""Engines at equal work: the two files, what is read from a llama-bench, the table, and bad input."""

from __future__ import annotations

import json
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from blockffn.cli import main
from blockffn.errors import BlockffnError
from blockffn.eval.bench import engines
from blockffn.eval.bench.engines import Engine
from blockffn.eval.planted import equal_work
from blockffn.eval.planted.equal_work import EqualWork
from blockffn.eval.planted.model import SHAPES

SHAPE = replace(SHAPES["tiny-deco"], name="tiny-peer", n_dense=0, shared_dim=0, activation="silu", gated=True)
MATRICES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "attn_q", "attn_output", "ffn_gate_inp")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> EqualWork:
    return equal_work.equal_work(SHAPE, "Q4_0", tmp_path_factory.mktemp("peer"))


def fake(folder: Path, body: str) -> Path:
    """Write a program that stands for an engine's llama-bench."""
    program = folder / "llama-bench"
    program.write_text(f"#!{sys.executable}\nimport json, sys\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def test_the_files_hold_the_same_matrices(work: EqualWork) -> None:
    ours, stock = ({t.name: t for t in GGUFReader(file).tensors} for file in (work.ours, work.stock))
    assert work.n_used == 4  # of 21
    for name in MATRICES:
        pair = [side[f"blk.1.{name}.weight"] for side in (ours, stock)]
        assert pair[0].tensor_type == pair[1].tensor_type and pair[0].shape.tolist() == pair[1].shape.tolist()
        if name != "attn_q":  # whose rows the converter permutes, as the architecture's RoPE wants them
            a, b = (dequantize(tensor.data, tensor.tensor_type) for tensor in pair)
            assert np.array_equal(a, b), name
    sizes = [sorted(t.n_bytes for t in side.values() if t.n_bytes > 4096) for side in (ours, stock)]
    assert sizes[0] == sizes[1]


def test_both_run(work: EqualWork) -> None:
    """The patched llama-bench runs ours and the stock file; an engine given by path takes part with its options."""
    chosen = engines.engines(work, [], None)
    chosen += [engines.parse_engine(f"again={chosen[0].program} -fa 0", work.stock)]
    rows = engines.measure(chosen, 1, 2, sizes=(1, 5))
    assert [(row["engine"], row["phase"], row["n"]) for row in rows] == [
        (name, *column)
        for name in (engines.OURS, engines.STOCK, "again")
        for column in (("at once", 1), ("at once", 5), ("decode", 1))
    ]
    assert all(row["tokens_per_second"] > 0 and row["samples"] == 2 * engines.REPETITIONS for row in rows)
    assert {row["model"] for row in rows} == {work.ours.name, work.stock.name}


def test_what_is_read(tmp_path: Path) -> None:
    """Lines before the JSON are skipped; arguments and options arrive; medians count."""
    body = """
print("repacked 3 tensors")
assert sys.argv[-2:] == ["-rtr", "1"] and sys.argv[sys.argv.index("-p") + 1] == "4"
print(json.dumps([{"n_prompt": 4, "n_gen": 0, "samples_ts": [40.0, 50.0, 90.0]},
                  {"n_prompt": 0, "n_gen": 32, "samples_ts": [7.0, 8.0, 8.0]}], indent=2))
"""
    engine = Engine("ik", fake(tmp_path, body), Path("m.gguf"), ("-rtr", "1"))
    rows = engines.measure([engine], 2, 1, sizes=(4,))
    assert [(row["phase"], row["n"], row["tokens_per_second"]) for row in rows] == [
        ("at once", 4, 50),
        ("decode", 1, 8),
    ]
    ours = [row | {"engine": engines.OURS, "tokens_per_second": 2 * row["tokens_per_second"]} for row in rows]
    assert engines.table([*ours, *rows]).splitlines() == [
        "| tokens at once | 4 | decode |",
        "|---|---|---|",
        "| blockffn | 100 | 16 |",
        "| ik | 50 (2.00x) | 8 (2.00x) |",
    ]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('unknown model architecture')", "engine ik: .*llama-bench ended with code 1: unknown model arch"),
        ("print('hello')", "expected 2 results in the JSON of llama-bench, found 0"),
        ("print('[')", "expected 2 results"),
        ("print(json.dumps([{'n_prompt': 4}], indent=1))", "found 0"),
    ],
)
def test_an_engine_that_fails(body: str, message: str, tmp_path: Path) -> None:
    engine = Engine("ik", fake(tmp_path, body), Path("m.gguf"))
    with pytest.raises(BlockffnError, match=message):
        engine.run(1, (4,), 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "/opt/llama-bench"], "--engine: expected NAME=PATH/llama-bench, found '/opt/llama-bench'"),
        (["--engine", "ik=missing/llama-bench"], "--engine: missing/llama-bench: no such file"),
        (["--engine", "ik=x", "-m", "m.gguf"], "--engine: makes its files itself"),
        ([], "expected -m M.gguf with -f FILE, or --engine NAME=PATH"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["bench", "peers", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_two_engines_of_one_name(work: EqualWork, tmp_path: Path) -> None:
    program = fake(tmp_path, "")
    with pytest.raises(BlockffnError, match="needs a name of its own"):
        engines.engines(work, [f"blockffn={program}"], None)


def test_the_command(work: EqualWork, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Files are made, all engines run, and the table and one line of JSON come out."""
    entries = [{"n_prompt": n, "n_gen": 0 if n else 32, "samples_ts": [10.0]} for n in (*engines.SIZES, 0)]
    program = fake(tmp_path, f"print(json.dumps({entries}, indent=2))")
    monkeypatch.setattr(equal_work, "equal_work", lambda **_: work)
    monkeypatch.setattr(engines, "engines", lambda w, others, _: [Engine("a", program, w.ours),
                                                                 engines.parse_engine(others[0], w.stock)])  # fmt: skip
    assert main(["bench", "peers", "--engine", f"b={program}", "--rounds", "1", "-t", "1", "--json"]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    found = json.loads(printed[-1])
    assert found["environment"]["experts_per_token"] == 4 and len(found["rows"]) == 2 * (len(engines.SIZES) + 1)
    assert any(line.startswith("| b | 10 (1.00x)") for line in printed)
