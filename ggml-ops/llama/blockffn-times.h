#pragma once

// Where the time of a step goes: what every kind of node took on the CPU backend, summed over evaluations. The C API, and
// the collector inside llama_context. Off unless asked for; a node costs some 0.1 us more while it is on.

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// Nodes that share an op and a label, all layers together. label: the weight that the node reads, else the node's own name,
// without the number of the layer.
struct blockffn_node_time {
    char    op[32];
    char    label[64];
    int64_t n_nodes;  // computed since the switch; those that ran fused with the one before are not counted
    double  work_ns;  // mean over the threads, with the barriers inside of the op
    double
        wait_ns;  // mean over the threads, at the barrier behind the node: for other threads, and for the barrier itself
};

// Switch timing on, with all sums at zero, or off, from the next llama_decode on. Returns false, with nothing changed, where
// the CPU backend cannot tell.
LLAMA_API bool blockffn_times_enable(struct llama_context * ctx, bool enable);

// The sums since timing was switched on, in the order of the graph: out[i], i < capacity. Returns how many there are.
LLAMA_API int32_t blockffn_times(struct llama_context * ctx, struct blockffn_node_time * out, int32_t capacity);

#ifdef __cplusplus
}

#    include <cstdint>
#    include <string>
#    include <unordered_map>
#    include <vector>

// Threads sum apart: they meet nobody else's memory while they compute.
class blockffn_times_collector {
  public:
    // a ggml_cpu_node_callback, data: the collector
    static void callback(const ggml_tensor * node, bool waited, int ith, int nth, void * data);

    // of all threads together
    std::vector<blockffn_node_time> sums() const;

  private:
    struct sum {
        std::string op, label;
        int64_t     n_nodes = 0;
        int64_t     work_ns = 0;
        int64_t     wait_ns = 0;
    };

    // a place in the graph and the sum that its node went to when it was last computed
    struct place {
        std::string name, weight;
        int         op = -1;
        size_t      to = 0;
    };

    struct alignas(64) thread_sums {
        int64_t                                 since = 0;  // when the last node or barrier ended
        size_t                                  at    = 0;  // place of the next node
        std::vector<place>                      places;
        std::vector<sum>                        sums;
        std::unordered_map<std::string, size_t> index;  // of sums, by op and label

        sum & find(const ggml_tensor * node);
    };

    static constexpr int MAX_THREADS = 512;  // as ggml has them

    thread_sums threads[MAX_THREADS];
};
#endif
