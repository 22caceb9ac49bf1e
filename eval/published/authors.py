"""The authors' own model code, which some checkpoints carry, as the yardstick of parity.

It runs only when the user says so (`--trust-remote-code`), through transformers, on the CPU in float32.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import blockffn
from blockffn.errors import BlockffnError
from blockffn.eval.quality import metrics
from blockffn.eval.quality.parity import BOUNDS, FLOAT32, SAMPLE_TEXT, weight_type


class CannotRun(Exception):
    """The authors' code is absent or does not run here; the message says why."""


@dataclass
class Authors:
    """The model as its authors wrote it."""

    model: Any
    torch: Any

    def logits(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """Return the logits after every token, float32 [n_tokens, n_vocab]. CannotRun when the code fails."""
        try:
            with self.torch.inference_mode():
                found = self.model(input_ids=self.torch.tensor([tokens]), use_cache=False).logits[0]
            return np.asarray(found.float().numpy())
        except Exception as error:  # remote code: whatever it raises
            raise CannotRun(_reason(error)) from error


def load(where: str) -> Authors:
    """Load the checkpoint by the code that it carries. CannotRun when there is none, or when it does not run here."""
    try:
        torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise CannotRun(f"the package {error.name} is not installed: pip install torch transformers") from error
    try:
        options = {"trust_remote_code": True, "torch_dtype": torch.float32}
        model = transformers.AutoModelForCausalLM.from_pretrained(where, **options)
        return Authors(model.eval(), torch)
    except Exception as error:  # remote code: whatever it raises
        raise CannotRun(_reason(error)) from error


def compare(gguf: Path, where: str, threads: int | None) -> dict[str, Any]:
    """Compare llama.cpp with the authors' code on a text; CannotRun when that does not run."""
    theirs = load(where)
    llm = blockffn.Llama(gguf, type_k=FLOAT32, type_v=FLOAT32, flash_attn=False, n_threads=threads)
    try:
        tokens = llm.tokenize(SAMPLE_TEXT.encode(), add_bos=True)
        found, kind = llm.logits(tokens), weight_type(str(gguf))
    finally:
        llm.close()
    wanted = theirs.logits(tokens)
    if wanted.shape != found.shape:
        raise BlockffnError(f"{where}: the authors' code gives logits {wanted.shape}, the GGUF {found.shape}")
    error, bound = metrics.nmse(found, wanted), BOUNDS.get(kind)
    divergence = metrics.kl_divergence(found, wanted)
    failed = not np.isfinite(error) or (bound is not None and error > bound)
    return {
        "weight_type": kind,
        "n_tokens": len(tokens),
        "nmse": error,
        "bound": bound,
        "max_error": float(np.abs(found - wanted).max()),
        "kl_mean": float(divergence.mean()),
        "top1": metrics.top1_agreement(found, wanted),
        "failures": [f"NMSE of the logits: expected at most {bound:g}, found {error:.2e}"] if failed else [],
    }


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
