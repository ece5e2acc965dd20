/* Rotary position embedding, in the form that pairs the first half of a head with the second.
 *
 *     y[i]     = x[i] cos a_i - x[i + d/2] sin a_i
 *     y[i+d/2] = x[i] sin a_i + x[i + d/2] cos a_i,    a_i = position * frequency[i],  i < d/2
 *
 * J. Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021. Scaled
 * variants differ in the frequencies and in a common factor of sine and cosine. */
#ifndef LBQ_ROPE_H
#define LBQ_ROPE_H

#include <stddef.h>

#include "core/status.h"

/* cosine, sine (tokens, half) times `factor`, for positions first, first + step, ...; angles in
 * float64: at position 2^17 a float32 angle is off by 1 % of a radian. */
lbq_status lbq_rope_table(ptrdiff_t first, ptrdiff_t step, ptrdiff_t tokens, ptrdiff_t half,
                          const double *frequency, double factor, float *cosine, float *sine);

/* The same for positions 0, 1, ..., transposed: table (2 half, count), cosines first, factor 1. */
void lbq_rope_columns(ptrdiff_t count, ptrdiff_t half, const double *frequency, float *table);

/* X (tokens, heads, 2 half) in place. Each head is first normalised by RMSNorm with `gain`
 * (2 half) and `epsilon`, unless gain is NULL. */
lbq_status lbq_rope(ptrdiff_t tokens, ptrdiff_t heads, ptrdiff_t half, const float *cosine,
                    const float *sine, const float *gain, float epsilon, float *X);

/* G (tokens, heads, 2 half), a gradient of what lbq_rope returns, becomes that of what it turned:
 * turned back. A norm has a gradient of its own. */
lbq_status lbq_rope_backward(ptrdiff_t tokens, ptrdiff_t heads, ptrdiff_t half, const float *cosine,
                             const float *sine, float *G);

#endif
