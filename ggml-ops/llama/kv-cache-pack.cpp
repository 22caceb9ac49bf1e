// llama_memory_seq_pack() for the KV cache: see patches/0031-cache-packing.patch.

#include "kv-cache-rows.h"
#include "llama-kv-cache.h"

#include <limits>

bool llama_kv_cache::seq_pack(llama_seq_id seq_id, llama_pos p0) {
    auto & cells = v_cells[0];
    if (seq_id < 0 || seq_id >= LLAMA_MAX_SEQ || other || n_stream > 1 || cells.get_has_shift()) {
        return false;
    }

    const auto & by_pos = cells.seq_pos_get(seq_id);
    const auto   first  = by_pos.lower_bound({ p0, 0 });
    if (first == by_pos.begin()) {
        return false;
    }

    const uint32_t before = std::prev(first)->second;  // the cell of the token before p0
    const auto     seqs   = cells.seq_get_all(before);

    // what is kept: cells, positions and extra info, in order of position
    std::vector<uint32_t>          src;
    std::vector<llama_pos>         pos;
    std::vector<llama_kv_cell_ext> ext;
    for (auto it = first; it != by_pos.end(); ++it) {
        if ((cells.seq_get_all(it->second) & ~seqs).any()) {
            return false;  // another sequence holds this cell as well: it may not move
        }
        src.push_back(it->second);
        pos.push_back(it->first);
        ext.push_back(cells.ext_get(it->second));
    }

    if (synchronize) {
        synchronize();
    }

    for (uint32_t i = cells.used_max_p1(); i-- > 0;) {
        if (!cells.pos_in(i, p0, std::numeric_limits<llama_pos>::max())) {
            continue;
        }
        const auto common = cells.seq_get_all(i) & seqs;
        for (int s = 0; s < LLAMA_MAX_SEQ; ++s) {
            if (common.test(s)) {
                cells.seq_rm(i, s);
            }
        }
    }

    std::vector<uint32_t> dst;
    for (uint32_t next = before + 1; dst.size() < src.size(); ++next) {
        const size_t   k = dst.size();
        const uint32_t i = v_trans ? src[k] : next % cells.size();  // a transposed V has no rows to move
        if (!cells.is_empty(i)) {
            continue;
        }
        cells.pos_set(i, pos[k]);
        cells.ext_set(i, ext[k]);
        for (int s = 0; s < LLAMA_MAX_SEQ; ++s) {
            if (seqs.test(s)) {
                cells.seq_add(i, s);
            }
        }
        dst.push_back(i);
    }
    v_heads[0] = cells.used_max_p1();  // not into the gap, so that the cells of others stay in order as well

    if (src != dst) {
        for (auto & layer : layers) {
            kv_rows_move(layer.k, src, dst);
            if (layer.v) {
                kv_rows_move(layer.v, src, dst);
            }
        }
    }

    return true;
}
