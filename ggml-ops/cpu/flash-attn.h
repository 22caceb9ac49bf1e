// Attention over the cache: FLASH_ATTN_EXT for all query rows that share a key/value head at once. See docs/kernels.md.
#pragma once

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// false, with nothing done, if this CPU or the node's types have no kernel of ours, or the node asks for ggml's own
bool ggml_compute_forward_flash_attn(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// the same for the bytes of scratch
bool ggml_flash_attn_work_size(struct ggml_tensor * dst, int n_tasks, size_t * size);

// a FLASH_ATTN_EXT node that ggml's own kernels shall compute, row by row of the query: op_params[5], which ggml leaves 0
static inline void ggml_flash_attn_set_row_by_row(struct ggml_tensor * dst) {
    dst->op_params[5] = 1;
}

#ifdef __cplusplus
}
#endif
