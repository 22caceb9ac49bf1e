"""The error that a type of weights makes by itself: torch with rounded inputs of its matrix products.

    with rounded_inputs(reference, torch.bfloat16):
        ideal = reference.forward(tokens)

ggml multiplies weights of a half-precision type with activations that it first rounds to the same type; products and
sums are float32 (`vec_dot_type` of the type's CPU traits). No implementation that does so can be nearer to the
unrounded reference than this one, except by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from blockffn.training.model import ReferenceModel


class RoundedInputs(TorchFunctionMode):
    """Rounds what `functional.linear` multiplies to `dtype`, but not where the weight is one of `exact`."""

    def __init__(self, dtype: torch.dtype, exact: list[Tensor]) -> None:
        super().__init__()
        self.dtype, self.exact = dtype, {weight.data_ptr() for weight in exact}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and args[1].data_ptr() not in self.exact:
            args = (args[0].to(self.dtype).to(args[0].dtype), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def rounded_inputs(reference: ReferenceModel, dtype: torch.dtype) -> Iterator[None]:
    """Round inside this block; routers, whose weights are float32 in every GGUF, keep their inputs."""
    with RoundedInputs(dtype, [ffn.router for ffn in reference.decoder.expert_layers()]):
        yield
