// What llama.cpp computes with edge/csrc in place of its own, against float64 or to the bit: products, layers, attention.
//
// A line for each case: what was found, and `ok` or `WRONG`. Ends with 1 where a case is wrong.

#include "ggml_cpu.h"

#include <cstdarg>
#include <cstdio>
#include <fstream>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr int WIDTH = 768, COLUMNS = 96, HEAD = 32;

using Doubles = std::vector<double>;
using Halves = std::vector<ggml_fp16_t>;

bool all_right = true;

__attribute__((format(printf, 2, 3))) void say(bool right, const char * format, ...) {
    va_list given;
    va_start(given, format);
    vprintf(format, given);
    va_end(given);
    puts(right ? " ok" : " WRONG");
    fflush(stdout);
    all_right &= right;
}

// The largest difference, as a share of the largest result.
double error(const Floats & found, const Doubles & right) {
    double most = 1e-9, off = 0;
    for (size_t i = 0; i < right.size(); ++i) {
        most = std::max(most, std::fabs(right[i]));
        off = found[i] == found[i] ? std::max(off, std::fabs(found[i] - right[i])) : INFINITY;
    }
    return off / most;
}

bool alike(const float * a, const float * b, size_t count) { return memcmp(a, b, count * sizeof *a) == 0; }

// ---- weights

double half(const uint8_t * at) {
    ggml_fp16_t value;
    memcpy(&value, at, sizeof value);
    return ggml_fp16_to_fp32(value);
}

// What the bytes of a block stand for.

void nibbles(const uint8_t * codes, double * values) {
    for (int i = 0; i < 16; ++i) {
        values[i] = codes[i] & 15;
        values[i + 16] = codes[i] >> 4;
    }
}

void meant_q4_0(const uint8_t * block, double * values) {
    nibbles(block + 2, values);
    std::for_each(values, values + 32, [&](double & value) { value = (value - 8) * half(block); });
}

void meant_q4_1(const uint8_t * block, double * values) {
    nibbles(block + 4, values);
    std::for_each(values, values + 32, [&](double & value) { value = value * half(block) + half(block + 2); });
}

void meant_q8_0(const uint8_t * block, double * values) {
    std::transform(block + 2, block + 34, values, [&](uint8_t code) { return (int8_t) code * half(block); });
}

// 6 bits of scale and of minimum for 32 values each: those of the last four lie in three parts.
void meant_q4_k(const uint8_t * block, double * values) {
    const uint8_t *const six = block + 4, *const codes = block + 16;
    for (int i = 0; i < 256; ++i) {
        const int unit = i / 32, k = unit % 4;
        const int scale = unit < 4 ? six[k] & 63 : (six[k + 8] & 15) + (six[k] >> 6) * 16;
        const int least = unit < 4 ? six[k + 4] & 63 : (six[k + 8] >> 4) + (six[k + 4] >> 6) * 16;
        const int code = codes[i / 64 * 32 + i % 32] >> (unit % 2 * 4) & 15;
        values[i] = half(block) * scale * code - half(block + 2) * least;
    }
}

// 4 low bits, 2 high ones, a scale in 8 bits for 16 values.
void meant_q6_k(const uint8_t * block, double * values) {
    for (int i = 0; i < 256; ++i) {
        const int in_half = i % 128, low = block[i / 128 * 64 + in_half % 64] >> (in_half / 64 * 4) & 15;
        const int high = block[128 + i / 128 * 32 + i % 32] >> (in_half / 32 * 2) & 3;
        values[i] = half(block + 208) * (int8_t) block[192 + i / 16] * (low + 16 * high - 32);
    }
}

void meant(const Kind & kind, const uint8_t * block, double * values) {
    switch (kind.type) {
        case GGML_TYPE_Q4_0: meant_q4_0(block, values); break;
        case GGML_TYPE_Q4_1: meant_q4_1(block, values); break;
        case GGML_TYPE_Q8_0: meant_q8_0(block, values); break;
        case GGML_TYPE_Q4_K: meant_q4_k(block, values); break;
        default: meant_q6_k(block, values); break;
    }
}

Bytes weights(const Kind & kind, int columns, int seed) { return random_weights(kind, WIDTH, columns, seed); }

ggml_tensor * laid_out(Ggml & ggml, const Kind & kind, const Bytes & stored) {
    return ggml.weight(kind, WIDTH, stored, ggml.laid_out());
}

// ---- products

// Whole numbers, and 127 in each block: rounding them to 8 bits changes nothing.
void products(const Kind & kind) {
    const int counts[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 64, 80, 150}, most = 150;
    Ggml ggml;
    if (kind.type == GGML_TYPE_Q4_1 && ggml.repacking.count("AMX") == 0) {
        return;  // llama.cpp's own, which only its AMX has
    }
    const Bytes stored = weights(kind, COLUMNS, 5);
    Doubles values_of(COLUMNS * WIDTH);
    const size_t wide = ggml_blck_size(kind.type);
    for (size_t i = 0; i < values_of.size() / wide; ++i) {
        meant(kind, stored.data() + i * ggml_type_size(kind.type), values_of.data() + i * wide);
    }
    Random random(6);
    Floats values(most * WIDTH);
    for (size_t i = 0; i < values.size(); ++i) {
        values[i] = i % 32 == 0 ? 127 : (float) (random() % 253) - 126;
    }
    Doubles right(most * COLUMNS);
    Floats alone;
    ggml.threads(1);
    ggml_tensor * const weight = laid_out(ggml, kind, stored);
    for (int row = 0; row < most; ++row) {
        for (int column = 0; column < COLUMNS; ++column) {
            for (int i = 0; i < WIDTH; ++i) {
                right[row * COLUMNS + column] += values[row * WIDTH + i] * values_of[column * WIDTH + i];
            }
        }
        const Floats one = ggml.product(weight, &values[row * WIDTH], 1);
        alone.insert(alone.end(), one.begin(), one.end());
    }
    ggml.threads(2);
    for (const int rows : counts) {
        const Floats found = ggml.product(weight, values.data(), rows);
        const double off = error(found, Doubles(right.begin(), right.begin() + rows * COLUMNS));
        const bool same = alike(found.data(), alone.data(), found.size());
        say(off < 1e-6 && same, "products %s, %d rows: error %.1e, %s as alone:", kind.name(), rows, off,
            same ? "the same" : "not the same");
    }
}

// Products of blocks of 32 that are rounded to 8 bits, added up in order and rounded to float each.
Floats in_order(const Kind & kind, const Bytes & stored, const Floats & values) {
    const size_t size = ggml_type_size(kind.type), rows = values.size() / WIDTH, blocks = WIDTH / 32;
    Floats totals(rows * COLUMNS);
    for (size_t i = 0; i < totals.size(); ++i) {
        for (size_t k = 0; k < blocks; ++k) {
            const float * const x = &values[i / COLUMNS * WIDTH + 32 * k];
            const uint8_t * const block = &stored[(i % COLUMNS * blocks + k) * size];
            float most = 0;
            std::for_each(x, x + 32, [&](float value) { most = std::max(most, std::fabs(value)); });
            const float times = 127 / most, by = ggml_fp16_to_fp32(ggml_fp32_to_fp16(most / 127));
            int dot = 0;
            for (int j = 0; j < 32; ++j) {
                const uint8_t four = block[2 + j % 16];
                const int code = kind.type == GGML_TYPE_Q8_0 ? (int8_t) block[2 + j] : (j < 16 ? four & 15 : four >> 4) - 8;
                dot += code * (int) std::nearbyint(x[j] * times);
            }
            const float scale = by * (float) half(block);
            totals[i] = (float) ((long double) dot * scale + totals[i]);
        }
    }
    return totals;
}

void exact(const Kind & kind) {
    Ggml ggml;
    const Bytes stored = weights(kind, COLUMNS, 5);
    const Floats values = normals(21 * WIDTH, 10);
    const Floats found = ggml.product(laid_out(ggml, kind, stored), values.data(), 21), right = in_order(kind, stored, values);
    say(alike(found.data(), right.data(), right.size()), "products %s, sums of blocks in order, to the bit:", kind.name());
}

// ---- a layer without its attention

enum Weight { Q, K, V, O, GATE, UP, DOWN, WEIGHTS };

struct Layer {
    Ggml & ggml;
    ggml_tensor ** weights;
    int rows;
    ggml_context * context = Ggml::context();
    Random random{8};
    ggml_tensor * positions = nullptr;

    ggml_tensor * vector(int size) {
        Floats values(size);
        std::generate(values.begin(), values.end(), [&] { return (float) uniform(random, 0.5, 1.5); });
        return ggml.plain(GGML_TYPE_F32, {size}, values.data());
    }
    ggml_tensor * normed(ggml_tensor * x) { return ggml_mul(context, ggml_rms_norm(context, x, 1e-5f), vector(WIDTH)); }
    ggml_tensor * product(Weight which, ggml_tensor * x) { return ggml_mul_mat(context, weights[which], x); }
    ggml_tensor * biased(Weight which, ggml_tensor * x) {
        return ggml_add(context, product(which, x), vector((int) weights[which]->ne[1]));
    }
    ggml_tensor * turned(ggml_tensor * x) {
        const int64_t size = x->ne[0];
        ggml_tensor * const heads = ggml_reshape_3d(context, x, HEAD, size / HEAD, rows);
        return ggml_reshape_2d(context, ggml_rope(context, heads, positions, HEAD, GGML_ROPE_TYPE_NEOX), size, rows);
    }

    // Results and both caches, one after the other. nodes: how many llama.cpp computed.
    Floats run(const float * values, bool one_by_one, int & nodes) {
        std::vector<int32_t> places(rows);
        std::vector<int64_t> cells(rows);
        for (int i = 0; i < rows; ++i) {
            places[i] = i + 3;
            cells[i] = rows - 1 - i;
        }
        positions = ggml.plain(GGML_TYPE_I32, {rows}, places.data());
        ggml_tensor * const where = ggml.plain(GGML_TYPE_I64, {rows}, cells.data());
        const Halves none(rows * COLUMNS);
        ggml_tensor * caches[2];
        ggml_tensor * const x = ggml.plain(GGML_TYPE_F32, {WIDTH, rows}, values);
        ggml_tensor * const first = normed(x);
        ggml_tensor *const q = turned(biased(Q, first)), *const v = biased(V, first), *const k = turned(biased(K, first));
        ggml_cgraph * const graph = ggml_new_graph(context);
        for (ggml_tensor * wanted : {q, v, k}) {
            ggml_build_forward_expand(graph, wanted);
        }
        for (int i = 0; i < 2; ++i) {
            caches[i] = ggml.plain(GGML_TYPE_F16, {COLUMNS, rows}, none.data());
            ggml_build_forward_expand(graph, ggml_set_rows(context, caches[i], i == 0 ? k : v, where));
        }
        ggml_tensor * const y = ggml_add(context, product(O, q), x);
        ggml_tensor * const second = normed(y);
        ggml_tensor *const gate = product(GATE, second), *const up = product(UP, second);
        ggml_tensor * const last = ggml_add(context, product(DOWN, ggml_swiglu_split(context, gate, up)), y);
        ggml_build_forward_expand(graph, last);
        ggml_set_output(last);
        for (int i = 0; one_by_one && i < ggml_graph_n_nodes(graph); ++i) {
            ggml_set_output(ggml_graph_node(graph, i));
        }
        GGML_ASSERT(ggml_gallocr_alloc_graph(ggml_gallocr_new(ggml.plain_memory), graph));
        nodes = 0;
        auto count = [](void * counted) { return ++*(int *) counted, false; };
        ggml_backend_cpu_set_abort_callback(ggml.backend, count, &nodes);
        GGML_ASSERT(ggml_backend_graph_compute(ggml.backend, graph) == GGML_STATUS_SUCCESS);
        ggml_backend_cpu_set_abort_callback(ggml.backend, nullptr, nullptr);
        Floats results = Ggml::read(last);
        for (const ggml_tensor * cache : caches) {
            const Floats kept = Ggml::read(cache);
            results.insert(results.end(), kept.begin(), kept.end());
        }
        return results;
    }
};

// Nodes that are put together give what they give where each is asked for. Of 21 there stay 5, or 8 of many rows: three
// products with a norm and biases, rotations and caches, a sum, gate and up, a sum.
void layers(const Kind & kind, const Kind & of_values) {
    Ggml ggml;
    ggml_tensor * all[WEIGHTS];
    for (int i = 0; i < WEIGHTS; ++i) {
        const Kind & own = i == V ? of_values : kind;
        all[i] = laid_out(ggml, own, weights(own, i == K || i == V ? COLUMNS : WIDTH, i));
    }
    const Floats values = normals(40 * WIDTH, 9);
    for (const int rows : {1, 2, 5, 9, 16, 17, 40}) {
        int nodes = 0;
        const Floats right = Layer{ggml, all, rows}.run(values.data(), true, nodes);
        bool same = true;
        for (const int threads : {1, 2, 3}) {
            ggml.threads(threads);
            const Floats found = Layer{ggml, all, rows}.run(values.data(), false, nodes);
            same &= alike(found.data(), right.data(), right.size());
        }
        say(same && nodes == (rows <= 16 ? 5 : 8), "layer %s %s, %d rows: %d nodes, %s as one by one:", kind.name(),
            of_values.name(), rows, nodes, same ? "the same" : "not the same");
    }
}

// ---- attention

enum Mask { NONE, CAUSAL, HOLES };

struct Attention {
    int width, heads, cached, tokens, streams, cells;
    Mask mask;

    Floats queries{};            // [streams, heads, tokens, width]
    Halves keys{}, values{};     // [streams, cached, cells, width]
    std::vector<bool> seen{};    // [streams, tokens, cells]

    // Cells that no token sees hold no numbers.
    void fill() {
        Random random(7);
        queries = normals(streams * heads * tokens * width, 7, 2);
        seen.resize(streams * tokens * cells);
        for (size_t i = 0; i < seen.size(); ++i) {
            const int cell = (int) (i % cells), token = (int) (i / cells % tokens);
            seen[i] = mask == NONE || cell <= token + cells - tokens;
            if (mask == HOLES) {
                const bool kept = random() % 10 < 3 && (cell < cells / 4 || cell >= cells / 2);
                seen[i] = seen[i] && kept && i >= (size_t) cells;
            }
        }
        int seed = 20;
        for (Halves * cache : {&keys, &values}) {
            const Floats numbers = normals(streams * cached * cells * width, ++seed);
            cache->resize(numbers.size());
            for (size_t i = 0; i < numbers.size(); ++i) {
                const int cell = (int) (i / width % cells), stream = (int) (i / width / cells / cached);
                (*cache)[i] = ggml_fp32_to_fp16(is_seen(stream, cell) ? numbers[i] : NAN);
            }
        }
    }

    bool is_seen(int stream, int cell) const {
        for (int token = 0; token < tokens; ++token) {
            if (seen[(stream * tokens + token) * cells + cell]) {
                return true;
            }
        }
        return false;
    }

    // Of `count` tokens from one on: `[streams, count, heads, width]`.
    Floats found(Ggml & ggml, int from, int count) const {
        Floats some(streams * heads * count * width);
        for (int i = 0; i < streams * heads; ++i) {
            const float * const first = &queries[(i * tokens + from) * width];
            std::copy(first, first + count * width, &some[i * count * width]);
        }
        ggml_tensor * hidden = nullptr;
        if (mask != NONE) {
            Halves bias(streams * count * cells);
            for (size_t i = 0; i < bias.size(); ++i) {
                const size_t stream = i / cells / count, token = from + i / cells % count;
                bias[i] = ggml_fp32_to_fp16(seen[(stream * tokens + token) * cells + i % cells] ? 0 : -INFINITY);
            }
            hidden = ggml.plain(GGML_TYPE_F16, {cells, count, 1, streams}, bias.data());
        }
        ggml_context * const context = Ggml::context();
        ggml_tensor * const result = ggml_flash_attn_ext(
            context, ggml.plain(GGML_TYPE_F32, {width, count, heads, streams}, some.data()),
            ggml.plain(GGML_TYPE_F16, {width, cells, cached, streams}, keys.data()),
            ggml.plain(GGML_TYPE_F16, {width, cells, cached, streams}, values.data()), hidden,
            1 / std::sqrt((float) width), 0, 0);
        return ggml.compute(context, result);
    }

    // A token that sees nothing gets zeros.
    Doubles right() const {
        Doubles results(streams * tokens * heads * width);
        for (size_t i = 0; i < results.size() / width; ++i) {
            const size_t head = i % heads, token = i / heads % tokens, stream = i / heads / tokens;
            const float * const query = &queries[((stream * heads + head) * tokens + token) * width];
            const size_t cache = (stream * cached + head / (heads / cached)) * cells;
            Doubles scores(cells, -INFINITY);
            double highest = -INFINITY, whole = 0;
            for (int cell = 0; cell < cells; ++cell) {
                if (seen[(stream * tokens + token) * cells + cell]) {
                    double dot = 0;
                    for (int d = 0; d < width; ++d) {
                        dot += query[d] * (double) ggml_fp16_to_fp32(keys[(cache + cell) * width + d]);
                    }
                    highest = std::max(highest, scores[cell] = dot / std::sqrt((double) width));
                }
            }
            for (double & score : scores) {
                whole += score = score == -INFINITY ? 0 : std::exp(score - highest);
            }
            for (int cell = 0; cell < cells; ++cell) {
                for (int d = 0; d < width && scores[cell] > 0; ++d) {
                    results[i * width + d] += scores[cell] / whole * ggml_fp16_to_fp32(values[(cache + cell) * width + d]);
                }
            }
        }
        return results;
    }

    void run() {
        fill();
        Ggml ggml;
        const Floats all = found(ggml, 0, tokens);
        ggml.threads(3);
        const Floats again = found(ggml, 0, tokens);
        bool same = alike(again.data(), all.data(), all.size());
        const int row = heads * width;
        ggml.threads(1);
        for (int token = 0; token < tokens; ++token) {
            const Floats one = found(ggml, token, 1);
            for (int stream = 0; stream < streams; ++stream) {
                same &= alike(&one[stream * row], &all[(stream * tokens + token) * row], row);
            }
        }
        const double off = error(all, right());
        const char * const masks[] = {"none", "causal", "holes"};
        say(off < 3e-6 && same, "attention of %d values, %d heads on %d, %d tokens, %d streams, %d cells, mask %s: "
            "error %.1e, %s by threads and alone:", width, heads, cached, tokens, streams, cells, masks[mask], off,
            same ? "the same" : "not the same");
    }
};

// ---- memory

#if defined(__linux__)

// Whether large pages were asked for in the middle of so many bytes.
bool asked_for_large(const void * data, size_t size) {
    const uintptr_t middle = (uintptr_t) data + size / 2;
    bool here = false;
    std::ifstream maps("/proc/self/smaps");
    for (std::string line; std::getline(maps, line);) {
        unsigned long long begin, end;
        if (sscanf(line.c_str(), "%llx-%llx ", &begin, &end) == 2) {
            here = begin <= middle && middle < end;
        } else if (here && line.rfind("VmFlags:", 0) == 0) {
            return line.find(" hg") != std::string::npos;
        }
    }
    return false;
}

void pages() {
    constexpr size_t SIZE = 16 << 20;
    void * const asked = mmap(nullptr, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(asked, SIZE, MADV_HUGEPAGE);
    if (!asked_for_large(asked, SIZE)) {
        return;  // emulators do not tell
    }
    Ggml ggml;
    for (const auto & [name, type] : ggml.repacking) {
        const ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(type, SIZE);
        say(asked_for_large(ggml_backend_buffer_get_base(buffer), SIZE), "pages of %s are large:", name.c_str());
    }
}

#else

void pages() {}

#endif

}  // namespace

int main() {
    for (const Kind & kind : {Q4_0, Q8_0, Q4_K, Q6_K, Q4_1}) {
        products(kind);
    }
    exact(Q4_0);
    exact(Q8_0);
    layers(Q4_0, Q4_0);
    layers(Q8_0, Q8_0);
    layers(Q4_K, Q6_K);
    layers(Q4_0, Q8_0);
    const Attention cases[] = {
        {64, 9, 3, 1, 1, 300, NONE},   {64, 9, 3, 1, 3, 257, HOLES}, {128, 12, 2, 1, 1, 1000, CAUSAL},
        {128, 12, 2, 5, 2, 333, HOLES}, {64, 14, 2, 33, 1, 64, HOLES}, {128, 8, 8, 2, 2, 31, CAUSAL},
        {192, 4, 1, 3, 1, 70, HOLES},  {256, 8, 1, 1, 1, 70, CAUSAL}, {64, 9, 3, 1, 1, 1, NONE},
        {64, 4, 2, 70, 2, 128, CAUSAL},
    };
    for (Attention one : cases) {
        one.run();
    }
    pages();
    return all_right ? 0 : 1;
}
