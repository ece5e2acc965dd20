/* Ranges, grids and codes of a panel's rows. */
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "core/half.h"
#include "core/pack.h"
#include "kernels/portable/portable.h"

int
lbq_range_f32_portable(const float *w, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t count,
                       float limit, float *low, float *high)
{
    bool within = true;
    for (ptrdiff_t r = 0; r < LBQ_PANEL; r++) {
        const float *const row = w + (r < rows ? r : rows - 1) * stride;
        float least = row[0], most = row[0];
        for (ptrdiff_t k = 0; k < count; k++) {
            least = row[k] < least ? row[k] : least;
            most = row[k] > most ? row[k] : most;
            within &= fabsf(row[k]) <= limit;
        }
        low[r] = least;
        high[r] = most;
    }
    return within;
}

void
lbq_cover_f16_portable(const float *low, const float *high, const lbq_cover *cover, float *grid)
{
    for (int l = 0; l < LBQ_PANEL; l++) {
        const float least = cover->clip * low[l] + 0.0f; /* turns -0, a possible minimum, into 0 */
        const float most = cover->clip * high[l];
        const float start = cover->has_offset ? lbq_half_round(least, -1) : 0;
        const float up = (most - start) / cover->above, down = (start - least) / cover->below;
        const float scale = lbq_half_round(up > down ? up : down, 1);
        grid[l] = scale > 0x1p-24f ? scale : 0x1p-24f;
        grid[LBQ_PANEL + l] = start - cover->zero * grid[l];
    }
}

void
lbq_encode_f32_portable(const float *w, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t count,
                        const float *grid, int top, ptrdiff_t ahead, uint8_t *codes)
{
    (void)ahead;
    const float limit = (float)top;
    memset(codes, 0, (size_t)((count + 15) / 16 * 16 * LBQ_PANEL));
    for (ptrdiff_t r = 0; r < rows; r++) {
        const float inverse = grid[r] != 0 ? 1 / grid[r] : 0, offset = grid[LBQ_PANEL + r];
        for (ptrdiff_t k = 0; k < count; k++) {
            float x = (w[r * stride + k] - offset) * inverse;
            x = x > 0 ? x : 0;
            x = x < limit ? x : limit;
            x = (x + 0x1.8p23f) - 0x1.8p23f; /* rounds, ties to even, without a call */
            codes[(k / 4 * LBQ_PANEL + r) * 4 + k % 4] = (uint8_t)(int32_t)x;
        }
    }
}

int
lbq_round_panel_portable(const float *w, ptrdiff_t stride, ptrdiff_t steps, ptrdiff_t count,
                         float limit, const lbq_cover *cover, int top, int bits, uint8_t *panel)
{
    const ptrdiff_t code_bytes = count * bits * LBQ_PANEL / 8;
    for (ptrdiff_t s = 0; s < steps; s++, w += count) {
        float low[LBQ_PANEL], high[LBQ_PANEL], grid[2 * LBQ_PANEL];
        uint16_t half[2 * LBQ_PANEL];
        uint8_t codes[LBQ_MAX_STEP * LBQ_PANEL];
        const size_t half_bytes = cover->has_offset ? sizeof half : sizeof half / 2;
        if (!lbq_range_f32_portable(w, stride, LBQ_PANEL, count, limit, low, high))
            return 0;
        lbq_cover_f16_portable(low, high, cover, grid);
        lbq_narrow_f16_portable(grid, 2 * LBQ_PANEL, half);
        lbq_encode_f32_portable(w, stride, LBQ_PANEL, count, grid, top, 0, codes);
        lbq_step_pack(bits, codes, count, panel);
        memcpy(panel + code_bytes, half, half_bytes);
        panel += code_bytes + (ptrdiff_t)half_bytes;
    }
    return 1;
}
