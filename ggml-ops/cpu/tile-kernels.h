// Kernels for tiles of tokens: how rows of a weight are multiplied with a few activation rows at once. The union FFN and
// MUL_MAT (token-tiles.cpp) are made of them.
//
// An activation row is packed once, in the format of the kernel that will read it, with a factor (the router score of
// the pair) folded into its scales. Every kernel keeps two promises, from which the batch invariance of the ops follows:
// the sums of one (row, activation) pair are formed in an order that depends on nothing but k, and accumulators of
// different pairs never mix.
#pragma once

#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

constexpr int64_t MAX_TILE = 8;  // of any kernel

// how rows lie: one after the other, or in groups of CPU_REPACK (rows of a group x bytes of a row that lie together)
enum tile_layout { ROWS_PLAIN, ROWS_4X4, ROWS_4X8, ROWS_8X4, ROWS_8X8, ROWS_OTHER };

struct tile_weight;

struct tile_kernel {
    int64_t rows;   // rows come in groups of this many
    int64_t lanes;  // partial sums per row
    int64_t tile;   // most activation rows per call
    int64_t ahead;  // bytes to ask for ahead of its reads of long rows; 0: it does that itself

    // bytes of an activation row of k values
    size_t (*act_size)(const tile_weight & w, int64_t k);

    // pack values [first, first + n) of an activation row of k values, times factor; first and n are multiples of
    // w.act_block
    void (*act_pack)(const tile_weight & w,
                     int64_t             k,
                     int64_t             first,
                     int64_t             n,
                     const float *       x,
                     float               factor,
                     void *              act);

    // acc[t][row*lanes + lane] += partial sums of n_rows consecutive rows starting at `rows` with act[t], t < n_act <= tile;
    // memory at `next`, as long as the rows, will be wanted soon (may be NULL): a kernel prefetches it as it goes along
    void (*dot)(const tile_weight &  w,
                const char *         rows,
                int64_t              n_rows,
                const void * const * act,
                int64_t              n_act,
                float * const *      acc,
                const char *         next);

    // out[row] = sum of the row's lanes
    void (*reduce)(int64_t n_rows, const float * acc, float * out);

    // whether MUL_MAT may take it without being asked for its invariance: measured to be faster than what it does otherwise
    bool mul_mat;

    int64_t act_block;   // values that are packed together; 0: a block of the format of the activation row
    int64_t ahead_rows;  // as ahead, in rows
};

typedef void (*tile_gemv_t)(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc);

// a weight [k, n_rows, n_expert] and the kernel that reads it
struct tile_weight {
    const char *        data;
    int64_t             k;
    int64_t             n_rows;
    size_t              row_size;     // bytes
    size_t              expert_size;  // bytes
    int64_t             act_block;    // values that are packed together
    bool                packed;       // rows lie in groups, as in CPU_REPACK
    const tile_kernel * kernel;
    // of the general kernels only
    ggml_type           act_type;
    ggml_vec_dot_t      vec_dot;
    ggml_from_float_t   from_float;
    tile_gemv_t         gemv;
};

// false if no kernel reads the type or layout of t
bool tile_weight_get(const ggml_tensor * t, tile_weight * w);

inline tile_layout tile_layout_get(int64_t group, int64_t inter, int64_t n_rows) {
    if (group == 1) {
        return ROWS_PLAIN;
    }
    if (n_rows % group != 0 || (inter != 4 && inter != 8) || (group != 4 && group != 8)) {
        return ROWS_OTHER;
    }
    return group == 4 ? (inter == 4 ? ROWS_4X4 : ROWS_4X8) : (inter == 4 ? ROWS_8X4 : ROWS_8X8);
}

// kernels of a CPU family: NULL means "not handled here", and the general kernel takes over
const tile_kernel * tile_kernel_x86(ggml_type type, int64_t group, int64_t inter, int64_t n_rows);
const tile_kernel * tile_kernel_arm(ggml_type type, int64_t group, int64_t inter, int64_t n_rows);

// the same, from tile-blocks-*.cpp
const tile_kernel * tile_kernel_blocks_32(ggml_type type, tile_layout layout);
const tile_kernel * tile_kernel_blocks_256(ggml_type type, tile_layout layout);

// dot(N) with n as the constant N, 1 <= n <= MAX: how a kernel reaches its code for a tile of n activation rows
template <int MAX, typename F> inline void with_tile(int64_t n, F && dot) {
    if constexpr (MAX == 0) {
        GGML_ABORT("tile of %d activation rows", (int) n);
    } else if (n == MAX) {
        dot(std::integral_constant<int, MAX>());
    } else {
        with_tile<MAX - 1>(n, dot);
    }
}

// The scale of values of at most `max` in magnitude that become 8-bit integers, and its inverse. Integers cannot say NaN or
// Inf: a block that has one gets zeros and the scale NaN, so that every sum with it is NaN.
struct tile_scale {
    float d, inverse;
};

inline tile_scale tile_scale_get(float max) {
    if (!(max <= FLT_MAX)) {
        return { NAN, 0.0f };
    }
    return max < 1e-36f ? tile_scale{ 0.0f, 0.0f } :  // 127 / max would be Inf
                          tile_scale{ max / 127.0f, 127.0f / max };
}

// a matrix of floats whose rows may lie apart
inline const float * tile_row(const ggml_tensor * t, int64_t row) {
    return (const float *) ((const char *) t->data + row * t->nb[1]);
}

inline size_t tile_align(size_t size) {
    return GGML_PAD(size, 64);
}

// reduce() of the kernels with one lane
inline void tile_copy_lanes(int64_t n_rows, const float * acc, float * out) {
    std::copy(acc, acc + n_rows, out);
}

// tokens are dealt to tiles of nearly equal size, so that none is left with a single token
inline int64_t next_tile(int64_t left, int64_t tile) {
    const int64_t tiles = (left + tile - 1) / tile;
    return (left + tiles - 1) / tiles;
}

// what a kernel shall prefetch while it reads long rows at `rows`
inline const char * tile_ahead(const tile_weight & w, const char * rows) {
    const size_t ahead = w.kernel->ahead + w.kernel->ahead_rows * w.row_size;
    return ahead > 0 ? rows + ahead : nullptr;
}

// z[t*stride + row] = n_rows rows starting at `rows` times act[t], t < n_act <= tile. lanes: scratch for the sums of all;
// next: as in dot()
inline void tile_multiply_rows(const tile_weight &  w,
                               const char *         rows,
                               int64_t              n_rows,
                               const void * const * act,
                               int64_t              n_act,
                               float *              lanes,
                               float *              z,
                               int64_t              stride,
                               const char *         next) {
    const int64_t step          = n_rows * w.kernel->lanes;
    float *       acc[MAX_TILE] = {};
    for (int64_t t = 0; t < n_act; t++) {
        acc[t] = lanes + t * step;
    }
    memset(lanes, 0, n_act * step * sizeof(float));
    w.kernel->dot(w, rows, n_rows, act, n_act, acc, next);
    for (int64_t t = 0; t < n_act; t++) {
        w.kernel->reduce(n_rows, acc[t], z + t * stride);
    }
}
