/* Tridiagonal form, bisection and inverse iteration by LAPACK, for as many vectors as are wanted.
 */
#include "gptq/eigen.h"

#include <math.h>
#include <string.h>

#include "core/blas.h"
#include "core/interrupt.h"
#include "core/memory.h"

enum { WORK = 70 /* doubles per column: LAPACK's best for blocks of 64 */ };

static lbq_status
check_finite(const char *name, ptrdiff_t n, const double *A)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        LBQ_TRY(lbq_interrupted());
        for (ptrdiff_t j = i; j < n; j++)
            LBQ_REQUIRE(isfinite(A[i * n + j]),
                        LBQ_BAD_VALUE,
                        "%s[%td, %td] is %g, expected finite numbers",
                        name,
                        i,
                        j,
                        A[i * n + j]);
    }
    return LBQ_OK;
}

/* `w` (n) and `z` (n, count) are LAPACK's results; *info is 0 unless it failed. */
static lbq_status
solve(ptrdiff_t n, double *A, double *B, ptrdiff_t count, lbq_arena *arena, double *w, double *z,
      int *info)
{
    const int order = (int)n, last = order, first = (int)(n - count + 1), product = 2;
    const int work_size = WORK * order;
    const double unused = 0, tolerance = 0; /* LAPACK's own */
    double *const work = lbq_arena_take(arena, (size_t)work_size * sizeof *work);
    int *const integers = lbq_arena_take(arena, 5 * (size_t)n * sizeof *integers);
    int *const failed = lbq_arena_take(arena, (size_t)n * sizeof *failed);
    int found;
    if (B)
        LBQ_BLAS(dsygvx_,
                 &product,
                 "V",
                 "I",
                 "L",
                 &order,
                 A,
                 &order,
                 B,
                 &order,
                 &unused,
                 &unused,
                 &first,
                 &last,
                 &tolerance,
                 &found,
                 w,
                 z,
                 &order,
                 work,
                 &work_size,
                 integers,
                 failed,
                 info,
                 1,
                 1,
                 1);
    else
        LBQ_BLAS(dsyevx_,
                 "V",
                 "I",
                 "L",
                 &order,
                 A,
                 &order,
                 &unused,
                 &unused,
                 &first,
                 &last,
                 &tolerance,
                 &found,
                 w,
                 z,
                 &order,
                 work,
                 &work_size,
                 integers,
                 failed,
                 info,
                 1,
                 1,
                 1);
    return LBQ_OK;
}

lbq_status
lbq_leading_eigenvectors(ptrdiff_t n, double *A, double *B, ptrdiff_t count, double *values,
                         double *vectors)
{
    LBQ_REQUIRE(
        count >= 1 && count <= n, LBQ_BAD_VALUE, "count is %td, expected 1 to %td", count, n);
    LBQ_TRY(check_finite("matrix", n, A));
    if (B)
        LBQ_TRY(check_finite("metric", n, B));
    lbq_arena arena;
    const size_t side = (size_t)n;
    LBQ_TRY(lbq_arena_open(
        &arena,
        lbq_padded(side * sizeof(double)) + lbq_padded(WORK * side * sizeof(double)) +
            lbq_padded(5 * side * sizeof(int)) + lbq_padded(side * sizeof(int))));
    double *const w = lbq_arena_take(&arena, side * sizeof *w);
    int info = 0;
    const lbq_status status = solve(n, A, B, count, &arena, w, vectors, &info);
    if (status == LBQ_OK && info == 0)
        memcpy(values, w, (size_t)count * sizeof *w);
    lbq_arena_close(&arena);
    LBQ_TRY(status);
    LBQ_REQUIRE(
        info <= n, LBQ_NOT_POSITIVE_DEFINITE, "metric is not positive definite; raise damping");
    LBQ_REQUIRE(info == 0 && isfinite(values[0]) && isfinite(values[count - 1]),
                LBQ_NOT_POSITIVE_DEFINITE,
                "eigenvectors do not converge (LAPACK says %d)",
                info);
    return LBQ_OK;
}
