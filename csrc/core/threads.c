/* One pool: the caller and threads - 1 workers take indices from an atomic counter.
 *
 * A worker that runs out of work spins for a few microseconds, since the next call of a decoder
 * comes soon, and then sleeps on a condition variable. After fork the child has none of the
 * parent's threads, so it forgets them and starts its own at the next call. */
#include "core/threads.h"

#include <assert.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/blas.h"

enum {
    MAX_THREADS = 256,
    SPINS = 400 /* 20 us where a pause takes 140 cycles, as since Skylake */
};

typedef struct {
    lbq_task task;
    void *context;
    ptrdiff_t count;
    atomic_ptrdiff_t next;
    pthread_mutex_t failure; /* guards the three below */
    ptrdiff_t failed_index;
    lbq_status status;
    char message[512];
} job;

static pthread_mutex_t callers = PTHREAD_MUTEX_INITIALIZER; /* one parallel call at a time */
static pthread_mutex_t state = PTHREAD_MUTEX_INITIALIZER;   /* guards what follows */
static pthread_cond_t work_came = PTHREAD_COND_INITIALIZER;
static pthread_cond_t work_done = PTHREAD_COND_INITIALIZER;
static job *current;
static _Atomic uint64_t generation; /* of `current`: raised under `state`, read by spinners */
static int started;                 /* workers that run */
static atomic_int busy;             /* workers that have not finished `current` */
static bool stopping;
static pthread_t workers[MAX_THREADS];
static atomic_int wanted; /* threads asked for; 0: not yet set */
static _Thread_local bool inside;

static inline void
relax(void)
{
#ifdef LBQ_X86
    __builtin_ia32_pause();
#else
    sched_yield();
#endif
}

static void
run(job *work, int worker)
{
    inside = true;
    for (ptrdiff_t index; (index = atomic_fetch_add(&work->next, 1)) < work->count;) {
        const lbq_status status = work->task(work->context, index, worker);
        if (status == LBQ_OK)
            continue;
        pthread_mutex_lock(&work->failure);
        if (work->status == LBQ_OK || index < work->failed_index) {
            work->status = status;
            work->failed_index = index;
            snprintf(work->message, sizeof work->message, "%s", lbq_message());
        }
        pthread_mutex_unlock(&work->failure);
    }
    inside = false;
}

static void *
worker_main(void *argument)
{
    const int worker = (int)(intptr_t)argument;
    uint64_t seen = 0;
    for (;;) {
        for (int spin = 0; spin < SPINS && atomic_load(&generation) == seen; spin++)
            relax();
        pthread_mutex_lock(&state);
        while (atomic_load(&generation) == seen && !stopping)
            pthread_cond_wait(&work_came, &state);
        if (stopping) {
            pthread_mutex_unlock(&state);
            return NULL;
        }
        seen = atomic_load(&generation);
        job *const work = current;
        pthread_mutex_unlock(&state);
        if (!work)
            continue;
        run(work, worker);
        if (atomic_fetch_sub(&busy, 1) == 1) {
            pthread_mutex_lock(&state);
            pthread_cond_signal(&work_done);
            pthread_mutex_unlock(&state);
        }
    }
}

/* Ends all workers; the caller holds `callers`, so no work is under way. */
static void
stop_workers(void)
{
    pthread_mutex_lock(&state);
    stopping = true;
    pthread_cond_broadcast(&work_came);
    pthread_mutex_unlock(&state);
    for (int i = 1; i <= started; i++)
        pthread_join(workers[i], NULL);
    started = 0;
    stopping = false;
    atomic_store(&generation, 0);
}

static void
before_fork(void)
{
    pthread_mutex_lock(&callers);
    pthread_mutex_lock(&state);
}

static void
after_fork_in_parent(void)
{
    pthread_mutex_unlock(&state);
    pthread_mutex_unlock(&callers);
}

static void
after_fork_in_child(void)
{
    pthread_mutex_init(&callers, NULL);
    pthread_mutex_init(&state, NULL);
    pthread_cond_init(&work_came, NULL);
    pthread_cond_init(&work_done, NULL);
    started = 0;
    current = NULL;
    atomic_store(&generation, 0);
    atomic_store(&busy, 0);
}

/* Brings the number of workers to threads - 1; the caller holds `callers`. */
static int
start_workers(int threads)
{
    static bool watching_fork;
    if (!watching_fork) {
        pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
        watching_fork = true;
    }
    if (started > threads - 1)
        stop_workers();
    while (started < threads - 1) {
        const intptr_t worker = started + 1;
        if (pthread_create(&workers[worker], NULL, worker_main, (void *)worker) != 0)
            break;
        started++;
    }
    return started + 1;
}

static lbq_status
run_on_pool(job *work)
{
    start_workers(lbq_threads());
    pthread_mutex_lock(&state);
    current = work;
    atomic_store(&busy, started);
    atomic_fetch_add(&generation, 1);
    pthread_cond_broadcast(&work_came);
    pthread_mutex_unlock(&state);

    run(work, 0);

    for (int spin = 0; spin < SPINS && atomic_load(&busy) > 0; spin++)
        relax();
    pthread_mutex_lock(&state);
    while (atomic_load(&busy) > 0)
        pthread_cond_wait(&work_done, &state);
    current = NULL;
    pthread_mutex_unlock(&state);
    return work->status == LBQ_OK ? LBQ_OK : lbq_fail(work->status, "%s", work->message);
}

static lbq_status
run_in_caller(ptrdiff_t count, lbq_task task, void *context)
{
    for (ptrdiff_t index = 0; index < count; index++)
        LBQ_TRY(task(context, index, 0));
    return LBQ_OK;
}

lbq_status
lbq_parallel(ptrdiff_t count, lbq_task task, void *context)
{
    if (count <= 1 || inside || lbq_threads() == 1 || pthread_mutex_trylock(&callers) != 0)
        return run_in_caller(count, task, context);
    job work = {.task = task, .context = context, .count = count};
    pthread_mutex_init(&work.failure, NULL);
    const lbq_status status = run_on_pool(&work);
    pthread_mutex_destroy(&work.failure);
    pthread_mutex_unlock(&callers);
    return status;
}

/* OpenBLAS with one thread never calls back, so a task may call it; its scratch memory is one
 * block per call under a lock of its own, so several tasks may. */
lbq_status
lbq_parallel_blas(ptrdiff_t count, lbq_task task, void *context)
{
    assert(!inside);
    job work = {.task = task, .context = context, .count = count};
    pthread_mutex_init(&work.failure, NULL);
    pthread_mutex_lock(&callers);
    BLAS(openblas_set_num_threads)(1);
    const lbq_status status = count <= 1 ? run_in_caller(count, task, context) : run_on_pool(&work);
    BLAS(openblas_set_num_threads)(lbq_threads());
    pthread_mutex_unlock(&callers);
    pthread_mutex_destroy(&work.failure);
    return status;
}

typedef struct {
    lbq_blas_job job;
    char *data;
    size_t size;
    int extra;
} blas_jobs;

static lbq_status
blas_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const blas_jobs *const jobs = context;
    jobs->job((int)index, jobs->data + (size_t)index * jobs->size, jobs->extra);
    return LBQ_OK;
}

/* OpenBLAS hands its jobs over here. Its jobs wait for one another, so unlike lbq_parallel this
 * waits for the pool rather than running them one by one. */
static void
blas_callback(int sync, lbq_blas_job blas_job, int jobs, size_t size, void *data, int extra)
{
    (void)sync;
    blas_jobs context = {.job = blas_job, .data = data, .size = size, .extra = extra};
    job work = {.task = blas_task, .context = &context, .count = jobs};
    pthread_mutex_init(&work.failure, NULL);
    pthread_mutex_lock(&callers);
    run_on_pool(&work);
    pthread_mutex_unlock(&callers);
    pthread_mutex_destroy(&work.failure);
}

int
lbq_cpus(void)
{
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        return CPU_COUNT(&set);
#endif
    const long count = sysconf(_SC_NPROCESSORS_ONLN);
    return count > 0 ? (int)count : 1;
}

int
lbq_threads(void)
{
    const int threads = atomic_load(&wanted);
    return threads ? threads : 1;
}

lbq_status
lbq_set_threads(int threads)
{
    LBQ_REQUIRE(threads >= 1 && threads <= MAX_THREADS,
                LBQ_BAD_VALUE,
                "threads is %d, expected 1 to %d",
                threads,
                MAX_THREADS);
    pthread_mutex_lock(&callers);
    const int got = start_workers(threads);
    atomic_store(&wanted, got);
    /* With one thread OpenBLAS keeps to the caller and never calls back. */
    if (BLAS(openblas_set_threads_callback_function))
        BLAS(openblas_set_threads_callback_function)(blas_callback);
    BLAS(openblas_set_num_threads)(got);
    pthread_mutex_unlock(&callers);
    LBQ_REQUIRE(
        got == threads, LBQ_NO_MEMORY, "the system let %d of %d threads start", got, threads);
    return LBQ_OK;
}
