// How the queries of one task meet its keys and values: by the matrix unit.
//
// Keys are the rows of a tile as they lie in their page. Values take turns in pairs of positions, as the unit multiplies
// them, and are laid out so once for all queries that go together.
#pragma once

#include "attention_forms.h"
#include "tiles.h"

#ifdef HAS_TILES
class AttentionTiles {
    static constexpr int COLUMNS = 4;  // queries whose scores are found at once
    static constexpr int PANELS = 4;  // vectors of values that are summed at once
    tiles::Unit unit;
    std::vector<bf16> turned;  // queries [key_dim / 2, COLUMNS, 2]
    std::vector<float> found;  // scores [positions, COLUMNS]
    alignas(64) bf16 pairs[2][PANELS][tiles::DEPTH * LANES];
    alignas(64) float sums[PANELS][QUERIES * LANES];

  public:
    static constexpr bool BY_PANELS = false;

    static bool serves(const Shape &shape) {
        bool whole = shape.key_dim % tiles::DEPTH == 0 && shape.value_dim % tiles::DEPTH == 0;
        return whole && shape.heads > shape.kv_heads && tiles::allowed();
    }

    // As those of AttentionVectors.
    void scores(const Task<bf16> &task, int n, const bf16 *const *q, int first, int last, float *const *out) {
        for (int i = 0; i < n; i += COLUMNS) some_scores(task, std::min(COLUMNS, n - i), q + i, first, last, out + i);
    }

    void answers(const Task<bf16> &task, int n, bf16 *const *weights, const float *shares, int first, int last,
                 bf16 *const *out) {
        int whole = first + (last - first + tiles::DEPTH - 1) / tiles::DEPTH * tiles::DEPTH;
        for (int i = 0; i < n; i++) std::fill(weights[i] + last, weights[i] + whole, bf16{});
        int64_t row = n > 1 ? (const char *)weights[1] - (const char *)weights[0] : 0;
        int column = 0, dim = task.shape.value_dim;
        unit.shape(n, tiles::DEPTH);
        for (; column + PANELS * LANES <= dim; column += PANELS * LANES)
            answer<PANELS>(task, n, weights[0], row, shares, first, last, column, out);
        if (column < dim) answer<2>(task, n, weights[0], row, shares, first, last, column, out);
    }

  private:
    void some_scores(const Task<bf16> &task, int n, const bf16 *const *q, int first, int last, float *const *out) {
        int dim = task.shape.key_dim, size = task.shape.page_size, pages = task.pages(last);
        turned.resize(size_t(dim) * COLUMNS);
        found.resize(size_t(last - first + LANES) * COLUMNS);
        for (int i = 0; i < COLUMNS; i++)
            for (int pair = 0; pair < dim; pair += 2)
                std::memcpy(&turned[pair * COLUMNS + 2 * i], q[std::min(i, n - 1)] + pair, 2 * sizeof(bf16));
        unit.shape(tiles::ROWS, tiles::DEPTH, COLUMNS);
        constexpr int BYTES = COLUMNS * sizeof(float);
        auto block = [&](auto sum, int at) {
            if (at % size == 0) {
                task.fetch(task.keys, at / size + AHEAD, pages, dim);
                task.fetch(task.values, at / size, pages, task.shape.value_dim);  // for when all scores are there
            }
            const bf16 *k = task.at(task.keys, at, dim);
            tiles::zero<sum>();
            for (int d = 0; d < dim; d += tiles::DEPTH) {
                tiles::load<4>(k + d, dim * sizeof(bf16));
                tiles::load<5>(&turned[d * COLUMNS], BYTES);
                tiles::multiply<sum, 4, 5>();
            }
            tiles::store<sum>(&found[(at - first) * COLUMNS], BYTES);
        };
        for (int at = first; at < last; at += 4 * LANES)  // a sum waits long for its products: four take turns
            tiles::each<4>([&](auto turn) {
                if (at + turn * LANES < last) block(turn, at + turn * LANES);
            });
        for (int at = first; at < last; at += LANES) {
            F of[COLUMNS];
            columns(&found[(at - first) * COLUMNS], of);
            for (int i = 0; i < n; i++) store(out[i] + at, of[i]);
        }
    }

    // What lies [LANES, 4], as four columns.
    static void columns(const float *from, F *out) {
        const I first = {0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29}, second = first + 2;
        const I low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, high = low + 8;
        F a = load(from), b = load(from + LANES), c = load(from + 2 * LANES), d = load(from + 3 * LANES);
        F ab = __builtin_shuffle(a, b, first), cd = __builtin_shuffle(c, d, first);
        out[0] = __builtin_shuffle(ab, cd, low), out[1] = __builtin_shuffle(ab, cd, high);
        ab = __builtin_shuffle(a, b, second), cd = __builtin_shuffle(c, d, second);
        out[2] = __builtin_shuffle(ab, cd, low), out[3] = __builtin_shuffle(ab, cd, high);
    }

    template <int N>
    void answer(const Task<bf16> &task, int n, const bf16 *weights, int64_t row, const float *shares, int first, int last,
                int column, bf16 *const *out) {
        tiles::each<N>([&](auto sum) { tiles::zero<sum>(); });
        bool turn = false;
        pair_up<N>(task, first, last, column, pairs[turn]);
        for (int at = first; at < last; at += tiles::DEPTH, turn = !turn) {
            // The next ones before these are multiplied: what was just stored is slow to be loaded as a tile.
            if (at + tiles::DEPTH < last) pair_up<N>(task, at + tiles::DEPTH, last, column, pairs[!turn]);
            tiles::load<4>(weights + at, row);
            tiles::each<N>([&](auto sum) {
                tiles::load<5>(pairs[turn][sum], 2 * LANES * sizeof(bf16));
                tiles::multiply<sum, 4, 5>();
            });
        }
        tiles::each<N>([&](auto sum) { tiles::store<sum>(sums[sum], LANES * sizeof(float)); });
        for (int i = 0; i < n; i++) {
            F total[N];
            for (int w = 0; w < N; w++) total[w] = load(sums[w] + i * LANES);
            InPairs::order<N>(total);
            for (int w = 0; w < N; w++) store(out[i] + column + w * LANES, total[w] * shares[i]);
        }
    }

    // N vectors of the values of DEPTH positions from `at` on, in pairs of positions and columns as `InPairs` has them. What
    // lies behind the last position may be NaN, and a weight of 0 does not help: it is 0 here.
    template <int N>
    static void pair_up(const Task<bf16> &task, int at, int last, int column, bf16 (*to)[tiles::DEPTH * LANES]) {
        int dim = task.shape.value_dim;
        for (int half = 0; half < tiles::DEPTH; half += LANES) {
            int from = at + half, count = std::min(LANES, last - from);
            const bf16 *v = count > 0 ? task.at(task.values, from, dim) + column : nullptr;
            for (int j = 0; j < LANES; j += 2)
                for (int w = 0; w < N; w += 2) {
                    __m512i zeros = _mm512_setzero_si512();
                    __m512i a = j < count ? raw<__m512i>(v + j * dim + w * LANES) : zeros;
                    __m512i b = j + 1 < count ? raw<__m512i>(v + (j + 1) * dim + w * LANES) : zeros;
                    bf16 *pair = to[w] + (half + j) * LANES;
                    _mm512_store_si512(pair, _mm512_unpacklo_epi16(a, b));
                    _mm512_store_si512(pair + tiles::DEPTH * LANES, _mm512_unpackhi_epi16(a, b));
                }
        }
    }
};
#endif
