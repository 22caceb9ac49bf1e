#pragma once

// Loading, as far as the architectures blockffn and blockffn-eagle share it. What a file says is checked before anything
// is built from it: an error names the key or the tensor, what was expected and what was found.

#include "models/models.h"

#include <string>
#include <vector>

struct blockffn_model_base : public llama_model_base {
    blockffn_model_base(const struct llama_model_params & params) : llama_model_base(params) {}

  protected:
    // What upstream reads for every architecture, and our graphs rely on: lengths, heads, rotary dimensions.
    void check_hparams(llama_model_loader & ml) const;

    // Names, types and shapes of all tensors of the file, as far as they do not depend on what a tensor is used for.
    void check_tensors(const llama_model_loader & ml) const;

    // A vector of n values in F32, as our ops want it. F16 and BF16, which other tools write, are converted.
    ggml_tensor * create_vector(llama_model_loader & ml, const LLM_TN_IMPL & tn, int64_t n, int flags);

  private:
    ggml_tensor * convert_vector(llama_model_loader & ml, const std::string & name, int bid);

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> converted;  // vectors
};

// "KEY: expected EXPECTED; found FOUND"
[[noreturn]] void blockffn_refuse(const llama_model_loader & ml,
                                  enum llm_kv                kid,
                                  const std::string &        expected,
                                  const std::string &        found);

// a finite number; the value stays where the key is missing and not required
void blockffn_get_number(llama_model_loader & ml, enum llm_kv kid, float & value, bool required = true);

// the epsilon of a norm: a finite number, not negative
void blockffn_get_epsilon(llama_model_loader & ml, enum llm_kv kid, float & value);

// the one value of a per-layer array, at least 1; what our graphs know only once
uint32_t blockffn_same_in_all_layers(const llama_model_loader & ml,
                                     const llama_hparams &      hparams,
                                     enum llm_kv                kid,
                                     uint32_t (llama_hparams::*value)(uint32_t) const);
