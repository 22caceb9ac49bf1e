#include "blockffn-stats.h"

#include "ggml-backend.h"
#include "llama-batch.h"
#include "llama-context.h"
#include "llama-graph.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>

void blockffn_stats_collector::begin(int64_t n_tokens) {
    n_batch = n_tokens;
    for (auto & layer : last) {
        layer.row_of.assign(n_tokens, -1);
        layer.rows.clear();
    }
}

// scores F32 [n_expert, n_rows]: nonzero means active
static void read_scores(const ggml_tensor * t, const uint8_t * data, int64_t n_expert, uint8_t * rows) {
    for (int64_t r = 0; r < t->ne[1]; ++r) {
        const float * scores = (const float *) (data + r * t->nb[1]);
        for (int64_t e = 0; e < n_expert; ++e) {
            rows[r * n_expert + e] = scores[e] != 0.0f;
        }
    }
}

// chosen experts I32 [n_expert_used, n_rows]
static void read_selected(const ggml_tensor * t, const uint8_t * data, int64_t n_expert, uint8_t * rows) {
    for (int64_t r = 0; r < t->ne[1]; ++r) {
        const int32_t * chosen = (const int32_t *) (data + r * t->nb[1]);
        for (int64_t i = 0; i < t->ne[0]; ++i) {
            if (chosen[i] >= 0 && chosen[i] < n_expert) {
                rows[r * n_expert + chosen[i]] = 1;
            }
        }
    }
}

void blockffn_stats_collector::collect(const llm_graph_result & res, const llama_ubatch & ubatch, int64_t n_expert) {
    const auto & scores = res.t_expert_scores;
    if (last.size() != scores.size()) {
        last.resize(scores.size());
        sums.resize(scores.size());
        begin(n_batch);
    }
    for (size_t i = 0; i < scores.size(); ++i) {
        const ggml_tensor * t = scores[i];  // [n_expert or n_expert_used, n_rows]
        if (t->ne[1] == 0) {
            continue;
        }
        const uint8_t *             data   = (const uint8_t *) t->data;
        const ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
        if (!ggml_backend_buffer_is_host(buffer)) {
            staging.resize(ggml_nbytes(t));
            ggml_backend_tensor_get(t, staging.data(), 0, staging.size());
            data = staging.data();
        }
        uint8_t * rows = add_rows(i, n_expert, t->ne[1], ubatch);
        (t->type == GGML_TYPE_I32 ? read_selected : read_scores)(t, data, n_expert, rows);
        count(i, rows, n_expert, t->ne[1]);
    }
}

uint8_t * blockffn_stats_collector::add_rows(size_t               i_layer,
                                             int64_t              n_expert,
                                             int64_t              n_rows,
                                             const llama_ubatch & ubatch) {
    auto &        layer = last[i_layer];
    const int64_t first = layer.rows.size() / n_expert;
    layer.n_expert      = n_expert;
    layer.rows.resize((first + n_rows) * n_expert);

    // the last layer computes only the rows that are output
    const bool all = n_rows == (int64_t) ubatch.n_tokens;
    int64_t    row = 0;
    for (uint32_t i = 0; i < ubatch.n_tokens && row < n_rows; ++i) {
        if (all || ubatch.output[i]) {
            const int64_t i_token = ubatch.data->batch_idxs[i];
            if (i_token < n_batch) {
                layer.row_of[i_token] = first + row;
            }
            ++row;
        }
    }
    return layer.rows.data() + first * n_expert;
}

void blockffn_stats_collector::count(size_t i_layer, const uint8_t * rows, int64_t n_expert, int64_t n_rows) {
    auto & sum = sums[i_layer];
    seen.assign(n_expert, 0);
    for (int64_t r = 0; r < n_rows; ++r) {
        for (int64_t e = 0; e < n_expert; ++e) {
            seen[e] |= rows[r * n_expert + e];
            sum.n_pairs += rows[r * n_expert + e];
        }
    }
    sum.n_evals += 1;
    sum.n_rows += n_rows;
    sum.n_union += std::count(seen.begin(), seen.end(), 1);
}

void blockffn_keep_selected(llm_graph_result & res, ggml_tensor * selected) {
    auto & kept = res.t_expert_scores;
    if (!kept.empty() && strcmp(kept.back()->name, selected->name) == 0) {
        return;
    }
    if (selected->view_src) {
        ggml_set_output(selected->view_src);  // whose memory it is
    }
    kept.push_back(selected);
}

void blockffn_stats_collector::reset() {
    std::fill(sums.begin(), sums.end(), blockffn_layer_stats{});
}

bool blockffn_stats_collector::active(int64_t i_layer, int64_t i_token, uint8_t * out) const {
    if (i_layer < 0 || i_layer >= (int64_t) last.size() || i_token < 0 || i_token >= n_batch) {
        return false;
    }
    const auto &  layer = last[i_layer];
    const int64_t row   = layer.row_of[i_token];
    if (row < 0) {
        return false;
    }
    std::copy_n(layer.rows.begin() + row * layer.n_expert, layer.n_expert, out);
    return true;
}

//
// C API
//

static bool has_experts(const llama_model * model, uint32_t il) {
    if (model->arch == LLM_ARCH_BLOCKFFN) {
        return model->hparams.n_expert > 0 && model->hparams.n_ff(il) == 0;
    }
    const auto & layer = model->layers[il];
    return layer.ffn_up_exps || layer.ffn_gate_up_exps;
}

int32_t blockffn_n_moe_layers(const llama_model * model) {
    int32_t n = 0;
    for (uint32_t il = 0; il < model->hparams.n_layer(); ++il) {
        n += has_experts(model, il);
    }
    return n;
}

int32_t blockffn_n_experts(const llama_model * model) {
    return blockffn_n_moe_layers(model) > 0 ? model->hparams.n_expert : 0;
}

bool blockffn_has_relu_router(const llama_model * model) {
    return model->arch == LLM_ARCH_BLOCKFFN && blockffn_n_moe_layers(model) > 0;
}

void blockffn_stats_enable(llama_context * ctx, bool enable) {
    ctx->synchronize();
    ctx->set_expert_stats(enable);
}

bool blockffn_active_experts(llama_context * ctx, int32_t i_layer, int32_t i_token, uint8_t * out) {
    ctx->synchronize();
    const auto * stats = ctx->get_expert_stats();
    return stats && stats->active(i_layer, i_token, out);
}

void blockffn_stats(llama_context * ctx, int64_t * n_evals, int64_t * n_rows, int64_t * n_pairs, int64_t * n_union) {
    ctx->synchronize();
    if (!ctx->get_expert_stats()) {
        return;
    }
    const auto & layers = ctx->get_expert_stats()->layers();
    const size_t n      = std::min<size_t>(layers.size(), blockffn_n_moe_layers(&ctx->get_model()));
    for (size_t i = 0; i < n; ++i) {
        if (n_evals) {
            n_evals[i] = layers[i].n_evals;
        }
        if (n_rows) {
            n_rows[i] = layers[i].n_rows;
        }
        if (n_pairs) {
            n_pairs[i] = layers[i].n_pairs;
        }
        if (n_union) {
            n_union[i] = layers[i].n_union;
        }
    }
}

void blockffn_stats_reset(llama_context * ctx) {
    if (auto * stats = ctx->get_expert_stats()) {
        stats->reset();
    }
}
