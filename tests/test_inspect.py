"""Reading GGUF files and describing them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoints import write_checkpoint
from conftest import Runner

from blockffn import BlockffnError, library
from blockffn.convert import convert_checkpoint
from blockffn.gguf_file import read_gguf
from blockffn.inspection import describe


def test_reader_agrees_with_gguf(blockffn_model: Path) -> None:
    file, reference = read_gguf(blockffn_model), gguf.GGUFReader(blockffn_model)
    assert [(t.name, t.type, t.n_elements, t.n_bytes) for t in file.tensors] == [
        (t.name, t.tensor_type.name, t.n_elements, t.n_bytes) for t in reference.tensors
    ]
    for name, field in reference.fields.items():
        if name.startswith("GGUF."):
            continue
        expected, found = field.contents(), file.metadata[name]
        if name == "tokenizer.ggml.tokens":
            assert found == expected
        else:
            assert np.array_equal(np.asarray(found), np.asarray(expected)), name


def test_reader_takes_a_large_vocabulary_as_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gguf's own reader makes two arrays for every token, which takes seconds."""
    n = 122753
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "blockffn")
    writer.add_token_list([f"token {i}" for i in range(n)])
    writer.add_token_scores([-float(i) for i in range(n)])
    writer.add_token_types([1] * n)
    writer.add_tensor("a", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    arrays, get = [0], gguf.GGUFReader._get

    def counted(*arguments: Any, **options: Any) -> Any:
        arrays[0] += 1
        return get(*arguments, **options)

    monkeypatch.setattr(gguf.GGUFReader, "_get", counted)
    file = read_gguf(tmp_path / "v.gguf")
    assert 0 < arrays[0] < 100
    assert file.metadata["tokenizer.ggml.tokens"][-1] == f"token {n - 1}"
    assert file.metadata["tokenizer.ggml.scores"][-1] == -float(n - 1)


def test_every_cut_is_an_error_with_the_name(stock_model: Path, tmp_path: Path) -> None:
    data = stock_model.read_bytes()
    header = read_gguf(stock_model)
    assert header.tensors
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 400, 7), *range(400, 20000, 501), len(data) // 2, len(data) - 33]:
        cut.write_bytes(data[:size])
        with pytest.raises(BlockffnError, match=r"cut\.gguf: (not a GGUF|damaged or truncated)"):
            read_gguf(cut)


def test_damaged_header_is_never_a_traceback(stock_model: Path, tmp_path: Path) -> None:
    """Flip bytes of the header: either it still reads, or there is one clear error."""
    data, rng = stock_model.read_bytes(), np.random.default_rng(0)
    damaged = tmp_path / "damaged.gguf"
    for _ in range(150):
        copy = bytearray(data)
        for at in rng.integers(4, 3000, 3):
            copy[at] = int(rng.integers(256))
        damaged.write_bytes(copy)
        try:
            describe(damaged)
        except BlockffnError as error:
            assert "damaged.gguf" in str(error)


def test_numbers_of_a_sparse_model(blockffn_model: Path) -> None:
    report = describe(blockffn_model)
    n_experts, width, n_embd, layers = 7, 32, 256, 2
    routed = n_experts * width * n_embd * 2 * layers
    assert report["parameters"]["routed"] == routed
    assert report["parameters"]["per_expert_all_layers"] == routed // n_experts
    assert report["parameters"]["always_active"] == report["parameters"]["total"] - routed
    assert report["router"]["experts"] == n_experts and report["router"]["norm"] == "rms"
    assert report["router"]["moe_layers"] == layers and report["router"]["norm_weight"]
    assert report["bits_per_weight"] == 32.0 and report["tokenizer"]["n_tokens"] == 512
    assert sum(row["elements"] for row in report["tensor_types"].values()) == report["parameters"]["total"]


def test_measured_sparsity(blockffn_model: Path) -> None:
    report = describe(blockffn_model, measure="def add(a, b):")
    measured = report["measured"]
    assert 0 < measured["token_sparsity"] == measured["tls"] <= measured["live_tls"] + measured["dead_share"]
    assert (measured["dead"], measured["routed_experts"]) == (round(14 * measured["dead_share"]), 14)
    assert set(measured["live_cls"]) == set(measured["cls"])
    assert report["parameters"]["always_active"] < measured["active_parameters"] < report["parameters"]["total"]


def test_split_model(blockffn_model: Path, tmp_path: Path) -> None:
    import subprocess

    command = [library.program("llama-gguf-split"), "--split-max-tensors", "10", blockffn_model, tmp_path / "part"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    first = min(tmp_path.iterdir())
    whole, split = describe(blockffn_model), describe(first)
    assert split["files"] > 1 and split["parameters"] == whole["parameters"]
    with pytest.raises(BlockffnError, match="name the first part"):
        describe(max(tmp_path.iterdir()))
    max(tmp_path.iterdir()).unlink()
    with pytest.raises(BlockffnError, match="no such file"):
        describe(first)


def test_model_without_experts(stock_model: Path) -> None:
    report = describe(stock_model)
    assert report["router"] is None and report["parameters"]["routed"] == 0
    assert report["hyper_parameters"]["block_count"] == 2


DECO: dict[str, Any] = {"family": "deco", "attention": "gqa", "n_head": 4, "n_head_kv": 2, "n_layer": 3}


@pytest.mark.parametrize("layout", ["expert", "dense"])
@pytest.mark.parametrize("gated", [False, True])
def test_deco(tmp_path: Path, layout: str, gated: bool) -> None:
    """Gated experts show in both layouts, and every token that ends a text is listed."""
    source = write_checkpoint(tmp_path / "m", norm="simple", gated=gated, bias="rms", router_fixed=True, **DECO)
    convert_checkpoint(source, tmp_path / "m.gguf", layout=layout)
    report = describe(tmp_path / "m.gguf")
    router = report["router"]
    assert (router["gated"], router["layout"], router["moe_layers"]) == (gated, layout, 2)
    assert (router["scale"], router["norm_weight"], router["bias_method"]) == (0.75, False, "rms")
    assert (router["activation"], router["shared_dim"]) == ("norm_silu", 48)
    assert report["hyper_parameters"]["feed_forward_length"] == [96, 0, 0]
    assert (report["tokenizer"]["eos_token_id"], report["tokenizer"]["eot_token_id"]) == (2, 5)
    assert report["parameters"]["routed"] == 7 * 32 * 64 * (3 if gated else 2) * 2


def test_a_model_that_is_dense_by_nature(tmp_path: Path) -> None:
    """Router norm normal: idle experts have a score, so no share of the parameters is idle."""
    convert_checkpoint(write_checkpoint(tmp_path / "m", norm="normal", **DECO), tmp_path / "m.gguf")
    report = describe(tmp_path / "m.gguf", measure="def add(a, b):")
    assert "active_at_20_percent" not in report["parameters"]
    assert report["measured"]["active_parameters"] == report["parameters"]["total"]
    assert 0.2 < report["measured"]["token_sparsity"] < 0.8


def test_command(blockffn_model: Path, blockffn_cli: Runner) -> None:
    text = blockffn_cli("inspect", blockffn_model).stdout
    for word in ("32.00 bits per weight", "expert_count", "router", "tensor types", "always_active", "F32"):
        assert word in text
    assert "1e-05" in text and "9.99999" not in text
    report = json.loads(blockffn_cli("inspect", blockffn_model, "--json", "--measure").stdout)
    assert report["architecture"] == "blockffn" and report["measured"]["tokens"] > 100
    text = blockffn_cli("inspect", blockffn_model, "--measure").stdout
    dead = report["measured"]["dead"]
    assert f"{100 * report['measured']['live_tls']:.1f} % of the live experts" in text and f"{dead} of 14" in text
