#pragma once

// BlockFFN (arXiv 2507.08771), DECO (arXiv 2605.10933), their dense twins and ReMoE as one llama.cpp model.
// docs/gguf.md lists the keys and tensors.

#include "blockffn-hparams.h"
#include "blockffn-load.h"

struct llama_model_blockffn : public blockffn_model_base {
    llama_model_blockffn(const struct llama_model_params & params) : blockffn_model_base(params) {}

    void load_arch_hparams(llama_model_loader & ml) override;
    void load_arch_tensors(llama_model_loader & ml) override;

    std::unique_ptr<llm_graph_context> build_arch_graph(const llm_graph_params & params) const override;

    struct graph;

    blockffn_hparams blockffn;  // beside hparams

  private:
    void check_mla(llama_model_loader & ml) const;
    void load_expert_hparams(llama_model_loader & ml);
    void load_attention(llama_model_loader & ml, llama_layer & layer, int il);
    void load_ffn(llama_model_loader & ml, llama_layer & layer, int il);
};

// Whose kernels the CPU backend runs a graph with, of any architecture: ours, made for few tokens, in every matrix product
// and attention, or ggml's own (model.stock_kernels), the yardstick of every benchmark: in files of the dense layout, and
// where the key <architecture>.ffn_dense says so.
void blockffn_choose_kernels(const llama_model & model, ggml_cgraph * gf);

// One graph of the decoder. FFN layers: dense (n_ff > 0), or routed experts through the union op or through stock ops.
struct llama_model_blockffn::graph : public llm_graph_context {
    graph(const llama_model_blockffn & model, const llm_graph_params & params);

  private:
    const blockffn_hparams & bf;
    const bool               stock;      // ggml's own ops, for the experts too
    float                    threshold;  // of this context, or else of the file
    int32_t                  budget;     // of this batch

    struct routing {
        ggml_tensor * scores;  // [n_expert, n_tokens]
        ggml_tensor * active;  // [n_expert, n_tokens], nonzero where the expert is active
    };

    ggml_tensor * build_mla(const llama_layer &      layer,
                            llm_graph_input_attn_k * inp,
                            ggml_tensor *            cur,
                            ggml_tensor *            pos,
                            int                      il);
    ggml_tensor * build_gqa(const llama_layer &       layer,
                            llm_graph_input_attn_kv * inp,
                            ggml_tensor *             cur,
                            ggml_tensor *             pos,
                            int                       il);
    ggml_tensor * build_ffn_block(const llama_layer & layer, ggml_tensor * cur, int il);

    bool          runs_union_op(const llama_layer & layer, ggml_tensor * cur);
    routing       build_router(const llama_layer & layer, ggml_tensor * cur, bool sparse, int il);
    routing       build_router_dense(const llama_layer & layer, ggml_tensor * logits);
    routing       build_dial_dense(const routing & r);
    ggml_tensor * build_union(const llama_layer & layer, ggml_tensor * cur, ggml_tensor * scores);
    ggml_tensor * build_experts_dense(const llama_layer & layer, ggml_tensor * cur, ggml_tensor * scores, int il);
    ggml_tensor * build_activation(const llama_layer & layer, ggml_tensor * z, ggml_tensor * cur);
    ggml_tensor * build_plain_ffn(ggml_tensor * up, ggml_tensor * gate, ggml_tensor * down, ggml_tensor * cur, int il);
};
