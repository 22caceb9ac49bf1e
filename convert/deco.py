"""DECO (BlockFFN v2, arXiv 2605.10933), Hugging Face class BlockFFNForCausalLM: its config.json and its tensors.

    read(open_checkpoint("DECO-0.5B")).moe.activation    # "norm_silu"
    write(config)["expert_act_func"]                      # "norm_silu"; LAYOUT names and arranges the tensors

The published config.json holds two generations of keys: those of a base model (num_hidden_layers, ...), stale, and
those of the training framework (num_layers, ...), true. Where two keys name one thing, the tensor shapes decide which
is believed, and a note says so; what shapes cannot decide is an error.
"""

from __future__ import annotations

import ast
import difflib
from typing import Any

from blockffn.convert.checkpoint import Checkpoint
from blockffn.convert.fields import Fields, shown
from blockffn.convert.hugging_face import (
    DECODER,
    HARMLESS,
    LAYER,
    count_layers,
    model_name,
    read_rope,
    read_token_ids,
    read_vocab_size,
    refuse_other_meanings,
    shared_keys,
)
from blockffn.convert.layout import SAME, SCALAR, SIDE_BY_SIDE, STACKED, Layout
from blockffn.convert.model import ModelConfig, MoeConfig
from blockffn.errors import BlockffnError

LAYOUT = Layout(
    LAYER,
    {
        **DECODER,
        "router": "mlp.moe_router.weight",
        "router_norm": (("mlp.router_norm.weight", SAME), ("mlp.router_norm.weight", SCALAR)),
        "expert_bias": "mlp.expert_bias",
        "act_norm": "mlp.expert_act.rms_norm.weight",
        "gate_exps": (("mlp.expert_gate_proj.weight", STACKED),),
        "up_exps": (("mlp.expert_up_proj.weight", STACKED),),
        "down_exps": (("mlp.expert_down_proj.weight", SIDE_BY_SIDE),),
    },
)
EXPERT_ACTS = {
    "silu": "silu", "relu": "relu", "gelu": "gelu", "sqrelu": "relu_squared", "norm_silu": "norm_silu",
    "norm_silu_nomean": "norm_silu_nomean", "norm_silu_norms": "norm_silu_norms",
}  # fmt: skip
ROUTER_NORMS = {"simple": "none", "null": "none", "rms": "rms", "normal": "normal"}
BIAS_METHODS = {"base": "base", "rms": "rms"}
UNUSED = (  # read by other routers of the training framework, or asserted only
    "expert_act_norm_type", "expert_act_norm_init_var", "moe_router_pre_softmax", "moe_router_topk", "moe_router_topp",
    "moe_router_score_function", "moe_router_topk_scaling_factor", "router_target_act_ratio", "moe_aux_loss_coeff",
    "moe_use_target_for_loss_free", "moe_expert_bias_update_method", "mup_denominator",
)  # fmt: skip
ROUTING = ("router_", "expert_", "moe_")  # how keys begin whose meaning should be known
MUP = ("scale_emb", "scale_depth", "dim_model_base")  # of the base model; mean nothing unless use_mup is true
KNOWN = (
    "vocab_size", "hidden_size", "num_layers", "num_hidden_layers", "num_attention_heads", "num_query_groups",
    "num_key_value_heads", "head_dim", "ffn_hidden_size", "intermediate_size", "norm_epsilon", "rms_norm_eps",
    "num_experts",
    "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_layer_freq", "router_act_func",
    "router_norm_type",
    "router_norm_fixed", "router_norm_scalar", "router_norm_init_var", "expert_act_func", "expert_not_gated",
    "moe_router_enable_expert_bias", "moe_expert_bias_apply_method", "rope_theta", "use_mup", "router_type",
    "use_blockffn",
    "moe_router_dtype", "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip

OPTIONAL = (
    "rope_theta", "rope_scaling", "rope_parameters",
    "tie_word_embeddings", "router_norm_fixed", "router_norm_scalar", "moe_layer_freq",
    "expert_not_gated", "moe_shared_expert_intermediate_size", "hidden_act", "head_dim",
)  # fmt: skip


def read(checkpoint: Checkpoint) -> ModelConfig:
    """Read a DECO config.json, each doubtful key checked against the tensors."""
    fields = Fields(checkpoint.config, "config.json", checkpoint.note)
    refuse_other_meanings(fields)
    _refuse_other_layers(checkpoint, fields)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = _head_dim(checkpoint, fields, hidden, heads)
    n_layer = _believe(fields, "num_layers", "num_hidden_layers", count_layers(checkpoint, "model.layers."), "layers")
    kv_rows = _rows(checkpoint, "model.layers.0.self_attn.k_proj.weight")
    n_ctx = fields.integer("max_position_embeddings")
    rope_base, scaling, factor = read_rope(fields, n_ctx, ("rotary_base", "rope_theta"))
    eps = _norm_eps(fields)
    is_moe = _moe_layers(checkpoint, fields, n_layer)
    bos, eos, pad = read_token_ids(fields)
    config = ModelConfig(
        name=model_name(checkpoint),
        family="deco",
        n_vocab=read_vocab_size(checkpoint, fields, "model.embed_tokens.weight"),
        n_embd=hidden,
        n_layer=n_layer,
        n_head=heads,
        n_head_kv=_believe(fields, "num_query_groups", "num_key_value_heads", kv_rows // head_dim, "key/value heads"),
        head_dim=head_dim,
        n_ctx_train=n_ctx,
        rms_eps=eps,
        rope_base=rope_base,
        rope_scaling=scaling,
        rope_factor=factor,
        embedding_scale=1.0,
        residual_scale=1.0,
        logit_scale=1.0,
        tied=_tied(checkpoint, fields),
        mla=None,
        moe=_read_moe(checkpoint, fields, eps) if any(is_moe) else None,
        dense_dim=_dense_dims(checkpoint, fields, is_moe),
        dense_activation=fields.choice("hidden_act", {"silu": "silu"}) if fields.has("hidden_act") else "silu",
        bos_id=bos,
        eos_ids=eos,
        pad_id=pad,
    )
    if heads % config.n_head_kv:
        fields.wrong("num_query_groups", f"a divisor of num_attention_heads = {heads}")
    _warn_of_unknown_routing(fields)
    fields.check_unknown((*HARMLESS, *UNUSED, *MUP, *KNOWN), OPTIONAL)
    return config


def parse_layer_freq(value: Any) -> list[int]:
    """Read moe_layer_freq: a list, or a string such as ``[0]*1+[1]*26``, by its syntax tree, without evaluating it.

    >>> parse_layer_freq("([0]*1+[1]*3)")
    [0, 1, 1, 1]
    """
    expected = "a list of 0 and 1, or an expression of such lists with + and *, like '[0]*1+[1]*26'"
    error = BlockffnError(f"config.json: moe_layer_freq: expected {expected}, found {shown(value)}; correct the file")

    def walk(node: ast.expr) -> list[int] | int:
        if isinstance(node, ast.Constant) and type(node.value) is int and 0 <= node.value <= 10_000:
            return node.value
        if isinstance(node, ast.List):
            items = [walk(element) for element in node.elts]
            if all(isinstance(item, int) for item in items):
                return [item for item in items if isinstance(item, int)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
            left, right = walk(node.left), walk(node.right)
            if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
                return left + right
            if isinstance(node.op, ast.Mult) and isinstance(left, list) != isinstance(right, list):
                part, times = (left, right) if isinstance(left, list) else (right, left)
                if isinstance(part, list) and isinstance(times, int) and len(part) * times <= 10_000:
                    return part * times
        raise error

    if isinstance(value, str):
        try:
            value = walk(ast.parse(value.strip(), mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as cause:
            raise error from cause
    if not isinstance(value, list) or any(type(item) is not int or item not in (0, 1) for item in value):
        raise error
    return value


def _refuse_other_layers(checkpoint: Checkpoint, fields: Fields) -> None:
    fields.refuse("use_blockffn", (True,), "false is another kind of expert layer, which this converter does not know")
    fields.refuse(
        "use_mup", (False,), "true scales embeddings, residuals and logits in ways the published models do not use"
    )
    scales = [key for key in MUP if fields.has(key) and fields.values[key] != 1]
    if scales and not fields.has("use_mup"):
        raise BlockffnError(
            f"{fields.file}: use_mup: expected false beside {', '.join(scales)}, found nothing; no tensor shape can "
            "tell whether these scales are applied: add use_mup from the original configuration"
        )
    if scales:
        fields.note(f"not believed, as use_mup is false: {', '.join(scales)}")
    if fields.has("router_type"):
        if not fields.has("use_blockffn") and not any(".mlp.moe_router." in name for name in checkpoint.tensors):
            fields.wrong("router_type", "no such key, or use_blockffn true, which replaces the layer that reads it")
        fields.note(f"router_type = {shown(fields.values['router_type'])} is not read by a BlockFFN layer")
    fields.refuse("moe_router_dtype", ("fp32", "float32"), "router scores are computed in float32")


def _warn_of_unknown_routing(fields: Fields) -> None:
    """A key about routing that nobody read may be harmless (training) or not: only the reader of the note can tell."""
    known = {*HARMLESS, *UNUSED, *KNOWN, *fields.asked}
    unknown = sorted(key for key in fields.values if key.startswith(ROUTING) and key not in known)
    close = [key for key in unknown if difflib.get_close_matches(key, OPTIONAL, 1, 0.85)]  # an error further on
    for key in set(unknown) - set(close):
        fields.asked.add(key)
    if len(unknown) > len(close):
        given = ", ".join(f"{key} = {shown(fields.values[key])}" for key in unknown if key not in close)
        fields.note(
            f"WARNING: {fields.file}: unknown keys about the experts were not applied: {given}; where one of them "
            "changes the forward pass, this conversion computes another model"
        )


def _believe(fields: Fields, true_key: str, stale_key: str, found: int, what: str) -> int:
    """Two keys name one number: return the one that the tensors confirm, and say why."""
    values = {key: fields.integer(key) for key in (true_key, stale_key) if fields.has(key)}
    if not values:
        fields.get(true_key, f"the number of {what}")
    if found not in values.values():
        given = ", ".join(f"{key} = {value}" for key, value in values.items())
        raise BlockffnError(
            f"config.json: {what}: the tensors show {found}, the file says {given}; correct the file, or download the "
            "missing shards"
        )
    if len(set(values.values())) > 1:
        believed, stale = (true_key, stale_key) if values[true_key] == found else (stale_key, true_key)
        fields.note(f"believed {believed} = {found} and not {stale} = {values[stale]}: the tensors have {found} {what}")
    return found


def _rows(checkpoint: Checkpoint, name: str) -> int:
    """Number of rows of a matrix that every DECO has."""
    info = checkpoint.tensors.get(name)
    if info is None or len(info.shape) != 2:
        found = "nothing" if info is None else f"shape {list(info.shape)}"
        raise BlockffnError(
            f"{checkpoint.folder}: {name}: expected a matrix, found {found}; download the checkpoint again"
        )
    return info.shape[0]


def _head_dim(checkpoint: Checkpoint, fields: Fields, hidden: int, heads: int) -> int:
    """Size of one head: the rows of q_proj decide, for head_dim may be left from a base model."""
    rows = _rows(checkpoint, "model.layers.0.self_attn.q_proj.weight")
    if rows % heads:
        fields.wrong("num_attention_heads", f"a divisor of {rows}, the rows of q_proj")
    for key in ("head_dim", "kv_channels"):
        if fields.has(key) and fields.values[key] != rows // heads:
            fields.note(
                f"{key} = {shown(fields.values[key])} not believed: q_proj has {rows} rows for {heads} heads, so the "
                f"size of a head is {rows // heads}"
            )
    return rows // heads


def _norm_eps(fields: Fields) -> float:
    """Eps of the norms: norm_epsilon of the training framework is true, rms_norm_eps is a base model's."""
    if not fields.has("norm_epsilon"):
        return fields.number("rms_norm_eps")
    eps = fields.number("norm_epsilon")
    if fields.has("rms_norm_eps") and fields.values["rms_norm_eps"] != eps:
        fields.note(f"believed norm_epsilon = {eps:g} and not rms_norm_eps = {shown(fields.values['rms_norm_eps'])}")
    return eps


def _moe_layers(checkpoint: Checkpoint, fields: Fields, n_layer: int) -> list[int]:
    """Per layer 1 where it has experts. The key must agree with the tensors; without it the tensors decide."""
    shown = [int(f"model.layers.{i}.mlp.moe_router.weight" in checkpoint.tensors) for i in range(n_layer)]
    if not fields.has("moe_layer_freq"):
        fields.note("config.json has no moe_layer_freq; the layers that hold moe_router.weight have experts")
        return shown
    freq = parse_layer_freq(fields.values["moe_layer_freq"])
    if len(freq) != n_layer:
        fields.wrong("moe_layer_freq", f"{n_layer} entries, one per layer")
    for i, (said, shows) in enumerate(zip(freq, shown, strict=True)):
        if said != shows:
            raise BlockffnError(
                f"config.json: moe_layer_freq: layer {i}: expected {shows}, as mlp.moe_router.weight is "
                f"{'there' if shows else 'not there'}, found {said}; correct the file"
            )
    return freq


def _dense_dims(checkpoint: Checkpoint, fields: Fields, is_moe: list[int]) -> tuple[int, ...]:
    """Width of each dense FFN; the rows of up_proj choose between ffn_hidden_size and the stale intermediate_size."""
    if all(is_moe):
        return (0,) * len(is_moe)
    first = is_moe.index(0)
    rows = _rows(checkpoint, f"model.layers.{first}.mlp.up_proj.weight")
    width = _believe(fields, "ffn_hidden_size", "intermediate_size", rows, "columns in the dense FFN")
    return tuple(0 if moe else width for moe in is_moe)


def _tied(checkpoint: Checkpoint, fields: Fields) -> bool:
    if fields.has("tie_word_embeddings"):
        return fields.flag("tie_word_embeddings")
    has_head = "lm_head.weight" in checkpoint.tensors
    fields.note(f"config.json has no tie_word_embeddings; lm_head.weight is {'there' if has_head else 'not there'}")
    return not has_head


def _read_moe(checkpoint: Checkpoint, fields: Fields, eps: float) -> MoeConfig:
    fields.choice("router_act_func", {"relu": "relu"})
    activation = fields.choice("expert_act_func", EXPERT_ACTS)
    n_expert = fields.integer("num_experts")
    norm, scale, weight = _router_norm(fields, n_expert)
    has_bias = _has_bias(checkpoint, fields)
    shared = fields.integer("moe_shared_expert_intermediate_size", low=0) if _has_shared(fields) else 0
    return MoeConfig(
        n_expert=n_expert,
        expert_dim=fields.integer("moe_ffn_hidden_size"),
        gated=_gated(checkpoint, fields),
        activation=activation,
        activation_eps=eps if activation in ("norm_silu", "norm_silu_nomean") else 0.0,
        router_norm=norm,
        router_norm_eps=eps if norm in ("rms", "normal") else 0.0,
        router_norm_scale=1.0,
        router_scale=scale,
        router_weight=weight,
        bias_method=fields.choice("moe_expert_bias_apply_method", BIAS_METHODS) if has_bias else "none",
        shared_dim=shared,
        shared_gated=shared > 0,
    )


def _has_bias(checkpoint: Checkpoint, fields: Fields) -> bool:
    """Whether a bias selects the experts; a file without the key and without the tensor has none."""
    stored = any(name.endswith(".mlp.expert_bias") for name in checkpoint.tensors)
    if stored or fields.has("moe_router_enable_expert_bias"):
        return fields.flag("moe_router_enable_expert_bias")
    fields.note("config.json has no moe_router_enable_expert_bias; expert_bias is not there")
    return False


def _has_shared(fields: Fields) -> bool:
    return fields.has("moe_shared_expert_intermediate_size")


def _router_norm(fields: Fields, n_expert: int) -> tuple[str, float, int]:
    """Return norm, constant factor and number of learnable factors (E, 1 or 0)."""
    if "router_norm_type" in fields.values and fields.values["router_norm_type"] is None:
        kind = "null"
        fields.asked.add("router_norm_type")
    else:
        kind = fields.get("router_norm_type", "one of " + ", ".join(ROUTER_NORMS))
        fields.choice("router_norm_type", ROUTER_NORMS)
    if kind == "normal":
        fields.note(
            "WARNING: router_norm_type normal gives inactive experts a score, so every expert works on every token: "
            "the model is dense by nature and no sparse op can speed it up"
        )
    if kind == "null":
        return "none", 1.0, 0
    if fields.flag("router_norm_fixed", False):
        return ROUTER_NORMS[kind], fields.number("router_norm_init_var", positive=False), 0
    return ROUTER_NORMS[kind], 1.0, 1 if fields.flag("router_norm_scalar", False) else n_expert


def _gated(checkpoint: Checkpoint, fields: Fields) -> bool:
    """Whether the experts are gated: the tensor expert_gate_proj decides, for the key may be missing or stale."""
    has_gate = any(name.endswith(".mlp.expert_gate_proj.weight") for name in checkpoint.tensors)
    if not fields.has("expert_not_gated"):
        fields.note(f"config.json has no expert_not_gated; expert_gate_proj is {'there' if has_gate else 'not there'}")
    elif fields.flag("expert_not_gated") == has_gate:
        fields.note(
            f"expert_not_gated = {not has_gate} not believed: expert_gate_proj is "
            f"{'there' if has_gate else 'not there'}"
        )
    return has_gate


def unused(checkpoint: Checkpoint) -> set[str]:
    """Tensors that the authors' code does not read: router_norm beside router_norm_type null."""
    if checkpoint.config.get("router_norm_type") not in (None, "null"):
        return set()
    ignored = {name for name in checkpoint.tensors if name.endswith(".mlp.router_norm.weight")}
    if ignored:
        checkpoint.note("router_norm.weight is there but not used: router_norm_type is null")
    return ignored


def write(config: ModelConfig) -> dict[str, Any]:
    """Return config.json: the training framework's keys, which are the true ones; `read` gives the same model back."""
    moe = config.moe
    if moe is None:
        raise BlockffnError("export: a DECO model needs experts; give a dense twin the family vanilla")
    widths = [width for width in config.dense_dim if width]
    fixed = moe.router_weight == 0
    return shared_keys(config) | {
        "architectures": ["BlockFFNForCausalLM"],
        "model_type": "blockffn",
        "use_blockffn": True,
        "use_mup": False,
        "eos_token_id": list(config.eos_ids),
        "hidden_act": config.dense_activation,
        "num_layers": config.n_layer,
        "num_query_groups": config.n_head_kv,
        "head_dim": config.head_dim,
        "ffn_hidden_size": widths[0] if widths else moe.n_expert * moe.expert_dim,
        "norm_epsilon": config.rms_eps,
        "moe_layer_freq": [0 if width else 1 for width in config.dense_dim],
        "num_experts": moe.n_expert,
        "moe_ffn_hidden_size": moe.expert_dim,
        "moe_shared_expert_intermediate_size": moe.shared_dim or None,
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": moe.bias_method != "none",
        "moe_expert_bias_apply_method": moe.bias_method if moe.bias_method != "none" else "base",
        "router_act_func": "relu",
        "router_norm_type": {"none": "simple", "rms": "rms", "normal": "normal"}[moe.router_norm],
        "router_norm_fixed": fixed,
        "router_norm_scalar": moe.router_weight == 1,
        "router_norm_init_var": moe.router_scale if fixed else 0.1,
        "expert_act_func": next(word for word, name in EXPERT_ACTS.items() if name == moe.activation),
        "expert_act_norm_type": "normal",
        "expert_not_gated": not moe.gated,
    }
