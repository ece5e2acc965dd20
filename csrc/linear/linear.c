/* Forward pass of linear layers: rotate their input, then one of three products.
 *
 * Dense weights go to BLAS. Packed ones with float32 activations are decoded a few panels at a
 * time and go to BLAS too: the reference. Packed ones with integer activations (quantized.c) are
 * the fast path, which rotates token by token as it quantizes. */
#include "linear/linear.h"

#include <assert.h>
#include <math.h>
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
    const lbq_packed *const packed = &layer->packed;
    lbq_packed_geometry geometry;
    LBQ_TRY(lbq_packed_geometry_of(packed, &geometry));
    for (int i = 0; packed->levels && i < 1 << packed->bits; i++)
        LBQ_REQUIRE(isfinite(packed->levels[i]),
                    LBQ_BAD_VALUE,
                    "levels has %g, expected finite numbers",
                    (double)packed->levels[i]);
    return LBQ_OK;
}

/* The product of one token: a task takes some rows. */
typedef struct {
    const lbq_linear *layer;
    const float *x;
    float beta, *y;
} vector_product;

enum { VECTOR_ROWS = 256 /* 0.2 ms for 4096 columns from memory */ };

static lbq_status
multiply_vector(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const vector_product *const p = context;
    const ptrdiff_t row = index * VECTOR_ROWS, cols = p->layer->cols;
    LBQ_BLAS(cblas_sgemv,
             CblasRowMajor,
             CblasNoTrans,
             (int)lbq_smaller(VECTOR_ROWS, p->layer->rows - row),
             (int)cols,
             1,
             p->layer->dense + row * cols,
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
multiply_dense(const lbq_linear *layer, ptrdiff_t tokens, const float *x, float beta, float *y)
{
    const ptrdiff_t rows = layer->rows, cols = layer->cols;
    if (tokens == 1) {
        vector_product p = {.layer = layer, .x = x, .beta = beta, .y = y};
        return lbq_parallel(lbq_pieces(rows, VECTOR_ROWS), multiply_vector, &p);
    }
    return lbq_sgemm(CblasNoTrans,
                     CblasTrans,
                     tokens,
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
multiply_decoded(const lbq_linear *layer, ptrdiff_t tokens, const float *x, float *y)
{
    const lbq_packed *const packed = &layer->packed;
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
                               1,
                               y + row,
                               packed->rows);
    }
    lbq_free(d.weight);
    return status;
}

static lbq_status
multiply_float(const lbq_linear *layer, ptrdiff_t tokens, const float *x, float *y)
{
    if (layer->dense && !layer->bias)
        return multiply_dense(layer, tokens, x, 0, y);
    const size_t row_bytes = sizeof(float) * (size_t)layer->rows;
    for (ptrdiff_t t = 0; t < tokens; t++) {
        if (layer->bias)
            memcpy(y + t * layer->rows, layer->bias, row_bytes);
        else
            memset(y + t * layer->rows, 0, row_bytes);
    }
    return layer->dense ? multiply_dense(layer, tokens, x, 1, y)
                        : multiply_decoded(layer, tokens, x, y);
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
    for (ptrdiff_t i = 0; i < count; i++) {
        float *const to = weight + i * cols;
        if (layer->dense)
            memcpy(to, layer->dense + row[i] * cols, (size_t)cols * sizeof(float));
        else
            LBQ_TRY(lbq_packed_row(&layer->packed, row[i], to));
    }
    return layer->rotation ? lbq_rotate_back(layer->rotation, count, weight) : LBQ_OK;
}
