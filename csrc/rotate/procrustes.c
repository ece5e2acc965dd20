/* Singular values by LAPACK's divide and conquer, then one product.
 *
 * P. Schoenemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 31,
 * 1966. Newton-Schulz steps would need no decomposition, but cross moments of activations have
 * condition numbers above 1e4, for which they take some 30 products and lose digits. */
#include "rotate/procrustes.h"

#include <math.h>
#include <string.h>

#include "core/blas.h"
#include "core/interrupt.h"
#include "core/memory.h"

enum { LARGEST = 16384 /* LAPACK's sizes of scratch, 4 n^2 + 7 n, are 32-bit integers */ };

static lbq_status
check_finite(ptrdiff_t n, const double *M)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        LBQ_TRY(lbq_interrupted());
        for (ptrdiff_t j = 0; j < n; j++)
            LBQ_REQUIRE(isfinite(M[i * n + j]),
                        LBQ_BAD_VALUE,
                        "matrix[%td, %td] is %g, expected finite numbers",
                        i,
                        j,
                        M[i * n + j]);
    }
    return LBQ_OK;
}

/* A (n, n) = U diag(values) V in LAPACK's column-major order; A is destroyed. */
static lbq_status
decompose(int n, double *A, double *values, double *U, double *V, double *work, int work_size,
          int *integers, int *info)
{
    LBQ_BLAS(
        dgesdd_, "S", &n, &n, A, &n, values, U, &n, V, &n, work, &work_size, integers, info, 1);
    return LBQ_OK;
}

/* To LAPACK, M is its transpose V^T S U^T, so its U is our V and its V our U^T; both are read
 * row-major again by the product U V^T. */
static lbq_status
multiply_out(ptrdiff_t n, const double *U, const double *V, double *Q)
{
    return lbq_dgemm(CblasNoTrans, CblasNoTrans, n, n, n, 1, V, n, U, n, 0, Q, n);
}

lbq_status
lbq_polar(ptrdiff_t n, const double *M, double *Q, double *values)
{
    LBQ_REQUIRE(
        n >= 1 && n <= LARGEST, LBQ_BAD_SHAPE, "n is %td, expected 1 to %d", n, (int)LARGEST);
    LBQ_TRY(check_finite(n, M));
    int info = 0;
    double best;
    LBQ_TRY(decompose((int)n, Q, values, Q, Q, &best, -1, &info, &info)); /* only asks for sizes */
    const size_t square = (size_t)(n * n) * sizeof(double);
    const size_t work = (size_t)best * sizeof(double), integers = 8 * (size_t)n * sizeof(int);
    lbq_arena arena;
    LBQ_TRY(
        lbq_arena_open(&arena, 2 * lbq_padded(square) + lbq_padded(work) + lbq_padded(integers)));
    double *const U = lbq_arena_take(&arena, square), *const V = lbq_arena_take(&arena, square);
    double *const scratch = lbq_arena_take(&arena, work);
    int *const found = lbq_arena_take(&arena, integers);
    memcpy(Q, M, square);
    lbq_status status = decompose((int)n, Q, values, U, V, scratch, (int)best, found, &info);
    if (status == LBQ_OK && info == 0)
        status = multiply_out(n, U, V, Q);
    lbq_arena_close(&arena);
    LBQ_TRY(status);
    LBQ_REQUIRE(info == 0,
                LBQ_NOT_POSITIVE_DEFINITE,
                "singular values do not converge (LAPACK says %d)",
                info);
    return LBQ_OK;
}
