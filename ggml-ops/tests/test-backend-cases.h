// Cases of the two ops for test-backend-ops; included there after its own cases, see patches/0010-expert-ops.patch.
// The CPU is compared with its reference only if it is asked for: test-backend-ops -b CPU -o UNION_FFN
#pragma once

#include "ggml-expert-ops.h"

// GGML_OP_RELU_ROUTER
struct test_relu_router : public test_case {
    const int64_t          n_expert;
    const int64_t          n_tokens;
    const ggml_router_norm norm;
    const ggml_router_bias bias;
    const int64_t          n_weight;  // 0: no weight

    std::string vars() override { return VARS_TO_STR5(n_expert, n_tokens, norm, bias, n_weight); }

    test_relu_router(int64_t          n_expert,
                     int64_t          n_tokens,
                     ggml_router_norm norm,
                     ggml_router_bias bias,
                     int64_t          n_weight) :
        n_expert(n_expert),
        n_tokens(n_tokens),
        norm(norm),
        bias(bias),
        n_weight(n_weight) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * logits = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_expert, n_tokens);
        ggml_tensor * weight = n_weight ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_weight) : nullptr;
        ggml_tensor * b = bias != GGML_ROUTER_BIAS_NONE ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_expert) : nullptr;
        return ggml_relu_router(ctx, logits, weight, b, norm, bias, 1e-5f, 1.0f, 0.5f);
    }
};

// GGML_OP_UNION_FFN
struct test_union_ffn : public test_case {
    const ggml_type      type;
    const int64_t        n_embd;
    const int64_t        d;
    const int64_t        n_expert;
    const int64_t        n_tokens;
    const ggml_union_act act;
    const bool           gated;
    const float          active;  // share of the experts that a token needs

    std::string vars() override { return VARS_TO_STR8(type, n_embd, d, n_expert, n_tokens, act, gated, active); }

    // vec_dot, which the CPU without a kernel for the type uses, rounds activations to F16 and BF16 as well
    double max_nmse_err() override {
        return ggml_is_quantized(type) ? 5e-4 : type == GGML_TYPE_BF16 ? 1e-4 : type == GGML_TYPE_F16 ? 1e-5 : 1e-6;
    }

    uint64_t op_flops(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return (uint64_t) (2.0 * (gated ? 3 : 2) * n_embd * d * n_expert * n_tokens * active);
    }

    test_union_ffn(ggml_type      type,
                   int64_t        n_embd,
                   int64_t        d,
                   int64_t        n_expert,
                   int64_t        n_tokens,
                   ggml_union_act act    = GGML_UNION_ACT_SILU,
                   bool           gated  = false,
                   float          active = 0.2f) :
        type(type),
        n_embd(n_embd),
        d(d),
        n_expert(n_expert),
        n_tokens(n_tokens),
        act(act),
        gated(gated),
        active(active) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * x      = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_embd, n_tokens);
        ggml_tensor * up     = ggml_new_tensor_3d(ctx, type, n_embd, d, n_expert);
        ggml_tensor * gate   = gated ? ggml_new_tensor_3d(ctx, type, n_embd, d, n_expert) : nullptr;
        ggml_tensor * down   = ggml_new_tensor_3d(ctx, type, d, n_embd, n_expert);
        ggml_tensor * scores = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_expert, n_tokens);
        const bool    mean   = act == GGML_UNION_ACT_NORM_SILU || act == GGML_UNION_ACT_NORM_SILU_NORMS;
        const bool    norm   = act == GGML_UNION_ACT_NORM_SILU || act == GGML_UNION_ACT_NORM_SILU_NOMEAN;
        ggml_set_name(scores, "scores");
        return ggml_union_ffn(ctx, x, up, gate, down, scores,
                              mean ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_embd) : nullptr,
                              norm ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, d) : nullptr, act, 1e-5f);
    }

    void initialize_tensors(ggml_context * ctx) override {
        std::mt19937                          rng(42);
        std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            if (strcmp(t->name, "scores") != 0) {
                init_tensor_uniform(t);
                continue;
            }
            std::vector<float> values(ggml_nelements(t));
            for (float & v : values) {
                const float share = uniform(rng);
                v                 = share < active ? uniform(rng) - 0.3f : 0.0f;
            }
            ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
        }
    }
};

static void make_blockffn_cases_eval(std::vector<std::unique_ptr<test_case>> & cases) {
    for (int64_t n_expert : { 1, 7, 56, 102 }) {
        for (int norm = GGML_ROUTER_NORM_NONE; norm <= GGML_ROUTER_NORM_SUM; norm++) {
            for (int bias = GGML_ROUTER_BIAS_NONE; bias <= GGML_ROUTER_BIAS_RMS; bias++) {
                for (int64_t n_weight : { (int64_t) 0, (int64_t) 1, n_expert }) {
                    cases.emplace_back(
                        new test_relu_router(n_expert, 5, (ggml_router_norm) norm, (ggml_router_bias) bias, n_weight));
                }
            }
        }
    }
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,
                            GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL, GGML_TYPE_MXFP4 }) {
        for (int64_t n_tokens : { 1, 2, 5, 8, 33 }) {
            cases.emplace_back(new test_union_ffn(type, 256, 64, 7, n_tokens));
            cases.emplace_back(
                new test_union_ffn(type, 96, 32, 42, n_tokens, GGML_UNION_ACT_NORM_SILU, n_tokens % 2 == 0));
        }
    }
    for (int act = GGML_UNION_ACT_SILU; act <= GGML_UNION_ACT_NORM_SILU_NORMS; act++) {
        for (float active : { 0.1f, 1.0f }) {
            cases.emplace_back(
                new test_union_ffn(GGML_TYPE_Q8_0, 128, 96, 7, 9, (ggml_union_act) act, act % 2 == 1, active));
        }
    }
}

static void make_blockffn_cases_perf(std::vector<std::unique_ptr<test_case>> & cases) {
    for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_F16 }) {
        for (int64_t n_tokens : { 1, 8, 32, 512 }) {
            cases.emplace_back(new test_union_ffn(type, 1792, 128, 56, n_tokens));
            cases.emplace_back(new test_union_ffn(type, 1792, 64, 102, n_tokens, GGML_UNION_ACT_NORM_SILU));
        }
    }
    cases.emplace_back(new test_relu_router(56, 512, GGML_ROUTER_NORM_RMS, GGML_ROUTER_BIAS_NONE, 56));
}
