// Plain reference of the union FFN: every row is dequantized and multiplied in double precision. Reached by
// params->use_ref, and what test-backend-ops compares the fast kernels with.
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "tile-kernels.h"
#include "union-ffn-op.h"
#include "union-ffn.h"

#include <cmath>
#include <cstring>

namespace {

// row `row` of expert `e` as floats
void row_to_float(const ggml_tensor * w, int64_t row, int64_t e, float * out) {
    const char * src = (const char *) w->data + row * w->nb[1] + e * w->nb[2];
    if (w->type == GGML_TYPE_F32) {
        memcpy(out, src, w->ne[0] * sizeof(float));
    } else {
        ggml_get_type_traits(w->type)->to_float(src, out, w->ne[0]);
    }
}

double dot(const float * a, const float * b, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) {
        sum += (double) a[i] * b[i];
    }
    return sum;
}

struct ref_scratch {
    float *  row;   // [max(n_embd, d)]
    float *  z;     // [d]
    float *  gate;  // [d]
    double * y;     // [n_embd]
};

void ref_expert(const union_op & op, int64_t e, float score, const float * x, double mean, const ref_scratch & s) {
    for (int64_t r = 0; r < op.d; r++) {
        row_to_float(op.up, r, e, s.row);
        s.z[r] = (float) dot(s.row, x, op.n_embd);
        if (op.gate) {
            row_to_float(op.gate, r, e, s.row);
            s.gate[r] = (float) dot(s.row, x, op.n_embd);
        }
    }
    float * a       = op.gate ? s.gate : s.z;  // what the activation sees
    double  squares = 0.0;
    for (int64_t r = 0; r < op.d; r++) {
        a[r] = (float) (a[r] - mean);
        squares += (double) a[r] * a[r];
    }
    const float rms = (float) (1.0 / std::sqrt(squares / op.d + op.eps));
    for (int64_t r = 0; r < op.d; r++) {
        const float v = union_act_has_norm(op.act) ? a[r] * rms * (op.act_norm ? op.act_norm[r] : 1.0f) : a[r];
        a[r]          = union_act_scalar(op.act, v);
        s.z[r]        = op.gate ? a[r] * s.z[r] : a[r];
    }
    for (int64_t r = 0; r < op.n_embd; r++) {
        row_to_float(op.down, r, e, s.row);
        s.y[r] += score * dot(s.row, s.z, op.d);
    }
}

}  // namespace

size_t union_ref_scratch_size(const union_op & op) {
    const size_t wide = (size_t) std::max(op.n_embd, op.d);
    return tile_align((wide + 2 * op.d) * sizeof(float)) + tile_align(op.n_embd * sizeof(double));
}

void ggml_compute_forward_union_ffn_ref(const ggml_compute_params * params, ggml_tensor * dst) {
    const union_op op   = union_op_get(dst);
    const size_t   size = union_ref_scratch_size(op);
    GGML_ASSERT(params->wsize >= size * params->nth);

    char *       base = (char *) params->wdata + size * params->ith;
    const size_t wide = (size_t) std::max(op.n_embd, op.d);
    ref_scratch  s;
    s.y    = (double *) base;
    s.row  = (float *) (base + tile_align(op.n_embd * sizeof(double)));
    s.z    = s.row + wide;
    s.gate = s.z + op.d;

    for (int64_t t = params->ith; t < op.n_tokens; t += params->nth) {
        const float * x      = tile_row(op.x, t);
        const float * scores = tile_row(op.scores, t);
        float *       y      = (float *) ((char *) dst->data + t * dst->nb[1]);
        const double  mean   = op.act_mean ? dot(op.act_mean, x, op.n_embd) : 0.0;

        memset(s.y, 0, op.n_embd * sizeof(double));
        for (int64_t e = 0; e < op.n_expert; e++) {
            if (scores[e] != 0.0f) {
                ref_expert(op, e, scores[e], x, mean, s);
            }
        }
        for (int64_t r = 0; r < op.n_embd; r++) {
            y[r] = (float) s.y[r];
        }
    }
}
