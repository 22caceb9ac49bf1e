#include "blockffn-eagle.h"

#include "blockffn-model.h"

void llama_model_blockffn_eagle::load_arch_hparams(llama_model_loader & ml) {
    check_hparams(ml);
    blockffn_same_in_all_layers(ml, hparams, LLM_KV_FEED_FORWARD_LENGTH, &llama_hparams::n_ff);
    blockffn_get_epsilon(ml, LLM_KV_ATTENTION_LAYERNORM_RMS_EPS, hparams.f_norm_rms_eps);
    blockffn_get_number(ml, LLM_KV_EMBEDDING_SCALE, hparams.f_embedding_scale);
    blockffn_get_number(ml, LLM_KV_LOGIT_SCALE, hparams.f_logit_scale);
    if (hparams.n_embd_head_v() != hparams.n_embd_head_k()) {
        blockffn_refuse(ml, LLM_KV_ATTENTION_VALUE_LENGTH, "the key length, " + std::to_string(hparams.n_embd_head_k()),
                        std::to_string(hparams.n_embd_head_v()));
    }
    type = LLM_TYPE_UNKNOWN;
}

void llama_model_blockffn_eagle::load_arch_tensors(llama_model_loader & ml) {
    LLAMA_LOAD_LOCALS;

    const int64_t n_q = n_embd_head_k * n_head;

    check_tensors(ml);
    tok_embd    = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), { n_embd, n_vocab }, 0);
    fc          = create_tensor(tn(LLM_TENSOR_FC, "weight"), { 2 * n_embd, n_embd }, 0);
    fc_b        = create_vector(ml, tn(LLM_TENSOR_FC, "bias"), n_embd, 0);
    embd_norm   = create_vector(ml, tn(LLM_TENSOR_NEXTN_ENORM, "weight", 0), n_embd, 0);
    hidden_norm = create_vector(ml, tn(LLM_TENSOR_NEXTN_HNORM, "weight", 0), n_embd, 0);

    // the draft vocabulary may be cut: the key draft_tokens then tells the drafter which token a row scores
    const auto *  meta    = ml.get_tensor_meta(tn(LLM_TENSOR_OUTPUT, "weight").str().c_str());
    const int64_t n_draft = meta ? meta->ne[1] : n_vocab;
    if (n_draft > n_vocab) {
        throw std::runtime_error("tensor 'output.weight': expected at most " + std::to_string(n_vocab) +
                                 " rows, one per token; found " + std::to_string(n_draft));
    }
    output = create_tensor(tn(LLM_TENSOR_OUTPUT, "weight"), { n_embd, n_draft }, TENSOR_NOT_REQUIRED);
    if (output == nullptr) {
        output = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), { n_embd, n_vocab }, TENSOR_DUPLICATED);
    }

    for (int il = 0; il < n_layer; ++il) {
        auto & layer = layers[il];
        if (il > 0) {
            layer.attn_norm = create_vector(ml, tn(LLM_TENSOR_ATTN_NORM, "weight", il), n_embd, 0);
        }
        create_tensor_qkv(layer, il, n_embd, n_q, n_embd_k_gqa, n_embd_v_gqa, 0);
        layer.wo       = create_tensor(tn(LLM_TENSOR_ATTN_OUT, "weight", il), { n_q, n_embd }, 0);
        layer.ffn_norm = create_vector(ml, tn(LLM_TENSOR_FFN_NORM, "weight", il), n_embd, 0);
        layer.ffn_gate = create_tensor(tn(LLM_TENSOR_FFN_GATE, "weight", il), { n_embd, n_ff }, 0);
        layer.ffn_up   = create_tensor(tn(LLM_TENSOR_FFN_UP, "weight", il), { n_embd, n_ff }, 0);
        layer.ffn_down = create_tensor(tn(LLM_TENSOR_FFN_DOWN, "weight", il), { n_ff, n_embd }, 0);
    }
}

std::unique_ptr<llm_graph_context> llama_model_blockffn_eagle::build_arch_graph(const llm_graph_params & params) const {
    return std::make_unique<graph>(*this, params);
}

llama_model_blockffn_eagle::graph::graph(const llama_model_blockffn_eagle & model, const llm_graph_params & params) :
    llm_graph_context(params) {
    ggml_tensor * cur     = build_input(model);  // [n_embd, n_tokens]
    ggml_tensor * pos     = build_inp_pos();
    auto *        inp     = build_attn_inp_kv();
    ggml_tensor * out_ids = build_inp_out_ids();

    for (int il = 0; il < n_layer; ++il) {
        cur = build_layer(model.layers[il], inp, cur, pos, il);
    }

    // the states of all rows: a node of a tree needs its parent's, whether or not its logits were asked for
    ggml_set_output(cur);
    cb(cur, "h_nextn", -1);
    res->t_h_nextn = cur;

    if (out_ids) {
        cur = ggml_get_rows(ctx0, cur, out_ids);
    }
    res->t_embd = cur;

    cur = build_lora_mm(model.output, ggml_scale(ctx0, cur, hparams.f_logit_scale));  // [n_draft, n_outputs]

    // llama.cpp copies n_vocab values per row: a cut vocabulary is filled up
    const int64_t n_rest = (int64_t) model.vocab.n_tokens() - cur->ne[0];
    if (n_rest > 0) {
        cur = ggml_pad(ctx0, cur, (int) n_rest, 0, 0, 0);
    }
    cb(cur, "result_output", -1);
    res->t_logits = cur;
    ggml_build_forward_expand(gf, cur);
}

// fc [norm(embedding) | norm(hidden state)] + bias
ggml_tensor * llama_model_blockffn_eagle::graph::build_input(const llama_model_blockffn_eagle & model) {
    auto inp = std::make_unique<llm_graph_input_embd>(n_embd);

    inp->tokens = ggml_new_tensor_1d(ctx0, GGML_TYPE_I32, n_tokens);
    inp->embd   = ggml_new_tensor_2d(ctx0, GGML_TYPE_F32, n_embd, n_tokens);
    ggml_set_input(inp->tokens);
    ggml_set_input(inp->embd);

    ggml_tensor * hidden = inp->embd;
    ggml_tensor * embd   = ggml_get_rows(ctx0, model.tok_embd, inp->tokens);  // [n_embd, n_tokens]
    res->add_input(std::move(inp));

    embd   = ggml_scale(ctx0, embd, hparams.f_embedding_scale);
    embd   = build_norm(embd, model.embd_norm, nullptr, LLM_NORM_RMS, -1);
    hidden = build_norm(hidden, model.hidden_norm, nullptr, LLM_NORM_RMS, -1);
    cb(embd, "embd_norm", -1);
    cb(hidden, "hidden_norm", -1);

    ggml_tensor * cur = build_lora_mm(model.fc, ggml_concat(ctx0, embd, hidden, 0));  // [n_embd, n_tokens]
    cur               = ggml_add(ctx0, cur, model.fc_b);
    cb(cur, "fc", -1);
    return cur;
}

// a Llama layer; the first has no norm before its attention
ggml_tensor * llama_model_blockffn_eagle::graph::build_layer(const llama_layer &       layer,
                                                             llm_graph_input_attn_kv * inp,
                                                             ggml_tensor *             cur,
                                                             ggml_tensor *             pos,
                                                             int                       il) {
    const int64_t n_head_dim = hparams.n_embd_head_k();
    ggml_tensor * residual   = cur;

    if (layer.attn_norm) {
        cur = build_norm(cur, layer.attn_norm, nullptr, LLM_NORM_RMS, il);
    }
    auto [q, k, v] = build_qkv(layer, cur, n_head_dim, n_head, n_head_kv, il);  // [n_head_dim, heads, n_tokens]
    q   = ggml_rope_ext(ctx0, q, pos, nullptr, n_rot, rope_type, n_ctx_orig, freq_base, freq_scale, ext_factor,
                        attn_factor, beta_fast, beta_slow);
    k   = ggml_rope_ext(ctx0, k, pos, nullptr, n_rot, rope_type, n_ctx_orig, freq_base, freq_scale, ext_factor,
                        attn_factor, beta_fast, beta_slow);
    cur = build_attn(inp, layer.wo, nullptr, nullptr, q, k, v, nullptr, nullptr, nullptr,
                     1.0f / sqrtf((float) n_head_dim), il);
    cur = ggml_add(ctx0, cur, residual);
    cb(cur, "attn_out", il);

    residual = cur;
    cur      = build_norm(cur, layer.ffn_norm, nullptr, LLM_NORM_RMS, il);
    cur      = build_ffn(cur, layer.ffn_up, nullptr, nullptr, layer.ffn_gate, nullptr, nullptr, layer.ffn_down, nullptr,
                         nullptr, nullptr, LLM_FFN_SILU, LLM_FFN_PAR, il);
    cur      = ggml_add(ctx0, cur, residual);
    cb(cur, "l_out", il);
    return cur;
}
