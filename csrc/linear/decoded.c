/* Dense weights go to BLAS. Packed ones are decoded first, a few panels at a time; this is the
 * reference. */
#include "linear/decoded.h"

#include "core/blas.h"
#include "core/memory.h"
#include "core/threads.h"

/* The product with one token; a task takes some rows. */
typedef struct {
    const lbq_copy *copy;
    const float *x;
    float beta, *y;
} vector_product;

enum { VECTOR_ROWS = 256 /* 0.2 ms for 4096 columns from memory */ };

static lbq_status
multiply_vector(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const vector_product *const p = context;
    const ptrdiff_t row = index * VECTOR_ROWS, cols = p->copy->cols;
    LBQ_CBLAS(sgemv,
              CblasNoTrans,
              (int)lbq_smaller(VECTOR_ROWS, p->copy->rows - row),
              (int)cols,
              1,
              p->copy->dense + row * cols,
              (int)cols,
              p->x,
              1,
              p->beta,
              p->y + row,
              1);
    return LBQ_OK;
}

/* y = x W^T + beta y for W (rows, cols). */
static lbq_status
multiply_dense(const lbq_copy *copy, ptrdiff_t tokens, const float *x, float beta, float *y)
{
    const ptrdiff_t rows = copy->rows, cols = copy->cols;
    if (tokens == 1) {
        vector_product p = {.copy = copy, .x = x, .beta = beta, .y = y};
        return lbq_parallel(lbq_pieces(rows, VECTOR_ROWS), multiply_vector, &p);
    }
    return lbq_sgemm(
        CblasNoTrans, CblasTrans, tokens, rows, cols, 1, x, cols, copy->dense, cols, beta, y, rows);
}

/* Panels decoded at a time: 4 MiB of float32, at most 16 panels. */
enum { DECODED_FLOATS = 1 << 20, DECODED_PANELS = 16 };

typedef struct {
    const lbq_matrix *matrix;
    const lbq_packed_geometry *geometry;
    ptrdiff_t first;  /* panel */
    ptrdiff_t stride; /* 16 * panels decoded at a time */
    float *weight;    /* (cols, stride): transposed, so that a panel's 16 rows are adjacent */
} decoding;

static lbq_status
decode_strip(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const decoding *const d = context;
    const lbq_packed_geometry *const g = d->geometry;
    const ptrdiff_t panel = index * g->strip;
    for (ptrdiff_t s = 0; s < g->steps; s++)
        lbq_matrix_values(d->matrix,
                          g,
                          d->first + panel,
                          s,
                          d->stride,
                          d->weight + s * g->step * d->stride + panel * LBQ_PANEL);
    return LBQ_OK;
}

static lbq_status
multiply_decoded(const lbq_matrix *matrix, ptrdiff_t tokens, const float *x, float beta, float *y)
{
    const lbq_packed *const packed = &matrix->packed;
    lbq_packed_geometry geometry;
    LBQ_TRY(lbq_packed_geometry_of(packed, &geometry));
    ptrdiff_t panels = DECODED_FLOATS / LBQ_PANEL / packed->cols + 1;
    panels = panels < DECODED_PANELS ? panels : DECODED_PANELS;
    panels = lbq_pieces(panels, geometry.strip) * geometry.strip;
    panels = panels < geometry.panels ? panels : geometry.panels;
    decoding d = {matrix, &geometry, 0, panels * LBQ_PANEL, NULL};
    LBQ_TRY(lbq_allocate(sizeof(float) * (size_t)(packed->cols * d.stride), &d.weight));
    lbq_status status = LBQ_OK;
    for (; d.first < geometry.panels && status == LBQ_OK; d.first += panels) {
        const ptrdiff_t left = geometry.panels - d.first;
        const ptrdiff_t row = d.first * LBQ_PANEL, rows = packed->rows - row;
        status = lbq_parallel(lbq_smaller(left, panels) / geometry.strip, decode_strip, &d);
        if (status == LBQ_OK)
            status = lbq_sgemm(CblasNoTrans,
                               CblasNoTrans,
                               tokens,
                               lbq_smaller(rows, d.stride),
                               packed->cols,
                               1,
                               x,
                               packed->cols,
                               d.weight,
                               d.stride,
                               beta,
                               y + row,
                               packed->rows);
    }
    lbq_free(d.weight);
    return status;
}

lbq_status
lbq_multiply_float(const lbq_copy *copy, ptrdiff_t tokens, const float *x, float beta, float *y)
{
    return copy->dense ? multiply_dense(copy, tokens, x, beta, y)
                       : multiply_decoded(&copy->matrix, tokens, x, beta, y);
}
