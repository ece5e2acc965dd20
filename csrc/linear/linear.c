/* Forward pass of linear layers: rotate their input, then one of three products.
 *
 * Dense weights go to BLAS. Packed ones with float32 activations are decoded a few panels at a
 * time and go to BLAS too: the reference. Packed ones with integer activations (quantized.c) are
 * the fast path, which rotates token by token as it quantizes. */
#include "linear/linear.h"

#include <assert.h>
#include <string.h>

#include "core/blas.h"
#include "core/memory.h"
#include "core/threads.h"
#include "kernels/kernels.h"
#include "linear/quantized.h"

lbq_status
lbq_linear_check(const lbq_linear *layer)
{
    const lbq_rotation *const rotation = layer->rotation;
    LBQ_REQUIRE(layer->rows >= 1 && layer->rows <= INT32_MAX && layer->cols >= 1 &&
                    layer->cols <= INT32_MAX,
                LBQ_BAD_SHAPE,
                "a layer of %td x %td, expected sizes of 1 to 2^31 - 1",
                layer->rows,
                layer->cols);
    LBQ_REQUIRE(!rotation || rotation->n == layer->cols,
                LBQ_BAD_SHAPE,
                "the rotation has order %td, but the layer has %td columns",
                rotation->n,
                layer->cols);
    const int activation_bits = layer->activation_bits;
    LBQ_REQUIRE(activation_bits == 0 || activation_bits == 4 || activation_bits == 8,
                LBQ_BAD_VALUE,
                "activation_bits is %d, expected 0, 4 or 8",
                activation_bits);
    LBQ_REQUIRE(!activation_bits || !layer->dense,
                LBQ_BAD_VALUE,
                "activation_bits is %d, but a dense layer takes float32 activations",
                activation_bits);
    if (layer->dense)
        return LBQ_OK;
    lbq_packed_geometry geometry;
    return lbq_packed_geometry_of(&layer->matrix.packed, &geometry);
}

/* y = x W^T + beta y for W (rows, cols). */
static void
multiply_dense(const lbq_linear *layer, ptrdiff_t tokens, const float *x, float beta, float *y)
{
    const int rows = (int)layer->rows, cols = (int)layer->cols;
    if (tokens == 1)
        BLAS(cblas_sgemv)(
            CblasRowMajor, CblasNoTrans, rows, cols, 1, layer->dense, cols, x, 1, beta, y, 1);
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
                          layer->dense,
                          cols,
                          beta,
                          y,
                          rows);
}

/* Panels decoded at a time: 4 MiB of float32, at most 16 panels. */
enum { DECODED_FLOATS = 1 << 20, DECODED_PANELS = 16 };

typedef struct {
    const lbq_matrix *matrix;
    const lbq_packed_geometry *geometry;
    ptrdiff_t first;  /* panel */
    ptrdiff_t stride; /* 16 * panels decoded at a time */
    float *weight;    /* (cols, stride): transposed, so that a panel's 16 rows lie together */
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
multiply_decoded(const lbq_linear *layer, ptrdiff_t tokens, const float *x, float *y)
{
    const lbq_packed *const packed = &layer->matrix.packed;
    lbq_packed_geometry geometry;
    LBQ_TRY(lbq_packed_geometry_of(packed, &geometry));
    ptrdiff_t panels = DECODED_FLOATS / LBQ_PANEL / packed->cols + 1;
    panels = panels < DECODED_PANELS ? panels : DECODED_PANELS;
    panels = lbq_pieces(panels, geometry.strip) * geometry.strip;
    panels = panels < geometry.panels ? panels : geometry.panels;
    decoding d = {&layer->matrix, &geometry, 0, panels * LBQ_PANEL, NULL};
    LBQ_TRY(lbq_allocate(sizeof(float) * (size_t)(packed->cols * d.stride), &d.weight));
    lbq_status status = LBQ_OK;
    for (; d.first < geometry.panels && status == LBQ_OK; d.first += panels) {
        const ptrdiff_t left = geometry.panels - d.first;
        const ptrdiff_t row = d.first * LBQ_PANEL, rows = packed->rows - row;
        status = lbq_parallel(lbq_smaller(left, panels) / geometry.strip, decode_strip, &d);
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
                          1,
                          y + row,
                          (int)packed->rows);
    }
    lbq_free(d.weight);
    return status;
}

static lbq_status
multiply_float(const lbq_linear *layer, ptrdiff_t tokens, const float *x, float *y)
{
    if (layer->dense && !layer->bias) {
        multiply_dense(layer, tokens, x, 0, y);
        return LBQ_OK;
    }
    const size_t row_bytes = sizeof(float) * (size_t)layer->rows;
    for (ptrdiff_t t = 0; t < tokens; t++) {
        if (layer->bias)
            memcpy(y + t * layer->rows, layer->bias, row_bytes);
        else
            memset(y + t * layer->rows, 0, row_bytes);
    }
    if (!layer->dense)
        return multiply_decoded(layer, tokens, x, y);
    multiply_dense(layer, tokens, x, 1, y);
    return LBQ_OK;
}

/* Layers that see the same activations: x after `hadamard`, where that is not NULL. */
static lbq_status
multiply(ptrdiff_t count, const lbq_linear *const *layers, const lbq_hadamard *hadamard,
         ptrdiff_t tokens, const float *x, float *const *y)
{
    if (layers[0]->activation_bits)
        return lbq_multiply_quantized(count, layers, hadamard, tokens, x, y);
    assert(!hadamard);
    for (ptrdiff_t i = 0; i < count; i++)
        LBQ_TRY(multiply_float(layers[i], tokens, x, y[i]));
    return LBQ_OK;
}

static lbq_status
rotate_and_multiply(ptrdiff_t count, const lbq_linear *const *layers, ptrdiff_t tokens,
                    const float *x, float *const *y)
{
    const lbq_rotation *const rotation = layers[0]->rotation;
    if (!rotation)
        return multiply(count, layers, NULL, tokens, x, y);
    if (layers[0]->activation_bits && !rotation->dense)
        return multiply(count, layers, &rotation->hadamard, tokens, x, y);
    const size_t bytes = sizeof(float) * (size_t)tokens * (size_t)rotation->n;
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, bytes));
    float *const rotated = lbq_arena_take(&arena, bytes);
    memcpy(rotated, x, bytes);
    lbq_status status = lbq_rotate(rotation, tokens, rotated);
    if (status == LBQ_OK)
        status = multiply(count, layers, NULL, tokens, rotated, y);
    lbq_arena_close(&arena);
    return status;
}

lbq_status
lbq_linears_forward(ptrdiff_t count, const lbq_linear *const *layers, ptrdiff_t tokens,
                    const float *x, float *const *y)
{
    LBQ_REQUIRE(tokens <= INT32_MAX, LBQ_BAD_SHAPE, "%td tokens are too many", tokens);
    if (tokens == 0)
        return LBQ_OK;
    for (ptrdiff_t first = 0, end; first < count; first = end) {
        assert(lbq_linear_check(layers[first]) == LBQ_OK);
        assert(layers[first]->cols == layers[0]->cols);
        for (end = first + 1; end < count && end < first + LBQ_SHARED; end++)
            if (!lbq_same_activations(layers[first], layers[end]))
                break;
        LBQ_TRY(rotate_and_multiply(end - first, layers + first, tokens, x, y + first));
    }
    return LBQ_OK;
}

lbq_status
lbq_linear_forward(const lbq_linear *layer, ptrdiff_t tokens, const float *x, float *y)
{
    return lbq_linears_forward(1, &layer, tokens, x, &y);
}

lbq_status
lbq_linear_rows(const lbq_linear *layer, ptrdiff_t count, const int32_t *row, float *weight)
{
    const ptrdiff_t cols = layer->cols;
    if (!layer->dense)
        LBQ_TRY(lbq_matrix_rows(&layer->matrix, count, row, weight));
    for (ptrdiff_t i = 0; layer->dense && i < count; i++)
        memcpy(weight + i * cols, layer->dense + row[i] * cols, (size_t)cols * sizeof(float));
    return layer->rotation ? lbq_rotate_back(layer->rotation, count, weight) : LBQ_OK;
}
