"""Every checkpoint layout, file format and element type gives the same canonical tensors, and the GGUF holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import DTYPES, FORMATS, LAYOUTS, Shape, canonical_tensors, write_checkpoint
from gguf import GGUFReader, quants

from blockffn.convert import convert_checkpoint, load_canonical, pickles
from blockffn.convert.checkpoint import open_checkpoint
from blockffn.convert.families import read_config

GQA = {"attention": "gqa", "n_head": 4, "n_head_kv": 2}


def check(folder: Path, dtype: str = "f32", fmt: str | None = None, **shape: Any) -> None:
    write_checkpoint(folder, dtype=dtype, fmt=fmt, **shape)
    _, tensors = load_canonical(folder)
    expected = canonical_tensors(Shape(**shape))
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        wanted = value if name.endswith("expert_bias") else value.to(DTYPES[dtype])
        assert torch.equal(tensors[name], wanted), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", ["rms", "sum", "none"])
@pytest.mark.parametrize("attention", ["mla", "gqa"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: str, attention: str, norm: str, tied: bool) -> None:
    check(tmp_path, layout=layout, attention=attention, norm=norm, tied=tied)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("fmt", FORMATS)
def test_formats(tmp_path: Path, fmt: str, dtype: str) -> None:
    check(tmp_path, dtype, fmt, n_head=2, n_layer=1, n_expert=3)


@pytest.mark.parametrize("layout", ["hf", "bmtrain"])
@pytest.mark.parametrize("family", ["vanilla", "remoe"])
def test_baselines(tmp_path: Path, family: str, layout: str) -> None:
    check(tmp_path, family=family, layout=layout, n_shared=2, **GQA)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", ["silu", "relu", "sqrelu", "gelu", "norm_silu", "norm_silu_nomean", "norm_silu_norms"])
def test_deco_activations(tmp_path: Path, act: str, gated: bool) -> None:
    check(tmp_path, "bf16", family="deco", norm="simple", act=act, gated=gated, **GQA)


@pytest.mark.parametrize("bias", ["none", "base", "rms"])
@pytest.mark.parametrize("norm", ["simple", "rms", "null", "normal"])
@pytest.mark.parametrize(
    "router", [{}, {"router_scalar": True}, {"router_fixed": True}], ids=["vector", "scalar", "fixed"]
)
def test_deco_routers(tmp_path: Path, router: dict[str, bool], norm: str, bias: str) -> None:
    check(tmp_path, "bf16", family="deco", norm=norm, bias=bias, n_dense=0, shared_dim=0, **router, **GQA)


def test_weight_suffix_on_raw_parameters(tmp_path: Path) -> None:
    """Re-saved files call the two big tensors up_proj.weight and down_proj.weight."""

    def add_suffix(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("up_proj", "down_proj"))]:
            tensors[name + ".weight"] = tensors.pop(name)

    write_checkpoint(tmp_path, edit=add_suffix)
    _, tensors = load_canonical(tmp_path)
    assert torch.equal(tensors["layers.1.down_exps"], canonical_tensors(Shape())["layers.1.down_exps"])


def test_transposed_view_in_a_pickle(tmp_path: Path) -> None:
    """The authors' script stores router_proj.weight as a transposed, non-contiguous view."""

    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.router_proj.weight"
        tensors[name] = tensors[name].T.contiguous().T

    write_checkpoint(tmp_path, fmt="pickle", edit=transpose)
    _, tensors = load_canonical(tmp_path)
    assert torch.equal(tensors["layers.0.router"], canonical_tensors(Shape())["layers.0.router"])


def test_pickles_are_mapped_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that were read stay resident until the file is mapped again; doing so between tensors changes nothing."""
    parsed = []
    parse = pickles.PickleFile._parse
    monkeypatch.setattr(pickles, "REOPEN_BYTES", 10_000)
    monkeypatch.setattr(pickles.PickleFile, "_parse", lambda self: parsed.append(self) or parse(self))
    check(tmp_path, fmt="pickle_sharded")
    assert len(parsed) > 10


def test_a_layout_of_the_same_model_gives_the_same_file(tmp_path: Path) -> None:
    """Block, block_linear, fastmoe and megablocks differ in storage only."""
    written = []
    for layout in LAYOUTS[:4]:
        source = write_checkpoint(tmp_path / layout / "model", layout=layout)
        convert_checkpoint(source, tmp_path / f"{layout}.gguf")
        reader = GGUFReader(tmp_path / f"{layout}.gguf")
        written.append({tensor.name: tensor.data.tobytes() for tensor in reader.tensors})
    assert all(tensors == written[0] for tensors in written[1:])


def read_tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """All tensors of a GGUF as float32, in torch order."""
    return {
        tensor.name: quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(tensor.shape[::-1].tolist()))
        for tensor in GGUFReader(path).tensors
    }


@pytest.mark.parametrize("layout", ["expert", "dense"])
def test_experts_in_the_gguf(tmp_path: Path, layout: str) -> None:
    shape = Shape(n_head=2)
    convert_checkpoint(write_checkpoint(tmp_path / "m", n_head=2), tmp_path / "m.gguf", layout=layout)
    tensors, expected = read_tensors(tmp_path / "m.gguf"), canonical_tensors(shape)
    up, down = expected["layers.1.up_exps"].numpy(), expected["layers.1.down_exps"].numpy()
    if layout == "expert":
        np.testing.assert_array_equal(tensors["blk.1.ffn_up_exps.weight"], up)  # [E, d, h]
        np.testing.assert_array_equal(tensors["blk.1.ffn_down_exps.weight"], down)  # [E, h, d]
    else:
        np.testing.assert_array_equal(tensors["blk.1.ffn_up.weight"], up.reshape(-1, shape.n_embd))  # [E*d, h]
        side_by_side = np.concatenate(list(down), axis=1)  # [h, E*d]
        np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"], side_by_side)


def test_absorbed_attention(tmp_path: Path) -> None:
    """k_b is kv_b's key part, transposed per head; v_b its value part."""
    shape = Shape(n_head=2)
    convert_checkpoint(write_checkpoint(tmp_path / "m", n_head=2), tmp_path / "m.gguf")
    tensors = read_tensors(tmp_path / "m.gguf")
    kv_b = canonical_tensors(shape)["layers.0.kv_b"].numpy().reshape(2, shape.nope + shape.head_dim, shape.kv_lora)
    for head in range(2):
        np.testing.assert_array_equal(tensors["blk.0.attn_k_b.weight"][head], kv_b[head, : shape.nope].T)
        np.testing.assert_array_equal(tensors["blk.0.attn_v_b.weight"][head], kv_b[head, shape.nope :])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", ["norm_silu", "norm_silu_norms", "norm_silu_nomean", "silu"])
def test_folded_mean_row(tmp_path: Path, act: str, gated: bool) -> None:
    """The row is the mean over all rows of the activated matrix: the gate's when gated."""
    source = write_checkpoint(tmp_path / "m", family="deco", norm="simple", act=act, gated=gated, **GQA)
    convert_checkpoint(source, tmp_path / "m.gguf", outtype="f16")
    reader = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    name = "blk.1.ffn_act_mean.weight"
    assert (name in reader) == (act in ("norm_silu", "norm_silu_norms"))
    if name in reader:
        _, tensors = load_canonical(source)
        rows = tensors["layers.1.gate_exps" if gated else "layers.1.up_exps"].double().flatten(0, 1)
        assert reader[name].tensor_type.name == "F32"
        np.testing.assert_allclose(reader[name].data, rows.mean(0).float().numpy(), rtol=1e-6)


def test_vectors_and_router_stay_f32(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m", dtype="bf16")
    convert_checkpoint(source, tmp_path / "m.gguf", outtype="bf16")
    for tensor in GGUFReader(tmp_path / "m.gguf").tensors:
        single = len(tensor.shape) == 1 or "ffn_gate_inp" in tensor.name
        assert tensor.tensor_type.name == ("F32" if single else "BF16"), tensor.name


def test_sparse_first_layers_of_deco(tmp_path: Path) -> None:
    """moe_layer_freq may put dense layers anywhere; the GGUF lists the width of each."""
    freq = [1, 0, 1]
    source = write_checkpoint(tmp_path / "m", family="deco", norm="simple", n_layer=3, n_dense=0, **GQA)
    canonical = canonical_tensors(Shape(family="deco", norm="simple", n_layer=3, n_dense=3, **GQA))

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.mlp.")]:
            del tensors[name]
        for part in ("gate", "up", "down"):
            tensors[f"model.layers.1.mlp.{part}_proj.weight"] = canonical[f"layers.1.{part}"]

    shape = {"family": "deco", "norm": "simple", "n_layer": 3, "n_dense": 0, **GQA}
    write_checkpoint(source, edit=swap, config={"moe_layer_freq": freq}, **shape)
    assert read_config(open_checkpoint(source)).dense_dim == (0, 96, 0)
    convert_checkpoint(source, tmp_path / "m.gguf")
    assert GGUFReader(tmp_path / "m.gguf").fields["blockffn.feed_forward_length"].contents() == [0, 96, 0]
