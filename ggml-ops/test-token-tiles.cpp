// Tests of MUL_MAT with GGML_HINT_TOKEN_TILES against a double-precision oracle, and of its batch invariance, bit for bit.
//     test-token-tiles [--quick]
// prints one line per failure and a summary; exit code 1 if anything failed.
#include "test-ops.h"

#include <cmath>

namespace {

struct product_case {
    ggml_type type;
    int64_t   k, n_rows, n;
    bool      packed;  // the weight in CPU_REPACK if that takes it
    bool      view;    // the input is a view into a wider tensor

    std::string name() const {
        char text[128];
        snprintf(text, sizeof(text), "type=%s k=%d rows=%d n=%d packed=%d view=%d", ggml_type_name(type), (int) k,
                 (int) n_rows, (int) n, packed, view);
        return text;
    }
};

struct product_data {
    product_case       c;
    placed_weight      weight;
    std::vector<float> x;  // [n][k]

    product_data(const product_case & c_, unsigned seed) : c(c_) {
        std::mt19937 rng(seed);
        const bool   takes = c.packed && c.n_rows % 8 == 0;  // the groups of CPU_REPACK
        weight = placed_weight(takes ? cpu_buffer_type("CPU_REPACK") : ggml_backend_cpu_buffer_type(), c.type,
                               { c.k, c.n_rows }, random_values(c.k * c.n_rows, rng, 1.0f / std::sqrt((float) c.k)));
        x      = random_values(c.n * c.k, rng);
    }

    // [n][n_rows]
    std::vector<float> compute(cpu_runner & runner, int64_t t0, int64_t n, int threads) const {
        ggml_tensor * in  = nullptr;
        const int64_t pad = c.view ? 3 : 0;
        return runner.run(
            threads,
            [&](ggml_context * ctx) {
                in                = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, c.k + pad, n);
                ggml_tensor * xv  = ggml_view_2d(ctx, in, c.k, n, in->nb[1], pad * sizeof(float));
                ggml_tensor * out = ggml_mul_mat(ctx, weight.tensor, xv);
                ggml_mul_mat_set_hint(out, GGML_HINT_TOKEN_TILES);
                return out;
            },
            [&] {
                for (int64_t t = 0; t < n; t++) {
                    ggml_backend_tensor_set(in, &x[(t0 + t) * c.k], t * in->nb[1] + pad * sizeof(float),
                                            c.k * sizeof(float));
                }
            });
    }

    double nmse(const std::vector<float> & got) const {
        const std::vector<float> w     = weight.dequantize();
        double                   error = 0.0, power = 0.0;
        for (int64_t t = 0; t < c.n; t++) {
            for (int64_t r = 0; r < c.n_rows; r++) {
                double want = 0.0;
                for (int64_t i = 0; i < c.k; i++) {
                    want += (double) w[r * c.k + i] * x[t * c.k + i];
                }
                const double off = got[t * c.n_rows + r] - want;
                error += off * off;
                power += want * want;
            }
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
        const double             limit = whole.size() < 8 ? 5e-3 : 5e-4;  // a few values may be unlucky
        report(data.nmse(whole) <= limit, "oracle", c.name());            // NaN fails
        for (int64_t t = 0; invariant && t < c.n; t += 1 + t / 4) {
            const int64_t            n    = std::min<int64_t>(1 + t % 9, c.n - t);
            const std::vector<float> part = data.compute(runner, t, n, 1 + (int) (t % 4));
            const bool               same = memcmp(part.data(), &whole[t * c.n_rows], part.size() * sizeof(float)) == 0;
            report(same, "invariance", c.name() + " from " + std::to_string(t) + ", " + std::to_string(n) + " tokens");
        }
    }
};

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
            if (quick && n != 5 && n != 17) {
                continue;
            }
            const bool view = n % 2;
            // where these have a kernel of ours depends on the CPU; so does invariance, which is checked on x86
#if defined(__x86_64__) && defined(__AVX2__)
            const bool q4_packed = n_rows % 8 == 0, q6 = true;
#else
            const bool q4_packed = false, q6 = false;
#endif
            // upstream's packed products read four tokens at a time as if they were contiguous: no views for them
            const bool q4_view = view && (q4_packed || n_rows % 8 != 0);
            t.check({ GGML_TYPE_Q4_0, 96, n_rows, n, true, q4_view }, q4_packed);
            t.check({ GGML_TYPE_Q4_0, 1024, n_rows, n, true, q4_view }, q4_packed);
            t.check({ GGML_TYPE_Q6_K, 256, n_rows, n, false, view }, q6);
            t.check({ GGML_TYPE_Q6_K, 1792, n_rows, n, false, view }, q6);
            // no kernel of ours: as without the hint
            t.check({ GGML_TYPE_Q4_K, 512, n_rows, n, false, false }, false);
            t.check({ GGML_TYPE_Q8_0, 96, n_rows, n, false, view }, false);
        }
    }
    printf("%d checks, %d failed\n", t.n_run, t.n_failed);
    return t.n_failed != 0;
}
