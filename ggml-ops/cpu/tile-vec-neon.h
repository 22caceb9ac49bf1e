// Vectors of tile-blocks.h for NEON with dot products, with 8-bit matrix multiplication where the compiler may use it: 8 rows
// in the lanes of two registers. Integer sums are exact, so both give the same bits.
#pragma once

#include "tile-kernels.h"

#if defined(__ARM_NEON) && defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#    define TILE_NEON 1

#    include <arm_neon.h>

namespace tile_blocks {

constexpr int ROWS       = 8;
constexpr int BLOCK_TILE = 4;
constexpr int MAX_WEIGHT = 127;  // what dot_words() takes; larger weights come as signed bytes

struct ints {
    uint32x4_t v[2];
};

struct floats {
    float32x4_t v[2];
};

inline ints set_words(uint32_t v) {
    return { vdupq_n_u32(v), vdupq_n_u32(v) };
}

inline ints set_bytes(int v) {
    return set_words(0x01010101u * (uint8_t) v);
}

inline ints bit_and(ints a, ints b) {
    return { vandq_u32(a.v[0], b.v[0]), vandq_u32(a.v[1], b.v[1]) };
}

inline ints bit_or(ints a, ints b) {
    return { vorrq_u32(a.v[0], b.v[0]), vorrq_u32(a.v[1], b.v[1]) };
}

inline ints bit_xor(ints a, ints b) {
    return { veorq_u32(a.v[0], b.v[0]), veorq_u32(a.v[1], b.v[1]) };
}

inline ints add_words(ints a, ints b) {
    return { vaddq_u32(a.v[0], b.v[0]), vaddq_u32(a.v[1], b.v[1]) };
}

template <int N> inline ints shift_right(ints v) {  // of words
    return { vshrq_n_u32(v.v[0], N), vshrq_n_u32(v.v[1], N) };
}

template <int N> inline ints shift_left(ints v) {
    return { vshlq_n_u32(v.v[0], N), vshlq_n_u32(v.v[1], N) };
}

template <int N> inline ints shift_right_signed(ints v) {
    return { vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(v.v[0]), N)),
             vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(v.v[1]), N)) };
}

inline uint32x4_t look_up(uint8x16_t table, uint32x4_t v) {
    return vreinterpretq_u32_u8(vqtbl1q_u8(table, vreinterpretq_u8_u32(v)));
}

// table[byte], bytes 0 .. 15
inline ints look_up(const uint8_t * table, ints v) {
    const uint8x16_t t = vld1q_u8(table);
    return { look_up(t, v.v[0]), look_up(t, v.v[1]) };
}

// v + 16 in every byte i of a word whose bit 4 J + i is set in the word of `bits`
template <int J> inline ints add_fifth_bit(ints v, ints bits) {
    static const uint32_t first[4] = { 0, 0x04040404, 0x08080808, 0x0c0c0c0c };
    const uint8x16_t      byte     = vaddq_u8(vreinterpretq_u8_u32(vld1q_u32(first)), vdupq_n_u8(J / 2));
    const uint8x16_t      which    = vreinterpretq_u8_u32(vdupq_n_u32(J % 2 ? 0x80402010u : 0x08040201u));
    for (int h = 0; h < 2; h++) {
        const uint8x16_t set = vtstq_u8(vqtbl1q_u8(vreinterpretq_u8_u32(bits.v[h]), byte), which);
        v.v[h]               = vorrq_u32(v.v[h], vreinterpretq_u32_u8(vandq_u8(set, vdupq_n_u8(16))));
    }
    return v;
}

inline floats set_floats(float v) {
    return { vdupq_n_f32(v), vdupq_n_f32(v) };
}

inline floats multiply(floats a, floats b) {
    return { vmulq_f32(a.v[0], b.v[0]), vmulq_f32(a.v[1], b.v[1]) };
}

inline floats multiply_add(floats a, floats b, floats c) {
    return { vfmaq_f32(c.v[0], a.v[0], b.v[0]), vfmaq_f32(c.v[1], a.v[1], b.v[1]) };
}

inline floats to_floats(ints v) {
    return { vcvtq_f32_s32(vreinterpretq_s32_u32(v.v[0])), vcvtq_f32_s32(vreinterpretq_s32_u32(v.v[1])) };
}

inline floats as_floats(ints v) {
    return { vreinterpretq_f32_u32(v.v[0]), vreinterpretq_f32_u32(v.v[1]) };
}

inline ints select_below_2(ints v, ints below, ints other) {
    const uint32x4_t two = vdupq_n_u32(2);
    return { vbslq_u32(vcltq_u32(v.v[0], two), below.v[0], other.v[0]),
             vbslq_u32(vcltq_u32(v.v[1], two), below.v[1], other.v[1]) };
}

inline floats load_floats(const float * p) {
    return { vld1q_f32(p), vld1q_f32(p + 4) };
}

inline void store_floats(float * p, floats v) {
    vst1q_f32(p, v.v[0]);
    vst1q_f32(p + 4, v.v[1]);
}

// the F16 in the low half of every word
inline floats low_halves(ints v) {
    return { vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(v.v[0]))),
             vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(v.v[1]))) };
}

// w[j] = bytes 4 j .. 4 j + 3 of 8 rows, `stride` bytes apart
inline __attribute__((always_inline)) void load_words(const char * at, size_t stride, ints w[4]) {
    for (int h = 0; h < 2; h++) {
        uint32x4_t z[4];
        for (int i = 0; i < 4; i++, at += stride) {
            z[i] = vreinterpretq_u32_u8(vld1q_u8((const uint8_t *) at));
        }
        const uint64x2_t t0 = vreinterpretq_u64_u32(vtrn1q_u32(z[0], z[1])),
                         t1 = vreinterpretq_u64_u32(vtrn2q_u32(z[0], z[1]));
        const uint64x2_t t2 = vreinterpretq_u64_u32(vtrn1q_u32(z[2], z[3])),
                         t3 = vreinterpretq_u64_u32(vtrn2q_u32(z[2], z[3]));
        w[0].v[h]           = vreinterpretq_u32_u64(vtrn1q_u64(t0, t2));
        w[1].v[h]           = vreinterpretq_u32_u64(vtrn1q_u64(t1, t3));
        w[2].v[h]           = vreinterpretq_u32_u64(vtrn2q_u64(t0, t2));
        w[3].v[h]           = vreinterpretq_u32_u64(vtrn2q_u64(t1, t3));
    }
}

// the F16 at the beginning of 8 rows
inline floats load_halves(const char * at, size_t stride) {
    uint16_t d[ROWS];
    for (int r = 0; r < ROWS; r++) {
        memcpy(d + r, at + r * stride, sizeof(uint16_t));
    }
    return { vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(d))), vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(d + 4))) };
}

inline uint32x4_t load_16(const char * at) {
    return vreinterpretq_u32_u8(vld1q_u8((const uint8_t *) at));
}

// w[j] = bytes 4 j .. 4 j + 3 of 8 rows, from one packed group of 8 rows or two of 4, the second one `next` bytes behind
template <tile_layout layout> inline void load_groups(const char * at, size_t next, ints w[4]) {
    if constexpr (layout == ROWS_8X8 || layout == ROWS_4X8) {  // two words of a row together
        for (int j = 0; j < 4; j += 2) {
            for (int h = 0; h < 2; h++) {
                const char *     from = layout == ROWS_8X8 ? at + 32 * j + 32 * h : at + 16 * j + next * h;
                const uint32x4_t a = load_16(from), b = load_16(from + 16);
                w[j].v[h]     = vuzp1q_u32(a, b);
                w[j + 1].v[h] = vuzp2q_u32(a, b);
            }
        }
    } else {
        for (int j = 0; j < 4; j++) {
            for (int h = 0; h < 2; h++) {
                w[j].v[h] = load_16(layout == ROWS_8X4 ? at + 32 * j + 16 * h : at + 16 * j + next * h);
            }
        }
    }
}

template <tile_layout layout> inline floats load_group_halves(const char * at, size_t next) {
    const char * second = layout == ROWS_8X8 || layout == ROWS_8X4 ? at + 8 : at + next;
    return { vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t *) at))),
             vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t *) second))) };
}

// 8 bytes as words
inline ints group_bytes(uint64_t v, uint64_t) {
    const uint16x8_t wide = vmovl_u8(vcreate_u8(v));
    return { vmovl_u16(vget_low_u16(wide)), vmovl_u16(vget_high_u16(wide)) };
}

// a byte of each of the 8 rows
template <tile_layout layout> inline ints load_group_bytes(const char * at, size_t next) {
    uint32_t v[2];
    memcpy(v, at, 4);
    memcpy(v + 1, layout == ROWS_8X8 || layout == ROWS_8X4 ? at + 4 : at + next, 4);
    return group_bytes(v[0] | (uint64_t) v[1] << 32, 0);
}

inline int32x4_t as_sums(uint32x4_t v) {
    return vreinterpretq_s32_u32(v);
}

inline int8x16_t as_bytes(uint32x4_t v) {
    return vreinterpretq_s8_u32(v);
}

// N words of 8 rows times one activation row
template <int N> inline void dot_one(const ints * w, const int8_t * x, ints & s) {
    int32x4_t sums[2] = { as_sums(s.v[0]), as_sums(s.v[1]) };
    for (int j = 0; j < N; j += 4) {
        const int8x16_t v = vld1q_s8(x + 4 * j);
        for (int h = 0; h < 2; h++) {
            sums[h] = vdotq_laneq_s32(sums[h], as_bytes(w[j].v[h]), v, 0);
            sums[h] = vdotq_laneq_s32(sums[h], as_bytes(w[j + 1].v[h]), v, 1);
            sums[h] = vdotq_laneq_s32(sums[h], as_bytes(w[j + 2].v[h]), v, 2);
            sums[h] = vdotq_laneq_s32(sums[h], as_bytes(w[j + 3].v[h]), v, 3);
        }
    }
    s = { vreinterpretq_u32_s32(sums[0]), vreinterpretq_u32_s32(sums[1]) };
}

#    if defined(__ARM_FEATURE_MATMUL_INT8)

// N words of 8 rows times two activation rows: 8 bytes of 2 rows, zipped from two words, times 8 bytes of both
template <int N> inline void dot_two(const ints * w, const int8_t * x0, const int8_t * x1, ints * s) {
    int32x4_t sums[2][2] = {};  // {row 0: t, t + 1, row 1: t, t + 1}
    for (int j = 0; j < N; j += 2) {
        const int8x16_t v = vcombine_s8(vld1_s8(x0 + 4 * j), vld1_s8(x1 + 4 * j));
        for (int h = 0; h < 2; h++) {
            sums[h][0] = vmmlaq_s32(sums[h][0], as_bytes(vzip1q_u32(w[j].v[h], w[j + 1].v[h])), v);
            sums[h][1] = vmmlaq_s32(sums[h][1], as_bytes(vzip2q_u32(w[j].v[h], w[j + 1].v[h])), v);
        }
    }
    for (int h = 0; h < 2; h++) {
        s[0].v[h] = vaddq_u32(s[0].v[h], vreinterpretq_u32_s32(vuzp1q_s32(sums[h][0], sums[h][1])));
        s[1].v[h] = vaddq_u32(s[1].v[h], vreinterpretq_u32_s32(vuzp2q_s32(sums[h][0], sums[h][1])));
    }
}

#    endif

// s[t] += sums over N words of bytes w (0 .. LIMIT, or signed) times bytes q[at ..] (-127 .. 127) of block b of act[t]
template <int LIMIT, int N, int T, typename act_block>
inline __attribute__((always_inline)) void dot_words(const ints *              w,
                                                     const act_block * const * act,
                                                     int64_t                   b,
                                                     int                       at,
                                                     ints *                    s) {
    int t = 0;
#    if defined(__ARM_FEATURE_MATMUL_INT8)
    for (; t + 2 <= T; t += 2) {
        dot_two<N>(w, act[t][b].q + at, act[t + 1][b].q + at, s + t);
    }
#    endif
    for (; t < T; t++) {
        dot_one<N>(w, act[t][b].q + at, s[t]);
    }
}

inline float largest_magnitude(const float * x, int64_t n) {  // n a multiple of 4; NaN if one of them is
    float32x4_t max = vdupq_n_f32(0.0f);
    for (int64_t i = 0; i < n; i += 4) {
        max = vmaxq_f32(max, vabsq_f32(vld1q_f32(x + i)));
    }
    return vmaxvq_f32(max);
}

// quantizes 32 values to q, returns the sum of the quantized values
inline int32_t quantize_block(const float * x, float inverse, int8_t * q) {
    int32x4_t sum = vdupq_n_s32(0);
    for (int i = 0; i < 32; i += 8) {  // a NaN becomes 0
        const int32x4_t a = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), inverse));
        const int32x4_t b = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4), inverse));
        sum               = vaddq_s32(sum, vaddq_s32(a, b));
        vst1_s8(q + i, vqmovn_s16(vcombine_s16(vqmovn_s32(a), vqmovn_s32(b))));
    }
    return vaddvq_s32(sum);
}

// always_inline: GCC drops calls of functions that do nothing but prefetch
inline __attribute__((always_inline)) void prefetch_to_l2(const char * p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) {
        __builtin_prefetch(p + i, 0, 2);
    }
}

}  // namespace tile_blocks

#else
#    define TILE_NEON 0
#endif
