/* The orthogonal matrix nearest to a square one, which solves the orthogonal Procrustes problem. */
#ifndef LBQ_PROCRUSTES_H
#define LBQ_PROCRUSTES_H

#include <stddef.h>

#include "core/status.h"

/* Q = U V^T and values = diag(S), descending, of the singular value decomposition M = U S V^T, all
 * row-major: Q (n, n) is orthogonal and maximises tr(Q^T M), whose maximum is the sum of the values
 * (n). It is unique if M has full rank, and any of the maxima otherwise.
 *
 * With M = B^T diag(w) A it minimises sum_t w_t |Q a_t - b_t|^2.
 *
 * LBQ_BAD_VALUE for a NaN or infinity, LBQ_BAD_SHAPE if n > 16384, LBQ_NO_MEMORY. One call of
 * LAPACK in one thread, which an interrupt does not end. */
lbq_status lbq_polar(ptrdiff_t n, const double *M, double *Q, double *values);

#endif
