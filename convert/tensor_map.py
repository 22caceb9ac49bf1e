"""Checkpoint + ModelConfig -> canonical tensors (names and shapes: blockffn.convert.model), whatever its layout.

    config, tensors = load_canonical("BlockFFN-Medium")
    tensors["layers.0.up_exps"].shape    # torch.Size([40, 128, 1280]), read when asked for

`map_tensors` checks presence, shape and leftovers of all tensors before any value is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from blockffn.convert import families
from blockffn.convert.checkpoint import BF16, DTYPES, Checkpoint, open_checkpoint
from blockffn.convert.layout import Form, Layout, spellings
from blockffn.convert.model import ModelConfig, canonical_shapes
from blockffn.errors import BlockffnError

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Source:
    """Where one canonical tensor comes from and how its values are rearranged into `shape`."""

    name: str  # in the checkpoint
    shape: tuple[int, ...]  # canonical
    form: Form  # how it is stored


def load_canonical(src: str | PathLike[str]) -> tuple[ModelConfig, Mapping[str, torch.Tensor]]:
    """Open a checkpoint of any layout; returns its configuration and a mapping that loads a tensor when asked for it.

    Keys are the canonical names without suffix (``embed``, ``layers.0.q_a``); types are those of the file.
    Raises BlockffnError for everything that is missing, superfluous, misshapen or contradictory.
    """
    checkpoint = open_checkpoint(str(src))
    config = families.read_config(checkpoint)
    return config, _TorchTensors(checkpoint, map_tensors(checkpoint, config))


def load_array(checkpoint: Checkpoint, source: Source) -> Array:
    """Return the values of one canonical tensor (bfloat16 as dtype BF16)."""
    values: Array = source.form.load(checkpoint.load(source.name), source.shape)
    return values


def map_tensors(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Source]:
    """Return the source of every canonical tensor of this model, in the order of the layers."""
    layout = families.layout(checkpoint, config)
    sources: dict[str, Source] = {}
    for canonical, shape in canonical_shapes(config).items():
        source = _find(checkpoint, layout, canonical, shape)
        _check_type(checkpoint, source.name)
        sources[canonical] = source
    claimed = {source.name for source in sources.values()} | families.unused(checkpoint, config)
    if config.tied and "lm_head.weight" in checkpoint.tensors:
        _check_tied(checkpoint, sources["embed"].name)
        claimed.add("lm_head.weight")
    leftover = sorted(set(checkpoint.tensors) - claimed)
    if leftover:
        more = f" and {len(leftover) - 1} more" if len(leftover) > 1 else ""
        raise BlockffnError(
            f"{checkpoint.tensors[leftover[0]].file.name}: tensor {leftover[0]}{more}: nothing in this model claims "
            "it; config.json does not describe this file, or it belongs to another model"
        )
    return sources


def _find(checkpoint: Checkpoint, layout: Layout, canonical: str, shape: tuple[int, ...]) -> Source:
    """Find one tensor among the ways to store it; several have one name, so the shape tells them apart."""
    tried: list[str] = []
    ways = layout.ways(canonical.rpartition(".")[2])
    for way, form in ways:
        for name in spellings(layout.prefix(canonical) + way):
            info = checkpoint.tensors.get(name)
            if info is None:
                continue
            if info.shape == form.shape(shape):
                return Source(name, shape, form)
            tried.append(
                f"{info.file.name}: {name}: expected shape {list(form.shape(shape))}, found {list(info.shape)}"
            )
    experts = f" ({shape[0]} experts, {shape[1]} x {shape[2]} values each)" if len(shape) == 3 else ""
    if tried:
        raise BlockffnError(f"{' or '.join(dict.fromkeys(tried))}{experts}; config.json and the weights differ")
    names = " or ".join(dict.fromkeys(layout.prefix(canonical) + way for way, _ in ways))
    raise BlockffnError(
        f"{checkpoint.folder}: tensor missing: expected {names} for {list(shape)}{experts}; download the checkpoint "
        "again, or correct config.json"
    )


def _check_type(checkpoint: Checkpoint, name: str) -> None:
    info = checkpoint.tensors[name]
    if info.dtype not in DTYPES:
        raise BlockffnError(
            f"{info.file.name}: {name}: expected one of {', '.join(sorted(DTYPES))}, found {info.dtype}; convert from "
            "unquantized weights"
        )


def _check_tied(checkpoint: Checkpoint, embed: str) -> None:
    """With tied embeddings a stored head has to be the embedding itself."""
    _check_type(checkpoint, "lm_head.weight")
    table, head = checkpoint.load(embed), checkpoint.load("lm_head.weight")
    if table.shape != head.shape or table.dtype != head.dtype or not _same(table, head):
        raise BlockffnError(
            "config.json: tie_word_embeddings is true (the default when missing), but lm_head.weight differs from "
            f"{embed}; set it to false if the head was trained by itself, or remove lm_head.weight"
        )
    checkpoint.note("lm_head.weight equals the embedding and is not stored twice (tie_word_embeddings)")


def _same(left: Array, right: Array) -> bool:
    """Bitwise equality, in pieces of 4096 rows so that no large temporary appears."""
    kind = np.dtype(f"u{left.dtype.itemsize}")
    pieces = range(0, left.shape[0], 4096)
    return all(np.array_equal(left[i : i + 4096].view(kind), right[i : i + 4096].view(kind)) for i in pieces)


class _TorchTensors(Mapping[str, "torch.Tensor"]):
    """Canonical tensors as torch tensors, read from disk at each access."""

    def __init__(self, checkpoint: Checkpoint, sources: dict[str, Source]) -> None:
        self._checkpoint = checkpoint
        self._sources = sources

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        values = np.array(load_array(self._checkpoint, self._sources[name]), order="C")  # own, writable memory
        if values.dtype == BF16:
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)
