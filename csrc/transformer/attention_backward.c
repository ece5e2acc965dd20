/* A task takes one key head and a run of keys, and goes through the queries that see them. It alone
 * writes dk and dv of its keys; what it knows of dq goes to a part of its own, and parts are added
 * in order. */
#include "transformer/attention_backward.h"

#include <math.h>
#include <string.h>

#include "core/blas.h"
#include "core/memory.h"
#include "core/threads.h"

enum {
    QUERIES = LBQ_MAP_ROWS, /* of a tile */
    KEYS = LBQ_MAP_KEYS,    /* of a run at least */
    MAX_PARTS = 8,          /* runs at most, which bounds the memory of the parts */
    TOKENS = 32,            /* per task of the sums over parts */
};

typedef struct {
    const lbq_attention_map *map;
    const lbq_attention_target *target;
    const lbq_heads *heads;
    ptrdiff_t tokens, keys, parts;
    const float *v, *o, *g;
    float *D;     /* (tokens, heads) */
    float *tiles; /* of each worker: P, dS, and P of the target (QUERIES, keys) */
    size_t tile_floats;
    float *dq, *dk, *dv;
    float *part[MAX_PARTS]; /* dq of the tokens from the run's first key on; the first is dq */
} backward;

static lbq_status
dot_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const backward *const b = context;
    const ptrdiff_t d = b->heads->head_dim, heads = b->heads->heads;
    const ptrdiff_t end = lbq_smaller((index + 1) * TOKENS, b->tokens) * heads;
    for (ptrdiff_t i = index * TOKENS * heads; i < end; i++) {
        float sum = 0;
        for (ptrdiff_t j = 0; j < d; j++)
            sum += b->o[i * d + j] * b->g[i * d + j];
        b->D[i] = sum;
    }
    return LBQ_OK;
}

/* dP of a tile to dS. */
static void
pull_back(const backward *b, const lbq_map_tile *t, const float *P, float *S)
{
    const float scale = (float)(1 / sqrt((double)b->heads->head_dim));
    for (ptrdiff_t r = 0; r < t->rows; r++) {
        const float D = b->D[(t->first + r) * b->heads->heads + t->head];
        for (ptrdiff_t s = 0; s < t->count; s++)
            S[r * b->keys + s] = scale * P[r * b->keys + s] * (S[r * b->keys + s] - D);
    }
}

/* Adds the gradient of the distance to the target to dS of a tile; T is room for its P. */
static lbq_status
pull_to_target(const backward *b, const lbq_map_tile *t, const float *P, float *T, float *S)
{
    const lbq_attention_map *const map = &b->target->map;
    const float scale = (float)(b->target->weight / sqrt((double)b->heads->head_dim));
    LBQ_TRY(lbq_map_scores(map, t, b->keys, T));
    lbq_map_weights(map, t, b->keys, T);
    for (ptrdiff_t r = 0; r < t->rows; r++)
        for (ptrdiff_t i = r * b->keys; i < r * b->keys + t->count; i++)
            S[i] += scale * (P[i] - T[i]);
    return LBQ_OK;
}

static lbq_status
tile_backward(const backward *b, ptrdiff_t part, const lbq_map_tile *t, float *space)
{
    const ptrdiff_t d = b->heads->head_dim, keys = b->keys, m = t->rows, n = t->count;
    const ptrdiff_t wide = b->heads->heads * d, narrow = b->heads->kv_heads * d;
    const ptrdiff_t kv_head = t->head / (b->heads->heads / b->heads->kv_heads);
    const ptrdiff_t query = t->first * wide + t->head * d, key = t->begin * narrow + kv_head * d;
    float *const P = space, *const S = P + QUERIES * keys, *const T = S + QUERIES * keys;
    const float *const q = b->map->q + query, *const g = b->g + query, *const k = b->map->k + key;
    float *const dq = b->part[part] + query - (part ? t->begin * wide : 0);
    LBQ_TRY(lbq_map_scores(b->map, t, keys, P));
    lbq_map_weights(b->map, t, keys, P);
    LBQ_TRY(
        lbq_sgemm(CblasTrans, CblasNoTrans, n, d, m, 1, P, keys, g, wide, 1, b->dv + key, narrow));
    LBQ_TRY(
        lbq_sgemm(CblasNoTrans, CblasTrans, m, n, d, 1, g, wide, b->v + key, narrow, 0, S, keys));
    pull_back(b, t, P, S);
    if (b->target)
        LBQ_TRY(pull_to_target(b, t, P, T, S));
    LBQ_TRY(
        lbq_sgemm(CblasTrans, CblasNoTrans, n, d, m, 1, S, keys, q, wide, 1, b->dk + key, narrow));
    return lbq_sgemm(CblasNoTrans, CblasNoTrans, m, d, n, 1, S, keys, k, narrow, 0, dq, wide);
}

/* The earliest keys, which most queries see, first. */
static lbq_status
run_task(void *context, ptrdiff_t index, int worker)
{
    const backward *const b = context;
    const lbq_heads *const heads = b->heads;
    const ptrdiff_t part = index / heads->kv_heads, kv_head = index % heads->kv_heads;
    const ptrdiff_t group = heads->heads / heads->kv_heads, d = heads->head_dim;
    const ptrdiff_t begin = part * b->keys, keys = lbq_smaller(b->keys, b->tokens - begin);
    float *const space = b->tiles + (size_t)worker * b->tile_floats;
    for (ptrdiff_t s = begin; s < begin + keys; s++) {
        const ptrdiff_t at = (s * heads->kv_heads + kv_head) * d;
        memset(b->dk + at, 0, (size_t)d * sizeof(float));
        memset(b->dv + at, 0, (size_t)d * sizeof(float));
    }
    for (ptrdiff_t head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (ptrdiff_t first = begin; first < b->tokens; first += QUERIES) {
            const ptrdiff_t rows = lbq_smaller(QUERIES, b->tokens - first);
            const ptrdiff_t count = lbq_smaller(keys, first + rows - begin);
            const lbq_map_tile t = {head, first, rows, begin, count};
            LBQ_TRY(tile_backward(b, part, &t, space));
        }
    return LBQ_OK;
}

/* dq of some tokens += their other parts. */
static lbq_status
add_parts(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const backward *const b = context;
    const ptrdiff_t wide = b->heads->heads * b->heads->head_dim;
    for (ptrdiff_t t = index * TOKENS; t < lbq_smaller((index + 1) * TOKENS, b->tokens); t++)
        for (ptrdiff_t p = 1; p < b->parts && p * b->keys <= t; p++) {
            const float *const from = b->part[p] + (t - p * b->keys) * wide;
            for (ptrdiff_t i = 0; i < wide; i++)
                b->dq[t * wide + i] += from[i];
        }
    return LBQ_OK;
}

/* Takes what lies in the arena; counts its bytes where that has no memory yet. */
static size_t
take(backward *b, lbq_arena *arena)
{
    const ptrdiff_t wide = b->heads->heads * b->heads->head_dim;
    b->tile_floats = (size_t)(QUERIES * b->keys * (b->target ? 3 : 2));
    size_t bytes = 0, sizes[2 + MAX_PARTS] = {(size_t)(b->tokens * b->heads->heads),
                                              b->tile_floats * (size_t)lbq_threads()};
    float **to[2 + MAX_PARTS] = {&b->D, &b->tiles};
    for (ptrdiff_t p = 1; p < b->parts; p++) {
        sizes[1 + p] = (size_t)((b->tokens - p * b->keys) * wide);
        to[1 + p] = &b->part[p];
    }
    for (ptrdiff_t i = 0; i < 1 + b->parts; i++) {
        if (arena->base)
            *to[i] = lbq_arena_take(arena, sizes[i] * sizeof(float));
        bytes += lbq_padded(sizes[i] * sizeof(float));
    }
    return bytes;
}

lbq_status
lbq_attention_backward(const lbq_attention_map *map, const float *v, const float *o, const float *g,
                       const lbq_attention_target *target, float *dq, float *dk, float *dv)
{
    const ptrdiff_t tokens = map->tokens;
    const ptrdiff_t least = lbq_pieces(lbq_pieces(tokens, MAX_PARTS), QUERIES) * QUERIES;
    if (target)
        LBQ_TRY(lbq_map_check_target(map, &target->map));
    backward b = {
        .map = map,
        .target = target,
        .heads = &map->heads,
        .tokens = tokens,
        .keys = least > KEYS ? least : KEYS,
        .v = v,
        .o = o,
        .g = g,
        .dq = dq,
        .dk = dk,
        .dv = dv,
        .part = {dq},
    };
    b.parts = lbq_pieces(tokens, b.keys);
    lbq_arena arena = {0};
    LBQ_TRY(lbq_arena_open(&arena, take(&b, &arena)));
    take(&b, &arena);
    lbq_status status = lbq_parallel(lbq_pieces(tokens, TOKENS), dot_task, &b);
    if (status == LBQ_OK)
        status = lbq_parallel(b.heads->kv_heads * b.parts, run_task, &b);
    if (status == LBQ_OK)
        status = lbq_parallel(lbq_pieces(tokens, TOKENS), add_parts, &b);
    lbq_arena_close(&arena);
    return status;
}
