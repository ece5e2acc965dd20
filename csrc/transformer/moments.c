/* Threads share the tokens; what is found of each token is added in the order of tokens, so results
 * depend neither on the threads nor on how a window was cut into batches. */
#include "transformer/moments.h"

#include "core/memory.h"
#include "core/threads.h"
#include "kernels/kernels.h"

enum { TOKENS = 32 /* of a task: a few microseconds for 576 columns */ };

typedef struct {
    ptrdiff_t above;
    float sum, largest;
} row;

typedef struct {
    ptrdiff_t tokens, cols;
    const float *x;
    float threshold;
    row *rows;
} job;

static lbq_status
moments_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const job *const j = context;
    const ptrdiff_t end = lbq_smaller((index + 1) * TOKENS, j->tokens);
    for (ptrdiff_t t = index * TOKENS; t < end; t++) {
        row *const r = j->rows + t;
        const float *const x = j->x + t * j->cols;
        r->above = lbq_kernel.moments_f32(x, j->cols, j->threshold, &r->sum, &r->largest);
    }
    return LBQ_OK;
}

lbq_status
lbq_moments_add(lbq_moments *moments, ptrdiff_t tokens, ptrdiff_t cols, const float *x)
{
    lbq_arena arena;
    job j = {.tokens = tokens, .cols = cols, .x = x, .threshold = (float)moments->threshold};
    LBQ_TRY(lbq_arena_open(&arena, lbq_padded((size_t)tokens * sizeof *j.rows)));
    j.rows = lbq_arena_take(&arena, (size_t)tokens * sizeof *j.rows);
    const lbq_status status = lbq_parallel(lbq_pieces(tokens, TOKENS), moments_task, &j);
    for (ptrdiff_t t = 0; status == LBQ_OK && t < tokens; t++) {
        const row *const r = j.rows + t;
        moments->count += (double)cols;
        moments->above += (double)r->above;
        moments->sum += (double)r->sum;
        if ((double)r->largest > moments->largest)
            moments->largest = (double)r->largest;
    }
    lbq_arena_close(&arena);
    return status;
}
