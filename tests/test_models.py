"""Every row of the table of models in README.md: a tiny checkpoint of that row, converted, against torch.

Experts (number and width), heads, kinds of layers and the layout of the files are those of the row; hidden size,
vocabulary and number of layers are cut. Weights are random.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from tiny_head import write_head

import blockffn
from blockffn.convert.convert import convert_checkpoint
from blockffn.convert.eagle import convert_head
from blockffn.eval.quality import metrics, parity
from blockffn.training.eagle import EagleReference
from blockffn.training.model import ReferenceModel

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
TEXT = "import os\n\ndef main():\n    return 1902 # caf\u00e9"
HEAD = "BlockFFN-3B-SFT-EAGLE"


def blockffn_row(n_head: int, n_expert: int, expert_dim: int, **more: Any) -> dict[str, Any]:
    """Published BlockFFN: pickles of the layout block_linear, MLA, RMS norm, tied or untied head."""
    sizes = {"n_head": n_head, "n_embd": 16 * n_head, "n_expert": n_expert, "expert_dim": expert_dim}
    return {"layout": "block_linear", "attention": "mla", "norm": "rms", "fmt": "pickle", **sizes, **more}


def deco_row(n_head: int, n_expert: int, **more: Any) -> dict[str, Any]:
    """Published DECO: safetensors, one dense layer first, NormSiLU, plain experts of 64, shared expert of 128."""
    sizes = {"n_head": n_head, "n_embd": 16 * n_head, "n_expert": n_expert, "expert_dim": 64, "shared_dim": 128}
    kind = {"family": "deco", "attention": "gqa", "norm": "simple", "act": "norm_silu", "n_dense": 1, "n_layer": 3}
    return {**kind, **sizes, "config": {"expert_not_gated": None, "router_norm_init_var": 0.1}, **more}


# first column of the table -> arguments of write_checkpoint
ROWS: dict[str, dict[str, Any]] = {
    "BlockFFN-Small (0.1B)": blockffn_row(6, 48, 64),
    "BlockFFN-Medium (0.5B)": blockffn_row(10, 40, 128, tied=True),
    "BlockFFN-Large (0.8B)": blockffn_row(12, 48, 128),
    "BlockFFN-XLarge (1.2B)": blockffn_row(14, 56, 128),
    "BlockFFN-3B-SFT": blockffn_row(8, 64, 128, attention="gqa", n_head_kv=2, fmt="safetensors_sharded"),
    HEAD: {},
    "DECO-0.1B": deco_row(6, 42),
    "DECO-0.2B": deco_row(8, 53),
    "DECO-0.5B": deco_row(10, 77),
    "DECO-1.2B": deco_row(14, 102),
    "BlockFFN in layout block, fastmoe or megablocks": blockffn_row(4, 40, 32, layout="megablocks", norm="sum"),
    "BlockFFN training run (BMTrain)": blockffn_row(4, 48, 32, layout="bmtrain", norm="none", fmt="pt"),
    "dense twin, MLA": {"family": "vanilla", "layout": "hf", "attention": "mla", "n_head": 6, "n_embd": 96},
    "dense twin, GQA": {"family": "vanilla", "layout": "hf", "n_head": 8, "n_head_kv": 2, "n_embd": 128,
                        "attention": "gqa"},
    "ReMoE baseline": {"family": "remoe", "layout": "hf", "n_head": 4, "n_embd": 64, "n_expert": 31, "expert_dim": 64,
                       "n_shared": 1, "attention": "gqa"},
}  # fmt: skip


def table() -> dict[str, list[str]]:
    """The rows of README's table of models: first column, links as their text -> the others."""
    section = README.split("\n## Models\n")[1].split("\n## ")[0]
    section = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", section)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    return {row[0]: row[1:] for row in cells[1:]}


def test_the_table_lists_what_is_tested() -> None:
    """Names, experts and attention of README are those of ROWS, in the same order."""
    found = table()
    assert list(found) == list(ROWS)
    for name, row in ROWS.items():
        experts, attention = found[name][:2]
        if "n_expert" in row:
            assert experts.startswith(f"{row['n_expert']} x {row['expert_dim']}"), name
        else:
            assert not re.match(r"\d", experts), name
        assert attention == row.get("attention", "gqa").upper(), name
        assert ("shared" in experts) == (row.get("family") in ("deco", "remoe")), name


@pytest.mark.parametrize("name", [name for name in ROWS if name != HEAD])
def test_row(name: str, tmp_path: Path) -> None:
    """The float32 bound of the converter, every router choice, and 64 equal greedy tokens."""
    source = write_checkpoint(tmp_path / "source", **{"seed": len(name), **ROWS[name]})
    convert_checkpoint(source, tmp_path / "model.gguf", outtype="f32")
    report = parity.verify(tmp_path / "model.gguf", source, TEXT, n_threads=1)
    assert report.failures == [] and report.nmse <= 1e-6, str(report)
    assert report.router_differences == 0 and report.top1 == 1.0, str(report)
    assert report.greedy_equal == report.greedy_tokens == parity.N_GREEDY or report.greedy_tie, str(report)
    assert (report.router_choices > 0) == ("n_expert" in ROWS[name])


@pytest.mark.parametrize("layout", ["block", "fastmoe"])
def test_the_other_layouts_of_that_row(layout: str, tmp_path: Path) -> None:
    """Three layouts share a row: the same weights give the same file as megablocks."""
    written = []
    for stored in ("megablocks", layout):
        row = {**ROWS["BlockFFN in layout block, fastmoe or megablocks"], "layout": stored}
        source = write_checkpoint(tmp_path / stored / "model", **row)
        written.append(tmp_path / f"{stored}.gguf")
        convert_checkpoint(source, written[-1], outtype="f32")
    tensors = [{t.name: t.data.tobytes() for t in gguf_tensors(path)} for path in written]
    assert tensors[0] == tensors[1] and len(tensors[0]) > 20


def gguf_tensors(path: Path) -> Any:
    from gguf import GGUFReader

    return GGUFReader(path).tensors


def test_head_row(tmp_path: Path) -> None:
    """The draft head's logits on the hidden states of its target, teacher-forced."""
    write_checkpoint(tmp_path / "target", n_embd=64, n_head=2, attention="gqa")
    convert_checkpoint(tmp_path / "target", tmp_path / "target.gguf", outtype="f32")
    write_head(tmp_path / "head", n_layer=1)
    convert_head(tmp_path / "head", tmp_path / "target", tmp_path / "head.gguf", outtype="f32")
    reference = EagleReference.from_checkpoint(tmp_path / "head", ReferenceModel.from_checkpoint(tmp_path / "target"))
    llm = blockffn.Llama(tmp_path / "target.gguf", n_ctx=128, n_threads=1)
    head = blockffn.EagleDrafter(tmp_path / "head.gguf", llm)
    tokens = np.random.default_rng(1).integers(3, 512, 41)
    hidden = llm.hidden_states(tokens[:-1].tolist())  # float32 [40, 64]
    expected = reference.draft_logits(torch.from_numpy(hidden), torch.from_numpy(tokens)).numpy()
    assert metrics.nmse(head.draft_logits(hidden, tokens.tolist()), expected) <= 1e-6
    head.close()
    llm.close()
