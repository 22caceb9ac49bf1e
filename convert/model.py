"""What a BlockFFN or DECO checkpoint is, in one form: `ModelConfig`, and the names and shapes of its tensors.

Nothing here has a default: a reader either finds a value, applies the default that the authors' code applies (and says
so), or raises. The torch reference (blockffn.training.model), the tensor plan and the GGUF writer all read this.
Formulas: BlockFFN arXiv 2507.08771, DECO arXiv 2605.10933.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention: ranks and head sizes, and the eps of q_a_norm and kv_a_norm."""

    q_lora_rank: int
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int
    norm_eps: float


@dataclass(frozen=True)
class MoeConfig:
    """One layer of ReLU-routed experts.

    scores: a = relu(r) inside the active set; s = norm(a) * weight * router_scale (BlockFFN eq. 3-5, DECO eq. 4-7).
    """

    n_expert: int  # routed experts, E
    expert_dim: int  # width d of one expert
    gated: bool  # act(gate x) * (up x) instead of act(up x)
    activation: str  # gguf_contract.ACTIVATIONS
    activation_eps: float  # eps of the NormSiLU norm (0.0 where the activation has none)
    router_norm: str  # gguf_contract.ROUTER_NORMS or "normal"
    router_norm_eps: float  # eps of `rms` and `normal`
    router_norm_scale: float  # factor on the sum of `sum`
    router_scale: float  # constant factor on the scores, 1.0 where there is none
    router_weight: int  # entries of the learnable factor on the scores: E, 1, or 0 for none
    bias_method: str  # gguf_contract.BIAS_METHODS
    shared_dim: int  # width of the shared expert, 0 for none
    shared_gated: bool  # SwiGLU shared expert (DECO) or plain (ReMoE)


@dataclass(frozen=True)
class ModelConfig:
    """The decoder around the FFNs; `moe` is None for the dense twin."""

    name: str  # general.name
    family: str  # "blockffn", "deco", "remoe" or "vanilla": what the user converted
    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int  # of q and k without MLA
    n_ctx_train: int
    rms_eps: float
    rope_base: float
    rope_scaling: str  # "none", "linear", "dynamic"
    rope_factor: float
    embedding_scale: float
    residual_scale: float  # factor on both residual branches, scale_depth / sqrt(n_layer)
    logit_scale: float  # factor on the logits, dim_model_base / hidden_size
    tied: bool
    mla: MlaConfig | None
    moe: MoeConfig | None
    dense_dim: tuple[int, ...]  # per layer: width of the dense FFN, 0 where the layer has experts
    dense_activation: str  # of the dense and of the shared FFN: "silu", "relu", "gelu"
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        return tuple(i for i, width in enumerate(self.dense_dim) if width == 0)


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape (torch order, row-major) of all tensors that a model of this configuration has.

    Every checkpoint layout is read into these names; the layers' have the prefix ``layers.{i}.``.
    """
    h, vocab = config.n_embd, config.n_vocab
    shapes: dict[str, tuple[int, ...]] = {"embed": (vocab, h)}
    for i in range(config.n_layer):
        shapes |= {f"layers.{i}.{part}": shape for part, shape in _layer_shapes(config, i).items()}
    shapes["output_norm"] = (h,)
    if not config.tied:
        shapes["lm_head"] = (vocab, h)
    return shapes


def _layer_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    h, heads = config.n_embd, config.n_head
    shapes: dict[str, tuple[int, ...]] = {"attn_norm": (h,)}
    if mla := config.mla:
        q_dim, kv_dim = mla.nope_head_dim + mla.rope_head_dim, mla.nope_head_dim + mla.v_head_dim
        shapes |= {"q_a": (mla.q_lora_rank, h), "q_a_norm": (mla.q_lora_rank,), "q_b": (heads * q_dim, mla.q_lora_rank)}
        shapes |= {"kv_a": (mla.kv_lora_rank + mla.rope_head_dim, h), "kv_a_norm": (mla.kv_lora_rank,)}
        shapes |= {"kv_b": (heads * kv_dim, mla.kv_lora_rank), "o": (h, heads * mla.v_head_dim)}
    else:
        q, kv = heads * config.head_dim, config.n_head_kv * config.head_dim
        shapes |= {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q)}
    shapes["ffn_norm"] = (h,)
    if (width := config.dense_dim[layer]) > 0:
        return shapes | {"gate": (width, h), "up": (width, h), "down": (h, width)}
    return shapes | _moe_shapes(config)


def _moe_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    moe, h = config.moe, config.n_embd
    assert moe is not None
    n, d = moe.n_expert, moe.expert_dim
    shapes: dict[str, tuple[int, ...]] = {"router": (n, h)}
    if moe.router_weight:
        shapes["router_norm"] = (moe.router_weight,)  # [E] or [1]
    if moe.bias_method != "none":
        shapes["expert_bias"] = (n,)
    if moe.gated:
        shapes["gate_exps"] = (n, d, h)
    shapes |= {"up_exps": (n, d, h), "down_exps": (n, h, d)}
    if moe.activation in ("norm_silu", "norm_silu_nomean"):
        shapes["act_norm"] = (d,)
    if moe.shared_dim:
        if moe.shared_gated:
            shapes["shared_gate"] = (moe.shared_dim, h)
        shapes |= {"shared_up": (moe.shared_dim, h), "shared_down": (h, moe.shared_dim)}
    return shapes
