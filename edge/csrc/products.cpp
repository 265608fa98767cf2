// Products of activations with quantised weights, for CPUs with AVX2, AVX-VNNI, AVX512-VNNI or AMX.
//
// With AMX it takes the place of llama.cpp's own products over weights that its AMX buffers have repacked (see
// build.cmake), for the types that matter here; without, weights.cpp lays weights out in the same way. Activations are
// rounded to 8 bits a block at a time, as llama.cpp does it, and blocks are added up in order. So a row's result is the
// same to the bit whatever rows are multiplied beside it, and of Q4_0 and Q8_0 on every processor. What is new:
//   - weights are read in one sweep, in the order they lie in memory, and asked for 8 KiB ahead, beyond the
//     end of what a thread took where it goes on, a few lines at a time between products: few rows of activations are
//     then bound by memory, where four columns at once were bound by its latency;
//   - a tile's weights stay in registers while rows are multiplied, as unsigned numbers: what they are too large by is
//     taken out of the sum at once. Rows are read as they lie, each four values for all columns;
//   - up to seven rows are multiplied like that where there is AMX, whose tiles cost as much for three rows as for
//     sixteen. Beyond that, tiles are spread, multiplied and gathered strip by strip, with as many rows as there are;
//   - Q6_K, whose 16 values to a scale leave AMX half empty, never goes there.
//
// Terms: a tile is 16 columns of the weights over one block of 32 or 256 values; a group is up to 16 rows of
// activations, or four with AVX2.

#include "products.h"

#if EDGE_PRODUCTS

#if defined(__AVX512VNNI__) && !defined(EDGE_AVX2)
#include "products_avx512.h"
#else
#include "products_avx2.h"
#endif

#if EDGE_AMX
#include "amx/amx.h"
#include "amx/mmq.h"
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int CHUNK = 16;    // tiles that a thread takes at once, at most
constexpr int AGAIN = 4;     // the same where they are read again and again, for one group after the other
constexpr int ALONE = 4096;  // values that each thread rounds for itself sooner than threads wait for one another

// ---- a stage

using edge::Product;
using edge::Stage;

template <class F> INLINE void with(ggml_type type, F f) {
    switch (type) {
        case GGML_TYPE_Q4_0: f(Q4_0{}); break;
        case GGML_TYPE_Q8_0: f(Q8_0{}); break;
        case GGML_TYPE_Q4_K: f(Q4_K{}); break;
        default: f(Q6_K{}); break;
    }
}

// Bytes of a row's activations once they are rounded.
size_t rounded_row(const ggml_tensor * weight) {
    size_t bytes = 0;
    with(weight->type, [&](auto type) {
        using One = typename decltype(type)::template Act<1>;
        bytes = sizeof(One) * (weight->ne[0] / One::values_in_row);
    });
    return bytes;
}

size_t tile_bytes(const ggml_tensor * weight) { return edge::tile_size(weight->type, weight->ne[0]); }

// How many tiles a thread takes at once: about a quarter of its share, and no more than `most`; of the sizes near that,
// the one with which the thread that has most to do has least.
int chunk_size(int tiles, int threads, int most) {
    const int largest = std::min(std::max(tiles / (4 * threads), 1), most);
    int best = largest, least = INT32_MAX;
    for (int size = largest; size >= std::max(largest / 2, 1); --size) {
        const int chunks = (tiles + size - 1) / size, longest = (chunks + threads - 1) / threads * size;
        if (longest < least) {
            least = longest;
            best = size;
        }
    }
    return best;
}

int tiles_of(const Product & product) { return product.weight->ne[1] / COLUMNS; }

void cut(Stage & stage, int threads) {
    const int counted = stage.side_by_side ? 1 : stage.count;
    int tiles = 0;
    for (int i = 0; i < counted; ++i) {
        tiles += tiles_of(stage.products[i]);
    }
    stage.size = chunk_size(tiles, threads, stage.rows > ROWS ? AGAIN : CHUNK);
    stage.chunks = 0;
    for (int i = 0; i < counted; ++i) {
        stage.chunks += (tiles_of(stage.products[i]) + stage.size - 1) / stage.size;
    }
}

// Tiles of a product, which lie side by side in memory.
struct Part {
    const Product * product;
    int first, end;

    const char * weights(int tile) const {
        return (const char *) product->weight->data + tile * tile_bytes(product->weight);
    }
};

// The parts of a chunk; returns their number.
int parts_of(const Stage & stage, int chunk, Part * parts) {
    const Product * product = stage.products;
    if (!stage.side_by_side) {
        for (int chunks; chunk >= (chunks = (tiles_of(*product) + stage.size - 1) / stage.size); ++product) {
            chunk -= chunks;
        }
    }
    const int count = stage.side_by_side ? stage.count : 1;
    for (int i = 0; i < count; ++i) {
        parts[i] = {product + i, chunk * stage.size, std::min((chunk + 1) * stage.size, tiles_of(product[i]))};
    }
    return count;
}

// Where a thread begins to read weights; null if it has nothing to do there.
const char * start_of(const Stage * stage, int chunk) {
    if (stage == nullptr || chunk >= stage->chunks) {
        return nullptr;
    }
    Part parts[Stage::MOST];
    parts_of(*stage, chunk, parts);
    return parts[0].weights(parts[0].first);
}

const float * row_of(const ggml_tensor * input, int64_t m) {
    const char * plane = (const char *) input->data;
    if (m >= input->ne[1]) {
        const int64_t second = m / input->ne[1], third = second / input->ne[2];
        plane += second % input->ne[2] * input->nb[2] + third * input->nb[3];
        m %= input->ne[1];
    }
    return (const float *) (plane + m * input->nb[1]);
}

// A thread's share of the input's rounding, or all of it where it works for itself.
void round(const Stage & stage, int ith, int nth, char * work) {
    const int width = stage.input->ne[0];
    const int from = stage.alone ? 0 : ith, step = stage.alone ? 1 : nth;
    for (int i = 0; i < stage.count; ++i) {
        const Product & product = stage.products[i];
        if (i > 0 && product.at <= stage.products[i - 1].at) {
            continue;  // those of a type share theirs
        }
        with(product.weight->type, [&](auto type) {
            using W = decltype(type);
            using One = typename W::template Act<1>;
            constexpr int WIDE = One::values_in_row;
            const int blocks = width / WIDE;
            // A row's block, among those of its group.
            auto put = [&](const float * x, int m, int block) {
                const int first = m / ROWS * ROWS, M = std::min(stage.rows - first, ROWS);
                char * const to = work + product.at + (first * (size_t) blocks + (size_t) block * M) * sizeof(One);
                char * const scales = to + M * WIDE;
                quantise<W>(x + block * WIDE, (int8_t *) to + (m - first) * WIDE, (float *) scales + (m - first),
                            (int32_t *) (scales + M * sizeof(float)) + (m - first), M);
            };
            if (stage.norm != nullptr) {
                float * const normal = (float *) (stage.work + stage.normal) + (size_t) ith * width;
                for (int m = from; m < stage.rows; m += step) {
                    normalise(row_of(stage.input, m), (const float *) stage.norm->data, stage.eps, width, normal);
                    for (int block = 0; block < blocks; ++block) {
                        put(normal, m, block);
                    }
                }
                return;
            }
            // Block by block, for a group's rows lie side by side.
            const int all = (stage.rows + ROWS - 1) / ROWS * blocks, share = (all + step - 1) / step;
            for (int one = share * from; one < std::min(share * (from + 1), all); ++one) {
                const int first = one / blocks * ROWS;
                for (int m = first; m < std::min(first + ROWS, stage.rows); ++m) {
                    put(row_of(stage.input, m), m, one % blocks);
                }
            }
        });
    }
}

// All rows of a part's columns. configured: the rows that AMX's registers are set up for, 0 for llama.cpp's own.
template <class W>
void multiply(const Stage & stage, const Part & part, const char * next, const char * work, int & configured) {
    const ggml_tensor *const weight = part.product->weight, *result = part.product->result, *plus = part.product->plus;
    const int blocks = weight->ne[0] / W::template Act<1>::values_in_row;
    const size_t stride = result->nb[1] / sizeof(float);
    const size_t plus_stride = plus != nullptr && plus->ne[1] > 1 ? plus->nb[1] / sizeof(float) : 0;
    const size_t row = sizeof(typename W::template Act<1>) * blocks;
    const int whole = stage.rows / ROWS;
    constexpr int together = W::FEW < ROWS ? TOGETHER : 1;  // nothing is spread without AMX
    const char * const end = part.weights(part.end);
    const Way way = {end, next != nullptr ? next - end : -AHEAD};
    for (int first = 0; first < stage.rows;) {
        const int groups = std::max(1, std::min(whole - first / ROWS, together));
        const int M = std::min(stage.rows - first, ROWS);
        if (M > W::FEW && M != configured) {
            configure(configured = M);
        }
        for (int tile = part.first; tile < part.end; ++tile) {
            const size_t column = (size_t) tile * COLUMNS;
            const float * const others =
                plus != nullptr ? (const float *) plus->data + first * plus_stride + column : nullptr;
            const Out out = {(float *) result->data + first * stride + column, stride, others, plus_stride,
                             part.product->gated};
            columns<W>(M, groups, blocks, work + part.product->at + first * row, part.weights(tile), way, out,
                       first > 0);
        }
        first += groups * ROWS;
    }
}

// take: gives the number of a further chunk, beyond those that threads begin with.
template <class Take> void run(const Stage & stage, const ggml_compute_params * params, Take take) {
    char * const work = stage.work + (stage.alone ? params->ith * stage.rounded : 0);
    round(stage, params->ith, params->nth, work);
    if (!stage.alone) {
        ggml_barrier(params->threadpool);
    }
    // Tile registers are set up for ROWS rows by llama.cpp, once for each thread; so they are left that way.
    int configured = 0;
    for (int chunk = params->ith, next; chunk < stage.chunks; chunk = next) {
        // Taken early, so that its weights can be asked for in time.
        next = take();
        Part parts[Stage::MOST];
        const int count = parts_of(stage, chunk, parts);
        for (int i = 0; i < count; ++i) {
            const char * then = i + 1 < count          ? parts[i + 1].weights(parts[i + 1].first)
                                : next < stage.chunks ? start_of(&stage, next)
                                                      : start_of(stage.then, params->ith);
            with(parts[i].product->weight->type, [&](auto type) {
                multiply<decltype(type)>(stage, parts[i], then, work, configured);
            });
        }
    }
    if (configured != 0 && configured != ROWS) {
        configure(ROWS);
    }
}

}  // namespace

size_t edge::tile_size(ggml_type type, int64_t width) {
    size_t bytes = 0;
    with(type, [&](auto one) {
        using W = decltype(one);
        bytes = (size_t) W::SIZE * (width / W::template Act<1>::values_in_row);
    });
    return bytes;
}

bool edge::is_product(const ggml_tensor * node) {
    return node->op == GGML_OP_MUL_MAT && node->ne[2] * node->ne[3] == 1 && is_laid_out(node->src[0]);
}

size_t edge::work_size(const ggml_tensor * product) {
    return ggml_nrows(product->src[1]) * rounded_row(product->src[0]);
}

void edge::multiply(const ggml_compute_params * params, ggml_tensor * product) {
    Stage stage;
    stage.input = product->src[1];
    stage.rows = ggml_nrows(product->src[1]);
    stage.count = 1;
    stage.products[0] = {product->src[0], product};
    stage.work = (char *) params->wdata;
    cut(stage, params->nth);
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    run(stage, params, [&] { return ggml_threadpool_chunk_add(params->threadpool, 1); });
}

size_t edge::Stage::divide(int threads) {
    const size_t width = input->ne[0];
    alone = rows * width <= ALONE;
    rounded = 0;
    for (int i = 0; i < count; ++i) {
        const auto same = std::find_if(products, products + i, [&](const Product & before) {
            return before.weight->type == products[i].weight->type;
        });
        products[i].at = same < products + i ? same->at : rounded;
        rounded += same < products + i ? 0 : (rows * rounded_row(products[i].weight) + 63) / 64 * 64;
    }
    normal = alone ? threads * rounded : rounded;
    cut(*this, threads);
    return normal + (norm != nullptr ? threads * width * sizeof(float) : 0);
}

void edge::Stage::run(const ggml_compute_params * params) const {
    ::run(*this, params, [&] { return params->nth + taken.fetch_add(1, std::memory_order_relaxed); });
}

#if EDGE_AMX

// llama.cpp's own, renamed by build.cmake: they serve the other types.
void edge_upstream_mul_mat(const ggml_compute_params * params, ggml_tensor * dst);
size_t edge_upstream_desired_wsize(const ggml_tensor * dst);

namespace {

bool served(const ggml_tensor * dst) { return edge::is_known(dst->src[0]->type) && dst->ne[2] * dst->ne[3] == 1; }

}  // namespace

bool edge::is_laid_out(const ggml_tensor * weight) {
    static const ggml_backend_buffer_type_t type = ggml_backend_amx_buffer_type();
    return is_known(weight->type) && weight->buffer != nullptr && ggml_backend_buffer_get_type(weight->buffer) == type;
}

size_t ggml_backend_amx_desired_wsize(const ggml_tensor * dst) {
    return served(dst) ? edge::work_size(dst) : edge_upstream_desired_wsize(dst);
}

void ggml_backend_amx_mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
    served(dst) ? edge::multiply(params, dst) : edge_upstream_mul_mat(params, dst);
}

#endif

#endif
