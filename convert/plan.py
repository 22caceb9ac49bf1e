"""ModelConfig + canonical tensors -> the list of GGUF tensors, each with a recipe, none of them loaded.

    plan = plan_tensors(checkpoint, config, map_tensors(checkpoint, config), "f16", "expert")
    plan[0].name, plan[0].ggml_shape, plan[0].type.name    # ('token_embd.weight', (1792, 122753), 'F16')

Constant changes happen here: kv_b is split and transposed for absorbed MLA, the mean row of norm_silu is folded, the
dense layout puts the experts side by side. Types: matrices take the output type; vectors, the mean row and the router
matrix stay F32. The router stays F32 because its sign decides which experts run: DECO computes it in float32, and for
BlockFFN a rounded row would switch experts on and off at the threshold, an error that no other tensor's rounding
makes, for 0.1 % of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from blockffn import gguf_contract as names
from blockffn.convert.checkpoint import Checkpoint, to_float32
from blockffn.convert.model import ModelConfig
from blockffn.convert.tensor_map import Array, Source, load_array

TYPES = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
OUTTYPES = (*TYPES, "auto")

PLAIN = {
    "embed": names.TOKEN_EMBD, "output_norm": names.OUTPUT_NORM, "lm_head": names.OUTPUT, "attn_norm": names.ATTN_NORM,
    "ffn_norm": names.FFN_NORM, "q_a": names.ATTN_Q_A, "q_a_norm": names.ATTN_Q_A_NORM, "q_b": names.ATTN_Q_B,
    "kv_a": names.ATTN_KV_A_MQA, "kv_a_norm": names.ATTN_KV_A_NORM, "q": names.ATTN_Q, "k": names.ATTN_K,
    "v": names.ATTN_V,
    "o": names.ATTN_OUT, "gate": names.FFN_GATE, "up": names.FFN_UP, "down": names.FFN_DOWN,
    "router": names.FFN_GATE_INP,
    "router_norm": names.FFN_ROUTER_NORM, "expert_bias": names.FFN_EXPERT_BIAS, "act_norm": names.FFN_ACT_NORM,
    "shared_gate": names.FFN_GATE_SHEXP, "shared_up": names.FFN_UP_SHEXP, "shared_down": names.FFN_DOWN_SHEXP,
}  # fmt: skip
EXPERTS = {"up_exps": names.FFN_UP_EXPS, "gate_exps": names.FFN_GATE_EXPS, "down_exps": names.FFN_DOWN_EXPS}
EXPERTS_DENSE = {"up_exps": names.FFN_UP, "gate_exps": names.FFN_GATE, "down_exps": names.FFN_DOWN}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output: shape in torch order, and how to get its values."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    source: str  # name in the checkpoint, for messages
    load: Callable[[], Array]

    @property
    def ggml_shape(self) -> tuple[int, ...]:
        """Shape in ggml order, rows first."""
        return self.shape[::-1]

    @property
    def n_elements(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape))

    @property
    def n_bytes(self) -> int:
        """Size in the file."""
        block, size = GGML_QUANT_SIZES[self.type]
        return self.n_elements // block * size


def choose_outtype(outtype: str, checkpoint: Checkpoint) -> str:
    """Resolve `auto`: the 16 or 32-bit type in which most weights are stored, so that nothing is lost."""
    if outtype != "auto":
        return outtype
    stored: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        stored[info.dtype] = stored.get(info.dtype, 0) + int(np.prod(info.shape))
    return {"F16": "f16", "BF16": "bf16"}.get(max(stored, key=lambda name: stored[name]), "f32")


def plan_tensors(
    checkpoint: Checkpoint, config: ModelConfig, sources: dict[str, Source], outtype: str, layout: str
) -> list[PlannedTensor]:
    """Return the output tensors in file order. layout: ``expert`` or ``dense``; outtype: a key of TYPES."""
    if config.moe is None and layout == "dense":
        checkpoint.note("layout dense changes nothing: the model has no experts")
    plan = []
    for canonical, source in sources.items():
        layer, _, part = canonical.rpartition(".")
        for template, shape, arrange in _outputs(config, part, source.shape, layout):
            name = template.format(i=layer.split(".")[1]) if layer else template
            kind = _type_of(name, part, shape, outtype)
            plan.append(PlannedTensor(name, shape, kind, source.name, partial(_load, checkpoint, source, arrange)))
    fallback = [tensor.name for tensor in plan if outtype == "q8_0" and tensor.type is TYPES["f16"]]
    if fallback:
        checkpoint.note(f"rows not divisible by 32 stay F16 instead of Q8_0: {_shorten(fallback)}")
    return plan


def _load(checkpoint: Checkpoint, source: Source, arrange: Callable[[Array], Array]) -> Array:
    return arrange(load_array(checkpoint, source))


def _outputs(
    config: ModelConfig, part: str, shape: tuple[int, ...], layout: str
) -> Iterator[tuple[str, tuple[int, ...], Callable[[Array], Array]]]:
    """Yield (name, shape, rearrangement) of every GGUF tensor made from one canonical tensor."""
    if part == "kv_b":
        yield from _absorbed(config)
    elif part in EXPERTS:
        yield from _experts(config, part, shape, layout)
    else:
        yield PLAIN[part], shape, lambda values: values


def _absorbed(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], Callable[[Array], Array]]]:
    """kv_b [H*(nope+v), kv_lora] -> k_b [H, kv_lora, nope] (transposed) and v_b [H, v, kv_lora]."""
    mla, heads = config.mla, config.n_head
    assert mla is not None
    nope, v, rank = mla.nope_head_dim, mla.v_head_dim, mla.kv_lora_rank

    def per_head(values: Array) -> Array:
        return values.reshape(heads, nope + v, rank)

    yield names.ATTN_K_B, (heads, rank, nope), lambda values: per_head(values)[:, :nope].transpose(0, 2, 1)
    yield names.ATTN_V_B, (heads, v, rank), lambda values: per_head(values)[:, nope:]


def _experts(
    config: ModelConfig, part: str, shape: tuple[int, ...], layout: str
) -> Iterator[tuple[str, tuple[int, ...], Callable[[Array], Array]]]:
    moe = config.moe
    assert moe is not None
    n, first, second = shape
    if layout == "expert":
        yield EXPERTS[part], shape, lambda values: values
    elif part == "down_exps":  # [E, h, d] -> [h, E*d]
        yield (
            EXPERTS_DENSE[part],
            (first, n * second),
            lambda values: values.transpose(1, 0, 2).reshape(first, n * second),
        )
    else:  # [E, d, h] -> [E*d, h]
        yield EXPERTS_DENSE[part], (n * first, second), lambda values: values.reshape(n * first, second)
    activated = "gate_exps" if moe.gated else "up_exps"
    if part == activated and moe.activation in ("norm_silu", "norm_silu_norms"):
        yield names.FFN_ACT_MEAN, (second,), _mean_row


def _mean_row(values: Array) -> Array:
    """Mean over all E*d rows, [E, d, h] -> [h]: mean(W x) = mean_row . x, so the op need not run idle experts."""
    total = np.zeros(values.shape[-1], np.float64)
    for expert in values:
        total += to_float32(np.ascontiguousarray(expert)).sum(axis=0, dtype=np.float64)
    return (total / (values.shape[0] * values.shape[1])).astype(np.float32)


def _type_of(name: str, part: str, shape: tuple[int, ...], outtype: str) -> GGMLQuantizationType:
    if part == "router" or name.endswith(".ffn_act_mean.weight"):
        return TYPES["f32"]
    return matrix_type(shape, outtype)


def matrix_type(shape: tuple[int, ...], outtype: str) -> GGMLQuantizationType:
    """The type of a tensor of this shape: vectors are F32, rows that 32 does not divide F16 instead of Q8_0."""
    if len(shape) == 1:
        return TYPES["f32"]
    return TYPES["f16"] if outtype == "q8_0" and shape[-1] % 32 else TYPES[outtype]


def _shorten(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
