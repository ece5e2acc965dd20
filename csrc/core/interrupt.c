/* The watch of each thread, and the clock that limits how often it asks. */
#include "core/interrupt.h"

#include <stddef.h>
#include <time.h>

enum { PERIOD = 50000000 /* nanoseconds */ };

static _Thread_local lbq_watch *joined;
static _Thread_local char self; /* its address identifies the thread */

/* The coarse clock lags by a few milliseconds but takes only 5 ns to read. */
static int64_t
nanoseconds(void)
{
#ifdef CLOCK_MONOTONIC_COARSE
    const clockid_t clock = CLOCK_MONOTONIC_COARSE;
#else
    const clockid_t clock = CLOCK_MONOTONIC;
#endif
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

lbq_watch *
lbq_watch_join(lbq_watch *watch)
{
    lbq_watch *const before = joined;
    joined = watch;
    return before;
}

lbq_watch *
lbq_watch_joined(void)
{
    return joined;
}

lbq_watch *
lbq_watch_open(lbq_watch *watch, bool (*ask)(lbq_watch *watch))
{
    watch->ask = ask;
    watch->owner = &self;
    watch->due = nanoseconds() + PERIOD;
    atomic_init(&watch->ended, false);
    return lbq_watch_join(watch);
}

lbq_status
lbq_interrupted(void)
{
    lbq_watch *const watch = joined;
    if (!watch)
        return LBQ_OK;
    if (!atomic_load_explicit(&watch->ended, memory_order_relaxed)) {
        if (watch->owner != &self || nanoseconds() < watch->due)
            return LBQ_OK;
        joined = NULL; /* calls made by ask() are not part of this one */
        const bool ended = watch->ask(watch);
        joined = watch;
        watch->due = nanoseconds() + PERIOD;
        if (!ended)
            return LBQ_OK;
        atomic_store(&watch->ended, true);
    }
    return lbq_fail(LBQ_INTERRUPTED, "interrupted");
}
