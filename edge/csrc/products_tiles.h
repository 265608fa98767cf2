// What products for any instruction set share: the layout of tiles, of rounded activations and of results.

#pragma once

#include "products.h"

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int COLUMNS = 16;  // of a tile
constexpr int AHEAD = 8192;  // bytes, into the second cache
constexpr int NEAR = 2048;   // bytes, into the first, which is worth asking again
constexpr int BOUND = 4;     // for so few rows, whose products wait for memory

// ---- activations

// A block of M rows. sums: what takes the weights' zero point or minimum out again, see each type.
template <int VALUES, int SUMS, int M> struct Block {
    static constexpr int values_in_row = VALUES;
    int8_t values[M][VALUES];
    float scales[M];
    int32_t sums[SUMS][M];
};
template <int M> using Small = Block<32, 1, M>;
template <int M> using Large = Block<256, 16, M>;

// Four values of a row. Read where they lie, they are spread to all columns as they are loaded; by way of a copy, the
// units that multiply would have to spread them.
using Four = int32_t __attribute__((may_alias, aligned(1)));

// ---- what is read next

// Where the weights that a thread reads end, and how far from there it goes on.
struct Way {
    const char * end;
    ptrdiff_t jump;
};

template <int BYTES> INLINE const char * ahead(const char * p, const Way & way) {
    p += BYTES;
    return p + (p < way.end ? 0 : way.jump);
}

// Lines of memory in a tile, and for each of its units. A core waits for 16 at most: asked for a few at a time they
// come while others are multiplied, where a tile's at once would make it stand still.
template <class W> constexpr int of_tile = (W::SIZE + 63) / 64;
template <class W> constexpr int lines = of_tile<W> / W::UNITS;

template <int LINES> INLINE void ask(const char * far) {
#pragma GCC unroll 64
    for (int line = 0; line < LINES; ++line) {
        _mm_prefetch(far + 64 * line, _MM_HINT_T1);
    }
}

// What vectors read later, and soon.
struct Next {
    const char *far, *near;
};

template <int LINES, int M> INLINE void ask(const Next & next, int first) {
    ask<LINES>(next.far + 64 * first);
    if constexpr (M <= BOUND) {
#pragma GCC unroll 64
        for (int line = 0; line < LINES; ++line) {
            _mm_prefetch(next.near + 64 * (first + line), _MM_HINT_T0);
        }
    }
}

// Where they go: pointers to a tile's columns of the first row.
struct Out {
    float * to;
    size_t stride;
    const float * plus;
    size_t plus_stride;
    bool gated;
};

}  // namespace
