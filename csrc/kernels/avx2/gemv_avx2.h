/* Partial sums y of a panel, and the next step to add. */
#ifndef LBQ_GEMV_AVX2_H
#define LBQ_GEMV_AVX2_H

#include "kernels/avx2/panel_avx2.h"

/* Partial sums y of some tokens, [half][token], and the factors of the next step: the panel's
 * scales, followed by its offsets, and those of the first of these tokens, in activations of width
 * `width`. */
typedef struct {
    __m256 y[2][4];
    const uint8_t *scale;
    const float *factors;
    ptrdiff_t width;
} progress;

LBQ_INLINE progress
start(const lbq_panel *panel, const float *factors, const ptrdiff_t width, const int tokens)
{
    progress sum = {.scale = panel->scale, .factors = factors, .width = width};
    for (int t = 0; t < tokens; t++)
        sum.y[0][t] = sum.y[1][t] = _mm256_setzero_ps();
    return sum;
}

/* Adds the integer sums of a step, [half][token], to the halves of y, starting at `first`. */
LBQ_INLINE void
add_sums(progress *to, const lbq_panel *panel, const int tokens, const int first, const int halves,
         const __m256i *dot)
{
    __m256 scale[2];
    if (LBQ_LIKELY(panel->scale_bits == 16))
        for (int h = 0; h < halves; h++)
            scale[h] = load_half(to->scale + 2 * HALF * (first + h));
    else
        for (int h = 0; h < halves; h++)
            scale[h] = load_scale(panel, to->scale, first + h);
    for (int h = 0; h < halves; h++)
        for (int t = 0; t < tokens; t++) {
            __m256 *const y = &to->y[first + h][t];
            *y = add_step(to->factors + t, to->width, scale[h], dot[h * tokens + t], *y);
        }
    if (LBQ_LIKELY(panel->has_offset))
        for (int h = 0; h < halves; h++) {
            const uint8_t *const at = to->scale + 2 * LBQ_PANEL + 2 * HALF * (first + h);
            const __m256 offset = load_half(at);
            for (int t = 0; t < tokens; t++) {
                __m256 *const y = &to->y[first + h][t];
                *y = add_offset(to->factors + t, to->width, offset, *y);
            }
        }
    if (first + halves == 2) {
        to->scale += panel->scale_stride;
        to->factors += 3 * to->width;
    }
}

LBQ_INLINE void
store(const progress *sum, const int tokens, float *y)
{
    for (int t = 0; t < tokens; t++)
        for (int h = 0; h < 2; h++)
            _mm256_storeu_ps(y + t * LBQ_PANEL + h * HALF, sum->y[h][t]);
}

#endif
