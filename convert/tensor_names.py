"""Tensor names of the checkpoint layouts, by canonical part name.

A value with ` | ` lists spellings. `{i}` is the layer. The expert matrices, which differ between the layouts in shape
and order as well, have their own table in `expert_sources`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

HF = {
    "layer": "model.layers.{i}.",
    "embed": "model.embed_tokens.weight",
    "output_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "q_a": "self_attn.q_a_proj.weight",
    "q_a_norm": "self_attn.q_a_layernorm.weight",
    "q_b": "self_attn.q_b_proj.weight",
    "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "kv_b": "self_attn.kv_b_proj.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "router": "mlp.router_proj.weight | mlp.router.weight",
    "router_norm": "mlp.router_norm.weight",
    "shared_gate": "mlp.shared_experts.gate_proj.weight",
    "shared_up": "mlp.shared_experts.up_proj.weight",
    "shared_down": "mlp.shared_experts.down_proj.weight",
}
DECO_MOE = {
    "router": "mlp.moe_router.weight",
    "expert_bias": "mlp.expert_bias",
    "act_norm": "mlp.expert_act.rms_norm.weight",
}
_ATTENTION = "self_att.self_attention."
_FFN = "ffn.ffn."
BMTRAIN = {
    "layer": "encoder.layers.{i}.",
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
    "o": f"{_ATTENTION}o_proj.weight | {_ATTENTION}attention_out.weight",
    "gate": _FFN + "w_in.w_0.weight",
    "up": _FFN + "w_in.w_1.weight",
    "down": _FFN + "w_out.weight",
    "router": f"{_FFN}moe_router.w_gate | {_FFN}router.weight",
    "router_norm": _FFN + "router_norm.weight",
    "shared_up": _FFN + "shared_experts.w_in.w_0.weight",
    "shared_down": _FFN + "shared_experts.w_out.weight",
}


@dataclass(frozen=True)
class ExpertSource:
    """One way in which a layout stores an expert matrix."""

    name: str
    stored: tuple[int, ...]
    arrange: Callable[[Array], Array]


def expert_sources(part: str, shape: tuple[int, ...]) -> Iterator[ExpertSource]:
    """Yield all ways to store `part`; shape is canonical: up and gate [E, d, h], down [E, h, d]."""
    n, first, second = shape
    stacked = (n * first, second)  # up [E*d, h]

    def same(values: Array) -> Array:
        return values

    def split_rows(values: Array) -> Array:
        return values.reshape(shape)  # [E*d, h] -> [E, d, h]

    def split_columns(values: Array) -> Array:
        return values.reshape(first, n, second).transpose(1, 0, 2)  # [h, E*d] -> [E, h, d]

    def split_transposed(values: Array) -> Array:
        return values.reshape(n, second, first).transpose(0, 2, 1)  # [E*d, h] -> [E, h, d]

    bmtrain = f"{_FFN}moe_experts."
    if part == "down_exps":
        columns = (first, n * second)  # [h, E*d]
        yield ExpertSource("mlp.down_proj", shape, same)  # block
        yield ExpertSource("mlp.down_proj", columns, split_columns)  # block_linear
        yield ExpertSource("mlp.experts.down_proj", shape, same)  # fastmoe, ReMoE
        yield ExpertSource("mlp.mlp.down_proj", (n * second, first), split_transposed)  # megablocks
        yield ExpertSource("mlp.expert_down_proj", columns, split_columns)  # DECO
        yield ExpertSource(bmtrain + "moe_w_out", shape, same)
        yield ExpertSource(bmtrain + "moe_w_out", columns, split_columns)
        yield ExpertSource(_FFN + "experts.w_out", shape, same)  # BMTrain ReMoE
    elif part == "gate_exps":
        yield ExpertSource("mlp.expert_gate_proj", stacked, split_rows)  # DECO
    else:
        yield ExpertSource("mlp.up_proj", shape, same)
        yield ExpertSource("mlp.up_proj", stacked, split_rows)
        yield ExpertSource("mlp.experts.up_proj", shape, same)
        yield ExpertSource("mlp.mlp.up_proj", stacked, split_rows)
        yield ExpertSource("mlp.expert_up_proj", stacked, split_rows)
        yield ExpertSource(bmtrain + "moe_w_in", shape, same)
        yield ExpertSource(bmtrain + "moe_w_in", stacked, split_rows)
        yield ExpertSource(_FFN + "experts.w_in.w_0", shape, same)
