/* Columns of rows to lanes, and back. */
#include "kernels/columns.h"
#include "kernels/portable/portable.h"

void
lbq_to_lanes_f32_portable(const float *w, ptrdiff_t stride, ptrdiff_t rows, const int64_t *columns,
                          const int64_t *place, ptrdiff_t count, float *lanes)
{
    lbq_columns_to_lanes(w, stride, rows, columns, place, count, lanes);
}

void
lbq_from_lanes_u8_portable(const uint8_t *lanes, const int64_t *columns, const int64_t *place,
                           ptrdiff_t count, ptrdiff_t rows, ptrdiff_t stride, uint8_t *codes)
{
    lbq_lanes_to_columns(lanes, columns, place, count, rows, stride, codes);
}
