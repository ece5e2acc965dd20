/* Bindings of attention in training: its maps, how far one is from another, and the way back. */
#include <float.h>
#include <string.h>

#include "core/memory.h"
#include "python/module.h"
#include "transformer/attention.h"
#include "transformer/attention_backward.h"
#include "transformer/decoder.h"

#define DECODER "lowbitq.decoder"
#define ATTENTION_MAP "lowbitq.attention_map"

static lbq_status
make_map(const lbq_array *q, const lbq_array *k, const float *log_sum, lbq_attention_map *map)
{
    const lbq_heads heads = {.heads = q->dims[1], .kv_heads = k->dims[1], .head_dim = q->dims[2]};
    LBQ_REQUIRE(heads.heads % heads.kv_heads == 0,
                LBQ_BAD_SHAPE,
                "q has %td heads, k %td",
                heads.heads,
                heads.kv_heads);
    *map = (lbq_attention_map){heads, q->dims[0], q->data, k->data, log_sum};
    return LBQ_OK;
}

LBQ_BINDING(attention_map)
{
    lbq_array q, k, log_sum;
    const lbq_arg spec[] = {
        LBQ_IN("q", &q, NPY_FLOAT32, "thd"),
        LBQ_IN("k", &k, NPY_FLOAT32, "tjd"),
        LBQ_IN("log_sum", &log_sum, NPY_FLOAT32, "th"),
    };
    LBQ_PARSE("attention_map", spec);
    lbq_attention_map *made;
    lbq_status status = lbq_allocate(sizeof *made, &made);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    status = make_map(&q, &k, log_sum.data, made);
    if (status == LBQ_OK)
        return lbq_handle_new(ATTENTION_MAP, made, args);
    lbq_free(made);
    return lbq_result(module, status);
}

static lbq_status
attention_divergence(const lbq_attention_map *map, const lbq_attention_map *target,
                     const lbq_array *divergence)
{
    LBQ_TRY(lbq_check_axis(divergence, "divergence", 0, "tokens", map->tokens));
    LBQ_TRY(lbq_check_axis(divergence, "divergence", 1, "heads", map->heads.heads));
    return lbq_attention_divergence(map, target, divergence->data);
}

LBQ_BINDING(attention_divergence)
{
    const lbq_attention_map *map, *target;
    lbq_array divergence;
    const lbq_arg spec[] = {
        LBQ_HANDLE("map", &map, ATTENTION_MAP),
        LBQ_HANDLE("target", &target, ATTENTION_MAP),
        LBQ_OUT("divergence", &divergence, NPY_FLOAT64, "th"),
    };
    LBQ_PARSE("attention_divergence", spec);
    LBQ_RUN(attention_divergence(map, target, &divergence));
}

/* Attention of q, k and v, then the way back. */
static lbq_status
attention_backward(const lbq_array *q, const lbq_array *k, const lbq_array *v, const lbq_array *g,
                   const lbq_attention_target *target, float *dq, float *dk, float *dv)
{
    lbq_attention_map map;
    LBQ_TRY(make_map(q, k, NULL, &map));
    const lbq_heads *const heads = &map.heads;
    const ptrdiff_t tokens = map.tokens, capacity = lbq_key_capacity(tokens);
    const size_t keys = sizeof(float) * (size_t)(tokens * heads->kv_heads * heads->head_dim);
    const size_t queries = sizeof(float) * (size_t)(tokens * heads->heads * heads->head_dim);
    const size_t sizes[] = {
        lbq_store_bytes(heads, capacity, 32),
        lbq_attention_scratch(heads, tokens),
        keys,
        queries,
        queries / (size_t)heads->head_dim,
    };
    size_t bytes = 0;
    for (int i = 0; i < 5; i++)
        bytes += lbq_padded(sizes[i]);
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, bytes));
    void *part[5];
    for (int i = 0; i < 5; i++)
        part[i] = lbq_arena_take(&arena, sizes[i]);
    const lbq_store store = lbq_store_at(heads, capacity, 32, part[0]);
    float *const copy = memcpy(part[2], k->data, keys);
    map.log_sum = part[4];
    lbq_status status = lbq_store_write(heads, 0, tokens, copy, v->data, &store);
    if (status == LBQ_OK)
        status = lbq_attention(heads, 0, tokens, q->data, &store, part[1], part[3], part[4]);
    if (status == LBQ_OK)
        status = lbq_attention_backward(&map, v->data, part[3], g->data, target, dq, dk, dv);
    lbq_arena_close(&arena);
    return status;
}

LBQ_BINDING(attention_backward)
{
    const lbq_attention_map *map;
    lbq_array q, k, v, g, dq, dk, dv;
    double weight;
    const lbq_arg spec[] = {
        LBQ_IN("q", &q, NPY_FLOAT32, "thd"),
        LBQ_IN("k", &k, NPY_FLOAT32, "tjd"),
        LBQ_IN("v", &v, NPY_FLOAT32, "tjd"),
        LBQ_IN("g", &g, NPY_FLOAT32, "thd"),
        LBQ_HANDLE_OR_NONE("target", &map, ATTENTION_MAP),
        LBQ_OUT("dq", &dq, NPY_FLOAT32, "thd"),
        LBQ_OUT("dk", &dk, NPY_FLOAT32, "tjd"),
        LBQ_OUT("dv", &dv, NPY_FLOAT32, "tjd"),
        LBQ_FLOAT("weight", &weight, 0, FLT_MAX),
    };
    LBQ_PARSE("attention_backward", spec);
    lbq_attention_target target = {.weight = (float)weight};
    if (map)
        target.map = *map;
    LBQ_RUN(attention_backward(&q, &k, &v, &g, map ? &target : NULL, dq.data, dk.data, dv.data));
}

static lbq_status
block_turn(const lbq_decoder *decoder, ptrdiff_t index, const lbq_array *query,
           const lbq_array *key)
{
    LBQ_REQUIRE(index < decoder->block_count,
                LBQ_BAD_VALUE,
                "block is %td, expected 0 to %td",
                index,
                decoder->block_count - 1);
    const lbq_block *const block = decoder->blocks[index];
    LBQ_TRY(lbq_check_axis(query, "query", 1, "rows", block->query->rows));
    LBQ_TRY(lbq_check_axis(key, "key", 1, "rows", block->key->rows));
    const ptrdiff_t tokens = query->dims[0];
    const size_t bytes = sizeof(float) * (size_t)(tokens * decoder->heads.head_dim / 2);
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, 2 * lbq_padded(bytes)));
    float *const cosine = lbq_arena_take(&arena, bytes), *const sine =
                                                             lbq_arena_take(&arena, bytes);
    lbq_status status = lbq_decoder_turns(decoder, tokens, cosine, sine);
    if (status == LBQ_OK)
        status = lbq_block_turn(decoder, block, tokens, cosine, sine, query->data, key->data);
    lbq_arena_close(&arena);
    return status;
}

LBQ_BINDING(block_turn)
{
    const lbq_decoder *decoder;
    lbq_array query, key;
    Py_ssize_t index;
    const lbq_arg spec[] = {
        LBQ_HANDLE("decoder", &decoder, DECODER),
        LBQ_INOUT("query", &query, NPY_FLOAT32, "tq"),
        LBQ_INOUT("key", &key, NPY_FLOAT32, "tk"),
        LBQ_INT("block", &index, 0, INT32_MAX),
    };
    LBQ_PARSE("block_turn", spec);
    LBQ_RUN(block_turn(decoder, index, &query, &key));
}

PyMethodDef lbq_methods_attention[] = {
    LBQ_METHOD(attention_map,
               "attention_map(q, k, log_sum, /)\n--\n\n"
               "Handle of causal attention's weights, as queries, keys and log_sum of "
               "decoder_block give them."),
    LBQ_METHOD(attention_divergence,
               "attention_divergence(map, target, divergence, /)\n--\n\n"
               "Set divergence (t, h) to KL(target || map) of each query, in nats."),
    LBQ_METHOD(attention_backward,
               "attention_backward(q, k, v, g, target, dq, dk, dv, /, *, weight)\n--\n\n"
               "Gradients of causal attention over a window of its own, for g = dL/do; with weight "
               "KL(target || map) in the loss, unless target is None."),
    LBQ_METHOD(block_turn, "block_turn(decoder, query, key, /, *, block)\n--\n\n"
                           "Norms of heads and rope, in place, of what decoder_block has shown."),
    LBQ_METHODS_END,
};
