/* Forced in before every C++ file of llama.cpp where GCC builds for a CPU with AMX.
 * GCC 12 declares the operand of ldtilecfg as one pointer (8 bytes) instead of the 64 bytes that the
 * instruction reads, so it may drop the stores of the configuration; the first matrix product then dies. */
#if defined(__AMX_TILE__) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
struct __attribute__((may_alias)) edge_tile_config { unsigned char bytes[64]; };
#define _tile_loadconfig(config) \
    __asm__ volatile("ldtilecfg\t%X0" ::"m"(*(const struct edge_tile_config *) (config)))
#endif
