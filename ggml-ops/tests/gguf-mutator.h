// A GGUF file as a structure whose parts can be changed one by one, for fuzz-load.cpp: keys, values, types, shapes, counts.
// The offsets of the tensors follow their shapes, so that a changed file still passes the checks of the container.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

// the value of a key: one item, or an array of items; items of strings lie in `strings`, all others in `bytes`
struct gguf_value {
    uint32_t                 type     = 0;  // of an item, enum gguf_type
    bool                     is_array = false;
    uint64_t                 count    = 1;  // that the file states
    std::vector<uint8_t>     bytes;
    std::vector<std::string> strings;

    uint64_t n_items() const;
};

struct gguf_pair {
    std::string key;
    gguf_value  value;
};

struct gguf_entry {
    std::string           name;
    std::vector<uint64_t> ne;
    uint32_t              type         = 0;  // enum ggml_type
    int64_t               offset_error = 0;  // added to the right offset
    std::vector<uint8_t>  data;
};

struct gguf_image {
    uint32_t                version       = 3;
    int64_t                 pairs_error   = 0;   // added to the right numbers
    int64_t                 tensors_error = 0;
    int64_t                 cut           = -1;  // bytes of the file that are kept, -1 for all
    std::vector<gguf_pair>  pairs;
    std::vector<gguf_entry> tensors;

    // throws std::runtime_error
    static gguf_image read(const std::string & path);

    std::vector<uint8_t> serialize() const;
};

// numbers that do not depend on the standard library, so that a seed means the same everywhere
struct gguf_random {
    std::mt19937_64 engine;

    explicit gguf_random(uint64_t seed) : engine(seed) {}

    uint64_t below(uint64_t n) { return engine() % n; }

    bool one_in(uint64_t n) { return below(n) == 0; }

    template <typename T> T & pick(std::vector<T> & from) { return from[below(from.size())]; }
};

// Changes one to three things and says which.
std::string gguf_mutate(gguf_image & image, gguf_random & random);
