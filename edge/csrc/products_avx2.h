// Products for CPUs with AVX2, and quicker with AVX-VNNI: a tile's columns are two halves of eight.
//
// Without VNNI, products of two values are added up in 16 bits before they are widened: what an unsigned weight of four
// bits gives, eight times two values of at most 15 * 127, or of six bits less its zero point, fits into those.

#pragma once

#include "products_tiles.h"

#include "vec.h"

#include <cmath>
#include <cstring>
#include <type_traits>

namespace {

constexpr int ROWS = 4;      // of a group
constexpr int TOGETHER = 1;  // groups at once
constexpr int HALVES = 2;

#if defined(__AVXVNNI__)
constexpr bool VNNI = true;
INLINE __m256i plus_fours(__m256i sum, __m256i w, __m256i v) { return _mm256_dpbusd_avx_epi32(sum, w, v); }
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
constexpr bool VNNI = true;
INLINE __m256i plus_fours(__m256i sum, __m256i w, __m256i v) { return _mm256_dpbusd_epi32(sum, w, v); }
#else
constexpr bool VNNI = false;
INLINE __m256i plus_fours(__m256i sum, __m256i w, __m256i v) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, v));
}
#endif

INLINE void configure(int) {}

// ---- vectors

using Both = __m256i[HALVES];
template <int M> using Ints = __m256i[M][HALVES];
template <int M> using Floats = __m256[M][HALVES];

INLINE __m128i sixteen(const void * p) { return _mm_loadu_si128((const __m128i *) p); }
INLINE __m256i load(const void * p) { return _mm256_loadu_si256((const __m256i *) p); }
INLINE __m256 halves(const char * p) { return _mm256_cvtph_ps(sixteen(p)); }
INLINE __m256i four(const int8_t * values) { return _mm256_set1_epi32(*(const Four *) values); }

template <int M> INLINE void fill(const int32_t * with, Ints<M> & s) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
        s[m][0] = s[m][1] = _mm256_set1_epi32(with[m]);
    }
}

// Adds the products of four values of each row with unsigned weights of each column.
template <int M, int WIDE> INLINE void add_fours(const Both & w, const int8_t * values, Ints<M> & s) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
        const __m256i v = four(values + m * WIDE);
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; ++h) {
            s[m][h] = plus_fours(s[m][h], w[h], v);
        }
    }
}

// Of each byte, the bits of `mask` after a shift to the right, or to the left where it is negative.
template <int RIGHT> INLINE __m256i bits(__m256i x, __m256i mask) {
    return _mm256_and_si256(RIGHT < 0 ? _mm256_slli_epi16(x, -RIGHT) : _mm256_srli_epi16(x, RIGHT), mask);
}

// The same with nibbles of 32 values.
template <int M, int WIDE> INLINE void add_nibbles(const char * p, const int8_t * values, Ints<M> & s) {
    const __m256i mask = _mm256_set1_epi8(15);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
        __m256i a = load(p + 64 * k), b = load(p + 64 * k + 32);
        asm("" : "+x"(a), "+x"(b));  // or they are loaded twice
        add_fours<M, WIDE>({bits<0>(a, mask), bits<0>(b, mask)}, values + 8 * k, s);
        add_fours<M, WIDE>({bits<4>(a, mask), bits<4>(b, mask)}, values + 8 * k + 4, s);
    }
}

// Sums of `plus_fours` in 32 bits, times a scale of each column that `scales_of` made.
INLINE __m256i scaled(__m256i s, __m256i scale) {
    return VNNI ? _mm256_mullo_epi32(s, scale) : _mm256_madd_epi16(s, scale);
}

INLINE void scales_of(const char * p, Both & scale) {
    const __m128i all = sixteen(p);
    scale[0] = VNNI ? _mm256_cvtepi8_epi32(all) : _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(all, all));
    scale[1] = VNNI ? _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(all, all))
                    : _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(all, all));
}

template <int M> INLINE void add_scaled(const Ints<M> & s, const char * scales, Ints<M> & total) {
    Both scale;
    scales_of(scales, scale);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; ++h) {
            total[m][h] = _mm256_add_epi32(total[m][h], scaled(s[m][h], scale[h]));
        }
    }
}

// sum + dots, times the columns' scales and the rows'
template <int M> INLINE void add(const Ints<M> & dots, const char * scales, const float * rows, Floats<M> & sum) {
    const __m256 scale[HALVES] = {halves(scales), halves(scales + 16)};
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
        const __m256 row = _mm256_set1_ps(rows[m]);
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; ++h) {
            sum[m][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[m][h]), _mm256_mul_ps(scale[h], row), sum[m][h]);
        }
    }
}

// ---- the types: where their parts lie in a tile, and how they are multiplied
//
// FEW: rows of a group. ZERO: what an unsigned weight stands for 0 at. UNITS: parts of a tile with own scales.

struct Q4_0 {
    template <int M> using Act = Small<M>;
    static constexpr int FEW = ROWS, SIZE = 288, ZERO = 8, UNITS = 1;

    template <int M, class N> INLINE void vector(const char * p, const N & next, const Act<M> & a, Floats<M> & sum) {
        Ints<M> s;
        next.template ask<lines<Q4_0>, M>(0);
        fill<M>(a.sums[0], s);
        add_nibbles<M, 32>(p, a.values[0], s);
        if constexpr (!VNNI) {
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                s[m][0] = _mm256_madd_epi16(s[m][0], _mm256_set1_epi16(1));
                s[m][1] = _mm256_madd_epi16(s[m][1], _mm256_set1_epi16(1));
            }
        }
        add<M>(s, p + 256, a.scales, sum);
    }
};

struct Q8_0 {
    template <int M> using Act = Small<M>;
    static constexpr int FEW = ROWS, SIZE = 544, ZERO = VNNI ? 128 : 0, UNITS = 1;

    template <int M, class N> INLINE void vector(const char * p, const N & next, const Act<M> & a, Floats<M> & sum) {
        Ints<M> s;
        next.template ask<lines<Q8_0>, M>(0);
        fill<M>(a.sums[0], s);
        for (int k = 0; k < 8; ++k) {
            const Both w = {load(p + 64 * k), load(p + 64 * k + 32)};
            if constexpr (VNNI) {
                const __m256i flip = _mm256_set1_epi8((char) 0x80);  // signed to unsigned: plus 128
                add_fours<M, 32>({_mm256_xor_si256(w[0], flip), _mm256_xor_si256(w[1], flip)}, a.values[0] + 4 * k, s);
            } else {
                add_signed<M>(w, a.values[0] + 4 * k, s);
            }
        }
        add<M>(s, p + 512, a.scales, sum);
    }

    // The sign goes to the values, which are never -128.
    template <int M> INLINE void add_signed(const Both & w, const int8_t * values, Ints<M> & s) {
        const Both size = {_mm256_abs_epi8(w[0]), _mm256_abs_epi8(w[1])};
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const __m256i v = four(values + m * 32);
#pragma GCC unroll 2
            for (int h = 0; h < HALVES; ++h) {
                const __m256i twos = _mm256_maddubs_epi16(size[h], _mm256_sign_epi8(v, w[h]));
                s[m][h] = _mm256_add_epi32(s[m][h], _mm256_madd_epi16(twos, _mm256_set1_epi16(1)));
            }
        }
    }
};

struct Q6_K {
    template <int M> using Act = Large<M>;
    static constexpr int FEW = ROWS, SIZE = 3360, ZERO = 32, UNITS = 16;

    template <int M, class N> INLINE void vector(const char * p, const N & next, const Act<M> & a, Floats<M> & sum) {
        Ints<M> total = {};
        for (int unit = 0; unit < UNITS; ++unit) {
            Ints<M> s;
            next.template ask<lines<Q6_K>, M>(lines<Q6_K> * unit);
            fill<M>(a.sums[unit], s);
            add_16<M>(p + 128 * unit, p + 2048 + 64 * unit, a.values[0] + 16 * unit, s);
            add_scaled<M>(s, p + 3072 + 16 * unit, total);
        }
        add<M>(total, p + 3328, a.scales, sum);
    }

    // Four low bits, and two high ones.
    template <int M> INLINE void add_16(const char * low, const char * high, const int8_t * values, Ints<M> & s) {
        const __m256i mask = _mm256_set1_epi8(15);
        Both two = {load(high), load(high + 32)}, lower = {load(low), load(low + 32)};
        add_fours<M, 256>({with<0, -4>(lower[0], two[0], mask), with<0, -4>(lower[1], two[1], mask)}, values, s);
        add_fours<M, 256>({with<4, -2>(lower[0], two[0], mask), with<4, -2>(lower[1], two[1], mask)}, values + 4, s);
        lower[0] = load(low + 64);
        lower[1] = load(low + 96);
        add_fours<M, 256>({with<0, 0>(lower[0], two[0], mask), with<0, 0>(lower[1], two[1], mask)}, values + 8, s);
        add_fours<M, 256>({with<4, 2>(lower[0], two[0], mask), with<4, 2>(lower[1], two[1], mask)}, values + 12, s);
    }

    template <int LOW, int HIGH> INLINE __m256i with(__m256i low, __m256i high, __m256i mask) {
        return _mm256_or_si256(bits<LOW>(low, mask), bits<HIGH>(high, _mm256_set1_epi8(0x30)));
    }
};

struct Q4_K {
    template <int M> using Act = Large<M>;
    static constexpr int FEW = ROWS, SIZE = 2368, ZERO = 0, UNITS = 8;

    template <int M, class N> INLINE void vector(const char * p, const N & next, const Act<M> & a, Floats<M> & sum) {
        Ints<M> total = {};
        for (int unit = 0; unit < UNITS; ++unit) {
            Ints<M> s = {};
            next.template ask<lines<Q4_K>, M>(lines<Q4_K> * unit);
            add_nibbles<M, 256>(p + 256 * unit, a.values[0] + 32 * unit, s);
            add_scaled<M>(s, p + 2048 + 16 * unit, total);
        }
        add<M>(total, p + 2304, a.scales, sum);
        minima<M>(p, a, sum);
    }

    // sums: of the values of two units, in 16 bits each
    template <int M> INLINE void minima(const char * p, const Act<M> & a, Floats<M> & sum) {
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; ++h) {
            __m256i least[4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
                least[k] = _mm256_cvtepi8_epi16(sixteen(p + 2176 + 32 * k + 16 * h));
            }
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                __m256i dot = _mm256_setzero_si256();
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) {
                    dot = _mm256_add_epi32(dot, _mm256_madd_epi16(least[k], _mm256_set1_epi32(a.sums[k][m])));
                }
                const __m256 other = _mm256_mul_ps(halves(p + 2336 + 16 * h), _mm256_set1_ps(a.scales[m]));
                sum[m][h] = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(dot), other, sum[m][h]);
            }
        }
    }
};

// ---- 16 columns, all of a row's blocks

INLINE __m256 silu(__m256 x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    return _mm512_castps512_ps256(ggml_v_silu(_mm512_zextps256_ps512(x)));
#else
    return ggml_v_silu(x);
#endif
}

INLINE void put(const Out & out, size_t m, const __m256 * sums) {
#pragma GCC unroll 2
    for (int h = 0; h < HALVES; ++h) {
        float * const to = out.to + m * out.stride + 8 * h;
        __m256 sum = sums[h];
        if (out.gated) {
            sum = _mm256_mul_ps(silu(_mm256_loadu_ps(to)), sum);
        }
        if (out.plus != nullptr) {
            sum = _mm256_add_ps(sum, _mm256_loadu_ps(out.plus + m * out.plus_stride + 8 * h));
        }
        _mm256_storeu_ps(to, sum);
    }
}

// What is read next, and where that is known already.
struct Asked {
    const char *far, *near;
    template <int LINES, int M> void ask(int first) const { ::ask<LINES, M>(Next{far, near}, first); }
};
struct Known {
    template <int LINES, int M> void ask(int) const {}
};

template <class W, int M, bool AGAIN>
void vectors(int blocks, const void * work, const char * p, const Way & way, const Out & out) {
    auto a = (const typename W::template Act<M> *) work;
    Floats<M> sum;
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
        sum[m][0] = sum[m][1] = _mm256_setzero_ps();
    }
    for (int i = 0; i < blocks; ++i, p += W::SIZE) {
        if constexpr (AGAIN) {
            W::template vector<M>(p, Known{}, a[i], sum);
        } else {
            const Asked next = {ahead<AHEAD>(p, way), ahead<NEAR>(p, way)};
            W::template vector<M>(p, next, a[i], sum);
            next.template ask<of_tile<W> % W::UNITS, M>(lines<W> * W::UNITS);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
        put(out, m, sum[m]);
    }
}

// again: the weights were read just now, for the group before.
template <class W, int M = ROWS>
void columns(int rows, int groups, int blocks, const void * work, const char * p, Way way, const Out & out,
             bool again) {
    if constexpr (M > 0) {
        if (rows != M) {
            columns<W, M - 1>(rows, groups, blocks, work, p, way, out, again);
        } else if (again) {
            vectors<W, M, true>(blocks, work, p, way, out);
        } else {
            vectors<W, M, false>(blocks, work, p, way, out);
        }
    }
}

// ---- activations, rounded to 8 bits as llama.cpp does it

INLINE float largest(__m256 v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

INLINE __m256 size_of(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

// The sums of values 0, 1, 4, 5, ... of sixteen, and of the others: they meet in one place of `plus_fours` in 16 bits.
struct Sums {
    int16_t of[2];
    int all() const { return of[0] + of[1]; }
};

// Sixteen values times `by`; returns their sums.
INLINE Sums rounded(const float * x, __m256 by, int8_t * to) {
    const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), by));
    const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), by));
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xD8);
    const __m128i values = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *) to, values);
    __m128i twos = _mm_maddubs_epi16(_mm_set1_epi8(1), values);
    twos = _mm_add_epi16(twos, _mm_srli_si128(twos, 8));
    const int32_t both = _mm_cvtsi128_si32(_mm_add_epi16(twos, _mm_srli_si128(twos, 4)));
    Sums sums;
    memcpy(&sums, &both, sizeof sums);
    return sums;
}

// Minus ZERO times the sums, as the products that they are added to are held.
template <class W> INLINE int32_t start_of(Sums sums) {
    if (VNNI || W::ZERO == 0) {
        return -W::ZERO * sums.all();
    }
    const int16_t both[2] = {(int16_t) (-W::ZERO * sums.of[0]), (int16_t) (-W::ZERO * sums.of[1])};
    int32_t start;
    memcpy(&start, both, sizeof start);
    return start;
}

// A row's block; its scale and sums are `rows` apart from one another.
template <class W> INLINE void quantise(const float * x, int8_t * values, float * scale, int32_t * sums, int rows) {
    constexpr int WIDE = W::template Act<1>::values_in_row;
    __m256 highest = size_of(_mm256_loadu_ps(x));
    for (int k = 8; k < WIDE; k += 8) {
        highest = _mm256_max_ps(highest, size_of(_mm256_loadu_ps(x + k)));
    }
    const float most = largest(highest);
    const __m256 by = _mm256_set1_ps(most != 0 ? 127 / most : 0);
    *scale = WIDE == 32 ? _cvtsh_ss(_cvtss_sh(most / 127, 0)) : most / 127;
    Sums of_16[WIDE / 16];
    for (int k = 0; k < WIDE / 16; ++k) {
        of_16[k] = rounded(x + 16 * k, by, values + 16 * k);
    }
    if constexpr (WIDE == 32) {
        *sums = start_of<W>({(int16_t) (of_16[0].of[0] + of_16[1].of[0]), (int16_t) (of_16[0].of[1] + of_16[1].of[1])});
    } else if constexpr (W::ZERO != 0) {
        for (int k = 0; k < WIDE / 16; ++k) {
            sums[k * rows] = start_of<W>(of_16[k]);
        }
    } else {
        for (int k = 0; k < WIDE / 64; ++k) {
            const Sums * s = of_16 + 4 * k;
            const int16_t both[2] = {(int16_t) (s[0].all() + s[1].all()), (int16_t) (s[2].all() + s[3].all())};
            memcpy(&sums[k * rows], both, sizeof both);
        }
    }
}

// RMS norm, as llama.cpp's: squares are added up in doubles.
void normalise(const float * x, const float * weight, float eps, int width, float * to) {
    __m256d sums[4] = {};
    for (int i = 0; i < width; i += 16) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            const __m128 v = _mm_loadu_ps(x + i + 4 * k);
            sums[k] = _mm256_add_pd(sums[k], _mm256_cvtps_pd(_mm_mul_ps(v, v)));
        }
    }
    const __m256d four = _mm256_add_pd(_mm256_add_pd(sums[0], sums[1]), _mm256_add_pd(sums[2], sums[3]));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    const float mean = (float) (_mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two))) / width);
    const __m256 scale = _mm256_set1_ps(1 / std::sqrt(mean + eps));
    for (int i = 0; i < width; i += 8) {
        const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + i), scale);
        _mm256_storeu_ps(to + i, _mm256_mul_ps(v, _mm256_loadu_ps(weight + i)));
    }
}

}  // namespace
