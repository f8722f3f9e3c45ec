// AMX's tiles in plain C++, after Intel's description of each instruction, for CPUs that do not have them.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>

struct Tiles {
    uint8_t lines[8], data[8][16][64];
    uint16_t bytes[8];
};
static thread_local Tiles* tiles;  // none before they are configured, as on the CPU

static inline void emulated_config(const void* from) {
    const uint8_t* c = (const uint8_t*)from;
    if (c[0] != 1 || c[1] != 0) abort();
    tiles = new Tiles();
    for (int t = 0; t < 8; t++) {
        memcpy(&tiles->bytes[t], c + 16 + 2 * t, 2), tiles->lines[t] = c[48 + t];
        if (tiles->bytes[t] > 64 || tiles->lines[t] > 16) abort();
    }
}
static inline void emulated_release() { delete tiles, tiles = nullptr; }
static inline void emulated_zero(int t) { memset(tiles->data[t], 0, 1024); }
static inline void emulated_loadd(int t, const void* from, size_t apart) {  // what is beyond its shape becomes zero
    emulated_zero(t);
    for (int i = 0; i < tiles->lines[t]; i++) memcpy(tiles->data[t][i], (const char*)from + i * apart, tiles->bytes[t]);
}
static inline void emulated_stored(int t, void* to, size_t apart) {
    for (int i = 0; i < tiles->lines[t]; i++) memcpy((char*)to + i * apart, tiles->data[t][i], tiles->bytes[t]);
}
// Raises #UD where the shapes do not fit: lines of c and a, bytes of c and b, bytes of a and lines of b.
static inline void emulated_shapes(int c, int a, int b) {
    if (tiles->lines[c] != tiles->lines[a] || tiles->bytes[c] != tiles->bytes[b]) abort();
    if (tiles->bytes[a] != 4 * tiles->lines[b]) abort();
}
static inline float emulated_half(const uint8_t* at) {
    uint32_t bits = 0;
    memcpy((char*)&bits + 2, at, 2);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
// TDPBF16PS: even and odd elements are added up apart, then together, then to what was there.
static inline void emulated_dpbf16ps(int c, int a, int b) {
    emulated_shapes(c, a, b);
    for (int m = 0; m < tiles->lines[c]; m++) {
        float apart[32] = {};
        for (int k = 0; k < tiles->bytes[a] / 4; k++)
            for (int i = 0; i < tiles->bytes[c] / 2; i++)
                apart[i] = std::fma(emulated_half(tiles->data[a][m] + 4 * k + 2 * (i % 2)),
                                    emulated_half(tiles->data[b][k] + 2 * i), apart[i]);
        float* sums = (float*)tiles->data[c][m];
        for (int n = 0; n < tiles->bytes[c] / 4; n++) sums[n] += apart[2 * n] + apart[2 * n + 1];
    }
}
// TDPBSSD: four signed bytes of a times four of b, into each 32-bit place.
static inline void emulated_dpbssd(int c, int a, int b) {
    emulated_shapes(c, a, b);
    for (int m = 0; m < tiles->lines[c]; m++)
        for (int k = 0; k < tiles->bytes[a] / 4; k++)
            for (int i = 0; i < tiles->bytes[c]; i++)
                ((int32_t*)tiles->data[c][m])[i / 4] +=
                    (int8_t)tiles->data[a][m][4 * k + i % 4] * (int8_t)tiles->data[b][k][i];
}
#undef _tile_zero
#define _tile_loadconfig emulated_config
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbf16ps emulated_dpbf16ps
#define _tile_dpbssd emulated_dpbssd
#define MIAOBI_AMX
static inline bool may_use_tiles() { return true; }
