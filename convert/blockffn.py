"""BlockFFN configurations: Hugging Face files of the class MiniCPMForCausalLM and BMTrain training files.

    read(open_checkpoint("BlockFFN-Medium")).moe.router_norm    # "rms"

Traps that this module settles (BlockFFN arXiv 2507.08771 and the published files): intermediate_size is stale in block
models; v_head_dim is ignored by the authors' code, which uses hidden_size / num_attention_heads; the norms inside MLA
have eps 1e-6 whatever rms_norm_eps says; missing keys take the defaults of the authors' configuration class.
"""

from __future__ import annotations

import math
from typing import Any

from blockffn.convert.checkpoint import Checkpoint
from blockffn.convert.fields import Fields, shown
from blockffn.convert.hugging_face import (
    DENSE_ACTIVATIONS,
    EXPERT_ACTIVATIONS,
    HARMLESS,
    check_heads,
    count_layers,
    model_name,
    read_rope,
    read_token_ids,
    read_vocab_size,
    refuse_other_meanings,
)
from blockffn.convert.model import MlaConfig, ModelConfig, MoeConfig
from blockffn.convert.tensor_names import BMTRAIN, HF
from blockffn.errors import BlockffnError

MLA_NORM_EPS = 1e-6  # q_a_layernorm and kv_a_layernorm are built without an eps argument
FFN_TYPES = {"block": "blockffn", "block_linear": "blockffn", "vanilla": "vanilla", "moe": "remoe"}
NORMS = {"rms": "rms", "sum": "sum", "none": "none"}
OPTIONAL = (
    "attention_type", "num_key_value_heads", "hidden_act", "router_act", "num_shared_experts", "norm_after_router",
    "norm_scale", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters",
)  # fmt: skip
UNUSED = (
    "moe_top_k",
    "moe_top_p",
    "v_head_dim",
    "block_implementation",
    "intermediate_size",
    "ffn_gated",
    "expert_size",
)


def read(checkpoint: Checkpoint) -> ModelConfig:
    """Read a Hugging Face config.json whose ffn_type is block, block_linear, vanilla or moe."""
    return _read(checkpoint, Fields(checkpoint.config, "config.json", checkpoint.note), HF)


def read_bmtrain(checkpoint: Checkpoint) -> ModelConfig:
    """Read the config.json of a BMTrain training run; its keys are translated into the Hugging Face names first."""
    own = Fields(checkpoint.config, "config.json", checkpoint.note)
    refuse_other_meanings(own)
    values = _translate_bmtrain(checkpoint, own)
    own.check_unknown(BMTRAIN_HARMLESS, ())
    return _read(checkpoint, Fields(values, "config.json (translated from BMTrain names)", checkpoint.note), BMTRAIN)


def _read(checkpoint: Checkpoint, fields: Fields, names: dict[str, str]) -> ModelConfig:
    family = fields.choice("ffn_type", FFN_TYPES)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    check_heads(fields, hidden, heads)
    n_layer = _layers(checkpoint, fields, names["layer"].removesuffix("{i}."))
    refuse_other_meanings(fields)
    n_ctx = fields.integer("max_position_embeddings", 4096)
    rope_base, scaling, factor = read_rope(fields, n_ctx)
    rms_eps = fields.number("rms_norm_eps", 1e-6)
    moe = _read_moe(checkpoint, fields, family, rms_eps)
    bos, eos, pad = read_token_ids(fields)
    mla = _read_mla(checkpoint, fields, _v_head_dim(fields, hidden // heads, trained=names is BMTRAIN))
    config = ModelConfig(
        name=model_name(checkpoint),
        family=family,
        n_vocab=read_vocab_size(checkpoint, fields, names["embed"]),
        n_embd=hidden,
        n_layer=n_layer,
        n_head=heads,
        n_head_kv=heads if mla else fields.integer("num_key_value_heads", heads),
        head_dim=hidden // heads,
        n_ctx_train=n_ctx,
        rms_eps=rms_eps,
        rope_base=rope_base,
        rope_scaling=scaling,
        rope_factor=factor,
        embedding_scale=fields.number("scale_emb"),
        residual_scale=fields.number("scale_depth") / math.sqrt(n_layer),
        logit_scale=fields.number("dim_model_base") / hidden,
        tied=fields.flag("tie_word_embeddings", True),
        mla=mla,
        moe=moe,
        dense_dim=(0 if moe else fields.integer("intermediate_size"),) * n_layer,
        dense_activation=fields.choice("hidden_act", DENSE_ACTIVATIONS if moe is None else EXPERT_ACTIVATIONS, "silu"),
        bos_id=bos,
        eos_ids=eos,
        pad_id=pad,
    )
    if heads % config.n_head_kv:
        fields.wrong("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    fields.check_unknown((*HARMLESS, *UNUSED, "num_key_value_heads"), OPTIONAL)
    return config


def _layers(checkpoint: Checkpoint, fields: Fields, prefix: str) -> int:
    n_layer, found = fields.integer("num_hidden_layers"), count_layers(checkpoint, prefix)
    if n_layer != found:
        raise BlockffnError(
            f"{fields.file}: num_hidden_layers: expected {found} (the tensors {prefix}0 to {prefix}{found - 1}), "
            f"found {n_layer}; correct the file or download the missing shards"
        )
    return n_layer


def _v_head_dim(fields: Fields, head_dim: int, trained: bool) -> int:
    """The training code uses dim_v_head; the Hugging Face class ignores v_head_dim and takes hidden_size / heads."""
    if not fields.has("v_head_dim"):
        return head_dim
    if trained:
        return fields.integer("v_head_dim")
    if fields.values["v_head_dim"] != head_dim:
        fields.note(
            f"v_head_dim = {shown(fields.values['v_head_dim'])} is stale: the authors' code uses hidden_size / "
            f"num_attention_heads = {head_dim}"
        )
    return head_dim


def _read_mla(checkpoint: Checkpoint, fields: Fields, v_head_dim: int) -> MlaConfig | None:
    has_mla = any(".kv_a_proj_with_mqa." in name or ".kv_down_proj." in name for name in checkpoint.tensors)
    if not fields.has("attention_type"):
        fields.note(f"config.json has no attention_type; the tensors are {'MLA' if has_mla else 'plain attention'}")
        kind = "mla" if has_mla else "vanilla"
    else:
        kind = fields.choice("attention_type", {"mla": "mla", "vanilla": "vanilla"})
    if has_mla != (kind == "mla"):
        raise BlockffnError(
            f"config.json: attention_type: expected {'mla' if has_mla else 'vanilla'}, as the attention tensors are, "
            f"found {kind!r}; correct the file"
        )
    if kind != "mla":
        return None
    return MlaConfig(
        q_lora_rank=fields.integer("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        nope_head_dim=fields.integer("qk_nope_head_dim"),
        rope_head_dim=fields.integer("qk_rope_head_dim"),
        v_head_dim=v_head_dim,
        norm_eps=MLA_NORM_EPS,
    )


def _read_moe(checkpoint: Checkpoint, fields: Fields, family: str, rms_eps: float) -> MoeConfig | None:
    if family == "vanilla":
        if fields.has("ffn_gated") and fields.values["ffn_gated"] is not True:
            fields.wrong("ffn_gated", "true (a dense FFN without gate was never published)")
        return None
    if family == "remoe":
        return _read_remoe(checkpoint, fields)
    n_expert = fields.integer("num_experts")
    fields.choice("router_act", {"relu": "relu"}, "relu")
    norm = _router_norm(checkpoint, fields)
    return MoeConfig(
        n_expert=n_expert,
        expert_dim=fields.integer("expert_size"),
        gated=False,
        activation=fields.choice("hidden_act", EXPERT_ACTIVATIONS, "silu"),
        activation_eps=0.0,
        router_norm=norm,
        router_norm_eps=rms_eps if norm == "rms" else 0.0,
        router_norm_scale=fields.number("norm_scale", 1.0) if norm == "sum" else 1.0,
        router_scale=1.0,
        router_weight=n_expert if norm == "rms" else 0,
        bias_method="none",
        shared_dim=0,
        shared_gated=False,
    )


def _router_norm(checkpoint: Checkpoint, fields: Fields) -> str:
    has_weight = any(".router_norm." in name for name in checkpoint.tensors)
    if not fields.has("norm_after_router") and has_weight:
        fields.note("config.json has no norm_after_router; the tensors router_norm.weight say rms")
        return "rms"
    norm = fields.choice("norm_after_router", NORMS, "sum")
    fields.asked.add("norm_scale")
    if has_weight and norm != "rms":
        raise BlockffnError(
            "config.json: norm_after_router: expected rms, as the checkpoint holds router_norm.weight, found "
            f"{norm!r}; correct the file"
        )
    return norm


def _read_remoe(checkpoint: Checkpoint, fields: Fields) -> MoeConfig:
    """ReMoE: num_experts counts the shared ones too, and intermediate_size is the width of one expert."""
    fields.choice("moe_routing_strategy", {"relu": "relu"})
    total, shared = fields.integer("num_experts"), fields.integer("num_shared_experts", 0, low=0)
    if shared >= total:
        fields.wrong("num_shared_experts", f"fewer than num_experts = {total}")
    width = fields.integer("intermediate_size")
    return MoeConfig(
        n_expert=total - shared,
        expert_dim=width,
        gated=False,
        activation=fields.choice("hidden_act", EXPERT_ACTIVATIONS, "silu"),
        activation_eps=0.0,
        router_norm="none",
        router_norm_eps=0.0,
        router_norm_scale=1.0,
        router_scale=1.0,
        router_weight=0,
        bias_method="none",
        shared_dim=shared * width,
        shared_gated=any(".shared_experts.gate_proj." in name for name in checkpoint.tensors),
    )


BMTRAIN_HARMLESS = (
    "dropout_p", "half", "half_type", "use_flash_attn", "flash_attn_mask_shape", "init_std", "scale", "model_type",
    "architectures", "dim_head", "pose_prob", "pose_scaling_factor", "rope_scaling_type", "rope_scaling_factor",
    "orig_max_length", "use_checkpoint", "tp", "attention_type", "moe_top_k", "moe_top_p", "dim_ff", "ffn_gated",
    "block_implementation", "dim_v_head", "num_kv_heads", "tokenizer_path", "scale_width", "base", "mask_modules",
)  # fmt: skip
BMTRAIN_NAMES = {
    "dim_model": "hidden_size", "num_heads": "num_attention_heads", "num_layers": "num_hidden_layers",
    "num_kv_heads": "num_key_value_heads", "vocab_size": "vocab_size", "eps": "rms_norm_eps", "scale_emb": "scale_emb",
    "dim_model_base": "dim_model_base", "scale_depth": "scale_depth", "tie_lm_head": "tie_word_embeddings",
    "norm_after_router": "norm_after_router", "norm_scale": "norm_scale", "dim_q_lora": "q_lora_rank",
    "dim_kv_lora": "kv_lora_rank", "dim_q_nope_head": "qk_nope_head_dim", "dim_q_pe_head": "qk_rope_head_dim",
    "dim_expert": "expert_size", "num_expert": "num_experts", "moe_num_experts": "num_experts",
    "num_shared_experts": "num_shared_experts", "moe_routing_strategy": "moe_routing_strategy",
    "router_activate_fn": "router_act", "dim_ff": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "rope_theta": "rope_theta", "rope_scaling": "rope_scaling", "rope_parameters": "rope_parameters",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id", "pad_token_id": "pad_token_id", "dim_v_head": "v_head_dim",
}  # fmt: skip


def _translate_bmtrain(checkpoint: Checkpoint, own: Fields) -> dict[str, Any]:
    """Return the Hugging Face view of a BMTrain configuration (the mapping of the authors' conversion script)."""
    values = {new: own.values[old] for old, new in BMTRAIN_NAMES.items() if own.has(old)}
    if not own.has("tie_lm_head"):
        own.note("config.json has no tie_lm_head; BMTrain's code then uses False")
        values["tie_word_embeddings"] = False
    act = "ffn_activate_fn" if own.has("ffn_activate_fn") else "activate_fn"
    if own.has(act):
        values["hidden_act"] = own.values[act]
    own.refuse("rope_scaling_type", ("", "none"), "positions were trained without scaling in every published model")
    if own.has("base"):
        values["rope_theta"] = own.values["base"]
    if own.has("ffn_type") and own.values["ffn_type"] in ("block", "block_linear"):
        values["ffn_type"] = own.values["ffn_type"]
    elif own.has("moe_routing_strategy"):
        values["ffn_type"] = "moe"
    elif any(".moe_router." in name for name in checkpoint.tensors):
        values["ffn_type"] = "block"
    else:
        values["ffn_type"] = "vanilla"
    if not own.has("norm_after_router") and not any(".router_norm." in name for name in checkpoint.tensors):
        values["norm_after_router"] = (
            "none"  # the default of the authors' conversion script, unlike that of their HF class
        )
    return values
