/* The halves of a block, backwards. All scratch of a call is one arena. */
#include "transformer/decoder_backward.h"

#include <string.h>

#include "core/memory.h"
#include "core/threads.h"
#include "transformer/rmsnorm.h"
#include "transformer/rope.h"
#include "transformer/swiglu.h"

/* One window on its way back through one block. */
typedef struct {
    const lbq_decoder *decoder;
    const lbq_block *block;
    ptrdiff_t tokens;
    const float *x;                   /* the block's input */
    float *output, *log_sum, *middle; /* of the forward pass */
    const lbq_trace *known;           /* what is left of it */
    const lbq_block_gradient *gradient;
    const lbq_block_outputs *outputs;
    const lbq_attention_target *target;
    float *dx;
    /* Scratch: */
    float *n, *dn, *scaled;         /* (tokens, hidden) */
    float *cosine, *sine;           /* (tokens, head_dim / 2) */
    float *q, *dq, *raw_q, *dout;   /* (tokens, heads head_dim); raw: before norm and turn */
    float *k, *v, *dk, *dv, *raw_k; /* (tokens, kv_heads head_dim) */
    float *gate, *up, *y, *dy;      /* (tokens, intermediate) */
} pass;

static const lbq_linear *
layer_of(const lbq_block *block, int slot)
{
    const lbq_linear *const layers[] = {
        block->query, block->key, block->value, block->output, block->gate, block->up, block->down};
    return layers[slot];
}

/* Whether the caller has kept all of q, k and v, or of gate and up. */
static bool
has_projection(const lbq_trace *known)
{
    return known->query && known->key && known->value;
}

static bool
has_gate(const lbq_trace *known)
{
    return known->gate && known->up;
}

/* Takes a pass's scratch from the arena, or counts its bytes where that has no memory yet. */
static size_t
take(pass *p, lbq_arena *arena)
{
    const lbq_trace *const known = p->known;
    const lbq_heads *const heads = &p->decoder->heads;
    const ptrdiff_t hidden = p->decoder->hidden, inner = p->block->gate->rows;
    const ptrdiff_t wide = heads->heads * heads->head_dim;
    const ptrdiff_t narrow = heads->kv_heads * heads->head_dim;
    const struct {
        float **to;
        ptrdiff_t size;
    } parts[] = {
        {&p->n, hidden},
        {&p->dn, hidden},
        {&p->scaled, hidden},
        {&p->cosine, heads->head_dim / 2},
        {&p->sine, heads->head_dim / 2},
        {&p->q, wide},
        {&p->dq, wide},
        {&p->raw_q, p->block->query_norm && !has_projection(known) ? wide : 0},
        {&p->dout, wide},
        {&p->k, narrow},
        {&p->v, has_projection(known) ? 0 : narrow},
        {&p->dk, narrow},
        {&p->dv, narrow},
        {&p->raw_k, p->block->key_norm && !has_projection(known) ? narrow : 0},
        {&p->gate, has_gate(known) ? 0 : inner},
        {&p->up, has_gate(known) ? 0 : inner},
        {&p->y, inner},
        {&p->dy, inner},
        {&p->output, known->output ? 0 : wide},
        {&p->log_sum, known->log_sum ? 0 : heads->heads},
        {&p->middle, known->middle ? 0 : hidden},
    };
    size_t total = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        const size_t bytes = lbq_padded(sizeof(float) * (size_t)(p->tokens * parts[i].size));
        if (arena->base && bytes)
            *parts[i].to = lbq_arena_take(arena, bytes);
        total += bytes;
    }
    return total;
}

static float *
either(float *known, float *scratch)
{
    return known ? known : scratch;
}

/* What the forward pass had in between: kept by the caller, or computed again. */
static lbq_status
recompute(pass *p, ptrdiff_t index)
{
    const size_t bytes = sizeof(float) * (size_t)(p->tokens * p->decoder->hidden);
    const lbq_trace *const known = p->known;
    const lbq_trace missing = {
        .output = known->output ? NULL : p->output,
        .log_sum = known->log_sum ? NULL : p->log_sum,
        .middle = known->middle ? NULL : p->middle,
    };
    if (missing.output || missing.log_sum || missing.middle)
        LBQ_TRY(lbq_decoder_block(
            p->decoder, index, LBQ_BLOCK, p->tokens, memcpy(p->scaled, p->x, bytes), &missing));
    p->output = either(known->output, p->output);
    p->log_sum = either(known->log_sum, p->log_sum);
    p->middle = either(known->middle, p->middle);
    return LBQ_OK;
}

/* The input of q, k and v, and these. */
static lbq_status
project(pass *p)
{
    const lbq_decoder *const decoder = p->decoder;
    const lbq_trace *const known = p->known;
    LBQ_TRY(lbq_decoder_turns(decoder, p->tokens, p->cosine, p->sine));
    if (!has_projection(known)) {
        const lbq_projection to = {p->cosine, p->sine, p->n, p->q, p->k, p->v, p->raw_q, p->raw_k};
        return lbq_block_project(decoder, p->block, p->tokens, p->x, NULL, &to);
    }
    p->raw_q = known->query;
    p->raw_k = known->key;
    p->v = known->value;
    memcpy(p->q, p->raw_q, sizeof(float) * (size_t)(p->tokens * p->block->query->rows));
    memcpy(p->k, p->raw_k, sizeof(float) * (size_t)(p->tokens * p->block->key->rows));
    LBQ_TRY(lbq_block_turn(decoder, p->block, p->tokens, p->cosine, p->sine, p->q, p->k));
    const float *const gain = p->block->attention_norm;
    return lbq_rmsnorm(p->tokens, decoder->hidden, p->x, gain, decoder->epsilon, p->n);
}

/* The input of gate and up, and these. */
static lbq_status
gate(pass *p)
{
    const lbq_decoder *const decoder = p->decoder;
    const lbq_trace *const known = p->known;
    if (!has_gate(known))
        return lbq_block_gate(decoder, p->block, p->tokens, p->middle, p->n, p->gate, p->up);
    p->gate = known->gate;
    p->up = known->up;
    const float *const gain = p->block->mlp_norm;
    return lbq_rmsnorm(p->tokens, decoder->hidden, p->middle, gain, decoder->epsilon, p->n);
}

/* Through one layer of the block, for its input x, its output y (or NULL) and g = dL/dy. */
static lbq_status
layer_backward(const pass *p, int slot, const float *x, const float *y, const float *g, bool add,
               float *dx)
{
    const lbq_linear *const layer = layer_of(p->block, slot);
    float *const seen = p->outputs->layers[slot];
    if (seen)
        memcpy(seen, g, sizeof(float) * (size_t)(p->tokens * layer->rows));
    return lbq_linear_backward(layer, p->tokens, x, y, g, &p->gradient->layers[slot], add, dx);
}

/* What a half adds to the residual stream has this gradient. */
static const float *
scaled(const pass *p, float scale)
{
    if (scale == 1)
        return p->dx;
    for (ptrdiff_t i = 0; i < p->tokens * p->decoder->hidden; i++)
        p->scaled[i] = scale * p->dx[i];
    return p->scaled;
}

static lbq_status
feed_forward_backward(pass *p)
{
    const lbq_decoder *const decoder = p->decoder;
    const ptrdiff_t tokens = p->tokens, count = tokens * p->block->gate->rows;
    LBQ_TRY(gate(p));
    LBQ_TRY(lbq_swiglu(count, p->gate, p->up, p->y));
    const float *const dm = scaled(p, p->block->mlp_scale);
    LBQ_TRY(layer_backward(p, LBQ_DOWN, p->y, NULL, dm, false, p->dy));
    /* dy and y are used up: the gradients of gate and up lie there. */
    LBQ_TRY(lbq_swiglu_backward(count, p->gate, p->up, p->dy, p->dy, p->y));
    LBQ_TRY(layer_backward(p, LBQ_GATE, p->n, p->gate, p->dy, false, p->dn));
    LBQ_TRY(layer_backward(p, LBQ_UP, p->n, p->up, p->y, true, p->dn));
    return lbq_rmsnorm_backward(tokens,
                                decoder->hidden,
                                p->middle,
                                p->block->mlp_norm,
                                decoder->epsilon,
                                p->dn,
                                p->gradient->mlp_norm,
                                p->dx);
}

/* dL/dx of a head's turn and norm; g is overwritten, the result lies in it or in `to`. */
static lbq_status
turn_backward(const pass *p, ptrdiff_t heads, const float *raw, const float *gain, float *dgain,
              float **g, float *to)
{
    const ptrdiff_t d = p->decoder->heads.head_dim, tokens = p->tokens;
    if (p->block->rope)
        LBQ_TRY(lbq_rope_backward(tokens, heads, d / 2, p->cosine, p->sine, *g));
    if (!gain)
        return LBQ_OK;
    memset(to, 0, sizeof(float) * (size_t)(tokens * heads * d));
    LBQ_TRY(lbq_rmsnorm_backward(tokens * heads, d, raw, gain, p->decoder->epsilon, *g, dgain, to));
    *g = to;
    return LBQ_OK;
}

static lbq_status
attention_half_backward(pass *p)
{
    const lbq_decoder *const decoder = p->decoder;
    const lbq_block *const block = p->block;
    const lbq_heads *const heads = &decoder->heads;
    const ptrdiff_t tokens = p->tokens;
    LBQ_TRY(project(p));
    const float *const da = scaled(p, block->attention_scale);
    LBQ_TRY(layer_backward(p, LBQ_OUTPUT, p->output, NULL, da, false, p->dout));
    const lbq_attention_map map = {*heads, tokens, p->q, p->k, p->log_sum};
    LBQ_TRY(lbq_attention_backward(&map, p->v, p->output, p->dout, p->target, p->dq, p->dk, p->dv));
    float *dq = p->dq, *dk = p->dk; /* q and k are used up: their gradients may lie there */
    LBQ_TRY(turn_backward(
        p, heads->heads, p->raw_q, block->query_norm, p->gradient->query_norm, &dq, p->q));
    LBQ_TRY(turn_backward(
        p, heads->kv_heads, p->raw_k, block->key_norm, p->gradient->key_norm, &dk, p->k));
    LBQ_TRY(layer_backward(p, LBQ_QUERY, p->n, p->raw_q, dq, false, p->dn));
    LBQ_TRY(layer_backward(p, LBQ_KEY, p->n, p->raw_k, dk, true, p->dn));
    LBQ_TRY(layer_backward(p, LBQ_VALUE, p->n, p->v, p->dv, true, p->dn));
    return lbq_rmsnorm_backward(tokens,
                                decoder->hidden,
                                p->x,
                                block->attention_norm,
                                decoder->epsilon,
                                p->dn,
                                p->gradient->attention_norm,
                                p->dx);
}

static lbq_status
check_gradient(const lbq_decoder *decoder, const lbq_block_gradient *gradient)
{
    LBQ_REQUIRE((!gradient->hidden || gradient->hidden == decoder->hidden) &&
                    (!gradient->head_dim || gradient->head_dim == decoder->heads.head_dim),
                LBQ_BAD_SHAPE,
                "gradients of norms have %td and %td numbers, expected %td and %td",
                gradient->hidden,
                gradient->head_dim,
                decoder->hidden,
                decoder->heads.head_dim);
    return LBQ_OK;
}

lbq_status
lbq_block_backward(const lbq_decoder *decoder, ptrdiff_t index, ptrdiff_t tokens, const float *x,
                   const lbq_trace *known, const lbq_block_gradient *gradient,
                   const lbq_block_outputs *outputs, const lbq_attention_target *target, float *dx)
{
    LBQ_REQUIRE(index >= 0 && index < decoder->block_count,
                LBQ_BAD_VALUE,
                "block is %td, expected 0 to %td",
                index,
                decoder->block_count - 1);
    LBQ_REQUIRE(tokens >= 1, LBQ_BAD_SHAPE, "there are no tokens");
    LBQ_TRY(check_gradient(decoder, gradient));
    pass p = {
        .decoder = decoder,
        .block = decoder->blocks[index],
        .tokens = tokens,
        .x = x,
        .gradient = gradient,
        .outputs = outputs,
        .target = target,
        .known = known,
        .dx = dx,
    };
    lbq_arena arena = {0};
    LBQ_TRY(lbq_arena_open(&arena, take(&p, &arena)));
    take(&p, &arena);
    lbq_status status = recompute(&p, index);
    if (status == LBQ_OK)
        status = feed_forward_backward(&p);
    if (status == LBQ_OK)
        status = attention_half_backward(&p);
    lbq_arena_close(&arena);
    return status;
}

lbq_status
lbq_embed_backward(const lbq_decoder *decoder, ptrdiff_t tokens, const int32_t *token, float *dx,
                   float *dense)
{
    const lbq_linear *const embedding = decoder->embedding;
    const lbq_copy *const copy = &embedding->copies[0];
    const ptrdiff_t hidden = decoder->hidden;
    LBQ_REQUIRE(embedding->count == 1 && copy->dense && !copy->weight && !embedding->rank,
                LBQ_BAD_VALUE,
                "the embedding is not one dense matrix");
    if (decoder->rotation)
        LBQ_TRY(lbq_rotate_back(decoder->rotation, tokens, dx));
    if (copy->input)
        LBQ_TRY(lbq_rotate(copy->input, tokens, dx));
    for (ptrdiff_t t = 0; t < tokens; t++) {
        LBQ_REQUIRE(token[t] >= 0 && token[t] < decoder->vocab,
                    LBQ_BAD_VALUE,
                    "tokens[%td] is %d, expected 0 to %td",
                    t,
                    (int)token[t],
                    decoder->vocab - 1);
        for (ptrdiff_t i = 0; i < hidden; i++)
            dense[token[t] * hidden + i] += dx[t * hidden + i];
    }
    return LBQ_OK;
}

lbq_status
lbq_finish_backward(const lbq_decoder *decoder, ptrdiff_t tokens, const float *x, const float *g,
                    float *final_norm, float *dx)
{
    const ptrdiff_t hidden = decoder->hidden;
    const size_t bytes = sizeof(float) * (size_t)(tokens * hidden);
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, bytes));
    float *const plain = memcpy(lbq_arena_take(&arena, bytes), x, bytes);
    memset(dx, 0, bytes);
    lbq_status status = LBQ_OK;
    if (decoder->rotation)
        status = lbq_rotate_back(decoder->rotation, tokens, plain);
    if (status == LBQ_OK)
        status = lbq_rmsnorm_backward(
            tokens, hidden, plain, decoder->final_norm, decoder->epsilon, g, final_norm, dx);
    if (status == LBQ_OK && decoder->rotation)
        status = lbq_rotate(decoder->rotation, tokens, dx);
    lbq_arena_close(&arena);
    return status;
}
