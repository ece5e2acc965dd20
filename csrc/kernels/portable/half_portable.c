/* float16 to float32, one at a time. */
#include "core/half.h"
#include "kernels/portable/portable.h"

void
lbq_widen_f16_portable(const uint16_t *x, ptrdiff_t count, float *y)
{
    for (ptrdiff_t i = 0; i < count; i++)
        y[i] = lbq_half_widen(x[i]);
}
