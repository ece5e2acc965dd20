/* float16 to and from float32, from float64, and grids of float16, one at a time. */
#include <math.h>

#include "core/half.h"
#include "kernels/portable/portable.h"

void
lbq_widen_f16_portable(const uint16_t *x, ptrdiff_t count, float *y)
{
    for (ptrdiff_t i = 0; i < count; i++)
        y[i] = lbq_half_widen(x[i]);
}

void
lbq_narrow_f16_portable(const float *x, ptrdiff_t count, uint16_t *y)
{
    for (ptrdiff_t i = 0; i < count; i++)
        y[i] = lbq_half_narrow(x[i]);
}

static uint16_t
round_one(double x, int direction)
{
    const double largest = 65504;
    if (fabs(x) >= largest)
        return lbq_half_narrow((float)copysign(largest, x));
    const uint16_t half = lbq_half_narrow((float)x);
    const double value = lbq_half_widen(half);
    if (direction == 0 || value == x || (value > x) == (direction > 0))
        return half;
    if (value == 0)
        return direction > 0 ? 1 : 0x8001;
    return (value > 0) == (direction > 0) ? half + 1 : half - 1;
}

void
lbq_round_f16_portable(const double *x, int direction, uint16_t *y)
{
    for (int i = 0; i < LBQ_PANEL; i++)
        y[i] = round_one(x[i], direction);
}

/* At least 2^-24. */
static double
scale_from(double x)
{
    const double half = lbq_half_widen(round_one(x, 1));
    return half > 0x1p-24 ? half : 0x1p-24;
}

void
lbq_cover_f16_portable(const float *low, const float *high, double clip, int top, float *scale,
                       float *offset)
{
    for (int l = 0; l < LBQ_PANEL; l++) {
        const double least = clip * (double)low[l] + 0.0; /* a range may begin with -0 or with 0 */
        const double most = clip * (double)high[l], from = lbq_half_widen(round_one(least, -1));
        double step = scale_from((most - least) / top);
        if (from + top * step < most)
            step = scale_from((most - from) / top);
        scale[l] = (float)step;
        offset[l] = (float)from;
    }
}
