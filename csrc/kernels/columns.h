/* Columns to lanes and back, one at a time: for columns that are not adjacent. */
#ifndef LBQ_COLUMNS_H
#define LBQ_COLUMNS_H

#include "kernels/kernels.h"

/* to_lanes_f32 and from_lanes_u8 of list.h. */
static inline void
lbq_columns_to_lanes(const float *w, ptrdiff_t stride, ptrdiff_t rows, const int64_t *columns,
                     const int64_t *place, ptrdiff_t count, float *lanes)
{
    for (ptrdiff_t i = 0; i < count; i++) {
        const float *const from = w + (columns ? columns[i] : i);
        float *const to = lanes + (place ? place[i] : i) * LBQ_PANEL;
        for (ptrdiff_t r = 0; r < LBQ_PANEL; r++)
            to[r] = r < rows ? from[r * stride] : 0;
    }
}

static inline void
lbq_lanes_to_columns(const uint8_t *lanes, const int64_t *columns, const int64_t *place,
                     ptrdiff_t count, ptrdiff_t rows, ptrdiff_t stride, uint8_t *codes)
{
    for (ptrdiff_t i = 0; i < count; i++)
        for (ptrdiff_t r = 0; r < rows; r++)
            codes[r * stride + columns[i]] = lanes[place[i] * LBQ_PANEL + r];
}

#endif
