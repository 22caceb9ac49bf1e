// Q4_0 in CPU_REPACK's groups of 4 rows, for NEON with dot products (4 bytes of a row together) or with 8-bit matrix
// multiplication (8 bytes together). Integer sums are exact, so both give the same bits.
#include "tile-kernels.h"

#if defined(__ARM_NEON) && defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#    include "repack.h"

#    include <arm_neon.h>

namespace {

constexpr int64_t BLOCK = 32;  // values of a quantized block
constexpr int64_t TILE  = 4;

// a packed activation row: [k] bytes of values, then [k/32] scales
struct int8_act {
    int8_t * q;
    float *  d;

    int8_act() = default;

    int8_act(const void * act, int64_t k) {
        q = (int8_t *) const_cast<void *>(act);
        d = (float *) (q + k);
    }
};

size_t int8_act_size(const tile_weight &, int64_t k) {
    return tile_align(k + k / BLOCK * sizeof(float));
}

// quantizes 32 values to q, returns the scale
float quantize_block(const float * x, int8_t * q) {
    float32x4_t v[8];
    float32x4_t max = vdupq_n_f32(0.0f);
    for (int i = 0; i < 8; i++) {
        v[i] = vld1q_f32(x + 4 * i);
        max  = vmaxq_f32(max, vabsq_f32(v[i]));
    }
    const tile_scale scale = tile_scale_get(vmaxvq_f32(max));  // a NaN stays one, and becomes the integer 0
    for (int i = 0; i < 8; i += 2) {
        const int16x4_t a = vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(v[i], scale.inverse)));
        const int16x4_t b = vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(v[i + 1], scale.inverse)));
        vst1_s8(q + 4 * i, vqmovn_s16(vcombine_s16(a, b)));
    }
    return scale.d;
}

void int8_act_pack(const tile_weight &,
                   int64_t       k,
                   int64_t       first,
                   int64_t       n,
                   const float * x,
                   float         factor,
                   void *        act) {
    int8_act a(act, k);
    for (int64_t i = 0; i < n; i += BLOCK) {
        a.d[(first + i) / BLOCK] = quantize_block(x + i, a.q + first + i) * factor;
    }
}

// Nibbles are signed numbers; both halves of a byte come out times 16, which the conversion to float takes back.
struct q4_block {
    int8x16_t low[4], high[4];

    explicit q4_block(const block_q4_0x4 & w) {
        for (int i = 0; i < 4; i++) {
            const int8x16_t v = vld1q_s8(w.qs + 16 * i);
            low[i]            = vshlq_n_s8(v, 4);
            high[i]           = vandq_s8(v, vdupq_n_s8((int8_t) 0xf0));
        }
    }
};

// 4 bytes of each of the 4 rows in a vector: sums[t] = {row 0 .. row 3}
struct q4_dot_product {
    template <int T> static void multiply(const q4_block & w, const int8_act * act, int64_t b, int32x4_t * sums) {
        for (int t = 0; t < T; t++) {
            const int8x16_t x0 = vld1q_s8(act[t].q + b * BLOCK);
            const int8x16_t x1 = vld1q_s8(act[t].q + b * BLOCK + 16);
            int32x4_t       s  = vdupq_n_s32(0);
            s                  = vdotq_laneq_s32(s, w.low[0], x0, 0);
            s                  = vdotq_laneq_s32(s, w.low[1], x0, 1);
            s                  = vdotq_laneq_s32(s, w.low[2], x0, 2);
            s                  = vdotq_laneq_s32(s, w.low[3], x0, 3);
            s                  = vdotq_laneq_s32(s, w.high[0], x1, 0);
            s                  = vdotq_laneq_s32(s, w.high[1], x1, 1);
            s                  = vdotq_laneq_s32(s, w.high[2], x1, 2);
            sums[t]            = vdotq_laneq_s32(s, w.high[3], x1, 3);
        }
    }
};

#    if defined(__ARM_FEATURE_MATMUL_INT8)

// 8 bytes of 2 rows in a vector, times 8 bytes of 2 activation rows; a last single one is taken twice
struct q4_matrix_product {
    template <int T> static void multiply(const q4_block & w, const int8_act * act, int64_t b, int32x4_t * sums) {
        for (int t = 0; t < T; t += 2) {
            const int8_t * x0  = act[t].q + b * BLOCK;
            const int8_t * x1  = act[t + 1 < T ? t + 1 : t].q + b * BLOCK;
            int32x4_t      s01 = vdupq_n_s32(0), s23 = vdupq_n_s32(0);  // {row 0: t, t + 1, row 1: t, t + 1}
            for (int i = 0; i < 2; i++) {
                const int8x16_t low  = vcombine_s8(vld1_s8(x0 + 8 * i), vld1_s8(x1 + 8 * i));
                const int8x16_t high = vcombine_s8(vld1_s8(x0 + 16 + 8 * i), vld1_s8(x1 + 16 + 8 * i));
                s01                  = vmmlaq_s32(vmmlaq_s32(s01, w.low[2 * i], low), w.high[2 * i], high);
                s23                  = vmmlaq_s32(vmmlaq_s32(s23, w.low[2 * i + 1], low), w.high[2 * i + 1], high);
            }
            sums[t] = vuzp1q_s32(s01, s23);
            if (t + 1 < T) {
                sums[t + 1] = vuzp2q_s32(s01, s23);
            }
        }
    }
};

#    endif

template <typename product, int T>
void q4_dot_tile(int64_t              k,
                 const char *         rows,
                 int64_t              n_rows,
                 const void * const * act,
                 float * const *      acc,
                 const char *         next) {
    int8_act a[T];
    for (int t = 0; t < T; t++) {
        a[t] = int8_act(act[t], k);
    }
    const block_q4_0x4 * w = (const block_q4_0x4 *) rows;
    for (int64_t r = 0; r < n_rows; r += 4) {
        float32x4_t sum[T];
        for (int t = 0; t < T; t++) {
            sum[t] = vld1q_f32(acc[t] + r);
        }
        for (int64_t b = 0; b < k / BLOCK; b++, w++) {
            if (next) {
                __builtin_prefetch(next + ((const char *) w - rows));
            }
            const float32x4_t dw = vcvt_f32_f16(vld1_f16((const float16_t *) w->d));
            int32x4_t         s[T];
            product::template multiply<T>(q4_block(*w), a, b, s);
            for (int t = 0; t < T; t++) {
                sum[t] = vfmaq_f32(sum[t], vcvtq_n_f32_s32(s[t], 4), vmulq_n_f32(dw, a[t].d[b]));
            }
        }
        for (int t = 0; t < T; t++) {
            vst1q_f32(acc[t] + r, sum[t]);
        }
    }
}

template <typename product>
void q4_dot(const tile_weight &  w,
            const char *         rows,
            int64_t              n_rows,
            const void * const * act,
            int64_t              n_act,
            float * const *      acc,
            const char *         next) {
    with_tile<TILE>(n_act,
                    [&](auto tile) { q4_dot_tile<product, decltype(tile)::value>(w.k, rows, n_rows, act, acc, next); });
}

const tile_kernel q4_dot_kernel = {
    /* .rows     = */ 4,
    /* .lanes    = */ 1,
    /* .tile     = */ TILE,
    /* .ahead    = */ 1024,
    /* .act_size = */ int8_act_size,
    /* .act_pack = */ int8_act_pack,
    /* .dot      = */ q4_dot<q4_dot_product>,
    /* .reduce   = */ tile_copy_lanes,
    /* .mul_mat  = */ false,
    /* .act_block = */ 32,
    /* .ahead_rows = */ 0,
};

}  // namespace

const tile_kernel * tile_kernel_arm(ggml_type type, int64_t group, int64_t inter, int64_t n_rows) {
    const tile_layout layout = tile_layout_get(group, inter, n_rows);
    if (type != GGML_TYPE_Q4_0 || layout == ROWS_PLAIN) {
        const tile_kernel * kernel = tile_kernel_blocks_32(type, layout);
        return kernel ? kernel : tile_kernel_blocks_256(type, layout);
    }
#    if defined(__ARM_FEATURE_MATMUL_INT8)
    static const tile_kernel q4_mm_kernel = {
        /* .rows     = */ 4,
        /* .lanes    = */ 1,
        /* .tile     = */ TILE,
        /* .ahead    = */ 1024,
        /* .act_size = */ int8_act_size,
        /* .act_pack = */ int8_act_pack,
        /* .dot      = */ q4_dot<q4_matrix_product>,
        /* .reduce   = */ tile_copy_lanes,
        /* .mul_mat  = */ false,
        /* .act_block = */ 32,
        /* .ahead_rows = */ 0,
    };
    if (layout == ROWS_4X8) {
        return &q4_mm_kernel;
    }
#    endif
    return layout == ROWS_4X4 ? &q4_dot_kernel : nullptr;
}

#else

const tile_kernel * tile_kernel_arm(ggml_type, int64_t, int64_t, int64_t) {
    return nullptr;
}

#endif
