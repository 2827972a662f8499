// What lies between a layer's projections, row by row; formulas in kernels/layer.py. Python fills these structures.
#pragma once

#include "vec.h"

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
struct Norm {  // of rows [size]
    const T *x, *weight;
    T *y, *s;
    float eps;
    int32_t size;

    // A row of x, to which `delta` is added if there is one.
    void row(int64_t number, const T *delta) const {
        const T *in = x + number * size;
        if (delta) {
            T *out = s + number * size;
            for (int i = 0; i < size; i += LANES)
                store(out + i, load(in + i, size - i) + load(delta + i, size - i), size - i);
            in = out;
        }
        T *to = y + number * size;
        float scale = 1.0f / std::sqrt(mean_square(in, size) + eps);
        for (int i = 0; i < size; i += LANES)
            store(to + i, load(in + i, size - i) * scale * load(weight + i, size - i), size - i);
    }
};

template <class T>
struct Rope {  // lines are counted in tokens: keys and values have the same strides
    const float *cos, *sin;
    const T *q_weight, *k_weight;
    T *q, *keys, *values;
    const int64_t *lines;
    int64_t cache_page, cache_head;
    int32_t heads, kv_heads, dim, page_size;
    float eps;

    // A row of qkv.
    void row(int64_t number, const T *qkv) const {
        const float *c = cos + number * (dim / 2), *s = sin + number * (dim / 2);
        for (int h = 0; h < heads; h++) rotate(qkv + h * dim, c, s, q_weight, q + (number * heads + h) * dim);
        int64_t page = lines[number] / page_size, place = lines[number] % page_size;
        for (int h = 0; h < kv_heads; h++) {
            int64_t line = (page * cache_page + h * cache_head + place) * dim;
            rotate(qkv + (heads + h) * dim, c, s, k_weight, keys + line);
            std::memcpy(values + line, qkv + (heads + kv_heads + h) * dim, dim * sizeof(T));
        }
    }

  private:
    // One head, normed if there is a weight, rotated into `to`.
    void rotate(const T *from, const float *cos, const float *sin, const T *weight, T *to) const {
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
};
