/* RMSNorm: y = gain x / sqrt(mean(x^2) + epsilon), row by row.
 *
 * B. Zhang, R. Sennrich, "Root mean square layer normalization", 2019, equation 4. */
#ifndef LBQ_RMSNORM_H
#define LBQ_RMSNORM_H

#include <stddef.h>

#include "core/status.h"

/* Y (rows, cols) of X (rows, cols); gain (cols), or NULL: ones. Y may be X. */
lbq_status lbq_rmsnorm(ptrdiff_t rows, ptrdiff_t cols, const float *X, const float *gain,
                       float epsilon, float *Y);

/* The gradient of X (rows, cols), added to dX, for G = dL/dY; with s = 1 / sqrt(mean(x^2) +
 * epsilon),
 *
 *     dx = s (gain g) - x s^3 / cols sum(gain g x),     dgain = sum over rows of g x s
 *
 * dgain (cols) is added to unless NULL. LBQ_NO_MEMORY. */
lbq_status lbq_rmsnorm_backward(ptrdiff_t rows, ptrdiff_t cols, const float *X, const float *gain,
                                float epsilon, const float *G, float *dgain, float *dX);

#endif
