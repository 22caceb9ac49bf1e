"""Write a trained decoder as a Hugging Face folder that the converter reads exactly like a published checkpoint.

    >>> export_checkpoint(Path("examples/tiny-blockffn"), decoder, Path("build/tokenizer.model"))

BlockFFN and its dense twin get the keys and the block_linear layout of the BlockFFN checkpoints, DECO the
Megatron-style keys of its own. Weights are bfloat16 in one safetensors file; the expert bias of DECO, which only moves
a threshold, stays float32. Files appear whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from blockffn.convert.model import ModelConfig, MoeConfig
from blockffn.convert.tensor_names import DECO_MOE, HF
from blockffn.errors import BlockffnError

if TYPE_CHECKING:
    from blockffn.training.reference import Decoder

DECO_EXPERTS = {
    "up_exps": "mlp.expert_up_proj.weight",
    "gate_exps": "mlp.expert_gate_proj.weight",
    "down_exps": "mlp.expert_down_proj.weight",
}
SQUARED_RELU = {"blockffn": "relu2", "deco": "sqrelu"}  # transformers' word and the training framework's
BLOCK_EXPERTS = {"up_exps": "mlp.up_proj", "down_exps": "mlp.down_proj"}  # block_linear: no suffix


def export_checkpoint(folder: Path, decoder: Decoder, tokenizer: Path) -> None:
    """Write config.json, generation_config.json, tokenizer files and model.safetensors into `folder`."""
    config = decoder.config
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for canonical, value in decoder.canonical():
        name, stored = _stored(config, canonical, value.detach().cpu())
        wide = canonical.rpartition(".")[2] == "expert_bias"
        tensors[name] = stored.to(torch.float32 if wide else torch.bfloat16)
    save_tensors(folder / "model.safetensors", tensors)
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    eos = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids)
    texts = {
        "config.json": deco_keys(config) if config.family == "deco" else blockffn_keys(config),
        "generation_config.json": {"bos_token_id": config.bos_id, "eos_token_id": eos, "do_sample": True},
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.n_ctx_train,
        },
    }
    for name, values in texts.items():
        write_json(folder / name, values)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial, metadata={"format": "pt"})
    os.replace(partial, path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def blockffn_keys(config: ModelConfig) -> dict[str, Any]:
    """config.json of a BlockFFN model or its dense twin, in the words of the published files."""
    if config.family not in ("blockffn", "vanilla"):
        raise BlockffnError(f"export: expected family blockffn, vanilla or deco, found {config.family}")
    keys: dict[str, Any] = {
        "architectures": ["MiniCPMForCausalLM"],
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0],
        "hidden_act": config.dense_activation if config.moe is None else _activation_name(config.moe, "blockffn"),
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head_kv,
        "max_position_embeddings": config.n_ctx_train,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": None,
        "scale_emb": config.embedding_scale,
        "scale_depth": config.residual_scale * config.n_layer**0.5,
        "dim_model_base": config.logit_scale * config.n_embd,
        "tie_word_embeddings": config.tied,
        "torch_dtype": "bfloat16",
        "vocab_size": config.n_vocab,
        "attention_type": "mla" if config.mla else "vanilla",
    }
    if config.mla:
        keys |= {
            "q_lora_rank": config.mla.q_lora_rank,
            "kv_lora_rank": config.mla.kv_lora_rank,
            "qk_nope_head_dim": config.mla.nope_head_dim,
            "qk_rope_head_dim": config.mla.rope_head_dim,
            "v_head_dim": config.mla.v_head_dim,
        }
    if config.moe is None:
        return keys | {"ffn_type": "vanilla", "intermediate_size": config.dense_dim[0]}
    return keys | {
        "ffn_type": "block_linear",
        "ffn_gated": False,
        "intermediate_size": config.moe.n_expert * config.moe.expert_dim,
        "num_experts": config.moe.n_expert,
        "expert_size": config.moe.expert_dim,
        "router_act": "relu",
        "norm_after_router": config.moe.router_norm,
        "norm_scale": config.moe.router_norm_scale,
    }


def deco_keys(config: ModelConfig) -> dict[str, Any]:
    """config.json of a DECO model: the Megatron keys, and the Hugging Face ones with the same, true values."""
    moe = config.moe
    if moe is None:
        raise BlockffnError("export: a DECO model needs experts; give a dense twin the family vanilla")
    norm, fixed = {"none": "simple", "rms": "rms", "normal": "normal"}[moe.router_norm], moe.router_weight == 0
    widths = [width for width in config.dense_dim if width]
    return {
        "architectures": ["BlockFFNForCausalLM"],
        "model_type": "blockffn",
        "use_blockffn": True,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
        "hidden_size": config.n_embd,
        "hidden_act": config.dense_activation,
        "num_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_query_groups": config.n_head_kv,
        "head_dim": config.head_dim,
        "ffn_hidden_size": widths[0] if widths else moe.n_expert * moe.expert_dim,
        "max_position_embeddings": config.n_ctx_train,
        "norm_epsilon": config.rms_eps,
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tied,
        "torch_dtype": "bfloat16",
        "use_mup": False,
        "vocab_size": config.n_vocab,
        "moe_layer_freq": [0 if width else 1 for width in config.dense_dim],
        "num_experts": moe.n_expert,
        "moe_ffn_hidden_size": moe.expert_dim,
        "moe_shared_expert_intermediate_size": moe.shared_dim or None,
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": moe.bias_method != "none",
        "moe_expert_bias_apply_method": moe.bias_method if moe.bias_method != "none" else "base",
        "router_act_func": "relu",
        "router_norm_type": norm,
        "router_norm_fixed": fixed,
        "router_norm_scalar": moe.router_weight == 1,
        "router_norm_init_var": moe.router_scale if fixed else 0.1,
        "expert_act_func": _activation_name(moe, "deco"),
        "expert_act_norm_type": "normal",
        "expert_not_gated": not moe.gated,
    }


def _activation_name(moe: MoeConfig, family: str) -> str:
    """The published word for the experts' activation."""
    return SQUARED_RELU[family] if moe.activation == "relu_squared" else moe.activation


def _stored(config: ModelConfig, canonical: str, value: Tensor) -> tuple[str, Tensor]:
    """Name and values in the published layout: up [E, d, h] -> [E*d, h], down [E, h, d] -> [h, E*d]."""
    layer, _, part = canonical.rpartition(".")
    prefix = HF["layer"].format(i=layer.split(".")[1]) if layer else ""
    if part in ("up_exps", "gate_exps"):
        value = value.flatten(0, 1)
    elif part == "down_exps":
        value = value.transpose(0, 1).flatten(1)
    names = HF | (DECO_MOE | DECO_EXPERTS if config.family == "deco" else BLOCK_EXPERTS)
    return prefix + names[part].split(" | ")[0], value
