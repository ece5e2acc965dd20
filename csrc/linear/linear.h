/* A linear layer: y = W act(R x) + b, with W dense or packed.
 *
 * R is an optional input rotation, act the activation quantizer: none (float32), or int8 with a
 * scale and a sum per step of the packed weight (activation_bits = 8; 4 uses the range -7..7). */
#ifndef LBQ_LINEAR_H
#define LBQ_LINEAR_H

#include <stddef.h>

#include "core/packed.h"
#include "core/status.h"
#include "rotate/rotation.h"

typedef struct {
    ptrdiff_t rows, cols;
    const float *dense;           /* W (rows, cols), or NULL: */
    lbq_packed packed;            /* the packed W */
    const float *bias;            /* (rows) or NULL */
    const lbq_rotation *rotation; /* of the input, or NULL */
    int activation_bits;          /* 0: float32; 8 or 4, packed only */
} lbq_linear;

/* y (tokens, rows) for x (tokens, cols). Packed layers give equal bits on every instruction set
 * and for every number of threads where activations are quantized. */
lbq_status lbq_linear_forward(const lbq_linear *layer, ptrdiff_t tokens, const float *x, float *y);

#endif
