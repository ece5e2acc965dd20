/* Ranges and codes of the rows of a panel. */
#include <math.h>
#include <stdbool.h>
#include <string.h>

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
lbq_encode_f32_portable(const float *w, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t count,
                        const float *grid, int top, uint8_t *codes)
{
    const float limit = (float)top;
    memset(codes, 0, (size_t)((count + 15) / 16 * 16 * LBQ_PANEL));
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t k = 0; k < count; k++) {
            float x = (w[r * stride + k] - grid[r]) * grid[LBQ_PANEL + r];
            x = x > 0 ? x : 0;
            x = x < limit ? x : limit;
            x = (x + 0x1.8p23f) - 0x1.8p23f; /* whole, ties to even, without a call */
            codes[(k / 4 * LBQ_PANEL + r) * 4 + k % 4] = (uint8_t)(int32_t)x;
        }
}
