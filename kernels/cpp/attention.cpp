// Attention over pages; the formula is in kernels/attention.py.
//
// One task is a sequence, a KV head and a few of its query rows: a key, once loaded, meets the queries of all heads of
// its group in all of those rows. All scores of a task are kept (they fit the second-level cache), so the softmax is the
// plain one: the largest, then the exponentials, then their sum, then the values.
#include <algorithm>
#include <vector>

#include "vec.h"

namespace {

constexpr int AHEAD = 2;  // pages that are fetched before their turn
constexpr int QUERIES = 4;  // at once in registers: 16 sums of products for each

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
            F found[QUERIES];
            score<T, P>(n, q, k, shape.key_dim, found);
            for (int i = 0; i < n; i++) store(scores[i] + at, found[i]);
        }
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
    void answer(const T *const *weights, int first, int last, T *const *out) const {
        int column = 0;
        for (; column + W * LANES <= shape.value_dim; column += W * LANES) {
            F total[N][W] = {};
            all_values<V, N, W>(weights, first, last, column, total);
            for (int n = 0; n < N; n++)
                for (int w = 0; w < W; w++) store(out[n] + column + w * LANES, total[n][w]);
        }
        for (; column < shape.value_dim; column += LANES) {
            F total[N][1] = {};
            all_values<Singly, N, 1>(weights, first, last, column, total);
            for (int n = 0; n < N; n++) store(out[n] + column, total[n][0]);
        }
    }
};

// Weights of positions `low` to `high` (exclusive) out of their scores, which go on to `last`; all others become 0. As T
// they take their scores' place. `scores` has room for a vector beyond `high`.
template <class T>
void softmax(float *scores, int first, int low, int high, int last, const Shape &shape) {
    std::fill(scores + first, scores + low, 0.0f);
    std::fill(scores + high, scores + last + LANES, -INFINITY);
    F top = all(-INFINITY);
    for (int j = low; j < high; j += LANES) {
        F s = load(scores + j) * shape.scale;
        if (shape.softcap > 0)
            for (int i = 0; i < LANES; i++) s[i] = std::tanh(s[i] / shape.softcap) * shape.softcap;
        if (high - j < LANES)
            for (int i = high - j; i < LANES; i++) s[i] = -INFINITY;  // a cap made it finite
        store(scores + j, s);
        top = larger(s, top);
    }
    float most = largest(top);
    F total = {};
    for (int j = low; j < high; j += LANES) {
        F e = exponential(load(scores + j) - most);
        total += e;
        store(scores + j, e);
    }
    std::fill(scores + high, scores + last + LANES, 0.0f);
    float share = 1.0f / sum(total);
    T *weights = (T *)scores;
    for (int j = first; j < last; j += LANES) store(weights + j, load(scores + j) * share);
}

template <class T, class P, class V>
void attend(T *out, const T *q, int64_t q_row, int64_t q_head, const T *keys, const T *values, const int32_t *starts,
            const int32_t *lengths, const int32_t *tables, int64_t table_row, int longest,
            const Shape &shape, const int32_t *tasks, int64_t count, int height) {
    int group = shape.heads / shape.kv_heads;
    int room = (longest / shape.page_size + 2) * shape.page_size;  // whole pages, and one for a vector beyond
#pragma omp parallel
    {
        std::vector<float> scores(size_t(QUERIES) * room);
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < count * shape.kv_heads; number++) {
            const int32_t *cut = tasks + number / shape.kv_heads * 2;
            int sequence = cut[0], row = cut[1], head = int(number % shape.kv_heads);
            int rows = std::min(starts[sequence + 1] - row, height);
            int past = lengths[sequence] - starts[sequence + 1];  // position of row t: past + t
            Task<T> task{shape, keys, values, tables + sequence * table_row, head};
            for (int from = 0; from < rows * group; from += QUERIES) {
                int n = std::min(QUERIES, rows * group - from);
                const T *mine[QUERIES];
                T *answers[QUERIES];
                float *of[QUERIES];
                const T *weights[QUERIES];
                int low[QUERIES], high[QUERIES], first = 1 << 30, last = 0;
                for (int i = 0; i < n; i++) {
                    int t = row + (from + i) / group, h = head * group + (from + i) % group;
                    mine[i] = q + t * q_row + h * q_head;
                    answers[i] = out + (int64_t(t) * shape.heads + h) * shape.value_dim;
                    of[i] = scores.data() + size_t(i) * room;
                    weights[i] = (const T *)of[i];
                    high[i] = past + t + 1;
                    low[i] = shape.window ? std::max(0, high[i] - shape.window) : 0;
                    first = std::min(first, low[i]), last = std::max(last, high[i]);
                }
                first = first / shape.page_size * shape.page_size;
                task.template all_scores<P>(n, mine, first, last, of);
                for (int i = 0; i < n; i++) softmax<T>(of[i], first, low[i], high[i], last, shape);
                switch (n) {
                    case 1: task.template answer<V, 1, 4>(weights, first, last, answers); break;
                    case 2: task.template answer<V, 2, 4>(weights, first, last, answers); break;
                    case 3: task.template answer<V, 3, 4>(weights, first, last, answers); break;
                    default: task.template answer<V, 4, 4>(weights, first, last, answers);
                }
            }
        }
    }
}

}  // namespace

#define EXPORT(T, name)                                                                                               \
    extern "C" void attend_##name(T *out, const T *q, int64_t q_row, int64_t q_head, const T *keys, const T *values,   \
                              const int32_t *starts, const int32_t *lengths, const int32_t *tables,                \
                              int64_t table_row, int longest, int heads, int kv_heads, int key_dim, \
                              int value_dim, int page_size, int window, float scale, float softcap,                \
                              int64_t cache_page, int64_t cache_head,                                              \
                              const int32_t *tasks, int64_t count, int height) {                                   \
        Shape shape{heads, kv_heads, key_dim, value_dim, page_size, window, scale, softcap, cache_page, cache_head};                         \
        PICK(T, attend)(out, q, q_row, q_head, keys, values, starts, lengths, tables, table_row, longest,   \
                    shape, tasks, count, height);                                                                       \
    }

#define PICK(T, f) f<T, Products<T>, Singly>
EXPORT(float, float32)
#ifdef HAS_DOT_BF16
#undef PICK
#define PICK(T, f) (key_dim % Pairs::COUNT ? f<T, Products<T>, InPairs> : f<T, Pairs, InPairs>)
#endif
EXPORT(bf16, bfloat16)
