/* Stores tokens in parallel, each with all its heads. */
#include "transformer/key_store.h"

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "core/threads.h"
#include "kernels/kernels.h"

enum { TOKENS = 64 }; /* per task */

lbq_store
lbq_store_at(const lbq_heads *heads, ptrdiff_t capacity, int bits, void *memory)
{
    const ptrdiff_t positions = heads->kv_heads * capacity, d = heads->head_dim;
    char *const keys = memory, *const values = keys + positions * d * (bits / 8);
    lbq_store store = {.capacity = capacity, .bits = bits, .keys = keys, .values = values};
    if (bits == 8) {
        store.key_scale = (float *)(values + positions * lbq_value_width(d));
        store.value_scale = store.key_scale + positions;
    }
    return store;
}

size_t
lbq_store_bytes(const lbq_heads *heads, ptrdiff_t capacity, int bits)
{
    const ptrdiff_t numbers = heads->head_dim + lbq_value_width(heads->head_dim);
    const ptrdiff_t scales = bits == 8 ? 2 * (ptrdiff_t)sizeof(float) : 0;
    return (size_t)(heads->kv_heads * capacity * (numbers * (bits / 8) + scales));
}

/* q[i * stride] = x[i] 127 / max |x|, ties to even; returns the scale, NaN if x has a NaN or an
 * infinity. Like quantize_i8, whose steps are too short for some heads. */
static float
quantize(const float *x, ptrdiff_t count, ptrdiff_t stride, int8_t *q)
{
    uint32_t top = 0; /* of bit patterns, where NaN > infinity > every number */
    for (ptrdiff_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float largest;
    memcpy(&largest, &top, sizeof largest);
    const bool usable = largest >= 0x1p-100f && largest < INFINITY;
    const float inverse = usable ? 127 / largest : 0;
    for (ptrdiff_t i = 0; i < count; i++)
        q[i * stride] = usable ? (int8_t)lrintf(x[i] * inverse) : 0;
    return usable ? largest / 127 : largest < 0x1p-100f ? 0 : NAN;
}

typedef struct {
    const lbq_heads *heads;
    ptrdiff_t past, tokens;
    float *k;
    const float *v;
    const lbq_store *store;
} storing;

/* Stores one position of one head, whose key and value begin at `key` and `value`. */
static void
store_floats(const float *k, const float *v, ptrdiff_t d, float *key, float *value)
{
    for (ptrdiff_t i = 0; i < d; i++)
        key[i * LBQ_KEYS] = k[i];
    memcpy(value, v, (size_t)d * sizeof(float));
    for (ptrdiff_t i = d; i < lbq_value_width(d); i++)
        value[i] = 0;
}

/* The same in 8 bits, where k becomes H k / n. */
static void
store_int8(float *k, const float *v, ptrdiff_t d, int8_t *key, float *key_scale, int8_t *value,
           float *value_scale)
{
    const ptrdiff_t n = lbq_key_order(d), width = lbq_value_width(d);
    for (ptrdiff_t i = 0; i < d; i++)
        k[i] /= (float)n; /* exact; before the sums, which could overflow */
    lbq_kernel.hadamard_sylvester(n, d / n, NULL, NULL, k);
    *key_scale = quantize(k, d, LBQ_KEYS, key);
    *value_scale = quantize(v, d, 1, value);
    memset(value + d, 0, (size_t)(width - d));
}

static lbq_status
store_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const storing *const s = context;
    const lbq_store *const store = s->store;
    const ptrdiff_t d = s->heads->head_dim, width = lbq_value_width(d);
    const ptrdiff_t kv_heads = s->heads->kv_heads;
    const ptrdiff_t first = index * TOKENS;
    const ptrdiff_t end = first + TOKENS < s->tokens ? first + TOKENS : s->tokens;
    for (ptrdiff_t head = 0; head < kv_heads; head++)
        for (ptrdiff_t t = first; t < end; t++) {
            const ptrdiff_t position = head * store->capacity + s->past + t;
            const ptrdiff_t lane = position % LBQ_KEYS;
            const ptrdiff_t key = (position - lane) * d + lane, value = position * width;
            float *const k = s->k + (t * kv_heads + head) * d;
            const float *const v = s->v + (t * kv_heads + head) * d;
            if (store->bits == 8)
                store_int8(k,
                           v,
                           d,
                           (int8_t *)store->keys + key,
                           store->key_scale + position,
                           (int8_t *)store->values + value,
                           store->value_scale + position);
            else
                store_floats(k, v, d, (float *)store->keys + key, (float *)store->values + value);
        }
    return LBQ_OK;
}

lbq_status
lbq_store_write(const lbq_heads *heads, ptrdiff_t past, ptrdiff_t tokens, float *k, const float *v,
                const lbq_store *store)
{
    storing s = {.heads = heads, .past = past, .tokens = tokens, .k = k, .v = v, .store = store};
    return lbq_parallel(lbq_pieces(tokens, TOKENS), store_task, &s);
}
