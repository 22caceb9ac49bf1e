// Attention over the cache, for the query rows (heads x tokens) that share a key/value head together: keys are widened
// once per tile of the cache, scores and values are small matrix products.
//
// The cache is cut into tiles at fixed positions. A row's result over one tile, with a maximum of its own, is a part;
// parts are merged in the order of the cache. So a row's bits depend on nothing but what it sees: not on the other rows,
// not on the threads, not on how far the cache is padded, since masked keys add nothing and masked tiles are left out.
#include "flash-attn.h"

#include "flash-attn-kernels.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

#include <cstring>

#if FLASH_VEC

namespace {

constexpr int64_t TILE          = 128;      // keys; merging parts costs about 2 % of a tile
constexpr int64_t MAX_ROWS      = 64;       // of a piece: their scores and sums stay in the second-level cache
constexpr int64_t MIN_ROWS      = 32;       // fewer per piece would widen the keys too often
constexpr int64_t GROUP         = 16;       // rows whose queries stay in the first-level cache while the keys go by
constexpr int64_t MAX_PARTS     = 4 << 20;  // floats of stored parts; more rows go without them
constexpr int64_t LINE          = 16;       // floats of a cache line
// F16 and BF16 are widened on load for so many rows, which hides the conversion; for more it would be repeated too often
constexpr int64_t IN_PLACE_ROWS = 16;
const ggml_fp16_t MASKED        = 0xfc00;  // -inf

struct attn_op {
    const ggml_tensor *q, *k, *v, *mask, *sinks;
    float              scale, max_bias, softcap;
    int64_t            dk, dv, n_tokens, n_kv, n_heads, n_heads_kv, n_streams;
    int64_t            group;           // heads per key/value head
    int64_t            n_rows;          // group * n_tokens: rows that share a key/value head of a stream
    bool               v_in_k;          // the values are the first dv elements of the keys
    int64_t            dk_pad, dv_pad;  // in floats, whole vectors
    int64_t k_stride, v_stride;  // floats of a widened row: an odd number of cache lines, which spreads over the sets
};

int64_t pad(int64_t n, int64_t unit) {
    return (n + unit - 1) / unit * unit;
}

int64_t odd_lines(int64_t n) {
    return (pad(n, LINE) / LINE | 1) * LINE;
}

bool readable(const ggml_tensor * t) {
    return t->nb[0] == ggml_type_size(t->type) && (t->type == GGML_TYPE_F32 || ggml_get_type_traits(t->type)->to_float);
}

bool op_get(const ggml_tensor * dst, attn_op & op) {
    if (dst->op != GGML_OP_FLASH_ATTN_EXT || dst->op_params[5]) {
        return false;
    }
    op.q     = dst->src[0];
    op.k     = dst->src[1];
    op.v     = dst->src[2];
    op.mask  = dst->src[3];
    op.sinks = dst->src[4];

    op.scale    = ggml_get_op_params_f32(dst, 0);
    op.max_bias = ggml_get_op_params_f32(dst, 1);
    op.softcap  = ggml_get_op_params_f32(dst, 2);

    op.dk         = op.k->ne[0];
    op.dv         = op.v->ne[0];
    op.n_tokens   = op.q->ne[1];
    op.n_kv       = op.k->ne[1];
    op.n_heads    = op.q->ne[2];
    op.n_heads_kv = op.k->ne[2];
    op.n_streams  = op.q->ne[3];
    op.group      = op.n_heads / op.n_heads_kv;
    op.n_rows     = op.group * op.n_tokens;
    if (op.q->type != GGML_TYPE_F32 || op.q->nb[0] != sizeof(float) || !readable(op.k) || !readable(op.v) ||
        op.v->ne[2] != op.n_heads_kv || op.k->ne[3] != op.n_streams || op.v->ne[3] != op.n_streams) {
        return false;
    }
    op.v_in_k = op.v->data == op.k->data && op.v->type == op.k->type && op.dv <= op.dk && op.v->nb[1] == op.k->nb[1] &&
                (op.n_heads_kv == 1 || op.v->nb[2] == op.k->nb[2]) && (op.n_streams == 1 || op.v->nb[3] == op.k->nb[3]);
    op.dk_pad   = pad(op.dk, FVEC);
    op.dv_pad   = pad(op.dv, FVEC);
    op.k_stride = odd_lines(op.dk);
    op.v_stride = odd_lines(op.dv);
    return true;
}

// scratch of a thread, in floats
struct attn_scratch {
    float * q;       // [MAX_ROWS][dk_pad], where the queries have no whole, aligned vectors
    float * k;       // [TILE][k_stride]
    float * v;       // [TILE][v_stride]
    float * scores;  // [MAX_ROWS][TILE], then the weights
    float * part;    // [MAX_ROWS][part_size], of the tile
    float * total;   // [MAX_ROWS][part_size], merged
    float * bias;    // [TILE]

    attn_scratch(const attn_op & op, float * at) {
        q      = at;
        k      = q + MAX_ROWS * pad(op.dk, LINE);
        v      = k + TILE * op.k_stride;
        scores = v + TILE * op.v_stride;
        part   = scores + MAX_ROWS * TILE;
        total  = part + MAX_ROWS * part_size(op);
        bias   = total + MAX_ROWS * part_size(op);
    }

    // a row's sums of values, then its maximum and the sum of its weights
    static int64_t part_size(const attn_op & op) { return pad(op.dv, LINE) + LINE; }

    static int64_t size(const attn_op & op) {
        return MAX_ROWS * (pad(op.dk, LINE) + TILE + 2 * part_size(op)) + TILE * (op.k_stride + op.v_stride + 1);
    }
};

// how a node is cut into pieces
struct attn_plan {
    int64_t n_blocks;  // of rows, per key/value head
    int64_t n_tiles;
    bool    by_tile;   // a piece is one tile: parts are stored, then merged
};

int64_t parts_size(const attn_op & op) {
    const int64_t size =
        op.n_rows * op.n_heads_kv * op.n_streams * pad(op.n_kv, TILE) / TILE * attn_scratch::part_size(op);
    return size <= MAX_PARTS ? size : 0;
}

attn_plan plan_get(const attn_op & op, int n_threads) {
    attn_plan     p;
    const int64_t heads  = op.n_heads_kv * op.n_streams;
    const int64_t fewest = (op.n_rows + MAX_ROWS - 1) / MAX_ROWS;
    const int64_t most   = std::max(fewest, op.n_rows / MIN_ROWS);

    // whole rows, if that keeps all threads busy nine tenths of the time
    p.n_tiles = (op.n_kv + TILE - 1) / TILE;
    p.by_tile = false;
    for (p.n_blocks = fewest; p.n_blocks <= most; p.n_blocks++) {
        const int64_t rounds = (heads * p.n_blocks + n_threads - 1) / n_threads;
        if (10 * heads * p.n_blocks >= 9 * rounds * n_threads) {
            return p;
        }
    }
    p.by_tile  = p.n_tiles > 1 && parts_size(op) > 0;
    p.n_blocks = p.by_tile ? fewest : most;
    while (p.by_tile && heads * p.n_blocks * p.n_tiles < n_threads && p.n_blocks < op.n_rows) {
        p.n_blocks++;
    }
    return p;
}

// the rows [row, row + n) of the queries that share a key/value head of a stream
struct attn_piece {
    int64_t head_kv, stream, row, n;
};

attn_piece piece_get(const attn_op & op, const attn_plan & p, int64_t i) {
    const int64_t block = i % p.n_blocks;
    const int64_t head  = i / p.n_blocks;
    const int64_t row   = op.n_rows * block / p.n_blocks;
    return { head % op.n_heads_kv, head / op.n_heads_kv, row, op.n_rows * (block + 1) / p.n_blocks - row };
}

// a row of a piece: its query and what it may see
struct attn_row {
    const float *       q;
    const ggml_fp16_t * mask;   // [n_kv] or NULL
    float               slope;  // of ALiBi
    int64_t             head, token;
};

attn_row row_get(const attn_op & op, const attn_piece & piece, int64_t i) {
    attn_row row;
    row.token = (piece.row + i) / op.group;
    row.head  = piece.head_kv * op.group + (piece.row + i) % op.group;
    row.q     = (const float *) ((const char *) op.q->data + row.token * op.q->nb[1] + row.head * op.q->nb[2] +
                             piece.stream * op.q->nb[3]);
    row.mask  = nullptr;
    if (const ggml_tensor * m = op.mask) {
        row.mask = (const ggml_fp16_t *) ((const char *) m->data + row.token * m->nb[1] +
                                          row.head % m->ne[2] * m->nb[2] + piece.stream % m->ne[3] * m->nb[3]);
    }
    row.slope = 1.0f;
    if (op.max_bias > 0.0f) {
        const int64_t n_log2 = 1ll << (int) std::floor(std::log2(op.n_heads));
        row.slope            = row.head < n_log2 ?
                                   std::pow(std::pow(2.0f, -op.max_bias / n_log2), row.head + 1) :
                                   std::pow(std::pow(2.0f, -op.max_bias / 2.0f / n_log2), 2 * (row.head - n_log2) + 1);
    }
    return row;
}

// the rows of a piece, with queries in whole vectors that lie within cache lines
void rows_get(const attn_op & op, const attn_piece & piece, const attn_scratch & s, attn_row * rows) {
    for (int64_t i = 0; i < piece.n; i++) {
        rows[i] = row_get(op, piece, i);
        if (op.dk_pad > op.dk || (uintptr_t) rows[i].q % sizeof(fvec) != 0) {
            float * copy = s.q + i * op.dk_pad;
            memcpy(copy, rows[i].q, op.dk * sizeof(float));
            std::fill(copy + op.dk, copy + op.dk_pad, 0.0f);
            rows[i].q = copy;
        }
    }
}

// the keys [first, end) of a tile, and which rows see any of them
struct attn_tile {
    int64_t start;       // position in the cache
    int64_t first, end;  // within the tile; first is a multiple of LINE
    int64_t n;           // rows
    int16_t rows[MAX_ROWS];
};

attn_tile tile_get(const attn_op & op, const attn_row * rows, int64_t n_rows, int64_t index) {
    attn_tile t;
    t.start                 = index * TILE;
    t.n                     = 0;
    const int64_t       n   = std::min(TILE, op.n_kv - t.start);
    int64_t             low = n, high = 0;  // of what any row sees
    const ggml_fp16_t * seen = nullptr;     // the mask row looked at last; rows of a token mostly share it
    bool                any  = true;
    for (int64_t i = 0; i < n_rows; i++) {
        if (!rows[i].mask) {
            low  = 0;
            high = n;
        } else if (rows[i].mask != seen) {
            seen                  = rows[i].mask;
            const ggml_fp16_t * m = seen + t.start;
            int64_t             a = 0, b = n;
            while (a < n && m[a] == MASKED) {
                a++;
            }
            while (b > a && m[b - 1] == MASKED) {
                b--;
            }
            any = a < b;
            if (any) {
                low  = std::min(low, a);
                high = std::max(high, b);
            }
        }
        if (any) {
            t.rows[t.n++] = (int16_t) i;
        }
    }
    t.first = low / LINE * LINE;
    t.end   = high;
    return t;
}

// a row of d values as whole vectors of floats, with zeros behind its end
void widen(const char * from, ggml_type type, int64_t d, float * to) {
    const int64_t whole = d / FVEC * FVEC;
    if (whole < d || !flash_readable(type)) {
        std::fill(to + whole, to + pad(d, FVEC), 0.0f);
        if (type == GGML_TYPE_F32) {
            memcpy(to, from, d * sizeof(float));
        } else {
            ggml_get_type_traits(type)->to_float(from, to, d);
        }
        return;
    }
    flash_with_type(type, [&](auto * t) {
        for (int64_t c = 0; c < d; c += FVEC) {
            fvec_store(to + c, fvec_load((decltype(t)) from + c));
        }
    });
}

// the rows of a tile of keys or values: where they are, if the kernels can read them there and few rows use them,
// else widened to `to`
flash_rows tile_rows(const ggml_tensor * x, const attn_piece & piece, const attn_tile & t, float * to, int64_t stride) {
    const char * data =
        (const char *) x->data + t.start * x->nb[1] + piece.head_kv * x->nb[2] + piece.stream * x->nb[3];
    if (flash_readable(x->type) && x->ne[0] % FVEC == 0 && (x->type == GGML_TYPE_F32 || t.n <= IN_PLACE_ROWS)) {
        return { data, x->nb[1], x->type };
    }
    for (int64_t j = t.first; j < t.end; j++) {
        widen(data + j * x->nb[1], x->type, x->ne[0], to + j * stride);
    }
    return { (const char *) to, stride * sizeof(float), GGML_TYPE_F32 };
}

// scores -> weights relative to the largest one; stores that and the sum of the weights
void softmax(const attn_op & op, const attn_tile & t, const float * bias, float slope, float * s, float * stat) {
    const fvec scale = fvec_set(op.softcap != 0.0f ? op.scale / op.softcap : op.scale);
    fvec       max   = fvec_set(-INFINITY);
    for (int64_t j = t.first; j < t.end; j += FVEC) {
        fvec x = fvec_mul(fvec_load(s + j), scale);
        if (op.softcap != 0.0f) {
            fvec_store(s + j, x);
            for (int64_t i = 0; i < FVEC; i++) {
                s[j + i] = op.softcap * std::tanh(s[j + i]);
            }
            x = fvec_load(s + j);
        }
        const fvec b = fvec_load(bias + j);
        x            = fvec_hide(fvec_fma(b, fvec_set(slope), x), b);
        fvec_store(s + j, x);
        max = fvec_max(max, x);
    }
    float top = fvec_max_lanes(max);
    if (!(top > -INFINITY)) {  // nothing but -inf, or a NaN, which a maximum may drop
        for (int64_t j = t.first; j < t.end; j++) {
            top = std::isnan(s[j]) ? s[j] : top;
        }
        if (!std::isnan(top)) {
            std::fill(s + t.first, s + pad(t.end, FVEC), 0.0f);
            stat[0] = -INFINITY;
            stat[1] = 0.0f;
            return;
        }
    }
    fvec sum = fvec_set(0.0f);
    for (int64_t j = t.first; j < t.end; j += FVEC) {
        const fvec p = fvec_exp(fvec_add(fvec_load(s + j), fvec_set(-top)));
        fvec_store(s + j, p);
        sum = fvec_add(sum, p);
    }
    stat[0] = top;
    stat[1] = fvec_sum(sum);
}

// the mask of a tile as floats, -inf also behind its end
void bias_get(const attn_tile & t, const ggml_fp16_t * mask, float * bias) {
    if (mask) {
        ggml_cpu_fp16_to_fp32(mask + t.start + t.first, bias + t.first, t.end - t.first);
    } else {
        std::fill(bias + t.first, bias + t.end, 0.0f);
    }
    std::fill(bias + t.end, bias + pad(t.end, LINE), -INFINITY);
}

// Asks for a cell that will be wanted soon: the CPU's own prefetching does not keep up. From memory, after 3,072 tokens, one
// token takes 0.57 instead of 0.74 ms with 14 latent heads, and a third less time with 8 heads of keys (Zen 4, one thread).
void prefetch_cell(const attn_op & op, const attn_piece & piece, int64_t cell) {
    for (const ggml_tensor * x : { op.k, op.v }) {
        const size_t size = ggml_row_size(x->type, x->ne[0]);
        const char * row =
            (const char *) x->data + cell * x->nb[1] + piece.head_kv * x->nb[2] + piece.stream * x->nb[3];
        for (size_t i = 0; i < size; i += 64) {
            __builtin_prefetch(row + i, 0, 2);
        }
        if (op.v_in_k) {
            return;
        }
    }
}

void tile_scores(const attn_op &    op,
                 const attn_piece & piece,
                 const attn_row *   rows,
                 const attn_tile &  t,
                 const flash_rows & keys,
                 int64_t            next,
                 float *            scores) {
    const float * q[MAX_ROWS];
    float *       s[MAX_ROWS];
    for (int64_t i = 0; i < t.n; i++) {
        q[i] = rows[t.rows[i]].q;
        s[i] = scores + i * TILE;
    }
    flash_with_type(keys.type, [&](auto * type) {
        typedef std::remove_const_t<std::remove_pointer_t<decltype(type)>> T;
        for (int64_t g = 0; g < t.n; g += GROUP) {
            const int64_t end = std::min(g + GROUP, t.n);
            for (int64_t j = t.first; j < t.end; j += SCORE_KEYS) {
                int64_t cell = next + j;  // to be asked for
                for (int64_t i = g; i < end;) {
                    const int64_t n = flash_block_size(end - i, SCORE_ROWS);
                    flash_scores<T>(q + i, n, keys, j, std::min(j + SCORE_KEYS, t.end), op.dk_pad, s + i);
                    i += n;
                    const int64_t until = g == 0 ? next + j + SCORE_KEYS * i / end : 0;
                    for (; cell < std::min(until, op.n_kv); cell++) {
                        prefetch_cell(op, piece, cell);
                    }
                }
            }
        }
    });
}

void tile_values(const attn_op &    op,
                 const attn_tile &  t,
                 const flash_rows & values,
                 const float *      weights,
                 float * const *    out) {
    const float * p[MAX_ROWS];
    for (int64_t i = 0; i < t.n; i++) {
        p[i] = weights + i * TILE;
    }
    flash_with_type(values.type, [&](auto * type) {
        typedef std::remove_const_t<std::remove_pointer_t<decltype(type)>> T;
        // a strip of columns of all keys stays in the first-level cache while the rows go by
        const int64_t strip = t.n <= VALUE_ROWS ? op.dv_pad : COLUMNS * FVEC;
        for (int64_t c = 0; c < op.dv_pad; c += strip) {
            for (int64_t i = 0; i < t.n;) {
                const int64_t n = flash_block_size(t.n - i, VALUE_ROWS);
                flash_values<T>(p + i, n, values, t.first, t.end, c, std::min(c + strip, op.dv_pad), out + i);
                i += n;
            }
        }
        // a masked value that is not finite would have come in as 0 * inf
        for (int64_t i = 0; i < t.n; i++) {
            fvec zero = fvec_set(0.0f);
            for (int64_t c = 0; c < op.dv_pad; c += FVEC) {
                zero = fvec_fma(fvec_load(out[i] + c), fvec_set(0.0f), zero);
            }
            if (!(fvec_sum(zero) == 0.0f)) {
                flash_values_sparse<T>(p[i], values, t.first, t.end, op.dv_pad, out[i]);
            }
        }
    });
}

// parts of the rows of t over its keys: out[i] for row t.rows[i]
void tile_parts(const attn_op &      op,
                const attn_piece &   piece,
                const attn_row *     rows,
                const attn_tile &    t,
                int64_t              next,
                const attn_scratch & s,
                float * const *      out) {
    const flash_rows keys = tile_rows(op.k, piece, t, s.k, op.k_stride);
    tile_scores(op, piece, rows, t, keys, next, s.scores);

    const ggml_fp16_t * mask = nullptr;
    for (int64_t i = 0; i < t.n; i++) {
        const attn_row & row = rows[t.rows[i]];
        if (i == 0 || row.mask != mask) {
            mask = row.mask;
            bias_get(t, mask, s.bias);
        }
        softmax(op, t, s.bias, row.slope, s.scores + i * TILE, out[i] + attn_scratch::part_size(op) - LINE);
    }
    tile_values(op, t, op.v_in_k ? keys : tile_rows(op.v, piece, t, s.v, op.v_stride), s.scores, out);
}

// merges a part into a total; not inlined, so that both ways to cut the work run the same instructions
__attribute__((noinline)) void merge(const attn_op & op, float * total, const float * part) {
    const int64_t at = attn_scratch::part_size(op) - LINE;
    if (part[at + 1] == 0.0f) {
        return;  // nothing seen
    }
    const float peak = part[at] > total[at] ? part[at] : total[at];
    const float a    = std::exp(total[at] - peak);
    const float b    = std::exp(part[at] - peak);
    for (int64_t c = 0; c < op.dv_pad; c += FVEC) {
        fvec_store(total + c, fvec_fma(fvec_load(part + c), fvec_set(b), fvec_mul(fvec_load(total + c), fvec_set(a))));
    }
    total[at]     = peak;
    total[at + 1] = total[at + 1] * a + part[at + 1] * b;
}

void total_clear(const attn_op & op, float * total) {
    const int64_t at = attn_scratch::part_size(op) - LINE;
    std::fill(total, total + op.dv_pad, 0.0f);
    total[at]     = -INFINITY;
    total[at + 1] = 0.0f;
}

// divides by the sum of the weights, to which a sink adds one without a value, and writes the row
void row_store(const attn_op & op, const attn_row & row, int64_t stream, float * total, ggml_tensor * dst) {
    const int64_t at     = attn_scratch::part_size(op) - LINE;
    float         factor = 1.0f;
    float         sum    = total[at + 1];
    if (op.sinks) {
        const float sink = ((const float *) op.sinks->data)[row.head];
        const float peak = sink > total[at] ? sink : total[at];
        factor           = std::exp(total[at] - peak);
        sum              = sum * factor + std::exp(sink - peak);
    }
    factor = sum == 0.0f ? 0.0f : factor / sum;

    float * out = (float *) ((char *) dst->data + row.head * dst->nb[1] + row.token * dst->nb[2] + stream * dst->nb[3]);
    for (int64_t c = 0; c < op.dv; c++) {
        out[c] = total[c] * factor;
    }
}

// all tiles of one piece
void run_piece(const attn_op &      op,
               const attn_plan &    p,
               const attn_piece &   piece,
               const attn_scratch & s,
               ggml_tensor *        dst) {
    const int64_t size = attn_scratch::part_size(op);
    attn_row      rows[MAX_ROWS];
    float *       parts[MAX_ROWS];
    rows_get(op, piece, s, rows);
    for (int64_t i = 0; i < piece.n; i++) {
        parts[i] = s.part + i * size;
        total_clear(op, s.total + i * size);
    }
    for (int64_t index = 0; index < p.n_tiles; index++) {
        const attn_tile t = tile_get(op, rows, piece.n, index);
        if (t.n == 0) {
            continue;
        }
        tile_parts(op, piece, rows, t, t.start + TILE, s, parts);
        for (int64_t i = 0; i < t.n; i++) {
            merge(op, s.total + t.rows[i] * size, parts[i]);
        }
    }
    for (int64_t i = 0; i < piece.n; i++) {
        row_store(op, rows[i], piece.stream, s.total + i * size, dst);
    }
}

// one tile of one piece, into the stored parts [row of the head][tile]
void run_tile(const attn_op &      op,
              const attn_plan &    p,
              const attn_piece &   piece,
              int64_t              index,
              int                  n_threads,
              const attn_scratch & s,
              float *              parts) {
    const int64_t size = attn_scratch::part_size(op);
    attn_row      rows[MAX_ROWS];
    float *       out[MAX_ROWS];
    rows_get(op, piece, s, rows);
    for (int64_t i = 0; i < piece.n; i++) {
        parts[((piece.row + i) * p.n_tiles + index + 1) * size - LINE + 1] = 0.0f;  // no weight
    }
    const attn_tile t = tile_get(op, rows, piece.n, index);
    for (int64_t i = 0; i < t.n; i++) {
        out[i] = parts + ((piece.row + t.rows[i]) * p.n_tiles + index) * size;
    }
    if (t.n > 0) {
        tile_parts(op, piece, rows, t, t.start + n_threads * TILE, s, out);
    }
}

// merges the stored parts of one row
void run_row(const attn_op &      op,
             const attn_plan &    p,
             const attn_piece &   piece,
             const attn_scratch & s,
             const float *        parts,
             ggml_tensor *        dst) {
    const int64_t size = attn_scratch::part_size(op);
    total_clear(op, s.total);
    for (int64_t index = 0; index < p.n_tiles; index++) {
        merge(op, s.total, parts + (piece.row * p.n_tiles + index) * size);
    }
    row_store(op, row_get(op, piece, 0), piece.stream, s.total, dst);
}

}  // namespace

bool ggml_flash_attn_work_size(const ggml_tensor * dst, int n_tasks, size_t * size) {
    attn_op op;
    if (!op_get(dst, op)) {
        return false;
    }
    *size = (n_tasks * attn_scratch::size(op) + parts_size(op) + LINE) * sizeof(float);
    return true;
}

bool ggml_compute_forward_flash_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    // Tiles lie at fixed cells, so a row's bits depend on where its cells lie. Verified trees leave gaps in the cache that
    // plain decoding does not have: their exact mode takes ggml's loop over the visible cells.
    attn_op op;
    if (params->use_ref || params->batch_invariant || !op_get(dst, op)) {
        return false;
    }
    const int          ith   = params->ith;
    const int          nth   = params->nth;
    const attn_plan    p     = plan_get(op, nth);
    float *            work  = (float *) (((uintptr_t) params->wdata + 63) / 64 * 64);
    float *            parts = work + nth * attn_scratch::size(op);
    const attn_scratch s(op, work + ith * attn_scratch::size(op));
    const int64_t      n_heads  = op.n_heads_kv * op.n_streams;
    const int64_t      n_pieces = n_heads * p.n_blocks;
    GGML_ASSERT((char *) (parts + (p.by_tile ? parts_size(op) : 0)) <= (char *) params->wdata + params->wsize);

    if (!p.by_tile) {
        if (ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, nth);
        }
        ggml_barrier(params->threadpool);
        for (int64_t i = ith; i < n_pieces; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
            run_piece(op, p, piece_get(op, p, i), s, dst);
        }
        return true;
    }
    const int64_t head_size = op.n_rows * p.n_tiles * attn_scratch::part_size(op);
    for (int64_t i = ith; i < n_pieces * p.n_tiles; i += nth) {
        const attn_piece piece = piece_get(op, p, i / p.n_tiles);
        run_tile(op, p, piece, i % p.n_tiles, nth, s,
                 parts + (piece.stream * op.n_heads_kv + piece.head_kv) * head_size);
    }
    ggml_barrier(params->threadpool);
    for (int64_t i = ith; i < n_heads * op.n_rows; i += nth) {
        const int64_t    head  = i / op.n_rows;
        const attn_piece piece = { head % op.n_heads_kv, head / op.n_heads_kv, i % op.n_rows, 1 };
        run_row(op, p, piece, s, parts + head * head_size, dst);
    }
    return true;
}

#else

bool ggml_flash_attn_work_size(const ggml_tensor *, int, size_t *) {
    return false;
}

bool ggml_compute_forward_flash_attn(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

#endif
