// Kernels of the union FFN: how rows of a weight are multiplied with a few activation rows at once.
//
// An activation row is packed once, in the format of the kernel that will read it, with a factor (the router score of
// the pair) folded into its scales. Every kernel keeps two promises, from which the batch invariance of the op follows:
// the sums of one (row, activation) pair are formed in an order that depends on nothing but k, and accumulators of
// different pairs never mix.
#pragma once

#include "ggml-cpu.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>

struct union_weight;

struct union_kernel {
    const char * name;
    int64_t      rows;   // rows come in groups of this many
    int64_t      lanes;  // partial sums per row
    int64_t      tile;   // most activation rows per call
    int64_t      ahead;  // bytes to ask for ahead of its reads of long rows; 0: it does that itself

    // bytes of an activation row of k values
    size_t (*act_size)(const union_weight & w, int64_t k);

    // pack values [first, first + n) of an activation row of k values, times factor; first and n are multiples of
    // w.act_block
    void (*act_pack)(const union_weight & w,
                     int64_t              k,
                     int64_t              first,
                     int64_t              n,
                     const float *        x,
                     float                factor,
                     void *               act);

    // acc[t][row*lanes + lane] += partial sums of n_rows consecutive rows starting at `rows` with act[t], t < n_act <= tile;
    // memory at `next`, as long as the rows, will be wanted soon (may be NULL): a kernel prefetches it as it goes along
    void (*dot)(const union_weight & w,
                const char *         rows,
                int64_t              n_rows,
                const void * const * act,
                int64_t              n_act,
                float * const *      acc,
                const char *         next);

    // out[row] = sum of the row's lanes
    void (*reduce)(int64_t n_rows, const float * acc, float * out);

    // also for whole matrices: measured to be faster than what MUL_MAT does otherwise
    bool mul_mat = false;
};

typedef void (*union_gemv_t)(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc);

// a weight [k, n_rows, n_expert] and the kernel that reads it
struct union_weight {
    const char *         data;
    int64_t              k;
    int64_t              n_rows;
    size_t               row_size;     // bytes
    size_t               expert_size;  // bytes
    int64_t              act_block;    // values that are packed together
    bool                 packed;       // rows lie in groups, as in CPU_REPACK
    const union_kernel * kernel;
    // of the general kernels only
    ggml_type            act_type;
    ggml_vec_dot_t       vec_dot;
    ggml_from_float_t    from_float;
    union_gemv_t         gemv;
};

// false if no kernel reads the type or layout of t
bool union_weight_get(const ggml_tensor * t, union_weight * w);

// kernels of a CPU family: NULL means "not handled here", and the general kernel takes over
const union_kernel * union_kernel_x86(ggml_type type, int64_t group, int64_t inter, int64_t k, int64_t n_rows);
const union_kernel * union_kernel_arm(ggml_type type, int64_t group, int64_t inter, int64_t k, int64_t n_rows);
