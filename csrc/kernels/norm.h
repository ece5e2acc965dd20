/* RMSNorm of a row whose squares leave the range of float32, for every instruction set. */
#ifndef LBQ_NORM_H
#define LBQ_NORM_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>

/* Whether no square that matters overflowed float32 or was so small that it lost digits. */
static inline bool
lbq_norm_in_range(float mean_square, float epsilon)
{
    return mean_square < INFINITY && mean_square + epsilon >= 0x1p-100f;
}

/* rmsnorm_f32 in float64, which holds the square of every float. Rows with a NaN or an infinity
 * come here too. */
static inline void
lbq_norm_wide(const float *x, const float *gain, ptrdiff_t count, float epsilon, float *y)
{
    double squares = 0;
    for (ptrdiff_t i = 0; i < count; i++)
        squares += (double)x[i] * (double)x[i];
    const double scale = 1 / sqrt(squares / (double)count + (double)epsilon);
    for (ptrdiff_t i = 0; i < count; i++)
        y[i] = (float)((double)x[i] * scale * (gain ? (double)gain[i] : 1.0));
}

#endif
