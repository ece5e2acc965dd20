/* Codes to bytes, bytes to the bytes of a table, and to float32 values. */
#include <math.h>

#include "kernels/portable/portable.h"

void
lbq_unpack_u1_portable(const uint8_t *codes, ptrdiff_t columns, uint8_t *out)
{
    lbq_step_unpack(1, codes, columns, out);
}

void
lbq_unpack_u2_portable(const uint8_t *codes, ptrdiff_t columns, uint8_t *out)
{
    lbq_step_unpack(2, codes, columns, out);
}

void
lbq_unpack_u3_portable(const uint8_t *codes, ptrdiff_t columns, uint8_t *out)
{
    lbq_step_unpack(3, codes, columns, out);
}

void
lbq_unpack_u4_portable(const uint8_t *codes, ptrdiff_t columns, uint8_t *out)
{
    lbq_step_unpack(4, codes, columns, out);
}

void
lbq_lookup_u8_portable(const uint8_t bytes[16], ptrdiff_t count, uint8_t *codes)
{
    for (ptrdiff_t i = 0; i < count; i++)
        codes[i] = bytes[codes[i]];
}

void
lbq_decode_f32_portable(const uint8_t *codes, ptrdiff_t columns, const float *levels,
                        const float *scale, const float *offset, ptrdiff_t stride, float *w)
{
    for (ptrdiff_t k = 0; k < columns; k++)
        for (int r = 0; r < LBQ_PANEL; r++) {
            const uint8_t code = codes[(k / 4 * LBQ_PANEL + r) * 4 + k % 4];
            const float level = levels ? levels[code] : (float)code;
            w[k * stride + r] = fmaf(scale[r], level, offset[r]);
        }
}
