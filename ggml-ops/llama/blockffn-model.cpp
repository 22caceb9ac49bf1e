// Names, hyper-parameters and tensors of the architecture blockffn; the graph is in blockffn-graph.cpp.

#include "blockffn-model.h"

#include "blockffn-dial.h"

#include <string>

//
// names of the enumerations in GGUF files
//

static const char * const ROUTER_NORMS[]  = { "none", "rms", "sum", "normal" };
static const char * const ROUTER_BIASES[] = { "none", "base", "rms" };
static const char * const ACTIVATIONS[]   = { "silu",           "relu",      "gelu",
                                              "relu_squared",   "norm_silu", "norm_silu_nomean",
                                              "norm_silu_norms" };

const char * blockffn_router_norm_name(blockffn_router_norm value) {
    return ROUTER_NORMS[value];
}

const char * blockffn_router_bias_name(blockffn_router_bias value) {
    return ROUTER_BIASES[value];
}

const char * blockffn_activation_name(blockffn_activation value) {
    return ACTIVATIONS[value];
}

// the value of a key that holds one of a few names; an unknown name is an error that lists the known ones
template <typename T, size_t N>
static T get_named(llama_model_loader & ml, enum llm_kv key, const char * const (&names)[N]) {
    std::string found;
    ml.get_key(key, found);
    std::string known;
    for (size_t i = 0; i < N; ++i) {
        if (found == names[i]) {
            return (T) i;
        }
        known += std::string(i ? ", " : "") + names[i];
    }
    throw std::runtime_error(ml.llm_kv(key) + ": expected one of " + known + "; found '" + found + "'");
}

//
// hyper-parameters
//

void llama_model_blockffn::load_arch_hparams(llama_model_loader & ml) {
    auto & bf = blockffn;

    check_hparams(ml);
    blockffn_get_epsilon(ml, LLM_KV_ATTENTION_LAYERNORM_RMS_EPS, hparams.f_norm_rms_eps);
    blockffn_get_number(ml, LLM_KV_EMBEDDING_SCALE, hparams.f_embedding_scale);
    blockffn_get_number(ml, LLM_KV_RESIDUAL_SCALE, hparams.f_residual_scale);
    blockffn_get_number(ml, LLM_KV_LOGIT_SCALE, hparams.f_logit_scale);
    bf.dense_act = get_named<blockffn_activation>(ml, LLM_KV_HIDDEN_ACT, ACTIVATIONS);
    if (bf.dense_act > BLOCKFFN_ACTIVATION_GELU) {
        blockffn_refuse(ml, LLM_KV_HIDDEN_ACT, "silu, relu or gelu", blockffn_activation_name(bf.dense_act));
    }
    blockffn_get_number(ml, LLM_KV_ROPE_SCALING_DYNAMIC_FACTOR, bf.rope_dynamic_factor, false);

    ml.get_key(LLM_KV_ATTENTION_KEY_LENGTH_MLA, hparams.n_embd_head_k_mla_impl, false);
    ml.get_key(LLM_KV_ATTENTION_VALUE_LENGTH_MLA, hparams.n_embd_head_v_mla_impl, false);
    if (hparams.n_embd_head_k_mla_impl != 0 || hparams.n_embd_head_v_mla_impl != 0) {
        ml.get_key(LLM_KV_ATTENTION_Q_LORA_RANK, hparams.n_lora_q);
        ml.get_key(LLM_KV_ATTENTION_KV_LORA_RANK, hparams.n_lora_kv);
        blockffn_get_epsilon(ml, LLM_KV_ATTENTION_LORA_LAYERNORM_RMS_EPS, bf.lora_rms_eps);
        check_mla(ml);
    } else if (hparams.n_embd_head_v() != hparams.n_embd_head_k()) {
        blockffn_refuse(ml, LLM_KV_ATTENTION_VALUE_LENGTH, "the key length, " + std::to_string(hparams.n_embd_head_k()),
                        std::to_string(hparams.n_embd_head_v()));
    }
    if (hparams.n_expert > 0) {
        load_expert_hparams(ml);
    }

    switch (hparams.n_layer()) {
        case 16:
            type = LLM_TYPE_SMALL;
            break;
        case 27:
            type = LLM_TYPE_0_5B;
            break;
        case 32:
            type = hparams.n_embd == 1536 ? LLM_TYPE_0_8B : LLM_TYPE_1_2B;
            break;
        case 35:
            type = LLM_TYPE_1_2B;
            break;
        default:
            type = LLM_TYPE_UNKNOWN;
    }
}

// One key and value of [kv_rank | rope] and [kv_rank] values serves all heads: see build_mla().
void llama_model_blockffn::check_mla(llama_model_loader & ml) const {
    const auto expect = [&ml](enum llm_kv kid, uint64_t expected, uint32_t found, const char * what) {
        if (found != expected) {
            blockffn_refuse(ml, kid, std::to_string(expected) + " (" + what + ")", std::to_string(found));
        }
    };
    const uint32_t n_rot = hparams.n_rot();
    expect(LLM_KV_ATTENTION_HEAD_COUNT_KV, 1, hparams.n_head_kv(), "latent attention");
    expect(LLM_KV_ATTENTION_KEY_LENGTH, (uint64_t) hparams.n_lora_kv + n_rot, hparams.n_embd_head_k(),
           "attention.kv_lora_rank + rope.dimension_count");
    expect(LLM_KV_ATTENTION_VALUE_LENGTH, hparams.n_lora_kv, hparams.n_embd_head_v(), "attention.kv_lora_rank");
    if (hparams.n_embd_head_k_mla_impl <= n_rot) {
        blockffn_refuse(ml, LLM_KV_ATTENTION_KEY_LENGTH_MLA, "more than rope.dimension_count, " + std::to_string(n_rot),
                        std::to_string(hparams.n_embd_head_k_mla_impl));
    }
    if (hparams.n_embd_head_v_mla_impl == 0) {
        blockffn_refuse(ml, LLM_KV_ATTENTION_VALUE_LENGTH_MLA, "at least 1", "0 or no such key");
    }
}

void llama_model_blockffn::load_expert_hparams(llama_model_loader & ml) {
    auto & bf = blockffn;

    ml.get_key_or_arr(LLM_KV_EXPERT_FEED_FORWARD_LENGTH, hparams.n_ff_exp_arr, hparams.n_layer_all);
    blockffn_same_in_all_layers(ml, hparams, LLM_KV_EXPERT_FEED_FORWARD_LENGTH, &llama_hparams::n_ff_exp);
    ml.get_key(LLM_KV_EXPERT_SHARED_FEED_FORWARD_LENGTH, hparams.n_ff_shexp, false);
    bf.activation  = get_named<blockffn_activation>(ml, LLM_KV_EXPERT_ACTIVATION, ACTIVATIONS);
    bf.router_norm = get_named<blockffn_router_norm>(ml, LLM_KV_ROUTER_NORM, ROUTER_NORMS);
    bf.router_bias = get_named<blockffn_router_bias>(ml, LLM_KV_ROUTER_BIAS_METHOD, ROUTER_BIASES);
    blockffn_get_epsilon(ml, LLM_KV_EXPERT_ACTIVATION_EPS, bf.activation_eps);
    blockffn_get_epsilon(ml, LLM_KV_ROUTER_NORM_EPS, bf.router_norm_eps);
    blockffn_get_number(ml, LLM_KV_ROUTER_NORM_SCALE, bf.router_norm_scale);
    blockffn_get_number(ml, LLM_KV_ROUTER_SCALE, bf.router_scale);
    ml.get_key(LLM_KV_ROUTER_THRESHOLD, bf.router_threshold, false);
    if (!blockffn_threshold_is_valid(bf.router_threshold)) {
        blockffn_refuse(ml, LLM_KV_ROUTER_THRESHOLD, BLOCKFFN_THRESHOLD_RANGE, std::to_string(bf.router_threshold));
    }

    static const char * const layouts[] = { "expert", "dense" };
    bf.dense_layout                     = get_named<int>(ml, LLM_KV_EXPERT_LAYOUT, layouts) == 1;
    stock_kernels                       = stock_kernels || bf.dense_layout;
}

//
// tensors
//

void llama_model_blockffn::load_arch_tensors(llama_model_loader & ml) {
    LLAMA_LOAD_LOCALS;

    check_tensors(ml);
    tok_embd    = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), { n_embd, n_vocab }, 0);
    output_norm = create_vector(ml, tn(LLM_TENSOR_OUTPUT_NORM, "weight"), n_embd, 0);
    output      = create_tensor(tn(LLM_TENSOR_OUTPUT, "weight"), { n_embd, n_vocab }, TENSOR_NOT_REQUIRED);
    if (output == nullptr) {
        output = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), { n_embd, n_vocab }, TENSOR_DUPLICATED);
    }

    for (int il = 0; il < n_layer; ++il) {
        layers[il].attn_norm = create_vector(ml, tn(LLM_TENSOR_ATTN_NORM, "weight", il), n_embd, 0);
        layers[il].ffn_norm  = create_vector(ml, tn(LLM_TENSOR_FFN_NORM, "weight", il), n_embd, 0);
        load_attention(ml, layers[il], il);
        load_ffn(ml, layers[il], il);
    }
}

void llama_model_blockffn::load_attention(llama_model_loader & ml, llama_layer & layer, int il) {
    LLAMA_LOAD_LOCALS;

    if (!hparams.is_mla()) {
        create_tensor_qkv(layer, il, n_embd, n_embd_head_k * n_head, n_embd_k_gqa, n_embd_v_gqa, 0);
        layer.wo = create_tensor(tn(LLM_TENSOR_ATTN_OUT, "weight", il), { n_embd_head_k * n_head, n_embd }, 0);
        return;
    }
    const int64_t q_rank  = hparams.n_lora_q;
    const int64_t kv_rank = hparams.n_lora_kv;
    const int64_t n_k     = hparams.n_embd_head_k_mla();  // nope + rope
    const int64_t n_v     = hparams.n_embd_head_v_mla();
    const int64_t n_nope  = n_k - n_rot;

    layer.wq_a           = create_tensor(tn(LLM_TENSOR_ATTN_Q_A, "weight", il), { n_embd, q_rank }, 0);
    layer.attn_q_a_norm  = create_vector(ml, tn(LLM_TENSOR_ATTN_Q_A_NORM, "weight", il), q_rank, 0);
    layer.wq_b           = create_tensor(tn(LLM_TENSOR_ATTN_Q_B, "weight", il), { q_rank, n_head * n_k }, 0);
    layer.wkv_a_mqa      = create_tensor(tn(LLM_TENSOR_ATTN_KV_A_MQA, "weight", il), { n_embd, kv_rank + n_rot }, 0);
    layer.attn_kv_a_norm = create_vector(ml, tn(LLM_TENSOR_ATTN_KV_A_NORM, "weight", il), kv_rank, 0);
    layer.wk_b           = create_tensor(tn(LLM_TENSOR_ATTN_K_B, "weight", il), { n_nope, kv_rank, n_head }, 0);
    layer.wv_b           = create_tensor(tn(LLM_TENSOR_ATTN_V_B, "weight", il), { kv_rank, n_v, n_head }, 0);
    layer.wo             = create_tensor(tn(LLM_TENSOR_ATTN_OUT, "weight", il), { n_head * n_v, n_embd }, 0);
}

void llama_model_blockffn::load_ffn(llama_model_loader & ml, llama_layer & layer, int il) {
    LLAMA_LOAD_LOCALS;
    const auto &  bf       = blockffn;
    const int64_t n_dense  = hparams.n_ff(il);
    const int64_t d        = hparams.n_ff_exp();
    const int64_t n_shared = hparams.n_ff_shexp;

    if (n_dense > 0) {
        layer.ffn_gate = create_tensor(tn(LLM_TENSOR_FFN_GATE, "weight", il), { n_embd, n_dense }, 0);
        layer.ffn_up   = create_tensor(tn(LLM_TENSOR_FFN_UP, "weight", il), { n_embd, n_dense }, 0);
        layer.ffn_down = create_tensor(tn(LLM_TENSOR_FFN_DOWN, "weight", il), { n_dense, n_embd }, 0);
        return;
    }
    if (n_expert == 0) {
        throw std::runtime_error("blockffn.feed_forward_length: 0 for layer " + std::to_string(il) +
                                 ", which marks a layer of experts, but blockffn.expert_count is 0");
    }
    layer.ffn_gate_inp    = create_tensor(tn(LLM_TENSOR_FFN_GATE_INP, "weight", il), { n_embd, n_expert }, 0);
    // the factor on the scores: one per expert, one for all, or none (a constant travels as router.scale, with any norm)
    const auto name       = tn(LLM_TENSOR_FFN_ROUTER_NORM, "weight", il);
    const auto meta       = ml.get_tensor_meta(name.str().c_str());
    layer.ffn_router_norm = create_vector(ml, name, meta && meta->ne[0] == 1 ? 1 : n_expert, TENSOR_NOT_REQUIRED);
    const int bias        = bf.router_bias == BLOCKFFN_ROUTER_BIAS_NONE ? TENSOR_NOT_REQUIRED : 0;
    layer.ffn_exp_probs_b = create_vector(ml, tn(LLM_TENSOR_FFN_EXP_PROBS_B, "bias", il), n_expert, bias);

    if (bf.dense_layout) {
        layer.ffn_gate =
            create_tensor(tn(LLM_TENSOR_FFN_GATE, "weight", il), { n_embd, n_expert * d }, TENSOR_NOT_REQUIRED);
        layer.ffn_up   = create_tensor(tn(LLM_TENSOR_FFN_UP, "weight", il), { n_embd, n_expert * d }, 0);
        layer.ffn_down = create_tensor(tn(LLM_TENSOR_FFN_DOWN, "weight", il), { n_expert * d, n_embd }, 0);
    } else {
        layer.ffn_gate_exps =
            create_tensor(tn(LLM_TENSOR_FFN_GATE_EXPS, "weight", il), { n_embd, d, n_expert }, TENSOR_NOT_REQUIRED);
        layer.ffn_up_exps   = create_tensor(tn(LLM_TENSOR_FFN_UP_EXPS, "weight", il), { n_embd, d, n_expert }, 0);
        layer.ffn_down_exps = create_tensor(tn(LLM_TENSOR_FFN_DOWN_EXPS, "weight", il), { d, n_embd, n_expert }, 0);
    }

    const bool has_norm =
        bf.activation == BLOCKFFN_ACTIVATION_NORM_SILU || bf.activation == BLOCKFFN_ACTIVATION_NORM_SILU_NOMEAN;
    const bool has_mean =
        bf.activation == BLOCKFFN_ACTIVATION_NORM_SILU || bf.activation == BLOCKFFN_ACTIVATION_NORM_SILU_NORMS;
    if (has_norm) {
        layer.ffn_act_norm = create_vector(ml, tn(LLM_TENSOR_FFN_ACT_NORM, "weight", il), d, 0);
    }
    if (has_mean) {
        layer.ffn_act_mean = create_vector(ml, tn(LLM_TENSOR_FFN_ACT_MEAN, "weight", il), n_embd, 0);
    }
    if (n_shared > 0) {
        layer.ffn_gate_shexp =
            create_tensor(tn(LLM_TENSOR_FFN_GATE_SHEXP, "weight", il), { n_embd, n_shared }, TENSOR_NOT_REQUIRED);
        layer.ffn_up_shexp   = create_tensor(tn(LLM_TENSOR_FFN_UP_SHEXP, "weight", il), { n_embd, n_shared }, 0);
        layer.ffn_down_shexp = create_tensor(tn(LLM_TENSOR_FFN_DOWN_SHEXP, "weight", il), { n_shared, n_embd }, 0);
    }
}
