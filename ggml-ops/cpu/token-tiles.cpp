// Matrix products for a few tokens, by kernels for tiles of tokens: a weight is loaded once for a tile of tokens, ahead
// of its use, and the result of a token does not depend on the others.
//
// A weight may have a matrix per head, each with activation rows of its own. Two phases with a barrier between them:
//   pack     : every thread packs its part of all activation rows
//   multiply : pieces (rows of the weight of a head), taken dynamically, times all tokens
#include "token-tiles.h"

#include "ggml-cpu-impl.h"
#include "tile-kernels.h"

namespace {

constexpr int64_t MAX_ROWS = 64;  // of the weight, per piece

struct tiles_plan {
    tile_weight w;
    int64_t     rows;         // of the weight, per piece
    int64_t     stride;       // rows from a piece to the one that the same thread will probably take next
    int64_t     n;            // tokens
    int64_t     heads;        // matrices of the weight
    size_t      act_size;     // bytes of a packed activation row
    size_t      thread_size;  // bytes of scratch per thread
    size_t      total;
};

bool plan_get(const ggml_tensor * dst, int n_tasks, tiles_plan & p) {
    const int32_t hint = ggml_get_op_params_i32(dst, 1);
    if (dst->op != GGML_OP_MUL_MAT || (hint != GGML_HINT_TOKEN_TILES && hint != GGML_HINT_BATCH_INVARIANT)) {
        return false;
    }
    const ggml_tensor * w     = dst->src[0];
    const ggml_tensor * x     = dst->src[1];
    const bool          plain = x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && w->ne[3] == 1 &&
                       w->nb[1] == ggml_row_size(w->type, w->ne[0]) && w->nb[2] == w->nb[1] * w->ne[1];
    if (!plain || x->ne[2] != w->ne[2] || x->ne[3] != 1 || !tile_weight_get(w, &p.w)) {
        return false;
    }
    if (hint == GGML_HINT_TOKEN_TILES && !p.w.kernel->mul_mat) {
        return false;
    }
    const int64_t by_tasks = (p.w.n_rows * w->ne[2] + 4 * n_tasks - 1) / (4 * n_tasks);
    p.rows                 = GGML_PAD(std::min(by_tasks, MAX_ROWS), p.w.kernel->rows);
    p.stride               = n_tasks * p.rows;
    p.n                    = x->ne[1];
    p.heads                = w->ne[2];
    p.act_size             = p.w.kernel->act_size(p.w, p.w.k);
    p.thread_size          = tile_align(MAX_TILE * MAX_ROWS * p.w.kernel->lanes * sizeof(float));
    p.total                = p.heads * p.n * p.act_size + n_tasks * p.thread_size;
    return true;
}

// part `ith` of `nth` of the blocks of all activation rows [k, n, heads]
void pack_part(const tiles_plan & p, const ggml_tensor * x, int64_t ith, int64_t nth, char * acts) {
    const int64_t n_blocks = p.w.k / p.w.act_block;
    const int64_t all      = n_blocks * p.n * p.heads;
    for (int64_t at = all * ith / nth, end = all * (ith + 1) / nth; at < end;) {
        const int64_t row   = at / n_blocks;
        const int64_t first = at % n_blocks;
        const int64_t last  = std::min(first + end - at, n_blocks);
        const float * from  = (const float *) ((const char *) x->data + row / p.n * x->nb[2] + row % p.n * x->nb[1]) +
                             first * p.w.act_block;
        p.w.kernel->act_pack(p.w, p.w.k, first * p.w.act_block, (last - first) * p.w.act_block, from, 1.0f,
                             acts + row * p.act_size);
        at += last - first;
    }
}

// rows [row, row + n_rows) of the weight of a head times all tokens
void multiply_piece(const tiles_plan & p,
                    const char *       acts,
                    int64_t            head,
                    int64_t            row,
                    int64_t            n_rows,
                    float *            lanes,
                    ggml_tensor *      dst) {
    const char *  rows   = p.w.data + head * p.w.expert_size + row * p.w.row_size;
    float *       out    = (float *) ((char *) dst->data + head * dst->nb[2]) + row;
    const int64_t stride = dst->nb[1] / sizeof(float);
    const int64_t group  = p.w.kernel->ahead_rows;
    for (int64_t t = 0; t < p.n;) {
        const int64_t n = next_tile(p.n - t, p.w.kernel->tile);
        const void *  act[MAX_TILE];
        for (int64_t i = 0; i < n; i++) {
            act[i] = acts + (head * p.n + t + i) * p.act_size;
        }
        if (t > 0 || group == 0) {  // the tiles after the first find the rows in the cache
            const char * next = t == 0 ? tile_ahead(p.w, rows) : nullptr;
            tile_multiply_rows(p.w, rows, n_rows, act, n, lanes, out + t * stride, stride, next);
        }
        for (int64_t r = 0; t == 0 && group > 0 && r < n_rows; r += group) {
            // after the last group comes the piece that this thread will probably take next
            const char * at   = rows + r * p.w.row_size;
            const char * next = r + group < n_rows ? at + group * p.w.row_size : rows + p.stride * p.w.row_size;
            tile_multiply_rows(p.w, at, std::min(group, n_rows - r), act, n, lanes, out + r, stride, next);
        }
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
    char *  work  = (char *) tile_align((size_t) params->wdata);
    float * lanes = (float *) (work + p.heads * p.n * p.act_size + params->ith * p.thread_size);
    GGML_ASSERT(work + p.total <= (char *) params->wdata + params->wsize);

    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, 0);
    }
    pack_part(p, dst->src[1], params->ith, params->nth, work);
    ggml_barrier(params->threadpool);

    const int64_t chunks = (p.w.n_rows + p.rows - 1) / p.rows;
    int64_t       piece;
    while ((piece = ggml_threadpool_chunk_add(params->threadpool, 1)) < chunks * p.heads) {
        const int64_t row = piece % chunks * p.rows;
        multiply_piece(p, work, piece / chunks, row, std::min(p.rows, p.w.n_rows - row), lanes, dst);
    }
    return true;
}
