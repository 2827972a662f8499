// Multi-LoRA over tiles of rows; the formula is in kernels/multi_lora.py.
//
// One task is a tile: it brings its rows down by each of its slots, and adds what comes up to y, rounding once. Weights lie
// as they are read: A [K, columns], and B [rank, width] of each sibling, in panels of LANES columns, each panel a stretch of
// memory of its own, `step` numbers of the reduced dimension side by side in it (2 where the processor multiplies pairs of
// bfloat16). A product is one load of weights, one number or pair of the row spread over a vector, no sum across lanes.
#include <algorithm>
#include <vector>

#include "product.h"

namespace {

template <class T>
struct Slot {
    const T *a, *b;
    int64_t columns;  // of A: the siblings' ranks, each to a multiple of `step`, together to one of LANES
};

// The blocks are calls: in one large function the rows' addresses would not stay in registers.
template <class T, int M, int N>
[[gnu::noinline]] void shrink_block(const T *x, int64_t x_row, const Slot<T> &slot, int k_size, float weight, int column, T *v,
                         int64_t v_row) {
    F total[M][N] = {};
    multiply<T, M, N>(x, x_row, slot.a + int64_t(column) * k_size, k_size, total);
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store(v + m * v_row + column + n * LANES, total[m][n] * weight);
}

template <class T>
void shrink(const T *x, int64_t x_row, int rows, const Slot<T> &slot, int k_size, float weight, T *v, int64_t v_row) {
    by_rows(rows, [&](int row, auto height) {
        constexpr int M = decltype(height)::value;
        const T *from = x + row * x_row;
        T *to = v + row * v_row;
        int column = 0;
        for (; column + 3 * LANES <= slot.columns; column += 3 * LANES)
            shrink_block<T, M, 3>(from, x_row, slot, k_size, weight, column, to, v_row);
        for (; column + 2 * LANES <= slot.columns; column += 2 * LANES)
            shrink_block<T, M, 2>(from, x_row, slot, k_size, weight, column, to, v_row);
        for (; column < slot.columns; column += LANES)
            shrink_block<T, M, 1>(from, x_row, slot, k_size, weight, column, to, v_row);
    });
}

template <class T>
struct Part {  // of a member: its columns of v and its B for one sibling
    const T *v, *b;
    int rank;
};

template <class T>
struct Expand {  // what is added to a tile's columns of one sibling
    std::vector<Part<T>> parts;
    int64_t v_row;

    // total += the deltas of M rows from `row` on and N panels from `column` on.
    template <int M, int N>
    void add(int row, int column, F (*total)[N]) const {
        for (const Part<T> &part : parts)
            multiply<T, M, N>(part.v + row * v_row, v_row, part.b + int64_t(column) * part.rank, part.rank, total);
    }
};

template <class T, int M, int N>
[[gnu::noinline]] void expand_block(T *y, int64_t y_row, const Expand<T> &expand, int row, int column) {
    F total[M][N];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) total[m][n] = load(y + m * y_row + n * LANES);
    expand.template add<M, N>(row, column, total);
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store(y + m * y_row + n * LANES, total[m][n]);
}

template <class T>
void expand_rows(T *y, int64_t y_row, int rows, const Expand<T> &expand, int width) {
    if (expand.parts.empty()) return;
    // Rows of y often lie a multiple of 4096 bytes apart, where they push each other out of the first cache: so few of
    // them at a time, and each from end to end.
    by_rows(rows, [&](int row, auto height) {
        constexpr int M = decltype(height)::value;
        int column = 0;
        for (; column + 2 * LANES <= width; column += 2 * LANES)
            expand_block<T, M, 2>(y + row * y_row + column, y_row, expand, row, column);
        for (; column < width; column += LANES)
            expand_block<T, M, 1>(y + row * y_row + column, y_row, expand, row, column);
    });
}

template <class T, int M, F act(F)>
[[gnu::noinline]] void gated_block(T *out, int64_t out_row, const T *gate, const T *up, int64_t y_row,
                                   const Expand<T> &of_gate, const Expand<T> &of_up, int row, int column) {
    F g[M][1], u[M][1];
    for (int m = 0; m < M; m++) g[m][0] = load(gate + m * y_row), u[m][0] = load(up + m * y_row);
    of_gate.template add<M, 1>(row, column, g);
    of_up.template add<M, 1>(row, column, u);
    for (int m = 0; m < M; m++) store(out + m * out_row, act(g[m][0]) * u[m][0]);
}

struct Tile {
    int32_t start, rows, first, members;  // rows of the batch; its members in the list of (slot, weight)
};

template <class T>
struct Call {
    const T *x;
    int64_t x_row;
    int k_size, siblings;
    const int32_t *widths;
    const Slot<T> *slots;
    const int32_t *ranks;
    const Tile *tiles;
    int64_t count;
    const int32_t *member_slots;
    const float *member_weights;
    int64_t most_columns;
    int height, most_members;
};

// Brings the rows of every tile down, and calls `finish` with the tile and what each sibling's columns are to get.
template <class T, class Finish>
void over_tiles(const Call<T> &call, Finish finish) {
#pragma omp parallel
    {
        std::vector<T> bridge(size_t(call.most_members) * call.height * call.most_columns);
        std::vector<Expand<T>> siblings(call.siblings);
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < call.count; number++) {
            const Tile &tile = call.tiles[number];
            for (Expand<T> &sibling : siblings) sibling.parts.clear(), sibling.v_row = call.most_columns;
            for (int i = 0; i < tile.members; i++) {
                int number_of_slot = call.member_slots[tile.first + i];
                const Slot<T> &slot = call.slots[number_of_slot];
                T *v = bridge.data() + size_t(i) * call.height * call.most_columns;
                shrink(call.x + tile.start * call.x_row, call.x_row, tile.rows, slot, call.k_size,
                       call.member_weights[tile.first + i], v, call.most_columns);
                const T *b = slot.b;
                for (int s = 0; s < call.siblings; s++) {
                    int rank = call.ranks[number_of_slot * call.siblings + s];
                    if (rank) siblings[s].parts.push_back({v, b, rank});
                    v += rank, b += int64_t(rank) * call.widths[s];
                }
            }
            finish(tile, siblings);
        }
    }
}

template <class T>
void multi_lora(const Call<T> &call, T *y, int64_t y_row) {
    over_tiles(call, [&](const Tile &tile, const std::vector<Expand<T>> &siblings) {
        T *columns = y + tile.start * y_row;
        for (int s = 0; s < call.siblings; columns += call.widths[s++])
            expand_rows(columns, y_row, tile.rows, siblings[s], call.widths[s]);
    });
}

template <class T, F act(F)>
void multi_lora_gated(const Call<T> &call, const T *y, int64_t y_row, T *out) {
    int width = call.widths[0];
    over_tiles(call, [&](const Tile &tile, const std::vector<Expand<T>> &siblings) {
        by_rows(tile.rows, [&](int row, auto height) {
            constexpr int M = decltype(height)::value;
            const T *gate = y + (tile.start + row) * y_row;
            T *to = out + int64_t(tile.start + row) * width;
            for (int column = 0; column < width; column += LANES)
                gated_block<T, M, act>(to + column, width, gate + column, gate + width + column, y_row, siblings[0],
                                       siblings[1], row, column);
        });
    });
}

}  // namespace

#define EXPORT(T, name)                                                                                                \
    extern "C" int multi_lora_step_##name() { return By<T>::STEP; }                                                    \
    extern "C" void multi_lora_##name(T *y, int64_t y_row, T *out, int activation, const T *x, int64_t x_row,          \
                                      int k_size, int siblings, const int32_t *widths, const Slot<T> *slots,           \
                                      const int32_t *ranks, const Tile *tiles, int64_t count,                          \
                                      const int32_t *member_slots, const float *member_weights, int64_t most_columns,  \
                                      int height, int most_members) {                                                  \
        Call<T> call{x,     x_row,        k_size,         siblings,     widths, slots,       ranks,                    \
                     tiles, count, member_slots, member_weights, most_columns, height, most_members};                  \
        if (!out)                                                                                                      \
            multi_lora(call, y, y_row);                                                                                \
        else if (activation)                                                                                           \
            multi_lora_gated<T, gelu_tanh>(call, y, y_row, out);                                                       \
        else                                                                                                           \
            multi_lora_gated<T, silu>(call, y, y_row, out);                                                            \
    }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
