"""A random EAGLE-2 head beside a planted model: for its time, its tokens mean nothing.

    >>> from blockffn.eval.planted import files as planted_files
    >>> from blockffn.eval.planted.head import head
    >>> head(planted_files.models("tiny")).name            # doctest: +SKIP
    'tiny-eagle-32768-Q4_0.gguf'

One decoder layer of the model's hidden size, SwiGLU of 8/3 of it, embedding and output matrix of the planted model; the
output matrix is cut to `n_draft` tokens, as FR-Spec does (arXiv 2502.14856). Made once and kept beside the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from blockffn.eval.planted.files import PlantedModels
from blockffn.eval.planted.model import FIRST_TOKEN, PlantedShape

DRAFT_TOKENS = 32768  # the larger of the published settings; the other is 16384


def head(models: PlantedModels, n_draft: int = DRAFT_TOKENS, say: Callable[[str], None] = lambda line: None) -> Path:
    """Return the file of a head for these models, of their weight type. Errors: BlockffnError for a full disk."""
    shape, kind = models.shape, models.union.stem.removeprefix(models.shape.name + "-")
    target = models.union.with_name(f"{shape.name}-eagle-{n_draft}-{kind}.gguf")
    if not target.exists():
        folder = target.with_name(f"{target.stem}-checkpoint")
        try:
            say(f"making {target.name}")
            write_checkpoint(shape, folder, n_draft)
            _convert(folder, models.union, target, kind)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return target


def write_checkpoint(shape: PlantedShape, folder: Path, n_draft: int, seed: int = 0) -> None:
    """Write config.json, float16 tensors under their published names, and the draft vocabulary (draft.json)."""
    rng = np.random.default_rng(seed)
    h, n_ff = shape.n_embd, 64 * round(shape.n_embd / 24)  # 8/3 of the hidden size
    tensors: dict[str, np.ndarray] = {"fc.bias": np.zeros(h, np.float16)}
    norms = ("input_norm1", "input_norm2", "layers.0.post_attention_layernorm")
    tensors |= {f"{name}.weight": np.ones(h, np.float16) for name in norms}
    sizes = {"fc": (h, 2 * h)} | {f"layers.0.self_attn.{name}_proj": (h, h) for name in "qkvo"}
    sizes |= {f"layers.0.mlp.{name}_proj": (n_ff, h) for name in ("gate", "up")} | {"layers.0.mlp.down_proj": (h, n_ff)}
    for name, size in sizes.items():
        values = rng.standard_normal(size, dtype=np.float32) * np.float32(size[1] ** -0.5)
        tensors[f"{name}.weight"] = values.astype(np.float16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "num_hidden_layers": 1,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_head,
        "head_dim": shape.head_dim,
        "intermediate_size": n_ff,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "draft.json").write_text(json.dumps(draft_tokens(shape, n_draft)))


def draft_tokens(shape: PlantedShape, n_draft: int) -> list[int]:
    """Return the ids that the head may draft: `n_draft` in mid-vocabulary, where the planted texts lie."""
    n = min(n_draft, shape.n_vocab - FIRST_TOKEN)
    first = FIRST_TOKEN + (shape.n_vocab - FIRST_TOKEN - n) // 2
    return list(range(first, first + n))


def _convert(checkpoint: Path, model: Path, target: Path, kind: str) -> None:
    from blockffn.convert.eagle import convert_head
    from blockffn.quantize import canonical_type, quantize

    half = target if kind == "F16" else target.with_name(target.stem + "-half.gguf")
    convert_head(checkpoint, model, half, outtype="f16", draft_tokens=checkpoint / "draft.json")
    if half != target:
        try:
            quantize(half, target, canonical_type(kind))
        finally:
            half.unlink()
