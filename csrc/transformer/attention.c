/* Attention in one pass over the keys, with a running maximum and sum per query.
 *
 * A piece of the work is one key head and a run of tokens: the queries of its group of heads are
 * rows of one matrix, so that keys and values are read once for all of them. Blocks of keys are
 * multiplied, exponentiated and multiplied with their values while they are in cache; what was
 * summed before is scaled when the maximum grows. M. Milakov, N. Gimelshein, "Online normalizer
 * calculation for softmax", 2018; T. Dao et al., "FlashAttention", 2022, algorithm 1.
 *
 * Few tokens make few pieces, so their keys are cut too, and the sums over each run of keys are
 * merged at the end. T. Dao et al., "Flash-Decoding for long-context inference", 2023. */
#include "transformer/attention.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "core/memory.h"
#include "core/threads.h"
#include "kernels/kernels.h"

enum {
    ROWS = 96,            /* queries of a piece, about: enough to use a panel of keys in L1 often */
    BLOCK = 4 * LBQ_KEYS, /* keys between two updates of the maximum: scores stay in L2 */
    SPLITS = 16,          /* runs of keys at most: enough for the threads, few to merge */
    LEAST_FLOATS = 1 << 16, /* of keys and values in such a run: 26 us from memory */
    STORE_TOKENS = 64,      /* per task */
};

/* count / step, rounded up. */
static ptrdiff_t
parts(ptrdiff_t count, ptrdiff_t step)
{
    return (count + step - 1) / step;
}

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
    const ptrdiff_t kv_heads = s->heads->kv_heads, capacity = s->store->capacity;
    const ptrdiff_t first = index * STORE_TOKENS;
    const ptrdiff_t end = first + STORE_TOKENS < s->tokens ? first + STORE_TOKENS : s->tokens;
    for (ptrdiff_t head = 0; head < kv_heads; head++)
        for (ptrdiff_t t = first; t < end; t++) {
            const ptrdiff_t position = s->past + t, row = (t * kv_heads + head) * d;
            const ptrdiff_t panel = position / LBQ_KEYS * LBQ_KEYS;
            float *const key = s->store->keys + (head * capacity + panel) * d + position % LBQ_KEYS;
            for (ptrdiff_t i = 0; i < d; i++)
                key[i * LBQ_KEYS] = s->k[row + i];
            float *const value = s->store->values + (head * capacity + position) * width;
            memcpy(value, s->v + row, (size_t)d * sizeof(float));
            for (ptrdiff_t i = d; i < width; i++)
                value[i] = 0;
        }
    return LBQ_OK;
}

lbq_status
lbq_attention_store(const lbq_heads *heads, ptrdiff_t past, ptrdiff_t tokens, const float *k,
                    const float *v, const lbq_store *store)
{
    storing s = {.heads = heads, .past = past, .tokens = tokens, .k = k, .v = v, .store = store};
    return lbq_parallel(parts(tokens, STORE_TOKENS), store_task, &s);
}

/* How the work is cut: a function of the sizes alone, so that the result does not depend on the
 * number of threads. */
typedef struct {
    ptrdiff_t tokens, runs; /* tokens of a piece; pieces along them */
    ptrdiff_t rows;         /* queries of a piece */
    ptrdiff_t keys, splits; /* keys of a piece; pieces along them, one if there are several runs */
    ptrdiff_t pieces;       /* kv_heads runs splits */
} cut;

/* As many tokens as give ROWS queries, at least one. */
static ptrdiff_t
tokens_of_piece(const lbq_heads *heads, ptrdiff_t tokens)
{
    const ptrdiff_t group = heads->heads / heads->kv_heads;
    const ptrdiff_t run = group < ROWS ? ROWS / group : 1;
    return run < tokens ? run : tokens;
}

/* No more than ROWS queries in all splits together, which keeps what is merged small. */
static ptrdiff_t
most_splits(ptrdiff_t rows)
{
    const ptrdiff_t most = rows < ROWS ? ROWS / rows : 1;
    return most < SPLITS ? most : SPLITS;
}

static cut
cut_of(const lbq_heads *heads, ptrdiff_t past, ptrdiff_t tokens)
{
    const ptrdiff_t run = tokens_of_piece(heads, tokens);
    const ptrdiff_t rows = run * (heads->heads / heads->kv_heads);
    const ptrdiff_t seen = past + tokens;
    const ptrdiff_t least = parts(parts(LEAST_FLOATS, 2 * heads->head_dim), BLOCK) * BLOCK;
    const ptrdiff_t keys = parts(seen, most_splits(rows) * least) * least;
    cut c = {.tokens = run, .rows = rows, .keys = keys};
    c.runs = parts(tokens, run);
    c.splits = parts(seen, keys);
    c.pieces = heads->kv_heads * c.runs * c.splits;
    return c;
}

/* Of the rows of a piece: sums of values and of weights, both relative to the maximum. */
typedef struct {
    float *O;         /* (rows, width) */
    float *max, *sum; /* (rows) */
} sums;

static size_t
sums_bytes(const lbq_heads *heads, ptrdiff_t rows)
{
    return lbq_padded((size_t)(rows * (lbq_value_width(heads->head_dim) + 2)) * sizeof(float));
}

static sums
sums_at(const lbq_heads *heads, ptrdiff_t rows, char *scratch)
{
    float *const O = (float *)scratch, *const max = O + rows * lbq_value_width(heads->head_dim);
    return (sums){.O = O, .max = max, .sum = max + rows};
}

/* Scratch of one worker. */
typedef struct {
    float *Q, *S; /* (rows, head_dim), (rows, BLOCK) */
    sums sums;
} workspace;

static size_t
workspace_bytes(const lbq_heads *heads, ptrdiff_t rows)
{
    return lbq_padded((size_t)(rows * (heads->head_dim + BLOCK)) * sizeof(float)) +
           sums_bytes(heads, rows);
}

static workspace
workspace_at(const lbq_heads *heads, ptrdiff_t rows, char *scratch, int worker)
{
    char *const own = scratch + (size_t)worker * workspace_bytes(heads, rows);
    float *const S = (float *)(own + sums_bytes(heads, rows));
    return (workspace){.Q = S + rows * BLOCK, .S = S, .sums = sums_at(heads, rows, own)};
}

typedef struct {
    const lbq_heads *heads;
    ptrdiff_t past, tokens;
    cut cut;
    ptrdiff_t per_task; /* pieces */
    const float *q;
    const lbq_store *store;
    char *workspaces, *splits; /* splits: sums as [head][split], if there are several */
    float *o;
} attention;

static sums
sums_of_split(const attention *a, ptrdiff_t head, ptrdiff_t split)
{
    const size_t index = (size_t)(head * a->cut.splits + split);
    return sums_at(a->heads, a->cut.rows, a->splits + index * sums_bytes(a->heads, a->cut.rows));
}

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
scatter(const attention *a, ptrdiff_t head, ptrdiff_t first, ptrdiff_t rows, const sums *from)
{
    const ptrdiff_t d = a->heads->head_dim, group = a->heads->heads / a->heads->kv_heads;
    for (ptrdiff_t r = 0; r < rows; r++) {
        const ptrdiff_t t = first + r / group, h = head * group + r % group;
        const float factor = 1.0f / from->sum[r];
        const float *const O = from->O + r * lbq_value_width(d);
        float *const o = a->o + (t * a->heads->heads + h) * d;
        for (ptrdiff_t i = 0; i < d; i++)
            o[i] = O[i] * factor;
    }
}

/* Scores of the keys from..from + count become weights; row r sees the first visible + r / group
 * of them. Rows of O, once begun, are scaled to the new maximum. */
static void
weigh(const attention *a, ptrdiff_t rows, ptrdiff_t count, ptrdiff_t visible, bool begun,
      const workspace *w)
{
    const ptrdiff_t width = lbq_value_width(a->heads->head_dim);
    const ptrdiff_t group = a->heads->heads / a->heads->kv_heads;
    for (ptrdiff_t r = 0; r < rows; r++) {
        float *const s = w->S + r * BLOCK;
        const ptrdiff_t seen = visible + r / group < count ? visible + r / group : count;
        if (seen > 0) {
            const sums *const to = &w->sums;
            const float factor = lbq_kernel.softmax_f32(s, seen, &to->max[r], &to->sum[r]);
            if (begun && factor != 1.0f)
                for (ptrdiff_t i = 0; i < width; i++)
                    to->O[r * width + i] *= factor;
        }
        for (ptrdiff_t i = seen > 0 ? seen : 0; i < count; i++)
            s[i] = 0;
    }
}

/* The keys from..end of one head, for rows of which row r sees the first visible + r / group. */
static void
attend_keys(const attention *a, ptrdiff_t head, ptrdiff_t rows, ptrdiff_t from, ptrdiff_t end,
            ptrdiff_t visible, const workspace *w)
{
    const ptrdiff_t d = a->heads->head_dim, width = lbq_value_width(d);
    const float *const keys = a->store->keys + head * a->store->capacity * d;
    const float *const values = a->store->values + head * a->store->capacity * width;
    float *const O = w->sums.O;
    bool begun = false;
    for (ptrdiff_t r = 0; r < rows; r++) {
        w->sums.max[r] = -INFINITY;
        w->sums.sum[r] = 0;
    }
    for (; from < end; from += BLOCK, begun = true) {
        const ptrdiff_t count = BLOCK < end - from ? BLOCK : end - from;
        for (ptrdiff_t s = 0; s < count; s += LBQ_KEYS) {
            /* Whole vectors: up to 15 scores beyond `count` are computed and not read. */
            const ptrdiff_t panel = LBQ_KEYS < count - s ? LBQ_KEYS : count - s;
            const ptrdiff_t whole = (panel + 15) / 16 * 16;
            const float *const K = keys + (from + s) * d;
            lbq_kernel.product_f32(rows, whole, d, w->Q, d, K, LBQ_KEYS, 0, w->S + s, BLOCK);
        }
        weigh(a, rows, count, visible - from, begun, w);
        for (ptrdiff_t s = 0; s < count; s += LBQ_KEYS) {
            const ptrdiff_t panel = LBQ_KEYS < count - s ? LBQ_KEYS : count - s;
            const float *const V = values + (from + s) * width;
            lbq_kernel.product_f32(
                rows, width, panel, w->S + s, BLOCK, V, width, begun || s > 0, O, width);
        }
    }
}

static void
attend_piece(const attention *a, ptrdiff_t index, int worker)
{
    const cut *const c = &a->cut;
    const ptrdiff_t head = index % a->heads->kv_heads, rest = index / a->heads->kv_heads;
    const ptrdiff_t split = rest % c->splits;
    /* The last tokens see the most keys: longest pieces first, so that none is left at the end. */
    const ptrdiff_t first = (c->runs - 1 - rest / c->splits) * c->tokens;
    const ptrdiff_t tokens = c->tokens < a->tokens - first ? c->tokens : a->tokens - first;
    const ptrdiff_t rows = tokens * (a->heads->heads / a->heads->kv_heads);
    const ptrdiff_t from = split * c->keys, seen = a->past + first + tokens;
    const ptrdiff_t end = from + c->keys < seen ? from + c->keys : seen;

    workspace w = workspace_at(a->heads, c->rows, a->workspaces, worker);
    if (c->splits > 1)
        w.sums = sums_of_split(a, head, split);
    gather(a, head, first, rows, w.Q);
    attend_keys(a, head, rows, from, end, a->past + first + 1, &w);
    if (c->splits == 1)
        scatter(a, head, first, rows, &w.sums);
}

static lbq_status
attention_task(void *context, ptrdiff_t index, int worker)
{
    const attention *const a = context;
    const ptrdiff_t first = index * a->per_task, pieces = a->cut.pieces;
    const ptrdiff_t end = first + a->per_task < pieces ? first + a->per_task : pieces;
    for (ptrdiff_t piece = first; piece < end; piece++)
        attend_piece(a, piece, worker);
    return LBQ_OK;
}

/* Sums over all keys of a head: sum_s f_s O_s and sum_s f_s sum_s with f_s = exp(max_s - max). */
static void
merge(const attention *a, ptrdiff_t head, const sums *to)
{
    const ptrdiff_t splits = a->cut.splits, width = lbq_value_width(a->heads->head_dim);
    const ptrdiff_t stride = (ptrdiff_t)(sums_bytes(a->heads, a->cut.rows) / sizeof(float));
    const sums from = sums_of_split(a, head, 0);
    for (ptrdiff_t r = 0; r < a->cut.rows; r++) {
        float factor[SPLITS], max = -INFINITY, unused = 0;
        for (ptrdiff_t s = 0; s < splits; s++)
            factor[s] = from.max[s * stride + r];
        lbq_kernel.softmax_f32(factor, splits, &max, &unused);
        to->sum[r] = 0;
        for (ptrdiff_t s = 0; s < splits; s++)
            to->sum[r] += factor[s] * from.sum[s * stride + r];
        const float *const O = from.O + r * width;
        lbq_kernel.product_f32(
            1, width, splits, factor, splits, O, stride, 0, to->O + r * width, width);
    }
}

/* All pieces in one task if they take less than 50 us: too little to share. A float of keys and
 * values comes from memory in 0.4 ns and is multiplied with 40 rows in 1 ns. */
static ptrdiff_t
pieces_per_task(const lbq_heads *heads, ptrdiff_t past, ptrdiff_t tokens, const cut *c)
{
    const ptrdiff_t floats = 2 * heads->head_dim * heads->kv_heads * (past + tokens);
    const ptrdiff_t nanoseconds = c->runs * floats * (16 + c->rows) / 40;
    return nanoseconds < 50000 ? c->pieces : 1;
}

size_t
lbq_attention_scratch(const lbq_heads *heads, ptrdiff_t tokens)
{
    const ptrdiff_t group = heads->heads / heads->kv_heads;
    const ptrdiff_t rows = tokens_of_piece(heads, tokens) * group;
    return (size_t)lbq_threads() * workspace_bytes(heads, rows) +
           (size_t)(heads->kv_heads * most_splits(rows)) * sums_bytes(heads, rows);
}

lbq_status
lbq_attention(const lbq_heads *heads, ptrdiff_t past, ptrdiff_t tokens, const float *q,
              const lbq_store *store, void *scratch, float *o)
{
    const cut c = cut_of(heads, past, tokens);
    attention a = {
        .heads = heads,
        .past = past,
        .tokens = tokens,
        .cut = c,
        .per_task = pieces_per_task(heads, past, tokens, &c),
        .q = q,
        .store = store,
        .workspaces = scratch,
        .splits = (char *)scratch + (size_t)lbq_threads() * workspace_bytes(heads, c.rows),
        .o = o,
    };
    LBQ_TRY(lbq_parallel(parts(c.pieces, a.per_task), attention_task, &a));
    const workspace w = workspace_at(heads, c.rows, a.workspaces, 0);
    for (ptrdiff_t head = 0; c.splits > 1 && head < heads->kv_heads; head++) {
        merge(&a, head, &w.sums);
        scatter(&a, head, 0, c.rows, &w.sums);
    }
    return LBQ_OK;
}
