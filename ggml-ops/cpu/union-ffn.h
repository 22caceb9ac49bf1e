// Sparse FFN over the union of the experts that a batch needs. See ggml_union_ffn() in ggml.h and docs/kernels.md.
#pragma once

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;
struct ggml_tensor;

void ggml_compute_forward_union_ffn(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// plain scalar reference, one token after another; needs plain rows (no packed buffers)
void ggml_compute_forward_union_ffn_ref(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// bytes of scratch that the op needs with n_tasks threads, whichever experts turn out to be active
size_t ggml_union_ffn_work_size(const struct ggml_tensor * dst, int n_tasks);

// false if a weight has a type or a layout that no kernel reads
bool ggml_union_ffn_supported(const struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
