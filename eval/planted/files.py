"""Planted models as files: checkpoint -> GGUF in both layouts -> quantized, each step made once and kept under build/.

    >>> from blockffn.eval.planted.files import models
    >>> models("tiny").union.name                          # doctest: +SKIP
    'tiny-Q4_0.gguf'

Only the quantized files stay; checkpoint and F16 files of the 1.2B shape (2.8 GB each) are removed again.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from blockffn.errors import BlockffnError
from blockffn.eval.environment import ROOT
from blockffn.eval.planted import model as planted
from blockffn.eval.planted.model import PlantedShape

CACHE = ROOT / "build" / "planted"
SHARD_BYTES = 400 << 20
SUFFIX = {"expert": "", "dense": "-dense"}  # of the file, by layout
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # types of SentencePiece pieces
BPE = 2  # type of SentencePiece model

Say = Callable[[str], None]


@dataclass(frozen=True)
class PlantedModels:
    """The same weights twice: `union` in the expert layout, `dense` in the dense layout."""

    shape: PlantedShape
    union: Path
    dense: Path


def models(name: str, kind: str = "Q4_0", folder: Path | None = None, say: Say = lambda line: None) -> PlantedModels:
    """Return the model files of a shape, making what is missing. kind: a type of `blockffn quantize`, or F16.

    Errors: BlockffnError for an unknown shape or type and for a full disk.
    """
    shape = planted.shape_named(name)
    union, dense = files(shape, ("expert", "dense"), kind, folder, say)
    return PlantedModels(shape, union, dense)


def files(
    shape: PlantedShape, layouts: Sequence[str], kind: str, folder: Path | None = None, say: Say = lambda line: None
) -> list[Path]:
    """Return one file of the same weights per layout ("expert", "dense"), making what is missing. See `models`."""
    target = folder or CACHE
    found = {layout: target / f"{shape.name}{SUFFIX[layout]}-{kind}.gguf" for layout in layouts}
    missing = {layout: file for layout, file in found.items() if not file.exists()}
    if missing:
        target.mkdir(parents=True, exist_ok=True)
        _check_space(shape, target)
        checkpoint = target / f"{shape.name}-checkpoint"
        try:
            say(f"writing the random checkpoint of shape {shape.name}")
            write_checkpoint(shape, checkpoint)
            for layout, file in missing.items():
                say(f"converting to {file.name}")
                _convert(checkpoint, file, layout, kind)
        finally:
            shutil.rmtree(checkpoint, ignore_errors=True)
    return list(found.values())


def _convert(checkpoint: Path, target: Path, layout: str, kind: str) -> None:
    from blockffn.convert.convert import convert_checkpoint
    from blockffn.quantize import canonical_type, quantize

    half = target if kind == "F16" else target.with_name(target.stem + "-half.gguf")
    convert_checkpoint(checkpoint, half, outtype="f16", layout=layout)
    if half != target:
        try:
            quantize(half, target, canonical_type(kind))
        finally:
            half.unlink()


def n_weights(shape: PlantedShape) -> int:
    """Return the number of weights of a shape, near enough to plan disk space (norms are left out)."""
    h, heads = shape.n_embd, shape.n_head
    if shape.family == "blockffn":
        attention = (
            h * (shape.q_lora + shape.kv_lora + shape.rope) + h * h + shape.q_lora * heads * (shape.nope + shape.rope)
        )
        attention += shape.kv_lora * heads * (shape.nope + shape.head_dim)
    else:
        attention = 4 * h * h
    experts = (
        (3 if shape.gated else 2) * h * shape.n_expert * shape.expert_dim
        + h * shape.n_expert
        + 3 * h * shape.shared_dim
    )
    ffn = (shape.n_layer - shape.n_dense) * experts + shape.n_dense * 3 * h * shape.n_ff
    return 2 * shape.n_vocab * h + shape.n_layer * attention + ffn


def _check_space(shape: PlantedShape, folder: Path) -> None:
    needed = 6 * n_weights(shape)  # checkpoint and one F16 file at a time, two quantized files
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BlockffnError(
            f"{folder}: the shape {shape.name} needs {needed / 1e9:.1f} GB of free disk, found {free / 1e9:.1f} GB; "
            "make room or choose a smaller --shape"
        )


def write_checkpoint(shape: PlantedShape, folder: Path, seed: int = 0) -> Path:
    """Write config.json, float16 safetensors shards with their index, and a tokenizer; return `folder`."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps(planted.configuration(shape), indent=1))
    (partial / "tokenizer.model").write_bytes(_sentencepiece(shape))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(shape, seed), 1):
        file = f"model-{number:05d}-of-00000.safetensors"
        save_file(shard, partial / file)
        weight_map |= dict.fromkeys(shard, file)
    _number_shards(partial, weight_map)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder


def _shards(shape: PlantedShape, seed: int) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    for name, values in planted.tensors(shape, seed):
        shard[name] = values.astype(np.float16)
        if sum(part.nbytes for part in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def _number_shards(folder: Path, weight_map: dict[str, str]) -> None:
    """Give the shards their final names, which hold their number, and write the index."""
    count = len(set(weight_map.values()))
    final = {file: file.replace("of-00000", f"of-{count:05d}") for file in set(weight_map.values())}
    for file, name in final.items():
        (folder / file).rename(folder / name)
    index = {"metadata": {}, "weight_map": {name: final[file] for name, file in weight_map.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _sentencepiece(shape: PlantedShape) -> bytes:
    """Return a tokenizer.model of the right size, in the protobuf wire format (sentencepiece_model.proto)."""
    entries = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    entries += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    entries += [(word, -float(i), NORMAL) for i, word in enumerate(planted.pieces(shape))]
    content = b"".join(_field(1, _piece(*entry)) for entry in entries)
    trainer = bytes([3 << 3, BPE]) + bytes([4 << 3]) + _varint(len(entries)) + _varint(35 << 3) + b"\1"  # byte_fallback
    normalizer = _field(1, b"identity") + bytes([3 << 3, 1, 4 << 3, 0, 5 << 3, 1])
    return content + _field(2, trainer) + _field(3, normalizer)


def _piece(text: str, score: float, kind: int) -> bytes:
    return _field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score) + bytes([3 << 3, kind])


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
