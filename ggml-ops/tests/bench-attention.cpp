// bench-ops --attention: attention over the cache, ours against the best stock path: one JSON line per (shape, n, past).
// Stock paths are ggml's own flash attention and the two products with a softmax between them, which needs the values
// transposed. Candidates run in turn, medians count. Times are per layer; the layers have caches of their own.
#include "bench-peaks.h"
#include "flash-attn.h"

namespace {

struct head_shape {
    const char * name;
    int64_t      heads, heads_kv, dk, dv;
    bool         v_in_k;
};

const head_shape HEADS[] = {
    { "MLA 14x320/256", 14, 1,  320, 256, true  },
    { "GQA 16:2x128",   16, 2,  128, 128, false },
    { "GQA 32:8x128",   32, 8,  128, 128, false },
    { "MHA 16x64",      16, 16, 64,  64,  false },
};

constexpr int64_t N_LAYERS = 16;

// --- candidates -------------------------------------------------------------------------------------------------------

enum class path { ours, stock_flash, stock_products };

struct candidate {
    path                  what;
    ctx_ptr               ctx;
    ggml_cgraph *         graph  = nullptr;
    ggml_backend_buffer_t buffer = nullptr;
    std::vector<double>   ms;

    candidate() = default;

    candidate(candidate && other) noexcept { *this = std::move(other); }

    candidate & operator=(candidate && other) noexcept {
        std::swap(what, other.what);
        std::swap(ctx, other.ctx);
        std::swap(graph, other.graph);
        std::swap(buffer, other.buffer);
        std::swap(ms, other.ms);
        return *this;
    }

    ~candidate() { ggml_backend_buffer_free(buffer); }
};

// a cache [d, n_kv, heads_kv] as a view of the rows of all heads
ggml_tensor * cache_view(ggml_context * ctx, int64_t d, int64_t heads_kv, int64_t n_kv) {
    ggml_tensor * t = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, d, heads_kv, n_kv);
    return ggml_permute(ctx, t, 0, 2, 1, 3);
}

ggml_tensor * build_layer(ggml_context * ctx, path what, const head_shape & s, ggml_tensor * q, ggml_tensor * mask) {
    const float   scale = 1.0f / std::sqrt((float) s.dk);
    const int64_t n_kv  = mask->ne[0];
    ggml_tensor * k     = cache_view(ctx, s.dk, s.heads_kv, n_kv);
    if (what == path::stock_products) {
        ggml_tensor * v  = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, n_kv, s.dv, s.heads_kv);
        ggml_tensor * kq = ggml_soft_max_ext(ctx, ggml_mul_mat(ctx, k, q), mask, scale, 0.0f);
        return ggml_cont(ctx, ggml_permute(ctx, ggml_mul_mat(ctx, v, kq), 0, 2, 1, 3));
    }
    ggml_tensor * v = s.v_in_k ? ggml_view_3d(ctx, k, s.dv, n_kv, s.heads_kv, k->nb[1], k->nb[2], 0) :
                                 cache_view(ctx, s.dv, s.heads_kv, n_kv);
    ggml_tensor * y = ggml_flash_attn_ext(ctx, q, k, v, mask, scale, 0.0f, 0.0f);
    if (what == path::stock_flash) {
        ggml_flash_attn_set_row_by_row(y);
    }
    return y;
}

void fill(ggml_tensor * t, std::mt19937 & rng) {
    const std::vector<float> some = random_values(4096, rng);
    std::vector<uint8_t>     part(4096 * ggml_type_size(t->type)), all(ggml_nbytes(t));
    if (t->type == GGML_TYPE_F32) {
        memcpy(part.data(), some.data(), part.size());
    } else {
        ggml_fp32_to_fp16_row(some.data(), (ggml_fp16_t *) part.data(), 4096);
    }
    for (size_t at = 0; at < all.size(); at += part.size()) {
        memcpy(&all[at], part.data(), std::min(part.size(), all.size() - at));
    }
    ggml_backend_tensor_set(t, all.data(), 0, all.size());
}

candidate make_candidate(path what, const head_shape & s, int64_t n, int64_t past) {
    candidate     c;
    const int64_t n_kv = GGML_PAD(past + n, 256);  // as llama.cpp pads it
    c.what             = what;
    c.ctx              = make_ctx(1024);
    c.graph            = ggml_new_graph_custom(c.ctx.get(), 1024, false);
    ggml_tensor * q    = ggml_new_tensor_3d(c.ctx.get(), GGML_TYPE_F32, s.dk, s.heads, n);
    ggml_tensor * mask = ggml_new_tensor_4d(c.ctx.get(), GGML_TYPE_F16, n_kv, n, 1, 1);
    for (int64_t l = 0; l < N_LAYERS; l++) {
        ggml_build_forward_expand(c.graph,
                                  build_layer(c.ctx.get(), what, s, ggml_permute(c.ctx.get(), q, 0, 2, 1, 3), mask));
    }
    c.buffer = ggml_backend_alloc_ctx_tensors_from_buft(c.ctx.get(), ggml_backend_cpu_buffer_type());
    std::mt19937 rng(3);
    for (ggml_tensor * t = ggml_get_first_tensor(c.ctx.get()); t; t = ggml_get_next_tensor(c.ctx.get(), t)) {
        if (t->op == GGML_OP_NONE && t != mask) {
            fill(t, rng);
        }
    }
    std::vector<ggml_fp16_t> seen(n_kv * n);
    for (int64_t i = 0; i < n_kv * n; i++) {
        seen[i] = ggml_fp32_to_fp16(i % n_kv <= past + i / n_kv ? 0.0f : -INFINITY);
    }
    ggml_backend_tensor_set(mask, seen.data(), 0, ggml_nbytes(mask));
    return c;
}

void bench_row(ggml_backend_t                backend,
               const head_shape &            s,
               int64_t                       n,
               int64_t                       past,
               const bench_settings &        with,
               double                        peak,
               const std::vector<uint64_t> & stream) {
    std::vector<candidate> all;
    for (path what : { path::ours, path::stock_flash, path::stock_products }) {
        all.push_back(make_candidate(what, s, n, past));
    }
    std::vector<double> bandwidth;
    for (int rep = 0; rep < with.reps + 1; rep++) {
        for (candidate & c : all) {
            bandwidth.push_back(read_bandwidth(stream, with.n_threads));  // everything else leaves the caches
            const double start = now_ms();
            ggml_backend_graph_compute(backend, c.graph);
            c.ms.push_back((now_ms() - start) / N_LAYERS);
        }
        if (rep == 0) {
            for (candidate & c : all) {
                c.ms.clear();  // the first round warms up
            }
        }
    }
    const double ours     = median(all[0].ms);
    const double flash    = median(all[1].ms);
    const double products = median(all[2].ms);
    const double macs     = 1.0 * s.heads * n * (past + (n + 1) / 2.0) * (s.dk + s.dv);
    const double bytes    = 2.0 * s.heads_kv * (past + n) * (s.dk + (s.v_in_k ? 0 : s.dv));
    const double gbs      = median(bandwidth);
    const double limit    = limit_ms(bytes, gbs, macs, peak);
    printf(
        "{\"subject\": \"attention\", \"shape\": \"%s\", \"n\": %d, \"past\": %d, \"threads\": %d, \"ours_ms\": %.4f, "
        "\"ours_min_ms\": %.4f, \"spread\": %.4f, \"flash_ms\": %.4f, \"products_ms\": %.4f, \"ours_gmacs\": %.1f, "
        "\"peak_gmacs\": %.1f, \"bandwidth_gbs\": %.2f, \"fraction_of_limit\": %.4f}\n",
        s.name, (int) n, (int) past, with.n_threads, ours, *std::min_element(all[0].ms.begin(), all[0].ms.end()),
        spread(all[0].ms), flash, products, macs / ours / 1e6, peak, gbs, limit / ours);
    fflush(stdout);
}

}  // namespace

void bench_attention(const bench_settings &       with,
                     const std::vector<int64_t> & tokens,
                     const std::vector<int64_t> & past) {
    ggml_backend_t backend = ggml_backend_dev_init(cpu_device(), nullptr);
    set_n_threads(backend, with.n_threads);
    const std::vector<uint64_t> stream((64 << 20) / sizeof(uint64_t), 1);
    const double                peak = fma_peak(with.n_threads);
    for (const head_shape & s : HEADS) {
        for (int64_t p : past) {
            for (int64_t n : tokens) {
                bench_row(backend, s, n, p, with, peak, stream);
            }
        }
    }
    ggml_backend_free(backend);
}
