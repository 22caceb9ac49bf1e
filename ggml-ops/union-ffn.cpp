// Entry points of the union FFN op.
#include "union-ffn.h"

#include "union-ffn-op.h"

bool ggml_union_ffn_supported(const ggml_tensor * dst) {
    (void) dst;
    return true;
}

size_t ggml_union_ffn_work_size(const ggml_tensor * dst, int n_tasks) {
    return union_ref_scratch_size(union_op_get(dst)) * n_tasks;
}

void ggml_compute_forward_union_ffn(const ggml_compute_params * params, ggml_tensor * dst) {
    ggml_compute_forward_union_ffn_ref(params, dst);
}
