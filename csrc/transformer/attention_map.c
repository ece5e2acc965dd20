/* A task takes the queries of one tile and goes through the tiles of keys that they see. */
#include "transformer/attention_map.h"

#include <assert.h>
#include <math.h>

#include "core/blas.h"
#include "core/memory.h"
#include "core/threads.h"
#include "kernels/kernels.h"

#define LOG2E 1.4426950408889634

enum { TILE = LBQ_MAP_ROWS * LBQ_MAP_KEYS };

lbq_status
lbq_map_check_target(const lbq_attention_map *map, const lbq_attention_map *target)
{
    LBQ_REQUIRE(target->tokens == map->tokens && target->heads.heads == map->heads.heads,
                LBQ_BAD_SHAPE,
                "the target has %td tokens of %td heads, expected %td of %td",
                target->tokens,
                target->heads.heads,
                map->tokens,
                map->heads.heads);
    return LBQ_OK;
}

lbq_status
lbq_map_scores(const lbq_attention_map *map, const lbq_map_tile *tile, ptrdiff_t stride, float *S)
{
    const lbq_heads *const heads = &map->heads;
    const ptrdiff_t d = heads->head_dim, wide = heads->heads * d, narrow = heads->kv_heads * d;
    const ptrdiff_t kv_head = tile->head / (heads->heads / heads->kv_heads);
    const float *const q = map->q + tile->first * wide + tile->head * d;
    const float *const k = map->k + tile->begin * narrow + kv_head * d;
    const float scale = (float)(LOG2E / sqrt((double)d));
    return lbq_sgemm(CblasNoTrans,
                     CblasTrans,
                     tile->rows,
                     tile->count,
                     d,
                     scale,
                     q,
                     wide,
                     k,
                     narrow,
                     0,
                     S,
                     stride);
}

static float
log_sum_of(const lbq_attention_map *map, const lbq_map_tile *tile, ptrdiff_t row)
{
    return map->log_sum[(tile->first + row) * map->heads.heads + tile->head];
}

void
lbq_map_weights(const lbq_attention_map *map, const lbq_map_tile *tile, ptrdiff_t stride, float *S)
{
    float max[LBQ_MAP_ROWS], sum[LBQ_MAP_ROWS], factor[LBQ_MAP_ROWS];
    assert(tile->rows <= LBQ_MAP_ROWS);
    for (ptrdiff_t r = 0; r < tile->rows; r++) {
        for (ptrdiff_t s = tile->first + r + 1 - tile->begin; s < tile->count; s++)
            S[r * stride + s] = -INFINITY;
        max[r] = log_sum_of(map, tile, r);
        sum[r] = 0;
    }
    lbq_kernel.softmax_f32(tile->rows, tile->count, S, stride, max, sum, factor);
}

typedef struct {
    const lbq_attention_map *map, *target;
    float *tiles; /* of each worker, two */
    double *divergence;
} comparison;

/* log2(P of target / P of map) of a tile, into gap; T has the target's scores, gap the map's. */
static void
compare(const comparison *c, const lbq_map_tile *tile, const float *T, float *gap)
{
    for (ptrdiff_t r = 0; r < tile->rows; r++) {
        const float theirs = log_sum_of(c->target, tile, r), ours = log_sum_of(c->map, tile, r);
        for (ptrdiff_t i = r * LBQ_MAP_KEYS; i < r * LBQ_MAP_KEYS + tile->count; i++)
            gap[i] = (T[i] - theirs) - (gap[i] - ours);
    }
}

/* Adds what a tile's keys contribute to the divergence of its queries, in units of log 2. */
static lbq_status
tile_divergence(const comparison *c, const lbq_map_tile *tile, float *space, double *to)
{
    float *const P = space, *const gap = space + TILE;
    LBQ_TRY(lbq_map_scores(c->target, tile, LBQ_MAP_KEYS, P));
    LBQ_TRY(lbq_map_scores(c->map, tile, LBQ_MAP_KEYS, gap));
    compare(c, tile, P, gap);
    lbq_map_weights(c->target, tile, LBQ_MAP_KEYS, P);
    for (ptrdiff_t r = 0; r < tile->rows; r++) {
        double sum = 0;
        for (ptrdiff_t i = r * LBQ_MAP_KEYS; i < r * LBQ_MAP_KEYS + tile->count; i++)
            sum += (double)P[i] * gap[i];
        to[r] += sum;
    }
    return LBQ_OK;
}

static lbq_status
divergence_task(void *context, ptrdiff_t index, int worker)
{
    const comparison *const c = context;
    const ptrdiff_t heads = c->map->heads.heads, tokens = c->map->tokens;
    const ptrdiff_t head = index % heads, first = index / heads * LBQ_MAP_ROWS;
    const ptrdiff_t rows = lbq_smaller(LBQ_MAP_ROWS, tokens - first), end = first + rows;
    double sums[LBQ_MAP_ROWS] = {0};
    for (ptrdiff_t begin = 0; begin < end; begin += LBQ_MAP_KEYS) {
        const ptrdiff_t count = lbq_smaller(LBQ_MAP_KEYS, end - begin);
        const lbq_map_tile tile = {head, first, rows, begin, count};
        LBQ_TRY(tile_divergence(c, &tile, c->tiles + 2 * TILE * (ptrdiff_t)worker, sums));
    }
    for (ptrdiff_t r = 0; r < rows; r++)
        c->divergence[(first + r) * heads + head] = sums[r] / LOG2E;
    return LBQ_OK;
}

lbq_status
lbq_attention_divergence(const lbq_attention_map *map, const lbq_attention_map *target,
                         double *divergence)
{
    LBQ_TRY(lbq_map_check_target(map, target));
    const size_t bytes = 2 * TILE * sizeof(float) * (size_t)lbq_threads();
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, bytes));
    comparison c = {map, target, lbq_arena_take(&arena, bytes), divergence};
    const ptrdiff_t tasks = lbq_pieces(map->tokens, LBQ_MAP_ROWS) * map->heads.heads;
    const lbq_status status = lbq_parallel(tasks, divergence_task, &c);
    lbq_arena_close(&arena);
    return status;
}
