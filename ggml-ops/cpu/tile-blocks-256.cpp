// Tile kernels for the types with blocks of 256 values.
#include "tile-vec-avx2.h"
#include "tile-vec-avx512.h"
#include "tile-vec-neon.h"

#if TILE_AVX2 || TILE_NEON

#    include "tile-blocks.h"

using namespace tile_blocks;

const tile_kernel * tile_kernel_blocks_256(ggml_type type, tile_layout layout) {
    if (type == GGML_TYPE_Q4_K && layout == ROWS_8X8) {
        return block_kernel<q4_K_type<ROWS_8X8>>();
    }
#    if TILE_NEON
    if (type == GGML_TYPE_Q4_K && layout == ROWS_8X4) {
        return block_kernel<q4_K_type<ROWS_8X4>>();
    }
#    endif
    if (layout != ROWS_PLAIN) {
        return nullptr;
    }
    switch (type) {
        case GGML_TYPE_Q4_K:
            return block_kernel<q4_K_type<ROWS_PLAIN>>();
        case GGML_TYPE_Q5_K:
            return block_kernel<q5_K_type>();
        case GGML_TYPE_Q6_K:
            return block_kernel<q6_K_type>();
        case GGML_TYPE_IQ4_XS:
            return block_kernel<iq4_xs_type>();
        default:
            return nullptr;
    }
}

#endif
