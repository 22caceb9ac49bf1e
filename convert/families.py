"""Whose checkpoint is it? Hands over to the file of the family: blockffn (with its dense twin and ReMoE) or deco.

config = read_config(open_checkpoint("BlockFFN-XLarge"))
config.moe.n_expert    # 56
"""

from __future__ import annotations

from typing import Any

from blockffn.convert import blockffn, deco
from blockffn.convert.checkpoint import Checkpoint
from blockffn.convert.fields import shown
from blockffn.convert.layout import Layout
from blockffn.convert.model import ModelConfig
from blockffn.errors import BlockffnError

OURS = "MiniCPMForCausalLM with ffn_type (BlockFFN, its dense twin, ReMoE) or BlockFFNForCausalLM (DECO)"


LIMITS = {"layers": 512, "experts": 1024}  # LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS of llama.cpp


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    """Return the model's configuration, checked against the tensor shapes. Decisions go to checkpoint.notes."""
    config = _read(checkpoint)
    check_runs(config)
    return config


def check_runs(config: ModelConfig) -> None:
    """Raise where llama.cpp could not load the model."""
    rotary = config.mla.rope_head_dim if config.mla else config.head_dim
    if rotary % 2:
        raise BlockffnError(
            f"config.json: {rotary} rotary dimensions of a head: expected an even number, as they are rotated in "
            "pairs; correct the number of heads or qk_rope_head_dim"
        )
    found = {"layers": config.n_layer, "experts": config.moe.n_expert if config.moe else 0}
    for what, limit in LIMITS.items():
        if found[what] > limit:
            raise BlockffnError(
                f"config.json: expected at most {limit} {what}, the limit of llama.cpp, found {found[what]}"
            )


def _read(checkpoint: Checkpoint) -> ModelConfig:
    config = checkpoint.config
    name = _architecture(config)
    if blockffn.is_bmtrain(checkpoint):
        return blockffn.read(checkpoint)
    if name == "BlockFFNForCausalLM" or (name is None and config.get("model_type") == "blockffn"):
        return deco.read(checkpoint)
    if {"fc.weight", "input_norm1.weight"} <= set(checkpoint.tensors):
        raise BlockffnError(
            f"{checkpoint.folder}: an EAGLE draft head, not a model; convert it with --target naming the model it "
            "drafts for"
        )
    if config.get("ffn_type") is not None and name in (None, "MiniCPMForCausalLM"):
        return blockffn.read(checkpoint)
    if name == "MiniCPMForCausalLM" or config.get("model_type") == "minicpm":
        raise BlockffnError(
            "config.json: ffn_type is missing: this is an ordinary MiniCPM model, not a BlockFFN one; convert it "
            "with llama.cpp's own convert_hf_to_gguf.py"
        )
    raise BlockffnError(
        f"config.json: architectures: expected {OURS}, found {shown(name)}; other models are converted with "
        "llama.cpp's own convert_hf_to_gguf.py"
    )


def layout(checkpoint: Checkpoint, config: ModelConfig) -> Layout:
    """How this checkpoint names and stores its tensors."""
    return deco.LAYOUT if config.family == "deco" else blockffn.layout(checkpoint, config)


def unused(checkpoint: Checkpoint, config: ModelConfig) -> set[str]:
    """Tensors that may be there without meaning: cached RoPE frequencies, and what a family does not read."""
    found = {name for name in checkpoint.tensors if name.endswith(".rotary_emb.inv_freq")}
    return found | (deco.unused(checkpoint) if config.family == "deco" and config.moe else set())


def write_config(config: ModelConfig) -> tuple[dict[str, Any], Layout]:
    """Return config.json and the layout in which a model is written; `read_config` gives the same model back."""
    if config.family == "deco":
        return deco.write(config), deco.LAYOUT
    return blockffn.write(config), blockffn.written_layout(config)


def _architecture(config: dict[str, Any]) -> str | None:
    names = config.get("architectures")
    if names is None:
        return None
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise BlockffnError(f"config.json: architectures: expected a list of one class name, found {shown(names)}")
    return str(names[0])
