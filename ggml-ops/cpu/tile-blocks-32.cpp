// Tile kernels for the types with blocks of 32 values.
#include "tile-vec-avx2.h"
#include "tile-vec-avx512.h"
#include "tile-vec-neon.h"

#if TILE_AVX2 || TILE_NEON

#    include "tile-blocks.h"

using namespace tile_blocks;

namespace {

// types whose packed groups differ with the CPU
template <template <tile_layout> class type> const tile_kernel * kernel_for(tile_layout layout) {
    switch (layout) {
        case ROWS_PLAIN:
            return block_kernel<type<ROWS_PLAIN>>();
#    if TILE_NEON
        case ROWS_4X4:
            return block_kernel<type<ROWS_4X4>>();
        case ROWS_4X8:
            return block_kernel<type<ROWS_4X8>>();
#    else
        case ROWS_8X8:
            return block_kernel<type<ROWS_8X8>>();
#    endif
        default:
            return nullptr;
    }
}

}  // namespace

const tile_kernel * tile_kernel_blocks_32(ggml_type type, tile_layout layout) {
    switch (type) {
        case GGML_TYPE_Q8_0:
            return kernel_for<q8_0_type>(layout);
        case GGML_TYPE_IQ4_NL:
            return kernel_for<iq4_nl_type>(layout);
        case GGML_TYPE_MXFP4:
            return kernel_for<mxfp4_type>(layout);
        default:
            break;
    }
    if (layout != ROWS_PLAIN) {
        return nullptr;
    }
    switch (type) {
        case GGML_TYPE_Q4_0:
            return block_kernel<q4_0_type>();
        case GGML_TYPE_Q4_1:
            return block_kernel<q4_1_type>();
        case GGML_TYPE_Q5_0:
            return block_kernel<q5_0_type>();
        case GGML_TYPE_Q5_1:
            return block_kernel<q5_1_type>();
        default:
            return nullptr;
    }
}

#endif
