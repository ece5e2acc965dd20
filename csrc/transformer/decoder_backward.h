/* Gradients of a network whose layers are dense, block by block from the last to the first.
 *
 * A block's backward pass takes dL/dx behind the block to that before it. It needs the block's
 * input and, of what the forward pass had in between, `output`, `log_sum` and `middle` of its
 * trace; with the outputs of the layers too, only norms and turns are computed again. */
#ifndef LBQ_DECODER_BACKWARD_H
#define LBQ_DECODER_BACKWARD_H

#include <stddef.h>

#include "core/status.h"
#include "linear/backward.h"
#include "transformer/attention_backward.h"
#include "transformer/decoder.h"

/* The layers of a block, in the order of the forward pass. */
enum { LBQ_QUERY, LBQ_KEY, LBQ_VALUE, LBQ_OUTPUT, LBQ_GATE, LBQ_UP, LBQ_DOWN, LBQ_SLOTS };

/* Where gradients of a block's parts are added; NULL: not wanted. */
typedef struct {
    ptrdiff_t hidden, head_dim; /* of the arrays below; 0: of none */
    float *attention_norm, *mlp_norm, *query_norm, *key_norm;
    lbq_linear_gradient layers[LBQ_SLOTS];
} lbq_block_gradient;

/* Gradients of the outputs of a block's layers, (tokens, rows) each: written unless NULL. */
typedef struct {
    float *layers[LBQ_SLOTS];
} lbq_block_outputs;

/* Block `index` for its input x (tokens, hidden), a window of its own; dx alike, in place. Parts of
 * `known` that are NULL are computed again; its taps other than `output` are not read. Attention is
 * pulled towards `target`, unless NULL. Equal bits for any number of threads, outside BLAS. */
lbq_status lbq_block_backward(const lbq_decoder *decoder, ptrdiff_t index, ptrdiff_t tokens,
                              const float *x, const lbq_trace *known,
                              const lbq_block_gradient *gradient, const lbq_block_outputs *outputs,
                              const lbq_attention_target *target, float *dx);

/* From dL/dx behind lbq_decoder_embed to the embedding's rows, dense (vocab, hidden), which is
 * added to; dx (tokens, hidden) is overwritten. LBQ_BAD_VALUE unless the embedding is one dense
 * copy without weights. */
lbq_status lbq_embed_backward(const lbq_decoder *decoder, ptrdiff_t tokens, const int32_t *token,
                              float *dx, float *dense);

/* Through the last norm: y = lbq_decoder_finish(x), g = dL/dy, dx (tokens, hidden) is written;
 * final_norm (hidden) is added to unless NULL. */
lbq_status lbq_finish_backward(const lbq_decoder *decoder, ptrdiff_t tokens, const float *x,
                               const float *g, float *final_norm, float *dx);

#endif
