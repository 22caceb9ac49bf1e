// The union FFN op unpacked from its tensor, shared by the reference and the fast path.
#pragma once

#include "ggml-expert-ops.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

// whether dst has the sources, types and shapes that ggml_union_ffn() asserts: a graph may come from elsewhere (RPC)
bool union_op_check(const ggml_tensor * dst);

struct union_op {
    const ggml_tensor * x;         // F32 [n_embd, n_tokens]
    const ggml_tensor * up;        // [n_embd, d, n_expert]
    const ggml_tensor * gate;      // [n_embd, d, n_expert] or NULL
    const ggml_tensor * down;      // [d, n_embd, n_expert]
    const ggml_tensor * scores;    // F32 [n_expert, n_tokens]
    const float *       act_mean;  // [n_embd] or NULL
    const float *       act_norm;  // [d] or NULL
    ggml_union_act      act;
    float               eps;
    int64_t             n_embd, d, n_expert, n_tokens;
};

inline union_op union_op_get(const ggml_tensor * dst) {
    union_op op;
    op.x        = dst->src[0];
    op.up       = dst->src[1];
    op.gate     = dst->src[2];
    op.down     = dst->src[3];
    op.scores   = dst->src[4];
    op.act_mean = dst->src[5] ? (const float *) dst->src[5]->data : nullptr;
    op.act_norm = dst->src[6] ? (const float *) dst->src[6]->data : nullptr;
    op.act      = (ggml_union_act) ggml_get_op_params_i32(dst, 0);
    op.eps      = ggml_get_op_params_f32(dst, 1);
    op.n_embd   = op.up->ne[0];
    op.d        = op.up->ne[1];
    op.n_expert = op.up->ne[2];
    op.n_tokens = op.x->ne[1];
    return op;
}

inline bool union_act_has_norm(ggml_union_act act) {
    return act == GGML_UNION_ACT_NORM_SILU || act == GGML_UNION_ACT_NORM_SILU_NOMEAN;
}

// the elementwise part of an activation
inline float union_act_scalar(ggml_union_act act, float v) {
    switch (act) {
        case GGML_UNION_ACT_RELU:
            return v < 0.0f ? 0.0f : v;  // a NaN stays one
        case GGML_UNION_ACT_RELU_SQUARED:
            return v < 0.0f ? 0.0f : v * v;
        case GGML_UNION_ACT_GELU:
            return 0.5f * v * (1.0f + std::erf(v * 0.70710678f));
        default:
            return v / (1.0f + std::exp(-v));
    }
}

size_t union_ref_scratch_size(const union_op & op);
