/* The thread pool: the only place that starts threads.
 *
 * lbq_parallel(count, task, context) calls task(context, index, worker) for every index below
 * `count`, each once, on the caller and the pool's workers. Which worker takes an index is not
 * fixed, so a task must compute the same thing whoever runs it: write by index, use `worker`
 * (0 <= worker < lbq_threads()) only to choose scratch memory. The first failure, by index, is
 * the result. Called inside a task, or by a second thread while the pool is busy, it runs in the
 * caller alone. OpenBLAS runs its jobs on this same pool where it can (0.3.27 and later). */
#ifndef LBQ_THREADS_H
#define LBQ_THREADS_H

#include <stddef.h>

#include "core/status.h"

typedef lbq_status (*lbq_task)(void *context, ptrdiff_t index, int worker);

lbq_status lbq_parallel(ptrdiff_t count, lbq_task task, void *context);

/* The same for tasks that call BLAS, which keeps to the thread of its caller meanwhile: equal bits
 * for any number of threads, which OpenBLAS does not promise when it cuts a product itself. Waits
 * for the pool where lbq_parallel would go without. Not inside a task. */
lbq_status lbq_parallel_blas(ptrdiff_t count, lbq_task task, void *context);

/* For cutting a range: how many pieces of `size` make up `whole`, the last perhaps shorter, and the
 * smaller of two ends. */
static inline ptrdiff_t
lbq_pieces(ptrdiff_t whole, ptrdiff_t size)
{
    return (whole + size - 1) / size;
}

static inline ptrdiff_t
lbq_smaller(ptrdiff_t a, ptrdiff_t b)
{
    return a < b ? a : b;
}

/* Number of threads, the caller included, of the pool and of OpenBLAS; at least 1. */
int lbq_threads(void);
lbq_status lbq_set_threads(int threads);

/* The number of CPUs this process may run on. */
int lbq_cpus(void);

#endif
