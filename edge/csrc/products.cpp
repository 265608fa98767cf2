// Products of activations with quantised weights, for CPUs with AVX512-VNNI and AMX.
//
// It takes the place of llama.cpp's own products over weights that its AMX buffers have repacked (see
// build.cmake), for the types that matter here; its layout of the weights and its arithmetic stay: activations
// are rounded to 8 bits a block at a time, blocks are added up in order. So a row's result is the same to the bit
// whatever rows are multiplied beside it. What is new:
//   - weights are read in one sweep, in the order they lie in memory, and asked for 8 KiB ahead, beyond the
//     end of what a thread took where it goes on, a few lines at a time between products: few rows of activations are
//     then bound by memory, where four columns at once were bound by its latency;
//   - up to eight rows are multiplied while a tile's weights are in registers, without AMX, whose tiles cost as much
//     for three rows as for sixteen;
//   - beyond that, tiles are spread, multiplied and gathered strip by strip, with as many rows as there are;
//   - Q6_K, whose 16 values to a scale leave AMX half empty, never goes there.
//
// Terms: a tile is 16 columns of the weights over one block of 32 or 256 values; a group is up to 16 rows of
// activations.

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__GNUC__)

#include "amx/mmq.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

// llama.cpp's own, renamed by build.cmake: they serve the other types.
void edge_upstream_mul_mat(const ggml_compute_params * params, ggml_tensor * dst);
size_t edge_upstream_desired_wsize(const ggml_tensor * dst);

#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int COLUMNS = 16;  // of a tile
constexpr int ROWS = 16;     // of a group
constexpr int TOGETHER = 4;  // groups that share what a tile's weights were spread to
constexpr int CHUNK = 16;    // tiles that a thread takes at once, at most
constexpr int AGAIN = 4;     // the same where they are read again and again, for one group after the other
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

// ---- vectors

INLINE __m512 halves(const char * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }

INLINE __m512 bytes(const char * p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p)));
}

INLINE void nibbles(const char * p, __m512i & low, __m512i & high) {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512i both = _mm512_loadu_si512(p);
    asm("" : "+v"(both));  // or it is loaded twice
    low = _mm512_and_si512(both, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}

// 32 values of each column
INLINE void nibbles_of_32(const char * p, __m512i * weights) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
        nibbles(p + 64 * k, weights[2 * k], weights[2 * k + 1]);
    }
}

// Four values of a row. Read where they lie, they are spread to all columns as they are loaded; by way of a copy, the
// units that multiply would have to spread them.
using Four = int32_t __attribute__((may_alias, aligned(1)));

// start + the products of 4 * N values of a row with unsigned weights, for each column; two sums, where many would wait
// for one another.
template <int N> INLINE __m512i dots(__m512i start, const __m512i * weights, const int8_t * values) {
    constexpr int SUMS = N > 4 ? 2 : 1;
    const Four * const fours = (const Four *) values;
    __m512i sums[2] = {start, _mm512_setzero_si512()};
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) {
        sums[k % SUMS] = _mm512_dpbusd_epi32(sums[k % SUMS], weights[k], _mm512_set1_epi32(fours[k]));
    }
    return SUMS > 1 ? _mm512_add_epi32(sums[0], sums[1]) : sums[0];
}

INLINE void add(__m512 & sum, __m512i dot, __m512 scale) {
    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, sum);
}

INLINE void add(__m512 & sum, __m512i dot, __m512 scale, float other) {
    add(sum, dot, _mm512_mul_ps(scale, _mm512_set1_ps(other)));
}

// Of a block in units, whose own scales are in `part`: a row's scale comes last, once.
template <int M> INLINE void add_parts(const __m512 * part, const float * scales, __m512 * sum) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
        sum[m] = _mm512_fmadd_ps(part[m], _mm512_set1_ps(scales[m]), sum[m]);
    }
}

template <int M> INLINE void add_dots(const Small<M> & a, const __m512i * weights, __m512 scale, __m512 * sum) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
        add(sum[m], dots<8>(_mm512_set1_epi32(a.sums[0][m]), weights, a.values[m]), scale, a.scales[m]);
    }
}

// ---- AMX's tiles: two sets of registers (weights T, activations 2 + T, products 4 + T)

using Weights = int8_t[512];     // 32 values by 16 columns, four values of a column side by side
using Products = int32_t[ROWS][COLUMNS];

INLINE void configure(int rows) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, none[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } tiles;
    for (int t = 0; t < 8; ++t) {
        tiles.bytes[t] = t == 2 || t == 3 ? 32 : 64;
        tiles.rows[t] = t < 2 ? 8 : rows;
    }
    asm volatile("ldtilecfg %0" ::"m"(tiles));
}

template <int T, bool SIGNED>
INLINE void multiply_tile(const void * weights, const int8_t * values, long stride, Products & to) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(weights), "r"(64L), "i"(T) : "memory");
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(values), "r"(stride), "i"(2 + T) : "memory");
    asm volatile("tilezero %%tmm%c0" ::"i"(4 + T));
    if constexpr (SIGNED) {
        asm volatile("tdpbssd %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(T), "i"(2 + T), "i"(4 + T));
    } else {
        asm volatile("tdpbsud %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(T), "i"(2 + T), "i"(4 + T));
    }
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(&to), "r"(64L), "i"(4 + T) : "memory");
}

template <int M> INLINE void add_products(const Products & c, __m512 scale, const float * others, __m512 * sum) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
        add(sum[m], _mm512_load_si512(c[m]), scale, others[m]);
    }
}

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

// ---- the types: where their parts lie in a tile, and how they are multiplied
//
// FEW: rows that are quicker without AMX. ZERO: what an unsigned weight stands for 0 at. UNITS: parts of a tile with a
// scale of their own. STRIP: tiles between spreading and gathering. SIGNED, DIRECT: spread weights are signed; they are
// multiplied where they lie.

struct Q4_0 {
    template <int M> using Act = Small<M>;
    static constexpr int FEW = 8, SIZE = 288, ZERO = 8, UNITS = 1, STRIP = 8;
    static constexpr bool SIGNED = true, DIRECT = false;

    template <int M> INLINE void vector(const char * p, const Next & next, const Act<M> & a, __m512 * sum) {
        __m512i weights[8];
        ask<lines<Q4_0>, M>(next, 0);
        nibbles_of_32(p, weights);
        add_dots<M>(a, weights, halves(p + 256), sum);
    }

    INLINE void spread(const char * p, Weights * b) {
        const __m512i zero = _mm512_set1_epi8(ZERO);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            __m512i low, high;
            nibbles(p + 64 * k, low, high);
            _mm512_store_si512(b[0] + 128 * k, _mm512_sub_epi8(low, zero));
            _mm512_store_si512(b[0] + 128 * k + 64, _mm512_sub_epi8(high, zero));
        }
    }

    template <int M> INLINE void gather(const char * p, const Act<M> & a, const Products * c, __m512 * sum) {
        add_products<M>(c[0], halves(p + 256), a.scales, sum);
    }
};

struct Q8_0 {
    template <int M> using Act = Small<M>;
    static constexpr int FEW = 8, SIZE = 608, ZERO = 128, UNITS = 1, STRIP = 8;
    static constexpr bool SIGNED = true, DIRECT = true;

    template <int M> INLINE void vector(const char * p, const Next & next, const Act<M> & a, __m512 * sum) {
        const __m512i flip = _mm512_set1_epi8((char) 0x80);  // signed to unsigned: plus 128
        __m512i weights[8];
        ask<lines<Q8_0>, M>(next, 0);
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) {
            weights[k] = _mm512_xor_si512(_mm512_loadu_si512(p + 64 * k), flip);
        }
        add_dots<M>(a, weights, halves(p + 512), sum);
    }

    INLINE void spread(const char *, Weights *) {}

    template <int M> INLINE void gather(const char * p, const Act<M> & a, const Products * c, __m512 * sum) {
        add_products<M>(c[0], halves(p + 512), a.scales, sum);
    }
};

struct Q6_K {
    template <int M> using Act = Large<M>;
    static constexpr int FEW = ROWS, SIZE = 3360, ZERO = 32, UNITS = 16;

    // 16 values of each column: four low bits, and two high ones
    INLINE void unpack(const char * p, int unit, __m512i * weights) {
        constexpr int A_OR_B_AND_C = 0xF8;
        const __m512i two = _mm512_set1_epi8(0x30), high = _mm512_loadu_si512(p + 2048 + 64 * unit);
        nibbles(p + 128 * unit, weights[0], weights[1]);
        nibbles(p + 128 * unit + 64, weights[2], weights[3]);
        weights[0] = _mm512_ternarylogic_epi32(weights[0], _mm512_slli_epi16(high, 4), two, A_OR_B_AND_C);
        weights[1] = _mm512_ternarylogic_epi32(weights[1], _mm512_slli_epi16(high, 2), two, A_OR_B_AND_C);
        weights[2] = _mm512_ternarylogic_epi32(weights[2], high, two, A_OR_B_AND_C);
        weights[3] = _mm512_ternarylogic_epi32(weights[3], _mm512_srli_epi16(high, 2), two, A_OR_B_AND_C);
    }

    INLINE __m512 scale(const char * p, int unit) {
        return _mm512_mul_ps(halves(p + 3328), bytes(p + 3072 + 16 * unit));
    }

    template <int M> INLINE void vector(const char * p, const Next & next, const Act<M> & a, __m512 * sum) {
        __m512 part[M] = {};
        for (int unit = 0; unit < UNITS; ++unit) {
            __m512i weights[4];
            ask<lines<Q6_K>, M>(next, lines<Q6_K> * unit);
            unpack(p, unit, weights);
            const __m512 factor = scale(p, unit);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                const __m512i start = _mm512_set1_epi32(a.sums[unit][m]);
                add(part[m], dots<4>(start, weights, a.values[m] + 16 * unit), factor);
            }
        }
        add_parts<M>(part, a.scales, sum);
    }
};

struct Q4_K {
    template <int M> using Act = Large<M>;
    static constexpr int FEW = 8, SIZE = 2368, ZERO = 0, UNITS = 8, STRIP = 1;
    static constexpr bool SIGNED = false, DIRECT = false;

    INLINE __m512 scale(const char * p, int unit) {
        return _mm512_mul_ps(halves(p + 2304), bytes(p + 2048 + 16 * unit));
    }

    // sums: of the values of two units, in 16 bits each
    template <int M> INLINE void minima(const char * p, const Act<M> & a, __m512 * sum) {
        const __m512 factor = halves(p + 2336);
        __m512i least[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            least[k] = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *) (p + 2176 + 32 * k)));
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            __m512i dot = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
                dot = _mm512_dpwssd_epi32(dot, least[k], _mm512_set1_epi32(a.sums[k][m]));
            }
            const __m512 other = _mm512_mul_ps(factor, _mm512_set1_ps(a.scales[m]));
            sum[m] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(dot), other, sum[m]);
        }
    }

    template <int M> INLINE void vector(const char * p, const Next & next, const Act<M> & a, __m512 * sum) {
        __m512 part[M] = {};
        for (int unit = 0; unit < UNITS; ++unit) {
            __m512i weights[8];
            ask<lines<Q4_K>, M>(next, lines<Q4_K> * unit);
            nibbles_of_32(p + 256 * unit, weights);
            const __m512 factor = scale(p, unit);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                add(part[m], dots<8>(_mm512_setzero_si512(), weights, a.values[m] + 32 * unit), factor);
            }
        }
        add_parts<M>(part, a.scales, sum);
        minima<M>(p, a, sum);
    }

    INLINE void spread(const char * p, Weights * b) {
        for (int unit = 0; unit < UNITS; ++unit) {
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
                __m512i low, high;
                nibbles(p + 256 * unit + 64 * k, low, high);
                _mm512_store_si512(b[unit] + 128 * k, low);
                _mm512_store_si512(b[unit] + 128 * k + 64, high);
            }
        }
    }

    template <int M> INLINE void gather(const char * p, const Act<M> & a, const Products * c, __m512 * sum) {
        __m512 part[M] = {};
        for (int unit = 0; unit < UNITS; ++unit) {
            const __m512 factor = scale(p, unit);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                add(part[m], _mm512_load_si512(c[unit][m]), factor);
            }
        }
        add_parts<M>(part, a.scales, sum);
        minima<M>(p, a, sum);
    }
};

// ---- 16 columns, all of a row's blocks

template <class W, int M>
void vectors(int blocks, const void * work, const char * p, Way way, float * to, size_t stride) {
    auto a = (const typename W::template Act<M> *) work;
    __m512 sum[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
        sum[m] = _mm512_setzero_ps();
    }
    for (int i = 0; i < blocks; ++i, p += W::SIZE) {
        const Next next = {ahead<AHEAD>(p, way), ahead<NEAR>(p, way)};
        W::template vector<M>(p, next, a[i], sum);
        ask<of_tile<W> % W::UNITS, M>(next, lines<W> * W::UNITS);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
        _mm512_storeu_ps(to + m * stride, sum[m]);
    }
}

template <class W, int M>
void matrices(int groups, int blocks, const void * work, const char * p, Way way, float * to, size_t stride) {
    using Act = typename W::template Act<M>;
    constexpr int UNITS = W::UNITS, WIDE = Act::values_in_row, STEP = WIDE / UNITS;
    // Of a tile's lines, those asked for while a unit is multiplied; the others are, while the tile is gathered.
    constexpr int EARLY = UNITS > 1 ? lines<W> : lines<W> / 2;
    alignas(64) Weights weights[W::STRIP * UNITS];
    alignas(64) Products products[W::STRIP * UNITS];
    __m512 sums[TOGETHER][M];
    for (int i = 0; i < blocks; i += W::STRIP, p += W::STRIP * W::SIZE) {
        const int strip = std::min(W::STRIP, blocks - i);
        for (int j = 0; j < strip; ++j) {
            W::spread(p + j * W::SIZE, weights + j * UNITS);
        }
        for (int group = 0; group < groups; ++group) {
            const Act * const a = (const Act *) work + (size_t) group * blocks + i;
            auto unit = [&](int u, auto T) {
                if (group == 0) {
                    ask<EARLY>(ahead<AHEAD>(p + u / UNITS * W::SIZE, way) + 64 * EARLY * (u % UNITS));
                }
                const void * b = W::DIRECT ? (const void *) (p + u * W::SIZE) : weights[u];
                multiply_tile<T, W::SIGNED>(b, a[u / UNITS].values[0] + u % UNITS * STEP, WIDE, products[u]);
            };
            for (int u = 0; u < strip * UNITS; u += 2) {
                unit(u, std::integral_constant<int, 0>{});
                if (u + 1 < strip * UNITS) {
                    unit(u + 1, std::integral_constant<int, 1>{});
                }
            }
            __m512 sum[M] = {};
            if (i > 0) {
                memcpy(sum, sums[group], sizeof sum);
            }
            for (int j = 0; j < strip; ++j) {
                if (group == 0) {
                    ask<of_tile<W> - EARLY * UNITS>(ahead<AHEAD>(p + j * W::SIZE, way) + 64 * EARLY * UNITS);
                }
                W::template gather<M>(p + j * W::SIZE, a[j], products + j * UNITS, sum);
            }
            memcpy(sums[group], sum, sizeof sum);
        }
    }
    for (int group = 0; group < groups; ++group) {
        for (int m = 0; m < M; ++m) {
            _mm512_storeu_ps(to + (group * (size_t) ROWS + m) * stride, sums[group][m]);
        }
    }
}

// Groups of `rows` rows each; several at once only where they are whole.
template <class W, int M = ROWS>
void columns(int rows, int groups, int blocks, const void * work, const char * p, Way way, float * to,
             size_t stride) {
    if constexpr (M > 0) {
        if (rows != M) {
            columns<W, M - 1>(rows, groups, blocks, work, p, way, to, stride);
        } else if constexpr (M > W::FEW) {
            matrices<W, M>(groups, blocks, work, p, way, to, stride);
        } else {
            vectors<W, M>(blocks, work, p, way, to, stride);
        }
    }
}

// ---- activations, rounded to 8 bits as llama.cpp does it

// Sixteen values times `by`; returns their sum.
INLINE int32_t rounded(const float * x, __m512 by, int8_t * to) {
    const __m512i values = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), by));
    _mm_storeu_si128((__m128i *) to, _mm512_cvtepi32_epi8(values));
    return _mm512_reduce_add_epi32(values);
}

// A row's block; its scale and sums are `rows` apart from one another.
template <class W> INLINE void quantise(const float * x, int8_t * values, float * scale, int32_t * sums, int rows) {
    if constexpr (std::is_same_v<typename W::template Act<1>, Small<1>>) {
        const __m512 first = _mm512_loadu_ps(x), second = _mm512_loadu_ps(x + 16);
        const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(first), _mm512_abs_ps(second)));
        const __m512 by = _mm512_set1_ps(most != 0 ? 127 / most : 0);
        *scale = _cvtsh_ss(_cvtss_sh(most / 127, 0));
        *sums = -W::ZERO * (rounded(x, by, values) + rounded(x + 16, by, values + 16));
    } else {
        __m512 highest = _mm512_loadu_ps(x), lowest = highest;
        for (int k = 16; k < QK_K; k += 16) {
            highest = _mm512_max_ps(highest, _mm512_loadu_ps(x + k));
            lowest = _mm512_min_ps(lowest, _mm512_loadu_ps(x + k));
        }
        const float most = std::max(_mm512_reduce_max_ps(highest), -_mm512_reduce_min_ps(lowest));
        const __m512 by = _mm512_set1_ps(most != 0 ? 127 / most : 0);
        *scale = most / 127;
        int32_t of_16[QK_K / 16];
        for (int k = 0; k < QK_K / 16; ++k) {
            of_16[k] = rounded(x + 16 * k, by, values + 16 * k);
        }
        if constexpr (W::ZERO != 0) {
            for (int k = 0; k < QK_K / 16; ++k) {
                sums[k * rows] = -W::ZERO * of_16[k];
            }
        } else {
            for (int k = 0; k < QK_K / 64; ++k) {
                const int32_t * s = of_16 + 4 * k;
                const int16_t both[2] = {(int16_t) (s[0] + s[1]), (int16_t) (s[2] + s[3])};
                memcpy(&sums[k * rows], both, sizeof both);
            }
        }
    }
}

// ---- one product

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

template <class W> void multiply(const ggml_compute_params * params, ggml_tensor * dst) {
    using One = typename W::template Act<1>;
    constexpr int WIDE = One::values_in_row;
    const ggml_tensor *weight = dst->src[0], *input = dst->src[1];
    const int rows = dst->ne[1], blocks = weight->ne[0] / WIDE, tiles = dst->ne[0] / COLUMNS;
    const size_t row_bytes = sizeof(One) * blocks, tile_bytes = (size_t) W::SIZE * blocks;
    const size_t stride = dst->nb[1] / sizeof(float);
    char * const work = (char *) params->wdata;

    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    // Block by block, for a group's rows lie side by side.
    const int all = (rows + ROWS - 1) / ROWS * blocks, share = (all + params->nth - 1) / params->nth;
    for (int one = share * params->ith; one < std::min(share * (params->ith + 1), all); ++one) {
        const int first = one / blocks * ROWS, block = one % blocks, M = std::min(rows - first, ROWS);
        char * const to = work + first * row_bytes + (size_t) block * M * sizeof(One);
        const char * const x = (const char *) input->data + first * input->nb[1] + block * WIDE * sizeof(float);
        for (int m = 0; m < M; ++m) {
            quantise<W>((const float *) (x + m * input->nb[1]), (int8_t *) to + m * WIDE,
                        (float *) (to + M * WIDE) + m, (int32_t *) (to + M * (WIDE + sizeof(float))) + m, M);
        }
    }
    ggml_barrier(params->threadpool);

    // Tile registers are set up for ROWS rows by llama.cpp, once for each thread; so they are left that way.
    int configured = 0;
    const int whole = rows / ROWS;
    constexpr int together = W::FEW < ROWS ? TOGETHER : 1;  // nothing is spread without AMX
    const char * const weights = (const char *) weight->data;
    const int size = chunk_size(tiles, params->nth, rows > ROWS ? AGAIN : CHUNK);
    for (int chunk = params->ith, next; chunk * size < tiles; chunk = next) {
        // Taken early, so that its weights can be asked for in time.
        next = ggml_threadpool_chunk_add(params->threadpool, 1);
        const int end = std::min((chunk + 1) * size, tiles);
        const Way way = {weights + end * tile_bytes,
                         next * size < tiles ? (ptrdiff_t) ((next * size - end) * tile_bytes) : -AHEAD};
        for (int first = 0; first < rows;) {
            const int groups = std::max(1, std::min(whole - first / ROWS, together));
            const int M = std::min(rows - first, ROWS);
            if (M > W::FEW && M != configured) {
                configure(configured = M);
            }
            for (int tile = chunk * size; tile < end; ++tile) {
                columns<W>(M, groups, blocks, work + first * row_bytes, weights + tile * tile_bytes, way,
                           (float *) dst->data + first * stride + tile * COLUMNS, stride);
            }
            first += groups * ROWS;
        }
    }
    if (configured != 0 && configured != ROWS) {
        configure(ROWS);
    }
}

bool served(const ggml_tensor * dst) {
    const ggml_type type = dst->src[0]->type;
    const bool known =
        type == GGML_TYPE_Q4_0 || type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_K || type == GGML_TYPE_Q6_K;
    return known && dst->ne[2] * dst->ne[3] == 1;
}

}  // namespace

size_t ggml_backend_amx_desired_wsize(const ggml_tensor * dst) {
    if (!served(dst)) {
        return edge_upstream_desired_wsize(dst);
    }
    const ggml_type type = dst->src[0]->type;
    const bool small = type == GGML_TYPE_Q4_0 || type == GGML_TYPE_Q8_0;
    const size_t width = dst->src[0]->ne[0];
    return dst->ne[1] * (small ? sizeof(Small<1>) * (width / QK8_0) : sizeof(Large<1>) * (width / QK_K));
}

void ggml_backend_amx_mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
    if (!served(dst)) {
        edge_upstream_mul_mat(params, dst);
        return;
    }
    switch (dst->src[0]->type) {
        case GGML_TYPE_Q4_0: multiply<Q4_0>(params, dst); break;
        case GGML_TYPE_Q8_0: multiply<Q8_0>(params, dst); break;
        case GGML_TYPE_Q4_K: multiply<Q4_K>(params, dst); break;
        default: multiply<Q6_K>(params, dst); break;
    }
}

#endif
