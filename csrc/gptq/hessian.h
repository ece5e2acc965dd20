/* The Hessian of a layer's output error: H = sum_t w_t x_t x_t^T over the layer's inputs x_t.
 *
 * Only the upper triangle is kept (row-major, i <= j); entries below the diagonal are neither read
 * nor written. Sums are float32 over at most 2048 tokens of a tile and float64 beyond. Tiles do not
 * depend on the number of threads, so results are bit-identical for any number. */
#ifndef LBQ_HESSIAN_H
#define LBQ_HESSIAN_H

#include <stddef.h>

#include "core/status.h"

/* H (cols, cols) += X^T diag(w) X for X (tokens, cols) and w (tokens), or NULL: all 1.
 * LBQ_BAD_VALUE for a negative weight, and for a NaN or infinity in X (H is then invalid). */
lbq_status lbq_hessian_add(ptrdiff_t tokens, ptrdiff_t cols, const float *X,
                           const float *weights /* (tokens) or NULL */, double *H);

/* *value = tr(E H E^T) for E (rows, cols): the squared output error, summed over rows and tokens,
 * caused by the weight error E. */
lbq_status lbq_hessian_error(ptrdiff_t rows, ptrdiff_t cols, const double *H, const float *E,
                             double *value);

/* full = H + damping I with both triangles, times a power of two that brings its diagonal below 1.
 * LBQ_BAD_VALUE for a NaN or infinity in H. */
lbq_status lbq_hessian_unfold(ptrdiff_t cols, const double *H, double damping, double *full);

#endif
