// As much of ggml's CPU backend as the programs here take. Memory is kept to the end.

#pragma once

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

using Bytes = std::vector<uint8_t>;
using Floats = std::vector<float>;
using Random = std::mt19937;

inline double uniform(Random & random, double from, double to) {
    return from + (to - from) * (random() / 4294967296.0);
}

inline double normal(Random & random) {
    return std::sqrt(-2 * std::log(1 - uniform(random, 0, 1))) * std::cos(uniform(random, 0, 6.283185307179586));
}

inline Floats normals(int count, int seed, double size = 1) {
    Random random(seed);
    Floats values(count);
    std::generate(values.begin(), values.end(), [&] { return (float) (size * normal(random)); });
    return values;
}

// A type of weights, and where a block of it has its halves.
struct Kind {
    ggml_type type;
    int at, halves;

    const char * name() const { return ggml_type_name(type); }
};

constexpr Kind Q4_0 = {GGML_TYPE_Q4_0, 0, 1}, Q4_1 = {GGML_TYPE_Q4_1, 0, 2}, Q8_0 = {GGML_TYPE_Q8_0, 0, 1},
               Q4_K = {GGML_TYPE_Q4_K, 0, 2}, Q6_K = {GGML_TYPE_Q6_K, 208, 1};

// Random rows of so many values as they are stored, one for each column.
inline Bytes random_weights(const Kind & kind, int width, int columns, int seed) {
    Random random(seed);
    const size_t size = ggml_type_size(kind.type);
    Bytes stored(ggml_row_size(kind.type, width) * columns);
    std::generate(stored.begin(), stored.end(), [&] { return (uint8_t) random(); });
    for (uint8_t * block = stored.data(); block < stored.data() + stored.size(); block += size) {
        for (int i = 0; i < kind.halves; ++i) {
            const ggml_fp16_t scale = ggml_fp32_to_fp16((float) uniform(random, 0.001, 0.01));
            memcpy(block + kind.at + 2 * i, &scale, sizeof scale);
        }
    }
    return stored;
}

struct Ggml {
    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_buffer_type_t plain_memory = ggml_backend_cpu_buffer_type();
    std::map<std::string, ggml_backend_buffer_type_t> repacking;

    Ggml() {
        const ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
        using Give = ggml_backend_buffer_type_t * (*) (ggml_backend_dev_t);
        const auto give = (Give) ggml_backend_reg_get_proc_address(registry, "ggml_backend_dev_get_extra_bufts");
        for (auto type = give(ggml_backend_get_device(backend)); *type != nullptr; ++type) {
            repacking[ggml_backend_buft_name(*type)] = *type;
        }
        threads(2);
    }

    void threads(int count) { ggml_backend_cpu_set_n_threads(backend, count); }

    static ggml_context * context() { return ggml_init({1 << 22, nullptr, true}); }

    // Where weights go that our products read.
    ggml_backend_buffer_type_t laid_out() { return repacking[repacking.count("AMX") ? "AMX" : "CPU_REPACK"]; }

    ggml_tensor * tensor(ggml_type type, std::vector<int64_t> sizes, const void * data,
                         ggml_backend_buffer_type_t where) {
        ggml_context * const own = ggml_init({1 << 12, nullptr, true});
        ggml_tensor * const one = ggml_new_tensor(own, type, (int) sizes.size(), sizes.data());
        GGML_ASSERT(ggml_backend_alloc_ctx_tensors_from_buft(own, where) != nullptr);
        if (where != plain_memory && one->extra == nullptr) {
            return plain(type, std::move(sizes), data);  // nothing repacks it
        }
        ggml_backend_tensor_set(one, data, 0, ggml_nbytes(one));
        return one;
    }

    ggml_tensor * plain(ggml_type type, std::vector<int64_t> sizes, const void * data) {
        return tensor(type, std::move(sizes), data, plain_memory);
    }

    ggml_tensor * weight(const Kind & kind, int width, const Bytes & stored, ggml_backend_buffer_type_t where) {
        const int64_t columns = stored.size() / ggml_row_size(kind.type, width);
        return tensor(kind.type, {width, columns}, stored.data(), where);
    }

    static Floats read(const ggml_tensor * tensor) {
        Floats values((ggml_nbytes(tensor) + 3) / 4);
        ggml_backend_tensor_get(tensor, values.data(), 0, ggml_nbytes(tensor));
        return values;
    }

    ggml_cgraph * graph_of(ggml_context * context, ggml_tensor * result) {
        GGML_ASSERT(ggml_backend_alloc_ctx_tensors_from_buft(context, plain_memory) != nullptr);
        ggml_cgraph * const graph = ggml_new_graph(context);
        ggml_build_forward_expand(graph, result);
        return graph;
    }

    void compute(ggml_cgraph * graph) {
        GGML_ASSERT(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS);
    }

    Floats compute(ggml_context * context, ggml_tensor * result) {
        compute(graph_of(context, result));
        return read(result);
    }

    // values `[rows, width]` -> `[rows, columns]`
    Floats product(ggml_tensor * weight, const float * values, int rows) {
        ggml_context * const own = context();
        return compute(own, ggml_mul_mat(own, weight, plain(GGML_TYPE_F32, {weight->ne[0], rows}, values)));
    }
};
