// How fast products with quantised weights are, on one thread: ours, llama.cpp's own, and the instructions alone.
//
// A line for each type and number of rows, in billions of operations a second of a thread's processor time: the median,
// and the quartiles in brackets. The three run in turn. llama.cpp's own are those of this library for weights that ours
// do not take, of 8 columns more than a multiple of 16, where its own loader would put them.

#include "ggml_cpu.h"

#include <immintrin.h>
#include <time.h>

#include <cstdio>

namespace {

constexpr int WIDTH = 1536, COLUMNS = 8960;
constexpr size_t BEYOND_CACHES = 96 << 20;
constexpr double SECONDS = 1.5;

double now() {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

// ---- the instructions that multiply, in registers alone

#if defined(__AVX512VNNI__)
using Vector = __m512i;
const char * const INSTRUCTIONS = "vpdpbusd of 512 bits";
Vector plus_products(Vector sum, Vector a, Vector b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVXVNNI__)
using Vector = __m256i;
const char * const INSTRUCTIONS = "vpdpbusd of 256 bits";
Vector plus_products(Vector sum, Vector a, Vector b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#else
using Vector = __m256i;
const char * const INSTRUCTIONS = "vpmaddubsw, vpmaddwd, vpaddd of 256 bits";
Vector plus_products(Vector sum, Vector a, Vector b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
#endif

constexpr int SUMS = 12, TURNS = 100000;

void instructions() {
    Vector sums[SUMS] = {}, a = {}, b = {};
    asm("" : "+v"(b));
    for (int turn = 0; turn < TURNS; ++turn) {
#pragma GCC unroll 12
        for (int i = 0; i < SUMS; ++i) {
            asm("" : "+v"(a));  // or the same product is computed once
            sums[i] = plus_products(sums[i], a, b);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < SUMS; ++i) {
        asm volatile("" ::"v"(sums[i]));
    }
}

constexpr double OPERATIONS = 2.0 * sizeof(Vector) * SUMS * TURNS;

// ---- products

// Copies of a weight, which together are in no cache.
std::vector<ggml_tensor *> copies(Ggml & ggml, const Kind & kind, int columns, bool ours) {
    const Bytes stored = random_weights(kind, WIDTH, columns, 1);
    std::vector<ggml_tensor *> all;
    for (size_t size = 0; size < BEYOND_CACHES; size += stored.size()) {
        all.push_back(ggml.weight(kind, WIDTH, stored, ours ? ggml.laid_out() : ggml.repacking["CPU_REPACK"]));
    }
    return all;
}

// Products of some rows with one copy after the other.
struct Products {
    Ggml & ggml;
    std::vector<ggml_cgraph *> graphs{};
    double operations = 0;
    size_t turn = 0;

    Products(Ggml & ggml, const std::vector<ggml_tensor *> & weights, int rows) : ggml(ggml) {
        const Floats values = normals(WIDTH * rows, 2);
        ggml_tensor * const input = ggml.plain(GGML_TYPE_F32, {WIDTH, rows}, values.data());
        for (ggml_tensor * weight : weights) {
            ggml_context * const context = Ggml::context();
            graphs.push_back(ggml.graph_of(context, ggml_mul_mat(context, weight, input)));
        }
        operations = 2.0 * WIDTH * weights[0]->ne[1] * rows;
    }

    void run() { ggml.compute(graphs[turn++ % graphs.size()]); }
};

struct Speeds {
    std::vector<double> found;

    template <class F> void measure(double operations, F run) {
        const double begin = now();
        run();
        found.push_back(1e-9 * operations / (now() - begin));
    }
    double at(double share) {
        std::sort(found.begin(), found.end());
        return found[(size_t) (share * (found.size() - 1))];
    }
    void print() { printf("  %6.0f [%5.0f %5.0f]", at(0.5), at(0.25), at(0.75)); }
};

void compare(const Kind & kind, int rows, Products ours, Products own) {
    Speeds speeds[3];
    const double end = now() + SECONDS;
    for (int turn = 0; turn < 8 || now() < end; ++turn) {
        speeds[0].measure(ours.operations, [&] { ours.run(); });
        speeds[1].measure(own.operations, [&] { own.run(); });
        speeds[2].measure(OPERATIONS, instructions);
    }
    printf("%-5s %5d", kind.name(), rows);
    for (Speeds & one : speeds) {
        one.print();
    }
    printf("  %5.2f  %5.2f\n", speeds[0].at(0.5) / speeds[1].at(0.5), speeds[0].at(0.5) / speeds[2].at(0.5));
    fflush(stdout);
}

}  // namespace

int main() {
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    Ggml ggml;
    ggml.threads(1);
    printf("GOP/s; a weight of %d columns of %d values; instructions: %s\n", COLUMNS, WIDTH, INSTRUCTIONS);
    printf("type   rows  %-21s  %-21s  %-21s  ratio  share\n", "ours", "llama.cpp's own", "instructions alone");
    for (const Kind & kind : {Q4_0, Q8_0, Q4_K, Q6_K}) {
        const auto ours = copies(ggml, kind, COLUMNS, true), own = copies(ggml, kind, COLUMNS + 8, false);
        for (const int rows : {1, 4, 16, 64, 256}) {
            compare(kind, rows, {ggml, ours, rows}, {ggml, own, rows});
        }
    }
}
