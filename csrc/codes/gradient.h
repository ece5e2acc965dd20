/* How the gradient of a loss by the weights of a packed matrix reaches what a code can change
 * without other words: scales, offsets and the table of levels. Words stay as they are, so that
 *
 *     w[r,k] = scale[r,g] level[r,k] + offset[r,g]
 *
 * is linear in each of them, for every kind of code: S. Esser, J. McKinstry, D. Bablani,
 * R. Appuswamy, D. Modha, "Learned Step Size Quantization", 2020, without its estimate of how words
 * would change. */
#ifndef LBQ_GRADIENT_H
#define LBQ_GRADIENT_H

#include "codes/matrix.h"

/* From dW (rows, cols), with scale (rows, groups) as lbq_matrix_compose has it:
 *
 *     dscale[r,g]  = sum_k dW[r,k] level[r,k]           if the matrix stores offsets
 *                  = sum_k dW[r,k] (level[r,k] - zero)  if not: offset = -zero scale
 *     doffset[r,g] = sum_k dW[r,k]
 *     dlevels[c]   = sum of dW[r,k] scale[r,g] over the words c
 *
 * over the columns k of group g; each may be NULL. Sums are accumulated in float64. LBQ_BAD_VALUE
 * for dlevels of a code without a table. */
lbq_status lbq_code_gradient(const lbq_matrix *matrix, const float *dW, const float *scale,
                             float *dscale, float *doffset, float *dlevels);

#endif
