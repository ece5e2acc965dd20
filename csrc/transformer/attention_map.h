/* Maps of causal attention, as queries, keys and the logarithms of their softmax's sums give them:
 *
 *     P[t,h,s] = softmax_s(q[t,h] . k[s,j] / sqrt(d)),   s <= t,   j = h / group
 *
 * and how far one is from another of the same tokens, as MiniLM has it (W. Wang et al., "MiniLM:
 * deep self-attention distillation for task-agnostic compression of pre-trained transformers",
 * 2020, equation 6). No array of tokens x tokens is kept. */
#ifndef LBQ_ATTENTION_MAP_H
#define LBQ_ATTENTION_MAP_H

#include <stddef.h>

#include "core/status.h"
#include "transformer/key_store.h"

typedef struct {
    lbq_heads heads;
    ptrdiff_t tokens;
    const float *q, *k;   /* (tokens, heads, head_dim), (tokens, kv_heads, head_dim), turned */
    const float *log_sum; /* (tokens, heads), as lbq_attention leaves it */
} lbq_attention_map;

enum { LBQ_MAP_ROWS = 128, LBQ_MAP_KEYS = 512 }; /* of a tile: a few of them stay in L2 */

/* Queries [first, first + rows) of one head, rows <= LBQ_MAP_ROWS, against the keys [begin, begin +
 * count). */
typedef struct {
    ptrdiff_t head, first, rows, begin, count;
} lbq_map_tile;

/* LBQ_BAD_SHAPE unless a target has a map's tokens and heads; kv_heads and head_dim may differ. */
lbq_status lbq_map_check_target(const lbq_attention_map *map, const lbq_attention_map *target);

/* Scores of a tile, logarithms of base 2, into S (rows, count), whose rows are `stride` apart. May
 * be called in a task. */
lbq_status lbq_map_scores(const lbq_attention_map *map, const lbq_map_tile *tile, ptrdiff_t stride,
                          float *S);

/* Scores of a tile to P, in place: 0 where a query does not see a key. */
void lbq_map_weights(const lbq_attention_map *map, const lbq_map_tile *tile, ptrdiff_t stride,
                     float *S);

/* divergence (tokens, heads), in nats: KL(P of target || P of map) of each query. Equal bits for
 * any number of threads; 0 for equal maps. LBQ_BAD_SHAPE, LBQ_NO_MEMORY. */
lbq_status lbq_attention_divergence(const lbq_attention_map *map, const lbq_attention_map *target,
                                    double *divergence);

#endif
