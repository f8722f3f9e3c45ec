// The matrix products of cpu_step.cpp, in whose middle this is, and the vectors that they are made of.
//
// Few streams: each row of a matrix is widened to float in registers and multiplied with all of them (`dots`). More:
// rows and streams are packed and multiplied in tiles, which load less for each multiplication (`tile`). Both add up
// in the same order, to the same bits.
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

// out[n] = w . x[n], for few streams: row after row is one stretch of memory, which the processor fetches faster than
// several.
template <int N, class T>
static void dots(const T* w, const float* x, int K, float* out) {
    vec acc[N][U] = {};
    int k = 0;
    for (; k + U * W <= K; k += U * W) {
        for (size_t i = 0; i < U * W * sizeof(T); i += 64) __builtin_prefetch((const char*)(w + k) + i + 2048);
        for (int u = 0; u < U; u++) {
            vec a = load(w + k + u * W);
            for (int n = 0; n < N; n++) acc[n][u] = fma(a, load(x + (size_t)n * K + k + u * W), acc[n][u]);
        }
    }
    for (; k < K; k += W)
        for (int n = 0; n < N; n++) acc[n][0] = fma(load(w + k), load(x + (size_t)n * K + k), acc[n][0]);
    for (int n = 0; n < N; n++) out[n] = sum((acc[n][0] + acc[n][1]) + (acc[n][2] + acc[n][3]));
}

struct alignas(64) Line { float floats[16]; };  // of the cache

// N rows of K numbers each as `tile` reads them, in floats: the steps of the first of the U sums, then of the second...
// A step has a vec of each row.
template <int N, class T>
static void pack(const T* rows, int K, float* to) {
    const int whole = K / (U * W), rest = K / W - whole * U;
    auto put = [&](float*& at, int n, int k) {
        vec v = load(rows + (size_t)n * K + k);
        memcpy(at, &v, sizeof v);
        at += W;
    };
    float* part[U];
    for (int u = 0; u < U; u++) part[u] = to + (size_t)(u * whole + (u ? rest : 0)) * N * W;
    for (int k = 0; k < whole * U * W; k += U * W)
        for (int u = 0; u < U; u++)
            for (int n = 0; n < N; n++) put(part[u], n, k + u * W);
    for (int k = whole * U * W; k < K; k += W)
        for (int n = 0; n < N; n++) put(part[0], n, k);
}

// In a register: the compiler would rather load it again for each use, and loads are what a tile has most of.
static inline vec held(vec v) {
#ifdef __AVX2__
    asm("" : "+x"(v));
#endif
    return v;
}

// out[r * apart + m] = w[r] . x[m] for R rows and M streams, both packed. Every sum is added up in the order of `dots`,
// to the same bits.
template <int R, int M>
static void tile(const float* w, const float* x, int K, float* out, int apart) {
    constexpr int S = R * M > 6 ? 1 : R * M > 3 ? 2 : U;  // so many of the U sums at once: registers hold no more
    const int whole = K / (U * W), rest = K / W - whole * U;
    vec found[R][U][M];
    for (int u = 0; u < U; u += S) {
        vec acc[S][R][M] = {};
        const size_t from = u * whole + (u ? rest : 0);
        auto add = [&](int s, size_t step) {
            const float *a = w + step * R * W, *b = x + step * M * W;
            vec row[R];
            for (int r = 0; r < R; r++) row[r] = held(load(a + r * W));
            for (int m = 0; m < M; m++) {
                vec state = held(load(b + m * W));
                for (int r = 0; r < R; r++) acc[s][r][m] = fma(row[r], state, acc[s][r][m]);
            }
        };
        for (int j = 0; j < whole; j++)
            for (int s = 0; s < S; s++) add(s, from + j + s * whole + (u == 0 && s ? rest : 0));
        for (int j = whole; u == 0 && j < whole + rest; j++) add(0, j);
        for (int s = 0; s < S; s++)
            for (int r = 0; r < R; r++)
                for (int m = 0; m < M; m++) found[r][u + s][m] = acc[s][r][m];
    }
    for (int r = 0; r < R; r++) {
        vec total[M];
        for (int m = 0; m < M; m++) total[m] = (found[r][0][m] + found[r][1][m]) + (found[r][2][m] + found[r][3][m]);
        sums<M>(total, out + r * apart);
    }
}

struct Matrix {  // (out, in) row by row, a scale per row where they are int8, a bias where there is one
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

// `product` with few streams: a row is read from memory in one stretch, and widened once for all of them.
template <class T>
static void product_of_few(const Matrix& a, int from, int to, int K, const float* x, int B, float* y, int stride,
                           Mode mode) {
    constexpr int N = 3;  // with these sums and their factors 16 registers are full
    for (int o = from; o < to; o++) {
        const T* w = (const T*)a.w + (size_t)o * K;
        float out[N];
        int b = 0;
        for (; b + N <= B; b += N) {
            dots<N>(w, x + (size_t)b * K, K, out);
            for (int n = 0; n < N; n++) put(a, o, 1, out + n, 1, y + (size_t)(b + n) * stride, mode);
        }
        for (; b < B; b++) {
            dots<1>(w, x + (size_t)b * K, K, out);
            put(a, o, 1, out, 1, y + (size_t)b * stride, mode);
        }
    }
}

// Rows `from` to `to` of a times each x (B, K), into, onto or times those columns of y (B, stride): each x as if there
// were no other, to the last bit, so that a text is the same whoever else is being written.
template <class T>
static void product(const Matrix& a, int from, int to, int K, const float* x, int B, float* y, int stride,
                    Mode mode) {
    constexpr int R = 3, M = 4;  // 12 sums, a row and the streams fill 16 registers
    constexpr int MOST = 8 * R, ROOM = 12 << 10;  // rows at a time: as fill so many bytes of the first-level cache
    if (B < M) return product_of_few<T>(a, from, to, K, x, B, y, stride, mode);
    const int fit = ROOM / (int)sizeof(float) / K / R * R, rows = fit < R ? R : fit > MOST ? MOST : fit;
    const T* w = (const T*)a.w;
    static thread_local std::vector<Line> room;
    room.resize(((size_t)B + rows) * K / 16 + 1);
    float *packed = room[0].floats, *states = packed + (size_t)rows * K;
    for (int b = 0; b < B; b += M)
        known<M>(B - b < M ? B - b : M, [&](auto m) { pack<m>(x + (size_t)b * K, K, states + (size_t)b * K); });
    for (int block = from; block < to; block += rows) {
        const int end = block + rows < to ? block + rows : to;
        const char *next = (const char*)(w + (size_t)end * K), *stop = (const char*)(w + (size_t)to * K);
        const size_t share = (size_t)rows * K * sizeof(T) / ((size_t)(B + M - 1) / M * (rows / R)) + 64;
        for (int o = block; o < end; o += R)
            known<R>(end - o < R ? end - o : R, [&](auto r) {
                pack<r>(w + (size_t)o * K, K, packed + (size_t)(o - block) * K);
            });
        for (int b = 0; b < B; b += M)
            known<M>(B - b < M ? B - b : M, [&](auto m) {
                float out[MOST][M];
                for (int o = block; o < end; o += R) {
                    for (const char* until = next + share; next < until && next < stop; next += 64)
                        __builtin_prefetch(next, 0, 2);  // the next rows come while these are at work
                    known<R>(end - o < R ? end - o : R, [&](auto r) {
                        tile<r, m>(packed + (size_t)(o - block) * K, states + (size_t)b * K, K, out[o - block], M);
                    });
                }
                for (int i = 0; i < m; i++)
                    put(a, block, end - block, out[0] + i, M, y + (size_t)(b + i) * stride, mode);
            });
    }
}
