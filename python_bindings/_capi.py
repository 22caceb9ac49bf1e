"""ctypes declarations of what our libllama adds (ggml-ops/llama/*.h, patches), and of gguf.h.

>>> from blockffn import _capi
>>> _capi.read_header("model.gguf")        # doctest: +SKIP
Header(architecture='blockffn', context_length=4096)
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockffn import library, logs
from blockffn.errors import BlockffnError


class NodeTime(ctypes.Structure):
    """struct blockffn_node_time of ggml-ops/llama/blockffn-times.h."""

    _fields_ = [
        ("op", ctypes.c_char * 32),
        ("label", ctypes.c_char * 64),
        ("n_nodes", ctypes.c_int64),
        ("work_ns", ctypes.c_double),
        ("wait_ns", ctypes.c_double),
    ]


_int64_p = ctypes.POINTER(ctypes.c_int64)
_uint8_p = ctypes.POINTER(ctypes.c_uint8)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    # name: (result, arguments)
    "blockffn_n_moe_layers": (ctypes.c_int32, [ctypes.c_void_p]),
    "blockffn_n_experts": (ctypes.c_int32, [ctypes.c_void_p]),
    "blockffn_has_relu_router": (ctypes.c_bool, [ctypes.c_void_p]),
    "blockffn_stats_enable": (None, [ctypes.c_void_p, ctypes.c_bool]),
    "blockffn_active_experts": (ctypes.c_bool, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, _uint8_p]),
    "blockffn_stats": (None, [ctypes.c_void_p, _int64_p, _int64_p, _int64_p, _int64_p]),
    "blockffn_stats_reset": (None, [ctypes.c_void_p]),
    "blockffn_times_enable": (ctypes.c_bool, [ctypes.c_void_p, ctypes.c_bool]),
    "blockffn_times": (ctypes.c_int32, [ctypes.c_void_p, ctypes.POINTER(NodeTime), ctypes.c_int32]),
    "blockffn_set_router_threshold": (ctypes.c_bool, [ctypes.c_void_p, ctypes.c_float]),
    "blockffn_router_threshold": (ctypes.c_float, [ctypes.c_void_p]),
    "blockffn_set_union_budget": (ctypes.c_bool, [ctypes.c_void_p, ctypes.c_int32]),
    "llama_set_batch_invariant": (ctypes.c_bool, [ctypes.c_void_p, ctypes.c_bool]),
}


class _GgufInitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


_GGUF_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "gguf_init_from_file": (ctypes.c_void_p, [ctypes.c_char_p, _GgufInitParams]),
    "gguf_free": (None, [ctypes.c_void_p]),
    "gguf_find_key": (ctypes.c_int64, [ctypes.c_void_p, ctypes.c_char_p]),
    "gguf_get_kv_type": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_int64]),
    "gguf_get_val_str": (ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_int64]),
    "gguf_get_val_u32": (ctypes.c_uint32, [ctypes.c_void_p, ctypes.c_int64]),
}
_GGUF_U32, _GGUF_STRING = 4, 8  # enum gguf_type


@functools.cache
def function(name: str) -> Callable[..., Any]:
    """Return a function of our libllama by name, with its argument types set."""
    result, arguments = (_SIGNATURES | _GGUF_SIGNATURES)[name]
    native = getattr(library.load()._lib, name, None)
    if native is None:
        raise BlockffnError(
            f"{library.directory() / library.LIBRARY}: function {name} is missing: "
            "this is not the library of the patched tree, or an old one; run `make setup`"
        )
    native.restype, native.argtypes = result, arguments
    return native


@dataclass(frozen=True)
class Header:
    """What has to be known of a model file before it is loaded."""

    architecture: str
    context_length: int | None  # tokens the model was trained with; None where the file does not say


def read_header(path: str | Path) -> Header:
    """Read the header of a GGUF file; BlockffnError for a missing, foreign or damaged file."""
    file = Path(path)
    if not file.is_file():
        what = "is a directory, expected a GGUF file" if file.is_dir() else "no such file"
        raise BlockffnError(f"{file}: {what}")
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        found = f"starts with {magic!r}" if magic else "is empty"
        raise BlockffnError(f"{file}: not a GGUF file (it {found}); convert a checkpoint with `blockffn convert`")
    with logs.collect() as lines:
        handle = function("gguf_init_from_file")(str(file).encode(), _GgufInitParams(True, None))
    if not handle:
        raise BlockffnError(
            f"{file}: damaged or truncated GGUF header: {logs.reason(lines) or 'unreadable'}; copy or convert it again"
        )
    try:
        architecture = _value(handle, "general.architecture", _GGUF_STRING, "gguf_get_val_str")
        if architecture is None:
            raise BlockffnError(f"{file}: key general.architecture is missing: not a model; convert it again")
        name = architecture.decode("utf-8", errors="replace")
        return Header(name, _value(handle, f"{name}.context_length", _GGUF_U32, "gguf_get_val_u32"))
    finally:
        function("gguf_free")(handle)


def _value(handle: int, key: str, expected_type: int, getter: str) -> Any:
    index = function("gguf_find_key")(handle, key.encode())
    if index < 0 or function("gguf_get_kv_type")(handle, index) != expected_type:
        return None
    return function(getter)(handle, index)
