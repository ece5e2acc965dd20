/* An orthogonal matrix R of order n, applied to the rows of a matrix.
 *
 * Two forms. Randomised Hadamard: R x = (B (x) H) (s o x) / sqrt(n), where n = c 2^k, H is the
 * Sylvester matrix of order 2^k, B an order-c matrix with B B^T = c I and entries of magnitude 1
 * where a Hadamard matrix of that order is known, s a vector of signs. Dense: R is stored. */
#ifndef LBQ_ROTATION_H
#define LBQ_ROTATION_H

#include <stddef.h>

#include "core/status.h"

typedef struct {
    ptrdiff_t n;
    ptrdiff_t order;    /* c; 0: dense */
    const float *base;  /* B (c, c), or R (n, n) */
    const float *signs; /* s (n) of +-1; NULL: all +1, or dense */
} lbq_rotation;

/* Each row x of X (rows, n) becomes R x, or R^T x; in place, rows in parallel. */
lbq_status lbq_rotate(const lbq_rotation *rotation, ptrdiff_t rows, float *X);
lbq_status lbq_rotate_back(const lbq_rotation *rotation, ptrdiff_t rows, float *X);

#endif
