// Vectors of floats as the attention kernels use them: AVX512, AVX2, NEON. FLASH_VEC is 0 where there are none of these.
//
// Sums over the lanes of a vector are always formed in the same order; products are only added by fused operations, so
// that no compiler contracts one copy of a loop and leaves another.
#pragma once

#include "ggml.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#    define FLASH_VEC 1
// GCC 12 takes the undefined operands inside its own AVX512 headers for uninitialized variables
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#    pragma GCC diagnostic ignored "-Wuninitialized"
#    include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#    define FLASH_VEC 1
#    include <arm_neon.h>
#else
#    define FLASH_VEC 0
#endif

#if FLASH_VEC

#    if defined(__AVX512F__) && defined(__AVX512DQ__)

typedef __m512    fvec;
constexpr int64_t FVEC = 16;  // lanes

inline fvec fvec_load(const float * p) {
    return _mm512_loadu_ps(p);
}

inline fvec fvec_load(const ggml_fp16_t * p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
}

inline fvec fvec_load(const ggml_bf16_t * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
}

inline void fvec_store(float * p, fvec v) {
    _mm512_storeu_ps(p, v);
}

inline fvec fvec_set(float x) {
    return _mm512_set1_ps(x);
}

inline fvec fvec_mul(fvec a, fvec b) {
    return _mm512_mul_ps(a, b);
}

inline fvec fvec_add(fvec a, fvec b) {
    return _mm512_add_ps(a, b);
}

inline fvec fvec_max(fvec a, fvec b) {
    return _mm512_max_ps(a, b);
}

inline fvec fvec_fma(fvec a, fvec b, fvec c) {
    return _mm512_fmadd_ps(a, b, c);
}

// x, but b where b is -inf
inline fvec fvec_hide(fvec x, fvec b) {
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(b, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ), b);
}

// x where key is not below limit (or NaN), else 0
inline fvec fvec_above(fvec key, fvec limit, fvec x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(key, limit, _CMP_NLT_UQ), x);
}

// 2^n for the n in the low bits of z = n + 1.5 * 2^23
inline fvec fvec_exp2(fvec z) {
    const __m512i e = _mm512_slli_epi32(_mm512_castps_si512(z), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(e, _mm512_castps_si512(_mm512_set1_ps(1.0f))));
}

inline float fvec_max_lanes(fvec v) {
    return _mm512_reduce_max_ps(v);
}

// out[i] = sum of the lanes of v[i]
inline void fvec_sum4(const fvec v[4], float * out) {
    const fvec   ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const fvec   cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const fvec   s  = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 h  = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}

// The sum of numbers from 0 to 1 in units of 2^-30, as integers: it does not depend on their order.
typedef __m512i fvec_total;

inline fvec_total fvec_total_zero() {
    return _mm512_setzero_si512();
}

inline fvec_total fvec_total_add(fvec_total sum, fvec x) {
    const __m512i i    = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(0x1p30f)));
    const __m512i even = _mm512_and_si512(i, _mm512_set1_epi64(0xffffffff));
    return _mm512_add_epi64(_mm512_add_epi64(sum, even), _mm512_srli_epi64(i, 32));
}

#    elif defined(__AVX2__)

typedef __m256    fvec;
constexpr int64_t FVEC = 8;

inline fvec fvec_load(const float * p) {
    return _mm256_loadu_ps(p);
}

inline fvec fvec_load(const ggml_fp16_t * p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
}

inline fvec fvec_load(const ggml_bf16_t * p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16));
}

inline void fvec_store(float * p, fvec v) {
    _mm256_storeu_ps(p, v);
}

inline fvec fvec_set(float x) {
    return _mm256_set1_ps(x);
}

inline fvec fvec_mul(fvec a, fvec b) {
    return _mm256_mul_ps(a, b);
}

inline fvec fvec_add(fvec a, fvec b) {
    return _mm256_add_ps(a, b);
}

inline fvec fvec_max(fvec a, fvec b) {
    return _mm256_max_ps(a, b);
}

inline fvec fvec_fma(fvec a, fvec b, fvec c) {
    return _mm256_fmadd_ps(a, b, c);
}

inline fvec fvec_hide(fvec x, fvec b) {
    return _mm256_blendv_ps(x, b, _mm256_cmp_ps(b, _mm256_set1_ps(-INFINITY), _CMP_EQ_OQ));
}

inline fvec fvec_above(fvec key, fvec limit, fvec x) {
    return _mm256_and_ps(x, _mm256_cmp_ps(key, limit, _CMP_NLT_UQ));
}

inline fvec fvec_exp2(fvec z) {
    const __m256i e = _mm256_slli_epi32(_mm256_castps_si256(z), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(e, _mm256_castps_si256(_mm256_set1_ps(1.0f))));
}

inline float fvec_max_lanes(fvec v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m        = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

inline void fvec_sum4(const fvec v[4], float * out) {
    const fvec ab = _mm256_add_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
    const fvec cd = _mm256_add_ps(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
    const fvec s  = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

typedef __m256i fvec_total;

inline fvec_total fvec_total_zero() {
    return _mm256_setzero_si256();
}

inline fvec_total fvec_total_add(fvec_total sum, fvec x) {
    const __m256i i    = _mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(0x1p30f)));
    const __m256i even = _mm256_and_si256(i, _mm256_set1_epi64x(0xffffffff));
    return _mm256_add_epi64(_mm256_add_epi64(sum, even), _mm256_srli_epi64(i, 32));
}

#    else

typedef float32x4_t fvec;
constexpr int64_t   FVEC = 4;

inline fvec fvec_load(const float * p) {
    return vld1q_f32(p);
}

inline fvec fvec_load(const ggml_fp16_t * p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *) p)));
}

inline fvec fvec_load(const ggml_bf16_t * p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *) p), 16));
}

inline void fvec_store(float * p, fvec v) {
    vst1q_f32(p, v);
}

inline fvec fvec_set(float x) {
    return vdupq_n_f32(x);
}

inline fvec fvec_mul(fvec a, fvec b) {
    return vmulq_f32(a, b);
}

inline fvec fvec_add(fvec a, fvec b) {
    return vaddq_f32(a, b);
}

inline fvec fvec_max(fvec a, fvec b) {
    return vmaxq_f32(a, b);
}

inline fvec fvec_fma(fvec a, fvec b, fvec c) {
    return vfmaq_f32(c, a, b);
}

inline fvec fvec_hide(fvec x, fvec b) {
    return vbslq_f32(vceqq_f32(b, vdupq_n_f32(-INFINITY)), b, x);
}

inline fvec fvec_above(fvec key, fvec limit, fvec x) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x), vcltq_f32(key, limit)));
}

inline fvec fvec_exp2(fvec z) {
    const int32x4_t e = vshlq_n_s32(vreinterpretq_s32_f32(z), 23);
    return vreinterpretq_f32_s32(vaddq_s32(e, vreinterpretq_s32_f32(vdupq_n_f32(1.0f))));
}

inline float fvec_max_lanes(fvec v) {
    return vmaxvq_f32(v);
}

inline void fvec_sum4(const fvec v[4], float * out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3])));
}

typedef int64x2_t fvec_total;

inline fvec_total fvec_total_zero() {
    return vdupq_n_s64(0);
}

inline fvec_total fvec_total_add(fvec_total sum, fvec x) {
    return vpadalq_s32(sum, vcvtnq_s32_f32(vmulq_f32(x, vdupq_n_f32(0x1p30f))));
}

#    endif

inline float fvec_total_get(fvec_total sum) {
    int64_t parts[sizeof(sum) / sizeof(int64_t)], all = 0;
    memcpy(parts, &sum, sizeof(sum));
    for (int64_t part : parts) {
        all += part;
    }
    return (float) ((double) all * 0x1p-30);
}

inline float fvec_sum(fvec v) {
    const fvec all[4] = { v, v, v, v };
    float      sum[4];
    fvec_sum4(all, sum);
    return sum[0];
}

// e^x for x <= 0, to 1.5 units in the last place; 0 below the smallest normal number. NaN stays NaN.
// The polynomial is that of ggml_v_expf() (vec.h), which comes from ARM's optimized routines.
inline fvec fvec_exp(fvec x) {
    const fvec round = fvec_set(0x1.8p23f);
    const fvec z     = fvec_fma(x, fvec_set(0x1.715476p+0f), round);
    const fvec n     = fvec_add(z, fvec_set(-0x1.8p23f));
    const fvec b     = fvec_fma(n, fvec_set(-0x1.7f7d1cp-20f), fvec_fma(n, fvec_set(-0x1.62e4p-1f), x));
    const fvec u     = fvec_mul(b, b);
    const fvec high  = fvec_fma(fvec_set(0x1.0e4020p-7f), b, fvec_set(0x1.573e2ep-5f));
    const fvec low   = fvec_fma(fvec_set(0x1.555e66p-3f), b, fvec_set(0x1.fffdb6p-2f));
    const fvec j     = fvec_fma(fvec_fma(high, u, low), u, fvec_mul(fvec_set(0x1.ffffecp-1f), b));
    const fvec k     = fvec_exp2(z);
    return fvec_above(x, fvec_set(-87.33f), fvec_fma(j, k, k));
}

#endif
