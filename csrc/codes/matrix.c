/* Words of packed matrices to bytes and to values, a strip at a time. */
#include "codes/matrix.h"

#include <assert.h>
#include <string.h>

#include "core/pack.h"
#include "core/threads.h"

enum { WORKSET = 1 << 16 /* weights per task: some 20 us */ };

static void
copy_u8(const uint8_t *codes, ptrdiff_t columns, uint8_t *out)
{
    memcpy(out, codes, (size_t)(columns * LBQ_PANEL));
}

/* The kernel in use that unpacks words of `bits` bits, as lbq_step_unpack does. */
static lbq_unpacker
unpacker_of(int bits)
{
    const lbq_unpacker unpack[] = {
        NULL,
        lbq_kernel.unpack_u1,
        lbq_kernel.unpack_u2,
        lbq_kernel.unpack_u3,
        lbq_kernel.unpack_u4,
    };
    return bits == 8 ? copy_u8 : unpack[bits];
}

void
lbq_matrix_words(const lbq_matrix *matrix, const lbq_packed_geometry *g, ptrdiff_t panel,
                 ptrdiff_t first, ptrdiff_t end, uint8_t *words)
{
    assert(g->strip == 1);
    const lbq_unpacker unpack = unpacker_of(matrix->packed.bits);
    const lbq_panel view = lbq_packed_panel(&matrix->packed, g, panel);
    for (ptrdiff_t s = first; s < end; s++, words += g->step * LBQ_PANEL)
        unpack(view.codes + s * g->step_bytes, g->step, words);
}

void
lbq_matrix_bytes(const lbq_matrix *matrix, const lbq_packed_geometry *g, ptrdiff_t panel,
                 ptrdiff_t first, ptrdiff_t end, uint8_t *bytes)
{
    const lbq_code *const code = matrix->code;
    const ptrdiff_t step_bytes = g->step * LBQ_PANEL, pitch = (end - first) * step_bytes;
    if (code->kind->read) {
        const lbq_panel view = lbq_packed_panel(&matrix->packed, g, panel);
        for (ptrdiff_t s = first; s < end; s++, bytes += step_bytes)
            code->kind->read(
                code, view.codes + s * g->step_bytes, g->panel_bytes, g->step, pitch, bytes);
        return;
    }
    lbq_matrix_words(matrix, g, panel, first, end, bytes);
    if (code->kind->expand)
        code->kind->expand(code, (end - first) * g->step, bytes);
}

void
lbq_matrix_decode(const lbq_matrix *matrix, const lbq_packed_geometry *geometry, ptrdiff_t panel,
                  ptrdiff_t step, const float *lanes, ptrdiff_t stride, float *w)
{
    const lbq_code *const code = matrix->code;
    const ptrdiff_t rows = geometry->strip * LBQ_PANEL;
    const ptrdiff_t left = matrix->packed.cols - step * geometry->step;
    const ptrdiff_t columns = lbq_smaller(geometry->step, left);
    uint8_t bytes[LBQ_MAX_STEP * LBQ_STRIP];
    if (code->levels)
        lbq_matrix_words(matrix, geometry, panel, step, step + 1, bytes);
    else
        lbq_matrix_bytes(matrix, geometry, panel, step, step + 1, bytes);
    for (ptrdiff_t r = 0; r < rows; r += LBQ_PANEL)
        lbq_kernel.decode_f32(bytes + r * geometry->step,
                              columns,
                              code->levels,
                              lanes + r,
                              lanes + rows + r,
                              stride,
                              w + r);
}

void
lbq_matrix_values(const lbq_matrix *matrix, const lbq_packed_geometry *geometry, ptrdiff_t panel,
                  ptrdiff_t step, ptrdiff_t stride, float *w)
{
    float lanes[2 * LBQ_STRIP];
    float *const scale = lanes, *const offset = lanes + geometry->strip * LBQ_PANEL;
    for (ptrdiff_t p = 0; p < geometry->strip; p++) {
        const lbq_panel view = lbq_packed_panel(&matrix->packed, geometry, panel + p);
        lbq_panel_scale(&view, step, scale + p * LBQ_PANEL);
        lbq_panel_offset(&view, step, offset + p * LBQ_PANEL);
    }
    lbq_matrix_decode(matrix, geometry, panel, step, lanes, stride, w);
}

/* --- values of whole rows --------------------------------------------------------------------- */

/* A matrix with the scales and offsets stored, or with others. */
typedef struct {
    const lbq_matrix *matrix;
    lbq_packed_geometry geometry;
    const float *scale, *offset; /* (rows, groups); scale NULL: those stored; offset NULL: -zero *
                                    scale */
    ptrdiff_t strips_per_task;
    float *weight;
} dequantization;

/* Values of the `rows` rows from `first`, the beginning of a strip, with other scales and offsets.
 */
static void
compose_step(const dequantization *d, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t step, float *w)
{
    const lbq_matrix *const matrix = d->matrix;
    const ptrdiff_t groups = lbq_matrix_groups(matrix), group = lbq_matrix_group_of(matrix, step);
    const ptrdiff_t lane_count = d->geometry.strip * LBQ_PANEL;
    float lanes[2 * LBQ_STRIP] = {0};
    for (ptrdiff_t r = 0; r < rows; r++) {
        const ptrdiff_t at = (first + r) * groups + group;
        lanes[r] = d->scale[at];
        lanes[lane_count + r] = d->offset ? d->offset[at] : -matrix->packed.zero * d->scale[at];
    }
    lbq_matrix_decode(matrix, &d->geometry, first / LBQ_PANEL, step, lanes, lane_count, w);
}

/* The rows [row, row + rows) of a strip, to weight (rows, cols); row = 0 if there is a scale. */
static void
values_of_rows(const dequantization *d, ptrdiff_t strip, ptrdiff_t row, ptrdiff_t rows,
               float *weight)
{
    const lbq_packed_geometry *const g = &d->geometry;
    const ptrdiff_t cols = d->matrix->packed.cols, lanes = g->strip * LBQ_PANEL;
    for (ptrdiff_t s = 0; s < g->steps; s++) {
        float w[LBQ_MAX_STEP * LBQ_STRIP];
        if (d->scale)
            compose_step(d, strip * lanes, rows, s, w);
        else
            lbq_matrix_values(d->matrix, g, strip * g->strip, s, lanes, w);
        const ptrdiff_t begin = s * g->step, count = lbq_smaller(g->step, cols - begin);
        for (ptrdiff_t r = 0; r < rows; r++)
            for (ptrdiff_t k = 0; k < count; k++)
                weight[r * cols + begin + k] = w[k * lanes + row + r];
    }
}

static lbq_status
dequantize_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const dequantization *const d = context;
    const lbq_packed *const packed = &d->matrix->packed;
    const ptrdiff_t lanes = d->geometry.strip * LBQ_PANEL;
    const ptrdiff_t begin = index * d->strips_per_task;
    for (ptrdiff_t i = begin; i < begin + d->strips_per_task; i++) {
        const ptrdiff_t first = i * lanes, rows = lbq_smaller(lanes, packed->rows - first);
        if (rows > 0)
            values_of_rows(d, i, 0, rows, d->weight + first * packed->cols);
    }
    return LBQ_OK;
}

lbq_status
lbq_matrix_compose(const lbq_matrix *matrix, const float *scale, const float *offset, float *weight)
{
    dequantization d = {.matrix = matrix, .scale = scale, .offset = offset, .weight = weight};
    LBQ_TRY(lbq_packed_geometry_of(&matrix->packed, &d.geometry));
    const ptrdiff_t lanes = d.geometry.strip * LBQ_PANEL;
    d.strips_per_task = WORKSET / lanes / matrix->packed.cols + 1;
    const ptrdiff_t strips = lbq_pieces(matrix->packed.rows, lanes);
    return lbq_parallel(lbq_pieces(strips, d.strips_per_task), dequantize_task, &d);
}

lbq_status
lbq_matrix_dequantize(const lbq_matrix *matrix, float *weight)
{
    return lbq_matrix_compose(matrix, NULL, NULL, weight);
}

lbq_status
lbq_matrix_rows(const lbq_matrix *matrix, ptrdiff_t count, const int32_t *row, float *weight)
{
    dequantization d = {.matrix = matrix};
    LBQ_TRY(lbq_packed_geometry_of(&matrix->packed, &d.geometry));
    const ptrdiff_t lanes = d.geometry.strip * LBQ_PANEL;
    for (ptrdiff_t i = 0; i < count; i++) {
        assert(row[i] >= 0 && row[i] < matrix->packed.rows);
        float *const to = weight + i * matrix->packed.cols;
        values_of_rows(&d, row[i] / lanes, row[i] % lanes, 1, to);
    }
    return LBQ_OK;
}
