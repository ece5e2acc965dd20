/* Ends a call early, for example on Ctrl-C.
 *
 * A caller that can be interrupted opens a watch with a function that says whether the call should
 * end. Long work calls LBQ_TRY(lbq_interrupted()) between pieces of at most some 50 ms;
 * lbq_parallel does so between tasks. A check takes a few nanoseconds: the watch calls its function
 * at most every 50 ms, on the thread that opened it, and the pool's workers see the answer. Once a
 * watch has ended, every check fails, so a task may return early with LBQ_OK: lbq_parallel fails
 * anyway. Without a watch nothing is interrupted. */
#ifndef LBQ_INTERRUPT_H
#define LBQ_INTERRUPT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"

typedef struct lbq_watch {
    bool (*ask)(struct lbq_watch *watch); /* whether the call should end */
    const void *owner;                    /* the thread that opened it */
    int64_t due;                          /* when to ask next */
    atomic_bool ended;
} lbq_watch;

/* Makes `watch` this thread's current watch; returns the previous one. */
lbq_watch *lbq_watch_open(lbq_watch *watch, bool (*ask)(lbq_watch *watch));
lbq_watch *lbq_watch_join(lbq_watch *watch); /* opened by another thread, or NULL for none */
lbq_watch *lbq_watch_joined(void);

/* LBQ_INTERRUPTED if the call should end. */
lbq_status lbq_interrupted(void);

#endif
