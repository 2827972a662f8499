// How the queries of one task meet its keys and values: by the processor's vectors. Those of the matrix unit are in
// attention_tiles.h.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "product.h"

constexpr int AHEAD = 2;  // pages that are fetched before their turn
constexpr int QUERIES = 8;  // that go through scores, softmax and values together
constexpr int IN_REGISTERS = 4;  // of them, where 16 sums of products are held for each

// Lane i of the result is the sum of the lanes of a[i], for as many vectors as lanes.
template <int GROUP>
inline F halves(F a, F b) {
    I first, second;
    for (int i = 0; i < LANES; i++) {
        int in_pair = i % (2 * GROUP), base = i - in_pair;
        int lane = base + in_pair % GROUP;
        first[i] = in_pair < GROUP ? lane : LANES + lane;
        second[i] = first[i] + GROUP;
    }
    return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
}
inline F quarters(const F *a) { return halves<2>(halves<1>(a[0], a[1]), halves<1>(a[2], a[3])); }
inline F sums(const F *a) { return halves<8>(halves<4>(a[0], a[1]), halves<4>(a[2], a[3])); }

// Sixteen vectors of 16 words each: rows become columns.
template <int GROUP = 1>
inline void transpose(F *rows) {
    I low, high;
    for (int i = 0; i < LANES; i++) low[i] = i & GROUP ? LANES + i - GROUP : i, high[i] = i & GROUP ? LANES + i : i + GROUP;
    for (int i = 0; i < LANES; i++) {
        if (i & GROUP) continue;
        F a = rows[i], b = rows[i + GROUP];
        rows[i] = __builtin_shuffle(a, b, low), rows[i + GROUP] = __builtin_shuffle(a, b, high);
    }
    if constexpr (GROUP < LANES / 2) transpose<2 * GROUP>(rows);
}

struct Shape {
    int heads, kv_heads, key_dim, value_dim, page_size, window;
    float scale, softcap;
    int64_t cache_page, cache_head;  // from one page to the next, from one head to the next: in tokens
};

// Scores of N queries against the 16 keys of `k`, each `dim` long.
template <class T, class P, int N>
inline void score(const T *const *q, const T *k, int dim, F *out) {
    F part[N][4];
    for (int j = 0; j < LANES; j += 4) {
        F total[N][4] = {};
        for (int d = 0; d < dim; d += P::COUNT)
            for (int n = 0; n < N; n++)
                for (int i = 0; i < 4; i++) total[n][i] = P::add(total[n][i], q[n] + d, k + (j + i) * dim + d);
        for (int n = 0; n < N; n++) part[n][j / 4] = quarters(total[n]);
    }
    for (int n = 0; n < N; n++) out[n] = sums(part[n]);
}

template <class T, class P>
inline void score(int n, const T *const *q, const T *k, int dim, F *out) {
    switch (n) {
        case 1: return score<T, P, 1>(q, k, dim, out);
        case 2: return score<T, P, 2>(q, k, dim, out);
        case 3: return score<T, P, 3>(q, k, dim, out);
        default: return score<T, P, 4>(q, k, dim, out);
    }
}

template <class T, int M, int N>
[[gnu::noinline]] void score_block(const T *q, const T *panels, int dim, float *scores, int room) {
    F total[M][N] = {};
    multiply<T, M, N>(q, dim, panels, dim, total);
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store(scores + m * room + n * LANES, total[m][n]);
}

// N weighted sums of values, W vectors wide. `weights` are those of positions from `at` on; `order` puts the columns back.
struct Singly {
    template <class T, int N, int W>
    static inline void add(const T *const *weights, int at, int count, const T *v, int dim, F (*out)[W]) {
        for (int j = 0; j < count; j++)
            for (int w = 0; w < W; w++) {
                F value = load(v + int64_t(j) * dim + w * LANES);
                for (int n = 0; n < N; n++) out[n][w] += wide(weights[n][at + j]) * value;
            }
    }
    template <int W>
    static inline void order(F *) {}
};

#ifdef HAS_DOT_BF16
// Two positions at a time. A pair of vectors holds the columns of 32 values, those of each 128 bits' lower halves first.
struct InPairs {
    template <class T, int N, int W>
    static inline void add(const T *const *weights, int at, int count, const T *v, int dim, F (*out)[W]) {
        for (int j = 0; j < count; j += 2) {
            bool both = j + 1 < count;  // what lies behind the last position may be NaN; its weight is 0
            __m512bh pair[N];
            for (int n = 0; n < N; n++) pair[n] = (__m512bh)_mm512_set1_epi32(raw<int>(weights[n] + at + j));
            const T *even = v + int64_t(j) * dim, *odd = even + (both ? dim : 0);
            for (int w = 0; w < W; w += 2) {
                __m512i a = raw<__m512i>(even + w * LANES), b = raw<__m512i>(odd + w * LANES);
                __m512bh low = (__m512bh)_mm512_unpacklo_epi16(a, b), high = (__m512bh)_mm512_unpackhi_epi16(a, b);
                for (int n = 0; n < N; n++) {
                    out[n][w] = (F)_mm512_dpbf16_ps((__m512)out[n][w], low, pair[n]);
                    out[n][w + 1] = (F)_mm512_dpbf16_ps((__m512)out[n][w + 1], high, pair[n]);
                }
            }
        }
    }
    template <int W>
    static inline void order(F *out) {
        const I first = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23}, second = first + 8;
        for (int w = 0; w < W; w += 2) {
            F low = out[w], high = out[w + 1];
            out[w] = __builtin_shuffle(low, high, first);
            out[w + 1] = __builtin_shuffle(low, high, second);
        }
    }
};
#endif

template <class T>
struct Task {
    const Shape &shape;
    const T *keys, *values;
    const int32_t *table;
    int kv_head;

    const T *page(const T *cache, int number, int dim) const {
        return cache + (table[number] * shape.cache_page + kv_head * shape.cache_head) * dim;
    }

    int pages(int positions) const { return (positions + shape.page_size - 1) / shape.page_size; }
    // The keys or values from a position on, up to the end of its page.
    const T *at(const T *cache, int position, int dim) const {
        return page(cache, position / shape.page_size, dim) + (position % shape.page_size) * dim;
    }

    // Pages lie anywhere, so no hardware foresees the next one.
    void fetch(const T *cache, int number, int count, int dim) const {
        if (number >= count) return;
        const char *from = (const char *)page(cache, number, dim);
        for (size_t at = 0; at < shape.page_size * dim * sizeof(T); at += 64) __builtin_prefetch(from + at);
    }

    // The keys of [first, last) as panels, 16 keys being the columns of each.
    void lay_out(int first, int last, T *panels) const {
        int words = shape.key_dim / By<T>::STEP;
        for (int at = first; at < last; at += LANES, panels += LANES * shape.key_dim) {
            const T *k = this->at(keys, at, shape.key_dim);
            for (int word = 0; word < words; word += LANES) {
                F block[LANES];
                for (int j = 0; j < LANES; j++) block[j] = raw<F>(k + j * shape.key_dim + word * By<T>::STEP);
                transpose(block);
                std::memcpy(panels + word * LANES * By<T>::STEP, block, sizeof block);
            }
        }
    }

    // Scores of queries that lie one after the other and keys that are laid out.
    void scores_by_panels(int n, const T *q, const T *panels, int first, int last, float *scores, int room) const {
        by_rows(n, [&](int row, auto height) {
            constexpr int M = decltype(height)::value;
            float *to = scores + row * room;
            const T *from = q + row * shape.key_dim, *weights = panels;
            int at = first;
            for (; at + LANES < last; at += 2 * LANES, weights += 2 * LANES * shape.key_dim)
                score_block<T, M, 2>(from, weights, shape.key_dim, to + at, room);
            if (at < last) score_block<T, M, 1>(from, weights, shape.key_dim, to + at, room);
        });
    }
};

// The scores and answers of up to QUERIES queries of a task, by vectors: IN_REGISTERS of them at a time.
template <class T, class P, class V>
struct AttentionVectors {
    static constexpr bool BY_PANELS = true;  // where there are enough queries for it to pay

    // Scores of positions [first, last), `first` being the start of a page; `out` has room for whole pages.
    void scores(const Task<T> &task, int n, const T *const *q, int first, int last, float *const *out) {
        for (int i = 0; i < n; i += IN_REGISTERS)
            some_scores(task, std::min(IN_REGISTERS, n - i), q + i, first, last, out + i);
    }

    // Values weighed, times each query's share. `weights` may be written beyond `last`.
    void answers(const Task<T> &task, int n, T *const *weights, const float *shares, int first, int last, T *const *out) {
        for (int i = 0; i < n; i += IN_REGISTERS) switch (n - i) {
                case 1: answer<1, 4>(task, weights + i, shares + i, first, last, out + i); break;
                case 2: answer<2, 4>(task, weights + i, shares + i, first, last, out + i); break;
                case 3: answer<3, 4>(task, weights + i, shares + i, first, last, out + i); break;
                default: answer<4, 4>(task, weights + i, shares + i, first, last, out + i);
            }
    }

  private:
    static void some_scores(const Task<T> &task, int n, const T *const *q, int first, int last, float *const *out) {
        int dim = task.shape.key_dim, pages = task.pages(last);
        for (int at = first; at < last; at += LANES) {
            if (at % task.shape.page_size == 0) task.fetch(task.keys, at / task.shape.page_size + AHEAD, pages, dim);
            F found[IN_REGISTERS];
            score<T, P>(n, q, task.at(task.keys, at, dim), dim, found);
            for (int i = 0; i < n; i++) store(out[i] + at, found[i]);
        }
    }

    template <class Some, int N, int W>
    static void sum(const Task<T> &task, const T *const *weights, int first, int last, int column, F (*out)[W]) {
        int size = task.shape.page_size, dim = task.shape.value_dim, pages = task.pages(last);
        for (int at = first; at < last; at += size) {
            if (column == 0) task.fetch(task.values, at / size + AHEAD, pages, dim);
            const T *v = task.at(task.values, at, dim) + column;
            Some::template add<T, N, W>(weights, at, std::min(size, last - at), v, dim, out);
        }
        for (int n = 0; n < N; n++) Some::template order<W>(out[n]);
    }

    template <int N, int W>
    static void answer(const Task<T> &task, const T *const *weights, const float *shares, int first, int last,
                       T *const *out) {
        int column = 0, dim = task.shape.value_dim;
        for (; column + W * LANES <= dim; column += W * LANES) {
            F total[N][W] = {};
            sum<V, N, W>(task, weights, first, last, column, total);
            for (int n = 0; n < N; n++)
                for (int w = 0; w < W; w++) store(out[n] + column + w * LANES, total[n][w] * shares[n]);
        }
        for (; column < dim; column += LANES) {
            F total[N][1] = {};
            sum<Singly, N, 1>(task, weights, first, last, column, total);
            for (int n = 0; n < N; n++) store(out[n] + column, total[n][0] * shares[n]);
        }
    }
};
