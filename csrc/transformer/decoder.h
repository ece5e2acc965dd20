/* A whole LLaMA or Qwen network: token numbers in, logits out.
 *
 *     x = R embedding[token]                                    R: residual rotation, or I
 *     x += output(attention(rope(norm(query n)), rope(norm(key n)), value n)),  n = norm(x)
 *     x += down(silu(gate n) * up n),                                           n = norm(x)
 *     logits = head(norm(R^T x))
 *
 * one pair of additions per block. Some blocks may leave out rope: they see the order of tokens
 * only by what earlier blocks made of it. B. Yang et al., "Rope to Nope and back again: a new
 * hybrid attention strategy", 2025.
 *
 * Linear layers are dense or packed, each with its own input rotation and bias. The embedding is a
 * layer too, whose rows are looked up; without a head, it is also the head. A decoder is immutable
 * once built, so threads may share it. */
#ifndef LBQ_DECODER_H
#define LBQ_DECODER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "linear/linear.h"
#include "rotate/rotation.h"
#include "transformer/attention.h"
#include "transformer/moments.h"

typedef struct {
    ptrdiff_t hidden, head_dim;             /* lengths of the norms below; 0: both are NULL */
    const float *attention_norm, *mlp_norm; /* (hidden); NULL: fused into the layers, all ones */
    const float *query_norm, *key_norm;     /* (head_dim), of each head; NULL: none */
    const lbq_linear *query, *key, *value, *output, *gate, *up, *down;
    float attention_scale, mlp_scale; /* of what each half adds to the residual stream */
    bool rope;                        /* whether queries and keys are turned by their position */
} lbq_block;

typedef struct {
    ptrdiff_t vocab, hidden, block_count;
    lbq_heads heads;
    float epsilon;                /* of every norm */
    const double *frequency;      /* (head_dim / 2), radians per position */
    double rope_factor;           /* of sine and cosine */
    const lbq_linear *embedding;  /* (vocab, hidden), without bias */
    const float *final_norm;      /* (hidden) */
    const lbq_linear *head;       /* NULL: the embedding */
    const lbq_rotation *rotation; /* R, or NULL */
    const lbq_block *const *blocks;
} lbq_decoder;

/* Keys and values of earlier tokens: one store per block, one after the other. */
typedef struct {
    ptrdiff_t past, capacity; /* positions; capacity is a multiple of LBQ_KEYS */
    int bits;                 /* 32 or 8, of a number in a store */
    void *memory;             /* block_count times lbq_store_bytes(), 64-byte aligned */
} lbq_cache;

/* What a caller wants to see of a block besides x; each is written unless NULL. */
typedef struct {
    /* Inputs of the layers, before a layer's own rotation: */
    float *qkv, *mlp; /* (tokens, hidden) */
    float *output;    /* (tokens, heads head_dim) */
    float *down;      /* (tokens, intermediate) */
    /* What a backward pass needs besides the block's input: */
    float *log_sum; /* (tokens, heads), as lbq_attention has it */
    float *middle;  /* (tokens, hidden): x between the halves */
    /* Outputs of the layers, (tokens, rows), before norms of heads and rope: */
    float *query, *key, *value, *gate, *up;
    lbq_moments *moments; /* (LBQ_TAPS): sums over the inputs above */
    bool starts;          /* whether token 0 begins the text; moments leave it out */
} lbq_trace;

/* LBQ_BAD_SHAPE unless all layers fit together; LBQ_BAD_VALUE if the heads or the embedding are not
 * as described above. */
lbq_status lbq_decoder_check(const lbq_decoder *decoder);

/* x (tokens, hidden): R embedding[token]; LBQ_BAD_VALUE for a token outside the vocabulary. */
lbq_status lbq_decoder_embed(const lbq_decoder *decoder, ptrdiff_t tokens, const int32_t *token,
                             float *x);

/* The steps of a block: to the inputs of its layers, and from there on. */
enum {
    LBQ_TO_QKV = 1,      /* qkv = norm(x); LBQ_TO_OUTPUT does this by itself */
    LBQ_TO_OUTPUT = 2,   /* output = attention(x) */
    LBQ_FROM_OUTPUT = 4, /* x += attention_scale * output layer(output) */
    LBQ_TO_MLP = 8,      /* mlp = norm(x); LBQ_TO_DOWN does this by itself */
    LBQ_TO_DOWN = 16,    /* down = silu(gate) * up */
    LBQ_FROM_DOWN = 32,  /* x += mlp_scale * down layer(down) */
    LBQ_BLOCK = 63       /* all */
};

/* Some steps of block `index` on x (tokens, hidden) in place, as a window without earlier tokens. A
 * step from a tap reads it from the trace, unless the step to it comes before; LBQ_BAD_VALUE if it
 * is not there. */
lbq_status lbq_decoder_block(const lbq_decoder *decoder, ptrdiff_t index, int steps,
                             ptrdiff_t tokens, float *x, const lbq_trace *trace);

/* Tables of rope for a window of its own: cosine, sine (tokens, head_dim / 2). */
lbq_status lbq_decoder_turns(const lbq_decoder *decoder, ptrdiff_t tokens, float *cosine,
                             float *sine);

/* What an attention half computes first: n = norm(x) (tokens, hidden), and its queries, keys and
 * values (tokens, heads or kv_heads, head_dim), with queries and keys turned. raw_q and raw_k,
 * unless NULL, are queries and keys before their norms and turns. */
typedef struct {
    const float *cosine, *sine; /* (tokens, head_dim / 2) */
    float *n, *q, *k, *v, *raw_q, *raw_k;
} lbq_projection;

/* Fills a projection of x (tokens, hidden), without the biases that a store leaves out (NULL: with
 * all). */
lbq_status lbq_block_project(const lbq_decoder *decoder, const lbq_block *block, ptrdiff_t tokens,
                             const float *x, const lbq_store_bias *bias, const lbq_projection *to);

/* The norms and turns of lbq_block_project, as far as the block has them: q and k, in place. */
lbq_status lbq_block_turn(const lbq_decoder *decoder, const lbq_block *block, ptrdiff_t tokens,
                          const float *cosine, const float *sine, float *q, float *k);

/* First step of a feed-forward half: n = norm(x), and gate and up of it (tokens, intermediate). */
lbq_status lbq_block_gate(const lbq_decoder *decoder, const lbq_block *block, ptrdiff_t tokens,
                          const float *x, float *n, float *gate, float *up);

/* y (rows, hidden) = norm(R^T x), the input of the head; y may be x. */
lbq_status lbq_decoder_finish(const lbq_decoder *decoder, ptrdiff_t rows, const float *x, float *y);

/* logits (rows, vocab) of y (rows, hidden). */
lbq_status lbq_decoder_head(const lbq_decoder *decoder, ptrdiff_t rows, const float *y,
                            float *logits);

/* Whether a cache of one decoder may be used with the other: keys and values are stored alike. */
bool lbq_decoder_same_cache(const lbq_decoder *a, const lbq_decoder *b);

/* The whole network. hidden (rows, hidden) and logits (rows, vocab) are of the last `rows` tokens;
 * either may be NULL. The tokens follow the cache's past ones and are stored in it; the caller
 * advances `past`. cache NULL: a window without earlier tokens. Moments (block_count, LBQ_TAPS) of
 * the layers' inputs are added to, unless NULL; they leave out position 0, to which later tokens
 * attend by activations so large that they would hide all others. */
lbq_status lbq_decoder_forward(const lbq_decoder *decoder, ptrdiff_t tokens, const int32_t *token,
                               const lbq_cache *cache, ptrdiff_t rows, float *hidden, float *logits,
                               lbq_moments *moments);

#endif
