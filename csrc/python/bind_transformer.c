/* Bindings of csrc/transformer. */
#include <string.h>

#include "core/memory.h"
#include "python/module.h"
#include "transformer/attention.h"
#include "transformer/cross_entropy.h"
#include "transformer/decoder.h"
#include "transformer/rmsnorm.h"
#include "transformer/rope.h"
#include "transformer/swiglu.h"

#define DECODER "lowbitq.decoder"
#define BLOCK "lowbitq.block"
#define CACHE "lowbitq.cache"
#define LINEAR "lowbitq.linear"
#define ROTATION "lowbitq.rotation"

LBQ_BINDING(rmsnorm)
{
    lbq_array x, gain, y;
    double epsilon;
    const lbq_arg spec[] = {
        LBQ_IN("x", &x, NPY_FLOAT32, "r*c"),
        LBQ_IN_OR_NONE("gain", &gain, NPY_FLOAT32, "c"),
        LBQ_OUT_OVER("y", &y, NPY_FLOAT32, "r*c", "x"),
        LBQ_FLOAT("epsilon", &epsilon, 0, 1),
    };
    LBQ_PARSE("rmsnorm", spec);
    LBQ_RUN(lbq_rmsnorm(x.dims[0], x.dims[1], x.data, gain.data, (float)epsilon, y.data));
}

LBQ_BINDING(swiglu)
{
    lbq_array gate, up, y;
    const lbq_arg spec[] = {
        LBQ_IN("gate", &gate, NPY_FLOAT32, "t*n"),
        LBQ_IN("up", &up, NPY_FLOAT32, "t*n"),
        LBQ_OUT_OVER("y", &y, NPY_FLOAT32, "t*n", "gate"),
    };
    LBQ_PARSE("swiglu", spec);
    LBQ_RUN(lbq_swiglu(gate.dims[0] * gate.dims[1], gate.data, up.data, y.data));
}

static lbq_status
rope(const lbq_array *x, const lbq_array *frequency, const lbq_array *gain, ptrdiff_t first,
     double factor, float epsilon)
{
    const ptrdiff_t tokens = x->dims[0], half = frequency->dims[0];
    LBQ_REQUIRE(x->dims[2] == 2 * half,
                LBQ_BAD_SHAPE,
                "x has heads of %td, expected twice the %td frequencies",
                x->dims[2],
                half);
    float *cosine;
    LBQ_TRY(lbq_allocate((size_t)(2 * tokens * half) * sizeof *cosine, &cosine));
    float *const sine = cosine + tokens * half;
    lbq_status status =
        lbq_rope_table(first, 1, tokens, half, frequency->data, factor, cosine, sine);
    if (status == LBQ_OK)
        status = lbq_rope(tokens, x->dims[1], half, cosine, sine, gain->data, epsilon, x->data);
    lbq_free(cosine);
    return status;
}

LBQ_BINDING(rope)
{
    lbq_array x, frequency, gain;
    Py_ssize_t first;
    double factor, epsilon;
    const lbq_arg spec[] = {
        LBQ_INOUT("x", &x, NPY_FLOAT32, "t*hd"),
        LBQ_IN("frequency", &frequency, NPY_FLOAT64, "f"),
        LBQ_IN_OR_NONE("gain", &gain, NPY_FLOAT32, "d"),
        LBQ_INT("first", &first, 0, INT32_MAX),
        LBQ_FLOAT("factor", &factor, 0, 1e6),
        LBQ_FLOAT("epsilon", &epsilon, 0, 1),
    };
    LBQ_PARSE("rope", spec);
    LBQ_RUN(rope(&x, &frequency, &gain, first, factor, (float)epsilon));
}

static lbq_status
check_cache_bits(ptrdiff_t bits)
{
    LBQ_REQUIRE(bits == 8 || bits == 32, LBQ_BAD_VALUE, "bits is %td, expected 8 or 32", bits);
    return LBQ_OK;
}

static lbq_status
attention(const lbq_array *q, const lbq_array *k, const lbq_array *v, int bits, float *o)
{
    LBQ_TRY(check_cache_bits(bits));
    const lbq_heads heads = {.heads = q->dims[1], .kv_heads = k->dims[1], .head_dim = q->dims[2]};
    const ptrdiff_t tokens = q->dims[0], positions = k->dims[0];
    LBQ_REQUIRE(tokens >= 1 && tokens <= positions && heads.kv_heads >= 1 &&
                    heads.heads % heads.kv_heads == 0,
                LBQ_BAD_SHAPE,
                "q has %td tokens of %td heads, k %td of %td",
                tokens,
                heads.heads,
                positions,
                heads.kv_heads);
    const ptrdiff_t capacity = lbq_key_capacity(positions);
    const size_t bytes = lbq_store_bytes(&heads, capacity, bits);
    const size_t scratch = lbq_attention_scratch(&heads, tokens);
    lbq_arena arena;
    const size_t key_bytes = sizeof(float) * (size_t)(positions * heads.kv_heads * heads.head_dim);
    LBQ_TRY(
        lbq_arena_open(&arena, lbq_padded(bytes) + lbq_padded(scratch) + lbq_padded(key_bytes)));
    const lbq_store store = lbq_store_at(&heads, capacity, bits, lbq_arena_take(&arena, bytes));
    float *const keys = memcpy(lbq_arena_take(&arena, key_bytes), k->data, key_bytes);
    lbq_status status = lbq_store_write(&heads, 0, positions, keys, v->data, &store);
    if (status == LBQ_OK)
        status = lbq_attention(&heads,
                               positions - tokens,
                               tokens,
                               q->data,
                               &store,
                               lbq_arena_take(&arena, scratch),
                               o,
                               NULL);
    lbq_arena_close(&arena);
    return status;
}

LBQ_BINDING(attention)
{
    lbq_array q, k, v, o;
    Py_ssize_t bits;
    const lbq_arg spec[] = {
        LBQ_IN("q", &q, NPY_FLOAT32, "thd"),
        LBQ_IN("k", &k, NPY_FLOAT32, "sjd"),
        LBQ_IN("v", &v, NPY_FLOAT32, "sjd"),
        LBQ_OUT_OVER("o", &o, NPY_FLOAT32, "thd", "q"),
        LBQ_INT("bits", &bits, 8, 32),
    };
    LBQ_PARSE("attention", spec);
    LBQ_RUN(attention(&q, &k, &v, (int)bits, o.data));
}

LBQ_BINDING(cross_entropy)
{
    lbq_array logits, target, nll;
    const lbq_arg spec[] = {
        LBQ_IN("logits", &logits, NPY_FLOAT32, "t*v"),
        LBQ_IN("target", &target, NPY_INT32, "t*"),
        LBQ_OUT("nll", &nll, NPY_FLOAT64, "t*"),
    };
    LBQ_PARSE("cross_entropy", spec);
    LBQ_RUN(lbq_cross_entropy(logits.dims[0], logits.dims[1], logits.data, target.data, nll.data));
}

LBQ_BINDING(kl_divergence)
{
    lbq_array p, q, kl, same;
    const lbq_arg spec[] = {
        LBQ_IN("p", &p, NPY_FLOAT32, "t*v"),
        LBQ_IN("q", &q, NPY_FLOAT32, "t*v"),
        LBQ_OUT("kl", &kl, NPY_FLOAT64, "t*"),
        LBQ_OUT("same", &same, NPY_UINT8, "t*"),
    };
    LBQ_PARSE("kl_divergence", spec);
    LBQ_RUN(lbq_kl_divergence(p.dims[0], p.dims[1], p.data, q.data, kl.data, same.data));
}

LBQ_BINDING(block)
{
    lbq_array attention_norm, mlp_norm, query_norm, key_norm;
    const lbq_linear *query, *key, *value, *output, *gate, *up, *down;
    double attention_scale, mlp_scale;
    int rope;
    const lbq_arg spec[] = {
        LBQ_IN_OR_NONE("attention_norm", &attention_norm, NPY_FLOAT32, "h"),
        LBQ_IN_OR_NONE("mlp_norm", &mlp_norm, NPY_FLOAT32, "h"),
        LBQ_IN_OR_NONE("query_norm", &query_norm, NPY_FLOAT32, "d"),
        LBQ_IN_OR_NONE("key_norm", &key_norm, NPY_FLOAT32, "d"),
        LBQ_HANDLE("q_proj", &query, LINEAR),
        LBQ_HANDLE("k_proj", &key, LINEAR),
        LBQ_HANDLE("v_proj", &value, LINEAR),
        LBQ_HANDLE("o_proj", &output, LINEAR),
        LBQ_HANDLE("gate_proj", &gate, LINEAR),
        LBQ_HANDLE("up_proj", &up, LINEAR),
        LBQ_HANDLE("down_proj", &down, LINEAR),
        LBQ_FLOAT("attention_scale", &attention_scale, -1e6, 1e6),
        LBQ_FLOAT("mlp_scale", &mlp_scale, -1e6, 1e6),
        LBQ_BOOL("rope", &rope),
    };
    LBQ_PARSE("block", spec);
    lbq_block *made;
    const lbq_status status = lbq_allocate(sizeof *made, &made);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    *made = (lbq_block){
        .hidden = attention_norm.data ? attention_norm.dims[0] : mlp_norm.dims[0],
        .head_dim = query_norm.data ? query_norm.dims[0] : key_norm.dims[0],
        .attention_norm = attention_norm.data,
        .mlp_norm = mlp_norm.data,
        .query_norm = query_norm.data,
        .key_norm = key_norm.data,
        .query = query,
        .key = key,
        .value = value,
        .output = output,
        .gate = gate,
        .up = up,
        .down = down,
        .attention_scale = (float)attention_scale,
        .mlp_scale = (float)mlp_scale,
        .rope = rope,
    };
    return lbq_handle_new(BLOCK, made, args);
}

LBQ_BINDING(decoder)
{
    lbq_array final_norm, frequency;
    const lbq_linear *embedding, *head;
    const lbq_rotation *rotation;
    lbq_handles blocks;
    Py_ssize_t heads, kv_heads;
    double epsilon, rope_factor;
    const lbq_arg spec[] = {
        LBQ_HANDLE("embedding", &embedding, LINEAR),
        LBQ_IN("final_norm", &final_norm, NPY_FLOAT32, "h"),
        LBQ_IN("frequency", &frequency, NPY_FLOAT64, "f"),
        LBQ_HANDLE_OR_NONE("head", &head, LINEAR),
        LBQ_HANDLE_OR_NONE("rotation", &rotation, ROTATION),
        LBQ_HANDLES("blocks", &blocks, BLOCK),
        LBQ_INT("heads", &heads, 1, 65536),
        LBQ_INT("kv_heads", &kv_heads, 1, 65536),
        LBQ_FLOAT("epsilon", &epsilon, 0, 1),
        LBQ_FLOAT("rope_factor", &rope_factor, 0, 1e6),
    };
    LBQ_PARSE("decoder", spec);
    lbq_decoder *made;
    const size_t pointers = (size_t)blocks.count * sizeof(lbq_block *);
    lbq_status status = lbq_allocate(sizeof *made + pointers, &made);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    const lbq_block **const list = (const lbq_block **)(made + 1);
    for (ptrdiff_t i = 0; i < blocks.count; i++)
        list[i] = lbq_handle_at(&blocks, i);
    *made = (lbq_decoder){
        .vocab = embedding->rows,
        .hidden = final_norm.dims[0],
        .block_count = blocks.count,
        .heads = {.heads = heads, .kv_heads = kv_heads, .head_dim = 2 * frequency.dims[0]},
        .epsilon = (float)epsilon,
        .frequency = frequency.data,
        .rope_factor = rope_factor,
        .embedding = embedding,
        .final_norm = final_norm.data,
        .head = head,
        .rotation = rotation,
        .blocks = list,
    };
    status = lbq_decoder_check(made);
    if (status != LBQ_OK) {
        lbq_free(made);
        return lbq_result(module, status);
    }
    return lbq_handle_new(DECODER, made, args);
}

LBQ_BINDING(decoder_embed)
{
    const lbq_decoder *decoder;
    lbq_array tokens, x;
    const lbq_arg spec[] = {
        LBQ_HANDLE("decoder", &decoder, DECODER),
        LBQ_IN("tokens", &tokens, NPY_INT32, "t*"),
        LBQ_OUT("x", &x, NPY_FLOAT32, "t*h"),
    };
    LBQ_PARSE("decoder_embed", spec);
    const lbq_status status = lbq_check_axis(&x, "x", 1, "hidden", decoder->hidden);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    LBQ_RUN(lbq_decoder_embed(decoder, tokens.dims[0], tokens.data, x.data));
}

enum { QKV, O, MLP, DOWN, LOG_SUM, MIDDLE, QUERY, KEY, VALUE, GATE, UP, TRACE };

static lbq_status
block_forward(const lbq_decoder *decoder, ptrdiff_t index, int steps, const lbq_array *x,
              const lbq_array *seen)
{
    LBQ_REQUIRE(index < decoder->block_count,
                LBQ_BAD_VALUE,
                "block is %td, expected 0 to %td",
                index,
                decoder->block_count - 1);
    const lbq_trace trace = {
        .qkv = seen[QKV].data,
        .output = seen[O].data,
        .mlp = seen[MLP].data,
        .down = seen[DOWN].data,
        .log_sum = seen[LOG_SUM].data,
        .middle = seen[MIDDLE].data,
        .query = seen[QUERY].data,
        .key = seen[KEY].data,
        .value = seen[VALUE].data,
        .gate = seen[GATE].data,
        .up = seen[UP].data,
    };
    const lbq_heads *const heads = &decoder->heads;
    const ptrdiff_t wide = heads->heads * heads->head_dim;
    const ptrdiff_t narrow = heads->kv_heads * heads->head_dim;
    const ptrdiff_t inner = decoder->blocks[index]->gate->rows;
    LBQ_TRY(lbq_check_axis(x, "x", 1, "hidden", decoder->hidden));
    LBQ_TRY(lbq_check_axis(&seen[O], "o", 1, "heads * head_dim", wide));
    LBQ_TRY(lbq_check_axis(&seen[DOWN], "down", 1, "feed-forward", inner));
    LBQ_TRY(lbq_check_axis(&seen[LOG_SUM], "log_sum", 1, "heads", heads->heads));
    LBQ_TRY(lbq_check_axis(&seen[QUERY], "query", 1, "heads * head_dim", wide));
    LBQ_TRY(lbq_check_axis(&seen[KEY], "key", 1, "kv_heads * head_dim", narrow));
    LBQ_TRY(lbq_check_axis(&seen[VALUE], "value", 1, "kv_heads * head_dim", narrow));
    LBQ_TRY(lbq_check_axis(&seen[GATE], "gate", 1, "feed-forward", inner));
    LBQ_TRY(lbq_check_axis(&seen[UP], "up", 1, "feed-forward", inner));
    return lbq_decoder_block(decoder, index, steps, x->dims[0], x->data, &trace);
}

LBQ_BINDING(decoder_block)
{
    const lbq_decoder *decoder;
    lbq_array x, seen[TRACE];
    Py_ssize_t index, steps;
    const lbq_arg spec[] = {
        LBQ_HANDLE("decoder", &decoder, DECODER),
        LBQ_INOUT("x", &x, NPY_FLOAT32, "t*h"),
        LBQ_OUT_OR_NONE("qkv", &seen[QKV], NPY_FLOAT32, "t*h"),
        LBQ_OUT_OR_NONE("o", &seen[O], NPY_FLOAT32, "t*a"),
        LBQ_OUT_OR_NONE("mlp", &seen[MLP], NPY_FLOAT32, "t*h"),
        LBQ_OUT_OR_NONE("down", &seen[DOWN], NPY_FLOAT32, "t*i"),
        LBQ_OUT_OR_NONE("log_sum", &seen[LOG_SUM], NPY_FLOAT32, "t*n"),
        LBQ_OUT_OR_NONE("middle", &seen[MIDDLE], NPY_FLOAT32, "t*h"),
        LBQ_OUT_OR_NONE("query", &seen[QUERY], NPY_FLOAT32, "t*a"),
        LBQ_OUT_OR_NONE("key", &seen[KEY], NPY_FLOAT32, "t*k"),
        LBQ_OUT_OR_NONE("value", &seen[VALUE], NPY_FLOAT32, "t*k"),
        LBQ_OUT_OR_NONE("gate", &seen[GATE], NPY_FLOAT32, "t*i"),
        LBQ_OUT_OR_NONE("up", &seen[UP], NPY_FLOAT32, "t*i"),
        LBQ_INT("block", &index, 0, INT32_MAX),
        LBQ_INT("steps", &steps, 0, 63),
    };
    LBQ_PARSE("decoder_block", spec);
    LBQ_RUN(block_forward(decoder, index, (int)steps, &x, seen));
}

LBQ_BINDING(decoder_finish)
{
    const lbq_decoder *decoder;
    lbq_array x, y;
    const lbq_arg spec[] = {
        LBQ_HANDLE("decoder", &decoder, DECODER),
        LBQ_IN("x", &x, NPY_FLOAT32, "t*h"),
        LBQ_OUT_OVER("y", &y, NPY_FLOAT32, "t*h", "x"),
    };
    LBQ_PARSE("decoder_finish", spec);
    const lbq_status status = lbq_check_axis(&x, "x", 1, "hidden", decoder->hidden);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    LBQ_RUN(lbq_decoder_finish(decoder, x.dims[0], x.data, y.data));
}

static lbq_status
head(const lbq_decoder *decoder, const lbq_array *y, const lbq_array *logits)
{
    LBQ_TRY(lbq_check_axis(y, "y", 1, "hidden", decoder->hidden));
    LBQ_TRY(lbq_check_axis(logits, "logits", 1, "vocab", decoder->vocab));
    return lbq_decoder_head(decoder, y->dims[0], y->data, logits->data);
}

LBQ_BINDING(decoder_head)
{
    const lbq_decoder *decoder;
    lbq_array y, logits;
    const lbq_arg spec[] = {
        LBQ_HANDLE("decoder", &decoder, DECODER),
        LBQ_IN("y", &y, NPY_FLOAT32, "t*h"),
        LBQ_OUT("logits", &logits, NPY_FLOAT32, "t*v"),
    };
    LBQ_PARSE("decoder_head", spec);
    LBQ_RUN(head(decoder, &y, &logits));
}

/* A cache and the only decoder that may use it; the stores' memory follows. */
typedef struct {
    const lbq_decoder *decoder;
    lbq_cache cache;
    size_t bytes; /* of the stores */
} owned_cache;

static lbq_status
make_cache(const lbq_decoder *decoder, ptrdiff_t capacity, int bits, owned_cache **made)
{
    LBQ_TRY(check_cache_bits(bits));
    const ptrdiff_t whole = lbq_key_capacity(capacity);
    const size_t head = lbq_padded(sizeof **made), panels = (size_t)(whole / LBQ_KEYS);
    const size_t panel = lbq_store_bytes(&decoder->heads, LBQ_KEYS, bits);
    const size_t panel_of_all = (size_t)decoder->block_count * panel;
    LBQ_REQUIRE(panel_of_all <= PTRDIFF_MAX / 2 / panels,
                LBQ_NO_MEMORY,
                "a cache of %td tokens is too large",
                capacity);
    LBQ_TRY(lbq_allocate(head + panels * panel_of_all, made));
    **made = (owned_cache){
        .decoder = decoder,
        .cache = {.capacity = whole, .bits = bits, .memory = (char *)*made + head},
        .bytes = panels * panel_of_all,
    };
    return LBQ_OK;
}

LBQ_BINDING(cache)
{
    const lbq_decoder *decoder;
    Py_ssize_t capacity, bits;
    const lbq_arg spec[] = {
        LBQ_HANDLE("decoder", &decoder, DECODER),
        LBQ_INT("capacity", &capacity, 1, INT32_MAX),
        LBQ_INT("bits", &bits, 8, 32),
    };
    LBQ_PARSE("cache", spec);
    owned_cache *made;
    const lbq_status status = make_cache(decoder, capacity, (int)bits, &made);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    const Py_ssize_t bytes = (Py_ssize_t)made->bytes;
    PyObject *const handle = lbq_handle_new(CACHE, made, args);
    return handle ? Py_BuildValue("(Nn)", handle, bytes) : NULL;
}

static lbq_status
forward(const lbq_decoder *decoder, const lbq_array *tokens, const owned_cache *owned,
        const lbq_array *hidden, const lbq_array *logits, const lbq_array *moments, ptrdiff_t past)
{
    LBQ_REQUIRE(!owned || lbq_decoder_same_cache(owned->decoder, decoder),
                LBQ_BAD_VALUE,
                "the cache was made for another decoder");
    lbq_cache cache = {0};
    if (owned)
        cache = owned->cache;
    cache.past = past;
    LBQ_TRY(lbq_check_axis(hidden, "hidden", 1, "hidden", decoder->hidden));
    LBQ_TRY(lbq_check_axis(logits, "logits", 1, "vocab", decoder->vocab));
    LBQ_TRY(lbq_check_axis(moments, "moments", 0, "blocks", decoder->block_count));
    return lbq_decoder_forward(decoder,
                               tokens->dims[0],
                               tokens->data,
                               owned ? &cache : NULL,
                               hidden->data ? hidden->dims[0] : logits->dims[0],
                               hidden->data,
                               logits->data,
                               moments->data);
}

LBQ_BINDING(decoder_forward)
{
    const lbq_decoder *decoder;
    const owned_cache *cache;
    lbq_array tokens, hidden, logits, moments;
    Py_ssize_t past;
    const lbq_arg spec[] = {
        LBQ_HANDLE("decoder", &decoder, DECODER),
        LBQ_IN("tokens", &tokens, NPY_INT32, "t*"),
        LBQ_HANDLE_OR_NONE("cache", &cache, CACHE),
        LBQ_OUT_OR_NONE("hidden", &hidden, NPY_FLOAT32, "r*h"),
        LBQ_OUT_OR_NONE("logits", &logits, NPY_FLOAT32, "r*v"),
        LBQ_OUT_OR_NONE("moments", &moments, NPY_FLOAT64, "b45"),
        LBQ_INT("past", &past, 0, INT32_MAX),
    };
    LBQ_PARSE("decoder_forward", spec);
    LBQ_RUN(forward(decoder, &tokens, cache, &hidden, &logits, &moments, past));
}

PyMethodDef lbq_methods_transformer[] = {
    LBQ_METHOD(rmsnorm, "rmsnorm(x, gain, y, /, *, epsilon)\n--\n\n"
                        "y (r, c) = gain (c, or None: ones) x / sqrt(mean of x^2 + epsilon), row "
                        "by row."),
    LBQ_METHOD(swiglu, "swiglu(gate, up, y, /)\n--\n\n"
                       "y (t, n) = gate / (1 + exp(-gate)) * up."),
    LBQ_METHOD(rope, "rope(x, frequency, gain, /, *, first, factor, epsilon)\n--\n\n"
                     "Rotary embedding of x (t, heads, d) in place: positions from first, "
                     "frequency (d / 2)\n"
                     "float64; heads are normalised with gain (d) before, unless it is None."),
    LBQ_METHOD(attention, "attention(q, k, v, o, /, *, bits)\n--\n\n"
                          "Causal attention o of q (t, heads, d) over k, v (s, kv heads, "
                          "d), stored with 8 or 32\n"
                          "bits: the t tokens are the last of the s."),
    LBQ_METHOD(cross_entropy,
               "cross_entropy(logits, target, nll, /)\n--\n\n"
               "nll (t) float64, in nats, of target (t) int32 under logits (t, vocab)."),
    LBQ_METHOD(kl_divergence, "kl_divergence(p, q, kl, same, /)\n--\n\n"
                              "kl (t) float64, in nats, of softmax p to softmax q "
                              "(t, vocab); same (t) uint8: 1 where\n"
                              "both have their maximum at the same index."),
    LBQ_METHOD(block, "block(attention_norm, mlp_norm, query_norm, key_norm, q_proj, k_proj, "
                      "v_proj, o_proj, "
                      "gate_proj, up_proj, down_proj, /, *, attention_scale, "
                      "mlp_scale, rope)\n--\n\n"
                      "A handle of one block: gains (or None), layers, scales of what each "
                      "half adds, whether queries and keys are turned by their position."),
    LBQ_METHOD(decoder, "decoder(embedding, final_norm, frequency, head, "
                        "rotation, blocks, /, *, heads, kv_heads, "
                        "epsilon, rope_factor)\n--\n\n"
                        "A handle of a network; head None: the embedding. "
                        "It keeps alive what it is made from."),
    LBQ_METHOD(decoder_embed, "decoder_embed(decoder, tokens, x, /)\n--\n\n"
                              "x (t, hidden): the residual stream that enters block 0."),
    LBQ_METHOD(decoder_block,
               "decoder_block(decoder, x, qkv, o, mlp, down, log_sum, middle, query, key, value, "
               "gate, up, /, *, block, steps)\n--\n\n"
               "Steps of one block on x (t, hidden) in place; the others (or None) get inputs and "
               "outputs of its layers.\nBits of steps: 1 to qkv, 2 to o, 4 from o, 8 to mlp, 16 to "
               "down, 32 from down."),
    LBQ_METHOD(decoder_finish, "decoder_finish(decoder, x, y, /)\n--\n\n"
                               "y (t, hidden): x after the last norm, the "
                               "input of the head."),
    LBQ_METHOD(decoder_head, "decoder_head(decoder, y, logits, /)\n--\n\n"
                             "logits (t, vocab) of y (t, hidden)."),
    LBQ_METHOD(decoder_forward, "decoder_forward(decoder, tokens, cache, "
                                "hidden, logits, moments, /, *, past)\n--\n\n"
                                "The whole network on tokens (t) that follow "
                                "past ones in the cache, or None; hidden\n"
                                "(r, hidden) and logits (r, vocab) of the last "
                                "r tokens, or None. Of the inputs of layers\n"
                                "qkv, o, mlp, down, moments (blocks, 4, 5) has "
                                "a threshold, and gets added: count,\n"
                                "count above it, sum, maximum of magnitudes."),
    LBQ_METHOD(cache, "cache(decoder, /, *, capacity, bits)\n--"
                      "\n\n"
                      "A handle of keys and values of at least "
                      "capacity tokens, uninitialised, stored\n"
                      "with 8 or 32 bits; and their bytes."),
    LBQ_METHODS_END,
};
