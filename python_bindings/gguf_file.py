"""Reads GGUF files, whole or split, without their tensor data; a damaged file is one clear error.

>>> from blockffn.gguf_file import read_gguf
>>> file = read_gguf("model.gguf")                            # doctest: +SKIP
>>> file.metadata["general.architecture"], len(file.tensors)  # doctest: +SKIP
('blockffn', 123)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, quants
from gguf.gguf_reader import ReaderField

from blockffn.errors import BlockffnError

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: ggml shape (fastest dimension first), type name as in gguf ("Q4_0"), elements, bytes, and where the
    bytes lie."""

    name: str
    shape: tuple[int, ...]
    type: str
    n_elements: int
    n_bytes: int
    file: Path
    offset: int  # of the first byte in the file

    def read(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the values as float32, in torch order (rows first); NotImplementedError where gguf cannot."""
        raw = np.asarray(np.memmap(self.file, np.uint8, "r", self.offset, (self.n_bytes,)))
        rows = raw.reshape(self.n_elements // self.shape[0], -1)
        return quants.dequantize(rows, GGMLQuantizationType[self.type]).reshape(self.shape[::-1])


@dataclass(frozen=True)
class GgufFile:
    """Keys and tensors of a model; a model split over several files is one object."""

    paths: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        """general.architecture."""
        return str(self.metadata["general.architecture"])

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of an architecture key, for example ``get("expert_count")``."""
        return self.metadata.get(f"{self.architecture}.{name}", default)


class _Reader(GGUFReader):
    """GGUFReader that takes an array of numbers as one piece, and checks that every tensor lies inside the file.

    The vocabulary arrays of a model (scores and types of 122,753 tokens) take it seconds value by value.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(path)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if GGUFValueType(raw_type) != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        start = orig_offs + 12
        types = [GGUFValueType.ARRAY, item]
        numpy_type = self.gguf_scalar_to_np.get(item)
        if numpy_type is not None:
            values = self._get(start, numpy_type, count)
            if len(values) != count:
                raise ValueError(f"an array of {count} values ends after {len(values)}")
            return 12 + values.nbytes, [values], [0], types
        if item != GGUFValueType.STRING:
            raise ValueError(f"array of {item.name}: not supported")
        offset, strings = start, list[bytes]()
        for _ in range(count):
            length = int.from_bytes(self._bytes[offset : offset + 8], "little" if self.byte_order == "I" else "big")
            offset += 8 + length
            if offset > len(self._bytes):
                raise ValueError(f"a list of {count} strings ends after {len(strings)}")
            strings.append(bytes(self._bytes[offset - length : offset]))
        return offset - orig_offs, [strings], [0], types

    @property
    def _bytes(self) -> memoryview:
        view = self.__dict__.get("_view")
        if view is None:
            view = self.__dict__["_view"] = memoryview(cast(Any, self.data))
        return view

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        self.infos: list[TensorInfo] = []
        for field in fields:
            _, name_data, _, dims, raw_type, offset = field.parts
            name = bytes(name_data).decode()
            kind = GGMLQuantizationType(int(raw_type[0]))
            block, size = GGML_QUANT_SIZES[kind]
            shape = tuple(int(n) for n in dims)
            n_elements = int(np.prod(dims, dtype=np.int64))
            n_bytes = n_elements * size // block
            end = start_offs + int(offset[0]) + n_bytes
            if end > len(self.data):
                raise ValueError(f"tensor {name} ends at byte {end}, the file has {len(self.data)}")
            self.infos.append(
                TensorInfo(name, shape, kind.name, n_elements, n_bytes, self.path, start_offs + int(offset[0]))
            )

    def values(self) -> dict[str, Any]:
        """Return every key with a plain Python value (arrays as lists)."""
        return {name: _value(field) for name, field in self.fields.items() if not name.startswith("GGUF.")}


def _value(field: ReaderField) -> Any:
    part = field.parts[-1]
    if field.types[0] == GGUFValueType.STRING:
        return bytes(part).decode("utf-8", errors="replace")
    if field.types[0] != GGUFValueType.ARRAY:
        return field.contents()
    if isinstance(part, list):
        return [item.decode("utf-8", errors="replace") for item in part]
    return part.tolist()


def read_gguf(path: str | Path) -> GgufFile:
    """Read a GGUF model; BlockffnError for a missing, foreign, damaged or incomplete one."""
    first = Path(path)
    readers = [_open(first)]
    paths = [first]
    match = _SHARD.search(first.name)
    if match is not None:
        stem = first.name[: match.start()]
        if int(match[1]) != 1:
            raise BlockffnError(f"{first}: this is part {int(match[1])} of {int(match[2])}; name the first part")
        for index in range(2, int(match[2]) + 1):
            paths.append(first.with_name(f"{stem}-{index:05d}-of-{match[2]}.gguf"))
            readers.append(_open(paths[-1]))
    metadata = readers[0].values()
    if "general.architecture" not in metadata:
        raise BlockffnError(f"{first}: key general.architecture is missing: not a model; convert it again")
    return GgufFile(tuple(paths), metadata, tuple(info for reader in readers for info in reader.infos))


def _open(path: Path) -> _Reader:
    if not path.is_file():
        raise BlockffnError(f"{path}: {'is a directory, expected a GGUF file' if path.is_dir() else 'no such file'}")
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        found = f"starts with {magic!r}" if magic else "is empty"
        raise BlockffnError(f"{path}: not a GGUF file (it {found}); convert a checkpoint with `blockffn convert`")
    try:
        return _Reader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise BlockffnError(f"{path}: damaged or truncated GGUF file: {error}; copy or convert it again") from error
