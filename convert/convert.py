"""One checkpoint -> one GGUF (or a split one): read, check, plan, write.

report = convert_checkpoint("BlockFFN-XLarge", "xlarge.gguf", outtype="f16")
report.files, report.notes
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from gguf import Keys
from gguf.utility import size_label

from blockffn.convert import writer
from blockffn.convert.chat_templates import MORE_TEMPLATES
from blockffn.convert.checkpoint import Checkpoint, open_checkpoint
from blockffn.convert.families import read_config
from blockffn.convert.fields import check_option
from blockffn.convert.metadata import SOURCE_SHA256, check_values, model_card, model_metadata, read_overrides
from blockffn.convert.model import ModelConfig
from blockffn.convert.plan import OUTTYPES, PlannedTensor, choose_outtype, plan_tensors
from blockffn.convert.tensor_map import map_tensors
from blockffn.convert.vocab import TOKENIZER_FILES, read_vocab
from blockffn.errors import BlockffnError
from blockffn.gguf_contract import EXPERT_LAYOUTS


@dataclass
class ConvertReport:
    """Returned by convert_checkpoint; `lines` is what the command line prints."""

    source: str
    name: str
    family: str
    outtype: str
    layout: str
    files: list[Path]
    tensors: list[PlannedTensor]
    n_tokens: int
    notes: list[str] = field(default_factory=list)
    sha256: str = ""
    seconds: float = 0.0
    dry_run: bool = False

    @property
    def n_parameters(self) -> int:
        """Weights in the file (the folded mean rows of norm_silu included)."""
        return sum(tensor.n_elements for tensor in self.tensors)

    @property
    def n_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    def lines(self) -> list[str]:
        """Return the summary, after the plan of a dry run."""
        plan = [
            f"{tensor.name:40} {tensor.type.name:5} {' x '.join(map(str, tensor.ggml_shape)):24} {tensor.source}"
            for tensor in self.tensors
        ]
        wrote = "would write" if self.dry_run else "wrote"
        size = f"{self.n_parameters / 1e6:.1f} M parameters, {self.n_bytes / 1e6:.1f} MB, {self.n_tokens} tokens"
        time = "" if self.dry_run else f", {self.seconds:.1f} s"
        summary = [f"{self.name}: {self.family}, {self.outtype}, layout {self.layout}: {size}{time}"]
        return (plan if self.dry_run else []) + self.notes + summary + [f"{wrote} {file}" for file in self.files]


def convert_checkpoint(
    src: str | PathLike[str],
    outfile: str | PathLike[str],
    *,
    outtype: str = "auto",
    layout: str = "expert",
    dry_run: bool = False,
    split_max_size: int = 0,
    metadata: str | PathLike[str] | None = None,
    vocab_only: bool = False,
) -> ConvertReport:
    """Convert a checkpoint folder or hub id to `outfile` and report what was done.

    outtype: f32, f16, bf16, q8_0, or auto (as most weights are stored). layout: ``expert`` (three-dimensional,
    contiguous per expert) or ``dense`` (two-dimensional, the dense baseline of the same weights). split_max_size:
    bytes per file, 0 for one file; split files are named ``model-00001-of-00003.gguf``. metadata: JSON file of
    general.* keys to add. Raises BlockffnError, and leaves no file, for anything unclear.
    """
    started = time.monotonic()
    target = Path(outfile)
    _check_choices(outtype, layout, split_max_size)
    overrides = read_overrides(Path(metadata) if metadata else None)
    checkpoint = open_checkpoint(str(src))
    config = read_config(checkpoint)
    sources = map_tensors(checkpoint, config)
    vocab = read_vocab(checkpoint, config)
    kind = choose_outtype(outtype, checkpoint)
    plan = plan_tensors(checkpoint, config, sources, kind, layout)
    values = model_metadata(config, layout, kind) | _origin(checkpoint, config, plan)
    values |= model_card(checkpoint) | overrides | vocab.metadata()
    check_values(values)
    _check_not_source(checkpoint, target)
    report = ConvertReport(
        source=str(src),
        name=config.name,
        family=config.family,
        outtype=kind,
        layout=layout,
        files=[target],
        tensors=[] if vocab_only else plan,
        n_tokens=len(vocab.tokens),
        notes=checkpoint.notes,
        dry_run=dry_run,
    )
    if dry_run:
        writer.check_target(target, report.n_bytes)
        return report
    with _Digest(checkpoint) as digest:
        report.files = writer.write_gguf(
            target,
            values,
            report.tensors,
            split_max_size=split_max_size,
            digest=digest.result,
        )
        report.sha256 = digest.result()
    report.seconds = time.monotonic() - started
    return report


def _check_choices(outtype: str, layout: str, split_max_size: int) -> None:
    check_option("outtype", outtype, OUTTYPES)
    check_option("layout", layout, EXPERT_LAYOUTS)
    if split_max_size < 0:
        raise BlockffnError(f"--split-max-size: expected a positive size, found {split_max_size}; for example 2G")


def _origin(checkpoint: Checkpoint, config: ModelConfig, plan: list[PlannedTensor]) -> dict[str, Any]:
    total = sum(tensor.n_elements for tensor in plan)
    values: dict[str, Any] = {Keys.General.SIZE_LABEL: size_label(total, total, 0, 0), SOURCE_SHA256: writer.PENDING}
    if not Path(checkpoint.source).exists():
        values["general.source.huggingface.repository"] = checkpoint.source
    return values


def _source_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Return name -> path of every file that a conversion reads, ordered by name."""
    extra = [checkpoint.folder / name for name in ("config.json", *TOKENIZER_FILES)]
    extra += (checkpoint.folder / MORE_TEMPLATES).glob("*.jinja")
    files = {*checkpoint.files, *(file for file in extra if file.is_file())}
    return dict(sorted((file.relative_to(checkpoint.folder).as_posix(), file) for file in files))


def _check_not_source(checkpoint: Checkpoint, target: Path) -> None:
    """Writing must not replace what is being read."""
    for name, file in _source_files(checkpoint).items():
        if target.exists() and target.samefile(file):
            raise BlockffnError(
                f"{target}: expected a file to write, found {name} of the checkpoint; choose another name"
            )


class _Digest:
    """SHA-256 over the lines that `sha256sum` prints for the source files, computed beside the conversion."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.files = _source_files(checkpoint)
        self.stop = False

    def __enter__(self) -> _Digest:
        self.pool = ThreadPoolExecutor(1)
        self.future: Future[str] = self.pool.submit(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop = True
        self.pool.shutdown()

    @property
    def result(self) -> Callable[[], str]:
        """Wait for the digest and return it as 64 hexadecimal digits."""
        return self.future.result

    def _run(self) -> str:
        lines, piece = hashlib.sha256(), memoryview(bytearray(1 << 20))
        for name, file in self.files.items():
            one = hashlib.sha256()
            with open(file, "rb", buffering=0) as stream:
                while (count := stream.readinto(piece)) and not self.stop:
                    one.update(piece[:count])
            lines.update(f"{one.hexdigest()}  {name}\n".encode("utf-8", "surrogateescape"))
        return lines.hexdigest()
