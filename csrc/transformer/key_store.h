/* Keys and values of earlier tokens, where they lie.
 *
 * A store belongs to one block of the network and holds `capacity` positions, a multiple of
 * LBQ_KEYS, in the order that the products read them: keys (kv_heads, capacity / LBQ_KEYS,
 * head_dim, LBQ_KEYS), values (kv_heads, capacity, width), width = lbq_value_width(head_dim). They
 * are float32, or int8 times a scale for each position and head: max |x| / 127, after the rotary
 * embedding. */
#ifndef LBQ_KEY_STORE_H
#define LBQ_KEY_STORE_H

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
lbq_status lbq_store_write(const lbq_heads *heads, ptrdiff_t past, ptrdiff_t tokens, const float *k,
                           const float *v, const lbq_store *store);

#endif
