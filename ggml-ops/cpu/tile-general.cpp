// Kernels for every weight type: ggml's vec_dot on plain rows, upstream's gemv on the packed rows of CPU_REPACK; and
// the choice of the kernel for a weight.
#include "ggml-backend.h"
#include "ggml-cpu-impl.h"
#include "repack.h"
#include "tile-kernels.h"

#include <cmath>

namespace {

// an activation row: the factor, then the row in w.act_type
constexpr size_t ACT_HEAD = 64;

size_t general_act_size(const tile_weight & w, int64_t k) {
    return ACT_HEAD + tile_align(ggml_row_size(w.act_type, k));
}

bool all_finite(const float * x, int64_t n) {
    return std::all_of(x, x + n, [](float v) { return std::isfinite(v); });
}

// n values that are no numbers, in a quantized type: zeros with the scale NaN. Upstream's quantizers would make numbers
// of them. Every type of activations begins its blocks with the scale.
void poison(ggml_type type, int64_t n, char * to) {
    memset(to, 0, ggml_row_size(type, n));
    for (int64_t i = 0; i < n; i += ggml_blck_size(type), to += ggml_type_size(type)) {
        if (type == GGML_TYPE_Q8_K) {
            const float nan = NAN;
            memcpy(to, &nan, sizeof(nan));
        } else {
            const ggml_fp16_t nan = ggml_fp32_to_fp16(NAN);
            memcpy(to, &nan, sizeof(nan));
        }
    }
}

void general_act_pack(const tile_weight & w,
                      int64_t,
                      int64_t       first,
                      int64_t       n,
                      const float * x,
                      float         factor,
                      void *        act) {
    if (first == 0) {  // the other pieces of the row have the same factor
        *(float *) act = factor;
    }
    char * to = (char *) act + ACT_HEAD + ggml_row_size(w.act_type, first);
    if (ggml_is_quantized(w.act_type) && !all_finite(x, n)) {
        poison(w.act_type, n, to);
    } else {
        w.from_float(x, to, n);
    }
}

void vec_dot_rows(const tile_weight &  w,
                  const char *         rows,
                  int64_t              n_rows,
                  const void * const * act,
                  int64_t              n_act,
                  float * const *      acc,
                  const char *) {
    for (int64_t r = 0; r < n_rows; r++) {
        for (int64_t t = 0; t < n_act; t++) {
            float sum = 0.0f;
            w.vec_dot((int) w.k, &sum, 0, rows + r * w.row_size, 0, (const char *) act[t] + ACT_HEAD, 0, 1);
            acc[t][r] = std::fma(*(const float *) act[t], sum, acc[t][r]);
        }
    }
}

// Upstream's gemm kernels take four activation rows at once, but round differently from gemv: not batch-invariant.
void gemv_rows(const tile_weight &  w,
               const char *         rows,
               int64_t              n_rows,
               const void * const * act,
               int64_t              n_act,
               float * const *      acc,
               const char *) {
    constexpr int64_t SPAN = 64;  // rows per call, a multiple of every group
    float             sums[SPAN];
    for (int64_t r = 0; r < n_rows; r += SPAN) {
        const int64_t n = std::min(SPAN, n_rows - r);
        for (int64_t t = 0; t < n_act; t++) {
            w.gemv((int) w.k, sums, n, rows + r * w.row_size, (const char *) act[t] + ACT_HEAD, 1, (int) n);
            for (int64_t i = 0; i < n; i++) {
                acc[t][r + i] = std::fma(*(const float *) act[t], sums[i], acc[t][r + i]);
            }
        }
    }
}

const tile_kernel vec_dot_kernel = {
    /* .rows     = */ 1,
    /* .lanes    = */ 1,
    /* .tile     = */ 8,
    /* .ahead    = */ 0,
    /* .act_size = */ general_act_size,
    /* .act_pack = */ general_act_pack,
    /* .dot      = */ vec_dot_rows,
    /* .reduce   = */ tile_copy_lanes,
    /* .mul_mat  = */ false,
    /* .act_block = */ 0,
    /* .ahead_rows = */ 0,
};
const tile_kernel gemv_kernel = {
    /* .rows     = */ 16,
    /* .lanes    = */ 1,
    /* .tile     = */ 8,
    /* .ahead    = */ 0,
    /* .act_size = */ general_act_size,
    /* .act_pack = */ general_act_pack,
    /* .dot      = */ gemv_rows,
    /* .reduce   = */ tile_copy_lanes,
    /* .mul_mat  = */ false,
    /* .act_block = */ 0,
    /* .ahead_rows = */ 0,
};

const tile_kernel * fast_kernel(ggml_type type, int64_t group, int64_t inter, int64_t n_rows) {
    const tile_kernel * kernel = tile_kernel_x86(type, group, inter, n_rows);
    return kernel ? kernel : tile_kernel_arm(type, group, inter, n_rows);
}

}  // namespace

bool tile_weight_get(const ggml_tensor * t, tile_weight * w) {
    w->data        = (const char *) t->data;
    w->k           = t->ne[0];
    w->n_rows      = t->ne[1];
    w->row_size    = ggml_row_size(t->type, t->ne[0]);
    w->expert_size = w->row_size * t->ne[1];
    w->vec_dot     = nullptr;
    w->gemv        = nullptr;
    w->act_type    = GGML_TYPE_F32;

    ggml_repack_kernel packed;
    w->packed = ggml_repack_get_kernel(t, &packed);
    if (!w->packed && t->buffer && !ggml_backend_buffer_is_host(t->buffer)) {
        return false;  // a layout of somebody else
    }
    w->kernel = fast_kernel(t->type, w->packed ? packed.rows : 1, w->packed ? packed.inter : 0, w->n_rows);
    if (w->kernel) {
        w->act_block = w->kernel->act_block;
        return true;
    }
    if (w->packed) {
        w->kernel   = &gemv_kernel;
        w->act_type = packed.act_type;
        w->gemv     = packed.gemv;
    } else {
        w->kernel   = &vec_dot_kernel;
        w->act_type = ggml_get_type_traits_cpu(t->type)->vec_dot_type;
        w->vec_dot  = ggml_get_type_traits_cpu(t->type)->vec_dot;
    }
    w->from_float = ggml_get_type_traits_cpu(w->act_type)->from_float;
    w->act_block  = ggml_blck_size(w->act_type);
    return (w->vec_dot || w->gemv) && w->from_float && w->k % w->act_block == 0;
}
