"""BlockFFN, its dense twin and ReMoE: Hugging Face files of the class MiniCPMForCausalLM, and BMTrain training files.

    read(open_checkpoint("BlockFFN-Medium")).moe.router_norm    # "rms"
    write(config)["norm_after_router"]                           # "rms"; HF, REMOE and BMTRAIN name the tensors

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
    DECODER,
    DENSE_ACTIVATIONS,
    EXPERT_ACTIVATIONS,
    HARMLESS,
    LAYER,
    check_heads,
    count_layers,
    model_name,
    read_rope,
    read_token_ids,
    read_vocab_size,
    refuse_other_meanings,
    shared_keys,
)
from blockffn.convert.layout import SAME, SIDE_BY_SIDE, STACKED, STACKED_TRANSPOSED, TRANSPOSED, Layout
from blockffn.convert.model import MlaConfig, ModelConfig, MoeConfig
from blockffn.errors import BlockffnError

HF = Layout(
    LAYER,
    {
        **DECODER,
        "q_a": "self_attn.q_a_proj.weight",
        "q_a_norm": "self_attn.q_a_layernorm.weight",
        "q_b": "self_attn.q_b_proj.weight",
        "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
        "kv_a_norm": "self_attn.kv_a_layernorm.weight",
        "kv_b": "self_attn.kv_b_proj.weight",
        "router": "mlp.router_proj.weight",
        "up_exps": (
            ("mlp.up_proj", STACKED),  # ffn_type block_linear
            ("mlp.up_proj", SAME),  # ffn_type block
            ("mlp.experts.up_proj.weight", SAME),  # block_implementation fastmoe
            ("mlp.mlp.up_proj", STACKED),  # block_implementation megablocks
        ),
        "down_exps": (
            ("mlp.down_proj", SIDE_BY_SIDE),
            ("mlp.down_proj", SAME),
            ("mlp.experts.down_proj.weight", SAME),
            ("mlp.mlp.down_proj", STACKED_TRANSPOSED),
        ),
    },
)
REMOE = Layout(
    LAYER,
    {
        **HF.parts,
        "router": "mlp.router.weight",
        "up_exps": "mlp.experts.up_proj.weight",
        "down_exps": "mlp.experts.down_proj.weight",
    },
)
_ATTENTION = "self_att.self_attention."
_FFN = "ffn.ffn."
BMTRAIN = Layout(
    "encoder.layers.{i}.",
    {
        "embed": "input_embedding.weight",
        "output_norm": "encoder.output_layernorm.weight",
        "lm_head": "lm_head.weight",
        "attn_norm": "self_att.layernorm_before_attention.weight",
        "ffn_norm": "ffn.layernorm_before_ffn.weight",
        "q_a": _ATTENTION + "q_down_proj.weight",
        "q_a_norm": _ATTENTION + "q_down_layernorm.weight",
        "q_b": _ATTENTION + "q_up_proj.weight",
        "kv_a": _ATTENTION + "kv_down_proj.weight",
        "kv_a_norm": _ATTENTION + "kv_down_layernorm.weight",
        "kv_b": _ATTENTION + "kv_up_proj.weight",
        "q": _ATTENTION + "project_q.weight",
        "k": _ATTENTION + "project_k.weight",
        "v": _ATTENTION + "project_v.weight",
        "o": ((_ATTENTION + "o_proj.weight", SAME), (_ATTENTION + "attention_out.weight", SAME)),  # MLA, plain
        "gate": _FFN + "w_in.w_0.weight",
        "up": _FFN + "w_in.w_1.weight",
        "down": _FFN + "w_out.weight",
        "router": (
            (_FFN + "moe_router.w_gate", TRANSPOSED),
            (_FFN + "moe_router.w_gate", SAME),
            (_FFN + "router.weight", SAME),  # ReMoE
            (_FFN + "router.weight", TRANSPOSED),
        ),
        "router_norm": _FFN + "router_norm.weight",
        "up_exps": (
            (_FFN + "moe_experts.moe_w_in", SAME),
            (_FFN + "moe_experts.moe_w_in", STACKED),
            (_FFN + "experts.w_in.w_0.weight", SAME),  # ReMoE
        ),
        "down_exps": (
            (_FFN + "moe_experts.moe_w_out", SAME),
            (_FFN + "moe_experts.moe_w_out", SIDE_BY_SIDE),
            (_FFN + "experts.w_out.weight", SAME),
        ),
        "shared_up": _FFN + "shared_experts.w_in.w_0.weight",
        "shared_down": _FFN + "shared_experts.w_out.weight",
    },
)
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
    """Read config.json: a Hugging Face one whose ffn_type is block, block_linear, vanilla or moe, or a BMTrain one."""
    fields = Fields(checkpoint.config, "config.json", checkpoint.note)
    if not is_bmtrain(checkpoint):
        return _read(checkpoint, fields, HF)
    refuse_other_meanings(fields)
    values = _translate_bmtrain(checkpoint, fields)
    fields.check_unknown(BMTRAIN_HARMLESS, ())
    return _read(checkpoint, Fields(values, "config.json (translated from BMTrain names)", checkpoint.note), BMTRAIN)


def is_bmtrain(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of a training run."""
    return "dim_model" in checkpoint.config


def layout(checkpoint: Checkpoint, config: ModelConfig) -> Layout:
    """The layout of a checkpoint that has been read."""
    return BMTRAIN if is_bmtrain(checkpoint) else written_layout(config)


def written_layout(config: ModelConfig) -> Layout:
    """The layout that goes with `write`: block_linear, as published."""
    return REMOE if config.family == "remoe" else HF


def _read(checkpoint: Checkpoint, fields: Fields, layout: Layout) -> ModelConfig:
    family = fields.choice("ffn_type", FFN_TYPES)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    check_heads(fields, hidden, heads)
    n_layer = _layers(checkpoint, fields, layout.layer.removesuffix("{i}."))
    refuse_other_meanings(fields)
    n_ctx = fields.integer("max_position_embeddings", 4096)
    rope_base, scaling, factor = read_rope(fields, n_ctx)
    rms_eps = fields.number("rms_norm_eps", 1e-6)
    moe = _read_moe(checkpoint, fields, family, rms_eps)
    bos, eos, pad = read_token_ids(fields)
    mla = _read_mla(checkpoint, fields, _v_head_dim(fields, hidden // heads, trained=layout is BMTRAIN))
    config = ModelConfig(
        name=model_name(checkpoint),
        family=family,
        n_vocab=read_vocab_size(checkpoint, fields, str(layout.parts["embed"])),
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


def write(config: ModelConfig) -> dict[str, Any]:
    """Return config.json in the words of the published files; `read` gives the same model back."""
    moe, mla = config.moe, config.mla
    activation = config.dense_activation if moe is None else moe.activation
    keys = shared_keys(config) | {
        "architectures": ["MiniCPMForCausalLM"],
        "hidden_act": "relu2" if activation == "relu_squared" else activation,
        "num_hidden_layers": config.n_layer,
        "num_key_value_heads": config.n_head_kv,
        "rms_norm_eps": config.rms_eps,
        "scale_emb": config.embedding_scale,
        "scale_depth": _dividend(config.residual_scale, math.sqrt(config.n_layer)),
        "dim_model_base": _dividend(config.logit_scale, config.n_embd),
        "attention_type": "mla" if mla else "vanilla",
    }
    if mla:
        keys |= {
            "q_lora_rank": mla.q_lora_rank,
            "kv_lora_rank": mla.kv_lora_rank,
            "qk_nope_head_dim": mla.nope_head_dim,
            "qk_rope_head_dim": mla.rope_head_dim,
            "v_head_dim": mla.v_head_dim,
        }
    if moe is None:
        return keys | {"ffn_type": "vanilla", "intermediate_size": config.dense_dim[0]}
    if config.family == "remoe":
        shared = moe.shared_dim // moe.expert_dim
        return keys | {
            "ffn_type": "moe",
            "moe_routing_strategy": "relu",
            "num_experts": moe.n_expert + shared,
            "num_shared_experts": shared,
            "intermediate_size": moe.expert_dim,
        }
    return keys | {
        "ffn_type": "block_linear",
        "ffn_gated": False,
        "intermediate_size": moe.n_expert * moe.expert_dim,
        "num_experts": moe.n_expert,
        "expert_size": moe.expert_dim,
        "router_act": "relu",
        "norm_after_router": moe.router_norm,
        "norm_scale": moe.router_norm_scale,
    }


def _dividend(quotient: float, divisor: float) -> float:
    """The number that divided by `divisor` gives `quotient`, to the last bit."""
    near = quotient * divisor
    nearby = (near, math.nextafter(near, 0), math.nextafter(near, math.inf))
    return next((value for value in nearby if value / divisor == quotient), near)
