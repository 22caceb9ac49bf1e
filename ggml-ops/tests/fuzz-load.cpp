// Loads mutated GGUF files: each must end in success or in an error of the loader, never in an assertion, a crash, a hang
// or a large allocation.
//     fuzz-load [--count N] [--first I] [--seed S] [--rss-mb M] [--seconds T] [--keep FILE] MODEL.gguf...
// Mutation i changes MODEL i modulo their number, drawn from (S, i): `--first I --count 1 --keep FILE` repeats one and
// leaves the file. A child process works through the mutations; where it dies, the parent says at which one and why, and
// another child goes on after it. Exit code 1 if anything failed.
#include "gguf-mutator.h"
#include "llama.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct options {
    uint64_t                 seed    = 1;
    int64_t                  first   = 0;
    int64_t                  count   = 10000;
    int64_t                  rss_mb  = 1024;  // of the child, at most
    int64_t                  seconds = 60;    // per mutation, at most
    std::string              keep;
    std::vector<std::string> models;
};

// what the child tells the parent, in shared memory
struct progress {
    volatile int64_t at;         // mutation under way
    volatile int64_t loaded;     // models that loaded and ran
    volatile int64_t refused;    // by an error of the loader
    volatile int64_t too_large;  // the mutation after which the process had grown beyond the limit, else -1
    char             what[512];  // the mutation in words
};

// the first error of the log, which the caller of a failing load would see
std::string first_error;

void keep_error(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR && first_error.empty()) {
        first_error = text;
    }
}

void decode_two_tokens(llama_model * model, int64_t i) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 64;
    params.n_batch = params.n_ubatch = 8;
    params.n_threads = params.n_threads_batch = 1;
    params.flash_attn_type                    = i % 2 ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * ctx                       = llama_init_from_model(model, params);
    if (!ctx) {
        return;
    }
    char arch[64] = "";
    llama_model_meta_val_str(model, "general.architecture", arch, sizeof(arch));
    llama_batch  batch = llama_batch_init(2, 0, 1);
    const size_t width = (size_t) llama_model_n_embd_inp(model);
    if (!strcmp(arch, "blockffn-eagle")) {  // reads a hidden state beside each token
        batch.embd = (float *) calloc(2 * width, sizeof(float));
    }
    batch.n_tokens = 2;
    for (int t = 0; t < 2; t++) {
        batch.token[t]     = t;
        batch.pos[t]       = t;
        batch.n_seq_id[t]  = 1;
        batch.seq_id[t][0] = 0;
        batch.logits[t]    = 1;
    }
    if (llama_decode(ctx, batch) == 0) {
        volatile float sum = 0.0f;
        for (int v = 0; v < llama_vocab_n_tokens(llama_model_get_vocab(model)); v++) {
            sum = sum + llama_get_logits_ith(ctx, 1)[v];
        }
    }
    llama_batch_free(batch);
    llama_free(ctx);
}

// true if the file loads; every fourth file runs its experts densely, every second one is mapped
bool load(const std::string & path, int64_t i) {
    llama_model_kv_override dense[2] = {};
    strcpy(dense[0].key, "blockffn.ffn_dense");
    dense[0].tag      = LLAMA_KV_OVERRIDE_TYPE_BOOL;
    dense[0].val_bool = true;

    llama_model_params params = llama_model_default_params();
    params.load_mode          = i / 2 % 2 ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
    params.kv_overrides       = i / 4 % 4 == 0 ? dense : nullptr;
    first_error.clear();
    llama_model * model = llama_model_load_from_file(path.c_str(), params);
    if (!model) {
        return false;
    }
    decode_two_tokens(model, i);
    llama_model_free(model);
    return true;
}

void write_file(const std::string & path, const std::vector<uint8_t> & bytes) {
    FILE *     file = fopen(path.c_str(), "wb");
    const bool ok   = file && fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size();
    if (!file || fclose(file) != 0 || !ok) {
        fprintf(stderr, "fuzz-load: cannot write %s\n", path.c_str());
        _exit(3);
    }
}

int64_t resident_mb() {
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss / 1024;
}

// the child: mutations [state->at, end)
void work(const options & o, const std::vector<gguf_image> & models, const std::string & path, progress * state) {
    llama_log_set(keep_error, nullptr);
    const bool verbose = o.count == 1;
    for (int64_t i = state->at; i < o.first + o.count; i++) {
        gguf_image        image = models[(size_t) i % models.size()];
        gguf_random       random(o.seed * 1000003 + (uint64_t) i);
        const std::string what = o.models[(size_t) i % models.size()] + ": " + gguf_mutate(image, random);
        snprintf(state->what, sizeof(state->what), "%s", what.c_str());
        state->at = i;
        write_file(path, image.serialize());
        const bool loaded = load(path, i);
        if (loaded) {
            state->loaded = state->loaded + 1;
        } else {
            state->refused = state->refused + 1;
        }
        if (verbose) {
            printf("%s\n%s\n", what.c_str(), loaded ? "loaded" : first_error.c_str());
        }
        if (!loaded && first_error.empty()) {
            fprintf(stderr, "fuzz-load: refused without a message\n");
            _exit(4);
        }
        if (resident_mb() > o.rss_mb) {
            state->too_large = i;
            _exit(5);
        }
    }
    fflush(stdout);
    _exit(0);
}

// waits for the child; "" if it finished, else why not
std::string wait_for(pid_t child, const options & o, const progress * state) {
    int64_t at = state->at, ticks = 0;
    int     status = 0;
    while (waitpid(child, &status, WNOHANG) == 0) {
        usleep(20000);
        ticks = state->at == at ? ticks + 1 : 0;
        at    = state->at;
        if (ticks > o.seconds * 50) {
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
            return "no end after " + std::to_string(o.seconds) + " s";
        }
    }
    if (WIFSIGNALED(status)) {
        return std::string("signal ") + std::to_string(WTERMSIG(status)) + " (" + strsignal(WTERMSIG(status)) + ")";
    }
    if (state->too_large >= 0) {
        return "more than " + std::to_string(o.rss_mb) + " MB";
    }
    return WEXITSTATUS(status) == 0 ? "" : "exit code " + std::to_string(WEXITSTATUS(status));
}

int run(const options & o) {
    std::vector<gguf_image> models;
    for (const std::string & path : o.models) {
        models.push_back(gguf_image::read(path));
    }
    char name[] = "/tmp/fuzz-load-XXXXXX";
    if (o.keep.empty()) {
        close(mkstemp(name));
    }
    const std::string path = o.keep.empty() ? name : o.keep;
    void *     block       = mmap(nullptr, sizeof(progress), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    progress * state       = new (block) progress();
    state->at              = o.first;
    state->too_large       = -1;

    int64_t n_failed = 0;
    while (state->at < o.first + o.count) {
        fflush(stdout);
        const pid_t child = fork();
        if (child == 0) {
            work(o, models, path, state);
        }
        const std::string why = wait_for(child, o, state);
        if (why.empty()) {
            break;
        }
        n_failed++;
        printf("FAIL mutation %lld: %s: %s\n", (long long) state->at, why.c_str(), state->what);
        state->too_large = -1;
        state->at        = state->at + 1;
    }
    if (o.keep.empty()) {
        unlink(name);
    }
    printf("%lld mutations: %lld loaded, %lld refused, %lld failed\n", (long long) o.count, (long long) state->loaded,
           (long long) state->refused, (long long) n_failed);
    return n_failed != 0;
}

}  // namespace

int main(int argc, char ** argv) {
    options                                o;
    const std::map<std::string, int64_t *> numbers = {
        { "--first",   &o.first   },
        { "--count",   &o.count   },
        { "--rss-mb",  &o.rss_mb  },
        { "--seconds", &o.seconds }
    };
    for (int i = 1; i < argc; i++) {
        const std::string name = argv[i];
        if (numbers.count(name) && i + 1 < argc) {
            *numbers.at(name) = atoll(argv[++i]);
        } else if (name == "--seed" && i + 1 < argc) {
            o.seed = strtoull(argv[++i], nullptr, 10);
        } else if (name == "--keep" && i + 1 < argc) {
            o.keep = argv[++i];
        } else {
            o.models.push_back(name);
        }
    }
    if (o.models.empty() || o.models[0][0] == '-') {
        fprintf(stderr,
                "usage: fuzz-load [--count N] [--first I] [--seed S] [--rss-mb M] [--seconds T] [--keep FILE] "
                "MODEL.gguf...\n");
        return 2;
    }
    try {
        return run(o);
    } catch (const std::exception & error) {
        fprintf(stderr, "fuzz-load: %s\n", error.what());
        return 2;
    }
}
