#pragma once

// Which experts the last batch activated, and how large their union was: the C API, and the collector inside
// llama_context. "Active" is what the router said: a nonzero score of the router op, or an expert that a stock MoE graph
// selects for mul_mat_id. Off unless asked for: collecting waits for every evaluation to end, and keeps the scores of all
// layers until then.

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// layers with routed experts, and routed experts per layer; both 0 for a dense model. Of any architecture.
LLAMA_API int32_t blockffn_n_moe_layers(const struct llama_model * model);
LLAMA_API int32_t blockffn_n_experts(const struct llama_model * model);

// whether its experts are routed by the router op: what the dial turns
LLAMA_API bool blockffn_has_relu_router(const struct llama_model * model);

// Switch collecting on or off, from the next llama_decode on. The sums below stay; what the last batch activated is
// forgotten.
LLAMA_API void blockffn_stats_enable(struct llama_context * ctx, bool enable);

// Experts that token i_token of the last llama_decode (its index in the batch) activated in MoE layer i_layer
// (counted over MoE layers): out[e] = 1 or 0, n_experts bytes. Returns false where that layer did not compute the
// token: the last layer computes only tokens whose logits or embeddings were asked for; and where nothing was collected.
LLAMA_API bool blockffn_active_experts(struct llama_context * ctx, int32_t i_layer, int32_t i_token, uint8_t * out);

// Sums over all collected evaluations (micro-batches) since blockffn_stats_reset, one entry per MoE layer; a NULL is
// skipped.
//   n_evals: evaluations; n_rows: tokens in them; n_pairs: active (token, expert) pairs; n_union: experts needed by
//   at least one token of the evaluation
LLAMA_API void blockffn_stats(struct llama_context * ctx,
                              int64_t *              n_evals,
                              int64_t *              n_rows,
                              int64_t *              n_pairs,
                              int64_t *              n_union);
LLAMA_API void blockffn_stats_reset(struct llama_context * ctx);

#ifdef __cplusplus
}

#    include <cstdint>
#    include <vector>

struct ggml_tensor;
struct llama_ubatch;
class llm_graph_result;

// Keep the choice of a stock MoE layer, I32 [n_expert_used, n_rows], until it is collected; of a layer that chooses twice,
// the first one.
void blockffn_keep_selected(llm_graph_result & res, ggml_tensor * selected);

struct blockffn_layer_stats {
    int64_t n_evals = 0;
    int64_t n_rows  = 0;
    int64_t n_pairs = 0;
    int64_t n_union = 0;
};

class blockffn_stats_collector {
  public:
    // forget the experts of the batch before
    void begin(int64_t n_tokens);

    // read the choices of one evaluated micro-batch; n_expert: of a layer of the model
    void collect(const llm_graph_result & res, const llama_ubatch & ubatch, int64_t n_expert);

    void reset();

    bool active(int64_t i_layer, int64_t i_token, uint8_t * out) const;

    const std::vector<blockffn_layer_stats> & layers() const { return sums; }

  private:
    struct layer_rows {
        int64_t              n_expert = 0;
        std::vector<int32_t> row_of;  // [n_tokens] row of a batch token, -1 where it was not computed
        std::vector<uint8_t> rows;    // [n_rows, n_expert]
    };

    // append a row of flags for every token that the layer computed; returns the first
    uint8_t * add_rows(size_t i_layer, int64_t n_expert, int64_t n_rows, const llama_ubatch & ubatch);

    void count(size_t i_layer, const uint8_t * rows, int64_t n_expert, int64_t n_rows);

    int64_t                           n_batch = 0;
    std::vector<layer_rows>           last;
    std::vector<blockffn_layer_stats> sums;
    std::vector<uint8_t>              staging;
    std::vector<uint8_t>              seen;
};
#endif
