// What lies between a layer's projections; formulas in kernels/layer.py.
#include "rows.h"

namespace {

template <class T>
void add_rms_norm(const Norm<T> &norm, const T *delta, int64_t rows) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) norm.row(row, delta ? delta + row * norm.size : nullptr);
}

template <class T>
void rope_store(const Rope<T> &rope, const T *qkv, int64_t qkv_row, int64_t rows) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) rope.row(row, qkv + row * qkv_row);
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

#define EXPORT(T, name)                                                                                                \
    extern "C" void add_rms_norm_##name(const Norm<T> *norm, const T *delta, int64_t rows) {                           \
        add_rms_norm(*norm, delta, rows);                                                                              \
    }                                                                                                                  \
    extern "C" void rope_store_##name(const Rope<T> *rope, const T *qkv, int64_t qkv_row, int64_t rows) {              \
        rope_store(*rope, qkv, qkv_row, rows);                                                                         \
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
