/* One kernel over chunks in parallel. */
#include "transformer/swiglu.h"

#include "core/threads.h"
#include "kernels/kernels.h"

enum { CHUNK = 1 << 15 }; /* 128 KiB per array: about 20 us */

typedef struct {
    ptrdiff_t count;
    const float *gate, *up;
    float *y;
} swiglu;

static lbq_status
swiglu_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const swiglu *const s = context;
    const ptrdiff_t at = index * CHUNK, left = s->count - at;
    lbq_kernel.swiglu_f32(s->gate + at, s->up + at, left < CHUNK ? left : CHUNK, s->y + at);
    return LBQ_OK;
}

lbq_status
lbq_swiglu(ptrdiff_t count, const float *gate, const float *up, float *y)
{
    swiglu s = {.count = count, .gate = gate, .up = up, .y = y};
    return lbq_parallel(lbq_pieces(count, CHUNK), swiglu_task, &s);
}
