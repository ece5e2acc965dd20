/* Gradients of causal attention with grouped heads, for a window of its own.
 *
 *     P[t,s] = softmax_s(q[t] . k[s] / sqrt(d)),     dP[t,s] = g[t] . v[s],     g = dL/do
 *     dS = P (dP - D) / sqrt(d),     D[t] = g[t] . o[t]
 *     dv[s] = sum_t P[t,s] g[t],     dk[s] = sum_t dS[t,s] q[t],     dq[t] = sum_s dS[t,s] k[s]
 *
 * summed over the query heads of a key head. T. Dao, "FlashAttention-2: faster attention with
 * better parallelism and work partitioning", 2023, algorithm 2: P comes again from the logarithms
 * of the softmax's sums, block by block, and no array of tokens x tokens is kept. */
#ifndef LBQ_ATTENTION_BACKWARD_H
#define LBQ_ATTENTION_BACKWARD_H

#include <stddef.h>

#include "core/status.h"
#include "transformer/key_store.h"

/* q, o, g, dq (tokens, heads, head_dim), k, v, dk, dv (tokens, kv_heads, head_dim); log_sum as
 * lbq_attention leaves it. Gradients are written. Equal bits for any number of threads; memory
 * grows with tokens. LBQ_NO_MEMORY. */
lbq_status lbq_attention_backward(const lbq_heads *heads, ptrdiff_t tokens, const float *q,
                                  const float *k, const float *v, const float *log_sum,
                                  const float *o, const float *g, float *dq, float *dk, float *dv);

#endif
