/* Right-looking Cholesky factorisation by tiles: factors a diagonal tile, solves the tiles below
 * it, and subtracts their products from the rest. */
#include "gptq/cholesky.h"

#include "core/blas.h"
#include "core/threads.h"

enum {
    TILE = 512,
    WHOLE = 2048, /* columns that LAPACK factors at once, in 60 ms in float32 on a slow core */
};

typedef struct {
    ptrdiff_t n;
    ptrdiff_t done, rest; /* first column of the diagonal tile, and of the rest */
    void *A;
} factoring;

#define CHOLESKY(type, real, potrf, trsm, syrk, gemm)                                              \
    static lbq_status solve_##type(void *context, ptrdiff_t index, int worker)                     \
    {                                                                                              \
        (void)worker;                                                                              \
        const factoring *const f = context;                                                        \
        real *const A = f->A;                                                                      \
        const ptrdiff_t row = f->rest + index * TILE;                                              \
        LBQ_CBLAS(trsm,                                                                            \
                  CblasRight,                                                                      \
                  CblasLower,                                                                      \
                  CblasTrans,                                                                      \
                  CblasNonUnit,                                                                    \
                  (int)lbq_smaller(TILE, f->n - row),                                              \
                  (int)(f->rest - f->done),                                                        \
                  1,                                                                               \
                  A + f->done * (f->n + 1),                                                        \
                  (int)f->n,                                                                       \
                  A + row * f->n + f->done,                                                        \
                  (int)f->n);                                                                      \
        return LBQ_OK;                                                                             \
    }                                                                                              \
    static lbq_status subtract_##type(void *context, ptrdiff_t index, int worker)                  \
    {                                                                                              \
        (void)worker;                                                                              \
        const factoring *const f = context;                                                        \
        ptrdiff_t row, column;                                                                     \
        lbq_triangle_at(index, &column, &row);                                                     \
        row = f->rest + row * TILE;                                                                \
        column = f->rest + column * TILE;                                                          \
        const int n = (int)f->n, depth = (int)(f->rest - f->done);                                 \
        const int height = (int)lbq_smaller(TILE, f->n - row);                                     \
        const int width = (int)lbq_smaller(TILE, f->n - column);                                   \
        real *const A = f->A, *const to = A + row * f->n + column;                                 \
        const real *const left = A + row * f->n + f->done;                                         \
        const real *const right = A + column * f->n + f->done;                                     \
        const int same = CblasNoTrans;                                                             \
        if (row == column)                                                                         \
            LBQ_CBLAS(syrk, CblasLower, same, width, depth, -1, left, n, 1, to, n);                \
        else                                                                                       \
            LBQ_CBLAS(                                                                             \
                gemm, same, CblasTrans, height, width, depth, -1, left, n, right, n, 1, to, n);    \
        return LBQ_OK;                                                                             \
    }                                                                                              \
    lbq_status lbq_cholesky_##type(ptrdiff_t n, real *A, bool *positive)                           \
    {                                                                                              \
        const ptrdiff_t tile = n <= WHOLE ? n : TILE;                                              \
        const int stride = (int)n;                                                                 \
        factoring f = {.n = n, .A = A};                                                            \
        for (*positive = true; f.done < n && *positive; f.done = f.rest) {                         \
            f.rest = lbq_smaller(f.done + tile, n);                                                \
            const int order = (int)(f.rest - f.done);                                              \
            const ptrdiff_t below = lbq_pieces(n - f.rest, TILE);                                  \
            int info;                                                                              \
            LBQ_BLAS(potrf, "U", &order, A + f.done * (n + 1), &stride, &info, 1);                 \
            *positive = info == 0;                                                                 \
            if (*positive) {                                                                       \
                LBQ_TRY(lbq_parallel(below, solve_##type, &f));                                    \
                LBQ_TRY(lbq_parallel(below * (below + 1) / 2, subtract_##type, &f));               \
            }                                                                                      \
        }                                                                                          \
        return LBQ_OK;                                                                             \
    }

CHOLESKY(f32, float, spotrf_, strsm, ssyrk, sgemm)
CHOLESKY(f64, double, dpotrf_, dtrsm, dsyrk, dgemm)
