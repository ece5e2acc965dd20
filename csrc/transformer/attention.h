/* Causal attention with grouped heads over a store of keys and values.
 *
 *     o[t,h] = sum_s softmax_s(q[t,h] . k[s,j] / sqrt(d)) v[s,j],   s <= past + t,  j = h / group
 *
 * for tokens t = 0, 1, ... that follow `past` earlier ones; group = heads / kv_heads. J. Ainslie et
 * al., "GQA: training generalized multi-query transformer models", 2023.
 *
 * A store belongs to one block of the network and holds `capacity` positions, a multiple of
 * LBQ_KEYS, in the order that the products read them: keys (kv_heads, capacity / LBQ_KEYS,
 * head_dim, LBQ_KEYS), values (kv_heads, capacity, width), width = lbq_value_width(head_dim). They
 * are float32, or int8 times a scale for each position and head: max |x| / 127, after the rotary
 * embedding. */
#ifndef LBQ_ATTENTION_H
#define LBQ_ATTENTION_H

#include <stddef.h>

#include "core/status.h"

enum { LBQ_KEYS = 64, LBQ_VALUE_STEP = 16 };

/* So many positions in whole panels. */
static inline ptrdiff_t
lbq_key_capacity(ptrdiff_t positions)
{
    return (positions + LBQ_KEYS - 1) / LBQ_KEYS * LBQ_KEYS;
}

typedef struct {
    ptrdiff_t heads, kv_heads, head_dim;
} lbq_heads;

typedef struct {
    ptrdiff_t capacity;
    int bits;                       /* 32: float32; 8: int8 */
    void *keys, *values;            /* 64-byte aligned */
    float *key_scale, *value_scale; /* (kv_heads, capacity), of int8 */
} lbq_store;

/* head_dim, rounded up to whole vectors. */
static inline ptrdiff_t
lbq_value_width(ptrdiff_t head_dim)
{
    return (head_dim + LBQ_VALUE_STEP - 1) / LBQ_VALUE_STEP * LBQ_VALUE_STEP;
}

/* The store that `memory` holds, and the bytes that it takes, a multiple of 64. */
size_t lbq_store_bytes(const lbq_heads *heads, ptrdiff_t capacity, int bits);
lbq_store lbq_store_at(const lbq_heads *heads, ptrdiff_t capacity, int bits, void *memory);

/* Puts keys and values (tokens, kv_heads, head_dim) at positions past, past + 1, ... */
lbq_status lbq_attention_store(const lbq_heads *heads, ptrdiff_t past, ptrdiff_t tokens,
                               const float *k, const float *v, const lbq_store *store);

/* Bytes of scratch that lbq_attention needs, for the current number of threads. */
size_t lbq_attention_scratch(const lbq_heads *heads, ptrdiff_t tokens);

/* o (tokens, heads, head_dim) for q alike; o may be q. The store holds past + tokens positions.
 * `scratch` is 64-byte aligned. */
lbq_status lbq_attention(const lbq_heads *heads, ptrdiff_t past, ptrdiff_t tokens, const float *q,
                         const lbq_store *store, void *scratch, float *o);

#endif
