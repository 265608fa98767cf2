// Weights for products of ours where there is no AMX: in tiles of 16 columns, as llama.cpp lays them out for AMX.
//
// They go to the buffers of llama.cpp's that repack weights, whose other types and shapes stay its own.

#include "products.h"

#include "repack.h"
#include "traits.h"

// What stands for llama.cpp's own in its list of buffers (see build.cmake).
ggml_backend_buffer_type_t edge_buffer_type();

#if EDGE_PRODUCTS && !EDGE_AMX

#include <cstdint>
#include <cstring>

namespace {

constexpr int COLUMNS = 16;
constexpr uint32_t LOW = 0x0F0F0F0F;

uint32_t four(const void * values, int i) {
    uint32_t x;
    memcpy(&x, (const char *) values + 4 * i, sizeof x);
    return x;
}

// Puts four values of a column, or eight as nibbles, into a tile's row.
void put(char * tile, int row, int column, uint32_t values) { memcpy(tile + 64 * row + 4 * column, &values, 4); }

uint32_t nibbles(uint32_t low, uint32_t high) { return low | high << 4; }

// A column's part of a tile, from a block of it.

void lay_out(const block_q4_0 & from, char * tile, int column) {
    for (int k = 0; k < 2; ++k) {
        const uint32_t a = four(from.qs, 2 * k), b = four(from.qs, 2 * k + 1);
        put(tile, k, column, nibbles(a & LOW, b & LOW));
        put(tile, k + 2, column, nibbles(a >> 4 & LOW, b >> 4 & LOW));
    }
    memcpy(tile + 256 + 2 * column, &from.d, 2);
}

void lay_out(const block_q8_0 & from, char * tile, int column) {
    for (int k = 0; k < 8; ++k) {
        put(tile, k, column, four(from.qs, k));
    }
    memcpy(tile + 512 + 2 * column, &from.d, 2);
}

void lay_out(const block_q4_K & from, char * tile, int column) {
    for (int k = 0; k < 16; ++k) {
        const uint32_t a = four(from.qs, 2 * k), b = four(from.qs, 2 * k + 1);
        const int row = k / 4 * 8 + k % 4;
        put(tile, row, column, nibbles(a & LOW, b & LOW));
        put(tile, row + 4, column, nibbles(a >> 4 & LOW, b >> 4 & LOW));
    }
    const uint8_t * const s = from.scales;
    for (int k = 0; k < 8; ++k) {
        // Six bits each; those of the last four have their high ones beside the first four's.
        const int i = k % 4;
        const uint8_t scale = k < 4 ? s[i] & 63 : (s[i + 8] & 15) | (s[i] >> 6) << 4;
        const uint8_t least = k < 4 ? s[i + 4] & 63 : s[i + 8] >> 4 | (s[i + 4] >> 6) << 4;
        tile[2048 + 16 * k + column] = scale;
        tile[2176 + 32 * (k / 2) + 2 * column + k % 2] = least;
    }
    const auto & scales = from.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S;
    memcpy(tile + 2304 + 2 * column, &scales.d, 2);
    memcpy(tile + 2336 + 2 * column, &scales.dmin, 2);
}

void lay_out(const block_q6_K & from, char * tile, int column) {
    uint32_t low[64], high[64];  // of each four values in their order
    for (int i = 0; i < 64; ++i) {
        const int half = i / 32, part = i % 32 / 8, at = i % 8;
        low[i] = four(from.ql, 16 * half + part % 2 * 8 + at) >> (part < 2 ? 0 : 4) & LOW;
        high[i] = four(from.qh, 8 * half + at) >> 2 * part & 0x03030303;
    }
    for (int k = 0; k < 32; ++k) {
        put(tile, k, column, nibbles(low[2 * k], low[2 * k + 1]));
    }
    for (int k = 0; k < 16; ++k) {
        const uint32_t * const h = high + 4 * k;
        put(tile + 2048, k, column, h[0] | h[1] << 2 | h[2] << 4 | h[3] << 6);
        tile[3072 + 16 * k + column] = from.scales[k];
    }
    memcpy(tile + 3328 + 2 * column, &from.d, 2);
}

template <class B> void lay_out(const ggml_tensor * weight, const void * data) {
    const int64_t blocks = weight->ne[0] / ggml_blck_size(weight->type);
    const size_t size = edge::tile_size(weight->type, weight->ne[0]) / blocks;
    char * tile = (char *) weight->data;
    for (int64_t first = 0; first < weight->ne[1]; first += COLUMNS) {
        for (int64_t block = 0; block < blocks; ++block, tile += size) {
            for (int column = 0; column < COLUMNS; ++column) {
                lay_out(((const B *) data)[(first + column) * blocks + block], tile, column);
            }
        }
    }
}

bool suits(const ggml_tensor * weight) {
    return edge::is_known(weight->type) && ggml_n_dims(weight) == 2 && weight->ne[1] % COLUMNS == 0;
}

struct Product : ggml::cpu::tensor_traits {
    bool work_size(int, const ggml_tensor * op, size_t & size) override {
        size = edge::work_size(op);
        return true;
    }
    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        edge::multiply(params, op);
        return true;
    }
};
Product PRODUCT;

ggml_backend_buffer_type upstream;         // as llama.cpp made it
ggml_backend_buffer_i upstream_of_buffer;

struct Weights : ggml::cpu::extra_buffer_type {
    ggml::cpu::extra_buffer_type * others() { return (ggml::cpu::extra_buffer_type *) upstream.context; }

    bool supports_op(ggml_backend_dev_t device, const ggml_tensor * op) override {
        if (op->op != GGML_OP_MUL_MAT || !suits(op->src[0])) {
            return others()->supports_op(device, op);
        }
        const ggml_tensor * const input = op->src[1];
        return op->src[0]->buffer != nullptr && op->src[0]->buffer->buft == edge_buffer_type() &&
               (input->buffer == nullptr || ggml_backend_buft_is_host(input->buffer->buft)) &&
               input->type == GGML_TYPE_F32 && input->nb[0] == sizeof(float);
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        return others()->get_tensor_traits(op);  // what `extra` points to
    }
};

ggml_status begin(ggml_backend_buffer_t buffer, ggml_tensor * tensor) {
    if (!suits(tensor)) {
        return upstream_of_buffer.init_tensor(buffer, tensor);
    }
    tensor->extra = (ggml::cpu::tensor_traits *) &PRODUCT;
    return GGML_STATUS_SUCCESS;
}

void set(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    if (!suits(tensor)) {
        upstream_of_buffer.set_tensor(buffer, tensor, data, offset, size);
        return;
    }
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(tensor));
    switch (tensor->type) {
        case GGML_TYPE_Q4_0: lay_out<block_q4_0>(tensor, data); break;
        case GGML_TYPE_Q8_0: lay_out<block_q8_0>(tensor, data); break;
        case GGML_TYPE_Q4_K: lay_out<block_q4_K>(tensor, data); break;
        default: lay_out<block_q6_K>(tensor, data); break;
    }
}

ggml_backend_buffer_t buffer_of(ggml_backend_buffer_type_t type, size_t size) {
    const ggml_backend_buffer_t buffer = upstream.iface.alloc_buffer(type, size);
    if (buffer != nullptr) {
        upstream_of_buffer = buffer->iface;
        buffer->iface.init_tensor = begin;
        buffer->iface.set_tensor = set;
    }
    return buffer;
}

size_t size_of(ggml_backend_buffer_type_t, const ggml_tensor * tensor) {
    return suits(tensor) ? tensor->ne[1] / COLUMNS * edge::tile_size(tensor->type, tensor->ne[0])
                         : ggml_nbytes(tensor);
}

}  // namespace

bool edge::is_laid_out(const ggml_tensor * weight) { return weight->extra == (ggml::cpu::tensor_traits *) &PRODUCT; }

ggml_backend_buffer_type_t edge_buffer_type() {
    static const ggml_backend_buffer_type_t type = [] {
        const ggml_backend_buffer_type_t one = ggml_backend_cpu_repack_buffer_type();
        upstream = *one;
        one->iface.alloc_buffer = buffer_of;
        one->iface.get_alloc_size = size_of;
        one->context = new Weights;
        return one;
    }();
    return type;
}

#else

ggml_backend_buffer_type_t edge_buffer_type() { return ggml_backend_cpu_repack_buffer_type(); }

#endif
