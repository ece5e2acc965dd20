/* Cholesky factors of large matrices by the threads of the pool, in time slices. */
#ifndef LBQ_CHOLESKY_H
#define LBQ_CHOLESKY_H

#include <stdbool.h>
#include <stddef.h>

#include "core/status.h"

/* A = C C^T for the lower triangle of A (n, n), row-major, in place; what lies above is undefined.
 * *positive is false, and A undefined, if A is not positive definite. LBQ_NO_MEMORY,
 * LBQ_INTERRUPTED. Results do not depend on the number of threads. */
lbq_status lbq_cholesky_f32(ptrdiff_t n, float *A, bool *positive);
lbq_status lbq_cholesky_f64(ptrdiff_t n, double *A, bool *positive);

#endif
