// The ReLU router: from router logits to scores. See ggml_relu_router() in ggml.h.
#pragma once

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// What the router leaves out, beyond the experts that are not active:
//   threshold: for each token the experts whose |score| is below threshold times its largest, 0 <= threshold < 1
//   budget   : all but the `budget` experts with the largest sum of |score| over the tokens; 0: none
// Both give exact zeros; the threshold comes first. Tokens stay independent of each other without a budget.
static inline void ggml_relu_router_set_dial(struct ggml_tensor * dst, float threshold, int32_t budget) {
    GGML_ASSERT(dst->op == GGML_OP_RELU_ROUTER && threshold >= 0.0f && threshold < 1.0f && budget >= 0);
    memcpy(&dst->op_params[5], &threshold, sizeof(threshold));
    dst->op_params[6] = budget;
}

void ggml_compute_forward_relu_router(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// bytes of scratch
size_t ggml_relu_router_work_size(const struct ggml_tensor * dst);

// false if the node is not what ggml_relu_router() makes
bool ggml_relu_router_supported(const struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
