"""Torch pickles (`pytorch_model*.bin`, BMTrain `*.pt`), read with weights_only and memory-mapped.

PickleFile(Path("pytorch_model.bin")).describe()["model.norm.weight"]    # ((1792,), "BF16")
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from blockffn.convert.fields import shown
from blockffn.errors import BlockffnError

PICKLE_BYTES = 64 << 20  # of data.pkl: the names and shapes of 10,000 tensors take 2 MB
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
        mapped = _is_zip(self.file)
        if mapped:
            check_archive(self.file)
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True, mmap=mapped)
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
            self._check(name, value)
        return state

    def _check(self, name: Any, value: Any) -> None:
        """Raise unless this is a name and an ordinary tensor, whose values are all in the file."""
        import torch

        if not isinstance(name, str):
            raise BlockffnError(f"{self.file}: expected the names of tensors, found the key {shown(name)}")
        if not isinstance(value, torch.Tensor):
            raise BlockffnError(
                f"{self.file}: {shown(name)}: expected a tensor, found {type(value).__name__}; save the state dict "
                "alone"
            )
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            found = "quantized" if value.is_quantized else f"{value.layout} on {value.device}"
            raise BlockffnError(
                f"{self.file}: {shown(name)}: expected a dense tensor with values, found {found}; save ordinary tensors"
            )
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise BlockffnError(
                f"{self.file}: {shown(name)}: {list(value.shape)} values are views of fewer stored ones (expand); save "
                "it contiguous"
            )


def check_archive(file: Path) -> None:
    """Refuse a torch archive whose members could inflate: torch stores them as they are, and data.pkl is small."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise BlockffnError(f"{file}: not a complete torch file ({error}); download it again") from error
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > file.stat().st_size:
            raise BlockffnError(
                f"{file}: refused: expected members stored as they are, as torch saves them, found "
                f"{shown(member.filename)}, which inflates to {member.file_size} bytes; save it again with torch"
            )
        if member.filename.endswith(".pkl") and member.file_size > PICKLE_BYTES:
            raise BlockffnError(
                f"{file}: refused: expected at most {PICKLE_BYTES} bytes of names and shapes, found "
                f"{member.file_size} in {shown(member.filename)}; save the state dict alone"
            )


def _is_zip(file: Path) -> bool:
    with open(file, "rb") as stream:
        return stream.read(4) == b"PK\x03\x04"
