// Q4_0 in CPU_REPACK's groups of 8 rows, for AVX2 and AVX512 with VNNI.
//
// A group's block holds 8 scales and, for each half of the 16 bytes of a row's block, 8 bytes of each of the 8 rows.
// Nibbles are stored as signed numbers; as unsigned ones (+ 8) they suit the u8 x i8 instructions, and -8 * sum(x) goes
// into the correction. Two neighbouring dwords belong to one row: hence 2 lanes.
#include "tile-x86.h"

#if TILE_AVX2

#    include "repack.h"

namespace {

#    if TILE_AVX512

void q4_act_pack(const tile_weight &, int64_t k, int64_t first, int64_t n, const float * x, float factor, void * act) {
    // both lanes of a row start with half of -8 * sum
    int8_act_pack(k, first, n, x, factor, act, [](int8_t *, int32_t sum) { return -4 * sum; });
}

template <int T>
void q4_dot_tile(int64_t              k,
                 const char *         rows,
                 int64_t              n_rows,
                 const void * const * act,
                 float * const *      acc,
                 const char *         next) {
    const int64_t n_blocks = k / BLOCK;
    const __m512i low      = _mm512_set1_epi8(0x0f);
    const __m512i flip     = _mm512_set1_epi8(0x08);
    const __m512i twice    = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);

    const int8_t *  q[T];
    const int32_t * c[T];
    const float *   d[T];
    for (int t = 0; t < T; t++) {
        const int8_act a(act[t], k);
        q[t] = a.q;
        c[t] = a.c;
        d[t] = a.d;
    }
    const block_q4_0x8 * w = (const block_q4_0x8 *) rows;
    for (int64_t g = 0; g < n_rows / 8; g++) {
        __m512 sum[T];
        for (int t = 0; t < T; t++) {
            sum[t] = _mm512_loadu_ps(acc[t] + 16 * g);
        }
        for (int64_t b = 0; b < n_blocks; b++, w++) {
            if (next) {
                prefetch_lines(next + ((const char *) w - rows), sizeof(block_q4_0x8));
            }
            const __m512i v0 = _mm512_loadu_si512(w->qs);
            const __m512i v1 = _mm512_loadu_si512(w->qs + 64);
            // 0x28: (a ^ b) & c
            const __m512i w0 = _mm512_ternarylogic_epi32(v0, flip, low, 0x28);
            const __m512i w1 = _mm512_ternarylogic_epi32(v1, flip, low, 0x28);
            const __m512i w2 = _mm512_ternarylogic_epi32(_mm512_srli_epi16(v0, 4), flip, low, 0x28);
            const __m512i w3 = _mm512_ternarylogic_epi32(_mm512_srli_epi16(v1, 4), flip, low, 0x28);
            const __m256  d8 = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) w->d));
            const __m512  dw = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(d8));
#        pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const long long * x = (const long long *) (q[t] + b * BLOCK);
                __m512i           s = _mm512_set1_epi32(c[t][b]);
                s                   = _mm512_dpbusd_epi32(s, w0, _mm512_set1_epi64(x[0]));
                s                   = _mm512_dpbusd_epi32(s, w1, _mm512_set1_epi64(x[1]));
                s                   = _mm512_dpbusd_epi32(s, w2, _mm512_set1_epi64(x[2]));
                s                   = _mm512_dpbusd_epi32(s, w3, _mm512_set1_epi64(x[3]));
                sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s), _mm512_mul_ps(dw, _mm512_set1_ps(d[t][b])), sum[t]);
            }
        }
        for (int t = 0; t < T; t++) {
            _mm512_storeu_ps(acc[t] + 16 * g, sum[t]);
        }
    }
}

constexpr int64_t Q4_TILE = 8;

#    else

void q4_act_pack(const tile_weight &, int64_t k, int64_t first, int64_t n, const float * x, float factor, void * act) {
    // 16-bit sums: each of the two halves of a lane starts with a quarter of -8 * sum
    int8_act_pack(k, first, n, x, factor, act,
                  [](int8_t *, int32_t sum) { return (int32_t) (0x10001u * (uint16_t) (int16_t) (-2 * sum)); });
}

template <int T>
void q4_dot_tile(int64_t              k,
                 const char *         rows,
                 int64_t              n_rows,
                 const void * const * act,
                 float * const *      acc,
                 const char *         next) {
    const int64_t n_blocks = k / BLOCK;
    const __m256i low      = _mm256_set1_epi8(0x0f);
    const __m256i flip     = _mm256_set1_epi8((char) 0x88);
    const __m256i ones     = _mm256_set1_epi16(1);

    const int8_t *  q[T];
    const int32_t * c[T];
    const float *   d[T];
    for (int t = 0; t < T; t++) {
        const int8_act a(act[t], k);
        q[t] = a.q;
        c[t] = a.c;
        d[t] = a.d;
    }
    const block_q4_0x8 * w = (const block_q4_0x8 *) rows;
    for (int64_t g = 0; g < n_rows / 8; g++) {
        __m256 sum[T][2];
        for (int t = 0; t < T; t++) {
            sum[t][0] = _mm256_loadu_ps(acc[t] + 16 * g);
            sum[t][1] = _mm256_loadu_ps(acc[t] + 16 * g + 8);
        }
        for (int64_t b = 0; b < n_blocks; b++, w++) {
            if (next) {
                prefetch_lines(next + ((const char *) w - rows), sizeof(block_q4_0x8));
            }
            const __m256 d8 = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) w->d));
#        pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {  // rows 0..3 and 4..7
                const __m256i v0 = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *) (w->qs + 32 * half)), flip);
                const __m256i v1 =
                    _mm256_xor_si256(_mm256_loadu_si256((const __m256i *) (w->qs + 64 + 32 * half)), flip);
                const __m256i w0 = _mm256_and_si256(v0, low);
                const __m256i w1 = _mm256_and_si256(v1, low);
                const __m256i w2 = _mm256_and_si256(_mm256_srli_epi16(v0, 4), low);
                const __m256i w3 = _mm256_and_si256(_mm256_srli_epi16(v1, 4), low);
                const __m256i at =
                    half ? _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7) : _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
                const __m256 dw = _mm256_permutevar8x32_ps(d8, at);
#        pragma GCC unroll 4
                for (int t = 0; t < T; t++) {
                    // at most 8 * 15 * 127 + 2 * 32 * 127 < 2^15
                    const long long * x  = (const long long *) (q[t] + b * BLOCK);
                    const __m256i     p0 = _mm256_maddubs_epi16(w0, _mm256_set1_epi64x(x[0]));
                    const __m256i     p1 = _mm256_maddubs_epi16(w1, _mm256_set1_epi64x(x[1]));
                    const __m256i     p2 = _mm256_maddubs_epi16(w2, _mm256_set1_epi64x(x[2]));
                    const __m256i     p3 = _mm256_maddubs_epi16(w3, _mm256_set1_epi64x(x[3]));
                    __m256i           s  = _mm256_add_epi16(_mm256_set1_epi32(c[t][b]), p0);
                    s                    = _mm256_add_epi16(_mm256_add_epi16(s, p1), _mm256_add_epi16(p2, p3));
                    sum[t][half]         = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(s, ones)),
                                                           _mm256_mul_ps(dw, _mm256_set1_ps(d[t][b])), sum[t][half]);
                }
            }
        }
        for (int t = 0; t < T; t++) {
            _mm256_storeu_ps(acc[t] + 16 * g, sum[t][0]);
            _mm256_storeu_ps(acc[t] + 16 * g + 8, sum[t][1]);
        }
    }
}

constexpr int64_t Q4_TILE = 4;

#    endif

void q4_dot(const tile_weight &  w,
            const char *         rows,
            int64_t              n_rows,
            const void * const * act,
            int64_t              n_act,
            float * const *      acc,
            const char *         next) {
    with_tile<Q4_TILE>(n_act,
                       [&](auto tile) { q4_dot_tile<decltype(tile)::value>(w.k, rows, n_rows, act, acc, next); });
}

void add_lane_pairs(int64_t n_rows, const float * acc, float * out) {
    for (int64_t r = 0; r < n_rows; r++) {
        out[r] = acc[2 * r] + acc[2 * r + 1];
    }
}

const tile_kernel q4_kernel = {
    /* .rows     = */ 8,
    /* .lanes    = */ 2,
    /* .tile     = */ Q4_TILE,
    /* .ahead    = */ 1536,
    /* .act_size = */ int8_act_size,
    /* .act_pack = */ q4_act_pack,
    /* .dot      = */ q4_dot,
    /* .reduce   = */ add_lane_pairs,
    /* .mul_mat  = */ true,
    /* .act_block = */ 32,
    /* .ahead_rows = */ 0,
};

}  // namespace

const tile_kernel * tile_kernel_x86_q4(ggml_type type, int64_t group, int64_t inter, int64_t n_rows) {
    return type == GGML_TYPE_Q4_0 && group == 8 && inter == 8 && n_rows % 8 == 0 ? &q4_kernel : nullptr;
}

#endif
