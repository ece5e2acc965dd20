/* An orthogonal matrix R of order n, applied to the rows of a matrix.
 *
 * Two forms: a randomised Hadamard matrix, applied by the fast transform of hadamard.h, or a
 * dense matrix, applied by BLAS. */
#ifndef LBQ_ROTATION_H
#define LBQ_ROTATION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"
#include "rotate/hadamard.h"

typedef struct {
    ptrdiff_t n;
    const float *dense;    /* R (n, n), row-major; NULL: */
    lbq_hadamard hadamard; /* the fast form */
    uint64_t digest;       /* by lbq_rotation_identify() */
} lbq_rotation;

/* Digests what R is made of, so that equal rotations can be told whatever memory they lie in. */
void lbq_rotation_identify(lbq_rotation *rotation);

/* Whether two rotations are one matrix; NULL is the identity. */
bool lbq_same_rotation(const lbq_rotation *a, const lbq_rotation *b);

/* Each row x of X (rows, n) becomes R x, or R^T x; in place, rows in parallel, equal bits for any
 * number of threads where R is a Hadamard matrix. LBQ_NO_MEMORY. Not inside a task where R is
 * dense, since BLAS is called. */
lbq_status lbq_rotate(const lbq_rotation *rotation, ptrdiff_t rows, float *X);
lbq_status lbq_rotate_back(const lbq_rotation *rotation, ptrdiff_t rows, float *X);

/* Q (n, n), uniform under the Haar measure on the orthogonal group: a function of seed and stream,
 * to rounding. LBQ_NO_MEMORY; LBQ_BAD_SHAPE beyond 46340, where LAPACK's sizes end. */
lbq_status lbq_orthogonal(uint64_t seed, uint64_t stream, ptrdiff_t n, double *Q);

#endif
