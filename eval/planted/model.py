"""Random-weight models of the published shapes, in which routing and the next token are planted.

    >>> from blockffn.eval.planted.model import SHAPES, text
    >>> SHAPES["1.2b"].n_layer, SHAPES["1.2b"].n_expert
    (35, 56)
    >>> text(SHAPES["tiny"], 4, start=1000)
    [1000, 1001, 1002, 1003]

What a benchmark needs of a model is its shape and how its tokens share experts; what the weights say is no matter. So
all weights are random but for a few reserved coordinates of the residual stream, which no attention and no FFN writes
to (the rows of their output matrices are zero there) and which therefore hold what the token's embedding put there:

- routing coordinates: a code that drifts slowly along the order of token ids. A router row is a random direction in
  it, minus a threshold times a constant coordinate. RMSNorm scales both alike, so that the active set of a token is
  fixed by its id: neighbouring ids share experts. The drift is a mixture of processes with memories of 1 to 1024 ids
  (`MEMORY`), chosen so that 20 % of the experts are active for one token and 30 % for 8 consecutive ones.
- identity coordinates: a random sign code of the token. The head's row of token v + 1 holds the code of token v, so
  that greedy text continues a, a + 1, a + 2, ... : the model's own text has the planted statistics, and the true
  continuation is known.

Coordinates are whole multiples of one unit, with -8 units in each group of 32: Q4_0 and Q8_0 keep every choice of the
router, and Q4_0 keeps the codes themselves, bit for bit. What is measured is still measured: `blockffn bench` prints
TLS and CLS from active_experts().
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from blockffn.errors import BlockffnError

Array = npt.NDArray[np.float32]

ACTIVE_SHARE = 0.2  # 1 - TLS
MEMORY = {1: 0.01, 16: 0.05, 64: 0.45, 256: 0.29, 1024: 0.20}  # length of memory in tokens -> share of the variance
GROUP = 32  # coordinates per block of a quantized type
FIRST_TOKEN = 3 + 256  # ids below are unknown, begin and end of text, and the single bytes
UNIT = 0.375  # one unit of a reserved coordinate, in the residual stream
SPREAD = 2.5  # standard deviation of a routing coordinate, in units
CODE = 6  # absolute value of an identity coordinate, in units


@dataclass(frozen=True)
class PlantedShape:
    """Dimensions of a model; `family` is "blockffn" (MLA) or "deco" (plain attention, shared expert)."""

    name: str
    family: str
    n_embd: int
    n_layer: int
    n_head: int
    n_expert: int
    expert_dim: int
    n_vocab: int
    routing_groups: int = 2
    identity_groups: int = 4
    q_lora: int = 768
    kv_lora: int = 256
    nope: int = 128
    rope: int = 64
    n_dense: int = 0  # leading dense layers
    n_ff: int = 0  # their width
    shared_dim: int = 0
    n_ctx: int = 4096
    activation: str = "norm_silu"  # of DECO's experts: expert_act_func
    gated: bool = False  # DECO's experts

    @property
    def head_dim(self) -> int:
        """Width of one head's values."""
        return self.n_embd // self.n_head

    @property
    def n_reserved(self) -> int:
        """Leading coordinates of the residual stream that hold the planted codes."""
        return GROUP * (self.routing_groups + self.identity_groups)

    @property
    def embedding_scale(self) -> float:
        """scale_emb of the BlockFFN family; DECO has none."""
        return 12.0 if self.family == "blockffn" else 1.0

    @property
    def branch_gain(self) -> float:
        """Factor on output matrices: what scale_depth does in the BlockFFN family, DECO has to do in its weights."""
        return 1.0 if self.family == "blockffn" else 1.4 / self.n_layer**0.5


# Dimensions: table of published shapes, BlockFFN arXiv 2507.08771 and DECO arXiv 2605.10933. The dense layer of DECO
# has the published 0.5B ratio, ffn_hidden_size 3360 at hidden size 1280.
SHAPES = {
    shape.name: shape
    for shape in (
        PlantedShape("1.2b", "blockffn", 1792, 35, 14, 56, 128, 122753),
        PlantedShape("0.1b", "blockffn", 768, 16, 6, 48, 64, 122753),
        PlantedShape("deco-1.2b", "deco", 1792, 32, 14, 102, 64, 73448, n_dense=1, n_ff=4704, shared_dim=128),
        PlantedShape("tiny", "blockffn", 256, 3, 2, 24, 32, 2048, 2, 2, 64, 32, 32, 16),
        PlantedShape("tiny-deco", "deco", 256, 3, 2, 21, 32, 2048, 2, 2, n_dense=1, n_ff=672, shared_dim=64),
    )
}


def shape_named(name: str) -> PlantedShape:
    """Return a shape of SHAPES; BlockffnError lists them for an unknown name."""
    if name not in SHAPES:
        raise BlockffnError(f"shape: expected one of {', '.join(SHAPES)}, found {name!r}")
    return SHAPES[name]


def with_activation(shape: PlantedShape, activation: str) -> PlantedShape:
    """Return a DECO shape with another expert activation, named after it; all random weights stay the same.

    >>> with_activation(SHAPES["deco-1.2b"], "silu").name
    'deco-1.2b-silu'
    """
    if shape.family != "deco":
        raise BlockffnError(f"shape: expected one of family deco, found {shape.name} of family {shape.family}")
    return replace(shape, name=f"{shape.name}-{activation}", activation=activation)


def text(shape: PlantedShape, n_tokens: int, start: int | None = None) -> list[int]:
    """Return `n_tokens` consecutive ids, the model's own greedy text; `start` defaults to mid-vocabulary."""
    first = shape.n_vocab // 2 if start is None else start
    span = shape.n_vocab - FIRST_TOKEN
    return [FIRST_TOKEN + (first - FIRST_TOKEN + i) % span for i in range(n_tokens)]


def drift(shape: PlantedShape, rng: np.random.Generator) -> Array:
    """Return the routing code of every token in units, whole numbers -7..7, float32 [n_vocab, routing coordinates]."""
    width = (GROUP - 1) * shape.routing_groups
    total = np.zeros((shape.n_vocab, width), np.float32)
    for memory, share in MEMORY.items():
        total += np.sqrt(share, dtype=np.float32) * _process(memory, total.shape, rng)
    total /= np.sqrt(np.square(total).mean(axis=1, keepdims=True))  # tokens of equal strength: equal activity
    rounded: Array = np.clip(np.rint(SPREAD * total), -7, 7)
    return rounded


def _process(memory: int, size: tuple[int, int], rng: np.random.Generator) -> Array:
    """Return a stationary process [time, width] of unit variance and correlation exp(-distance / memory)."""
    keep = float(np.exp(-1.0 / memory))
    noise = rng.standard_normal(size, dtype=np.float32)
    noise[1:] *= np.sqrt(1.0 - keep * keep)
    for t in range(1, size[0]):
        noise[t] += keep * noise[t - 1]
    return noise


@dataclass
class Planted:
    """The codes of one model; its methods give the tensors that hold them."""

    shape: PlantedShape
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.routing = drift(self.shape, self.rng)  # [n_vocab, 31 x routing_groups]
        width = (GROUP - 1) * self.shape.identity_groups
        signs = self.rng.integers(0, 2, (self.shape.n_vocab, width))
        self.identity: Array = (CODE * (2 * signs - 1)).astype(np.float32)  # [n_vocab, 31 x identity_groups]

    def embedding(self) -> Array:
        """Return the embedding, float32 [n_vocab, n_embd]: codes in the reserved coordinates, noise in the others."""
        s, unit = self.shape, UNIT / self.shape.embedding_scale
        values = self.noise(s.n_vocab, s.n_embd, std=1.0 / s.embedding_scale)
        codes = np.concatenate([self.routing, self.identity], axis=1) * unit
        groups = codes.reshape(s.n_vocab, -1, GROUP - 1)  # [n_vocab, groups, 31]
        reserved = values[:, : s.n_reserved].reshape(s.n_vocab, -1, GROUP)
        reserved[:, :, 0] = -8 * unit  # the constant coordinate: largest of its group, it sets the unit of Q4_0
        reserved[:, :, 1:] = groups
        return values

    def head(self, confidence: float) -> Array:
        """Return the head, float32 [n_vocab, n_embd]: the row of token v + 1 holds the code of token v."""
        s = self.shape
        values = self.noise(s.n_vocab, s.n_embd, std=0.1 * confidence)
        values[:, : s.n_reserved] = 0
        before = np.roll(self.identity[FIRST_TOKEN:], 1, axis=0) / CODE  # the last token is followed by the first
        part = values[FIRST_TOKEN:, GROUP * s.routing_groups : s.n_reserved].reshape(len(before), -1, GROUP)
        part[:, :, 1:] = confidence * before.reshape(len(before), -1, GROUP - 1)  # a view: it writes into `values`
        values[:FIRST_TOKEN] = 0
        return values

    def router(self) -> Array:
        """Return a router, float32 [n_expert, n_embd], whose rows are positive for ACTIVE_SHARE of the tokens."""
        s = self.shape
        width = (GROUP - 1) * s.routing_groups
        directions = self.rng.standard_normal((s.n_expert, width)).astype(np.float32) / np.float32(width**0.5)
        seen = self.routing[FIRST_TOKEN :: max(1, s.n_vocab // 16384)] @ directions.T  # [tokens, n_expert], in units
        threshold = np.quantile(seen, 1.0 - ACTIVE_SHARE, axis=0, method="midpoint")  # [n_expert]
        values = np.zeros((s.n_expert, s.n_embd), np.float32)
        reserved = np.zeros((s.n_expert, s.routing_groups, GROUP), np.float32)
        reserved[:, :, 1:] = directions.reshape(s.n_expert, s.routing_groups, GROUP - 1)
        reserved[:, 0, 0] = threshold / 8  # times the constant coordinate of -8 units: minus the threshold
        values[:, : reserved.shape[1] * GROUP] = 4 * reserved.reshape(s.n_expert, -1)
        return values

    def matrix(self, n_out: int, n_in: int, std: float | None = None) -> Array:
        """Return a random matrix, float32 [n_out, n_in], by default of unit gain."""
        return self.noise(n_out, n_in, std=n_in**-0.5 if std is None else std)

    def output_matrix(self, n_in: int, std: float | None = None) -> Array:
        """Return a random matrix into the residual stream, [n_embd, n_in], that spares the reserved coordinates."""
        values = self.matrix(self.shape.n_embd, n_in, self.shape.branch_gain * (n_in**-0.5 if std is None else std))
        values[: self.shape.n_reserved] = 0
        return values

    def noise(self, *size: int, std: float) -> Array:
        """Return normal values, float32."""
        values = self.rng.standard_normal(size, dtype=np.float32)
        values *= np.float32(std)
        return values


def tensors(shape: PlantedShape, seed: int = 0) -> Iterator[tuple[str, Array]]:
    """Yield (name, values) of every tensor under its Hugging Face name, a few at a time in memory."""
    planted = Planted(shape, np.random.Generator(np.random.SFC64(seed)))
    yield "model.embed_tokens.weight", planted.embedding()
    for layer in range(shape.n_layer):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield prefix + name + ".weight", np.ones(shape.n_embd, np.float32)
        attention = _mla(planted) if shape.family == "blockffn" else _gqa(planted)
        for name, values in attention:
            yield prefix + "self_attn." + name + ".weight", values
        if layer < shape.n_dense:
            ffn = _swiglu(planted, shape.n_ff)
        else:
            ffn = _block(planted) if shape.family == "blockffn" else _deco(planted)
        for name, values in ffn:
            yield prefix + "mlp." + name, values
    yield "model.norm.weight", np.ones(shape.n_embd, np.float32)
    # The likeliest token leads by about ten nats, whatever the family's logit scale.
    yield "lm_head.weight", planted.head(1.5 if shape.family == "blockffn" else 0.2)


Named = Iterator[tuple[str, Array]]


def _mla(planted: Planted) -> Named:
    s = planted.shape
    yield "q_a_proj", planted.matrix(s.q_lora, s.n_embd)
    yield "q_a_layernorm", np.ones(s.q_lora, np.float32)
    yield "q_b_proj", planted.matrix(s.n_head * (s.nope + s.rope), s.q_lora)
    yield "kv_a_proj_with_mqa", planted.matrix(s.kv_lora + s.rope, s.n_embd)
    yield "kv_a_layernorm", np.ones(s.kv_lora, np.float32)
    yield "kv_b_proj", planted.matrix(s.n_head * (s.nope + s.head_dim), s.kv_lora)
    yield "o_proj", planted.output_matrix(s.n_head * s.head_dim)


def _gqa(planted: Planted) -> Named:
    s = planted.shape
    for name in ("q_proj", "k_proj", "v_proj"):
        yield name, planted.matrix(s.n_embd, s.n_embd)
    yield "o_proj", planted.output_matrix(s.n_embd)


def _block(planted: Planted) -> Named:
    s = planted.shape
    width = s.n_expert * s.expert_dim
    yield "router_proj.weight", planted.router()
    yield "router_norm.weight", np.ones(s.n_expert, np.float32)
    yield "up_proj", planted.matrix(width, s.n_embd)
    yield "down_proj", planted.output_matrix(width, (ACTIVE_SHARE * width) ** -0.5)


def _deco(planted: Planted) -> Named:
    s = planted.shape
    width = s.n_expert * s.expert_dim
    yield "moe_router.weight", planted.router()
    yield "router_norm.weight", np.ones(s.n_expert, np.float32)
    if s.gated:
        yield "expert_gate_proj.weight", planted.matrix(width, s.n_embd)
    yield "expert_up_proj.weight", planted.matrix(width, s.n_embd)
    yield "expert_down_proj.weight", planted.output_matrix(width, (ACTIVE_SHARE * width) ** -0.5)
    if s.activation in ("norm_silu", "norm_silu_nomean"):
        yield "expert_act.rms_norm.weight", np.ones(s.expert_dim, np.float32)
    if s.shared_dim:
        for name, values in _swiglu(planted, s.shared_dim):
            yield "shared_experts." + name, values


def _swiglu(planted: Planted, width: int) -> Named:
    yield "gate_proj.weight", planted.matrix(width, planted.shape.n_embd)
    yield "up_proj.weight", planted.matrix(width, planted.shape.n_embd)
    yield "down_proj.weight", planted.output_matrix(width)


def configuration(shape: PlantedShape) -> dict[str, Any]:
    """Return config.json of the family, as the published files have it."""
    common: dict[str, Any] = {
        "vocab_size": shape.n_vocab, "hidden_size": shape.n_embd, "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_head, "max_position_embeddings": shape.n_ctx, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "num_hidden_layers": shape.n_layer, "bos_token_id": 1, "hidden_act": "silu",
        "torch_dtype": "float16",
    }  # fmt: skip
    if shape.family == "blockffn":
        return common | {
            "architectures": ["MiniCPMForCausalLM"], "eos_token_id": 2, "rope_scaling": None, "scale_depth": 1.4,
            "scale_emb": shape.embedding_scale, "dim_model_base": shape.n_embd // 7, "attention_type": "mla",
            "q_lora_rank": shape.q_lora, "kv_lora_rank": shape.kv_lora, "qk_nope_head_dim": shape.nope,
            "qk_rope_head_dim": shape.rope, "ffn_type": "block_linear", "block_implementation": "torch",
            "router_act": "relu", "num_experts": shape.n_expert, "expert_size": shape.expert_dim,
            "norm_after_router": "rms",
        }  # fmt: skip
    return common | {
        "architectures": ["BlockFFNForCausalLM"], "model_type": "blockffn", "eos_token_id": [2], "pad_token_id": 2,
        "num_layers": shape.n_layer, "num_query_groups": shape.n_head, "head_dim": shape.head_dim,
        "ffn_hidden_size": shape.n_ff, "norm_epsilon": 1e-5, "rope_theta": 10000.0, "use_mup": False,
        "use_blockffn": True, "num_experts": shape.n_expert, "moe_ffn_hidden_size": shape.expert_dim,
        "moe_shared_expert_intermediate_size": shape.shared_dim or None, "router_act_func": "relu",
        "moe_layer_freq": [0] * shape.n_dense + [1] * (shape.n_layer - shape.n_dense), "router_norm_type": "simple",
        "router_norm_fixed": False, "router_norm_scalar": False, "router_norm_init_var": 0.1,
        "expert_act_func": shape.activation, "expert_act_norm_type": "normal", "expert_not_gated": not shape.gated,
        "moe_router_enable_expert_bias": False, "router_type": None,
    }  # fmt: skip


def pieces(shape: PlantedShape) -> Sequence[str]:
    """Return the text of every token id from FIRST_TOKEN on: words of four letters, all different."""
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = []
    for number in range(shape.n_vocab - FIRST_TOKEN):
        word = ""
        for _ in range(4):
            number, letter = divmod(number, len(letters))
            word += letters[letter]
        words.append("\u2581" + word)
    return words
