// A random case of attention over the cache, of the op test: queries, cells, mask; the op on any part of it, and a
// double-precision oracle.
#pragma once

#include "flash-attn.h"
#include "test-ops.h"

#include <cmath>

enum class mask_kind { none, causal, tree, sequences, texts, biased };

inline const char * const MASK_NAMES[] = { "none", "causal", "tree", "sequences", "texts", "biased" };

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
            case mask_kind::
                texts:  // chains of three tokens of four texts with a common beginning, in turn in one cache
                seen = i < past / 4 || (i < past ? i % 4 == t / 3 % 4 : (i - past) / 3 == t / 3 && i - past <= t);
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
        CPU_FUNCTION(ggml_backend_cpu_set_use_ref)(runner.backend, a.use_ref);
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

    // token t alone, with the cells that it sees and up to max_gap others before each of them; one stream
    attn_data moved(int64_t t, int64_t max_gap, std::mt19937 & rng) const {
        std::vector<int64_t> from, to;
        int64_t              end = 0;
        for (int64_t i = 0; i < c.n_kv; i++) {
            if (mask_at(0, t, i) > -INFINITY) {
                end += max_gap > 0 ? (int64_t) rng() % (max_gap + 1) * (rng() % 16 == 0) : 0;
                from.push_back(i);
                to.push_back(end++);
            }
        }
        attn_case one = c;
        one.n         = 1;
        one.n_kv      = std::max<int64_t>(1, end);
        one.mask      = mask_kind::sequences;
        attn_data     m(one, rng());
        const int64_t row = c.heads() * c.dk;
        m.q.assign(q.begin() + t * row, q.begin() + (t + 1) * row);
        m.sinks = sinks;
        std::fill(m.mask.begin(), m.mask.end(), -INFINITY);
        const size_t k_size = k.size() / size, v_size = v.size() / size;
        for (size_t i = 0; i < from.size(); i++) {
            m.mask[to[i]] = mask_at(0, t, from[i]);
            std::copy_n(k.begin() + from[i] * k_size, k_size, m.k.begin() + to[i] * k_size);
            std::copy_n(v.begin() + from[i] * v_size, v_size, m.v.begin() + to[i] * v_size);
        }
        return m;
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
