/* Dense weights go to BLAS. Packed ones are decoded a few panels at a time and go to BLAS too: the
 * reference. */
#include "linear/decoded.h"

#include "core/blas.h"
#include "core/memory.h"
#include "core/threads.h"
#include "kernels/kernels.h"
#include "linear/quantized.h"

/* y = x W^T + beta y for W (rows, cols). */
static void
multiply_dense(const lbq_copy *copy, ptrdiff_t tokens, const float *x, float beta, float *y)
{
    const int rows = (int)copy->rows, cols = (int)copy->cols;
    if (tokens == 1)
        BLAS(cblas_sgemv)(
            CblasRowMajor, CblasNoTrans, rows, cols, 1, copy->dense, cols, x, 1, beta, y, 1);
    else
        BLAS(cblas_sgemm)(CblasRowMajor,
                          CblasNoTrans,
                          CblasTrans,
                          (int)tokens,
                          rows,
                          cols,
                          1,
                          x,
                          cols,
                          copy->dense,
                          cols,
                          beta,
                          y,
                          rows);
}

/* Panels decoded at a time: 4 MiB of float32, at most 16 panels. */
enum { DECODED_FLOATS = 1 << 20, DECODED_PANELS = 16 };

typedef struct {
    const lbq_packed *packed;
    const lbq_packed_geometry *geometry;
    ptrdiff_t first;  /* panel */
    ptrdiff_t stride; /* 16 * panels decoded at a time */
    float *weight;    /* (cols, stride): transposed, so that a panel's 16 rows lie together */
} decoding;

static lbq_status
decode_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const decoding *const d = context;
    const lbq_packed *const packed = d->packed;
    const lbq_panel panel = lbq_packed_panel(packed, d->geometry, d->first + index);
    for (ptrdiff_t s = 0; s < panel.steps; s++) {
        uint8_t codes[LBQ_MAX_STEP * LBQ_PANEL];
        float scale[LBQ_PANEL], offset[LBQ_PANEL];
        lbq_step_unpack_fast(packed->bits, panel.codes + s * panel.step_bytes, panel.step, codes);
        lbq_panel_scale(&panel, s, scale);
        lbq_panel_offset(&panel, s, offset);
        const ptrdiff_t begin = s * panel.step, left = packed->cols - begin;
        lbq_kernel.decode_f32(codes,
                              left < panel.step ? left : panel.step,
                              packed->levels,
                              scale,
                              offset,
                              d->stride,
                              d->weight + begin * d->stride + index * LBQ_PANEL);
    }
    return LBQ_OK;
}

static lbq_status
multiply_decoded(const lbq_packed *packed, ptrdiff_t tokens, const float *x, float beta, float *y)
{
    lbq_packed_geometry geometry;
    LBQ_TRY(lbq_packed_geometry_of(packed, &geometry));
    ptrdiff_t panels = DECODED_FLOATS / LBQ_PANEL / packed->cols + 1;
    panels = panels < DECODED_PANELS ? panels : DECODED_PANELS;
    panels = panels < geometry.panels ? panels : geometry.panels;
    decoding d = {packed, &geometry, 0, panels * LBQ_PANEL, NULL};
    LBQ_TRY(lbq_allocate(sizeof(float) * (size_t)(packed->cols * d.stride), &d.weight));
    lbq_status status = LBQ_OK;
    for (; d.first < geometry.panels && status == LBQ_OK; d.first += panels) {
        const ptrdiff_t left = geometry.panels - d.first;
        const ptrdiff_t row = d.first * LBQ_PANEL, rows = packed->rows - row;
        status = lbq_parallel(left < panels ? left : panels, decode_task, &d);
        BLAS(cblas_sgemm)(CblasRowMajor,
                          CblasNoTrans,
                          CblasNoTrans,
                          (int)tokens,
                          (int)(rows < d.stride ? rows : d.stride),
                          (int)packed->cols,
                          1,
                          x,
                          (int)packed->cols,
                          d.weight,
                          (int)d.stride,
                          beta,
                          y + row,
                          (int)packed->rows);
    }
    lbq_free(d.weight);
    return status;
}

lbq_status
lbq_multiply_float(const lbq_copy *copy, ptrdiff_t tokens, const float *x, float beta, float *y)
{
    if (!copy->dense)
        return multiply_decoded(&copy->packed, tokens, x, beta, y);
    multiply_dense(copy, tokens, x, beta, y);
    return LBQ_OK;
}
