// Products of a few rows with panels of weights: each panel is LANES columns, a stretch of memory of its own, with `STEP`
// numbers of the reduced dimension side by side in it. One load of weights, one number or pair of the row spread over a
// vector, no sum across lanes.
#pragma once

#include "vec.h"

template <class T>
struct By {  // sum += weights * x, one vector of columns and one row
    static constexpr int STEP = 1;
    static inline F add(F sum, const T *weights, const T *x) { return sum + load(weights) * wide(*x); }
};
#ifdef HAS_DOT_BF16
template <>
struct By<bf16> {
    static constexpr int STEP = 2;
    static inline F add(F sum, const bf16 *weights, const bf16 *x) {
        __m512bh pair = (__m512bh)_mm512_set1_epi32(raw<int>(x));
        return (F)_mm512_dpbf16_ps((__m512)sum, raw<__m512bh>(weights), pair);
    }
};
#endif

// out[m][n] += the sum over k of x[m][k] weights[k][n], for M rows and N panels. Rows are reached from every third one, so
// that their addresses stay in registers.
template <class T, int M, int N>
inline void multiply(const T *x, int64_t x_row, const T *weights, int k_size, F (*out)[N]) {
    constexpr int STEP = By<T>::STEP;
    const int64_t panel = int64_t(k_size) * LANES;
    const T *thirds[3] = {x, x + 3 * x_row, x + 6 * x_row};
    const T *end = x + k_size;
    for (; thirds[0] < end; weights += STEP * LANES) {
        for (int n = 0; n < N; n++) fetch_ahead(weights + n * panel);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++)
                out[m][n] = By<T>::add(out[m][n], weights + n * panel, thirds[m / 3] + m % 3 * x_row);
        for (int i = 0; i < 3; i++) thirds[i] += STEP;
    }
}

template <int M, class Function>
inline void rest_of_rows(int row, int rows, Function f) {
    if (rows - row == M) f(row, std::integral_constant<int, M>());
    if constexpr (M > 1) rest_of_rows<M - 1>(row, rows, f);
}
// Calls `f` with the rows cut into eights and one piece of the rest, so that weights are read once for each.
template <class Function>
inline void by_rows(int rows, Function f) {
    int row = 0;
    for (; row + 8 <= rows; row += 8) f(row, std::integral_constant<int, 8>());
    rest_of_rows<7>(row, rows, f);
}
