// Multi-LoRA over tiles of rows; the formula is in kernels/multi_lora.py.
//
// One task is a tile: it brings its rows down by each of its slots, adds what comes up to y, rounding once, and goes on with
// what follows in the layer.
#include "lora_forms.h"
#include "rows.h"

namespace {

struct Tile {
    int32_t start, rows, first, members;  // rows of the batch; its members in the list of (slot, weight)
};

template <class T>
struct Call {  // Python fills it
    const T *x;
    int64_t x_row;
    int32_t k_size, siblings;
    const int32_t *widths;
    const Slot<T> *slots;
    const int32_t *ranks;
    int64_t most_columns;
    const Tile *tiles;
    int64_t count;
    const int32_t *member_slots;
    const float *member_weights;
    int32_t height, most_members;
};

// Brings the rows of every tile down, and calls `finish` with the tile, what each sibling's columns are to get, and what
// computes that.
template <class Form, class T, class Finish>
void over_tiles(const Call<T> &call, Form *, Finish finish) {
#pragma omp parallel
    {
        std::vector<T> bridge(size_t(call.most_members) * call.height * call.most_columns);
        std::vector<Expand<T>> siblings(call.siblings);
        Form form;
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < call.count; number++) {
            const Tile &tile = call.tiles[number];
            for (Expand<T> &sibling : siblings) sibling.parts.clear(), sibling.v_row = call.most_columns;
            for (int i = 0; i < tile.members; i++) {
                int number_of_slot = call.member_slots[tile.first + i];
                const Slot<T> &slot = call.slots[number_of_slot];
                T *v = bridge.data() + size_t(i) * call.height * call.most_columns;
                form.shrink(call.x + tile.start * call.x_row, call.x_row, tile.rows, slot, call.k_size,
                            call.member_weights[tile.first + i], v, call.most_columns);
                const T *b = slot.b;
                for (int s = 0; s < call.siblings; s++) {
                    int rank = call.ranks[number_of_slot * call.siblings + s];
                    if (rank) siblings[s].parts.push_back({v, b, rank});
                    v += rank, b += int64_t(rank) * call.widths[s];
                }
            }
            finish(tile, siblings, form);
        }
    }
}

// Calls `f` with a pointer of the type of the form that serves numbers of type T here.
template <class T, class Function>
void in_best_form(Function f) {
#ifdef HAS_TILES
    if constexpr (std::is_same_v<T, bf16>)
        if (tiles::allowed()) return f((Tiles *)nullptr);
#endif
    f((Vectors<T> *)nullptr);
}

// Adds the deltas to y, and calls `go_on` with each row while it is in a cache.
template <class T, class Row>
void multi_lora(const Call<T> &call, T *y, int64_t y_row, Row go_on) {
    in_best_form<T>([&](auto *form) {
        over_tiles(call, form, [&](const Tile &tile, const std::vector<Expand<T>> &siblings, auto &form) {
            T *columns = y + tile.start * y_row;
            for (int s = 0; s < call.siblings; columns += call.widths[s++])
                if (!siblings[s].parts.empty()) form.expand(columns, y_row, tile.rows, siblings[s], call.widths[s]);
            for (int64_t row = tile.start; row < tile.start + tile.rows; row++) go_on(row, y + row * y_row);
        });
    });
}

template <F act(F), class T>
void multi_lora_gated(const Call<T> &call, const T *y, int64_t y_row, T *out) {
    int64_t width = call.widths[0];
    in_best_form<T>([&](auto *form) {
        over_tiles(call, form, [&](const Tile &tile, const std::vector<Expand<T>> &siblings, auto &form) {
            form.template gated<act>(out + tile.start * width, y + tile.start * y_row, y_row, tile.rows, siblings[0],
                                     siblings[1], width);
        });
    });
}

}  // namespace

#define EXPORT(T, name)                                                                                                \
    extern "C" int multi_lora_step_##name() { return By<T>::STEP; }                                                    \
    extern "C" void multi_lora_##name(const Call<T> *call, T *y, int64_t y_row) {                                      \
        multi_lora(*call, y, y_row, [](int64_t, const T *) {});                                                        \
    }                                                                                                                  \
    extern "C" void multi_lora_normed_##name(const Call<T> *call, T *y, int64_t y_row, const Norm<T> *norm) {          \
        multi_lora(*call, y, y_row, [=](int64_t row, const T *its) { norm->row(row, its); });                          \
    }                                                                                                                  \
    extern "C" void multi_lora_roped_##name(const Call<T> *call, T *y, int64_t y_row, const Rope<T> *rope) {           \
        multi_lora(*call, y, y_row, [=](int64_t row, const T *its) { rope->row(row, its); });                          \
    }                                                                                                                  \
    extern "C" void multi_lora_gated_##name(const Call<T> *call, const T *y, int64_t y_row, T *out, int activation) {  \
        activation ? multi_lora_gated<gelu_tanh>(*call, y, y_row, out) : multi_lora_gated<silu>(*call, y, y_row, out); \
    }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)

extern "C" int matrix_unit() {
#ifdef HAS_TILES
    return tiles::allowed();
#else
    return 0;
#endif
}
