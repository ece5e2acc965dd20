/* Haar-distributed orthogonal matrices.
 *
 * The Q of G = Q R, G with independent normal entries, is Haar-distributed once the signs of R's
 * diagonal are moved into Q's columns. Otherwise LAPACK's choice of signs shows. Mezzadri, "How to
 * generate random matrices from the classical compact groups", 2007, section 5. */
#include <math.h>
#include <string.h>

#include "core/blas.h"
#include "core/interrupt.h"
#include "core/memory.h"
#include "core/random.h"
#include "core/threads.h"
#include "rotate/rotation.h"

enum {
    BLOCK = 64,                     /* reflections that LAPACK applies at once; more gain nothing */
    CHUNK = 128,                    /* columns of a task */
    WORK = BLOCK * CHUNK + 65 * 64, /* LAPACK's for those, including its triangular factor */
};

/* Reflections of the columns [at, at + count), to be applied to the columns from `first`. */
typedef struct {
    ptrdiff_t n, at, count, first;
    const char *trans;
    double *Q, *tau;
    double *work; /* (threads, WORK) */
} reflecting;

static lbq_status
reflect(void *context, ptrdiff_t index, int worker)
{
    const reflecting *const r = context;
    const ptrdiff_t column = r->first + index * CHUNK;
    const int rows = (int)(r->n - r->at), columns = (int)lbq_smaller(CHUNK, r->n - column);
    const int count = (int)r->count, stride = (int)r->n, work_size = WORK;
    int info;
    LBQ_BLAS(dormqr_,
             "L",
             r->trans,
             &rows,
             &columns,
             &count,
             r->Q + r->at * (r->n + 1),
             &stride,
             r->tau + r->at,
             r->Q + column * r->n + r->at,
             &stride,
             r->work + worker * WORK,
             &work_size,
             &info,
             1,
             1);
    return LBQ_OK;
}

/* Q R, one block of columns at a time; its reflections are applied to the columns to its right. */
static lbq_status
factor(reflecting *r)
{
    const int stride = (int)r->n, work_size = WORK;
    int info;
    r->trans = "T";
    for (r->at = 0; r->at < r->n; r->at = r->first) {
        r->first = lbq_smaller(r->at + BLOCK, r->n);
        r->count = r->first - r->at;
        const int rows = (int)(r->n - r->at), count = (int)r->count;
        double *const block = r->Q + r->at * (r->n + 1);
        LBQ_BLAS(
            dgeqrf_, &rows, &count, block, &stride, r->tau + r->at, r->work, &work_size, &info);
        LBQ_TRY(lbq_parallel(lbq_pieces(r->n - r->first, CHUNK), reflect, r));
    }
    return LBQ_OK;
}

/* Applies the reflections to the identity, last block first: a block does not change the columns to
 * its left. */
static lbq_status
multiply_out(reflecting *r)
{
    const int stride = (int)r->n, work_size = WORK;
    int info;
    r->trans = "N";
    for (r->at = (r->n - 1) / BLOCK * BLOCK; r->at >= 0; r->at -= BLOCK) {
        r->first = lbq_smaller(r->at + BLOCK, r->n);
        r->count = r->first - r->at;
        const int rows = (int)(r->n - r->at), count = (int)r->count;
        double *const block = r->Q + r->at * (r->n + 1);
        LBQ_TRY(lbq_parallel(lbq_pieces(r->n - r->first, CHUNK), reflect, r));
        LBQ_BLAS(dorgqr_,
                 &rows,
                 &count,
                 &count,
                 block,
                 &stride,
                 r->tau + r->at,
                 r->work,
                 &work_size,
                 &info);
        for (ptrdiff_t column = r->at; column < r->first; column++)
            memset(r->Q + column * r->n, 0, (size_t)r->at * sizeof(double));
    }
    return LBQ_OK;
}

static lbq_status
fill_and_factor(uint64_t seed, uint64_t stream, reflecting *r, double *sign)
{
    const ptrdiff_t n = r->n;
    for (ptrdiff_t i = 0; i < n * n; i++) {
        if (i % n == 0)
            LBQ_TRY(lbq_interrupted());
        r->Q[i] = lbq_random_normal(seed, stream, (uint64_t)i);
    }
    LBQ_TRY(factor(r));
    for (ptrdiff_t i = 0; i < n; i++)
        sign[i] = copysign(1, r->Q[i * n + i]);
    LBQ_TRY(multiply_out(r));
    for (ptrdiff_t i = 0; i < n * n; i++)
        r->Q[i] *= sign[i / n]; /* LAPACK's column i / n is a row here: Q^T is Haar too */
    return LBQ_OK;
}

lbq_status
lbq_orthogonal(uint64_t seed, uint64_t stream, ptrdiff_t n, double *Q)
{
    LBQ_REQUIRE(
        n >= 1 && n <= 46340, LBQ_BAD_SHAPE, "n is %td, expected at least 1, at most 46340", n);
    const size_t vector = (size_t)n * sizeof(double);
    const size_t work = (size_t)lbq_threads() * WORK * sizeof(double);
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, 2 * lbq_padded(vector) + lbq_padded(work)));
    reflecting r = {.n = n, .Q = Q, .tau = lbq_arena_take(&arena, vector)};
    double *const sign = lbq_arena_take(&arena, vector);
    r.work = lbq_arena_take(&arena, work);
    const lbq_status status = fill_and_factor(seed, stream, &r, sign);
    lbq_arena_close(&arena);
    return status;
}
