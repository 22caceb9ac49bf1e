"""What a BlockFFN or DECO checkpoint is, in one form: `ModelConfig`, made by the configuration readers of this package.

Nothing here has a default: a reader either finds a value, applies the default that the authors' code applies (and says
so), or raises. The torch reference (blockffn.training.reference), the tensor plan and the GGUF writer all read this.
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


# Canonical tensors: every checkpoint layout is read into these names and shapes (torch order, row-major).
# h = n_embd, V = n_vocab, H = n_head, E = n_expert, d = expert_dim. Absent where the model has no such tensor.
#   embed [V, h]   output_norm [h]   lm_head [V, h] (absent when tied)
#   layers.{i}.attn_norm [h]   layers.{i}.ffn_norm [h]
#   MLA: layers.{i}.q_a [q_lora, h]  q_a_norm [q_lora]  q_b [H*(nope+rope), q_lora]
#        kv_a [kv_lora+rope, h]  kv_a_norm [kv_lora]  kv_b [H*(nope+v), kv_lora]  o [h, H*v]
#   GQA: layers.{i}.q [H*head_dim, h]  k, v [n_head_kv*head_dim, h]  o [h, H*head_dim]
#   experts: layers.{i}.router [E, h]  router_norm [E] or [1]  expert_bias [E]
#            up_exps, gate_exps [E, d, h]  down_exps [E, h, d]  act_norm [d]
#            shared_up, shared_gate [shared_dim, h]  shared_down [h, shared_dim]
#   dense:   layers.{i}.up, gate [dense_dim, h]  down [h, dense_dim]
