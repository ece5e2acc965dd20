/* Haar-distributed orthogonal matrices.
 *
 * The Q of G = Q R, G with independent normal entries, is Haar-distributed once the signs of R's
 * diagonal are moved into Q's columns. Without that LAPACK's choice of signs shows.
 * Mezzadri, "How to generate random matrices from the classical compact groups", 2007, section 5.
 */
#include <math.h>

#include "core/blas.h"
#include "core/memory.h"
#include "core/random.h"
#include "rotate/rotation.h"

lbq_status
lbq_orthogonal(uint64_t seed, uint64_t stream, ptrdiff_t n, double *Q)
{
    enum { BLOCK = 64 /* columns per LAPACK panel; more workspace gains nothing */ };
    LBQ_REQUIRE(n <= 46340, LBQ_BAD_SHAPE, "n is %td, expected at most 46340", n);
    lbq_arena arena;
    const size_t vector = (size_t)n * sizeof(double);
    LBQ_TRY(lbq_arena_open(&arena, 2 * lbq_padded(vector) + lbq_padded(BLOCK * vector)));
    double *const tau = lbq_arena_take(&arena, vector);
    double *const sign = lbq_arena_take(&arena, vector);
    double *const work = lbq_arena_take(&arena, BLOCK * vector);
    for (ptrdiff_t i = 0; i < n * n; i++)
        Q[i] = lbq_random_normal(seed, stream, (uint64_t)i);
    const int size = (int)n, work_size = size * BLOCK;
    int info;
    BLAS(dgeqrf_)(&size, &size, Q, &size, tau, work, &work_size, &info);
    for (ptrdiff_t i = 0; i < n; i++)
        sign[i] = copysign(1, Q[i * n + i]);
    BLAS(dorgqr_)(&size, &size, &size, Q, &size, tau, work, &work_size, &info);
    for (ptrdiff_t i = 0; i < n * n; i++)
        Q[i] *= sign[i / n]; /* LAPACK's column i / n is a row here: Q^T is as Haar as Q */
    lbq_arena_close(&arena);
    return LBQ_OK;
}
