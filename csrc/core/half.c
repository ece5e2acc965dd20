/* Conversions in integer arithmetic, the same on every machine. */
#include "core/half.h"

#include <math.h>
#include <string.h>

#include "core/threads.h"

enum { CHUNK = 1 << 16 };

static inline uint32_t
bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float
float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

float
lbq_half_widen(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    const uint32_t magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) /* infinity, NaN */
        return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude < 0x0400) { /* zero, subnormal: magnitude * 2^-24 */
        const float value = (float)magnitude * 0x1p-24f;
        return float_of(sign | bits_of(value));
    }
    return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

uint16_t
lbq_half_narrow(float value)
{
    const uint32_t bits = bits_of(value);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return sign | 0x7e00;
    if (magnitude >= 0x477ff000) /* rounds to 65536 or more */
        return sign | 0x7c00;
    if (magnitude < 0x38800000) { /* below 2^-14: adding 0.5 rounds to units of 2^-24 */
        const float shifted = float_of(magnitude) + 0.5f;
        return sign | (uint16_t)(bits_of(shifted) - bits_of(0.5f));
    }
    const uint32_t odd = magnitude >> 13 & 1;
    return sign | (uint16_t)((magnitude - (112u << 23) + 0xfff + odd) >> 13);
}

float
lbq_half_round(float value, int direction)
{
    const float largest = 65504;
    if (fabsf(value) >= largest)
        return copysignf(largest, value);
    const uint16_t half = lbq_half_narrow(value);
    const float near = lbq_half_widen(half);
    if (direction == 0 || near == value || (near > value) == (direction > 0))
        return near;
    if (near == 0)
        return direction > 0 ? 0x1p-24f : -0x1p-24f;
    return lbq_half_widen((near > 0) == (direction > 0) ? half + 1 : half - 1);
}

typedef struct {
    const void *in;
    void *out;
    ptrdiff_t count;
} conversion;

#define CONVERT(name, from, to, expression)                                                        \
    static lbq_status name##_task(void *context, ptrdiff_t index, int worker)                      \
    {                                                                                              \
        (void)worker;                                                                              \
        const conversion *const c = context;                                                       \
        const ptrdiff_t end = (index + 1) * CHUNK < c->count ? (index + 1) * CHUNK : c->count;     \
        for (ptrdiff_t i = index * CHUNK; i < end; i++) {                                          \
            const from value = ((const from *)c->in)[i];                                           \
            ((to *)c->out)[i] = (expression);                                                      \
        }                                                                                          \
        return LBQ_OK;                                                                             \
    }                                                                                              \
    lbq_status name(const from *in, ptrdiff_t count, to *out)                                      \
    {                                                                                              \
        conversion c = {.in = in, .out = out, .count = count};                                     \
        return lbq_parallel(lbq_pieces(count, CHUNK), name##_task, &c);                            \
    }

CONVERT(lbq_half_to_float, uint16_t, float, lbq_half_widen(value))
CONVERT(lbq_bfloat_to_float, uint16_t, float, float_of((uint32_t)value << 16))
CONVERT(lbq_float_to_half, float, uint16_t, lbq_half_narrow(value))
