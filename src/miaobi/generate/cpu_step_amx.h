// The matrix products of cpu_step.cpp on CPUs with AMX's tiles, in whose middle this is: where Linux lets them be used,
// instead of those of cpu_step_avx512.h.
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && !defined(MIAOBI_AMX)
#define MIAOBI_AMX
#include <sys/syscall.h>
#include <unistd.h>
// Whether this process may use tiles. They make every thread's state 8 kB larger, so Linux wants to be asked
// (Documentation/arch/x86/xstate.rst).
static bool may_use_tiles() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
    static const bool may = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
    return may;
}
#endif
#if defined(MIAOBI_AMX) && defined(MIAOBI_AVX512)
// A tile is 16 lines of 64 bytes. C (16 rows of a, 16 streams) += A (16 rows of a, 64 bytes of each) B (as many numbers
// of 16 streams): A is loaded from where the weights are, B from states rounded as in cpu_step_avx512.h. What one place
// of C adds up does not depend on the others, so each stream is as if there were no other: one stream, too, is
// multiplied by tiles.
constexpr int SIDE = 16;  // lines of a tile, and numbers of four bytes in a line

struct alignas(64) Line { float floats[16]; };  // of the cache
struct alignas(64) TileConfig {  // as LDTILECFG reads it
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a line
    uint8_t lines[16] = {};
    void shape(int tile, int n, int size) { lines[tile] = n, bytes[tile] = size; }
};

static inline float convert(const float* x, int K, int8_t* to) {  // to 127 steps to either side
    std::vector<uint8_t> steps(K);
    const float scale = convert(x, K, steps.data());
    for (int k = 0; k < K; k++) to[k] = (int8_t)(steps[k] - 128);
    return scale;
}
template <class T> struct TileSums;
template <> struct TileSums<bfloat16> { typedef float Sum; };
template <> struct TileSums<int8_t> { typedef int32_t Sum; };
#define MIAOBI_TILE_PRODUCT(c, a, b) \
    do { \
        if constexpr (std::is_same<T, int8_t>::value) _tile_dpbssd(c, a, b); \
        else _tile_dpbf16ps(c, a, b); \
    } while (0)

// What `product` does.
template <class T>
static void tiled_product(const Matrix& a, int from, int to, int K, const float* x, int B, float* y, int stride,
                          Mode mode) {
    typedef typename TileSums<T>::Sum Sum;
    constexpr int L = LINE / sizeof(T), FOUR = 4 / sizeof(T), BLOCKS = 4;  // products wait for the one before: 4 at once
    const int whole = K / L, rest = K % L;  // of K: lines, numbers
    static thread_local std::vector<Line> room;
    const int groups = (B + SIDE - 1) / SIDE, group_lines = (K + FOUR - 1) / FOUR;
    room.assign((size_t)groups * group_lines + (size_t)(K * sizeof(T) + 63) / 64 * SIDE + 1, Line());
    T* states = (T*)room.data();  // [group][K / FOUR][stream][FOUR]
    T* last = states + (size_t)groups * group_lines * L;  // rows that are no whole block, and rows of zeros
    static thread_local std::vector<float> scales;
    std::vector<T> rounded(K);
    scales.resize(B);
    for (int b = 0; b < B; b++) {
        scales[b] = convert(x + (size_t)b * K, K, rounded.data());
        T* group = states + (size_t)(b / SIDE) * group_lines * L;
        for (int k = 0; k < K; k++) group[(size_t)(k / FOUR) * L + b % SIDE * FOUR + k % FOUR] = rounded[k];
    }
    TileConfig config;
    for (int c = 0; c < BLOCKS; c++) config.shape(c, SIDE, LINE);
    config.shape(4, SIDE, LINE), config.shape(5, SIDE, LINE);  // A and B
    config.shape(6, SIDE, rest ? rest * sizeof(T) : 4), config.shape(7, rest ? rest / FOUR : 1, LINE);  // the rest of K
    _tile_loadconfig(&config);
    alignas(64) Sum sums[BLOCKS][SIDE][SIDE];
    for (int block = from; block < to; block += BLOCKS * SIDE) {
        const int end = block + BLOCKS * SIDE < to ? block + BLOCKS * SIDE : to, full = (end - block) / SIDE;
        const T* w = (const T*)a.w + (size_t)block * K;
        const char *next = (const char*)(w + (size_t)(end - block) * K), *stop = (const char*)((const T*)a.w + (size_t)to * K);
        const int blocks = (end - block + SIDE - 1) / SIDE;
        if (blocks > full)
            memcpy(last, w + (size_t)full * SIDE * K, (size_t)(end - block - full * SIDE) * K * sizeof(T));
        auto rows = [&](int i) { return i < full ? w + (size_t)i * SIDE * K : last; };
        for (int g = 0; g < groups; g++) {
            const T* group = states + (size_t)g * group_lines * L;
            const size_t apart = K * sizeof(T);
            _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
            for (int k = 0; k < whole; k++) {
                for (int i = 0; g == 0 && i < BLOCKS * SIDE && next < stop; i++, next += LINE)
                    __builtin_prefetch(next, 0, 2);  // the next rows, one stretch of memory
                _tile_loadd(5, group + (size_t)k * SIDE * L, LINE);
                _tile_loadd(4, rows(0) + k * L, apart); MIAOBI_TILE_PRODUCT(0, 4, 5);
                if (blocks > 1) { _tile_loadd(4, rows(1) + k * L, apart); MIAOBI_TILE_PRODUCT(1, 4, 5); }
                if (blocks > 2) { _tile_loadd(4, rows(2) + k * L, apart); MIAOBI_TILE_PRODUCT(2, 4, 5); }
                if (blocks > 3) { _tile_loadd(4, rows(3) + k * L, apart); MIAOBI_TILE_PRODUCT(3, 4, 5); }
            }
            if (rest) {
                _tile_loadd(7, group + (size_t)whole * SIDE * L, LINE);
                _tile_loadd(6, rows(0) + whole * L, apart); MIAOBI_TILE_PRODUCT(0, 6, 7);
                if (blocks > 1) { _tile_loadd(6, rows(1) + whole * L, apart); MIAOBI_TILE_PRODUCT(1, 6, 7); }
                if (blocks > 2) { _tile_loadd(6, rows(2) + whole * L, apart); MIAOBI_TILE_PRODUCT(2, 6, 7); }
                if (blocks > 3) { _tile_loadd(6, rows(3) + whole * L, apart); MIAOBI_TILE_PRODUCT(3, 6, 7); }
            }
            _tile_stored(0, sums[0], LINE); _tile_stored(1, sums[1], LINE);
            _tile_stored(2, sums[2], LINE); _tile_stored(3, sums[3], LINE);
            for (int b = g * SIDE; b < B && b < (g + 1) * SIDE; b++) {
                float values[BLOCKS * SIDE];
                for (int o = 0; o < end - block; o++) values[o] = sums[o / SIDE][o % SIDE][b % SIDE] * scales[b];
                put(a, block, end - block, values, 1, y + (size_t)b * stride, mode);
            }
        }
    }
    _tile_release();
}
#endif
