/* Gradients of a linear layer whose copies are dense.
 *
 *     y = sum_i weight_i * P_i^T W_i R_i x  +  U V^T x  +  b,     g = dL/dy,
 *
 *     dL/dx = sum_i R_i^T W_i^T h_i  +  V U^T g,     h_i = P_i (weight_i * g)
 *
 * and, summed over tokens,
 *
 *     dL/dW_i = h_i (R_i x)^T,     dL/dweight_i = g * P_i^T W_i R_i x,
 *     dL/dU = g (V^T x)^T,     dL/dV = x (U^T g)^T,     dL/db = g,
 *     dL/dR_i = W_i^T h_i x^T.
 *
 * Where a copy rounds R x, linear/fake.h has the way through it. */
#ifndef LBQ_BACKWARD_H
#define LBQ_BACKWARD_H

#include <stdbool.h>
#include <stddef.h>

#include "core/status.h"
#include "linear/linear.h"

enum { LBQ_COPIES = 8 /* of a layer that has gradients, at most */ };

/* Where gradients are added; NULL: not wanted. */
typedef struct {
    ptrdiff_t rows, cols, rank; /* of the arrays; 0: of none */
    float *dense[LBQ_COPIES];   /* of each copy: (rows, cols) */
    float *weight[LBQ_COPIES];  /* (rows) */
    float *fake[LBQ_COPIES];    /* (LBQ_FAKE_VALUES) */
    float *input[LBQ_COPIES];   /* (cols, cols): of R, as if its entries were free */
    float *bias, *U, *V;
} lbq_linear_gradient;

/* dx (tokens, cols) is written, or added to, for x alike and g (tokens, rows); dx may be NULL. y
 * (tokens, rows), the output for x, saves products where it is not NULL.
 * LBQ_BAD_VALUE for packed copies or too many of them; LBQ_BAD_SHAPE unless the sizes of the arrays
 * are those of the layer; LBQ_NO_MEMORY. */
lbq_status lbq_linear_backward(const lbq_linear *layer, ptrdiff_t tokens, const float *x,
                               const float *y, const float *g, const lbq_linear_gradient *gradient,
                               bool add, float *dx);

#endif
