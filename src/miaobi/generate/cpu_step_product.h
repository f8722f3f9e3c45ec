// The matrix products of cpu_step.cpp, in whose middle this is, and the vectors that they are made of.
//
// Rows of a matrix lie side by side in panels, whose numbers are widened to float in registers and multiplied with all
// streams. A sum is added up in the order of the columns, for one stream and for many, to the same bits.
#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef float vec __attribute__((vector_size(32)));
typedef int32_t ivec __attribute__((vector_size(32)));
typedef uint16_t bfloat16;
constexpr int W = 8;  // floats in a vec

static inline vec load(const float* p) { vec v; memcpy(&v, p, sizeof v); return v; }
#ifdef __AVX2__  // one instruction each; GCC 12 makes four of __builtin_convertvector
static inline ivec widen(const uint16_t* p) { return (ivec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline ivec widen(const int8_t* p) { return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static inline vec convert(ivec v) { return (vec)_mm256_cvtepi32_ps((__m256i)v); }
static inline void rest() { _mm_pause(); }
#else
template <class T>
static inline ivec widen(const T* p) {
    typedef T lanes __attribute__((vector_size(W * sizeof(T))));
    lanes v; memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, ivec);
}
static inline vec convert(ivec v) { return __builtin_convertvector(v, vec); }
static inline void rest() {}
#endif
static inline vec load(const bfloat16* p) { return (vec)(widen(p) << 16); }  // it is the upper half of a float
static inline vec load(const int8_t* p) { return convert(widen(p)); }
#if defined(__AVX2__) && defined(__FMA__)  // by name: left to itself the compiler takes a fused one in some places and not in others
static inline vec fma(vec a, vec b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
static inline vec fma(vec a, vec b, vec c) { return a * b + c; }
#endif
static inline vec everywhere(float x) {
#ifdef __AVX2__
    return (vec)_mm256_set1_ps(x);
#else
    return x - vec{};
#endif
}
// In a register: the compiler would rather load it again for each use, and loads are what a product has most of.
static inline vec held(vec v) {
#ifdef __AVX2__
    asm("" : "+x"(v));
#endif
    return v;
}
static inline float sum(vec v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }
static inline void store(float* p, float x) { *p = x; }
static inline void store(bfloat16* p, float x) {  // round to nearest even
    uint32_t u; memcpy(&u, &x, sizeof u);
    *p = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

// The sums of M vecs, each as `sum` has it.
template <int M>
static inline void sums(const vec* v, float* out) {
    for (int m = 0; m < M; m++) out[m] = sum(v[m]);
}
#ifdef __AVX2__
static inline __m128 halves(vec v) {
    return _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
}
template <>
inline void sums<4>(const vec* v, float* out) {
    _mm_storeu_ps(out, _mm_hadd_ps(_mm_hadd_ps(halves(v[0]), halves(v[1])), _mm_hadd_ps(halves(v[2]), halves(v[3]))));
}
#endif

// `f` of a number from 1 to N, known when this is compiled.
template <int N, class F>
static inline void known(int n, F f) {
    if constexpr (N > 1) { if (n < N) return known<N - 1>(n, f); }
    f(std::integral_constant<int, N>());
}

// out[r] = w[r] . x for R rows of w, each K long, side by side.
template <int R, class T>
static void beside(const T* w, const float* x, int K, float* out) {
    vec acc[R] = {};
    for (int k = 0; k < K; k += W) {
        vec b = load(x + k);
        for (int r = 0; r < R; r++) acc[r] = fma(load(w + (size_t)r * K + k), b, acc[r]);
    }
    sums<R>(acc, out);
}

constexpr int U = 4;  // sums at once for a dot product, or each addition would wait for the one before

// w . x
template <class T>
static float dot(const T* w, const float* x, int K) {
    vec acc[U] = {};
    int k = 0;
    for (; k + U * W <= K; k += U * W)
        for (int u = 0; u < U; u++) acc[u] = fma(load(w + k + u * W), load(x + k + u * W), acc[u]);
    for (; k < K; k += W) acc[0] = fma(load(w + k), load(x + k), acc[0]);
    return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

struct Matrix {  // (out, in) in panels or, for `rounded_product` and `tiled_product`, row by row; a scale per row where they are int8, a bias where there is one
    const void* w;
    const float* scale;
    const float* bias;
};
enum Kind { FLOAT, BFLOAT16, INT8 };
enum Mode { SET, ADD, MULTIPLY };

// Puts what n rows of a, from row o on, times x are, at those rows of a stream's y. values: `apart` from each other.
static inline void put(const Matrix a, int o, int n, const float* values, int apart, float* y, Mode mode) {
    for (int i = 0; i < n; i++) {
        float value = std::fma(values[i * apart], a.scale ? a.scale[o + i] : 1, a.bias ? a.bias[o + i] : 0);
        y[o + i] = mode == SET ? value : mode == ADD ? y[o + i] + value : y[o + i] * value;
    }
}

// A matrix lies in panels of so many rows, column by column: (out / PANEL, in, PANEL), rows of zeros at its end. So
// the numbers of a vec belong to different rows, and no sum has to be gathered from the places of one.
constexpr int PANEL = 32;
constexpr int AHEAD = 2048;  // bytes between what is multiplied and what is fetched, where memory is read straight on

// out[n][v]: V vecs of rows of a panel, from w on, times N streams. Meanwhile `lines` lines of the cache are fetched
// from `next` on for each 8 columns.
template <int V, int N, class T>
static void columns(const T* w, const float* x, int K, vec out[][PANEL / W], const char* next, int lines) {
    vec acc[N][V] = {};
    for (int k = 0; k < K; k += 8) {
        for (int i = 0; i < lines; i++, next += 64) __builtin_prefetch(next, 0, 2);
        for (int j = k; j < k + 8; j++) {
            vec rows[V];
            for (int v = 0; v < V; v++) rows[v] = held(load(w + (size_t)j * PANEL + v * W));
            for (int n = 0; n < N; n++) {
                const vec state = everywhere(x[(size_t)n * K + j]);
                for (int v = 0; v < V; v++) acc[n][v] = fma(rows[v], state, acc[n][v]);
            }
        }
    }
    for (int n = 0; n < N; n++)
        for (int v = 0; v < V; v++) out[n][v] = acc[n][v];
}

// A panel times N streams. 16 registers hold 4 vecs of rows and 2 streams, or 2 and 6.
template <int N, class T>
static void panel(const T* w, const float* x, int K, vec out[][PANEL / W], const char* next, int lines) {
    if constexpr (N <= 2) return columns<4, N>(w, x, K, out, next, lines);
    const int half = (lines + 1) / 2;
    columns<2, N>(w, x, K, out, next, half);
    columns<2, N>(w + 2 * W, x, K, (vec(*)[PANEL / W])(out[0] + 2), next + (size_t)half * K * 8, half);
}

// Puts what rows o to o + PANEL of a times x are into a stream's y.
static inline void put(const Matrix& a, int o, const vec* values, float* y, Mode mode) {
    for (int v = 0; v < PANEL / W; v++, o += W) {
        vec value = values[v];
        if (a.scale) value *= load(a.scale + o);
        if (a.bias) value += load(a.bias + o);
        if (mode == ADD) value += load(y + o);
        if (mode == MULTIPLY) value *= load(y + o);
        memcpy(y + o, &value, sizeof value);
    }
}

// Rows `from` to `to` of a times each x (B, K), into, onto or times those columns of y (B, stride): each x as if there
// were no other, to the last bit, so that a text is the same whoever else is being written. `from` is where a panel
// begins.
template <class T>
static void product(const Matrix& a, int from, int to, int K, const float* x, int B, float* y, int stride,
                    Mode mode) {
    constexpr int N = 6, ROOM = 128 << 10;  // streams at a time; bytes of panels, which stay in the second-level cache
    const int groups = (B + N - 1) / N, fit = ROOM / (int)sizeof(T) / K / PANEL;
    const int most = groups == 1 || fit < 1 ? 1 : fit;
    const int lines = (PANEL * sizeof(T) * 8 / 64 + groups - 1) / groups;
    for (int block = from; block < to; block += most * PANEL) {
        const int end = block + most * PANEL < to ? block + most * PANEL : to;
        const T* w = (const T*)a.w + (size_t)block * K;
        const char* next = groups == 1 ? (const char*)w + AHEAD : (const char*)(w + (size_t)(end - block) * K);
        for (int g = 0; g < groups; g++) {
            const int b = B * g / groups, n = B * (g + 1) / groups - b;
            for (int o = block; o < end; o += PANEL) {
                vec out[N][PANEL / W];
                known<N>(n, [&](auto n) {
                    panel<n>(w + (size_t)(o - block) * K, x + (size_t)b * K, K, out, next, lines);
                });
                next += (size_t)lines * K * 8;
                for (int i = 0; i < n; i++) {
                    float* of = y + (size_t)(b + i) * stride;
                    if (o + PANEL <= to) put(a, o, out[i], of, mode);
                    else put(a, o, to - o, (const float*)out[i], 1, of, mode);
                }
            }
        }
    }
}
