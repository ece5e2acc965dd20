/* The thread pool: the only place that starts threads.
 *
 * lbq_parallel(count, task, context) calls task(context, index, worker) for every index below
 * `count`, each once, on the caller and the pool's workers. Which worker takes an index is not
 * fixed, so a task must compute the same thing whoever runs it: write by index, use `worker`
 * (0 <= worker < lbq_threads()) only to choose scratch memory. The first failure, by index, is
 * the result. Called inside a task, or by a second thread while the pool is busy, it runs in the
 * caller alone. Between tasks it asks lbq_interrupted(); an interrupted call has run some tasks. */
#ifndef LBQ_THREADS_H
#define LBQ_THREADS_H

#include <stddef.h>

#include "core/status.h"

typedef lbq_status (*lbq_task)(void *context, ptrdiff_t index, int worker);

lbq_status lbq_parallel(ptrdiff_t count, lbq_task task, void *context);

/* For cutting a range: how many pieces of `size` make up `whole`, the last perhaps shorter, and the
 * smaller of two ends. */
static inline ptrdiff_t
lbq_pieces(ptrdiff_t whole, ptrdiff_t size)
{
    return whole / size + (whole % size != 0); /* no sum: size may be PTRDIFF_MAX */
}

static inline ptrdiff_t
lbq_smaller(ptrdiff_t a, ptrdiff_t b)
{
    return a < b ? a : b;
}

/* Index of a tile in the upper triangle of a square of tiles, column by column, to its row and
 * column: all of a triangle of n columns are n (n + 1) / 2. */
static inline void
lbq_triangle_at(ptrdiff_t index, ptrdiff_t *row, ptrdiff_t *column)
{
    *column = 0;
    while (index > *column)
        index -= ++*column;
    *row = index;
}

/* Number of threads of the pool, the caller included; at least 1. */
int lbq_threads(void);

/* Makes lbq_threads() a constant for this thread, so that scratch for each worker and the call that
 * uses it agree whatever other threads set; 0 ends that. Returns the constant before. */
int lbq_settle_threads(int threads);

lbq_status lbq_set_threads(int threads);

/* The number of CPUs this process may run on. */
int lbq_cpus(void);

#endif
