// Tile kernels for quantized types: one loop for all types and CPU families.
//
// Every lane of a vector belongs to a row, so no sum goes across lanes. 32 values of ROWS rows are unpacked to 8 vectors of
// bytes, each with 4 neighbouring values of every row (tile-types.h), and multiplied with all activation rows of the tile;
// the integer sums are exact. A family gives the vectors and dot_words(), and says how many rows it takes at once.
#pragma once

#include "tile-kernels.h"
#include "tile-types.h"

#include <numeric>

namespace tile_blocks {

constexpr int BLOCK_VALUES = 32;

// 32 values of an activation row
template <typename type> struct block_act {
    int8_t  q[BLOCK_VALUES];
    int32_t start[type::SCALES];  // where the integer sums begin: -OFFSET * sum of q
    float   d[1 + type::MIN];     // the scale and, if the type has a min, scale * sum of q
};

template <typename type> size_t block_act_size(const tile_weight &, int64_t k) {
    return tile_align(k / BLOCK_VALUES * sizeof(block_act<type>));
}

template <typename type>
void block_act_pack(const tile_weight &, int64_t, int64_t first, int64_t n, const float * x, float factor, void * act) {
    constexpr int     SPAN = BLOCK_VALUES / type::SCALES;
    block_act<type> * a    = (block_act<type> *) act + first / BLOCK_VALUES;
    for (int64_t i = 0; i < n; i += BLOCK_VALUES, a++) {
        const tile_scale scale = tile_scale_get(largest_magnitude(x + i, BLOCK_VALUES));
        const int32_t    sum   = quantize_block(x + i, scale.inverse, a->q);
        a->d[0]                = scale.d * factor;
        for (int s = 0; s < type::SCALES; s++) {
            const int32_t part = type::SCALES == 1 ? sum : std::accumulate(a->q + SPAN * s, a->q + SPAN * (s + 1), 0);
            a->start[s]        = -type::OFFSET * part;
        }
        if constexpr (type::MIN) {
            a->d[1] = a->d[0] * (float) sum;
        }
    }
}

// f(0), ..., f(N - 1), numbers as constants: GCC keeps an array that a loop reads in memory, too
template <int N, int I = 0, typename F> inline __attribute__((always_inline)) void repeat(F && f) {
    if constexpr (I < N) {
        f(std::integral_constant<int, I>());
        repeat<N, I + 1>(f);
    }
}

// sum[t] += 32 values of ROWS rows times block b of activation row t
template <typename type, int T>
inline __attribute__((always_inline)) void block_multiply(const ints                      w[8],
                                                          const floats *                  d,
                                                          floats                          min,
                                                          const block_act<type> * const * act,
                                                          int64_t                         b,
                                                          floats *                        sum) {
    constexpr int N    = 8 / type::SCALES;
    constexpr int PART = 4;  // more integer sums at once do not fit into the registers
    if constexpr (T > PART) {
        block_multiply<type, PART>(w, d, min, act, b, sum);
        block_multiply<type, T - PART>(w, d, min, act + PART, b, sum + PART);
        return;
    }
#pragma GCC unroll 2
    for (int s = 0; s < type::SCALES; s++) {
        ints sums[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            sums[t] = set_words(type::OFFSET ? act[t][b].start[s] : 0);
        }
        dot_words<type::LIMIT, N, T>(w + N * s, act, b, 4 * N * s, sums);
        repeat<T>([&](auto t) __attribute__((always_inline)) {
            sum[t] = multiply_add(to_floats(sums[t]), multiply(d[s], set_floats(act[t][b].d[0])), sum[t]);
        });
    }
    if constexpr (type::MIN) {
        repeat<T>([&](auto t) __attribute__((always_inline)) {
            sum[t] = multiply_add(min, set_floats(act[t][b].d[1]), sum[t]);
        });
    }
}

// n <= ROWS floats, in most cases all of them
inline floats load_rows(const float * p, int64_t n) {
    if (n == ROWS) {
        return load_floats(p);
    }
    float part[ROWS];
    memcpy(part, p, n * sizeof(float));
    return load_floats(part);
}

inline void store_rows(float * p, int64_t n, floats v) {
    if (n == ROWS) {
        store_floats(p, v);
        return;
    }
    float part[ROWS];
    store_floats(part, v);
    memcpy(p, part, n * sizeof(float));
}

// the blocks of fewer than ROWS rows, followed by copies of the last one
template <int BYTES> inline rows_at copy_blocks(const char * rows, size_t row_size, int64_t n, char * to) {
    for (int64_t r = 0; r < ROWS; r++) {
        memcpy(to + r * BYTES, rows + std::min(r, n - 1) * row_size, BYTES);
    }
    return { to, BYTES };
}

// block s of n <= ROWS rows
template <typename type>
inline rows_at block_rows(const char * rows, size_t row_size, int64_t n, int64_t s, char * copy) {
    constexpr int GROUP = group_rows(type::LAYOUT);
    if constexpr (GROUP > 1) {  // n is a multiple of it; a second group that is not there is the first one again
        return { rows + s * GROUP * type::BYTES, n > GROUP ? GROUP * row_size : 0 };
    } else if (n < ROWS) {
        return copy_blocks<type::BYTES>(rows + s * type::BYTES, row_size, n, copy);
    } else {
        return { rows + s * type::BYTES, row_size };
    }
}

template <typename type, int T>
void block_dot_tile(const tile_weight &  w,
                    const char *         rows,
                    int64_t              n_rows,
                    const void * const * act,
                    float * const *      acc,
                    const char *         next) {
    const block_act<type> * a[T];
    memcpy(a, act, sizeof(a));
    constexpr int64_t SOON = ROWS * type::BYTES / (type::SIZE / BLOCK_VALUES);  // bytes of 32 values of all rows
    char              copy[ROWS * type::BYTES];
    for (int64_t r = 0; r < n_rows; r += ROWS) {
        const int64_t n = std::min<int64_t>(ROWS, n_rows - r);
        floats        sum[T];
        repeat<T>([&](auto t) __attribute__((always_inline)) { sum[t] = load_rows(acc[t] + r, n); });
        const char * soon = next ? next + r * w.row_size : nullptr;
        for (int64_t s = 0; s < w.k / type::SIZE; s++) {
            type::unpack(block_rows<type>(rows + r * w.row_size, w.row_size, n, s, copy),
                         [&](int b, const ints * words, const floats * d, floats min) __attribute__((always_inline)) {
                             if (soon) {
                                 prefetch_to_l2(soon, SOON);
                                 soon += SOON;
                             }
                             block_multiply<type, T>(words, d, min, a, s * (type::SIZE / BLOCK_VALUES) + b, sum);
                         });
        }
        repeat<T>([&](auto t) __attribute__((always_inline)) { store_rows(acc[t] + r, n, sum[t]); });
    }
}

template <typename type>
void block_dot(const tile_weight &  w,
               const char *         rows,
               int64_t              n_rows,
               const void * const * act,
               int64_t              n_act,
               float * const *      acc,
               const char *         next) {
    with_tile<BLOCK_TILE>(
        n_act, [&](auto tile) { block_dot_tile<type, decltype(tile)::value>(w, rows, n_rows, act, acc, next); });
}

template <typename type> const tile_kernel * block_kernel() {
    static const tile_kernel kernel = {
        /* .rows      = */ ROWS,
        /* .lanes     = */ 1,
        /* .tile      = */ BLOCK_TILE,
        /* .ahead     = */ 0,
        /* .act_size  = */ block_act_size<type>,
        /* .act_pack  = */ block_act_pack<type>,
        /* .dot       = */ block_dot<type>,
        /* .reduce    = */ tile_copy_lanes,
        /* .mul_mat   = */ true,
        /* .act_block = */ BLOCK_VALUES,
        /* .ahead_rows = */ ROWS,
    };
    return &kernel;
}

}  // namespace tile_blocks
