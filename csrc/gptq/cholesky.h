/* Cholesky factorisation of large matrices on the thread pool, in short tasks. */
#ifndef LBQ_CHOLESKY_H
#define LBQ_CHOLESKY_H

#include <stdbool.h>
#include <stddef.h>

#include "core/status.h"

/* Replaces the lower triangle of A (n, n), row-major, by C with A = C C^T; the part above is
 * undefined. *positive is false, and A undefined, if A is not positive definite. LBQ_NO_MEMORY,
 * LBQ_INTERRUPTED. Results do not depend on the number of threads. */
lbq_status lbq_cholesky_f32(ptrdiff_t n, float *A, bool *positive);
lbq_status lbq_cholesky_f64(ptrdiff_t n, double *A, bool *positive);

#endif
