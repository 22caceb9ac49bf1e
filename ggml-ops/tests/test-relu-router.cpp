// Tests of the ReLU router op against its definition in double precision; exit code 1 if anything failed.
#include "relu-router.h"
#include "test-ops.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <string>

namespace {

struct router_case {
    int64_t          n_expert, n;
    ggml_router_norm norm;
    ggml_router_bias bias;
    int64_t          n_weight;  // 0: no weight
    float            scale;
    bool             views;
    float            threshold = 0.0f;
    int32_t          budget    = 0;
};

constexpr float EPS        = 1e-5f;
constexpr float NORM_SCALE = 1.5f;

struct router_data {
    std::vector<float> logits, weight, bias;
};

// random rows, a row of zeros, a row without a positive logit and a row with a NaN
router_data make_data(const router_case & c) {
    std::mt19937 rng((unsigned) (c.n_expert * 31 + c.n));
    router_data  d = { random_values(c.n * c.n_expert, rng), random_values(c.n_weight, rng),
                       random_values(c.n_expert, rng) };
    for (int64_t e = 0; e < c.n_expert; e++) {
        if (c.n > 1) {
            d.logits[c.n_expert + e] = 0.0f;
        }
        if (c.n > 2) {
            d.logits[2 * c.n_expert + e] = -1.0f - e;
        }
    }
    if (c.n_weight > 2) {
        d.weight[1] = 0.0f;  // an active expert of weight zero stays in the active set
    }
    return d;
}

std::vector<double> oracle(const router_case & c, const router_data & d) {
    std::vector<double> s(c.n * c.n_expert, 0.0);
    for (int64_t t = 0; t < c.n; t++) {
        const float * r       = &d.logits[t * c.n_expert];
        double        squares = 0.0, active_squares = 0.0, sum = 0.0;
        for (int64_t e = 0; e < c.n_expert; e++) {
            squares += (double) r[e] * r[e];
        }
        const double      factor = c.bias == GGML_ROUTER_BIAS_RMS ? std::sqrt(squares / c.n_expert) : 1.0;
        std::vector<bool> active(c.n_expert);
        for (int64_t e = 0; e < c.n_expert; e++) {
            active[e] = r[e] > 0.0f && (c.bias == GGML_ROUTER_BIAS_NONE || r[e] + d.bias[e] * factor > 0.0);
            active_squares += active[e] ? (double) r[e] * r[e] : 0.0;
            sum += active[e] ? r[e] : 0.0;
        }
        const double norm = c.norm == GGML_ROUTER_NORM_RMS ?
                                1.0 / std::sqrt(active_squares / c.n_expert + (double) EPS) :
                            c.norm == GGML_ROUTER_NORM_SUM ? 1.0 / (sum * (double) NORM_SCALE + 1e-5) :
                                                             1.0;
        for (int64_t e = 0; e < c.n_expert; e++) {
            if (active[e]) {
                const double w        = c.n_weight == 0 ? 1.0 : d.weight[c.n_weight == 1 ? 0 : e];
                const double v        = r[e] * norm * w * c.scale;
                s[t * c.n_expert + e] = std::fabs(v) < FLT_MIN ? std::copysign(FLT_MIN, v) : v;
            }
        }
    }
    return s;
}

// the definition of ggml_relu_router_set_dial() on scores as the op computes them without it: the bits of what stays
std::vector<float> dial_oracle(const router_case & c, std::vector<float> s) {
    std::vector<std::pair<float, int64_t>> sums;
    for (int64_t t = 0; t < c.n; t++) {
        float * row     = &s[t * c.n_expert];
        float   largest = 0.0f;
        for (int64_t e = 0; e < c.n_expert; e++) {
            largest = std::fabs(row[e]) > largest ? std::fabs(row[e]) : largest;
        }
        for (int64_t e = 0; e < c.n_expert; e++) {
            row[e] = std::fabs(row[e]) < c.threshold * largest ? 0.0f : row[e];
        }
    }
    for (int64_t e = 0; e < c.n_expert; e++) {
        double sum = 0.0;
        for (int64_t t = 0; t < c.n; t++) {
            sum += std::fabs(s[t * c.n_expert + e]);
        }
        sums.push_back({ std::isnan(sum) ? -std::numeric_limits<float>::infinity() : -(float) sum, e });
    }
    std::sort(sums.begin(), sums.end());
    for (int64_t i = c.budget; c.budget > 0 && i < c.n_expert; i++) {
        for (int64_t t = 0; t < c.n; t++) {
            s[t * c.n_expert + sums[i].second] = 0.0f;
        }
    }
    return s;
}

std::vector<float> compute(cpu_runner & runner, const router_case & c, const router_data & d, int threads) {
    const int64_t pad    = c.views ? 5 : 0;
    ggml_tensor * logits = nullptr;
    ggml_tensor * weight = nullptr;
    ggml_tensor * bias   = nullptr;
    auto          build  = [&](ggml_context * ctx) {
        logits = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, c.n_expert + pad, c.n);
        weight = c.n_weight ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.n_weight) : nullptr;
        bias = c.bias != GGML_ROUTER_BIAS_NONE ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.n_expert) : nullptr;
        ggml_tensor * rows = ggml_view_2d(ctx, logits, c.n_expert, c.n, logits->nb[1], 0);
        ggml_tensor * out = ggml_relu_router(ctx, rows, weight, bias, c.norm, c.bias, EPS, NORM_SCALE, c.scale);
        if (c.threshold > 0.0f || c.budget > 0) {
            ggml_relu_router_set_dial(out, c.threshold, c.budget);
        }
        return out;
    };
    auto set = [&] {
        for (int64_t t = 0; t < c.n; t++) {
            ggml_backend_tensor_set(logits, &d.logits[t * c.n_expert], t * logits->nb[1], c.n_expert * sizeof(float));
        }
        if (weight) {
            ggml_backend_tensor_set(weight, d.weight.data(), 0, ggml_nbytes(weight));
        }
        if (bias) {
            ggml_backend_tensor_set(bias, d.bias.data(), 0, ggml_nbytes(bias));
        }
    };
    return runner.run(threads, build, set);
}

// the same active set, exactly, and values within float rounding
bool matches(const std::vector<float> & got, const std::vector<double> & want) {
    for (size_t i = 0; i < want.size(); i++) {
        if ((got[i] == 0.0f) != (want[i] == 0.0) ||
            !(std::fabs(got[i] - want[i]) <= 1e-5 * std::fabs(want[i]) + FLT_MIN)) {
            return false;
        }
    }
    return true;
}

bool same_bits(const std::vector<float> & a, const std::vector<float> & b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Threshold and budget, bit for bit, on any number of threads; a token alone keeps what it has in a batch, but for a budget.
// Returns what differs.
std::vector<std::string> check_dial(cpu_runner & runner, router_case c, const router_data & d) {
    std::vector<std::string> wrong;
    c.threshold = 0.0f;
    c.budget    = 0;

    const std::vector<float> all = compute(runner, c, d, 1);
    for (float threshold : { 0.0f, 0.01f, 0.25f, 0.999f }) {
        for (int32_t budget : { 0, 1, 5, 56, 200 }) {
            c.threshold                     = threshold;
            c.budget                        = budget;
            const std::vector<float> wanted = dial_oracle(c, all);
            for (int threads : { 1, 3 }) {
                if (!same_bits(compute(runner, c, d, threads), wanted)) {
                    wrong.push_back("threshold " + std::to_string(threshold) + " budget " + std::to_string(budget) +
                                    " threads " + std::to_string(threads));
                }
            }
        }
        c.budget                       = 0;
        const std::vector<float> batch = compute(runner, c, d, 1);
        for (int64_t t = 0; t < c.n; t++) {
            router_case one   = c;
            router_data alone = d;
            one.n             = 1;
            alone.logits.assign(&d.logits[t * c.n_expert], &d.logits[t * c.n_expert] + c.n_expert);
            const auto row = batch.begin() + t * c.n_expert;
            if (!same_bits(compute(runner, one, alone, 1), { row, row + c.n_expert })) {
                wrong.push_back("threshold " + std::to_string(threshold) + ": token " + std::to_string(t) + " alone");
            }
        }
    }
    return wrong;
}

// the same with a NaN score and with infinite ones, which weights that are not finite make
std::vector<std::string> check_dial_not_finite(cpu_runner & runner) {
    const router_case c = { 7, 3, GGML_ROUTER_NORM_NONE, GGML_ROUTER_BIAS_NONE, 7, 1.0f, false };
    router_data       d = make_data(c);
    d.logits.assign(c.n * c.n_expert, 1.0f);
    d.weight = { 1.0f, std::numeric_limits<float>::quiet_NaN(), 3.0f, 0.1f, INFINITY, -INFINITY, 2.0f };
    return check_dial(runner, c, d);
}

// NaN logits select nothing and do not spread to other tokens
bool nan_is_inactive(cpu_runner & runner) {
    const router_case        c     = { 7, 3, GGML_ROUTER_NORM_RMS, GGML_ROUTER_BIAS_NONE, 7, 1.0f, false };
    router_data              d     = make_data(c);
    const std::vector<float> clean = compute(runner, c, d, 1);
    d.logits[2 * c.n_expert + 3]   = std::numeric_limits<float>::quiet_NaN();
    const std::vector<float> got   = compute(runner, c, d, 1);
    for (size_t i = 0; i < got.size(); i++) {
        if (std::isnan(got[i]) || (i < 2 * (size_t) c.n_expert && got[i] != clean[i])) {
            return false;
        }
    }
    return true;
}

// the CPU refuses a node that ggml_relu_router() does not make; returns what it took
std::vector<std::string> wrongly_taken() {
    ctx_ptr ctx = make_ctx(8);
    auto    row = [&](int64_t n) {
        return ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, n);
    };
    ggml_tensor * op = ggml_relu_router(ctx.get(), ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 7, 3), row(7), row(7),
                                        GGML_ROUTER_NORM_RMS, GGML_ROUTER_BIAS_BASE, EPS, NORM_SCALE, 1.0f);
    ggml_backend_dev_t       cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    std::vector<std::string> taken;
    auto                     check = [&](const std::string & what) {
        if (ggml_backend_dev_supports_op(cpu, op)) {
            taken.push_back(what);
        }
    };
    if (!ggml_backend_dev_supports_op(cpu, op)) {
        taken.push_back("nothing, not even a whole node");
    }
    for (int i = 0; i < 3; i++) {
        for (int dim = 0; dim < 3; dim++) {
            op->src[i]->ne[dim]++;
            check("source " + std::to_string(i) + " longer in dimension " + std::to_string(dim));
            op->src[i]->ne[dim]--;
        }
        op->src[i]->type = GGML_TYPE_F16;
        check("source " + std::to_string(i) + " in F16");
        op->src[i]->type = GGML_TYPE_F32;
    }
    for (float wrong : { -0.1f, 1.0f, INFINITY, std::numeric_limits<float>::quiet_NaN() }) {
        memcpy(&op->op_params[5], &wrong, sizeof(wrong));
        check("threshold " + std::to_string(wrong));
    }
    op->op_params[5] = 0;
    op->op_params[6] = -1;
    check("budget -1");
    op->op_params[6] = 0;
    for (int i : { 0, 1 }) {
        const int32_t whole = op->op_params[i];
        for (int32_t wrong : { -1, 9 }) {
            op->op_params[i] = wrong;
            check("parameter " + std::to_string(i) + " = " + std::to_string(wrong));
        }
        op->op_params[i] = whole;
    }
    op->src[2] = nullptr;
    check("no bias, with a method");
    op->src[0] = nullptr;
    check("no logits");
    return taken;
}

}  // namespace

int main() {
    cpu_runner runner;
    int        n_run = 0, n_failed = 0;
    for (int64_t n_expert : { 1, 7, 42, 56, 77, 102 }) {
        for (int64_t n : { 1, 2, 3, 5, 17 }) {
            for (int norm = GGML_ROUTER_NORM_NONE; norm <= GGML_ROUTER_NORM_SUM; norm++) {
                for (int bias = GGML_ROUTER_BIAS_NONE; bias <= GGML_ROUTER_BIAS_RMS; bias++) {
                    for (int64_t n_weight : { (int64_t) 0, (int64_t) 1, n_expert }) {
                        const router_case c = {
                            n_expert,           n,         (ggml_router_norm) norm, (ggml_router_bias) bias, n_weight,
                            bias ? 0.5f : 1.0f, n % 2 == 1
                        };
                        const router_data d  = make_data(c);
                        const bool        ok = matches(compute(runner, c, d, 1 + n_run % 4), oracle(c, d));
                        n_run++;
                        n_failed += !ok;
                        if (!ok) {
                            printf("FAIL E=%d n=%d norm=%d bias=%d n_weight=%d\n", (int) n_expert, (int) n, norm, bias,
                                   (int) n_weight);
                        }
                        if (n != 5 && n_weight != n_expert) {
                            continue;  // the dial sees scores alone
                        }
                        n_run++;
                        for (const std::string & what : check_dial(runner, c, d)) {
                            n_failed++;
                            printf("FAIL E=%d n=%d norm=%d bias=%d n_weight=%d %s\n", (int) n_expert, (int) n, norm,
                                   bias, (int) n_weight, what.c_str());
                        }
                    }
                }
            }
        }
    }
    n_run++;
    if (!nan_is_inactive(runner)) {
        n_failed++;
        printf("FAIL NaN logits\n");
    }
    n_run++;
    for (const std::string & what : check_dial_not_finite(runner)) {
        n_failed++;
        printf("FAIL not finite: %s\n", what.c_str());
    }
    n_run++;
    for (const std::string & what : wrongly_taken()) {
        n_failed++;
        printf("FAIL taken: %s\n", what.c_str());
    }
    printf("%d checks, %d failed\n", n_run, n_failed);
    return n_failed != 0;
}
