/* Levels are rounded to multiples of 1/127 of the largest, as activations are, and 128 is added
 * because the integer kernels take unsigned codes. */
#include "linear/levels.h"

#include <math.h>

lbq_byte_levels
lbq_byte_levels_of(const lbq_packed *packed)
{
    const float *const levels = packed->levels;
    if (!levels)
        return (lbq_byte_levels){.step = 1};
    if (packed->bits == 1)
        return (lbq_byte_levels){.base = levels[0], .step = levels[1] - levels[0]};
    const int count = 1 << packed->bits;
    float largest = 0;
    for (int i = 0; i < count; i++)
        largest = fmaxf(largest, fabsf(levels[i]));
    const float step = largest / 127;
    lbq_byte_levels result = {.lookup = true, .base = -128 * step, .step = step};
    for (int i = 0; i < (int)sizeof result.bytes; i++) {
        const float share = largest > 0 ? levels[i % count] / largest : 0;
        result.bytes[i] = (uint8_t)(128 + lrintf(127 * share));
    }
    return result;
}
