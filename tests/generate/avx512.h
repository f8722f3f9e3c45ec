// AVX-512's dot products in plain C++, after Intel's description of each instruction, for CPUs that do not have them.
#include <cstdint>
#include <cstring>
#include <immintrin.h>

static inline float widened(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
// VDPBF16PS: lane by lane the odd elements' product is added first, then the even ones'.
static inline __m512 emulated_dpbf16(__m512 sum, __m512bh a, __m512bh b) {
    uint16_t x[32], y[32];
    memcpy(x, &a, sizeof x), memcpy(y, &b, sizeof y);
    for (int i = 0; i < 16; i++) {
        sum[i] += widened(x[2 * i + 1]) * widened(y[2 * i + 1]);
        sum[i] += widened(x[2 * i]) * widened(y[2 * i]);
    }
    return sum;
}
// VPDPBUSD: four unsigned bytes of a times four signed ones of b, into each 32-bit lane.
static inline __m512i emulated_dpbusd(__m512i sum, __m512i a, __m512i b) {
    int32_t lanes[16];
    uint8_t x[64];
    int8_t y[64];
    memcpy(lanes, &sum, sizeof lanes), memcpy(x, &a, sizeof x), memcpy(y, &b, sizeof y);
    for (int i = 0; i < 64; i++) lanes[i / 4] += (int32_t)x[i] * y[i];
    memcpy(&sum, lanes, sizeof sum);
    return sum;
}
static inline __m512i emulated_load(const void* p) { __m512i v; memcpy(&v, p, sizeof v); return v; }
static inline __m512i emulated_set1(char c) { __m512i v; memset(&v, c, sizeof v); return v; }
static inline float emulated_sum(__m512 v) { float sum = 0; for (int i = 0; i < 16; i++) sum += v[i]; return sum; }
static inline int32_t emulated_sum(__m512i v) {
    int32_t lanes[16], sum = 0;
    memcpy(lanes, &v, sizeof lanes);
    for (int lane : lanes) sum += lane;
    return sum;
}
#define _mm512_dpbf16_ps emulated_dpbf16
#define _mm512_dpbusd_epi32 emulated_dpbusd
#define _mm512_loadu_si512 emulated_load
#define _mm512_set1_epi8 emulated_set1
#define _mm512_reduce_add_ps emulated_sum
#define _mm512_reduce_add_epi32 emulated_sum
#define MIAOBI_AVX512
