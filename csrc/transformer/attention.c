/* Attention in one pass over the keys, with a running maximum and sum per query.
 *
 * A piece of work is one key head and a run of tokens: the queries of the head's group form the
 * rows of one matrix, so that keys and values are read once for all of them. Blocks of keys are
 * multiplied, exponentiated and multiplied by their values while in cache; earlier sums are
 * rescaled when the maximum grows. M. Milakov, N. Gimelshein, "Online normalizer calculation for
 * softmax", 2018; T. Dao et al., "FlashAttention", 2022, algorithm 1.
 *
 * Few tokens give few pieces, so their keys are split too, and the sums over each run of keys are
 * merged at the end. T. Dao et al., "Flash-Decoding for long-context inference", 2023. */
#include "transformer/attention.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>

#include "core/memory.h"
#include "core/threads.h"
#include "kernels/kernels.h"

#define LOG2E 1.4426950408889634

enum {
    ROWS = 96,              /* queries of a piece, roughly: enough to reuse a panel of keys in L1 */
    BLOCK = 4 * LBQ_KEYS,   /* keys per update of the maximum: scores stay in L2 */
    MANY = 13,              /* queries: more than two tiles of the products */
    SPLITS = 16,            /* most runs of keys: enough for the threads, few to merge */
    LEAST_FLOATS = 1 << 16, /* of keys and values in such a run: 26 us from memory */
};

/* How the work is split: by its sizes only, so results do not depend on the number of threads. */
typedef struct {
    ptrdiff_t tokens, runs; /* tokens of a piece; pieces along them */
    ptrdiff_t rows;         /* queries of a piece */
    ptrdiff_t keys, splits; /* keys of a piece; pieces along them, one if there are several runs */
    ptrdiff_t pieces;       /* kv_heads runs splits */
} cut;

/* As many tokens as fit in ROWS queries, at least one. */
static ptrdiff_t
tokens_of_piece(const lbq_heads *heads, ptrdiff_t tokens)
{
    const ptrdiff_t group = heads->heads / heads->kv_heads;
    const ptrdiff_t run = group < ROWS ? ROWS / group : 1;
    return run < tokens ? run : tokens;
}

/* At most ROWS queries in all splits together, to keep the merge small. */
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
    const ptrdiff_t least =
        lbq_pieces(lbq_pieces(LEAST_FLOATS, 2 * heads->head_dim), BLOCK) * BLOCK;
    const ptrdiff_t keys = lbq_pieces(seen, most_splits(rows) * least) * least;
    cut c = {.tokens = run, .rows = rows, .keys = keys};
    c.runs = lbq_pieces(tokens, run);
    c.splits = lbq_pieces(seen, keys);
    c.pieces = heads->kv_heads * c.runs * c.splits;
    return c;
}

/* Sums of values and of weights for the rows of a piece, both relative to the row's maximum. */
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
    float *Q, *S;   /* (rows, head_dim), (rows, BLOCK) */
    float *T;       /* (rows, head_dim), of turn_bias */
    float *panel;   /* (LBQ_KEYS, width) */
    float *factors; /* (rows) */
    sums sums;
} workspace;

static size_t
workspace_bytes(const lbq_heads *heads, ptrdiff_t rows)
{
    const ptrdiff_t panel = LBQ_KEYS * lbq_value_width(heads->head_dim);
    return lbq_padded((size_t)(rows * (2 * heads->head_dim + BLOCK + 1) + panel) * sizeof(float)) +
           sums_bytes(heads, rows);
}

static workspace
workspace_at(const lbq_heads *heads, ptrdiff_t rows, char *scratch, int worker)
{
    char *const own = scratch + (size_t)worker * workspace_bytes(heads, rows);
    float *const S = (float *)(own + sums_bytes(heads, rows));
    float *const Q = S + rows * BLOCK, *const T = Q + rows * heads->head_dim;
    float *const panel = T + rows * heads->head_dim;
    return (workspace){
        .Q = Q,
        .S = S,
        .T = T,
        .panel = panel,
        .factors = panel + LBQ_KEYS * lbq_value_width(heads->head_dim),
        .sums = sums_at(heads, rows, own),
    };
}

typedef struct {
    const lbq_heads *heads;
    ptrdiff_t past, tokens;
    cut cut;
    ptrdiff_t per_task; /* pieces */
    const float *q;
    const lbq_store *store;
    char *workspaces, *splits; /* splits: sums as [head][split], if there are several */
    float *o, *log_sum;
} attention;

static sums
sums_of_split(const attention *a, ptrdiff_t head, ptrdiff_t split)
{
    const size_t index = (size_t)(head * a->cut.splits + split);
    return sums_at(a->heads, a->cut.rows, a->splits + index * sums_bytes(a->heads, a->cut.rows));
}

/* Where row r of a piece lies in q and o: query head r % group of token first + r / group. */
static ptrdiff_t
place_of(const lbq_heads *heads, ptrdiff_t head, ptrdiff_t first, ptrdiff_t r)
{
    const ptrdiff_t group = heads->heads / heads->kv_heads;
    const ptrdiff_t t = first + r / group, h = head * group + r % group;
    return (t * heads->heads + h) * heads->head_dim;
}

/* Factor of scores, which are base-2 logarithms. */
static float
scale_of(const lbq_heads *heads)
{
    return (float)(LOG2E / sqrt((double)heads->head_dim));
}

/* Copies the rows of a piece, scaled and transformed like the keys. */
static void
gather(const attention *a, ptrdiff_t head, ptrdiff_t first, ptrdiff_t rows, float *Q)
{
    const ptrdiff_t d = a->heads->head_dim, order = lbq_key_order(d);
    const float scale = scale_of(a->heads);
    for (ptrdiff_t r = 0; r < rows; r++) {
        const float *const q = a->q + place_of(a->heads, head, first, r);
        for (ptrdiff_t i = 0; i < d; i++)
            Q[r * d + i] = q[i] * scale;
    }
    if (a->store->bits == 8)
        lbq_kernel.hadamard_sylvester(order, rows * d / order, NULL, NULL, Q);
}

/* T (rows, d): its product with column j of the turns is the scaled q . R(s + j) b, for a panel
 * that begins at position s. For a pair x, y of R(s) b and q, q' of the query, R(j) gives the term
 * (q x + q' y) cos + (q' x - q y) sin. */
static void
turn_bias(const attention *a, ptrdiff_t head, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t panel,
          float *T)
{
    const lbq_store_bias *const bias = &a->store->bias;
    const ptrdiff_t d = a->heads->head_dim, half = d / 2;
    const float *const cosine = bias->cosine + panel * half;
    const float *const sine = bias->sine + panel * half;
    const float *const b = bias->key + head * d, scale = scale_of(a->heads);
    for (ptrdiff_t r = 0; r < rows; r++) {
        const float *const q = a->q + place_of(a->heads, head, first, r);
        for (ptrdiff_t i = 0; i < half; i++) {
            const float x = scale * (b[i] * cosine[i] - b[half + i] * sine[i]);
            const float y = scale * (b[half + i] * cosine[i] + b[i] * sine[i]);
            T[r * d + i] = q[i] * x + q[half + i] * y;
            T[r * d + half + i] = q[half + i] * x - q[i] * y;
        }
    }
}

static void
scatter(const attention *a, ptrdiff_t head, ptrdiff_t first, ptrdiff_t rows, const sums *from)
{
    const ptrdiff_t d = a->heads->head_dim;
    const float *const bias = a->store->bias.value;
    for (ptrdiff_t r = 0; r < rows; r++) {
        const float factor = 1.0f / from->sum[r];
        const float *const O = from->O + r * lbq_value_width(d);
        float *const o = a->o + place_of(a->heads, head, first, r);
        for (ptrdiff_t i = 0; i < d; i++)
            o[i] = O[i] * factor;
        for (ptrdiff_t i = 0; bias && i < d; i++)
            o[i] += bias[head * d + i];
        if (a->log_sum)
            a->log_sum[place_of(a->heads, head, first, r) / d] = from->max[r] + log2f(from->sum[r]);
    }
}

/* How many of `count` keys row r sees: the first visible + r / group. */
static ptrdiff_t
seen_by(ptrdiff_t r, ptrdiff_t group, ptrdiff_t visible, ptrdiff_t count)
{
    const ptrdiff_t seen = visible + r / group;
    return seen < 0 ? 0 : seen < count ? seen : count;
}

/* Applies the scales of keys to scores, or those of values to weights: one product per key. */
static void
scale_keys(ptrdiff_t rows, ptrdiff_t group, ptrdiff_t visible, ptrdiff_t count,
           const float *restrict scale, float *restrict S)
{
    for (ptrdiff_t r = 0; r < rows; r++, S += BLOCK) {
        const ptrdiff_t seen = seen_by(r, group, visible, count);
        for (ptrdiff_t i = 0; i < seen; i++)
            S[i] *= scale[i];
    }
}

/* Later rows see more keys, so the loop ends at the first row that sees all of them: in most
 * blocks, row 0. */
static void
hide_keys(ptrdiff_t rows, ptrdiff_t group, ptrdiff_t visible, ptrdiff_t count, float *S)
{
    for (ptrdiff_t r = 0; r < rows && visible + r / group < count; r++)
        for (ptrdiff_t i = seen_by(r, group, visible, count); i < count; i++)
            S[r * BLOCK + i] = -INFINITY;
}

static void
scale_rows(ptrdiff_t rows, ptrdiff_t width, const float *restrict factors, float *restrict O)
{
    for (ptrdiff_t r = 0; r < rows; r++)
        if (factors[r] != 1.0f)
            for (ptrdiff_t i = 0; i < width; i++)
                O[r * width + i] *= factors[r];
}

/* Turns scores of `count` keys into weights, 0 where a row does not see the key; `position` is that
 * of the first key in the store, over all heads. Rows of O, once begun, are rescaled to the new
 * maximum. */
static void
weigh(const attention *a, ptrdiff_t rows, ptrdiff_t position, ptrdiff_t count, ptrdiff_t visible,
      bool begun, const workspace *w)
{
    const lbq_store *const store = a->store;
    const ptrdiff_t group = a->heads->heads / a->heads->kv_heads;
    hide_keys(rows, group, visible, count, w->S);
    lbq_kernel.softmax_f32(rows, count, w->S, BLOCK, w->sums.max, w->sums.sum, w->factors);
    if (begun)
        scale_rows(rows, lbq_value_width(a->heads->head_dim), w->factors, w->sums.O);
    if (store->bits == 8)
        scale_keys(rows, group, visible, count, store->value_scale + position, w->S);
}

/* A panel of keys or values: either floats or bytes. */
typedef struct {
    const float *floats;
    const int8_t *bytes;
} operand;

/* `count` numbers of the store's keys or values, starting at element `at`. For many rows, bytes are
 * widened once: a product of bytes would widen them for every few rows. */
static operand
panel_at(int bits, const void *numbers, ptrdiff_t at, ptrdiff_t count, ptrdiff_t rows, float *wide)
{
    if (bits == 32)
        return (operand){.floats = (const float *)numbers + at};
    const int8_t *const bytes = (const int8_t *)numbers + at;
    if (rows < MANY)
        return (operand){.bytes = bytes};
    lbq_kernel.widen_i8(bytes, count, wide);
    return (operand){.floats = wide};
}

/* product_f32 or product_i8_f32. */
static void
multiply(operand B, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *A, ptrdiff_t lda,
         ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    if (B.floats)
        lbq_kernel.product_f32(m, n, k, A, lda, B.floats, ldb, add, C, ldc);
    else
        lbq_kernel.product_i8_f32(m, n, k, A, lda, B.bytes, ldb, add, C, ldc);
}

/* Scores of `count` keys of one head, the first at position `from`, a multiple of LBQ_KEYS; up to
 * 15 more are computed to fill a vector and never read. */
static void
score(const attention *a, ptrdiff_t head, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t from,
      ptrdiff_t count, const workspace *w)
{
    const lbq_store *const store = a->store;
    const ptrdiff_t d = a->heads->head_dim, group = a->heads->heads / a->heads->kv_heads;
    const ptrdiff_t position = head * store->capacity + from, visible = a->past + first + 1 - from;
    const operand turns = {.floats = store->bias.turns};
    for (ptrdiff_t s = 0; s < count; s += LBQ_KEYS) {
        const ptrdiff_t panel = LBQ_KEYS < count - s ? LBQ_KEYS : count - s;
        const ptrdiff_t whole = (panel + 15) / 16 * 16, at = (position + s) * d;
        const operand K = panel_at(store->bits, store->keys, at, d * LBQ_KEYS, rows, w->panel);
        float *const S = w->S + s;
        multiply(K, rows, whole, d, w->Q, d, LBQ_KEYS, 0, S, BLOCK);
        if (store->bits == 8)
            scale_keys(rows, group, visible - s, panel, store->key_scale + position + s, S);
        if (store->bias.key) {
            turn_bias(a, head, first, rows, (from + s) / LBQ_KEYS, w->T);
            multiply(turns, rows, whole, d, w->T, d, LBQ_KEYS, 1, S, BLOCK);
        }
    }
}

/* Attends to the keys from..end of one head, for the rows of tokens first, first + 1, ... */
static void
attend_keys(const attention *a, ptrdiff_t head, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t from,
            ptrdiff_t end, const workspace *w)
{
    const ptrdiff_t width = lbq_value_width(a->heads->head_dim);
    const ptrdiff_t visible = a->past + first + 1;
    const lbq_store *const store = a->store;
    float *const O = w->sums.O;
    bool begun = false;
    for (ptrdiff_t r = 0; r < rows; r++) {
        w->sums.max[r] = -FLT_MAX; /* finite, for rows that see no key of a split */
        w->sums.sum[r] = 0;
    }
    for (; from < end; from += BLOCK, begun = true) {
        const ptrdiff_t count = BLOCK < end - from ? BLOCK : end - from;
        const ptrdiff_t position = head * store->capacity + from;
        score(a, head, first, rows, from, count, w);
        weigh(a, rows, position, count, visible - from, begun, w);
        for (ptrdiff_t s = 0; s < count; s += LBQ_KEYS) {
            const ptrdiff_t panel = LBQ_KEYS < count - s ? LBQ_KEYS : count - s;
            const ptrdiff_t at = (position + s) * width;
            const operand V =
                panel_at(store->bits, store->values, at, panel * width, rows, w->panel);
            multiply(V, rows, width, panel, w->S + s, BLOCK, width, begun || s > 0, O, width);
        }
    }
}

static void
attend_piece(const attention *a, ptrdiff_t index, int worker)
{
    const cut *const c = &a->cut;
    const ptrdiff_t head = index % a->heads->kv_heads, rest = index / a->heads->kv_heads;
    const ptrdiff_t split = rest % c->splits;
    /* The last tokens see the most keys: longest pieces first, to balance threads. */
    const ptrdiff_t first = (c->runs - 1 - rest / c->splits) * c->tokens;
    const ptrdiff_t tokens = c->tokens < a->tokens - first ? c->tokens : a->tokens - first;
    const ptrdiff_t rows = tokens * (a->heads->heads / a->heads->kv_heads);
    const ptrdiff_t from = split * c->keys, seen = a->past + first + tokens;
    const ptrdiff_t end = from + c->keys < seen ? from + c->keys : seen;

    workspace w = workspace_at(a->heads, c->rows, a->workspaces, worker);
    if (c->splits > 1)
        w.sums = sums_of_split(a, head, split);
    gather(a, head, first, rows, w.Q);
    attend_keys(a, head, first, rows, from, end, &w);
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

/* Sums over all keys of a head: sum_s f_s O_s and sum_s f_s sum_s with f_s = 2^(max_s - max). */
static void
merge(const attention *a, ptrdiff_t head, const sums *to)
{
    const ptrdiff_t splits = a->cut.splits, width = lbq_value_width(a->heads->head_dim);
    const ptrdiff_t stride = (ptrdiff_t)(sums_bytes(a->heads, a->cut.rows) / sizeof(float));
    const sums from = sums_of_split(a, head, 0);
    for (ptrdiff_t r = 0; r < a->cut.rows; r++) {
        float factor[SPLITS], max = -FLT_MAX, sum = 0, unused;
        for (ptrdiff_t s = 0; s < splits; s++)
            factor[s] = from.max[s * stride + r];
        lbq_kernel.softmax_f32(1, splits, factor, splits, &max, &sum, &unused);
        to->max[r] = max;
        to->sum[r] = 0;
        for (ptrdiff_t s = 0; s < splits; s++)
            to->sum[r] += factor[s] * from.sum[s * stride + r];
        const float *const O = from.O + r * width;
        lbq_kernel.product_f32(
            1, width, splits, factor, splits, O, stride, 0, to->O + r * width, width);
    }
}

/* One task for all pieces if they take less than 50 us, too little to share. Reading a float of
 * keys and values takes 0.4 ns, a byte 0.1 ns, multiplying it by 40 rows 1 ns. */
static ptrdiff_t
pieces_per_task(const lbq_heads *heads, ptrdiff_t past, ptrdiff_t tokens, int bits, const cut *c)
{
    const ptrdiff_t numbers = 2 * heads->head_dim * heads->kv_heads * (past + tokens);
    const ptrdiff_t nanoseconds = c->runs * numbers * (bits / 2 + c->rows) / 40;
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
              const lbq_store *store, void *scratch, float *o, float *log_sum)
{
    const cut c = cut_of(heads, past, tokens);
    attention a = {
        .heads = heads,
        .past = past,
        .tokens = tokens,
        .cut = c,
        .per_task = pieces_per_task(heads, past, tokens, store->bits, &c),
        .q = q,
        .store = store,
        .workspaces = scratch,
        .splits = (char *)scratch + (size_t)lbq_threads() * workspace_bytes(heads, c.rows),
        .o = o,
        .log_sum = log_sum,
    };
    LBQ_TRY(lbq_parallel(lbq_pieces(c.pieces, a.per_task), attention_task, &a));
    const workspace w = workspace_at(heads, c.rows, a.workspaces, 0);
    for (ptrdiff_t head = 0; c.splits > 1 && head < heads->kv_heads; head++) {
        merge(&a, head, &w.sums);
        scatter(&a, head, 0, c.rows, &w.sums);
    }
    return LBQ_OK;
}
