"""Tiny random EAGLE-2 heads in the published layout.

    source = write_head(tmp_path / "head", seed=8, n_layer=1)

They fit targets of hidden size 64: `write_checkpoint(folder, n_embd=64, n_head=2, attention="gqa")`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

N_EMBD = 64
SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}


def write_head(folder: Path, seed: int = 5, n_layer: int = 2, gain: float = 1.0, **config: Any) -> Path:
    """Write a random head in the published layout."""
    random = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return gain * torch.randn(shape, generator=random) / shape[-1] ** 0.5

    tensors = {
        "fc.weight": matrix(N_EMBD, 2 * N_EMBD),
        "fc.bias": 0.1 * torch.randn(N_EMBD, generator=random),
        "input_norm1.weight": 1 + 0.1 * torch.randn(N_EMBD, generator=random),
        "input_norm2.weight": 1 + 0.1 * torch.randn(N_EMBD, generator=random),
    }
    for layer in range(n_layer):
        sizes = {
            "self_attn.q_proj": (64, N_EMBD),
            "self_attn.k_proj": (32, N_EMBD),
            "self_attn.v_proj": (32, N_EMBD),
            "self_attn.o_proj": (N_EMBD, 64),
            "mlp.gate_proj": (48, N_EMBD),
            "mlp.up_proj": (48, N_EMBD),
            "mlp.down_proj": (N_EMBD, 48),
        }
        tensors |= {f"layers.{layer}.{name}.weight": matrix(*size) for name, size in sizes.items()}
        norms = ("post_attention_layernorm", "input_layernorm") if layer else ("post_attention_layernorm",)
        for name in norms:
            tensors[f"layers.{layer}.{name}.weight"] = 1 + 0.1 * torch.randn(N_EMBD, generator=random)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": n_layer} | config))
    return folder
