/* Attention in one pass over the keys, with a running maximum and sum per query.
 *
 * A task takes one key head and a run of tokens: the queries of its group of heads are rows of one
 * matrix, so that keys and values are read once for all of them. Blocks of keys are multiplied,
 * exponentiated and multiplied with their values while they are in cache; what was summed before
 * is scaled when the maximum grows. M. Milakov, N. Gimelshein, "Online normalizer calculation for
 * softmax", 2018; T. Dao et al., "FlashAttention", 2022, algorithm 1. */
#include "transformer/attention.h"

#include <math.h>
#include <string.h>

#include "core/memory.h"
#include "core/threads.h"
#include "kernels/kernels.h"

enum {
    ROWS = 96,            /* queries of a task, about: enough to use a panel of keys in L1 often */
    BLOCK = 4 * LBQ_KEYS, /* keys between two updates of the maximum: scores stay in L2 */
    STORE_TOKENS = 64,
};

typedef struct {
    const lbq_heads *heads;
    ptrdiff_t past, tokens;
    const float *k, *v;
    const lbq_store *store;
} storing;

static lbq_status
store_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const storing *const s = context;
    const ptrdiff_t d = s->heads->head_dim, width = lbq_value_width(d);
    const ptrdiff_t kv_heads = s->heads->kv_heads, head = index % kv_heads;
    const ptrdiff_t first = index / kv_heads * STORE_TOKENS;
    const ptrdiff_t end = first + STORE_TOKENS < s->tokens ? first + STORE_TOKENS : s->tokens;
    float *const keys = s->store->keys + head * s->store->capacity * d;
    float *const values = s->store->values + head * s->store->capacity * width;
    for (ptrdiff_t t = first; t < end; t++) {
        const ptrdiff_t position = s->past + t, row = (t * kv_heads + head) * d;
        float *const panel = keys + position / LBQ_KEYS * LBQ_KEYS * d + position % LBQ_KEYS;
        for (ptrdiff_t i = 0; i < d; i++)
            panel[i * LBQ_KEYS] = s->k[row + i];
        memcpy(values + position * width, s->v + row, (size_t)d * sizeof(float));
        for (ptrdiff_t i = d; i < width; i++)
            values[position * width + i] = 0;
    }
    return LBQ_OK;
}

lbq_status
lbq_attention_store(const lbq_heads *heads, ptrdiff_t past, ptrdiff_t tokens, const float *k,
                    const float *v, const lbq_store *store)
{
    storing s = {.heads = heads, .past = past, .tokens = tokens, .k = k, .v = v, .store = store};
    const ptrdiff_t runs = (tokens + STORE_TOKENS - 1) / STORE_TOKENS;
    return lbq_parallel(runs * heads->kv_heads, store_task, &s);
}

/* Tokens of a task: as many as give ROWS queries, at least one. */
static ptrdiff_t
tokens_per_task(const lbq_heads *heads, ptrdiff_t tokens)
{
    const ptrdiff_t group = heads->heads / heads->kv_heads;
    const ptrdiff_t run = group < ROWS ? ROWS / group : 1;
    return run < tokens ? run : tokens;
}

/* Scratch of one worker. */
typedef struct {
    float *Q, *S, *O; /* (rows, head_dim), (rows, BLOCK), (rows, width) */
    float *max, *sum; /* (rows) */
} workspace;

static size_t
workspace_bytes(const lbq_heads *heads, ptrdiff_t rows)
{
    const ptrdiff_t floats = heads->head_dim + BLOCK + lbq_value_width(heads->head_dim) + 2;
    return lbq_padded((size_t)(rows * floats) * sizeof(float));
}

static workspace
workspace_at(const lbq_heads *heads, ptrdiff_t rows, char *scratch, int worker)
{
    float *const S = (float *)(scratch + (size_t)worker * workspace_bytes(heads, rows));
    float *const O = S + rows * BLOCK;
    float *const Q = O + rows * lbq_value_width(heads->head_dim);
    float *const max = Q + rows * heads->head_dim;
    return (workspace){.Q = Q, .S = S, .O = O, .max = max, .sum = max + rows};
}

typedef struct {
    const lbq_heads *heads;
    ptrdiff_t past, tokens, run;
    const float *q;
    const lbq_store *store;
    char *scratch;
    float *o;
} attention;

/* Row r of Q is query head r % group of token r / group, times 1 / sqrt(d). */
static void
gather(const attention *a, ptrdiff_t head, ptrdiff_t first, ptrdiff_t rows, float *Q)
{
    const ptrdiff_t d = a->heads->head_dim, group = a->heads->heads / a->heads->kv_heads;
    const float scale = (float)(1.0 / sqrt((double)d));
    for (ptrdiff_t r = 0; r < rows; r++) {
        const ptrdiff_t t = first + r / group, h = head * group + r % group;
        const float *const q = a->q + (t * a->heads->heads + h) * d;
        for (ptrdiff_t i = 0; i < d; i++)
            Q[r * d + i] = q[i] * scale;
    }
}

static void
scatter(const attention *a, ptrdiff_t head, ptrdiff_t first, ptrdiff_t rows, const workspace *w)
{
    const ptrdiff_t d = a->heads->head_dim, group = a->heads->heads / a->heads->kv_heads;
    for (ptrdiff_t r = 0; r < rows; r++) {
        const ptrdiff_t t = first + r / group, h = head * group + r % group;
        const float factor = 1.0f / w->sum[r];
        const float *const from = w->O + r * lbq_value_width(d);
        float *const o = a->o + (t * a->heads->heads + h) * d;
        for (ptrdiff_t i = 0; i < d; i++)
            o[i] = from[i] * factor;
    }
}

/* Scores of the keys from..from + count become weights; row r sees the first visible + r / group
 * of them. Rows of O are scaled to the new maximum. */
static void
weigh(const attention *a, ptrdiff_t rows, ptrdiff_t count, ptrdiff_t visible, const workspace *w)
{
    const ptrdiff_t width = lbq_value_width(a->heads->head_dim);
    const ptrdiff_t group = a->heads->heads / a->heads->kv_heads;
    for (ptrdiff_t r = 0; r < rows; r++) {
        float *const s = w->S + r * BLOCK;
        const ptrdiff_t seen = visible + r / group < count ? visible + r / group : count;
        if (seen > 0) {
            const float factor = lbq_kernel.softmax_f32(s, seen, &w->max[r], &w->sum[r]);
            if (factor != 1.0f)
                for (ptrdiff_t i = 0; i < width; i++)
                    w->O[r * width + i] *= factor;
        }
        for (ptrdiff_t i = seen > 0 ? seen : 0; i < count; i++)
            s[i] = 0;
    }
}

static lbq_status
attention_task(void *context, ptrdiff_t index, int worker)
{
    const attention *const a = context;
    const lbq_heads *const heads = a->heads;
    const ptrdiff_t d = heads->head_dim, width = lbq_value_width(d);
    const ptrdiff_t group = heads->heads / heads->kv_heads;
    /* The last tokens see the most keys: longest tasks first, so that none is left at the end. */
    const ptrdiff_t runs = (a->tokens + a->run - 1) / a->run;
    const ptrdiff_t head = index % heads->kv_heads;
    const ptrdiff_t first = (runs - 1 - index / heads->kv_heads) * a->run;
    const ptrdiff_t tokens = a->run < a->tokens - first ? a->run : a->tokens - first;
    const ptrdiff_t rows = tokens * group, keys_seen = a->past + first + tokens;

    const workspace w = workspace_at(heads, a->run * group, a->scratch, worker);
    gather(a, head, first, rows, w.Q);
    memset(w.O, 0, (size_t)(rows * width) * sizeof(float));
    for (ptrdiff_t r = 0; r < rows; r++) {
        w.max[r] = -INFINITY;
        w.sum[r] = 0;
    }
    const float *const keys = a->store->keys + head * a->store->capacity * d;
    const float *const values = a->store->values + head * a->store->capacity * width;
    for (ptrdiff_t from = 0; from < keys_seen; from += BLOCK) {
        const ptrdiff_t count = BLOCK < keys_seen - from ? BLOCK : keys_seen - from;
        for (ptrdiff_t s = 0; s < count; s += LBQ_KEYS) {
            /* Whole vectors: up to 15 scores beyond `count` are computed and not read. */
            const ptrdiff_t panel = LBQ_KEYS < count - s ? LBQ_KEYS : count - s;
            const ptrdiff_t whole = (panel + 15) / 16 * 16;
            const float *const K = keys + (from + s) * d;
            lbq_kernel.product_f32(rows, whole, d, w.Q, d, K, LBQ_KEYS, 0, w.S + s, BLOCK);
        }
        weigh(a, rows, count, a->past + first + 1 - from, &w);
        for (ptrdiff_t s = 0; s < count; s += LBQ_KEYS) {
            const ptrdiff_t panel = LBQ_KEYS < count - s ? LBQ_KEYS : count - s;
            const float *const V = values + (from + s) * width;
            lbq_kernel.product_f32(rows, width, panel, w.S + s, BLOCK, V, width, 1, w.O, width);
        }
    }
    scatter(a, head, first, rows, &w);
    return LBQ_OK;
}

size_t
lbq_attention_scratch(const lbq_heads *heads, ptrdiff_t tokens)
{
    const ptrdiff_t group = heads->heads / heads->kv_heads;
    return (size_t)lbq_threads() * workspace_bytes(heads, tokens_per_task(heads, tokens) * group);
}

lbq_status
lbq_attention(const lbq_heads *heads, ptrdiff_t past, ptrdiff_t tokens, const float *q,
              const lbq_store *store, void *scratch, float *o)
{
    attention a = {
        .heads = heads,
        .past = past,
        .tokens = tokens,
        .run = tokens_per_task(heads, tokens),
        .q = q,
        .store = store,
        .scratch = scratch,
        .o = o,
    };
    const ptrdiff_t runs = (tokens + a.run - 1) / a.run;
    return lbq_parallel(runs * heads->kv_heads, attention_task, &a);
}
