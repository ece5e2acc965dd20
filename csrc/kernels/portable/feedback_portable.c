/* GPTQ's error feedback and rounding, sixteen rows at a time; moves of coordinate descent. */
#include <string.h>

#include "kernels/portable/portable.h"

void
lbq_feedback_f32_portable(ptrdiff_t count, ptrdiff_t width, const float *R, ptrdiff_t stride,
                          const float *e, ptrdiff_t pitch, float *sum)
{
    for (ptrdiff_t j = 0; j < width; j++, sum += pitch) {
        float total[LBQ_PANEL];
        memcpy(total, sum, sizeof total);
        for (ptrdiff_t i = 0; i < count; i++)
            for (int l = 0; l < LBQ_PANEL; l++)
                total[l] += R[i * stride + j] * e[i * pitch + l];
        memcpy(sum, total, sizeof total);
    }
}

void
lbq_solve_f32_portable(ptrdiff_t count, const float *R, ptrdiff_t stride, float *x)
{
    for (ptrdiff_t j = 0; j < count; j++) {
        float total[LBQ_PANEL];
        memcpy(total, x + j * LBQ_PANEL, sizeof total);
        for (ptrdiff_t i = 0; i < j; i++)
            for (int l = 0; l < LBQ_PANEL; l++)
                total[l] -= R[i * stride + j] * x[i * LBQ_PANEL + l];
        memcpy(x + j * LBQ_PANEL, total, sizeof total);
    }
}

void
lbq_round_f32_portable(const float *grid, int top, const float *w, const float *shift,
                       uint8_t *codes, float *e)
{
    const float *const scale = grid, *const offset = grid + LBQ_PANEL;
    const float *const inverse = offset + LBQ_PANEL;
    const float limit = (float)top;
    float level[LBQ_PANEL];
    for (int l = 0; l < LBQ_PANEL; l++) {
        float x = ((w[l] + shift[l]) - offset[l]) * inverse[l];
        x = x > 0 ? x : 0;
        x = x < limit ? x : limit;
        level[l] = (x + 0x1.8p23f) - 0x1.8p23f; /* rounds, ties to even, without a call */
    }
    for (int l = 0; l < LBQ_PANEL; l++) {
        codes[l] = (uint8_t)level[l];
        e[l] = w[l] - (scale[l] * level[l] + offset[l]);
    }
}

void
lbq_add_rows_f32_portable(ptrdiff_t count, const int32_t *row, const float *factor,
                          const float *matrix, ptrdiff_t stride, ptrdiff_t width, float *y)
{
    for (ptrdiff_t i = 0; i < count; i++)
        for (ptrdiff_t c = 0; c < width; c++)
            y[c] += factor[i] * matrix[row[i] * stride + c];
}
