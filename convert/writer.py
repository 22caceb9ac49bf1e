"""Write the GGUF file or files: streamed, with progress, whole or not at all.

    write_gguf(Path("model.gguf"), values, plan, split_max_size=0, digest=None)    # [Path("model.gguf")]

Data goes in pieces of a few megabytes to files in a hidden folder beside the target. They are renamed at the end, when
the disk has them; the folder is removed in any case.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, quants
from tqdm import tqdm

from blockffn.convert.checkpoint import BF16, to_float32
from blockffn.convert.metadata import SOURCE_SHA256, check_values
from blockffn.convert.plan import PlannedTensor
from blockffn.convert.tensor_map import Array
from blockffn.errors import BlockffnError
from blockffn.gguf_contract import ARCH

PIECE_VALUES = 1 << 20
PENDING = "?" * 64  # stands for the digest of the source until it is known


def write_gguf(
    outfile: Path,
    values: dict[str, Any],
    plan: list[PlannedTensor],
    *,
    split_max_size: int = 0,
    digest: Callable[[], str] | None = None,
    arch: str = ARCH,
) -> list[Path]:
    """Write metadata and tensors; return the files. `digest` is asked last, as it is computed meanwhile.

    split_max_size: bytes of tensor data per file, 0 for one file. Raises BlockffnError for a full disk, for weights
    that are not finite, and for values that the output type cannot hold.
    """
    check_values(values)
    check_target(outfile, sum(tensor.n_bytes for tensor in plan))
    folder: Path | None = None
    writer: GGUFWriter | None = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{outfile.name}.", suffix=".partial", dir=outfile.parent))
        writer = FastWriter(folder / outfile.name, arch, split_max_size=split_max_size if plan else 0)
        for key, value in values.items():
            add_value(writer, key, value)
        for tensor in plan:
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=tensor.type
            )
        files = writer.format_shard_names(folder / outfile.name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_data(writer, plan)
        writer.close()
        if digest is not None:
            _fill_in_digest(files[0], digest())
        for file in files:
            _sync(file)
        return _move(files, outfile.parent)
    except OSError as error:
        where = error.filename or outfile
        raise BlockffnError(
            f"{where}: {error.strerror or error}; the conversion to {outfile} was undone: free space or check the disk"
        ) from error
    finally:
        for stream in (writer.fout if writer is not None else None) or ():
            with contextlib.suppress(OSError):  # a full disk refuses what is still buffered, too
                stream.close()
        if folder is not None and not _waiting(folder):
            shutil.rmtree(folder, ignore_errors=True)


class FastWriter(GGUFWriter):
    """GGUFWriter that packs long arrays, a vocabulary's, at once instead of element by element; the bytes are the "
    "same."""

    def _pack_val(
        self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: GGUFValueType | None = None
    ) -> bytes:
        plain = vtype is GGUFValueType.ARRAY and sub_type is None and isinstance(val, list)
        kinds = {type(item) for item in val} if plain else set()
        if len(kinds) != 1 or len(val) < 1000 or (kind := kinds.pop()) not in (int, float, str):
            return bytes(super()._pack_val(val, vtype, add_vtype, sub_type))
        if kind is str:
            encoded = [text.encode() for text in val]
            content = b"".join(len(text).to_bytes(8, "little") + text for text in encoded)
        else:
            content = np.asarray(val, "<i4" if kind is int else "<f4").tobytes()
        head = self._pack("I", vtype) if add_vtype else b""
        return bytes(head + self._pack("I", GGUFValueType.get_type(val[0])) + self._pack("Q", len(val)) + content)


def check_target(outfile: Path, n_bytes: int) -> None:
    """Raise unless `outfile` can be created and the disk has room for it."""
    if outfile.is_dir():
        raise BlockffnError(f"{outfile}: expected a file name, found a folder; add a name such as model.gguf")
    if not outfile.parent.is_dir():
        raise BlockffnError(f"{outfile.parent}: no such folder; create it first")
    if not os.access(outfile.parent, os.W_OK):
        raise BlockffnError(f"{outfile.parent}: not writable; choose another folder")
    free = shutil.disk_usage(outfile.parent).free
    if free < n_bytes + (1 << 20):
        raise BlockffnError(
            f"{outfile.parent}: not enough space: expected {n_bytes / 1e9:.2f} GB, found {free / 1e9:.2f} GB free; "
            "free some or choose a smaller --outtype"
        )


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    """Store a Python value with its GGUF type: bool, u32, f32, string, or array of strings, i32 or f32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_key_value(key, value, GGUFValueType.STRING)
    elif isinstance(value, bytes):
        writer.add_array(key, value)
    else:
        writer.add_array(key, list(value))


def _write_data(writer: GGUFWriter, plan: list[PlannedTensor]) -> None:
    assert writer.fout is not None
    by_name = {tensor.name: tensor for tensor in plan}
    with _Progress(sum(tensor.n_bytes for tensor in plan)) as progress:
        for stream, infos in zip(writer.fout, writer.tensors, strict=True):
            writer.write_padding(stream, stream.tell())
            for name in infos:
                tensor = by_name[name]
                before = stream.tell()
                for piece in encode(tensor):
                    stream.write(piece.data)
                    progress.add(piece.nbytes)
                assert stream.tell() - before == tensor.n_bytes, f"{name}: {stream.tell() - before} != {tensor.n_bytes}"
                writer.write_padding(stream, tensor.n_bytes)


def encode(tensor: PlannedTensor) -> Iterator[Array]:
    """Yield the tensor's bytes in its output type, in pieces of whole rows."""
    values = tensor.load()
    row = tensor.shape[-1]
    step = max(1, PIECE_VALUES // row)
    if values.ndim == 3:  # keep strided views strided: one expert or head after another
        for part in values:
            yield from _encode_rows(tensor, part, step)
    else:
        yield from _encode_rows(tensor, values.reshape(-1, row), step)


def _encode_rows(tensor: PlannedTensor, rows: Array, step: int) -> Iterator[Array]:
    for start in range(0, rows.shape[0], step):
        yield _encode_piece(tensor, np.ascontiguousarray(rows[start : start + step]))


def _encode_piece(tensor: PlannedTensor, values: Array) -> Array:
    """Check that the values [rows, columns] are finite and return them as contiguous bytes in the output type."""
    kind = tensor.type
    if values.dtype == BF16 and kind is GGMLQuantizationType.BF16:
        _require_finite(tensor, int((values.view(np.uint16) & 0x7FFF).max(initial=0)) < 0x7F80)
        return values.view(np.uint8)
    if values.dtype == np.float16 and kind is GGMLQuantizationType.F16:
        _require_finite(tensor, int((values.view(np.uint16) & 0x7FFF).max(initial=0)) < 0x7C00)
        return values.view(np.uint8)
    wide = to_float32(values)
    _require_finite(tensor, bool(np.isfinite(wide).all()))
    if kind is GGMLQuantizationType.F32:
        return wide.view(np.uint8)
    if kind is GGMLQuantizationType.F16:
        with np.errstate(over="ignore"):
            half = wide.astype(np.float16)
        if not np.isfinite(half).all():
            raise BlockffnError(
                f"{tensor.name} (from {tensor.source}): value {float(np.abs(wide).max()):g} does not fit F16 (up to "
                "65504); use --outtype bf16 or f32"
            )
        return half.view(np.uint8)
    packed = quants.quantize(wide, kind)
    if kind is GGMLQuantizationType.BF16 and (packed.view(np.uint16) & 0x7FFF).max(initial=0) >= 0x7F80:
        raise BlockffnError(f"{tensor.name} (from {tensor.source}): a value does not fit BF16; use --outtype f32")
    return np.ascontiguousarray(packed).view(np.uint8)


def _require_finite(tensor: PlannedTensor, finite: bool) -> None:
    if not finite:
        raise BlockffnError(
            f"{tensor.name} (from {tensor.source}): the weights hold NaN or Inf; the checkpoint is damaged or the "
            "training diverged: take another checkpoint"
        )


def _fill_in_digest(file: Path, digest: str) -> None:
    """Replace the placeholder in the header; both have 64 characters, so nothing moves."""
    with open(file, "r+b") as stream:
        head = stream.read(1 << 20)
        marker = SOURCE_SHA256.encode()
        at = head.index(PENDING.encode(), head.index(marker))
        stream.seek(at)
        stream.write(digest.encode())


def _sync(path: Path) -> None:
    """Wait until the disk has a file or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move(files: list[Path], target: Path) -> list[Path]:
    """Rename the finished files into place, all or none: the parts that they replace wait in their folder meanwhile."""
    placed = [target / file.name for file in files]
    waiting = files[0].parent / "replaced"
    waiting.mkdir()
    try:
        for file in placed if len(files) > 1 else ():  # one file is replaced at once
            if file.exists():
                os.replace(file, waiting / file.name)
        for file, place in zip(files, placed, strict=True):
            os.replace(file, place)
        _sync(target)
    except BaseException:
        for file, place in zip(files, placed, strict=True):
            if (waiting / file.name).exists():
                os.replace(waiting / file.name, place)
            elif len(files) > 1 and not file.exists():
                place.unlink()
        raise
    shutil.rmtree(waiting)
    return placed


def _waiting(folder: Path) -> bool:
    """Whether earlier files are still in the folder: putting them back failed, so they stay where they are."""
    return (folder / "replaced").is_dir() and any((folder / "replaced").iterdir())


class _Progress:
    """A bar on a terminal, a line per tenth elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.shown = total, 0, 0
        self.bar = tqdm(total=total, unit="B", unit_scale=True, desc="convert") if _terminal(sys.stderr) else None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, n_bytes: int) -> None:
        """Advance by n_bytes of written data."""
        self.done += n_bytes
        if self.bar is not None:
            self.bar.update(n_bytes)
        elif self.total > 100_000_000 and self.done * 10 // self.total > self.shown:
            self.shown = self.done * 10 // self.total
            print(f"convert: {self.shown * 10} % of {self.total / 1e9:.2f} GB written", file=sys.stderr, flush=True)


def _terminal(stream: Any) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())
