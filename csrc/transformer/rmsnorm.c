/* One kernel call per row, rows in parallel. */
#include "transformer/rmsnorm.h"

#include <math.h>

#include "core/memory.h"
#include "core/threads.h"
#include "kernels/kernels.h"

enum { ROWS = 32 }; /* per task: about 20 us for rows of 4096 */

typedef struct {
    ptrdiff_t rows, cols;
    const float *X, *gain;
    float epsilon;
    float *Y;
} norm;

static lbq_status
norm_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const norm *const n = context;
    const ptrdiff_t end = (index + 1) * ROWS < n->rows ? (index + 1) * ROWS : n->rows;
    for (ptrdiff_t r = index * ROWS; r < end; r++)
        lbq_kernel.rmsnorm_f32(
            n->X + r * n->cols, n->gain, n->cols, n->epsilon, n->Y + r * n->cols);
    return LBQ_OK;
}

lbq_status
lbq_rmsnorm(ptrdiff_t rows, ptrdiff_t cols, const float *X, const float *gain, float epsilon,
            float *Y)
{
    norm n = {.rows = rows, .cols = cols, .X = X, .gain = gain, .epsilon = epsilon, .Y = Y};
    return lbq_parallel(lbq_pieces(rows, ROWS), norm_task, &n);
}

/* --- backward --------------------------------------------------------------------------------- */

enum { LANES = 8, COLUMNS = 64 /* per task */ };

typedef struct {
    ptrdiff_t rows, cols;
    const float *X, *gain, *G;
    float epsilon;
    float *dgain, *dX;
    float *scale; /* (rows): s */
} norm_backward;

/* Sums of x^2 and of gain g x, in lanes so that compilers vectorise it. */
static void
row_sums(const norm_backward *n, const float *x, const float *g, double *squares, double *product)
{
    double square[LANES] = {0}, dot[LANES] = {0};
    for (ptrdiff_t i = 0; i < n->cols; i += LANES)
        for (ptrdiff_t j = 0; j < lbq_smaller(LANES, n->cols - i); j++) {
            const double value = (double)x[i + j], gain = n->gain ? (double)n->gain[i + j] : 1;
            square[j] += value * value;
            dot[j] += value * (double)g[i + j] * gain;
        }
    *squares = *product = 0;
    for (int j = 0; j < LANES; j++) {
        *squares += square[j];
        *product += dot[j];
    }
}

static lbq_status
norm_backward_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const norm_backward *const n = context;
    for (ptrdiff_t r = index * ROWS; r < lbq_smaller((index + 1) * ROWS, n->rows); r++) {
        const float *const x = n->X + r * n->cols, *const g = n->G + r * n->cols;
        float *const dx = n->dX + r * n->cols;
        double squares, product;
        row_sums(n, x, g, &squares, &product);
        const double mean = squares / (double)n->cols + (double)n->epsilon;
        const float s = (float)(1 / sqrt(mean));
        const double along = product / (double)n->cols / mean / sqrt(mean);
        n->scale[r] = s;
        for (ptrdiff_t i = 0; i < n->cols; i++)
            dx[i] += s * g[i] * (n->gain ? n->gain[i] : 1) - (float)(along * (double)x[i]);
    }
    return LBQ_OK;
}

static lbq_status
gain_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const norm_backward *const n = context;
    const ptrdiff_t first = index * COLUMNS, end = lbq_smaller(first + COLUMNS, n->cols);
    for (ptrdiff_t r = 0; r < n->rows; r++)
        for (ptrdiff_t i = first; i < end; i++)
            n->dgain[i] += n->G[r * n->cols + i] * n->X[r * n->cols + i] * n->scale[r];
    return LBQ_OK;
}

lbq_status
lbq_rmsnorm_backward(ptrdiff_t rows, ptrdiff_t cols, const float *X, const float *gain,
                     float epsilon, const float *G, float *dgain, float *dX)
{
    norm_backward n = {rows, cols, X, gain, G, epsilon, dgain, dX, NULL};
    lbq_arena arena;
    const size_t bytes = (size_t)rows * sizeof(float);
    LBQ_TRY(lbq_arena_open(&arena, bytes));
    n.scale = lbq_arena_take(&arena, bytes);
    lbq_status status = lbq_parallel(lbq_pieces(rows, ROWS), norm_backward_task, &n);
    if (status == LBQ_OK && dgain)
        status = lbq_parallel(lbq_pieces(cols, COLUMNS), gain_task, &n);
    lbq_arena_close(&arena);
    return status;
}
