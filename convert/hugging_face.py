"""What the Hugging Face files of all families share: names of a decoder's tensors, activations, positions, token ids.

    read_rope(Fields(config, "config.json", print), n_ctx_train=4096)    # (10000.0, "none", 1.0)

`shared_keys` writes what the other functions read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from blockffn.convert.checkpoint import Checkpoint
from blockffn.convert.fields import Fields, shown
from blockffn.convert.model import ModelConfig
from blockffn.errors import BlockffnError

# Dense and shared FFNs; gelu is the exact one (erf) in every checkpoint.
DENSE_ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu"}
EXPERT_ACTIVATIONS = {**DENSE_ACTIVATIONS, "relu2": "relu_squared", "sqrelu": "relu_squared"}

# Canonical part -> name, of a Llama-style decoder: see blockffn.convert.layout.
LAYER = "model.layers.{i}."
DECODER = {
    "embed": "model.embed_tokens.weight",
    "output_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "router_norm": "mlp.router_norm.weight",
    "shared_gate": "mlp.shared_experts.gate_proj.weight",
    "shared_up": "mlp.shared_experts.up_proj.weight",
    "shared_down": "mlp.shared_experts.down_proj.weight",
}

# Keys of Hugging Face configurations that change nothing in the numbers of a forward pass.
HARMLESS = (
    "architectures", "auto_map", "attention_dropout", "hidden_dropout", "dropout", "initializer_range", "model_type",
    "pad_token_id", "tokenizer_class", "torch_dtype", "dtype", "transformers_version", "use_cache", "_name_or_path",
    "_attn_implementation", "attn_implementation", "id2label", "label2id", "return_dict", "output_attentions",
    "output_hidden_states", "is_encoder_decoder", "name_or_path", "pretraining_tp",
)  # fmt: skip
# Keys of Hugging Face and of training frameworks that would change the numbers; the values that change nothing.
OTHER_MEANINGS: dict[str, tuple[Any, ...]] = {
    "layernorm_zero_centered_gamma": (False,), "apply_residual_connection_post_layernorm": (False,),
    "rotary_interleaved": (False,), "position_embedding_type": ("rope",), "use_rope_scaling": (False,),
    "rotary_seq_len_interpolation_factor": (1, 1.0), "rotary_percent": (1, 1.0), "partial_rotary_factor": (1, 1.0),
    "multi_latent_attention": (False,), "sliding_window": (), "window_size": (), "softmax_scale": (),
    "attention_bias": (False,), "attention_out_bias": (False,), "mlp_bias": (False,), "add_bias_linear": (False,),
    "add_qkv_bias": (False,), "qk_layernorm": (False,), "qk_norm": (False,), "attention_output_gate": (False,),
    "attn_logit_softcapping": (), "final_logit_softcapping": (), "query_pre_attn_scalar": (), "clip_qkv": (),
    "normalization": ("RMSNorm",), "moe_apply_probs_on_input": (False,), "moe_shared_expert_gate": (False,),
    "embedding_multiplier": (1, 1.0), "residual_multiplier": (1, 1.0), "attention_multiplier": (),
    "logits_scaling": (1, 1.0), "logit_scale": (1, 1.0),
}  # fmt: skip


def refuse_other_meanings(fields: Fields) -> None:
    """Refuse every key that would change the numbers in a way that neither family knows."""
    for key, allowed in OTHER_MEANINGS.items():
        fields.refuse(key, allowed or (None,), "anything else computes something that is not part of these models")
    if fields.has("layer_types"):
        kinds = fields.values["layer_types"]
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            fields.wrong("layer_types", "full_attention for every layer")


def read_rope(
    fields: Fields, n_ctx_train: int, base_keys: tuple[str, ...] = ("rope_theta",)
) -> tuple[float, str, float]:
    """Return (base, kind, factor) of the positions; kind: none, linear or dynamic (NTK, inert in the trained context).

    The scaling is the object rope_scaling, or rope_parameters, which transformers 5 saves and which holds rope_theta
    too. No tensor shape can tell which of two bases is true, so they must agree.
    """
    bases = {key: fields.number(key) for key in base_keys if fields.has(key)}
    scalings: dict[str, tuple[str, float]] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not fields.has(key):
            continue
        if not isinstance(fields.values[key], dict):
            fields.wrong(key, "null or an object with type and factor")
        inner = Fields({f"{key}.{name}": v for name, v in fields.values[key].items()}, fields.file, fields.note)
        if inner.has(f"{key}.rope_theta"):
            bases[f"{key}.rope_theta"] = inner.number(f"{key}.rope_theta")
        scalings[key] = _scaling(inner, key, n_ctx_train)
        inner.check_unknown((), ())
    if len(set(scalings.values())) > 1:
        raise BlockffnError(
            f"{fields.file}: rope_scaling and rope_parameters contradict each other; remove one of them"
        )
    kind, factor = next(iter(scalings.values()), ("none", 1.0))
    return _one_value(fields, bases) if bases else fields.number("rope_theta", 10000.0), kind, factor


def _scaling(inner: Fields, key: str, n_ctx_train: int) -> tuple[str, float]:
    """Return kind and factor of one object of RoPE settings, whose values are named ``key.name``."""
    for name, value in inner.values.items():
        if isinstance(value, dict):
            inner.wrong(name, "a number or a name: one setting for all layers")
    inner.refuse(f"{key}.partial_rotary_factor", (1, 1.0), "every coordinate is rotated in these models")
    given = [name for name in (f"{key}.rope_type", f"{key}.type") if inner.has(name)]
    if not given and not inner.has(f"{key}.factor"):
        return "none", 1.0
    name = given[0] if given else f"{key}.rope_type"
    kind = inner.choice(name, {"default": "none", "linear": "linear", "dynamic": "dynamic"})
    if any(inner.values[other] != inner.values[name] for other in given):
        inner.wrong(given[1], f"{inner.values[name]!r}, as {name} says")
    length = f"{key}.original_max_position_embeddings"
    if kind == "none":
        inner.asked.update((f"{key}.factor", length))
        return "none", 1.0
    factor = inner.number(f"{key}.factor")
    if factor < 1.0:
        inner.wrong(f"{key}.factor", "a number >= 1")
    if kind == "dynamic":
        if inner.has(length) and inner.integer(length) != n_ctx_train:
            inner.wrong(length, f"max_position_embeddings = {n_ctx_train}, up to which dynamic scaling is inert")
        inner.note(
            f"rope_scaling dynamic (factor {factor:g}) changes nothing up to max_position_embeddings = {n_ctx_train}, "
            f"and llama.cpp has no such scaling: the model runs in llama.cpp up to {n_ctx_train} tokens of context, "
            "not beyond"
        )
    inner.asked.add(length)
    return kind, factor


def _one_value(fields: Fields, given: dict[str, float]) -> float:
    """Several keys name one number: all must say the same."""
    (key, value), *others = given.items()
    for other, found in others:
        if found != value:
            raise BlockffnError(
                f"{fields.file}: {key} = {value:g} and {other} = {found:g} contradict each other, and no tensor shape "
                "can tell which is true; remove the wrong one"
            )
    return value


def read_token_ids(fields: Fields) -> tuple[int | None, tuple[int, ...], int | None]:
    """Return bos, all eos ids, pad; None or () where config.json has none (the tokenizer may know more)."""
    bos, eos, pad = (token_ids(fields, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id"))
    return (bos[0] if bos else None), eos, (pad[0] if pad else None)


def token_ids(fields: Fields, key: str) -> tuple[int, ...]:
    """Return the ids of one key, which holds a number or a list; () where it is missing or null."""
    if not fields.has(key):
        return ()
    values = fields.values[key] if isinstance(fields.values[key], list) else [fields.values[key]]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in values):
        fields.wrong(key, "a token id or a list of token ids")
    return tuple(values)


def read_vocab_size(checkpoint: Checkpoint, fields: Fields, embed: str) -> int:
    """Return vocab_size; a file without it is settled by the rows of the embedding."""
    if not fields.has("vocab_size") and embed in checkpoint.tensors:
        rows = checkpoint.tensors[embed].shape[0]
        fields.note(f"{fields.file} has no vocab_size; the embedding has {rows} rows")
        return rows
    return fields.integer("vocab_size")


def count_layers(checkpoint: Checkpoint, prefix: str) -> int:
    """Number of layers that the tensors show by names like ``model.layers.N.``; none may be missing between."""
    found = {match[1] for name in checkpoint.tensors if (match := re.match(re.escape(prefix) + r"([0-9]+)\.", name))}
    missing = next((i for i in range(len(found)) if str(i) not in found), None)
    if missing is not None:
        raise BlockffnError(
            f"{checkpoint.folder}: tensors of {len(found)} layers are there, so expected {prefix}0 to "
            f"{prefix}{len(found) - 1}, found nothing of layer {missing} but of layer {shown(max(found, key=len))}; "
            "download the missing shards"
        )
    return len(found)


def model_name(checkpoint: Checkpoint) -> str:
    """general.name: the last part of the folder's path or of the hub id."""
    given = Path(checkpoint.source)
    name = given.resolve().name if given.exists() else given.name
    return name.encode("utf-8", "replace").decode("utf-8")  # a path need not be valid Unicode


def check_heads(fields: Fields, hidden: int, heads: int) -> None:
    """hidden_size must be a multiple of the head count: the authors' code derives head sizes from the quotient."""
    if hidden % heads:
        raise BlockffnError(
            f"{fields.file}: num_attention_heads: expected a divisor of hidden_size = {hidden}, found {heads}; "
            "correct the file"
        )


def shared_keys(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json that all families write alike."""
    scaled = config.rope_scaling != "none"
    return {
        "vocab_size": config.n_vocab,
        "hidden_size": config.n_embd,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.n_ctx_train,
        "rope_theta": config.rope_base,
        "rope_scaling": {"type": config.rope_scaling, "factor": config.rope_factor} if scaled else None,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids),
        "pad_token_id": config.pad_id,
        "torch_dtype": "bfloat16",
    }
