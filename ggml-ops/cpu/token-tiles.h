// Matrix products for a few tokens: MUL_MAT with GGML_HINT_TOKEN_TILES. See docs/kernels.md.
#pragma once

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;
struct ggml_tensor;

// false, with nothing done, if the node does not ask for it or no kernel of ours is better than ggml's
bool ggml_compute_forward_token_tiles(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// bytes of scratch that it needs, 0 if it does nothing
size_t ggml_token_tiles_work_size(const struct ggml_tensor * dst, int n_tasks);

#ifdef __cplusplus
}
#endif
