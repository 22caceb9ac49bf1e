// The choice among the x86 kernels of the union FFN.
#include "tile-x86.h"

#if UNION_AVX2

const union_kernel * union_kernel_x86(ggml_type type, int64_t group, int64_t inter, int64_t, int64_t n_rows) {
    if (const union_kernel * kernel = union_kernel_x86_q4(type, group, inter, n_rows)) {
        return kernel;
    }
    if (const union_kernel * kernel = union_kernel_x86_q8(type, group, n_rows)) {
        return kernel;
    }
    if (const union_kernel * kernel = union_kernel_x86_q6(type, group)) {
        return kernel;
    }
    return union_kernel_x86_float(type, group);
}

#else

const union_kernel * union_kernel_x86(ggml_type, int64_t, int64_t, int64_t, int64_t) {
    return nullptr;
}

#endif
