"""What a conversion did, or would do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from blockffn.convert.plan import PlannedTensor


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
