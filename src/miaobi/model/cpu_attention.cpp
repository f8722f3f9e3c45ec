// Causal attention in fp32 on the CPU, forward and backward: tiles of the probabilities live in a core's own cache, and
// nothing above the diagonal is computed (the way of FlashAttention, arXiv:2205.14135). All products go through one
// register kernel. Built by cpu_attention.py; vectors are the extension that GCC and Clang share.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>

typedef float vec __attribute__((vector_size(32)));
typedef int32_t ivec __attribute__((vector_size(32)));
constexpr int W = 8;        // floats in a vec
constexpr int R = 6, N = 2 * W;  // the tile that registers hold: 12 sums, 2 of b, 1 of a
constexpr int ROWS = 64;    // queries at a time

static inline vec load(const float* p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, vec v) { memcpy(p, &v, sizeof v); }

static int round_up(int n, int to) { return (n + to - 1) / to * to; }

// R rows of c, N columns, += or = R rows of a times k rows of b.
template <int R, bool ADD>
static void tile(int k, const float* a, size_t by_row, size_t by_column, const float* b, size_t ldb, float* c,
                 size_t ldc) {
    vec sum[R][2] = {};
    for (int x = 0; x < k; x++, a += by_column, b += ldb) {
        vec left = load(b), right = load(b + W);
#if defined(__x86_64__) && defined(__AVX__)
        asm("" : "+x"(left), "+x"(right));  // or GCC reads them from memory again for each row
#endif
        for (int r = 0; r < R; r++) {
            const float s = a[r * by_row];
            sum[r][0] += s * left;
            sum[r][1] += s * right;
        }
    }
    for (int r = 0; r < R; r++) {
        float* to = c + r * ldc;
        store(to, ADD ? load(to) + sum[r][0] : sum[r][0]);
        store(to + W, ADD ? load(to + W) + sum[r][1] : sum[r][1]);
    }
}

// c (m, n) += or = a (m, k) b (k, n). a lies at strides (by_row, by_column); b and c row by row. m is a multiple of
// ROWS, n of N.
template <bool ADD>
static void multiply(int m, int n, int k, const float* a, size_t by_row, size_t by_column, const float* b, size_t ldb,
                     float* c, size_t ldc) {
    for (int j = 0; j < n; j += N) {
        int i = 0;
        for (; i + R <= m; i += R) tile<R, ADD>(k, a + i * by_row, by_row, by_column, b + j, ldb, c + i * ldc + j, ldc);
        for (; i < m; i += 2) tile<2, ADD>(k, a + i * by_row, by_row, by_column, b + j, ldb, c + i * ldc + j, ldc);
    }
}

// exp of each: 2^n times a polynomial of the rest (Cephes).
static inline vec fast_exp(vec x) {
    x = x < -87.f ? vec{} - 87.f : x;
    const vec n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // adding 1.5 * 2^23 rounds to an integer
    const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec y = 1.9875691500e-4f * r + 1.3981999507e-3f;
    y = ((y * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r;
    y = (y + 1.6666665459e-1f) * r + 5.0000001201e-1f;
    const ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return (y * r * r + r + 1) * (vec)power;
}

static const ivec COUNT = {0, 1, 2, 3, 4, 5, 6, 7};

// Those of x, the j-th and following of a row, that stand before the n-th; for the others what `hidden` has.
static inline vec before(vec x, int j, int n, vec hidden) { return COUNT + j < n ? x : hidden; }

static inline float sum(vec v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

// The first n of a row of scores s become their softmax, those up to `seen` zero. Returns the logarithm of the
// denominator.
static float softmax(float* s, int n, int seen, float scale) {
    vec most = vec{} - INFINITY, total = {};
    for (int j = 0; j < n; j += W) {
        const vec x = before(load(s + j), j, n, vec{} - INFINITY);
        most = x > most ? x : most;
    }
    float top = most[0];
    for (int i = 1; i < W; i++) top = most[i] > top ? most[i] : top;
    for (int j = 0; j < n; j += W) {
        const vec e = before(fast_exp((load(s + j) - top) * scale), j, n, vec{});
        total += e;
        store(s + j, e);
    }
    const float denominator = sum(total);
    for (int j = 0; j < n; j += W) store(s + j, load(s + j) * (1 / denominator));
    for (int j = round_up(n, W); j < seen; j += W) store(s + j, vec{});
    return top * scale + std::log(denominator);
}

// The first n of a row of scores s become shares again, and of g, their gradients, those of the scores; the rest zero.
static void back(float* s, float* g, int n, int seen, float scale, float denominator, float along) {
    for (int j = 0; j < n; j += W) {
        const vec share = before(fast_exp(load(s + j) * scale - denominator), j, n, vec{});
        store(s + j, share);
        store(g + j, before(share * (load(g + j) - along) * scale, j, n, vec{}));
    }
    for (int j = round_up(n, W); j < seen; j += W) store(s + j, vec{}), store(g + j, vec{});
}

struct Strides { int64_t batch, head, row; };  // in floats; the D numbers of a head lie side by side

struct Shape {
    int64_t batch, heads, kv_heads, length, width;  // B, H, H_kv, T, D
};

struct Head {  // one head's rows, where they are
    float* at;
    int64_t row;
};

static Head head(float* x, const Strides& s, int64_t b, int64_t h) { return {x + b * s.batch + h * s.head, s.row}; }

// How far apart rows of n floats lie: at a power of two they would all want the same places of the cache.
static int apart(int n) { return n + N; }

// Rows of a head into scratch, side by side, the rows up to `padded` zero; transposed as well where asked.
static void pack(const Head& from, int T, int padded, int D, float* rows, float* columns) {
    for (int t = 0; t < T; t++) memcpy(rows + (size_t)t * D, from.at + t * from.row, sizeof(float) * D);
    memset(rows + (size_t)T * D, 0, sizeof(float) * (padded - T) * D);
    if (columns)  // in narrow strips, whose rows stay in the first-level cache
        for (int from = 0; from < padded; from += N)
            for (int d = 0; d < D; d++)
                for (int t = from; t < from + N; t++) columns[(size_t)d * apart(padded) + t] = rows[(size_t)t * D + d];
}

static void unpack(const float* rows, int T, int D, const Head& to) {
    for (int t = 0; t < T; t++) memcpy(to.at + t * to.row, rows + (size_t)t * D, sizeof(float) * D);
}

struct Scratch {  // floats of one thread
    float* at;
    float* next(size_t count) { float* found = at; at += (count + 15) / 16 * 16; return found; }
};

static float* room(size_t floats) { return (float*)aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64); }

// y = softmax(q kT / sqrt(D)) v, and for the way back the logarithm of each row's denominator, lse (B, H, T).
// Returns 0 where there is no memory.
extern "C" int miaobi_attention(const Shape* shape, float* q, const Strides* qs, float* k, const Strides* ks, float* v,
                                const Strides* vs, float* y, const Strides* ys, float* lse, int threads) {
    const int T = shape->length, D = shape->width, P = round_up(T, ROWS), L = apart(P), H = shape->heads;
    const int group = H / shape->kv_heads, tasks = shape->batch * shape->kv_heads;
    const float scale = 1 / std::sqrt((float)D);
    const size_t each = 3 * (size_t)P * D + (size_t)L * D + (size_t)ROWS * L + (size_t)ROWS * D + 128;
    float* all = room(each * threads);
    if (!all) return 0;
    #pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int task = 0; task < tasks; task++) {
        const int b = task / (int)shape->kv_heads, h_kv = task % (int)shape->kv_heads;
        Scratch scratch{all + each * omp_get_thread_num()};
        float *Q = scratch.next((size_t)P * D), *K = scratch.next((size_t)P * D), *KT = scratch.next((size_t)L * D);
        float *V = scratch.next((size_t)P * D), *S = scratch.next((size_t)ROWS * L), *O = scratch.next((size_t)ROWS * D);
        pack(head(k, *ks, b, h_kv), T, P, D, K, KT);
        pack(head(v, *vs, b, h_kv), T, P, D, V, nullptr);
        for (int h = h_kv * group; h < (h_kv + 1) * group; h++) {
            pack(head(q, *qs, b, h), T, P, D, Q, nullptr);
            const Head out = head(y, *ys, b, h);
            float* of_rows = lse + ((size_t)b * H + h) * T;
            for (int from = 0; from < T; from += ROWS) {
                const int seen = from + ROWS, rows = T - from < ROWS ? T - from : ROWS;
                multiply<false>(ROWS, seen, D, Q + (size_t)from * D, D, 1, KT, L, S, L);
                for (int r = 0; r < ROWS; r++) {
                    const float denominator = softmax(S + (size_t)r * L, from + r + 1, seen, scale);
                    if (r < rows) of_rows[from + r] = denominator;
                }
                multiply<false>(ROWS, D, seen, S, L, 1, V, D, O, D);
                unpack(O, rows, D, {out.at + from * out.row, out.row});
            }
        }
    }
    free(all);
    return 1;
}

// dq, dk, dv: gradients of q, k, v, from dy and what the forward pass left.
// Returns 0 where there is no memory.
extern "C" int miaobi_attention_backward(const Shape* shape, float* q, const Strides* qs, float* k, const Strides* ks,
                                         float* v, const Strides* vs, float* y, const Strides* ys, float* lse,
                                         float* dy, const Strides* dys, float* dq, float* dk, float* dv,
                                         const Strides* dqs, const Strides* dks, const Strides* dvs, int threads) {
    const int T = shape->length, D = shape->width, P = round_up(T, ROWS), L = apart(P), H = shape->heads;
    const int group = H / shape->kv_heads, tasks = shape->batch * shape->kv_heads;
    const float scale = 1 / std::sqrt((float)D);
    const size_t each = 6 * (size_t)P * D + 2 * (size_t)L * D + 2 * (size_t)ROWS * L + (size_t)ROWS * D + 192;
    float* all = room(each * threads);
    if (!all) return 0;
    #pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int task = 0; task < tasks; task++) {
        const int b = task / (int)shape->kv_heads, h_kv = task % (int)shape->kv_heads;
        const size_t whole = (size_t)P * D;
        Scratch scratch{all + each * omp_get_thread_num()};
        float *Q = scratch.next(whole), *K = scratch.next(whole), *KT = scratch.next((size_t)L * D), *V = scratch.next(whole);
        float *VT = scratch.next((size_t)L * D), *G = scratch.next(whole), *DK = scratch.next(whole), *DV = scratch.next(whole);
        float *S = scratch.next((size_t)ROWS * L), *R = scratch.next((size_t)ROWS * L);
        float* DQ = scratch.next((size_t)ROWS * D);
        pack(head(k, *ks, b, h_kv), T, P, D, K, KT);
        pack(head(v, *vs, b, h_kv), T, P, D, V, VT);
        memset(DK, 0, sizeof(float) * whole);
        memset(DV, 0, sizeof(float) * whole);
        for (int h = h_kv * group; h < (h_kv + 1) * group; h++) {
            pack(head(q, *qs, b, h), T, P, D, Q, nullptr);
            pack(head(dy, *dys, b, h), T, P, D, G, nullptr);
            const Head out = head(y, *ys, b, h), to = head(dq, *dqs, b, h);
            const float* of_rows = lse + ((size_t)b * H + h) * T;
            for (int from = 0; from < T; from += ROWS) {
                const int seen = from + ROWS, rows = T - from < ROWS ? T - from : ROWS;
                multiply<false>(ROWS, seen, D, Q + (size_t)from * D, D, 1, KT, L, S, L);
                multiply<false>(ROWS, seen, D, G + (size_t)from * D, D, 1, VT, L, R, L);
                for (int r = 0; r < ROWS; r++) {
                    float along = 0;  // what the softmax takes from every gradient of the row
                    if (r < rows) {
                        const float *o = out.at + (from + r) * out.row, *d = G + (size_t)(from + r) * D;
                        #pragma omp simd reduction(+ : along)
                        for (int i = 0; i < D; i++) along += o[i] * d[i];
                    }
                    back(S + (size_t)r * L, R + (size_t)r * L, r < rows ? from + r + 1 : 0, seen, scale,
                         r < rows ? of_rows[from + r] : 0, along);
                }
                multiply<true>(seen, D, ROWS, S, 1, L, G + (size_t)from * D, D, DV, D);
                multiply<true>(seen, D, ROWS, R, 1, L, Q + (size_t)from * D, D, DK, D);
                multiply<false>(ROWS, D, seen, R, L, 1, K, D, DQ, D);
                unpack(DQ, rows, D, {to.at + from * to.row, to.row});
            }
        }
        unpack(DK, T, D, head(dk, *dks, b, h_kv));
        unpack(DV, T, D, head(dv, *dvs, b, h_kv));
    }
    free(all);
    return 1;
}
