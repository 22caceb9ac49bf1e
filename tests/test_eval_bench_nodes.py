"""`blockffn bench --ops`: what nodes take, told apart by kind; the switch of a context; the table and the plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blockffn
from blockffn import node_times
from blockffn.cli import main
from blockffn.eval.bench import nodes
from blockffn.eval.planted import files as planted_files
from blockffn.eval.planted import model as planted
from blockffn.eval.planted.files import PlantedModels


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> PlantedModels:
    return planted_files.models("tiny", "F16", folder=tmp_path_factory.mktemp("nodes"))


@pytest.mark.parametrize("threads", [1, 4])
def test_the_switch(models: PlantedModels, threads: int) -> None:
    """Nothing is summed while it is off, switching on starts at zero, and the logits are the same bits."""
    llm = blockffn.Llama(str(models.union), n_ctx=64, n_threads=threads, n_threads_batch=threads)
    tokens = planted.text(models.shape, 9)

    def logits() -> np.ndarray[Any, np.dtype[np.float32]]:
        llm.reset()
        llm.eval(tokens)
        return np.ctypeslib.as_array(llm._ctx.get_logits(), (llm.n_vocab(),)).copy()

    assert node_times.read(llm.ctx) == []
    plain = logits()
    for _ in range(2):
        node_times.switch(llm.ctx, True)
        assert np.array_equal(plain, logits())
        found = node_times.read(llm.ctx)
        counts = {entry.op: entry.n_nodes for entry in found if entry.op in ("UNION_FFN", "RELU_ROUTER")}
        assert counts == dict.fromkeys(counts, models.shape.n_layer) and len(counts) == 2
        assert all(entry.work_ms > 0 and entry.wait_ms >= 0 for entry in found)
        per_head = [e for e in found if e.label in ("attn_k_b.weight", "attn_v_b.weight")]
        assert sum(entry.n_nodes for entry in per_head) == 2 * models.shape.n_layer
    node_times.switch(llm.ctx, False)
    logits()
    assert node_times.read(llm.ctx) == found


def test_both_graphs_by_kind(models: PlantedModels, blockffn_cli: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ["-m", models.union, "--dense", models.dense, "-t", 1, "--rounds", 1, "--verify", "5", "--past", "9,17"]
    result = blockffn_cli("bench", "--ops", *arguments, "--plot", tmp_path / "step", "--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout.strip().splitlines()[-1])["rows"]
    wanted = [(past, n, ffn) for past in (9, 17) for n in (1, 5) for ffn in ("union", "dense")]
    assert [(row["past"], row["n"], row["ffn"]) for row in rows] == wanted
    for row in rows:
        parts = row["ms"]
        assert list(parts) == list(nodes.KINDS) and sum(parts.values()) == pytest.approx(row["step_ms"])
        for name in nodes.KINDS[:7]:
            assert parts[name] > 0, (row["ffn"], name)
        assert -0.05 * row["step_ms"] < parts[nodes.OUTSIDE] < row["step_ms"]
    assert rows[0]["nodes"] < rows[1]["nodes"]  # the router and the experts are one node each
    assert "| 17 | 5 | dense |" in result.stdout
    for suffix in (".png", ".svg"):
        assert (tmp_path / f"step{suffix}").stat().st_size > 1000


@pytest.mark.parametrize(
    ("op", "label", "kind"),
    [
        ("MUL_MAT", "attn_output.weight", nodes.PRODUCTS),
        ("MUL_MAT", "attn_v_b.weight", nodes.HEADS),
        ("MUL_MAT", "output.weight", nodes.HEAD),
        ("MUL_MAT", "token_embd.weight", nodes.HEAD),  # of a model whose head is its embedding
        ("MUL_MAT", "ffn_down_shexp.weight", nodes.EXPERTS),
        ("MUL_MAT", "ffn_gate_inp.weight", nodes.ROUTER),
        ("MUL_MAT_ID", "ffn_up_exps.weight", nodes.EXPERTS),
        ("MUL_MAT", "kq", nodes.CACHE),
        ("RMS_NORM", "norm", nodes.REST),
        ("GET_ROWS", "token_embd.weight", nodes.REST),
        ("MUL", "ffn_hidden", nodes.EXPERTS),
    ],
)
def test_kinds(op: str, label: str, kind: str) -> None:
    assert nodes.kind(op, label) == kind


def test_a_row_is_one_round() -> None:
    """Of three rounds the one of median length is shown, so that the parts add up to a step that happened."""
    answers = [
        {"seconds": [0.01 * length] * 2, "nodes": [["UNION_FFN", "x", 6, 4.0 * length, 1.0], ["ADD", "y", 4, 2.0, 0.0]]}
        for length in (1, 9, 2)
    ]
    row = nodes.row("union", 128, 4, answers)
    assert row["step_ms"] == pytest.approx(20.0) and row["nodes"] == 5
    assert row["ms"][nodes.EXPERTS] == pytest.approx(4.0) and row["ms"][nodes.BARRIERS] == pytest.approx(0.5)
    assert row["ms"][nodes.OUTSIDE] == pytest.approx(20.0 - 4.0 - 0.5 - 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--past", "128,1024"], "--past: takes several numbers only with --ops"),
        (["--ops", "--past", "none"], "--past: expected numbers of tokens from 1 on, found 'none'"),
        (["--ops", "--acceptance", "0.8"], "--ops: times plain steps"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["bench", "--shape", "tiny", *arguments]) == 1
    assert message in capsys.readouterr().err
