// What the attention kernel works on: the node, its pieces, rows and tiles.
#include "flash-attn-op.h"

#include "ggml-impl.h"

#if FLASH_VEC

namespace {

constexpr int64_t MAX_SHARED  = 4 << 20;  // floats of scores that threads share
constexpr int64_t MAX_SCORES  = 1 << 20;  // floats of scores of a block, unless it has but FEW_ROWS
constexpr int64_t FEW_ROWS    = 16;
constexpr int64_t FEWEST_ROWS = 4;        // of a block in a group, where threads would wait
constexpr int64_t FEW_CELLS   = 16;       // are not worth a group
const ggml_fp16_t MASKED      = 0xfc00;   // -inf

int64_t odd_lines(int64_t n) {
    return (attn_pad(n, LINE) / LINE | 1) * LINE;
}

bool readable(const ggml_tensor * t) {
    return t->nb[0] == ggml_type_size(t->type) && (t->type == GGML_TYPE_F32 || ggml_get_type_traits(t->type)->to_float);
}

const ggml_fp16_t * mask_row(const ggml_tensor * mask, int64_t token, int64_t head, int64_t stream) {
    return (const ggml_fp16_t *) ((const char *) mask->data + token * mask->nb[1] + head % mask->ne[2] * mask->nb[2] +
                                  stream % mask->ne[3] * mask->nb[3]);
}

// how many of n cells two rows of the mask both show
int64_t both_see(const ggml_fp16_t * a, const ggml_fp16_t * b, int64_t n) {
    int64_t seen = 0;
    for (int64_t start = 0; start < n; start += TILE) {
        uint16_t      part = 0;  // of the width of the mask, for the compiler's vectors
        const int64_t end  = std::min(start + TILE, n);
        for (int64_t j = start; j < end; j++) {
            part += (uint16_t) (a[j] != MASKED && b[j] != MASKED);
        }
        seen += part;
    }
    return seen;
}

// Puts a token into the group of the one before it unless a quarter of what either sees is hidden from the other. A single
// group lists its cells where that halves the work of a thread, although heads are fewer than threads and these then read the
// same cells: a text alone in a cache that still holds others.
void groups_get(const attn_op & op, attn_plan & p, int n_threads) {
    if (!op.mask || op.mask->ne[2] > 1 || op.n_streams > 1 || op.n_tokens > MAX_GROUPS) {
        return;
    }
    int64_t before = 0, most_seen = 0;
    for (int64_t t = 0; t < op.n_tokens; t++) {
        const ggml_fp16_t * m    = mask_row(op.mask, t, 0, 0);
        const int64_t       seen = both_see(m, m, op.n_kv);
        if (t > 0) {
            const int64_t most = std::max(seen, before);
            if (most - both_see(mask_row(op.mask, t - 1, 0, 0), m, op.n_kv) > most / 4 + FEW_CELLS) {
                p.token[p.n_groups++] = (int32_t) t;
            }
        }
        before    = seen;
        most_seen = std::max(most_seen, seen);
    }
    p.token[p.n_groups] = (int32_t) op.n_tokens;
    p.listed = p.n_groups > 1 || 2 * most_seen * std::max<int64_t>(n_threads, op.n_heads_kv) <= op.n_heads_kv * op.n_kv;
}

int64_t widest_group(const attn_plan & p) {
    int64_t most = 0;
    for (int64_t g = 0; g < p.n_groups; g++) {
        most = std::max<int64_t>(most, p.token[g + 1] - p.token[g]);
    }
    return most;
}

// all threads are busy nine tenths of the time
bool balanced(int64_t n_pieces, int n_threads) {
    const int64_t rounds = (n_pieces + n_threads - 1) / n_threads;
    return 10 * n_pieces >= 9 * rounds * n_threads;
}

}  // namespace

bool attn_op_get(ggml_tensor * dst, attn_op & op) {
    if (dst->op != GGML_OP_FLASH_ATTN_EXT || dst->op_params[5]) {
        return false;
    }
    op.dst   = dst;
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
    op.dk_pad     = attn_pad(op.dk, FVEC);
    op.dv_pad     = attn_pad(op.dv, FVEC);
    op.n_tiles    = (op.n_kv + TILE - 1) / TILE;

    op.tile_stride  = odd_lines(std::max(op.dk, op.dv));
    op.score_stride = odd_lines(op.n_tiles * TILE + 1);
    op.sum_stride   = odd_lines(op.dv);
    return op.q->type == GGML_TYPE_F32 && op.q->nb[0] == sizeof(float) && readable(op.k) && readable(op.v) &&
           op.v->ne[2] == op.n_heads_kv && op.k->ne[3] == op.n_streams && op.v->ne[3] == op.n_streams;
}

int64_t attn_block_rows(const attn_op & op) {
    return std::min(op.n_rows, std::clamp(MAX_SCORES / op.score_stride, FEW_ROWS, MAX_ROWS));
}

int64_t attn_shared_scores(const attn_op & op) {
    const int64_t size = op.n_rows * op.n_heads_kv * op.n_streams * op.score_stride;
    return size <= MAX_SHARED ? size : 0;
}

attn_plan attn_plan_get(const attn_op & op, int n_threads) {
    const int64_t rows   = attn_block_rows(op);
    const int64_t fewest = (op.n_rows + rows - 1) / rows;
    const int64_t most   = std::max(fewest, op.n_rows / MIN_ROWS);

    attn_plan p = {
        fewest, false, 1, 1, { 0, (int32_t) op.n_tokens }
    };
    groups_get(op, p, n_threads);
    if (p.listed) {
        const int64_t widest = op.group * widest_group(p);
        p.n_blocks           = (widest + rows - 1) / rows;
        while (!balanced(p.n_pieces(op), n_threads) && widest >= (p.n_blocks + 1) * FEWEST_ROWS) {
            p.n_blocks++;
        }
        return p;
    }
    for (; p.n_blocks <= most; p.n_blocks++) {
        if (balanced(p.n_pieces(op), n_threads)) {
            return p;
        }
    }
    p.by_stage = op.n_tiles > 1 && attn_shared_scores(op) > 0;
    p.n_blocks = p.by_stage ? fewest : most;
    if (p.by_stage) {
        while (p.n_pieces(op) * op.n_tiles < n_threads && p.n_blocks < op.n_rows) {
            p.n_blocks++;
        }
        while (p.n_strips < op.dv / STRIP && !balanced(p.n_pieces(op) * p.n_strips, n_threads)) {
            p.n_strips++;
        }
    }
    return p;
}

attn_piece attn_piece_get(const attn_op & op, const attn_plan & p, int64_t i) {
    const int64_t block = i % p.n_blocks;
    const int64_t group = i / p.n_blocks % p.n_groups;
    const int64_t head  = i / p.n_blocks / p.n_groups;
    const int64_t first = op.group * p.token[group];
    const int64_t n     = op.group * p.token[group + 1] - first;
    const int64_t row   = n * block / p.n_blocks;
    return {
        head % op.n_heads_kv, head / op.n_heads_kv, first + row, n * (block + 1) / p.n_blocks - row, op.n_kv, nullptr,
    };
}

void attn_piece_list(const attn_op & op, const attn_row * rows, int32_t * cells, attn_piece & piece) {
    int64_t n = 0;
    for (int64_t start = 0; start < op.n_kv; start += TILE) {
        const int64_t size       = std::min(TILE, op.n_kv - start);
        uint16_t      seen[TILE] = { 0 };
        for (int64_t i = 0; i < piece.n; i++) {
            if (i == 0 || rows[i].mask != rows[i - 1].mask) {
                const ggml_fp16_t * m = rows[i].mask + start;
                for (int64_t j = 0; j < size; j++) {
                    seen[j] |= (uint16_t) (m[j] != MASKED);
                }
            }
        }
        for (int64_t j = 0; j < size; j++) {
            cells[n] = (int32_t) (start + j);
            n += seen[j];
        }
    }
    piece.n_cells = n;
    piece.cells   = cells;
}

attn_row attn_row_get(const attn_op & op, const attn_piece & piece, int64_t i) {
    attn_row row;
    row.scores = nullptr;
    row.token  = (piece.row + i) / op.group;
    row.head   = piece.head_kv * op.group + (piece.row + i) % op.group;
    row.q      = (const float *) ((const char *) op.q->data + row.token * op.q->nb[1] + row.head * op.q->nb[2] +
                             piece.stream * op.q->nb[3]);
    row.mask   = nullptr;
    if (op.mask) {
        row.mask = mask_row(op.mask, row.token, row.head, piece.stream);
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

attn_tile attn_tile_get(const attn_piece & piece, const attn_row * rows, int64_t index) {
    attn_tile t;
    t.start                 = index * TILE;
    t.n                     = 0;
    const int64_t       n   = std::min(TILE, piece.n_cells - t.start);
    int64_t             low = n, high = 0;  // of what any row sees
    const ggml_fp16_t * seen = nullptr;     // the mask row looked at last; rows of a token mostly share it
    bool                any  = true;
    for (int64_t i = 0; i < piece.n; i++) {
        if (!rows[i].mask) {
            low  = 0;
            high = n;
        } else if (rows[i].mask != seen) {
            seen      = rows[i].mask;
            int64_t a = 0, b = n;
            while (a < n && seen[piece.cell(t.start + a)] == MASKED) {
                a++;
            }
            while (b > a && seen[piece.cell(t.start + b - 1)] == MASKED) {
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

attn_scratch::attn_scratch(const attn_op & op, float * at) {
    q     = at;
    tile  = q + MAX_ROWS * attn_pad(op.dk, LINE);
    sums  = tile + TILE * op.tile_stride;
    bias  = sums + MAX_ROWS * op.sum_stride;
    cells = (int32_t *) (bias + TILE);
}

int64_t attn_scratch::size(const attn_op & op) {
    return MAX_ROWS * (attn_pad(op.dk, LINE) + op.sum_stride) + TILE * (op.tile_stride + 1) + attn_pad(op.n_kv, LINE);
}

#endif
