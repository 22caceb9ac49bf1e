// The three stages of attention over the cache: scores, weights, values. See flash-attn.cpp.
#include "flash-attn-op.h"
#include "ggml-cpu.h"

#include <cstring>

#if FLASH_VEC

namespace {

constexpr int64_t GROUP         = 16;  // rows whose queries stay in the first-level cache while the keys go by
// F16 and BF16 are widened on load for so many rows, which hides the conversion; for more it would be repeated too often
constexpr int64_t IN_PLACE_ROWS = 16;

// columns [column, end) of a row as whole vectors of floats, with zeros behind its end
void widen(const char * from, ggml_type type, int64_t d, int64_t column, int64_t end, float * to) {
    const int64_t block = ggml_blck_size(type);
    if (column % block != 0 || (end < d && end % block != 0)) {
        column = 0;
        end    = d;
    }
    from += column / block * ggml_type_size(type);
    to += column;
    const int64_t n     = std::min(end, d) - column;
    const int64_t whole = n / FVEC * FVEC;
    if (whole < n || !flash_readable(type)) {
        std::fill(to + whole, to + attn_pad(n, FVEC), 0.0f);
        if (type == GGML_TYPE_F32) {
            memcpy(to, from, n * sizeof(float));
        } else {
            ggml_get_type_traits(type)->to_float(from, to, n);
        }
        return;
    }
    flash_with_type(type, [&](auto * t) {
        for (int64_t c = 0; c < n; c += FVEC) {
            fvec_store(to + c, fvec_load((decltype(t)) from + c));
        }
    });
}

// the key or value of cell i of the piece
const char * cell(const ggml_tensor * x, const attn_piece & piece, int64_t i) {
    return (const char *) x->data + piece.cell(i) * x->nb[1] + piece.head_kv * x->nb[2] + piece.stream * x->nb[3];
}

// columns [column, end) of the keys or values of a tile: where they are, if the kernels can read them there and few rows
// use them, else widened
flash_rows tile_rows(const ggml_tensor *  x,
                     const attn_op &      op,
                     const attn_piece &   piece,
                     const attn_tile &    t,
                     int64_t              column,
                     int64_t              end,
                     const attn_scratch & s) {
    flash_rows rows;
    const bool in_place =
        flash_readable(x->type) && x->ne[0] % FVEC == 0 && (x->type == GGML_TYPE_F32 || t.n <= IN_PLACE_ROWS);
    rows.type = in_place ? x->type : GGML_TYPE_F32;
    for (int64_t j = t.first; j < t.end; j++) {
        rows.row[j] = cell(x, piece, t.start + j);
        if (!in_place) {
            float * to = s.tile + j * op.tile_stride;
            widen(rows.row[j], x->type, x->ne[0], column, end, to);
            rows.row[j] = (const char *) to;
        }
    }
    return rows;
}

// Asks for columns [column, end) of the cells [first, last) of a cache, which will be wanted soon: the CPU's own prefetching
// does not keep up.
void prefetch(const ggml_tensor * x,
              const attn_piece &  piece,
              int64_t             first,
              int64_t             last,
              int64_t             column,
              int64_t             end) {
    const int64_t size = ggml_row_size(x->type, x->ne[0]);
    const int64_t from = size * column / x->ne[0];
    const int64_t to   = std::min(size, size * end / x->ne[0]);
    for (int64_t i = first; i < std::min(last, piece.n_cells); i++) {
        const char * row = cell(x, piece, i);
        for (int64_t b = from; b < to; b += 64) {
            __builtin_prefetch(row + b, 0, 2);
        }
    }
}

// raw products of the rows of t with its keys
void multiply_keys(const attn_op &      op,
                   const attn_piece &   piece,
                   const attn_row *     rows,
                   const attn_tile &    t,
                   int64_t              next,
                   const attn_scratch & s) {
    const float * q[MAX_ROWS];
    float *       out[MAX_ROWS];
    for (int64_t i = 0; i < t.n; i++) {
        q[i]   = rows[t.rows[i]].q;
        out[i] = rows[t.rows[i]].scores + t.start;
    }
    const flash_rows keys = tile_rows(op.k, op, piece, t, 0, op.dk_pad, s);
    flash_with_type(keys.type, [&](auto * type) {
        typedef std::remove_const_t<std::remove_pointer_t<decltype(type)>> T;
        for (int64_t g = 0; g < t.n; g += GROUP) {
            const int64_t end = std::min(g + GROUP, t.n);
            for (int64_t j = t.first; j < t.end; j += SCORE_KEYS) {
                int64_t asked = next + j;
                for (int64_t i = g; i < end;) {
                    const int64_t n = flash_block_size(end - i, SCORE_ROWS);
                    flash_scores<T>(q + i, n, keys, j, std::min(j + SCORE_KEYS, t.end), op.dk_pad, out + i);
                    i += n;
                    if (g == 0) {
                        const int64_t until = next + j + SCORE_KEYS * i / end;
                        prefetch(op.k, piece, asked, until, 0, op.dk);
                        asked = until;
                    }
                }
            }
        }
    });
}

// the mask of a tile as floats, -inf also behind its end
void bias_get(const attn_piece & piece, const attn_tile & t, const ggml_fp16_t * mask, float * bias) {
    if (mask && piece.cells) {
        ggml_fp16_t listed[TILE];
        for (int64_t j = t.first; j < t.end; j++) {
            listed[j] = mask[piece.cells[t.start + j]];
        }
        ggml_cpu_fp16_to_fp32(listed + t.first, bias + t.first, t.end - t.first);
    } else if (mask) {
        ggml_cpu_fp16_to_fp32(mask + t.start + t.first, bias + t.first, t.end - t.first);
    } else {
        std::fill(bias + t.first, bias + t.end, 0.0f);
    }
    std::fill(bias + t.end, bias + attn_pad(t.end, LINE), -INFINITY);
}

// products -> scores: scale, cap, mask and ALiBi; s is the row's tile
void finish_scores(const attn_op & op, const attn_tile & t, const float * bias, float slope, float * s) {
    const fvec scale = fvec_set(op.softcap != 0.0f ? op.scale / op.softcap : op.scale);
    std::fill(s, s + t.first, -INFINITY);
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
        fvec_store(s + j, fvec_hide(fvec_fma(b, fvec_set(slope), x), b));
    }
    std::fill(s + attn_pad(t.end, FVEC), s + TILE, -INFINITY);
}

// sums[r] += weights times values of a tile, columns [column, end)
template <typename T>
void multiply_values(const attn_op &    op,
                     const attn_piece & piece,
                     const attn_tile &  t,
                     const flash_rows & values,
                     const float **     p,
                     float **           sums,
                     int64_t            column,
                     int64_t            end) {
    // a strip of columns of all keys stays in the first-level cache while the rows go by
    const int64_t strip = t.n <= VALUE_ROWS ? end - column : COLUMNS * FVEC;
    const int64_t calls = (end - column + strip - 1) / strip * t.n;
    int64_t       asked = t.start + TILE, done = 0;
    for (int64_t c = column; c < end; c += strip) {
        for (int64_t i = 0; i < t.n;) {
            const int64_t n = flash_block_size(t.n - i, VALUE_ROWS);
            flash_values<T>(p + i, n, values, t.first, t.end, c, std::min(c + strip, end), sums + i);
            i += n;
            done += n;
            const int64_t until = t.start + TILE + TILE * done / calls;
            prefetch(op.v, piece, asked, until, column, end);
            asked = until;
        }
    }
}

// the same for one row and all tiles, leaving out what has weight 0: there an infinity or NaN would have come in
void multiply_visible(const attn_op &      op,
                      const attn_piece &   piece,
                      const attn_row &     row,
                      int64_t              column,
                      int64_t              end,
                      const attn_scratch & s,
                      float *              sums) {
    std::fill(sums + column, sums + end, 0.0f);
    for (int64_t i = 0; i < piece.n_cells; i++) {
        if (row.scores[i] != 0.0f) {
            widen(cell(op.v, piece, i), op.v->type, op.dv, column, end, s.tile);
            for (int64_t c = column; c < end; c += FVEC) {
                fvec_store(sums + c, fvec_fma(fvec_set(row.scores[i]), fvec_load(s.tile + c), fvec_load(sums + c)));
            }
        }
    }
}

bool finite(const float * x, int64_t column, int64_t end) {
    fvec zero = fvec_set(0.0f);
    for (int64_t c = column; c < end; c += FVEC) {
        zero = fvec_fma(fvec_load(x + c), fvec_set(0.0f), zero);
    }
    return fvec_sum(zero) == 0.0f;
}

void store(const attn_op &    op,
           const attn_piece & piece,
           const attn_row &   row,
           const float *      sums,
           int64_t            column,
           int64_t            end) {
    const ggml_tensor * dst = op.dst;
    float *             out =
        (float *) ((char *) dst->data + row.head * dst->nb[1] + row.token * dst->nb[2] + piece.stream * dst->nb[3]);
    const fvec factor = fvec_set(row.scores[op.score_stride - 1]);
    for (int64_t c = column; c < end; c += FVEC) {
        const fvec x = fvec_fma(fvec_load(sums + c), factor, fvec_set(0.0f));  // + 0: one sign of zero
        if (c + FVEC <= op.dv) {
            fvec_store(out + c, x);
        } else {
            float last[FVEC];
            fvec_store(last, x);
            memcpy(out + c, last, (op.dv - c) * sizeof(float));
        }
    }
}

}  // namespace

void attn_scores(const attn_op &      op,
                 const attn_piece &   piece,
                 attn_row *           rows,
                 int64_t              index,
                 int64_t              next,
                 const attn_scratch & s) {
    const attn_tile t = attn_tile_get(piece, rows, index);
    if (t.n > 0) {
        multiply_keys(op, piece, rows, t, next, s);
    }
    const ggml_fp16_t * mask = nullptr;
    int64_t             seen = 0;  // rows of the tile so far
    for (int64_t i = 0; i < piece.n; i++) {
        float * scores = rows[i].scores + t.start;
        if (seen == t.n || t.rows[seen] != i) {
            std::fill(scores, scores + TILE, -INFINITY);
            continue;
        }
        if (seen++ == 0 || rows[i].mask != mask) {
            mask = rows[i].mask;
            bias_get(piece, t, mask, s.bias);
        }
        finish_scores(op, t, s.bias, rows[i].slope, scores);
    }
}

void attn_weights(const attn_op & op, const attn_piece & piece, const attn_row & row) {
    float *       s = row.scores;
    const int64_t n = piece.n_tiles() * TILE;
    fvec          max[4];
    std::fill(max, max + 4, fvec_set(-INFINITY));
    for (int64_t j = 0; j < n; j += 4 * FVEC) {
        for (int64_t i = 0; i < 4; i++) {
            max[i] = fvec_max(max[i], fvec_load(s + j + i * FVEC));
        }
    }
    float top = fvec_max_lanes(fvec_max(fvec_max(max[0], max[1]), fvec_max(max[2], max[3])));
    if (!(top > -INFINITY)) {  // nothing but -inf, or a NaN, which a maximum may drop
        for (int64_t j = 0; j < n; j++) {
            top = std::isnan(s[j]) ? s[j] : top;
        }
    }
    float & factor = s[op.score_stride - 1];
    if (top == -INFINITY) {
        std::fill(s, s + n, 0.0f);
        factor = 0.0f;
        return;
    }
    fvec_total sum = fvec_total_zero();
    for (int64_t j = 0; j < n; j += FVEC) {
        const fvec p = fvec_exp(fvec_add(fvec_load(s + j), fvec_set(-top)));
        fvec_store(s + j, p);
        sum = fvec_total_add(sum, p);
    }
    const float total = fvec_total_get(sum);
    if (!op.sinks) {
        factor = 1.0f / total;
        return;
    }
    // a sink adds a weight without a value
    const float sink = ((const float *) op.sinks->data)[row.head];
    const float peak = sink > top ? sink : top;
    const float part = std::exp(top - peak);
    factor           = part / (total * part + std::exp(sink - peak));
}

void attn_values(const attn_op &      op,
                 const attn_piece &   piece,
                 const attn_row *     rows,
                 int64_t              column,
                 int64_t              end,
                 const attn_scratch & s) {
    for (int64_t i = 0; i < piece.n; i++) {
        std::fill(s.sums + i * op.sum_stride + column, s.sums + i * op.sum_stride + end, 0.0f);
    }
    for (int64_t index = 0; index < piece.n_tiles(); index++) {
        const attn_tile t = attn_tile_get(piece, rows, index);
        if (t.n == 0) {
            continue;
        }
        const float *    p[MAX_ROWS];
        float *          sums[MAX_ROWS];
        const flash_rows values = tile_rows(op.v, op, piece, t, column, end, s);
        for (int64_t i = 0; i < t.n; i++) {
            p[i]    = rows[t.rows[i]].scores + t.start;
            sums[i] = s.sums + t.rows[i] * op.sum_stride;
        }
        flash_with_type(values.type, [&](auto * type) {
            typedef std::remove_const_t<std::remove_pointer_t<decltype(type)>> T;
            multiply_values<T>(op, piece, t, values, p, sums, column, end);
        });
    }
    for (int64_t i = 0; i < piece.n; i++) {
        float * sums = s.sums + i * op.sum_stride;
        if (!finite(sums, column, end)) {
            multiply_visible(op, piece, rows[i], column, end, s, sums);
        }
        store(op, piece, rows[i], sums, column, end);
    }
}

#endif
