// How a tile of rows goes through low-rank weights: by the processor's vectors, or by its matrix unit.
//
// Weights lie as they are read: A [K, columns], and B [rank, width] of each sibling, in panels of LANES columns, each panel a
// stretch of memory of its own, `step` numbers of the reduced dimension side by side in it (2 where the processor multiplies
// pairs of bfloat16).
#pragma once

#include <algorithm>
#include <vector>

#include "product.h"
#include "tiles.h"

template <class T>
struct Slot {
    const T *a, *b;
    int64_t columns;  // of A: the siblings' ranks, each to a multiple of `step`, together to one of LANES
};

template <class T>
struct Part {  // of a member: its columns of v and its B for one sibling
    const T *v, *b;
    int rank;
};

template <class T>
struct Expand {  // what is added to a tile's columns of one sibling
    std::vector<Part<T>> parts;
    int64_t v_row;
};

// The products by the processor's vectors, eight rows in registers. The blocks are calls: in one large function the rows'
// addresses would not stay in registers.
template <class T>
struct Vectors {
    template <int M, int N>
    [[gnu::noinline]] static void shrink_block(const T *x, int64_t x_row, const Slot<T> &slot, int k_size, float weight,
                                               int column, T *v, int64_t v_row) {
        F total[M][N] = {};
        multiply<T, M, N>(x, x_row, slot.a + int64_t(column) * k_size, k_size, total);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) store(v + m * v_row + column + n * LANES, total[m][n] * weight);
    }

    void shrink(const T *x, int64_t x_row, int rows, const Slot<T> &slot, int k_size, float weight, T *v, int64_t v_row) {
        by_rows(rows, [&](int row, auto height) {
            constexpr int M = decltype(height)::value;
            const T *from = x + row * x_row;
            T *to = v + row * v_row;
            int column = 0;
            for (; column + 3 * LANES <= slot.columns; column += 3 * LANES)
                shrink_block<M, 3>(from, x_row, slot, k_size, weight, column, to, v_row);
            for (; column + 2 * LANES <= slot.columns; column += 2 * LANES)
                shrink_block<M, 2>(from, x_row, slot, k_size, weight, column, to, v_row);
            for (; column < slot.columns; column += LANES)
                shrink_block<M, 1>(from, x_row, slot, k_size, weight, column, to, v_row);
        });
    }

    // total += the deltas of M rows from `row` on and N panels from `column` on.
    template <int M, int N>
    static void add(const Expand<T> &expand, int row, int column, F (*total)[N]) {
        for (const Part<T> &part : expand.parts)
            multiply<T, M, N>(part.v + row * expand.v_row, expand.v_row, part.b + int64_t(column) * part.rank, part.rank,
                              total);
    }

    template <int M, int N>
    [[gnu::noinline]] static void expand_block(T *y, int64_t y_row, const Expand<T> &expand, int row, int column) {
        F total[M][N];
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) total[m][n] = load(y + m * y_row + n * LANES);
        add<M, N>(expand, row, column, total);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) store(y + m * y_row + n * LANES, total[m][n]);
    }

    void expand(T *y, int64_t y_row, int rows, const Expand<T> &expand, int width) {
        // Rows of y often lie a multiple of 4096 bytes apart, where they push each other out of the first cache: so few of
        // them at a time, and each from end to end.
        by_rows(rows, [&](int row, auto height) {
            constexpr int M = decltype(height)::value;
            int column = 0;
            for (; column + 2 * LANES <= width; column += 2 * LANES)
                expand_block<M, 2>(y + row * y_row + column, y_row, expand, row, column);
            for (; column < width; column += LANES)
                expand_block<M, 1>(y + row * y_row + column, y_row, expand, row, column);
        });
    }

    template <int M, F act(F)>
    [[gnu::noinline]] static void gated_block(T *out, int64_t out_row, const T *gate, const T *up, int64_t y_row,
                                              const Expand<T> &of_gate, const Expand<T> &of_up, int row, int column) {
        F g[M][1], u[M][1];
        for (int m = 0; m < M; m++) g[m][0] = load(gate + m * y_row), u[m][0] = load(up + m * y_row);
        add<M, 1>(of_gate, row, column, g);
        add<M, 1>(of_up, row, column, u);
        for (int m = 0; m < M; m++) store(out + m * out_row, act(g[m][0]) * u[m][0]);
    }

    template <F act(F)>
    void gated(T *out, const T *y, int64_t y_row, int rows, const Expand<T> &of_gate, const Expand<T> &of_up, int width) {
        by_rows(rows, [&](int row, auto height) {
            constexpr int M = decltype(height)::value;
            const T *gate = y + row * y_row;
            T *to = out + int64_t(row) * width;
            for (int column = 0; column < width; column += LANES)
                gated_block<M, act>(to + column, width, gate + column, gate + width + column, y_row, of_gate, of_up, row,
                                    column);
        });
    }
};

#ifdef HAS_TILES
// The same by the matrix unit, sixteen rows at a time. It leaves its sums in memory, WIDTH columns that stay in the first
// cache, from which the rows are gone on with one after the other.
class Tiles {
    static constexpr int WIDTH = 256;
    tiles::Unit unit;
    alignas(64) float sums[2][tiles::ROWS * WIDTH];

    // Calls `f` with the first of so many panels side by side, at most MOST, until all columns have been.
    template <int MOST, class Function>
    static void across(int64_t columns, Function f) {
        int64_t column = 0;
        for (; column + MOST * LANES <= columns; column += MOST * LANES) f(column, std::integral_constant<int, MOST>());
        if constexpr (MOST > 1)
            across<MOST - 1>(columns - column, [&](int64_t more, auto n) { f(column + more, n); });
    }
    // Calls `f` with the first of so many rows.
    template <class Function>
    static void down(int rows, Function f) {
        for (int row = 0; row < rows; row += tiles::ROWS) f(row, std::min(tiles::ROWS, rows - row));
    }

    // Asks for a piece of rows of y while its deltas are computed: rows lie pages apart, which no hardware foresees.
    static void fetch(const bf16 *y, int64_t y_row, int rows, int columns) {
        for (int m = 0; m < rows; m++)
            for (int i = 0; i < columns; i += 2 * LANES) __builtin_prefetch(y + m * y_row + i);
    }

    // The deltas of these rows and columns; none at all are zeros.
    void add(const Expand<bf16> &expand, int row, int rows, int64_t first, int64_t columns, float *to) {
        if (expand.parts.empty()) std::fill(to, to + tiles::ROWS * WIDTH, 0.0f);
        for (const Part<bf16> &part : expand.parts) {
            unit.shape(rows, part.rank);
            across<4>(columns, [&](int64_t column, auto n) {
                tiles::products<n, 1>(part.v + row * expand.v_row, expand.v_row, part.b + (first + column) * part.rank,
                                      part.rank, to + column, WIDTH, &part != &expand.parts[0]);
            });
        }
    }

  public:
    void shrink(const bf16 *x, int64_t x_row, int rows, const Slot<bf16> &slot, int k_size, float weight, bf16 *v,
                int64_t v_row) {
        down(rows, [&](int row, int height) {
            unit.shape(height, k_size);
            across<3>(slot.columns, [&](int64_t column, auto n) {
                constexpr int CHAINS = 4 / n;
                tiles::products<n, CHAINS>(x + row * x_row, x_row, slot.a + column * k_size, k_size, sums[0], WIDTH, false);
                for (int m = 0; m < height; m++)
                    for (int i = 0; i < n; i++) {
                        F total = {};
                        for (int chain = 0; chain < CHAINS; chain++)
                            total += load(sums[0] + m * WIDTH + (chain * n + i) * LANES);
                        store(v + (row + m) * v_row + column + i * LANES, total * weight);
                    }
            });
        });
    }

    void expand(bf16 *y, int64_t y_row, int rows, const Expand<bf16> &expand, int width) {
        down(rows, [&](int row, int height) {
            for (int column = 0; column < width; column += WIDTH) {
                int columns = std::min(WIDTH, width - column);
                fetch(y + row * y_row + column, y_row, height, columns);
                add(expand, row, height, column, columns, sums[0]);
                for (int m = 0; m < height; m++) {
                    bf16 *to = y + (row + m) * y_row + column;
                    for (int i = 0; i < columns; i += LANES) store(to + i, load(to + i) + load(sums[0] + m * WIDTH + i));
                }
            }
        });
    }

    template <F act(F)>
    void gated(bf16 *out, const bf16 *y, int64_t y_row, int rows, const Expand<bf16> &of_gate, const Expand<bf16> &of_up,
               int width) {
        if (of_gate.parts.empty() && of_up.parts.empty())  // rows of the base
            return Vectors<bf16>().template gated<act>(out, y, y_row, rows, of_gate, of_up, width);
        down(rows, [&](int row, int height) {
            for (int column = 0; column < width; column += WIDTH) {
                int columns = std::min(WIDTH, width - column);
                fetch(y + row * y_row + column, y_row, height, columns);
                fetch(y + row * y_row + width + column, y_row, height, columns);
                add(of_gate, row, height, column, columns, sums[0]);
                add(of_up, row, height, column, columns, sums[1]);
                for (int m = 0; m < height; m++) {
                    const bf16 *gate = y + (row + m) * y_row + column, *up = gate + width;
                    const float *g = sums[0] + m * WIDTH, *u = sums[1] + m * WIDTH;
                    bf16 *to = out + int64_t(row + m) * width + column;
                    for (int i = 0; i < columns; i += LANES)
                        store(to + i, act(load(gate + i) + load(g + i)) * (load(up + i) + load(u + i)));
                }
            }
        });
    }
};
#endif
