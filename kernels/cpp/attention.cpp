// Attention over pages; the formula is in kernels/attention.py.
//
// One task is a sequence, a KV head and a few of its query rows: a key, once loaded, meets the queries of all heads of
// its group in all of those rows. All scores of a task are kept (they fit the second-level cache), so the softmax is the
// plain one: the largest, then the exponentials, then their sum, then the values. A task of many queries by vectors lays
// its keys out in panels first: its scores then need no sums across lanes.
#include "attention_forms.h"
#include "attention_tiles.h"

namespace {

constexpr int PANELS_FROM = 16;  // queries of a task

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

template <class Form, class T>
void attend(T *out, const T *q, int64_t q_row, int64_t q_head, const T *keys, const T *values, const int32_t *starts,
            const int32_t *lengths, const int32_t *tables, int64_t table_row, int longest,
            const Shape &shape, const int32_t *tasks, int64_t count, int height) {
    int group = shape.heads / shape.kv_heads;
    int room = (longest / shape.page_size + 2) * shape.page_size;  // whole pages, and one for a vector beyond
    bool whole = sizeof(T) * By<T>::STEP == sizeof(float) && shape.key_dim % (LANES * By<T>::STEP) == 0;
    bool fits_panels = Form::BY_PANELS && whole;
#pragma omp parallel
    {
        std::vector<float> scores(size_t(QUERIES) * room);
        std::vector<T> panels, queries(size_t(QUERIES) * shape.key_dim);
        Form form;
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
                const T *mine[QUERIES];
                T *answers[QUERIES], *weights[QUERIES];
                float *of[QUERIES], shares[QUERIES];
                int low[QUERIES], high[QUERIES], first = 1 << 30, last = 0;
                for (int i = 0; i < n; i++) {
                    int t = row + (from + i) / group, h = head * group + (from + i) % group;
                    mine[i] = q + t * q_row + h * q_head;
                    answers[i] = out + (int64_t(t) * shape.heads + h) * shape.value_dim;
                    of[i] = scores.data() + size_t(i) * room;
                    weights[i] = (T *)of[i];
                    low[i] = begin(t), high[i] = past + t + 1;
                    first = std::min(first, low[i]), last = std::max(last, high[i]);
                }
                first = first / shape.page_size * shape.page_size;
                if (by_panels) {
                    for (int i = 0; i < n; i++)
                        std::copy(mine[i], mine[i] + shape.key_dim, queries.data() + i * shape.key_dim);
                    const T *of_first = panels.data() + size_t(first - laid) * shape.key_dim;
                    task.scores_by_panels(n, queries.data(), of_first, first, last, scores.data(), room);
                } else {
                    form.scores(task, n, mine, first, last, of);
                }
                for (int i = 0; i < n; i++) shares[i] = softmax<T>(of[i], first, low[i], high[i], last, shape);
                form.answers(task, n, weights, shares, first, last, answers);
            }
        }
    }
}

// Calls `f` with a pointer of the type of the form that serves here.
template <class Function>
void in_best_form(const float *, const Shape &, Function f) {
    f((AttentionVectors<float, Products<float>, Singly> *)nullptr);
}
template <class Function>
void in_best_form(const bf16 *, const Shape &shape, Function f) {
#ifdef HAS_TILES
    if (AttentionTiles::serves(shape)) return f((AttentionTiles *)nullptr);
#endif
#ifdef HAS_DOT_BF16
    if (shape.key_dim % Pairs::COUNT == 0) return f((AttentionVectors<bf16, Pairs, InPairs> *)nullptr);
    f((AttentionVectors<bf16, Products<bf16>, InPairs> *)nullptr);
#else
    f((AttentionVectors<bf16, Products<bf16>, Singly> *)nullptr);
#endif
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
        in_best_form(q, shape, [&](auto *form) {                                                                       \
            attend<std::remove_pointer_t<decltype(form)>>(out, q, q_row, q_head, keys, values, starts, lengths,        \
                                                          tables, table_row, longest, shape, tasks, count, height);    \
        });                                                                                                            \
    }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
