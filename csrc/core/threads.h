/* The thread pool: the only place that starts threads.
 *
 * lbq_parallel(count, task, context) calls task(context, index, worker) for every index below
 * `count`, each once, on the caller and the pool's workers. Any worker may take an index, so a task
 * must not depend on who runs it: write by index, use `worker` (0 <= worker < lbq_threads()) only
 * to choose scratch memory. The failure with the lowest index is the result. Inside a task, or
 * while another thread uses the pool, it runs in the caller alone. It checks lbq_interrupted()
 * between tasks; an interrupted call has run some of them. */
#ifndef LBQ_THREADS_H
#define LBQ_THREADS_H

#include <stddef.h>

#include "core/status.h"

typedef lbq_status (*lbq_task)(void *context, ptrdiff_t index, int worker);

lbq_status lbq_parallel(ptrdiff_t count, lbq_task task, void *context);

/* For splitting a range: the number of pieces of `size` in `whole`, the last possibly shorter, and
 * the smaller of two ends. */
static inline ptrdiff_t
lbq_pieces(ptrdiff_t whole, ptrdiff_t size)
{
    return whole / size + (whole % size != 0); /* not a sum: size may be PTRDIFF_MAX */
}

static inline ptrdiff_t
lbq_smaller(ptrdiff_t a, ptrdiff_t b)
{
    return a < b ? a : b;
}

/* Row and column of tile `index` in the upper triangle of a square of tiles, counted column by
 * column; n columns have n (n + 1) / 2 tiles. */
static inline void
lbq_triangle_at(ptrdiff_t index, ptrdiff_t *row, ptrdiff_t *column)
{
    *column = 0;
    while (index > *column)
        index -= ++*column;
    *row = index;
}

/* Number of threads of the pool, including the caller; at least 1. */
int lbq_threads(void);

/* Fixes lbq_threads() for this thread, so that scratch sized by it fits the call that uses it even
 * if another thread changes the number; 0 ends that. Returns the previous value. */
int lbq_settle_threads(int threads);

lbq_status lbq_set_threads(int threads);

/* The number of CPUs this process may run on. */
int lbq_cpus(void);

#endif
