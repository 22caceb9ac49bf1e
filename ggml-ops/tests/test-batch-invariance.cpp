// Batch invariance of the CPU backend in its exact mode, bit for bit: MUL_MAT and MUL_MAT_ID with every type of weights in
// every buffer type, FLASH_ATTN_EXT with every type of cache. Whatever kernel upstream adds, a batch of any size must give
// each token what it gets alone.
//     test-batch-invariance
// prints one line per failure and a summary; exit code 1 if anything failed. The summary ends with the number of cases
// whose results do depend on the batch without the flag: 0 would mean that the test sees nothing.
#include "ggml-backend-impl.h"
#include "test-ops.h"

#include <cmath>

namespace {

constexpr int64_t MAX_TOKENS = 67;  // beyond the tiles of every kernel (64 rows in attention)

const std::vector<int64_t> BATCHES = { 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, MAX_TOKENS };

struct tester {
    cpu_runner runner;
    int        n_run = 0, n_failed = 0, n_dependent = 0;

    // the result of tokens [first, first + n): consecutive rows of `row` values
    typedef std::function<std::vector<float>(int64_t first, int64_t n, int threads)> compute_t;

    // every token alone, [MAX_TOKENS, values of a row]
    std::vector<float> alone(const compute_t & compute, bool exact) {
        GGML_ASSERT(CPU_FUNCTION(ggml_backend_cpu_set_batch_invariant)(runner.backend, exact));
        std::vector<float> rows;
        for (int64_t t = 0; t < MAX_TOKENS; t++) {
            const std::vector<float> row = compute(t, 1, t % 16 == 1 ? 3 : 1);
            rows.insert(rows.end(), row.begin(), row.end());
        }
        return rows;
    }

    bool differs(const compute_t & compute, const std::vector<float> & rows, int64_t n) {
        const int64_t            first = (n * 5) % (MAX_TOKENS - n + 1);
        const std::vector<float> batch = compute(first, n, 1 + (int) (n % 2));
        const float *            want  = &rows[first * (rows.size() / MAX_TOKENS)];
        return memcmp(batch.data(), want, batch.size() * sizeof(float)) != 0;
    }

    // batches of every size against their tokens alone
    void check(const std::string & name, const compute_t & compute, bool exact = true) {
        const std::vector<float> rows = alone(compute, exact);
        n_run++;
        for (int64_t n : BATCHES) {
            if (differs(compute, rows, n)) {
                n_failed++;
                printf("FAIL %s: a batch of %d differs from single tokens\n", name.c_str(), (int) n);
                break;
            }
        }
        if (exact) {
            CPU_FUNCTION(ggml_backend_cpu_set_batch_invariant)(runner.backend, false);
            n_dependent += differs(compute, rows, MAX_TOKENS);
        }
    }
};

// --- weights ---------------------------------------------------------------------------------------------------------

// types that weights can have, those that upstream adds included
std::vector<ggml_type> weight_types() {
    std::vector<ggml_type> types;
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const ggml_type type  = (ggml_type) i;
        const bool      plain = type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
        if (plain || (ggml_is_quantized(type) && type != GGML_TYPE_Q8_1 && type != GGML_TYPE_Q8_K)) {
            types.push_back(type);
        }
    }
    return types;
}

// whether the CPU takes this op with its first source in a buffer of this type: the question of the model loader
bool supported(ggml_backend_buffer_type_t                                          buft,
               const std::function<ggml_tensor *(ggml_context *, ggml_tensor *)> & build,
               ggml_type                                                           type,
               std::vector<int64_t>                                                ne) {
    ctx_ptr       ctx    = make_ctx(8);
    ggml_tensor * weight = ggml_new_tensor(ctx.get(), type, (int) ne.size(), ne.data());
    ggml_tensor * op     = build(ctx.get(), weight);
    weight->buffer       = ggml_backend_buft_alloc_buffer(buft, 0);
    const bool yes       = ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), op);
    ggml_backend_buffer_free(weight->buffer);
    return yes;
}

// Weights of random values; where quantizing would take seconds (the grids of IQ1, IQ2, IQ3), random blocks of scale 2^-7.
placed_weight make_weight(ggml_backend_buffer_type_t buft,
                          ggml_type                  type,
                          std::vector<int64_t>       ne,
                          std::mt19937 &             rng) {
    const bool grid = !strncmp(ggml_type_name(type), "iq1", 3) || !strncmp(ggml_type_name(type), "iq2", 3) ||
                      !strncmp(ggml_type_name(type), "iq3", 3);
    if (!grid) {
        int64_t n = 1;
        for (int64_t x : ne) {
            n *= x;
        }
        return placed_weight(buft, type, ne, random_values(n, rng, 1.0f / std::sqrt((float) ne[0])));
    }
    placed_weight w;
    w.ctx    = make_ctx(2);
    w.tensor = ggml_new_tensor(w.ctx.get(), type, (int) ne.size(), ne.data());
    w.rows.resize(ggml_nbytes(w.tensor));
    for (uint8_t & byte : w.rows) {
        byte = (uint8_t) rng();
    }
    const ggml_fp16_t scale = ggml_fp32_to_fp16(1.0f / 128);
    for (size_t i = 0; type != GGML_TYPE_IQ1_M && i < w.rows.size(); i += ggml_type_size(type)) {
        memcpy(&w.rows[i], &scale, sizeof(scale));
    }
    w.buffer = ggml_backend_alloc_ctx_tensors_from_buft(w.ctx.get(), buft);
    ggml_backend_buffer_set_usage(w.buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_tensor_set(w.tensor, w.rows.data(), 0, w.rows.size());
    return w;
}

// --- the ops ---------------------------------------------------------------------------------------------------------

// [rows, n, heads] = weight [k, rows, heads] x input [k, n, heads], as the graph of a model feeds it: heads in the middle
void check_mul_mat(tester &                   t,
                   ggml_backend_buffer_type_t buft,
                   ggml_type                  type,
                   int64_t                    k,
                   int64_t                    rows,
                   int64_t                    heads) {
    const auto build = [&](ggml_context * ctx, ggml_tensor * weight, ggml_tensor ** in, int64_t n) {
        *in               = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, k, heads, n);
        ggml_tensor * x   = heads > 1 ? ggml_permute(ctx, *in, 0, 2, 1, 3) : ggml_reshape_2d(ctx, *in, k, n);
        ggml_tensor * out = ggml_mul_mat(ctx, weight, x);
        return heads > 1 ? ggml_cont(ctx, ggml_permute(ctx, out, 0, 2, 1, 3)) : out;  // a token's values together
    };
    const std::vector<int64_t> ne = { k, rows, heads };
    const auto                 op = [&](ggml_context * ctx, ggml_tensor * weight) {
        ggml_tensor * x = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, k, 4, heads);
        return ggml_mul_mat(ctx, weight, x);
    };
    if (!supported(buft, op, type, ne)) {
        return;
    }
    std::mt19937             rng(1);
    const placed_weight      weight = make_weight(buft, type, ne, rng);
    const std::vector<float> x      = random_values(MAX_TOKENS * heads * k, rng);
    const auto               run    = [&](ggml_op_hint hint) {
        return [&, hint](int64_t first, int64_t n, int threads) {
            ggml_tensor * in = nullptr;
            return t.runner.run(
                threads,
                [&](ggml_context * ctx) {
                    ggml_tensor * out = build(ctx, weight.tensor, &in, n);
                    if (hint != GGML_HINT_NONE) {
                        ggml_mul_mat_set_hint(heads > 1 ? out->src[0]->src[0] : out, hint);
                    }
                    return out;
                },
                [&] { ggml_backend_tensor_set(in, &x[first * heads * k], 0, n * heads * k * sizeof(float)); });
        };
    };
    char name[160];
    snprintf(name, sizeof(name), "MUL_MAT %s in %s, k=%d rows=%d heads=%d", ggml_type_name(type),
             ggml_backend_buft_name(buft), (int) k, (int) rows, (int) heads);
    t.check(name, run(GGML_HINT_NONE));
    const bool ours = ggml_backend_buft_is_host(buft) || !strcmp(ggml_backend_buft_name(buft), "CPU_REPACK");
    if (ours) {
        t.check(std::string(name) + ", default mode with the hint", run(GGML_HINT_BATCH_INVARIANT), false);
    }
}

// [rows, used, n] = the experts of weight [k, rows, n_expert] that the ids of a token name, times its input [k, 1 or used]
void check_mul_mat_id(tester & t, ggml_backend_buffer_type_t buft, ggml_type type, int64_t k, int64_t rows, bool own) {
    constexpr int64_t N_EXPERT = 3, USED = 2;
    const auto build = [&](ggml_context * ctx, ggml_tensor * weight, ggml_tensor ** in, ggml_tensor ** ids, int64_t n) {
        *in  = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, k, own ? USED : 1, n);
        *ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, USED, n);
        return ggml_mul_mat_id(ctx, weight, *in, *ids);
    };
    const std::vector<int64_t> ne = { k, rows, N_EXPERT };
    ggml_tensor *              in = nullptr, *ids = nullptr;
    if (!supported(
            buft, [&](ggml_context * ctx, ggml_tensor * weight) { return build(ctx, weight, &in, &ids, 4); }, type,
            ne)) {
        return;
    }
    std::mt19937             rng(2);
    const placed_weight      weight = make_weight(buft, type, ne, rng);
    const int64_t            step   = k * (own ? USED : 1);
    const std::vector<float> x      = random_values(MAX_TOKENS * step, rng);
    std::vector<int32_t>     chosen(MAX_TOKENS * USED);
    for (int64_t i = 0; i < MAX_TOKENS; i++) {
        chosen[USED * i]     = (int32_t) (rng() % N_EXPERT);
        chosen[USED * i + 1] = (int32_t) ((chosen[USED * i] + 1 + rng() % (N_EXPERT - 1)) % N_EXPERT);
    }
    char name[160];
    snprintf(name, sizeof(name), "MUL_MAT_ID %s in %s, k=%d rows=%d own=%d", ggml_type_name(type),
             ggml_backend_buft_name(buft), (int) k, (int) rows, own);
    t.check(name, [&](int64_t first, int64_t n, int threads) {
        return t.runner.run(
            threads, [&](ggml_context * ctx) { return build(ctx, weight.tensor, &in, &ids, n); },
            [&] {
                ggml_backend_tensor_set(in, &x[first * step], 0, n * step * sizeof(float));
                ggml_backend_tensor_set(ids, &chosen[first * USED], 0, n * USED * sizeof(int32_t));
            });
    });
}

struct attention_case {
    ggml_type type_k, type_v;
    int64_t   dk, dv, heads, heads_kv, n_kv;
    float     max_bias, softcap;
};

// attention of the last MAX_TOKENS positions of a cache of n_kv cells, each seeing what lies before it
void check_attention(tester & t, const attention_case & c) {
    std::mt19937 rng(3);

    ggml_backend_buffer_type_t host = ggml_backend_cpu_buffer_type();
    const placed_weight        k    = make_weight(host, c.type_k, { c.dk, c.n_kv, c.heads_kv }, rng);
    const placed_weight        v    = make_weight(host, c.type_v, { c.dv, c.n_kv, c.heads_kv }, rng);
    const std::vector<float>   q    = random_values(MAX_TOKENS * c.heads * c.dk, rng, 3.0f);
    std::vector<ggml_fp16_t>   mask(MAX_TOKENS * c.n_kv);
    for (int64_t i = 0; i < MAX_TOKENS; i++) {
        for (int64_t j = 0; j < c.n_kv; j++) {
            mask[i * c.n_kv + j] = ggml_fp32_to_fp16(j <= c.n_kv - MAX_TOKENS + i ? 0.0f : -INFINITY);
        }
    }
    char name[200];
    snprintf(name, sizeof(name), "FLASH_ATTN_EXT k=%s v=%s dk=%d dv=%d heads=%d/%d cells=%d bias=%g softcap=%g",
             ggml_type_name(c.type_k), ggml_type_name(c.type_v), (int) c.dk, (int) c.dv, (int) c.heads,
             (int) c.heads_kv, (int) c.n_kv, c.max_bias, c.softcap);
    t.check(name, [&](int64_t first, int64_t n, int threads) {
        ggml_tensor *in = nullptr, *m = nullptr;
        return t.runner.run(
            threads,
            [&](ggml_context * ctx) {
                in = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, c.dk, c.heads, n);
                m  = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, c.n_kv, n);
                return ggml_flash_attn_ext(ctx, ggml_permute(ctx, in, 0, 2, 1, 3), k.tensor, v.tensor, m,
                                           1.0f / std::sqrt((float) c.dk), c.max_bias, c.softcap);
            },
            [&] {
                ggml_backend_tensor_set(in, &q[first * c.heads * c.dk], 0, n * c.heads * c.dk * sizeof(float));
                ggml_backend_tensor_set(m, &mask[first * c.n_kv], 0, n * c.n_kv * sizeof(ggml_fp16_t));
            });
    });
}

void check_attentions(tester & t) {
    const std::vector<ggml_type> types = { GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16,
                                           GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1,
                                           GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL };
    for (ggml_type k : types) {
        for (ggml_type v : types) {
            if (k == v || k == GGML_TYPE_F16 || v == GGML_TYPE_F16) {
                check_attention(t, { k, v, 64, 64, 4, 2, 128, 0.0f, 0.0f });
            }
        }
        check_attention(t, { k, k, 64, 64, 2, 1, 640, 0.0f, 0.0f });    // split between threads for a single token
        check_attention(t, { k, k, 288, 256, 3, 1, 128, 0.0f, 0.0f });  // latent attention
        check_attention(t, { k, k, 96, 96, 4, 4, 128, 8.0f, 0.0f });
        check_attention(t, { k, k, 128, 128, 4, 1, 640, 0.0f, 30.0f });
    }
}

// whether the list of buffer types whose kernels keep the promise holds what it should, and nothing else
void check_buffer_types(tester & t) {
    const auto report = [&](bool ok, const char * name) {
        t.n_run++;
        if (!ok) {
            t.n_failed++;
            printf("FAIL promise of buffer type %s\n", name);
        }
    };
    for (ggml_backend_buffer_type_t buft : cpu_buffer_types()) {
        report(CPU_FUNCTION(ggml_backend_cpu_buft_is_batch_invariant)(buft), ggml_backend_buft_name(buft));
    }
    char                  page[64];
    ggml_backend_buffer_t mapped = ggml_backend_cpu_buffer_from_ptr((void *) (((uintptr_t) page + 31) / 32 * 32), 32);
    report(CPU_FUNCTION(ggml_backend_cpu_buft_is_batch_invariant)(ggml_backend_buffer_get_type(mapped)), "mapped");
    ggml_backend_buffer_free(mapped);

    // kernels of somebody else: not memory of the host
    ggml_backend_buffer_type foreign = {};
    foreign.iface.get_name           = [](ggml_backend_buffer_type_t) {
        return "CPU_KLEIDIAI";
    };
    foreign.iface.is_host = [](ggml_backend_buffer_type_t) {
        return false;
    };
    report(!CPU_FUNCTION(ggml_backend_cpu_buft_is_batch_invariant)(&foreign), "CPU_KLEIDIAI");
}

}  // namespace

int main(int argc, char **) {
    if (argc > 1) {
        fprintf(stderr, "usage: test-batch-invariance\n");
        return 2;
    }
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);  // a line per packed tensor otherwise
    tester t;
    check_buffer_types(t);
    for (ggml_backend_buffer_type_t buft : cpu_buffer_types()) {
        for (ggml_type type : weight_types()) {
            const int64_t block = ggml_blck_size(type);
            check_mul_mat(t, buft, type, 512, 64, 1);
            check_mul_mat(t, buft, type, (96 + block - 1) / block * block, 102, 1);
            check_mul_mat(t, buft, type, 256, 32, 3);
            check_mul_mat_id(t, buft, type, 256, 64, true);
            check_mul_mat_id(t, buft, type, 256, 30, false);
        }
    }
    check_attentions(t);
    printf("%d checks, %d failed; without the flag %d depend on the batch\n", t.n_run, t.n_failed, t.n_dependent);
    return t.n_failed != 0;
}
