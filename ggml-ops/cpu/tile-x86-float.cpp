// Plain rows of F32, F16 and BF16, for AVX2 and AVX512: 4 rows times a few activation rows in float registers.
// Activations and hidden values stay F32, so nothing is rounded but the sums.
#include "tile-x86.h"

#if TILE_AVX2

#    include "ggml-impl.h"

#    include <cstring>

namespace {

constexpr int64_t FLOAT_ROWS = 4;  // rows whose sums are formed together

size_t float_act_size(const tile_weight &, int64_t k) {
    return tile_align(k * sizeof(float));
}

void float_act_pack(const tile_weight &, int64_t, int64_t first, int64_t n, const float * x, float factor, void * act) {
    for (int64_t i = 0; i < n; i++) {
        ((float *) act)[first + i] = x[i] * factor;
    }
}

inline float to_float(float v) {
    return v;
}

inline float to_float(ggml_fp16_t v) {
    return _cvtsh_ss(v);
}

inline float to_float(ggml_bf16_t v) {
    return GGML_BF16_TO_FP32(v);
}

#    if TILE_AVX512

typedef __m512    vec;
constexpr int64_t VEC        = 16;
constexpr int64_t FLOAT_TILE = 4;

inline vec load(const float * p) {
    return _mm512_loadu_ps(p);
}

inline vec load(const ggml_fp16_t * p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
}

inline vec load(const ggml_bf16_t * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
}

inline vec zero() {
    return _mm512_setzero_ps();
}

inline vec fma(vec a, vec b, vec c) {
    return _mm512_fmadd_ps(a, b, c);
}

inline __m256 fold(vec v) {
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}

#    else

typedef __m256    vec;
constexpr int64_t VEC        = 8;
constexpr int64_t FLOAT_TILE = 2;

inline vec load(const float * p) {
    return _mm256_loadu_ps(p);
}

inline vec load(const ggml_fp16_t * p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
}

inline vec load(const ggml_bf16_t * p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16));
}

inline vec zero() {
    return _mm256_setzero_ps();
}

inline vec fma(vec a, vec b, vec c) {
    return _mm256_fmadd_ps(a, b, c);
}

inline __m256 fold(vec v) {
    return v;
}

#    endif

// the sums over the lanes of 4 vectors, each added in the same order
inline __m128 sum_lanes(const vec v[FLOAT_ROWS]) {
    const __m256 a = _mm256_hadd_ps(fold(v[0]), fold(v[1]));
    const __m256 b = _mm256_hadd_ps(fold(v[2]), fold(v[3]));
    const __m256 c = _mm256_hadd_ps(a, b);
    return _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1));
}

// R <= FLOAT_ROWS rows times T activation rows
template <typename W, int T, int R>
inline void float_dot_rows(int64_t               k,
                           const char *          rows,
                           size_t                row_size,
                           const float * const * x,
                           float * const *       acc) {
    vec sum[T][FLOAT_ROWS];
    for (int t = 0; t < T; t++) {
        for (int r = 0; r < FLOAT_ROWS; r++) {
            sum[t][r] = zero();
        }
    }
    const W * w[R];
    for (int r = 0; r < R; r++) {
        w[r] = (const W *) (rows + r * row_size);
    }
    int64_t i = 0;
    for (; i + VEC <= k; i += VEC) {
        vec v[T];
        for (int t = 0; t < T; t++) {
            v[t] = load(x[t] + i);
        }
#    pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            _mm_prefetch((const char *) (w[r] + i) + 1024, _MM_HINT_T0);  // every row is a stream of its own
            const vec wr = load(w[r] + i);
#    pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                sum[t][r] = fma(wr, v[t], sum[t][r]);
            }
        }
    }
    for (int t = 0; t < T; t++) {
        alignas(16) float total[FLOAT_ROWS];
        _mm_store_ps(total, sum_lanes(sum[t]));
        for (int r = 0; r < R; r++) {
            for (int64_t j = i; j < k; j++) {
                total[r] = std::fma(to_float(w[r][j]), x[t][j], total[r]);
            }
            acc[t][r] += total[r];
        }
    }
}

template <typename W, int T>
void float_dot_tile(const tile_weight &  w,
                    const char *         rows,
                    int64_t              n_rows,
                    const void * const * act,
                    float * const *      acc,
                    const char *         next) {
    const float * x[T];
    float *       sums[T];
    for (int t = 0; t < T; t++) {
        x[t] = (const float *) act[t];
    }
    for (int64_t r = 0; r < n_rows; r += FLOAT_ROWS) {
        for (int t = 0; t < T; t++) {
            sums[t] = acc[t] + r;
        }
        const char * at = rows + r * w.row_size;
        if (next) {
            prefetch_lines(next + r * w.row_size, std::min(FLOAT_ROWS, n_rows - r) * w.row_size);
        }
        switch (std::min(FLOAT_ROWS, n_rows - r)) {
            case 1:
                float_dot_rows<W, T, 1>(w.k, at, w.row_size, x, sums);
                break;
            case 2:
                float_dot_rows<W, T, 2>(w.k, at, w.row_size, x, sums);
                break;
            case 3:
                float_dot_rows<W, T, 3>(w.k, at, w.row_size, x, sums);
                break;
            default:
                float_dot_rows<W, T, 4>(w.k, at, w.row_size, x, sums);
        }
    }
}

template <typename W>
void float_dot(const tile_weight &  w,
               const char *         rows,
               int64_t              n_rows,
               const void * const * act,
               int64_t              n_act,
               float * const *      acc,
               const char *         next) {
    with_tile<FLOAT_TILE>(
        n_act, [&](auto tile) { float_dot_tile<W, decltype(tile)::value>(w, rows, n_rows, act, acc, next); });
}

const tile_kernel f32_kernel = {
    /* .rows     = */ FLOAT_ROWS,
    /* .lanes    = */ 1,
    /* .tile     = */ FLOAT_TILE,
    /* .ahead    = */ 0,
    /* .act_size = */ float_act_size,
    /* .act_pack = */ float_act_pack,
    /* .dot      = */ float_dot<float>,
    /* .reduce   = */ tile_copy_lanes,
    /* .mul_mat  = */ false,
    /* .act_block = */ 1,
    /* .ahead_rows = */ 0,
};
const tile_kernel f16_kernel = {
    /* .rows     = */ FLOAT_ROWS,
    /* .lanes    = */ 1,
    /* .tile     = */ FLOAT_TILE,
    /* .ahead    = */ 0,
    /* .act_size = */ float_act_size,
    /* .act_pack = */ float_act_pack,
    /* .dot      = */ float_dot<ggml_fp16_t>,
    /* .reduce   = */ tile_copy_lanes,
    /* .mul_mat  = */ false,
    /* .act_block = */ 1,
    /* .ahead_rows = */ 0,
};
const tile_kernel bf16_kernel = {
    /* .rows     = */ FLOAT_ROWS,
    /* .lanes    = */ 1,
    /* .tile     = */ FLOAT_TILE,
    /* .ahead    = */ 0,
    /* .act_size = */ float_act_size,
    /* .act_pack = */ float_act_pack,
    /* .dot      = */ float_dot<ggml_bf16_t>,
    /* .reduce   = */ tile_copy_lanes,
    /* .mul_mat  = */ false,
    /* .act_block = */ 1,
    /* .ahead_rows = */ 0,
};

}  // namespace

const tile_kernel * tile_kernel_x86_float(ggml_type type, int64_t group) {
    if (group != 1) {
        return nullptr;
    }
    switch (type) {
        case GGML_TYPE_F32:
            return &f32_kernel;
        case GGML_TYPE_F16:
            return &f16_kernel;
        case GGML_TYPE_BF16:
            return &bf16_kernel;
        default:
            return nullptr;
    }
}

#endif
