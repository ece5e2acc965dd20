/* Aligned blocks from aligned_alloc, and a bump allocator for one call.
 *
 * Arenas are opened and closed like stack frames, so each thread keeps one block for all that fit.
 * Decoding a token opens some two hundred, and separate blocks would cost 0.2 us each. */
#include "core/memory.h"

#include <assert.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* Enough for the layers of a 7B network and a few tokens; pages never touched cost no memory. 0
 * under sanitizers: they detect overruns only at the end of an allocation. */
#ifdef LBQ_SANITIZE
enum { STACK_BYTES = 0 };
#define HUGE_PAGE SIZE_MAX
#else
enum { STACK_BYTES = 1 << 20 };
#define HUGE_PAGE ((size_t)2 << 20) /* on x86, and on Arm with 4 KiB pages */
#endif

/* Weights stream from memory some 7 % faster with huge pages, which need fewer address
 * translations. An incomplete last page is left out: it would take more memory than requested. */
static void
ask_for_huge_pages(void *memory, size_t bytes)
{
#ifdef MADV_HUGEPAGE
    if (bytes >= HUGE_PAGE)
        madvise(memory, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE); /* only advice */
#else
    (void)memory, (void)bytes;
#endif
}

lbq_status
lbq_allocate(size_t bytes, void *block)
{
    const size_t unit = bytes < HUGE_PAGE ? LBQ_ALIGNMENT : HUGE_PAGE;
    LBQ_REQUIRE(bytes <= SIZE_MAX - unit, LBQ_NO_MEMORY, "%zu bytes are too many", bytes);
    const size_t units = bytes ? (bytes + unit - 1) / unit : 1;
    void *memory = aligned_alloc(unit, units * unit);
    LBQ_REQUIRE(memory, LBQ_NO_MEMORY, "cannot allocate %zu bytes", bytes);
    ask_for_huge_pages(memory, bytes);
    memcpy(block, &memory, sizeof memory); /* block is a pointer to any pointer type */
    return LBQ_OK;
}

void
lbq_free(void *block)
{
    free(block);
}

struct lbq_stack {
    size_t used; /* a multiple of LBQ_ALIGNMENT */
    _Alignas(LBQ_ALIGNMENT) char bytes[];
};

static pthread_once_t stacks_once = PTHREAD_ONCE_INIT;
static pthread_key_t stacks;
static int stacks_error;

static void
make_stacks(void)
{
    stacks_error = pthread_key_create(&stacks, lbq_free);
}

/* This thread's stack, freed when the thread ends; NULL if it cannot be allocated. */
static struct lbq_stack *
own_stack(void)
{
    pthread_once(&stacks_once, make_stacks);
    if (stacks_error)
        return NULL;
    struct lbq_stack *stack = pthread_getspecific(stacks);
    if (stack)
        return stack;
    stack = aligned_alloc(LBQ_ALIGNMENT, sizeof *stack + STACK_BYTES);
    if (!stack)
        return NULL;
    stack->used = 0;
    if (pthread_setspecific(stacks, stack) == 0)
        return stack;
    lbq_free(stack);
    return NULL;
}

lbq_status
lbq_arena_open(lbq_arena *arena, size_t bytes)
{
    struct lbq_stack *const stack = own_stack();
    *arena = (lbq_arena){.size = bytes};
    if (!stack || bytes > STACK_BYTES - stack->used)
        return lbq_allocate(bytes, &arena->base);
    arena->stack = stack;
    arena->base = stack->bytes + stack->used;
    stack->used += lbq_padded(bytes);
    return LBQ_OK;
}

void *
lbq_arena_take(lbq_arena *arena, size_t bytes)
{
    void *const block = arena->base + arena->used;
    arena->used += lbq_padded(bytes);
    assert(arena->used <= lbq_padded(arena->size));
    return block;
}

void
lbq_arena_close(lbq_arena *arena)
{
    if (arena->stack) {
        arena->stack->used -= lbq_padded(arena->size);
        assert(arena->base == arena->stack->bytes + arena->stack->used);
    } else {
        lbq_free(arena->base);
    }
    arena->base = NULL;
}
