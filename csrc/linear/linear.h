/* A linear layer: y = W act(R x) + b, with W dense or packed.
 *
 * R is an optional input rotation, act the activation quantizer: none (float32), or int8 with a
 * scale and a sum per step of the packed weight (activation_bits = 8; 4 uses the range -7..7).
 * Levels are then rounded to 8 bits too (lbq_byte_levels). */
#ifndef LBQ_LINEAR_H
#define LBQ_LINEAR_H

#include <stddef.h>
#include <stdint.h>

#include "codes/matrix.h"
#include "core/status.h"
#include "rotate/rotation.h"

typedef struct {
    ptrdiff_t rows, cols;
    const float *dense;           /* W (rows, cols), or NULL: */
    lbq_matrix matrix;            /* the packed W */
    const float *bias;            /* (rows) or NULL */
    const lbq_rotation *rotation; /* of the input, or NULL */
    int activation_bits;          /* 0: float32; 8 or 4, packed only */
} lbq_linear;

/* LBQ_OK if the parts fit together; else LBQ_BAD_VALUE or LBQ_BAD_SHAPE. Call it once per layer. */
lbq_status lbq_linear_check(const lbq_linear *layer);

/* y (tokens, rows) for x (tokens, cols), both finite; a NaN or infinity in a token's x makes that
 * token's y NaN. Where activations are quantized y is equal bit for bit on every instruction set,
 * for every number of threads and whatever other tokens come along (kernels.h has the order of
 * operations; b is added last). LBQ_NO_MEMORY if there is none for scratch. */
lbq_status lbq_linear_forward(const lbq_linear *layer, ptrdiff_t tokens, const float *x, float *y);

/* The same for `count` layers of one x: y[i] is the output of layers[i]. Neighbours of equal
 * rotation, activation_bits and step quantize x once and split their panels over the threads
 * together. The bits are those of one call per layer. */
lbq_status lbq_linears_forward(ptrdiff_t count, const lbq_linear *const *layers, ptrdiff_t tokens,
                               const float *x, float *const *y);

/* weight (count, cols): rows row[0], row[1], ... of W R, as an embedding looks them up; each is
 * from 0 to rows - 1. */
lbq_status lbq_linear_rows(const lbq_linear *layer, ptrdiff_t count, const int32_t *row,
                           float *weight);

#endif
