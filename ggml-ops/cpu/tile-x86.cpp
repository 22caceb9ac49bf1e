// The choice among the x86 kernels.
#include "tile-x86.h"

#if TILE_AVX2

const tile_kernel * tile_kernel_x86(ggml_type type, int64_t group, int64_t inter, int64_t n_rows) {
    if (const tile_kernel * kernel = tile_kernel_x86_q4(type, group, inter, n_rows)) {
        return kernel;
    }
    const tile_layout layout = tile_layout_get(group, inter, n_rows);
    if (const tile_kernel * kernel = tile_kernel_blocks_32(type, layout)) {
        return kernel;
    }
    if (const tile_kernel * kernel = tile_kernel_blocks_256(type, layout)) {
        return kernel;
    }
    return tile_kernel_x86_float(type, group);
}

#else

const tile_kernel * tile_kernel_x86(ggml_type, int64_t, int64_t, int64_t) {
    return nullptr;
}

#endif
