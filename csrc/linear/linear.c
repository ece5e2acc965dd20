/* Forward pass of linear layers: copies with equal inputs go together through one of two products.
 *
 * Integer activations (quantized.c) are the fast path, which rotates token by token as it
 * quantizes. Float32 activations (decoded.c) are rotated first and go to BLAS. */
#include "linear/linear.h"

#include <assert.h>
#include <string.h>

#include "core/blas.h"
#include "core/memory.h"
#include "linear/decoded.h"
#include "linear/quantized.h"

/* --- checks ----------------------------------------------------------------------------------- */

static lbq_status
check_rotation(const lbq_rotation *rotation, const char *name, const char *axis, ptrdiff_t n)
{
    LBQ_REQUIRE(!rotation || rotation->n == n,
                LBQ_BAD_SHAPE,
                "the %s rotation has order %td, but the layer has %td %s",
                name,
                rotation->n,
                n,
                axis);
    return LBQ_OK;
}

lbq_status
lbq_copy_check(const lbq_copy *copy)
{
    LBQ_REQUIRE(copy->rows >= 1 && copy->rows <= INT32_MAX && copy->cols >= 1 &&
                    copy->cols <= INT32_MAX,
                LBQ_BAD_SHAPE,
                "a layer of %td x %td, expected sizes of 1 to 2^31 - 1",
                copy->rows,
                copy->cols);
    LBQ_TRY(check_rotation(copy->input, "input", "columns", copy->cols));
    LBQ_TRY(check_rotation(copy->output, "output", "rows", copy->rows));
    LBQ_TRY(lbq_activation_check(&copy->activation));
    LBQ_TRY(lbq_fake_check(&copy->fake));
    LBQ_TRY(check_rotation(copy->fake.basis, "rounding", "columns", copy->cols));
    LBQ_REQUIRE(!copy->activation.bits || !copy->dense,
                LBQ_BAD_VALUE,
                "activation_bits is %d, but a dense layer takes float32 activations",
                copy->activation.bits);
    LBQ_REQUIRE(!copy->sums || copy->activation.bits,
                LBQ_BAD_VALUE,
                "sums are given, but float32 activations have no zero point");
    if (copy->dense)
        return LBQ_OK;
    lbq_packed_geometry geometry;
    return lbq_packed_geometry_of(&copy->matrix.packed, &geometry);
}

lbq_status
lbq_linear_check(const lbq_linear *layer)
{
    LBQ_REQUIRE(layer->count >= 1, LBQ_BAD_SHAPE, "a layer has no copies, expected at least one");
    for (ptrdiff_t i = 0; i < layer->count; i++)
        LBQ_REQUIRE(layer->copies[i].rows == layer->rows && layer->copies[i].cols == layer->cols,
                    LBQ_BAD_SHAPE,
                    "copy %td is (%td, %td), the first is (%td, %td)",
                    i,
                    layer->copies[i].rows,
                    layer->copies[i].cols,
                    layer->rows,
                    layer->cols);
    return LBQ_OK;
}

bool
lbq_linear_is_float(const lbq_linear *layer)
{
    for (ptrdiff_t i = 0; i < layer->count; i++)
        if (!layer->copies[i].activation.bits)
            return true;
    return false;
}

/* --- forward ---------------------------------------------------------------------------------- */

/* Progress of a layer: y holds the sum of its copies before `next`. */
typedef struct {
    const lbq_linear *layer;
    float *y;
    ptrdiff_t next;
} progress;

/* Whether two copies multiply the same activations: equal rotation, quantizers and step. */
static bool
same_activations(const lbq_copy *a, const lbq_copy *b)
{
    if (a->activation.bits != b->activation.bits || !lbq_same_rotation(a->input, b->input) ||
        !lbq_same_fake(&a->fake, &b->fake))
        return false;
    if (!a->activation.bits)
        return true;
    return a->activation.clip == b->activation.clip && a->activation.scale == b->activation.scale &&
           !a->sums == !b->sums &&
           (!a->sums || lbq_same_float(a->activation.zero, b->activation.zero)) &&
           lbq_packed_step(&a->matrix.packed) == lbq_packed_step(&b->matrix.packed);
}

/* y (+)= weight * z, by rows. */
static void
add_weighted(ptrdiff_t tokens, ptrdiff_t rows, const float *weight, const float *z, bool add,
             float *y)
{
    for (ptrdiff_t t = 0; t < tokens; t++, y += rows, z += rows)
        for (ptrdiff_t r = 0; r < rows; r++) {
            const float value = weight ? weight[r] * z[r] : z[r];
            y[r] = add ? y[r] + value : value;
        }
}

static void
fill_rows(ptrdiff_t tokens, ptrdiff_t rows, const float *bias, float *y)
{
    for (ptrdiff_t t = 0; t < tokens; t++)
        memcpy(y + t * rows, bias, sizeof(float) * (size_t)rows);
}

/* A float term: BLAS adds to y, which already holds the bias if there is only one copy. */
static lbq_status
add_float_term(const lbq_term *term, ptrdiff_t tokens, const float *x)
{
    const lbq_copy *const copy = term->copy;
    if (!term->weight) {
        if (term->bias)
            fill_rows(tokens, copy->rows, term->bias, term->y);
        return lbq_multiply_float(copy, tokens, x, term->add || term->bias, term->y);
    }
    const size_t bytes = sizeof(float) * (size_t)tokens * (size_t)copy->rows;
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, bytes));
    float *const product = lbq_arena_take(&arena, bytes);
    const lbq_status status = lbq_multiply_float(copy, tokens, x, 0, product);
    if (status == LBQ_OK)
        add_weighted(tokens, copy->rows, term->weight, product, term->add, term->y);
    lbq_arena_close(&arena);
    return status;
}

/* Terms with equal activations, of `hadamard` x if that is not NULL, else of x. */
static lbq_status
multiply(ptrdiff_t count, const lbq_term *terms, const lbq_hadamard *hadamard, ptrdiff_t tokens,
         const float *x)
{
    if (terms[0].copy->activation.bits)
        return lbq_multiply_quantized(count, terms, hadamard, tokens, x);
    assert(!hadamard);
    for (ptrdiff_t i = 0; i < count; i++)
        LBQ_TRY(add_float_term(&terms[i], tokens, x));
    return LBQ_OK;
}

static lbq_status
rotate_and_multiply(ptrdiff_t count, const lbq_term *terms, ptrdiff_t tokens, const float *x)
{
    const lbq_copy *const copy = terms[0].copy;
    const lbq_rotation *const rotation = copy->input;
    const bool rounds = copy->fake.values;
    if (!rotation && !rounds)
        return multiply(count, terms, NULL, tokens, x);
    if (copy->activation.bits && !rounds && !rotation->dense)
        return multiply(count, terms, &rotation->hadamard, tokens, x);
    const size_t bytes = sizeof(float) * (size_t)tokens * (size_t)copy->cols;
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, bytes));
    float *const seen = memcpy(lbq_arena_take(&arena, bytes), x, bytes);
    lbq_status status = rotation ? lbq_rotate(rotation, tokens, seen) : LBQ_OK;
    if (status == LBQ_OK && rounds)
        status = lbq_fake_forward(&copy->fake, tokens, copy->cols, seen, seen);
    if (status == LBQ_OK)
        status = multiply(count, terms, NULL, tokens, seen);
    lbq_arena_close(&arena);
    return status;
}

/* The same for copies that may have output rotations: their products go to scratch, are rotated
 * back and then added. */
static lbq_status
add_terms(ptrdiff_t count, lbq_term *terms, ptrdiff_t tokens, const float *x)
{
    size_t bytes = 0;
    for (ptrdiff_t i = 0; i < count; i++)
        if (terms[i].copy->output)
            bytes += lbq_padded(sizeof(float) * (size_t)tokens * (size_t)terms[i].copy->rows);
    if (!bytes)
        return rotate_and_multiply(count, terms, tokens, x);
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, bytes));
    lbq_term products[LBQ_SHARED];
    for (ptrdiff_t i = 0; i < count; i++) {
        const ptrdiff_t rows = terms[i].copy->rows;
        products[i] = (lbq_term){.copy = terms[i].copy, .y = terms[i].y};
        if (terms[i].copy->output)
            products[i].y = lbq_arena_take(&arena, sizeof(float) * (size_t)tokens * (size_t)rows);
        else
            products[i] = terms[i];
    }
    lbq_status status = rotate_and_multiply(count, products, tokens, x);
    for (ptrdiff_t i = 0; i < count && status == LBQ_OK; i++) {
        const lbq_copy *const copy = terms[i].copy;
        if (!copy->output)
            continue;
        status = lbq_rotate_back(copy->output, tokens, products[i].y);
        add_weighted(tokens, copy->rows, terms[i].weight, products[i].y, terms[i].add, terms[i].y);
    }
    lbq_arena_close(&arena);
    return status;
}

/* Whether a product can add the bias: it is the last copy's, and nothing is added after it. */
static bool
takes_bias(const lbq_linear *layer, ptrdiff_t index)
{
    const lbq_copy *const copy = &layer->copies[index];
    return index + 1 == layer->count && !layer->rank && !copy->output &&
           (copy->activation.bits || (index == 0 && !copy->weight));
}

/* Takes the next copies that quantize x like the next copy of the layer furthest behind, so that
 * layers wait for each other. Returns their number, 0 if all are done. */
static ptrdiff_t
gather(progress *all, ptrdiff_t layers, lbq_term *terms)
{
    const progress *least = NULL;
    for (const progress *at = all; at < all + layers; at++)
        if (at->next < at->layer->count && (!least || at->next < least->next))
            least = at;
    if (!least)
        return 0;
    const lbq_copy *const lead = &least->layer->copies[least->next];
    ptrdiff_t count = 0;
    for (progress *at = all; at < all + layers; at++) {
        bool open = true; /* a product to be rotated back is added late, so it must be the layer's
                             last here */
        while (open && count < LBQ_SHARED && at->next < at->layer->count) {
            const lbq_copy *const copy = &at->layer->copies[at->next];
            if (copy != lead && !same_activations(lead, copy))
                break;
            terms[count++] = (lbq_term){
                .copy = copy,
                .weight = copy->weight,
                .bias = takes_bias(at->layer, at->next) ? at->layer->bias : NULL,
                .y = at->y,
                .add = at->next > 0,
            };
            open = !copy->output;
            at->next++;
        }
    }
    return count;
}

/* y += x V U^T. */
static lbq_status
add_adapter(const lbq_linear *layer, ptrdiff_t tokens, const float *x, float *y)
{
    const ptrdiff_t rows = layer->rows, cols = layer->cols, rank = layer->rank;
    const size_t bytes = sizeof(float) * (size_t)tokens * (size_t)rank;
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, bytes));
    float *const inner = lbq_arena_take(&arena, bytes);
    lbq_status status = lbq_sgemm(
        CblasNoTrans, CblasNoTrans, tokens, rank, cols, 1, x, cols, layer->V, rank, 0, inner, rank);
    if (status == LBQ_OK)
        status = lbq_sgemm(CblasNoTrans,
                           CblasTrans,
                           tokens,
                           rows,
                           rank,
                           1,
                           inner,
                           rank,
                           layer->U,
                           rank,
                           1,
                           y,
                           rows);
    lbq_arena_close(&arena);
    return status;
}

static lbq_status
finish(const lbq_linear *layer, ptrdiff_t tokens, const float *x, float *y)
{
    if (layer->rank)
        LBQ_TRY(add_adapter(layer, tokens, x, y));
    if (layer->bias && !takes_bias(layer, layer->count - 1))
        for (ptrdiff_t t = 0; t < tokens; t++)
            add_weighted(1, layer->rows, NULL, layer->bias, true, y + t * layer->rows);
    return LBQ_OK;
}

lbq_status
lbq_linears_forward(ptrdiff_t count, const lbq_linear *const *layers, ptrdiff_t tokens,
                    const float *x, float *const *y)
{
    LBQ_REQUIRE(tokens <= INT32_MAX, LBQ_BAD_SHAPE, "%td tokens are too many", tokens);
    assert(count <= LBQ_LAYERS);
    if (tokens == 0)
        return LBQ_OK;
    progress all[LBQ_LAYERS];
    for (ptrdiff_t i = 0; i < count; i++) {
        assert(lbq_linear_check(layers[i]) == LBQ_OK && layers[i]->cols == layers[0]->cols);
        all[i] = (progress){layers[i], y[i], 0};
    }
    lbq_term terms[LBQ_SHARED];
    for (ptrdiff_t taken; (taken = gather(all, count, terms)) > 0;)
        LBQ_TRY(add_terms(taken, terms, tokens, x));
    for (ptrdiff_t i = 0; i < count; i++)
        LBQ_TRY(finish(layers[i], tokens, x, y[i]));
    return LBQ_OK;
}

ptrdiff_t
lbq_linears_inputs(ptrdiff_t count, const lbq_linear *const *layers)
{
    assert(count <= LBQ_LAYERS);
    progress all[LBQ_LAYERS];
    for (ptrdiff_t i = 0; i < count; i++)
        all[i] = (progress){layers[i], NULL, 0};
    lbq_term terms[LBQ_SHARED];
    ptrdiff_t inputs = 0;
    while (gather(all, count, terms) > 0)
        inputs++;
    return inputs;
}

lbq_status
lbq_linear_forward(const lbq_linear *layer, ptrdiff_t tokens, const float *x, float *y)
{
    return lbq_linears_forward(1, &layer, tokens, x, &y);
}

/* --- rows ------------------------------------------------------------------------------------- */

/* The rows of one copy, written to `weight` or, via `weight`, added to `sum`. */
static lbq_status
copy_rows(const lbq_copy *copy, ptrdiff_t count, const int32_t *row, float *weight, float *sum)
{
    const ptrdiff_t cols = copy->cols;
    if (!copy->dense)
        LBQ_TRY(lbq_matrix_rows(&copy->matrix, count, row, weight));
    for (ptrdiff_t i = 0; copy->dense && i < count; i++)
        memcpy(weight + i * cols, copy->dense + row[i] * cols, (size_t)cols * sizeof(float));
    for (ptrdiff_t i = 0; copy->weight && i < count; i++)
        for (ptrdiff_t k = 0; k < cols; k++)
            weight[i * cols + k] *= copy->weight[row[i]];
    if (copy->input)
        LBQ_TRY(lbq_rotate_back(copy->input, count, weight));
    if (sum != weight)
        add_weighted(count, cols, NULL, weight, true, sum);
    return LBQ_OK;
}

static void
add_adapter_rows(const lbq_linear *layer, ptrdiff_t count, const int32_t *row, float *weight)
{
    for (ptrdiff_t i = 0; i < count; i++)
        for (ptrdiff_t k = 0; k < layer->cols; k++)
            for (ptrdiff_t j = 0; j < layer->rank; j++)
                weight[i * layer->cols + k] +=
                    layer->U[row[i] * layer->rank + j] * layer->V[k * layer->rank + j];
}

lbq_status
lbq_linear_rows(const lbq_linear *layer, ptrdiff_t count, const int32_t *row, float *weight)
{
    LBQ_TRY(copy_rows(&layer->copies[0], count, row, weight, weight));
    const size_t bytes = sizeof(float) * (size_t)count * (size_t)layer->cols;
    if (layer->count > 1) {
        lbq_arena arena;
        LBQ_TRY(lbq_arena_open(&arena, bytes));
        float *const one = lbq_arena_take(&arena, bytes);
        lbq_status status = LBQ_OK;
        for (ptrdiff_t i = 1; i < layer->count && status == LBQ_OK; i++)
            status = copy_rows(&layer->copies[i], count, row, one, weight);
        lbq_arena_close(&arena);
        LBQ_TRY(status);
    }
    add_adapter_rows(layer, count, row, weight);
    return LBQ_OK;
}
