/* RMSNorm and moments of one row. */
#include <math.h>

#include "kernels/norm.h"
#include "kernels/portable/portable.h"

enum { LANES = 16 };

void
lbq_rmsnorm_f32_portable(const float *x, const float *gain, ptrdiff_t count, float epsilon,
                         float *y)
{
    float lane[LANES] = {0}, squares = 0;
    ptrdiff_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] += x[i + j] * x[i + j];
    for (; i < count; i++)
        squares += x[i] * x[i];
    for (int j = 0; j < LANES; j++)
        squares += lane[j];
    const float mean = squares / (float)count;
    if (!lbq_norm_in_range(mean, epsilon)) {
        lbq_norm_wide(x, gain, count, epsilon, y);
        return;
    }
    const float scale = 1.0f / sqrtf(mean + epsilon);
    if (gain)
        for (i = 0; i < count; i++)
            y[i] = x[i] * scale * gain[i];
    else
        for (i = 0; i < count; i++)
            y[i] = x[i] * scale;
}

ptrdiff_t
lbq_moments_f32_portable(const float *x, ptrdiff_t count, float threshold, float *sum,
                         float *largest)
{
    float lane[64] = {0}, most = 0;
    ptrdiff_t above = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
        const float magnitude = fabsf(x[i]);
        lane[i % 64] += magnitude;
        most = magnitude > most ? magnitude : most;
        above += magnitude > threshold;
    }
    for (int half = 32; half > 0; half /= 2)
        for (int j = 0; j < half; j++)
            lane[j] += lane[j + half];
    *sum = lane[0];
    *largest = most;
    return above;
}
