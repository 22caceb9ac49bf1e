"""Quantizes GGUF files with llama-quantize of the patched tree, and says beforehand what every tensor becomes.

A row must be a multiple of the block of its type: K-quants have blocks of 256, so the down projections of experts with
64 or 128 hidden values cannot hold them and llama-quantize falls back to a type of 32. The plan names these tensors.

    >>> from blockffn.quantize import plan, quantize
    >>> plan("model.gguf", "Q4_K_M").bits_per_weight                  # doctest: +SKIP
    5.93
    >>> quantize("model.gguf", "small.gguf", "Q4_K_M")                # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from blockffn import library
from blockffn.errors import BlockffnError
from blockffn.gguf_file import TensorInfo, read_gguf
from blockffn.threads import default_threads

# File types that llama-quantize knows -> the type of most of their tensors.
TYPES = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "Q8_0": "Q8_0",
    "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K",
    "Q5_K_S": "Q5_K",
    "Q5_1": "Q5_1",
    "Q5_0": "Q5_0",
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "Q4_1": "Q4_1",
    "Q4_0": "Q4_0",
    "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS",
    "Q3_K_L": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_S": "Q3_K",
    "IQ3_M": "IQ3_S",
    "IQ3_S": "IQ3_S",
    "IQ3_XXS": "IQ3_XXS",
    "Q2_K": "Q2_K",
    "IQ2_M": "IQ2_S",
    "IQ2_S": "IQ2_S",
    "IQ2_XS": "IQ2_XS",
    "IQ2_XXS": "IQ2_XXS",
    "IQ1_M": "IQ1_M",
    "IQ1_S": "IQ1_S",
    "MXFP4_MOE": "MXFP4",
}


@dataclass(frozen=True)
class Preset:
    """A file type with other types for some tensors."""

    base: str  # file type of llama-quantize
    rules: tuple[tuple[str, str], ...]  # (pattern of tensor names, tensor type); the first that matches counts
    about: str


PRESETS: dict[str, Preset] = {
    "BALANCED": Preset(
        "IQ4_NL", (("attn", "Q8_0"),), "IQ4_NL, attention in Q8_0: half the divergence of Q4_K_M in about the same size"
    ),
}
# Tensor types whose products of several tokens have kernels of ours, on x86 and on ARM (docs/kernels.md); with any
# other type, n tokens cost about n times one.
TILED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
TILED_X86 = ("F32", "F16", "BF16")  # on x86 alone
_ALIASES = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M"}
_FLOATS = ("F32", "F16", "BF16")

_TENSOR = re.compile(r"^\[ *(\d+)/ *(\d+)\] (\S+) +- \[.*?\], type = +(\S+?),(?:.*\((\S+)\))?")
_FALLBACK = re.compile(r"^warning: (\S+) +- ncols +\d+ not divisible by +\d+ \(required for type +(\S+)\)")


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor: what it is, what it becomes, and what it should have become if its rows allowed it."""

    source: TensorInfo
    type: str
    wanted: str

    @property
    def fallback(self) -> bool:
        """True when the rows of the tensor do not fit the wanted type."""
        return self.type != self.wanted


@dataclass(frozen=True)
class Plan:
    """What llama-quantize will do to a file."""

    type: str
    tensors: tuple[PlannedTensor, ...]
    needs_imatrix: bool

    @property
    def fallbacks(self) -> tuple[PlannedTensor, ...]:
        """Tensors that do not get the type they should."""
        return tuple(tensor for tensor in self.tensors if tensor.fallback)

    @property
    def nominal_bits(self) -> float:
        """Bits per weight of the type itself, scales included: what its name promises."""
        return bits(_tensor_type(self.type))

    @property
    def untiled(self) -> dict[str, int]:
        """Tensor types without a fast kernel for several tokens -> weights in them; matrices alone."""
        found: dict[str, int] = {}
        for tensor in self.tensors:
            if len(tensor.source.shape) > 1 and tensor.type not in TILED + TILED_X86:
                found[tensor.type] = found.get(tensor.type, 0) + tensor.source.n_elements
        return found

    @property
    def bits_without_fallbacks(self) -> float:
        """Bits per weight of the whole file if every row fitted: some tensors always keep a finer type."""
        return self._mean([bits(tensor.wanted) for tensor in self.tensors])

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the whole file as it will be."""
        return self._mean([bits(tensor.type) for tensor in self.tensors])

    def _mean(self, bits_of: list[float]) -> float:
        sizes = [tensor.source.n_elements for tensor in self.tensors]
        return sum(b * n for b, n in zip(bits_of, sizes, strict=True)) / max(1, sum(sizes))


def bits(kind: str) -> float:
    """Return the bits per weight of a tensor type, for example 4.5 for Q4_K."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return 8 * size / block


def canonical_type(name: str) -> str:
    """Return the file type in llama-quantize's spelling, or the preset; an unknown one is an error that lists all."""
    upper = _ALIASES.get(name.upper(), name.upper())
    known = [*TYPES, *PRESETS]
    if upper in known:
        return upper
    near = difflib.get_close_matches(upper, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise BlockffnError(f"unknown type {name!r}: {hint}known: {', '.join(known)}")


def main_type(path: str | Path) -> str:
    """Return the type of most weights of an unquantized file: F32, F16 or BF16. Errors: BlockffnError for others."""
    found = _most_weights(path)
    if found not in _FLOATS:
        raise BlockffnError(f"{path}: most weights are {found} already: give the F32, F16 or BF16 file")
    return found


def is_unquantized(path: str | Path) -> bool:
    """Return whether most weights of a file are F32, F16 or BF16."""
    return _most_weights(path) in _FLOATS


def _most_weights(path: str | Path) -> str:
    sizes: dict[str, int] = {}
    for tensor in read_gguf(path).tensors:
        sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.n_elements
    return max(sizes, key=lambda kind: sizes[kind])


def _base(kind: str) -> str:
    """Return the file type of llama-quantize."""
    return PRESETS[kind].base if kind in PRESETS else kind


def _tensor_type(kind: str) -> str:
    """Return the type of most tensors."""
    return TYPES[_base(kind)]


def plan(source: str | Path, kind: str, imatrix: str | Path | None = None) -> Plan:
    """Return what `quantize` would do, from llama-quantize's own dry run; nothing is written."""
    kind = canonical_type(kind)
    infos = {tensor.name: tensor for tensor in read_gguf(source).tensors}
    becomes: dict[str, str] = {}
    wanted: dict[str, str] = {}
    needs_imatrix = False
    for line in _run([*_options(kind, imatrix), "--dry-run", str(source), _base(kind)], str(source)):
        if match := _FALLBACK.match(line):
            wanted[match[1]] = match[2].upper()
        elif match := _TENSOR.match(line):
            becomes[match[3]] = (match[5] or match[4]).upper()
        needs_imatrix |= "will require an imatrix" in line
    missing = infos.keys() - becomes.keys()
    if missing:
        raise BlockffnError(f"{source}: llama-quantize did not say what becomes of {', '.join(sorted(missing)[:3])}")
    tensors = [
        PlannedTensor(info, becomes[name], wanted.get(name) or _silent_fallback(info, kind, becomes[name]))
        for name, info in infos.items()
    ]
    return Plan(kind, tuple(tensors), needs_imatrix)


def _silent_fallback(tensor: TensorInfo, kind: str, becomes: str) -> str:
    """Return the wanted type of a tensor without a warning: only the head falls back (to Q8_0) without saying so."""
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[_tensor_type(kind)]]
    head = tensor.name in ("output.weight", "token_embd.weight")
    return "Q6_K" if head and becomes == "Q8_0" and block > 32 and tensor.shape[0] % block else becomes


def quantize(
    source: str | Path,
    target: str | Path,
    kind: str,
    imatrix: str | Path | None = None,
    announce: Callable[[Plan], None] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Plan:
    """Quantize `source` to `target`, which appears whole or not at all, and return the plan that was followed.

    announce(plan) is called before anything is written, progress(i, n, tensor) for each tensor.
    Errors: BlockffnError for bad files, unknown types, a missing importance matrix, or a quantized source.
    """
    kind = canonical_type(kind)
    out = _checked_target(Path(source), Path(target))
    if imatrix is not None and not Path(imatrix).is_file():
        raise BlockffnError(f"{imatrix}: no such importance matrix; make one with llama-imatrix")
    steps = plan(source, kind, imatrix)
    _check_sources(source, steps)
    if steps.needs_imatrix and imatrix is None:
        raise BlockffnError(f"{kind} needs an importance matrix: make one with llama-imatrix and give --imatrix")
    if announce is not None:
        announce(steps)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        arguments = [*_options(kind, imatrix), str(source), str(temporary), _base(kind), str(default_threads())]
        for line in _run(arguments, str(source)):
            if progress is not None and (match := _TENSOR.match(line)):
                progress(int(match[1]), int(match[2]), match[3])
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return steps


def _checked_target(source: Path, target: Path) -> Path:
    if not target.parent.is_dir():
        raise BlockffnError(f"{target}: the folder {target.parent} does not exist; create it")
    if target.is_dir():
        raise BlockffnError(f"{target}: is a directory, expected a file name")
    if target.exists() and source.exists() and target.samefile(source):
        raise BlockffnError(f"{target}: input and output are the same file; choose another name")
    return target


def _check_sources(source: str | Path, steps: Plan) -> None:
    for tensor in steps.tensors:
        if tensor.source.type != tensor.type and tensor.source.type not in _FLOATS:
            raise BlockffnError(
                f"{source}: tensor {tensor.source.name} is {tensor.source.type} already; "
                "quantize from the F32, F16 or BF16 file"
            )


def _options(kind: str, imatrix: str | Path | None) -> list[str]:
    options = [] if imatrix is None else ["--imatrix", str(imatrix)]
    for pattern, tensor_type in PRESETS[kind].rules if kind in PRESETS else ():
        options += ["--tensor-type", f"{pattern}={tensor_type.lower()}"]
    return options


def _run(arguments: list[str], source: str) -> Iterator[str]:
    """Run llama-quantize and yield its lines; BlockffnError with its last words when it fails."""
    command = [str(library.program("llama-quantize")), *arguments]
    environment = {**os.environ, "LC_ALL": "C"}
    tail: list[str] = []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            tail = [*tail[-15:], line.strip()]
            yield line
        status = process.wait()
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            process.wait()
    if status != 0:
        raise BlockffnError(f"{source}: llama-quantize failed: {_cause(tail)}")


def _cause(tail: list[str]) -> str:
    """Return the line of the output that says most."""
    for mark in ("failed to quantize:", "error loading model:", "rror", "failed"):
        for line in tail:
            if mark in line:
                return line.split(mark, 1)[1].strip(" :") or line if mark.endswith(":") else line
    return tail[-1] if tail else "no output"
