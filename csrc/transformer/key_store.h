/* Keys and values of earlier tokens: their layout, and how they are rounded to 8 bits.
 *
 * A store belongs to one block of the network and holds `capacity` positions, a multiple of
 * LBQ_KEYS, in the order that the products read them: keys (kv_heads, capacity / LBQ_KEYS,
 * head_dim, LBQ_KEYS), values (kv_heads, capacity, width), width = lbq_value_width(head_dim). They
 * are float32, or int8 times a scale for each position and head: max |x| / 127.
 *
 * A single outlier channel would take the range from all others. So 8 bits round H k / n instead of
 * k (after the rotary embedding): H is Sylvester's Hadamard matrix of the largest order n that
 * divides head_dim, applied block by block. Attention multiplies queries by H, since q . k = (H q)
 * . (H k / n). S. Ashkboos et al., "QuaRot: outlier-free 4-bit inference in rotated LLMs", 2024.
 *
 * That does not help against a bias b of the key projection: in Qwen2 it exceeds 100, while the
 * rest of a key is about 3. But every key at position s contains the same R(s) b, with R the rotary
 * embedding. So the store leaves it out, and attention adds q . R(s) b to the scores. A bias of the
 * values is left out too; weights sum to 1, so attention adds it to the output. Both are exact. KL
 * divergence from the float32 cache in nats per token, of Qwen2.5-Coder-0.5B on the first 192
 * tokens of WikiText-2's test text, by what is rounded:
 *
 *     k                    0.0197
 *     H k / n              0.0178
 *     k - R(s) b           0.00025
 *     H (k - R(s) b) / n   0.00014 */
#ifndef LBQ_KEY_STORE_H
#define LBQ_KEY_STORE_H

#include <stddef.h>

#include "core/status.h"

enum { LBQ_KEYS = 64, LBQ_VALUE_STEP = 16 };

/* `positions` rounded up to whole panels. */
static inline ptrdiff_t
lbq_key_capacity(ptrdiff_t positions)
{
    return (positions + LBQ_KEYS - 1) / LBQ_KEYS * LBQ_KEYS;
}

typedef struct {
    ptrdiff_t heads, kv_heads, head_dim;
} lbq_heads;

/* Biases that a store leaves out, and tables of the rotary embedding to add back those of the keys:
 * the angles of position p LBQ_KEYS + j are the sums of those in row p of cosine and sine and those
 * in column j of turns. */
typedef struct {
    const float *key, *value;   /* (kv_heads, head_dim), or NULL: nothing */
    const float *cosine, *sine; /* (panels, head_dim / 2), times the factor of the embedding */
    const float *turns;         /* (head_dim, LBQ_KEYS): cosines, then sines */
} lbq_store_bias;

typedef struct {
    ptrdiff_t capacity;
    int bits;                       /* 32: float32; 8: int8 */
    void *keys, *values;            /* 64-byte aligned */
    float *key_scale, *value_scale; /* (kv_heads, capacity), of int8 */
    lbq_store_bias bias;            /* left out of int8 */
} lbq_store;

/* head_dim, rounded up to whole vectors. */
static inline ptrdiff_t
lbq_value_width(ptrdiff_t head_dim)
{
    return (head_dim + LBQ_VALUE_STEP - 1) / LBQ_VALUE_STEP * LBQ_VALUE_STEP;
}

/* Order of the Hadamard matrix that 8-bit keys, and their queries, are multiplied by. */
static inline ptrdiff_t
lbq_key_order(ptrdiff_t head_dim)
{
    return head_dim & -head_dim;
}

/* The store in `memory`, without biases, and its size in bytes, a multiple of 64. */
size_t lbq_store_bytes(const lbq_heads *heads, ptrdiff_t capacity, int bits);
lbq_store lbq_store_at(const lbq_heads *heads, ptrdiff_t capacity, int bits, void *memory);

/* Stores keys and values (tokens, kv_heads, head_dim), without the store's biases, at positions
 * past, past + 1, ... With 8 bits, k is undefined afterwards. */
lbq_status lbq_store_write(const lbq_heads *heads, ptrdiff_t past, ptrdiff_t tokens, float *k,
                           const float *v, const lbq_store *store);

#endif
