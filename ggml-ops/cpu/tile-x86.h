// What the x86 kernels share: the packed int8 activation row and prefetching.
#pragma once

#include "tile-kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#    define TILE_AVX2 1
#else
#    define TILE_AVX2 0
#endif

#if TILE_AVX2

#    if defined(__GNUC__) && \
        !defined(__clang__)  // GCC 12 takes undefined operands of its own headers for uninitialized
#        pragma GCC diagnostic push
#        pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#        pragma GCC diagnostic ignored "-Wuninitialized"
#        include <immintrin.h>
#        pragma GCC diagnostic pop
#    else
#        include <immintrin.h>
#    endif

#    if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#        define TILE_AVX512 1
#    else
#        define TILE_AVX512 0
#    endif

constexpr int64_t BLOCK = 32;  // values of a quantized block

// --- packed activation rows: int8 values in blocks of 32 ------------------------------------------------------------
// [k] bytes of values, then [k/32] int32 corrections (whatever the kernel adds to its integer sums), then [k/32] floats

inline size_t int8_act_size(const tile_weight &, int64_t k) {
    return tile_align(k + k / BLOCK * (sizeof(int32_t) + sizeof(float)));
}

struct int8_act {
    int8_t *  q;
    int32_t * c;
    float *   d;

    int8_act() = default;

    int8_act(const void * act, int64_t k) {
        q = (int8_t *) const_cast<void *>(act);
        c = (int32_t *) (q + k);
        d = (float *) (c + k / BLOCK);
    }
};

// the largest magnitude of n values, n a multiple of 8; NaN if one of them is: magnitudes are ordered like their bits
inline float largest_magnitude(const float * x, int64_t n) {
    const __m256i size = _mm256_set1_epi32(0x7fffffff);
    __m256i       max  = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 8) {
        max = _mm256_max_epi32(max, _mm256_and_si256(size, _mm256_loadu_si256((const __m256i *) (x + i))));
    }
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256(max, 1));
    m         = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m         = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(m));
}

// quantizes 32 values to q, returns the sum of the quantized values
inline int32_t quantize_block(const float * x, float inverse, int8_t * q) {
    if (inverse == 0.0f) {
        memset(q, 0, BLOCK);
        return 0;
    }
    __m256i n[4];
    for (int i = 0; i < 4; i++) {
        n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(inverse)));
    }
    const __m256i all = _mm256_add_epi32(_mm256_add_epi32(n[0], n[1]), _mm256_add_epi32(n[2], n[3]));
    __m128i       s   = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    s                 = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s                 = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));

    const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i *) q, _mm256_permutevar8x32_epi32(words, order));
    return _mm_cvtsi128_si32(s);
}

template <typename F>
inline void int8_act_pack(int64_t k, int64_t first, int64_t n, const float * x, float factor, void * act, F && finish) {
    int8_act a(act, k);
    for (int64_t i = 0; i < n; i += BLOCK) {
        const int64_t    b     = (first + i) / BLOCK;
        const tile_scale scale = tile_scale_get(largest_magnitude(x + i, BLOCK));
        const int32_t    sum   = quantize_block(x + i, scale.inverse, a.q + first + i);
        a.d[b]                 = scale.d * factor;
        a.c[b]                 = finish(a.q + first + i, sum);
    }
}

// always_inline: GCC drops calls of functions that do nothing but prefetch
inline __attribute__((always_inline)) void prefetch_lines(const char * p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) {
        _mm_prefetch(p + i, _MM_HINT_T0);
    }
}

// for what is wanted after more than the first level holds (Zen 4: the ops read 18 to 26 instead of 11 to 20 GB/s)
inline __attribute__((always_inline)) void prefetch_to_l2(const char * p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) {
        _mm_prefetch(p + i, _MM_HINT_T1);
    }
}

// NULL: not handled here
const tile_kernel * tile_kernel_x86_q4(ggml_type type, int64_t group, int64_t inter, int64_t n_rows);
const tile_kernel * tile_kernel_x86_float(ggml_type type, int64_t group);

#endif
