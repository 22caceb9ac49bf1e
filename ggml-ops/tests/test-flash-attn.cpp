// Tests of attention over the cache (FLASH_ATTN_EXT) against a double-precision oracle, and of its batch invariance, bit
// for bit: batches cut at any token, any number of threads, a cache padded further, cells of others between those that a
// token sees, NaN in rows and cells of others.
//     test-flash-attn [--quick]
// prints one line per failure and a summary; exit code 1 if anything failed.
#include "attention-case.h"

namespace {

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

    // the cells that a token sees, without gaps between them and with other gaps: as plain decoding and a verified tree
    // leave them
    void check_places(const attn_data & data, const std::vector<float> & whole) {
        const attn_case & c   = data.c;
        const int64_t     row = c.heads() * c.dv;
        std::mt19937      rng(n_run);
        for (int64_t t = c.n - 1; t >= 0 && c.streams == 1; t -= 1 + c.n / 2) {
            for (int64_t max_gap : { 0, t % 2 ? 9 : 300 }) {
                const attn_data moved = data.moved(t, max_gap, rng);
                run_args        a;
                a.n       = 1;
                a.n_kv    = moved.c.n_kv + rng() % 300;
                a.threads = 1 + (int) (rng() % 4);
                report(same_bits(&whole[t * row], moved.compute(runner, a).data(), row), "cells elsewhere",
                       c.name() + " token " + std::to_string(t) + ", gaps to " + std::to_string(max_gap));
            }
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
            check_places(data, whole);
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
    const mask_kind masks[] = { mask_kind::causal, mask_kind::tree,  mask_kind::sequences,
                                mask_kind::none,   mask_kind::texts, mask_kind::biased };
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
                t.check({ h.dk, h.dv, h.group, h.heads_kv, n, n_kv, k, v, masks[i % 6], h.v_in_k });
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
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (int64_t n : { 2, 12, 64, 65 }) {  // up to 64 tokens go in groups
            t.check({ 320, 256, 14, 1, n, 1000, type, type, mask_kind::texts, true });
            t.check({ 64, 64, 3, 3, n, 1000, type, type, mask_kind::texts, false });
        }
    }
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
    t.ours = (cpu_has("AVX2") && cpu_has("FMA") && cpu_has("F16C")) || cpu_has("NEON");
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
