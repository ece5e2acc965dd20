/* Ridge regression on the inputs of a layer, from sums over its tokens. */
#ifndef LBQ_RIDGE_H
#define LBQ_RIDGE_H

#include <stddef.h>

#include "core/status.h"

/* M (rows, cols) += Y^T diag(w) X for Y (tokens, rows), X (tokens, cols) and w (tokens), or NULL:
 * all 1. Sums are float32 over at most 2048 tokens and float64 beyond. LBQ_NO_MEMORY,
 * LBQ_INTERRUPTED. */
lbq_status lbq_moment_add(ptrdiff_t tokens, ptrdiff_t rows, ptrdiff_t cols, const float *Y,
                          const float *X, const float *weights, double *M);

/* B (rows, cols) becomes B (H + ridge I)^-1, for H (cols, cols), read on and above the diagonal.
 * LBQ_NOT_POSITIVE_DEFINITE, LBQ_NO_MEMORY, LBQ_INTERRUPTED. */
lbq_status lbq_ridge_solve(ptrdiff_t rows, ptrdiff_t cols, const double *H, double ridge,
                           double *B);

#endif
