/* Aligned blocks on aligned_alloc, and the bump allocator of one call. */
#include "core/memory.h"

#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

lbq_status
lbq_allocate(size_t bytes, void *block)
{
    LBQ_REQUIRE(bytes <= SIZE_MAX - LBQ_ALIGNMENT, LBQ_NO_MEMORY, "%zu bytes are too many", bytes);
    void *memory = aligned_alloc(LBQ_ALIGNMENT, lbq_padded(bytes ? bytes : 1));
    LBQ_REQUIRE(memory, LBQ_NO_MEMORY, "cannot allocate %zu bytes", bytes);
    memcpy(block, &memory, sizeof memory); /* block is a pointer to any pointer type */
    return LBQ_OK;
}

void
lbq_free(void *block)
{
    free(block);
}

lbq_status
lbq_arena_open(lbq_arena *arena, size_t bytes)
{
    *arena = (lbq_arena){.size = bytes};
    return lbq_allocate(bytes, &arena->base);
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
    lbq_free(arena->base);
    arena->base = NULL;
}
