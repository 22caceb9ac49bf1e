// Tests of attention over the cache (FLASH_ATTN_EXT) against a double-precision oracle, and of its batch invariance, bit
// for bit: batches cut at any token, any number of threads, a cache padded further, NaN in rows and cells of others.
//     test-flash-attn [--quick]
// prints one line per failure and a summary; exit code 1 if anything failed.
#include "flash-attn.h"
#include "test-ops.h"

#include <cmath>

namespace {

enum class mask_kind { none, causal, tree, sequences, biased };

const char * const MASK_NAMES[] = { "none", "causal", "tree", "sequences", "biased" };

struct attn_case {
    int64_t   dk, dv, group, heads_kv, n, n_kv;
    ggml_type k_type, v_type;
    mask_kind mask;
    bool      v_in_k;  // values are the first dv elements of the keys, as latent attention has them
    int64_t   streams  = 1;
    float     max_bias = 0.0f, softcap = 0.0f;
    bool      sinks = false;

    int64_t heads() const { return group * heads_kv; }

    std::string name() const {
        char text[256];
        snprintf(text, sizeof(text),
                 "dk=%d dv=%d group=%d heads_kv=%d n=%d n_kv=%d k=%s v=%s mask=%s v_in_k=%d streams=%d bias=%g cap=%g "
                 "sinks=%d",
                 (int) dk, (int) dv, (int) group, (int) heads_kv, (int) n, (int) n_kv, ggml_type_name(k_type),
                 ggml_type_name(v_type), MASK_NAMES[(int) mask], v_in_k, (int) streams, max_bias, softcap, sinks);
        return text;
    }
};

// what a batch of tokens [first, first + n) is evaluated with
struct run_args {
    int64_t first = 0, n;
    int64_t n_kv;  // of the cache, as far as it is padded
    int     threads    = 1;
    bool    row_by_row = false;
    bool    use_ref    = false;
};

struct attn_data {
    attn_case            c;
    int64_t              size;    // cells of the cache; those from n_kv on are never visible
    std::vector<float>   q;       // [streams][n][heads][dk]
    std::vector<float>   mask;    // [streams][n][size]
    std::vector<float>   sinks;   // [heads]
    std::vector<uint8_t> k, v;    // [streams][size][heads_kv] rows
    std::vector<float>   kf, vf;  // the values that these stand for

    attn_data(const attn_case & c_, unsigned seed) : c(c_), size(c_.n_kv + 300) {
        std::mt19937 rng(seed);
        q     = random_values(c.streams * c.n * c.heads() * c.dk, rng, 1.5f);
        sinks = random_values(c.heads(), rng, 2.0f);
        make_cells(c.k_type, c.dk, rng, k, kf);
        if (!c.v_in_k) {
            make_cells(c.v_type, c.dv, rng, v, vf);
        }
        mask.assign(c.streams * c.n * size, -INFINITY);
        for (int64_t s = 0; s < c.streams; s++) {
            for (int64_t t = 0; t < c.n; t++) {
                for (int64_t i = 0; i < c.n_kv; i++) {
                    mask[(s * c.n + t) * size + i] = mask_value(t, i, rng);
                }
            }
        }
    }

    void make_cells(ggml_type              type,
                    int64_t                d,
                    std::mt19937 &         rng,
                    std::vector<uint8_t> & rows,
                    std::vector<float> &   values) const {
        const int64_t            n_rows = c.streams * size * c.heads_kv;
        const std::vector<float> x      = random_values(n_rows * d, rng);
        rows.resize(n_rows * ggml_row_size(type, d));
        values = x;
        if (type == GGML_TYPE_F32) {
            memcpy(rows.data(), x.data(), rows.size());
        } else {
            ggml_quantize_chunk(type, x.data(), rows.data(), 0, n_rows, d, nullptr);
            ggml_get_type_traits(type)->to_float(rows.data(), values.data(), (int64_t) values.size());
        }
    }

    float mask_value(int64_t t, int64_t i, std::mt19937 & rng) const {
        const int64_t past = std::max<int64_t>(0, c.n_kv - c.n);  // cells of earlier tokens; then those of the batch
        bool          seen = true;
        switch (c.mask) {
            case mask_kind::none:
                break;
            case mask_kind::causal:
                seen = i <= past + t;
                break;
            case mask_kind::tree:  // token t hangs on token (t - 1) / 2
                seen = i < past;
                for (int64_t a = t; !seen; a = (a - 1) / 2) {
                    seen = i == past + a;
                    if (a == 0) {
                        break;
                    }
                }
                break;
            case mask_kind::
                sequences:  // whole stretches of the cache, and single cells, belong to others; a row may see none
                seen = (i / 150) % 3 == t % 3 && i % 7 != 0;
                break;
            case mask_kind::biased:
                return rng() % 5 == 0 ? -INFINITY : -0.25f * (float) (rng() % 16);
        }
        return seen ? 0.0f : -INFINITY;
    }

    float mask_at(int64_t s, int64_t t, int64_t i) const {
        return c.mask == mask_kind::none ? 0.0f : mask[(s * c.n + t) * size + i];
    }

    const float * k_row(int64_t s, int64_t i, int64_t h) const { return &kf[((s * size + i) * c.heads_kv + h) * c.dk]; }

    const float * v_row(int64_t s, int64_t i, int64_t h) const {
        return c.v_in_k ? k_row(s, i, h) : &vf[((s * size + i) * c.heads_kv + h) * c.dv];
    }

    // a view of the cache as llama.cpp makes it: [d, n_kv, heads_kv, streams]
    static ggml_tensor * cache_view(ggml_context * ctx,
                                    ggml_tensor *  cache,
                                    int64_t        d,
                                    int64_t        heads_kv,
                                    int64_t        n_kv) {
        ggml_tensor * x = ggml_view_4d(ctx, cache, d, heads_kv, n_kv, cache->ne[2], cache->nb[1] / heads_kv,
                                       cache->nb[1], cache->nb[2], 0);
        return ggml_permute(ctx, x, 0, 2, 1, 3);
    }

    // [streams][n][heads][dv]
    std::vector<float> compute(cpu_runner & runner, const run_args & a) const {
        ggml_tensor *qt, *kt, *vt = nullptr, *mt = nullptr, *st = nullptr;
        ggml_backend_cpu_set_use_ref(runner.backend, a.use_ref);
        auto build = [&](ggml_context * ctx) {
            qt               = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, c.dk, c.heads(), a.n, c.streams);
            kt               = ggml_new_tensor_3d(ctx, c.k_type, c.dk * c.heads_kv, size, c.streams);
            ggml_tensor * kv = cache_view(ctx, kt, c.dk, c.heads_kv, a.n_kv);
            ggml_tensor * vv = nullptr;
            if (c.v_in_k) {
                vv = ggml_view_4d(ctx, kv, c.dv, a.n_kv, c.heads_kv, c.streams, kv->nb[1], kv->nb[2], kv->nb[3], 0);
            } else {
                vt = ggml_new_tensor_3d(ctx, c.v_type, c.dv * c.heads_kv, size, c.streams);
                vv = cache_view(ctx, vt, c.dv, c.heads_kv, a.n_kv);
            }
            if (c.mask != mask_kind::none) {
                mt = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, a.n_kv, a.n, 1, c.streams);
            }
            ggml_tensor * out = ggml_flash_attn_ext(ctx, ggml_permute(ctx, qt, 0, 2, 1, 3), kv, vv, mt,
                                                    1.0f / std::sqrt((float) c.dk), c.max_bias, c.softcap);
            if (c.sinks) {
                st = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.heads());
                ggml_flash_attn_ext_add_sinks(out, st);
            }
            if (a.row_by_row) {
                ggml_flash_attn_set_row_by_row(out);
            }
            return out;
        };
        auto set = [&] {
            const int64_t row = c.heads() * c.dk;
            for (int64_t s = 0; s < c.streams; s++) {
                ggml_backend_tensor_set(qt, &q[(s * c.n + a.first) * row], s * qt->nb[3], a.n * row * sizeof(float));
            }
            ggml_backend_tensor_set(kt, k.data(), 0, k.size());
            if (vt) {
                ggml_backend_tensor_set(vt, v.data(), 0, v.size());
            }
            if (st) {
                ggml_backend_tensor_set(st, sinks.data(), 0, ggml_nbytes(st));
            }
            for (int64_t s = 0; mt && s < c.streams; s++) {
                for (int64_t t = 0; t < a.n; t++) {
                    std::vector<ggml_fp16_t> half(a.n_kv);
                    ggml_fp32_to_fp16_row(&mask[(s * c.n + a.first + t) * size], half.data(), a.n_kv);
                    ggml_backend_tensor_set(mt, half.data(), s * mt->nb[3] + t * mt->nb[1],
                                            a.n_kv * sizeof(ggml_fp16_t));
                }
            }
        };
        return runner.run(a.threads, build, set);
    }

    double slope(int64_t head) const {
        if (c.max_bias == 0.0f) {
            return 1.0;
        }
        const double n_log2 = std::exp2(std::floor(std::log2((double) c.heads())));
        return head < n_log2 ? std::pow(2.0, -c.max_bias / n_log2 * (head + 1)) :
                               std::pow(2.0, -c.max_bias / 2.0 / n_log2 * (2 * (head - n_log2) + 1));
    }

    // one row, written from the definition
    std::vector<double> oracle(int64_t s, int64_t t, int64_t head) const {
        const float *       x = &q[((s * c.n + t) * c.heads() + head) * c.dk];
        std::vector<double> score(c.n_kv, -INFINITY), out(c.dv, 0.0);
        double              max = c.sinks ? sinks[head] : -INFINITY;
        for (int64_t i = 0; i < c.n_kv; i++) {
            if (mask_at(s, t, i) == -INFINITY) {
                continue;
            }
            const float * y   = k_row(s, i, head / c.group);
            double        dot = 0.0;
            for (int64_t d = 0; d < c.dk; d++) {
                dot += (double) x[d] * y[d];
            }
            dot /= std::sqrt((double) c.dk);
            dot      = c.softcap != 0.0f ? c.softcap * std::tanh(dot / c.softcap) : dot;
            score[i] = dot + slope(head) * mask_at(s, t, i);
            max      = std::max(max, score[i]);
        }
        double sum = c.sinks ? std::exp(sinks[head] - max) : 0.0;
        for (int64_t i = 0; i < c.n_kv; i++) {
            if (score[i] == -INFINITY) {
                continue;
            }
            const double p = std::exp(score[i] - max);
            sum += p;
            for (int64_t d = 0; d < c.dv; d++) {
                out[d] += p * v_row(s, i, head / c.group)[d];
            }
        }
        for (double & o : out) {
            o = sum > 0.0 ? o / sum : 0.0;
        }
        return out;
    }

    // of every 1 + skip-th row
    double nmse(const std::vector<float> & got, int64_t skip) const {
        double error = 0.0, power = 0.0;
        for (int64_t r = 0; r < c.streams * c.n * c.heads(); r += 1 + skip) {
            const std::vector<double> want = oracle(r / (c.n * c.heads()), r / c.heads() % c.n, r % c.heads());
            for (int64_t d = 0; d < c.dv; d++) {
                const double off = got[r * c.dv + d] - want[d];
                error += off * off;
                power += want[d] * want[d];
            }
        }
        return power > 0.0 ? error / power : error;
    }
};

bool same_bits(const float * a, const float * b, int64_t n) {
    return memcmp(a, b, n * sizeof(float)) == 0;
}

struct tester {
    cpu_runner runner;
    bool       ours;  // this CPU has our kernel: the stricter checks
    int        n_run = 0, n_failed = 0;

    void report(bool ok, const char * what, const std::string & name) {
        n_run++;
        if (!ok) {
            n_failed++;
            printf("FAIL %s: %s\n", what, name.c_str());
        }
    }

    // tokens [first, first + n) of every stream are the same in both
    bool same_tokens(const attn_case &          c,
                     const std::vector<float> & whole,
                     const std::vector<float> & part,
                     int64_t                    first,
                     int64_t                    n) {
        const int64_t row = c.heads() * c.dv;
        bool          ok  = true;
        for (int64_t s = 0; s < c.streams; s++) {
            ok &= same_bits(&whole[(s * c.n + first) * row], &part[s * n * row], n * row);
        }
        return ok;
    }

    void check_oracle(const attn_data & data, const std::vector<float> & whole) {
        const attn_case & c    = data.c;
        const int64_t     macs = c.heads() * c.n * c.streams * c.n_kv * (c.dk + c.dv);
        report(data.nmse(whole, macs / 4000000) <= (ours ? 1e-11 : 5e-4), "oracle", c.name());  // NaN fails
    }

    // parts of the batch, other numbers of threads, and a cache of another length; without a mask all of it is seen
    void check_invariance(const attn_data & data, const std::vector<float> & whole) {
        const attn_case & c = data.c;
        for (int64_t t = 0; t < c.n; t += 1 + t / 3) {
            run_args a;
            a.first   = t;
            a.n       = std::min<int64_t>(1 + t % 6, c.n - t);
            a.n_kv    = c.n_kv + (c.mask == mask_kind::none ? 0 : 37 * (t % 9));
            a.threads = 1 + (int) ((t + 1) % 4);
            report(same_tokens(c, whole, data.compute(runner, a), t, a.n), "invariance",
                   c.name() + " from " + std::to_string(t) + ", " + std::to_string(a.n) + " tokens");
        }
    }

    void check(const attn_case & c) {
        const attn_data data(c, 1 + n_run);
        run_args        a;
        a.n                            = c.n;
        a.n_kv                         = c.n_kv;
        a.threads                      = 1 + n_run % 4;
        const std::vector<float> whole = data.compute(runner, a);
        check_oracle(data, whole);
        if (ours) {
            check_invariance(data, whole);
        }
    }

    // NaN in one query stays in its row; NaN and infinity in a cell stay with the rows that see it
    void check_nan(const attn_case & c) {
        attn_data data(c, 99);
        run_args  a;
        a.n                             = c.n;
        a.n_kv                          = c.n_kv;
        a.threads                       = 2;
        const std::vector<float> before = data.compute(runner, a);
        const int64_t            bad    = c.n * c.heads() / 2;
        data.q[bad * c.dk + 1]          = NAN;
        std::vector<float> after        = data.compute(runner, a);
        bool               ok           = true;
        for (int64_t r = 0; r < c.n * c.heads(); r++) {
            ok &= r == bad ? std::isnan(after[r * c.dv]) : same_bits(&before[r * c.dv], &after[r * c.dv], c.dv);
        }
        report(ok, "NaN in a query", c.name());

        data = attn_data(c, 99);
        for (float bits : { NAN, INFINITY }) {
            const int64_t cell = c.n_kv - 2;
            for (std::vector<uint8_t> * x : { &data.k, &data.v }) {
                if (!x->empty()) {
                    const ggml_fp16_t h = ggml_fp32_to_fp16(bits);
                    memcpy(x->data() + cell * x->size() / data.size, &h, sizeof(h));
                }
            }
            after = data.compute(runner, a);
            ok    = true;
            for (int64_t t = 0; t < c.n; t++) {
                if (data.mask_at(0, t, cell) == -INFINITY) {
                    const int64_t row = c.heads() * c.dv;
                    ok &= same_bits(&before[t * row], &after[t * row], row);
                } else if (std::isnan(bits)) {
                    ok &= std::isnan(after[t * c.heads() * c.dv]);
                }
            }
            report(ok, "value that is not finite in a cell", c.name());
        }
    }

    // the switch to ggml's own kernel: row by row it is the reference, and less accurate than ours
    void check_row_by_row(const attn_case & c) {
        const attn_data data(c, 5);
        run_args        a;
        a.n                           = c.n;
        a.n_kv                        = c.n_kv;
        a.row_by_row                  = true;
        const std::vector<float> rows = data.compute(runner, a);
        a.row_by_row                  = false;
        const std::vector<float> fast = data.compute(runner, a);
        a.use_ref                     = true;
        const std::vector<float> ref  = data.compute(runner, a);
        report(same_bits(rows.data(), ref.data(), (int64_t) ref.size()), "row by row", c.name());
        report(!ours || data.nmse(fast, 0) < 0.01 * data.nmse(ref, 0), "more accurate than the reference", c.name());
    }
};

struct head_shape {
    int64_t dk, dv, group, heads_kv;
    bool    v_in_k;
};

const head_shape SHAPES[] = {
    { 320, 256, 14, 1, true  },
    { 288, 256, 3,  1, true  },
    { 64,  64,  7,  2, false },
    { 48,  48,  2,  3, false },
    { 128, 128, 4,  2, false },
    { 96,  96,  1,  4, false },
    { 40,  40,  5,  1, false },
    { 72,  33,  2,  2, false },
};

void check_shapes(tester & t, bool quick) {
    const mask_kind masks[] = { mask_kind::causal, mask_kind::tree, mask_kind::sequences, mask_kind::none,
                                mask_kind::biased };
    const ggml_type types[] = { GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 };
    int             i       = 0;
    for (const head_shape & h : SHAPES) {
        for (int64_t n_kv : { 1, 31, 129, 256, 511, 513, 3000 }) {
            for (int64_t n : { 1, 2, 3, 5, 8, 17, 33 }) {
                i++;
                if ((n_kv == 3000 && n > 3 && i % 7 != 0) || (quick && i % 11 != 0)) {
                    continue;
                }
                ggml_type k = types[i % 5], v = h.v_in_k ? k : types[(i + i / 5) % 5];
                k = h.dk % ggml_blck_size(k) ? GGML_TYPE_F16 : k;
                v = h.v_in_k ? k : h.dv % ggml_blck_size(v) ? GGML_TYPE_BF16 : v;
                t.check({ h.dk, h.dv, h.group, h.heads_kv, n, n_kv, k, v, masks[i % 5], h.v_in_k });
            }
        }
    }
}

void check_features(tester & t) {
    attn_case c = { 64, 64, 2, 3, 9, 300, GGML_TYPE_F16, GGML_TYPE_F16, mask_kind::causal, false };
    for (int64_t streams : { 1, 3 }) {
        for (float softcap : { 0.0f, 5.0f }) {
            for (float max_bias : { 0.0f, 8.0f }) {
                for (bool sinks : { false, true }) {
                    c.streams  = streams;
                    c.softcap  = softcap;
                    c.max_bias = max_bias;
                    c.sinks    = sinks;
                    c.mask     = max_bias > 0.0f ? mask_kind::biased : mask_kind::sequences;
                    t.check(c);
                }
            }
        }
    }
    t.check({ 64, 64, 4, 2, 150, 400, GGML_TYPE_F16, GGML_TYPE_F16, mask_kind::causal, false });  // a prompt
    t.check({ 64, 48, 14, 1, 40, 700, GGML_TYPE_F16, GGML_TYPE_F16, mask_kind::tree, true });
}

}  // namespace

int main(int argc, char ** argv) {
    const bool quick = argc == 2 && !strcmp(argv[1], "--quick");
    if (argc > 1 && !quick) {
        fprintf(stderr, "usage: test-flash-attn [--quick]\n");
        return 2;
    }
    tester t;
    // at run time: this program is not compiled for the CPU that the kernels are compiled for
    t.ours = (ggml_cpu_has_avx2() && ggml_cpu_has_fma() && ggml_cpu_has_f16c()) || ggml_cpu_has_neon();
    check_shapes(t, quick);
    check_features(t);
    for (int64_t group : { 1, 2, 7, 17 }) {  // read in place, and widened
        const attn_case c = { 64, 64, group, 1, 5, 140, GGML_TYPE_F16, GGML_TYPE_F16, mask_kind::tree, false };
        if (t.ours) {
            t.check_nan(c);
        }
        t.check_row_by_row(c);
    }
    if (t.ours) {  // rows whose last cells are masked
        t.check_nan({ 64, 64, 1, 1, 33, 40, GGML_TYPE_F16, GGML_TYPE_F16, mask_kind::causal, false });
    }
    printf("%d checks, %d failed\n", t.n_run, t.n_failed);
    return t.n_failed != 0;
}
