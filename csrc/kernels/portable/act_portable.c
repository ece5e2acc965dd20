/* Activations to int8, one scale per step. The largest magnitude is found on the bit patterns,
 * where NaN > infinity > every number. */
#include <math.h>
#include <string.h>

#include "kernels/portable/portable.h"

static inline uint32_t
magnitude_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x7fffffff;
}

/* Nearest integer, ties to even, for |value| < 2^22: the last bit of the sum is worth 1. */
static inline int32_t
nearest(float value)
{
    const float shifted = value + 0x1.8p23f;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return bits - 0x4b400000;
}

void
lbq_quantize_i8_portable(const float *x, ptrdiff_t cols, ptrdiff_t step, int limit, int8_t *q,
                         float *scale, float *total)
{
    for (ptrdiff_t begin = 0, s = 0; begin < cols; begin += step, s++, q += step) {
        const ptrdiff_t count = cols - begin < step ? cols - begin : step;
        memset(q, 0, (size_t)step);
        uint32_t top = 0;
        for (ptrdiff_t k = 0; k < count; k++) {
            const uint32_t bits = magnitude_bits(x[begin + k]);
            top = bits > top ? bits : top;
        }
        float largest;
        memcpy(&largest, &top, sizeof largest);
        if (!(largest >= 0x1p-100f && largest < INFINITY)) {
            scale[s] = total[s] = top >= 0x7f800000 ? NAN : 0;
            continue;
        }
        const float inverse = (float)limit / largest;
        int32_t sum = 0;
        for (ptrdiff_t k = 0; k < count; k++) {
            const int32_t code = nearest(x[begin + k] * inverse);
            q[k] = (int8_t)code;
            sum += code;
        }
        scale[s] = largest / (float)limit;
        total[s] = scale[s] * (float)sum;
    }
}

void
lbq_clip_i8_portable(const float *x, ptrdiff_t cols, ptrdiff_t step, int limit, float clip,
                     float step_scale, int8_t *q, float *scale, float *total)
{
    const float most = (float)limit;
    for (ptrdiff_t begin = 0, s = 0; begin < cols; begin += step, s++, q += step) {
        const ptrdiff_t count = cols - begin < step ? cols - begin : step;
        memset(q, 0, (size_t)step);
        uint32_t top = 0;
        for (ptrdiff_t k = 0; k < count; k++) {
            const uint32_t bits = magnitude_bits(x[begin + k]);
            top = bits > top ? bits : top;
        }
        float largest;
        memcpy(&largest, &top, sizeof largest);
        const float kept = step_scale > 0 ? step_scale * most : clip * largest;
        if (!(largest >= 0x1p-100f && largest < INFINITY)) {
            scale[s] = total[s] = top >= 0x7f800000 ? NAN : 0;
            continue;
        }
        const float inverse = most / kept;
        int32_t sum = 0;
        for (ptrdiff_t k = 0; k < count; k++) {
            float code = x[begin + k] * inverse;
            code = code > most ? most : code < -most ? -most : code;
            q[k] = (int8_t)nearest(code);
            sum += q[k];
        }
        scale[s] = kept / most;
        total[s] = scale[s] * (float)sum;
    }
}

/* Sum of a part of q[0], q[4], q[8] and q[12] over the bits of m. */
static int
subset_sum(const int8_t *q, int part, int m)
{
    int sum = 32 * part;
    for (int j = 0; j < 4; j++) {
        const int low = q[4 * j] & 15, high = (q[4 * j] - low) / 16;
        sum += (m >> j & 1) * (part ? high : low);
    }
    return sum;
}

void
lbq_subset_sums_portable(const int8_t *q, ptrdiff_t columns, uint8_t *sums)
{
    for (ptrdiff_t k = 0; k < columns; k += 32)
        for (int part = 0; part < 2; part++)
            for (int n = 0; n < 2; n++)
                for (int i = 0; i < 4; i++)
                    for (int m = 0; m < 16; m++)
                        *sums++ = (uint8_t)subset_sum(q + k + 16 * n + i, part, m);
}

void
lbq_interleave_portable(const int8_t *q, ptrdiff_t columns, ptrdiff_t width, int8_t *values)
{
    for (ptrdiff_t k = 0; k < columns; k += 4)
        for (ptrdiff_t t = 0; t < width; t++, values += 4)
            memcpy(values, q + t * columns + k, 4);
}
