/* Products go to BLAS; what a copy's rotations and weights change lies in scratch. */
#include "linear/backward.h"

#include <string.h>

#include "core/blas.h"
#include "core/memory.h"
#include "core/threads.h"

static bool
fits(ptrdiff_t size, ptrdiff_t expected)
{
    return size == 0 || size == expected;
}

static lbq_status
check(const lbq_linear *layer, const lbq_linear_gradient *gradient)
{
    LBQ_REQUIRE(fits(gradient->rows, layer->rows) && fits(gradient->cols, layer->cols) &&
                    fits(gradient->rank, layer->rank),
                LBQ_BAD_SHAPE,
                "gradients are (%td, %td) and of rank %td, the layer is (%td, %td) and of rank %td",
                gradient->rows,
                gradient->cols,
                gradient->rank,
                layer->rows,
                layer->cols,
                layer->rank);
    LBQ_REQUIRE(layer->count <= LBQ_COPIES,
                LBQ_BAD_VALUE,
                "gradients of a layer of %td copies, expected at most %d",
                layer->count,
                LBQ_COPIES);
    for (ptrdiff_t i = 0; i < layer->count; i++)
        LBQ_REQUIRE(layer->copies[i].dense,
                    LBQ_BAD_VALUE,
                    "copy %td is packed: gradients need dense weights",
                    i);
    for (ptrdiff_t i = 0; i < layer->count; i++) {
        const lbq_rotation *const input = layer->copies[i].input;
        LBQ_REQUIRE(!gradient->fake[i] || layer->copies[i].fake.values,
                    LBQ_BAD_VALUE,
                    "gradients of how copy %td rounds its inputs, but it does not",
                    i);
        LBQ_REQUIRE(!gradient->input[i] || (input && input->dense),
                    LBQ_BAD_VALUE,
                    "gradients of the rotation of copy %td, but it has no dense one",
                    i);
    }
    return LBQ_OK;
}

enum { DEPTH = 1 << 12 }; /* BLAS's tiles get smaller for longer sums */

/* Y (m, n) (+)= A B or A B^T, and Y (m, n) += A^T B, for matrices without gaps. */
static lbq_status
product(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *A, const float *B, bool add, float *Y)
{
    for (ptrdiff_t i = 0; i < k; i += DEPTH)
        LBQ_TRY(lbq_sgemm(CblasNoTrans,
                          CblasNoTrans,
                          m,
                          n,
                          lbq_smaller(DEPTH, k - i),
                          1,
                          A + i,
                          k,
                          B + i * n,
                          n,
                          add || i > 0,
                          Y,
                          n));
    return LBQ_OK;
}

static lbq_status
product_transposed(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *A, const float *B, float *Y)
{
    return lbq_sgemm(CblasNoTrans, CblasTrans, m, n, k, 1, A, k, B, k, 0, Y, n);
}

static lbq_status
add_outer(ptrdiff_t m, ptrdiff_t n, ptrdiff_t tokens, const float *A, const float *B, float *Y)
{
    return lbq_sgemm(CblasTrans, CblasNoTrans, m, n, tokens, 1, A, m, B, n, 1, Y, n);
}

enum { COLUMNS = 64 /* per task: four cache lines of each row */ };

typedef struct {
    ptrdiff_t tokens, cols;
    const float *g, *z;
    float *sum;
} column_sums;

static lbq_status
sum_columns(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const column_sums *const s = context;
    const ptrdiff_t first = index * COLUMNS, count = lbq_smaller(COLUMNS, s->cols - first);
    float *const sum = s->sum + first;
    for (ptrdiff_t t = 0; t < s->tokens; t++) {
        const float *const g = s->g + t * s->cols + first;
        const float *const z = s->z ? s->z + t * s->cols + first : NULL;
        for (ptrdiff_t c = 0; c < count; c++)
            sum[c] += z ? g[c] * z[c] : g[c];
    }
    return LBQ_OK;
}

/* sum[c] += sum_t g[t,c], times z[t,c] if z is not NULL. */
static lbq_status
add_column_sums(ptrdiff_t tokens, ptrdiff_t cols, const float *g, const float *z, float *sum)
{
    column_sums s = {tokens, cols, g, z, sum};
    return lbq_parallel(lbq_pieces(cols, COLUMNS), sum_columns, &s);
}

/* Scratch of a copy: NULL what it does not need. */
typedef struct {
    float *x;      /* (tokens, cols): R x, where there is an R */
    float *y, *dx; /* (tokens, cols): R x rounded, where it is; and the gradient of R x, if x is not
                      that */
    float *h;      /* (tokens, rows): where there is a P or a weight */
    float *z;      /* (tokens, rows): P^T W R x, where the weight's gradient is wanted */
} scratch;

/* Bytes of the scratch; the scratch itself once there is memory for it. */
static size_t
take(const lbq_copy *copy, ptrdiff_t tokens, bool weight, lbq_arena *arena, scratch *s)
{
    const size_t wide = lbq_padded(sizeof(float) * (size_t)(tokens * copy->cols));
    const size_t high = lbq_padded(sizeof(float) * (size_t)(tokens * copy->rows));
    const bool rounds = copy->fake.values;
    const size_t sizes[] = {copy->input ? wide : 0,
                            rounds ? wide : 0,
                            copy->input || rounds ? wide : 0,
                            copy->output || copy->weight ? high : 0,
                            weight ? high : 0};
    float **const at[] = {&s->x, &s->y, &s->dx, &s->h, &s->z};
    size_t total = 0;
    for (int i = 0; i < 5; i++) {
        if (arena->base)
            *at[i] = sizes[i] ? lbq_arena_take(arena, sizes[i]) : NULL;
        total += sizes[i];
    }
    return total;
}

static lbq_status
rotated(const lbq_rotation *rotation, ptrdiff_t tokens, const float *x, float *to)
{
    memcpy(to, x, sizeof(float) * (size_t)(tokens * rotation->n));
    return lbq_rotate(rotation, tokens, to);
}

/* g * P^T W x, x being rotated already. */
static lbq_status
weight_gradient(const lbq_copy *copy, ptrdiff_t tokens, const float *x, const float *g, float *z,
                float *to)
{
    LBQ_TRY(product_transposed(tokens, copy->rows, copy->cols, x, copy->dense, z));
    if (copy->output)
        LBQ_TRY(lbq_rotate_back(copy->output, tokens, z));
    return add_column_sums(tokens, copy->rows, g, z, to);
}

/* Whether the gradient of the weight follows from the layer's output: of a single copy without an
 * adapter, if no weight is 0. */
static bool
follows(const lbq_linear *layer, const float *y)
{
    if (!y || layer->count != 1 || layer->rank)
        return false;
    const float *const weight = layer->copies[0].weight;
    for (ptrdiff_t r = 0; weight && r < layer->rows; r++)
        if (weight[r] == 0)
            return false;
    return true;
}

/* to += sum_t g (y - b) / weight. */
static lbq_status
weight_from_output(const lbq_linear *layer, ptrdiff_t tokens, const float *y, const float *g,
                   float *to)
{
    const ptrdiff_t rows = layer->rows;
    const float *const weight = layer->copies[0].weight;
    const size_t bytes = sizeof(float) * (size_t)rows;
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, 2 * lbq_padded(bytes)));
    float *const by_y = memset(lbq_arena_take(&arena, bytes), 0, bytes);
    float *const by_b = memset(lbq_arena_take(&arena, bytes), 0, bytes);
    lbq_status status = add_column_sums(tokens, rows, g, y, by_y);
    if (status == LBQ_OK && layer->bias)
        status = add_column_sums(tokens, rows, g, NULL, by_b);
    for (ptrdiff_t r = 0; r < rows && status == LBQ_OK; r++)
        to[r] +=
            (by_y[r] - (layer->bias ? layer->bias[r] * by_b[r] : 0)) / (weight ? weight[r] : 1);
    lbq_arena_close(&arena);
    return status;
}

/* P (weight * g), where that is not g. */
static lbq_status
pull_back(const lbq_copy *copy, ptrdiff_t tokens, const float *g, float *h)
{
    for (ptrdiff_t t = 0; t < tokens; t++)
        for (ptrdiff_t r = 0; r < copy->rows; r++)
            h[t * copy->rows + r] = g[t * copy->rows + r] * (copy->weight ? copy->weight[r] : 1);
    return copy->output ? lbq_rotate(copy->output, tokens, h) : LBQ_OK;
}

static lbq_status
add_rotated_back(const lbq_copy *copy, ptrdiff_t tokens, float *from, bool add, float *to)
{
    if (copy->input)
        LBQ_TRY(lbq_rotate_back(copy->input, tokens, from));
    for (ptrdiff_t i = 0; i < tokens * copy->cols; i++)
        to[i] = add ? to[i] + from[i] : from[i];
    return LBQ_OK;
}

/* Through copy `index` of the layer. */
static lbq_status
copy_backward(const lbq_linear *layer, ptrdiff_t index, ptrdiff_t tokens, const float *x,
              const float *g, const lbq_linear_gradient *gradient, bool add, const scratch *s,
              float *dx)
{
    const lbq_copy *const copy = &layer->copies[index];
    const ptrdiff_t rows = copy->rows, cols = copy->cols;
    float *const dense = gradient->dense[index];
    float *const weight = s->z ? gradient->weight[index] : NULL; /* else it follows from y */
    float *const fake = gradient->fake[index], *const input = gradient->input[index];
    const float *turned = x; /* R x */
    if (s->x && (dense || weight || s->y)) {
        LBQ_TRY(rotated(copy->input, tokens, x, s->x));
        turned = s->x;
    }
    const float *seen = turned; /* what W multiplies */
    if (s->y) {
        LBQ_TRY(lbq_fake_forward(&copy->fake, tokens, cols, turned, s->y));
        seen = s->y;
    }
    if (weight)
        LBQ_TRY(weight_gradient(copy, tokens, seen, g, s->z, weight));
    if (s->h) {
        LBQ_TRY(pull_back(copy, tokens, g, s->h));
        g = s->h;
    }
    if (dense)
        LBQ_TRY(add_outer(rows, cols, tokens, g, seen, dense));
    if (!dx && !fake && !input)
        return LBQ_OK;
    if (!s->dx)
        return product(tokens, cols, rows, g, copy->dense, add, dx);
    LBQ_TRY(product(tokens, cols, rows, g, copy->dense, false, s->dx));
    if (s->y)
        LBQ_TRY(lbq_fake_backward(&copy->fake, tokens, cols, turned, s->dx, fake));
    if (input)
        LBQ_TRY(add_outer(cols, cols, tokens, s->dx, x, input));
    return dx ? add_rotated_back(copy, tokens, s->dx, add, dx) : LBQ_OK;
}

/* Of U V^T x, through V^T x and U^T g. */
static lbq_status
adapter_backward(const lbq_linear *layer, ptrdiff_t tokens, const float *x, const float *g,
                 float *dU, float *dV, float *dx)
{
    const ptrdiff_t rows = layer->rows, cols = layer->cols, rank = layer->rank;
    const size_t bytes = sizeof(float) * (size_t)(tokens * rank);
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, 2 * lbq_padded(bytes)));
    float *const inner = lbq_arena_take(&arena, bytes);
    float *const outer = lbq_arena_take(&arena, bytes);
    lbq_status status = product(tokens, rank, cols, x, layer->V, false, inner);
    if (status == LBQ_OK)
        status = product(tokens, rank, rows, g, layer->U, false, outer);
    if (status == LBQ_OK && dU)
        status = add_outer(rows, rank, tokens, g, inner, dU);
    if (status == LBQ_OK && dV)
        status = add_outer(cols, rank, tokens, x, outer, dV);
    if (status == LBQ_OK && dx)
        status = lbq_sgemm(CblasNoTrans,
                           CblasTrans,
                           tokens,
                           cols,
                           rank,
                           1,
                           outer,
                           rank,
                           layer->V,
                           rank,
                           1,
                           dx,
                           cols);
    lbq_arena_close(&arena);
    return status;
}

lbq_status
lbq_linear_backward(const lbq_linear *layer, ptrdiff_t tokens, const float *x, const float *y,
                    const float *g, const lbq_linear_gradient *gradient, bool add, float *dx)
{
    LBQ_TRY(check(layer, gradient));
    const bool known = follows(layer, y);
    if (known && gradient->weight[0])
        LBQ_TRY(weight_from_output(layer, tokens, y, g, gradient->weight[0]));
    for (ptrdiff_t i = 0; i < layer->count; i++) {
        const lbq_copy *const copy = &layer->copies[i];
        const bool weight = gradient->weight[i] && !known;
        scratch s = {0};
        lbq_arena arena = {0};
        LBQ_TRY(lbq_arena_open(&arena, take(copy, tokens, weight, &arena, &s)));
        take(copy, tokens, weight, &arena, &s);
        const lbq_status status =
            copy_backward(layer, i, tokens, x, g, gradient, add || i > 0, &s, dx);
        lbq_arena_close(&arena);
        LBQ_TRY(status);
    }
    if (layer->rank)
        LBQ_TRY(adapter_backward(layer, tokens, x, g, gradient->U, gradient->V, dx));
    if (gradient->bias)
        LBQ_TRY(add_column_sums(tokens, layer->rows, g, NULL, gradient->bias));
    return LBQ_OK;
}
