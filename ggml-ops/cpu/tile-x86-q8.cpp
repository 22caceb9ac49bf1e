// Plain rows of Q8_0, for AVX2 and AVX512 with VNNI.
//
// A block of 16 (AVX2: 8) rows is transposed in registers, dword by dword, so that every lane sums for one row: no sum
// across lanes at the end, and one conversion, scale and addition per 16 rows. The work of transposing is shared by the
// activation rows of a tile.
#include "tile-x86.h"

#if TILE_AVX2

#    define GGML_COMMON_DECL_CPP
#    include "ggml-common.h"

namespace {

const block_q8_0 * block_at(const char * rows, size_t row_size, int64_t row, int64_t b) {
    return (const block_q8_0 *) (rows + row * row_size) + b;
}

#    if TILE_AVX512

constexpr int64_t Q8_ROWS = 16;
constexpr int64_t Q8_TILE = 8;

// weights become unsigned by + 128
void q8_act_pack(const tile_weight &, int64_t k, int64_t first, int64_t n, const float * x, float factor, void * act) {
    int8_act_pack(k, first, n, x, factor, act, [](int8_t *, int32_t sum) { return -128 * sum; });
}

inline __m256i q8_row(const char * rows, size_t row_size, int64_t row, int64_t b) {
    return _mm256_loadu_si256((const __m256i *) block_at(rows, row_size, row, b)->qs);
}

inline void q8_transpose(const char * rows, size_t row_size, int64_t b, __m512i out[8]) {
    __m512i z[8], t[8];
    for (int i = 0; i < 8; i++) {
        z[i] = _mm512_inserti64x4(_mm512_castsi256_si512(q8_row(rows, row_size, i, b)),
                                  q8_row(rows, row_size, i + 8, b), 1);
    }
    for (int i = 0; i < 8; i += 2) {
        t[i]     = _mm512_unpacklo_epi32(z[i], z[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(z[i], z[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        z[i]     = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        z[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        z[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        z[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    const __m512i low  = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
    const __m512i high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    const __m512i flip = _mm512_set1_epi8((char) 0x80);
    for (int i = 0; i < 4; i++) {
        out[i]     = _mm512_xor_si512(_mm512_permutex2var_epi64(z[i], low, z[i + 4]), flip);
        out[i + 4] = _mm512_xor_si512(_mm512_permutex2var_epi64(z[i], high, z[i + 4]), flip);
    }
}

inline __m512 q8_scales(const char * rows, size_t row_size, int64_t b) {
    alignas(32) ggml_half d[Q8_ROWS];
    for (int64_t r = 0; r < Q8_ROWS; r++) {
        d[r] = block_at(rows, row_size, r, b)->d;
    }
    return _mm512_cvtph_ps(_mm256_load_si256((const __m256i *) d));
}

template <int T> inline void q8_multiply(const __m512i w[8], __m512 dw, const int8_act * act, int64_t b, __m512 * sum) {
#        pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        const int32_t * x = (const int32_t *) (act[t].q + b * BLOCK);
        __m512i         s = _mm512_set1_epi32(act[t].c[b]);
        for (int j = 0; j < 8; j++) {
            s = _mm512_dpbusd_epi32(s, w[j], _mm512_set1_epi32(x[j]));
        }
        sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s), _mm512_mul_ps(dw, _mm512_set1_ps(act[t].d[b])), sum[t]);
    }
}

typedef __m512  q8_sums;
typedef __m512i q8_dwords;

inline q8_sums q8_load(const float * p) {
    return _mm512_loadu_ps(p);
}

inline void q8_store(float * p, q8_sums v) {
    _mm512_storeu_ps(p, v);
}

#    else

constexpr int64_t Q8_ROWS = 8;
constexpr int64_t Q8_TILE = 4;

void q8_act_pack(const tile_weight &, int64_t k, int64_t first, int64_t n, const float * x, float factor, void * act) {
    int8_act_pack(k, first, n, x, factor, act, [](int8_t *, int32_t) { return 0; });
}

inline void q8_transpose(const char * rows, size_t row_size, int64_t b, __m256i out[8]) {
    __m256i z[8], t[8];
    for (int i = 0; i < 8; i++) {
        z[i] = _mm256_loadu_si256((const __m256i *) block_at(rows, row_size, i, b)->qs);
    }
    for (int i = 0; i < 8; i += 2) {
        t[i]     = _mm256_unpacklo_epi32(z[i], z[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(z[i], z[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        z[i]     = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        z[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        z[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        z[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        out[i]     = _mm256_permute2x128_si256(z[i], z[i + 4], 0x20);
        out[i + 4] = _mm256_permute2x128_si256(z[i], z[i + 4], 0x31);
    }
}

inline __m256 q8_scales(const char * rows, size_t row_size, int64_t b) {
    alignas(16) ggml_half d[Q8_ROWS];
    for (int64_t r = 0; r < Q8_ROWS; r++) {
        d[r] = block_at(rows, row_size, r, b)->d;
    }
    return _mm256_cvtph_ps(_mm_load_si128((const __m128i *) d));
}

// |w| * (x with the sign of w): pairs stay below 2 * 127 * 127 < 2^15, since neither has -128
template <int T> inline void q8_multiply(const __m256i w[8], __m256 dw, const int8_act * act, int64_t b, __m256 * sum) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i       s[T];
    for (int t = 0; t < T; t++) {
        s[t] = _mm256_setzero_si256();
    }
    for (int j = 0; j < 8; j++) {
        const __m256i size = _mm256_abs_epi8(w[j]);
#        pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            const __m256i x = _mm256_set1_epi32(((const int32_t *) (act[t].q + b * BLOCK))[j]);
            s[t] =
                _mm256_add_epi32(s[t], _mm256_madd_epi16(_mm256_maddubs_epi16(size, _mm256_sign_epi8(x, w[j])), ones));
        }
    }
    for (int t = 0; t < T; t++) {
        sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s[t]), _mm256_mul_ps(dw, _mm256_set1_ps(act[t].d[b])), sum[t]);
    }
}

typedef __m256  q8_sums;
typedef __m256i q8_dwords;

inline q8_sums q8_load(const float * p) {
    return _mm256_loadu_ps(p);
}

inline void q8_store(float * p, q8_sums v) {
    _mm256_storeu_ps(p, v);
}

#    endif

template <int T>
void q8_dot_tile(const tile_weight &  w,
                 const char *         rows,
                 int64_t              n_rows,
                 const void * const * act,
                 float * const *      acc,
                 const char *         next) {
    const int64_t n_blocks = w.k / BLOCK;
    int8_act      a[T];
    for (int t = 0; t < T; t++) {
        a[t] = int8_act(act[t], w.k);
    }
    for (int64_t r = 0; r < n_rows; r += Q8_ROWS) {
        const char * group = rows + r * w.row_size;
        if (next) {
            prefetch_lines(next + r * w.row_size, Q8_ROWS * w.row_size);
        }
        q8_sums sum[T];
        for (int t = 0; t < T; t++) {
            sum[t] = q8_load(acc[t] + r);
        }
        for (int64_t b = 0; b < n_blocks; b++) {
            if (b % 2 == 0) {  // every row is a stream of its own
                for (int64_t i = 0; i < Q8_ROWS; i++) {
                    _mm_prefetch((const char *) block_at(group, w.row_size, i, b) + 512, _MM_HINT_T0);
                }
            }
            q8_dwords q[8];
            q8_transpose(group, w.row_size, b, q);
            q8_multiply<T>(q, q8_scales(group, w.row_size, b), a, b, sum);
        }
        for (int t = 0; t < T; t++) {
            q8_store(acc[t] + r, sum[t]);
        }
    }
}

void q8_dot(const tile_weight &  w,
            const char *         rows,
            int64_t              n_rows,
            const void * const * act,
            int64_t              n_act,
            float * const *      acc,
            const char *         next) {
    with_tile<Q8_TILE>(n_act, [&](auto tile) { q8_dot_tile<decltype(tile)::value>(w, rows, n_rows, act, acc, next); });
}

const tile_kernel q8_kernel = {
    /* .rows     = */ Q8_ROWS,
    /* .lanes    = */ 1,
    /* .tile     = */ Q8_TILE,
    /* .ahead    = */ 0,
    /* .act_size = */ int8_act_size,
    /* .act_pack = */ q8_act_pack,
    /* .dot      = */ q8_dot,
    /* .reduce   = */ tile_copy_lanes,
    /* .mul_mat  = */ false,
};

}  // namespace

const tile_kernel * tile_kernel_x86_q8(ggml_type type, int64_t group, int64_t n_rows) {
    return type == GGML_TYPE_Q8_0 && group == 1 && n_rows % Q8_ROWS == 0 ? &q8_kernel : nullptr;
}

#endif
