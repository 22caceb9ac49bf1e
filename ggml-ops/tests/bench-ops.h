// What bench-ops measures with: clock and medians, read bandwidth, the shapes, weights in every buffer type, routing.
#pragma once

#include "test-ops.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <map>
#include <numeric>
#include <thread>

inline double now_ms() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

// half the distance between the quartiles, relative to the median
inline double spread(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return (v[v.size() * 3 / 4] - v[v.size() / 4]) / 2.0 / v[v.size() / 2];
}

struct ffn_shape {
    const char * name;
    int64_t      h, n_expert, d;
    bool         norm_silu;  // the models of this shape normalize: ours is timed with NormSiLU beside SiLU
};

const ffn_shape SHAPES[] = {
    { "1.2B",      1792, 56,  128, false },
    { "3B",        2048, 64,  128, false },
    { "DECO-1.2B", 1792, 102, 64,  true  },
};

constexpr double                ACTIVE_SHARE = 0.2;  // of the experts, for one token
// share of the experts that n tokens need together, as measured on real models; grows with the active share
const std::map<int64_t, double> UNION_SHARE  = {
    { 1,   0.2   },
    { 2,   0.225 },
    { 4,   0.26  },
    { 8,   0.3   },
    { 16,  0.36  },
    { 32,  0.43  },
    { 128, 0.65  },
    { 512, 0.85  },
};

constexpr size_t  CACHE_BYTES = 512 << 20;  // weights of all layers together exceed every cache
constexpr int64_t MIN_LAYERS  = 16;
constexpr int64_t MAX_SMALL_N = 16;         // above, time goes into arithmetic and MIN_LAYERS do

// --- bandwidth --------------------------------------------------------------------------------------------------------

// gigabytes per second of plain reads by all threads together
inline double read_bandwidth(const std::vector<uint64_t> & data, int n_threads) {
    std::atomic<uint64_t>    sink(0);
    std::vector<std::thread> threads;
    const double             start = now_ms();
    for (int i = 0; i < n_threads; i++) {
        threads.emplace_back([&, i] {
            const size_t begin  = data.size() * i / n_threads / 8 * 8;
            const size_t end    = data.size() * (i + 1) / n_threads / 8 * 8;
            uint64_t     sum[8] = {};
            for (size_t j = begin; j < end; j += 8) {
                for (int k = 0; k < 8; k++) {
                    sum[k] += data[j + k];
                }
            }
            sink += std::accumulate(sum, sum + 8, (uint64_t) 0);
        });
    }
    for (std::thread & t : threads) {
        t.join();
    }
    return (double) data.size() * sizeof(uint64_t) / 1e6 / (now_ms() - start);
}

// --- weights ----------------------------------------------------------------------------------------------------------

// the same few random rows over and over: the kernels do not look at values
inline placed_weight fill_weight(ggml_backend_buffer_type_t buft, ggml_type type, std::vector<int64_t> ne) {
    placed_weight w;
    w.ctx    = make_ctx(2);
    w.tensor = ggml_new_tensor(w.ctx.get(), type, (int) ne.size(), ne.data());
    std::mt19937             rng(1);
    const int64_t            n_rows = 16;
    const size_t             row    = ggml_row_size(type, ne[0]);
    const std::vector<float> values = random_values(n_rows * ne[0], rng, 0.05f);
    std::vector<uint8_t>     some(row * n_rows), all(ggml_nbytes(w.tensor));
    ggml_quantize_chunk(type, values.data(), some.data(), 0, n_rows, ne[0], nullptr);
    for (size_t at = 0; at < all.size(); at += some.size()) {
        memcpy(&all[at], some.data(), std::min(some.size(), all.size() - at));
    }
    w.buffer = ggml_backend_alloc_ctx_tensors_from_buft(w.ctx.get(), buft);
    ggml_backend_buffer_set_usage(w.buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_tensor_set(w.tensor, all.data(), 0, all.size());
    return w;
}

inline bool buffer_takes(ggml_backend_buffer_type_t buft, ggml_type type, bool dense, const ffn_shape & s) {
    ctx_ptr       ctx  = make_ctx(8);
    const int64_t rows = dense ? s.n_expert * s.d : s.d;
    ggml_tensor * w    = dense ? ggml_new_tensor_2d(ctx.get(), type, s.h, rows) :
                                 ggml_new_tensor_3d(ctx.get(), type, s.h, rows, s.n_expert);
    ggml_tensor * x    = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, s.h, 1, 4);
    ggml_tensor * ids  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 1, 4);
    ggml_tensor * op   = dense ? ggml_mul_mat(ctx.get(), w, ggml_reshape_2d(ctx.get(), x, s.h, 4)) :
                                 ggml_mul_mat_id(ctx.get(), w, x, ids);
    w->buffer          = ggml_backend_buft_alloc_buffer(buft, 0);
    const bool ok      = ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), op);
    ggml_backend_buffer_free(w->buffer);
    return ok;
}

struct ffn_layer {
    placed_weight up, down;
};

// one layout in one buffer type
struct ffn_weights {
    std::string            buffer;
    bool                   dense;
    std::vector<ffn_layer> layers;
};

inline ffn_weights make_weights(ggml_backend_buffer_type_t buft,
                                ggml_type                  type,
                                bool                       dense,
                                const ffn_shape &          s,
                                int64_t                    n_layers) {
    ffn_weights   w{ ggml_backend_buft_name(buft), dense, {} };
    const int64_t width = s.n_expert * s.d;
    for (int64_t l = 0; l < n_layers; l++) {
        ffn_layer layer;
        layer.up = fill_weight(
            buft, type, dense ? std::vector<int64_t>{ s.h, width } : std::vector<int64_t>{ s.h, s.d, s.n_expert });
        layer.down = fill_weight(
            buft, type, dense ? std::vector<int64_t>{ width, s.h } : std::vector<int64_t>{ s.d, s.h, s.n_expert });
        w.layers.push_back(std::move(layer));
    }
    return w;
}

// --- routing ----------------------------------------------------------------------------------------------------------

// per layer: `used` experts per token, drawn from a pool of the wanted union size
struct routing {
    int64_t                           used;
    double                            union_share;  // as it came out
    std::vector<std::vector<int32_t>> ids;          // [layer][n * used]
};

inline routing make_routing(const ffn_shape & s, double active_share, int64_t n, int64_t n_layers) {
    routing      r;
    std::mt19937 rng((unsigned) n);
    const double union_share = std::min(1.0, UNION_SHARE.at(n) * active_share / ACTIVE_SHARE);
    r.used                   = std::max<int64_t>(1, std::lround(s.n_expert * active_share));
    const int64_t pool       = std::max(r.used, (int64_t) std::lround(s.n_expert * union_share));
    double        sum        = 0.0;
    for (int64_t l = 0; l < n_layers; l++) {
        std::vector<int32_t> experts(s.n_expert), ids;
        std::iota(experts.begin(), experts.end(), 0);
        std::shuffle(experts.begin(), experts.end(), rng);
        std::vector<bool> seen(s.n_expert);
        for (int64_t t = 0; t < n; t++) {
            std::shuffle(experts.begin(), experts.begin() + pool, rng);
            for (int64_t i = 0; i < r.used; i++) {
                ids.push_back(experts[i]);
                seen[experts[i]] = true;
            }
        }
        sum += (double) std::count(seen.begin(), seen.end(), true) / s.n_expert;
        r.ids.push_back(std::move(ids));
    }
    r.union_share = sum / n_layers;
    return r;
}

// --- the other subjects ---------------------------------------------------------------------------------------------

struct bench_settings {
    int n_threads, reps;
};

// bench-attention.cpp: attention over the cache, after so many tokens
void bench_attention(const bench_settings &       with,
                     const std::vector<int64_t> & tokens,
                     const std::vector<int64_t> & past);

// bench-products.cpp: the matrix products around the FFN
void bench_products(const bench_settings & with, const std::vector<int64_t> & tokens);
