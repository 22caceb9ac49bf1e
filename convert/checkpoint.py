"""Open a checkpoint folder lazily: names, shapes and dtypes first, one tensor's values at a time afterwards.

Reads safetensors files and torch pickles (weights_only, memory-mapped), whole or sharded, and BMTrain `*.pt` files:

    checkpoint = open_checkpoint("BlockFFN-XLarge")
    checkpoint.tensors["model.norm.weight"].shape       # (1792,)
    checkpoint.load("model.norm.weight")                # numpy array, bfloat16 as the dtype BF16

bfloat16 values travel as the one-field structured dtype `BF16`, so that numpy can reshape and transpose them unchanged;
`to_float32` widens them. torch is imported for pickles only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from blockffn.convert.fields import shown
from blockffn.convert.pickles import PickleFile
from blockffn.errors import BlockffnError

BF16 = np.dtype([("bf16", "<u2")])
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BF16,
}
JSON_BYTES = 128 << 20  # the largest JSON file read: a tokenizer.json of 250,000 tokens has 20 MB
HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"  # owner/name
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.(safetensors|bin)$")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the checkpoint: where it lies and what it is (shape in torch order)."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # a key of DTYPES, or the name of a dtype that we refuse
    file: Path
    offset: int = -1  # of the first byte in a safetensors file


@dataclass
class Checkpoint:
    """A folder with config.json and weights. `notes` collects what the readers decided, for the report."""

    folder: Path
    source: str  # what the user named: the folder or the hub id
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: list[Path]
    notes: list[str] = field(default_factory=list)
    _pickles: dict[Path, PickleFile] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Record a decision once."""
        if text not in self.notes:
            self.notes.append(text)

    def load(self, name: str) -> np.ndarray[Any, Any]:
        """Return the values of one tensor, in the shape and type it is stored with."""
        info = self.tensors[name]
        if info.file.suffix == ".safetensors":
            size = math.prod(info.shape) * DTYPES[info.dtype].itemsize
            if size == 0:
                return np.empty(info.shape, DTYPES[info.dtype])
            raw = np.memmap(info.file, np.uint8, "r", info.offset, (size,))
            return np.asarray(raw).view(DTYPES[info.dtype]).reshape(info.shape)
        values = self._pickles[info.file].load(name)
        return values.view(BF16) if info.dtype == "BF16" else values


def to_float32(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Widen stored values (F16, BF16, F64) to float32; exact except for F64."""
    if values.dtype == BF16:
        wide = np.left_shift(values.view(np.uint16), np.uint32(16), dtype=np.uint32)
        return wide.view(np.float32)
    return values.astype(np.float32, copy=False)


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a folder, or a hub id such as ``SparseLLM/BlockFFN-XLarge``. Raises BlockffnError on anything unclear."""
    folder = _locate(source)
    config = read_json(folder / "config.json", "every checkpoint has one; copy it beside the weights")
    if not isinstance(config, dict):
        raise BlockffnError(f"{folder / 'config.json'}: expected a JSON object, found {type(config).__name__}")
    notes: list[str] = []
    files, index = _find_files(folder, notes)
    checkpoint = Checkpoint(folder, str(source), config, {}, files, notes)
    for file in files:
        infos = _safetensors_infos(file) if file.suffix == ".safetensors" else _pickle_infos(checkpoint, file)
        for info in infos:
            if info.name in checkpoint.tensors:
                other = checkpoint.tensors[info.name].file.name
                raise BlockffnError(
                    f"{file.name}: tensor {info.name} is also in {other}; expected it once; remove the stale file"
                )
            checkpoint.tensors[info.name] = info
    if index is not None:
        _check_index(index, checkpoint)
    if not checkpoint.tensors:
        raise BlockffnError(f"{folder}: the weight files hold no tensor; download the checkpoint again")
    return checkpoint


def read_json(path: Path, cure: str) -> Any:
    """Parse a JSON file, with an error that names the file, the line and the cure."""
    if not path.is_file():
        raise BlockffnError(f"{path}: file not found; {cure}")
    if path.stat().st_size > JSON_BYTES:
        raise BlockffnError(f"{path}: expected at most {JSON_BYTES >> 20} MiB; restore the original file")
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise BlockffnError(f"{path}: not valid JSON ({error}); restore the original file") from error


def optional_json(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object; {} where there is no file."""
    if not path.is_file():
        return {}
    values = read_json(path, "")
    if not isinstance(values, dict):
        raise BlockffnError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BlockffnError(f"{path}: expected UTF-8 text ({error}); restore the original file") from error
    except OSError as error:
        raise BlockffnError(f"{path}: cannot be read: {error.strerror or error}") from error


def _locate(source: str | Path) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise BlockffnError(
            f"{source}: expected a checkpoint folder, found a file; name the folder with its config.json"
        )
    if re.fullmatch(HUB_ID, str(source)):
        return _download(str(source))
    raise BlockffnError(f"{source}: no such folder, and not a hub id of the form owner/name")


def _download(repository: str) -> Path:
    """Fetch a hub repository into the user's cache; only weights, configuration and tokenizer."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise BlockffnError(
            f"{repository}: no such folder; to fetch it from the hub, install huggingface_hub: pip install "
            "'blockffn[hub]'"
        ) from error
    patterns = ["*.json", "*.safetensors", "*.bin", "*.pt", "tokenizer.model", "*.jinja", "freq_*.pkl", "README.md"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # the library raises many kinds: network, name, permission, disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BlockffnError(
            f"{repository}: no such folder, and the hub did not deliver it ({reason}); check the name and the "
            "network, or download the folder and name its path"
        ) from error


def _find_files(folder: Path, notes: list[str]) -> tuple[list[Path], Path | None]:
    """Return the weight files and the index that lists them, if there is one."""
    for kind, index_name, pattern in (
        ("safetensors", "model.safetensors.index.json", "*.safetensors"),
        ("bin", "pytorch_model.bin.index.json", "pytorch_model*.bin"),
        ("pt", "", "*.pt"),
    ):
        found = sorted(folder.glob(pattern))
        index = folder / index_name if index_name and (folder / index_name).is_file() else None
        if not found and index is None:
            continue
        if kind == "safetensors" and list(folder.glob("pytorch_model*.bin")):
            notes.append("the folder holds safetensors and pytorch_model files; the safetensors files are read")
        if index is not None:
            return _indexed_files(folder, index, found), index
        _check_numbering(found)
        if kind == "pt" and len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise BlockffnError(f"{folder}: expected one training file *.pt, found {names}; keep the one to convert")
        return found, None
    raise BlockffnError(
        f"{folder}: no weights found; expected *.safetensors, pytorch_model*.bin or one *.pt file beside config.json"
    )


def _indexed_files(folder: Path, index: Path, found: list[Path]) -> list[Path]:
    listed = sorted(set(_weight_map(index).values()))
    for name in listed:
        if Path(name).name != name or Path(name).suffix != _suffix(index):
            raise BlockffnError(
                f"{index.name}: weight_map names {shown(name)}; expected a file *{_suffix(index)} of the same folder"
            )
        if not (folder / name).is_file():
            raise BlockffnError(f"{index.name}: shard {name} is missing from {folder}; download it again")
    unknown = sorted({file.name for file in found} - set(listed))
    if unknown:
        raise BlockffnError(
            f"{folder}: {', '.join(unknown)} is not listed in {index.name}; remove it, or restore the index it "
            "belongs to"
        )
    return [folder / name for name in listed]


def _suffix(index: Path) -> str:
    """The suffix of the weight files that an index lists."""
    return ".safetensors" if index.name.startswith("model.") else ".bin"


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor -> file of an index."""
    content = read_json(index, "")
    weight_map = content.get("weight_map") if isinstance(content, dict) else content
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) and name for name in weight_map.values())
    ):
        raise BlockffnError(
            f"{index}: expected an object weight_map (tensor: file), found {shown(weight_map)}; restore the file"
        )
    return weight_map


def _check_numbering(files: list[Path]) -> None:
    """Without an index, files numbered NNNNN-of-MMMMM must all be there."""
    for file in files:
        match = SHARD.search(file.name)
        if not match:
            continue
        stem = file.name[: match.start()]
        for number in range(1, int(match[2]) + 1):
            name = f"{stem}-{number:05d}-of-{match[2]}.{match[3]}"
            if not (file.parent / name).is_file():
                raise BlockffnError(f"{file.parent}: shard {name} is missing ({file.name} is there); download it again")


def _check_index(index: Path, checkpoint: Checkpoint) -> None:
    weight_map = _weight_map(index)
    for name, file in weight_map.items():
        info = checkpoint.tensors.get(name)
        if info is None or info.file.name != file:
            where = "nowhere" if info is None else f"in {info.file.name}"
            raise BlockffnError(
                f"{index.name}: {shown(name)}: expected in {file}, found {where}; the shard and the index differ"
            )
    for name, info in checkpoint.tensors.items():
        if name not in weight_map:
            raise BlockffnError(f"{info.file.name}: {name}: not listed in {index.name}; the shard and the index differ")


def _reject_pointer(file: Path) -> None:
    if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
        raise BlockffnError(f"{file}: a Git LFS pointer, not weights; run `git lfs pull` in the folder")


def _safetensors_infos(file: Path) -> Iterable[TensorInfo]:
    _reject_pointer(file)
    try:
        with safe_open(file, framework="np"):  # the library checks header, offsets and file length
            pass
    except (SafetensorError, OSError) as error:
        raise BlockffnError(f"{file}: not a complete safetensors file ({error}); download it again") from error
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        yield TensorInfo(name, tuple(entry["shape"]), entry["dtype"], file, 8 + length + entry["data_offsets"][0])


def _pickle_infos(checkpoint: Checkpoint, file: Path) -> Iterable[TensorInfo]:
    _reject_pointer(file)
    pickle = PickleFile(file)
    checkpoint._pickles[file] = pickle
    for name, (shape, dtype) in pickle.describe().items():
        yield TensorInfo(name, shape, dtype, file)
