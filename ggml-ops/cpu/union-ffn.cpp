// The union FFN op: every expert that any token needs is loaded once and only active (token, expert) pairs are computed.
//
// Three phases with a barrier between them, for blocks of tokens:
//   gather : pack the input rows, list the tokens of every expert
//   up     : pieces (expert, rows of d), taken dynamically: up (and gate) rows times all tokens of the expert, activation,
//            and the hidden values packed again, with the router score folded in
//   down   : pieces (rows of n_embd), taken dynamically: the sum over the experts in ascending order
// A piece owns its outputs, so no result depends on the number of threads or on who took which piece.
#include "union-ffn.h"

#include "ggml-cpu-impl.h"
#include "tile-kernels.h"
#include "union-ffn-op.h"
#include "vec.h"

#include <cstring>

namespace {

constexpr int64_t UP_CHUNK        = 32;        // rows of d per piece; one block of the packed hidden row
constexpr size_t  HIDDEN_LIMIT    = 8 << 20;   // bytes of packed hidden rows; bounds the tokens of a block
constexpr int64_t MIN_BLOCK       = 64;        // tokens
constexpr size_t  ACC_LIMIT       = 64 << 10;  // bytes of accumulators that a down piece aims at
constexpr int64_t MAX_DOWN_CHUNK  = 128;       // rows of n_embd per piece
constexpr int64_t DOWN_CHUNK_STEP = 32;

// what one block of tokens needs, laid out in the work buffer
struct union_plan {
    union_op    op;
    tile_weight up, gate, down;
    bool        gate_own_act;                      // gate reads another activation format than up
    int64_t     block;                             // most tokens per block
    int64_t     up_chunk;                          // rows of d per piece
    int64_t     down_chunk;                        // rows of n_embd per piece
    size_t      x_size, gate_x_size, hidden_size;  // bytes of one packed row
    size_t      thread_size;                       // bytes of scratch per thread
    size_t      at_tokens, at_pair_score, at_mean, at_x, at_gate_x, at_hidden, at_threads;  // offsets
    size_t      total;
};

// the head of the work buffer; arrays follow
struct union_lists {
    int32_t n_active;
    int32_t pad[15];
    // int32_t active[n_expert]     experts needed by any token, ascending
    // int32_t first[n_expert + 1]  first pair of active[i]
    // int32_t cursor[n_expert]     while the pairs are listed
};

int64_t round_down(int64_t value, int64_t step) {
    return value / step * step;
}

int64_t plan_down_chunk(const union_plan & p, int n_tasks) {
    const size_t  row_bytes = p.block * p.down.kernel->lanes * sizeof(float);
    const int64_t by_cache  = (int64_t) (ACC_LIMIT / row_bytes);
    const int64_t by_tasks  = p.op.n_embd / (2 * n_tasks);
    return std::max<int64_t>(DOWN_CHUNK_STEP,
                             round_down(std::min({ by_cache, by_tasks, MAX_DOWN_CHUNK }), DOWN_CHUNK_STEP));
}

size_t plan_thread_size(const union_plan & p) {
    const int64_t lanes = std::max(p.up.kernel->lanes, p.op.gate ? p.gate.kernel->lanes : 1);
    const size_t  up    = MAX_TILE * p.up_chunk * (lanes + 2) * sizeof(float);
    // the largest chunk for any number of threads, since fewer may come than were planned
    const size_t  down  = std::max(ACC_LIMIT, p.block * DOWN_CHUNK_STEP * p.down.kernel->lanes * sizeof(float));
    return tile_align(std::max(up, down));
}

bool union_plan_get(const ggml_tensor * dst, int n_tasks, union_plan & p) {
    if (!union_op_check(dst)) {
        return false;
    }
    p.op = union_op_get(dst);
    if (!tile_weight_get(p.op.up, &p.up) || !tile_weight_get(p.op.down, &p.down) ||
        (p.op.gate && !tile_weight_get(p.op.gate, &p.gate))) {
        return false;
    }
    const union_op & op = p.op;
    p.gate_own_act      = op.gate && (p.gate.kernel != p.up.kernel || p.gate.act_type != p.up.act_type);

    p.x_size      = p.up.kernel->act_size(p.up, op.n_embd);
    p.gate_x_size = p.gate_own_act ? p.gate.kernel->act_size(p.gate, op.n_embd) : 0;
    p.hidden_size = p.down.kernel->act_size(p.down, op.d);

    const int64_t by_hidden = (int64_t) (HIDDEN_LIMIT / (op.n_expert * p.hidden_size));
    p.block      = std::min(std::max<int64_t>(op.n_tokens, 1), std::max(MIN_BLOCK, round_down(by_hidden, 8)));
    p.up_chunk   = union_act_has_norm(op.act) ? op.d : std::max(UP_CHUNK, p.down.act_block);
    p.down_chunk = plan_down_chunk(p, n_tasks);

    const size_t pairs = (size_t) p.block * op.n_expert;
    p.at_tokens        = tile_align(sizeof(union_lists) + (3 * op.n_expert + 1) * sizeof(int32_t));
    p.at_pair_score    = p.at_tokens + tile_align(pairs * sizeof(int32_t));
    p.at_mean          = p.at_pair_score + tile_align(pairs * sizeof(float));
    p.at_x             = p.at_mean + tile_align(p.block * sizeof(float));
    p.at_gate_x        = p.at_x + p.block * p.x_size;
    p.at_hidden        = p.at_gate_x + p.block * p.gate_x_size;
    p.at_threads       = p.at_hidden + pairs * p.hidden_size;
    p.thread_size      = plan_thread_size(p);
    p.total            = p.at_threads + p.thread_size * n_tasks;
    return true;
}

// one thread's view of the op while it computes
struct union_run {
    const union_plan &          p;
    const ggml_compute_params * params;
    ggml_tensor *               dst;
    char *                      work;
    int64_t                     t0;  // first token of the block
    int64_t                     n;   // tokens of the block

    int32_t & n_active() const { return ((union_lists *) work)->n_active; }

    int32_t * active() const { return (int32_t *) (work + sizeof(union_lists)); }

    int32_t * first() const { return active() + p.op.n_expert; }

    int32_t * cursor() const { return first() + p.op.n_expert + 1; }

    int32_t * tokens() const { return (int32_t *) (work + p.at_tokens); }

    float * pair_score() const { return (float *) (work + p.at_pair_score); }

    float * mean() const { return (float *) (work + p.at_mean); }

    char * x(int64_t t) const { return work + p.at_x + t * p.x_size; }

    char * gate_x(int64_t t) const { return p.gate_own_act ? work + p.at_gate_x + t * p.gate_x_size : x(t); }

    char * hidden(int64_t pair) const { return work + p.at_hidden + pair * p.hidden_size; }

    float * scratch() const { return (float *) (work + p.at_threads + params->ith * p.thread_size); }
};

// --- gather ---------------------------------------------------------------------------------------------------------

// pairs ordered by expert, then by token; scores are read row by row
void list_pairs(const union_run & run) {
    const int64_t n_expert = run.p.op.n_expert;
    int32_t *     cursor   = run.cursor();  // pairs of every expert, then where its next pair goes
    memset(cursor, 0, n_expert * sizeof(int32_t));
    for (int64_t t = 0; t < run.n; t++) {
        const float * scores = tile_row(run.p.op.scores, run.t0 + t);
        for (int64_t e = 0; e < n_expert; e++) {
            cursor[e] += scores[e] != 0.0f;
        }
    }
    int32_t pair = 0, n_active = 0;
    for (int64_t e = 0; e < n_expert; e++) {
        const int32_t count = cursor[e];
        cursor[e]           = pair;
        if (count > 0) {
            run.active()[n_active]  = (int32_t) e;
            run.first()[n_active++] = pair;
        }
        pair += count;
    }
    run.first()[n_active] = pair;
    run.n_active()        = n_active;
    for (int64_t t = 0; t < run.n; t++) {
        const float * scores = tile_row(run.p.op.scores, run.t0 + t);
        for (int64_t e = 0; e < n_expert; e++) {
            if (scores[e] != 0.0f) {
                const int32_t at     = cursor[e]++;
                run.tokens()[at]     = (int32_t) t;
                run.pair_score()[at] = scores[e];
            }
        }
    }
}

// sum of a[i] * b[i] in an order that depends on n alone: eight partial sums, since a single one waits for itself
double dot_in_order(const float * a, const float * b, int64_t n) {
    double  part[8] = {};
    int64_t i       = 0;
    for (; i + 8 <= n; i += 8) {
        for (int k = 0; k < 8; k++) {
            part[k] += (double) a[i + k] * b[i + k];
        }
    }
    for (; i < n; i++) {
        part[i % 8] += (double) a[i] * b[i];
    }
    return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

void gather(const union_run & run) {
    const union_plan & p = run.p;
    if (run.params->ith == 0) {
        ggml_threadpool_chunk_set(run.params->threadpool, 0);
        list_pairs(run);
    }
    for (int64_t t = run.params->ith; t < run.n; t += run.params->nth) {
        const float * x = tile_row(p.op.x, run.t0 + t);
        p.up.kernel->act_pack(p.up, p.op.n_embd, 0, p.op.n_embd, x, 1.0f, run.x(t));
        if (p.gate_own_act) {
            p.gate.kernel->act_pack(p.gate, p.op.n_embd, 0, p.op.n_embd, x, 1.0f, run.gate_x(t));
        }
        run.mean()[t] = p.op.act_mean ? (float) dot_in_order(p.op.act_mean, x, p.op.n_embd) : 0.0f;
    }
}

// --- up -------------------------------------------------------------------------------------------------------------

// a[n_rows] = activation of a - mean; with a norm, a is the whole hidden row
void activate(const union_op & op, int64_t n_rows, float mean, float * a) {
    if (op.act_mean) {
        for (int64_t r = 0; r < n_rows; r++) {
            a[r] -= mean;
        }
    }
    if (union_act_has_norm(op.act)) {
        const float   rms  = (float) (1.0 / std::sqrt(dot_in_order(a, a, n_rows) / n_rows + op.eps));
        const float * norm = op.act_norm;
        for (int64_t r = 0; r < n_rows; r++) {
            a[r] *= norm ? rms * norm[r] : rms;
        }
    }
    switch (op.act) {
        case GGML_UNION_ACT_RELU:
        case GGML_UNION_ACT_RELU_SQUARED:
        case GGML_UNION_ACT_GELU:
            for (int64_t r = 0; r < n_rows; r++) {
                a[r] = union_act_scalar(op.act, a[r]);
            }
            break;
        default:
            ggml_vec_silu_f32((int) n_rows, a, a);
    }
}

// rows [row, row + n_rows) of active expert i for pairs [pair, pair + n)
void up_tile(const union_run & run, int64_t i, int64_t row, int64_t n_rows, int64_t pair, int64_t n, bool cold) {
    const union_plan & p     = run.p;
    const int64_t      e     = run.active()[i];
    float *            lanes = run.scratch();
    float *            z     = lanes + (p.thread_size / sizeof(float) - 2 * MAX_TILE * p.up_chunk);
    float *            gate  = z + MAX_TILE * p.up_chunk;

    const void * x[MAX_TILE];
    for (int64_t t = 0; t < n; t++) {
        x[t] = run.x(run.tokens()[pair + t]);
    }
    const char * rows = p.up.data + e * p.up.expert_size + row * p.up.row_size;
    tile_multiply_rows(p.up, rows, n_rows, x, n, lanes, z, n_rows, cold ? tile_ahead(p.up, rows) : nullptr);
    if (p.op.gate) {
        for (int64_t t = 0; t < n; t++) {
            x[t] = run.gate_x(run.tokens()[pair + t]);
        }
        rows = p.gate.data + e * p.gate.expert_size + row * p.gate.row_size;
        tile_multiply_rows(p.gate, rows, n_rows, x, n, lanes, gate, n_rows, cold ? tile_ahead(p.gate, rows) : nullptr);
    }
    for (int64_t t = 0; t < n; t++) {
        float * u = z + t * n_rows;
        float * a = p.op.gate ? gate + t * n_rows : u;
        activate(p.op, n_rows, run.mean()[run.tokens()[pair + t]], a);
        if (p.op.gate) {
            ggml_vec_mul_f32((int) n_rows, u, u, a);
        }
        p.down.kernel->act_pack(p.down, p.op.d, row, n_rows, u, run.pair_score()[pair + t], run.hidden(pair + t));
    }
}

int64_t up_tile_limit(const union_plan & p) {
    return p.op.gate ? std::min(p.up.kernel->tile, p.gate.kernel->tile) : p.up.kernel->tile;
}

// returns the number of pieces
int64_t up_phase(const union_run & run) {
    const union_plan & p        = run.p;
    const int64_t      chunks   = (p.op.d + p.up_chunk - 1) / p.up_chunk;
    const int64_t      n_pieces = run.n_active() * chunks;
    const int64_t      tile     = up_tile_limit(p);

    int64_t piece;
    while ((piece = ggml_threadpool_chunk_add(run.params->threadpool, 1)) < n_pieces) {
        const int64_t i      = piece / chunks;
        const int64_t row    = piece % chunks * p.up_chunk;
        const int64_t n_rows = std::min(p.up_chunk, p.op.d - row);
        const int64_t end    = run.first()[i + 1];
        bool          cold   = true;  // the tiles after the first find the rows in the cache
        for (int64_t pair = run.first()[i]; pair < end;) {
            const int64_t n = next_tile(end - pair, tile);
            up_tile(run, i, row, n_rows, pair, n, cold);
            cold = false;
            pair += n;
        }
    }
    return n_pieces;
}

// --- down -----------------------------------------------------------------------------------------------------------

void down_piece(const union_run & run, int64_t row, int64_t n_rows) {
    const union_plan & p    = run.p;
    const int64_t      step = n_rows * p.down.kernel->lanes;
    float *            acc  = run.scratch();  // [n][n_rows][lanes]
    memset(acc, 0, run.n * step * sizeof(float));

    for (int64_t i = 0; i < run.n_active(); i++) {
        const char *  rows = p.down.data + run.active()[i] * p.down.expert_size + row * p.down.row_size;
        const char *  next = i + 1 < run.n_active() ?
                                 p.down.data + run.active()[i + 1] * p.down.expert_size + row * p.down.row_size :
                                 nullptr;
        const int64_t end  = run.first()[i + 1];
        for (int64_t pair = run.first()[i]; pair < end;) {
            const int64_t n = next_tile(end - pair, p.down.kernel->tile);
            const void *  act[MAX_TILE];
            float *       sums[MAX_TILE];
            for (int64_t t = 0; t < n; t++) {
                act[t]  = run.hidden(pair + t);
                sums[t] = acc + run.tokens()[pair + t] * step;
            }
            p.down.kernel->dot(p.down, rows, n_rows, act, n, sums, next);
            next = nullptr;
            pair += n;
        }
    }
    for (int64_t t = 0; t < run.n; t++) {
        float * y = (float *) ((char *) run.dst->data + (run.t0 + t) * run.dst->nb[1]);
        p.down.kernel->reduce(n_rows, acc + t * step, y + row);
    }
}

void down_phase(const union_run & run, int64_t n_up_pieces) {
    const union_plan & p    = run.p;
    // every thread took one number too many in the up phase
    const int64_t      base = n_up_pieces + run.params->nth;

    int64_t piece;
    while ((piece = ggml_threadpool_chunk_add(run.params->threadpool, 1) - base) * p.down_chunk < p.op.n_embd) {
        const int64_t row = piece * p.down_chunk;
        down_piece(run, row, std::min(p.down_chunk, p.op.n_embd - row));
    }
}

}  // namespace

static bool is_rows(const ggml_tensor * t, int64_t ne0, int64_t ne1) {
    return t && t->type == GGML_TYPE_F32 && t->ne[0] == ne0 && t->ne[1] == ne1 && ggml_is_matrix(t) &&
           t->nb[0] == sizeof(float) && t->nb[1] % sizeof(float) == 0;
}

static bool is_experts(const ggml_tensor * t, int64_t ne0, int64_t ne1, int64_t ne2) {
    return t && t->ne[0] == ne0 && t->ne[1] == ne1 && t->ne[2] == ne2 && t->ne[3] == 1 && ggml_is_contiguous(t) &&
           ggml_nelements(t) > 0;
}

static bool is_vector_or_none(const ggml_tensor * t, int64_t n) {
    return !t || (is_rows(t, n, 1) && ggml_is_contiguous(t));
}

bool union_op_check(const ggml_tensor * dst) {
    const ggml_tensor * const * src = dst->src;
    const int32_t               act = ggml_get_op_params_i32(dst, 0);
    if (!src[0] || !src[1] || act < GGML_UNION_ACT_SILU || act > GGML_UNION_ACT_NORM_SILU_NORMS) {
        return false;
    }
    const int64_t n_embd = src[1]->ne[0], d = src[1]->ne[1], n_expert = src[1]->ne[2], n_tokens = src[0]->ne[1];
    return is_rows(dst, n_embd, n_tokens) && is_rows(src[0], n_embd, n_tokens) &&
           is_experts(src[1], n_embd, d, n_expert) && (!src[2] || is_experts(src[2], n_embd, d, n_expert)) &&
           is_experts(src[3], d, n_embd, n_expert) && is_rows(src[4], n_expert, n_tokens) &&
           is_vector_or_none(src[5], n_embd) && is_vector_or_none(src[6], d);
}

bool ggml_union_ffn_supported(const ggml_tensor * dst) {
    union_plan p;
    return union_plan_get(dst, 1, p);
}

size_t ggml_union_ffn_work_size(const ggml_tensor * dst, int n_tasks) {
    union_plan p;
    GGML_ASSERT(union_plan_get(dst, n_tasks, p));
    return std::max(p.total, n_tasks * union_ref_scratch_size(p.op)) + 64;
}

void ggml_compute_forward_union_ffn(const ggml_compute_params * params, ggml_tensor * dst) {
    union_plan p;
    GGML_ASSERT(union_plan_get(dst, params->nth, p));
    const bool packed = p.up.packed || p.down.packed || (p.op.gate && p.gate.packed);
    if (params->use_ref && !packed) {
        ggml_compute_forward_union_ffn_ref(params, dst);
        return;
    }
    char * work = (char *) tile_align((size_t) params->wdata);
    GGML_ASSERT(work + p.total <= (char *) params->wdata + params->wsize);

    for (int64_t t0 = 0; t0 < p.op.n_tokens; t0 += p.block) {
        const union_run run = { p, params, dst, work, t0, std::min(p.block, p.op.n_tokens - t0) };
        if (t0 > 0) {
            ggml_barrier(params->threadpool);
        }
        gather(run);
        ggml_barrier(params->threadpool);
        const int64_t n_up_pieces = up_phase(run);
        ggml_barrier(params->threadpool);
        down_phase(run, n_up_pieces);
    }
}
