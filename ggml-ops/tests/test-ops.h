// What the op tests and the op benchmark share: weights of any type in any buffer, and graphs on the CPU backend.
#pragma once

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-expert-ops.h"
#include "ggml.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

struct ctx_deleter {
    void operator()(ggml_context * c) const { ggml_free(c); }
};

using ctx_ptr = std::unique_ptr<ggml_context, ctx_deleter>;

inline ctx_ptr make_ctx(size_t n_tensors) {
    const size_t size = ggml_tensor_overhead() * n_tensors + ggml_graph_overhead_custom(n_tensors, false);
    return ctx_ptr(ggml_init({ size, nullptr, true }));
}

inline std::vector<float> random_values(size_t n, std::mt19937 & rng, float scale = 1.0f) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float>              v(n);
    for (float & x : v) {
        x = normal(rng);
    }
    return v;
}

// The CPU backend as the registry has it: with GGML_BACKEND_DL it is a library, which is loaded here.
inline ggml_backend_dev_t cpu_device() {
    if (!ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)) {
        ggml_backend_load_all();
    }
    ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!device) {
        fprintf(stderr, "no CPU backend: expected libggml-cpu*.so beside this program\n");
        exit(1);
    }
    return device;
}

// A function of the CPU backend; nothing is linked to, for there may be several libraries that have it.
template <typename pointer> pointer cpu_function(const char * name) {
    return (pointer) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu_device()), name);
}

#define CPU_FUNCTION(name) cpu_function<decltype(&name)>(#name)

// whether the backend was compiled for a feature ("AVX2", "NEON") and this CPU has it
inline bool cpu_has(const char * feature) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(cpu_device());
    auto               get = cpu_function<ggml_backend_get_features_t>("ggml_backend_get_features");
    for (ggml_backend_feature * f = get(reg); f->name; f++) {
        if (!strcmp(f->name, feature)) {
            return true;
        }
    }
    return false;
}

inline void set_n_threads(ggml_backend_t backend, int n_threads) {
    cpu_function<ggml_backend_set_n_threads_t>("ggml_backend_set_n_threads")(backend, n_threads);
}

// the CPU's buffer types: plain rows first, then the packed ones (CPU_REPACK, AMX ...)
inline std::vector<ggml_backend_buffer_type_t> cpu_buffer_types() {
    std::vector<ggml_backend_buffer_type_t> types = { ggml_backend_cpu_buffer_type() };
    auto get = cpu_function<ggml_backend_dev_get_extra_bufts_t>("ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * t = get ? get(cpu_device()) : nullptr; t && *t; t++) {
        types.push_back(*t);
    }
    return types;
}

inline ggml_backend_buffer_type_t cpu_buffer_type(const std::string & name) {
    for (ggml_backend_buffer_type_t t : cpu_buffer_types()) {
        if (name == ggml_backend_buft_name(t)) {
            return t;
        }
    }
    return nullptr;
}

// one weight in a buffer of its own, as the model loader would place it
struct placed_weight {
    ctx_ptr               ctx;
    ggml_backend_buffer_t buffer = nullptr;
    ggml_tensor *         tensor = nullptr;
    std::vector<uint8_t>  rows;  // plain rows, before any packing

    placed_weight() = default;

    placed_weight(ggml_backend_buffer_type_t type_of_buffer,
                  ggml_type                  type,
                  std::vector<int64_t>       ne,
                  const std::vector<float> & values) :
        ctx(make_ctx(2)) {
        tensor = ggml_new_tensor(ctx.get(), type, (int) ne.size(), ne.data());
        rows.resize(ggml_nbytes(tensor));
        ggml_quantize_chunk(type, values.data(), rows.data(), 0, ggml_nrows(tensor), tensor->ne[0], nullptr);
        buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), type_of_buffer);
        ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        ggml_backend_tensor_set(tensor, rows.data(), 0, rows.size());
    }

    placed_weight(placed_weight && other) noexcept { *this = std::move(other); }

    placed_weight & operator=(placed_weight && other) noexcept {
        std::swap(ctx, other.ctx);
        std::swap(buffer, other.buffer);
        std::swap(tensor, other.tensor);
        std::swap(rows, other.rows);
        return *this;
    }

    ~placed_weight() {
        if (buffer) {
            ggml_backend_buffer_free(buffer);
        }
    }

    // the values that the stored rows stand for
    std::vector<float> dequantize() const {
        std::vector<float> out(ggml_nelements(tensor));
        if (tensor->type == GGML_TYPE_F32) {
            memcpy(out.data(), rows.data(), rows.size());
        } else {
            ggml_get_type_traits(tensor->type)->to_float(rows.data(), out.data(), (int64_t) out.size());
        }
        return out;
    }
};

// builds a graph with `build`, computes it on the CPU and returns the output's values; `set` fills the inputs
struct cpu_runner {
    ggml_backend_t backend = ggml_backend_dev_init(cpu_device(), nullptr);

    ~cpu_runner() { ggml_backend_free(backend); }

    std::vector<float> run(int                                                  n_threads,
                           const std::function<ggml_tensor *(ggml_context *)> & build,
                           const std::function<void()> &                        set) {
        ctx_ptr       ctx   = make_ctx(64);
        ggml_tensor * out   = build(ctx.get());
        ggml_cgraph * graph = ggml_new_graph_custom(ctx.get(), 64, false);
        ggml_build_forward_expand(graph, out);
        ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx.get(), backend);
        set();
        set_n_threads(backend, n_threads);
        if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
            fprintf(stderr, "graph_compute failed\n");
            exit(1);
        }
        std::vector<float> values(ggml_nelements(out));
        ggml_backend_tensor_get(out, values.data(), 0, values.size() * sizeof(float));
        ggml_backend_buffer_free(buffer);
        return values;
    }
};
