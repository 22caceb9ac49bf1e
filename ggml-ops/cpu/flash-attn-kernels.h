// Small matrix products of the attention kernel: a few rows of queries times the keys of a tile, and their weights times
// its values, in float registers. Keys and values are F32, F16 or BF16 rows, widened on load.
//
// The sum of one (row, key) pair runs over the lanes of one register along the head, that of one (row, column) pair over
// the keys in ascending order: neither depends on how many rows or keys a call takes.
#pragma once

#include "flash-attn-vec.h"

#if FLASH_VEC

#    include <algorithm>
#    include <type_traits>

constexpr int64_t TILE = 128;  // keys that stay in the caches while the rows go by

// the keys or values of a tile, which may lie anywhere
struct flash_rows {
    const char * row[TILE];
    ggml_type    type;  // F32, F16 or BF16
};

// The blocks are not inlined: beside others some lose registers.
#    define FLASH_BLOCK static __attribute__((noinline))

inline bool flash_readable(ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}

// f(const T *) with the element type of `rows`
template <typename F> inline void flash_with_type(ggml_type type, F && f) {
    switch (type) {
        case GGML_TYPE_F16:
            return f((const ggml_fp16_t *) nullptr);
        case GGML_TYPE_BF16:
            return f((const ggml_bf16_t *) nullptr);
        default:
            return f((const float *) nullptr);
    }
}

// f(N) with n as the constant N, 1 <= n <= MAX
template <int MAX, typename F> inline void flash_with_rows(int64_t n, F && f) {
    if constexpr (MAX > 1) {
        if (n < MAX) {
            return flash_with_rows<MAX - 1>(n, f);
        }
    }
    f(std::integral_constant<int, MAX>());
}

// rows are dealt to blocks of nearly equal size: one that is left alone would wait for its own sums
inline int64_t flash_block_size(int64_t left, int64_t most) {
    const int64_t blocks = (left + most - 1) / most;
    return (left + blocks - 1) / blocks;
}

// blocks that fit into the registers: rows times 4 keys, rows times COLUMNS vectors, up to 3 rows times WIDE_COLUMNS
#    if defined(__AVX512F__) || defined(__aarch64__)
constexpr int SCORE_ROWS   = 6;
constexpr int VALUE_ROWS   = 8;
constexpr int COLUMNS      = 2;
constexpr int WIDE_COLUMNS = 8;
#    else
constexpr int SCORE_ROWS   = 3;
constexpr int VALUE_ROWS   = 6;
constexpr int COLUMNS      = 2;
constexpr int WIDE_COLUMNS = 4;
#    endif
constexpr int SCORE_KEYS = 8;  // a multiple of every step over the keys

// s[r][first + j] = q[r] * key first + j, j < J, over d values; keys from n_keys on repeat the last one
template <typename T, int R, int J>
FLASH_BLOCK void flash_scores_block(const float * const * q,
                                    const flash_rows &    keys,
                                    int64_t               first,
                                    int64_t               n_keys,
                                    int64_t               d,
                                    float * const *       s) {
    const int64_t left = n_keys - first;
    const T *     k[J];
#    pragma GCC   unroll 8
    for (int j = 0; j < J; j++) {
        k[j] = (const T *) keys.row[first + (left >= J ? j : std::min<int64_t>(j, left - 1))];
    }
    fvec        sum[R][J];
#    pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#    pragma GCC unroll 8
        for (int j = 0; j < J; j++) {
            sum[r][j] = fvec_set(0.0f);
        }
    }
    for (int64_t i = 0; i < d; i += FVEC) {
        fvec x[R];
#    pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            x[r] = fvec_load(q[r] + i);
        }
#    pragma GCC unroll 8
        for (int j = 0; j < J; j++) {
            const fvec y = fvec_load(k[j] + i);
#    pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                sum[r][j] = fvec_fma(x[r], y, sum[r][j]);
            }
        }
    }
#    pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#    pragma GCC unroll 8
        for (int j = 0; j < J; j += 4) {
            fvec_sum4(&sum[r][j], s[r] + first + j);
        }
    }
}

// scores of n_rows <= SCORE_ROWS rows and the keys [first, end) of a tile; first is a multiple of SCORE_KEYS
template <typename T>
inline void flash_scores(const float * const * q,
                         int64_t               n_rows,
                         const flash_rows &    keys,
                         int64_t               first,
                         int64_t               end,
                         int64_t               d,
                         float * const *       s) {
    flash_with_rows<SCORE_ROWS>(n_rows, [&](auto rows) {
        constexpr int R = decltype(rows)::value;
        constexpr int J = R == 1 ? 8 : 4;
        for (int64_t j = first; j < end; j += J) {
            flash_scores_block<T, R, J>(q, keys, j, end, d, s);
        }
    });
}

// o[r][0 .. C vectors) += sum over the keys [first, end) of p[r][key] * v[key]
template <typename T, int R, int C>
FLASH_BLOCK void flash_values_block(const float * const * p,
                                    const flash_rows &    values,
                                    int64_t               first,
                                    int64_t               end,
                                    float * const *       o,
                                    int64_t               column) {
    fvec        sum[R][C];
#    pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#    pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            sum[r][c] = fvec_load(o[r] + column + c * FVEC);
        }
    }
    for (int64_t j = first; j < end; j++) {
        const T * y = (const T *) values.row[j] + column;
        if constexpr (R <= C) {
            fvec x[R];
#    pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                x[r] = fvec_set(p[r][j]);
            }
#    pragma GCC unroll 8
            for (int c = 0; c < C; c++) {
                const fvec w = fvec_load(y + c * FVEC);
#    pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    sum[r][c] = fvec_fma(x[r], w, sum[r][c]);
                }
            }
        } else {
            fvec w[C];
#    pragma GCC unroll 8
            for (int c = 0; c < C; c++) {
                w[c] = fvec_load(y + c * FVEC);
            }
#    pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const fvec x = fvec_set(p[r][j]);
#    pragma GCC unroll 8
                for (int c = 0; c < C; c++) {
                    sum[r][c] = fvec_fma(x, w[c], sum[r][c]);
                }
            }
        }
    }
#    pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#    pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            fvec_store(o[r] + column + c * FVEC, sum[r][c]);
        }
    }
}

// columns [column, d) of the blocks of at most C vectors
template <typename T, int R, int C>
inline void flash_values_columns(const float * const * p,
                                 const flash_rows &    values,
                                 int64_t               first,
                                 int64_t               end,
                                 float * const *       o,
                                 int64_t               column,
                                 int64_t               d) {
    for (; column + C * FVEC <= d; column += C * FVEC) {
        flash_values_block<T, R, C>(p, values, first, end, o, column);
    }
    if constexpr (C > 1) {
        flash_values_columns<T, R, C / 2>(p, values, first, end, o, column, d);
    }
}

// o[r] += sum over the keys [first, end) of p[r][key] * value key, r < n_rows <= VALUE_ROWS, for the columns [column, d)
template <typename T>
inline void flash_values(const float * const * p,
                         int64_t               n_rows,
                         const flash_rows &    values,
                         int64_t               first,
                         int64_t               end,
                         int64_t               column,
                         int64_t               d,
                         float * const *       o) {
    flash_with_rows<VALUE_ROWS>(n_rows, [&](auto rows) {
        constexpr int R = decltype(rows)::value;
        flash_values_columns<T, R, R <= 3 ? WIDE_COLUMNS : COLUMNS>(p, values, first, end, o, column, d);
    });
}

#endif
