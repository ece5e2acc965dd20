/* Rings of words: their levels, and their product with int8 activations. */
#include "core/ring.h"
#include "kernels/portable/gemv_portable.h"
#include "kernels/portable/portable.h"
#include "kernels/trellis.h"

enum { PANELS = LBQ_STRIP / LBQ_PANEL };

/* The numbers of one column, and the four windows that begin in the number of a lane. */
static void
windows_of(const lbq_trellis *trellis, const uint32_t number[LBQ_PANEL], int lane,
           uint32_t window[PANELS])
{
    uint64_t bits = 0;
    for (int i = 0, at = 0; at < (PANELS - 1) * trellis->bits + trellis->window; i++) {
        bits |= (uint64_t)number[(lane + i) % LBQ_PANEL] << at;
        at += PANELS * trellis->bits;
    }
    for (int p = 0; p < PANELS; p++)
        window[p] = (uint32_t)(bits >> p * trellis->bits) & ((1u << trellis->window) - 1);
}

void
lbq_expand_trellis_portable(const lbq_trellis *trellis, const uint8_t *codes, ptrdiff_t panel_bytes,
                            ptrdiff_t columns, ptrdiff_t pitch, uint8_t *bytes)
{
    const ptrdiff_t count = columns / trellis->cols, quarter = count / PANELS;
    for (ptrdiff_t c = 0; c < count; c++) {
        const uint8_t *const from = codes + c / quarter * panel_bytes;
        uint32_t number[LBQ_PANEL], window[PANELS];
        for (int lane = 0; lane < LBQ_PANEL; lane++)
            number[lane] = lbq_ring_number(trellis->bits, from, c % quarter, lane);
        for (int lane = 0; lane < LBQ_PANEL; lane++) {
            windows_of(trellis, number, lane, window);
            uint8_t *to = bytes + lbq_word_at(c * trellis->cols, lane);
            for (int p = 0; p < PANELS; p++, to += pitch)
                for (int i = 0; i < trellis->cols; i++) /* columns of a ring lie side by side */
                    to[i] = (uint8_t)lbq_trellis_level(trellis, window[p], i);
        }
    }
}

void
lbq_gemv_trellis_i8_portable(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    const ptrdiff_t pitch = panel->step * LBQ_PANEL;
    uint8_t bytes[LBQ_MAX_STEP * LBQ_STRIP];
    memset(y, 0, sizeof(float) * (size_t)(LBQ_STRIP * x->width));
    for (ptrdiff_t s = 0; s < panel->steps; s++) {
        const uint8_t *const codes = panel->codes + s * panel->step_bytes;
        lbq_expand_trellis_portable(
            panel->trellis, codes, panel->panel_bytes, panel->step, pitch, bytes);
        lbq_panel view = *panel;
        for (int p = 0; p < PANELS; p++) {
            lbq_add_step_portable(&view, s, bytes + p * pitch, x, y + p * LBQ_PANEL * x->width);
            view.scale += panel->panel_bytes;
        }
    }
}
