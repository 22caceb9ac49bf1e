// Vectors of tile-blocks.h for AVX2, with AVX-VNNI where the compiler may use it: 8 rows, one in every lane.
#pragma once

#include "tile-x86.h"

#if TILE_AVX2 && !TILE_AVX512

namespace tile_blocks {

constexpr int ROWS       = 8;
constexpr int BLOCK_TILE = 8;
#    if defined(__AVXVNNI__)
constexpr int MAX_WEIGHT = 255;  // what dot_words() takes; larger weights come as signed bytes
#    else
constexpr int MAX_WEIGHT = 127;
#    endif

typedef __m256i ints;
typedef __m256  floats;

inline ints set_bytes(int v) {
    return _mm256_set1_epi8((char) v);
}

inline ints set_words(uint32_t v) {
    return _mm256_set1_epi32((int) v);
}

inline ints bit_and(ints a, ints b) {
    return _mm256_and_si256(a, b);
}

inline ints bit_or(ints a, ints b) {
    return _mm256_or_si256(a, b);
}

inline ints bit_xor(ints a, ints b) {
    return _mm256_xor_si256(a, b);
}

inline ints add_words(ints a, ints b) {
    return _mm256_add_epi32(a, b);
}

template <int N> inline ints shift_right(ints v) {  // of words
    return _mm256_srli_epi32(v, N);
}

template <int N> inline ints shift_left(ints v) {
    return _mm256_slli_epi32(v, N);
}

template <int N> inline ints shift_right_signed(ints v) {
    return _mm256_srai_epi32(v, N);
}

// table[byte], bytes 0 .. 15
inline ints look_up(const uint8_t * table, ints v) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) table)), v);
}

// v + 16 in every byte i of a word whose bit 4 J + i is set in the word of `bits`; v has no such bits
template <int J> inline ints add_fifth_bit(ints v, ints bits) {
    const __m256i byte =
        _mm256_add_epi8(_mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c),
                        set_bytes(J / 2));
    const __m256i which = set_words(J % 2 ? 0x80402010u : 0x08040201u);
    const __m256i set   = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(bits, byte), which), which);
    return _mm256_or_si256(v, _mm256_and_si256(set, set_bytes(16)));
}

inline floats set_floats(float v) {
    return _mm256_set1_ps(v);
}

inline floats multiply(floats a, floats b) {
    return _mm256_mul_ps(a, b);
}

inline floats multiply_add(floats a, floats b, floats c) {
    return _mm256_fmadd_ps(a, b, c);
}

inline floats to_floats(ints v) {
    return _mm256_cvtepi32_ps(v);
}

inline floats as_floats(ints v) {
    return _mm256_castsi256_ps(v);
}

inline ints select_below_2(ints v, ints below, ints other) {
    return _mm256_blendv_epi8(other, below, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), v));
}

inline floats load_floats(const float * p) {
    return _mm256_loadu_ps(p);
}

inline void store_floats(float * p, floats v) {
    _mm256_storeu_ps(p, v);
}

// the F16 in the low half of every word
inline floats low_halves(ints v) {
    const __m256i low = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}

// w[j] = bytes 4 j .. 4 j + 3 of 8 rows, `stride` bytes apart
inline __attribute__((always_inline)) void load_words(const char * at, size_t stride, ints w[4]) {
    __m256i z[4];
    for (int i = 0; i < 4; i++, at += stride) {  // rows i, i + 4
        z[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) at)),
                                       _mm_loadu_si128((const __m128i *) (at + 4 * stride)), 1);
    }
    const __m256i t0 = _mm256_unpacklo_epi32(z[0], z[1]), t1 = _mm256_unpackhi_epi32(z[0], z[1]);
    const __m256i t2 = _mm256_unpacklo_epi32(z[2], z[3]), t3 = _mm256_unpackhi_epi32(z[2], z[3]);
    w[0] = _mm256_unpacklo_epi64(t0, t2);
    w[1] = _mm256_unpackhi_epi64(t0, t2);
    w[2] = _mm256_unpacklo_epi64(t1, t3);
    w[3] = _mm256_unpackhi_epi64(t1, t3);
}

// the F16 at the beginning of 8 rows
inline floats load_halves(const char * at, size_t stride) {
    __m128i two[4];
    for (int i = 0; i < 4; i++, at += 2 * stride) {
        two[i] =
            _mm_unpacklo_epi16(_mm_loadu_si128((const __m128i *) at), _mm_loadu_si128((const __m128i *) (at + stride)));
    }
    return _mm256_cvtph_ps(_mm_unpacklo_epi64(_mm_unpacklo_epi32(two[0], two[1]), _mm_unpacklo_epi32(two[2], two[3])));
}

// the same from a group of 8 rows, 8 bytes of each row together
template <tile_layout layout> inline void load_groups(const char * at, size_t, ints w[4]) {
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    for (int i = 0; i < 2; i++, at += 64) {
        const __m256i a = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *) at), order);
        const __m256i b = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *) (at + 32)), order);
        w[2 * i]        = _mm256_permute2x128_si256(a, b, 0x20);
        w[2 * i + 1]    = _mm256_permute2x128_si256(a, b, 0x31);
    }
}

// 8 F16 of the group
template <tile_layout layout> inline floats load_group_halves(const char * at, size_t) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) at));
}

// 8 bytes of the group as words
inline ints group_bytes(uint64_t first, uint64_t) {
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long) first));
}

template <tile_layout layout> inline ints load_group_bytes(const char * at, size_t) {
    static_assert(layout == ROWS_8X8, "not a layout of x86");
    uint64_t v;
    memcpy(&v, at, sizeof(v));
    return group_bytes(v, 0);
}

#    if defined(__AVXVNNI__)

template <int LIMIT, int N>
inline __attribute__((always_inline)) ints dot_row(const ints * w, const int32_t * x, ints s) {
#        pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
        s = _mm256_dpbusd_avx_epi32(s, w[j], _mm256_set1_epi32(x[j]));
    }
    return s;
}

#    else

template <int LIMIT, int N>
inline __attribute__((always_inline)) ints dot_row(const ints * w, const int32_t * x, ints s) {
    // products of pairs that fit into 16 bits together
    constexpr int SPAN = LIMIT <= 15 ? 8 : LIMIT <= 31 ? 4 : LIMIT <= 63 ? 2 : 1;
    static_assert(LIMIT > MAX_WEIGHT || SPAN * 2 * LIMIT * 127 < 32768, "16-bit sums overflow");
    constexpr int STEP = SPAN < N ? SPAN : N;
    const __m256i ones = _mm256_set1_epi16(1);
#        pragma GCC unroll 8
    for (int j = 0; j < N; j += STEP) {
        __m256i sums;
        if constexpr (LIMIT > MAX_WEIGHT) {  // |w| * (x with the sign of w): w has no -128
            sums = _mm256_maddubs_epi16(_mm256_abs_epi8(w[j]), _mm256_sign_epi8(_mm256_set1_epi32(x[j]), w[j]));
        } else {
            sums = _mm256_maddubs_epi16(w[j], _mm256_set1_epi32(x[j]));
#        pragma GCC unroll 8
            for (int i = 1; i < STEP; i++) {
                sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(w[j + i], _mm256_set1_epi32(x[j + i])));
            }
        }
        s = _mm256_add_epi32(s, _mm256_madd_epi16(sums, ones));
    }
    return s;
}

#    endif

// s[t] += sums over N words of bytes w (0 .. LIMIT, or signed) times bytes q[at ..] (-127 .. 127) of block b of act[t]
template <int LIMIT, int N, int T, typename act_block>
inline __attribute__((always_inline)) void dot_words(const ints *              w,
                                                     const act_block * const * act,
                                                     int64_t                   b,
                                                     int                       at,
                                                     ints *                    s) {
#    pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        s[t] = dot_row<LIMIT, N>(w, (const int32_t *) (act[t][b].q + at), s[t]);
    }
}

}  // namespace tile_blocks

#endif
