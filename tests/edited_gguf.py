"""A GGUF file written again with other keys or tensors, to see what the loader says about it.

edit_gguf(model, tmp_path / "bad.gguf", keys={"blockffn.rope.dimension_count": 15}, tensors={"output.weight": None})
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter


def edit_gguf(
    source: Path,
    target: Path,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, npt.NDArray[Any] | tuple[npt.NDArray[Any], str] | None] | None = None,
) -> Path:
    """Write `source` to `target` with changed keys and tensors; None removes one.

    keys: values of the type that the file has; of a new key bool, int (u32), float (f32), str; a list is an array of
        i32. tensors: float32 or float16 arrays (rows last, as numpy has them), or bytes with the name of their type.
    """
    reader, keys, tensors = GGUFReader(source), dict(keys or {}), dict(tensors or {})
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == GGUFValueType.ARRAY else None
        value = keys.pop(name, field.contents())
        if value is not None:
            if isinstance(value, list) and kind != GGUFValueType.ARRAY:
                kind, sub = GGUFValueType.ARRAY, GGUFValueType.INT32
            writer.add_key_value(name, value, kind, sub)
    for name, value in keys.items():
        if value is not None:
            kind = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}.get(
                type(value), GGUFValueType.STRING
            )
            writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        if tensor.name not in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, given in tensors.items():
        if isinstance(given, tuple):
            writer.add_tensor(name, given[0], raw_dtype=GGMLQuantizationType[given[1]])
        elif given is not None:
            writer.add_tensor(name, given)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def values(source: Path, name: str) -> npt.NDArray[np.float32]:
    """Return the float32 values of one tensor, rows last."""
    (tensor,) = [tensor for tensor in GGUFReader(source).tensors if tensor.name == name]
    found: npt.NDArray[np.float32] = np.array(tensor.data, dtype=np.float32)
    return found
