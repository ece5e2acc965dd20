/* The forward pass: a few linear layers per block and the steps between them.
 *
 * A window passes through a block in batches, as a prompt passes through the network: attention
 * only looks back.
 *
 * All scratch of a call is one arena. A tap's buffer replaces the scratch with the same contents,
 * so tapping copies nothing. */
#include "transformer/decoder.h"

#include <string.h>

#include "core/memory.h"
#include "core/threads.h"
#include "transformer/rmsnorm.h"
#include "transformer/rope.h"
#include "transformer/swiglu.h"

/* Tokens of a batch, per thread. Activations of a small network then stay in the L2 cache: a block
 * of SmolLM2 takes 12 % less time than with 2048 tokens at once. One thread is as fast with 64; two
 * take 3 % longer with 128, as there is less to share. */
enum { BATCH = 256 };

/* Scratch of the blocks, for tokens that come in batches. */
typedef struct {
    ptrdiff_t batch;      /* tokens */
    float *norm;          /* (batch, hidden): input of qkv and of gate and up; increment of x */
    float *q, *k, *v;     /* (batch, heads or kv_heads, head_dim) */
    float *gate, *up;     /* (batch, intermediate) */
    float *cosine, *sine; /* (tokens, head_dim / 2) */
    void *attention;
    lbq_store store; /* of one block, if there is no cache */
    /* Tables of lbq_store_bias, if the cache leaves out biases of keys: */
    ptrdiff_t panels;
    float *panel_cosine, *panel_sine, *turns;
} scratch;

static ptrdiff_t
intermediate_of(const lbq_decoder *decoder)
{
    ptrdiff_t most = 0;
    for (ptrdiff_t i = 0; i < decoder->block_count; i++)
        if (decoder->blocks[i]->gate->rows > most)
            most = decoder->blocks[i]->gate->rows;
    return most;
}

/* All tokens of a window with float32 activations, since BLAS repacks the weights in every call.
 * Otherwise equal batches, whose size changes no bit unless attention splits keys. */
static ptrdiff_t
batch_of(const lbq_decoder *decoder, ptrdiff_t tokens)
{
    for (ptrdiff_t i = 0; i < decoder->block_count; i++)
        if (lbq_linear_is_float(decoder->blocks[i]->gate))
            return tokens;
    const ptrdiff_t batches = lbq_pieces(tokens, BATCH * lbq_threads());
    return lbq_pieces(tokens, batches);
}

/* The first pass (empty arena) adds up the sizes, the second one hands out the blocks, so each size
 * is written once. */
static size_t
take(lbq_arena *arena, ptrdiff_t floats, float **block)
{
    const size_t bytes = (size_t)floats * sizeof(float);
    if (arena->base)
        *block = lbq_arena_take(arena, bytes);
    return lbq_padded(bytes);
}

/* The bias that 8-bit keys leave out: NULL if a norm follows it, which makes it differ between
 * tokens, or if rope does not. */
static const float *
key_bias_of(const lbq_block *block)
{
    return block->key_norm || !block->rope ? NULL : block->key->bias;
}

/* The tables for biases of keys, if a block leaves any out. */
static size_t
take_tables(const lbq_decoder *decoder, ptrdiff_t tokens, const lbq_cache *cache, lbq_arena *arena,
            scratch *s)
{
    const ptrdiff_t half = decoder->heads.head_dim / 2;
    bool any = false;
    for (ptrdiff_t i = 0; i < decoder->block_count; i++)
        any |= key_bias_of(decoder->blocks[i]) != NULL;
    if (!any || cache->bits != 8)
        return 0;
    s->panels = lbq_pieces(cache->past + tokens, LBQ_KEYS);
    return take(arena, s->panels * half, &s->panel_cosine) +
           take(arena, s->panels * half, &s->panel_sine) +
           take(arena, 2 * half * LBQ_KEYS, &s->turns);
}

static size_t
take_scratch(const lbq_decoder *decoder, ptrdiff_t tokens, const lbq_cache *cache, lbq_arena *arena,
             scratch *s)
{
    const lbq_heads *const heads = &decoder->heads;
    const ptrdiff_t d = heads->head_dim, intermediate = intermediate_of(decoder);
    const ptrdiff_t batch = batch_of(decoder, tokens);
    s->batch = batch;
    size_t bytes = take(arena, batch * decoder->hidden, &s->norm);
    /* gate and up reuse the memory of q, k and v, which are no longer needed then. */
    lbq_arena same = *arena;
    size_t attending = take(arena, batch * heads->heads * d, &s->q);
    attending += take(arena, batch * heads->kv_heads * d, &s->k);
    attending += take(arena, batch * heads->kv_heads * d, &s->v);
    size_t feeding = take(&same, batch * intermediate, &s->gate);
    feeding += take(&same, batch * intermediate, &s->up);
    bytes += attending > feeding ? attending : feeding;
    arena->used = arena->used > same.used ? arena->used : same.used;
    bytes += take(arena, tokens * (d / 2), &s->cosine);
    bytes += take(arena, tokens * (d / 2), &s->sine);
    float *attention = NULL;
    const size_t attention_bytes = lbq_attention_scratch(heads, batch);
    bytes += take(arena, (ptrdiff_t)(attention_bytes / sizeof(float)), &attention);
    s->attention = attention;
    if (cache) {
        bytes += take_tables(decoder, tokens, cache, arena, s);
    } else {
        const ptrdiff_t capacity = lbq_key_capacity(tokens);
        const size_t store_bytes = lbq_store_bytes(heads, capacity, 32);
        float *store = NULL;
        bytes += take(arena, (ptrdiff_t)(store_bytes / sizeof(float)), &store);
        s->store = lbq_store_at(heads, capacity, 32, store);
    }
    return bytes;
}

/* The store of a block in the cache; positions from `past` are about to be overwritten. */
static lbq_store
store_of(const lbq_decoder *decoder, const lbq_cache *cache, ptrdiff_t index, const scratch *s)
{
    const lbq_heads *const heads = &decoder->heads;
    const lbq_block *const block = decoder->blocks[index];
    const size_t bytes = lbq_store_bytes(heads, cache->capacity, cache->bits);
    char *const memory = (char *)cache->memory + (size_t)index * bytes;
    lbq_store store = lbq_store_at(heads, cache->capacity, cache->bits, memory);
    if (cache->bits == 8)
        store.bias = (lbq_store_bias){
            .key = key_bias_of(block),
            .value = block->value->bias,
            .cosine = s->panel_cosine,
            .sine = s->panel_sine,
            .turns = s->turns,
        };
    return store;
}

typedef struct {
    float *x;
    const float *y;
    ptrdiff_t count;
    float scale;
} addition;

enum { CHUNK = 1 << 16 };

static lbq_status
add_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const addition *const a = context;
    const ptrdiff_t end = (index + 1) * CHUNK < a->count ? (index + 1) * CHUNK : a->count;
    float *const restrict x = a->x;
    const float *const restrict y = a->y;
    for (ptrdiff_t i = index * CHUNK; i < end; i++)
        x[i] += a->scale * y[i];
    return LBQ_OK;
}

static lbq_status
add(float *x, float scale, const float *y, ptrdiff_t count)
{
    addition a = {.x = x, .y = y, .scale = scale, .count = count};
    return lbq_parallel(lbq_pieces(count, CHUNK), add_task, &a);
}

lbq_status
lbq_block_turn(const lbq_decoder *decoder, const lbq_block *block, ptrdiff_t tokens,
               const float *cosine, const float *sine, float *q, float *k)
{
    const lbq_heads *const heads = &decoder->heads;
    const ptrdiff_t d = heads->head_dim;
    const float epsilon = decoder->epsilon;
    if (block->rope) {
        LBQ_TRY(lbq_rope(tokens, heads->heads, d / 2, cosine, sine, block->query_norm, epsilon, q));
        return lbq_rope(tokens, heads->kv_heads, d / 2, cosine, sine, block->key_norm, epsilon, k);
    }
    if (block->query_norm)
        LBQ_TRY(lbq_rmsnorm(tokens * heads->heads, d, q, block->query_norm, epsilon, q));
    if (block->key_norm)
        LBQ_TRY(lbq_rmsnorm(tokens * heads->kv_heads, d, k, block->key_norm, epsilon, k));
    return LBQ_OK;
}

/* Copies a layer's output to where a caller wants to see it. */
static void
show(const lbq_linear *layer, ptrdiff_t tokens, const float *y, float *to)
{
    if (to)
        memcpy(to, y, (size_t)(tokens * layer->rows) * sizeof(float));
}

lbq_status
lbq_block_project(const lbq_decoder *decoder, const lbq_block *block, ptrdiff_t tokens,
                  const float *x, const lbq_store_bias *bias, const lbq_projection *to)
{
    LBQ_TRY(
        lbq_rmsnorm(tokens, decoder->hidden, x, block->attention_norm, decoder->epsilon, to->n));
    lbq_linear key = *block->key, value = *block->value;
    if (bias && bias->key)
        key.bias = NULL;
    if (bias && bias->value)
        value.bias = NULL;
    const lbq_linear *const layers[] = {block->query, &key, &value};
    float *const outputs[] = {to->q, to->k, to->v};
    LBQ_TRY(lbq_linears_forward(3, layers, tokens, to->n, outputs));
    show(block->query, tokens, to->q, to->raw_q);
    show(block->key, tokens, to->k, to->raw_k);
    return lbq_block_turn(decoder, block, tokens, to->cosine, to->sine, to->q, to->k);
}

lbq_status
lbq_block_gate(const lbq_decoder *decoder, const lbq_block *block, ptrdiff_t tokens, const float *x,
               float *n, float *gate, float *up)
{
    LBQ_TRY(lbq_rmsnorm(tokens, decoder->hidden, x, block->mlp_norm, decoder->epsilon, n));
    const lbq_linear *const layers[] = {block->gate, block->up};
    float *const outputs[] = {gate, up};
    return lbq_linears_forward(2, layers, tokens, n, outputs);
}

static lbq_status
count_moments(const lbq_trace *trace, int tap, ptrdiff_t tokens, ptrdiff_t cols, const float *x)
{
    const ptrdiff_t first = trace->starts ? 1 : 0;
    if (!trace->moments || tokens == first)
        return LBQ_OK;
    return lbq_moments_add(trace->moments + tap, tokens - first, cols, x + first * cols);
}

/* Attention of x, into the tap `output`. */
static lbq_status
attend(const lbq_decoder *decoder, const lbq_block *block, ptrdiff_t past, ptrdiff_t tokens,
       const lbq_store *store, const lbq_trace *trace, const scratch *s, const float *x)
{
    const lbq_heads *const heads = &decoder->heads;
    const lbq_projection projection = {
        .cosine = s->cosine,
        .sine = s->sine,
        .n = trace->qkv,
        .q = s->q,
        .k = s->k,
        .v = s->v,
        .raw_q = trace->query,
        .raw_k = trace->key,
    };
    LBQ_TRY(lbq_block_project(decoder, block, tokens, x, &store->bias, &projection));
    LBQ_TRY(count_moments(trace, LBQ_TAP_QKV, tokens, decoder->hidden, trace->qkv));
    show(block->value, tokens, s->v, trace->value);
    LBQ_TRY(lbq_store_write(heads, past, tokens, s->k, s->v, store));
    LBQ_TRY(lbq_attention(
        heads, past, tokens, s->q, store, s->attention, trace->output, trace->log_sum));
    return count_moments(trace, LBQ_TAP_OUTPUT, tokens, block->output->cols, trace->output);
}

/* What the feed-forward half multiplies last, into the tap `down`. */
static lbq_status
feed(const lbq_decoder *decoder, const lbq_block *block, ptrdiff_t tokens, const lbq_trace *trace,
     const float *x)
{
    LBQ_TRY(lbq_block_gate(decoder, block, tokens, x, trace->mlp, trace->gate, trace->up));
    LBQ_TRY(count_moments(trace, LBQ_TAP_MLP, tokens, decoder->hidden, trace->mlp));
    LBQ_TRY(lbq_swiglu(tokens * block->gate->rows, trace->gate, trace->up, trace->down));
    return count_moments(trace, LBQ_TAP_DOWN, tokens, block->down->cols, trace->down);
}

/* x += scale * layer(tap): the end of a half. */
static lbq_status
leave(const lbq_decoder *decoder, const lbq_linear *layer, float scale, ptrdiff_t tokens,
      const float *tap, const scratch *s, float *x)
{
    LBQ_TRY(lbq_linear_forward(layer, tokens, tap, s->norm));
    return add(x, scale, s->norm, tokens * decoder->hidden);
}

static lbq_status
normalize(const lbq_decoder *decoder, ptrdiff_t tokens, const float *x, const float *gain, float *n)
{
    return lbq_rmsnorm(tokens, decoder->hidden, x, gain, decoder->epsilon, n);
}

/* Some steps of a block on a batch. All taps are there. */
static lbq_status
run_steps(const lbq_decoder *decoder, const lbq_block *block, int steps, ptrdiff_t past,
          ptrdiff_t tokens, const lbq_store *store, const lbq_trace *trace, const scratch *s,
          float *x)
{
    if (steps & LBQ_TO_QKV && !(steps & LBQ_TO_OUTPUT))
        LBQ_TRY(normalize(decoder, tokens, x, block->attention_norm, trace->qkv));
    if (steps & LBQ_TO_OUTPUT)
        LBQ_TRY(attend(decoder, block, past, tokens, store, trace, s, x));
    if (steps & LBQ_FROM_OUTPUT)
        LBQ_TRY(leave(decoder, block->output, block->attention_scale, tokens, trace->output, s, x));
    if (trace->middle)
        memcpy(trace->middle, x, (size_t)(tokens * decoder->hidden) * sizeof(float));
    if (steps & LBQ_TO_MLP && !(steps & LBQ_TO_DOWN))
        LBQ_TRY(normalize(decoder, tokens, x, block->mlp_norm, trace->mlp));
    if (steps & LBQ_TO_DOWN)
        LBQ_TRY(feed(decoder, block, tokens, trace, x));
    if (steps & LBQ_FROM_DOWN)
        LBQ_TRY(leave(decoder, block->down, block->mlp_scale, tokens, trace->down, s, x));
    return LBQ_OK;
}

/* What a caller wants to see of a batch, or the scratch with the same contents. */
static float *
later(float *part, ptrdiff_t count, float *unseen)
{
    return part ? part + count : unseen;
}

/* Runs steps of a block on x in place, in batches: no token depends on a later one. */
static lbq_status
run_block(const lbq_decoder *decoder, const lbq_block *block, int steps, ptrdiff_t past,
          ptrdiff_t tokens, const lbq_store *store, const lbq_trace *trace, const scratch *s,
          float *x)
{
    const lbq_heads *const heads = &decoder->heads;
    const ptrdiff_t hidden = decoder->hidden, d = heads->head_dim;
    for (ptrdiff_t first = 0; first < tokens; first += s->batch) {
        const ptrdiff_t count = lbq_smaller(s->batch, tokens - first);
        const lbq_trace here = {
            .qkv = later(trace->qkv, first * hidden, s->norm),
            .mlp = later(trace->mlp, first * hidden, s->norm),
            .output = later(trace->output, first * heads->heads * d, s->q),
            .down = later(trace->down, first * block->down->cols, s->gate),
            .log_sum = later(trace->log_sum, first * heads->heads, NULL),
            .middle = later(trace->middle, first * hidden, NULL),
            .query = later(trace->query, first * block->query->rows, NULL),
            .key = later(trace->key, first * block->key->rows, NULL),
            .value = later(trace->value, first * block->value->rows, NULL),
            .gate = later(trace->gate, first * block->gate->rows, s->gate),
            .up = later(trace->up, first * block->up->rows, s->up),
            .moments = trace->moments,
            .starts = past + first == 0,
        };
        scratch batch = *s;
        batch.cosine += first * (d / 2);
        batch.sine += first * (d / 2);
        float *const to = x + first * hidden;
        LBQ_TRY(run_steps(decoder, block, steps, past + first, count, store, &here, &batch, to));
    }
    return LBQ_OK;
}

lbq_status
lbq_decoder_turns(const lbq_decoder *decoder, ptrdiff_t tokens, float *cosine, float *sine)
{
    return lbq_rope_table(0,
                          1,
                          tokens,
                          decoder->heads.head_dim / 2,
                          decoder->frequency,
                          decoder->rope_factor,
                          cosine,
                          sine);
}

static lbq_status
fill_tables(const lbq_decoder *decoder, ptrdiff_t past, ptrdiff_t tokens, scratch *s)
{
    const ptrdiff_t half = decoder->heads.head_dim / 2;
    const double *const frequency = decoder->frequency, factor = decoder->rope_factor;
    LBQ_TRY(lbq_rope_table(past, 1, tokens, half, frequency, factor, s->cosine, s->sine));
    if (!s->turns)
        return LBQ_OK;
    lbq_rope_columns(LBQ_KEYS, half, frequency, s->turns);
    return lbq_rope_table(
        0, LBQ_KEYS, s->panels, half, frequency, factor, s->panel_cosine, s->panel_sine);
}

static lbq_status
check_layer(const lbq_linear *layer, const char *name, ptrdiff_t index, ptrdiff_t rows,
            ptrdiff_t cols)
{
    LBQ_REQUIRE(layer->rows == rows && layer->cols == cols,
                LBQ_BAD_SHAPE,
                "%s of block %td is (%td, %td), expected (%td, %td)",
                name,
                index,
                layer->rows,
                layer->cols,
                rows,
                cols);
    return LBQ_OK;
}

lbq_status
lbq_decoder_check(const lbq_decoder *decoder)
{
    const lbq_heads *const heads = &decoder->heads;
    const ptrdiff_t hidden = decoder->hidden;
    const ptrdiff_t q = heads->heads * heads->head_dim, kv = heads->kv_heads * heads->head_dim;
    LBQ_REQUIRE(heads->heads % heads->kv_heads == 0,
                LBQ_BAD_VALUE,
                "%td heads do not share %td key heads evenly",
                heads->heads,
                heads->kv_heads);
    for (ptrdiff_t i = 0; i < decoder->block_count; i++) {
        const lbq_block *const b = decoder->blocks[i];
        LBQ_REQUIRE((!b->hidden || b->hidden == hidden) &&
                        (!b->head_dim || b->head_dim == heads->head_dim),
                    LBQ_BAD_SHAPE,
                    "norms of block %td have %td and %td gains, expected %td and %td",
                    i,
                    b->hidden,
                    b->head_dim,
                    hidden,
                    heads->head_dim);
        LBQ_TRY(check_layer(b->query, "q_proj", i, q, hidden));
        LBQ_TRY(check_layer(b->key, "k_proj", i, kv, hidden));
        LBQ_TRY(check_layer(b->value, "v_proj", i, kv, hidden));
        LBQ_TRY(check_layer(b->output, "o_proj", i, hidden, q));
        LBQ_TRY(check_layer(b->gate, "gate_proj", i, b->up->rows, hidden));
        LBQ_TRY(check_layer(b->up, "up_proj", i, b->up->rows, hidden));
        LBQ_TRY(check_layer(b->down, "down_proj", i, hidden, b->up->rows));
    }
    const lbq_linear *const embedding = decoder->embedding;
    LBQ_REQUIRE(embedding->rows == decoder->vocab && embedding->cols == hidden,
                LBQ_BAD_SHAPE,
                "the embedding is (%td, %td), expected (%td, %td)",
                embedding->rows,
                embedding->cols,
                decoder->vocab,
                hidden);
    LBQ_REQUIRE(!embedding->bias, LBQ_BAD_VALUE, "the embedding has a bias, expected none");
    for (ptrdiff_t i = 0; i < embedding->count; i++)
        LBQ_REQUIRE(!embedding->copies[i].output,
                    LBQ_BAD_VALUE,
                    "copy %td of the embedding has an output rotation, expected none",
                    i);
    LBQ_REQUIRE(!decoder->head ||
                    (decoder->head->rows == decoder->vocab && decoder->head->cols == hidden),
                LBQ_BAD_SHAPE,
                "the head is (%td, %td), expected (%td, %td)",
                decoder->head->rows,
                decoder->head->cols,
                decoder->vocab,
                hidden);
    LBQ_REQUIRE(!decoder->rotation || decoder->rotation->n == hidden,
                LBQ_BAD_SHAPE,
                "the residual rotation has order %td, expected %td",
                decoder->rotation->n,
                hidden);
    return LBQ_OK;
}

lbq_status
lbq_decoder_embed(const lbq_decoder *decoder, ptrdiff_t tokens, const int32_t *token, float *x)
{
    for (ptrdiff_t t = 0; t < tokens; t++)
        LBQ_REQUIRE(token[t] >= 0 && token[t] < decoder->vocab,
                    LBQ_BAD_VALUE,
                    "tokens[%td] is %d, expected 0 to %td",
                    t,
                    (int)token[t],
                    decoder->vocab - 1);
    LBQ_TRY(lbq_linear_rows(decoder->embedding, tokens, token, x));
    return decoder->rotation ? lbq_rotate(decoder->rotation, tokens, x) : LBQ_OK;
}

static lbq_status
check_steps(int steps, const lbq_trace *trace)
{
    const bool no_output = steps & LBQ_FROM_OUTPUT && !(steps & LBQ_TO_OUTPUT) && !trace->output;
    const bool no_down = steps & LBQ_FROM_DOWN && !(steps & LBQ_TO_DOWN) && !trace->down;
    LBQ_REQUIRE(!no_output && !no_down,
                LBQ_BAD_VALUE,
                "steps go on from %s, which is not there",
                no_output ? "o" : "down");
    return LBQ_OK;
}

lbq_status
lbq_decoder_block(const lbq_decoder *decoder, ptrdiff_t index, int steps, ptrdiff_t tokens,
                  float *x, const lbq_trace *trace)
{
    LBQ_REQUIRE(index >= 0 && index < decoder->block_count,
                LBQ_BAD_VALUE,
                "block is %td, expected 0 to %td",
                index,
                decoder->block_count - 1);
    LBQ_REQUIRE(tokens >= 1, LBQ_BAD_SHAPE, "there are no tokens");
    LBQ_TRY(check_steps(steps, trace));
    scratch s = {0};
    lbq_arena arena = {0};
    LBQ_TRY(lbq_arena_open(&arena, take_scratch(decoder, tokens, NULL, &arena, &s)));
    take_scratch(decoder, tokens, NULL, &arena, &s);
    lbq_status status = fill_tables(decoder, 0, tokens, &s);
    if (status == LBQ_OK)
        status =
            run_block(decoder, decoder->blocks[index], steps, 0, tokens, &s.store, trace, &s, x);
    lbq_arena_close(&arena);
    return status;
}

lbq_status
lbq_decoder_finish(const lbq_decoder *decoder, ptrdiff_t rows, const float *x, float *y)
{
    const ptrdiff_t hidden = decoder->hidden;
    if (decoder->rotation) {
        if (y != x)
            memcpy(y, x, (size_t)(rows * hidden) * sizeof(float));
        LBQ_TRY(lbq_rotate_back(decoder->rotation, rows, y));
        x = y;
    }
    return lbq_rmsnorm(rows, hidden, x, decoder->final_norm, decoder->epsilon, y);
}

lbq_status
lbq_decoder_head(const lbq_decoder *decoder, ptrdiff_t rows, const float *y, float *logits)
{
    const lbq_linear *const head = decoder->head ? decoder->head : decoder->embedding;
    return lbq_linear_forward(head, rows, y, logits);
}

static lbq_status
run_blocks(const lbq_decoder *decoder, ptrdiff_t tokens, const lbq_cache *cache, scratch *s,
           float *x, lbq_moments *moments)
{
    const ptrdiff_t past = cache ? cache->past : 0;
    LBQ_TRY(fill_tables(decoder, past, tokens, s));
    for (ptrdiff_t i = 0; i < decoder->block_count; i++) {
        const lbq_store store = cache ? store_of(decoder, cache, i, s) : s->store;
        const lbq_block *const block = decoder->blocks[i];
        const lbq_trace trace = {.moments = moments ? moments + i * LBQ_TAPS : NULL};
        LBQ_TRY(run_block(decoder, block, LBQ_BLOCK, past, tokens, &store, &trace, s, x));
    }
    return LBQ_OK;
}

bool
lbq_decoder_same_cache(const lbq_decoder *a, const lbq_decoder *b)
{
    const lbq_heads *const p = &a->heads, *const q = &b->heads;
    bool same = a->block_count == b->block_count && p->heads == q->heads &&
                p->kv_heads == q->kv_heads && p->head_dim == q->head_dim &&
                a->rope_factor == b->rope_factor;
    for (ptrdiff_t i = 0; same && i < p->head_dim / 2; i++)
        same = a->frequency[i] == b->frequency[i];
    for (ptrdiff_t i = 0; same && i < a->block_count; i++)
        same = a->blocks[i]->rope == b->blocks[i]->rope &&
               key_bias_of(a->blocks[i]) == key_bias_of(b->blocks[i]) &&
               a->blocks[i]->value->bias == b->blocks[i]->value->bias;
    return same;
}

lbq_status
lbq_decoder_forward(const lbq_decoder *decoder, ptrdiff_t tokens, const int32_t *token,
                    const lbq_cache *cache, ptrdiff_t rows, float *hidden, float *logits,
                    lbq_moments *moments)
{
    LBQ_REQUIRE(tokens >= 1, LBQ_BAD_SHAPE, "there are no tokens");
    LBQ_REQUIRE(rows <= tokens, LBQ_BAD_SHAPE, "%td rows of only %td tokens", rows, tokens);
    LBQ_REQUIRE(!cache || cache->past + tokens <= cache->capacity,
                LBQ_BAD_VALUE,
                "the cache holds %td of at most %td tokens, no room for %td",
                cache->past,
                cache->capacity,
                tokens);
    scratch s = {0};
    lbq_arena arena = {0};
    float *x = NULL;
    const size_t bytes = take_scratch(decoder, tokens, cache, &arena, &s);
    LBQ_TRY(lbq_arena_open(&arena, bytes + take(&arena, tokens * decoder->hidden, &x)));
    take_scratch(decoder, tokens, cache, &arena, &s);
    take(&arena, tokens * decoder->hidden, &x);

    lbq_status status = lbq_decoder_embed(decoder, tokens, token, x);
    if (status == LBQ_OK)
        status = run_blocks(decoder, tokens, cache, &s, x, moments);
    float *const last = x + (tokens - rows) * decoder->hidden, *const y = hidden ? hidden : last;
    if (status == LBQ_OK)
        status = lbq_decoder_finish(decoder, rows, last, y);
    if (status == LBQ_OK && logits)
        status = lbq_decoder_head(decoder, rows, y, logits);
    lbq_arena_close(&arena);
    return status;
}
