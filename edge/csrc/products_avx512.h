// Products for CPUs with AVX512-VNNI, and with AMX where there is that too.

#pragma once

#include "products_tiles.h"

#include "vec.h"
#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace {

constexpr int ROWS = 16;     // of a group
constexpr int TOGETHER = 4;  // groups that share what a tile's weights were spread to

constexpr bool AMX = EDGE_AMX;

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

// ---- AMX's tiles: weights in register 0, activations in 2, products in 4
//
// The same three for all. Their writers do not wait for their readers as long as a core has registers to rename them
// to, and it has so few, which it shares with its other thread, that each further one makes them wait.

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

template <bool SIGNED>
INLINE void multiply_tile(const void * weights, const int8_t * values, ptrdiff_t stride, Products & to) {
    asm volatile("tileloadd (%0,%1,1), %%tmm0" ::"r"(weights), "r"((ptrdiff_t) 64) : "memory");
    asm volatile("tileloadd (%0,%1,1), %%tmm2" ::"r"(values), "r"(stride) : "memory");
    asm volatile("tilezero %tmm4");
    if constexpr (SIGNED) {
        asm volatile("tdpbssd %tmm0, %tmm2, %tmm4");
    } else {
        asm volatile("tdpbsud %tmm0, %tmm2, %tmm4");
    }
    asm volatile("tilestored %%tmm4, (%0,%1,1)" ::"r"(&to), "r"((ptrdiff_t) 64) : "memory");
}

template <int M> INLINE void add_products(const Products & c, __m512 scale, const float * others, __m512 * sum) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
        add(sum[m], _mm512_load_si512(c[m]), scale, others[m]);
    }
}

// ---- the types: where their parts lie in a tile, and how they are multiplied
//
// FEW: rows that are quicker without AMX. ZERO: what an unsigned weight stands for 0 at. UNITS: parts of a tile with a
// scale of their own. STRIP: tiles between spreading and gathering. SIGNED, DIRECT: spread weights are signed; they are
// multiplied where they lie.

struct Q4_0 {
    template <int M> using Act = Small<M>;
    static constexpr int FEW = AMX ? 7 : ROWS, SIZE = 288, ZERO = 8, UNITS = 1, STRIP = 8;
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
    static constexpr int FEW = AMX ? 7 : ROWS, SIZE = AMX ? 608 : 544, ZERO = 128, UNITS = 1, STRIP = 8;
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
    static constexpr int FEW = AMX ? 7 : ROWS, SIZE = 2368, ZERO = 0, UNITS = 8, STRIP = 1;
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

INLINE void put(const Out & out, size_t m, __m512 sum) {
    float * const to = out.to + m * out.stride;
    if (out.gated) {
        sum = _mm512_mul_ps(ggml_v_silu(_mm512_loadu_ps(to)), sum);
    }
    if (out.plus != nullptr) {
        sum = _mm512_add_ps(sum, _mm512_loadu_ps(out.plus + m * out.plus_stride));
    }
    _mm512_storeu_ps(to, sum);
}

template <class W, int M> void vectors(int blocks, const void * work, const char * p, Way way, const Out & out) {
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
        put(out, m, sum[m]);
    }
}

template <class W, int M>
void matrices(int groups, int blocks, const void * work, const char * p, Way way, const Out & out) {
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
            for (int u = 0; u < strip * UNITS; ++u) {
                if (group == 0) {
                    ask<EARLY>(ahead<AHEAD>(p + u / UNITS * W::SIZE, way) + 64 * EARLY * (u % UNITS));
                }
                const void * b = W::DIRECT ? (const void *) (p + u * W::SIZE) : weights[u];
                multiply_tile<W::SIGNED>(b, a[u / UNITS].values[0] + u % UNITS * STEP, WIDE, products[u]);
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
            put(out, group * (size_t) ROWS + m, sums[group][m]);
        }
    }
}

// Groups of `rows` rows each; several at once only where they are whole.
template <class W, int M = ROWS>
void columns(int rows, int groups, int blocks, const void * work, const char * p, Way way, const Out & out, bool) {
    if constexpr (M > 0) {
        if (rows != M) {
            columns<W, M - 1>(rows, groups, blocks, work, p, way, out, false);
        } else if constexpr (M > W::FEW) {
            matrices<W, M>(groups, blocks, work, p, way, out);
        } else {
            vectors<W, M>(blocks, work, p, way, out);
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

// RMS norm, as llama.cpp's: squares are added up in doubles.
void normalise(const float * x, const float * weight, float eps, int width, float * to) {
    __m512d sums[2] = {};
    for (int i = 0; i < width; i += 16) {
        const __m512 v = _mm512_loadu_ps(x + i), square = _mm512_mul_ps(v, v);
        sums[0] = _mm512_add_pd(sums[0], _mm512_cvtps_pd(_mm512_castps512_ps256(square)));
        sums[1] = _mm512_add_pd(sums[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(square, 1)));
    }
    const float mean = (float) (_mm512_reduce_add_pd(_mm512_add_pd(sums[0], sums[1])) / width);
    const __m512 scale = _mm512_set1_ps(1 / std::sqrt(mean + eps));
    for (int i = 0; i < width; i += 16) {
        const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + i), scale);
        _mm512_storeu_ps(to + i, _mm512_mul_ps(v, _mm512_loadu_ps(weight + i)));
    }
}

}  // namespace
