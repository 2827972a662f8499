// What lies between a layer's projections; formulas in kernels/layer.py.
// A cache's lines are counted in tokens: its keys and values have the same strides but for the size of a head.
#include "vec.h"

namespace {

template <class T>
float mean_square(const T *x, int size) {
    F total = {};
    for (int i = 0; i < size; i += LANES) {
        F v = load(x + i, size - i);
        total += v * v;
    }
    return sum(total) / size;
}

template <class T>
void add_rms_norm(const T *x, const T *residual, const T *weight, float eps, T *y, T *s, int64_t rows, int size) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *in = x + row * size;
        if (residual) {
            T *out = s + row * size;
            for (int i = 0; i < size; i += LANES)
                store(out + i, load(in + i, size - i) + load(residual + row * size + i, size - i), size - i);
            in = out;
        }
        float scale = 1.0f / std::sqrt(mean_square(in, size) + eps);
        for (int i = 0; i < size; i += LANES)
            store(y + row * size + i, load(in + i, size - i) * scale * load(weight + i, size - i), size - i);
    }
}

// One head, normed if there is a weight, rotated into `to`.
template <class T>
void rotate(const T *from, const float *cos, const float *sin, const T *weight, float eps, T *to, int dim) {
    float scale = weight ? 1.0f / std::sqrt(mean_square(from, dim) + eps) : 1.0f;
    int half = dim / 2;
    for (int i = 0; i < half; i += LANES) {
        int n = half - i;
        F a = load(from + i, n) * scale, b = load(from + half + i, n) * scale;
        if (weight) a *= load(weight + i, n), b *= load(weight + half + i, n);
        F c = load(cos + i, n), s = load(sin + i, n);
        store(to + i, a * c - b * s, n);
        store(to + half + i, b * c + a * s, n);
    }
}

template <class T>
void rope_store(const T *qkv, int64_t qkv_row, const float *cos, const float *sin, const T *q_weight,
                const T *k_weight, float eps, T *q, T *keys, T *values, const int64_t *lines, int64_t rows, int heads,
                int kv_heads, int dim, int page_size, int64_t cache_page, int64_t cache_head) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *in = qkv + row * qkv_row;
        const float *c = cos + row * (dim / 2), *s = sin + row * (dim / 2);
        for (int h = 0; h < heads; h++) rotate(in + h * dim, c, s, q_weight, eps, q + (row * heads + h) * dim, dim);
        int64_t page = lines[row] / page_size, place = lines[row] % page_size;
        for (int h = 0; h < kv_heads; h++) {
            int64_t line = (page * cache_page + h * cache_head + place) * dim;
            rotate(in + (heads + h) * dim, c, s, k_weight, eps, keys + line, dim);
            std::memcpy(values + line, in + (heads + kv_heads + h) * dim, dim * sizeof(T));
        }
    }
}

template <class T, F act(F)>
void gated(const T *gate_up, T *y, int64_t rows, int size) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = gate_up + row * 2 * size, *up = gate + size;
        for (int i = 0; i < size; i += LANES)
            store(y + row * size + i, act(load(gate + i, size - i)) * load(up + i, size - i), size - i);
    }
}

template <class T>
void put_kv(const T *k, int64_t k_row, int64_t k_head, const T *v, int64_t v_row, int64_t v_head, T *keys, T *values,
            const int64_t *lines, int64_t rows, int kv_heads, int key_dim, int value_dim, int page_size, int64_t cache_page,
            int64_t cache_head) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        int64_t page = lines[row] / page_size, place = lines[row] % page_size;
        for (int h = 0; h < kv_heads; h++) {
            int64_t line = page * cache_page + h * cache_head + place;
            std::memcpy(keys + line * key_dim, k + row * k_row + h * k_head, key_dim * sizeof(T));
            std::memcpy(values + line * value_dim, v + row * v_row + h * v_head, value_dim * sizeof(T));
        }
    }
}

// The first of the largest numbers of each row, and that number: NaN if there is one in the row.
template <class T>
void largest_of_rows(const T *x, int64_t x_row, int64_t rows, int size, int64_t *index, float *value) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *in = x + row * x_row;
        F top = all(-INFINITY);
        I nan = {};
        int whole = size / LANES * LANES;
        for (int i = 0; i < whole; i += LANES) {
            F v = load(in + i);
            nan |= v != v;
            top = larger(v, top);
        }
        float most = largest(top);
        bool bad = false;
        for (int i = 0; i < LANES; i++) bad |= nan[i] != 0;
        for (int i = whole; i < size; i++) {
            float v = wide(in[i]);
            bad |= v != v;
            most = v > most ? v : most;
        }
        int first = 0;
        while (first < size && wide(in[first]) != most) first++;
        index[row] = bad ? 0 : first;
        value[row] = bad ? NAN : most;
    }
}

}  // namespace

#define EXPORT(T, name)                                                                                               \
    extern "C" void add_rms_norm_##name(const T *x, const T *residual, const T *weight, float eps, T *y, T *s,         \
                                        int64_t rows, int size) {                                                      \
        add_rms_norm(x, residual, weight, eps, y, s, rows, size);                                                      \
    }                                                                                                                  \
    extern "C" void rope_store_##name(const T *qkv, int64_t qkv_row, const float *cos, const float *sin,               \
                                      const T *q_weight, const T *k_weight, float eps, T *q, T *keys, T *values,       \
                                      const int64_t *lines, int64_t rows, int heads, int kv_heads, int dim,            \
                                      int page_size, int64_t cache_page, int64_t cache_head) {                         \
        rope_store(qkv, qkv_row, cos, sin, q_weight, k_weight, eps, q, keys, values, lines, rows, heads, kv_heads,     \
                   dim, page_size, cache_page, cache_head);                                                                                    \
    }                                                                                                                  \
    extern "C" void largest_##name(const T *x, int64_t x_row, int64_t rows, int size, int64_t *index, float *value) {   \
        largest_of_rows(x, x_row, rows, size, index, value);                                                           \
    }                                                                                                                  \
    extern "C" void gated_##name(const T *gate_up, T *y, int64_t rows, int size, int activation) {                     \
        activation ? gated<T, gelu_tanh>(gate_up, y, rows, size) : gated<T, silu>(gate_up, y, rows, size);             \
    }                                                                                                                  \
    extern "C" void store_##name(const T *k, int64_t k_row, int64_t k_head, const T *v, int64_t v_row, int64_t v_head, \
                                 T *keys, T *values, const int64_t *lines, int64_t rows, int kv_heads, int key_dim,    \
                                 int value_dim, int page_size, int64_t cache_page, int64_t cache_head) {               \
        put_kv(k, k_row, k_head, v, v_row, v_head, keys, values, lines, rows, kv_heads, key_dim, value_dim,            \
               page_size, cache_page, cache_head);                                                                            \
    }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
