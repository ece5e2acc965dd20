/* Packed panels times int8 activations of a few tokens: the order of every operation. */
#include <math.h>
#include <string.h>

#include "kernels/portable/gemv_portable.h"
#include "kernels/portable/portable.h"

void
lbq_add_step_portable(const lbq_panel *panel, ptrdiff_t step, const uint8_t *codes,
                      const lbq_activations *x, float *y)
{
    float scale[LBQ_PANEL], offset[LBQ_PANEL];
    lbq_panel_scale(panel, step, scale);
    if (panel->has_offset)
        lbq_panel_offset(panel, step, offset);
    const int8_t *const values = x->values + step * panel->step * x->width;
    for (ptrdiff_t t = 0; t < x->width; t++) {
        int32_t dot[LBQ_PANEL] = {0};
        for (ptrdiff_t k = 0; k < panel->step; k += 4) {
            const uint8_t *const code = codes + k * LBQ_PANEL;
            const int8_t *const q = values + k * x->width + 4 * t;
            for (int r = 0; r < LBQ_PANEL; r++)
                for (int i = 0; i < 4; i++)
                    dot[r] += code[4 * r + i] * q[i];
        }
        const float *const factors = x->factors + 3 * step * x->width + t;
        const float x_scale = factors[0], total = factors[x->width], shift = factors[2 * x->width];
        for (int r = 0; r < LBQ_PANEL; r++) {
            float *const sum = &y[t * LBQ_PANEL + r];
            *sum = fmaf(scale[r], fmaf(x_scale, (float)dot[r], shift), *sum);
            if (panel->has_offset)
                *sum = fmaf(offset[r], total, *sum);
        }
    }
}

static void
gemv(int bits, const uint8_t *bytes, const lbq_panel *panel, const lbq_activations *x, float *y)
{
    uint8_t codes[LBQ_MAX_STEP * LBQ_PANEL];
    memset(y, 0, sizeof(float) * (size_t)(LBQ_PANEL * x->width));
    for (ptrdiff_t s = 0; s < panel->steps; s++) {
        lbq_step_unpack(bits, panel->codes + s * panel->step_bytes, panel->step, codes);
        if (bytes)
            lbq_lookup_u8_portable(bytes, panel->step * LBQ_PANEL, codes);
        lbq_add_step_portable(panel, s, codes, x, y);
    }
}

void
lbq_gemv_u1_i8_portable(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv(1, NULL, panel, x, y);
}

void
lbq_gemv_u2_i8_portable(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv(2, NULL, panel, x, y);
}

void
lbq_gemv_u3_i8_portable(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv(3, NULL, panel, x, y);
}

void
lbq_gemv_u4_i8_portable(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv(4, NULL, panel, x, y);
}

void
lbq_gemv_u8_i8_portable(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv(8, NULL, panel, x, y);
}

void
lbq_gemv_t2_i8_portable(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv(2, panel->bytes, panel, x, y);
}

void
lbq_gemv_t3_i8_portable(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv(3, panel->bytes, panel, x, y);
}

void
lbq_gemv_t4_i8_portable(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv(4, panel->bytes, panel, x, y);
}

void
lbq_gemm_u8_i8_portable(const lbq_panel *panel, ptrdiff_t count, int bits, const uint8_t *codes,
                        ptrdiff_t first, ptrdiff_t end, const lbq_activations *x, float *y)
{
    (void)bits;
    if (first == 0)
        memset(y, 0, sizeof(float) * (size_t)(LBQ_PANEL * LBQ_TILE * count));
    for (ptrdiff_t p = 0; p < count; p++, y += LBQ_TILE * LBQ_PANEL)
        for (ptrdiff_t s = first; s < end; s++, codes += panel->step * LBQ_PANEL)
            lbq_add_step_portable(&panel[p], s, codes, x, y);
}

void
lbq_store_tile_portable(const float *sums, ptrdiff_t count, ptrdiff_t tokens, ptrdiff_t stride,
                        float *y)
{
    for (ptrdiff_t p = 0; p < count; p++)
        for (ptrdiff_t t = 0; t < tokens; t++)
            memcpy(y + t * stride + p * LBQ_PANEL,
                   sums + (p * LBQ_TILE + t) * LBQ_PANEL,
                   sizeof(float) * LBQ_PANEL);
}
