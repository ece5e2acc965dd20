/* Causal attention with grouped heads over a store of keys and values.
 *
 *     o[t,h] = sum_s softmax_s(q[t,h] . k[s,j] / sqrt(d)) v[s,j],   s <= past + t,  j = h / group
 *
 * for tokens t = 0, 1, ... that follow `past` earlier ones; group = heads / kv_heads. J. Ainslie et
 * al., "GQA: training generalized multi-query transformer models", 2023. Keys and values include
 * the biases that the store leaves out. */
#ifndef LBQ_ATTENTION_H
#define LBQ_ATTENTION_H

#include <stddef.h>

#include "core/status.h"
#include "transformer/key_store.h"

/* Bytes of scratch that lbq_attention needs, for the current number of threads. */
size_t lbq_attention_scratch(const lbq_heads *heads, ptrdiff_t tokens);

/* o (tokens, heads, head_dim) for q of the same shape; o may be q. The store holds past + tokens
 * positions. `scratch` is 64-byte aligned. log_sum (tokens, heads), unless NULL, receives the
 * logarithm of base 2 of the softmax's sum, from which a backward pass recovers the weights. */
lbq_status lbq_attention(const lbq_heads *heads, ptrdiff_t past, ptrdiff_t tokens, const float *q,
                         const lbq_store *store, void *scratch, float *o, float *log_sum);

#endif
