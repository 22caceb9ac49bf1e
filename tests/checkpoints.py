"""Tiny random checkpoints in every layout that exists, for all tests.

    folder = write_checkpoint(tmp_path / "model", layout="megablocks", attention="gqa", norm="sum", n_expert=7)

Weights are drawn once in canonical form (seeded), then written in the layout asked for: two layouts with the same seed
and shapes hold the same model. The tokenizer is tests/data/tokenizer.model: SentencePiece BPE with byte fallback.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

DATA = Path(__file__).parent / "data"
N_VOCAB = 512  # pieces of tests/data/tokenizer.model
LAYOUTS = ("block", "block_linear", "fastmoe", "megablocks", "bmtrain")
FORMATS = ("safetensors", "safetensors_sharded", "pickle", "pickle_sharded", "pt")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """Everything that `write_checkpoint` can vary; the defaults give a model of about 100 k parameters."""

    family: str = "blockffn"  # blockffn, vanilla, remoe, deco
    layout: str = "block_linear"  # of the blockffn family; vanilla and remoe know hf and bmtrain
    attention: str = "mla"  # mla or gqa
    norm: str = "rms"  # blockffn: rms, sum, none; deco: simple, rms, null, normal
    tied: bool = False
    n_expert: int = 7
    expert_dim: int = 32
    n_layer: int = 2
    n_head: int = 1
    n_head_kv: int | None = None
    n_embd: int = 64
    n_ff: int = 96  # of the vanilla twin and of DECO's dense layers
    n_vocab: int = N_VOCAB
    n_shared: int = 1  # remoe: shared experts
    q_lora: int = 24
    kv_lora: int = 16
    nope: int = 32
    rope: int = 16
    n_ctx: int = 256
    hidden_act: str = "silu"
    # DECO
    act: str = "norm_silu"
    gated: bool = False
    bias: str = "none"  # none, base, rms
    shared_dim: int = 48
    router_scalar: bool = False
    router_fixed: bool = False
    n_dense: int = 1  # leading dense layers
    embed_std: float = 0.5  # of the embedding; the other matrices turn unit variance into about unit variance
    seed: int = 0

    @property
    def kv_heads(self) -> int:
        return self.n_head_kv or self.n_head

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


def write_checkpoint(
    folder: Path | str,
    *,
    dtype: str = "f32",
    fmt: str | None = None,
    with_tokenizer: bool = True,
    config: dict[str, Any] | None = None,
    edit: Callable[[dict[str, Tensor]], None] | None = None,
    **shape: Any,
) -> Path:
    """Write config.json, weights and tokenizer to `folder` and return it.

    dtype: f32, f16 or bf16. fmt: one of FORMATS (default: pt for the layout bmtrain, else safetensors). `config`
    overrides keys of config.json (a value of None removes the key); `edit` may change the stored tensors before they
    are written. The other arguments are the fields of `Shape`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = Shape(**shape)
    stored = stored_tensors(wanted)
    tensors = {name: value.to(DTYPES[dtype]) for name, value in stored.items()}
    for name in tensors:
        if name.endswith("expert_bias"):
            tensors[name] = stored[name].float()  # stays float32 in a bfloat16 file
    if edit is not None:
        edit(tensors)
    values = configuration(wanted) | (config or {})
    kept = {key: value for key, value in values.items() if not (config and key in config and config[key] is None)}
    (folder / "config.json").write_text(json.dumps(kept, indent=1))
    _write_weights(folder, tensors, fmt or ("pt" if wanted.layout == "bmtrain" else "safetensors"))
    if with_tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Copy the tiny SentencePiece tokenizer and its configuration."""
    shutil.copy(DATA / "tokenizer.model", folder / "tokenizer.model")
    config = {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer"}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def canonical_tensors(shape: Shape) -> dict[str, Tensor]:
    """Draw all canonical tensors (names: convert/model.py), float32."""
    generator = torch.Generator().manual_seed(shape.seed)
    h, tensors = shape.n_embd, {}

    def draw(name: str, *size: int, scale: float | None = None, mean: float = 0.0) -> None:
        std = scale if scale is not None else size[-1] ** -0.5
        tensors[name] = torch.randn(size, generator=generator) * std + mean

    draw("embed", shape.n_vocab, h, scale=shape.embed_std)
    for i in range(shape.n_layer):
        at = f"layers.{i}."
        draw(at + "attn_norm", h, scale=0.1, mean=1.0)
        if shape.attention == "mla":
            q_dim, v = shape.nope + shape.rope, shape.head_dim
            draw(at + "q_a", shape.q_lora, h)
            draw(at + "q_a_norm", shape.q_lora, scale=0.1, mean=1.0)
            draw(at + "q_b", shape.n_head * q_dim, shape.q_lora)
            draw(at + "kv_a", shape.kv_lora + shape.rope, h)
            draw(at + "kv_a_norm", shape.kv_lora, scale=0.1, mean=1.0)
            draw(at + "kv_b", shape.n_head * (shape.nope + v), shape.kv_lora)
            draw(at + "o", h, shape.n_head * v)
        else:
            draw(at + "q", shape.n_head * shape.head_dim, h)
            draw(at + "k", shape.kv_heads * shape.head_dim, h)
            draw(at + "v", shape.kv_heads * shape.head_dim, h)
            draw(at + "o", h, shape.n_head * shape.head_dim)
        draw(at + "ffn_norm", h, scale=0.1, mean=1.0)
        if shape.family == "vanilla" or (shape.family == "deco" and i < shape.n_dense):
            draw(at + "gate", shape.n_ff, h)
            draw(at + "up", shape.n_ff, h)
            draw(at + "down", h, shape.n_ff)
        else:
            _draw_experts(shape, at, draw)
    draw("output_norm", h, scale=0.1, mean=1.0)
    if not shape.tied:
        draw("lm_head", shape.n_vocab, h)
    return tensors


def _draw_experts(shape: Shape, at: str, draw: Callable[..., None]) -> None:
    n, d, h = shape.n_expert, shape.expert_dim, shape.n_embd
    draw(at + "router", n, h)
    weights = 1 if shape.router_scalar else n
    if shape.family == "blockffn" and shape.norm == "rms":
        draw(at + "router_norm", n, scale=1.0, mean=0.5)  # some weights are negative
    if shape.family == "deco" and shape.norm != "null" and not shape.router_fixed:
        draw(at + "router_norm", weights, scale=0.5, mean=1.0)
    if shape.bias != "none":
        draw(at + "expert_bias", n, scale=0.3)
    if shape.gated:
        draw(at + "gate_exps", n, d, h)
    draw(at + "up_exps", n, d, h)
    draw(at + "down_exps", n, h, d, scale=(n * d) ** -0.5)
    if shape.act in ("norm_silu", "norm_silu_nomean") and shape.family == "deco":
        draw(at + "act_norm", d, scale=0.1, mean=1.0)
    shared = {"deco": shape.shared_dim, "remoe": shape.n_shared * d}.get(shape.family, 0)
    if shared:
        if shape.family == "deco":
            draw(at + "shared_gate", shared, h)
        draw(at + "shared_up", shared, h)
        draw(at + "shared_down", h, shared)


HF_NAMES = {
    "attn_norm": "input_layernorm.weight", "ffn_norm": "post_attention_layernorm.weight",
    "q_a": "self_attn.q_a_proj.weight", "q_a_norm": "self_attn.q_a_layernorm.weight",
    "q_b": "self_attn.q_b_proj.weight",
    "kv_a": "self_attn.kv_a_proj_with_mqa.weight", "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "kv_b": "self_attn.kv_b_proj.weight", "q": "self_attn.q_proj.weight", "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight", "o": "self_attn.o_proj.weight", "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight", "down": "mlp.down_proj.weight", "router": "mlp.router_proj.weight",
    "router_norm": "mlp.router_norm.weight", "shared_gate": "mlp.shared_experts.gate_proj.weight",
    "shared_up": "mlp.shared_experts.up_proj.weight", "shared_down": "mlp.shared_experts.down_proj.weight",
    "expert_bias": "mlp.expert_bias", "act_norm": "mlp.expert_act.rms_norm.weight",
}  # fmt: skip
BMTRAIN_NAMES = {
    "attn_norm": "self_att.layernorm_before_attention.weight", "ffn_norm": "ffn.layernorm_before_ffn.weight",
    "q_a": "self_att.self_attention.q_down_proj.weight", "q_a_norm": "self_att.self_attention.q_down_layernorm.weight",
    "q_b": "self_att.self_attention.q_up_proj.weight", "kv_a": "self_att.self_attention.kv_down_proj.weight",
    "kv_a_norm": "self_att.self_attention.kv_down_layernorm.weight",
    "kv_b": "self_att.self_attention.kv_up_proj.weight",
    "q": "self_att.self_attention.project_q.weight", "k": "self_att.self_attention.project_k.weight",
    "v": "self_att.self_attention.project_v.weight", "gate": "ffn.ffn.w_in.w_0.weight", "up": "ffn.ffn.w_in.w_1.weight",
    "down": "ffn.ffn.w_out.weight", "router_norm": "ffn.ffn.router_norm.weight",
    "shared_up": "ffn.ffn.shared_experts.w_in.w_0.weight", "shared_down": "ffn.ffn.shared_experts.w_out.weight",
}  # fmt: skip


def stored_tensors(shape: Shape) -> dict[str, Tensor]:
    """Return the tensors as the layout stores them: its names, its shapes, float32."""
    bmtrain = shape.layout == "bmtrain"
    stored = {}
    for name, value in canonical_tensors(shape).items():
        layer, _, part = name.rpartition(".")
        if not layer:
            hf = {"embed": "model.embed_tokens.weight", "output_norm": "model.norm.weight", "lm_head": "lm_head.weight"}
            bm = {"embed": "input_embedding.weight", "output_norm": "encoder.output_layernorm.weight"}
            stored[bm.get(part, hf[part]) if bmtrain else hf[part]] = value
            continue
        prefix = ("encoder.layers." if bmtrain else "model.layers.") + layer.split(".")[1] + "."
        own, values = _store_part(shape, part, value)
        stored[prefix + own] = values.contiguous()
    return stored


def _store_part(shape: Shape, part: str, value: Tensor) -> tuple[str, Tensor]:
    bmtrain = shape.layout == "bmtrain"
    if part in ("up_exps", "gate_exps", "down_exps"):
        return _store_experts(shape, part.removesuffix("_exps"), value)
    if part == "router" and bmtrain:
        return ("ffn.ffn.router.weight", value) if shape.family == "remoe" else ("ffn.ffn.moe_router.w_gate", value.T)
    if part == "router" and shape.family != "blockffn":
        return {"deco": "mlp.moe_router.weight", "remoe": "mlp.router.weight"}[shape.family], value
    if part == "o" and bmtrain:
        name = "o_proj" if shape.attention == "mla" else "attention_out"
        return f"self_att.self_attention.{name}.weight", value
    return (BMTRAIN_NAMES if bmtrain else HF_NAMES)[part], value


def _store_experts(shape: Shape, part: str, value: Tensor) -> tuple[str, Tensor]:
    """Up and gate [E, d, h], down [E, h, d] -> name and values of the layout."""
    flat = value.reshape(-1, shape.n_embd) if part != "down" else value.permute(1, 0, 2).reshape(shape.n_embd, -1)
    if shape.family == "deco":
        return f"mlp.expert_{part}_proj.weight", flat
    if shape.family == "remoe":
        if shape.layout == "bmtrain":
            return ("ffn.ffn.experts.w_out.weight" if part == "down" else "ffn.ffn.experts.w_in.w_0.weight"), value
        return f"mlp.experts.{part}_proj.weight", value
    if shape.layout == "bmtrain":
        return "ffn.ffn.moe_experts." + ("moe_w_out" if part == "down" else "moe_w_in"), value
    if shape.layout == "block":
        return f"mlp.{part}_proj", value
    if shape.layout == "block_linear":
        return f"mlp.{part}_proj", flat
    if shape.layout == "fastmoe":
        return f"mlp.experts.{part}_proj.weight", value
    if shape.layout == "megablocks":
        return f"mlp.mlp.{part}_proj", flat if part != "down" else flat.T
    raise ValueError(f"layout: expected one of {LAYOUTS}, found {shape.layout!r}")


def configuration(shape: Shape) -> dict[str, Any]:
    """Return config.json for this shape, with the stale keys that published files hold."""
    if shape.family == "deco":
        return _deco_configuration(shape)
    if shape.layout == "bmtrain":
        return _bmtrain_configuration(shape)
    config: dict[str, Any] = {
        "architectures": ["MiniCPMForCausalLM"], "vocab_size": shape.n_vocab, "hidden_size": shape.n_embd,
        "num_hidden_layers": shape.n_layer, "num_attention_heads": shape.n_head, "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.n_ctx, "rms_norm_eps": 1e-5, "tie_word_embeddings": shape.tied,
        "rope_scaling": None, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 32, "bos_token_id": 1,
        "eos_token_id": 2, "torch_dtype": "bfloat16", "hidden_act": shape.hidden_act, "intermediate_size": 5760,
        "attention_type": "vanilla", "ffn_gated": True,
    }  # fmt: skip
    if shape.attention == "mla":
        config |= {"attention_type": "mla", "q_lora_rank": shape.q_lora, "kv_lora_rank": shape.kv_lora}
        config |= {"qk_nope_head_dim": shape.nope, "qk_rope_head_dim": shape.rope, "v_head_dim": shape.nope}
    if shape.family == "vanilla":
        config |= {"ffn_type": "vanilla", "intermediate_size": shape.n_ff}
    elif shape.family == "remoe":
        config |= {"ffn_type": "moe", "moe_routing_strategy": "relu", "num_experts": shape.n_expert + shape.n_shared}
        config |= {"num_shared_experts": shape.n_shared, "intermediate_size": shape.expert_dim, "ffn_gated": False}
    else:
        kind = "block" if shape.layout == "block" else "block_linear"
        kernel = shape.layout if shape.layout in ("fastmoe", "megablocks") else "torch"
        config |= {
            "ffn_type": kind,
            "block_implementation": kernel,
            "router_act": "relu",
            "num_experts": shape.n_expert,
        }
        config |= {"expert_size": shape.expert_dim, "norm_after_router": shape.norm, "norm_scale": 1.0}
    return config


def _bmtrain_configuration(shape: Shape) -> dict[str, Any]:
    config: dict[str, Any] = {
        "vocab_size": shape.n_vocab, "dropout_p": 0.0, "eps": 1e-5, "half": True, "dim_model": shape.n_embd,
        "num_heads": shape.n_head, "num_kv_heads": shape.kv_heads, "num_layers": shape.n_layer, "scale_emb": 12,
        "scale_depth": 1.4, "dim_model_base": 32, "tie_lm_head": shape.tied, "ffn_gated": True,
    }  # fmt: skip
    if shape.attention == "mla":
        config |= {"dim_q_lora": shape.q_lora, "dim_kv_lora": shape.kv_lora, "dim_q_nope_head": shape.nope}
        config |= {"dim_q_pe_head": shape.rope, "dim_v_head": shape.head_dim}
    if shape.family == "vanilla":
        return config | {"activate_fn": shape.hidden_act, "dim_ff": shape.n_ff}
    if shape.family == "remoe":
        config |= {"activate_fn": shape.hidden_act, "dim_ff": shape.expert_dim, "moe_routing_strategy": "relu"}
        return config | {
            "moe_num_experts": shape.n_expert + shape.n_shared,
            "num_shared_experts": shape.n_shared,
            "moe_top_k": 2,
        }
    config |= {"ffn_type": "block", "dim_expert": shape.expert_dim, "num_expert": shape.n_expert, "dim_ff": 5760}
    config |= {"ffn_activate_fn": shape.hidden_act, "router_activate_fn": "relu"}
    return config | {"norm_after_router": shape.norm, "norm_scale": 1.0}


def _deco_configuration(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["BlockFFNForCausalLM"], "model_type": "blockffn", "vocab_size": shape.n_vocab,
        "hidden_size": shape.n_embd, "num_hidden_layers": 32, "num_key_value_heads": 2, "intermediate_size": 10240,
        "rms_norm_eps": 1e-6, "num_attention_heads": shape.n_head, "head_dim": shape.head_dim, "hidden_act": "silu",
        "max_position_embeddings": shape.n_ctx, "rope_theta": 10000.0, "tie_word_embeddings": shape.tied,
        "bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 2, "torch_dtype": "bfloat16",
        "num_layers": shape.n_layer, "num_query_groups": shape.kv_heads, "ffn_hidden_size": shape.n_ff,
        "norm_epsilon": 1e-5, "use_blockffn": True, "num_experts": shape.n_expert,
        "moe_ffn_hidden_size": shape.expert_dim,
        "moe_shared_expert_intermediate_size": shape.shared_dim or None,
        "moe_layer_freq": [0] * shape.n_dense + [1] * (shape.n_layer - shape.n_dense), "router_act_func": "relu",
        "router_norm_type": shape.norm, "router_norm_fixed": shape.router_fixed,
        "router_norm_scalar": shape.router_scalar,
        "router_norm_init_var": 0.75, "expert_act_func": shape.act, "expert_act_norm_type": "normal",
        "expert_not_gated": not shape.gated, "moe_router_enable_expert_bias": shape.bias != "none",
        "moe_expert_bias_apply_method": shape.bias if shape.bias != "none" else "base", "use_mup": False,
        "router_type": "topk",
    }  # fmt: skip


def _write_weights(folder: Path, tensors: dict[str, Tensor], fmt: str) -> None:
    if fmt == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif fmt == "pickle":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif fmt == "pt":
        torch.save(tensors, folder / "checkpoint.pt")
    elif fmt in ("safetensors_sharded", "pickle_sharded"):
        _write_shards(folder, tensors, fmt == "safetensors_sharded")
    else:
        raise ValueError(f"fmt: expected one of {FORMATS}, found {fmt!r}")


def _write_shards(folder: Path, tensors: dict[str, Tensor], safe: bool, count: int = 3) -> None:
    names = list(tensors)
    weight_map = {}
    for k in range(count):
        part = {name: tensors[name] for name in names[k::count]}
        stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
        file = f"{stem}-{k + 1:05d}-of-{count:05d}.{suffix}"
        save_file(part, folder / file) if safe else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / ("model.safetensors.index.json" if safe else "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
