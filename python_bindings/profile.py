"""The sparsity profile that a GGUF can carry: what `blockffn eval sparsity --write-metadata` measured on a text.

    >>> write_profile("model.gguf", {"tokens": 4096, "tls": 0.8, "union": {1: 10.0, 2: 13.0}})        # doctest: +SKIP
    >>> describe("model.gguf")["profile"]["union"][2]                                                # doctest: +SKIP
    13.0

`blockffn inspect` shows it. `step_growth` is what the choice of drafts believes before it has measured a step: how much
longer each further token makes a step that is bound by the weights it reads, those of the union of its experts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from blockffn import gguf_contract as names
from blockffn.errors import BlockffnError
from blockffn.gguf_file import GgufFile, read_gguf
from blockffn.inspection import expert_tensors

GROWTH_AT = 4  # tokens of the step whose growth over a plain one is stated, per further token


def step_growth(file: GgufFile, union: Mapping[int, float]) -> float:
    """Return the growth of a step with each further token, in plain steps, where reading weights takes all of the time.

    Everything but routed experts and the table of embeddings is read once, whatever the number of tokens.
    """
    sizes = {tensor.name: tensor.n_bytes for tensor in file.tensors}
    routed = sum(tensor.n_bytes for tensor in expert_tensors(file))
    table = sizes.get(names.TOKEN_EMBD, 0) if names.OUTPUT in sizes else 0
    always, experts = sum(sizes.values()) - routed - table, float(file.get(names.EXPERT_COUNT) or 1)
    at = max((n for n in union if n <= GROWTH_AT), default=1)
    if at == 1:
        return 0.0
    plain, larger = (always + routed * union[n] / experts for n in (1, at))
    return (larger / plain - 1.0) / (at - 1)


def write_profile(path: str | Path, profile: Mapping[str, Any]) -> None:
    """Store a profile {tokens, tls, union} in a model file, which is replaced whole or not at all.

    Errors: BlockffnError for a split model, and for one without routed experts.
    """
    file = read_gguf(path)
    if len(file.paths) > 1:
        raise BlockffnError(f"{path}: a model in several files; merge it with llama-gguf-split --merge first")
    if not expert_tensors(file):
        raise BlockffnError(f"{path}: no layer of this model has routed experts: nothing to store")
    union = {int(n): float(value) for n, value in profile["union"].items()}
    arch = file.architecture
    keys: dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]] = {
        names.key(names.PROFILE_TOKENS, arch): (int(profile["tokens"]), GGUFValueType.UINT32, None),
        names.key(names.PROFILE_TLS, arch): (float(profile["tls"]), GGUFValueType.FLOAT32, None),
        names.key(names.PROFILE_UNION_TOKENS, arch): (list(union), GGUFValueType.ARRAY, GGUFValueType.INT32),
        names.key(names.PROFILE_UNION_EXPERTS, arch): (
            list(union.values()), GGUFValueType.ARRAY, GGUFValueType.FLOAT32,
        ),
        names.key(names.PROFILE_STEP_GROWTH, arch): (step_growth(file, union), GGUFValueType.FLOAT32, None),
    }  # fmt: skip
    target = Path(path).resolve()
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        _copy(target, partial, keys)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _copy(source: Path, target: Path, keys: Mapping[str, tuple[Any, GGUFValueType, GGUFValueType | None]]) -> None:
    """Write a file again with these keys set; tensors stay as they are."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    alignment = reader.fields.get("general.alignment")
    if alignment is not None:
        writer.data_alignment = int(alignment.contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in keys:
            continue
        sub = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub)
    for name, (value, kind, sub) in keys.items():
        writer.add_key_value(name, value, kind, sub)
    for tensor in reader.tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            writer.write_tensor_data(np.asarray(tensor.data))
    finally:
        writer.close()
