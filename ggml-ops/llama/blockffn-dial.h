#pragma once

// What a router leaves out at run time, beyond the experts that are not active: the C API.
//
// The threshold skips, for every token, the experts whose |score| is below threshold times the token's largest. It keeps
// a token's result independent of the other tokens of the batch. A file can say it (key blockffn.router.threshold, or
// --override-kv blockffn.router.threshold=float:T), and a context can say otherwise.
//
// The union budget keeps, in each layer, the experts with the largest sum of |score| over the tokens of a batch
// (micro-batch) of two tokens or more. A token's result then depends on the batch, so exact mode refuses it.

#include "llama.h"

#define BLOCKFFN_THRESHOLD_RANGE "a number from 0 to less than 1"

#ifdef __cplusplus
extern "C" {
#endif

// From the next llama_decode on; negative: as the file says. Returns false, with nothing changed and the reason in the
// log, for a number outside the range and for a model without routed experts.
LLAMA_API bool blockffn_set_router_threshold(struct llama_context * ctx, float threshold);

// the threshold in force
LLAMA_API float blockffn_router_threshold(const struct llama_context * ctx);

// From the next llama_decode on; 0: no bound. Returns false, with nothing changed and the reason in the log, for a negative
// number, for a model without routed experts, and in a context whose results must not depend on the batch
// (llama_set_batch_invariant).
LLAMA_API bool blockffn_set_union_budget(struct llama_context * ctx, int32_t n_experts);

#ifdef __cplusplus
}

// also false for a NaN
inline bool blockffn_threshold_is_valid(float threshold) {
    return threshold >= 0.0f && threshold < 1.0f;
}
#endif
