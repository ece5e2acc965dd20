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

/* Sets the digest of R's contents, by which equal rotations are recognised wherever they lie in
 * memory. */
void lbq_rotation_identify(lbq_rotation *rotation);

/* Whether two rotations are the same matrix; NULL is the identity. */
bool lbq_same_rotation(const lbq_rotation *a, const lbq_rotation *b);

/* Each row x of X (rows, n) becomes R x, or R^T x; in place, rows in parallel. For a Hadamard
 * matrix the bits do not depend on the number of threads. LBQ_NO_MEMORY. A dense R calls BLAS, so
 * not inside a task. */
lbq_status lbq_rotate(const lbq_rotation *rotation, ptrdiff_t rows, float *X);
lbq_status lbq_rotate_back(const lbq_rotation *rotation, ptrdiff_t rows, float *X);

/* Q (n, n), uniform under the Haar measure on the orthogonal group: a function of seed and stream,
 * to rounding. LBQ_NO_MEMORY; LBQ_BAD_SHAPE if n > 46340, the limit of LAPACK's sizes. */
lbq_status lbq_orthogonal(uint64_t seed, uint64_t stream, ptrdiff_t n, double *Q);

#endif
