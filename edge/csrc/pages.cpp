// Memory for weights in pages of 2 MiB, where Linux has them for the asking.
//
// Decoding reads all weights for each token: in pages of 4 KiB, those are more than a processor remembers the places
// of.

#include "ggml-backend.h"
#include "ggml-impl.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

void ask_for_large_pages(void * data, size_t size) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t LARGE = 2 << 20;
    const uintptr_t begin = ((uintptr_t) data + LARGE - 1) & ~(LARGE - 1);
    const uintptr_t end = ((uintptr_t) data + size) & ~(LARGE - 1);
    if (begin < end) {
        madvise((void *) begin, end - begin, MADV_HUGEPAGE);  // a wish: all works without
    }
#endif
}

}  // namespace

// These take the place of llama.cpp's own where buffers for repacked weights are made (see build.cmake).
extern "C" {
void * edge_aligned_malloc(size_t size);
ggml_backend_buffer_t edge_alloc_buffer(ggml_backend_buffer_type_t type, size_t size);
}

void * edge_aligned_malloc(size_t size) {
    void * const data = ggml_aligned_malloc(size);
    if (data != nullptr) {
        ask_for_large_pages(data, size);
    }
    return data;
}

ggml_backend_buffer_t edge_alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    const ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(type, size);
    if (buffer != nullptr) {
        ask_for_large_pages(ggml_backend_buffer_get_base(buffer), size);
    }
    return buffer;
}
