// One decoding step of the whole model on the CPU: every stream gets one token further, or one stream several, in one
// parallel region.
//
// A step is bound by reading the weights, so they stay as they are stored (float, bfloat16 or int8 with a scale per
// row) and are widened to float in registers, once for all streams. All arithmetic is in float. Built by cpu_step.py with
// whatever C++ compiler is there; vectors are the extension that GCC and Clang share.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <sched.h>
#include <type_traits>
#include <vector>
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

// Without branches or calls, so that the compiler makes vectors of them. exp: 2^n times a polynomial of the rest
// (Cephes); erf: Abramowitz and Stegun 7.1.26, off by 1.5e-7 at most.
static inline float fast_exp(float x) {
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    float n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // adding 1.5 * 2^23 rounds to an integer
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f * r + 1.3981999507e-3f;
    y = ((y * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r;
    y = (y + 1.6666665459e-1f) * r + 5.0000001201e-1f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power; memcpy(&power, &bits, sizeof power);
    return (y * r * r + r + 1) * power;
}
static inline float fast_erf(float x) {
    float a = x < 0 ? -x : x, t = 1 / (1 + 0.3275911f * a);
    float y = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    y = 1 - y * fast_exp(-a * a);
    return x < 0 ? -y : y;
}

// out[r] = w[r] . x for R rows of w, each K long, side by side.
template <int R, class T>
static void beside(const T* w, const float* x, int K, float* out) {
    vec acc[R] = {};
    for (int k = 0; k < K; k += W) {
        vec b = load(x + k);
        for (int r = 0; r < R; r++) acc[r] = fma(load(w + (size_t)r * K + k), b, acc[r]);
    }
    for (int r = 0; r < R; r++) out[r] = sum(acc[r]);
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

// out[m * R + r] = w[r] . x[m] for R rows of w and M of x, each K long, for many streams. Every sum is added up in the
// order of `dots`, to the same bits; two of the U sums and then the others, as registers hold no more.
template <int R, int M, class T>
static void tile(const T* w, const float* x, int K, float* out) {
    vec total[R][M];
    const int whole = K / (U * W) * (U * W);
    for (int from = 0; from < U; from += 2) {
        vec acc[R][M][2] = {};
        auto add = [&](int k, int u) {
            vec a[R];
            for (int r = 0; r < R; r++) a[r] = load(w + (size_t)r * K + k);
            for (int m = 0; m < M; m++) {
                vec b = load(x + (size_t)m * K + k);
                for (int r = 0; r < R; r++) acc[r][m][u] = fma(a[r], b, acc[r][m][u]);
            }
        };
        for (int k = from * W; k < whole; k += U * W) add(k, 0), add(k + W, 1);
        for (int k = whole; from == 0 && k < K; k += W) add(k, 0);
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) {
                vec both = acc[r][m][0] + acc[r][m][1];
                total[r][m] = from == 0 ? both : total[r][m] + both;
            }
    }
    for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++) out[m * R + r] = sum(total[r][m]);
}

struct Matrix {  // (out, in) row by row, a scale per row where they are int8, a bias where there is one
    const void* w;
    const float* scale;
    const float* bias;
};
enum Kind { FLOAT, BFLOAT16, INT8 };
enum Mode { SET, ADD, MULTIPLY };

// Puts `value`, row o of a times x, at row o of y's stream b.
static inline void put(const Matrix& a, float* y, int stride, Mode mode, int b, int o, float value) {
    value = std::fma(value, a.scale ? a.scale[o] : 1, a.bias ? a.bias[o] : 0);
    float* at = y + (size_t)b * stride + o;
    *at = mode == SET ? value : mode == ADD ? *at + value : *at * value;
}

// Rows `from` to `to` of a times each x (B, K), into, onto or times those columns of y (B, stride): each x as if there
// were no other, to the last bit, so that a text is the same whoever else is being written.
template <class T>
static void product(const Matrix& a, int from, int to, int K, const float* x, int B, float* y, int stride,
                    Mode mode) {
    constexpr int R = 2, M = 3, N = 3;  // with these sums and their factors 16 registers are full
    constexpr int MANY = 12;  // from here on tiles are faster
    constexpr int ROWS = 32;  // of a at a time, which stay in the second-level cache while all x go by
    const T* w = (const T*)a.w;
    const int tiled = B >= MANY ? B / M * M : 0;
    for (int block = from; block < to; block += ROWS) {
        const int end = block + ROWS < to ? block + ROWS : to, pairs = block + (end - block) / R * R;
        const char *next = (const char*)(w + (size_t)end * K), *stop = (const char*)(w + (size_t)to * K);
        const size_t share = tiled ? ((size_t)ROWS * K * sizeof(T)) / (size_t)(tiled / M * (ROWS / R)) + 64 : 0;
        for (int b = 0; b < tiled; b += M) {
            for (int o = block; o < pairs; o += R) {
                float out[R * M];
                for (const char* until = next + share; next < until && next < stop; next += 64)
                    __builtin_prefetch(next, 0, 2);  // the next rows come while these are at work
                tile<R, M>(w + (size_t)o * K, x + (size_t)b * K, K, out);
                for (int j = 0; j < R * M; j++) put(a, y, stride, mode, b + j / R, o + j % R, out[j]);
            }
        }
        for (int o = block; o < end; o++) {
            float out[N];
            int b = o < pairs ? tiled : 0;
            for (; b + N <= B; b += N) {
                dots<N>(w + (size_t)o * K, x + (size_t)b * K, K, out);
                for (int n = 0; n < N; n++) put(a, y, stride, mode, b + n, o, out[n]);
            }
            for (; b < B; b++) {
                dots<1>(w + (size_t)o * K, x + (size_t)b * K, K, out);
                put(a, y, stride, mode, b, o, *out);
            }
        }
    }
}

#include "cpu_step_avx512.h"

struct Layer {
    Matrix qkv, proj, gate, up, down;  // gate: where there is none, null
    const float *attn_norm, *attn_norm_bias, *mlp_norm, *mlp_norm_bias, *q_norm, *k_norm;
};

struct Model {
    int32_t layers, heads, kv_heads, head_dim, width, inner, vocab, is_rms, is_gated, is_tanh;
    float eps, qk_eps;
    Matrix head;
    const float *norm, *norm_bias, *rope;  // rope (2, block_size, D), or null
    int64_t block_size;
};

static void normalize(const Model& m, const float* x, const float* w, const float* bias, int n, float eps, float* y) {
    float mean = 0, square = 0;
    if (!m.is_rms) {
        #pragma omp simd reduction(+ : mean)
        for (int i = 0; i < n; i++) mean += x[i];
        mean /= n;
    }
    #pragma omp simd reduction(+ : square)
    for (int i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / std::sqrt(square / n + eps);
    for (int i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * w[i] + (bias ? bias[i] : 0);
}

static void activate(const Model& m, float* x, int n) {
    if (m.is_gated)
        for (int i = 0; i < n; i++) x[i] = x[i] / (1 + fast_exp(-x[i]));
    else if (m.is_tanh)  // 1 + tanh(z) = 2 / (1 + exp(-2z)), z = sqrt(2 / pi) (x + ...)
        for (int i = 0; i < n; i++) x[i] /= 1 + fast_exp(-1.5957691216f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
    else
        for (int i = 0; i < n; i++) x[i] *= 0.5f * (1 + fast_erf(x[i] * 0.70710678f));
}

// QK-norm, then the rotation of a position, for one head.
static void place(const Model& m, float* x, const float* w, int pos) {
    const int D = m.head_dim;
    if (w) normalize(m, x, w, nullptr, D, m.qk_eps, x);
    if (!m.rope) return;
    const float *cos = m.rope + (size_t)pos * D, *sin = cos + m.block_size * D;
    for (int i = 0; i < D / 2; i++) {
        float a = x[i], c = x[i + D / 2];
        x[i] = a * cos[i] - c * sin[i];
        x[i + D / 2] = c * cos[i + D / 2] + a * sin[i + D / 2];
    }
}

// Key and value of one token and head h into the caches, where that head's begin at `offset` elements.
template <class C>
static void remember(const Model& m, const Layer& l, float* qkv, int h, int pos, void* k_cache, void* v_cache,
                     size_t offset) {
    const int D = m.head_dim;
    C *ks = (C*)k_cache + offset, *vs = (C*)v_cache + offset;
    float *k = qkv + (m.heads + h) * D, *v = k + m.kv_heads * D;
    place(m, k, l.k_norm, pos);
    for (int d = 0; d < D; d++) { store(ks + (size_t)pos * D + d, k[d]); store(vs + (size_t)pos * D + d, v[d]); }
}

// All heads of one token that share key/value head h: its qkv -> its y, from the caches as `remember` filled them.
template <class C>
static void attend(const Model& m, const Layer& l, float* qkv, int h, int pos, const void* k_cache,
                   const void* v_cache, size_t offset, float* p, float* y) {
    const int D = m.head_dim, group = m.heads / m.kv_heads;
    const C *ks = (const C*)k_cache + offset, *vs = (const C*)v_cache + offset;
    for (int g = h * group; g < (h + 1) * group; g++) {
        float* q = qkv + g * D;
        place(m, q, l.q_norm, pos);
        float top, total = 0, scale = 1 / std::sqrt((float)D);
        int j = 0;
        for (; j + 4 <= pos + 1; j += 4) beside<4>(ks + (size_t)j * D, q, D, p + j);
        for (; j <= pos; j++) dots<1>(ks + (size_t)j * D, q, D, p + j);
        top = p[0];
        #pragma omp simd reduction(max : top)
        for (j = 0; j <= pos; j++) top = p[j] > top ? p[j] : top;
        for (j = 0; j <= pos; j++) p[j] = fast_exp((p[j] - top) * scale);
        #pragma omp simd reduction(+ : total)
        for (j = 0; j <= pos; j++) total += p[j];
        for (int d = 0; d < D; d += W) {
            vec acc = {};
            for (j = 0; j <= pos; j++) acc += load(vs + (size_t)j * D + d) * p[j];
            acc /= total;
            memcpy(y + g * D + d, &acc, sizeof acc);
        }
    }
}

// OpenMP's barrier spins on for long when another program has the core that it waits for; this one lets it run.
struct Barrier {
    std::atomic<int> arrived{0}, round{0};
    void wait(int threads) {
        const int now = round.load();
        if (arrived.fetch_add(1) + 1 == threads) {
            arrived = 0;
            round = now + 1;
            return;
        }
        for (int spins = 0; round.load() == now; spins++) {
            if (spins < 1000) rest();
            else sched_yield();
        }
    }
};

// What cpu_step.py calls: x (B, width), embeddings in and states out; logits (B, vocab). k, v: caches of all layers
// (layers, rows, H_kv, S, D), bfloat16 where is_short, else float. Token b goes to positions[b] of row b, or of row 0
// where is_one: then they are one stream's, in order, and get the logits that they would get one by one; none for the
// first `unscored` of them. scratch: floats, as many as cpu_step.py says.
extern "C" void miaobi_step(const Model* model, const Layer* layers, int kind, int is_short, int is_one,
                            int unscored, int B, int rows, int S, const int64_t* positions, void* k, void* v, float* x, float* logits,
                            float* scratch, int threads) {
    const Model& m = *model;
    const int E = m.width, D = m.head_dim, Q = (m.heads + 2 * m.kv_heads) * D, Y = m.heads * D, F = m.inner;
    float *qkv = scratch, *y = qkv + (size_t)B * Q, *inner = y + (size_t)B * Y, *own = inner + (size_t)B * F;
#ifdef MIAOBI_AVX512
    auto multiply = kind == FLOAT      ? product<float>
                    : kind == BFLOAT16 ? rounded_product<Bfloat16Sums, bfloat16>
                                       : rounded_product<ByteSums, int8_t>;
#else
    auto multiply = kind == FLOAT ? product<float> : kind == BFLOAT16 ? product<bfloat16> : product<int8_t>;
#endif
    auto keep = is_short ? remember<bfloat16> : remember<float>;
    auto attention = is_short ? attend<bfloat16> : attend<float>;
    Barrier barrier;
    #pragma omp parallel num_threads(threads)
    {
        const int t = omp_get_thread_num(), of = omp_get_num_threads();
        float* z = own + (size_t)t * ((size_t)B * E + m.block_size);  // normed states, then attention weights
        float* p = z + (size_t)B * E;
        auto first = [&](int n, int thread) { return thread == of ? n : (int)((int64_t)n / 16 * thread / of) * 16; };
        auto share = [&](const Matrix& a, int n, int K, const float* in, float* out, Mode mode) {
            multiply(a, first(n, t), first(n, t + 1), K, in, B, out, n, mode);
        };
        auto norm_all = [&](const float* w, const float* bias) {  // each thread for itself: cheaper than to wait
            for (int b = 0; b < B; b++) normalize(m, x + (size_t)b * E, w, bias, E, m.eps, z + (size_t)b * E);
        };
        for (int i = 0; i < m.layers; i++) {
            const Layer& l = layers[i];
            norm_all(l.attn_norm, l.attn_norm_bias);
            share(l.qkv, Q, E, z, qkv, SET);
            barrier.wait(of);
            const int heads = B * m.kv_heads, from_head = heads * t / of, to_head = heads * (t + 1) / of;
            auto offset = [&](int at) {
                return ((size_t)i * rows * m.kv_heads + (is_one ? at % m.kv_heads : at)) * S * D;
            };
            for (int at = from_head; at < to_head; at++) {
                const int b = at / m.kv_heads;
                keep(m, l, qkv + (size_t)b * Q, at % m.kv_heads, positions[b], k, v, offset(at));
            }
            if (is_one) barrier.wait(of);  // they look at each other's
            for (int at = from_head; at < to_head; at++) {
                const int b = at / m.kv_heads, h = at % m.kv_heads;
                attention(m, l, qkv + (size_t)b * Q, h, positions[b], k, v, offset(at), p, y + (size_t)b * Y);
            }
            barrier.wait(of);
            share(l.proj, E, Y, y, x, ADD);
            barrier.wait(of);
            norm_all(l.mlp_norm, l.mlp_norm_bias);
            share(m.is_gated ? l.gate : l.up, F, E, z, inner, SET);
            const int from = first(F, t), to = first(F, t + 1);
            for (int b = 0; b < B; b++) activate(m, inner + (size_t)b * F + from, to - from);
            if (m.is_gated) share(l.up, F, E, z, inner, MULTIPLY);
            barrier.wait(of);
            share(l.down, E, F, inner, x, ADD);
            barrier.wait(of);
        }
        norm_all(m.norm, m.norm_bias);
        if (unscored < B)
            multiply(m.head, first(m.vocab, t), first(m.vocab, t + 1), E, z + (size_t)unscored * E, B - unscored, logits,
                     m.vocab, SET);
    }
}
