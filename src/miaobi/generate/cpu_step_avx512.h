// The matrix products of cpu_step.cpp on CPUs with AVX-512's dot products (BF16 and VNNI), in whose middle this is.
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && !defined(MIAOBI_AVX512)
#define MIAOBI_AVX512
#endif
#ifdef MIAOBI_AVX512
// Dot products as AVX-512 has them: of bfloat16 pairs, and of unsigned with signed bytes. So the states are rounded as
// well: to bfloat16, or to 127 steps to either side of 128 with a scale for each. One stream and many are added up by
// the same instructions in the same order, whole numbers exactly, so here too each is as if there were no other.
constexpr int LINE = 64;  // bytes in a register, and in a line of the cache

static inline float convert(const float* x, int K, bfloat16* to) {
    for (int k = 0; k < K; k++) store(to + k, x[k]);
    return 1;
}
static inline float convert(const float* x, int K, uint8_t* to) {
    float top = 0;
    #pragma omp simd reduction(max : top)
    for (int k = 0; k < K; k++) { float size = std::fabs(x[k]); top = size > top ? size : top; }
    const float scale = top / 127, inverse = top > 0 ? 127 / top : 0;
    for (int k = 0; k < K; k++) to[k] = (uint8_t)(x[k] * inverse + 128.5f);
    return scale;
}
struct Bfloat16Sums {
    typedef bfloat16 State;
    __m512 acc[U] = {};
    void add(int u, __m512i w, __m512i x) { acc[u] = _mm512_dpbf16_ps(acc[u], (__m512bh)w, (__m512bh)x); }
    float total() const { return _mm512_reduce_add_ps((acc[0] + acc[1]) + (acc[2] + acc[3])); }
};
struct ByteSums {
    typedef uint8_t State;
    __m512i acc[U] = {}, ones[U] = {};  // w . x, and what the states' 128 adds to that
    void add(int u, __m512i w, __m512i x) {
        acc[u] = _mm512_dpbusd_epi32(acc[u], x, w);
        ones[u] = _mm512_dpbusd_epi32(ones[u], _mm512_set1_epi8((char)128), w);
    }
    float total() const {
        int32_t sum = 0;
        for (int u = 0; u < U; u++) sum += _mm512_reduce_add_epi32(acc[u]) - _mm512_reduce_add_epi32(ones[u]);
        return sum;
    }
};

// What `product` does. x is copied once, rounded, with zeros up to a whole number of registers.
template <class Sums, class T>
static void rounded_product(const Matrix& a, int from, int to, int K, const float* x, int B, float* y, int stride,
                            Mode mode) {
    typedef typename Sums::State State;
    constexpr int L = LINE / sizeof(T), N = 4;
    const int width = (K + L - 1) / L * L;
    static thread_local std::vector<State> states;
    static thread_local std::vector<float> scales;
    states.assign((size_t)B * width, 0);
    scales.resize(B);
    for (int b = 0; b < B; b++) scales[b] = convert(x + (size_t)b * K, K, states.data() + (size_t)b * width);
    auto dots = [&](auto count, const T* w, int o, int b) {
        constexpr int n = decltype(count)::value;
        Sums sums[n];
        T rest[L] = {};
        auto add = [&](int u, const T* at, int k) {
            const __m512i line = _mm512_loadu_si512(at);
            for (int i = 0; i < n; i++)
                sums[i].add(u, line, _mm512_loadu_si512(states.data() + (size_t)(b + i) * width + k));
        };
        int k = 0;
        for (; k + U * L <= K; k += U * L)
            for (int u = 0; u < U; u++) {
                __builtin_prefetch((const char*)(w + k + u * L) + 2048);
                add(u, w + k + u * L, k + u * L);
            }
        for (int u = 0; u < U; u++, k += L)
            if (k < K) add(u, k + L <= K ? w + k : (const T*)memcpy(rest, w + k, (K - k) * sizeof(T)), k);
        for (int i = 0; i < n; i++) {
            const float value = sums[i].total() * scales[b + i];
            put(a, o, 1, &value, 1, y + (size_t)(b + i) * stride, mode);
        }
    };
    for (int o = from; o < to; o++) {
        const T* w = (const T*)a.w + (size_t)o * K;
        int b = 0;
        for (; b + N <= B; b += N) dots(std::integral_constant<int, N>(), w, o, b);
        for (; b < B; b++) dots(std::integral_constant<int, 1>(), w, o, b);
    }
}
#endif
