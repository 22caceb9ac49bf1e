// Constructors of the two ops of sparse experts: checks of shapes and types, and the node.

#include "ggml-expert-ops.h"

#include "ggml-impl.h"

// ggml_relu_router

struct ggml_tensor * ggml_relu_router(struct ggml_context * ctx,
                                      struct ggml_tensor *  logits,
                                      struct ggml_tensor *  weight,
                                      struct ggml_tensor *  bias,
                                      enum ggml_router_norm norm,
                                      enum ggml_router_bias bias_method,
                                      float                 eps,
                                      float                 norm_scale,
                                      float                 scale) {
    const int64_t n_expert = logits->ne[0];

    GGML_ASSERT(logits->type == GGML_TYPE_F32 && logits->nb[0] == sizeof(float));
    GGML_ASSERT(ggml_is_matrix(logits));
    if (weight) {
        GGML_ASSERT(weight->type == GGML_TYPE_F32 && ggml_is_contiguous(weight) && ggml_is_vector(weight));
        GGML_ASSERT(weight->ne[0] == n_expert || weight->ne[0] == 1);
    }
    if (bias) {
        GGML_ASSERT(bias->type == GGML_TYPE_F32 && ggml_is_contiguous(bias) && ggml_is_vector(bias));
        GGML_ASSERT(bias->ne[0] == n_expert);
    }
    GGML_ASSERT((bias == NULL) == (bias_method == GGML_ROUTER_BIAS_NONE));

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_expert, logits->ne[1]);

    ggml_set_op_params_i32(result, 0, (int32_t) norm);
    ggml_set_op_params_i32(result, 1, (int32_t) bias_method);
    ggml_set_op_params_f32(result, 2, eps);
    ggml_set_op_params_f32(result, 3, norm_scale);
    ggml_set_op_params_f32(result, 4, scale);

    result->op     = GGML_OP_RELU_ROUTER;
    result->src[0] = logits;
    result->src[1] = weight;
    result->src[2] = bias;

    return result;
}

// ggml_union_ffn

struct ggml_tensor * ggml_union_ffn(struct ggml_context * ctx,
                                    struct ggml_tensor *  x,
                                    struct ggml_tensor *  up,
                                    struct ggml_tensor *  gate,
                                    struct ggml_tensor *  down,
                                    struct ggml_tensor *  scores,
                                    struct ggml_tensor *  act_mean,
                                    struct ggml_tensor *  act_norm,
                                    enum ggml_union_act   act,
                                    float                 eps) {
    const int64_t n_embd   = x->ne[0];
    const int64_t n_tokens = x->ne[1];
    const int64_t d        = up->ne[1];
    const int64_t n_expert = up->ne[2];

    GGML_ASSERT(x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && ggml_is_matrix(x));
    GGML_ASSERT(up->ne[0] == n_embd && up->ne[3] == 1 && ggml_is_contiguous(up));
    GGML_ASSERT(down->ne[0] == d && down->ne[1] == n_embd && down->ne[2] == n_expert && down->ne[3] == 1);
    GGML_ASSERT(ggml_is_contiguous(down));
    if (gate) {
        GGML_ASSERT(ggml_are_same_shape(gate, up) && ggml_is_contiguous(gate));
    }
    GGML_ASSERT(scores->type == GGML_TYPE_F32 && scores->nb[0] == sizeof(float) && ggml_is_matrix(scores));
    GGML_ASSERT(scores->ne[0] == n_expert && scores->ne[1] == n_tokens);
    GGML_ASSERT(act >= GGML_UNION_ACT_SILU && act <= GGML_UNION_ACT_NORM_SILU_NORMS);
    if (act_mean) {
        GGML_ASSERT(act == GGML_UNION_ACT_NORM_SILU || act == GGML_UNION_ACT_NORM_SILU_NORMS);
        GGML_ASSERT(act_mean->type == GGML_TYPE_F32 && ggml_is_contiguous(act_mean) &&
                    ggml_nelements(act_mean) == n_embd);
    }
    if (act_norm) {
        GGML_ASSERT(act == GGML_UNION_ACT_NORM_SILU || act == GGML_UNION_ACT_NORM_SILU_NOMEAN);
        GGML_ASSERT(act_norm->type == GGML_TYPE_F32 && ggml_is_contiguous(act_norm) && ggml_nelements(act_norm) == d);
    }

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_embd, n_tokens);

    ggml_set_op_params_i32(result, 0, (int32_t) act);
    ggml_set_op_params_f32(result, 1, eps);

    result->op     = GGML_OP_UNION_FFN;
    result->src[0] = x;
    result->src[1] = up;
    result->src[2] = gate;
    result->src[3] = down;
    result->src[4] = scores;
    result->src[5] = act_mean;
    result->src[6] = act_norm;

    return result;
}
