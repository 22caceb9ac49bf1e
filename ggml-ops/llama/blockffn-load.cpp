// Checks of a file, and vectors in other types than F32: see blockffn-load.h.

#include "blockffn-load.h"

#include "llama-model-loader.h"

#include <climits>
#include <cmath>

void blockffn_refuse(const llama_model_loader & ml,
                     enum llm_kv                kid,
                     const std::string &        expected,
                     const std::string &        found) {
    throw std::runtime_error(ml.llm_kv(kid) + ": expected " + expected + "; found " + found);
}

void blockffn_get_number(llama_model_loader & ml, enum llm_kv kid, float & value, bool required) {
    ml.get_key(kid, value, required);
    if (!std::isfinite(value)) {
        blockffn_refuse(ml, kid, "a finite number", std::to_string(value));
    }
}

void blockffn_get_epsilon(llama_model_loader & ml, enum llm_kv kid, float & value) {
    blockffn_get_number(ml, kid, value);
    if (value < 0.0f) {
        blockffn_refuse(ml, kid, "a number that is not negative", std::to_string(value));
    }
}

uint32_t blockffn_same_in_all_layers(const llama_model_loader & ml,
                                     const llama_hparams &      hparams,
                                     enum llm_kv                kid,
                                     uint32_t (llama_hparams::*value)(uint32_t) const) {
    const uint32_t first = (hparams.*value)(0);
    if (first == 0) {
        blockffn_refuse(ml, kid, "at least 1", "0");
    }
    for (uint32_t il = 1; il < hparams.n_layer_all; ++il) {
        const uint32_t other = (hparams.*value)(il);
        if (other != first) {
            blockffn_refuse(ml, kid, "the same value for all layers",
                            std::to_string(first) + " for layer 0 and " + std::to_string(other) + " for layer " +
                                std::to_string(il));
        }
    }
    return first;
}

//
// hyper-parameters
//

static void check_range(const llama_model_loader & ml, enum llm_kv kid, uint32_t value, uint32_t most = INT_MAX) {
    if (value < 1 || value > most) {
        blockffn_refuse(ml, kid, "1 to " + std::to_string(most), std::to_string(value));
    }
}

static void check_positive(const llama_model_loader & ml, enum llm_kv kid, float value) {
    if (!std::isfinite(value) || value <= 0.0f) {
        blockffn_refuse(ml, kid, "a positive number", std::to_string(value));
    }
}

static void check_rope(const llama_model_loader & ml, const llama_hparams & hparams) {
    const uint32_t n_rot = hparams.n_rot();
    check_range(ml, LLM_KV_ROPE_DIMENSION_COUNT, n_rot, hparams.n_embd_head_k());
    if (n_rot % 2 != 0) {
        blockffn_refuse(ml, LLM_KV_ROPE_DIMENSION_COUNT, "an even number", std::to_string(n_rot));
    }
    check_positive(ml, LLM_KV_ROPE_FREQ_BASE, hparams.rope_freq_base_train);
    check_positive(ml, LLM_KV_ROPE_SCALING_FACTOR, 1.0f / hparams.rope_freq_scale_train);
    check_positive(ml, LLM_KV_ROPE_SCALING_ATTN_FACTOR, hparams.rope_attn_factor);
    if (hparams.rope_scaling_type_train == LLAMA_ROPE_SCALING_TYPE_LONGROPE) {
        blockffn_refuse(ml, LLM_KV_ROPE_SCALING_TYPE, "none, linear or yarn", "longrope");
    }
}

// Keys of other models, which every architecture can have: our graphs do not do what they ask for.
static void check_foreign(const llama_model_loader & ml, const llama_hparams & hparams) {
    if (hparams.n_layer_nextn != 0) {
        blockffn_refuse(ml, LLM_KV_NEXTN_PREDICT_LAYERS, "0", std::to_string(hparams.n_layer_nextn));
    }
    if (hparams.n_embd_out() != hparams.n_embd) {
        blockffn_refuse(ml, LLM_KV_EMBEDDING_LENGTH_OUT, "the embedding length, " + std::to_string(hparams.n_embd),
                        std::to_string(hparams.n_embd_out()));
    }
    if (!hparams.causal_attn) {
        blockffn_refuse(ml, LLM_KV_ATTENTION_CAUSAL, "true", "false");
    }
    const int pooling = (int) hparams.pooling_type;
    if (pooling < LLAMA_POOLING_TYPE_UNSPECIFIED || pooling > LLAMA_POOLING_TYPE_LAST) {
        blockffn_refuse(ml, LLM_KV_POOLING_TYPE, "0 to 3 (none, mean, first token, last token)",
                        std::to_string(pooling));
    }
}

void blockffn_model_base::check_hparams(llama_model_loader & ml) const {
    check_range(ml, LLM_KV_CONTEXT_LENGTH, hparams.n_ctx_train);
    check_range(ml, LLM_KV_EMBEDDING_LENGTH, hparams.n_embd);

    // llama.cpp makes room for as many tokens as the key says, before it looks at the tensors
    uint32_t     n_vocab = 0;
    const auto * embd    = ml.get_tensor_meta(tn(LLM_TENSOR_TOKEN_EMBD, "weight").str().c_str());
    if (embd && ml.get_key(LLM_KV_VOCAB_SIZE, n_vocab, false) && (int64_t) n_vocab != embd->ne[1]) {
        blockffn_refuse(ml, LLM_KV_VOCAB_SIZE, "the rows of token_embd.weight, " + std::to_string(embd->ne[1]),
                        std::to_string(n_vocab));
    }

    const uint32_t n_head =
        blockffn_same_in_all_layers(ml, hparams, LLM_KV_ATTENTION_HEAD_COUNT, &llama_hparams::n_head);
    const uint32_t n_head_kv =
        blockffn_same_in_all_layers(ml, hparams, LLM_KV_ATTENTION_HEAD_COUNT_KV, &llama_hparams::n_head_kv);
    if (n_head % n_head_kv != 0) {
        blockffn_refuse(ml, LLM_KV_ATTENTION_HEAD_COUNT_KV, "a divisor of the " + std::to_string(n_head) + " heads",
                        std::to_string(n_head_kv));
    }
    check_range(ml, LLM_KV_ATTENTION_KEY_LENGTH, hparams.n_embd_head_k());
    check_range(ml, LLM_KV_ATTENTION_VALUE_LENGTH, hparams.n_embd_head_v());
    check_rope(ml, hparams);
    check_foreign(ml, hparams);
}

//
// tensors
//

static bool has_suffix(const std::string & text, const std::string & suffix) {
    return text.size() >= suffix.size() && text.compare(text.size() - suffix.size(), suffix.size(), suffix) == 0;
}

void blockffn_model_base::check_tensors(const llama_model_loader & ml) const {
    for (const auto & [name, weight] : ml.weights_map) {
        const ggml_tensor * t = weight.tensor;
        if (ggml_nelements(t) == 0) {
            throw std::runtime_error("tensor '" + name + "': expected at least one value; found shape " +
                                     llama_format_tensor_shape(t));
        }
        if (t->type != GGML_TYPE_F32 && !ggml_get_type_traits(t->type)->to_float) {
            throw std::runtime_error("tensor '" + name +
                                     "': expected F32, F16, BF16 or a quantized type of weights; found " +
                                     ggml_type_name(t->type));
        }
        if (t->type != GGML_TYPE_F32 && name.find(".attn_") != std::string::npos && has_suffix(name, ".bias")) {
            throw std::runtime_error("tensor '" + name + "': expected F32; found " + ggml_type_name(t->type));
        }
        // upstream would load them, and our graphs would not multiply with most of them
        const size_t dot    = std::min(name.rfind('.'), name.size());
        const auto * beside = name.compare(dot, 6, ".scale") == 0 || name.compare(dot, 12, ".input_scale") == 0 ?
                                  ml.get_tensor_meta((name.substr(0, dot) + ".weight").c_str()) :
                                  nullptr;
        if (beside && (ggml_is_quantized(beside->type) || t->type != GGML_TYPE_F32)) {
            throw std::runtime_error("tensor '" + name +
                                     "': models of this architecture have no scales beside their weights");
        }
    }
}

ggml_tensor * blockffn_model_base::create_vector(llama_model_loader & ml,
                                                 const LLM_TN_IMPL &  tn,
                                                 int64_t              n,
                                                 int                  flags) {
    const std::string   name = tn.str();
    const ggml_tensor * meta = ml.get_tensor_meta(name.c_str());
    if (!meta || meta->type == GGML_TYPE_F32) {
        return create_tensor(tn, { n }, flags);
    }
    ml.check_tensor_dims(name, { n }, true, false);
    if (meta->type != GGML_TYPE_F16 && meta->type != GGML_TYPE_BF16) {
        throw std::runtime_error("tensor '" + name + "': expected F32, F16 or BF16; found " +
                                 ggml_type_name(meta->type));
    }
    return convert_vector(ml, name, tn.bid);
}

// Reads the values now, since the loader only copies or maps what has the type of the file.
ggml_tensor * blockffn_model_base::convert_vector(llama_model_loader & ml, const std::string & name, int bid) {
    const auto &         weight = ml.require_weight(name.c_str());
    const int64_t        n      = ggml_nelements(weight.tensor);
    std::vector<uint8_t> stored(ggml_nbytes(weight.tensor));
    std::vector<float>   values(n);
    ml.files.at(weight.idx)->seek(weight.offs, SEEK_SET);
    ml.files.at(weight.idx)->read_raw(stored.data(), stored.size());
    ggml_get_type_traits(weight.tensor->type)->to_float(stored.data(), values.data(), n);

    ggml_context_ptr ctx(ggml_init({ 2 * ggml_tensor_overhead(), nullptr, true }));
    ggml_tensor *    t = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, n);
    ggml_set_name(t, name.c_str());
    auto *                  buft = bid < 0 ? ggml_backend_cpu_buffer_type() : select_buft(bid);
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
    if (!buffer) {
        throw std::runtime_error("no memory for tensor '" + name + "'");
    }
    ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_tensor_set(t, values.data(), 0, values.size() * sizeof(float));

    tensors_by_name.emplace_back(name, t);
    converted.emplace_back(std::move(ctx), std::move(buffer));
    ml.n_created++;  // the loader counts what is used
    ml.size_data -= stored.size();
    return t;
}
