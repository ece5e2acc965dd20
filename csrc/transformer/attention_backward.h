/* Gradients of causal attention with grouped heads, for a window of its own.
 *
 *     P[t,s] = softmax_s(q[t] . k[s] / sqrt(d)),     dP[t,s] = g[t] . v[s],     g = dL/do
 *     dS = P (dP - D) / sqrt(d),     D[t] = g[t] . o[t]
 *     dv[s] = sum_t P[t,s] g[t],     dk[s] = sum_t dS[t,s] q[t],     dq[t] = sum_s dS[t,s] k[s]
 *
 * summed over the query heads of a key head. T. Dao, "FlashAttention-2: faster attention with
 * better parallelism and work partitioning", 2023, algorithm 2: P comes again from the logarithms
 * of the softmax's sums, block by block, and no array of tokens x tokens is kept.
 *
 * A target adds weight sum_(t,h) KL(P of target || P) to the loss, whose gradient by a score is
 * weight (P - P of target). */
#ifndef LBQ_ATTENTION_BACKWARD_H
#define LBQ_ATTENTION_BACKWARD_H

#include "core/status.h"
#include "transformer/attention_map.h"

typedef struct {
    lbq_attention_map map; /* of as many tokens and heads */
    float weight;
} lbq_attention_target;

/* o, g (tokens, heads, head_dim), v (tokens, kv_heads, head_dim), and gradients like q, k and v,
 * which are written. target may be NULL. Equal bits for any number of threads; memory grows with
 * tokens. LBQ_BAD_SHAPE for a target that does not fit, LBQ_NO_MEMORY. */
lbq_status lbq_attention_backward(const lbq_attention_map *map, const float *v, const float *o,
                                  const float *g, const lbq_attention_target *target, float *dq,
                                  float *dk, float *dv);

#endif
