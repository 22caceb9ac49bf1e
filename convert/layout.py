"""How a checkpoint names and stores the canonical tensors (blockffn.convert.model): one table per layout.

    layout = Layout("model.layers.{i}.", {"embed": "model.embed_tokens.weight", "up_exps": (("mlp.up_proj", STACKED),)})
    layout.store("layers.3.up_exps", values)    # ("model.layers.3.mlp.up_proj", values as [E*d, h])

A part has one way to be stored, or several: the first is the one that is written, shapes tell the others apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """One arrangement of a tensor's values."""

    shape: Callable[[Shape], Shape]  # canonical shape -> stored shape
    load: Callable[[Any, Shape], Any]  # (stored values, canonical shape) -> canonical values
    save: Callable[[Any], Any]  # canonical values -> stored values, numpy or torch


SAME = Form(lambda shape: shape, lambda values, shape: values, lambda values: values)
SCALAR = Form(lambda shape: (), lambda values, shape: values.reshape(1), lambda values: values.reshape(()))  # [1]
TRANSPOSED = Form(lambda shape: shape[::-1], lambda values, shape: values.T, lambda values: values.T)  # [E, h]
STACKED = Form(  # up [E, d, h], stored as [E*d, h]
    lambda shape: (shape[0] * shape[1], shape[2]),
    lambda values, shape: values.reshape(shape),
    lambda values: values.reshape(-1, values.shape[2]),
)
SIDE_BY_SIDE = Form(  # down [E, h, d], stored as [h, E*d]
    lambda shape: (shape[1], shape[0] * shape[2]),
    lambda values, shape: values.reshape(shape[1], shape[0], shape[2]).swapaxes(0, 1),
    lambda values: values.swapaxes(0, 1).reshape(values.shape[1], -1),
)
STACKED_TRANSPOSED = Form(  # down [E, h, d], stored as [E*d, h]
    lambda shape: (shape[0] * shape[2], shape[1]),
    lambda values, shape: values.reshape(shape[0], shape[2], shape[1]).swapaxes(1, 2),
    lambda values: values.swapaxes(1, 2).reshape(-1, values.shape[1]),
)

Way = tuple[str, Form]  # name within the layer, arrangement


@dataclass(frozen=True)
class Layout:
    """The names of one kind of checkpoint. A part whose way is a name alone is stored as it is."""

    layer: str  # what the names of a layer begin with; {i} is its number
    parts: Mapping[str, str | tuple[Way, ...]]

    def ways(self, part: str) -> tuple[Way, ...]:
        """All ways in which this layout may store a part."""
        found = self.parts[part]
        return ((found, SAME),) if isinstance(found, str) else found

    def prefix(self, canonical: str) -> str:
        """What the name of a canonical tensor begins with: that of its layer, or nothing."""
        layer = canonical.rpartition(".")[0]
        return self.layer.format(i=layer.split(".")[1]) if layer else ""

    def store(self, canonical: str, values: Any) -> tuple[str, Any]:
        """Return name and values of a canonical tensor as this layout writes them."""
        name, form = self.ways(canonical.rpartition(".")[2])[0]
        return self.prefix(canonical) + name, form.save(values)


def spellings(name: str) -> Iterator[str]:
    """A name with and without the suffix ``.weight``, which some re-saved files add or drop."""
    yield name
    yield name.removesuffix(".weight") if name.endswith(".weight") else f"{name}.weight"
