"""ModelConfig -> GGUF keys (docs/gguf.md explains each), as a plain dictionary that the writer stores.

    model_metadata(config, "expert", "f16")["blockffn.router.norm"]    # "rms"

A Python int becomes u32, a float f32, a str string, a bool bool, a list of ints an array of i32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_VERSION, LlamaFileType

from blockffn import gguf_contract as names
from blockffn.convert.checkpoint import read_json
from blockffn.convert.model_config import ModelConfig
from blockffn.errors import BlockffnError

FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}
SOURCE_SHA256 = "general.source.sha256"
RESERVED = ("general.architecture", "general.file_type", "general.quantization_version", "general.type", SOURCE_SHA256)


def model_metadata(config: ModelConfig, layout: str, outtype: str) -> dict[str, Any]:
    """Return every model key of the file, without the tokenizer's."""
    values: dict[str, Any] = {
        "general.type": "model",
        "general.name": config.name,
        "general.file_type": int(FILE_TYPES[outtype]),
        "general.quantization_version": GGML_QUANT_VERSION,
    }
    for part in (_decoder(config), _attention(config), _rope(config), _ffn(config, layout)):
        values |= {names.key(name): value for name, value in part.items()}
    return values


def read_overrides(path: Path | None) -> dict[str, Any]:
    """Read --metadata: a JSON object of `general.*` keys, for example {"general.license": "apache-2.0"}."""
    if path is None:
        return {}
    values = read_json(path, "name an existing JSON file")
    if not isinstance(values, dict):
        raise BlockffnError(f"{path}: expected a JSON object of general.* keys, found {type(values).__name__}")
    for key, value in values.items():
        if not key.startswith("general.") or key in RESERVED:
            raise BlockffnError(
                f"{path}: {key}: expected a descriptive general.* key, such as general.name or general.license; what "
                "carries weight is read from the checkpoint only"
            )
        texts = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
        if not isinstance(value, str | int | float | bool) and not texts:
            raise BlockffnError(
                f"{path}: {key}: expected a string, number, truth value or list of strings, found {value!r}"
            )
    return values


def _decoder(config: ModelConfig) -> dict[str, Any]:
    return {
        names.VOCAB_SIZE: config.n_vocab,
        names.CONTEXT_LENGTH: config.n_ctx_train,
        names.EMBEDDING_LENGTH: config.n_embd,
        names.BLOCK_COUNT: config.n_layer,
        names.RMS_EPSILON: config.rms_eps,
        names.EMBEDDING_SCALE: config.embedding_scale,
        names.RESIDUAL_SCALE: config.residual_scale,
        names.LOGIT_SCALE: config.logit_scale,
        names.HIDDEN_ACTIVATION: config.dense_activation,
    }


def _attention(config: ModelConfig) -> dict[str, Any]:
    """With MLA the file describes the absorbed form: one key/value head that holds the compressed values."""
    if (mla := config.mla) is None:
        return {
            names.HEAD_COUNT: config.n_head,
            names.HEAD_COUNT_KV: config.n_head_kv,
            names.KEY_LENGTH: config.head_dim,
            names.VALUE_LENGTH: config.head_dim,
        }
    return {
        names.HEAD_COUNT: config.n_head,
        names.HEAD_COUNT_KV: 1,
        names.KEY_LENGTH: mla.kv_lora_rank + mla.rope_head_dim,
        names.VALUE_LENGTH: mla.kv_lora_rank,
        names.KEY_LENGTH_MLA: mla.nope_head_dim + mla.rope_head_dim,
        names.VALUE_LENGTH_MLA: mla.v_head_dim,
        names.Q_LORA_RANK: mla.q_lora_rank,
        names.KV_LORA_RANK: mla.kv_lora_rank,
        names.LORA_RMS_EPSILON: mla.norm_eps,
    }


def _rope(config: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        names.ROPE_DIMENSION_COUNT: config.mla.rope_head_dim if config.mla else config.head_dim,
        names.ROPE_FREQ_BASE: config.rope_base,
        names.ROPE_SCALING_TYPE: "linear" if config.rope_scaling == "linear" else "none",
    }
    if config.rope_scaling == "linear":
        values[names.ROPE_SCALING_FACTOR] = config.rope_factor
    if config.rope_scaling == "dynamic":
        values[names.ROPE_DYNAMIC_FACTOR] = config.rope_factor
    return values


def _ffn(config: ModelConfig, layout: str) -> dict[str, Any]:
    widths = config.dense_dim
    values: dict[str, Any] = {names.FEED_FORWARD_LENGTH: widths[0] if len(set(widths)) == 1 else list(widths)}
    if (moe := config.moe) is None:
        return values
    return values | {
        names.EXPERT_COUNT: moe.n_expert,
        names.EXPERT_USED_COUNT: moe.n_expert,
        names.EXPERT_FEED_FORWARD_LENGTH: moe.expert_dim,
        names.EXPERT_SHARED_COUNT: 1 if moe.shared_dim else 0,
        names.EXPERT_SHARED_FEED_FORWARD_LENGTH: moe.shared_dim,
        names.EXPERT_ACTIVATION: moe.activation,
        names.EXPERT_ACTIVATION_EPSILON: moe.activation_eps,
        names.EXPERT_LAYOUT: layout,
        names.ROUTER_NORM: moe.router_norm,
        names.ROUTER_NORM_EPSILON: moe.router_norm_eps,
        names.ROUTER_NORM_SCALE: moe.router_norm_scale,
        names.ROUTER_SCALE: moe.router_scale,
        names.ROUTER_BIAS_METHOD: moe.bias_method,
    }
