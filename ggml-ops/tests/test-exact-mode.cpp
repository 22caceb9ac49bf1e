// llama_set_batch_invariant() with a backend beside the CPU, as BLAS or a GPU would be: it must refuse.
//     test-exact-mode MODEL.gguf
// prints a summary; exit code 1 if anything failed.
#include "ggml-backend-impl.h"
#include "llama.h"

#include <cstdio>
#include <cstring>

namespace {

// an accelerator that takes no op: registered, it is a backend of every context
namespace accelerator {

ggml_guid            guid = { 'a', 'c', 'c', 'e', 'l' };
ggml_backend_device  device;
ggml_backend_reg     reg;
const ggml_backend_i backend_api = [] {
    ggml_backend_i api = {};
    api.get_name       = [](ggml_backend_t) {
        return "ACCEL";
    };
    api.free = [](ggml_backend_t backend) {
        delete backend;
    };
    api.graph_compute = [](ggml_backend_t, ggml_cgraph *) {
        return GGML_STATUS_FAILED;
    };
    return api;
}();

void set_up() {
    auto & dev   = device.iface;
    dev.get_name = [](ggml_backend_dev_t) {
        return "ACCEL";
    };
    dev.get_description = [](ggml_backend_dev_t) {
        return "takes no op";
    };
    dev.get_memory = [](ggml_backend_dev_t, size_t * free, size_t * total) {
        *free = *total = 0;
    };
    dev.get_type = [](ggml_backend_dev_t) {
        return GGML_BACKEND_DEVICE_TYPE_ACCEL;
    };
    dev.get_props = [](ggml_backend_dev_t, ggml_backend_dev_props * props) {
        *props      = {};
        props->name = props->description = "ACCEL";
        props->type                      = GGML_BACKEND_DEVICE_TYPE_ACCEL;
    };
    dev.init_backend = [](ggml_backend_dev_t, const char *) {
        return new ggml_backend{ &guid, backend_api, &device, nullptr };
    };
    dev.get_buffer_type = [](ggml_backend_dev_t) {
        return ggml_backend_cpu_buffer_type();
    };
    dev.supports_op = [](ggml_backend_dev_t, const ggml_tensor *) {
        return false;
    };
    dev.supports_buft = [](ggml_backend_dev_t, ggml_backend_buffer_type_t buft) {
        return ggml_backend_buft_is_host(buft);
    };

    reg.api_version    = GGML_BACKEND_API_VERSION;
    reg.iface.get_name = [](ggml_backend_reg_t) {
        return "ACCEL";
    };
    reg.iface.get_device_count = [](ggml_backend_reg_t) -> size_t {
        return 1;
    };
    reg.iface.get_device = [](ggml_backend_reg_t, size_t) {
        return &device;
    };
    device.reg = &reg;
    ggml_backend_register(&reg);
}

}  // namespace accelerator

int n_run = 0, n_failed = 0;

void report(bool ok, const char * what) {
    n_run++;
    if (!ok) {
        n_failed++;
        printf("FAIL %s\n", what);
    }
}

struct loaded {
    llama_model *   model;
    llama_context * ctx;

    explicit loaded(const char * path) {
        model                       = llama_model_load_from_file(path, llama_model_default_params());
        llama_context_params params = llama_context_default_params();
        params.n_ctx                = 64;
        ctx                         = model ? llama_init_from_model(model, params) : nullptr;
        report(ctx != nullptr, "a context can be made");
    }

    ~loaded() {
        llama_free(ctx);
        llama_model_free(model);
    }

    bool decodes() {
        llama_token token = 5;
        return llama_decode(ctx, llama_batch_get_one(&token, 1)) == 0;
    }
};

char last_error[256];

void keep_errors(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        snprintf(last_error, sizeof(last_error), "%s", text);
    }
}

}  // namespace

int main(int argc, char ** argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: test-exact-mode MODEL.gguf\n");
        return 2;
    }
    llama_log_set(keep_errors, nullptr);
    ggml_backend_load_all();
    llama_backend_init();
    {
        loaded alone(argv[1]);
        report(llama_set_batch_invariant(alone.ctx, true), "the CPU alone promises exact mode");
        report(alone.decodes(), "exact mode evaluates");
        report(llama_set_batch_invariant(alone.ctx, false), "exact mode can be left");
    }
    accelerator::set_up();
    {
        loaded both(argv[1]);
        report(!llama_set_batch_invariant(both.ctx, true), "another backend refuses exact mode");
        report(strstr(last_error, "ACCEL") != nullptr, "the log names the backend");
        report(llama_set_batch_invariant(both.ctx, false), "the default mode needs no promise");
        report(both.decodes(), "the context goes on");
    }
    printf("%d checks, %d failed\n", n_run, n_failed);
    return n_failed != 0;
}
