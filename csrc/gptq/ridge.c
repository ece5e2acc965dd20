/* Products by tiles of BLAS; a Cholesky factor of the damped Hessian, and triangular solves of some
 * rows per task. */
#include "gptq/ridge.h"

#include <stdbool.h>

#include "core/blas.h"
#include "core/memory.h"
#include "core/threads.h"
#include "gptq/cholesky.h"

enum { TOKENS = 2048, ROWS = 64 /* per task */ };

static void
scale_rows(ptrdiff_t tokens, ptrdiff_t cols, const float *X, const float *weights, float *to)
{
    for (ptrdiff_t t = 0; t < tokens; t++)
        for (ptrdiff_t k = 0; k < cols; k++)
            to[t * cols + k] = weights[t] * X[t * cols + k];
}

static lbq_status
add_tokens(ptrdiff_t tokens, ptrdiff_t rows, ptrdiff_t cols, const float *Y, const float *X,
           float *product, double *M)
{
    LBQ_TRY(lbq_sgemm(
        CblasTrans, CblasNoTrans, rows, cols, tokens, 1, Y, rows, X, cols, 0, product, cols));
    for (ptrdiff_t i = 0; i < rows * cols; i++)
        M[i] += (double)product[i];
    return LBQ_OK;
}

lbq_status
lbq_moment_add(ptrdiff_t tokens, ptrdiff_t rows, ptrdiff_t cols, const float *Y, const float *X,
               const float *weights, double *M)
{
    const ptrdiff_t most = lbq_smaller(TOKENS, tokens);
    const size_t product_bytes = (size_t)(rows * cols) * sizeof(float);
    const size_t scaled_bytes = weights ? (size_t)(most * cols) * sizeof(float) : 0;
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, lbq_padded(product_bytes) + lbq_padded(scaled_bytes)));
    float *const product = lbq_arena_take(&arena, product_bytes);
    float *const scaled = lbq_arena_take(&arena, scaled_bytes);
    lbq_status status = LBQ_OK;
    for (ptrdiff_t first = 0; first < tokens && status == LBQ_OK; first += TOKENS) {
        const ptrdiff_t count = lbq_smaller(TOKENS, tokens - first);
        const float *x = X + first * cols;
        if (weights) {
            scale_rows(count, cols, x, weights + first, scaled);
            x = scaled;
        }
        status = add_tokens(count, rows, cols, Y + first * rows, x, product, M);
    }
    lbq_arena_close(&arena);
    return status;
}

typedef struct {
    ptrdiff_t rows, cols;
    const double *factor; /* C: C C^T = H + ridge I, lower triangle */
    double *B;
} solving;

static lbq_status
solve_rows(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const solving *const s = context;
    const int rows = (int)lbq_smaller(ROWS, s->rows - index * ROWS), cols = (int)s->cols;
    double *const B = s->B + index * ROWS * s->cols;
    const int transposed[] = {CblasTrans, CblasNoTrans};
    for (int i = 0; i < 2; i++)
        LBQ_CBLAS(dtrsm,
                  CblasRight,
                  CblasLower,
                  transposed[i],
                  CblasNonUnit,
                  rows,
                  cols,
                  1,
                  s->factor,
                  cols,
                  B,
                  cols);
    return LBQ_OK;
}

static lbq_status
solve(ptrdiff_t rows, ptrdiff_t cols, const double *H, double ridge, double *factor, double *B)
{
    for (ptrdiff_t i = 0; i < cols; i++)
        for (ptrdiff_t k = 0; k <= i; k++)
            factor[i * cols + k] = H[k * cols + i] + (i == k ? ridge : 0);
    bool positive = false;
    LBQ_TRY(lbq_cholesky_f64(cols, factor, &positive));
    LBQ_REQUIRE(positive,
                LBQ_NOT_POSITIVE_DEFINITE,
                "the Hessian with %g on its diagonal is not positive definite",
                ridge);
    solving s = {rows, cols, factor, B};
    return lbq_parallel(lbq_pieces(rows, ROWS), solve_rows, &s);
}

lbq_status
lbq_ridge_solve(ptrdiff_t rows, ptrdiff_t cols, const double *H, double ridge, double *B)
{
    const size_t bytes = (size_t)(cols * cols) * sizeof(double);
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, bytes));
    const lbq_status status = solve(rows, cols, H, ridge, lbq_arena_take(&arena, bytes), B);
    lbq_arena_close(&arena);
    return status;
}
