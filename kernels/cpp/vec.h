// Sixteen numbers at a time, in GCC's and Clang's portable vectors: the compiler cuts them to what the processor has.
// A tensor holds float or bf16; between a load and a store everything is float.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#ifdef __AVX512BF16__
#define HAS_DOT_BF16 1
#endif
#endif

constexpr int LANES = 16;
typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

template <class V>
static inline V raw(const void *p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline F all(float x) { return x - F{}; }

static inline float wide(float x) { return x; }
static inline float wide(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

static inline F load(const float *p) { return raw<F>(p); }
static inline F load(const bf16 *p) {
#ifdef __AVX512F__
    return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw<__m256i>(p)), 16);
#else
    return (F)(__builtin_convertvector(raw<H>(p), U) << 16);
#endif
}

static inline void store(float *p, F v) { std::memcpy(p, &v, sizeof v); }
static inline void store(bf16 *p, F v) {
#ifdef HAS_DOT_BF16
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &h, sizeof h);
#else
    U bits = (U)v;
    U nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    U nan = (U)(v != v);
    H h = __builtin_convertvector((nearest & ~nan) | (nan & 0x7fc0), H);
    std::memcpy(p, &h, sizeof h);
#endif
}

// The first n < 16 numbers; the others are zero, and are not stored.
template <class T>
static inline F load_part(const T *p, int n) {
    T some[LANES] = {};
    std::memcpy(some, p, n * sizeof(T));
    return load(some);
}
template <class T>
static inline void store_part(T *p, F v, int n) {
    T some[LANES];
    store(some, v);
    std::memcpy(p, some, n * sizeof(T));
}
template <class T>
static inline F load(const T *p, int n) { return n >= LANES ? load(p) : load_part(p, n); }
template <class T>
static inline void store(T *p, F v, int n) { n >= LANES ? store(p, v) : store_part(p, v, n); }

// Asks for what lies a page on in a long stretch of weights that is read once, from end to end: the processor's own guesses
// stop at the end of a page.
static inline void fetch_ahead(const void *line) { __builtin_prefetch((const char *)line + 4096); }

static inline F larger(F a, F b) { return a > b ? a : b; }

// v with lanes `GROUP` apart exchanged.
template <int GROUP>
static inline F crossed(F v) {
    I other;
    for (int i = 0; i < LANES; i++) other[i] = i ^ GROUP;
    return __builtin_shuffle(v, other);
}
static inline float sum(F v) {
    v += crossed<8>(v);
    v += crossed<4>(v);
    v += crossed<2>(v);
    return (v + crossed<1>(v))[0];
}
static inline float largest(F v) {
    v = larger(v, crossed<8>(v));
    v = larger(v, crossed<4>(v));
    v = larger(v, crossed<2>(v));
    return larger(v, crossed<1>(v))[0];
}

// e^x to about two units in the last place of a float, 0 below -87.
static inline F exponential(F x) {
    F low = all(-87.3f), high = all(88.3f);
    I small = x < low;
    x = x > high ? high : x;  // what is no number stays it
    x = small ? low : x;
    F shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: what is left of the product is its nearest whole number,
    F n = shifted - 12582912.0f;                // and the last bits hold it as an integer
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    F y = all(1.9875691500e-4f);
    y = y * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    y = y * (F)(((U)shifted + 127) << 23);
    return small ? F{} : y;
}

static inline F silu(F g) { return g / (1.0f + exponential(-g)); }
static inline F gelu_tanh(F g) {
    F inner = 0.7978845608f * (g + 0.044715f * g * g * g);
    return g / (1.0f + exponential(-2.0f * inner));  // 0.5 (1 + tanh(z)) = 1 / (1 + e^-2z)
}

// Products of two stretches of T, summed into a float vector in some order of lanes: what a dot product is made of.
template <class T>
struct Products {
    static constexpr int COUNT = LANES;
    static inline F add(F sum, const T *a, const T *b) { return sum + load(a) * load(b); }
};
#ifdef HAS_DOT_BF16
struct Pairs {
    static constexpr int COUNT = 2 * LANES;
    static inline F add(F sum, const bf16 *a, const bf16 *b) {
        return (F)_mm512_dpbf16_ps((__m512)sum, raw<__m512bh>(a), raw<__m512bh>(b));
    }
};
#endif
