// Matrix products for a few tokens, by kernels for tiles of tokens: a weight is loaded once for a tile of tokens, ahead
// of its use, and the result of a token does not depend on the others.
//
// Two phases with a barrier between them:
//   pack     : every thread packs its part of every activation row
//   multiply : pieces (rows of the weight), taken dynamically, times all tokens
#include "token-tiles.h"

#include "ggml-cpu-impl.h"
#include "tile-kernels.h"

namespace {

constexpr int64_t MAX_ROWS = 64;  // of the weight, per piece

struct tiles_plan {
    tile_weight w;
    int64_t     rows;         // of the weight, per piece
    int64_t     n;            // tokens
    size_t      act_size;     // bytes of a packed activation row
    size_t      thread_size;  // bytes of scratch per thread
    size_t      total;
};

bool plan_get(const ggml_tensor * dst, int n_tasks, tiles_plan & p) {
    const int32_t hint = ggml_get_op_params_i32(dst, 1);
    if (dst->op != GGML_OP_MUL_MAT || (hint != GGML_HINT_TOKEN_TILES && hint != GGML_HINT_BATCH_INVARIANT)) {
        return false;
    }
    const ggml_tensor * w = dst->src[0];
    const ggml_tensor * x = dst->src[1];
    const bool plain      = x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && w->ne[2] == 1 && w->ne[3] == 1 &&
                       w->nb[1] == ggml_row_size(w->type, w->ne[0]);
    if (!plain || x->ne[2] != 1 || x->ne[3] != 1 || !tile_weight_get(w, &p.w)) {
        return false;
    }
    if (hint == GGML_HINT_TOKEN_TILES && !p.w.kernel->mul_mat) {
        return false;
    }
    const int64_t by_tasks = (p.w.n_rows + 4 * n_tasks - 1) / (4 * n_tasks);
    p.rows                 = GGML_PAD(std::min(by_tasks, MAX_ROWS), p.w.kernel->rows);
    p.n                    = x->ne[1];
    p.act_size             = p.w.kernel->act_size(p.w, p.w.k);
    p.thread_size          = tile_align(MAX_TILE * MAX_ROWS * p.w.kernel->lanes * sizeof(float));
    p.total                = p.n * p.act_size + n_tasks * p.thread_size;
    return true;
}

// rows [row, row + n_rows) of the weight times all tokens
void multiply_piece(const tiles_plan & p,
                    const char *       acts,
                    int64_t            row,
                    int64_t            n_rows,
                    float *            lanes,
                    ggml_tensor *      dst) {
    const char *  rows   = p.w.data + row * p.w.row_size;
    const int64_t stride = dst->nb[1] / sizeof(float);
    for (int64_t t = 0; t < p.n;) {
        const int64_t n = next_tile(p.n - t, p.w.kernel->tile);
        const void *  act[MAX_TILE];
        for (int64_t i = 0; i < n; i++) {
            act[i] = acts + (t + i) * p.act_size;
        }
        // the tiles after the first find the rows in the cache
        tile_multiply_rows(p.w, rows, n_rows, act, n, lanes, (float *) dst->data + t * stride + row, stride, t == 0);
        t += n;
    }
}

}  // namespace

size_t ggml_token_tiles_work_size(const ggml_tensor * dst, int n_tasks) {
    tiles_plan p;
    return plan_get(dst, n_tasks, p) ? p.total + 64 : 0;
}

bool ggml_compute_forward_token_tiles(const ggml_compute_params * params, ggml_tensor * dst) {
    tiles_plan p;
    if (!plan_get(dst, params->nth, p) || (params->use_ref && !p.w.packed)) {
        return false;
    }
    char *    work  = (char *) tile_align((size_t) params->wdata);
    float *   lanes = (float *) (work + p.n * p.act_size + params->ith * p.thread_size);
    const int ith   = params->ith;
    const int nth   = params->nth;
    GGML_ASSERT(work + p.total <= (char *) params->wdata + params->wsize);

    if (ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, 0);
    }
    const int64_t n_blocks = p.w.k / p.w.act_block;
    const int64_t first    = n_blocks * ith / nth * p.w.act_block;
    const int64_t end      = n_blocks * (ith + 1) / nth * p.w.act_block;
    for (int64_t t = 0; t < p.n && first < end; t++) {
        const float * x = tile_row(dst->src[1], t);
        p.w.kernel->act_pack(p.w, p.w.k, first, end - first, x + first, 1.0f, work + t * p.act_size);
    }
    ggml_barrier(params->threadpool);

    int64_t piece;
    while ((piece = ggml_threadpool_chunk_add(params->threadpool, 1)) * p.rows < p.w.n_rows) {
        const int64_t row = piece * p.rows;
        multiply_piece(p, work, row, std::min(p.rows, p.w.n_rows - row), lanes, dst);
    }
    return true;
}
