// See gguf-mutator.h.
#include "gguf-mutator.h"

#include "ggml.h"
#include "gguf.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <stdexcept>

//
// reading and writing
//

namespace {

constexpr size_t   ALIGNMENT = 32;
constexpr uint64_t MOST_DATA = 1 << 20;  // bytes that a tensor gets; what claims more is incomplete

size_t item_size(uint32_t type) {
    switch (type) {
        case GGUF_TYPE_UINT8:
        case GGUF_TYPE_INT8:
        case GGUF_TYPE_BOOL:
            return 1;
        case GGUF_TYPE_UINT16:
        case GGUF_TYPE_INT16:
            return 2;
        case GGUF_TYPE_UINT64:
        case GGUF_TYPE_INT64:
        case GGUF_TYPE_FLOAT64:
            return 8;
        default:
            return 4;
    }
}

struct reader {
    const std::vector<uint8_t> & from;
    size_t                       at = 0;

    void raw(void * to, size_t n) {
        if (n > from.size() - at) {
            throw std::runtime_error("the file ends too early");
        }
        if (n > 0) {
            memcpy(to, from.data() + at, n);
        }
        at += n;
    }

    template <typename T> T number() {
        T value;
        raw(&value, sizeof(value));
        return value;
    }

    std::string string() {
        std::string text(number<uint64_t>(), '\0');
        raw(&text[0], text.size());
        return text;
    }
};

struct writer {
    std::vector<uint8_t> to;

    void raw(const void * from, size_t n) { to.insert(to.end(), (const uint8_t *) from, (const uint8_t *) from + n); }

    template <typename T> void number(T value) { raw(&value, sizeof(value)); }

    void string(const std::string & text) {
        number<uint64_t>(text.size());
        raw(text.data(), text.size());
    }

    void pad() { to.resize(GGML_PAD(to.size(), ALIGNMENT)); }
};

gguf_value read_value(reader & r) {
    gguf_value value;
    value.type     = r.number<uint32_t>();
    value.is_array = value.type == GGUF_TYPE_ARRAY;
    if (value.is_array) {
        value.type  = r.number<uint32_t>();
        value.count = r.number<uint64_t>();
    }
    if (value.type == GGUF_TYPE_STRING) {
        for (uint64_t i = 0; i < value.count; i++) {
            value.strings.push_back(r.string());
        }
    } else {
        value.bytes.resize(value.count * item_size(value.type));
        r.raw(value.bytes.data(), value.bytes.size());
    }
    return value;
}

// bytes of a tensor; 0 for what no file can hold
uint64_t entry_size(const gguf_entry & t) {
    if (t.type >= GGML_TYPE_COUNT || ggml_blck_size((ggml_type) t.type) == 0) {
        return 0;
    }
    double   n    = (double) ggml_type_size((ggml_type) t.type) / (double) ggml_blck_size((ggml_type) t.type);
    uint64_t size = ggml_type_size((ggml_type) t.type);
    for (size_t i = 0; i < t.ne.size(); i++) {
        n *= (double) t.ne[i];
        size *= i == 0 ? t.ne[i] / ggml_blck_size((ggml_type) t.type) : t.ne[i];
    }
    return n < 1e15 ? size : 0;
}

void put_pair(writer & w, const gguf_pair & pair) {
    const gguf_value & value = pair.value;
    w.string(pair.key);
    if (value.is_array) {
        w.number<uint32_t>(GGUF_TYPE_ARRAY);
        w.number(value.type);
        w.number(value.count);
    } else {
        w.number(value.type);
    }
    for (const std::string & text : value.strings) {
        w.string(text);
    }
    w.raw(value.bytes.data(), value.bytes.size());
}

}  // namespace

uint64_t gguf_value::n_items() const {
    return type == GGUF_TYPE_STRING ? strings.size() : bytes.size() / item_size(type);
}

gguf_image gguf_image::read(const std::string & path) {
    FILE * file = fopen(path.c_str(), "rb");
    if (!file) {
        throw std::runtime_error("cannot open " + path);
    }
    std::vector<uint8_t> bytes;
    for (uint8_t block[65536]; const size_t n = fread(block, 1, sizeof(block), file);) {
        bytes.insert(bytes.end(), block, block + n);
    }
    fclose(file);

    reader     r = { bytes };
    gguf_image image;
    r.number<uint32_t>();  // magic
    image.version            = r.number<uint32_t>();
    const uint64_t n_tensors = r.number<uint64_t>();
    const uint64_t n_pairs   = r.number<uint64_t>();
    for (uint64_t i = 0; i < n_pairs; i++) {
        gguf_pair pair;
        pair.key   = r.string();
        pair.value = read_value(r);
        image.pairs.push_back(pair);
    }
    std::vector<uint64_t> offsets;
    for (uint64_t i = 0; i < n_tensors; i++) {
        gguf_entry t;
        t.name = r.string();
        t.ne.resize(r.number<uint32_t>());
        for (uint64_t & n : t.ne) {
            n = r.number<uint64_t>();
        }
        t.type = r.number<uint32_t>();
        offsets.push_back(r.number<uint64_t>());
        image.tensors.push_back(t);
    }
    const size_t start = GGML_PAD(r.at, ALIGNMENT);
    for (uint64_t i = 0; i < n_tensors; i++) {
        r.at = start + offsets[i];
        image.tensors[i].data.resize(entry_size(image.tensors[i]));
        r.raw(image.tensors[i].data.data(), image.tensors[i].data.size());
    }
    return image;
}

std::vector<uint8_t> gguf_image::serialize() const {
    writer w;
    w.raw(GGUF_MAGIC, 4);
    w.number(version);
    w.number<uint64_t>(tensors.size() + tensors_error);
    w.number<uint64_t>(pairs.size() + pairs_error);
    for (const gguf_pair & pair : pairs) {
        put_pair(w, pair);
    }
    uint64_t offset = 0;
    for (const gguf_entry & t : tensors) {
        w.string(t.name);
        w.number<uint32_t>((uint32_t) t.ne.size());
        for (uint64_t n : t.ne) {
            w.number(n);
        }
        w.number(t.type);
        w.number<uint64_t>(offset + t.offset_error);
        offset += GGML_PAD(entry_size(t), ALIGNMENT);
    }
    w.pad();
    for (const gguf_entry & t : tensors) {
        const uint64_t size = std::min(entry_size(t), MOST_DATA);
        for (uint64_t i = 0; i < size;) {  // its own bytes, again and again where it has grown
            const uint64_t n = std::min<uint64_t>(size - i, t.data.size());
            if (n == 0) {
                w.to.resize(w.to.size() + size - i);
                break;
            }
            w.raw(t.data.data(), n);
            i += n;
        }
        w.pad();
    }
    if (cut >= 0 && (uint64_t) cut < w.to.size()) {
        w.to.resize(cut);
    }
    return w.to;
}

//
// mutations: each returns what it did, or nothing where it does not apply
//

namespace {

std::string short_text(const std::string & text) {
    std::string shown;
    for (const char c : text.substr(0, 24)) {
        shown += c >= ' ' && c <= '~' ? c : '?';
    }
    return "'" + shown + (text.size() > 24 ? "...' (" + std::to_string(text.size()) + " bytes)" : "'");
}

uint64_t odd_integer(uint64_t now, gguf_random & random) {
    const uint64_t odd[] = { 0,          1,       2,          3,          5,       7,          31,
                             33,         64,      127,        255,        256,     511,        512,
                             513,        1024,    1025,       65535,      65536,   0x7fffffff, 0x80000000,
                             0xffffffff, 1 << 20, 0x40000001, now + 1,    now - 1, now * 2,    now / 2,
                             now + 2,    now * 3, ~0ull,      1ull << 63, 1000003, 1ull << 32 };
    return odd[random.below(sizeof(odd) / sizeof(odd[0]))];
}

double odd_number(double now, gguf_random & random) {
    const double odd[] = { 0.0,
                           -0.0,
                           1.0,
                           -1.0,
                           1e-30,
                           1e30,
                           -1e30,
                           3.4e38,
                           std::numeric_limits<double>::quiet_NaN(),
                           1e-5,
                           2.0,
                           -now,
                           now * 2,
                           0.5,
                           1e-45,
                           1e300,
                           std::numeric_limits<double>::infinity(),
                           -std::numeric_limits<double>::infinity() };
    return odd[random.below(sizeof(odd) / sizeof(odd[0]))];
}

std::string odd_string(const gguf_image & image, const std::string & now, gguf_random & random) {
    switch (random.below(8)) {
        case 0:
            return "";
        case 1:
            return std::string(1, '\0') + now;
        case 2:
            return std::string(1 + random.below(3000), 'x');
        case 3:
            return "\xff\xfe\xe2\x82" + now;
        case 4:
            return now + " ";
        case 5:
            {
                const char * known[] = { "none",
                                         "linear",
                                         "yarn",
                                         "longrope",
                                         "rms",
                                         "sum",
                                         "normal",
                                         "silu",
                                         "relu",
                                         "gelu",
                                         "dense",
                                         "expert",
                                         "base",
                                         "norm_silu",
                                         "llama",
                                         "gpt2",
                                         "t5",
                                         "default",
                                         "norm_silu_norms",
                                         "\n",
                                         "relu_squared",
                                         "no_vocab",
                                         "norm_silu_nomean" };
                return known[random.below(sizeof(known) / sizeof(known[0]))];
            }
        case 6:
            {
                std::string other = now;
                if (!other.empty()) {
                    other[random.below(other.size())] = (char) random.below(256);
                }
                return other;
            }
        default:
            {
                // any string of the file, but no architecture that is not ours
                const gguf_value & value = image.pairs[random.below(image.pairs.size())].value;
                return value.strings.empty() ? now.substr(0, now.size() / 2) :
                                               value.strings[random.below(value.strings.size())];
            }
    }
}

void set_item(gguf_value & value, size_t i, uint64_t integer, double number) {
    uint8_t * at = value.bytes.data() + i * item_size(value.type);
    if (value.type == GGUF_TYPE_FLOAT32) {
        const float f = (float) number;
        memcpy(at, &f, sizeof(f));
    } else if (value.type == GGUF_TYPE_FLOAT64) {
        memcpy(at, &number, sizeof(number));
    } else {
        memcpy(at, &integer, item_size(value.type));
    }
}

uint64_t get_item(const gguf_value & value, size_t i) {
    uint64_t item = 0;
    memcpy(&item, value.bytes.data() + i * item_size(value.type), item_size(value.type));
    return item;
}

std::string change_item(gguf_image & image, gguf_random & random) {
    gguf_pair &    pair = random.pick(image.pairs);
    gguf_value &   v    = pair.value;
    const uint64_t n    = v.n_items();
    if (n == 0) {
        return "";
    }
    const uint64_t i = random.below(n);
    if (v.type == GGUF_TYPE_STRING) {
        v.strings[i] = odd_string(image, v.strings[i], random);
        return pair.key + "[" + std::to_string(i) + "] = " + short_text(v.strings[i]);
    }
    if (v.type == GGUF_TYPE_FLOAT32 || v.type == GGUF_TYPE_FLOAT64) {
        float now = 0.0f;
        memcpy(&now, v.bytes.data() + i * item_size(v.type), sizeof(now));
        const double number = odd_number(now, random);
        set_item(v, i, 0, number);
        return pair.key + "[" + std::to_string(i) + "] = " + std::to_string(number);
    }
    const uint64_t integer = odd_integer(get_item(v, i), random);
    set_item(v, i, integer, 0.0);
    return pair.key + "[" + std::to_string(i) + "] = " + std::to_string(get_item(v, i));
}

std::string change_type(gguf_image & image, gguf_random & random) {
    gguf_pair &  pair = random.pick(image.pairs);
    gguf_value & v    = pair.value;
    if (v.n_items() == 0 || v.n_items() > 600) {
        return "";
    }
    const uint64_t integer = v.type == GGUF_TYPE_STRING ? 1 : get_item(v, 0);
    const uint64_t n       = v.n_items();
    v.type                 = (uint32_t) random.below(GGUF_TYPE_COUNT + 1);
    v.strings.clear();
    v.bytes.clear();
    if (v.type == GGUF_TYPE_STRING) {
        v.strings.assign(n, std::to_string(integer));
    } else {
        v.bytes.resize(n * item_size(v.type));
        for (uint64_t i = 0; i < n; i++) {
            set_item(v, i, integer, (double) integer);
        }
    }
    return pair.key + " has type " + std::to_string(v.type);
}

// an array becomes its first item, an item an array of some
std::string change_length(gguf_image & image, gguf_random & random) {
    gguf_pair &    pair = random.pick(image.pairs);
    gguf_value &   v    = pair.value;
    const uint64_t now  = v.n_items();
    if (now == 0) {
        return "";
    }
    const uint64_t lengths[] = { 0, 1, 2, 3, now - 1, now + 1, 512, 513 };
    const uint64_t n         = v.is_array && random.one_in(4) ? 1 : lengths[random.below(8)];
    const bool     to_item   = v.is_array && n == 1 && random.one_in(2);
    const size_t   size      = item_size(v.type);
    while (v.type != GGUF_TYPE_STRING && v.bytes.size() < n * size) {
        v.bytes.push_back(v.bytes[v.bytes.size() - now * size]);
    }
    v.strings.resize(v.type == GGUF_TYPE_STRING ? n : 0, v.strings.empty() ? "" : v.strings[0]);
    v.bytes.resize(v.type == GGUF_TYPE_STRING ? 0 : n * size);
    v.is_array = !to_item;
    v.count    = n;
    return pair.key + (to_item ? " is no array" : " is an array of " + std::to_string(n));
}

std::string change_count(gguf_image & image, gguf_random & random) {
    gguf_pair & pair = random.pick(image.pairs);
    if (!pair.value.is_array) {
        return "";
    }
    pair.value.count = odd_integer(pair.value.count, random);
    return pair.key + " claims " + std::to_string(pair.value.count) + " items";
}

std::string change_keys(gguf_image & image, gguf_random & random) {
    const size_t      i   = random.below(image.pairs.size());
    const std::string key = image.pairs[i].key;
    switch (random.below(4)) {
        case 0:
            image.pairs.erase(image.pairs.begin() + (long) i);
            return "no " + key;
        case 1:
            image.pairs.push_back(image.pairs[i]);
            return key + " twice";
        case 2:
            image.pairs[i].key = odd_string(image, key, random);
            return key + " is called " + short_text(image.pairs[i].key);
        default:
            {
                const size_t j = random.below(image.pairs.size());
                std::swap(image.pairs[i].value, image.pairs[j].value);
                return key + " and " + image.pairs[j].key + " have changed places";
            }
    }
}

// keys that upstream reads for every architecture and our files do not have
std::string add_key(gguf_image & image, gguf_random & random) {
    const char * names[] = { "embedding_length_out",
                             "attention.causal",
                             "pooling_type",
                             "nextn_predict_layers",
                             "expert_group_count",
                             "expert_group_used_count",
                             "rope.scale_linear",
                             "attention.key_length_swa",
                             "rope.scaling.attn_factor",
                             "rope.scaling.original_context_length",
                             "attention.key_length_mla",
                             "rope.scaling.factor",
                             "attention.value_length_mla",
                             "expert_count",
                             "expert_used_count",
                             "rope.scaling.yarn_log_multiplier",
                             "ffn_dense",
                             "rope.scaling.dynamic_factor",
                             "vocab_size",
                             "draft_tokens",
                             "expert_shared_feed_forward_length",
                             "tensor_extra.name",
                             "classifier.output_labels" };
    std::string  prefix  = "blockffn.";
    for (const gguf_pair & pair : image.pairs) {
        prefix = pair.key == "blockffn-eagle.block_count" ? "blockffn-eagle." : prefix;
    }
    gguf_pair pair;
    pair.key               = prefix + names[random.below(sizeof(names) / sizeof(names[0]))];
    const uint32_t types[] = { GGUF_TYPE_UINT32, GGUF_TYPE_UINT32, GGUF_TYPE_BOOL, GGUF_TYPE_FLOAT32, GGUF_TYPE_INT32 };
    pair.value.type        = types[random.below(5)];
    pair.value.bytes.resize(item_size(pair.value.type));
    const uint64_t integer = odd_integer(1, random);
    set_item(pair.value, 0, integer, odd_number(1.0, random));
    image.pairs.push_back(pair);
    return pair.key + " added, type " + std::to_string(pair.value.type) + ", " + std::to_string(integer);
}

std::string change_shape(gguf_image & image, gguf_random & random) {
    gguf_entry & t = random.pick(image.tensors);
    if (t.ne.empty()) {
        return "";
    }
    switch (random.below(4)) {
        case 0:
            t.ne.push_back(1 + random.below(3));
            return t.name + " has " + std::to_string(t.ne.size()) + " dimensions";
        case 1:
            t.ne.pop_back();
            return t.name + " has " + std::to_string(t.ne.size()) + " dimensions";
        case 2:
            std::swap(t.ne.front(), t.ne.back());
            return t.name + " is transposed";
        default:
            {
                uint64_t & n = random.pick(t.ne);
                n            = odd_integer(n, random);
                return t.name + " has a dimension of " + std::to_string(n);
            }
    }
}

// one length of the model, in every tensor and every key that has it
std::string change_length_everywhere(gguf_image & image, gguf_random & random) {
    const gguf_entry & t = random.pick(image.tensors);
    if (t.ne.empty()) {
        return "";
    }
    const uint64_t now       = t.ne[random.below(t.ne.size())];
    const uint64_t lengths[] = { 0, 1, 2, 3, 5, 16, 32, 33, 48, 64, 96, 256, now + 1, now - 1 };
    const uint64_t n         = lengths[random.below(sizeof(lengths) / sizeof(lengths[0]))];
    for (gguf_entry & other : image.tensors) {
        std::replace(other.ne.begin(), other.ne.end(), now, n);
    }
    const bool keys = !random.one_in(4);
    for (gguf_pair & pair : image.pairs) {
        if (keys && pair.value.type == GGUF_TYPE_UINT32 && !pair.value.is_array && get_item(pair.value, 0) == now) {
            set_item(pair.value, 0, n, 0.0);
        }
    }
    return std::to_string(now) + " is " + std::to_string(n) + (keys ? " everywhere" : " in every tensor");
}

std::string change_tensor_type(gguf_image & image, gguf_random & random) {
    gguf_entry & t = random.pick(image.tensors);
    t.type = random.one_in(8) ? (uint32_t) odd_integer(t.type, random) : (uint32_t) random.below(GGML_TYPE_COUNT);
    return t.name + " has type " + std::to_string(t.type);
}

std::string change_tensor_types(gguf_image & image, gguf_random & random) {
    const bool     vectors = random.one_in(2);
    const uint32_t type    = (uint32_t) random.below(GGML_TYPE_COUNT);
    for (gguf_entry & t : image.tensors) {
        const uint64_t block = ggml_blck_size((ggml_type) type);
        if ((t.ne.size() == 1) == vectors && block > 0 && t.ne[0] % block == 0) {
            t.type = type;
        }
    }
    return std::string(vectors ? "vectors" : "matrices") + " have type " + std::to_string(type);
}

std::string change_tensors(gguf_image & image, gguf_random & random) {
    const size_t      i    = random.below(image.tensors.size());
    const std::string name = image.tensors[i].name;
    switch (random.below(6)) {
        case 0:
            image.tensors.erase(image.tensors.begin() + (long) i);
            return "no " + name;
        case 1:
            image.tensors.push_back(image.tensors[i]);
            return name + " twice";
        case 2:
            image.tensors[i].name = odd_string(image, name, random);
            return name + " is called " + short_text(image.tensors[i].name);
        case 3:
            {
                const size_t j = random.below(image.tensors.size());
                std::swap(image.tensors[i].name, image.tensors[j].name);
                return name + " and " + image.tensors[j].name + " have changed names";
            }
        case 4:
            {
                const char * suffixes[] = { ".bias", ".scale", ".input_scale" };
                gguf_entry   t          = image.tensors[i];
                t.name                  = name.substr(0, name.rfind('.')) + suffixes[random.below(3)];
                t.ne                    = { random.one_in(2) ? 1 : t.ne.empty() ? 1 : t.ne.back() };
                t.type                  = random.one_in(2) ? (uint32_t) GGML_TYPE_F32 : (uint32_t) GGML_TYPE_F16;
                image.tensors.push_back(t);
                return t.name + " added";
            }
        default:
            image.tensors[i].offset_error = (int64_t) odd_integer(0, random);
            return name + " lies " + std::to_string(image.tensors[i].offset_error) + " bytes off";
    }
}

std::string change_header(gguf_image & image, gguf_random & random) {
    switch (random.below(4)) {
        case 0:
            image.version = (uint32_t) odd_integer(image.version, random);
            return "version " + std::to_string(image.version);
        case 1:
            image.pairs_error = (int64_t) odd_integer(0, random);
            return std::to_string(image.pairs_error) + " keys more";
        case 2:
            image.tensors_error = (int64_t) odd_integer(0, random);
            return std::to_string(image.tensors_error) + " tensors more";
        default:
            image.cut = (int64_t) random.below(image.serialize().size());
            return "cut after " + std::to_string(image.cut) + " bytes";
    }
}

}  // namespace

std::string gguf_mutate(gguf_image & image, gguf_random & random) {
    typedef std::string (*mutation)(gguf_image &, gguf_random &);
    const mutation kinds[] = { change_item,
                               change_item,
                               change_item,
                               change_item,
                               change_type,
                               change_keys,
                               add_key,
                               change_length,
                               change_count,
                               change_shape,
                               change_shape,
                               change_header,
                               change_tensor_type,
                               change_tensor_types,
                               change_tensors,
                               change_length_everywhere,
                               change_length_everywhere };
    const uint64_t n       = 1 + (random.one_in(3) ? random.below(3) : 0);
    std::string    done;
    for (uint64_t i = 0; i < n;) {
        if (image.pairs.empty() || image.tensors.empty()) {
            break;
        }
        const std::string what = kinds[random.below(sizeof(kinds) / sizeof(kinds[0]))](image, random);
        if (!what.empty()) {
            done += (i++ ? "; " : "") + what;
        }
    }
    return done;
}
