// Tests of MUL_MAT with GGML_HINT_TOKEN_TILES against a double-precision oracle, and of its batch invariance, bit for bit.
//     test-token-tiles [--quick]
// prints one line per failure and a summary; exit code 1 if anything failed.
#include "test-ops.h"

#include <cmath>
#include <limits>

namespace {

struct product_case {
    ggml_type type;
    int64_t   k, n_rows, n;
    bool      packed;         // the weight in CPU_REPACK if that takes it
    bool      view;           // the input is a view into a wider tensor
    bool      skips = false;  // the weight is every second row of a tensor
    int64_t   heads = 1;      // matrices of the weight, each with activation rows of its own

    std::string name() const {
        char text[160];
        snprintf(text, sizeof(text), "type=%s k=%d rows=%d n=%d packed=%d view=%d skips=%d heads=%d",
                 ggml_type_name(type), (int) k, (int) n_rows, (int) n, packed, view, skips, (int) heads);
        return text;
    }
};

struct product_data {
    product_case       c;
    placed_weight      weight;
    std::vector<float> x;  // [n][heads][k]

    product_data(const product_case & c_, unsigned seed) : c(c_) {
        std::mt19937 rng(seed);
        weight = placed_weight(packs() ? cpu_buffer_type("CPU_REPACK") : ggml_backend_cpu_buffer_type(), c.type,
                               { c.k, stored_rows(), c.heads },
                               random_values(c.k * stored_rows() * c.heads, rng, 1.0f / std::sqrt((float) c.k)));
        x      = random_values(c.n * c.heads * c.k, rng);
    }

    // whether the loader would put the weight into CPU_REPACK
    bool packs() const {
        ggml_backend_buffer_type_t buft = cpu_buffer_type("CPU_REPACK");
        if (!c.packed || !buft) {
            return false;
        }
        ctx_ptr       ctx = make_ctx(8);
        ggml_tensor * w   = ggml_new_tensor_3d(ctx.get(), c.type, c.k, stored_rows(), c.heads);
        ggml_tensor * op  = ggml_mul_mat(ctx.get(), w, ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, c.k, 4, c.heads));
        w->buffer         = ggml_backend_buft_alloc_buffer(buft, 0);
        const bool ok     = ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), op);
        ggml_backend_buffer_free(w->buffer);
        return ok;
    }

    int64_t stored_rows() const { return c.skips ? 2 * c.n_rows : c.n_rows; }

    ggml_tensor * product(ggml_context * ctx, ggml_tensor * x_in, ggml_op_hint hint) const {
        ggml_tensor * w   = weight.tensor;
        ggml_tensor * out = ggml_mul_mat(ctx, c.skips ? ggml_view_2d(ctx, w, c.k, c.n_rows, 2 * w->nb[1], 0) : w, x_in);
        ggml_mul_mat_set_hint(out, hint);
        return out;
    }

    // bytes of scratch that the graph asks for
    size_t work_size(ggml_op_hint hint, int threads) const {
        ctx_ptr       ctx   = make_ctx(16);
        ggml_cgraph * graph = ggml_new_graph_custom(ctx.get(), 16, false);
        ggml_build_forward_expand(
            graph, product(ctx.get(), ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, c.k, c.n, c.heads), hint));
        return ggml_graph_plan(graph, threads, nullptr).work_size;
    }

    // [heads][n][n_rows]
    std::vector<float> compute(cpu_runner & runner, int64_t t0, int64_t n, int threads) const {
        ggml_tensor * in  = nullptr;
        const int64_t pad = c.view ? 3 : 0;
        return runner.run(
            threads,
            [&](ggml_context * ctx) {
                in = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, c.k + pad, c.heads, n);
                ggml_tensor * by_head =
                    ggml_view_3d(ctx, in, c.k, n, c.heads, in->nb[2], in->nb[1], pad * sizeof(float));
                return product(ctx, by_head, GGML_HINT_TOKEN_TILES);
            },
            [&] {
                for (int64_t row = 0; row < n * c.heads; row++) {
                    ggml_backend_tensor_set(in, &x[(t0 * c.heads + row) * c.k], row * in->nb[1] + pad * sizeof(float),
                                            c.k * sizeof(float));
                }
            });
    }

    double nmse(const std::vector<float> & got) const {
        const std::vector<float> w     = weight.dequantize();
        double                   error = 0.0, power = 0.0;
        for (int64_t i = 0; i < c.heads * c.n * c.n_rows; i++) {
            const int64_t r = i % c.n_rows, t = i / c.n_rows % c.n, head = i / c.n_rows / c.n;
            const float * row  = &w[(head * stored_rows() + (c.skips ? 2 * r : r)) * c.k];
            const float * col  = &x[(t * c.heads + head) * c.k];
            double        want = 0.0;  // and its power, as the sum of random terms has it: a value near 0 says nothing
            for (int64_t j = 0; j < c.k; j++) {
                const double term = (double) row[j] * col[j];
                want += term;
                power += term * term;
            }
            error += (got[i] - want) * (got[i] - want);
        }
        return error / power;
    }
};

struct tester {
    cpu_runner runner;
    int        n_run = 0, n_failed = 0;

    void report(bool ok, const char * what, const std::string & name) {
        n_run++;
        if (!ok) {
            n_failed++;
            printf("FAIL %s: %s\n", what, name.c_str());
        }
    }

    void check(const product_case & c, bool invariant) {
        const product_data       data(c, 1 + n_run);
        const std::vector<float> whole = data.compute(runner, 0, c.n, 1 + n_run % 4);
        report(data.nmse(whole) <= 5e-4, "oracle", c.name());  // NaN fails
        for (int threads : { 1, 4 }) {
            report(data.work_size(GGML_HINT_TOKEN_TILES, threads) >= data.work_size(GGML_HINT_NONE, threads),
                   "scratch below the stock one", c.name());
        }
        for (int64_t t = 0; invariant && t < c.n; t += 1 + t / 4) {
            const int64_t            n    = std::min<int64_t>(1 + t % 9, c.n - t);
            const std::vector<float> part = data.compute(runner, t, n, 1 + (int) (t % 4));
            bool                     same = true;
            for (int64_t head = 0; head < c.heads; head++) {
                same = same && memcmp(&part[head * n * c.n_rows], &whole[(head * c.n + t) * c.n_rows],
                                      n * c.n_rows * sizeof(float)) == 0;
            }
            report(same, "invariance", c.name() + " from " + std::to_string(t) + ", " + std::to_string(n) + " tokens");
        }
    }

    // a row of the input with a NaN or an Inf gives nothing but such values; the other tokens keep their bits
    void not_a_number(const product_case & c) {
        product_data             data(c, 3);
        const std::vector<float> x = data.x, clean = data.compute(runner, 0, c.n, 2);
        for (const float bad : { std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity() }) {
            for (const int64_t at : { (int64_t) 0, (int64_t) 1, c.k / 2 + 3, c.k - 1 }) {
                const int64_t token          = at % c.n;
                data.x                       = x;
                data.x[token * c.k + at]     = bad;
                const std::vector<float> got = data.compute(runner, 0, c.n, 2);
                bool                     ok  = true;
                for (int64_t i = 0; i < c.n * c.n_rows; i++) {
                    ok = ok && (i / c.n_rows == token ? !std::isfinite(got[i]) :
                                                        memcmp(&got[i], &clean[i], sizeof(float)) == 0);
                }
                report(ok, "not a number", c.name() + ": " + std::to_string(bad) + " at " + std::to_string(at));
            }
        }
    }
};

const ggml_type BLOCK_TYPES[] = {
    GGML_TYPE_Q4_0,  GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0,   GGML_TYPE_IQ4_NL,
    GGML_TYPE_MXFP4, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K, GGML_TYPE_IQ4_XS,
};

void check_types(tester & t, int64_t n, int64_t n_rows) {
    // where there is a kernel of ours depends on the CPU; so does invariance, which is checked on x86
    const bool x86  = cpu_has("AVX2") && cpu_has("FMA") && cpu_has("F16C");
    const bool view = n % 2;
    for (ggml_type type : BLOCK_TYPES) {
        if ((type + n + n_rows) % 4 != 0 && n != 5) {  // a quarter of the combinations
            continue;
        }
        const int64_t block = ggml_blck_size(type);
        const int64_t k     = block == 32 ? 96 : 2 * block;
        for (bool packed : { false, true }) {
            // upstream's packed products read four tokens at a time as if they were contiguous: no views for them
            t.check({ type, k, n_rows, n, packed, view && (x86 || !packed) }, x86);
        }
        t.check({ type, block, n_rows, n, false, view, false, 3 }, x86);
        if (x86 && n < 10) {
            t.not_a_number({ type, k, n_rows, n, n % 4 < 2, view });
        }
    }
    t.check({ GGML_TYPE_Q4_0, 1024, n_rows, n, true, view && x86 }, x86);
    t.check({ GGML_TYPE_Q6_K, 1792, n_rows, n, false, view }, x86);
    // no kernel of ours: as without the hint
    t.check({ GGML_TYPE_Q3_K, 512, n_rows, n, false, view }, false);
    t.check({ GGML_TYPE_Q6_K, 512, n_rows, n, false, view, true }, false);
    t.check({ GGML_TYPE_Q8_0, 96, n_rows, n, false, false, true }, false);
}

}  // namespace

int main(int argc, char ** argv) {
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);  // a line per packed tensor otherwise
    const bool quick = argc == 2 && !strcmp(argv[1], "--quick");
    if (argc > 1 && !quick) {
        fprintf(stderr, "usage: test-token-tiles [--quick]\n");
        return 2;
    }
    tester t;
    for (int64_t n : { 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 130 }) {
        for (int64_t n_rows : { 1, 7, 8, 40, 129, 320 }) {
            if (!quick || n == 5 || n == 17) {
                check_types(t, n, n_rows);
            }
        }
    }
    printf("%d checks, %d failed\n", t.n_run, t.n_failed);
    return t.n_failed != 0;
}
