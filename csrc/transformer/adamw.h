/* A step of AdamW, and the sum of squares that a gradient is clipped by.
 *
 *     p <- (1 - rate decay) p
 *     m <- beta1 m + (1 - beta1) g
 *     v <- beta2 v + (1 - beta2) g^2
 *     p <- p - rate m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + epsilon)
 *
 * I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2, in the
 * arithmetic of torch.optim.AdamW. */
#ifndef LBQ_ADAMW_H
#define LBQ_ADAMW_H

#include <stddef.h>

#include "core/status.h"

typedef struct {
    double rate;         /* of learning, >= 0 */
    double beta1, beta2; /* 0 <= beta < 1 */
    double epsilon;      /* > 0 */
    double decay;        /* >= 0 */
} lbq_adamw;

/* Step number `step` >= 1 of param (n) by gradient (n), whose squares must stay within float32; the
 * moments first, second (n) are zeros before step 1. */
lbq_status lbq_adamw_step(const lbq_adamw *how, ptrdiff_t step, ptrdiff_t n, float *param,
                          const float *gradient, float *first, float *second);

/* *sum: of x[i]^2 in float64, in an order that follows from n alone. */
lbq_status lbq_square_sum(ptrdiff_t n, const float *x, double *sum);

#endif
