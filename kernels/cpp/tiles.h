// Products of up to 16 rows of bfloat16 with panels of weights, by the matrix unit that some processors have (AMX).
//
// A panel holds pairs of numbers of the reduced dimension, 16 columns of them side by side: sixteen such rows of pairs are
// what the unit takes as a tile of weights, as they lie. An instruction multiplies 16 rows of 32 numbers with one.
#pragma once

#include "vec.h"

#ifdef __AMX_BF16__
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <type_traits>

namespace tiles {

constexpr int ROWS = 16, DEPTH = 32;

// Whether the system lets this process use the unit; LORAMILL_AMX=0 says that it shall not.
inline bool allowed() {
    static const bool yes = [] {
        const char *said = std::getenv("LORAMILL_AMX");
        constexpr long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return !(said && !std::strcmp(said, "0")) && syscall(SYS_arch_prctl, ask, tile_data) == 0;
    }();
    return yes;
}

// Not the compiler's own forms of these: GCC's do not say that memory is read.
template <int TILE>
inline void load(const void *at, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
inline void store(void *at, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
inline void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}
template <int SUM, int X, int WEIGHTS>
inline void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(X), "i"(WEIGHTS));
}

template <int N, class Function>
inline void each(Function f) {
    if constexpr (N > 0) {
        each<N - 1>(f);
        f(std::integral_constant<int, N - 1>());
    }
}

// A thread's unit. Tiles 0 to 3 hold sums, 4 and 5 pieces of rows and of weights, 6 and 7 what is left of a depth that is no
// multiple of 32.
class Unit {
    int rows = 0, rest = 0, columns = 0;

  public:
    // Shapes the tiles for so many rows, such a depth and so many columns. What they hold is lost.
    void shape(int for_rows, int depth, int for_columns = LANES) {
        int left = depth % DEPTH;
        if (for_rows == rows && for_columns == columns && (left == 0 || left == rest)) return;
        rows = for_rows, columns = for_columns;
        if (left) rest = left;
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        auto is = [&](int tile, int of_rows, int numbers) { shapes.rows[tile] = of_rows, shapes.bytes[tile] = 2 * numbers; };
        for (int tile = 0; tile < 4; tile++) is(tile, rows, 2 * columns);
        is(4, rows, DEPTH), is(5, DEPTH / 2, 2 * columns);
        if (rest) is(6, rows, rest), is(7, rest / 2, 2 * columns);
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~Unit() {
        if (rows) asm volatile("tilerelease");
    }
};

// A piece of weights of such a depth as tile TILE, which is shaped for it.
template <int TILE>
inline void load_weights(const bf16 *at, int depth) {
    for (int i = 0; i < depth * LANES; i += DEPTH) fetch_ahead(at + i);
    load<TILE>(at, 2 * LANES * sizeof(bf16));
}

// sums = x [rows, depth] times N panels of the weights, for as many rows as the unit is shaped for: CHAINS times N * LANES
// columns side by side, which are to be added up. A chain waits 50 cycles for each product, so there should be three or four
// of sums in all. `more` adds to what they hold.
template <int N, int CHAINS>
inline void products(const bf16 *x, int64_t x_row, const bf16 *weights, int depth, float *sums, int64_t sums_row,
                     bool more) {
    const int64_t panel = int64_t(depth) * LANES, x_bytes = x_row * int64_t(sizeof(bf16));
    const int64_t sums_bytes = sums_row * int64_t(sizeof(float));
    each<N * CHAINS>([&](auto sum) { more ? load<sum>(sums + sum * LANES, sums_bytes) : zero<sum>(); });
    auto piece = [&](auto chain, int k) {
        load<4>(x + k, x_bytes);
        each<N>([&](auto n) {
            load_weights<5>(weights + n * panel + k * LANES, DEPTH);
            multiply<chain * N + n, 4, 5>();
        });
    };
    int k = 0;
    for (; k + CHAINS * DEPTH <= depth; k += CHAINS * DEPTH)
        each<CHAINS>([&](auto chain) { piece(chain, k + chain * DEPTH); });
    for (; k + DEPTH <= depth; k += DEPTH) piece(std::integral_constant<int, 0>(), k);
    if (k < depth) {
        load<6>(x + k, x_bytes);
        each<N>([&](auto n) {
            load_weights<7>(weights + n * panel + k * LANES, depth - k);
            multiply<n, 6, 7>();
        });
    }
    each<N * CHAINS>([&](auto sum) { store<sum>(sums + sum * LANES, sums_bytes); });
}

}  // namespace tiles
#endif
