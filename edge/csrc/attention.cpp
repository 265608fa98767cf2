// Attention over 16-bit caches, for x86 CPUs with AVX2 or AVX512.
//
// It takes the place of llama.cpp's flash attention (see build.cmake); other caches are handed on. Where a step
// decodes, llama.cpp goes from cell to cell and head by head, with a call, an exponential and a rounding to 16 bits for
// each; for a prompt it multiplies whole squares of tokens and cells, of which the mask hides half. Here cells that
// the mask hides are passed over by the dozen, those that are left are taken 32 at a time, heads that share keys and
// values read them once, and sums are kept in float32.
// A token's result depends neither on the tokens beside it nor on the number of threads.
//
// The recurrence of the running maximum and sum: Milakov and Gimelshein, arXiv:1805.02867.

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "ops.h"

// llama.cpp's own, renamed by build.cmake.
extern "C" void edge_upstream_flash_attn_ext(const ggml_compute_params * params, ggml_tensor * dst);

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "vec.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int CELLS = 32;  // taken at once
constexpr int HEADS = 4;   // that share a read of keys and values, at most
constexpr int WIDEST = 256;

#if defined(__AVX512F__)

constexpr int LANES = 16, REGISTERS = 4;  // for the values of a head
using Vector = __m512;

INLINE Vector halves(const ggml_fp16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
INLINE Vector load(const float * p) { return _mm512_load_ps(p); }
INLINE void store(float * p, Vector v) { _mm512_store_ps(p, v); }
INLINE Vector all(float x) { return _mm512_set1_ps(x); }
INLINE Vector plus_product(Vector sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
INLINE Vector higher(Vector a, Vector b) { return _mm512_max_ps(a, b); }
INLINE float largest(Vector v) { return _mm512_reduce_max_ps(v); }
INLINE float total(Vector v) { return _mm512_reduce_add_ps(v); }

// The totals of 16 vectors, in order.
INLINE Vector totals(const float (*v)[LANES]) {
    Vector fours[4];
    for (int i = 0; i < 4; ++i) {
        const Vector a = load(v[4 * i]), b = load(v[4 * i + 1]), c = load(v[4 * i + 2]), d = load(v[4 * i + 3]);
        const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
        const __m512d cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
        fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)) + _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    }
    auto merge = [](Vector a, Vector b) {
        return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
    };
    return merge(merge(fours[0], fours[1]), merge(fours[2], fours[3]));
}

#else

constexpr int LANES = 8, REGISTERS = 2;
using Vector = __m256;

INLINE Vector halves(const ggml_fp16_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
INLINE Vector load(const float * p) { return _mm256_load_ps(p); }
INLINE void store(float * p, Vector v) { _mm256_store_ps(p, v); }
INLINE Vector all(float x) { return _mm256_set1_ps(x); }
INLINE Vector plus_product(Vector sum, Vector a, Vector b) { return _mm256_fmadd_ps(a, b, sum); }
INLINE Vector higher(Vector a, Vector b) { return _mm256_max_ps(a, b); }

INLINE float largest(Vector v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

INLINE float total(Vector v) {
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}

// The totals of 8 vectors, in order.
INLINE Vector totals(const float (*v)[LANES]) {
    Vector fours[2];
    for (int i = 0; i < 2; ++i) {
        const Vector a = load(v[4 * i]), b = load(v[4 * i + 1]), c = load(v[4 * i + 2]), d = load(v[4 * i + 3]);
        const __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b));
        const __m256d cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d));
        fours[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)) + _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
    }
    return _mm256_permute2f128_ps(fours[0], fours[1], 0x20) + _mm256_permute2f128_ps(fours[0], fours[1], 0x31);
}

#endif

// Which cells a token sees, some at a time.
class Cells {
  public:
    Cells(const ggml_fp16_t * mask, int64_t count) : mask_(mask), count_(count) {}

    int at[CELLS];
    alignas(64) float bias[CELLS] = {};  // what the mask adds

    // Up to CELLS more of them; 0 at the end.
    int next() {
        int found = 0;
        while (found < CELLS && at_ < count_) {
            if (mask_ == nullptr) {
                at[found] = (int) at_++;
                bias[found++] = 0;
                continue;
            }
            if (at_ % 16 == 0 && at_ + 16 <= count_ && hidden(mask_ + at_)) {
                at_ += 16;
                continue;
            }
            const ggml_fp16_t here = mask_[at_];
            if (here != NONE) {
                at[found] = (int) at_;
                bias[found++] = here == 0 ? 0 : GGML_CPU_FP16_TO_FP32(here);
            }
            ++at_;
        }
        return found;
    }

  private:
    static constexpr ggml_fp16_t NONE = 0xFC00;  // minus infinity

    static bool hidden(const ggml_fp16_t * p) {
        const __m256i none = _mm256_set1_epi16((short) NONE);
        const __m256i same = _mm256_cmpeq_epi16(_mm256_loadu_si256((const __m256i *) p), none);
        return _mm256_movemask_epi8(same) == -1;
    }

    const ggml_fp16_t * mask_;
    int64_t count_, at_ = 0;
};

// Keys or values of one head: cells `stride` bytes apart.
struct Cache {
    const char * data;
    size_t stride;
    const ggml_fp16_t * at(int cell) const { return (const ggml_fp16_t *) (data + cell * stride); }
};

// D of a cell's, that are read soon.
template <int D> INLINE void ask(const ggml_fp16_t * p) {
#pragma GCC unroll 8
    for (int d = 0; d < D; d += 32) {
        _mm_prefetch((const char *) (p + d), _MM_HINT_T0);
    }
}

// G heads of one token, D values each. queries, results: pointers to a head's values.
template <int D, int G>
void attend(const float * const * queries, float scale, Cells cells, Cache keys, Cache values,
            float * const * results) {
    alignas(64) float q[G][D], sums[G][D] = {}, parts[G][LANES][LANES] = {}, weights[G][CELLS];
    float most[G], whole[G];
    for (int g = 0; g < G; ++g) {
        most[g] = -INFINITY;
        whole[g] = 0;
        for (int d = 0; d < D; ++d) {
            q[g][d] = queries[g][d] * scale;
        }
    }
    while (const int count = cells.next()) {
        for (int first = 0; first < count; first += LANES) {
            for (int i = first; i < std::min(first + LANES, count); ++i) {
                const ggml_fp16_t * const key = keys.at(cells.at[i]);
                ask<D>(values.at(cells.at[i]));
                ask<D>(keys.at(cells.at[i] + CELLS));  // most often one that comes next
                Vector dots[G];
                for (int g = 0; g < G; ++g) {
                    dots[g] = all(0);
                }
#pragma GCC unroll 32
                for (int d = 0; d < D; d += LANES) {
                    const Vector k = halves(key + d);
                    for (int g = 0; g < G; ++g) {
                        dots[g] = plus_product(dots[g], load(q[g] + d), k);
                    }
                }
                for (int g = 0; g < G; ++g) {
                    store(parts[g][i - first], dots[g]);
                }
            }
            for (int g = 0; g < G; ++g) {
                store(weights[g] + first, totals(parts[g]) + load(cells.bias + first));
            }
        }
        for (int g = 0; g < G; ++g) {
            for (int i = count; i < CELLS; ++i) {
                weights[g][i] = -INFINITY;
            }
            Vector high = load(weights[g]);
            for (int i = LANES; i < CELLS; i += LANES) {
                high = higher(high, load(weights[g] + i));
            }
            const float before = most[g];
            most[g] = std::max(before, largest(high));
            Vector sum = all(0);
            for (int i = 0; i < CELLS; i += LANES) {
                const Vector weight = ggml_v_expf(load(weights[g] + i) - all(most[g]));
                store(weights[g] + i, weight);
                sum += weight;
            }
            const float kept = before == most[g] ? 1 : std::exp(before - most[g]);
            whole[g] = whole[g] * kept + total(sum);
            if (kept != 1) {
                for (int d = 0; d < D; d += LANES) {
                    store(sums[g] + d, load(sums[g] + d) * all(kept));
                }
            }
        }
        for (int part = 0; part < D; part += REGISTERS * LANES) {
            Vector sum[G][REGISTERS];
            for (int g = 0; g < G; ++g) {
                for (int r = 0; r < REGISTERS; ++r) {
                    sum[g][r] = load(sums[g] + part + r * LANES);
                }
            }
            for (int i = 0; i < count; ++i) {
                const ggml_fp16_t * const value = values.at(cells.at[i]) + part;
#pragma GCC unroll 4
                for (int r = 0; r < REGISTERS; ++r) {
                    const Vector v = halves(value + r * LANES);
                    for (int g = 0; g < G; ++g) {
                        sum[g][r] = plus_product(sum[g][r], v, all(weights[g][i]));
                    }
                }
            }
            for (int g = 0; g < G; ++g) {
                for (int r = 0; r < REGISTERS; ++r) {
                    store(sums[g] + part + r * LANES, sum[g][r]);
                }
            }
        }
    }
    for (int g = 0; g < G; ++g) {
        const float share = whole[g] == 0 ? 0 : 1 / whole[g];
        for (int d = 0; d < D; ++d) {
            results[g][d] = sums[g][d] * share;
        }
    }
}

template <int D>
void attend(int heads, const float * const * queries, float scale, const Cells & cells, Cache keys, Cache values,
            float * const * results) {
    switch (heads) {
        case 1: attend<D, 1>(queries, scale, cells, keys, values, results); break;
        case 2: attend<D, 2>(queries, scale, cells, keys, values, results); break;
        case 3: attend<D, 3>(queries, scale, cells, keys, values, results); break;
        default: attend<D, 4>(queries, scale, cells, keys, values, results); break;
    }
}

// How many of `shared` heads to take at once, so that `others` such sets keep all threads busy: reading keys and values
// costs about as much as one head.
int heads_at_once(int64_t shared, int64_t others, int threads) {
    int best = 1;
    int64_t least = INT64_MAX;
    for (int heads = HEADS; heads >= 1; --heads) {
        const int64_t units = others * ((shared + heads - 1) / heads);
        const int64_t cost = (units + threads - 1) / threads * (std::min<int64_t>(heads, shared) + 1);
        if (cost < least) {
            least = cost;
            best = heads;
        }
    }
    return best;
}

template <int D> void forward(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3];
    float scale;
    memcpy(&scale, dst->op_params, sizeof scale);
    const int64_t tokens = q->ne[1], heads = q->ne[2], streams = q->ne[3];
    const int64_t shared = heads / k->ne[2];
    const int at_once = heads_at_once(shared, tokens * streams * k->ne[2], params->nth);
    const int64_t sets = (shared + at_once - 1) / at_once, units = streams * tokens * k->ne[2] * sets;
    // Sets that share keys and values follow one another on a thread, where that leaves none with more than others.
    const int64_t together = units / sets % params->nth == 0 ? sets : 1;
    auto unit_of_thread = [&](int64_t i) {
        return (i / together * params->nth + params->ith) * together + i % together;
    };
    for (int64_t i = 0, unit; (unit = unit_of_thread(i)) < units; ++i) {
        // Head by head, for all tokens of a prompt read the same keys and values.
        const int64_t set = unit % sets, token = unit / sets % tokens;
        const int64_t head = unit / sets / tokens % k->ne[2], stream = unit / sets / tokens / k->ne[2];
        const int64_t first = head * shared + set * at_once;
        const int count = (int) std::min<int64_t>(at_once, shared - set * at_once);
        const float * queries[HEADS];
        float * results[HEADS];
        for (int g = 0; g < count; ++g) {
            const size_t from = token * q->nb[1] + (first + g) * q->nb[2] + stream * q->nb[3];
            const size_t to = (first + g) * dst->nb[1] + token * dst->nb[2] + stream * dst->nb[3];
            queries[g] = (const float *) ((const char *) q->data + from);
            results[g] = (float *) ((char *) dst->data + to);
        }
        const ggml_fp16_t * seen = nullptr;
        if (mask != nullptr) {
            const size_t from = token * mask->nb[1] + stream % mask->ne[3] * mask->nb[3];
            seen = (const ggml_fp16_t *) ((const char *) mask->data + from);
        }
        const int64_t cache = stream / (streams / k->ne[3]);
        const Cache keys = {(const char *) k->data + head * k->nb[2] + cache * k->nb[3], k->nb[1]};
        const Cache values = {(const char *) v->data + head * v->nb[2] + cache * v->nb[3], v->nb[1]};
        attend<D>(count, queries, scale, Cells(seen, k->ne[1]), keys, values, results);
    }
}

bool served(const ggml_compute_params * params, const ggml_tensor * dst) {
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3], *sinks = dst->src[4];
    float bias, cap;
    memcpy(&bias, dst->op_params + 1, sizeof bias);
    memcpy(&cap, dst->op_params + 2, sizeof cap);
    const bool plain = bias == 0 && cap == 0 && sinks == nullptr && !params->use_ref;
    const bool types = q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16;
    const bool width = k->ne[0] == v->ne[0] && k->ne[0] % 64 == 0 && k->ne[0] <= WIDEST;
    const bool same = k->ne[2] == v->ne[2] && k->ne[3] == v->ne[3] && k->ne[1] <= INT32_MAX;
    const bool one_mask = mask == nullptr || (mask->type == GGML_TYPE_F16 && mask->ne[2] == 1);
    return plain && types && width && same && one_mask;
}

}  // namespace

void ggml_compute_forward_flash_attn_ext(const ggml_compute_params * params, ggml_tensor * dst) {
    if (!served(params, dst)) {
        edge_upstream_flash_attn_ext(params, dst);
        return;
    }
    switch (dst->src[1]->ne[0]) {
        case 64: forward<64>(params, dst); break;
        case 128: forward<128>(params, dst); break;
        case 192: forward<192>(params, dst); break;
        default: forward<256>(params, dst); break;
    }
}

#else

void ggml_compute_forward_flash_attn_ext(const ggml_compute_params * params, ggml_tensor * dst) {
    edge_upstream_flash_attn_ext(params, dst);
}

#endif
