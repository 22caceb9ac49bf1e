#pragma once

// The EAGLE-2 draft head of BlockFFN models (arXiv 2406.16858) as a llama.cpp model of its own.
// docs/gguf.md lists the keys and tensors.

#include "blockffn-load.h"

struct llama_model_blockffn_eagle : public blockffn_model_base {
    llama_model_blockffn_eagle(const struct llama_model_params & params) : blockffn_model_base(params) {}

    void load_arch_hparams(llama_model_loader & ml) override;
    void load_arch_tensors(llama_model_loader & ml) override;

    std::unique_ptr<llm_graph_context> build_arch_graph(const llm_graph_params & params) const override;

    struct graph;

    struct ggml_tensor * fc_b        = nullptr;  // [n_embd], beside llama_model::fc
    struct ggml_tensor * embd_norm   = nullptr;  // [n_embd], norm of the token's embedding
    struct ggml_tensor * hidden_norm = nullptr;  // [n_embd], norm of the target's hidden state
};

// Row i of a batch holds token i + 1 and, as its embedding, the target's hidden state of token i; its position is i.
// The output rows guess token i + 2; the states that deeper drafts continue from are the "nextn" embeddings.
struct llama_model_blockffn_eagle::graph : public llm_graph_context {
    graph(const llama_model_blockffn_eagle & model, const llm_graph_params & params);

  private:
    ggml_tensor * build_input(const llama_model_blockffn_eagle & model);
    ggml_tensor * build_layer(const llama_layer &       layer,
                              llm_graph_input_attn_kv * inp,
                              ggml_tensor *             cur,
                              ggml_tensor *             pos,
                              int                       il);
};
