// Rows of the KV cache that move from cell to cell.
#pragma once

#include "ggml-backend.h"

#include <cstdint>
#include <vector>

// copy the rows of K and V of cells src[i] to cells dst[i], all read before the first is written
inline void kv_rows_move(ggml_tensor * t, const std::vector<uint32_t> & src, const std::vector<uint32_t> & dst) {
    const size_t n = t->nb[1];  // bytes of a cell

    std::vector<uint8_t> rows(src.size() * n);
    for (size_t i = 0; i < src.size(); ++i) {
        ggml_backend_tensor_get(t, rows.data() + i * n, src[i] * n, n);
    }
    for (size_t i = 0; i < dst.size(); ++i) {
        ggml_backend_tensor_set(t, rows.data() + i * n, dst[i] * n, n);
    }
}
