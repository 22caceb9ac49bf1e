// Attention over the cache, for the query rows (heads x tokens) that share a key/value head together, in three stages:
//   1. scores: small matrix products of the rows and a tile of keys, which is widened once for all of them
//   2. weights: per row, relative to the maximum over all that it sees
//   3. values: small matrix products of the weights and a tile of values
//
// A row's bits depend on nothing but the sequence of keys and values that it sees: not on where these lie in the cache, what
// lies between them, the other rows or the threads. A score is a sum along the head. A maximum has no order. The sum of the
// weights is formed in integers, which have none either. A sum of values is one chain of fused multiply-adds in the order
// of the cache, and what a row does not see has weight 0, which changes no bit of it.
#include "flash-attn.h"

#include "flash-attn-op.h"
#include "ggml-cpu-impl.h"

#include <cstring>

#if FLASH_VEC

namespace {

// the rows of a piece; their scores from `scores` on
void rows_get(const attn_op & op, const attn_piece & piece, float * scores, attn_row * rows) {
    for (int64_t i = 0; i < piece.n; i++) {
        rows[i]        = attn_row_get(op, piece, i);
        rows[i].scores = scores + i * op.score_stride;
    }
}

// copies queries that have no whole vectors, or lie across cache lines
void queries_get(const attn_op & op, const attn_piece & piece, const attn_scratch & s, attn_row * rows) {
    for (int64_t i = 0; i < piece.n; i++) {
        if (op.dk_pad > op.dk || (uintptr_t) rows[i].q % sizeof(fvec) != 0) {
            float * copy = s.q + i * op.dk_pad;
            memcpy(copy, rows[i].q, op.dk * sizeof(float));
            std::fill(copy + op.dk, copy + op.dk_pad, 0.0f);
            rows[i].q = copy;
        }
    }
}

// all stages of one piece
void run_piece(const attn_op & op, attn_piece piece, bool listed, const attn_scratch & s, float * scores) {
    attn_row rows[MAX_ROWS];
    rows_get(op, piece, scores, rows);
    queries_get(op, piece, s, rows);
    if (listed) {
        attn_piece_list(op, rows, s.cells, piece);
    }
    for (int64_t index = 0; index < piece.n_tiles(); index++) {
        attn_scores(op, piece, rows, index, (index + 1) * TILE, s);
    }
    for (int64_t i = 0; i < piece.n; i++) {
        attn_weights(op, piece, rows[i]);
    }
    attn_values(op, piece, rows, 0, op.dv_pad, s);
}

// whole pieces, by whichever thread is free
void run_whole(const ggml_compute_params * params,
               const attn_op &             op,
               const attn_plan &           p,
               const attn_scratch &        s,
               float *                     scores) {
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    for (int64_t i = params->ith; i < p.n_pieces(op); i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        run_piece(op, attn_piece_get(op, p, i), p.listed, s, scores);
    }
}

// stage by stage
void run_stages(const ggml_compute_params * params,
                const attn_op &             op,
                const attn_plan &           p,
                const attn_scratch &        s,
                float *                     scores) {
    const int64_t heads = op.n_heads_kv * op.n_streams;
    const int     nth   = params->nth;
    attn_row      rows[MAX_ROWS];

    const auto piece_get = [&](int64_t i) {
        const attn_piece piece = attn_piece_get(op, p, i);
        const int64_t    head  = piece.stream * op.n_heads_kv + piece.head_kv;
        rows_get(op, piece, scores + (head * op.n_rows + piece.row) * op.score_stride, rows);
        return piece;
    };
    for (int64_t i = params->ith; i < p.n_pieces(op) * op.n_tiles; i += nth) {
        const attn_piece piece = piece_get(i / op.n_tiles);
        queries_get(op, piece, s, rows);
        attn_scores(op, piece, rows, i % op.n_tiles, (i % op.n_tiles + nth) * TILE, s);
    }
    ggml_barrier(params->threadpool);
    for (int64_t i = params->ith; i < heads * op.n_rows; i += nth) {
        const attn_piece piece = { i / op.n_rows % op.n_heads_kv, 0, i % op.n_rows, 1, op.n_kv, nullptr };
        attn_row         row   = attn_row_get(op, piece, 0);
        row.scores             = scores + i * op.score_stride;
        attn_weights(op, piece, row);
    }
    ggml_barrier(params->threadpool);
    const int64_t units = attn_pad(op.dv, STRIP) / STRIP;
    for (int64_t i = params->ith; i < p.n_pieces(op) * p.n_strips; i += nth) {
        const attn_piece piece = piece_get(i / p.n_strips);
        const int64_t    strip = i % p.n_strips;
        attn_values(op, piece, rows, units * strip / p.n_strips * STRIP,
                    std::min(units * (strip + 1) / p.n_strips * STRIP, op.dv_pad), s);
    }
}

}  // namespace

bool ggml_flash_attn_work_size(ggml_tensor * dst, int n_tasks, size_t * size) {
    attn_op op;
    if (!attn_op_get(dst, op)) {
        return false;
    }
    const int64_t scores = std::max(n_tasks * attn_block_rows(op) * op.score_stride, attn_shared_scores(op));
    *size                = (n_tasks * attn_scratch::size(op) + scores + LINE) * sizeof(float);
    return true;
}

bool ggml_compute_forward_flash_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    attn_op op;
    if (params->use_ref || !attn_op_get(dst, op)) {
        return false;
    }
    const attn_plan    p      = attn_plan_get(op, params->nth);
    const int64_t      own    = attn_block_rows(op) * op.score_stride;
    float *            work   = (float *) (((uintptr_t) params->wdata + 63) / 64 * 64);
    float *            scores = work + params->nth * attn_scratch::size(op);
    const attn_scratch s(op, work + params->ith * attn_scratch::size(op));
    GGML_ASSERT((char *) (scores + (p.by_stage ? attn_shared_scores(op) : params->nth * own)) <=
                (char *) params->wdata + params->wsize);
    if (p.by_stage) {
        run_stages(params, op, p, s, scores);
    } else {
        run_whole(params, op, p, s, scores + params->ith * own);
    }
    return true;
}

#else

bool ggml_flash_attn_work_size(ggml_tensor *, int, size_t *) {
    return false;
}

bool ggml_compute_forward_flash_attn(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

#endif
