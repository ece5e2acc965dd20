/* Outcome of a call: a code for the kind of failure and a message with the details.
 *
 * A function that can fail returns lbq_status. LBQ_REQUIRE rejects what a user can get wrong,
 * LBQ_TRY passes a failure on. The message belongs to the calling thread and lives until its next
 * failure. */
#ifndef LBQ_STATUS_H
#define LBQ_STATUS_H

typedef enum {
    LBQ_OK,
    LBQ_BAD_VALUE,
    LBQ_BAD_SHAPE,
    LBQ_NO_MEMORY,
    LBQ_NOT_POSITIVE_DEFINITE,
    LBQ_BAD_FORMAT,
    LBQ_INTERRUPTED,
} lbq_status;

/* Stores the printf-style message for this thread and returns `status`. */
lbq_status lbq_fail(lbq_status status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* The message of this thread's last failure; never NULL. */
const char *lbq_message(void);

#define LBQ_REQUIRE(condition, status, ...)                                                        \
    do {                                                                                           \
        if (!(condition))                                                                          \
            return lbq_fail((status), __VA_ARGS__);                                                \
    } while (0)

#define LBQ_TRY(call)                                                                              \
    do {                                                                                           \
        const lbq_status lbq_try_status = (call);                                                  \
        if (lbq_try_status != LBQ_OK)                                                              \
            return lbq_try_status;                                                                 \
    } while (0)

#endif
