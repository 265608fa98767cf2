// Memory for weights in pages of 2 MiB, where Linux has them for the asking; and a KV cache that is cleared untouched.
//
// Decoding reads all weights for each token: in pages of 4 KiB, those are more than a processor remembers the places
// of. Of a KV cache most cells are never used, and fresh pages read as zeros.

#include "ggml-backend.h"
#include "ggml-impl.h"

#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
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
void edge_buffer_clear(ggml_backend_buffer_t buffer, uint8_t value);
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

// Takes the place of llama.cpp's own where a KV cache is cleared. Private pages that are given back are zeros when they
// are next read; what is mapped otherwise, or locked, is written to.
void edge_buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
#if defined(__linux__)
    if (value == 0 && ggml_backend_buffer_get_type(buffer) == ggml_backend_cpu_buffer_type()) {
        char * const data = (char *) ggml_backend_buffer_get_base(buffer);
        char * const end = data + ggml_backend_buffer_get_size(buffer);
        const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE);
        char * const first = (char *) (((uintptr_t) data + page - 1) & ~(page - 1));
        char * const last = (char *) ((uintptr_t) end & ~(page - 1));
        if (first < last && madvise(first, last - first, MADV_DONTNEED) == 0) {
            memset(data, 0, first - data);
            memset(last, 0, end - last);
            return;
        }
    }
#endif
    ggml_backend_buffer_clear(buffer, value);
}
