// bench-ops --subject products: the matrix products around the FFN, ours against the best stock path: one JSON line per (product, n).
// Ours is MUL_MAT with the hint of our graph, on the weight where the model loader puts it; stock is the product without
// the hint in every buffer type that takes the weight. Candidates run in turn, medians count. Times are per layer.
#include "bench-peaks.h"

namespace {

struct product {
    const char * subject;
    const char * name;
    ggml_type    type;
    int64_t      k, rows, heads, layers;
};

// of the 1.2B shape in the types that llama-quantize gives them in a Q4_0 file
const product PRODUCTS[] = {
    { "head",               "output",    GGML_TYPE_Q6_K, 1792, 122753, 1,  1  },
    { "head",               "output",    GGML_TYPE_Q4_0, 1792, 122752, 1,  1  },
    { "per-head products",  "wk_b",      GGML_TYPE_Q4_0, 128,  256,    14, 35 },
    { "per-head products",  "wv_b",      GGML_TYPE_Q4_0, 256,  128,    14, 35 },
    { "attention products", "wq_a",      GGML_TYPE_Q4_0, 1792, 768,    1,  35 },
    { "attention products", "wq_b",      GGML_TYPE_Q4_0, 768,  2688,   1,  35 },
    { "attention products", "wkv_a_mqa", GGML_TYPE_Q4_0, 1792, 320,    1,  35 },
    { "attention products", "wo",        GGML_TYPE_Q4_0, 1792, 1792,   1,  35 },
    { "router",             "gate_inp",  GGML_TYPE_F32,  1792, 56,     1,  35 },
};

using weights = std::vector<placed_weight>;

// x [k, n, heads] as the graph has it: a view of the rows of all heads of a token
// hint: as the graph gives it, to the router's product another one than to the rest
ggml_tensor * make_product(ggml_context * ctx, ggml_tensor * w, int64_t n, bool hint) {
    ggml_tensor * x = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, w->ne[0], w->ne[2], n);
    ggml_tensor * y = ggml_mul_mat(ctx, w, ggml_permute(ctx, x, 0, 2, 1, 3));
    if (hint) {
        ggml_mul_mat_set_hint(y, w->type == GGML_TYPE_F32 ? GGML_HINT_BATCH_INVARIANT : GGML_HINT_TOKEN_TILES);
    }
    return y;
}

bool takes(ggml_backend_buffer_type_t buft, const product & p) {
    ctx_ptr       ctx = make_ctx(8);
    ggml_tensor * w   = ggml_new_tensor_3d(ctx.get(), p.type, p.k, p.rows, p.heads);
    w->buffer         = ggml_backend_buft_alloc_buffer(buft, 0);
    const bool ok     = ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU),
                                                     make_product(ctx.get(), w, 4, false));
    ggml_backend_buffer_free(w->buffer);
    return ok;
}

struct candidate {
    std::string           buffer_type;
    ctx_ptr               ctx;
    ggml_cgraph *         graph  = nullptr;
    ggml_backend_buffer_t buffer = nullptr;
    std::vector<double>   ms;  // per layer

    candidate(ggml_backend_buffer_type_t buft, const weights & layers, int64_t n, bool hint) :
        buffer_type(ggml_backend_buft_name(buft)),
        ctx(make_ctx(8 * layers.size() + 8)) {
        graph = ggml_new_graph_custom(ctx.get(), 8 * layers.size() + 8, false);
        for (const placed_weight & w : layers) {
            ggml_build_forward_expand(graph, make_product(ctx.get(), w.tensor, n, hint));
        }
        buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_cpu_buffer_type());
        std::mt19937 rng(5);
        for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
            if (t->op == GGML_OP_NONE) {
                const std::vector<float> values = random_values(ggml_nelements(t), rng);
                ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
            }
        }
    }

    candidate(const candidate &) = delete;

    ~candidate() { ggml_backend_buffer_free(buffer); }
};

void bench_row(ggml_backend_t                                                      backend,
               const product &                                                     p,
               const std::vector<std::pair<ggml_backend_buffer_type_t, weights>> & placed,
               int64_t                                                             n,
               const bench_settings &                                              with,
               double                                                              peak,
               const std::vector<uint64_t> &                                       stream) {
    std::vector<std::unique_ptr<candidate>> all;
    for (const auto & [buft, layers] : placed) {
        all.push_back(std::make_unique<candidate>(buft, layers, n, false));
    }
    all.push_back(std::make_unique<candidate>(placed.back().first, placed.back().second, n, true));

    std::vector<double> bandwidth;
    for (int rep = 0; rep < with.reps + 1; rep++) {
        for (auto & c : all) {
            bandwidth.push_back(read_bandwidth(stream, with.n_threads));  // everything else leaves the caches
            const double start = now_ms();
            ggml_backend_graph_compute(backend, c->graph);
            if (rep > 0) {  // the first round warms up
                c->ms.push_back((now_ms() - start) / p.layers);
            }
        }
    }
    const candidate & ours  = *all.back();
    const auto        stock = std::min_element(all.begin(), all.end() - 1,
                                               [](const auto & a, const auto & b) { return median(a->ms) < median(b->ms); });
    const double      gbs   = median(bandwidth);
    const double      bytes = (double) ggml_row_size(p.type, p.k) * p.rows * p.heads;
    const double      limit = limit_ms(bytes, gbs, (double) p.k * p.rows * p.heads * n, peak);
    printf(
        "{\"subject\": \"%s\", \"shape\": \"%s\", \"type\": \"%s\", \"n\": %d, \"threads\": %d, \"ours_ms\": %.4f, "
        "\"ours_buffer\": \"%s\", \"spread\": %.4f, \"stock_ms\": %.4f, \"stock_buffer\": \"%s\", \"peak_gmacs\": "
        "%.1f, "
        "\"bandwidth_gbs\": %.2f, \"fraction_of_limit\": %.4f}\n",
        p.subject, p.name, ggml_type_name(p.type), (int) n, with.n_threads, median(ours.ms), ours.buffer_type.c_str(),
        spread(ours.ms), median((*stock)->ms), (*stock)->buffer_type.c_str(), peak, gbs, limit / median(ours.ms));
    fflush(stdout);
}

}  // namespace

void bench_products(const bench_settings & with, const std::vector<int64_t> & tokens) {
    ggml_backend_t backend = ggml_backend_dev_init(cpu_device(), nullptr);
    set_n_threads(backend, with.n_threads);
    const std::vector<uint64_t> stream(CACHE_BYTES / sizeof(uint64_t), 1);
    for (const product & p : PRODUCTS) {
        std::vector<std::pair<ggml_backend_buffer_type_t, weights>> placed;
        for (ggml_backend_buffer_type_t buft : cpu_buffer_types()) {
            if (takes(buft, p)) {
                weights layers;
                for (int64_t l = 0; l < p.layers; l++) {
                    layers.push_back(fill_weight(buft, p.type, { p.k, p.rows, p.heads }));
                }
                placed.emplace_back(buft, std::move(layers));
            }
        }
        const double peak = type_peak(with.n_threads, p.type);
        for (int64_t n : tokens) {
            bench_row(backend, p, placed, n, with, peak, stream);
        }
    }
    ggml_backend_free(backend);
}
