// Products of the same activations with several weights in one go: what graph.cpp makes of llama.cpp's nodes.

#pragma once

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include <atomic>

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

// Whether a node is a product that a stage can hold.
bool is_product(const ggml_tensor * node);

}  // namespace edge
