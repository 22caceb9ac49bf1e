// Plain rows of Q6_K, for AVX2, and AVX512 with VNNI: what llama-quantize gives the output matrix.
//
// Unpacking 256 weights costs as much as multiplying them with one activation row; a tile of rows shares it. The sums of
// a row lie in 8 lanes that depend on nothing but k.
#include "tile-x86.h"

#if TILE_AVX2

#    define GGML_COMMON_DECL_CPP
#    include "ggml-common.h"

#    include <cstring>
#    include <numeric>

namespace {

constexpr int64_t Q6_TILE  = 8;
constexpr int64_t Q6_LANES = 8;
constexpr int64_t GROUPS   = QK_K / 16;  // groups of 16 values with a scale of their own

// Scales and group sums in the order 0, 2, .. 14, 1, 3, .. 15: the two scales of 32 values then lie at the same place of
// the two halves of a register.
constexpr int group_at(int i) {
    return i < 8 ? 2 * i : 2 * (i - 8) + 1;
}

// 256 values of an activation row
struct alignas(32) q6_act {
    int8_t  q[QK_K];
    int16_t sum[GROUPS];  // of the groups, in the order of group_at
    float   d;
};

size_t q6_act_size(const tile_weight &, int64_t k) {
    return tile_align(k / QK_K * sizeof(q6_act));
}

void q6_act_pack(const tile_weight &, int64_t, int64_t first, int64_t n, const float * x, float factor, void * act) {
    q6_act * a = (q6_act *) act + first / QK_K;
    for (int64_t i = 0; i < n; i += QK_K, a++) {
        const tile_scale scale = tile_scale_get(largest_magnitude(x + i, QK_K));
        a->d                   = scale.d * factor;
        for (int64_t j = 0; j < QK_K; j += BLOCK) {
            quantize_block(x + i + j, scale.inverse, a->q + j);
        }
        for (int g = 0; g < (int) GROUPS; g++) {
            const int8_t * q = a->q + 16 * group_at(g);
            a->sum[g]        = (int16_t) std::accumulate(q, q + 16, 0);
        }
    }
}

// 0 .. 63, 32 values each: q[c] holds values 32 c of the block
inline void q6_unpack(const block_q6_K & b, __m256i q[8]) {
    const __m256i low  = _mm256_set1_epi8(0x0f);
    const __m256i high = _mm256_set1_epi8(0x30);
    for (int half = 0; half < 2; half++) {
        const __m256i a = _mm256_loadu_si256((const __m256i *) (b.ql + 64 * half));
        const __m256i c = _mm256_loadu_si256((const __m256i *) (b.ql + 64 * half + 32));
        const __m256i h = _mm256_loadu_si256((const __m256i *) (b.qh + 32 * half));

        q[4 * half]     = _mm256_or_si256(_mm256_and_si256(a, low), _mm256_and_si256(_mm256_slli_epi16(h, 4), high));
        q[4 * half + 1] = _mm256_or_si256(_mm256_and_si256(c, low), _mm256_and_si256(_mm256_slli_epi16(h, 2), high));
        q[4 * half + 2] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(a, 4), low), _mm256_and_si256(h, high));
        q[4 * half + 3] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(c, 4), low),
                                          _mm256_and_si256(_mm256_srli_epi16(h, 2), high));
    }
}

// the scales as 16 bits, in the order of group_at
inline __m256i q6_scales(const block_q6_K & b) {
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i *) b.scales), order));
}

// sum += w * x in pairs of pairs, scaled: at most 4 * 63 * 127 * 128, and 16 of them
inline __m256i q6_add(__m256i sum, __m256i w, const int8_t * x, __m256i scale) {
    const __m256i pairs = _mm256_maddubs_epi16(w, _mm256_load_si256((const __m256i *) x));
#    if TILE_AVX512
    return _mm256_dpwssd_epi32(sum, pairs, scale);
#    else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, scale));
#    endif
}

template <int T> inline void q6_multiply(const block_q6_K & w, const q6_act * const * x, int64_t b, __m256 * sum) {
    const __m256i scales = q6_scales(w);
    __m256i       q[8];
    q6_unpack(w, q);

    __m256i     s[T];
#    pragma GCC unroll 8
    for (int t = 0; t < T; t++) {  // weights are 0 .. 63 for -32 .. 31
        const __m256i sums = _mm256_load_si256((const __m256i *) x[t][b].sum);
        s[t] = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(_mm256_madd_epi16(sums, scales), 5));
    }
#    pragma GCC unroll 8
    for (int c = 0; c < 8; c++) {
        const __m256i scale = _mm256_shuffle_epi8(scales, _mm256_set1_epi16((short) (0x0100 + 0x0202 * c)));
#    pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            s[t] = q6_add(s[t], q[c], x[t][b].q + 32 * c, scale);
        }
    }
    const __m256 d = _mm256_set1_ps(_cvtsh_ss(w.d));
#    pragma GCC  unroll 8
    for (int t = 0; t < T; t++) {
        sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s[t]), _mm256_mul_ps(d, _mm256_set1_ps(x[t][b].d)), sum[t]);
    }
}

template <int T>
void q6_dot_tile(const tile_weight &  w,
                 const char *         rows,
                 int64_t              n_rows,
                 const void * const * act,
                 float * const *      acc,
                 const char *         next) {
    const int64_t  n_blocks = w.k / QK_K;
    const q6_act * x[T];
    memcpy(x, act, sizeof(x));
    for (int64_t r = 0; r < n_rows; r++) {
        const block_q6_K * block = (const block_q6_K *) (rows + r * w.row_size);
        __m256             sum[T];
        for (int t = 0; t < T; t++) {
            sum[t] = _mm256_loadu_ps(acc[t] + Q6_LANES * r);
        }
        for (int64_t b = 0; b < n_blocks; b++) {
            if (next) {
                prefetch_lines(next + r * w.row_size + b * sizeof(block_q6_K), sizeof(block_q6_K));
            }
            q6_multiply<T>(block[b], x, b, sum);
        }
        for (int t = 0; t < T; t++) {
            _mm256_storeu_ps(acc[t] + Q6_LANES * r, sum[t]);
        }
    }
}

void q6_dot(const tile_weight &  w,
            const char *         rows,
            int64_t              n_rows,
            const void * const * act,
            int64_t              n_act,
            float * const *      acc,
            const char *         next) {
    with_tile<Q6_TILE>(n_act, [&](auto tile) { q6_dot_tile<decltype(tile)::value>(w, rows, n_rows, act, acc, next); });
}

void add_lanes(int64_t n_rows, const float * acc, float * out) {
    for (int64_t r = 0; r < n_rows; r++) {
        const __m256 v = _mm256_loadu_ps(acc + Q6_LANES * r);
        __m128       s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        s              = _mm_add_ps(s, _mm_movehl_ps(s, s));
        out[r]         = _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
}

const tile_kernel q6_kernel = {
    /* .rows     = */ 1,
    /* .lanes    = */ Q6_LANES,
    /* .tile     = */ Q6_TILE,
    /* .ahead    = */ 2048,
    /* .act_size = */ q6_act_size,
    /* .act_pack = */ q6_act_pack,
    /* .dot      = */ q6_dot,
    /* .reduce   = */ add_lanes,
    /* .mul_mat  = */ true,
};

}  // namespace

const tile_kernel * tile_kernel_x86_q6(ggml_type type, int64_t group) {
    return type == GGML_TYPE_Q6_K && group == 1 ? &q6_kernel : nullptr;
}

#endif
