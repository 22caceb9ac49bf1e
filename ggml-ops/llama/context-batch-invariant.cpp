// llama_set_batch_invariant(): see patches/0030-batch-invariance.patch.

#include "ggml-cpu.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

// only the CPU backend has this mode: any other one, or a buffer type of its own kernels, may take any product
bool llama_context::set_batch_invariant(bool value) {
    auto * reg    = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend_cpu));
    auto * set_fn = (decltype(ggml_backend_cpu_set_batch_invariant) *) ggml_backend_reg_get_proc_address(
        reg, "ggml_backend_cpu_set_batch_invariant");
    auto * is_fn = (decltype(ggml_backend_cpu_buft_is_batch_invariant) *) ggml_backend_reg_get_proc_address(
        reg, "ggml_backend_cpu_buft_is_batch_invariant");
    if (!set_fn || !is_fn) {
        LLAMA_LOG_ERROR("%s: the CPU backend has no batch-invariant mode\n", __func__);
        return !value;
    }
    if (value && cparams.union_budget > 0) {
        LLAMA_LOG_ERROR("%s: a union budget (%d experts) makes results depend on the batch\n", __func__,
                        cparams.union_budget);
        return false;
    }
    if (value) {
        for (const auto & backend : backends) {
            if (backend.get() != backend_cpu) {
                LLAMA_LOG_ERROR("%s: results of backend %s may depend on the batch\n", __func__,
                                ggml_backend_name(backend.get()));
                return false;
            }
        }
        for (const auto & [buft, size] : model.memory_breakdown()) {
            if (!is_fn(buft)) {
                LLAMA_LOG_ERROR("%s: results from weights in %s may depend on the batch\n", __func__,
                                ggml_backend_buft_name(buft));
                return false;
            }
        }
    }
    if (!set_fn(backend_cpu, value)) {
        LLAMA_LOG_ERROR("%s: this build of the CPU backend has kernels whose results may depend on the batch\n",
                        __func__);
        return false;
    }
    cparams.batch_invariant = value;
    return true;
}
