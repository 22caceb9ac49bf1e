"""ModelConfig -> GGUF keys (docs/gguf.md explains each), as a plain dictionary that the writer stores.

    model_metadata(config, "expert", "f16")["blockffn.router.norm"]    # "rms"

A Python int becomes u32, a float f32, a str string, a bool bool, a list of ints an array of i32.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from gguf import GGML_QUANT_VERSION, Keys, LlamaFileType

from blockffn import gguf_contract as names
from blockffn.convert.checkpoint import HUB_ID, Checkpoint, read_json
from blockffn.convert.fields import fits_f32, shown
from blockffn.convert.model import ModelConfig
from blockffn.errors import BlockffnError

FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}
CARD_BYTES = 1 << 16  # of README.md that are searched for its header
SOURCE_SHA256 = "general.source.sha256"
RESERVED = (
    "general.architecture", "general.file_type", "general.quantization_version", "general.type", "general.alignment",
    SOURCE_SHA256,
)  # fmt: skip


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
        if not re.fullmatch(r"general(\.[A-Za-z0-9_-]{1,50}){1,5}", key) or key in RESERVED:
            raise BlockffnError(
                f"{path}: {shown(key)}: expected a descriptive general.* key, such as general.name or "
                "general.license; what carries weight is read from the checkpoint only"
            )
        texts = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
        name_wrong = key == "general.name" and not isinstance(value, str)
        if name_wrong or not (isinstance(value, str | int | float | bool) or texts):
            expected = "a string" if name_wrong else "a string, number, truth value or list of strings"
            raise BlockffnError(f"{path}: {key}: expected {expected}, found {shown(value)}")
    return values


def model_card(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return licence, tags, languages and base models that the header of README.md states, as upstream's converter."""
    try:
        card = _front_matter(checkpoint.folder / "README.md")
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        reason = str(error).partition("\n")[0]
        checkpoint.note(f"README.md: the header is not read, as it is not valid YAML in UTF-8 ({reason})")
        return {}

    def texts(*keys: str) -> list[str]:
        values = [item for key in keys for item in (card[key] if isinstance(card.get(key), list) else [card.get(key)])]
        return [value for value in values if isinstance(value, str) and value]

    values: dict[str, Any] = {
        f"general.{key.replace('_', '.')}": ", ".join(texts(key)) for key in ("license", "license_name", "license_link")
    }
    values |= {Keys.General.TAGS: texts("tags", "pipeline_tag"), Keys.General.LANGUAGES: texts("language", "languages")}
    bases = [name for name in texts("base_model") if re.fullmatch(HUB_ID, name)]
    for i, (owner, _, name) in enumerate(base.partition("/") for base in bases):
        values[Keys.General.BASE_MODEL_NAME.format(id=i)] = name
        values[Keys.General.BASE_MODEL_ORGANIZATION.format(id=i)] = owner
        values[Keys.General.BASE_MODEL_REPO_URL.format(id=i)] = f"https://huggingface.co/{owner}/{name}"
    return {key: value for key, value in values.items() if value} | (
        {Keys.General.BASE_MODEL_COUNT: len(bases)} if bases else {}
    )


def _front_matter(path: Path) -> dict[str, Any]:
    """Return the YAML between the first two lines ``---``; {} where there is none."""
    if not path.is_file():
        return {}
    with open(path, "rb") as stream:
        lines = stream.read(CARD_BYTES).decode("utf-8", "ignore").splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    content = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    return content if isinstance(content, dict) else {}


def check_values(values: dict[str, Any]) -> None:
    """Raise unless every value fits the type that a GGUF file gives it (see `writer.add_value`)."""
    for key, value in values.items():
        if isinstance(value, bytes | bool):
            continue
        items = list(value) if isinstance(value, list | tuple) else [value]
        whole = isinstance(value, int)
        wrong = _first_wrong(items, 0 if whole else -(2**31), 2**32 - 1 if whole else 2**31 - 1)
        if wrong is not None:
            kind = {str: "valid Unicode text", float: "a number that float32 can hold"}.get(type(wrong))
            expected = kind or f"an integer from {'0 to 2^32 - 1' if whole else '-2^31 to 2^31 - 1'}"
            raise BlockffnError(f"{key}: expected {expected}, found {shown(wrong)}; correct the file it comes from")


def _first_wrong(items: list[Any], low: int, high: int) -> Any:
    """Return the first item that does not fit, None where all do; whole arrays are tried first, as they are long."""
    if all(type(item) is str for item in items):
        try:
            "".join(items).encode()
            return None
        except UnicodeEncodeError:
            return next(item for item in items if any(0xD800 <= ord(letter) < 0xE000 for letter in item))
    if all(type(item) is float for item in items):
        sizes = np.abs(np.asarray(items))
        limits = np.finfo(np.float32)
        if bool(((sizes == 0) | ((sizes >= limits.tiny) & (sizes <= limits.max))).all()):
            return None
    if all(type(item) is int for item in items) and low <= min(items, default=0) <= max(items, default=0) <= high:
        return None
    return next((item for item in items if not _fits(item, low, high)), None)


def _fits(item: Any, low: int, high: int) -> bool:
    return fits_f32(item) if isinstance(item, float) else isinstance(item, int) and low <= item <= high


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
