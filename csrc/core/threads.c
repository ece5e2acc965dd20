/* One pool: the caller and threads - 1 workers take indices from an atomic counter.
 *
 * A parallel region is one atomic word that workers join and leave, so no lock is held while they
 * spin. The thread that takes the last index closes the region to workers that have not joined, and
 * the caller waits only for those that have: a worker that is not scheduled delays nobody. Waiting
 * threads spin for a few microseconds, since a decoder's next call comes soon, and then sleep.
 * After a fork the child has none of the parent's threads and starts its own at the next call. A
 * fork does not wait for the region, whose caller may be waiting for something that the forking
 * thread holds. */
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
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include "core/interrupt.h"

enum {
    MAX_THREADS = 256,
    /* A wait starts with pauses, then yields the processor, possibly to the very thread that it
     * waits for if there are more threads than free cores. The total is longer than a decoder's
     * work between two regions and shorter than a time slice. */
    PAUSE_NANOSECONDS = 3000,
    SPIN_NANOSECONDS = 30000,
};

typedef struct {
    lbq_task task;
    void *context;
    lbq_watch *watch; /* the caller's */
    int threads;      /* that may take part: the caller has scratch for them */
    ptrdiff_t count;
    atomic_ptrdiff_t next;
    ptrdiff_t failed_index; /* guarded by `failures`, as are the next two */
    lbq_status status;
    char message[256];
} job;

/* Bits of the region: the number of workers in it; whether more may join; whether all must end. */
enum { WORKERS = 0xff, OPEN = 0x100, STOP = 0x200 };

static pthread_mutex_t callers = PTHREAD_MUTEX_INITIALIZER; /* one region at a time */
static pthread_mutex_t failures = PTHREAD_MUTEX_INITIALIZER;
static atomic_uint region;
static job *current;        /* of the region; read only inside it */
static atomic_uint asleep;  /* workers that no longer spin but sleep until `region` changes */
static atomic_uint awaited; /* 1: the caller sleeps until the last worker has left */
static int started;         /* running workers */
static pthread_t workers[MAX_THREADS];
static atomic_int wanted;         /* threads requested; 0: not yet set */
static _Thread_local int settled; /* fixed result of lbq_threads(); 0: `wanted` */
static _Thread_local bool inside;

/* sleep_while: sleeps until wake() is called on the word, unless it no longer holds `value`; may
 * also wake spuriously. wake: wakes at least `count` sleepers. */
#ifdef __linux__
static void
sleep_while(atomic_uint *word, unsigned value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void
wake(atomic_uint *word, int count)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}
#else
static pthread_mutex_t sleep_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t sleep_condition = PTHREAD_COND_INITIALIZER;

static void
sleep_while(atomic_uint *word, unsigned value)
{
    pthread_mutex_lock(&sleep_mutex);
    if (atomic_load(word) == value)
        pthread_cond_wait(&sleep_condition, &sleep_mutex);
    pthread_mutex_unlock(&sleep_mutex);
}

static void
wake(atomic_uint *word, int count)
{
    (void)word, (void)count;
    pthread_mutex_lock(&sleep_mutex);
    pthread_cond_broadcast(&sleep_condition);
    pthread_mutex_unlock(&sleep_mutex);
}
#endif

static inline void
relax(void)
{
#ifdef LBQ_X86
    __builtin_ia32_pause();
#else
    sched_yield();
#endif
}

static inline int64_t
nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline bool
is_quiet(unsigned word)
{
    return !(word & (OPEN | STOP));
}

static inline bool
is_populated(unsigned word)
{
    return word & WORKERS;
}

/* Spins while such(region), but briefly: by the clock, since a pause takes 40 to 140 cycles. */
static inline void
spin_while(bool (*such)(unsigned))
{
    if (!such(atomic_load(&region)))
        return;
    const int64_t start = nanoseconds();
    int64_t now = start;
    for (; such(atomic_load(&region)) && now - start < SPIN_NANOSECONDS; now = nanoseconds())
        if (now - start < PAUSE_NANOSECONDS)
            relax();
        else
            sched_yield();
}

/* Records the failure with the lowest index; an interruption takes precedence. */
static void
note_failure(job *work, lbq_status status, ptrdiff_t index)
{
    pthread_mutex_lock(&failures);
    const bool first = work->status == LBQ_OK || index < work->failed_index;
    if (status == LBQ_INTERRUPTED || (first && work->status != LBQ_INTERRUPTED)) {
        work->status = status;
        work->failed_index = index;
        snprintf(work->message, sizeof work->message, "%s", lbq_message());
    }
    pthread_mutex_unlock(&failures);
}

static void
run(job *work, int worker)
{
    inside = true;
    for (ptrdiff_t index; (index = atomic_fetch_add(&work->next, 1)) < work->count;) {
        lbq_status status = lbq_interrupted();
        if (status != LBQ_OK)
            atomic_store(&work->next, work->count);
        if (status != LBQ_OK || index == work->count - 1)
            atomic_fetch_and(&region, ~(unsigned)OPEN);
        if (status == LBQ_OK)
            status = work->task(work->context, index, worker);
        if (status != LBQ_OK)
            note_failure(work, status, index);
    }
    inside = false;
}

static void *
worker_main(void *argument)
{
    const int worker = (int)(intptr_t)argument;
    for (;;) {
        spin_while(is_quiet);
        unsigned now = atomic_load(&region);
        if (is_quiet(now)) {
            /* `asleep` is written before the region is read; a caller does the reverse. */
            atomic_fetch_add(&asleep, 1);
            while (is_quiet(now = atomic_load(&region)))
                sleep_while(&region, now);
            atomic_fetch_sub(&asleep, 1);
        }
        if (now & STOP)
            return NULL;
        if (!atomic_compare_exchange_weak(&region, &now, now + 1))
            continue;
        if (worker < current->threads) {
            lbq_watch_join(current->watch);
            run(current, worker);
            lbq_watch_join(NULL);
        }
        now = atomic_fetch_sub(&region, 1) - 1;
        if (!is_populated(now) && atomic_exchange(&awaited, 0))
            wake(&awaited, 1);
    }
}

/* Ends all workers; the caller holds `callers`, so no work is in progress. */
static void
stop_workers(void)
{
    atomic_store(&region, STOP);
    wake(&region, MAX_THREADS);
    for (int i = 1; i <= started; i++)
        pthread_join(workers[i], NULL);
    started = 0;
    atomic_store(&region, 0);
}

static void
after_fork_in_child(void)
{
    pthread_mutex_init(&callers, NULL);
    pthread_mutex_init(&failures, NULL);
#ifndef __linux__
    pthread_mutex_init(&sleep_mutex, NULL);
    pthread_cond_init(&sleep_condition, NULL);
#endif
    started = 0;
    atomic_store(&region, 0);
    atomic_store(&asleep, 0);
    atomic_store(&awaited, 0);
}

/* Brings the number of workers to threads - 1; the caller holds `callers`. */
static int
start_workers(int threads)
{
    static bool watching_fork;
    if (!watching_fork) {
        pthread_atfork(NULL, NULL, after_fork_in_child);
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

/* The caller holds `callers`. */
static lbq_status
run_on_pool(job *work)
{
    assert(work->count >= 1);
    start_workers(atomic_load(&wanted));
    current = work;
    atomic_fetch_or(&region, OPEN);
    if (atomic_load(&asleep) > 0)
        wake(&region, work->count <= MAX_THREADS ? (int)work->count - 1 : MAX_THREADS);

    run(work, 0);

    spin_while(is_populated);
    while (is_populated(atomic_load(&region))) {
        atomic_store(&awaited, 1);
        if (is_populated(atomic_load(&region)))
            sleep_while(&awaited, 1);
    }
    return work->status == LBQ_OK ? LBQ_OK : lbq_fail(work->status, "%s", work->message);
}

static lbq_status
run_in_caller(ptrdiff_t count, lbq_task task, void *context)
{
    for (ptrdiff_t index = 0; index < count; index++) {
        LBQ_TRY(lbq_interrupted());
        LBQ_TRY(task(context, index, 0));
    }
    return LBQ_OK;
}

lbq_status
lbq_parallel(ptrdiff_t count, lbq_task task, void *context)
{
    if (count <= 1 || inside || lbq_threads() == 1 || pthread_mutex_trylock(&callers) != 0) {
        LBQ_TRY(run_in_caller(count, task, context));
        return lbq_interrupted();
    }
    job work = {
        .task = task,
        .context = context,
        .watch = lbq_watch_joined(),
        .threads = lbq_threads(),
        .count = count,
    };
    const lbq_status status = run_on_pool(&work);
    pthread_mutex_unlock(&callers);
    return status == LBQ_OK ? lbq_interrupted() : status;
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
    const int threads = settled ? settled : atomic_load(&wanted);
    return threads ? threads : 1;
}

int
lbq_settle_threads(int threads)
{
    const int before = settled;
    settled = threads;
    return before;
}

lbq_status
lbq_set_threads(int threads)
{
    LBQ_REQUIRE(threads >= 1 && threads <= MAX_THREADS,
                LBQ_BAD_VALUE,
                "threads is %d, expected 1 to %d",
                threads,
                MAX_THREADS);
    LBQ_REQUIRE(!inside, LBQ_BAD_VALUE, "the number of threads cannot change inside a computation");
    pthread_mutex_lock(&callers);
    const int got = start_workers(threads);
    atomic_store(&wanted, got);
    pthread_mutex_unlock(&callers);
    LBQ_REQUIRE(
        got == threads, LBQ_NO_MEMORY, "only %d of %d threads could be started", got, threads);
    return LBQ_OK;
}
