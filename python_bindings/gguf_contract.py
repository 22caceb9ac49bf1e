"""Names of the GGUF format of BlockFFN and DECO models: the one list that converter, tools, tests and C++ agree on.

docs/gguf.md explains every key and tensor; tests/test_gguf_contract.py compares this module with the names in the
C++ source, so that the two cannot drift apart. This module imports nothing.

    >>> from blockffn import gguf_contract as names
    >>> names.key(names.ROUTER_NORM)
    'blockffn.router.norm'
    >>> names.tensor(names.FFN_UP_EXPS, 3)
    'blk.3.ffn_up_exps.weight'
"""

from __future__ import annotations

ARCH = "blockffn"
ARCH_EAGLE = "blockffn-eagle"

# Keys, to be prefixed with the architecture (see `key`). Upstream's own names wherever llama.cpp has one.
CONTEXT_LENGTH = "context_length"
EMBEDDING_LENGTH = "embedding_length"
BLOCK_COUNT = "block_count"
VOCAB_SIZE = "vocab_size"
FEED_FORWARD_LENGTH = (
    "feed_forward_length"  # width of the dense FFN; 0 marks a layer of experts; one value or one per layer
)
HEAD_COUNT = "attention.head_count"
HEAD_COUNT_KV = "attention.head_count_kv"
KEY_LENGTH = "attention.key_length"
VALUE_LENGTH = "attention.value_length"
KEY_LENGTH_MLA = "attention.key_length_mla"
VALUE_LENGTH_MLA = "attention.value_length_mla"
Q_LORA_RANK = "attention.q_lora_rank"
KV_LORA_RANK = "attention.kv_lora_rank"
RMS_EPSILON = "attention.layer_norm_rms_epsilon"
LORA_RMS_EPSILON = "attention.lora_layer_norm_rms_epsilon"  # ours: eps of q_a_norm and kv_a_norm
ROPE_DIMENSION_COUNT = "rope.dimension_count"
ROPE_FREQ_BASE = "rope.freq_base"
ROPE_SCALING_TYPE = "rope.scaling.type"
ROPE_SCALING_FACTOR = "rope.scaling.factor"
ROPE_DYNAMIC_FACTOR = (
    "rope.scaling.dynamic_factor"  # ours: dynamic NTK, refused beyond context_length; scaling.type is none
)
EMBEDDING_SCALE = "embedding_scale"
RESIDUAL_SCALE = "residual_scale"
LOGIT_SCALE = "logit_scale"
EXPERT_COUNT = "expert_count"
EXPERT_USED_COUNT = "expert_used_count"  # upper bound that llama.cpp wants: expert_count
EXPERT_FEED_FORWARD_LENGTH = "expert_feed_forward_length"
EXPERT_SHARED_COUNT = "expert_shared_count"
EXPERT_SHARED_FEED_FORWARD_LENGTH = "expert_shared_feed_forward_length"
# Ours.
EXPERT_ACTIVATION = "expert_activation"
EXPERT_ACTIVATION_EPSILON = "expert_activation_epsilon"  # eps of the NormSiLU norm
EXPERT_LAYOUT = "expert_layout"
HIDDEN_ACTIVATION = "hidden_activation"  # upstream's name: activation of dense and shared FFNs (silu, relu, gelu)
ROUTER_NORM = "router.norm"
ROUTER_NORM_EPSILON = "router.norm_epsilon"  # eps of norm `rms`
ROUTER_NORM_SCALE = "router.norm_scale"  # factor on the sum of norm `sum`
ROUTER_SCALE = "router.scale"  # constant factor on all scores (1 where absent)
ROUTER_BIAS_METHOD = "router.bias_method"
ROUTER_THRESHOLD = "router.threshold"  # share of a token's largest score below which experts are skipped (or 0)
FFN_DENSE = "ffn_dense"  # never written; --override-kv blockffn.ffn_dense=bool:true runs experts densely
# Ours, read by Python alone: the sparsity that `blockffn eval sparsity --write-metadata` measured (profile.py).
PROFILE_TOKENS = "profile.tokens"  # of the text
PROFILE_TLS = "profile.tls"
PROFILE_UNION_TOKENS = "profile.union_tokens"  # sizes of batches, and
PROFILE_UNION_EXPERTS = "profile.union_experts"  # how many experts of a layer they need, on average
PROFILE_STEP_GROWTH = "profile.step_growth"  # of a step with each further token, where reading weights takes all time

ROUTER_NORMS = ("none", "rms", "sum")  # DECO's simple and null are none (with and without weight)
ROUTER_NORM_NORMAL = "normal"  # DECO: (a - mean) / rms; such a model is dense by nature
BIAS_METHODS = ("none", "base", "rms")
EXPERT_LAYOUTS = ("expert", "dense")
ACTIVATIONS = ("silu", "relu", "gelu", "relu_squared", "norm_silu", "norm_silu_nomean", "norm_silu_norms")

# Tensors; `{i}` is the layer.
TOKEN_EMBD = "token_embd.weight"
OUTPUT_NORM = "output_norm.weight"
OUTPUT = "output.weight"
ATTN_NORM = "blk.{i}.attn_norm.weight"
ATTN_Q = "blk.{i}.attn_q.weight"
ATTN_K = "blk.{i}.attn_k.weight"
ATTN_V = "blk.{i}.attn_v.weight"
ATTN_OUT = "blk.{i}.attn_output.weight"
ATTN_Q_A = "blk.{i}.attn_q_a.weight"
ATTN_Q_A_NORM = "blk.{i}.attn_q_a_norm.weight"
ATTN_Q_B = "blk.{i}.attn_q_b.weight"
ATTN_KV_A_MQA = "blk.{i}.attn_kv_a_mqa.weight"
ATTN_KV_A_NORM = "blk.{i}.attn_kv_a_norm.weight"
ATTN_K_B = "blk.{i}.attn_k_b.weight"
ATTN_V_B = "blk.{i}.attn_v_b.weight"
FFN_NORM = "blk.{i}.ffn_norm.weight"
FFN_GATE = "blk.{i}.ffn_gate.weight"
FFN_UP = "blk.{i}.ffn_up.weight"
FFN_DOWN = "blk.{i}.ffn_down.weight"
FFN_GATE_INP = "blk.{i}.ffn_gate_inp.weight"  # router matrix
FFN_ROUTER_NORM = "blk.{i}.ffn_router_norm.weight"  # ours: factor on the scores, [E] or [1]
FFN_EXPERT_BIAS = "blk.{i}.exp_probs_b.bias"  # DECO's expert bias, [E]
FFN_GATE_EXPS = "blk.{i}.ffn_gate_exps.weight"
FFN_UP_EXPS = "blk.{i}.ffn_up_exps.weight"
FFN_DOWN_EXPS = "blk.{i}.ffn_down_exps.weight"
FFN_ACT_NORM = "blk.{i}.ffn_act_norm.weight"  # ours: NormSiLU weight, [d]
FFN_ACT_MEAN = "blk.{i}.ffn_act_mean.weight"  # ours: mean row of all up (or gate) projections, [n_embd]
FFN_GATE_SHEXP = "blk.{i}.ffn_gate_shexp.weight"
FFN_UP_SHEXP = "blk.{i}.ffn_up_shexp.weight"
FFN_DOWN_SHEXP = "blk.{i}.ffn_down_shexp.weight"

# The draft head (blockffn-eagle) has its layers' names from above and, beside them:
DRAFT_TOKENS = "draft_tokens"  # ours: cut draft vocabulary: row of the output matrix -> token; absent where not cut
FC = "fc.weight"  # [n_embd, 2 * n_embd]: on the normed embedding, then the normed hidden state
FC_BIAS = "fc.bias"
EMBD_NORM = "blk.{i}.nextn.enorm.weight"  # layer 0 only, as HIDDEN_NORM
HIDDEN_NORM = "blk.{i}.nextn.hnorm.weight"


def key(name: str, arch: str = ARCH) -> str:
    """Return the full GGUF key of `name`, for example ``blockffn.router.norm``."""
    return f"{arch}.{name}"


def tensor(name: str, layer: int) -> str:
    """Return the GGUF tensor name of `name` in layer `layer`."""
    return name.format(i=layer)
