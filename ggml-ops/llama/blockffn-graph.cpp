// The graph of one evaluation: see blockffn-model.h.

#include "../cpu/flash-attn.h"
#include "../cpu/relu-router.h"
#include "blockffn-model.h"
#include "ggml-expert-ops.h"
#include "llama-adapter.h"

#include <string>

// the ops and the files count their alternatives alike
static_assert((int) BLOCKFFN_ROUTER_NORM_SUM == (int) GGML_ROUTER_NORM_SUM, "router norms differ");
static_assert((int) BLOCKFFN_ROUTER_BIAS_RMS == (int) GGML_ROUTER_BIAS_RMS, "router biases differ");
static_assert((int) BLOCKFFN_ACTIVATION_NORM_SILU_NORMS == (int) GGML_UNION_ACT_NORM_SILU_NORMS, "activations differ");

void blockffn_choose_kernels(const llama_model & model, ggml_cgraph * gf) {
    for (int i = 0; i < ggml_graph_n_nodes(gf); i++) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        if (model.stock_kernels && node->op == GGML_OP_FLASH_ATTN_EXT) {
            ggml_flash_attn_set_row_by_row(node);
        } else if (!model.stock_kernels && node->op == GGML_OP_MUL_MAT && node->op_params[1] == GGML_HINT_NONE) {
            ggml_mul_mat_set_hint(node, GGML_HINT_TOKEN_TILES);
        }
    }
}

std::unique_ptr<llm_graph_context> llama_model_blockffn::build_arch_graph(const llm_graph_params & params) const {
    return std::make_unique<graph>(*this, params);
}

llama_model_blockffn::graph::graph(const llama_model_blockffn & model, const llm_graph_params & params) :
    llm_graph_context(params),
    bf(model.blockffn),
    stock(model.stock_kernels),
    threshold(cparams.router_threshold < 0.0f ? bf.router_threshold : cparams.router_threshold),
    budget(ubatch.n_tokens > 1 ? cparams.union_budget : 0) {
    if (bf.rope_dynamic_factor > 0.0f && cparams.n_ctx_seq > hparams.n_ctx_train) {
        throw std::runtime_error("this model scales RoPE dynamically beyond its trained context of " +
                                 std::to_string(hparams.n_ctx_train) +
                                 " tokens, which is not supported: use a context of at most that");
    }
    const bool mla = hparams.is_mla();

    ggml_tensor * inpL = build_inp_embd(model.tok_embd);  // [n_embd, n_tokens], times f_embedding_scale already

    ggml_tensor * pos        = build_inp_pos();
    auto *        inp_k      = mla ? build_attn_inp_k() : nullptr;
    auto *        inp_kv     = mla ? nullptr : build_attn_inp_kv();
    ggml_tensor * out_ids    = build_inp_out_ids();
    // a draft head reads the hidden states of all tokens, everybody else only those of the output rows
    const bool    all_hidden = cparams.embeddings_nextn && !cparams.embeddings_nextn_masked;

    for (int il = 0; il < n_layer; ++il) {
        const auto & layer = model.layers[il];

        ggml_tensor * cur = build_norm(inpL, layer.attn_norm, nullptr, LLM_NORM_RMS, il);
        cb(cur, "attn_norm", il);
        cur = mla ? build_mla(layer, inp_k, cur, pos, il) : build_gqa(layer, inp_kv, cur, pos, il);
        cb(cur, "attn_out", il);

        if (il == n_layer - 1 && out_ids && !all_hidden) {
            cur  = ggml_get_rows(ctx0, cur, out_ids);
            inpL = ggml_get_rows(ctx0, inpL, out_ids);
        }
        ggml_tensor * ffn_inp = ggml_add(ctx0, ggml_scale(ctx0, cur, hparams.f_residual_scale), inpL);
        cb(ffn_inp, "ffn_inp", il);

        cur = build_norm(ffn_inp, layer.ffn_norm, nullptr, LLM_NORM_RMS, il);
        cb(cur, "ffn_norm", il);
        cur = build_ffn_block(layer, cur, il);
        cb(cur, "ffn_out", il);

        cur  = ggml_add(ctx0, ggml_scale(ctx0, cur, hparams.f_residual_scale), ffn_inp);
        cur  = build_cvec(cur, il);
        inpL = cur;
        cb(inpL, "l_out", il);
    }

    ggml_tensor * cur = build_norm(inpL, model.output_norm, nullptr, LLM_NORM_RMS, -1);
    res->t_h_nextn    = cur;
    if (all_hidden && out_ids) {
        cur = ggml_get_rows(ctx0, cur, out_ids);
    }
    cb(cur, "result_norm", -1);
    res->t_embd = cur;

    cur = build_lora_mm(model.output, ggml_scale(ctx0, cur, hparams.f_logit_scale));  // [n_vocab, n_outputs]
    cb(cur, "result_output", -1);
    res->t_logits = cur;
    ggml_build_forward_expand(gf, cur);
}

// Multi-head latent attention in absorbed form: one shared key [kv_rank + rope] per token is all that the cache holds.
ggml_tensor * llama_model_blockffn::graph::build_mla(const llama_layer &      layer,
                                                     llm_graph_input_attn_k * inp,
                                                     ggml_tensor *            cur,
                                                     ggml_tensor *            pos,
                                                     int                      il) {
    const int64_t n_k     = hparams.n_embd_head_k_mla();
    const int64_t n_nope  = n_k - n_rot;
    const int64_t kv_rank = hparams.n_lora_kv;
    const float   eps     = bf.lora_rms_eps;

    ggml_tensor * q = build_lora_mm(layer.wq_a, cur);
    q               = ggml_mul(ctx0, ggml_rms_norm(ctx0, q, eps), layer.attn_q_a_norm);
    q               = build_lora_mm(layer.wq_b, q);
    q               = ggml_reshape_3d(ctx0, q, n_k, n_head, n_tokens);  // per head [nope | rope]
    cb(q, "q", il);

    ggml_tensor * q_nope = ggml_view_3d(ctx0, q, n_nope, n_head, n_tokens, q->nb[1], q->nb[2], 0);
    ggml_tensor * q_rope =
        ggml_view_3d(ctx0, q, n_rot, n_head, n_tokens, q->nb[1], q->nb[2], ggml_row_size(q->type, n_nope));
    q_rope = ggml_rope_ext(ctx0, q_rope, pos, nullptr, n_rot, rope_type, n_ctx_orig, freq_base, freq_scale, ext_factor,
                           attn_factor, beta_fast, beta_slow);
    cb(q_rope, "q_rope", il);

    ggml_tensor * kv = build_lora_mm(layer.wkv_a_mqa, cur);  // [kv_rank + rope, n_tokens]
    ggml_tensor * c  = ggml_view_2d(ctx0, kv, kv_rank, n_tokens, kv->nb[1], 0);
    c                = ggml_mul(ctx0, ggml_rms_norm(ctx0, c, eps), layer.attn_kv_a_norm);
    c                = ggml_reshape_3d(ctx0, c, kv_rank, 1, n_tokens);
    cb(c, "kv_compressed", il);
    ggml_tensor * k_rope =
        ggml_view_3d(ctx0, kv, n_rot, 1, n_tokens, kv->nb[1], kv->nb[1], ggml_row_size(kv->type, kv_rank));
    k_rope = ggml_rope_ext(ctx0, k_rope, pos, nullptr, n_rot, rope_type, n_ctx_orig, freq_base, freq_scale, ext_factor,
                           attn_factor, beta_fast, beta_slow);
    cb(k_rope, "k_rope", il);

    q_nope          = ggml_permute(ctx0, q_nope, 0, 2, 1, 3);  // [nope, n_tokens, n_head]
    q_nope          = ggml_mul_mat(ctx0, layer.wk_b, q_nope);  // [kv_rank, n_tokens, n_head]
    q_nope          = ggml_permute(ctx0, q_nope, 0, 2, 1, 3);  // [kv_rank, n_head, n_tokens]
    q               = ggml_concat(ctx0, q_nope, q_rope, 0);    // [kv_rank + rope, n_head, n_tokens]
    ggml_tensor * k = ggml_concat(ctx0, c, k_rope, 0);         // [kv_rank + rope, 1, n_tokens]

    return build_attn(inp, layer.wo, nullptr, nullptr, q, k, c, nullptr, nullptr, layer.wv_b, 1.0f / sqrtf(float(n_k)),
                      il);
}

// Grouped-query attention.
ggml_tensor * llama_model_blockffn::graph::build_gqa(const llama_layer &       layer,
                                                     llm_graph_input_attn_kv * inp,
                                                     ggml_tensor *             cur,
                                                     ggml_tensor *             pos,
                                                     int                       il) {
    auto [q, k, v] = build_qkv(layer, cur, n_embd_head_k, n_head, n_head_kv, il);
    q = ggml_rope_ext(ctx0, q, pos, nullptr, n_rot, rope_type, n_ctx_orig, freq_base, freq_scale, ext_factor,
                      attn_factor, beta_fast, beta_slow);
    k = ggml_rope_ext(ctx0, k, pos, nullptr, n_rot, rope_type, n_ctx_orig, freq_base, freq_scale, ext_factor,
                      attn_factor, beta_fast, beta_slow);
    cb(q, "q", il);
    cb(k, "k", il);
    return build_attn(inp, layer.wo, nullptr, nullptr, q, k, v, nullptr, nullptr, nullptr,
                      1.0f / sqrtf(float(n_embd_head_k)), il);
}

// The FFN of one layer: y [n_embd, n_tokens] from its normed input.
ggml_tensor * llama_model_blockffn::graph::build_ffn_block(const llama_layer & layer, ggml_tensor * cur, int il) {
    if (hparams.n_ff(il) > 0) {
        return build_plain_ffn(layer.ffn_up, layer.ffn_gate, layer.ffn_down, cur, il);
    }
    const bool    sparse = runs_union_op(layer, cur);
    const routing r      = build_router(layer, cur, sparse, il);
    if (cparams.expert_stats) {
        ggml_build_forward_expand(gf, r.active);
        res->t_expert_scores.push_back(r.active);
    }

    ggml_tensor * y = sparse ? build_union(layer, cur, r.scores) : build_experts_dense(layer, cur, r.scores, il);
    cb(y, "ffn_experts", il);
    if (layer.ffn_up_shexp) {
        y = ggml_add(ctx0, y, build_plain_ffn(layer.ffn_up_shexp, layer.ffn_gate_shexp, layer.ffn_down_shexp, cur, il));
    }
    return y;
}

// Whether an adapter changes the matrices of the experts.
static bool has_lora(const llama_adapter_loras & loras, const llama_layer & layer) {
    for (const auto & lora : loras) {
        for (ggml_tensor * w : { layer.ffn_up_exps, layer.ffn_gate_exps, layer.ffn_down_exps }) {
            if (w && lora.first->get_weight(w)) {
                return true;
            }
        }
    }
    return false;
}

// Whether this layer runs through the ops: not if the file or the user asks for the dense graph (as llama-imatrix does,
// which watches matrix products), not with an adapter, whose products only the dense graph has, and only where the
// device of the weights knows the op.
bool llama_model_blockffn::graph::runs_union_op(const llama_layer & layer, ggml_tensor * cur) {
    if (stock || bf.router_norm == BLOCKFFN_ROUTER_NORM_NORMAL || has_lora(*loras, layer)) {
        return false;
    }
    ggml_tensor *         scores = ggml_new_tensor_2d(ctx0, GGML_TYPE_F32, n_expert, cur->ne[1]);
    ggml_tensor *         op     = build_union(layer, cur, scores);
    ggml_backend_buffer_t buffer = layer.ffn_up_exps->buffer;
    ggml_backend_dev_t    dev = buffer ? ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer)) : nullptr;
    if (!dev) {  // the CPU's plain and mapped buffers name no device
        dev = ggml_backend_get_device(backend_cpu);
    }
    return ggml_backend_dev_supports_op(dev, op);
}

// The sparse FFN: each expert that any token needs is read once, only active pairs are computed.
ggml_tensor * llama_model_blockffn::graph::build_union(const llama_layer & layer,
                                                       ggml_tensor *       cur,
                                                       ggml_tensor *       scores) {
    return ggml_union_ffn(ctx0, cur, layer.ffn_up_exps, layer.ffn_gate_exps, layer.ffn_down_exps, scores,
                          layer.ffn_act_mean, layer.ffn_act_norm, (enum ggml_union_act) bf.activation,
                          bf.activation_eps);
}

// The products between x and t, with those of an adapter: a logit near 0 that changes its sign with the number of tokens
// in the batch would add or drop an expert.
static void hint_batch_invariant(ggml_tensor * t, const ggml_tensor * x) {
    if (!t || t == x) {
        return;
    }
    if (t->op == GGML_OP_MUL_MAT) {
        ggml_mul_mat_set_hint(t, GGML_HINT_BATCH_INVARIANT);
    }
    hint_batch_invariant(t->src[0], x);
    hint_batch_invariant(t->src[1], x);
}

// Scores of all experts (BlockFFN eq. 3 to 5, DECO eq. 4 to 7).
llama_model_blockffn::graph::routing llama_model_blockffn::graph::build_router(const llama_layer & layer,
                                                                               ggml_tensor *       cur,
                                                                               bool                sparse,
                                                                               int                 il) {
    ggml_tensor * logits  = build_lora_mm(layer.ffn_gate_inp, cur);  // [n_expert, n_tokens]
    ggml_tensor * product = logits;
    while (product->op == GGML_OP_ADD) {                             // of an adapter
        product = product->src[0];
    }
    ggml_prec_set_acc(product, GGML_PREC_F32);
    if (!stock) {
        hint_batch_invariant(logits, cur);
    }
    cb(logits, "ffn_router_logits", il);

    if (!sparse) {
        const routing r = build_dial_dense(build_router_dense(layer, logits));
        cb(r.active, "ffn_router_active", il);
        cb(r.scores, "ffn_router_scores", il);
        return r;
    }
    const bool    biased = bf.router_bias != BLOCKFFN_ROUTER_BIAS_NONE;
    ggml_tensor * scores =
        ggml_relu_router(ctx0, logits, layer.ffn_router_norm, biased ? layer.ffn_exp_probs_b : nullptr,
                         (enum ggml_router_norm) bf.router_norm, (enum ggml_router_bias) bf.router_bias,
                         bf.router_norm_eps, bf.router_norm_scale, bf.router_scale);
    ggml_relu_router_set_dial(scores, threshold, budget);
    cb(scores, "ffn_router_scores", il);
    return { scores, scores };
}

// The same through stock ops.
llama_model_blockffn::graph::routing llama_model_blockffn::graph::build_router_dense(const llama_layer & layer,
                                                                                     ggml_tensor *       logits) {
    ggml_tensor * active = ggml_relu(ctx0, logits);
    if (layer.ffn_exp_probs_b && bf.router_bias != BLOCKFFN_ROUTER_BIAS_NONE) {
        // the bias only selects: the score stays that of the logit itself
        ggml_tensor * shifted = nullptr;
        if (bf.router_bias == BLOCKFFN_ROUTER_BIAS_RMS) {
            ggml_tensor * rms = ggml_sqrt(ctx0, ggml_mean(ctx0, ggml_sqr(ctx0, logits)));  // [1, n_tokens]
            ggml_tensor * b   = ggml_repeat(ctx0, layer.ffn_exp_probs_b, logits);
            shifted           = ggml_add(ctx0, logits, ggml_mul(ctx0, b, rms));
        } else {
            shifted = ggml_add(ctx0, logits, layer.ffn_exp_probs_b);
        }
        active = ggml_mul(ctx0, active, ggml_step(ctx0, shifted));
    }

    ggml_tensor * scores = active;
    switch (bf.router_norm) {
        case BLOCKFFN_ROUTER_NORM_NONE:
            break;
        case BLOCKFFN_ROUTER_NORM_RMS:
            scores = ggml_rms_norm(ctx0, active, bf.router_norm_eps);
            break;
        case BLOCKFFN_ROUTER_NORM_SUM:
            scores =
                ggml_div(ctx0, active, ggml_scale_bias(ctx0, ggml_sum_rows(ctx0, active), bf.router_norm_scale, 1e-5f));
            break;
        case BLOCKFFN_ROUTER_NORM_NORMAL:
            scores = ggml_norm(ctx0, active, bf.router_norm_eps);
            break;
    }
    if (layer.ffn_router_norm) {
        scores = ggml_mul(ctx0, scores, layer.ffn_router_norm);
    }
    if (bf.router_scale != 1.0f) {
        scores = ggml_scale(ctx0, scores, bf.router_scale);
    }
    return { scores, active };
}

// What threshold and budget leave, through stock ops; see ggml_relu_router_set_dial().
llama_model_blockffn::graph::routing llama_model_blockffn::graph::build_dial_dense(const routing & r) {
    ggml_tensor * scores = r.scores;  // [n_expert, n_tokens]
    ggml_tensor * active = r.active;
    const auto    keep   = [&](ggml_tensor * mask) {
        scores = ggml_mul(ctx0, scores, mask);
        active = ggml_mul(ctx0, active, mask);
    };
    if (threshold > 0.0f) {
        ggml_tensor * size    = ggml_abs(ctx0, scores);
        ggml_tensor * largest = ggml_pool_1d(ctx0, size, GGML_OP_POOL_MAX, n_expert, n_expert, 0);  // [1, n_tokens]
        ggml_tensor * bound   = ggml_repeat(ctx0, ggml_scale(ctx0, largest, threshold), size);
        // 1 - step(bound - size): also where both are equal
        keep(ggml_scale_bias(ctx0, ggml_step(ctx0, ggml_sub(ctx0, bound, size)), -1.0f, 1.0f));
    }
    if (budget > 0 && budget < n_expert) {
        ggml_tensor * by_expert =
            ggml_cont(ctx0, ggml_transpose(ctx0, ggml_abs(ctx0, scores)));  // [n_tokens, n_expert]
        ggml_tensor * sums  = ggml_reshape_1d(ctx0, ggml_sum_rows(ctx0, by_expert), n_expert);
        ggml_tensor * order = ggml_argsort(ctx0, sums, GGML_SORT_ORDER_DESC);
        ggml_tensor * rank  = ggml_argsort(ctx0, ggml_cast(ctx0, order, GGML_TYPE_F32), GGML_SORT_ORDER_ASC);
        rank                = ggml_cast(ctx0, rank, GGML_TYPE_F32);
        keep(ggml_step(ctx0, ggml_scale_bias(ctx0, rank, -1.0f, budget - 0.5f)));
    }
    return { scores, active };
}

// All experts through stock ops. Dense layout: two matrix products. Expert layout: mul_mat_id with every expert, which
// every backend, packed buffer type and the imatrix tool know.
ggml_tensor * llama_model_blockffn::graph::build_experts_dense(const llama_layer & layer,
                                                               ggml_tensor *       cur,
                                                               ggml_tensor *       scores,
                                                               int                 il) {
    const bool    flat = bf.dense_layout;
    const int64_t d    = hparams.n_ff_exp();
    const int64_t n    = cur->ne[1];

    ggml_tensor * ids = nullptr;
    if (!flat) {
        // 0, 1, 2, ... for every token; counted up from the scores because llama-imatrix crashes at a node without a
        // source, as ggml_arange is one
        ggml_tensor * ones = ggml_scale_bias(ctx0, scores, 0.0f, 1.0f);
        ids                = ggml_scale_bias(ctx0, ggml_cumsum(ctx0, ones), 1.0f, -1.0f);
        ids                = ggml_cast(ctx0, ids, GGML_TYPE_I32);      // [n_expert, n]
    }
    const auto project = [&](ggml_tensor * w, ggml_tensor * w_exps) {  // [d, n_expert, n]
        if (flat) {
            return ggml_reshape_3d(ctx0, build_lora_mm(w, cur), d, n_expert, n);
        }
        return build_lora_mm_id(w_exps, ggml_reshape_3d(ctx0, cur, n_embd, 1, n), ids);
    };

    ggml_tensor * z = project(layer.ffn_up, layer.ffn_up_exps);
    cb(z, "ffn_up", il);
    if (layer.ffn_gate || layer.ffn_gate_exps) {
        z = ggml_mul(ctx0, build_activation(layer, project(layer.ffn_gate, layer.ffn_gate_exps), cur), z);
    } else {
        z = build_activation(layer, z, cur);
    }
    cb(z, "ffn_activated", il);
    z = ggml_mul(ctx0, z, ggml_reshape_3d(ctx0, scores, 1, n_expert, n));
    cb(z, "ffn_hidden", il);

    if (flat) {
        return build_lora_mm(layer.ffn_down, ggml_reshape_2d(ctx0, z, d * n_expert, n));
    }
    ggml_tensor * y = build_lora_mm_id(layer.ffn_down_exps, z, ids);  // [n_embd, n_expert, n]
    y               = ggml_cont(ctx0, ggml_permute(ctx0, y, 1, 0, 2, 3));
    return ggml_reshape_2d(ctx0, ggml_sum_rows(ctx0, y), n_embd, n);
}

// The activation of the experts on z [d, n_expert, n]; cur [n_embd, n] is what z was projected from.
ggml_tensor * llama_model_blockffn::graph::build_activation(const llama_layer & layer,
                                                            ggml_tensor *       z,
                                                            ggml_tensor *       cur) {
    if (layer.ffn_act_mean) {
        // mean over the projections of all experts: one dot product with the mean row
        ggml_tensor * mean = ggml_mul_mat(ctx0, layer.ffn_act_mean, cur);  // [1, n]
        z                  = ggml_sub(ctx0, z, ggml_reshape_3d(ctx0, mean, 1, 1, cur->ne[1]));
    }
    if (layer.ffn_act_norm) {
        z = ggml_mul(ctx0, ggml_rms_norm(ctx0, z, bf.activation_eps), layer.ffn_act_norm);
    }
    switch (bf.activation) {
        case BLOCKFFN_ACTIVATION_RELU:
            return ggml_relu(ctx0, z);
        case BLOCKFFN_ACTIVATION_GELU:
            return ggml_gelu_erf(ctx0, z);
        case BLOCKFFN_ACTIVATION_RELU_SQUARED:
            return ggml_sqr(ctx0, ggml_relu(ctx0, z));
        default:
            return ggml_silu(ctx0, z);
    }
}

// Dense or shared FFN: down(act(gate x) * up x), or down(act(up x)) where there is no gate.
ggml_tensor * llama_model_blockffn::graph::build_plain_ffn(ggml_tensor * up,
                                                           ggml_tensor * gate,
                                                           ggml_tensor * down,
                                                           ggml_tensor * cur,
                                                           int           il) {
    const auto act = [&](ggml_tensor * z) {
        switch (bf.dense_act) {
            case BLOCKFFN_ACTIVATION_RELU:
                return ggml_relu(ctx0, z);
            case BLOCKFFN_ACTIVATION_GELU:
                return ggml_gelu_erf(ctx0, z);
            default:
                return ggml_silu(ctx0, z);
        }
    };
    ggml_tensor * z = build_lora_mm(up, cur);
    if (gate && bf.dense_act == BLOCKFFN_ACTIVATION_SILU) {
        z = ggml_swiglu_split(ctx0, build_lora_mm(gate, cur), z);
    } else {
        z = gate ? ggml_mul(ctx0, act(build_lora_mm(gate, cur)), z) : act(z);
    }
    cb(z, "ffn_plain_hidden", il);
    return build_lora_mm(down, z);
}
