/* Memory: 64-byte aligned blocks, and an arena from which one call takes all of its scratch.
 *
 * An arena is sized before the work starts: LBQ_TRY(lbq_arena_open(&arena, bytes)) once, then
 * lbq_arena_take() as often as needed without a check, then lbq_arena_close(). Small arenas cost
 * nothing: they lie on a stack that the thread keeps, so they are closed in reverse order, by the
 * thread that opened them. */
#ifndef LBQ_MEMORY_H
#define LBQ_MEMORY_H

#include <stddef.h>

#include "core/status.h"

enum { LBQ_ALIGNMENT = 64 };

/* `bytes` rounded up to whole cache lines: what lbq_arena_take() uses up. */
static inline size_t
lbq_padded(size_t bytes)
{
    return (bytes + LBQ_ALIGNMENT - 1) / LBQ_ALIGNMENT * LBQ_ALIGNMENT;
}

/* A block of `bytes`, 64-byte aligned, contents undefined; LBQ_NO_MEMORY. Free with lbq_free. */
lbq_status lbq_allocate(size_t bytes, void *block);
void lbq_free(void *block);

typedef struct {
    char *base;
    size_t size, used;
    struct lbq_stack *stack; /* that holds it; NULL: a separate block */
} lbq_arena;

/* Contents are undefined; LBQ_NO_MEMORY. */
lbq_status lbq_arena_open(lbq_arena *arena, size_t bytes);
void *lbq_arena_take(lbq_arena *arena, size_t bytes);
void lbq_arena_close(lbq_arena *arena);

#endif
