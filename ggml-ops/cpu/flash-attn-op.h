// A FLASH_ATTN_EXT node as the attention kernel sees it, and how its work is cut. See flash-attn.cpp for the method.
#pragma once

#include "flash-attn-kernels.h"

#if FLASH_VEC

constexpr int64_t MAX_ROWS   = 64;  // of a piece
constexpr int64_t MIN_ROWS   = 32;  // fewer per piece would widen the keys too often
constexpr int64_t MAX_GROUPS = 64;  // of tokens
constexpr int64_t LINE       = 16;  // floats of a cache line
constexpr int64_t STRIP      = 32;  // columns of values: a whole block of the quantized types that a cache may have

struct attn_op {
    const ggml_tensor *q, *k, *v, *mask, *sinks;
    ggml_tensor *      dst;
    float              scale, max_bias, softcap;
    int64_t            dk, dv, n_tokens, n_kv, n_heads, n_heads_kv, n_streams;
    int64_t            group;           // heads per key/value head
    int64_t            n_rows;          // group * n_tokens: rows that share a key/value head of a stream
    int64_t            dk_pad, dv_pad;  // in floats, whole vectors
    int64_t            n_tiles;
    // floats of a row; an odd number of cache lines, which spreads the rows over the sets of a cache
    int64_t            tile_stride;  // of widened keys or values
    int64_t score_stride;  // of the scores, then weights of all keys, and behind them what the sums are multiplied by
    int64_t sum_stride;    // of the sums of values
};

// false if the node asks for ggml's own kernel or has a type that is not read here
bool attn_op_get(ggml_tensor * dst, attn_op & op);

// How a node is cut: into blocks of rows that one thread takes through all stages, or each stage for itself, into tiles
// of keys, rows, and strips of columns, with scores that all threads share. Tokens of several texts, which see different
// parts of the cache, go in groups of neighbours that see much the same; a block then belongs to one group, and reads
// only the cells that it sees, as the block of a text does that sees few. The bits are the same.
struct attn_plan {
    int64_t n_blocks;               // of rows, per group and key/value head
    bool    by_stage;
    int64_t n_strips;               // of columns of values, in the third stage
    int64_t n_groups;               // of tokens
    int32_t token[MAX_GROUPS + 1];  // the first one of each group, and behind the last group
    bool    listed = false;         // a block reads only the cells that its group sees

    int64_t n_pieces(const attn_op & op) const { return op.n_heads_kv * op.n_streams * n_groups * n_blocks; }
};

attn_plan attn_plan_get(const attn_op & op, int n_threads);

int64_t attn_block_rows(const attn_op & op);  // the most rows of a block
int64_t attn_shared_scores(
    const attn_op & op);                      // floats of the scores of all rows, 0 if they are too many to be shared

// the rows [row, row + n) of the queries that share a key/value head of a stream, and the cells that they are multiplied with
struct attn_piece {
    int64_t         head_kv, stream, row, n;
    int64_t         n_cells;
    const int32_t * cells;  // ascending; NULL: the cells [0, n_cells)

    int64_t cell(int64_t i) const { return cells ? cells[i] : i; }

    int64_t n_tiles() const { return (n_cells + TILE - 1) / TILE; }
};

attn_piece attn_piece_get(const attn_op & op, const attn_plan & p, int64_t i);

// a row of a piece: its query and what it may see
struct attn_row {
    const float *       q;
    const ggml_fp16_t * mask;    // [n_kv] or NULL
    float *             scores;  // [score_stride]
    float               slope;   // of ALiBi
    int64_t             head, token;
};

attn_row attn_row_get(const attn_op & op, const attn_piece & piece, int64_t i);

// the keys [first, end) of a tile, and which rows see any of them
struct attn_tile {
    int64_t start;       // first cell of the piece
    int64_t first, end;  // within the tile; first is a multiple of LINE
    int64_t n;           // rows
    int16_t rows[MAX_ROWS];
};

attn_tile attn_tile_get(const attn_piece & piece, const attn_row * rows, int64_t index);

// lists the cells that any row of the piece sees, in `cells` [n_kv]
void attn_piece_list(const attn_op & op, const attn_row * rows, int32_t * cells, attn_piece & piece);

// scratch of a thread, in floats
struct attn_scratch {
    float *   q;      // [MAX_ROWS][dk_pad], where the queries have no whole, aligned vectors
    float *   tile;   // [TILE][tile_stride]
    float *   sums;   // [MAX_ROWS][sum_stride]
    float *   bias;   // [TILE]
    int32_t * cells;  // [n_kv]

    attn_scratch(const attn_op & op, float * at);
    static int64_t size(const attn_op & op);
};

// --- the stages -------------------------------------------------------------------------------------------------------

// 1: scores of the rows of a piece over one tile, -inf where a row sees nothing. `next` is the cell to prefetch from.
void attn_scores(const attn_op &      op,
                 const attn_piece &   piece,
                 attn_row *           rows,
                 int64_t              index,
                 int64_t              next,
                 const attn_scratch & s);

// 2: the scores of a row become its weights
void attn_weights(const attn_op & op, const attn_piece & piece, const attn_row & row);

// 3: columns [column, end) of the sums of values, written to the node
void attn_values(const attn_op &      op,
                 const attn_piece &   piece,
                 const attn_row *     rows,
                 int64_t              column,
                 int64_t              end,
                 const attn_scratch & s);

// n rounded up to whole units
inline int64_t attn_pad(int64_t n, int64_t unit) {
    return (n + unit - 1) / unit * unit;
}

#endif
