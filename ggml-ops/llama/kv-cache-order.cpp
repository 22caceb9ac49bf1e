// Cells of a sequence in the order of its positions: see patches/0035-cache-order.patch.

#include "kv-cache-rows.h"
#include "llama-context.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <array>

// Each token gets the first empty cell behind those of its sequences. A cell that a sliding window hides is not taken:
// a rejected draft, or another text with the same beginning, may need it again.
llama_kv_cache::slot_info llama_kv_cache::find_slot_in_order(const llama_ubatch & ubatch) const {
    const uint32_t n_streams = n_stream > 1 ? ubatch.n_seqs_unq : 1;
    const uint32_t n_tokens  = ubatch.n_tokens / n_streams;

    std::array<uint32_t, LLAMA_MAX_SEQ> next;  // the cell behind the last one of a sequence
    for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
        const llama_seq_id seq_id = ubatch.seq_id_unq[s];
        const auto &       by_pos = v_cells[seq_to_stream[seq_id]].seq_pos_get(seq_id);
        next[seq_id]              = by_pos.empty() ? 0 : by_pos.rbegin()->second + 1;
    }

    slot_info res = { LLAMA_MAX_SEQ, 0, {}, {} };
    res.resize(n_streams);
    for (uint32_t s = 0; s < n_streams; ++s) {
        res.strm[s] = seq_to_stream[ubatch.seq_id_unq[s]];
        res.s0      = std::min<uint32_t>(res.s0, res.strm[s]);
        res.s1      = std::max<uint32_t>(res.s1, res.strm[s]);

        const auto &      cells = v_cells[res.strm[s]];
        std::vector<bool> taken(cells.size());
        for (uint32_t i = s * n_tokens; i < (s + 1) * n_tokens; ++i) {
            uint32_t idx = 0;
            for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
                idx = std::max(idx, next[ubatch.seq_id[i][j]]);
            }
            while (idx < cells.size() && (taken[idx] || !cells.is_empty(idx))) {
                ++idx;
            }
            if (idx == cells.size()) {
                return {};
            }
            taken[idx] = true;
            for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
                next[ubatch.seq_id[i][j]] = idx + 1;
            }
            res.idxs[s].push_back(idx);
        }
    }
    return res;
}

// Called where find_slot_in_order() found no place, though cells may be empty before those of a sequence.
bool llama_kv_cache::close_gaps(llama_context * lctx) {
    // rows that another cache keeps for the same cells could not follow
    if (v_cells_impl.use_count() > 1 || get_has_shift()) {
        return false;
    }

    bool moved = false;
    for (uint32_t s = 0; s < n_stream; ++s) {
        auto & cells = v_cells[s];

        std::vector<uint32_t> src, dst;
        for (uint32_t i = 0, n = 0; i < cells.used_max_p1(); ++i) {
            if (!cells.is_empty(i)) {
                if (i != n) {
                    src.push_back(i);
                    dst.push_back(n);
                }
                ++n;
            }
        }
        if (src.empty()) {
            continue;
        }

        const llama_kv_cells state = cells.cp(src);
        for (uint32_t i : src) {
            cells.rm(i);
        }
        cells.set(dst, state);
        v_heads[s] = cells.used_max_p1();

        lctx->synchronize();  // an evaluation may still write
        for (auto & layer : layers) {
            kv_rows_move(layer.k_stream[s], src, dst);
            if (layer.v) {
                kv_rows_move(layer.v_stream[s], src, dst);
            }
        }
        moved = true;
    }
    return moved;
}
