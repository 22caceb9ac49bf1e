// Vectors of tile-blocks.h for AVX512 with VNNI: 16 rows, one in every lane.
#pragma once

#include "tile-x86.h"

#if TILE_AVX2 && TILE_AVX512

namespace tile_blocks {

constexpr int ROWS       = 16;
constexpr int BLOCK_TILE = 8;
constexpr int MAX_WEIGHT = 255;  // what dot_words() takes

typedef __m512i ints;
typedef __m512  floats;

inline ints set_bytes(int v) {
    return _mm512_set1_epi8((char) v);
}

inline ints set_words(uint32_t v) {
    return _mm512_set1_epi32((int) v);
}

inline ints bit_and(ints a, ints b) {
    return _mm512_and_si512(a, b);
}

inline ints bit_or(ints a, ints b) {
    return _mm512_or_si512(a, b);
}

inline ints bit_xor(ints a, ints b) {
    return _mm512_xor_si512(a, b);
}

inline ints add_words(ints a, ints b) {
    return _mm512_add_epi32(a, b);
}

template <int N> inline ints shift_right(ints v) {  // of words
    return _mm512_srli_epi32(v, N);
}

template <int N> inline ints shift_left(ints v) {
    return _mm512_slli_epi32(v, N);
}

template <int N> inline ints shift_right_signed(ints v) {
    return _mm512_srai_epi32(v, N);
}

// table[byte], bytes 0 .. 15
inline ints look_up(const uint8_t * table, ints v) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) table)), v);
}

// v + 16 in every byte i of a word whose bit 4 J + i is set in the word of `bits`; v has no such bits
template <int J> inline ints add_fifth_bit(ints v, ints bits) {
    // 4 bits choose 4 bytes; the instruction takes no others
    const __m512i bytes = _mm512_setr_epi32(0x00000000, 0x00000010, 0x00001000, 0x00001010, 0x00100000, 0x00100010,
                                            0x00101000, 0x00101010, 0x10000000, 0x10000010, 0x10001000, 0x10001010,
                                            0x10100000, 0x10100010, 0x10101000, 0x10101010);
    return bit_or(v, _mm512_permutexvar_epi32(shift_right<4 * J>(bits), bytes));
}

inline floats set_floats(float v) {
    return _mm512_set1_ps(v);
}

inline floats multiply(floats a, floats b) {
    return _mm512_mul_ps(a, b);
}

inline floats multiply_add(floats a, floats b, floats c) {
    return _mm512_fmadd_ps(a, b, c);
}

inline floats to_floats(ints v) {
    return _mm512_cvtepi32_ps(v);
}

inline floats as_floats(ints v) {
    return _mm512_castsi512_ps(v);
}

inline ints select_below_2(ints v, ints below, ints other) {
    return _mm512_mask_mov_epi32(other, _mm512_cmplt_epi32_mask(v, _mm512_set1_epi32(2)), below);
}

inline floats load_floats(const float * p) {
    return _mm512_loadu_ps(p);
}

inline void store_floats(float * p, floats v) {
    _mm512_storeu_ps(p, v);
}

// the F16 in the low half of every word
inline floats low_halves(ints v) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v));
}

inline __m256i load_two(const char * low, const char * high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) low)),
                                   _mm_loadu_si128((const __m128i *) high), 1);
}

// w[j] = bytes 4 j .. 4 j + 3 of 16 rows, `stride` bytes apart
inline __attribute__((always_inline)) void load_words(const char * at, size_t stride, ints w[4]) {
    __m512i z[4];
    for (int i = 0; i < 4; i++, at += stride) {  // rows i, i + 4, i + 8, i + 12
        z[i] = _mm512_inserti64x4(_mm512_castsi256_si512(load_two(at, at + 4 * stride)),
                                  load_two(at + 8 * stride, at + 12 * stride), 1);
    }
    const __m512i t0 = _mm512_unpacklo_epi32(z[0], z[1]), t1 = _mm512_unpackhi_epi32(z[0], z[1]);
    const __m512i t2 = _mm512_unpacklo_epi32(z[2], z[3]), t3 = _mm512_unpackhi_epi32(z[2], z[3]);
    w[0] = _mm512_unpacklo_epi64(t0, t2);
    w[1] = _mm512_unpackhi_epi64(t0, t2);
    w[2] = _mm512_unpacklo_epi64(t1, t3);
    w[3] = _mm512_unpackhi_epi64(t1, t3);
}

// the F16 at the beginning of 8 rows
inline __m128i load_8_halves(const char * at, size_t stride) {
    __m128i two[4];
    for (int i = 0; i < 4; i++, at += 2 * stride) {
        two[i] =
            _mm_unpacklo_epi16(_mm_loadu_si128((const __m128i *) at), _mm_loadu_si128((const __m128i *) (at + stride)));
    }
    return _mm_unpacklo_epi64(_mm_unpacklo_epi32(two[0], two[1]), _mm_unpacklo_epi32(two[2], two[3]));
}

inline floats load_halves(const char * at, size_t stride) {
    return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(load_8_halves(at, stride)),
                                                   load_8_halves(at + 8 * stride, stride), 1));
}

// the same from two groups of 8 rows, 8 bytes of each row together, the second one `next` bytes behind
template <tile_layout layout> inline void load_groups(const char * at, size_t next, ints w[4]) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd  = _mm512_or_si512(even, _mm512_set1_epi32(1));
    for (int i = 0; i < 2; i++, at += 64) {
        const __m512i a = _mm512_loadu_si512(at), b = _mm512_loadu_si512(at + next);
        w[2 * i]     = _mm512_permutex2var_epi32(a, even, b);
        w[2 * i + 1] = _mm512_permutex2var_epi32(a, odd, b);
    }
}

// 8 F16 of each of the groups
template <tile_layout layout> inline floats load_group_halves(const char * at, size_t next) {
    return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) at)),
                                                   _mm_loadu_si128((const __m128i *) (at + next)), 1));
}

// 8 bytes of each of the groups as words
inline ints group_bytes(uint64_t first, uint64_t second) {
    return _mm512_cvtepu8_epi32(_mm_set_epi64x((long long) second, (long long) first));
}

template <tile_layout layout> inline ints load_group_bytes(const char * at, size_t next) {
    static_assert(layout == ROWS_8X8, "not a layout of x86");
    uint64_t v[2];
    memcpy(v, at, 8);
    memcpy(v + 1, at + next, 8);
    return group_bytes(v[0], v[1]);
}

// s[t] += sums over N words of bytes w (0 .. LIMIT) times bytes q[at ..] (-127 .. 127) of block b of act[t]
template <int LIMIT, int N, int T, typename act_block>
inline __attribute__((always_inline)) void dot_words(const ints *              w,
                                                     const act_block * const * act,
                                                     int64_t                   b,
                                                     int                       at,
                                                     ints *                    s) {
#    pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
#    pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            s[t] = _mm512_dpbusd_epi32(s[t], w[j], _mm512_set1_epi32(((const int32_t *) (act[t][b].q + at))[j]));
        }
    }
}

}  // namespace tile_blocks

#endif
