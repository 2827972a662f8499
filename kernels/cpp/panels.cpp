// Low-rank weights as they were saved, into the panels that lora.cpp reads: kernels/panels.py lists the matrices.
//
// A matrix is [rows, k], each row a stretch of memory: A as it is, and B with the scale. A row becomes a lane. Rows are
// brought to T sixteen at a time in a block that stays in the first cache, and the block is written across, so that
// memory is read and written in order.
#include <algorithm>

#include "product.h"

namespace {

struct half {
    uint16_t bits;
};

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float wide(double x) { return float(x); }
inline float wide(half x) {
    uint32_t most = x.bits & 0x7fff, sign = uint32_t(x.bits & 0x8000) << 16;
    uint32_t endless = most >= 0x7c00 ? 0x7f800000 : 0;
    float y = as_float(most << 13) * 0x1p112f;  // exponents are 112 apart; exact, also of what is subnormal
    uint32_t bits;
    std::memcpy(&bits, &y, 4);
    return as_float(bits | sign | endless);
}

// Rounded as torch does it, and not as the processor's own instruction, which makes zero of what is subnormal.
inline void narrow(float *out, float x) { *out = x; }
inline void narrow(bf16 *out, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out->bits = x != x ? 0x7fc0 : uint16_t(nearest);
}

struct Matrix {
    const char *from;
    void *to;        // panels of `depth` numbers of the reduced dimension
    int64_t stride;  // numbers between rows
    int32_t rows, k, first_lane, first_k, depth, dtype;
    float scale;
};

template <class T, class S>
inline void convert(T *out, const char *from, int count, float scale) {
    for (int i = 0; i < count; i++) {
        S x;
        std::memcpy(&x, from + i * sizeof(S), sizeof(S));  // a file's numbers may lie at odd addresses
        narrow(out + i, wide(x) * scale);
    }
}

constexpr int DEPTH = 128;  // of a block

// k from `begin` to `end` of so many lanes, of a block that begins at the step where `begin` is.
template <class T>
inline void write(T *to, const T (*block)[DEPTH], int lanes, int begin, int end) {
    constexpr int STEP = By<T>::STEP;
    const int base = begin / STEP * STEP;
    auto alone = [&](int k) {  // the other half of its pair is someone else's, or zero
        for (int lane = 0; lane < lanes; lane++)
            to[int64_t(k / STEP * LANES + lane) * STEP + k % STEP] = block[lane][k - base];
    };
    int k = begin;
    if (k % STEP) alone(k++);
    for (; k + STEP <= end; k += STEP)
        for (int lane = 0; lane < lanes; lane++)
            std::memcpy(to + int64_t(k) * LANES + lane * STEP, block[lane] + k - base, STEP * sizeof(T));
    if (k < end) alone(k);
}

template <class T, class S>
void fill(const Matrix &m) {
    T block[LANES][DEPTH];
    const int last = m.first_k + m.k;
    for (int row = 0, lanes; row < m.rows; row += lanes) {
        const int lane = (m.first_lane + row) % LANES;
        lanes = std::min(LANES - lane, m.rows - row);
        T *to = (T *)m.to + int64_t((m.first_lane + row) / LANES) * m.depth * LANES + lane * By<T>::STEP;
        for (int begin = m.first_k, end; begin < last; begin = end) {
            end = std::min(last, (begin / DEPTH + 1) * DEPTH);
            const char *from = m.from + (row * m.stride + begin - m.first_k) * int64_t(sizeof(S));
            for (int i = 0; i < lanes; i++)
                convert<T, S>(block[i] + begin % By<T>::STEP, from + i * m.stride * sizeof(S), end - begin, m.scale);
            lanes == LANES ? write(to, block, LANES, begin, end) : write(to, block, lanes, begin, end);
        }
    }
}

template <class T>
void fill_panels(const Matrix *matrices, int64_t count) {
    constexpr void (*by_dtype[])(const Matrix &) = {fill<T, float>, fill<T, bf16>, fill<T, half>, fill<T, double>};
    for (int64_t i = 0; i < count; i++) by_dtype[matrices[i].dtype](matrices[i]);
}

}  // namespace

#define EXPORT(T, name)                                                                                                \
    extern "C" void fill_panels_##name(const Matrix *matrices, int64_t count) { fill_panels<T>(matrices, count); }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
