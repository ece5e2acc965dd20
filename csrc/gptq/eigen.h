/* The leading eigenvectors of a symmetric matrix, or of a product of two. */
#ifndef LBQ_EIGEN_H
#define LBQ_EIGEN_H

#include <stddef.h>

#include "core/status.h"

/* The `count` largest values with A x = value x, |x| = 1, or with A B x = value x, x^T B x = 1:
 * values (count) ascending, vectors (count, n) in rows. A and B (n, n) are read on and above the
 * diagonal and then undefined; B is NULL or positive definite, else LBQ_NOT_POSITIVE_DEFINITE.
 * LBQ_BAD_VALUE for a NaN or infinity, or a count that is not 1 to n.
 *
 * One call of LAPACK in one thread, so results do not depend on the number of threads; 0.012 s for
 * 576 columns, 4.5 s for 4096, which an interrupt does not end. */
lbq_status lbq_leading_eigenvectors(ptrdiff_t n, double *A, double *B, ptrdiff_t count,
                                    double *values, double *vectors);

#endif
