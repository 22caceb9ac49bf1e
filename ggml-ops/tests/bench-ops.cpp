// Benchmark of the union FFN against stock ggml: one JSON line per (shape, type, n), after a line with the bandwidth.
//     bench-ops [--threads 2] [--shapes 1.2B,3B,DECO-1.2B] [--types q4_0,q8_0,f16] [--tokens 1,2,4,...]
//               [--active 0.2] [--reps 9]
//     bench-ops --subject products [--threads 2] [--tokens 1,4,8,32] [--reps 9]: the matrix products around the FFN
//     bench-ops --attention 128,1024,4096,8192 [--threads 2] [--tokens 1,4,8,32] [--reps 9]: after so many tokens
// --active is the share of the experts that one token needs. Stock candidates are the dense FFN (layout [h, E*d] and
// [E*d, h]) and mul_mat_id with as many experts per token as ours has, each in every buffer type that takes it; all
// candidates run in turn, --reps rounds (three times as many for few tokens), medians count. Times are per layer.
// Shapes whose models normalize inside the experts (DECO) time ours a second time with NormSiLU: norm_silu_ms, and the
// median over the rounds of its ratio to ours with SiLU, as the other candidates have it.
#include "bench-peaks.h"

#include <sstream>

namespace {

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

enum class kind { dense, mul_mat_id, ours, ours_norm_silu };

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

// ours; NormSiLU has two vectors more per layer, the mean row and the weight of the norm
ggml_tensor * build_ours(ggml_context *               ctx,
                         const ffn_layer &            w,
                         const ffn_shape &            s,
                         ggml_tensor *                x,
                         ggml_tensor *                scores,
                         bool                         norm_silu,
                         std::vector<ggml_tensor *> & vectors) {
    ggml_tensor * mean = nullptr;
    ggml_tensor * norm = nullptr;
    if (norm_silu) {
        mean = input(ctx, GGML_TYPE_F32, s.h, 1, 1);
        norm = input(ctx, GGML_TYPE_F32, s.d, 1, 1);
        vectors.push_back(mean);
        vectors.push_back(norm);
    }
    return ggml_union_ffn(ctx, x, w.up.tensor, nullptr, w.down.tensor, scores, mean, norm,
                          norm_silu ? GGML_UNION_ACT_NORM_SILU : GGML_UNION_ACT_SILU, norm_silu ? 1e-5f : 0.0f);
}

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
    std::vector<ggml_tensor *> scores, ids, vectors;
    for (size_t l = 0; l < r.ids.size(); l++) {
        ggml_tensor * choice = nullptr;
        ggml_tensor * y      = nullptr;
        if (what == kind::mul_mat_id) {
            choice = ggml_reshape_2d(ctx, input(ctx, GGML_TYPE_I32, r.used, n, 1), r.used, n);
            y      = build_mul_mat_id(ctx, w.layers[l], s, x, choice, factors);
        } else {
            choice = ggml_reshape_2d(ctx, input(ctx, GGML_TYPE_F32, s.n_expert, n, 1), s.n_expert, n);
            y      = what == kind::dense ? build_dense(ctx, w.layers[l], s, x, choice) :
                                           build_ours(ctx, w.layers[l], s, x, choice, what == kind::ours_norm_silu, vectors);
        }
        ggml_set_output(y);
        scores.push_back(choice);
        ids.push_back(choice);
        ggml_build_forward_expand(c.graph, y);
    }
    c.memory.reset(ggml_gallocr_new(ggml_backend_cpu_buffer_type()));
    ggml_gallocr_alloc_graph(c.memory.get(), c.graph);
    set_inputs(c, scores, ids, x, factors, s, r);
    for (ggml_tensor * v : vectors) {
        const std::vector<float> ones(ggml_nelements(v), 1.0f);
        ggml_backend_tensor_set(v, ones.data(), 0, ggml_nbytes(v));
    }
    return c;
}

// candidates of a kind that are far behind its best after two warm rounds are not timed further
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

double median_ratio(std::vector<double> a, const std::vector<double> & b) {
    std::transform(a.begin(), a.end(), b.begin(), a.begin(), [](double x, double y) { return x / y; });
    return median(a);
}

// --- one table cell -----------------------------------------------------------------------------------------------------

struct bench_args {
    int                  n_threads = 2, reps = 9;
    double               active = ACTIVE_SHARE;
    std::vector<int64_t> past;              // --attention
    bool                 products = false;  // --subject products
    bool                 alone    = false;  // --subject ours: no peers, to compare two builds of ours
    std::vector<int64_t> tokens   = { 1, 2, 4, 8, 16, 32, 128, 512 };
    std::string          shapes = "1.2B,3B,DECO-1.2B", types = "q4_0,q8_0,f16";
};

struct bench_row {
    int64_t     n;
    double      union_share, ours_ms, ours_min_ms, ours_spread, dense_ms = 1e30, id_ms = 1e30;
    double      norm_silu_ms = 0.0, norm_silu_ratio = 0.0;  // where the shape has it
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
    const routing r        = make_routing(s, args.active, n, n_layers);

    std::vector<candidate> all;
    for (const ffn_weights & w : weights) {
        if (!args.alone) {
            all.push_back(make_candidate(w.dense ? kind::dense : kind::mul_mat_id, w, s, n, r));
        }
        if (!w.dense && &w == &weights.back()) {  // the loader's choice: the last buffer type that takes the experts
            all.push_back(make_candidate(kind::ours, w, s, n, r));
            if (s.norm_silu) {
                all.push_back(make_candidate(kind::ours_norm_silu, w, s, n, r));
            }
        }
    }
    const int reps = n <= MAX_SMALL_N ? 3 * args.reps : args.reps;  // short rounds are the noisy ones
    for (int rep = 0; rep < reps + 1; rep++) {
        for (candidate & c : all) {
            // between two candidates everything else leaves the caches: they share weights
            bandwidth.push_back(read_bandwidth(stream, args.n_threads));
            const double start = now_ms();
            ggml_backend_graph_compute(backend, c.graph);
            const double ms = (now_ms() - start) / n_layers;
            c.ms.push_back(ms);
        }
        if (rep == 2) {
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
    row.n                  = n;
    row.union_share        = r.union_share;
    const candidate * silu = nullptr;
    for (const candidate & c : all) {
        const double ms = median(c.ms);
        if (c.what == kind::ours_norm_silu) {
            row.norm_silu_ms    = ms;
            row.norm_silu_ratio = median_ratio(c.ms, silu->ms);
        } else if (c.what == kind::ours) {
            silu            = &c;
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
    const double macs   = 2.0 * s.h * s.d * s.n_expert;  // of one token through all experts
    const double bytes  = 2.0 * ggml_row_size(type, s.h) * s.d * s.n_expert;
    const double peak   = type_peak(args.n_threads, type);
    const double active = std::lround(s.n_expert * args.active) / (double) s.n_expert;
    for (const bench_row & r : rows) {
        const double limit = limit_ms(r.union_share * bytes, gbs, active * macs * r.n, peak);
        printf(
            "{\"shape\": \"%s\", \"type\": \"%s\", \"n\": %d, \"threads\": %d, \"ours_ms\": %.4f, \"ours_min_ms\": "
            "%.4f, "
            "\"ours_buffer\": \"%s\", \"spread\": %.4f, \"union_share\": %.4f, \"active_share\": %.4f, "
            "\"bandwidth_gbs\": %.2f, \"peak_gmacs\": %.1f, \"fraction_of_limit\": %.4f",
            s.name, ggml_type_name(type), (int) r.n, args.n_threads, r.ours_ms, r.ours_min_ms, r.ours_buffer.c_str(),
            r.ours_spread, r.union_share, active, gbs, peak, limit / r.ours_ms);
        if (!args.alone) {
            printf(
                ", \"dense_ms\": %.4f, \"dense_buffer\": \"%s\", \"mul_mat_id_ms\": %.4f, \"mul_mat_id_buffer\": "
                "\"%s\"",
                r.dense_ms, r.dense_buffer.c_str(), r.id_ms, r.id_buffer.c_str());
        }
        if (s.norm_silu) {
            printf(", \"norm_silu_ms\": %.4f, \"norm_silu_ratio\": %.4f", r.norm_silu_ms, r.norm_silu_ratio);
        }
        printf("}\n");
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
        if (dense && args.alone) {
            continue;
        }
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
            "[--tokens 1,2,4,8,16,32,128,512] [--active 0.2] [--reps N] [--subject ffn|ours]\n"
            "       bench-ops --subject products [--threads N] [--tokens 1,4,8,32] [--reps N]\n"
            "       bench-ops --attention PAST,PAST,... [--threads N] [--tokens 1,4,8,32] [--reps N]\n",
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
        } else if (key == "--active") {
            args.active = atof(argv[i + 1]);
            if (!(args.active > 0.0 && args.active <= 1.0)) {
                return usage("--active is a share of the experts, above 0 and up to 1");
            }
        } else if (key == "--attention") {
            for (const std::string & n : split(argv[i + 1])) {
                args.past.push_back(std::max(1, atoi(n.c_str())));
            }
        } else if (key == "--subject") {
            args.products = strcmp(argv[i + 1], "products") == 0;
            args.alone    = strcmp(argv[i + 1], "ours") == 0;
            if (!args.products && !args.alone && strcmp(argv[i + 1], "ffn") != 0) {
                return usage(("unknown subject " + std::string(argv[i + 1])).c_str());
            }
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
    if (!args.past.empty()) {
        bench_attention({ args.n_threads, args.reps }, args.tokens, args.past);
        return 0;
    }
    if (args.products) {
        bench_products({ args.n_threads, args.reps }, args.tokens);
        return 0;
    }
    ggml_backend_t backend = ggml_backend_dev_init(cpu_device(), nullptr);
    set_n_threads(backend, args.n_threads);
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
