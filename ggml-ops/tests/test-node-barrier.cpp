// Tests of the barrier between two nodes: nobody passes before all have come, also when the others sleep already, when there
// are more threads than cores, when two threads of a program compute at once, and when a backend keeps its threads from graph
// to graph. Exit code 1 if anything failed.
#include "test-ops.h"

#include <atomic>
#include <chrono>
#include <thread>

namespace {

constexpr int N_NODES = 200;

// what the threads of one graph have seen
struct watch {
    int              slow;             // a thread that comes late comes every so many nodes; 0: never
    std::atomic<int> n_computed{ 0 };  // by all threads
    std::atomic<int> n_early{ 0 };     // barriers that were passed too early
    std::atomic<int> n_passed{ 0 };
    std::vector<int> n_done;           // by each thread

    watch(int n_threads, int slow) : slow(slow), n_done(n_threads, 0) {}
};

void look(const ggml_tensor * node, bool waited, int ith, int nth, void * data) {
    watch & w = *(watch *) data;
    if (!node) {
        return;
    }
    if (waited) {
        w.n_passed++;
        w.n_early += w.n_computed < w.n_done[ith] * nth;
        return;
    }
    const int n = ++w.n_done[ith];
    if (w.slow && (n * 7 + ith * 3) % w.slow == 0) {
        std::this_thread::sleep_for(std::chrono::microseconds(n % 2 ? 20 : 300));  // the others spin, or sleep
    }
    w.n_computed++;
}

ggml_backend_t new_backend() {
    return ggml_backend_dev_init(cpu_device(), nullptr);
}

// Adds and subtracts in turn, each in a node of its own; false if a barrier failed or the values are wrong.
bool holds(ggml_backend_t backend, int n_threads, int slow) {
    ctx_ptr       ctx   = make_ctx(N_NODES + 8);
    ggml_tensor * input = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 64, 32);
    ggml_tensor * out   = input;
    for (int i = 0; i < N_NODES; i++) {
        out = i % 2 ? ggml_sub(ctx.get(), out, input) : ggml_add(ctx.get(), out, input);
    }
    ggml_cgraph * graph = ggml_new_graph_custom(ctx.get(), N_NODES + 8, false);
    ggml_build_forward_expand(graph, out);
    ggml_backend_buffer_t    buffer = ggml_backend_alloc_ctx_tensors(ctx.get(), backend);
    const std::vector<float> values(ggml_nelements(input), 3.0f);
    ggml_backend_tensor_set(input, values.data(), 0, ggml_nbytes(input));

    watch w(n_threads, slow);
    set_n_threads(backend, n_threads);
    CPU_FUNCTION(ggml_backend_cpu_set_node_callback)(backend, look, &w);
    const bool         ok = ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS;
    std::vector<float> found(values.size());
    ggml_backend_tensor_get(out, found.data(), 0, ggml_nbytes(out));
    ggml_backend_buffer_free(buffer);
    return ok && found == values && w.n_early == 0 && w.n_passed == n_threads * (N_NODES - 1);
}

}  // namespace

int main() {
    std::atomic<int> n_run{ 0 }, n_failed{ 0 };
    const auto       check = [&](ggml_backend_t backend, int n_threads, int slow) {
        n_run++;
        if (!holds(backend, n_threads, slow)) {
            n_failed++;
            printf("FAIL threads=%d slow=%d\n", n_threads, slow);
        }
    };
    const auto alone = [&](int n_threads, int slow) {
        ggml_backend_t backend = new_backend();
        check(backend, n_threads, slow);
        ggml_backend_free(backend);
    };
    for (int n_threads : { 1, 2, 3, 8 }) {
        for (int slow : { 0, 1, 5, 50 }) {
            alone(n_threads, slow);
            std::thread other(alone, n_threads, slow);
            alone(n_threads, slow);
            other.join();
        }
    }
    ggml_backend_t kept = new_backend();  // graph after graph, with more threads and with fewer
    for (int n_threads : { 2, 4, 1, 3, 8, 2, 5 }) {
        check(kept, n_threads, 50);
        check(kept, n_threads, 0);
    }
    ggml_backend_free(kept);
    printf("%d checks, %d failed\n", n_run.load(), n_failed.load());
    return n_failed > 0;
}
