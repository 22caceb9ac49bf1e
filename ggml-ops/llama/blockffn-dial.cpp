#include "blockffn-dial.h"

#include "blockffn-model.h"
#include "blockffn-stats.h"
#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>

static bool has_router(const llama_context * ctx, const char * caller) {
    if (blockffn_has_relu_router(&ctx->get_model())) {
        return true;
    }
    LLAMA_LOG_ERROR("%s: no layer of this model has ReLU-routed experts\n", caller);
    return false;
}

bool blockffn_set_router_threshold(llama_context * ctx, float threshold) {
    if (!(threshold < 0.0f) && !blockffn_threshold_is_valid(threshold)) {
        LLAMA_LOG_ERROR("%s: expected " BLOCKFFN_THRESHOLD_RANGE "; found %g\n", __func__, threshold);
        return false;
    }
    if (threshold > 0.0f && !has_router(ctx, __func__)) {
        return false;
    }
    ctx->set_router_threshold(threshold);
    return true;
}

float blockffn_router_threshold(const llama_context * ctx) {
    const float set = ctx->get_cparams().router_threshold;
    if (set >= 0.0f || !blockffn_has_relu_router(&ctx->get_model())) {
        return std::max(set, 0.0f);
    }
    return static_cast<const llama_model_blockffn &>(ctx->get_model()).blockffn.router_threshold;
}

bool blockffn_set_union_budget(llama_context * ctx, int32_t n_experts) {
    if (n_experts < 0) {
        LLAMA_LOG_ERROR("%s: expected a number of experts, or 0 for no bound; found %d\n", __func__, n_experts);
        return false;
    }
    return (n_experts == 0 || has_router(ctx, __func__)) && ctx->set_union_budget(n_experts);
}

// both only change parameters of nodes, or add a few small ones: nothing to reserve
void llama_context::set_router_threshold(float value) {
    cparams.router_threshold = value;
}

bool llama_context::set_union_budget(int32_t value) {
    if (value > 0 && cparams.batch_invariant) {
        LLAMA_LOG_ERROR(
            "%s: a union budget (%d experts) makes results depend on the batch, which exact mode rules out\n", __func__,
            value);
        return false;
    }
    cparams.union_budget = value;
    return true;
}
