// The ReLU router: from router logits to scores. See ggml_relu_router() in ggml.h.
#pragma once

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;
struct ggml_tensor;

void ggml_compute_forward_relu_router(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// false if the node is not what ggml_relu_router() makes
bool ggml_relu_router_supported(const struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
