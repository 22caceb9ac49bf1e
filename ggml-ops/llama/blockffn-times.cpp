#include "blockffn-times.h"

#include "ggml-cpu.h"
#include "ggml.h"
#include "llama-context.h"

#include <algorithm>
#include <chrono>
#include <cstring>

static int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// the weight that a node multiplies by, "" where it reads none
static const char * weight_of(const ggml_tensor * node) {
    const ggml_tensor * w = node->src[0];
    return w && w->op == GGML_OP_NONE && strstr(w->name, ".weight") ? w->name : "";
}

// "blk.12.attn_q_a.weight" -> "attn_q_a.weight", "ffn_inp-12" -> "ffn_inp", "q-12 (view)" -> "q", "node_77" -> ""
static std::string without_layer(std::string name) {
    if (name.rfind("blk.", 0) == 0) {
        const size_t dot = name.find('.', 4);
        return dot == std::string::npos ? name : name.substr(dot + 1);
    }
    if (name.rfind("node_", 0) == 0) {  // as ggml calls those that nobody named
        return "";
    }
    name              = name.substr(0, name.find(" ("));
    const size_t dash = name.rfind('-');
    if (dash != std::string::npos && dash + 1 < name.size() &&
        name.find_first_not_of("0123456789", dash + 1) == std::string::npos) {
        name.resize(dash);
    }
    return name;
}

blockffn_times_collector::sum & blockffn_times_collector::thread_sums::find(const ggml_tensor * node) {
    if (at == places.size()) {
        places.emplace_back();
    }
    place &      p      = places[at++];
    const char * weight = weight_of(node);
    if (p.op != (int) node->op || p.name != node->name || p.weight != weight) {
        const std::string label = without_layer(*weight ? weight : node->name);
        const std::string op    = ggml_op_desc(node);
        const auto        found = index.emplace(op + '\n' + label, sums.size());
        if (found.second) {
            sums.push_back({ op, label });
        }
        p = { node->name, weight, (int) node->op, found.first->second };
    }
    return sums[p.to];
}

void blockffn_times_collector::callback(const ggml_tensor * node, bool waited, int ith, int nth, void * data) {
    if (ith >= MAX_THREADS) {
        return;
    }
    thread_sums & t   = static_cast<blockffn_times_collector *>(data)->threads[ith];
    const int64_t now = now_ns();
    if (!node) {
        t.at = 0;
    } else if (waited) {
        t.sums[t.places[t.at - 1].to].wait_ns += now - t.since;
    } else {
        sum & s = t.find(node);
        s.n_nodes += 1;
        s.work_ns += now - t.since;
    }
    t.since = node ? now : now_ns();
    GGML_UNUSED(nth);
}

std::vector<blockffn_node_time> blockffn_times_collector::sums() const {
    std::vector<blockffn_node_time> found;
    const double                    n_threads =
        std::count_if(std::begin(threads), std::end(threads), [](const thread_sums & t) { return !t.sums.empty(); });
    for (const sum & first : threads[0].sums) {
        blockffn_node_time total = {};
        first.op.copy(total.op, sizeof(total.op) - 1);
        first.label.copy(total.label, sizeof(total.label) - 1);
        total.n_nodes = first.n_nodes;
        for (const thread_sums & t : threads) {
            const auto same = t.index.find(first.op + '\n' + first.label);
            if (same != t.index.end()) {
                total.work_ns += t.sums[same->second].work_ns / n_threads;
                total.wait_ns += t.sums[same->second].wait_ns / n_threads;
            }
        }
        found.push_back(total);
    }
    return found;
}

//
// C API
//

bool blockffn_times_enable(llama_context * ctx, bool enable) {
    ctx->synchronize();
    return ctx->set_node_times(enable);
}

int32_t blockffn_times(llama_context * ctx, blockffn_node_time * out, int32_t capacity) {
    ctx->synchronize();
    if (!ctx->get_node_times()) {
        return 0;
    }
    const auto sums = ctx->get_node_times()->sums();
    std::copy_n(sums.begin(), std::min<size_t>(sums.size(), std::max(capacity, 0)), out);
    return (int32_t) sums.size();
}

bool llama_context::set_node_times(bool value) {
    auto * reg    = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend_cpu));
    auto * set_fn = (decltype(ggml_backend_cpu_set_node_callback) *) ggml_backend_reg_get_proc_address(
        reg, "ggml_backend_cpu_set_node_callback");
    if (!set_fn) {
        return !value;
    }
    if (value) {
        node_times = std::make_unique<blockffn_times_collector>();
    }
    set_fn(backend_cpu, value ? blockffn_times_collector::callback : nullptr, value ? node_times.get() : nullptr);
    return true;
}
