/* Centring, and the choice of the kernel that rounds. */
#include "linear/activation.h"

#include <math.h>

#include "kernels/kernels.h"

lbq_status
lbq_activation_check(const lbq_activation *activation)
{
    const int bits = activation->bits;
    LBQ_REQUIRE(bits == 0 || bits == 4 || bits == 8,
                LBQ_BAD_VALUE,
                "activation_bits is %d, expected 0, 4 or 8",
                bits);
    const float scale = activation->scale;
    LBQ_REQUIRE(!bits || scale == 0 || (scale >= 0x1p-100f && isfinite(scale)),
                LBQ_BAD_VALUE,
                "scale is %g, expected 0 or a finite number >= 2^-100",
                (double)scale);
    LBQ_REQUIRE(!isinf(activation->zero),
                LBQ_BAD_VALUE,
                "zero is %g, expected a finite number or NaN",
                (double)activation->zero);
    return LBQ_OK;
}

bool
lbq_same_float(float a, float b)
{
    return a == b || (isnan(a) && isnan(b));
}

float
lbq_activation_centre(const lbq_activation *activation, ptrdiff_t cols, float *x)
{
    float zero = activation->zero;
    if (isnan(zero)) {
        float low = x[0], high = x[0];
        for (ptrdiff_t k = 1; k < cols; k++) {
            low = x[k] < low ? x[k] : low;
            high = x[k] > high ? x[k] : high;
        }
        zero = 0.5f * low + 0.5f * high;
    }
    for (ptrdiff_t k = 0; k < cols; k++)
        x[k] -= zero;
    return zero;
}

void
lbq_activation_round(const lbq_activation *activation, ptrdiff_t cols, ptrdiff_t step,
                     const float *x, int8_t *q, float *scale, float *total)
{
    const int limit = (1 << (activation->bits - 1)) - 1;
    const float clip = activation->clip, given = activation->scale;
    if (clip == 1 && given == 0)
        lbq_kernel.quantize_i8(x, cols, step, limit, q, scale, total);
    else
        lbq_kernel.clip_i8(x, cols, step, limit, clip, given, q, scale, total);
}
