/* float32 to float16, one at a time. */
#include "core/half.h"
#include "kernels/portable/portable.h"

void
lbq_narrow_f16_portable(const float *x, ptrdiff_t count, uint16_t *y)
{
    for (ptrdiff_t i = 0; i < count; i++)
        y[i] = lbq_half_narrow(x[i]);
}

void
lbq_round_f16_portable(const float *x, int direction, float *y)
{
    for (int i = 0; i < LBQ_PANEL; i++)
        y[i] = lbq_half_round(x[i], direction);
}
