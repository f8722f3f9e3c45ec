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

#include "cpu_step_product.h"
#include "cpu_step_avx512.h"
#include "cpu_step_amx.h"

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
    constexpr int AT_ONCE = 8;  // sums, or each addition would wait for the one before
    const int D = m.head_dim, group = m.heads / m.kv_heads;
    const C *ks = (const C*)k_cache + offset, *vs = (const C*)v_cache + offset;
    for (int g = h * group; g < (h + 1) * group; g++) {
        float* q = qkv + g * D;
        place(m, q, l.q_norm, pos);
        float top, total = 0, scale = 1 / std::sqrt((float)D);
        int j = 0;
        for (; j + 4 <= pos + 1; j += 4) beside<4>(ks + (size_t)j * D, q, D, p + j);
        for (; j <= pos; j++) p[j] = dot(ks + (size_t)j * D, q, D);
        top = p[0];
        #pragma omp simd reduction(max : top)
        for (j = 0; j <= pos; j++) top = p[j] > top ? p[j] : top;
        for (j = 0; j <= pos; j++) p[j] = fast_exp((p[j] - top) * scale);
        #pragma omp simd reduction(+ : total)
        for (j = 0; j <= pos; j++) total += p[j];
        for (int d = 0; d < D; d += AT_ONCE * W)
            known<AT_ONCE>((D - d) / W < AT_ONCE ? (D - d) / W : AT_ONCE, [&](auto n) {
                vec acc[n] = {};
                for (int i = 0; i <= pos; i++) {
                    const C* value = vs + (size_t)i * D + d;
                    for (int v = 0; v < n; v++) acc[v] = fma(load(value + v * W), vec{} + p[i], acc[v]);
                }
                for (int v = 0; v < n; v++) acc[v] /= total;
                memcpy(y + g * D + d, acc, sizeof acc);
            });
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

// Rows in a panel, as `miaobi_step` wants matrices of a kind; 1 where it wants them row by row.
extern "C" int miaobi_panel(int kind) {
#ifdef MIAOBI_AVX512
    if (kind != FLOAT) return 1;
#endif
    return PANEL;
}

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
#ifdef MIAOBI_AMX
    if (kind != FLOAT && may_use_tiles()) multiply = kind == BFLOAT16 ? tiled_product<bfloat16> : tiled_product<int8_t>;
#endif
#else
    auto multiply = kind == FLOAT ? product<float> : kind == BFLOAT16 ? product<bfloat16> : product<int8_t>;
#endif
    auto keep = is_short ? remember<bfloat16> : remember<float>;
    auto attention = is_short ? attend<bfloat16> : attend<float>;
    constexpr int HEADS = 4;  // that a thread takes at once
    const int rows_at_once = miaobi_panel(kind) > 1 ? 2 * PANEL : 1 << 30;  // the others round their states at each call
    const int parts = 5 * m.layers + 1;
    std::vector<std::atomic<int>> taken((size_t)parts * threads);
    Barrier barrier;
    #pragma omp parallel num_threads(threads)
    {
        const int t = omp_get_thread_num(), of = omp_get_num_threads();
        float* z = own + (size_t)t * ((size_t)B * E + m.block_size);  // normed states, then attention weights
        float* p = z + (size_t)B * E;
        int part = 0;
        // `work` on all of n, some at a time: each thread has its share, and when that is done, what others have not begun:
        // one of them may have lost its core to another program. A share begins at a multiple of `unit`.
        auto shared = [&](int n, int unit, int at_once, auto work) {
            std::atomic<int>* begun = taken.data() + (size_t)part++ * threads;
            auto first = [&](int thread) { return thread == of ? n : (int)((int64_t)n / unit * thread / of) * unit; };
            for (int i = 0; i < of; i++) {
                const int thread = (t + i) % of, from = first(thread), to = first(thread + 1);
                for (int at; (at = begun[thread].fetch_add(1)) < (to - from + at_once - 1) / at_once;) {
                    const int begin = from + at * at_once;
                    work(begin, begin + at_once < to ? begin + at_once : to);
                }
            }
        };
        auto multiplied = [&](const Matrix& a, int n, int K, const float* in, float* out, Mode mode) {
            shared(n, PANEL, rows_at_once, [&](int from, int to) { multiply(a, from, to, K, in, B, out, n, mode); });
        };
        auto norm_all = [&](const float* w, const float* bias) {  // each thread for itself: cheaper than to wait
            for (int b = 0; b < B; b++) normalize(m, x + (size_t)b * E, w, bias, E, m.eps, z + (size_t)b * E);
        };
        for (int i = 0; i < m.layers; i++) {
            const Layer& l = layers[i];
            norm_all(l.attn_norm, l.attn_norm_bias);
            multiplied(l.qkv, Q, E, z, qkv, SET);
            barrier.wait(of);
            const int heads = B * m.kv_heads;
            auto offset = [&](int at) {
                return ((size_t)i * rows * m.kv_heads + (is_one ? at % m.kv_heads : at)) * S * D;
            };
            auto keep_head = [&](int at) {
                const int b = at / m.kv_heads;
                keep(m, l, qkv + (size_t)b * Q, at % m.kv_heads, positions[b], k, v, offset(at));
            };
            if (is_one) {  // they look at each other's
                for (int at = heads * t / of; at < heads * (t + 1) / of; at++) keep_head(at);
                barrier.wait(of);
            }
            shared(heads, 1, HEADS, [&](int from, int to) {
                for (int at = from; at < to; at++) {
                    const int b = at / m.kv_heads, h = at % m.kv_heads;
                    if (!is_one) keep_head(at);
                    attention(m, l, qkv + (size_t)b * Q, h, positions[b], k, v, offset(at), p, y + (size_t)b * Y);
                }
            });
            barrier.wait(of);
            multiplied(l.proj, E, Y, y, x, ADD);
            barrier.wait(of);
            norm_all(l.mlp_norm, l.mlp_norm_bias);
            shared(F, PANEL, rows_at_once, [&](int from, int to) {
                multiply(m.is_gated ? l.gate : l.up, from, to, E, z, B, inner, F, SET);
                for (int b = 0; b < B; b++) activate(m, inner + (size_t)b * F + from, to - from);
                if (m.is_gated) multiply(l.up, from, to, E, z, B, inner, F, MULTIPLY);
            });
            barrier.wait(of);
            multiplied(l.down, E, F, inner, x, ADD);
            barrier.wait(of);
        }
        norm_all(m.norm, m.norm_bias);
        if (unscored < B)
            shared(m.vocab, PANEL, rows_at_once, [&](int from, int to) {
                multiply(m.head, from, to, E, z + (size_t)unscored * E, B - unscored, logits, m.vocab, SET);
            });
    }
}
