#pragma once

// The two ops of sparse experts: nodes GGML_OP_RELU_ROUTER and GGML_OP_UNION_FFN (patches/0010-expert-ops.patch).

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// ReLU router: from router logits to scores, where exact zero means that the expert is not active for the token.
// An expert is active if its logit is > 0 and, with a bias, if logit + bias is > 0 too; its value is a = relu(logit).
// An active expert never gets an exact zero: where its score vanishes it gets the smallest normal number.
//   logits : F32 [n_expert, n_tokens]
//   weight : F32 [n_expert] or [1] or NULL, factor on the normed values, may be negative
//   bias   : F32 [n_expert] or NULL, only selects
// returns F32 [n_expert, n_tokens]
enum ggml_router_norm {
    GGML_ROUTER_NORM_NONE,  // s = a
    GGML_ROUTER_NORM_RMS,   // s = a / sqrt(mean(a^2) + eps), the mean over all n_expert entries
    GGML_ROUTER_NORM_SUM,   // s = a / (sum(a)*norm_scale + 1e-5)
};

enum ggml_router_bias {
    GGML_ROUTER_BIAS_NONE,
    GGML_ROUTER_BIAS_BASE,  // bias as it is
    GGML_ROUTER_BIAS_RMS,   // bias * sqrt(mean(logits^2))
};

GGML_API struct ggml_tensor * ggml_relu_router(struct ggml_context * ctx,
                                               struct ggml_tensor *  logits,
                                               struct ggml_tensor *  weight,
                                               struct ggml_tensor *  bias,
                                               enum ggml_router_norm norm,
                                               enum ggml_router_bias bias_method,
                                               float                 eps,
                                               float                 norm_scale,
                                               float                 scale);

// sparse FFN over the union of the experts that a batch of tokens needs:
//   y = sum over e with scores[e] != 0, ascending, of scores[e] * down[e] u_e,  u_e = act(up[e] x)
//   with gate: u_e = act(gate[e] x) * (up[e] x)
//   x        : F32 [n_embd, n_tokens]
//   up, gate : any type, [n_embd, d, n_expert]; gate may be NULL
//   down     : any type, [d, n_embd, n_expert]
//   scores   : F32 [n_expert, n_tokens]
//   act_mean : F32 [n_embd] or NULL: act sees z - dot(act_mean, x)
//   act_norm : F32 [d] or NULL: weight of the RMS norm inside act
// returns F32 [n_embd, n_tokens]; one token's result does not depend on the other tokens of the batch
enum ggml_union_act {
    GGML_UNION_ACT_SILU,
    GGML_UNION_ACT_RELU,
    GGML_UNION_ACT_GELU,              // with erf
    GGML_UNION_ACT_RELU_SQUARED,
    GGML_UNION_ACT_NORM_SILU,         // silu(rms_norm(z - mean) * act_norm)
    GGML_UNION_ACT_NORM_SILU_NOMEAN,  // silu(rms_norm(z) * act_norm)
    GGML_UNION_ACT_NORM_SILU_NORMS,   // silu(z - mean)
};

GGML_API struct ggml_tensor * ggml_union_ffn(struct ggml_context * ctx,
                                             struct ggml_tensor *  x,
                                             struct ggml_tensor *  up,
                                             struct ggml_tensor *  gate,
                                             struct ggml_tensor *  down,
                                             struct ggml_tensor *  scores,
                                             struct ggml_tensor *  act_mean,
                                             struct ggml_tensor *  act_norm,
                                             enum ggml_union_act   act,
                                             float                 eps);

#ifdef __cplusplus
}
#endif
