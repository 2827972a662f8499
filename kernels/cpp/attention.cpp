// Attention over pages; the formula is in kernels/attention.py.
//
// One task is a sequence, a KV head and a few of its query rows: a key, once loaded, meets the queries of all heads of
// its group in all of those rows. All scores of a task are kept (they fit the second-level cache), so the softmax is the
// plain one: the largest, then the exponentials, then their sum, then the values. A task of many queries lays its keys out
// in panels first: its scores then need no sums across lanes.
#include <algorithm>
#include <vector>

#include "product.h"

namespace {

constexpr int AHEAD = 2;  // pages that are fetched before their turn
constexpr int QUERIES = 8;  // that go through scores, softmax and values together
constexpr int IN_REGISTERS = 4;  // of them, where 16 sums of products are held for each
constexpr int PANELS_FROM = 16;  // queries of a task

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

    // Pages lie anywhere, so no hardware foresees the next one.
    void fetch(const T *cache, int number, int count, int dim) const {
        if (number >= count) return;
        const char *from = (const char *)page(cache, number, dim);
        for (size_t at = 0; at < shape.page_size * dim * sizeof(T); at += 64) __builtin_prefetch(from + at);
    }

    template <class P>
    void all_scores(int n, const T *const *q, int first, int last, float *const *scores) const {
        int pages = (last + shape.page_size - 1) / shape.page_size;
        for (int at = first; at < last; at += LANES) {
            if (at % shape.page_size == 0) fetch(keys, at / shape.page_size + AHEAD, pages, shape.key_dim);
            const T *k = page(keys, at / shape.page_size, shape.key_dim) + (at % shape.page_size) * shape.key_dim;
            F found[IN_REGISTERS];
            score<T, P>(n, q, k, shape.key_dim, found);
            for (int i = 0; i < n; i++) store(scores[i] + at, found[i]);
        }
    }

    // The keys of [first, last) as panels, 16 keys being the columns of each.
    void lay_out(int first, int last, T *panels) const {
        int words = shape.key_dim / By<T>::STEP;
        for (int at = first; at < last; at += LANES, panels += LANES * shape.key_dim) {
            const T *k = page(keys, at / shape.page_size, shape.key_dim) + (at % shape.page_size) * shape.key_dim;
            for (int word = 0; word < words; word += LANES) {
                F block[LANES];
                for (int j = 0; j < LANES; j++) block[j] = raw<F>(k + j * shape.key_dim + word * By<T>::STEP);
                transpose(block);
                std::memcpy(panels + word * LANES * By<T>::STEP, block, sizeof block);
            }
        }
    }

    // As all_scores, of queries that lie one after the other and keys that are laid out.
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

    template <class V, int N, int W>
    void all_values(const T *const *weights, int first, int last, int column, F (*out)[W]) const {
        int pages = (last + shape.page_size - 1) / shape.page_size;
        for (int at = first; at < last; at += shape.page_size) {
            if (column == 0) fetch(values, at / shape.page_size + AHEAD, pages, shape.value_dim);
            int count = std::min(shape.page_size, last - at);
            const T *v = page(values, at / shape.page_size, shape.value_dim) + column;
            V::template add<T, N, W>(weights, at, count, v, shape.value_dim, out);
        }
        for (int n = 0; n < N; n++) V::template order<W>(out[n]);
    }

    template <class V, int N, int W>
    void answer(const T *const *weights, const float *shares, int first, int last, T *const *out) const {
        int column = 0;
        for (; column + W * LANES <= shape.value_dim; column += W * LANES) {
            F total[N][W] = {};
            all_values<V, N, W>(weights, first, last, column, total);
            for (int n = 0; n < N; n++)
                for (int w = 0; w < W; w++) store(out[n] + column + w * LANES, total[n][w] * shares[n]);
        }
        for (; column < shape.value_dim; column += LANES) {
            F total[N][1] = {};
            all_values<Singly, N, 1>(weights, first, last, column, total);
            for (int n = 0; n < N; n++) store(out[n] + column, total[n][0] * shares[n]);
        }
    }
};

// Weights of positions `low` to `high` (exclusive) out of their scores, which go on to `last`. A factor is left out of them,
// the result, which belongs to the sum of values that they weigh. All others, the one at `last` too, become 0. As T they
// take their scores' place, which has room for a vector beyond.
template <class T>
float softmax(float *scores, int first, int low, int high, int last, const Shape &shape) {
    const I lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    bool capped = shape.softcap > 0;
    F top = all(-INFINITY);
    for (int j = low; j < high; j += LANES) {
        F s = load(scores + j);
        if (capped)
            for (int i = 0; i < LANES; i++) s[i] = std::tanh(s[i] * shape.scale / shape.softcap) * shape.softcap;
        if (high - j < LANES) s = lane < high - j ? s : all(-INFINITY);
        if (capped || high - j < LANES) store(scores + j, s);
        top = larger(s, top);
    }
    float most = largest(top), scale = capped ? 1.0f : shape.scale;
    F total = {};
    T *weights = (T *)scores;
    int j = low;
    for (; j < high; j += LANES) {
        F e = exponential((load(scores + j) - most) * scale);
        total += e;
        store(weights + j, e);
    }
    std::fill(weights + first, weights + low, T{});
    for (; j <= last; j++) weights[j] = T{};
    return 1.0f / sum(total);
}

template <class T, class P, class V>
void attend(T *out, const T *q, int64_t q_row, int64_t q_head, const T *keys, const T *values, const int32_t *starts,
            const int32_t *lengths, const int32_t *tables, int64_t table_row, int longest,
            const Shape &shape, const int32_t *tasks, int64_t count, int height) {
    int group = shape.heads / shape.kv_heads;
    int room = (longest / shape.page_size + 2) * shape.page_size;  // whole pages, and one for a vector beyond
    bool fits_panels = sizeof(T) * By<T>::STEP == sizeof(float) && shape.key_dim % (LANES * By<T>::STEP) == 0;
#pragma omp parallel
    {
        std::vector<float> scores(size_t(QUERIES) * room);
        std::vector<T> panels, queries(size_t(QUERIES) * shape.key_dim);
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < count * shape.kv_heads; number++) {
            const int32_t *cut = tasks + number / shape.kv_heads * 2;
            int sequence = cut[0], row = cut[1], head = int(number % shape.kv_heads);
            int rows = std::min(starts[sequence + 1] - row, height);
            int past = lengths[sequence] - starts[sequence + 1];  // position of row t: past + t
            auto begin = [&](int t) { return shape.window ? std::max(0, past + t + 1 - shape.window) : 0; };
            Task<T> task{shape, keys, values, tables + sequence * table_row, head};
            int laid = begin(row) / shape.page_size * shape.page_size;
            bool by_panels = fits_panels && rows * group >= PANELS_FROM;
            if (by_panels) {
                panels.resize(size_t(room) * shape.key_dim);
                task.lay_out(laid, past + row + rows, panels.data());
            }
            for (int from = 0; from < rows * group; from += QUERIES) {
                int n = std::min(QUERIES, rows * group - from);
                const T *mine[QUERIES], *weights[QUERIES];
                T *answers[QUERIES];
                float *of[QUERIES];
                int low[QUERIES], high[QUERIES], first = 1 << 30, last = 0;
                for (int i = 0; i < n; i++) {
                    int t = row + (from + i) / group, h = head * group + (from + i) % group;
                    mine[i] = q + t * q_row + h * q_head;
                    answers[i] = out + (int64_t(t) * shape.heads + h) * shape.value_dim;
                    of[i] = scores.data() + size_t(i) * room;
                    weights[i] = (const T *)of[i];
                    low[i] = begin(t), high[i] = past + t + 1;
                    first = std::min(first, low[i]), last = std::max(last, high[i]);
                }
                first = first / shape.page_size * shape.page_size;
                if (by_panels) {
                    for (int i = 0; i < n; i++)
                        std::copy(mine[i], mine[i] + shape.key_dim, queries.data() + i * shape.key_dim);
                    const T *of_first = panels.data() + size_t(first - laid) * shape.key_dim;
                    task.scores_by_panels(n, queries.data(), of_first, first, last, scores.data(), room);
                }
                for (int i = 0; i < n; i += IN_REGISTERS) {
                    int some = std::min(IN_REGISTERS, n - i);
                    if (!by_panels) task.template all_scores<P>(some, mine + i, first, last, of + i);
                    float shares[IN_REGISTERS];
                    for (int j = 0; j < some; j++)
                        shares[j] = softmax<T>(of[i + j], first, low[i + j], high[i + j], last, shape);
                    switch (some) {
                        case 1: task.template answer<V, 1, 4>(weights + i, shares, first, last, answers + i); break;
                        case 2: task.template answer<V, 2, 4>(weights + i, shares, first, last, answers + i); break;
                        case 3: task.template answer<V, 3, 4>(weights + i, shares, first, last, answers + i); break;
                        default: task.template answer<V, 4, 4>(weights + i, shares, first, last, answers + i);
                    }
                }
            }
        }
    }
}

}  // namespace

#define EXPORT(T, name)                                                                                                \
    extern "C" void attend_##name(T *out, const T *q, int64_t q_row, int64_t q_head, const T *keys, const T *values,   \
                              const int32_t *starts, const int32_t *lengths, const int32_t *tables,                    \
                              int64_t table_row, int longest, int heads, int kv_heads, int key_dim,                    \
                              int value_dim, int page_size, int window, float scale, float softcap,                    \
                              int64_t cache_page, int64_t cache_head,                                                  \
                              const int32_t *tasks, int64_t count, int height) {                                       \
        Shape shape{heads, kv_heads, key_dim, value_dim, page_size, window, scale, softcap, cache_page, cache_head};   \
        PICK(T, attend)(out, q, q_row, q_head, keys, values, starts, lengths, tables, table_row, longest,              \
                    shape, tasks, count, height);                                                                      \
    }

#define PICK(T, f) f<T, Products<T>, Singly>
EXPORT(float, float32)
#ifdef HAS_DOT_BF16
#undef PICK
#define PICK(T, f) (key_dim % Pairs::COUNT ? f<T, Products<T>, InPairs> : f<T, Pairs, InPairs>)
#endif
EXPORT(bf16, bfloat16)
