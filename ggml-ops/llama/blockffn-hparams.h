#pragma once

// Hyper-parameters that only BlockFFN and DECO models have; docs/gguf.md lists their keys. Part of llama_model_blockffn.

#include <cstdint>

enum blockffn_router_norm {
    BLOCKFFN_ROUTER_NORM_NONE,
    BLOCKFFN_ROUTER_NORM_RMS,
    BLOCKFFN_ROUTER_NORM_SUM,
    BLOCKFFN_ROUTER_NORM_NORMAL,  // (a - mean) / std: every expert has a score, such a model is dense
};

enum blockffn_router_bias {
    BLOCKFFN_ROUTER_BIAS_NONE,
    BLOCKFFN_ROUTER_BIAS_BASE,
    BLOCKFFN_ROUTER_BIAS_RMS,
};

enum blockffn_activation {
    BLOCKFFN_ACTIVATION_SILU,
    BLOCKFFN_ACTIVATION_RELU,
    BLOCKFFN_ACTIVATION_GELU,
    BLOCKFFN_ACTIVATION_RELU_SQUARED,
    BLOCKFFN_ACTIVATION_NORM_SILU,
    BLOCKFFN_ACTIVATION_NORM_SILU_NOMEAN,
    BLOCKFFN_ACTIVATION_NORM_SILU_NORMS,
};

struct blockffn_hparams {
    float lora_rms_eps = 0.0f;  // of q_a_norm and kv_a_norm

    blockffn_activation activation     = BLOCKFFN_ACTIVATION_SILU;
    float               activation_eps = 0.0f;
    blockffn_activation dense_act      = BLOCKFFN_ACTIVATION_SILU;  // of dense and shared FFNs

    blockffn_router_norm router_norm       = BLOCKFFN_ROUTER_NORM_NONE;
    float                router_norm_eps   = 0.0f;
    float                router_norm_scale = 1.0f;
    float                router_scale      = 1.0f;
    blockffn_router_bias router_bias       = BLOCKFFN_ROUTER_BIAS_NONE;
    float                router_threshold  = 0.0f;  // experts below this share of the token's largest score are skipped

    bool  dense_layout        = false;              // experts stored as two-dimensional matrices
    float rope_dynamic_factor = 0.0f;               // dynamic NTK, which nothing computes: 0 where absent
};

const char * blockffn_router_norm_name(blockffn_router_norm value);
const char * blockffn_router_bias_name(blockffn_router_bias value);
const char * blockffn_activation_name(blockffn_activation value);
