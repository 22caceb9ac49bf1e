// Tests of the union FFN op against a double-precision oracle, and of its batch invariance, bit for bit.
//     test-union-ffn [--quick | --full] [--filter TEXT]
// --quick is for emulators and sanitizers, --full is every shape with every number of tokens;
// prints one line per failure and a summary; exit code 1 if anything failed.
#include "test-ops.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace {

enum class extent { quick, normal, full };

enum class pattern { some, all, none, one_token };

const char * pattern_name(pattern p) {
    static const char * names[] = { "some", "all", "none", "one_token" };
    return names[(int) p];
}

const char * act_name(ggml_union_act act) {
    static const char * names[] = {
        "silu", "relu", "gelu", "relu2", "norm_silu", "norm_silu_nomean", "norm_silu_norms"
    };
    return names[(int) act];
}

struct ffn_case {
    int64_t        h = 256, d = 64, n_expert = 7, n = 5;
    ggml_type      up = GGML_TYPE_F32, down = GGML_TYPE_F32;
    bool           gated   = false;
    bool           packed  = false;  // weights in CPU_REPACK where it takes them
    bool           views   = false;  // input and scores are views into wider tensors
    ggml_union_act act     = GGML_UNION_ACT_SILU;
    pattern        active  = pattern::some;
    int            threads = 2;

    std::string name() const {
        char text[256];
        snprintf(text, sizeof(text),
                 "h=%d d=%d E=%d n=%d up=%s down=%s gated=%d packed=%d views=%d act=%s active=%s threads=%d", (int) h,
                 (int) d, (int) n_expert, (int) n, ggml_type_name(up), ggml_type_name(down), gated, packed, views,
                 act_name(act), pattern_name(active), threads);
        return text;
    }
};

bool has_norm(ggml_union_act act) {
    return act == GGML_UNION_ACT_NORM_SILU || act == GGML_UNION_ACT_NORM_SILU_NOMEAN;
}

bool has_mean(ggml_union_act act) {
    return act == GGML_UNION_ACT_NORM_SILU || act == GGML_UNION_ACT_NORM_SILU_NORMS;
}

// weights and inputs of a case; tokens can be evaluated in any cut
struct ffn_data {
    ffn_case               c;
    placed_weight          up, gate, down;
    std::vector<float>     x, scores, mean, norm;  // [n][h], [n][n_expert], [h], [d]
    static constexpr float eps = 1e-5f;

    ffn_data(const ffn_case & c_, unsigned seed) : c(c_) {
        std::mt19937 rng(seed);
        const size_t n_weights = (size_t) c.h * c.d * c.n_expert;
        up   = place(c.up, { c.h, c.d, c.n_expert }, random_values(n_weights, rng, 1.0f / std::sqrt((float) c.h)));
        down = place(c.down, { c.d, c.h, c.n_expert }, random_values(n_weights, rng, 1.0f / std::sqrt((float) c.d)));
        if (c.gated) {
            gate = place(c.up, { c.h, c.d, c.n_expert }, random_values(n_weights, rng, 1.0f / std::sqrt((float) c.h)));
        }
        x      = random_values(c.n * c.h, rng);
        scores = random_values(c.n * c.n_expert, rng);  // half of them negative
        mean   = random_values(c.h, rng, 0.1f);
        norm   = random_values(c.d, rng);
        std::uniform_real_distribution<float> share(0.0f, 1.0f);
        for (int64_t t = 0; t < c.n; t++) {
            for (int64_t e = 0; e < c.n_expert; e++) {
                const bool on = c.active == pattern::all || (c.active == pattern::some && share(rng) < 0.25f) ||
                                (c.active == pattern::one_token && t == c.n / 2);
                if (!on) {
                    scores[t * c.n_expert + e] = 0.0f;
                }
            }
        }
    }

    // in CPU_REPACK only if the loader would put it there, as a weight of mul_mat_id
    placed_weight place(ggml_type type, std::vector<int64_t> ne, const std::vector<float> & values) const {
        ggml_backend_buffer_type_t buft = c.packed ? cpu_buffer_type("CPU_REPACK") : nullptr;
        if (buft) {
            ctx_ptr       ctx = make_ctx(8);
            ggml_tensor * w   = ggml_new_tensor(ctx.get(), type, 3, ne.data());
            ggml_tensor * b   = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, ne[0], 1, 1);
            ggml_tensor * op  = ggml_mul_mat_id(ctx.get(), w, b, ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 1, 1));
            w->buffer         = ggml_backend_buft_alloc_buffer(buft, 0);
            const bool ok = ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), op);
            ggml_backend_buffer_free(w->buffer);
            buft = ok ? buft : nullptr;
        }
        return placed_weight(buft ? buft : ggml_backend_cpu_buffer_type(), type, std::move(ne), values);
    }

    std::vector<float> compute(cpu_runner & runner, int64_t t0, int64_t n, int threads) const {
        ggml_tensor * x_in, *s_in, *mean_in, *norm_in;
        const int64_t pad   = c.views ? 3 : 0;
        auto          build = [&](ggml_context * ctx) {
            x_in             = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, c.h + pad, n);
            s_in             = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, c.n_expert + pad, n);
            mean_in          = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.h);
            norm_in          = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.d);
            ggml_tensor * xv = ggml_view_2d(ctx, x_in, c.h, n, x_in->nb[1], pad * sizeof(float));
            ggml_tensor * sv = ggml_view_2d(ctx, s_in, c.n_expert, n, s_in->nb[1], pad * sizeof(float));
            return ggml_union_ffn(ctx, c.views ? xv : x_in, up.tensor, gate.tensor, down.tensor, c.views ? sv : s_in,
                                  has_mean(c.act) ? mean_in : nullptr, has_norm(c.act) ? norm_in : nullptr, c.act, eps);
        };
        auto set = [&] {
            for (int64_t t = 0; t < n; t++) {
                ggml_backend_tensor_set(x_in, &x[(t0 + t) * c.h], t * x_in->nb[1] + pad * sizeof(float),
                                        c.h * sizeof(float));
                ggml_backend_tensor_set(s_in, &scores[(t0 + t) * c.n_expert], t * s_in->nb[1] + pad * sizeof(float),
                                        c.n_expert * sizeof(float));
            }
            if (mean_in->buffer) {
                ggml_backend_tensor_set(mean_in, mean.data(), 0, c.h * sizeof(float));
                ggml_backend_tensor_set(norm_in, norm.data(), 0, c.d * sizeof(float));
            }
        };
        return runner.run(threads, build, set);
    }
};

double activation(ggml_union_act act, double v) {
    switch (act) {
        case GGML_UNION_ACT_RELU:
            return std::max(v, 0.0);
        case GGML_UNION_ACT_RELU_SQUARED:
            return v > 0.0 ? v * v : 0.0;
        case GGML_UNION_ACT_GELU:
            return 0.5 * v * (1.0 + std::erf(v * std::sqrt(0.5)));
        default:
            return v / (1.0 + std::exp(-v));
    }
}

std::vector<double> matvec(const float * rows, const double * x, int64_t k, int64_t n_rows) {
    std::vector<double> out(n_rows);
    for (int64_t r = 0; r < n_rows; r++) {
        for (int64_t i = 0; i < k; i++) {
            out[r] += (double) rows[r * k + i] * x[i];
        }
    }
    return out;
}

// [n][h], from the definition, all in double precision
std::vector<double> oracle(const ffn_data & data) {
    const ffn_case &         c    = data.c;
    const std::vector<float> up   = data.up.dequantize();
    const std::vector<float> gate = c.gated ? data.gate.dequantize() : std::vector<float>();
    const std::vector<float> down = data.down.dequantize();
    std::vector<double>      y(c.n * c.h, 0.0);
    for (int64_t t = 0; t < c.n; t++) {
        const std::vector<double> x(&data.x[t * c.h], &data.x[t * c.h] + c.h);
        const double              mean = has_mean(c.act) ? matvec(data.mean.data(), x.data(), c.h, 1)[0] : 0.0;
        for (int64_t e = 0; e < c.n_expert; e++) {
            const double score = data.scores[t * c.n_expert + e];
            if (score == 0.0) {
                continue;
            }
            std::vector<double> u       = matvec(&up[e * c.h * c.d], x.data(), c.h, c.d);
            std::vector<double> a       = c.gated ? matvec(&gate[e * c.h * c.d], x.data(), c.h, c.d) : u;
            double              squares = 0.0;
            for (double & v : a) {
                v -= mean;
                squares += v * v;
            }
            const double rms = 1.0 / std::sqrt(squares / c.d + (double) ffn_data::eps);
            for (int64_t r = 0; r < c.d; r++) {
                const double v = activation(c.act, has_norm(c.act) ? a[r] * rms * data.norm[r] : a[r]);
                u[r]           = c.gated ? v * u[r] : v;
            }
            const std::vector<double> o = matvec(&down[e * c.h * c.d], u.data(), c.d, c.h);
            for (int64_t i = 0; i < c.h; i++) {
                y[t * c.h + i] += score * o[i];
            }
        }
    }
    return y;
}

// normalized mean squared error, as test-backend-ops measures it
double nmse(const std::vector<float> & got, const std::vector<double> & want) {
    double error = 0.0, power = 0.0;
    for (size_t i = 0; i < want.size(); i++) {
        error += (got[i] - want[i]) * (got[i] - want[i]);
        power += want[i] * want[i];
    }
    return power > 0.0 ? error / power : error;
}

// where there is no kernel of its own, ggml's vec_dot rounds the activations to F16 and BF16 too
double nmse_limit(const ffn_case & c) {
    const auto limit = [](ggml_type type) {
        switch (type) {
            case GGML_TYPE_F32:
                return 1e-10;
            case GGML_TYPE_F16:
                return 1e-5;
            case GGML_TYPE_BF16:
                return 1e-4;
            default:
                return 5e-4;
        }
    };
    return std::max(limit(c.up), limit(c.down));
}

struct tester {
    cpu_runner  runner;
    std::string filter;
    int         n_run = 0, n_failed = 0;

    void report(bool ok, const std::string & what, const std::string & name, const std::string & detail) {
        n_run++;
        if (!ok) {
            n_failed++;
            printf("FAIL %s: %s: %s\n", what.c_str(), name.c_str(), detail.c_str());
        }
    }

    bool wanted(const ffn_case & c) const { return filter.empty() || c.name().find(filter) != std::string::npos; }

    void against_oracle(const ffn_case & c) {
        if (!wanted(c)) {
            return;
        }
        const ffn_data data(c, 1 + n_run);
        const double   error = nmse(data.compute(runner, 0, c.n, c.threads), oracle(data));
        report(error <= nmse_limit(c), "oracle", c.name(), "nmse " + std::to_string(error));  // NaN fails
    }

    // every token alone, and in cuts at any position, with any number of threads: the same bits
    void batch_invariance(const ffn_case & c) {
        if (!wanted(c)) {
            return;
        }
        const ffn_data           data(c, 77);
        const std::vector<float> whole = data.compute(runner, 0, c.n, c.threads);
        auto                     check = [&](int64_t t0, int64_t n, int threads) {
            const std::vector<float> part = data.compute(runner, t0, n, threads);
            const bool               same = memcmp(part.data(), &whole[t0 * c.h], part.size() * sizeof(float)) == 0;
            report(same, "invariance", c.name(),
                                       "tokens " + std::to_string(t0) + " + " + std::to_string(n) + ", threads " + std::to_string(threads));
        };
        for (int64_t t = 0; t < c.n; t += 1 + t / 8) {
            check(t, 1, 1 + (int) (t % 4));
        }
        for (int64_t n : { 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 31, 33 }) {
            if (n < c.n) {
                check((7 * n) % (c.n - n), n, 1 + (int) (n % 4));
            }
        }
        for (int threads = 1; threads <= 4; threads++) {
            check(0, c.n, threads);
        }
    }

    // A token whose input has a NaN or an Inf comes out as NaN or Inf in every value, like one whose score is none; the
    // other tokens keep their bits. Tiny values, whose scale has no inverse, come out tiny.
    void not_a_number(const ffn_case & c) {
        if (!wanted(c)) {
            return;
        }
        const float              nan = std::numeric_limits<float>::quiet_NaN();
        const float              inf = std::numeric_limits<float>::infinity();
        ffn_data                 data(c, 5);
        const std::vector<float> x = data.x, scores = data.scores, clean = data.compute(runner, 0, c.n, c.threads);
        for (const float bad : { nan, inf, -inf, 1e-40f }) {
            for (const int64_t at : { (int64_t) 1, c.h - 1 }) {
                const int64_t token      = (at + 1) % c.n;
                data.x                   = x;
                data.x[token * c.h + at] = bad;
                if (bad == 1e-40f) {
                    std::fill_n(&data.x[token * c.h], c.h, bad);
                }
                const std::vector<float> got = data.compute(runner, 0, c.n, c.threads);
                report(contained(c, clean, got, token, bad == 1e-40f), "not a number", c.name(),
                       std::to_string(bad) + " at " + std::to_string(at) + " of token " + std::to_string(token));
            }
        }
        data.x         = x;
        data.scores[1] = nan;  // expert 1 of token 0
        report(contained(c, clean, data.compute(runner, 0, c.n, c.threads), 0, false), "not a number", c.name(),
               "score");
    }

    static bool contained(const ffn_case &           c,
                          const std::vector<float> & clean,
                          const std::vector<float> & got,
                          int64_t                    token,
                          bool                       tiny) {
        for (int64_t t = 0; t < c.n; t++) {
            for (int64_t i = t * c.h; i < (t + 1) * c.h; i++) {
                const bool ok = t != token ? memcmp(&got[i], &clean[i], sizeof(float)) == 0 :
                                tiny       ? std::fabs(got[i]) < 1e-30f :
                                             !std::isfinite(got[i]);
                if (!ok) {
                    return false;
                }
            }
        }
        return true;
    }

    // the CPU refuses a node that ggml_union_ffn() does not make, and takes it again when it is whole
    void refusals();
};

// the types that llama-quantize gives to expert tensors; k-quants of down where 256 divides d
struct type_pair {
    ggml_type up, down;
};

const type_pair TYPES[] = {
    { GGML_TYPE_F32,    GGML_TYPE_F32    },
    { GGML_TYPE_F16,    GGML_TYPE_F16    },
    { GGML_TYPE_BF16,   GGML_TYPE_BF16   },
    { GGML_TYPE_Q8_0,   GGML_TYPE_Q8_0   },
    { GGML_TYPE_Q4_0,   GGML_TYPE_Q4_0   },
    { GGML_TYPE_Q4_1,   GGML_TYPE_Q4_1   },
    { GGML_TYPE_Q5_0,   GGML_TYPE_Q5_0   },
    { GGML_TYPE_Q5_1,   GGML_TYPE_Q5_1   },
    { GGML_TYPE_IQ4_NL, GGML_TYPE_IQ4_NL },
    { GGML_TYPE_MXFP4,  GGML_TYPE_MXFP4  },
    { GGML_TYPE_Q2_K,   GGML_TYPE_IQ4_NL },
    { GGML_TYPE_Q3_K,   GGML_TYPE_Q4_0   },
    { GGML_TYPE_Q4_K,   GGML_TYPE_Q5_0   },
    { GGML_TYPE_Q5_K,   GGML_TYPE_Q5_1   },
    { GGML_TYPE_Q6_K,   GGML_TYPE_Q8_0   },
    { GGML_TYPE_IQ4_XS, GGML_TYPE_IQ4_NL },
    { GGML_TYPE_Q4_0,   GGML_TYPE_F16    },
    { GGML_TYPE_F32,    GGML_TYPE_Q4_0   },
    { GGML_TYPE_Q4_0,   GGML_TYPE_Q2_K   },
    { GGML_TYPE_Q3_K,   GGML_TYPE_Q3_K   },
    { GGML_TYPE_Q4_K,   GGML_TYPE_Q4_K   },
    { GGML_TYPE_F16,    GGML_TYPE_Q5_K   },
    { GGML_TYPE_Q4_K,   GGML_TYPE_Q6_K   },
    { GGML_TYPE_IQ4_XS, GGML_TYPE_IQ4_XS },
};

// rows of down that hold whole blocks of the type
int64_t width_for(ggml_type down) {
    return std::max<int64_t>(64, ggml_blck_size(down));
}

const int64_t TOKENS[] = { 1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 32, 33, 64, 129, 512 };

void test_types(tester & t, extent e) {
    for (const type_pair & types : TYPES) {
        for (bool packed : { false, true }) {
            for (int64_t n : TOKENS) {
                if (e == extent::quick ? n != 5 : e == extent::normal && n != 1 && n != 4 && n != 17) {
                    continue;
                }
                ffn_case c;
                c.up      = types.up;
                c.down    = types.down;
                c.d       = width_for(types.down);
                c.packed  = packed;
                c.n       = n;
                c.threads = n == 17 ? 7 : 1 + (int) (n % 4);
                t.against_oracle(c);
            }
            ffn_case c;
            c.up     = types.up;
            c.down   = types.down;
            c.d      = width_for(types.down);
            c.packed = packed;
            c.n      = e == extent::quick ? 12 : e == extent::normal ? 40 : 130;
            c.act    = packed ? GGML_UNION_ACT_SILU : GGML_UNION_ACT_NORM_SILU;
            t.batch_invariance(c);
            c.n        = 3;
            c.n_expert = 2;
            c.active   = pattern::all;
            c.act      = GGML_UNION_ACT_SILU;
            t.not_a_number(c);
        }
    }
}

void test_shapes(tester & t, extent x) {
    for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_F16, GGML_TYPE_F32 }) {
        for (int64_t n_expert : { 1, 7, 42, 56, 77, 102 }) {
            for (int64_t d : { 32, 64, 96, 128 }) {
                for (int64_t n : TOKENS) {
                    if ((x != extent::full && n != TOKENS[(n_expert + d / 32) % 13]) ||
                        (x == extent::quick && n_expert != 7)) {
                        continue;
                    }
                    ffn_case c;
                    c.h        = 96;
                    c.d        = d;
                    c.n_expert = n_expert;
                    c.n        = n;
                    c.up = c.down = type;
                    c.packed      = true;
                    c.threads     = 1 + (int) ((n + d / 32) % 4);
                    t.against_oracle(c);
                }
            }
        }
    }
}

void test_activations(tester & t, extent e) {
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0 }) {
        for (int act = GGML_UNION_ACT_SILU; act <= GGML_UNION_ACT_NORM_SILU_NORMS; act++) {
            for (bool gated : { false, true }) {
                for (pattern active : { pattern::some, pattern::all, pattern::none, pattern::one_token }) {
                    ffn_case c;
                    c.h  = 64;
                    c.up = c.down = type;
                    c.packed      = true;
                    c.act         = (ggml_union_act) act;
                    c.gated       = gated;
                    c.active      = active;
                    c.n           = 9;
                    c.views       = gated;
                    t.against_oracle(c);
                    if (active == pattern::some && e != extent::quick) {
                        c.n = 20;
                        t.batch_invariance(c);
                    }
                }
            }
        }
    }
}

// sizes that fill no vector: only floats can have them
void test_odd_sizes(tester & t) {
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 }) {
        for (int64_t h : { 1, 5, 33, 67 }) {
            for (int64_t d : { 1, 7, 33 }) {
                ffn_case c;
                c.h  = h;
                c.d  = d;
                c.up = c.down = type;
                c.n           = 6;
                c.active      = pattern::all;
                t.against_oracle(c);
            }
        }
    }
    // rows that fill no group of a kernel: hidden values that a float matrix takes
    for (const type_pair & types : TYPES) {
        for (int64_t d : { 1, 7, 33 }) {
            ffn_case c;
            c.h  = ggml_blck_size(types.up);
            c.d  = d;
            c.up = types.up;
            c.n  = 6;
            t.against_oracle(c);
        }
    }
}

// more pairs than one block of tokens may hold: the op works in several blocks
void test_token_blocks(tester & t, extent e) {
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_Q4_0 }) {
        ffn_case c;
        c.h        = 32;
        c.n_expert = 102;
        c.d        = 128;
        c.n        = 700;
        c.threads  = 3;
        c.up = c.down = type;
        c.gated = c.packed = type != GGML_TYPE_F32;
        t.against_oracle(c);
        if (e != extent::quick) {
            t.batch_invariance(c);
        }
    }
}

void tester::refusals() {
    ctx_ptr ctx  = make_ctx(16);
    auto    rows = [&](int64_t a, int64_t b) {
        return ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, a, b);
    };
    auto cubes = [&](int64_t a, int64_t b) {
        return ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, a, b, 3);
    };
    ggml_tensor *      op    = ggml_union_ffn(ctx.get(), rows(8, 5), cubes(8, 4), cubes(8, 4), cubes(4, 8), rows(3, 5),
                                              ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, 8),
                                              ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, 4), GGML_UNION_ACT_NORM_SILU, 1e-5f);
    ggml_backend_dev_t cpu   = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto               check = [&](bool expected, const std::string & what) {
        report(ggml_backend_dev_supports_op(cpu, op) == expected, "refusal", what, expected ? "refused" : "taken");
    };
    check(true, "whole");
    for (int i = 0; i < 7; i++) {
        ggml_tensor * const whole = op->src[i];
        for (int dim = 0; dim < 4; dim++) {
            whole->ne[dim]++;
            check(false, "source " + std::to_string(i) + " longer in dimension " + std::to_string(dim));
            whole->ne[dim]--;
        }
        if (i == 0 || i > 3) {  // weights may have any type
            whole->type = GGML_TYPE_F16;
            check(false, "source " + std::to_string(i) + " in F16");
            whole->type = GGML_TYPE_F32;
        }
        whole->nb[1] += 2;
        whole->nb[0] += 1;
        check(false, "source " + std::to_string(i) + " with other strides");
        whole->nb[1] -= 2;
        whole->nb[0] -= 1;
        if (i != 2 && i < 5) {
            op->src[i] = nullptr;
            check(false, "without source " + std::to_string(i));
            op->src[i] = whole;
        }
    }
    for (int32_t act : { -1, (int32_t) GGML_UNION_ACT_NORM_SILU_NORMS + 1 }) {
        op->op_params[0] = act;
        check(false, "activation " + std::to_string(act));
    }
    op->op_params[0] = GGML_UNION_ACT_SILU;
    op->ne[1]++;
    check(false, "more rows than tokens");
    op->ne[1]--;
    check(true, "whole again");
}

}  // namespace

int main(int argc, char ** argv) {
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);  // a line per packed tensor otherwise
    tester t;
    extent e = extent::normal;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--full")) {
            e = extent::full;
        } else if (!strcmp(argv[i], "--quick")) {
            e = extent::quick;
        } else if (!strcmp(argv[i], "--filter") && i + 1 < argc) {
            t.filter = argv[++i];
        } else {
            fprintf(stderr, "usage: test-union-ffn [--quick | --full] [--filter TEXT]\n");
            return 2;
        }
    }
    test_types(t, e);
    test_shapes(t, e);
    test_activations(t, e);
    test_odd_sizes(t);
    test_token_blocks(t, e);
    t.refusals();
    printf("%d checks, %d failed\n", t.n_run, t.n_failed);
    return t.n_failed != 0;
}
