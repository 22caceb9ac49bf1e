"""Planted models: the statistics that they promise, measured in llama.cpp, through conversion and quantization."""

from __future__ import annotations

import json
import types
from pathlib import Path

import numpy as np
import pytest

import blockffn
from blockffn.errors import BlockffnError
from blockffn.eval.planted import files as planted_files
from blockffn.eval.planted import model as planted
from blockffn.eval.planted.files import PlantedModels
from blockffn.eval.quality import metrics


@pytest.fixture(scope="module", params=["tiny", "tiny-deco"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PlantedModels:
    return planted_files.models(request.param, folder=tmp_path_factory.mktemp("planted"))


def test_sparsity_is_what_was_planted(models: PlantedModels) -> None:
    """The tiny shapes see a short stretch of the drift, so that the tolerance is wide."""
    llm = blockffn.Llama(str(models.union), n_ctx=2048, n_threads=1, ffn="dense")
    found = blockffn.eval.sparsity(llm, planted.text(models.shape, 1024))
    llm.close()
    assert found.tls == pytest.approx(0.80, abs=0.03)
    assert found.cls[8] == pytest.approx(0.70, abs=0.05)
    assert found.layer_tls == pytest.approx(0.80, abs=0.06)


def test_the_model_continues_its_own_text(models: PlantedModels) -> None:
    """Greedy text is the next id, in every layout and through the union op."""
    text = planted.text(models.shape, 40)
    for path, ffn in ((models.union, "union"), (models.union, "dense"), (models.dense, "dense")):
        llm = blockffn.Llama(str(path), n_ctx=256, n_threads=1, ffn=ffn)
        assert llm.logits(text[:-1]).argmax(axis=-1).tolist() == text[1:], (path.name, ffn)
        llm.close()


def test_both_files_hold_the_same_weights(models: PlantedModels) -> None:
    text, results = planted.text(models.shape, 64), []
    for path, ffn in ((models.union, "union"), (models.dense, "dense")):
        llm = blockffn.Llama(str(path), n_ctx=256, n_threads=1, ffn=ffn)
        results.append((llm.logits(text), llm.active_experts(text)))
        llm.close()
    assert metrics.nmse(results[0][0], results[1][0]) < 5e-3  # Q4_0 rounds the activations in other places
    assert np.array_equal(results[0][1], results[1][1])  # the router's coordinates are exact


def test_only_the_models_are_kept(models: PlantedModels) -> None:
    folder = models.union.parent
    assert sorted(path.name for path in folder.iterdir()) == sorted([models.union.name, models.dense.name])
    before = models.union.stat().st_mtime_ns
    again = planted_files.models(models.shape.name, folder=folder)
    assert again == models and models.union.stat().st_mtime_ns == before


def test_the_union_grows_as_the_benchmarks_assume() -> None:
    """Share of the experts that n consecutive tokens of the 1.2B shape need, straight from the codes."""
    shape = planted.shape_named("1.2b")
    codes = planted.Planted(shape, np.random.default_rng(0))
    router = codes.router()  # [n_expert, n_embd]
    used = np.arange(0, planted.GROUP * shape.routing_groups)
    coordinates = np.zeros((20000, len(used)), np.float32)
    coordinates.reshape(20000, -1, planted.GROUP)[:, :, 1:] = codes.routing[-20000:].reshape(
        20000, -1, planted.GROUP - 1
    )
    coordinates.reshape(20000, -1, planted.GROUP)[:, :, 0] = -8
    active = coordinates @ router[:, used].T > 0  # [tokens, n_expert]
    for n, share in {1: 0.20, 2: 0.225, 4: 0.26, 8: 0.30, 16: 0.36, 32: 0.43, 128: 0.65}.items():
        chunks = active[: len(active) // n * n].reshape(-1, n, shape.n_expert)
        assert chunks.any(axis=1).mean() == pytest.approx(share, abs=0.04), n


def test_codes_survive_four_bits() -> None:
    """Every group of 32 reserved coordinates holds -8 units and whole units, as Q4_0 wants them."""
    shape = planted.shape_named("tiny")
    values = planted.Planted(shape, np.random.default_rng(1)).embedding()
    units = values[:, : shape.n_reserved].reshape(-1, planted.GROUP) * shape.embedding_scale / planted.UNIT
    assert np.array_equal(units, np.rint(units)) and (units[:, 0] == -8).all()
    assert np.abs(units[:, 1:]).max() <= 7


@pytest.mark.parametrize("name", list(planted.SHAPES))
def test_weights_have_the_stated_number(name: str) -> None:
    """The estimate for the disk space is the truth without the norms."""
    shape = planted.shape_named(name)
    assert {"1.2b": 1.65e9, "deco-1.2b": 1.5e9}.get(name, 4e8) > planted_files.n_weights(shape) > 1e6
    if name.startswith("tiny"):
        exact = sum(values.size for _, values in planted.tensors(shape) if values.ndim > 1)
        assert planted_files.n_weights(shape) == exact


def test_checkpoint_is_sharded_as_its_index_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted_files, "SHARD_BYTES", 1 << 20)
    folder = planted_files.write_checkpoint(planted.shape_named("tiny"), tmp_path / "checkpoint")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {path.name for path in folder.glob("*.safetensors")}
    assert set(index.values()) == files and len(files) > 2
    assert all(f"-of-{len(files):05d}." in file for file in files)


def test_unknown_shape_lists_the_known() -> None:
    with pytest.raises(BlockffnError, match=r"expected one of 1.2b, 0.1b, deco-1.2b.*found '7b'"):
        planted_files.models("7b")


def test_full_disk_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted_files.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1 << 20))
    with pytest.raises(BlockffnError, match=r"tiny needs 0.0 GB of free disk, found 0.0 GB"):
        planted_files.models("tiny", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_text_goes_round() -> None:
    shape = planted.shape_named("tiny")
    last = shape.n_vocab - 1
    assert planted.text(shape, 3, start=last) == [last, planted.FIRST_TOKEN, planted.FIRST_TOKEN + 1]
