/* Hadamard transforms, one number at a time. */
#include <math.h>
#include <string.h>

#include "kernels/portable/portable.h"

static void
multiply(ptrdiff_t n, const float *factor, float *x)
{
    for (ptrdiff_t i = 0; factor && i < n; i++)
        x[i] *= factor[i];
}

void
lbq_hadamard_sylvester_portable(ptrdiff_t n, ptrdiff_t count, const float *before,
                                const float *after, float *x)
{
    multiply(n * count, before, x);
    for (ptrdiff_t at = 0; at < n * count; at += n)
        for (ptrdiff_t distance = 1; distance < n; distance *= 2)
            for (float *left = x + at; left < x + at + n; left += 2 * distance)
                for (ptrdiff_t i = 0; i < distance; i++) {
                    const float a = left[i], b = left[i + distance];
                    left[i] = a + b;
                    left[i + distance] = a - b;
                }
    multiply(n * count, after, x);
}

/* sum += b x, rounded once; if b is a sign, without fmaf, which may be a slow call. */
static void
add_multiple(float b, const float *x, ptrdiff_t lanes, float *sum)
{
    if (b == 1)
        for (ptrdiff_t i = 0; i < lanes; i++)
            sum[i] += x[i];
    else if (b == -1)
        for (ptrdiff_t i = 0; i < lanes; i++)
            sum[i] -= x[i];
    else
        for (ptrdiff_t i = 0; i < lanes; i++)
            sum[i] = fmaf(b, x[i], sum[i]);
}

void
lbq_hadamard_base_portable(const float *A, ptrdiff_t order, ptrdiff_t lanes, const float *before,
                           const float *after, float *x, float *scratch)
{
    multiply(order * lanes, before, x);
    for (ptrdiff_t first = 0; first < lanes; first += LBQ_HADAMARD_LANES) {
        const ptrdiff_t left = lanes - first;
        const ptrdiff_t width = left < LBQ_HADAMARD_LANES ? left : LBQ_HADAMARD_LANES;
        for (ptrdiff_t j = 0; j < order; j++)
            memcpy(scratch + j * width, x + j * lanes + first, (size_t)width * sizeof *x);
        for (ptrdiff_t i = 0; i < order; i++) {
            float *const sum = x + i * lanes + first;
            memset(sum, 0, (size_t)width * sizeof *sum);
            for (ptrdiff_t j = 0; j < order; j++)
                add_multiple(A[j * order + i], scratch + j * width, width, sum);
        }
    }
    multiply(order * lanes, after, x);
}
