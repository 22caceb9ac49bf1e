"""Torch pickles (`pytorch_model*.bin`, BMTrain `*.pt`), read with weights_only and memory-mapped.

PickleFile(Path("pytorch_model.bin")).describe()["model.norm.weight"]    # ((1792,), "BF16")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from blockffn.errors import BlockffnError

NAMES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64"}
REOPEN_BYTES = 512 << 20  # mapped pages that were read count as resident memory until the file is mapped afresh


class PickleFile:
    """One pickle: its tensors are views of the mapped file, copied out one at a time."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._state: dict[str, Any] | None = None
        self._read = 0

    def describe(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of every tensor without reading values."""
        return {
            name: (tuple(tensor.shape), NAMES.get(str(tensor.dtype), str(tensor.dtype)))
            for name, tensor in self._open().items()
        }

    def load(self, name: str) -> np.ndarray[Any, Any]:
        """Return one tensor as a C-contiguous array; bfloat16 comes as its 16 raw bits (int16)."""
        import torch

        if self._read > REOPEN_BYTES:
            self._state, self._read = None, 0
        tensor = self._open()[name].detach().contiguous()
        self._read += tensor.numel() * tensor.element_size()
        return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()

    def _open(self) -> dict[str, Any]:
        if self._state is None:
            self._state = self._parse()
        return self._state

    def _parse(self) -> dict[str, Any]:
        import pickle

        try:
            import torch
        except ImportError as error:
            raise BlockffnError(
                f"{self.file}: reading torch pickles needs torch: pip install 'blockffn[train]'"
            ) from error
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True, mmap=_is_zip(self.file))
        except pickle.UnpicklingError as error:
            raise BlockffnError(
                f"{self.file}: refused: the pickle holds more than tensors, and loading it could run code; save the "
                "state dict alone, best as safetensors"
            ) from error
        except Exception as error:  # truncated archives raise RuntimeError, EOFError, KeyError, ...
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise BlockffnError(f"{self.file}: not a complete torch file ({reason}); download it again") from error
        if not isinstance(state, dict):
            raise BlockffnError(f"{self.file}: expected a state dict (name: tensor), found {type(state).__name__}")
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                raise BlockffnError(
                    f"{self.file}: {name}: expected a tensor, found {type(value).__name__}; save the state dict alone"
                )
        return state


def _is_zip(file: Path) -> bool:
    with open(file, "rb") as stream:
        return stream.read(4) == b"PK\x03\x04"
