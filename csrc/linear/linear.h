/* A linear layer: a sum of copies of one matrix, a low-rank adapter and a bias.
 *
 *     y  =  sum_i  weight_i * P_i^T ( W_i act_i( R_i x ) )   +   U V^T x   +   b
 *
 * A copy has an input rotation R, an output rotation P, weights that are dense or packed, an
 * activation quantizer act and a fusion weight per row. Copies with the same W can differ in how
 * they round: act(x) = act'( T^T fake( T x ) ), fake in float32 and act' for the product. With
 * integer activations a table of levels is rounded to 8 bits (lbq_byte_levels). Most layers have
 * one copy. */
#ifndef LBQ_LINEAR_H
#define LBQ_LINEAR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "codes/matrix.h"
#include "core/status.h"
#include "linear/activation.h"
#include "linear/fake.h"
#include "rotate/rotation.h"

enum { LBQ_LAYERS = 8 /* that one call takes */ };

typedef struct {
    ptrdiff_t rows, cols;
    const float *dense;                 /* W (rows, cols), or NULL: */
    lbq_matrix matrix;                  /* the packed W */
    const lbq_rotation *input, *output; /* R, P; NULL: the identity */
    lbq_activation activation;          /* bits = 0 where W is dense */
    lbq_fake fake;                      /* rounds R x before, if there are values */
    const float *weight;                /* (rows); NULL: 1 */
    const float *sums;                  /* W 1 (rows); NULL: activations have no zero point */
} lbq_copy;

typedef struct {
    ptrdiff_t rows, cols;
    ptrdiff_t count;        /* of copies, at least 1 */
    const lbq_copy *copies; /* each (rows, cols) */
    const float *bias;      /* (rows) or NULL */
    ptrdiff_t rank;         /* 0: no adapter */
    const float *U, *V;     /* (rows, rank), (cols, rank) */
} lbq_linear;

/* LBQ_OK if the parts fit together; else LBQ_BAD_VALUE or LBQ_BAD_SHAPE. Call each once. */
lbq_status lbq_copy_check(const lbq_copy *copy);
lbq_status lbq_linear_check(const lbq_linear *layer);

/* Whether a copy takes float32 activations. */
bool lbq_linear_is_float(const lbq_linear *layer);

/* y (tokens, rows) for x (tokens, cols), both finite; a NaN or infinity in a token's x makes that
 * token's y NaN. Copies are added in their order, then the adapter, then b. Where activations are
 * quantized and there is no adapter, y is bit-identical on every instruction set, for any number of
 * threads and regardless of the other tokens (kernels/list.h: the order of operations).
 * LBQ_NO_MEMORY if scratch cannot be allocated. */
lbq_status lbq_linear_forward(const lbq_linear *layer, ptrdiff_t tokens, const float *x, float *y);

/* The same for `count` <= LBQ_LAYERS layers with the same x: y[i] is the output of layers[i].
 * Copies with equal input rotation, activation and step, in one layer or several, quantize x once,
 * and threads share all their panels. Results are bit-identical to one call per layer. */
lbq_status lbq_linears_forward(ptrdiff_t count, const lbq_linear *const *layers, ptrdiff_t tokens,
                               const float *x, float *const *y);

/* How often such a call rotates and quantizes x. */
ptrdiff_t lbq_linears_inputs(ptrdiff_t count, const lbq_linear *const *layers);

/* weight (count, cols): rows row[0], row[1], ... of the sum of all copies and the adapter, as an
 * embedding looks them up; each is from 0 to rows - 1. No copy has an output rotation. */
lbq_status lbq_linear_rows(const lbq_linear *layer, ptrdiff_t count, const int32_t *row,
                           float *weight);

#endif
