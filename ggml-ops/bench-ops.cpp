// Benchmark of the union FFN against stock ggml: one JSON line per (shape, type, n), after a line with the bandwidth.
//     bench-ops [--threads 2] [--shapes 1.2B,3B,DECO-1.2B] [--types q4_0,q8_0,f16] [--tokens 1,2,4,...] [--reps 9]
// Stock candidates are the dense FFN (layout [h, E*d] and [E*d, h]) and mul_mat_id with as many experts per token as ours
// has, each in every buffer type that takes it; all candidates run in turn, medians count. Times are per layer.
#include "test-ops.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <map>
#include <numeric>
#include <sstream>
#include <thread>

namespace {

double now_ms() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

// half the distance between the quartiles, relative to the median
double spread(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return (v[v.size() * 3 / 4] - v[v.size() / 4]) / 2.0 / v[v.size() / 2];
}

struct ffn_shape {
    const char * name;
    int64_t      h, n_expert, d;
};

const ffn_shape SHAPES[] = {
    { "1.2B",      1792, 56,  128 },
    { "3B",        2048, 64,  128 },
    { "DECO-1.2B", 1792, 102, 64  },
};

constexpr double                ACTIVE_SHARE = 0.2;
// share of the experts that n tokens need together, as measured on real models
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
double read_bandwidth(const std::vector<uint64_t> & data, int n_threads) {
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
placed_weight fill_weight(ggml_backend_buffer_type_t buft, ggml_type type, std::vector<int64_t> ne) {
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

bool buffer_takes(ggml_backend_buffer_type_t buft, ggml_type type, bool dense, const ffn_shape & s) {
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

ffn_weights make_weights(ggml_backend_buffer_type_t buft,
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

routing make_routing(const ffn_shape & s, int64_t n, int64_t n_layers) {
    routing      r;
    std::mt19937 rng((unsigned) n);
    r.used             = std::max<int64_t>(1, std::lround(s.n_expert * ACTIVE_SHARE));
    const int64_t pool = std::max(r.used, (int64_t) std::lround(s.n_expert * UNION_SHARE.at(n)));
    double        sum  = 0.0;
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

// --- candidates -------------------------------------------------------------------------------------------------------

// set once and read in every repetition: as an output too, so that the allocator never gives its memory to another tensor
ggml_tensor * input(ggml_context * ctx, ggml_type type, int64_t a, int64_t b, int64_t c) {
    ggml_tensor * t = ggml_new_tensor_3d(ctx, type, a, b, c);
    ggml_set_input(t);
    ggml_set_output(t);
    return t;
}

ggml_tensor * build_dense(ggml_context *    ctx,
                          const ffn_layer & w,
                          const ffn_shape & s,
                          ggml_tensor *     x,
                          ggml_tensor *     scores) {
    const int64_t n = x->ne[1];
    ggml_tensor * u = ggml_silu(ctx, ggml_mul_mat(ctx, w.up.tensor, x));  // [E*d, n]
    u = ggml_mul(ctx, ggml_reshape_3d(ctx, u, s.d, s.n_expert, n), ggml_reshape_3d(ctx, scores, 1, s.n_expert, n));
    return ggml_mul_mat(ctx, w.down.tensor, ggml_reshape_2d(ctx, u, s.d * s.n_expert, n));
}

ggml_tensor * build_mul_mat_id(ggml_context *    ctx,
                               const ffn_layer & w,
                               const ffn_shape & s,
                               ggml_tensor *     x,
                               ggml_tensor *     ids,
                               ggml_tensor *     factors) {
    const int64_t n = x->ne[1], used = ids->ne[0];
    ggml_tensor * u = ggml_mul_mat_id(ctx, w.up.tensor, ggml_reshape_3d(ctx, x, s.h, 1, n), ids);  // [d, used, n]
    u               = ggml_mul(ctx, ggml_silu(ctx, u), factors);
    ggml_tensor * o = ggml_mul_mat_id(ctx, w.down.tensor, u, ids);                                 // [h, used, n]
    ggml_tensor * y = ggml_view_2d(ctx, o, s.h, n, o->nb[2], 0);
    for (int64_t i = 1; i < used; i++) {
        y = ggml_add(ctx, y, ggml_view_2d(ctx, o, s.h, n, o->nb[2], i * o->nb[1]));
    }
    return y;
}

enum class kind { dense, mul_mat_id, ours };

struct gallocr_deleter {
    void operator()(ggml_gallocr_t a) const { ggml_gallocr_free(a); }
};

struct candidate {
    kind                                           what;
    std::string                                    buffer;
    ctx_ptr                                        ctx;
    ggml_cgraph *                                  graph = nullptr;
    std::unique_ptr<ggml_gallocr, gallocr_deleter> memory;
    std::vector<double>                            ms;  // per layer
};

void set_inputs(const candidate &                  c,
                const std::vector<ggml_tensor *> & scores,
                const std::vector<ggml_tensor *> & ids,
                ggml_tensor *                      x,
                ggml_tensor *                      factors,
                const ffn_shape &                  s,
                const routing &                    r) {
    std::mt19937       rng(7);
    std::vector<float> values = random_values(ggml_nelements(x), rng);
    ggml_backend_tensor_set(x, values.data(), 0, ggml_nbytes(x));
    if (c.what == kind::mul_mat_id) {
        values.assign(ggml_nelements(factors), 0.5f);
        ggml_backend_tensor_set(factors, values.data(), 0, ggml_nbytes(factors));
    }
    for (size_t l = 0; l < scores.size(); l++) {
        if (c.what == kind::mul_mat_id) {
            ggml_backend_tensor_set(ids[l], r.ids[l].data(), 0, ggml_nbytes(ids[l]));
            continue;
        }
        values.assign(ggml_nelements(scores[l]), 0.0f);
        for (size_t i = 0; i < r.ids[l].size(); i++) {
            values[i / r.used * s.n_expert + r.ids[l][i]] = 0.5f;
        }
        ggml_backend_tensor_set(scores[l], values.data(), 0, ggml_nbytes(scores[l]));
    }
}

candidate make_candidate(kind what, const ffn_weights & w, const ffn_shape & s, int64_t n, const routing & r) {
    candidate c;
    c.what                 = what;
    c.buffer               = w.buffer;
    c.ctx                  = make_ctx(8192);
    ggml_context * ctx     = c.ctx.get();
    ggml_tensor *  x       = ggml_reshape_2d(ctx, input(ctx, GGML_TYPE_F32, s.h, n, 1), s.h, n);
    ggml_tensor *  factors = what == kind::mul_mat_id ? input(ctx, GGML_TYPE_F32, 1, r.used, n) : nullptr;
    c.graph                = ggml_new_graph_custom(ctx, 8192, false);
    std::vector<ggml_tensor *> scores, ids;
    for (size_t l = 0; l < r.ids.size(); l++) {
        ggml_tensor * choice = nullptr;
        ggml_tensor * y      = nullptr;
        if (what == kind::mul_mat_id) {
            choice = ggml_reshape_2d(ctx, input(ctx, GGML_TYPE_I32, r.used, n, 1), r.used, n);
            y      = build_mul_mat_id(ctx, w.layers[l], s, x, choice, factors);
        } else {
            choice = ggml_reshape_2d(ctx, input(ctx, GGML_TYPE_F32, s.n_expert, n, 1), s.n_expert, n);
            y      = what == kind::dense ? build_dense(ctx, w.layers[l], s, x, choice) :
                                           ggml_union_ffn(ctx, x, w.layers[l].up.tensor, nullptr, w.layers[l].down.tensor,
                                                          choice, nullptr, nullptr, GGML_UNION_ACT_SILU, 0.0f);
        }
        ggml_set_output(y);
        scores.push_back(choice);
        ids.push_back(choice);
        ggml_build_forward_expand(c.graph, y);
    }
    c.memory.reset(ggml_gallocr_new(ggml_backend_cpu_buffer_type()));
    ggml_gallocr_alloc_graph(c.memory.get(), c.graph);
    set_inputs(c, scores, ids, x, factors, s, r);
    return c;
}

// candidates of a kind that are far behind its best after a first look are not timed further
void drop_slow(std::vector<candidate> & all, kind what) {
    double best = 1e30;
    for (const candidate & c : all) {
        if (c.what == what) {
            best = std::min(best, *std::min_element(c.ms.begin(), c.ms.end()));
        }
    }
    all.erase(std::remove_if(all.begin(), all.end(),
                             [&](const candidate & c) {
                                 return c.what == what && *std::min_element(c.ms.begin(), c.ms.end()) > 1.4 * best;
                             }),
              all.end());
}

// --- one table cell -----------------------------------------------------------------------------------------------------

struct bench_args {
    int                  n_threads = 2, reps = 9;
    std::vector<int64_t> tokens = { 1, 2, 4, 8, 16, 32, 128, 512 };
    std::string          shapes = "1.2B,3B,DECO-1.2B", types = "q4_0,q8_0,f16";
};

struct bench_row {
    int64_t     n;
    double      union_share, ours_ms, ours_min_ms, ours_spread, dense_ms = 1e30, id_ms = 1e30;
    std::string dense_buffer, id_buffer, ours_buffer;
};

bench_row bench_tokens(ggml_backend_t                   backend,
                       const std::vector<ffn_weights> & weights,
                       const ffn_shape &                s,
                       int64_t                          n,
                       const bench_args &               args,
                       const std::vector<uint64_t> &    stream,
                       std::vector<double> &            bandwidth) {
    const int64_t n_layers = n <= MAX_SMALL_N ? (int64_t) weights[0].layers.size() : MIN_LAYERS;
    const routing r        = make_routing(s, n, n_layers);

    std::vector<candidate> all;
    for (const ffn_weights & w : weights) {
        all.push_back(make_candidate(w.dense ? kind::dense : kind::mul_mat_id, w, s, n, r));
        if (!w.dense && &w == &weights.back()) {  // the loader's choice: the last buffer type that takes the experts
            all.push_back(make_candidate(kind::ours, w, s, n, r));
        }
    }
    for (int rep = 0; rep < args.reps + 1; rep++) {
        for (candidate & c : all) {
            // between two candidates everything else leaves the caches: they share weights
            bandwidth.push_back(read_bandwidth(stream, args.n_threads));
            const double start = now_ms();
            ggml_backend_graph_compute(backend, c.graph);
            const double ms = (now_ms() - start) / n_layers;
            c.ms.push_back(ms);
        }
        if (rep == 0 || rep == 1) {
            drop_slow(all, kind::dense);
            drop_slow(all, kind::mul_mat_id);
        }
        if (rep == 0) {
            for (candidate & c : all) {
                c.ms.clear();  // the first round warms up
            }
        }
    }
    bench_row row;
    row.n           = n;
    row.union_share = r.union_share;
    for (const candidate & c : all) {
        const double ms = median(c.ms);
        if (c.what == kind::ours) {
            row.ours_ms     = ms;
            row.ours_min_ms = *std::min_element(c.ms.begin(), c.ms.end());
            row.ours_spread = spread(c.ms);
            row.ours_buffer = c.buffer;
        } else if (c.what == kind::dense && ms < row.dense_ms) {
            row.dense_ms     = ms;
            row.dense_buffer = c.buffer;
        } else if (c.what == kind::mul_mat_id && ms < row.id_ms) {
            row.id_ms     = ms;
            row.id_buffer = c.buffer;
        }
    }
    return row;
}

void print_rows(const std::vector<bench_row> & rows,
                const ffn_shape &              s,
                ggml_type                      type,
                double                         gbs,
                const bench_args &             args) {
    const double macs  = 2.0 * s.h * s.d * s.n_expert;  // of one token through all experts
    const double bytes = 2.0 * ggml_row_size(type, s.h) * s.d * s.n_expert;
    double       rate  = 0.0;                           // best stock multiply-adds per ms
    for (const bench_row & r : rows) {
        rate = std::max(rate, macs * r.n / r.dense_ms);
    }
    const double active = std::lround(s.n_expert * ACTIVE_SHARE) / (double) s.n_expert;
    for (const bench_row & r : rows) {
        const double limit = std::max(r.union_share * bytes / (gbs * 1e6), active * macs * r.n / rate);
        printf(
            "{\"shape\": \"%s\", \"type\": \"%s\", \"n\": %d, \"threads\": %d, \"ours_ms\": %.4f, \"ours_min_ms\": "
            "%.4f, "
            "\"ours_buffer\": \"%s\", \"dense_ms\": %.4f, \"dense_buffer\": \"%s\", \"mul_mat_id_ms\": %.4f, "
            "\"mul_mat_id_buffer\": \"%s\", \"spread\": %.4f, \"union_share\": %.4f, \"active_share\": %.4f, "
            "\"bandwidth_gbs\": %.2f, \"fraction_of_limit\": %.4f}\n",
            s.name, ggml_type_name(type), (int) r.n, args.n_threads, r.ours_ms, r.ours_min_ms, r.ours_buffer.c_str(),
            r.dense_ms, r.dense_buffer.c_str(), r.id_ms, r.id_buffer.c_str(), r.ours_spread, r.union_share, active, gbs,
            limit / r.ours_ms);
    }
    fflush(stdout);
}

void bench_shape(ggml_backend_t                backend,
                 const ffn_shape &             s,
                 ggml_type                     type,
                 const bench_args &            args,
                 const std::vector<uint64_t> & stream) {
    const size_t  layer_bytes = 2 * ggml_row_size(type, s.h) * s.d * s.n_expert;
    const int64_t n_layers    = std::max(MIN_LAYERS, (int64_t) (CACHE_BYTES / layer_bytes + 1));

    std::vector<ffn_weights> weights;
    for (bool dense : { true, false }) {
        for (ggml_backend_buffer_type_t buft : cpu_buffer_types()) {
            if (buffer_takes(buft, type, dense, s)) {
                weights.push_back(make_weights(buft, type, dense, s, n_layers));
            }
        }
    }
    std::vector<bench_row> rows;
    std::vector<double>    bandwidth;
    for (int64_t n : args.tokens) {
        rows.push_back(bench_tokens(backend, weights, s, n, args, stream, bandwidth));
    }
    print_rows(rows, s, type, median(bandwidth), args);
}

std::vector<std::string> split(const std::string & text) {
    std::vector<std::string> parts;
    std::stringstream        stream(text);
    for (std::string part; std::getline(stream, part, ',');) {
        parts.push_back(part);
    }
    return parts;
}

int usage(const char * what) {
    fprintf(stderr,
            "error: %s\nusage: bench-ops [--threads N] [--shapes 1.2B,3B,DECO-1.2B] [--types q4_0,q8_0,f16] "
            "[--tokens 1,2,4,8,16,32,128,512] [--reps N]\n",
            what);
    return 2;
}

ggml_type type_named(const std::string & name) {
    for (int t = 0; t < GGML_TYPE_COUNT; t++) {
        if (ggml_type_name((ggml_type) t) && name == ggml_type_name((ggml_type) t)) {
            return (ggml_type) t;
        }
    }
    exit(usage(("unknown type " + name).c_str()));
}

}  // namespace

int main(int argc, char ** argv) {
    bench_args args;
    for (int i = 1; i < argc; i += 2) {
        const std::string key = argv[i];
        if (i + 1 == argc) {
            return usage(("no value for " + key).c_str());
        }
        if (key == "--threads") {
            args.n_threads = std::max(1, atoi(argv[i + 1]));
        } else if (key == "--reps") {
            args.reps = std::max(3, atoi(argv[i + 1]));
        } else if (key == "--shapes") {
            args.shapes = argv[i + 1];
        } else if (key == "--types") {
            args.types = argv[i + 1];
        } else if (key == "--tokens") {
            args.tokens.clear();
            for (const std::string & n : split(argv[i + 1])) {
                if (!UNION_SHARE.count(atoi(n.c_str()))) {
                    return usage(("no measured union share for n = " + n).c_str());
                }
                args.tokens.push_back(atoi(n.c_str()));
            }
        } else {
            return usage(("unknown option " + key).c_str());
        }
    }
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, args.n_threads);
    const std::vector<uint64_t> stream(CACHE_BYTES / sizeof(uint64_t), 1);
    for (const std::string & shape : split(args.shapes)) {
        const ffn_shape * found =
            std::find_if(std::begin(SHAPES), std::end(SHAPES), [&](const ffn_shape & s) { return shape == s.name; });
        if (found == std::end(SHAPES)) {
            return usage(("unknown shape " + shape).c_str());
        }
        for (const std::string & type : split(args.types)) {
            bench_shape(backend, *found, type_named(type), args, stream);
        }
    }
    ggml_backend_free(backend);
}
