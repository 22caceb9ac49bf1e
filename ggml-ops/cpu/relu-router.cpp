// ReLU router, one token at a time: active set, norm, weight, and what the dial leaves of them. Plain loops over at most a
// few hundred experts, so the same code serves as the reference.
#include "relu-router.h"

#include "ggml-cpu-impl.h"
#include "ggml-expert-ops.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

namespace {

struct router_params {
    ggml_router_norm norm;
    ggml_router_bias bias_method;
    float            eps;
    float            norm_scale;
    float            scale;
    float            threshold;  // 0: every active expert stays
    int32_t          budget;     // 0: no bound on the union
};

router_params router_params_get(const ggml_tensor * dst) {
    return {
        (ggml_router_norm) ggml_get_op_params_i32(dst, 0),
        (ggml_router_bias) ggml_get_op_params_i32(dst, 1),
        ggml_get_op_params_f32(dst, 2),
        ggml_get_op_params_f32(dst, 3),
        ggml_get_op_params_f32(dst, 4),
        ggml_get_op_params_f32(dst, 5),
        ggml_get_op_params_i32(dst, 6),
    };
}

double mean_of_squares(const float * x, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) {
        sum += (double) x[i] * x[i];
    }
    return sum / (double) n;
}

// a[e] = relu(logit[e]) for the active experts, 0 elsewhere; a NaN logit is not active
void router_activate(const router_params & p, int64_t n_expert, const float * logits, const float * bias, float * a) {
    const float bias_scale =
        p.bias_method == GGML_ROUTER_BIAS_RMS ? (float) std::sqrt(mean_of_squares(logits, n_expert)) : 1.0f;
    for (int64_t e = 0; e < n_expert; e++) {
        const bool active = logits[e] > 0.0f && (!bias || logits[e] + bias[e] * bias_scale > 0.0f);
        a[e]              = active ? logits[e] : 0.0f;
    }
}

float router_norm_factor(const router_params & p, int64_t n_expert, const float * a) {
    switch (p.norm) {
        case GGML_ROUTER_NORM_NONE:
            return 1.0f;
        case GGML_ROUTER_NORM_RMS:
            return (float) (1.0 / std::sqrt(mean_of_squares(a, n_expert) + p.eps));
        case GGML_ROUTER_NORM_SUM:
            {
                double sum = 0.0;
                for (int64_t e = 0; e < n_expert; e++) {
                    sum += a[e];
                }
                return (float) (1.0 / (sum * p.norm_scale + 1e-5));
            }
    }
    GGML_ABORT("unknown ggml_router_norm %d", (int) p.norm);
}

// zeros where |s| is below `threshold` times the largest of the row; a NaN stays, and sets no bound for the others
void router_apply_threshold(float threshold, int64_t n_expert, float * s) {
    float largest = 0.0f;
    for (int64_t e = 0; e < n_expert; e++) {
        largest = std::max(largest, std::fabs(s[e]));
    }
    for (int64_t e = 0; e < n_expert; e++) {
        if (std::fabs(s[e]) < threshold * largest) {
            s[e] = 0.0f;
        }
    }
}

// what the budget needs in the work buffer
struct budget_scratch {
    float *   sum;    // [n_expert] |s| over the tokens; a NaN counts as infinity, so that it stays to be seen
    int32_t * order;  // [n_expert] experts, the largest sum first, the lower index first among equals
};

// zeros in all columns but those of the `budget` experts with the largest sums
void router_apply_budget(int32_t budget, ggml_tensor * dst, const budget_scratch & scratch) {
    const int64_t n_expert = dst->ne[0];
    const auto    row      = [dst](int64_t t) {
        return (float *) ((char *) dst->data + t * dst->nb[1]);
    };
    for (int64_t e = 0; e < n_expert; e++) {
        double sum = 0.0;
        for (int64_t t = 0; t < dst->ne[1]; t++) {
            sum += std::fabs(row(t)[e]);
        }
        scratch.sum[e]   = std::isnan(sum) ? INFINITY : (float) sum;
        scratch.order[e] = (int32_t) e;
    }
    const float * sum = scratch.sum;
    std::sort(scratch.order, scratch.order + n_expert,
              [sum](int32_t a, int32_t b) { return sum[a] != sum[b] ? sum[a] > sum[b] : a < b; });
    for (int64_t i = budget; i < n_expert; i++) {
        for (int64_t t = 0; t < dst->ne[1]; t++) {
            row(t)[scratch.order[i]] = 0.0f;
        }
    }
}

bool is_vector(const ggml_tensor * t, int64_t n) {
    return t->type == GGML_TYPE_F32 && ggml_is_contiguous(t) && ggml_is_vector(t) && t->ne[0] == n;
}

}  // namespace

bool ggml_relu_router_supported(const ggml_tensor * dst) {
    const ggml_tensor * logits    = dst->src[0];
    const ggml_tensor * weight    = dst->src[1];
    const ggml_tensor * bias      = dst->src[2];
    const int32_t       norm      = ggml_get_op_params_i32(dst, 0);
    const int32_t       method    = ggml_get_op_params_i32(dst, 1);
    const float         threshold = ggml_get_op_params_f32(dst, 5);
    return logits && logits->type == GGML_TYPE_F32 && logits->nb[0] == sizeof(float) && ggml_is_matrix(logits) &&
           dst->type == GGML_TYPE_F32 && ggml_is_contiguous(dst) && ggml_are_same_shape(dst, logits) &&
           (!weight || is_vector(weight, 1) || is_vector(weight, dst->ne[0])) &&
           (!bias || is_vector(bias, dst->ne[0])) && norm >= GGML_ROUTER_NORM_NONE && norm <= GGML_ROUTER_NORM_SUM &&
           method >= GGML_ROUTER_BIAS_NONE && method <= GGML_ROUTER_BIAS_RMS &&
           (bias == nullptr) == (method == GGML_ROUTER_BIAS_NONE) && threshold >= 0.0f && threshold < 1.0f &&
           ggml_get_op_params_i32(dst, 6) >= 0;
}

size_t ggml_relu_router_work_size(const ggml_tensor * dst) {
    return ggml_get_op_params_i32(dst, 6) > 0 ? dst->ne[0] * (sizeof(float) + sizeof(int32_t)) : 0;
}

void ggml_compute_forward_relu_router(const ggml_compute_params * params, ggml_tensor * dst) {
    GGML_ASSERT(ggml_relu_router_supported(dst));
    const ggml_tensor * logits = dst->src[0];  // [n_expert, n_tokens]
    const ggml_tensor * weight = dst->src[1];  // [n_expert] or [1] or NULL
    const ggml_tensor * bias   = dst->src[2];  // [n_expert] or NULL

    const router_params p        = router_params_get(dst);
    const int64_t       n_expert = dst->ne[0];
    const float *       w        = weight ? (const float *) weight->data : nullptr;
    const int64_t       w_step   = weight && weight->ne[0] == n_expert ? 1 : 0;

    for (int64_t t = params->ith; t < dst->ne[1]; t += params->nth) {
        const float * r = (const float *) ((const char *) logits->data + t * logits->nb[1]);
        float *       s = (float *) ((char *) dst->data + t * dst->nb[1]);

        router_activate(p, n_expert, r, bias ? (const float *) bias->data : nullptr, s);
        // without an active expert the row is zeros already, and "none" with eps 0 would give 0 * inf
        const float factor = router_norm_factor(p, n_expert, s) * p.scale;
        for (int64_t e = 0; e < n_expert; e++) {
            if (s[e] == 0.0f) {
                continue;
            }
            const float v = s[e] * factor * (w ? w[e * w_step] : 1.0f);
            s[e]          = std::fabs(v) < FLT_MIN ? std::copysign(FLT_MIN, v) : v;
        }
        if (p.threshold > 0.0f) {
            router_apply_threshold(p.threshold, n_expert, s);
        }
    }
    if (p.budget > 0 && p.budget < n_expert) {
        ggml_barrier(params->threadpool);
        if (params->ith == 0) {
            float * sum = (float *) params->wdata;
            router_apply_budget(p.budget, dst, { sum, (int32_t *) (sum + n_expert) });
        }
    }
}
