// Products with weights that are laid out for them. A stage is those of the same activations with several weights in
// one go: what graph.cpp makes of llama.cpp's nodes.

#pragma once

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include <atomic>

#if defined(__GNUC__) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define EDGE_PRODUCTS 1
#else
#define EDGE_PRODUCTS 0
#endif

#if EDGE_PRODUCTS && defined(__AMX_INT8__) && defined(__AVX512VNNI__)
#define EDGE_AMX 1
#else
#define EDGE_AMX 0
#endif

namespace edge {

// A product, and what becomes of it before it is stored in `result`.
struct Product {
    const ggml_tensor * weight;
    ggml_tensor * result;
    const ggml_tensor * plus = nullptr;  // is added: a row for each, or one for all
    bool gated = false;                  // multiplies silu of what `result` holds
    size_t at = 0;                       // where, in the work, its rounded activations lie
};

struct Stage {
    static constexpr int MOST = 4;

    const ggml_tensor * input = nullptr;
    const ggml_tensor * norm = nullptr;  // weights of the RMS norm that comes first, if one does
    float eps = 0;
    int rows = 0;
    int count = 0;
    Product products[MOST];
    bool side_by_side = false;           // the same columns of all products are one thread's
    const Stage * then = nullptr;        // whose weights are read next

    char * work = nullptr;
    bool alone = false;                  // each thread rounds all activations for itself
    size_t rounded = 0;                  // bytes of rounded activations, of a thread's where `alone`
    size_t normal = 0;                   // where, in the work, each thread has a row that is normalised
    int size = 0;                        // tiles in a chunk
    int chunks = 0;
    mutable std::atomic<int> taken{0};   // chunks, beyond those that threads begin with

    // Lays out the work and the chunks for so many threads; returns the bytes of work that it takes.
    size_t divide(int threads);
    void run(const ggml_compute_params * params) const;
};

inline bool is_known(ggml_type type) {
    return type == GGML_TYPE_Q4_0 || type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_K || type == GGML_TYPE_Q6_K;
}

// Whether weights lie in tiles, as products read them: by llama.cpp's hand with AMX, by that of weights.cpp without.
bool is_laid_out(const ggml_tensor * weight);

// Bytes of 16 columns of so many values each.
size_t tile_size(ggml_type type, int64_t width);

// Whether a node is a product that a stage can hold.
bool is_product(const ggml_tensor * node);

// One product of any shape, and the bytes of work that it takes.
void multiply(const ggml_compute_params * params, ggml_tensor * product);
size_t work_size(const ggml_tensor * product);

}  // namespace edge
